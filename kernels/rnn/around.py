"""What surrounds a step: the first of two dependent products, and the layer norm of rows of all steps at once."""

import triton
import triton.language as tl

from seqaccel.kernels._math import sigmoid
from seqaccel.kernels.rnn.cells import normalize, normalize_backward
from seqaccel.kernels.rnn.step import begins_at, restarted

# ---- GRU, reset before: r, z = sigmoid(x + W h'), then the product behind r h' ----


@triton.jit(do_not_specialize=["t", "B"])
def reset_forward_kernel(
    p_gates,  # [T, B, 3H] W_ih x + b; r and z are overwritten by their activated values
    p_product,  # [B, 2H] W_hr h', W_hz h'
    p_h,  # [B, H] float32
    p_operand,  # [B, H] r h'
    t,
    B,
    H,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < H
    p_r = p_gates + (tl.cast(t, tl.int64) * B + b) * 3 * H + unit
    p_product += b * 2 * H + unit
    b_r = tl.load(p_r, mask=mask, other=0.0).to(tl.float32) + tl.load(p_product, mask=mask, other=0.0).to(tl.float32)
    b_z = tl.load(p_r + H, mask=mask, other=0.0).to(tl.float32)
    b_r, b_z = sigmoid(b_r), sigmoid(b_z + tl.load(p_product + H, mask=mask, other=0.0).to(tl.float32))
    b_h = tl.load(p_h + b * H + unit, mask=mask, other=0.0)
    tl.store(p_r, b_r.to(p_gates.dtype.element_ty), mask=mask)
    tl.store(p_r + H, b_z.to(p_gates.dtype.element_ty), mask=mask)
    tl.store(p_operand + b * H + unit, (b_r * b_h).to(p_operand.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["t", "earlier", "B"])
def reset_backward_kernel(
    p_product,  # [B, H] gradient of r h'
    p_gates,  # [T, B, 3H] activated
    p_output,  # [T, B, H]
    p_h_0,  # [B, H]
    p_lengths,  # [B] or None
    p_begins,  # [T, B] int8 or None: an episode begins with the step
    p_dh,  # [B, H] float32, added to
    p_grad_x,  # [T, B, 3H]: r's part is written
    t,
    earlier,
    B,
    H,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < H
    row = tl.cast(t, tl.int64) * B + b
    s_earlier = tl.zeros_like(unit) + earlier
    inner = s_earlier >= 0
    running = s_earlier >= -1
    if p_lengths is not None:
        length = tl.load(p_lengths + b)
        inner = inner & (s_earlier < length)
        running = tl.zeros_like(unit) + t < length
    b_d = tl.load(p_product + b * H + unit, mask=mask, other=0.0).to(tl.float32)
    b_r = tl.load(p_gates + row * 3 * H + unit, mask=mask, other=0.0).to(tl.float32)
    b_earlier = tl.load(p_output + (tl.cast(earlier, tl.int64) * B + b) * H + unit, mask=mask & inner, other=0.0)
    b_h = tl.where(inner, b_earlier, tl.load(p_h_0 + b * H + unit, mask=mask, other=0.0)).to(tl.float32)
    b_h = restarted(b_h, begins_at(p_begins, t, B, b))
    b_dh = tl.load(p_dh + b * H + unit, mask=mask, other=0.0)
    tl.store(p_dh + b * H + unit, b_dh + tl.where(running, b_d * b_r, 0.0), mask=mask)
    b_dr = tl.where(running, b_d * b_h * b_r * (1.0 - b_r), 0.0)
    tl.store(p_grad_x + row * 3 * H + unit, b_dr.to(p_grad_x.dtype.element_ty), mask=mask)


# ---- multiplicative LSTM: m = (W_mx x) (W_mh h') ----


@triton.jit(do_not_specialize=["t", "B"])
def multiply_forward_kernel(p_m_x, p_m_h, p_operand, t, B, H, BLOCK: tl.constexpr):
    """p_operand [B, H] = p_m_x[t] p_m_h [B, H]."""
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < H
    b_x = tl.load(p_m_x + (tl.cast(t, tl.int64) * B + b) * H + unit, mask=mask, other=0.0).to(tl.float32)
    b_h = tl.load(p_m_h + b * H + unit, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_operand + b * H + unit, (b_x * b_h).to(p_operand.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["t", "B"])
def multiply_backward_kernel(
    p_product,  # [B, H] gradient of m
    p_m_x,  # [T, B, H] W_mx x
    p_m_h,  # [T, B, H] W_mh h'
    p_lengths,  # [B] or None
    p_grad_m_x,  # [T, B, H]
    p_grad_m_h,  # [T, B, H]
    t,
    B,
    H,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < H
    read = mask
    if p_lengths is not None:
        read = mask & (tl.zeros_like(unit) + t < tl.load(p_lengths + b))  # gradients are 0 past the end of a row
    o = (tl.cast(t, tl.int64) * B + b) * H + unit
    b_d = tl.load(p_product + b * H + unit, mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_m_x + o, mask=read, other=0.0).to(tl.float32)
    b_h = tl.load(p_m_h + o, mask=read, other=0.0).to(tl.float32)
    tl.store(p_grad_m_x + o, (b_d * b_h).to(p_grad_m_x.dtype.element_ty), mask=mask)
    tl.store(p_grad_m_h + o, (b_d * b_x).to(p_grad_m_h.dtype.element_ty), mask=mask)


# ---- layer norm of rows [N, W] ----


@triton.jit
def rows_forward_kernel(
    p_x,  # [N, W], overwritten by LN(x) gamma + bias
    p_gamma,  # [W]
    p_bias,  # [W] or None
    W,
    BLOCK: tl.constexpr,
):
    o_w = tl.arange(0, BLOCK)
    mask = o_w < W
    p_x += tl.program_id(0).to(tl.int64) * W + o_w
    hat, _ = normalize((tl.load(p_x, mask=mask, other=0.0).to(tl.float32),), mask, W)
    b_y = hat[0] * tl.load(p_gamma + o_w, mask=mask, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_y += tl.load(p_bias + o_w, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_x, b_y.to(p_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "ROWS"])
def rows_backward_kernel(
    p_x,  # [N, W] before the layer norm
    p_dy,  # [N, W] gradient of LN(x) gamma
    p_gamma,  # [W]
    p_dx,  # [N, W] or None where it is not needed
    p_dgamma,  # [programs, W] float32: each program's sum
    N,
    W,
    ROWS,  # rows of a program
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    o_w = tl.arange(0, BLOCK)
    mask = o_w < W
    b_gamma = tl.load(p_gamma + o_w, mask=mask, other=0.0).to(tl.float32)
    b_dgamma = tl.zeros([BLOCK], tl.float32)
    for n in range(i * ROWS, tl.minimum((i + 1) * ROWS, N)):
        o = tl.cast(n, tl.int64) * W + o_w
        hat, rstd = normalize((tl.load(p_x + o, mask=mask, other=0.0).to(tl.float32),), mask, W)
        b_dy = tl.load(p_dy + o, mask=mask, other=0.0).to(tl.float32)
        b_dgamma += b_dy * hat[0]
        if p_dx is not None:
            b_dx = normalize_backward(hat, rstd, (b_dy * b_gamma,), mask, W)
            tl.store(p_dx + o, b_dx[0].to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_dgamma + tl.cast(i, tl.int64) * W + o_w, b_dgamma, mask=mask)
