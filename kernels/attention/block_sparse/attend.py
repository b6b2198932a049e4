"""Queries against the blocks of keys that they see: forward, and the gradients of queries, keys and values."""

import triton
import triton.language as tl

# Without do_not_specialize Triton makes a number that is 1 a constant, and `_narrow` could not cast it.
_NUMBERS = ["H", "G", "Tq", "Tk", "block_size", "batch_rows", "head_rows", "blocks"]


@triton.jit
def _narrow(Tq, Tk, block_size, batch_rows, head_rows, blocks, scale):
    """Inductor may pass these as int64 and float64."""
    return (
        tl.cast(Tq, tl.int32), tl.cast(Tk, tl.int32), tl.cast(block_size, tl.int32), tl.cast(batch_rows, tl.int32),
        tl.cast(head_rows, tl.int32), tl.cast(blocks, tl.int32), tl.cast(scale, tl.float32),
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def block_sparse_forward_kernel(
    p_query,  # [B, H, Tq, D]
    p_key,  # [B, G, Tk, D]
    p_value,  # [B, G, Tk, DV]
    p_count,  # [lists], lists of one (batch, head) after another: of a query block at b * batch_rows + h * head_rows
    p_index,  # [lists, blocks]
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq]
    H,
    G,
    Tq,
    Tk,
    block_size,
    batch_rows,
    head_rows,
    blocks,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Tq, Tk, block_size, batch_rows, head_rows, blocks, scale = _narrow(
        Tq, Tk, block_size, batch_rows, head_rows, blocks, scale
    )
    i_bh = tl.program_id(1).to(tl.int64)
    i_bg = i_bh // H * G + i_bh % H // (H // G)
    tiles = tl.cdiv(block_size, BM)
    i_block = tl.program_id(0) // tiles
    t = i_block * block_size + tl.program_id(0) % tiles * BM
    t_end = tl.minimum(tl.minimum(Tq, (i_block + 1) * block_size), t + BM)
    o_t, o_d, o_v = t + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    m_t, m_d, m_v = o_t < t_end, o_d < D, o_v < DV
    o_q = (i_bh * Tq + o_t)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_query + o_q, mask=m_t[:, None] & m_d[None, :], other=0)  # [BM, BD]
    i_list = i_bh // H * batch_rows + i_bh % H * head_rows + i_block
    count = tl.load(p_count + i_list)
    b_out = tl.zeros([BM, BV], tl.float32)
    b_most = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    parts = tl.cdiv(block_size, BN)
    for step in range(count * parts):
        i_key = tl.load(p_index + i_list * blocks + step // parts)
        end = tl.minimum(Tk, (i_key + 1) * block_size)
        o_n = i_key * block_size + step % parts * BN + tl.arange(0, BN)
        m_n = o_n < end
        row = (i_bg * Tk + o_n)[:, None]
        b_k = tl.load(p_key + row * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0)  # [BN, BD]
        b_v = tl.load(p_value + row * DV + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0)  # [BN, BV]
        seen = m_n[None, :]
        if CAUSAL:
            seen = seen & (o_n[None, :] <= o_t[:, None])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where(seen, b_s, -float("inf"))  # [BM, BN]
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # a row may see nothing of a causal tile
        b_p = tl.exp(b_s - shift[:, None])
        decay = tl.exp(b_most - shift)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_out = b_out * decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_most = b_new
    none = b_most == -float("inf")
    b_out = tl.where(none[:, None], 0.0, b_out / tl.where(none, 1.0, b_sum)[:, None])
    o_o = (i_bh * Tq + o_t)[:, None] * DV + o_v[None, :]
    tl.store(p_out + o_o, b_out.to(p_out.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])
    tl.store(p_lse + i_bh * Tq + o_t, b_most + tl.log(tl.where(none, 1.0, b_sum)), mask=m_t)


@triton.jit(do_not_specialize=_NUMBERS)
def block_sparse_query_gradient_kernel(
    p_query,  # [B, H, Tq, D]
    p_key,  # [B, G, Tk, D]
    p_value,  # [B, G, Tk, DV]
    p_count,  # as in the forward kernel
    p_index,
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq]
    p_grad_out,  # [B, H, Tq, DV]
    p_delta,  # [B, H, Tq], written
    p_grad_query,  # [B, H, Tq, D]
    H,
    G,
    Tq,
    Tk,
    block_size,
    batch_rows,
    head_rows,
    blocks,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Tq, Tk, block_size, batch_rows, head_rows, blocks, scale = _narrow(
        Tq, Tk, block_size, batch_rows, head_rows, blocks, scale
    )
    i_bh = tl.program_id(1).to(tl.int64)
    i_bg = i_bh // H * G + i_bh % H // (H // G)
    tiles = tl.cdiv(block_size, BM)
    i_block = tl.program_id(0) // tiles
    t = i_block * block_size + tl.program_id(0) % tiles * BM
    t_end = tl.minimum(tl.minimum(Tq, (i_block + 1) * block_size), t + BM)
    o_t, o_d, o_v = t + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    m_t, m_d, m_v = o_t < t_end, o_d < D, o_v < DV
    o_q = (i_bh * Tq + o_t)[:, None] * D + o_d[None, :]
    o_o = (i_bh * Tq + o_t)[:, None] * DV + o_v[None, :]
    b_q = tl.load(p_query + o_q, mask=m_t[:, None] & m_d[None, :], other=0)  # [BM, BD]
    b_do = tl.load(p_grad_out + o_o, mask=m_t[:, None] & m_v[None, :], other=0)  # [BM, BV]
    b_o = tl.load(p_out + o_o, mask=m_t[:, None] & m_v[None, :], other=0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    b_lse = tl.load(p_lse + i_bh * Tq + o_t, mask=m_t, other=0)
    i_list = i_bh // H * batch_rows + i_bh % H * head_rows + i_block
    count = tl.load(p_count + i_list)
    b_dq = tl.zeros([BM, BD], tl.float32)
    parts = tl.cdiv(block_size, BN)
    for step in range(count * parts):
        i_key = tl.load(p_index + i_list * blocks + step // parts)
        end = tl.minimum(Tk, (i_key + 1) * block_size)
        o_n = i_key * block_size + step % parts * BN + tl.arange(0, BN)
        m_n = o_n < end
        row = (i_bg * Tk + o_n)[:, None]
        b_k = tl.load(p_key + row * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0)  # [BN, BD]
        b_v = tl.load(p_value + row * DV + o_v[None, :], mask=m_n[:, None] & m_v[None, :], other=0)  # [BN, BV]
        seen = m_n[None, :] & m_t[:, None]
        if CAUSAL:
            seen = seen & (o_n[None, :] <= o_t[:, None])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_p = tl.where(seen, tl.exp(b_s - b_lse[:, None]), 0.0)  # [BM, BN]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = tl.where(seen, b_p * (b_dp - b_delta[:, None]), 0.0)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    tl.store(p_delta + i_bh * Tq + o_t, b_delta, mask=m_t)
    tl.store(p_grad_query + o_q, (b_dq * scale).to(p_grad_query.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=_NUMBERS)
def block_sparse_key_gradient_kernel(
    p_query,  # [B, H, Tq, D]
    p_key,  # [B, G, Tk, D]
    p_value,  # [B, G, Tk, DV]
    p_count,  # [lists]: of a key block at b * batch_rows + h * head_rows
    p_index,  # [lists, blocks]: query blocks
    p_lse,  # [B, H, Tq]
    p_grad_out,  # [B, H, Tq, DV]
    p_delta,  # [B, H, Tq]
    p_grad_key,  # [B, G, Tk, D]
    p_grad_value,  # [B, G, Tk, DV]
    H,
    G,
    Tq,
    Tk,
    block_size,
    batch_rows,
    head_rows,
    blocks,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Tq, Tk, block_size, batch_rows, head_rows, blocks, scale = _narrow(
        Tq, Tk, block_size, batch_rows, head_rows, blocks, scale
    )
    i_bg = tl.program_id(1).to(tl.int64)
    group = H // G
    tiles = tl.cdiv(block_size, BN)
    i_block = tl.program_id(0) // tiles
    n = i_block * block_size + tl.program_id(0) % tiles * BN
    n_end = tl.minimum(tl.minimum(Tk, (i_block + 1) * block_size), n + BN)
    o_n, o_d, o_v = n + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    m_n, m_d, m_v = o_n < n_end, o_d < D, o_v < DV
    o_k = (i_bg * Tk + o_n)[:, None] * D + o_d[None, :]
    o_w = (i_bg * Tk + o_n)[:, None] * DV + o_v[None, :]
    b_k = tl.load(p_key + o_k, mask=m_n[:, None] & m_d[None, :], other=0)  # [BN, BD]
    b_v = tl.load(p_value + o_w, mask=m_n[:, None] & m_v[None, :], other=0)  # [BN, BV]
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BV], tl.float32)
    parts = tl.cdiv(block_size, BM)
    for member in range(group):
        h = i_bg % G * group + member
        i_bh = i_bg // G * H + h
        i_list = i_bg // G * batch_rows + h * head_rows + i_block
        count = tl.load(p_count + i_list)
        for step in range(count * parts):
            i_query = tl.load(p_index + i_list * blocks + step // parts)
            end = tl.minimum(Tq, (i_query + 1) * block_size)
            o_t = i_query * block_size + step % parts * BM + tl.arange(0, BM)
            m_t = o_t < end
            row = (i_bh * Tq + o_t)[:, None]
            b_q = tl.load(p_query + row * D + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0)  # [BM, BD]
            b_do = tl.load(p_grad_out + row * DV + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0)
            b_lse = tl.load(p_lse + i_bh * Tq + o_t, mask=m_t, other=0)
            b_delta = tl.load(p_delta + i_bh * Tq + o_t, mask=m_t, other=0)
            seen = m_n[:, None] & m_t[None, :]
            if CAUSAL:
                seen = seen & (o_n[:, None] <= o_t[None, :])
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale  # [BN, BM]
            b_p = tl.where(seen, tl.exp(b_s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = tl.where(seen, b_p * (b_dp - b_delta[None, :]), 0.0)
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    tl.store(p_grad_key + o_k, (b_dk * scale).to(p_grad_key.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    tl.store(p_grad_value + o_w, b_dv.to(p_grad_value.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])
