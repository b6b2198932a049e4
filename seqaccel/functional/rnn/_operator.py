"""The operators of one layer and direction: their facts (``_registration``), and autograd around them."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel import _common, _extension
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.functional.rnn import _packed
from seqaccel.functional.rnn._cells import CELLS, saved_shapes
from seqaccel.reference import rnn as reference


def operators(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "cpp":
        return torch.ops.seqaccel.rnn_forward.default, torch.ops.seqaccel.rnn_backward.default
    from seqaccel.kernels import rnn as kernels

    once(_register, "triton")
    return kernels.rnn_forward, kernels.rnn_backward


def _forward_fake(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save, reset=None):
    lead, B = input.shape[:-1], h_0.shape[0]
    P, H = weights[1].shape[1], weights[1].shape[0] // CELLS[cell].gates
    return (
        input.new_empty((*lead, P)),
        input.new_empty((B, P)),
        input.new_empty((B, H) if c_0 is not None else (0,)),
        [input.new_empty(shape) for shape in saved_shapes(cell, lead, H)] if save else [],
    )


def _backward_fake(
    cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, output, saved,
    reverse, needs, reset=None,
):  # fmt: skip
    return (
        input.new_empty(input.shape if needs[0] else (0,)),
        input.new_empty(h_0.shape),
        input.new_empty(c_0.shape if c_0 is not None else (0,)),
        [
            input.new_empty(weight.shape if need and weight is not None else (0,))
            for weight, need in zip(weights, needs[1:], strict=True)
        ],
    )


def _bfloat16_fake(cell, input, h_0, c_0, weights, lengths, reverse, reset=None):
    return _forward_fake(cell, input, h_0, c_0, weights, lengths, None, None, reverse, False)[:3]


def called(cell: str, direction: str, operator: Callable[..., Any], *arguments: Any) -> Any:
    """``call``, under the cell's name in a profile."""
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"seqaccel::{cell}_{direction}"):
            return call(operator, cell, *arguments)
    return call(operator, cell, *arguments)


class Layer(torch.autograd.Function):
    """Saves the input, the output and what ``saved_shapes`` lists, which a list ``kept`` takes too.
    ``batch_sizes``: of a packed input, else None.

    The output may be modified in place, as torch's layers allow (where ``csrc/autograd`` is there to notice): backward
    then calculates it again.
    """

    @staticmethod
    def forward(
        ctx, kept, cell, backend, reverse, batch_sizes, lengths, reset, zoneout_h, zoneout_c, input, h_0, c_0, *weights
    ):  # fmt: skip
        arguments = (input, h_0, c_0, list(weights), lengths, zoneout_h, zoneout_c, reverse, True, reset)
        output, h_n, c_n, saved = called(cell, "forward", operators(backend)[0], *arguments)
        if kept is not None:
            kept.extend(saved)
        ctx.batch_sizes, ctx.watch, own = batch_sizes, None, output
        if kept is None and _extension.autograd is not None and type(output) is Tensor and output.is_cpu:
            ctx.watch, own = _extension.autograd.watch(output), output.data
        ctx.save_for_backward(lengths, reset, zoneout_h, zoneout_c, own, input, h_0, c_0, *weights, *saved)
        ctx.cell, ctx.backend, ctx.reverse, ctx.weights = cell, backend, reverse, len(weights)
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        cell, reverse = ctx.cell, ctx.reverse
        lengths, reset, zoneout_h, zoneout_c, output, *rest = ctx.saved_tensors
        inputs, saved = rest[: 3 + ctx.weights], rest[3 + ctx.weights :]
        needs = ctx.needs_input_grad[9:]
        input, h_0, c_0, *weights = inputs
        if c_0 is None:
            grad_c_n = None
        if torch.is_grad_enabled() or _common.is_batched(grad_output, grad_h_n, grad_c_n):
            outer = (grad_output, grad_h_n, grad_c_n)[: 2 if c_0 is None else 3]
            return *[None] * 9, *differentiate_again(
                cell, reverse, inputs, outer, needs, ctx.batch_sizes, lengths, zoneout_h, zoneout_c, reset
            )
        forward, backward = operators(ctx.backend)
        shared = (input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c)
        if ctx.watch is not None and ctx.watch._version:
            output = called(cell, "forward", forward, *shared, reverse, False, reset)[0]
        grad_input, grad_h_0, grad_c_0, grad_weights = called(
            cell, "backward", backward, grad_output, grad_h_n, grad_c_n, *shared, output, saved, reverse,
            [needs[0], *needs[3:]], reset,
        )  # fmt: skip
        grads = (grad_input, grad_h_0, grad_c_0, *grad_weights)
        return *[None] * 9, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


def differentiate_again(
    cell, reverse, inputs, grad_outputs, needs, batch_sizes=None, lengths=None, zoneout_h=None, zoneout_c=None,
    reset=None,
):  # fmt: skip
    """Gradients of inputs (input, h_0, c_0, weights) by the reference: differentiable, and of batched ``grad_outputs``;
    csrc/autograd calls it too."""

    def again(input, h_0, c_0, *weights):
        definition = functools.partial(reference.layer, cell, reset=reset)
        arguments = (input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)
        outputs = on_padded(definition, batch_sizes, *arguments)
        return outputs if c_0 is not None else outputs[:2]

    return _common.differentiable_backward(again, inputs, grad_outputs, needs)


# ---- the operators' facts ----


def _definition(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save=False, reset=None):
    """output, h_n and c_n, empty where the cell has none; input may be packed."""
    sizes = _packed.batch_sizes_of(lengths) if input.dim() == 2 else None
    definition = functools.partial(reference.layer, cell, reset=reset)
    output, h_n, c_n = on_padded(
        definition, sizes, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse
    )  # fmt: skip
    return output, h_n, input.new_empty(0) if c_n is None else c_n


def _recorded(backend, cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save, reset=None):
    kept: list[Tensor] = []
    sizes = _packed.batch_sizes_of(lengths) if input.dim() == 2 else None
    results = Layer.apply(
        kept, cell, backend, reverse, sizes, lengths, reset, zoneout_h, zoneout_c, input, h_0, c_0, *weights
    )  # fmt: skip
    return *results, kept if save else []


def _bfloat16_definition(cell, input, h_0, c_0, weights, lengths, reverse, reset=None):
    return _definition(cell, input, h_0, c_0, weights, lengths, None, None, reverse, reset=reset)


def _bfloat16_recorded(cell, input, h_0, c_0, weights, lengths, reverse, reset=None):
    """In float32, as the public function trains."""
    input, h_0, c_0, *weights = (None if t is None else t.float() for t in (input, h_0, c_0, *weights))
    results = _recorded("cpp", cell, input, h_0, c_0, weights, lengths, None, None, reverse, False, reset)
    return tuple(t.bfloat16() for t in results[:3])


def _forward_flops(cell, input, h_0, c_0, weights, *_) -> int:
    """Those of the products."""
    rows = math.prod(input[:-1])
    return 2 * rows * sum(math.prod(weight) for weight in weights if weight is not None and len(weight) == 2)


def _backward_flops(
    cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, output, saved,
    reverse, needs, reset=None,
) -> int:  # fmt: skip
    forward = _forward_flops(cell, input, h_0, c_0, weights)
    of_weights = _forward_flops(
        cell, input, h_0, c_0, [weight if need else None for weight, need in zip(weights, needs[1:], strict=True)]
    )
    of_input = 0 if needs[0] or weights[0] is None else 2 * math.prod(input[:-1]) * math.prod(weights[0])
    return forward + of_weights - of_input


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    named: dict[str | int, int] = {"input": 1, "h_0": 0, "c_0": 0, "lengths": 0, "zoneout_h": 1, "zoneout_c": 1}
    named["reset"] = 1
    register(
        Operator(
            "rnn_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=named | {0: 1, 1: 0, 2: 0, 3: 1},
            packs=("input", 2),
            autocast=autocast,
        )
    )
    of_grads: dict[str | int, int] = {"grad_output": 1, "grad_h_n": 0, "grad_c_n": 0, "output": 1, "saved": 1}
    register(
        Operator(
            "rnn_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch=named | of_grads | {0: 1, 1: 0, 2: 0},
            summed=(3,),
            packs=("input", 2),
            autocast=autocast,
        )
    )


_register("cpp")
register(
    Operator(
        "rnn_forward_bfloat16",
        _bfloat16_fake,
        _forward_flops,
        definition=_bfloat16_definition,
        recorded=_bfloat16_recorded,
        batch={"input": 1, "h_0": 0, "c_0": 0, "lengths": 0, "reset": 1, 0: 1, 1: 0, 2: 0},
        autocast=torch.bfloat16,
    )
)


def on_padded(function, batch_sizes, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse):
    """``function`` of a layer's padded arguments, on packed ones if there are ``batch_sizes``."""
    if batch_sizes is not None:
        pad = functools.partial(_packed.pad, batch_sizes=batch_sizes, lengths=lengths)
        input = pad(input)
        zoneout_h, zoneout_c = (
            pad(z) if isinstance(z, Tensor) and z.numel() != 1 else z for z in (zoneout_h, zoneout_c)
        )
    output, *last = function(input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)
    return output if batch_sizes is None else _packed.pack(output, batch_sizes, lengths), *last
