"""What follows a convolution: bias, activation, dropout, residual, relu; and the gradient of all of these.

``y = relu?(residual + dropout(activation(v)))`` with v = conv + bias. "glu" and "gated" take two rows of v for one of
y: the value at o and the gate at O + o.
"""

import torch
import triton
import triton.language as tl

from seqaccel.kernels._math import normal_below, sigmoid, silu, tanh

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "glu", "gated")
GATED = ("glu", "gated")


def saved_kind(activation: str, relu: bool, dropout: float, has_residual: bool) -> str:
    """What the forward pass saves beside y: ``"nothing"``, ``"active"`` (bytes) or ``"pre"``."""
    if activation == "none":
        return "nothing"
    if activation == "relu":
        return "active" if has_residual else "nothing"
    from_output = activation in ("leaky_relu", "tanh", "sigmoid")
    return "pre" if not from_output or has_residual or relu or dropout > 0 else "nothing"


def threshold_and_scale(dropout: float) -> tuple[int, float]:
    """The hash below which an element is dropped, and the factor of the others."""
    return min(round(dropout * 2**32), 0xFFFFFFFF), 1 / (1 - dropout) if dropout < 1 else 0.0


@triton.jit
def _gelu_argument(v):
    return 0.7978845608028654 * (v + 0.044715 * v * v * v)


@triton.jit
def _activate(v, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "tanh":
        v = tanh(v)
    elif ACTIVATION == "sigmoid":
        v = sigmoid(v)
    elif ACTIVATION == "silu":
        v = silu(v)
    elif ACTIVATION == "leaky_relu":
        v = tl.where(v < 0, 0.01 * v, v)
    elif ACTIVATION == "gelu":
        v = v * normal_below(v)
    elif ACTIVATION == "gelu_tanh":
        v = 0.5 * v * (1.0 + tanh(_gelu_argument(v)))
    return v


@triton.jit
def _slope(v, ACTIVATION: tl.constexpr):
    """Of the activations whose backward keeps v."""
    if ACTIVATION == "silu":
        s = sigmoid(v)
        d = s * (1 + v * (1 - s))
    elif ACTIVATION == "gelu":
        d = normal_below(v) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    else:
        a = tanh(_gelu_argument(v))
        inner = 0.7978845608028654 * (1.0 + 3 * 0.044715 * v * v)
        d = 0.5 * (1.0 + a) + 0.5 * v * (1.0 - a * a) * inner
    return d


@triton.jit
def _keep(p_seed, row, t, threshold):
    """The dropout mask of csrc/common/dropout.h for elements t of rows ``row`` (shapes broadcast)."""
    z = tl.load(p_seed).to(tl.uint64) + (row + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    h = t.to(tl.uint32) * 0x9E3779B9 + z.to(tl.uint32)
    h = h ^ (h >> 16)
    h = h * 0x21F0AAAD + (z >> 32).to(tl.uint32)
    h = h ^ (h >> 15)
    h = h * 0x735A2D97
    h = h ^ (h >> 15)
    return h.to(tl.int64) >= threshold


@triton.jit
def finish(
    v, gate, i_b, o, t, there, valid, p_bias, p_residual, p_seed, p_y, p_pre, p_active, outputs, L, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Stores y [B, outputs, L] and what is saved from conv ``v``, and ``gate`` if there is one.

    ``o`` and ``there`` (whether the channel exists) are columns or scalars, ``t`` is a row and ``valid`` a tile.
    """
    offset = o * L + t
    if p_bias is not None:
        v += tl.load(p_bias + o, mask=there, other=0.0).to(tl.float32)
    if ACTIVATION == "glu" or ACTIVATION == "gated":
        if p_bias is not None:
            gate += tl.load(p_bias + outputs + o, mask=there, other=0.0).to(tl.float32)
        if p_pre is not None:
            p_pre += i_b * outputs * L * 2
            tl.store(p_pre + offset, v.to(p_pre.dtype.element_ty), mask=valid)
            tl.store(p_pre + outputs * L + offset, gate.to(p_pre.dtype.element_ty), mask=valid)
        y = (tanh(v) if ACTIVATION == "gated" else v) * sigmoid(gate)
    else:
        if p_pre is not None:
            tl.store(p_pre + i_b * outputs * L + offset, v.to(p_pre.dtype.element_ty), mask=valid)
        y = _activate(v, ACTIVATION)
    active = (v <= 0) == 0
    if DROPOUT:
        keep = _keep(p_seed, i_b * outputs + o, t, threshold)
        active = active & keep
        y = tl.where(keep, y * scale, 0.0)
    if p_active is not None:
        tl.store(p_active + i_b * outputs * L + offset, active.to(tl.uint8), mask=valid)
    if p_residual is not None:
        y += tl.load(p_residual + i_b * outputs * L + offset, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(p_y + i_b * outputs * L + offset, y.to(p_y.dtype.element_ty), mask=valid)


@triton.jit
def gradient_at(
    p_grad_y, p_y, p_pre, p_active, p_seed, i_b, row, t, valid, outputs, L, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of the residual and of v, from that of y, at steps t of rows of v (shapes broadcast)."""
    GATED: tl.constexpr = ACTIVATION == "glu" or ACTIVATION == "gated"
    o = row
    if GATED:
        o = tl.where(row < outputs, row, row - outputs)
    base, offset = i_b * outputs * L, o * L + t
    d = tl.load(p_grad_y + base + offset, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        y = tl.load(p_y + base + offset, mask=valid, other=0.0)
        d = tl.where(y <= 0, 0.0, d)
    g = d
    if DROPOUT:
        g = tl.where(_keep(p_seed, i_b * outputs + o, t, threshold), g * scale, 0.0)
    if ACTIVATION == "relu":
        if p_active is not None:
            g = tl.where(tl.load(p_active + base + offset, mask=valid, other=0) != 0, g, 0.0)
        else:
            y = tl.load(p_y + base + offset, mask=valid, other=0.0)
            g = tl.where(y <= 0, 0.0, g)
    elif ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh":
        g = g * _slope(tl.load(p_pre + base + offset, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
    elif GATED:
        value = tl.load(p_pre + 2 * base + offset, mask=valid, other=0.0).to(tl.float32)
        s = sigmoid(tl.load(p_pre + 2 * base + outputs * L + offset, mask=valid, other=0.0).to(tl.float32))
        if ACTIVATION == "gated":
            value = tanh(value)
            g = g * tl.where(row < outputs, s * (1 - value * value), value * s * (1 - s))
        else:
            g = g * tl.where(row < outputs, s, value * s * (1 - s))
    elif ACTIVATION != "none":
        if p_pre is not None:
            a = _activate(tl.load(p_pre + base + offset, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
        else:
            a = tl.load(p_y + base + offset, mask=valid, other=0.0).to(tl.float32)
        if ACTIVATION == "tanh":
            g = g * (1 - a * a)
        elif ACTIVATION == "sigmoid":
            g = g * a * (1 - a)
        else:
            g = tl.where(a <= 0, 0.01 * g, g)
    return d, g


class Epilogue:
    """The epilogue of a call: what its kernels are given, forward and backward."""

    def __init__(self, activation: str, relu: bool, dropout: float, seed: torch.Tensor | None) -> None:
        self.activation, self.relu, self.dropout, self.seed = activation, relu, dropout, seed
        self.numbers = threshold_and_scale(dropout)
        self.options = {"ACTIVATION": activation, "RELU": relu, "DROPOUT": dropout > 0}
        self.halves = 2 if activation in GATED else 1


PLAIN = Epilogue("none", False, 0.0, None)
