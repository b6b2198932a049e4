"""The residual block of a temporal convolutional network: the public call, checks, autograd and choice of backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, register
from seqaccel.functional.conv import _checks
from seqaccel.functional.conv._causal_conv1d import activate, causal_conv1d
from seqaccel.functional.conv._operators import saved_kind
from seqaccel.reference import conv as reference
from seqaccel.reference.dropout import skip_rows

__all__ = ["temporal_block"]

NAME = "temporal_block"
BACKENDS = ("reference", "cpp", "triton", "torch")
ACTIVATIONS = (None, *(name for name in reference.ACTIVATIONS if name not in reference.GATED))

#: Differentiable arguments, in the operators' order; bit i of ``wants`` asks for the gradient of the i-th.
_INPUTS = ("x", "weight_1", "g_1", "bias_1", "weight_2", "g_2", "bias_2", "downsample_weight", "downsample_bias")
_X, _WEIGHT_1, _G_1, _WEIGHT_2, _G_2, _DOWNSAMPLE = 1, 2, 4, 16, 32, 128


def _definition(
    x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, downsample_weight, downsample_bias, seed, reset, dilation,
    activation_1, activation_2, relu, dropout, save=False,
) -> Tensor:  # fmt: skip
    return reference.temporal_block(
        x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, downsample_weight, downsample_bias, seed, reset,
        dilation=dilation, activation_1=None if activation_1 == "none" else activation_1,
        activation_2=None if activation_2 == "none" else activation_2, relu=relu, dropout=dropout,
    )  # fmt: skip


class _TemporalBlock(torch.autograd.Function):
    """Saves the inputs, z, what both convolutions' derivatives need, and y with a relu; a list ``kept`` takes what the
    operator returns beside y."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, seed, reset, options, kept = arguments
        y, z, saved_1, saved_2 = call(torch.ops.seqaccel.temporal_block_forward, *inputs, seed, reset, *options, True)
        if kept is not None:
            kept += [z, saved_1, saved_2]
        relu = options[3]
        ctx.save_for_backward(*inputs, seed, reset, y if relu else None, z, saved_1, saved_2)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, grad_y):
        *inputs, seed, reset, y, z, saved_1, saved_2 = ctx.saved_tensors
        needs = ctx.needs_input_grad[: len(_INPUTS)]
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, seed, reset, *ctx.options), inputs, (grad_y,), needs
            )
            return (*grads, None, None, None, None)
        x, weight_1, g_1, _, weight_2, g_2, _, downsample_weight, _ = inputs
        grads = call(
            torch.ops.seqaccel.temporal_block_backward,
            grad_y, y, z, saved_1, saved_2, x, weight_1, g_1, weight_2, g_2, downsample_weight, seed, reset,
            *ctx.options,
            sum(1 << i for i, need in enumerate(needs) if need),
        )  # fmt: skip
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 4)


# ---- the operators' facts ----


def _forward_fake(
    x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, downsample_weight, downsample_bias, seed, reset, dilation,
    activation_1, activation_2, relu, dropout, save,
):  # fmt: skip
    batch, _, length = x.shape
    shape = (batch, weight_2.shape[0], length)

    def saved(activation, rows, has_residual):
        kind = saved_kind(activation, False, dropout, has_residual) if save else "nothing"
        dtype = torch.uint8 if kind == "active" else x.dtype
        return x.new_empty((0,) if kind == "nothing" else (batch, rows, length), dtype=dtype)

    z = x.new_empty(shape if save else (0,))
    return x.new_empty(shape), z, saved(activation_1, weight_1.shape[0], False), saved(activation_2, shape[1], True)


def _backward_fake(
    grad_y, y, z, saved_1, saved_2, x, weight_1, g_1, weight_2, g_2, downsample_weight, seed, reset, dilation,
    activation_1, activation_2, relu, dropout, wants,
):  # fmt: skip
    wants |= wants >> 1 & (_WEIGHT_1 | _WEIGHT_2)  # a gradient of g takes that of its weight, and the other way round
    wants |= (wants << 1 & _G_1 if g_1 is not None else 0) | (wants << 1 & _G_2 if g_2 is not None else 0)
    rows, outputs = weight_1.shape[0], weight_2.shape[0]
    shapes = (
        x.shape, weight_1.shape, (rows, 1, 1), (rows,), weight_2.shape, (outputs, 1, 1), (outputs,),
        (outputs, x.shape[1], 1), (outputs,),
    )  # fmt: skip
    return tuple(x.new_empty(shape if wants >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _recorded(*arguments):
    *operands, save = arguments
    kept: list[Tensor] = []
    y = _TemporalBlock.apply(*operands[:11], tuple(operands[11:]), kept)
    return (y, *kept) if save else (y, *(y.new_empty(0) for _ in kept))


def _forward_flops(x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, downsample_weight, *_) -> int:
    taps = math.prod(weight_1) + math.prod(weight_2)
    return 2 * x[0] * x[2] * (taps + (math.prod(downsample_weight) if downsample_weight is not None else 0))


def _backward_flops(grad_y, y, z, saved_1, saved_2, x, weight_1, g_1, weight_2, g_2, downsample_weight, *rest) -> int:
    wants = rest[-1]
    first = math.prod(weight_1) * (bool(wants & _X) + bool(wants & (_WEIGHT_1 | _G_1)))
    second = math.prod(weight_2) * (bool(wants & 0b1111) + bool(wants & (_WEIGHT_2 | _G_2)))
    down = math.prod(downsample_weight) if downsample_weight is not None else 0
    return 2 * x[0] * x[2] * (first + second + down * (bool(wants & _X) + bool(wants & _DOWNSAMPLE)))


def _from_row(named: dict[str, Any], first: int) -> dict[str, Any]:
    """The arguments for a part of the batch: its dropout masks are those that it has in the whole."""
    if named["seed"] is None:
        return named
    return named | {"seed": skip_rows(named["seed"], first * named["weight_2"].shape[0])}


register(
    Operator(
        "temporal_block_forward",
        _forward_fake,
        _forward_flops,
        definition=_definition,
        recorded=_recorded,
        batch={"x": 0, "reset": 0, 0: 0, 1: 0, 2: 0, 3: 0},
        from_row=_from_row,
    )
)
register(
    Operator(
        "temporal_block_backward",
        _backward_fake,
        _backward_flops,
        batch={"grad_y": 0, "y": 0, "z": 0, "saved_1": 0, "saved_2": 0, "x": 0, "reset": 0, 0: 0},
        summed=(1, 2, 3, 4, 5, 6, 7, 8),
        from_row=_from_row,
    )
)


@_common.unrecorded
def _check(tensors: dict[str, Tensor | None], dilation: int, activation: str | None, use_gate: bool, dropout: float):
    x, weight_1, weight_2 = (tensors[name] for name in ("x", "weight_1", "weight_2"))
    assert x is not None and weight_1 is not None and weight_2 is not None
    _checks.alike(NAME, x, tensors)
    _arguments.integer(NAME, "dilation", dilation, 1)
    _arguments.probability(NAME, "dropout", dropout)
    _arguments.flag(NAME, "use_gate", use_gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: expected activation to be one of {ACTIVATIONS}, but got {activation!r}")
    if x.dim() != 3:
        raise ValueError(f"{NAME}: expected x to be 3D (B, C, T), but got a tensor of size {list(x.shape)}")
    for key, weight in (("weight_1", weight_1), ("weight_2", weight_2)):
        if weight.dim() != 3 or weight.shape[2] < 1:
            raise ValueError(
                f"{NAME}: expected {key} to be 3D (O, C, K) with K >= 1, but got a tensor of size {list(weight.shape)}"
            )
    channels, outputs = x.shape[1], weight_2.shape[0]
    rows = 2 * outputs if use_gate else outputs
    shapes = {
        "weight_1": (rows, channels, weight_1.shape[2]),
        "g_1": (rows, 1, 1),
        "bias_1": (rows,),
        "weight_2": (outputs, outputs, weight_2.shape[2]),
        "g_2": (outputs, 1, 1),
        "bias_2": (outputs,),
        "downsample_weight": (outputs, channels, 1),
        "downsample_bias": (outputs,),
    }
    for key, shape in shapes.items():
        t = tensors[key]
        if t is not None and t.shape != shape:
            raise ValueError(f"{NAME}: expected {key} to have shape {shape}, but got {tuple(t.shape)}")
    if tensors["downsample_weight"] is None and (channels != outputs or tensors["downsample_bias"] is not None):
        raise ValueError(
            f"{NAME}: expected downsample_weight with downsample_bias, and where the channels of x, {channels}, are "
            f"not those of weight_2, {outputs}"
        )


def _composed(
    inputs, reset: Tensor | None, dilation: int, activation: str | None, use_gate: bool, dropout: float
) -> Tensor:
    """The same by one operator for each convolution."""
    x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, downsample_weight, downsample_bias = inputs
    weight_1 = weight_1 if g_1 is None else torch._weight_norm(weight_1, g_1, 0)
    weight_2 = weight_2 if g_2 is None else torch._weight_norm(weight_2, g_2, 0)
    options: dict[str, Any] = {"dilation": dilation, "dropout": dropout, "reset": reset}
    z = causal_conv1d(x, weight_1, bias_1, activation="glu" if use_gate else activation, **options)
    r = x if downsample_weight is None else causal_conv1d(x, downsample_weight, downsample_bias)
    relu = "relu" if activation == "relu" else None
    s = causal_conv1d(z, weight_2, bias_2, activation=activation, residual=r, output_activation=relu, **options)
    return s if relu else activate(s, activation)


def temporal_block(
    x: Tensor,
    weight_1: Tensor,
    bias_1: Tensor | None,
    weight_2: Tensor,
    bias_2: Tensor | None = None,
    downsample_weight: Tensor | None = None,
    downsample_bias: Tensor | None = None,
    *,
    g_1: Tensor | None = None,
    g_2: Tensor | None = None,
    dilation: int = 1,
    activation: str | None = "relu",
    use_gate: bool = False,
    dropout: float = 0.0,
    reset: Tensor | None = None,
) -> Tensor:
    r"""Residual block of a temporal convolutional network: two causal dilated convolutions, fused with all around them.

    .. math::
        z &= \mathrm{dropout}(\varphi(W_1 * x + b_1)) \\
        y &= \varphi(r + \mathrm{dropout}(\varphi(W_2 * z + b_2)))

    r is x, or its 1×1 convolution. With weight normalisation W = g·v/‖v‖, the norm being over each output channel.

    Args:
        x: input (B, C, T).
        weight_1: W_1 (O, C, K), or with ``g_1`` its v. The last tap meets the present.
        bias_1: (O,) or None.
        weight_2: W_2 (O, O, K'), or with ``g_2`` its v.
        bias_2: (O,). Default: none.
        downsample_weight: (O, C, 1), of the 1×1 convolution; needed where C is not O. Default: none, r is x.
        downsample_bias: (O,). Default: none.
        g_1, g_2: (O, 1, 1), as :func:`torch.nn.utils.parametrizations.weight_norm` has them (``original0``; v is
            ``original1``). Default: none.
        dilation: distance between taps of both convolutions, in time steps. Default: 1
        activation: φ: one of :func:`causal_conv1d`'s that keep the channels, or None. Default: "relu"
        use_gate: weight_1, g_1 and bias_1 have 2 O rows, and a gated linear unit (``"glu"``) takes the place of the
            first φ. Default: False
        dropout: probability that an activation is zeroed, the others being scaled by 1/(1-p). Default: 0
        reset: (B, T) bool: an episode begins at the steps where it is true, whose taps meet zeros before that step.
            Default: none.

    Returns:
        y (B, O, T).

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit; the message says
            which one.

    On a CPU in float32 and float64 it is one operator and one node of autograd. With relu the backward keeps z, y and a
    byte an element beside the inputs. Normalised weights and dropout masks are computed again. Other dtypes, autocast
    and other devices run one operator per convolution.

    Source: Bai, Kolter, Koltun, An Empirical Evaluation of Generic Convolutional and Recurrent Networks, 2018.

    Example:
        >>> import torch, seqaccel.functional as SF
        >>> x, weight = torch.ones(1, 1, 5), torch.ones(1, 1, 2)
        >>> SF.temporal_block(x, weight, None, weight, dilation=2)
        tensor([[[2., 2., 4., 4., 5.]]])
    """
    _arguments.tensors(NAME, x=x, weight_1=weight_1, weight_2=weight_2)
    optional = {"g_1": g_1, "bias_1": bias_1, "g_2": g_2, "bias_2": bias_2}
    optional |= {"downsample_weight": downsample_weight, "downsample_bias": downsample_bias}
    _arguments.optional_tensors(NAME, **optional, reset=reset)
    inputs = (x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, downsample_weight, downsample_bias)
    options_given = (dilation, activation, use_gate, dropout)
    _check(dict(zip(_INPUTS, inputs, strict=True)), *options_given)
    if reset is not None:
        _arguments.reset(NAME, reset, (x.shape[0], x.shape[2]), x.device)
    backend = backends.choose(NAME, x, BACKENDS)
    wide = x.dtype in (torch.float32, torch.float64)
    if backend in ("triton", "torch") or not wide or _onnx.exporting() or _common.autocast_on(x.device.type):
        return _composed(inputs, reset, *options_given)
    relu, inner = activation == "relu", activation or "none"
    options = (dilation, "glu" if use_gate else inner, inner, relu, float(dropout))
    seed = torch.randint(-(1 << 62), 1 << 62, (2,), device=x.device) if dropout > 0 else None
    if seed is not None and _common.is_distributed(x):
        from seqaccel.functional._sharding import replicated

        seed = replicated(seed, x)
    if backend == "reference" or _common.transforms_active():
        y = _definition(*inputs, seed, reset, *options)
    elif torch.compiler.is_compiling():  # autograd records the operator itself
        y = torch.ops.seqaccel.temporal_block_forward(*inputs, seed, reset, *options, False)[0]
    elif _common.needs_grad(*inputs):
        y = _TemporalBlock.apply(*inputs, seed, reset, options, None)
    else:
        y = call(torch.ops.seqaccel.temporal_block_forward, *inputs, seed, reset, *options, False)[0]
    return y if relu else activate(y, activation)
