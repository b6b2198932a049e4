"""Depthwise convolutions: a channel of x is met by the taps of ``fan_out`` outputs and of no others.

They move memory: x is read and y written once. The backward pass reads y's gradient and x, and gives all gradients:

    dx[c, t]  = sum_{f,k} W[o, k] g[o, t + s_k]
    dW[o, k]  = sum_{b,t} g[o, t + s_k] x[c, t]     o = c fan_out + f

both of the same tiles of g, which are calculated from y's gradient where they are used. A tile is N vectors of V steps,
16 bytes each where whole sequences have a multiple of 16 steps. A tap then meets steps that lie across two vectors: the
kernel is compiled for what its distance leaves when divided by V, and picks those steps in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import wrap_triton
from seqaccel.kernels.conv.epilogue import Epilogue, finish, gradient_at
from seqaccel.kernels.conv.taps import Sequences, Taps, tap_at

STRIP = 1024  # time steps per program
_TAPS = 8  # the most that are unrolled for vectors


@triton.jit
def _columns(v, N: tl.constexpr, V: tl.constexpr):
    """The columns of [N, V]."""
    if V == 4:
        even, odd = tl.split(v.reshape([N, 2, 2]))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        return v0, v1, v2, v3
    else:
        even, odd = tl.split(v.reshape([N, 2, 2, 2]))
        v04, v26 = tl.split(even)
        v15, v37 = tl.split(odd)
        v0, v4 = tl.split(v04)
        v1, v5 = tl.split(v15)
        v2, v6 = tl.split(v26)
        v3, v7 = tl.split(v37)
        return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def _across(a, b, R: tl.constexpr, N: tl.constexpr, V: tl.constexpr):
    """Columns R to R + V of a [N, V] and b [N, V] side by side."""
    c = (_columns(a, N, V) + _columns(b, N, V))[R : R + V]
    if V == 4:
        return tl.join(tl.join(c[0], c[2]), tl.join(c[1], c[3])).reshape([N, V])
    else:
        even = tl.join(tl.join(c[0], c[4]), tl.join(c[2], c[6]))
        odd = tl.join(tl.join(c[1], c[5]), tl.join(c[3], c[7]))
        return tl.join(even, odd).reshape([N, V])


@triton.jit(do_not_specialize=["context"])
def conv_depthwise_kernel(
    p_x,  # [B, channels, T]
    p_history,  # [N, channels, context]
    p_begin,  # [B, T]
    p_row,  # [B, T]
    p_weight,  # [outputs, K]
    p_bias, p_residual, p_seed, p_y, p_pre, p_active,
    T, context, outputs, fan_out, K, down, across, side, width, threshold, scale,
    GRID: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    TAPS: tl.constexpr, REST: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """A strip of a row of y [B, outputs, T]. With vectors TAPS is K and REST is down % V."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    program = tl.program_id(0).to(tl.int64)
    i_b, o = program // outputs, program % outputs
    o_n = tl.program_id(1) * N + tl.arange(0, N)[:, None]
    o_v = tl.arange(0, V)[None, :]
    o_t = o_n * V + o_v
    p_x += program // fan_out * T
    p_weight += o * K
    acc = tl.zeros([N, V], dtype=tl.float32)
    if V > 1:
        for k in tl.static_range(TAPS):
            x = _x_at(p_x, o_n, o_v, (k + 1 - TAPS) * down, T, (k + 1 - TAPS) * REST % V, N, V)
            acc += tl.load(p_weight + k).to(tl.float32) * x
    else:
        lower = o_t * 0
        if p_begin is not None:
            lower = tl.load(p_begin + i_b * T + o_t, mask=o_t < T, other=0)
        if p_history is not None:
            row, continues = i_b, o_t < T
            if p_row is not None:
                row = tl.load(p_row + i_b * T + o_t, mask=o_t < T, other=0).to(tl.int64)
                continues = continues & (row >= 0)
            p_before = p_history + (row * (outputs // fan_out) + o // fan_out) * context + context - lower
        for k in range(K):
            at, there = tap_at(k, o_t, 0, K, down, across, side, width, -1, GRID)
            x = tl.load(p_x + at, mask=there & (at >= lower) & (at < T), other=0.0).to(tl.float32)
            if p_history is not None:
                x += tl.load(p_before + at, mask=there & (at < lower) & continues, other=0.0).to(tl.float32)
            acc += tl.load(p_weight + k).to(tl.float32) * x
    finish(
        acc, acc, i_b, o, o_t, o < outputs, o_t < T, p_bias, p_residual, p_seed, p_y, p_pre, p_active, outputs, T,
        threshold, scale, ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip


@triton.jit
def _x_at(p_x, o_n, o_v, distance, T, R: tl.constexpr, N: tl.constexpr, V: tl.constexpr):
    """x [N, V] this far from the steps of a tile; R is the distance % V."""
    n = o_n + (distance - R) // V
    x = tl.load(p_x + n * V + o_v, mask=(n >= 0) & (n < T // V), other=0.0)
    if R > 0:
        following = tl.load(p_x + (n + 1) * V + o_v, mask=(n >= -1) & (n < T // V - 1), other=0.0)
        x = _across(x, following, R, N, V)
    return x.to(tl.float32)


@triton.jit
def _gradient_across(
    p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, o_n, o_v, distance, outputs, L, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """v's gradient [N, V] this far from the steps of a tile; R is the distance % V."""
    n = o_n + (distance - R) // V
    _, g = gradient_at(
        p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, n * V + o_v, n < L // V, outputs, L, threshold, scale,
        ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip
    if R > 0:
        _, following = gradient_at(
            p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, (n + 1) * V + o_v, n + 1 < L // V, outputs, L, threshold,
            scale, ACTIVATION, RELU, DROPOUT,
        )  # fmt: skip
        g = _across(g, following, R, N, V)
    return g


@triton.jit(do_not_specialize=["first"])
def conv_depthwise_gradient_kernel(
    p_grad_y, p_y, p_pre, p_active, p_seed,  # [B, outputs, L]
    p_end,  # [B, L]
    p_x,  # [B, channels, T]
    p_weight,  # [outputs, K]
    p_addend, p_grad_x,  # [B, channels, T]
    p_grad_residual,  # [B, outputs, L]
    p_taps,  # [B * strips, outputs, K], fp32
    p_sums,  # [B * strips, outputs], fp32
    T, L, first, channels, fan_out, K, down, across, side, width, threshold, scale,
    GRID: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    TAPS: tl.constexpr, REST: tl.constexpr, N: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """All gradients of a strip of x, which is at steps ``first`` to first + T of y; with vectors first is 0."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    program = tl.program_id(0).to(tl.int64)
    i_b, i_c = program // channels, program % channels
    outputs = channels * fan_out
    o_n = tl.program_id(1) * N + tl.arange(0, N)[:, None]
    o_v = tl.arange(0, V)[None, :]
    o_t = o_n * V + o_v
    part = i_b * tl.num_programs(1) + tl.program_id(1)
    p_x += program * T
    upper = o_t * 0 + L
    if p_end is not None:
        upper = tl.load(p_end + i_b * L + o_t, mask=o_t < L, other=0)
    x = tl.load(p_x + o_t, mask=o_t < T, other=0.0).to(tl.float32)
    dx = tl.zeros([N, V], dtype=tl.float32)
    if p_addend is not None:
        dx += tl.load(p_addend + program * T + o_t, mask=o_t < T, other=0.0).to(tl.float32)
    for f in range(fan_out):
        o = i_c * fan_out + f
        if p_sums is not None or p_grad_residual is not None:
            d, g = gradient_at(
                p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, o_t, o_t < L, outputs, L, threshold, scale,
                ACTIVATION, RELU, DROPOUT,
            )  # fmt: skip
            if p_sums is not None:
                tl.store(p_sums + part * outputs + o, tl.sum(tl.where(o_t < L, g, 0.0)))
            if p_grad_residual is not None:
                p_out = p_grad_residual + i_b * outputs * L + o * L + o_t
                tl.store(p_out, d.to(p_grad_residual.dtype.element_ty), mask=o_t < L)
        if V > 1:
            for k in tl.static_range(TAPS):
                g = _gradient_across(
                    p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, o_n, o_v, (TAPS - 1 - k) * down, outputs, L,
                    threshold, scale, ACTIVATION, RELU, DROPOUT, (TAPS - 1 - k) * REST % V, N, V,
                )  # fmt: skip
                dx += tl.load(p_weight + o * K + k).to(tl.float32) * g
                if p_taps is not None:
                    tl.store(p_taps + (part * outputs + o) * K + k, tl.sum(g * x))
        else:
            for k in range(K):
                at, there = tap_at(k, o_t, first, K, down, across, side, width, 1, GRID)
                met = there & (at >= 0) & (at < upper) & (o_t < T)
                _, g = gradient_at(
                    p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, at, met, outputs, L, threshold, scale,
                    ACTIVATION, RELU, DROPOUT,
                )  # fmt: skip
                g = tl.where(met, g, 0.0)
                dx += tl.load(p_weight + o * K + k).to(tl.float32) * g
                if p_taps is not None:
                    tl.store(p_taps + (part * outputs + o) * K + k, tl.sum(g * x))
    if p_grad_x is not None:
        tl.store(p_grad_x + program * T + o_t, dx.to(p_grad_x.dtype.element_ty), mask=o_t < T)


def _tile(x: Tensor, taps: Taps, whole: bool) -> dict[str, int]:
    """Vectors of 16 bytes where steps of whole sequences come in them, else single steps."""
    if whole and taps.across == 1 and taps.count <= _TAPS and x.shape[2] % 16 == 0:
        v = 16 // x.element_size()
        return {"TAPS": taps.count, "REST": taps.down % v, "N": STRIP // v, "V": v}
    return {"TAPS": 0, "REST": 0, "N": STRIP, "V": 1}


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, history: Tensor | None, y: Tensor,
    pre: Tensor | None, active: Tensor | None, taps: Taps, sequences: Sequences, epilogue: Epilogue,
) -> None:  # fmt: skip
    """Launches the forward pass."""
    batch, outputs, length = y.shape
    if y.numel() == 0:
        return
    wrap_triton(conv_depthwise_kernel)[(batch * outputs, triton.cdiv(length, STRIP))](
        x, history, sequences.begin, sequences.row, weight, bias, residual, epilogue.seed, y, pre, active,
        length, taps.context, outputs, outputs // x.shape[1], taps.count, *taps[1:], *epilogue.numbers,
        GRID=taps.across > 1, **epilogue.options, **_tile(x, taps, history is None and sequences.begin is None),
        num_warps=4,
    )  # fmt: skip


def depthwise_gradients(
    grad_y: Tensor, y: Tensor | None, pre: Tensor | None, active: Tensor | None, x: Tensor, weight: Tensor,
    addend: Tensor | None, grad_x: Tensor | None, grad_residual: Tensor | None, wants_weight: bool, wants_bias: bool,
    first: int, taps: Taps, end: Tensor | None, epilogue: Epilogue,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the backward pass for an x that is at steps ``first`` on of y.

    Returns the parts of the gradients of the weight [parts, outputs, K] and of the bias [parts, outputs].
    """
    batch, channels, length = x.shape
    outputs, steps = grad_y.shape[1:]
    strips = triton.cdiv(length, STRIP)
    empty = grad_y.numel() == 0 or x.numel() == 0
    fresh = grad_y.new_zeros if empty else grad_y.new_empty
    by_tap, sums = (
        fresh((batch * strips, *shape), dtype=torch.float32) for shape in ((outputs, taps.count), (outputs,))
    )
    if not empty:
        wrap_triton(conv_depthwise_gradient_kernel)[(batch * channels, strips)](
            grad_y, y, pre, active, epilogue.seed, end, x, weight, addend, grad_x, grad_residual,
            by_tap if wants_weight else None, sums if wants_bias else None,
            length, steps, first, channels, outputs // channels, taps.count, *taps[1:], *epilogue.numbers,
            GRID=taps.across > 1, **epilogue.options, **_tile(x, taps, first == 0 and length == steps and end is None),
            num_warps=4,
        )  # fmt: skip
    elif grad_x is not None:
        grad_x.copy_(torch.zeros_like(grad_x) if addend is None else addend)
    return by_tap, sums
