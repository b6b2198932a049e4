"""Depthwise convolutions: a channel of x is met by the taps of ``fan_out`` outputs and of no others.

They move memory: x is read and y written once. The backward pass reads y's gradient and x, and gives all gradients:

    dx[c, t]  = sum_{f,k} W[o, k] g[o, t + s_k]
    dW[o, k]  = sum_{b,t} g[o, t + s_k] x[c, t]     o = c fan_out + f

both of the same tiles of g, which are calculated from y's gradient where they are used.
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


@triton.jit(do_not_specialize=["context"])
def conv_depthwise_kernel(
    p_x,  # [B, channels, T]
    p_history,  # [N, channels, context]
    p_begin,  # [B, T]
    p_row,  # [B, T]
    p_weight,  # [outputs, K]
    p_bias, p_residual, p_seed, p_y, p_pre, p_active,
    T, context, outputs, fan_out, K, down, across, side, width, threshold, scale,
    GRID: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A strip of a row of y [B, outputs, T]."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    program = tl.program_id(0).to(tl.int64)
    i_b, o = program // outputs, program % outputs
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    p_x += program // fan_out * T
    lower = o_t * 0
    if p_begin is not None:
        lower = tl.load(p_begin + i_b * T + o_t, mask=o_t < T, other=0)
    if p_history is not None:
        row = i_b
        if p_row is not None:
            row = tl.load(p_row + i_b * T + o_t, mask=o_t < T, other=0).to(tl.int64)
        p_before = p_history + (row * (outputs // fan_out) + o // fan_out) * context + context - lower
    acc = tl.zeros([BT], dtype=tl.float32)
    for k in range(K):
        at, there = tap_at(k, o_t, 0, K, down, across, side, width, -1, GRID)
        x = tl.load(p_x + at, mask=there & (at >= lower) & (at < T), other=0.0).to(tl.float32)
        if p_history is not None:
            x += tl.load(p_before + at, mask=there & (at < lower) & (o_t < T), other=0.0).to(tl.float32)
        acc += tl.load(p_weight + o * K + k).to(tl.float32) * x
    finish(
        acc, acc, i_b, o, o_t, o < outputs, o_t < T, p_bias, p_residual, p_seed, p_y, p_pre, p_active, outputs, T,
        threshold, scale, ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip


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
    GRID: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Of a strip of x, which is at steps ``first`` to first + T of y: all gradients."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    program = tl.program_id(0).to(tl.int64)
    i_b, i_c = program // channels, program % channels
    outputs = channels * fan_out
    o_t = tl.program_id(1) * BT + tl.arange(0, BT)
    o_x = program * T + o_t
    part = i_b * tl.num_programs(1) + tl.program_id(1)
    upper = o_t * 0 + L
    if p_end is not None:
        upper = tl.load(p_end + i_b * L + o_t, mask=o_t < L, other=0)
    if p_taps is not None:
        x = tl.load(p_x + o_x, mask=o_t < T, other=0.0).to(tl.float32)
    dx = tl.zeros([BT], dtype=tl.float32)
    if p_addend is not None:
        dx += tl.load(p_addend + o_x, mask=o_t < T, other=0.0).to(tl.float32)
    for f in range(fan_out):
        o = i_c * fan_out + f
        if p_sums is not None or p_grad_residual is not None:
            d, g = gradient_at(
                p_grad_y, p_y, p_pre, p_active, p_seed, i_b, o, o_t, o_t < L, outputs, L, threshold, scale,
                ACTIVATION, RELU, DROPOUT,
            )  # fmt: skip
            if p_sums is not None:
                tl.store(p_sums + part * outputs + o, tl.sum(tl.where(o_t < L, g, 0.0), 0))
            if p_grad_residual is not None:
                p_out = p_grad_residual + (i_b * outputs + o) * L + o_t
                tl.store(p_out, d.to(p_grad_residual.dtype.element_ty), mask=o_t < L)
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
                tl.store(p_taps + (part * outputs + o) * K + k, tl.sum(g * x, 0))
    if p_grad_x is not None:
        tl.store(p_grad_x + o_x, dx.to(p_grad_x.dtype.element_ty), mask=o_t < T)


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
        GRID=taps.across > 1, **epilogue.options, BT=STRIP, num_warps=4,
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
            GRID=taps.across > 1, **epilogue.options, BT=STRIP, num_warps=4,
        )  # fmt: skip
    return by_tap, sums
