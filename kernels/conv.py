"""Dilated causal convolution on a GPU.

An implicit matrix product, tap by tap: for tap k the operand is x shifted by ``s_k = (K-1-k) dilation``, so a tile of
outputs [BO, BT] adds ``W_k [BO, BC] @ x[BC, BT at t - s_k]`` over channels and taps, and nothing is unfolded in memory.

    forward   y[o, t]     = sum_{k,c} W[o, c, k] x[c, t - s_k]      then bias, activation, dropout, residual, relu
    data      dx[c, t]    = sum_{k,o} W[o, c, k] g[o, t + s_k]      the same kernel, direction +1, W transposed
    weight    dW[o, c, k] = sum_{b,t} g[o, t] x[c, t - s_k]         partial sums over parts of b and t, added by torch

The weight is permuted to [K, O, C] first, so that a tile of it is read in rows. Depthwise convolutions have kernels
without a matrix product. A history is joined to x first; ``first`` is then where the outputs begin. Letters: o outputs,
c channels, t time steps, k taps, B batch, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, precision, wrap_triton
from seqaccel.kernels._math import normal_below, sigmoid, silu, tanh

_STRIP = 1024  # time steps per program in the elementwise and depthwise kernels
_PROGRAMS = 264  # the least number of programs for a weight gradient: 2 per multiprocessor of an H100


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
def _gelu_argument(v):
    return 0.7978845608028654 * (v + 0.044715 * v * v * v)


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
def _finish(
    acc, channel, row, t, valid, p_bias, p_residual, p_seed, p_y, p_pre, p_active, L, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Bias, activation, dropout, residual, relu; stores. ``channel`` and ``row`` are columns, ``t`` a row."""
    o_y = row * L + t
    v = acc
    if p_bias is not None:
        v += tl.load(p_bias + channel, mask=channel >= 0, other=0.0).to(tl.float32)
    if p_pre is not None:
        tl.store(p_pre + o_y, v.to(p_pre.dtype.element_ty), mask=valid)
    y = _activate(v, ACTIVATION)
    active = (v <= 0) == 0
    if DROPOUT:
        keep = _keep(p_seed, row, t, threshold)
        active = active & keep
        y = tl.where(keep, y * scale, 0.0)
    if p_active is not None:
        tl.store(p_active + o_y, active.to(tl.uint8), mask=valid)
    if p_residual is not None:
        y += tl.load(p_residual + o_y, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        y = tl.where(y < 0, 0.0, y)
    tl.store(p_y + o_y, y.to(p_y.dtype.element_ty), mask=valid)


@triton.jit
def conv_product_kernel(
    p_x,  # [B, G * C, T]
    p_weight,  # [K, G * O, C]
    p_bias,  # [G * O]
    p_residual,  # [B, G * O, L]
    p_seed,  # [1]
    p_y,  # [B, G * O, L]
    p_pre,  # [B, G * O, L]
    p_active,  # [B, G * O, L]
    T, L, first, C, O, K, G, dilation, threshold, scale,
    DIRECTION: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[b, o, i] = sum_{k,c} weight[k, o, c] x[b, c, first + i + DIRECTION * s_k], with the epilogue."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    i_bg = tl.program_id(2).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    acc = tl.zeros([BO, BT], dtype=tl.float32)
    chunks = tl.cdiv(C, BC)
    p_x += i_bg * C * T  # 64 bits up to here, 32 within a sequence: offsets of 64 bits take the registers of the tiles
    for i in range(K * chunks):
        k, c = i // chunks, i % chunks * BC + o_c
        at = first + o_t + DIRECTION * (K - 1 - k) * dilation
        b_x = tl.load(  # [BC, BT]
            p_x + c[:, None] * T + at[None, :],
            mask=(c[:, None] < C) & (at[None, :] >= 0) & (at[None, :] < T),
            other=0.0,
        )
        b_w = tl.load(  # [BO, BC]
            p_weight + (k * G + i_g) * O * C + o_o[:, None] * C + c[None, :],
            mask=(o_o[:, None] < O) & (c[None, :] < C),
            other=0.0,
        )
        acc = tl.dot(b_w, b_x, acc, input_precision=PRECISION)
    channel = tl.where(o_o < O, i_g * O + o_o, -1)[:, None]
    valid = (o_o[:, None] < O) & (o_t[None, :] < L)
    _finish(
        acc, channel, i_b * G * O + channel, o_t[None, :], valid, p_bias, p_residual, p_seed, p_y, p_pre, p_active, L,
        threshold, scale, ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip


# Triton compiles anew where an integer becomes 1 or divisible by 16. That is avoided for B and per_split. It pays for T
# and S: where 16 divides them, the kernel loads vectors.
@triton.jit(do_not_specialize=["B", "per_split"])
def conv_weight_kernel(
    p_g,  # [B, G * O, T]
    p_x,  # [B, G * C, S]
    p_partial,  # [splits, K, G * O, C], fp32
    B, T, S, C, O, K, G, dilation, per_split,
    PRECISION: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial[i, k, o, c] = sum over the i-th part of all (b, tile of t) of g[b, o, t] x[b, c, S - T + t - s_k]."""
    tiles_c = tl.cdiv(C, BC)
    i_k, i_g = tl.program_id(1) // G, tl.program_id(1) % G
    o_o = tl.program_id(0) // tiles_c * BO + tl.arange(0, BO)
    o_c = tl.program_id(0) % tiles_c * BC + tl.arange(0, BC)
    i_s = tl.program_id(2)
    shift = S - T - (K - 1 - i_k) * dilation
    steps = tl.cdiv(T, BT)
    acc = tl.zeros([BO, BC], dtype=tl.float32)
    for i in range(i_s * per_split, (i_s + 1) * per_split):
        b = (i // steps).to(tl.int64)
        t = i % steps * BT + tl.arange(0, BT)
        b_g = tl.load(  # [BO, BT]
            p_g + (b * G + i_g) * O * T + o_o[:, None] * T + t[None, :],
            mask=(o_o[:, None] < O) & (t[None, :] < tl.where(b < B, T, 0)),
            other=0.0,
        )
        at = t + shift
        b_x = tl.load(  # [BC, BT]
            p_x + (b * G + i_g) * C * S + o_c[:, None] * S + at[None, :],
            mask=(o_c[:, None] < C) & (at[None, :] >= 0) & (at[None, :] < tl.where(b < B, S, 0)),
            other=0.0,
        )
        acc = tl.dot(b_g, tl.trans(b_x), acc, input_precision=PRECISION)
    tl.store(
        p_partial + ((tl.cast(i_s, tl.int64) * K + i_k) * G + i_g) * O * C + o_o[:, None] * C + o_c[None, :],
        acc,
        mask=(o_o[:, None] < O) & (o_c[None, :] < C),
    )


@triton.jit
def conv_depthwise_kernel(
    p_x, p_weight, p_bias, p_residual, p_seed, p_y, p_pre, p_active,
    T, L, first, channels, rows, fan_in, fan_out, K, dilation, threshold, scale,
    DIRECTION: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One row of outputs from ``fan_in`` rows of x, which ``fan_out`` rows share; weight [max(rows, channels), K]."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    row = tl.program_id(0).to(tl.int64)
    i_b, channel = row // rows, row % rows
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    acc = tl.zeros([BT], dtype=tl.float32)
    for i in range(fan_in * K):
        k, source = i % K, channel // fan_out * fan_in + i // K
        at = first + o_t + DIRECTION * (K - 1 - k) * dilation
        x = tl.load(p_x + (i_b * channels + source) * T + at, mask=(at >= 0) & (at < T), other=0.0)
        w = tl.load(p_weight + tl.where(fan_in == 1, channel, source) * K + k)
        acc += w.to(tl.float32) * x.to(tl.float32)
    _finish(
        acc, channel, row, o_t, o_t < L, p_bias, p_residual, p_seed, p_y, p_pre, p_active, L, threshold, scale,
        ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "per_split"])
def conv_depthwise_weight_kernel(
    p_g, p_x, p_partial, B, T, S, channels, rows, fan_out, K, dilation, per_split, BT: tl.constexpr
):
    """partial[i, o, k] = sum over the i-th part of all (b, tile of t) of g[b, o, t] x[b, o // fan_out, S-T+t - s_k]."""
    k, row, i_s = tl.program_id(0) % K, tl.program_id(0) // K, tl.program_id(1)
    steps = tl.cdiv(T, BT)
    acc = tl.zeros([BT], dtype=tl.float32)
    for i in range(i_s * per_split, (i_s + 1) * per_split):
        b = (i // steps).to(tl.int64)
        t = i % steps * BT + tl.arange(0, BT)
        g = tl.load(p_g + (b * rows + row) * T + t, mask=t < tl.where(b < B, T, 0), other=0.0)
        at = t + S - T - (K - 1 - k) * dilation
        x = tl.load(
            p_x + (b * channels + row // fan_out) * S + at, mask=(at >= 0) & (at < tl.where(b < B, S, 0)), other=0.0
        )
        acc += g.to(tl.float32) * x.to(tl.float32)
    tl.store(p_partial + (tl.cast(i_s, tl.int64) * rows + row) * K + k, tl.sum(acc, 0))


@triton.jit
def conv_gradient_kernel(
    p_grad_y, p_y, p_pre, p_active, p_seed, p_g, p_grad_residual, T, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient of conv + bias from that of y (all [B, O, T]), and the residual's on the way."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    row = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    valid = t < T
    o_y = row * T + t
    d = tl.load(p_grad_y + o_y, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        y = tl.load(p_y + o_y, mask=valid, other=0.0)
        d = tl.where(y <= 0, 0.0, d)
    if p_grad_residual is not None:
        tl.store(p_grad_residual + o_y, d.to(p_grad_residual.dtype.element_ty), mask=valid)
    if DROPOUT:
        d = tl.where(_keep(p_seed, row, t, threshold), d * scale, 0.0)
    if ACTIVATION == "relu":
        if p_active is not None:
            d = tl.where(tl.load(p_active + o_y, mask=valid, other=0) != 0, d, 0.0)
        else:
            y = tl.load(p_y + o_y, mask=valid, other=0.0)
            d = tl.where(y <= 0, 0.0, d)
    elif ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_tanh":
        d = d * _slope(tl.load(p_pre + o_y, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
    elif ACTIVATION != "none":
        if p_pre is not None:
            a = _activate(tl.load(p_pre + o_y, mask=valid, other=0.0).to(tl.float32), ACTIVATION)
        else:
            a = tl.load(p_y + o_y, mask=valid, other=0.0).to(tl.float32)
        if ACTIVATION == "tanh":
            d = d * (1 - a * a)
        elif ACTIVATION == "sigmoid":
            d = d * a * (1 - a)
        else:
            d = tl.where(a <= 0, 0.01 * d, d)
    tl.store(p_g + o_y, d.to(p_g.dtype.element_ty), mask=valid)


def _precision(dtype: torch.dtype) -> str:
    """torch's own switch for convolutions decides; its default is TF32."""
    return precision(dtype, torch.backends.cudnn.conv)


#: Tiles of products: output channels -> (time steps, channels per multiplication, warps, stages). TF32 and 16 bits were
#: tuned on an H100. Without tensor cores larger tiles spill registers.
_PRODUCT = {
    "ieee": {16: (64, 16, 4, 2), 32: (64, 16, 4, 2), 64: (64, 16, 8, 2)},
    "tf32": {16: (64, 16, 4, 2), 32: (64, 16, 4, 2), 64: (64, 16, 4, 3), 128: (64, 16, 4, 3)},
    "half": {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3)},
}
#: Tiles of weight gradients: channels of a side -> (time steps per multiplication, warps, stages).
_WEIGHT = {
    "ieee": {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2)},
    "tf32": {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 3), 128: (32, 8, 3)},
    "half": {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 3), 128: (64, 8, 3)},
}


def _kind(dtype: torch.dtype) -> str:
    return _precision(dtype) if dtype == torch.float32 else "half"


def _side(table: dict[int, tuple[int, ...]], channels: int) -> int:
    """The side of the tile for this many channels: the smallest that holds them, or the largest there is."""
    return next((side for side in table if side >= channels), max(table))


def _splits(tiles: int, programs: int) -> tuple[int, int]:
    """How many parts to cut the sum over ``tiles`` (b, tile of t) into for enough programs, and the tiles per part."""
    splits = max(1, min(triton.cdiv(tiles, 4), triton.cdiv(_PROGRAMS, max(1, programs))))
    return splits, triton.cdiv(tiles, splits)


def _scale(dropout: float) -> float:
    return 1 / (1 - dropout) if dropout < 1 else 0.0


def _product(
    x, weight, bias, residual, seed, y, pre, active, first, direction, dilation, groups, activation, relu, dropout
) -> None:  # fmt: skip
    """Launches the product: weight (G * O, C, K), rows of y from channels of x."""
    batch, channels, length = x.shape
    rows, group_channels, taps = weight.shape
    steps = y.shape[2]
    if y.numel() == 0:
        return
    threshold = min(round(dropout * 2**32), 0xFFFFFFFF)
    shared = (dilation, threshold, _scale(dropout))
    if (group_channels == 1 and groups > 1) or rows == groups > 1:
        fan_in, fan_out = channels // groups, rows // groups
        wrap_triton(conv_depthwise_kernel)[(batch * rows, triton.cdiv(steps, _STRIP))](
            x, weight, bias, residual, seed, y, pre, active,
            length, steps, first, channels, rows, fan_in, fan_out, taps, *shared,
            DIRECTION=direction, ACTIVATION=activation, RELU=relu, DROPOUT=dropout > 0, BT=_STRIP, num_warps=4,
        )  # fmt: skip
        return
    outputs = rows // groups
    table = _PRODUCT[_kind(x.dtype)]
    tile = _side(table, outputs)
    block, depth, warps, stages = table[tile]
    wrap_triton(conv_product_kernel)[(triton.cdiv(steps, block), triton.cdiv(outputs, tile), batch * groups)](
        x, weight.permute(2, 0, 1).contiguous(), bias, residual, seed, y, pre, active,
        length, steps, first, group_channels, outputs, taps, groups, *shared,
        DIRECTION=direction, ACTIVATION=activation, RELU=relu, DROPOUT=dropout > 0,
        PRECISION=_precision(x.dtype), BO=tile, BT=block, BC=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _check(
    x: Tensor, weight: Tensor, reset: Tensor | None, cu_seqlens: Tensor | None, dilation: int, groups: int,
    activation: str,
) -> None:  # fmt: skip
    if reset is not None or cu_seqlens is not None:
        raise ValueError("causal_conv1d: the Triton kernels take no reset and no cu_seqlens")
    if activation not in ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid"):
        raise ValueError(f"causal_conv1d: the Triton kernels have no activation {activation!r}")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"causal_conv1d: backend 'triton' takes float32, float16 and bfloat16, but got {x.dtype}")
    if not fits(x.shape, weight.shape, dilation, groups):
        raise RuntimeError(
            f"causal_conv1d: backend 'triton' takes fewer than 2^31 values a sequence, 65535 * {_STRIP} steps, and at "
            "most 65535 batch * groups and taps * groups, "
            f"but got x {tuple(x.shape)} in {groups} groups"
        )


def fits(x: Sequence[int], weight: Sequence[int], dilation: int, groups: int) -> bool:
    """Whether offsets within a sequence fit 32 bits, and the grids of forward and backward fit CUDA's limits."""
    length = x[2] + (weight[2] - 1) * dilation
    programs = max(x[0] * groups, weight[2] * groups, triton.cdiv(length, _STRIP))
    return max(x[1], weight[0]) * length < 1 << 31 and programs <= 65535


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def saved_kind(activation: str, relu: bool, dropout: float, has_residual: bool) -> str:
    """What the forward pass saves beside y: ``"nothing"``, ``"active"`` (bytes) or ``"pre"``."""
    if activation == "none":
        return "nothing"
    if activation == "relu":
        return "active" if has_residual else "nothing"
    from_output = activation in ("leaky_relu", "tanh", "sigmoid")
    return "pre" if not from_output or has_residual or relu or dropout > 0 else "nothing"


@operator(torch.library.triton_op, "seqaccel::causal_conv1d_forward_triton", mutates_args={})
def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    history: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    relu: bool,
    dropout: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Like ``seqaccel::causal_conv1d_forward``: y, and what the backward pass needs beside it."""
    _check(x, weight, reset, cu_seqlens, dilation, groups, activation)
    shape = (x.shape[0], weight.shape[0], x.shape[2])
    first = 0
    if history is not None:
        x, first = torch.cat([history, x], -1), history.shape[2]
    x, weight, bias, residual = _contiguous(x, weight, bias, residual)
    y = x.new_empty(shape)
    kind = saved_kind(activation, relu, dropout, residual is not None) if save else "nothing"
    saved = x.new_empty((0,) if kind == "nothing" else shape, dtype=torch.uint8 if kind == "active" else x.dtype)
    pre, active = saved if kind == "pre" else None, saved if kind == "active" else None
    _product(x, weight, bias, residual, seed, y, pre, active, first, -1, dilation, groups, activation, relu, dropout)
    return y, saved


@operator(torch.library.triton_op, "seqaccel::causal_conv1d_backward_triton", mutates_args={})
def causal_conv1d_backward(
    grad_y: Tensor,
    y: Tensor | None,
    saved: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    addend: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    relu: bool,
    dropout: float,
    has_residual: bool,
    wants: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like ``seqaccel::causal_conv1d_backward``: gradients of x, weight, bias, residual, history; empty if unwanted."""
    _check(x, weight, reset, cu_seqlens, dilation, groups, activation)
    grad_y, y, saved, x, weight, addend = _contiguous(grad_y, y, saved, x, weight, addend)
    batch, channels, length = x.shape
    outputs, group_channels, taps = weight.shape
    rows = batch * outputs
    context = (taps - 1) * dilation
    kind = saved_kind(activation, relu, dropout, has_residual)
    nothing = x.new_empty(0)
    grad_residual = torch.empty_like(grad_y) if wants & 8 else None
    if activation == "none" and not relu and dropout == 0 and grad_residual is None:
        g = grad_y
    else:
        g = torch.empty_like(grad_y)
        if g.numel():
            wrap_triton(conv_gradient_kernel)[(rows, triton.cdiv(length, _STRIP))](
                grad_y, y, saved if kind == "pre" else None, saved if kind == "active" else None, seed, g,
                grad_residual, length, min(round(dropout * 2**32), 0xFFFFFFFF), _scale(dropout),
                ACTIVATION=activation, RELU=relu, DROPOUT=dropout > 0, BT=_STRIP, num_warps=4,
            )  # fmt: skip

    # The product for the gradient of x has the weight [G * C, O, K]: O and C change places within each group.
    blocks = weight.view(groups, outputs // groups, group_channels, taps)
    transposed = blocks.transpose(1, 2).reshape(channels, outputs // groups, taps)
    plain = (dilation, groups, "none", False, 0.0)
    grad_x, grad_history = nothing, nothing.clone()
    if wants & 1:
        grad_x = torch.empty_like(x)
        _product(g, transposed, None, addend, None, grad_x, None, None, 0, 1, *plain)
    if wants & 16:
        grad_history = x.new_empty((batch, channels, context))
        _product(g, transposed, None, None, None, grad_history, None, None, -context, 1, *plain)

    grad_weight = nothing.clone()
    if wants & 2:
        seen = x if history is None else torch.cat([history, x], -1)
        if group_channels == 1 and groups > 1:
            tiles = batch * triton.cdiv(length, _STRIP)
            per_split = max(4, triton.cdiv(tiles, 1024))
            splits = triton.cdiv(tiles, per_split)
            partial = x.new_zeros((splits, outputs, taps), dtype=torch.float32)
            if g.numel():
                wrap_triton(conv_depthwise_weight_kernel)[(outputs * taps, splits)](
                    g, seen, partial, batch, length, seen.shape[2], channels, outputs, outputs // channels, taps,
                    dilation, per_split, BT=_STRIP, num_warps=4,
                )  # fmt: skip
            grad_weight = partial.sum(0).view(weight.shape).to(x.dtype)
        else:
            table = _WEIGHT[_kind(x.dtype)]
            tile = _side(table, max(outputs // groups, group_channels))
            steps, warps, stages = table[tile]
            tiles = triton.cdiv(outputs // groups, tile) * triton.cdiv(group_channels, tile)
            splits, per_split = _splits(batch * triton.cdiv(length, steps), tiles * taps * groups)
            partial = x.new_zeros((splits, taps, outputs, group_channels), dtype=torch.float32)
            if g.numel() and partial.numel():
                wrap_triton(conv_weight_kernel)[(tiles, taps * groups, splits)](
                    g, seen, partial, batch, length, seen.shape[2], group_channels, outputs // groups, taps, groups,
                    dilation, per_split,
                    PRECISION=_precision(x.dtype), BO=tile, BC=tile, BT=steps, num_warps=warps, num_stages=stages,
                )  # fmt: skip
            grad_weight = partial.sum(0).permute(1, 2, 0).to(x.dtype).contiguous()
    grad_bias = g.sum((0, 2), dtype=torch.float32).to(x.dtype) if wants & 4 else nothing.clone()
    residual = grad_residual if grad_residual is not None else nothing.clone()
    return grad_x, grad_weight, grad_bias, residual, grad_history


def _configurations() -> list[Configuration]:
    """Every tile with the fullest epilogue (forward), the largest with none (data)."""
    sizes = dict.fromkeys(("T", "L", "first", "C", "O", "K", "G", "dilation"), "i32")
    extra = {"threshold": "i64", "scale": "fp32"}
    table = []
    for kind, p in (("ieee", "*fp32"), ("tf32", "*fp32"), ("half", "*bf16")):
        spills = 0 if kind == "ieee" else 544
        for tile, (steps, depth, warps, stages) in _PRODUCT[kind].items():
            shape = {"BO": tile, "BT": steps, "BC": depth, "PRECISION": "tf32" if kind == "tf32" else "ieee"}
            forward = {
                "p_x": p, "p_weight": p, "p_bias": p, "p_residual": p, "p_seed": "*i64", "p_y": p,
                "p_active": "*u8", **sizes, **extra,
            }  # fmt: skip
            options = {"DIRECTION": -1, "ACTIVATION": "relu", "RELU": True, "DROPOUT": True, "p_pre": None}
            table.append(
                Configuration(conv_product_kernel, forward, {**options, **shape}, warps, stages, spills=spills)
            )
        absent = dict.fromkeys(("p_bias", "p_residual", "p_seed", "p_pre", "p_active"))
        data = {"p_x": p, "p_weight": p, "p_y": p, **sizes, **extra}
        options = {"DIRECTION": 1, "ACTIVATION": "none", "RELU": False, "DROPOUT": False, **absent}
        table.append(Configuration(conv_product_kernel, data, {**options, **shape}, warps, stages, spills=spills))
        for tile, (steps, warps, stages) in _WEIGHT[kind].items():
            weight = {"p_g": p, "p_x": p, "p_partial": "*fp32", "B": "i32", "per_split": "i32"}
            weight |= {name: kind for name, kind in sizes.items() if name not in ("L", "first")} | {"S": "i32"}
            shape = {"BO": tile, "BC": tile, "BT": steps, "PRECISION": "tf32" if kind == "tf32" else "ieee"}
            table.append(Configuration(conv_weight_kernel, weight, shape, warps, stages, spills=spills))
    p, block = "*fp32", {"BT": _STRIP}
    rows = dict.fromkeys(("T", "L", "first", "channels", "rows", "fan_in", "fan_out", "K", "dilation"), "i32")
    tensors = dict.fromkeys(("p_x", "p_weight", "p_bias", "p_residual", "p_y"), p)
    epilogue = {"ACTIVATION": "relu", "RELU": True, "DROPOUT": True}
    table.append(
        Configuration(
            conv_depthwise_kernel,
            {**tensors, "p_seed": "*i64", "p_active": "*u8", **rows, **extra},
            {"DIRECTION": -1, **epilogue, "p_pre": None, **block},
        )
    )
    names = ("B", "T", "S", "channels", "rows", "fan_out", "K", "dilation", "per_split")
    table.append(
        Configuration(
            conv_depthwise_weight_kernel,
            {"p_g": p, "p_x": p, "p_partial": p, **dict.fromkeys(names, "i32")},
            block,
        )
    )
    table.append(
        Configuration(
            conv_gradient_kernel,
            {
                "p_grad_y": p,
                "p_y": p,
                "p_active": "*u8",
                "p_seed": "*i64",
                "p_g": p,
                "p_grad_residual": p,
                "T": "i32",
                **extra,
            },
            {**epilogue, "p_pre": None, **block},
        )
    )
    return table


CONFIGURATIONS = _configurations()
