"""One layer and direction of any cell: checks, shape functions, autograd and the choice of backend."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, _extension, backends
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.functional.rnn import _onnx, _packed, _torch
from seqaccel.functional.rnn._cells import CELLS, CellSpec, Problem, saved_shapes
from seqaccel.reference import rnn as reference

Zoneout = float | Tensor | None
Weights = Sequence[Tensor | None]


def _operators(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "cpp":
        return torch.ops.seqaccel.rnn_forward.default, torch.ops.seqaccel.rnn_backward.default
    from seqaccel.kernels import rnn as kernels

    once(_register, "triton")
    return kernels.rnn_forward, kernels.rnn_backward


def _forward_fake(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save):
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
    reverse, needs,
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


def _bfloat16_fake(cell, input, h_0, c_0, weights, lengths, reverse):
    return _forward_fake(cell, input, h_0, c_0, weights, lengths, None, None, reverse, False)[:3]


def _called(cell: str, direction: str, operator: Callable[..., Any], *arguments: Any) -> Any:
    """``call``, under the cell's name in a profile."""
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"seqaccel::{cell}_{direction}"):
            return call(operator, cell, *arguments)
    return call(operator, cell, *arguments)


class _Layer(torch.autograd.Function):
    """Saves the input, the output and what ``saved_shapes`` lists, which a list ``kept`` takes too.
    ``batch_sizes``: of a packed input, else None.

    The output may be modified in place, as torch's layers allow (where ``csrc/autograd`` is there to notice): backward
    then calculates it again.
    """

    @staticmethod
    def forward(
        ctx, kept, cell, backend, reverse, batch_sizes, lengths, zoneout_h, zoneout_c, input, h_0, c_0, *weights
    ):  # fmt: skip
        arguments = (input, h_0, c_0, list(weights), lengths, zoneout_h, zoneout_c, reverse, True)
        output, h_n, c_n, saved = _called(cell, "forward", _operators(backend)[0], *arguments)
        if kept is not None:
            kept.extend(saved)
        ctx.batch_sizes, ctx.watch, own = batch_sizes, None, output
        if kept is None and _extension.autograd is not None and type(output) is Tensor and output.is_cpu:
            ctx.watch, own = _extension.autograd.watch(output), output.data
        ctx.save_for_backward(lengths, zoneout_h, zoneout_c, own, input, h_0, c_0, *weights, *saved)
        ctx.cell, ctx.backend, ctx.reverse, ctx.weights = cell, backend, reverse, len(weights)
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        cell, reverse = ctx.cell, ctx.reverse
        lengths, zoneout_h, zoneout_c, output, *rest = ctx.saved_tensors
        inputs, saved = rest[: 3 + ctx.weights], rest[3 + ctx.weights :]
        needs = ctx.needs_input_grad[8:]
        input, h_0, c_0, *weights = inputs
        if c_0 is None:
            grad_c_n = None
        if torch.is_grad_enabled() or _common.is_batched(grad_output, grad_h_n, grad_c_n):
            outer = (grad_output, grad_h_n, grad_c_n)[: 2 if c_0 is None else 3]
            return *[None] * 8, *differentiate_again(
                cell, reverse, inputs, outer, needs, ctx.batch_sizes, lengths, zoneout_h, zoneout_c
            )
        forward, backward = _operators(ctx.backend)
        shared = (input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c)
        if ctx.watch is not None and ctx.watch._version:
            output = _called(cell, "forward", forward, *shared, reverse, False)[0]
        grad_input, grad_h_0, grad_c_0, grad_weights = _called(
            cell, "backward", backward, grad_output, grad_h_n, grad_c_n, *shared, output, saved, reverse,
            [needs[0], *needs[3:]],
        )  # fmt: skip
        grads = (grad_input, grad_h_0, grad_c_0, *grad_weights)
        return *[None] * 8, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


def differentiate_again(
    cell, reverse, inputs, grad_outputs, needs, batch_sizes=None, lengths=None, zoneout_h=None, zoneout_c=None
):
    """Gradients of inputs (input, h_0, c_0, weights) by the reference: differentiable, and of batched ``grad_outputs``;
    csrc/autograd calls it too."""

    def again(input, h_0, c_0, *weights):
        definition = functools.partial(reference.layer, cell)
        arguments = (input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)
        outputs = _on_padded(definition, batch_sizes, *arguments)
        return outputs if c_0 is not None else outputs[:2]

    return _common.differentiable_backward(again, inputs, grad_outputs, needs)


# ---- the operators' facts ----


def _definition(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save=False):
    """output, h_n and c_n, empty where the cell has none; input may be packed."""
    sizes = _packed.batch_sizes_of(lengths) if input.dim() == 2 else None
    definition = functools.partial(reference.layer, cell)
    output, h_n, c_n = _on_padded(
        definition, sizes, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse
    )  # fmt: skip
    return output, h_n, input.new_empty(0) if c_n is None else c_n


def _recorded(backend, cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save):
    kept: list[Tensor] = []
    sizes = _packed.batch_sizes_of(lengths) if input.dim() == 2 else None
    results = _Layer.apply(
        kept, cell, backend, reverse, sizes, lengths, zoneout_h, zoneout_c, input, h_0, c_0, *weights
    )  # fmt: skip
    return *results, kept if save else []


def _bfloat16_definition(cell, input, h_0, c_0, weights, lengths, reverse):
    return _definition(cell, input, h_0, c_0, weights, lengths, None, None, reverse)


def _bfloat16_recorded(cell, input, h_0, c_0, weights, lengths, reverse):
    """In float32, as the public function trains."""
    input, h_0, c_0, *weights = (None if t is None else t.float() for t in (input, h_0, c_0, *weights))
    results = _recorded("cpp", cell, input, h_0, c_0, weights, lengths, None, None, reverse, False)
    return tuple(t.bfloat16() for t in results[:3])


def _forward_flops(cell, input, h_0, c_0, weights, *_) -> int:
    """Those of the products."""
    rows = math.prod(input[:-1])
    return 2 * rows * sum(math.prod(weight) for weight in weights if weight is not None and len(weight) == 2)


def _backward_flops(cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, *rest) -> int:
    forward, needs = _forward_flops(cell, input, h_0, c_0, weights), rest[-1]
    of_weights = _forward_flops(
        cell, input, h_0, c_0, [weight if need else None for weight, need in zip(weights, needs[1:], strict=True)]
    )
    return forward + of_weights - (0 if needs[0] else 2 * math.prod(input[:-1]) * math.prod(weights[0]))


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    named: dict[str | int, int] = {"input": 1, "h_0": 0, "c_0": 0, "lengths": 0, "zoneout_h": 1, "zoneout_c": 1}
    register(
        Operator(
            "rnn_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=named | {0: 1, 1: 0, 2: 0, 3: 1},
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
        batch={"input": 1, "h_0": 0, "c_0": 0, "lengths": 0, 0: 1, 1: 0, 2: 0},
        autocast=torch.bfloat16,
    )
)


def _on_padded(function, batch_sizes, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse):
    """``function`` of a layer's padded arguments, on packed ones if there are ``batch_sizes``."""
    if batch_sizes is not None:
        pad = functools.partial(_packed.pad, batch_sizes=batch_sizes, lengths=lengths)
        input = pad(input)
        zoneout_h, zoneout_c = (
            pad(z) if isinstance(z, Tensor) and z.numel() != 1 else z for z in (zoneout_h, zoneout_c)
        )
    output, *last = function(input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)
    return output if batch_sizes is None else _packed.pack(output, batch_sizes, lengths), *last


# ---- checks ----


_STATES = (("h_0", "BP"), ("c_0", "BH"))


def _refuse_others(name: str, cell: str, input: Any, h_0: Any, c_0: Any, weights: Sequence[Any]) -> None:
    """Of arguments that are not all tensors, or None where they may be."""
    spec = CELLS[cell]
    keys = ("input", *(key for key, _ in _STATES), *spec.weights)
    for key, value in zip(keys, (input, h_0, c_0, *weights), strict=True):
        _arguments.tensor(name, key, value, optional=key in (*spec.optional, "h_0", "c_0"))


@_common.unrecorded
def _check(
    name: str, cell: str, input: Tensor, batch: int | None, h_0: Tensor, c_0: Tensor | None, weights: Weights
) -> None:
    """``batch``: sequences of a packed input, else None."""
    spec = CELLS[cell]
    gates, weight_hh = spec.gates, weights[1]
    if batch is None and input.dim() != 3:
        raise ValueError(f"{name}: expected input to have 3 dimensions (T, B, I), but got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"{name}: expected input to be floating point, but got {input.dtype}")
    if weight_hh is None or weight_hh.dim() != 2 or weight_hh.shape[0] % gates or weight_hh.shape[0] == 0:
        rows = "H" if gates == 1 else f"{gates} * H"
        found = None if weight_hh is None else tuple(weight_hh.shape)
        raise ValueError(f"{name}: expected weight_hh to have shape ({rows}, H), but got {found}")
    B, I = input.shape[1] if batch is None else batch, input.shape[-1]
    G, P = weight_hh.shape
    H = G // gates
    if spec.projects:
        projection = weights[4]
        if projection is not None and (projection.dim() != 2 or projection.shape[1] != H):
            raise ValueError(f"{name}: expected weight_hr to have shape (P, {H}), but got {tuple(projection.shape)}")
        P = H if projection is None else projection.shape[0]
    else:
        P = H
    shapes = {"GI": (G, I), "GP": (G, P), "G": (G,), "BP": (B, P), "BH": (B, H), "PH": (P, H), "H": (H,)}
    dtype, device = input.dtype, input.device
    for tensor, (key, letters) in zip((h_0, c_0, *weights), (*_STATES, *spec.weights.items()), strict=True):
        if tensor is None:
            if key in spec.optional or (key == "c_0" and not spec.has_cell_state):
                continue
            raise TypeError(f"{name}: expected {key} to be a tensor, but got None")
        wanted = shapes.get(letters) or tuple({"3": 3, "H": H, "I": I}[letter] for letter in letters)
        if tensor.shape != wanted:
            raise ValueError(f"{name}: expected {key} to have shape {wanted}, but got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {key} to have the dtype of input, {dtype}, but got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, "
                f"but input is on {device} and {key} is on {tensor.device}"
            )


@_common.unrecorded
def _check_lengths(name: str, lengths: Tensor, steps: int, batch: int) -> None:
    _arguments.tensor(name, "lengths", lengths)
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"{name}: expected lengths to be torch.int64 of shape ({batch},), "
            f"but got {lengths.dtype} of {tuple(lengths.shape)}"
        )
    if _common.transforms_active() or _onnx.exporting() or not batch:
        return
    if torch.compiler.is_compiling() or lengths.device.type != "cpu":  # which nothing waits for
        message = f"{name}: expected lengths to be between 1 and the number of steps"
        torch._assert_async(((lengths >= 1) & (lengths <= steps)).all(), message)
    else:
        shortest, longest = (int(bound) for bound in lengths.aminmax())
        if shortest < 1 or longest > steps:
            raise ValueError(
                f"{name}: expected lengths to be between 1 and {steps}, but they range from {shortest} to {longest}"
            )


def _on_device(lengths: Tensor, device: torch.device) -> Tensor:
    """Copied to a GPU from pinned memory, so that nothing waits for it."""
    if device.type != "cuda" or not lengths.is_cpu or torch.compiler.is_compiling():
        return lengths.to(device)
    return lengths.pin_memory().to(device, non_blocking=True)


def _factors(name: str, key: str, zoneout: Zoneout, input: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
    """Blend factors as the operators take them: (T, B, width), or of packed rows (N, width), or one for all."""
    if zoneout is None:
        return None
    if not isinstance(zoneout, Tensor):
        _arguments.probability(name, key, zoneout)
        return torch.full((1,), float(zoneout), dtype=dtype, device=input.device)
    shape = (*input.shape[:-1], width)
    if zoneout.numel() == 1:
        zoneout = zoneout.reshape(1)
    elif tuple(zoneout.shape) != shape:
        raise ValueError(f"{name}: expected {key} to be a number or of shape {shape}, but got {tuple(zoneout.shape)}")
    return zoneout.detach().to(input.device, dtype)


def _supported(spec: CellSpec, projected: bool, zoneout: bool) -> tuple[str, ...]:
    left_out = (spec.without_projection if projected else ()) + (spec.without_zoneout if zoneout else ())
    return tuple(backend for backend in spec.backends if backend not in left_out)


# ---- the call ----

#: ``_Layer.apply`` without what ``Function`` does for functorch.
_apply_plainly = super(torch.autograd.Function, _Layer).apply


def is_plain(cell: str, input: Tensor) -> bool:
    """Whether ``layer`` of an input in steps, without lengths and zoneout, comes down to ``plain_layer``."""
    return (
        not torch.compiler.is_compiling()
        and input.is_cpu
        and (input.dtype is torch.float32 or input.dtype is torch.float64)
        and backends.current() in ("auto", "cpp")
        and _extension.cpp_error is None
        and not _common.autocast_on("cpu")
        and not _common.transforms_active()
        and not _onnx.exporting()
        and not torch.jit.is_tracing()
    )


def run_at_once(
    cell: str, input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights, reverse: bool
) -> list[Tensor] | None:
    """``layer`` of an input in steps, without lengths and zoneout, where C++ takes all of it and autograd: output,
    h_n (1, B, P) and c_n (1, B, H) if the cell has it. None where something is in the way or does not fit."""
    if torch.compiler.is_dynamo_compiling() or _extension.autograd is None or backends.asked() not in ("auto", "cpp"):
        return None
    spec = CELLS[cell]
    try:
        return _extension.autograd.layer(cell, input, h_0, c_0, weights, reverse, spec.gates, spec.has_cell_state)
    except RuntimeError:
        return None


def plain_layer(
    cell: str, input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Weights, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """``layer`` in the fewest steps of Python, which take as long as a small problem; None where something does not
    fit, for ``layer`` to say what. h_n is (1, B, P), c_n (1, B, H)."""
    spec = CELLS[cell]
    has_c = spec.has_cell_state
    done = run_at_once(cell, input, h_0, c_0, weights, reverse)
    if done is not None:
        return done[0], done[1], done[2] if has_c else None
    try:
        if any(t is not None and t.device != input.device for t in (input, h_0, c_0, *weights)):
            return None
        weight_hh: Any = weights[1]
        if h_0 is None:
            batch = input.shape[1]
            h_0 = input.new_zeros(batch, weight_hh.shape[1])
            c_0 = input.new_zeros(batch, weight_hh.shape[0] // spec.gates) if has_c else None
        if torch.is_grad_enabled() and (weight_hh.requires_grad or _common.needs_grad(input, h_0, c_0, *weights)):
            found = _apply_plainly(None, cell, "cpp", reverse, None, None, None, None, input, h_0, c_0, *weights)
        else:
            arguments = (input, h_0, c_0, weights, None, None, None, reverse, False)
            found = _called(cell, "forward", torch.ops.seqaccel.rnn_forward.default, *arguments)
    except (RuntimeError, AttributeError, IndexError, TypeError):
        return None
    # Not views, which may not be detached in place.
    return found[0], torch.stack((found[1],)), torch.stack((found[2],)) if has_c else None


def layer(
    name: str,
    cell: str,
    input: Tensor,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Weights,
    *,
    lengths: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    zoneout_h: Zoneout = None,
    zoneout_c: Zoneout = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """output (T, B, P), h_n (B, P) and, where the cell has it, c_n (B, H); ``name`` is the public function's.

    A state that is None is zero. Zoneout is None, a number, or blend factors. With ``batch_sizes``, input and output
    are the rows of packed sequences, (N, ·), and lengths are longest first.
    """
    for t in (input, weights[0], weights[1]):
        if not isinstance(t, Tensor):
            _refuse_others(name, cell, input, h_0, c_0, weights)
    for t in (h_0, c_0, *weights):
        if t is not None and not isinstance(t, Tensor):
            _refuse_others(name, cell, input, h_0, c_0, weights)
    if type(reverse) is not bool:
        _arguments.flag(name, "reverse", reverse)
        reverse = bool(reverse)
    spec, carried = CELLS[cell], (c_0 if c_0 is not None else input if h_0 is None else h_0).dtype
    weight_hh, projection = weights[1], weights[4] if spec.projects else None
    if h_0 is None and weight_hh is not None:
        hidden = weight_hh.shape[0] // spec.gates
        if batch_sizes is not None:
            batch = lengths.shape[0]  # type: ignore[union-attr]
        else:
            batch = input.shape[1] if input.dim() == 3 else 0
        h_0 = weight_hh.new_zeros(batch, hidden if projection is None else projection.shape[0])
        c_0 = weight_hh.new_zeros(batch, hidden) if spec.has_cell_state else None
    input, h_0, c_0, *weights = _common.autocast(input, h_0, c_0, *weights)  # type: ignore[assignment]
    _check(name, cell, input, None if batch_sizes is None else lengths.shape[0], h_0, c_0, weights)  # type: ignore
    if lengths is not None and batch_sizes is None:
        _check_lengths(name, lengths, input.shape[0], input.shape[1])
    if not isinstance(zoneout_h, Tensor) and zoneout_h == 0:
        zoneout_h = None
    if not isinstance(zoneout_c, Tensor) and zoneout_c == 0:
        zoneout_c = None
    found = _run(cell, batch_sizes, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)  # type: ignore
    if input.device.type == "cpu" and carried != input.dtype and _common.autocast_on("cpu"):
        # What autocast leaves of the state's dtype in torch.nn's layers on a CPU.
        output, h_n, c_n = found
        carried = torch.promote_types(carried, output.dtype)
        if spec.gates == 3:
            output, h_n = output.to(carried), h_n.to(carried)
        elif projection is not None:
            c_n = None if c_n is None else c_n.to(carried)
        return output, h_n, c_n
    return found


def _is_one_call_of_torch(problem: Problem) -> bool:
    """Whether torch's operator, if it is chosen, stays one call: what compiles may unroll its steps."""
    if not torch.compiler.is_compiling():
        return True
    if problem.device.type == "cpu":  # oneDNN's backward pass cannot be traced
        return False
    return not problem.ragged and _torch.is_opaque(problem.device, problem.dtype)


def _choose(cell: str, input: Tensor, problem: Problem, zoned: bool) -> str:
    """The backend of a layer."""
    spec = CELLS[cell]
    prefer = None
    device_type = problem.device.type
    if device_type == "cuda" and problem.dtype == torch.float64:  # our kernels have none
        prefer = "torch" if "torch" in spec.backends and not zoned else "reference"
    elif spec.torch_is_faster is not None and _is_one_call_of_torch(problem):
        prefer = "torch" if spec.torch_is_faster(problem) else None
    supported = _supported(spec, problem.projected, zoned) if problem.projected or zoned else spec.backends
    return backends.choose(cell, input, supported, prefer=prefer)


def torch_runs_all_layers(
    cell: str, input: Tensor, batch_sizes: Tensor | None, hidden_size: int, projected: bool
) -> bool:
    """Whether torch's operator serves on a GPU, where it takes the layers of a module, and its weights, as a whole.

    A layer of them at a time it would copy the weights at each call. Where torch.jit traces, it is one node.
    """
    if "torch" not in CELLS[cell].backends:
        return False
    if torch.jit.is_tracing() and backends.current() in ("auto", "torch"):
        return True
    if input.device.type != "cuda":
        return False
    if _common.transforms_active() or _onnx.exporting():
        return False
    dtype = input.dtype
    if torch.compiler.is_compiling() and (
        batch_sizes is not None or _common.autocast_on("cuda") or not _torch.is_opaque(input.device, dtype)
    ):
        return False
    if _common.autocast_on("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        if dtype != torch.float16:  # torch's autocast of these operators knows float16 only
            return False
    steps, batch = input.shape[:2] if batch_sizes is None else (len(batch_sizes), int(batch_sizes[0]))
    problem = Problem(input.device, steps, batch, input.shape[-1], hidden_size, dtype, False, False, projected)
    return _choose(cell, input, problem, False) == "torch"


def _run(
    cell: str,
    batch_sizes: Tensor | None,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: Weights,
    lengths: Tensor | None,
    zoneout_h: Zoneout,
    zoneout_c: Zoneout,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``layer`` with arguments that fit together."""
    exporting = _onnx.exporting()
    if exporting and _onnx.is_operator(cell, zoneout_h, zoneout_c):
        first_c = None if c_0 is None else c_0[None]
        output, h_n, c_n = _onnx.layer(cell, input, h_0[None], first_c, [weights], lengths, reverse)
        return output, h_n[0], None if c_n is None else c_n[0]
    spec = CELLS[cell]
    steps, batch = input.shape[0] if batch_sizes is None else batch_sizes.shape[0], h_0.shape[0]
    hidden = weights[1].shape[0] // spec.gates  # type: ignore[union-attr]
    recorded = _common.needs_grad(input, h_0, c_0, *weights)
    projected = spec.projects and weights[4] is not None
    problem = Problem(
        input.device, steps, batch, input.shape[-1], hidden, input.dtype, lengths is not None, recorded, projected
    )
    zoned = zoneout_h is not None or zoneout_c is not None
    backend = _choose(cell, input, problem, zoned)
    if exporting or _common.transforms_active():
        backend = "reference"
    narrow = backend == "cpp" and input.dtype == torch.bfloat16 and not recorded
    if batch_sizes is not None and (backend != "cpp" or narrow):
        arguments = (input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)
        return _on_padded(functools.partial(_run, cell, None), batch_sizes, *arguments)
    if backend == "torch":
        return _torch.layer(cell, input, h_0, c_0, list(weights), lengths, reverse)
    dtype = input.dtype
    compute = _common.compute_dtype(dtype) if backend == "cpp" else dtype
    factors_h = _factors(cell, "zoneout of h", zoneout_h, input, h_0.shape[1], compute)
    factors_c = _factors(cell, "zoneout of c", zoneout_c, input, hidden, compute) if spec.has_cell_state else None
    if lengths is not None:
        lengths = _on_device(lengths, input.device)
    if backend == "reference":
        definition = _onnx.scanned_layer if exporting else reference.layer
        return definition(cell, input, h_0, c_0, weights, lengths, factors_h, factors_c, reverse)
    if narrow and factors_h is None and factors_c is None:
        narrow_forward = torch.ops.seqaccel.rnn_forward_bfloat16.default
        narrow_operands = (input, h_0, c_0, list(weights), lengths, reverse)
        # While compiling autograd records the operator itself.
        if torch.compiler.is_compiling():
            output, h_n, c_n = narrow_forward(cell, *narrow_operands)
        else:
            output, h_n, c_n = _called(cell, "forward", narrow_forward, *narrow_operands)
        return output, h_n, c_n if spec.has_cell_state else None
    tensors = [input, h_0, c_0, *weights]
    if dtype != compute:
        tensors = [None if t is None else t.to(compute) for t in tensors]
    input, h_0, c_0, *weights = tensors  # type: ignore[assignment]
    operands = (input, h_0, c_0, list(weights), lengths, factors_h, factors_c, reverse, False)
    if torch.compiler.is_compiling():
        output, h_n, c_n, _ = _operators(backend)[0](cell, *operands)
    elif recorded:
        output, h_n, c_n = _Layer.apply(
            None, cell, backend, reverse, batch_sizes, lengths, factors_h, factors_c, *tensors
        )  # fmt: skip
    else:
        output, h_n, c_n, _ = _called(cell, "forward", _operators(backend)[0], *operands)
    if dtype != compute:
        output, h_n, c_n = output.to(dtype), h_n.to(dtype), c_n.to(dtype)
    return output, h_n, c_n if spec.has_cell_state else None


def torch_step_is_faster(cell: str, input: Tensor, hidden_size: int) -> bool:
    """Whether ``auto`` takes torch's operator of a single step for input (B, I): see ``CellSpec.torch_steps``."""
    if torch.jit.is_tracing():
        return backends.current() in ("auto", "torch")
    return (
        not torch.compiler.is_compiling()  # first: a graph must not depend on the batch
        and 0 < input.shape[0] * hidden_size <= CELLS[cell].torch_steps
        and not torch.is_grad_enabled()
        and not _common.transforms_active()
        and input.device.type == "cpu"
        and backends.current() == "auto"
    )
