"""All steps in one launch, of cells with one product a step and no layer norm.

A program owns BLOCK_B rows of the batch and walks through time; h and c stay in registers, its part of W_hh is loaded
once and stays in shared memory. Up to 64, or 80, 96, 112, 128 units it owns all units, and programs never wait for each
other; each step's operands are loaded STAGES - 1 steps ahead.

More units are SPREAD: a program owns BLOCK_U of them, and a step needs what all programs of its rows found in the step
before: h by way of p_exchange, or in the backward pass the gradient of r. Each program counts itself in once it has
stored its part, and waits until all have; all must be running, so the launch is cooperative. What a step loads
otherwise, it loads before it waits.
"""

import triton
import triton.language as tl

from seqaccel.kernels.rnn.step import load_backward, load_tiles, step_backward, step_forward, store_forward, store_tiles

_WAIT = tl.constexpr("""{
.reg .pred p;
.reg .u32 found;
mov.u32 found, %tid.x;
setp.ne.u32 p, found, 0;
@p bra DONE;
WAIT:
ld.acquire.gpu.global.u32 found, [$1];
setp.lt.s32 p, found, $2;
@p bra WAIT;
DONE:
mov.u32 $0, 0;
}""")


@triton.jit
def arrive(p_arrived):
    """Counts this program in: who waits for it sees all that it has stored."""
    tl.debug_barrier()
    tl.atomic_add(p_arrived, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_arrived, count):
    """Until ``count`` programs have arrived. One thread looks; one program need not wait for itself."""
    if tl.num_programs(1) > 1:
        tl.inline_asm_elementwise(_WAIT, "=r,l,r", [p_arrived.to(tl.int64), count], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def load_weight(p_weight, unit, k, H, GATES: tl.constexpr):
    """Tiles [k, unit], one a gate, of W_hh transposed."""
    b = ()
    for i in tl.static_range(GATES):
        b += (tl.load(p_weight + (i * H + unit) * H + k, mask=(k < H) & (unit < H), other=0.0),)
    return b


@triton.jit
def load_weight_backward(p_weight, unit, k, H, GATES: tl.constexpr):
    """Tiles [k, unit], one a gate, of W_hh."""
    b = ()
    for i in tl.static_range(GATES):
        b += (tl.load(p_weight + (i * H + k) * H + unit, mask=(k < H) & (unit < H), other=0.0),)
    return b


@triton.jit
def load_weight_parts(p_weight, unit, k, H, GATES: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """PARTS tiles [k, unit] of all gates' rows of W_hh, BLOCK rows each."""
    b = ()
    for n in tl.static_range(PARTS):
        row = n * BLOCK + k
        b += (tl.load(p_weight + row * H + unit, mask=(row < GATES * H) & (unit < H), other=0.0),)
    return b


@triton.jit
def load_operand(p, b, k, B, K):
    """[SPREAD, BLOCK_B, BLOCK_K] of rows of K values that other programs have just stored: past the L1 cache."""
    return tl.load(p + b * K + k, mask=(b < B) & (k < K), other=0.0, cache_modifier=".cg")


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
    p_exchange,  # [2, B, H] where SPREAD: its first half h_0
    p_arrived,  # [blocks of rows, 32] where SPREAD: zeros
    T,
    B,
    H,
    b_first,  # the first row
    zoneout_h_stride,
    zoneout_c_stride,
    FORWARD: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_C: tl.constexpr,
    REVERSE: tl.constexpr,
    SPREAD: tl.constexpr,  # parts of the product's sum, one a warp; 0: one program has all units
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = (b_first + tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]  # [BLOCK_B, 1]
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]  # [1, BLOCK_U]
    k = tl.arange(0, BLOCK_K)
    mask = (b < B) & (unit < H)
    b_h = tl.load(p_h + b * H + unit, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_U]
    b_c = b_h
    if HAS_C:
        b_c = tl.load(p_c + b * H + unit, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + b, mask=b < B, other=0)
    if SPREAD:
        p_arrived += tl.program_id(0) * 32
        k = (tl.arange(0, SPREAD)[:, None] * BLOCK_K + k[None, :])[:, None, :]
        b_w = load_weight(p_weight, unit[None, :, :], tl.trans(k, 0, 2, 1), H, GATES)
    else:
        b_w = load_weight(p_weight, unit, k[:, None], H, GATES)
    for s in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - s if REVERSE else s
        row = tl.cast(t, tl.int64) * B + b
        b_x = load_tiles(p_x, row * GATES * H + unit, H, mask, GATES)
        b_r = ()
        if SPREAD:
            wait(p_arrived, s * tl.num_programs(1))
            b_operand = load_operand(p_exchange + s % 2 * B * H, b[None, :, :], k, B, H)
            for i in tl.static_range(GATES):
                b_r += (tl.sum(tl.dot(b_operand, b_w[i], input_precision=PRECISION), 0),)
        else:
            b_operand = b_h.to(p_weight.dtype.element_ty)
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
        b_s, b_fresh, b_h, b_c = step_forward(
            b_x, b_r, b_h, b_c, b_v, row * H + unit, running, mask, p_zoneout_h, p_zoneout_c, zoneout_h_stride,
            zoneout_c_stride, H, FORWARD, HAS_C, False,
        )  # fmt: skip
        if SPREAD:
            o_to = ((s + 1) % 2 * B + b) * H + unit
            tl.store(p_exchange + o_to, b_h.to(p_exchange.dtype.element_ty), mask=mask)
            arrive(p_arrived)
        store_forward(
            b_s, b_fresh, b_h, b_c, row, unit, running, mask, p_output, p_gates, p_cells, p_carried, H, SAVED, HAS_C,
            False,
        )  # fmt: skip
    tl.store(p_h + b * H + unit, b_h, mask=mask)
    if HAS_C:
        tl.store(p_c + b * H + unit, b_c, mask=mask)


@triton.jit
def product_of_step(
    b_w, p_grad_r, p_arrived, s, t, b, k, B, K, BLOCK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """Gradient of h through r of step t, once every program has stored its part of s steps; s = 0: none, zeros."""
    wait(p_arrived, s * tl.num_programs(1))
    p, rows = p_grad_r + tl.cast(t, tl.int64) * B * K, tl.where(s > 0, B, 0)
    b_sum = tl.dot(load_operand(p, b[None, :, :], k, rows, K), b_w[0], input_precision=PRECISION)
    for n in tl.static_range(1, PARTS):
        b_dr = load_operand(p, b[None, :, :], n * BLOCK + k, rows, K)
        b_sum = tl.dot(b_dr, b_w[n], b_sum, input_precision=PRECISION)
    return tl.sum(b_sum, 0)


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
    p_arrived,  # [blocks of rows, 32] where SPREAD: zeros
    T,
    B,
    H,
    b_first,  # the first row
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
    SPREAD: tl.constexpr,  # parts of the product's sum, one a warp; 0: one program has all units
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # tiles that the sum is cut into where SPREAD, one after the other
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b = (b_first + tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]
    k = tl.arange(0, BLOCK_K)
    mask = (b < B) & (unit < H)
    b_dh = tl.load(p_dh + b * H + unit, mask=mask, other=0.0)
    b_dc = b_dh
    if HAS_C:
        b_dc = tl.load(p_dc + b * H + unit, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + b, mask=b < B, other=0)
    if SPREAD:
        p_arrived += tl.program_id(0) * 32
        k = (tl.arange(0, SPREAD)[:, None] * BLOCK_K + k[None, :])[:, None, :]
        b_w = load_weight_parts(p_weight, unit[None, :, :], tl.trans(k, 0, 2, 1), H, GATES, SPREAD * BLOCK_K, PARTS)
    else:
        b_w = load_weight_backward(p_weight, unit, k[:, None], H, GATES)
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
        b_grad = b_dh
        if p_grad_output is not None:
            b_grad = tl.load(p_grad_output + row * H + unit, mask=mask, other=0.0).to(tl.float32)
        b_saved = load_backward(
            row, earlier_row, inner, inner_h, b, unit, mask, p_gates, p_cells, p_carried, p_c_0, p_output, p_h_0, H,
            SAVED, HAS_C, USES_OUTPUT, USES_H,
        )  # fmt: skip
        if SPREAD:
            # Through r of the step before in this pass.
            p_grad_last = p_grad_x if p_grad_r is None else p_grad_r
            t_last = t - 1 if REVERSE else t + 1
            b_dh += product_of_step(
                b_w, p_grad_last, p_arrived, s, t_last, b, k, B, GATES * H, SPREAD * BLOCK_K, PARTS, PRECISION
            )
        b_held = b_dh
        if p_grad_output is not None:
            b_dh += b_grad
        b_v = load_tiles(p_vectors, unit, H, unit < H, VECTORS)
        b_dr, b_dh, b_dc = step_backward(
            b_saved, b_dh, b_dc, b_v, row, unit, running, mask, p_zoneout_h, p_zoneout_c, zoneout_h_stride,
            zoneout_c_stride, p_grad_x, None, H, BACKWARD, GATES, HAS_C, False,
        )  # fmt: skip
        if p_grad_r is not None:
            store_tiles(p_grad_r, row * GATES * H + unit, H, b_dr, mask)
        if SPREAD:
            arrive(p_arrived)
        else:
            for i in tl.static_range(GATES):
                b_dh += tl.dot(b_dr[i].to(p_weight.dtype.element_ty), b_w[i], input_precision=PRECISION)
        if running is not None:
            b_dh = tl.where(running, b_dh, b_held)
    if SPREAD:
        p_grad_last = p_grad_x if p_grad_r is None else p_grad_r
        t_last = T - 1 if REVERSE else 0
        b_dh += product_of_step(
            b_w, p_grad_last, p_arrived, T, t_last, b, k, B, GATES * H, SPREAD * BLOCK_K, PARTS, PRECISION
        )
    tl.store(p_dh + b * H + unit, b_dh, mask=mask)
    if HAS_C:
        tl.store(p_dc + b * H + unit, b_dc, mask=mask)
