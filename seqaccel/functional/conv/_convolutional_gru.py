"""A step of a convolutional GRU on a grid: the public call, checks, autograd and choice of backend."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, register
from seqaccel.functional.conv import _checks
from seqaccel.reference import conv as reference

__all__ = ["convolutional_gru"]

NAME = "convolutional_gru"
BACKENDS = ("reference", "cpp", "torch")
GATES = ("hard", "sigmoid")

#: Differentiable arguments, in the operators' order; bit i of ``wants`` asks for the gradient of the i-th.
_INPUTS = ("x", "weight_gates", "bias_gates", "weight_candidate", "bias_candidate")


def _definition(x, weight_gates, bias_gates, weight_candidate, bias_candidate, hard, save=False) -> Tensor:
    return reference.convolutional_gru(x, weight_gates, bias_gates, weight_candidate, bias_candidate, hard=hard)


class _ConvolutionalGRU(torch.autograd.Function):
    """Saves x, the weights, the gates' values and the candidate; a list ``kept`` takes the last two."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, hard, kept = arguments
        y, gates, candidate = call(torch.ops.seqaccel.convolutional_gru_forward, *inputs, hard, True)
        if kept is not None:
            kept += [gates, candidate]
        ctx.save_for_backward(*inputs, gates, candidate)
        ctx.hard = hard
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *inputs, gates, candidate = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(_INPUTS)]
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, ctx.hard), inputs, (grad_y,), needs
            )
            return (*grads, None, None)
        x, weight_gates, _, weight_candidate, _ = inputs
        grads = call(
            torch.ops.seqaccel.convolutional_gru_backward,
            grad_y, gates, candidate, x, weight_gates, weight_candidate, ctx.hard,
            sum(1 << i for i, need in enumerate(needs) if need),
        )  # fmt: skip
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None)


# ---- the operators' facts ----


def _forward_fake(x, weight_gates, bias_gates, weight_candidate, bias_candidate, hard, save):
    batch, channels, *grid = x.shape
    saved = ((batch, 2 * channels, *grid), (batch, channels, *grid)) if save else ((0,), (0,))
    return x.new_empty(x.shape), *(x.new_empty(shape) for shape in saved)


def _backward_fake(grad_y, gates, candidate, x, weight_gates, weight_candidate, hard, wants):
    channels = x.shape[1]
    shapes = (x.shape, weight_gates.shape, (2 * channels,), weight_candidate.shape, (channels,))
    return tuple(x.new_empty(shape if wants >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _recorded(*arguments):
    *operands, save = arguments
    kept: list[Tensor] = []
    y = _ConvolutionalGRU.apply(*operands, kept)
    return (y, *kept) if save else (y, *(y.new_empty(0) for _ in kept))


def _forward_flops(x, weight_gates, bias_gates, weight_candidate, *_) -> int:
    return 2 * x[0] * x[2] * x[3] * (math.prod(weight_gates) + math.prod(weight_candidate))


def _backward_flops(grad_y, gates, candidate, x, weight_gates, weight_candidate, hard, wants) -> int:
    first = math.prod(weight_gates) * (bool(wants & 1) + bool(wants & 2))
    second = math.prod(weight_candidate) * (bool(wants & 0b111) + bool(wants & 8))
    return 2 * x[0] * x[2] * x[3] * (first + second)


register(
    Operator(
        "convolutional_gru_forward",
        _forward_fake,
        _forward_flops,
        definition=_definition,
        recorded=_recorded,
        batch={"x": 0, 0: 0, 1: 0, 2: 0},
    )
)
register(
    Operator(
        "convolutional_gru_backward",
        _backward_fake,
        _backward_flops,
        batch={"grad_y": 0, "gates": 0, "candidate": 0, "x": 0, 0: 0},
        summed=(1, 2, 3, 4),
    )
)


@_common.unrecorded
def _check(tensors: dict[str, Tensor | None], gates: str) -> None:
    x, weight_gates, weight_candidate = (tensors[name] for name in ("x", "weight_gates", "weight_candidate"))
    assert x is not None and weight_gates is not None and weight_candidate is not None
    _checks.alike(NAME, x, tensors)
    if gates not in GATES:
        raise ValueError(f"{NAME}: expected gates to be one of {GATES}, but got {gates!r}")
    if x.dim() != 4:
        raise ValueError(f"{NAME}: expected x to be 4D (B, C, W, N), but got a tensor of size {list(x.shape)}")
    channels = x.shape[1]
    for key, weight, outputs in (
        ("weight_gates", weight_gates, 2 * channels),
        ("weight_candidate", weight_candidate, channels),
    ):
        if weight.dim() != 4 or weight.shape[2] % 2 != 1 or weight.shape[3] % 2 != 1:
            raise ValueError(
                f"{NAME}: expected {key} to be 4D with an odd kernel size along both dimensions, but got a tensor of "
                f"size {list(weight.shape)}"
            )
        if weight.shape[:2] != (outputs, channels):
            raise ValueError(
                f"{NAME}: expected {key} to have shape ({outputs}, {channels}, K, L), but got {tuple(weight.shape)}"
            )
    for key, size in (("bias_gates", 2 * channels), ("bias_candidate", channels)):
        bias = tensors[key]
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{NAME}: expected {key} to have shape {(size,)}, but got {tuple(bias.shape)}")


def _torch_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype in which gates are calculated."""
    if not torch.jit.is_tracing() and x.numel() == 0:  # F.conv2d refuses these
        return x.sum() * weight.sum() + x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    y = F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))
    return y.to(_common.compute_dtype(y.dtype))


def _torch_step(x, weight_gates, bias_gates, weight_candidate, bias_candidate, *, hard) -> Tensor:
    """The same from torch's own operators."""
    gates = torch.sigmoid(_torch_conv(x, weight_gates, bias_gates))
    if hard:
        gates = (1.2 * gates - 0.1).clamp(0, 1)
    u, r = gates.chunk(2, 1)
    candidate = torch.tanh(_torch_conv((r * x).to(x.dtype), weight_candidate, bias_candidate))
    return (u * x + (1 - u) * candidate).to(x.dtype)


def _onednn_is_faster(x: Tensor) -> bool:
    """Whether torch's bfloat16 convolutions were measured faster on a CPU: with AMX, from 64 channels on.

    Two Xeon cores: the step from them took 0.46 of our time at 8 x 128 x 4 x 64 (training: 0.57) and 0.74 (0.81) at
    8 x 64 x 4 x 32, but 1.23 (1.33) at 32 x 24 x 4 x 17.
    """
    return x.device.type == "cpu" and x.shape[1] >= 64 and x.numel() >= 1 << 16 and backends.torch_has_amx()


def convolutional_gru(
    x: Tensor,
    weight_gates: Tensor,
    bias_gates: Tensor | None,
    weight_candidate: Tensor,
    bias_candidate: Tensor | None = None,
    *,
    gates: str = "hard",
) -> Tensor:
    r"""A step of a convolutional gated recurrent unit, whose state is a grid (W, N) of vectors.

    .. math::
        u &= \varphi(K_u * x + b_u), \quad r = \varphi(K_r * x + b_r) \\
        y &= u \odot x + (1 - u) \odot \tanh(K * (r \odot x) + b)

    The convolutions are centred along both dimensions and see zeros outside of the grid. :math:`\varphi` is the
    saturating sigmoid :math:`\max(0, \min(1, 1.2\,\sigma - 0.1))`, which can keep a value as it is and has no gradient
    where it is 0 or 1, or the sigmoid.

    Args:
        x: the state (B, C, W, N), of a Neural GPU N positions of a sequence and W rows for each.
        weight_gates: K_u, then K_r, (2 C, C, K_w, K_n) with odd K_w and K_n.
        bias_gates: b_u, then b_r, (2 C,), or None.
        weight_candidate: K, (C, C, K'_w, K'_n), likewise odd.
        bias_candidate: b, (C,). Default: none.
        gates: :math:`\varphi`: ``"hard"`` or ``"sigmoid"``. Default: ``"hard"``

    Returns:
        y (B, C, W, N).

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit; the message says
            which one.

    On a CPU it is one operator. The backward keeps x, the gates and the candidate, 4 values for each of x. 16-bit
    tensors are calculated in float32, and so are the gates of every backend.

    Source: Kaiser, Sutskever, Neural GPUs Learn Algorithms, 2016.

    Example:
        >>> import torch, seqaccel.functional as SF
        >>> x, weight = torch.randn(2, 8, 4, 11), torch.randn(24, 8, 3, 3) / 8
        >>> SF.convolutional_gru(x, weight[:16], torch.zeros(16), weight[16:]).shape
        torch.Size([2, 8, 4, 11])
    """
    _arguments.tensors(NAME, x=x, weight_gates=weight_gates, weight_candidate=weight_candidate)
    _arguments.optional_tensors(NAME, bias_gates=bias_gates, bias_candidate=bias_candidate)
    inputs: tuple[Any, ...] = _common.autocast(x, weight_gates, bias_gates, weight_candidate, bias_candidate)
    _check(dict(zip(_INPUTS, inputs, strict=True)), gates)
    x = inputs[0]
    hard, dtype = gates == "hard", x.dtype
    prefer = None
    if dtype == torch.bfloat16 and not _common.is_traced(x):
        prefer = "torch" if _onednn_is_faster(x) else None
    backend = backends.choose(NAME, x, BACKENDS, prefer=prefer)
    if backend == "torch" or _onnx.exporting():
        return _torch_step(*inputs, hard=hard)
    if backend == "reference" or _common.transforms_active():
        return reference.convolutional_gru(*inputs, hard=hard)
    inputs = _common.widened(*inputs)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        y = torch.ops.seqaccel.convolutional_gru_forward(*inputs, hard, False)[0]
    elif _common.needs_grad(*inputs):
        y = _ConvolutionalGRU.apply(*inputs, hard, None)
    else:
        y = call(torch.ops.seqaccel.convolutional_gru_forward, *inputs, hard, False)[0]
    return y.to(dtype)
