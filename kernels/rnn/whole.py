"""All steps in one launch: cells with one product a step and no layer norm, of up to 64, or 80, 96, 112, 128 units.

A program owns BLOCK_B rows of the batch and walks through time; programs never wait for each other. The state stays in
registers; W_hh is loaded once and stays in shared memory (with four gates, 128 units and 16 bits 128 KiB of it); each
step's operands are loaded STAGES - 1 steps ahead.
"""

import triton
import triton.language as tl

from seqaccel.kernels.rnn.step import load_tiles, step_backward, step_forward


@triton.jit
def load_weight(p_weight, o, H, mask, GATES: tl.constexpr):
    b = ()
    for k in tl.static_range(GATES):
        b += (tl.load(p_weight + o + k * H * H, mask=mask, other=0.0),)
    return b


@triton.jit
def whole_forward_kernel(
    p_x,  # [T, B, G*H] W_ih x + b; may be p_gates
    p_weight,  # [G*H, H]
    p_bias,  # [G*H] added to the product, or None
    p_vectors,  # [VECTORS, H]
    p_lengths,  # [B] or None
    p_zoneout_h,  # [T, B, H] or [1] or None
    p_zoneout_c,  # [T, B, H] or [1] or None
    p_h,  # [B, H] float32: h_0, overwritten by h_n
    p_c,  # [B, H] float32: c_0, overwritten by c_n
    p_output,  # [T, B, H]
    p_gates,  # [T, B, SAVED*H] or None
    p_cells,  # [T, B, H] float32, or None
    p_carried,  # [T, B, H] float32 or None
    T,
    B,
    H,
    zoneout_h_stride,
    zoneout_c_stride,
    FORWARD: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_C: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]  # [BLOCK_B, 1]
    unit = tl.arange(0, BLOCK_H)[None, :]  # [1, BLOCK_H]
    k = tl.arange(0, BLOCK_H)[:, None]
    mask, m_weight = (b < B) & (unit < H), (k < H) & (unit < H)
    b_h = tl.load(p_h + b * H + unit, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_H]
    b_c = b_h
    if HAS_C:
        b_c = tl.load(p_c + b * H + unit, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + b, mask=b < B, other=0)
    o_weight = unit * H + k
    b_w = load_weight(p_weight, o_weight, H, m_weight, GATES)
    for s in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - s if REVERSE else s
        row = tl.cast(t, tl.int64) * B + b
        b_x = load_tiles(p_x, row * GATES * H + unit, H, mask, GATES)
        b_operand = b_h.to(p_weight.dtype.element_ty)
        b_r = ()
        for i in tl.static_range(GATES):
            b_r += (tl.dot(b_operand, b_w[i], input_precision=PRECISION),)
        if p_bias is not None:
            b_bias = load_tiles(p_bias, unit, H, unit < H, GATES)
            b_sum = ()
            for i in tl.static_range(GATES):
                b_sum += (b_r[i] + b_bias[i],)
            b_r = b_sum
        b_v = load_tiles(p_vectors, unit, H, unit < H, VECTORS)
        running = None
        if p_lengths is not None:
            running = t < b_length
        b_h, b_c = step_forward(
            b_x, b_r, b_h, b_c, b_v, row, unit, running, mask, p_output, p_gates, p_cells, p_carried, p_zoneout_h,
            p_zoneout_c, zoneout_h_stride, zoneout_c_stride, H, FORWARD, SAVED, HAS_C, False,
        )  # fmt: skip
    tl.store(p_h + b * H + unit, b_h, mask=mask)
    if HAS_C:
        tl.store(p_c + b * H + unit, b_c, mask=mask)


@triton.jit
def whole_backward_kernel(
    p_grad_output,  # [T, B, H] or None
    p_weight,  # [G*H, H]
    p_gates,  # [T, B, SAVED*H]
    p_vectors,  # [VECTORS, H]
    p_cells,  # [T, B, H] float32
    p_carried,  # [T, B, H] float32 or None
    p_c_0,  # [B, H]
    p_output,  # [T, B, H]
    p_h_0,  # [B, H]
    p_lengths,  # [B] or None
    p_zoneout_h,  # [T, B, H] or [1] or None
    p_zoneout_c,  # [T, B, H] or [1] or None
    p_dh,  # [B, H] float32: gradient of h_n, overwritten by that of h_0
    p_dc,  # [B, H] float32: gradient of c_n, overwritten by that of c_0
    p_grad_x,  # [T, B, G*H]
    p_grad_r,  # [T, B, G*H] where it is not grad_x, or None
    T,
    B,
    H,
    zoneout_h_stride,
    zoneout_c_stride,
    BACKWARD: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_C: tl.constexpr,
    USES_OUTPUT: tl.constexpr,
    USES_H: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    unit = tl.arange(0, BLOCK_H)[None, :]
    k = tl.arange(0, BLOCK_H)[:, None]
    mask, m_weight = (b < B) & (unit < H), (k < H) & (unit < H)
    b_dh = tl.load(p_dh + b * H + unit, mask=mask, other=0.0)
    b_dc = b_dh
    if HAS_C:
        b_dc = tl.load(p_dc + b * H + unit, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + b, mask=b < B, other=0)
    o_weight = k * H + unit
    b_w = load_weight(p_weight, o_weight, H, m_weight, GATES)
    for s in tl.range(0, T, num_stages=STAGES):
        t = s if REVERSE else T - 1 - s
        earlier = t + 1 if REVERSE else t - 1
        row, earlier_row = tl.cast(t, tl.int64) * B + b, tl.cast(earlier, tl.int64) * B + b
        inner = unit * 0 + s < T - 1
        inner_h = inner
        running = None
        if p_lengths is not None:
            running = t < b_length
            inner_h = inner & (earlier < b_length)
        b_held = b_dh
        if p_grad_output is not None:
            b_dh += tl.load(p_grad_output + row * H + unit, mask=mask, other=0.0).to(tl.float32)
        b_v = load_tiles(p_vectors, unit, H, unit < H, VECTORS)
        b_dr, b_dh, b_dc = step_backward(
            b_dh, b_dc, b_v, row, earlier_row, inner, inner_h, b, unit, running, mask, p_gates, p_cells, p_carried,
            p_c_0, p_output, p_h_0, p_zoneout_h, p_zoneout_c, zoneout_h_stride, zoneout_c_stride, p_grad_x, None, H,
            BACKWARD, GATES, SAVED, HAS_C, USES_OUTPUT, USES_H, False,
        )  # fmt: skip
        if p_grad_r is not None:
            for i in tl.static_range(GATES):
                b_dr_i = b_dr[i].to(p_grad_r.dtype.element_ty)
                tl.store(p_grad_r + row * GATES * H + i * H + unit, b_dr_i, mask=mask)
        for i in tl.static_range(GATES):
            b_dh += tl.dot(b_dr[i].to(p_weight.dtype.element_ty), b_w[i], input_precision=PRECISION)
        if running is not None:
            b_dh = tl.where(running, b_dh, b_held)
    tl.store(p_dh + b * H + unit, b_dh, mask=mask)
    if HAS_C:
        tl.store(p_dc + b * H + unit, b_dc, mask=mask)
