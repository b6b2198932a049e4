"""A WaveNet layer: the public call, its checks, autograd and choice of backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.functional.conv import _checks
from seqaccel.functional.conv._causal_conv1d import causal_conv1d
from seqaccel.reference import conv as reference

__all__ = ["wavenet_layer"]

NAME = "wavenet_layer"
BACKENDS = ("reference", "cpp", "triton", "torch")

#: Which tensor argument of the forward operator is ``skip``. Its gradient is that of the result, and its value is not
#: saved. The others' gradients are the results of the backward operator, in their order, and ``wants`` has a bit for
#: each.
_SKIP = 5


def _definition(
    x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history, reset, dilation, residual,
    save=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, next_skip = reference.wavenet_layer(
        x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history, reset,
        dilation=dilation,
    )  # fmt: skip
    return y if residual else y.new_empty(0), next_skip


class _WaveNetLayer(torch.autograd.Function):
    """Saves the operands but ``skip``, and tanh and sigmoid of the gates, which a list ``kept`` takes."""

    @staticmethod
    def forward(
        ctx, x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history, reset, backend,
        dilation, residual, kept=None,
    ):  # fmt: skip
        operands = (x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history)
        y, next_skip, saved = call(_operators(backend)[0], *operands, reset, dilation, residual, True)
        if kept is not None:
            kept.append(saved)
        ctx.save_for_backward(*(t for i, t in enumerate(operands) if i != _SKIP), reset, saved)
        ctx.options, ctx.backend = (dilation, residual), backend
        ctx.set_materialize_grads(False)
        return y, next_skip

    @staticmethod
    def backward(ctx, grad_y, grad_skip):
        *operands, reset, saved = ctx.saved_tensors
        needs, needs_skip = list(ctx.needs_input_grad[:9]), ctx.needs_input_grad[_SKIP]
        del needs[_SKIP]
        dilation, residual = ctx.options
        if not residual:
            grad_y = None
        if torch.is_grad_enabled():

            def definition(*tensors):
                return _definition(*tensors[:_SKIP], None, *tensors[_SKIP:], reset, *ctx.options)

            grads = _common.differentiable_backward(definition, operands, (grad_y, grad_skip), needs)
        elif grad_y is None and grad_skip is None:
            grads = [None] * len(needs)
        else:
            x, weight, _, output_weight, *_, history = operands
            found = call(
                _operators(ctx.backend)[1],
                grad_y, grad_skip, saved, x, weight, output_weight, history, reset, dilation,
                sum(1 << i for i, need in enumerate(needs) if need),
            )  # fmt: skip
            grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
        return (*grads[:_SKIP], grad_skip if needs_skip else None, *grads[_SKIP:], *[None] * 5)


# ---- the operators' facts ----


def _forward_fake(
    x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history, reset, dilation, residual,
    save,
):  # fmt: skip
    batch, channels, length = x.shape
    skips = output_weight.shape[0] - channels
    return (
        x.new_empty(x.shape if residual else (0,)),
        x.new_empty(batch, skips, length),
        x.new_empty((batch, weight.shape[0], length) if save else (0,)),
    )


def _backward_fake(grad_y, grad_skip, saved, x, weight, output_weight, history, reset, dilation, wants):
    batch, channels, length = x.shape
    rows = weight.shape[0]
    shapes = (
        x.shape, weight.shape, (rows,), output_weight.shape, (output_weight.shape[0],), (batch, rows, length),
        (batch, rows), (batch, channels, (weight.shape[2] - 1) * dilation),
    )  # fmt: skip
    return tuple(x.new_empty(shape if wants >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _recorded(backend, *arguments):
    *operands, save = arguments
    kept: list[Tensor] = []
    y, next_skip = _WaveNetLayer.apply(*operands[:10], backend, *operands[10:], kept)
    return y, next_skip, kept[0] if save else next_skip.new_empty(0)


def _forward_flops(x, weight, bias, output_weight, *_) -> int:
    return 2 * x[0] * x[2] * (math.prod(weight) + math.prod(output_weight))


def _backward_flops(grad_y, grad_skip, saved, x, weight, output_weight, history, reset, dilation, wants) -> int:
    data, conv = (bool(wants & bits) for bits in (1 << 0 | 1 << 7, 1 << 1))
    gate, output = (bool(wants & bits) for bits in (0b11100111, 1 << 3))
    return 2 * x[0] * x[2] * (math.prod(weight) * (data + conv) + math.prod(output_weight) * (gate + output))


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    register(
        Operator(
            "wavenet_layer_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch={
                "x": 0,
                "skip": 0,
                "condition": 0,
                "global_condition": 0,
                "history": 0,
                "reset": 0,
                0: 0,
                1: 0,
                2: 0,
            },
            autocast=autocast,
        )
    )
    register(
        Operator(
            "wavenet_layer_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch={"x": 0, "grad_y": 0, "grad_skip": 0, "saved": 0, "history": 0, "reset": 0, 0: 0, 5: 0, 6: 0, 7: 0},
            summed=(1, 2, 3, 4),
            autocast=autocast,
        )
    )


_register("cpp")


def _operators(backend: str) -> tuple[Any, Any]:
    """The forward and the backward operator."""
    if backend == "cpp":
        return torch.ops.seqaccel.wavenet_layer_forward, torch.ops.seqaccel.wavenet_layer_backward
    from seqaccel.kernels import conv as triton_kernels

    once(_register, "triton")
    return triton_kernels.wavenet_layer_forward, triton_kernels.wavenet_layer_backward


@_common.unrecorded
def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, output_weight: Tensor, output_bias: Tensor | None, dilation: int,
    skip: Tensor | None, condition: Tensor | None, global_condition: Tensor | None, initial_state: Tensor | None,
) -> None:  # fmt: skip
    _arguments.integer(NAME, "dilation", dilation, 1)
    tensors = {
        "weight": weight, "output_weight": output_weight, "bias": bias, "output_bias": output_bias, "skip": skip,
        "condition": condition, "global_condition": global_condition, "initial_state": initial_state,
    }  # fmt: skip
    _checks.alike(NAME, x, tensors)
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"{NAME}: expected x to be 3D (B, C, T), but got a tensor of size {list(x.shape)}")
    batch, channels, length = x.shape
    if weight.dim() != 3 or weight.shape[0] < 2 or weight.shape[0] % 2 or weight.shape[2] < 1:
        raise ValueError(
            f"{NAME}: expected weight to be 3D (2 * G, C, K) with G and K >= 1, but got a tensor of size "
            f"{list(weight.shape)}"
        )
    rows, taps = weight.shape[0], weight.shape[2]
    if output_weight.dim() != 3 or output_weight.shape[0] < channels:
        raise ValueError(
            f"{NAME}: expected output_weight to be 3D (C + S, G, 1) with C = {channels}, but got a tensor of size "
            f"{list(output_weight.shape)}"
        )
    outputs = output_weight.shape[0]
    shapes = {
        "weight": (rows, channels, taps),
        "output_weight": (outputs, rows // 2, 1),
        "bias": (rows,),
        "output_bias": (outputs,),
        "skip": (batch, outputs - channels, length),
        "condition": (batch, rows, length),
        "global_condition": (batch, rows),
        "initial_state": (batch, channels, (taps - 1) * dilation),
    }
    for key, shape in shapes.items():
        t = tensors[key]
        if t is not None and t.shape != shape:
            raise ValueError(f"{NAME}: expected {key} to have shape {tuple(shape)}, but got {tuple(t.shape)}")


def _composed(
    x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history, reset, dilation, residual
) -> tuple[Tensor | None, Tensor]:
    """The same from causal convolutions, whose backend is chosen by each."""
    if condition is None and global_condition is None:
        z = causal_conv1d(x, weight, bias, dilation=dilation, activation="gated", initial_state=history, reset=reset)
    else:
        added = condition
        if global_condition is not None:
            constant = global_condition.unsqueeze(-1)
            added = constant.expand(-1, -1, x.shape[-1]) if added is None else added + constant
        v = causal_conv1d(x, weight, bias, dilation=dilation, residual=added, initial_state=history, reset=reset)
        value, gate = v.chunk(2, 1)
        z = torch.tanh(value) * torch.sigmoid(gate)
    rows = x.shape[1]
    first, last = (None, None) if output_bias is None else (output_bias[:rows], output_bias[rows:])
    y = causal_conv1d(z, output_weight[:rows], first, residual=x) if residual else None
    return y, causal_conv1d(z, output_weight[rows:], last, residual=skip)


def _triton_takes(x: Tensor, weight: Tensor, output_weight: Tensor, context: int) -> bool:
    """Whether a program of the Triton kernel holds all gates; else the layer is composed of its convolutions."""
    from seqaccel.kernels.conv import layer_fits

    return layer_fits((*x.shape[:2], x.shape[2] + context), weight.shape, output_weight.shape)


def _composition_is_faster(x: Tensor, weight: Tensor, output_weight: Tensor) -> bool:
    """Whether separate convolutions, which multiply few columns as dot products, were measured faster on a CPU.

    float32, two Zen 4 cores, inference: of one time step 1.2 times at 256 channels and 2.4 at 512, but 0.4 at 64. Of
    8 time steps the layer is faster at 256 channels, and as fast at 512.
    """
    few = x.shape[0] * x.shape[2] <= 4 and weight.numel() + output_weight.numel() >= 1 << 18
    return few and backends.asked() == "auto"


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's bfloat16 convolutions were measured faster on a CPU: with AMX, from 192 channels of 2 taps on.

    Two Xeon cores: they took 0.84, 0.86 and 0.54 of our time at 192, 256 and 512 channels (training: 0.73, 0.68, 0.47),
    and at 128 channels 1.07 to 1.3 (0.94 to 1.06).
    """
    return x.device.type == "cpu" and weight.numel() >= 1 << 17 and backends.torch_has_amx()


def wavenet_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    *,
    dilation: int = 1,
    skip: Tensor | None = None,
    condition: Tensor | None = None,
    global_condition: Tensor | None = None,
    residual: bool = True,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    r"""A WaveNet layer in one pass: gated dilated causal convolution, residual and skip connection.

    .. math::
        z &= \tanh(W_f * x + b_f + c_f + g_f) \odot \sigma(W_g * x + b_g + c_g + g_g) \\
        x' &= x + R\, z + r, \qquad s' = s + S\, z + q

    with \* a causal convolution, of an x that is zero before its start, or ``initial_state``.

    Args:
        x: input (B, C, T).
        weight: (2 · G, C, K): W_f, then W_g; the last tap meets the present.
        bias: (2 · G,): b_f, then b_g; or None.
        output_weight: (C + S, G, 1): R, then S, as one convolution of one tap has them.
        output_bias: (C + S,): r, then q. Default: none.
        dilation: distance between taps, in time steps. Default: 1
        skip: s (B, S, T), the sum of the skip connections of the layers before. Default: zero.
        condition: c (B, 2 · G, T), what a local condition adds before the gate. Default: none.
        global_condition: g (B, 2 · G), what a global condition adds at every step. Default: none.
        residual: whether x' is wanted: the last layer of a WaveNet has only a skip connection. Default: True
        initial_state: the (K-1) · dilation inputs before x (B, C, (K-1) · dilation), as a stream carries them.
            Default: none.
        reset: (B, T) bool: an episode begins at the steps where it is true. What a tap would meet before that step is
            zero. Default: none.

    Returns:
        (x', s'): (B, C, T), or None without ``residual``, and (B, S, T).

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit; the message says
            which one.

    Saved for the backward, beside the arguments but ``skip``: tanh and σ, 2 · G values per time step. float16 and
    bfloat16 are computed in float32 on a CPU. A backward that is itself differentiated runs on the reference. On a GPU
    the Triton kernels take up to 128 gates G; a layer of more is composed of :func:`causal_conv1d`.

    Source: van den Oord et al., WaveNet: A Generative Model for Raw Audio, 2016.

    Example:
        >>> import torch, seqaccel.functional as SF
        >>> x, weight, output_weight = torch.randn(2, 8, 10), torch.randn(12, 8, 2), torch.randn(8 + 5, 6, 1)
        >>> x, skip = SF.wavenet_layer(x, weight, None, output_weight, dilation=4)
        >>> x.shape, skip.shape
        (torch.Size([2, 8, 10]), torch.Size([2, 5, 10]))
    """
    _arguments.tensors(NAME, x=x, weight=weight, output_weight=output_weight)
    _arguments.optional_tensors(
        NAME, bias=bias, output_bias=output_bias, skip=skip, condition=condition, global_condition=global_condition,
        initial_state=initial_state, reset=reset,
    )  # fmt: skip
    _arguments.flags(NAME, residual=residual)
    given = (x, weight, bias, output_weight, output_bias, skip, condition, global_condition, initial_state)
    operands = _common.autocast(*given)
    x, weight, bias, output_weight, output_bias, skip, condition, global_condition, history = operands  # type: ignore[assignment]
    _check(
        x, weight, bias, output_weight, output_bias, dilation, skip, condition, global_condition, history
    )  # fmt: skip
    if reset is not None:
        _arguments.reset(NAME, reset, (x.shape[0], x.shape[2]), x.device)
    arguments = [*operands, reset, dilation, residual]
    prefer = None
    if x.dtype == torch.bfloat16 and reset is None and not _common.is_traced(x):
        prefer = "torch" if _onednn_is_faster(x, weight) else None
    backend = backends.choose(NAME, x, BACKENDS, prefer=prefer)
    context = (weight.shape[2] - 1) * dilation
    refused = backend == "triton" and not _triton_takes(x, weight, output_weight, context)
    if backend == "torch" or refused or _onnx.exporting():
        return _composed(*arguments)
    if backend == "reference" or _common.transforms_active():
        y, next_skip = _definition(*arguments)
        return y if residual else None, next_skip
    recorded, traced = _common.needs_grad(*operands), torch.compiler.is_compiling()
    dtype = x.dtype
    if backend == "cpp":
        if not recorded and not traced and _composition_is_faster(x, weight, output_weight):
            return _composed(*arguments)
        to = _common.compute_dtype(dtype)
        operands = tuple(None if t is None else t.to(to) for t in operands)
    if traced:  # autograd records the operator itself
        y, next_skip, _ = _operators(backend)[0](*operands, reset, dilation, residual, False)
    elif recorded:
        y, next_skip = _WaveNetLayer.apply(*operands, reset, backend, dilation, residual)
    else:
        y, next_skip, _ = call(_operators(backend)[0], *operands, reset, dilation, residual, False)
    return y.to(dtype) if residual else None, next_skip.to(dtype)
