"""Persistent kernels: all steps in one launch, for cells with one product per step and no layer norm.

A program owns BLOCK_B rows of the batch and walks through time. h and c stay in registers; the program loads its part
of W_hh once and keeps it in shared memory. With few units (``tiles.one_program``) a program owns all of them, and
programs never wait for each other. Each step's operands are loaded STAGES - 1 steps ahead.

More units are shared by a COOPERATIVE grid: a program owns BLOCK_U units, and a step needs the results of all programs
of its rows from the step before: h through p_exchange, or in the backward pass the gradient of r. Each program stores
its part, increments a counter and waits until the counter says that all have done so. All programs must be running, so
the launch is cooperative. A step loads its other operands before it waits.
"""

import triton
import triton.language as tl

from seqaccel.kernels.rnn.step import (
    begins_at,
    load_backward,
    load_tiles,
    restarted,
    step_backward,
    step_forward,
    store_forward,
    store_tiles,
)

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
    """Increments the counter. Programs that wait for it then see all that this program has stored."""
    tl.debug_barrier()
    tl.atomic_add(p_arrived, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_arrived, count):
    """Waits until ``count`` programs have arrived. One thread polls; a lone program does not wait."""
    if tl.num_programs(1) > 1:
        tl.inline_asm_elementwise(_WAIT, "=r,l,r", [p_arrived.to(tl.int64), count], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def load_weight(p_weight, o, H, mask, GATES: tl.constexpr):
    b = ()
    for k in tl.static_range(GATES):
        b += (tl.load(p_weight + o + k * H * H, mask=mask, other=0.0),)
    return b


@triton.jit
def load_rows(
    p_weight,
    unit,
    k,
    H,
    K,
    unit_stride,
    k_stride,
    GATES: tl.constexpr,
    QUARTERS: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """PARTS tiles [4 * BLOCK_U, BLOCK_K]: tensor cores want 64 rows, so that each unit has four.

    Those of its gates, the fourth zero where it has three; or where QUARTERS is 4 those of a quarter of the sum each.
    """
    row = tl.arange(0, 4 * BLOCK_U)[:, None]
    fourth, unit = row // BLOCK_U, unit + row % BLOCK_U
    b = ()
    for n in tl.static_range(PARTS):
        if QUARTERS == 4:
            in_k = (fourth * PARTS + n) * BLOCK_K + k
            mask, o = in_k < K, unit.to(tl.int64) * unit_stride + in_k.to(tl.int64) * k_stride
        else:
            in_k = n * BLOCK_K + k
            mask, o = (in_k < K) & (fourth < GATES), (fourth * H + unit).to(tl.int64) * unit_stride + in_k * k_stride
        b += (tl.load(p_weight + o, mask=mask & (unit < H), other=0.0),)
    return b


@triton.jit
def cooperative_product(
    b_w,
    p,
    b_first,
    k,
    B,
    K,
    QUARTERS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Four tiles [BLOCK_B, BLOCK_U], of the gates or of the quarters of the sum, of the product with rows p [B, K].

    Other programs have just stored those: they are loaded past the L1 cache. Of the quarters' products with all
    quarters of the rows, those with their own are kept.
    """
    row = tl.arange(0, QUARTERS * BLOCK_B)[:, None]
    b = b_first + row % BLOCK_B
    b_sum = tl.zeros([4 * BLOCK_U, QUARTERS * BLOCK_B], tl.float32)
    for n in tl.static_range(PARTS):
        in_k = (row // BLOCK_B * PARTS + n) * BLOCK_K + k
        b_rows = tl.load(p + b.to(tl.int64) * K + in_k, mask=(b < B) & (in_k < K), other=0.0, cache_modifier=".cg")
        b_sum = tl.dot(b_w[n], tl.trans(b_rows), b_sum, input_precision=PRECISION)
    if QUARTERS == 4:
        quarter = tl.arange(0, 4)
        kept = quarter[:, None, None, None] == quarter[None, None, :, None]
        b_sum = tl.sum(tl.where(kept, tl.reshape(b_sum, 4, BLOCK_U, 4, BLOCK_B), 0.0), 2)
    b_fourths = tl.permute(tl.reshape(b_sum, 4, BLOCK_U, BLOCK_B), 2, 1, 0)
    even, odd = tl.split(tl.reshape(b_fourths, BLOCK_B, BLOCK_U, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


# Triton compiles anew where an integer becomes 1 or divisible by 16; not for these.
_NUMBERS = ["T", "B", "b_first"]


@triton.jit(do_not_specialize=_NUMBERS)
def persistent_forward_kernel(
    p_x,  # [T, B, G*H] W_ih x + b; may be p_gates
    p_weight,  # [G*H, H]
    p_bias,  # [G*H] added to the product, or None
    p_vectors,  # [VECTORS, H]
    p_lengths,  # [B] or None
    p_begins,  # [T, B] int8 or None: an episode begins with the step, in the forward pass's direction
    p_zoneout_h,  # [T, B, H] or [1] or None
    p_zoneout_c,  # [T, B, H] or [1] or None
    p_h,  # [B, H] float32: h_0, overwritten by h_n
    p_c,  # [B, H] float32: c_0, overwritten by c_n
    p_output,  # [T, B, H]
    p_gates,  # [T, B, SAVED*H] or None
    p_cells,  # [T, B, H] float32, or None
    p_carried,  # [T, B, H] float32 or None
    p_exchange,  # [2, B, H] where COOPERATIVE: its first half h_0
    p_arrived,  # [blocks of rows, 32] where COOPERATIVE: zeros
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
    COOPERATIVE: tl.constexpr,
    QUARTERS: tl.constexpr,  # COOPERATIVE: 4 with one gate, else 1
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # COOPERATIVE: the sum, or each quarter of it, is cut into so many tiles
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_first += tl.program_id(0) * BLOCK_B
    b = (b_first + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]  # [BLOCK_B, 1]
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]  # [1, BLOCK_U]
    k = tl.arange(0, BLOCK_K)
    mask = (b < B) & (unit < H)
    b_h = tl.load(p_h + b * H + unit, mask=mask, other=0.0)  # [BLOCK_B, BLOCK_U]
    b_c = b_h
    if HAS_C:
        b_c = tl.load(p_c + b * H + unit, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + b, mask=b < B, other=0)
    if COOPERATIVE:
        p_arrived += tl.program_id(0) * 32
        b_w = load_rows(
            p_weight, tl.program_id(1) * BLOCK_U, k[None, :], H, H, H, 1, GATES, QUARTERS, BLOCK_U, BLOCK_K, PARTS
        )
    else:
        m_weight = (k[:, None] < H) & (unit < H)
        b_w = load_weight(p_weight, unit * H + k[:, None], H, m_weight, GATES)
    for s in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - s if REVERSE else s
        row = tl.cast(t, tl.int64) * B + b
        b_x = load_tiles(p_x, row * GATES * H + unit, H, mask, GATES)
        begins = begins_at(p_begins, t, B, b)
        b_h, b_c = restarted(b_h, begins), restarted(b_c, begins)
        b_r = ()
        if COOPERATIVE:
            wait(p_arrived, s * tl.num_programs(1))
            p_from = p_exchange + tl.cast(s % 2, tl.int64) * B * H
            b_fourths = cooperative_product(
                b_w, p_from, b_first, k[None, :], B, H, QUARTERS, BLOCK_B, BLOCK_U, BLOCK_K, PARTS, PRECISION
            )
            if QUARTERS == 4:
                b_r = (b_fourths[0] + b_fourths[1] + (b_fourths[2] + b_fourths[3]),)
            else:
                for i in tl.static_range(GATES):
                    b_r += (b_fourths[i],)
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
        if COOPERATIVE:
            o_to = ((s + 1) % 2 * B + b) * H + unit
            following = tl.where(s + 1 < T, t - 1 if REVERSE else t + 1, -1)
            b_next = restarted(b_h, begins_at(p_begins, following, B, b))
            tl.store(p_exchange + o_to, b_next.to(p_exchange.dtype.element_ty), mask=mask)
            arrive(p_arrived)
        store_forward(
            b_s, b_fresh, b_h, b_c, row, unit, running, mask, p_output, p_gates, p_cells, p_carried, H, SAVED, HAS_C,
            False,
        )  # fmt: skip
    tl.store(p_h + b * H + unit, b_h, mask=mask)
    if HAS_C:
        tl.store(p_c + b * H + unit, b_c, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS)
def persistent_backward_kernel(
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
    p_begins,  # [T, B] int8 or None: an episode begins with the step, in the forward pass's direction
    p_zoneout_h,  # [T, B, H] or [1] or None
    p_zoneout_c,  # [T, B, H] or [1] or None
    p_dh,  # [B, H] float32: gradient of h_n, overwritten by that of h_0
    p_dc,  # [B, H] float32: gradient of c_n, overwritten by that of c_0
    p_grad_x,  # [T, B, G*H]
    p_grad_r,  # [T, B, G*H] where it is not grad_x, or None
    p_arrived,  # [blocks of rows, 32] where COOPERATIVE: zeros
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
    COOPERATIVE: tl.constexpr,
    QUARTERS: tl.constexpr,  # COOPERATIVE: 4
    BLOCK_B: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b_first += tl.program_id(0) * BLOCK_B
    b = (b_first + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U))[None, :]
    k = tl.arange(0, BLOCK_K)
    mask = (b < B) & (unit < H)
    b_dh = tl.load(p_dh + b * H + unit, mask=mask, other=0.0)
    b_dc = b_dh
    if HAS_C:
        b_dc = tl.load(p_dc + b * H + unit, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + b, mask=b < B, other=0)
    if COOPERATIVE:
        p_arrived += tl.program_id(0) * 32
        p_grad_last = p_grad_x if p_grad_r is None else p_grad_r
        b_w = load_rows(
            p_weight, tl.program_id(1) * BLOCK_U, k[None, :], H, GATES * H, 1, H, GATES, QUARTERS, BLOCK_U, BLOCK_K,
            PARTS,
        )  # fmt: skip
    else:
        m_weight = (k[:, None] < H) & (unit < H)
        b_w = load_weight(p_weight, k[:, None] * H + unit, H, m_weight, GATES)
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
        begins = begins_at(p_begins, t, B, b)
        b_grad = b_dh
        if p_grad_output is not None:
            b_grad = tl.load(p_grad_output + row * H + unit, mask=mask, other=0.0).to(tl.float32)
        b_saved = load_backward(
            row, earlier_row, inner, inner_h, b, unit, mask, p_gates, p_cells, p_carried, p_c_0, p_output, p_h_0, H,
            SAVED, HAS_C, USES_OUTPUT, USES_H, begins,
        )  # fmt: skip
        if COOPERATIVE:
            # The gradient through r comes from the step that this pass ran before. The first step has none.
            wait(p_arrived, s * tl.num_programs(1))
            t_last = t - 1 if REVERSE else t + 1
            b_fourths = cooperative_product(
                b_w, p_grad_last + tl.cast(t_last, tl.int64) * B * GATES * H, b_first, k[None, :],
                tl.where(s > 0, B, 0), GATES * H, QUARTERS, BLOCK_B, BLOCK_U, BLOCK_K, PARTS, PRECISION,
            )  # fmt: skip
            b_dh += b_fourths[0] + b_fourths[1] + (b_fourths[2] + b_fourths[3])
            b_dh = restarted(b_dh, begins_at(p_begins, tl.where(s > 0, t_last, -1), B, b))
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
        if COOPERATIVE:
            arrive(p_arrived)
        else:
            for i in tl.static_range(GATES):
                b_dh += tl.dot(b_dr[i].to(p_weight.dtype.element_ty), b_w[i], input_precision=PRECISION)
        if running is not None:
            b_dh = tl.where(running, b_dh, b_held)
        b_dc = restarted(b_dc, begins)
        if not COOPERATIVE:
            b_dh = restarted(b_dh, begins)
    if COOPERATIVE:
        wait(p_arrived, T * tl.num_programs(1))
        t_last = T - 1 if REVERSE else 0
        b_fourths = cooperative_product(
            b_w, p_grad_last + tl.cast(t_last, tl.int64) * B * GATES * H, b_first, k[None, :], B, GATES * H, QUARTERS,
            BLOCK_B, BLOCK_U, BLOCK_K, PARTS, PRECISION,
        )  # fmt: skip
        b_dh += b_fourths[0] + b_fourths[1] + (b_fourths[2] + b_fourths[3])
        b_dh = restarted(b_dh, begins_at(p_begins, t_last, B, b))
    tl.store(p_dh + b * H + unit, b_dh, mask=mask)
    if HAS_C:
        tl.store(p_dc + b * H + unit, b_dc, mask=mask)
