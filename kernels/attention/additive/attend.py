"""Logits, weights, and the gradients of queries, keys and the vector."""

import triton
import triton.language as tl

from seqaccel.kernels._math import tanh


@triton.jit
def _seen(p_mask, row, i_b, Tq, Tk, mask_rows, o_j):
    """Which keys the query at ``row`` attends to, before the end of the keys."""
    seen = o_j < Tk
    if p_mask is not None:
        at = i_b * mask_rows + tl.where(mask_rows == 1, 0, row)
        seen = seen & (tl.load(p_mask + at * Tk + o_j, mask=seen, other=0) != 0)
    return seen


# Without do_not_specialize Triton makes a number that is 1 a constant, which could not be cast: Inductor may pass these
# as int64. The rows of H numbers are read lane by lane, so that a multiple of 16 gains nothing.
@triton.jit(do_not_specialize=["Tq", "Tk", "H", "mask_rows"])
def additive_logits_kernel(
    p_query,  # [B, Tq, H]
    p_key,  # [B, Tk, H]
    p_weight,  # [H]
    p_mask,  # [B, mask_rows, Tk], or None
    p_attention,  # [B, Tq, Tk], float32: e; -inf where a query does not attend
    Tq,
    Tk,
    H,
    mask_rows,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    Tq, Tk, H, mask_rows = (
        tl.cast(Tq, tl.int32),
        tl.cast(Tk, tl.int32),
        tl.cast(H, tl.int32),
        tl.cast(mask_rows, tl.int32),
    )
    tiles, key_tiles = tl.cdiv(Tq, BM), tl.cdiv(Tk, BN)
    i_b = (tl.program_id(0) // key_tiles // tiles).to(tl.int64)
    o_i = tl.program_id(0) // key_tiles % tiles * BM + tl.arange(0, BM)
    o_j = tl.program_id(0) % key_tiles * BN + tl.arange(0, BN)
    row_i, row_j = (i_b * Tq + o_i)[:, None], (i_b * Tk + o_j)[:, None]
    seen = (o_i < Tq)[:, None] & _seen(p_mask, tl.minimum(o_i, Tq - 1)[:, None], i_b, Tq, Tk, mask_rows, o_j[None, :])
    end = tl.where(tl.max(seen.to(tl.int32)) > 0, H, 0)  # a tile that the mask hides takes no time
    b_sum = tl.zeros([BM, BN, BH], tl.float32)
    for h in range(0, end, BH):
        o_h = h + tl.arange(0, BH)
        m_h = o_h < H
        b_w = tl.load(p_weight + o_h, mask=m_h, other=0).to(tl.float32)  # [BH]
        b_q = tl.load(p_query + row_i * H + o_h[None, :], mask=(o_i < Tq)[:, None] & m_h[None, :], other=0)  # [BM, BH]
        b_k = tl.load(p_key + row_j * H + o_h[None, :], mask=(o_j < Tk)[:, None] & m_h[None, :], other=0)  # [BN, BH]
        b_sum += b_w[None, None, :] * tanh(b_q.to(tl.float32)[:, None, :] + b_k.to(tl.float32)[None, :, :])
    b_e = tl.where(seen, tl.sum(b_sum, 2), -float("inf"))  # [BM, BN]
    tl.store(p_attention + row_i * Tk + o_j[None, :], b_e, mask=(o_i < Tq)[:, None] & (o_j < Tk)[None, :])


@triton.jit(do_not_specialize=["Tq", "Tk", "mask_rows"])
def additive_softmax_kernel(
    p_attention,  # [B, Tq, Tk], float32: e, then p; 0 in a row that attends to no key
    p_mask,  # [B, mask_rows, Tk], or None
    Tq,
    Tk,
    mask_rows,
    BN: tl.constexpr,
):
    Tq, Tk, mask_rows = tl.cast(Tq, tl.int32), tl.cast(Tk, tl.int32), tl.cast(mask_rows, tl.int32)
    row = tl.program_id(0).to(tl.int64)
    i_b, i = row // Tq, row % Tq
    p_row = p_attention + row * Tk
    b_most, b_sum = tl.full([BN], -float("inf"), tl.float32), tl.zeros([BN], tl.float32)
    for j in range(0, Tk, BN):
        o_j = j + tl.arange(0, BN)
        b_most = tl.maximum(b_most, tl.load(p_row + o_j, mask=o_j < Tk, other=-float("inf")))
    most = tl.max(b_most, 0)
    for j in range(0, Tk, BN):
        o_j = j + tl.arange(0, BN)
        seen = _seen(p_mask, i, i_b, Tq, Tk, mask_rows, o_j)
        b_sum += tl.where(seen, tl.exp(tl.load(p_row + o_j, mask=seen, other=0) - most), 0.0)
    total = tl.sum(b_sum, 0)
    for j in range(0, Tk, BN):
        o_j = j + tl.arange(0, BN)
        seen = _seen(p_mask, i, i_b, Tq, Tk, mask_rows, o_j)
        b_p = tl.exp(tl.load(p_row + o_j, mask=seen, other=0) - most) / total
        tl.store(p_row + o_j, tl.where(seen, b_p, 0.0), mask=o_j < Tk)


@triton.jit(do_not_specialize=["Tk"])
def additive_softmax_gradient_kernel(
    p_attention,  # [B * Tq, Tk], float32
    p_grad_attention,  # [B * Tq, Tk]
    p_grad_logits,  # [B * Tq, Tk], float32: s
    Tk,
    BN: tl.constexpr,
):
    Tk = tl.cast(Tk, tl.int32)
    o_row = tl.program_id(0).to(tl.int64) * Tk
    b_mean = tl.zeros([BN], tl.float32)
    for j in range(0, Tk, BN):
        o_j = j + tl.arange(0, BN)
        b_p = tl.load(p_attention + o_row + o_j, mask=o_j < Tk, other=0)
        b_dp = tl.load(p_grad_attention + o_row + o_j, mask=o_j < Tk, other=0).to(tl.float32)
        b_mean += tl.where(b_p == 0, 0.0, b_p * b_dp)  # the gradient of a weight of 0 does not count
    mean = tl.sum(b_mean, 0)
    for j in range(0, Tk, BN):
        o_j = j + tl.arange(0, BN)
        b_p = tl.load(p_attention + o_row + o_j, mask=o_j < Tk, other=0)
        b_dp = tl.load(p_grad_attention + o_row + o_j, mask=o_j < Tk, other=0).to(tl.float32)
        tl.store(p_grad_logits + o_row + o_j, tl.where(b_p == 0, 0.0, b_p * (b_dp - mean)), mask=o_j < Tk)


@triton.jit(do_not_specialize=["Tq", "Tk", "H", "parts"])
def additive_gradients_kernel(
    p_query,  # [B, Tq, H]
    p_key,  # [B, Tk, H]
    p_weight,  # [H]
    p_grad_logits,  # [B, Tq, Tk], float32
    p_grad_query,  # [B, parts, Tq, H], float32
    p_grad_key,  # [B, Tk, H]
    p_grad_weight,  # [B, parts, H], float32
    Tq,
    Tk,
    H,
    parts,
    BN: tl.constexpr,
    BH: tl.constexpr,
):
    Tq, Tk, H, parts = tl.cast(Tq, tl.int32), tl.cast(Tk, tl.int32), tl.cast(H, tl.int32), tl.cast(parts, tl.int32)
    slices = tl.cdiv(H, BH)
    i_part = (tl.program_id(0) // slices).to(tl.int64)  # of all batch entries
    i_b = i_part // parts
    o_h = tl.program_id(0) % slices * BH + tl.arange(0, BH)
    m_h = o_h < H
    b_w = tl.load(p_weight + o_h, mask=m_h, other=0).to(tl.float32)  # [BH]
    b_dw = tl.zeros([BH], tl.float32)
    tiles = tl.cdiv(Tk, BN)
    share = tl.cdiv(tiles, parts)
    first = (i_part % parts).to(tl.int32) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        o_j = tile * BN + tl.arange(0, BN)
        m_k = (o_j < Tk)[:, None] & m_h[None, :]
        o_k = (i_b * Tk + o_j)[:, None] * H + o_h[None, :]
        b_k = tl.load(p_key + o_k, mask=m_k, other=0).to(tl.float32)  # [BN, BH]
        b_dk = tl.zeros([BN, BH], tl.float32)
        stored = tl.where(tile > first, H, 0)  # numbers of grad q that an earlier tile has stored
        for i in range(Tq):
            b_s = tl.load(p_grad_logits + (i_b * Tq + i) * Tk + o_j, mask=o_j < Tk, other=0)[:, None]  # [BN, 1]
            b_q = tl.load(p_query + (i_b * Tq + i) * H + o_h, mask=m_h, other=0).to(tl.float32)[None, :]
            o_q = (i_part * Tq + i) * H + o_h
            b_dq = tl.load(p_grad_query + o_q, mask=o_h < stored, other=0)  # [BH]
            b_t = tanh(tl.where(b_s == 0, 0.0, b_q + b_k))
            b_st = b_s * b_t
            b_slope = b_s - b_st * b_t
            b_dk += b_slope
            b_dw += tl.sum(b_st, 0)
            tl.store(p_grad_query + o_q, b_dq + b_w * tl.sum(b_slope, 0), mask=m_h)
        tl.store(p_grad_key + o_k, (b_dk * b_w[None, :]).to(p_grad_key.dtype.element_ty), mask=m_k)
        tl.debug_barrier()  # the next tile adds to what this one has stored
    tl.store(p_grad_weight + i_part * H + o_h, b_dw, mask=m_h)
