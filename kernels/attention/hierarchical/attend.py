"""Queries against the runs of nodes they see: forward, and the gradients of queries, keys and values."""

import triton
import triton.language as tl


@triton.jit
def _above(span, factor, T):
    """Tokens per node one level up, at most T + 1: there is no difference between wider nodes."""
    return tl.minimum(tl.cast(span, tl.int64) * factor, T + 1).to(tl.int32)


@triton.jit
def _narrow(Tq, T, nodes, block_size, fanout, levels, w, scale):
    """Inductor may pass these as int64 and float64."""
    return (
        tl.cast(Tq, tl.int32), tl.cast(T, tl.int32), tl.cast(nodes, tl.int32), tl.cast(block_size, tl.int32),
        tl.cast(fanout, tl.int32), tl.cast(levels, tl.int32), tl.cast(w, tl.int32), tl.cast(scale, tl.float32),
    )  # fmt: skip


@triton.jit
def length_of(p_lengths, i_b, T):
    """Tokens of a row before its padding."""
    length = T
    if p_lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), T).to(tl.int32)
    return length


@triton.jit
def _query_tile(block_size, first, length, BM: tl.constexpr, SEVERAL: tl.constexpr):
    """Where the program's tile of queries begins, and where those that count end. The tile holds as many blocks as fit
    (SEVERAL), or a part of one. ``first`` is the position of the first query: a tile may begin before it."""
    if SEVERAL:
        width = BM // block_size * block_size
        t = (first // width + tl.program_id(0)) * width
        t_end = t + width
    else:
        tiles = tl.cdiv(block_size, BM)
        i_block = first // block_size + tl.program_id(0) // tiles
        t = i_block * block_size + tl.program_id(0) % tiles * BM
        t_end = tl.minimum((i_block + 1) * block_size, t + BM)
    return t, tl.minimum(length, t_end)


@triton.jit
def _product_below(a, b, most):
    """min(a * b, most); a * b may have more than 32 bits."""
    return tl.minimum(tl.cast(a, tl.int64) * b, most).to(tl.int32)


@triton.jit
def _node_run(part, t, T, span, above, fanout, top, w):
    """Nodes [begin, end) of a level >= 1 that the query at t sees: left, right, right with no parent. ``t`` may be a
    column of queries."""
    cell, parent = t // span, t // above
    count = T // span
    complete = tl.where(top, count, (T // above) * fanout)
    left = tl.where(top, 0, fanout * tl.maximum(parent - w + 1, 0))
    begin = tl.where(part == 0, left, tl.maximum(cell + w, tl.where(part == 1, 0, complete)))
    right = tl.where(top | (part == 2), count, _product_below(fanout, parent + w, complete))
    return begin, tl.where(part == 0, tl.maximum(cell - w + 1, 0), right)


@triton.jit
def _token_run(part, t, T, block_size, has_levels, w, CAUSAL: tl.constexpr):
    """Tokens [begin, end) that the query at t sees: near ones, and those with no parent. ``t`` may be a column."""
    begin = tl.where(has_levels, block_size * tl.maximum(t // block_size - w + 1, 0), 0)
    complete = tl.where(has_levels, (T // block_size) * block_size, T)
    if CAUSAL:
        end = t + 1
    elif part == 0:
        end = tl.where(has_levels, _product_below(block_size, t // block_size + w, complete), T)
    else:
        begin = tl.maximum(begin, complete)
        end = T
    return begin, end


# Of a tile of queries [t, t_end) at o_t: the keys [begin, end) that any of them sees, and [first, last) that each sees,
# columns where the queries differ. Both bounds grow with the position of the query.


@triton.jit
def _nodes_of_tile(part, o_t, t, t_end, T, span, above, fanout, top, w, SEVERAL: tl.constexpr):
    begin, end = _node_run(part, t, T, span, above, fanout, top, w)
    first, last = begin, end
    if SEVERAL:
        end = _node_run(part, t_end - 1, T, span, above, fanout, top, w)[1]
        first, last = _node_run(part, o_t[:, None], T, span, above, fanout, top, w)
    return begin, end, first, last


@triton.jit
def _tokens_of_tile(
    part, o_t, t, t_end, T, block_size, has_levels, w, CAUSAL: tl.constexpr, SEVERAL: tl.constexpr
):  # fmt: skip
    begin, end = _token_run(part, t, T, block_size, has_levels, w, CAUSAL)
    first, last = begin, end
    if CAUSAL or SEVERAL:
        end = _token_run(part, t_end - 1, T, block_size, has_levels, w, CAUSAL)[1]
        first, last = _token_run(part, o_t[:, None], T, block_size, has_levels, w, CAUSAL)
    return begin, end, first, last


@triton.jit
def _is_spoilt(b):
    """Whether an infinity or NaN is in a tile."""
    return tl.max(tl.where(tl.abs(b) < float("inf"), 0, 1)) > 0


@triton.jit
def _scores(b_a, b_b, PRECISION: tl.constexpr):
    """b_a [M, BD] @ b_b [N, BD]^T. A single row does not use tensor cores, which need 16."""
    if b_a.shape[0] == 1:
        b = tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)[None, :]
    else:
        b = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    return b


@triton.jit
def _weighted(b_w, b_rows, PRECISION: tl.constexpr):
    """b_w [M, N] @ b_rows [N, BD]. A single row does not use tensor cores."""
    if b_w.shape[0] == 1:
        b = tl.sum(tl.trans(b_w) * b_rows.to(tl.float32), 0)[None, :]
    else:
        b = tl.dot(b_w.to(b_rows.dtype), b_rows, input_precision=PRECISION)
    return b


@triton.jit
def _attend(
    b_q, b_out, b_most, b_sum, p_key, p_value, keys, bias, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, end, first, last = keys
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        row, m_n = o_n.to(tl.int64)[:, None], (o_n < end)[:, None]
        b_k = tl.load(p_key + row * D + o_d[None, :], mask=m_n & (o_d < D)[None, :], other=0)  # [BN, BD]
        b_v = tl.load(p_value + row * DV + o_v[None, :], mask=m_n & (o_v < DV)[None, :], other=0)  # [BN, BV]
        b_s = _scores(b_q, b_k, PRECISION) * scale + bias  # [BM, BN]
        b_s = tl.where((o_n[None, :] >= first) & (o_n[None, :] < last), b_s, -float("inf"))
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_new[:, None])
        decay = tl.exp(b_most - b_new)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_out = b_out * decay[:, None] + _weighted(b_p, b_v, PRECISION)
        b_most = b_new
    return b_out, b_most, b_sum


@triton.jit
def _attend_all(
    b_q, p_key, p_value, p_pooled_key, p_pooled_value, o_t, t, t_end, length, T, block_size, fanout, levels, w, scale,
    CAUSAL: tl.constexpr, MASS_BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SEVERAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens and nodes of all levels that the tile of queries [t, t_end) sees; the pointers are its head's."""
    b_out = tl.zeros([BM, BV], tl.float32)
    # Of the first keys a query may see none: from the lowest number up their weights are e^-inf = 0, from -inf NaN.
    b_most = tl.full([BM], -3.4028234663852886e38, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if t < t_end:
        for part in tl.static_range(1 if CAUSAL else 2):
            tokens = _tokens_of_tile(part, o_t, t, t_end, length, block_size, levels > 0, w, CAUSAL, SEVERAL)
            b_out, b_most, b_sum = _attend(
                b_q, b_out, b_most, b_sum, p_key, p_value, tokens, 0.0, scale, D, DV, BD, BV, BN,
                PRECISION,
            )  # fmt: skip
        span = block_size
        row = tl.zeros((), tl.int64)
        for level in range(1, levels + 1):
            above = _above(span, fanout, T)
            bias = tl.log(tl.cast(span, tl.float32)) if MASS_BIAS else 0.0
            for side in range(1 if CAUSAL else 3):
                nodes = _nodes_of_tile(side, o_t, t, t_end, length, span, above, fanout, level == levels, w, SEVERAL)
                b_out, b_most, b_sum = _attend(
                    b_q, b_out, b_most, b_sum, p_pooled_key + row * D, p_pooled_value + row * DV, nodes, bias, scale,
                    D, DV, BD, BV, BN, PRECISION,
                )  # fmt: skip
            row += T // span
            span = above
    return b_out, b_most, b_sum


# Without do_not_specialize Triton makes a number that is 1 a constant, and `_narrow` could not cast it.
_NUMBERS = ["H", "G", "Tq", "T", "nodes", "block_size", "fanout", "levels", "w"]


@triton.jit(do_not_specialize=_NUMBERS)
def attention_forward_kernel(
    p_query,  # [B, H, Tq, D]: the last positions
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_pooled_key,  # [B, G, nodes, D]
    p_pooled_value,  # [B, G, nodes, DV]
    p_lengths,  # [B], tokens before the padding; or None
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq]
    H,
    G,
    Tq,
    T,
    nodes,
    block_size,
    fanout,
    levels,
    w,
    scale,
    CAUSAL: tl.constexpr,
    MASS_BIAS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Tq, T, nodes, block_size, fanout, levels, w, scale = _narrow(Tq, T, nodes, block_size, fanout, levels, w, scale)
    i_bh = tl.program_id(1).to(tl.int64)
    i_bg = i_bh // H * G + i_bh % H // (H // G)
    length, first = length_of(p_lengths, i_bh // H, T), T - Tq
    t, t_end = _query_tile(block_size, first, length, BM, SEVERAL)
    o_t, o_d, o_v = t + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    m_t = (o_t >= first) & (o_t < t_end)
    row = (i_bh * Tq + o_t - first)[:, None]
    b_q = tl.load(p_query + row * D + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0)  # [BM, BD]
    o_k, o_w = i_bg * T, i_bg * nodes
    b_out, b_most, b_sum = _attend_all(
        b_q, p_key + o_k * D, p_value + o_k * DV, p_pooled_key + o_w * D, p_pooled_value + o_w * DV, o_t,
        tl.maximum(t, first), t_end, length, T, block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, DV, BD, BV,
        BM, BN, SEVERAL, PRECISION,
    )  # fmt: skip
    spoilt = (CAUSAL or SEVERAL) and _is_spoilt(b_out)
    stored = m_t
    if p_lengths is not None:  # the output of padding is 0
        b_out, b_sum = tl.where(m_t[:, None], b_out, 0.0), tl.where(m_t, b_sum, 1.0)
        stored = o_t < _query_tile(block_size, first, T, BM, SEVERAL)[1]
    m_o = stored[:, None] & (o_v < DV)[None, :]
    tl.store(p_out + row * DV + o_v[None, :], (b_out / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_o)
    tl.store(p_lse + i_bh * Tq + o_t - first, b_most + tl.log(b_sum), mask=stored)
    if CAUSAL or SEVERAL:  # noqa: SIM102  (a constexpr decides first)
        if spoilt:
            # A NaN in a key that a row does not see reaches it through the mask, since 0 times NaN is NaN. The rows
            # run again one by one, and read only what they see.
            tl.debug_barrier()
            for one in range(tl.maximum(t, first), t_end):
                i_row = i_bh * Tq + one - first
                b_row, _, b_total = _attend_all(
                    tl.load(p_query + i_row * D + o_d[None, :], mask=o_d[None, :] < D, other=0), p_key + o_k * D,
                    p_value + o_k * DV, p_pooled_key + o_w * D, p_pooled_value + o_w * DV, one + tl.arange(0, 1), one,
                    one + 1, length, T, block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, DV, BD, BV, 1, BN,
                    False, PRECISION,
                )  # fmt: skip
                b_row = (b_row / b_total[:, None]).to(p_out.dtype.element_ty)
                tl.store(p_out + i_row * DV + o_v[None, :], b_row, mask=o_v[None, :] < DV)


@triton.jit
def _query_gradient(
    b_q, b_do, b_lse, b_delta, b_dq, p_key, p_value, keys, bias, scale,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    begin, end, first, last = keys
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        row, m_n = o_n.to(tl.int64)[:, None], (o_n < end)[:, None]
        b_k = tl.load(p_key + row * D + o_d[None, :], mask=m_n & (o_d < D)[None, :], other=0)  # [BN, BD]
        b_v = tl.load(p_value + row * DV + o_v[None, :], mask=m_n & (o_v < DV)[None, :], other=0)  # [BN, BV]
        b_s = _scores(b_q, b_k, PRECISION) * scale + bias  # [BM, BN]
        seen = (o_n[None, :] >= first) & (o_n[None, :] < last)
        b_p = tl.where(seen, tl.exp(b_s - b_lse[:, None]), 0.0)
        b_dp = _scores(b_do, b_v, PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += _weighted(b_ds, b_k, PRECISION)
    return b_dq


@triton.jit
def _query_gradient_all(
    b_q, b_do, b_lse, b_delta, p_key, p_value, p_pooled_key, p_pooled_value, o_t, t, t_end, length, T, block_size,
    fanout, levels, w, scale,
    CAUSAL: tl.constexpr, MASS_BIAS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SEVERAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_dq = tl.zeros([BM, BD], tl.float32)
    if t < t_end:
        for part in tl.static_range(1 if CAUSAL else 2):
            tokens = _tokens_of_tile(part, o_t, t, t_end, length, block_size, levels > 0, w, CAUSAL, SEVERAL)
            b_dq = _query_gradient(
                b_q, b_do, b_lse, b_delta, b_dq, p_key, p_value, tokens, 0.0, scale, D, DV, BD, BV, BN,
                PRECISION,
            )  # fmt: skip
        span = block_size
        row = tl.zeros((), tl.int64)
        for level in range(1, levels + 1):
            above = _above(span, fanout, T)
            bias = tl.log(tl.cast(span, tl.float32)) if MASS_BIAS else 0.0
            for side in range(1 if CAUSAL else 3):
                nodes = _nodes_of_tile(side, o_t, t, t_end, length, span, above, fanout, level == levels, w, SEVERAL)
                b_dq = _query_gradient(
                    b_q, b_do, b_lse, b_delta, b_dq, p_pooled_key + row * D, p_pooled_value + row * DV, nodes,
                    bias, scale, D, DV, BD, BV, BN, PRECISION,
                )  # fmt: skip
            row += T // span
            span = above
    return b_dq


@triton.jit(do_not_specialize=_NUMBERS)
def attention_query_gradient_kernel(
    p_query,  # [B, H, Tq, D]
    p_key,  # [B, G, T, D]
    p_value,  # [B, G, T, DV]
    p_pooled_key,  # [B, G, nodes, D]
    p_pooled_value,  # [B, G, nodes, DV]
    p_lengths,  # [B], or None
    p_out,  # [B, H, Tq, DV]
    p_lse,  # [B, H, Tq]
    p_grad_out,  # [B, H, Tq, DV]
    p_delta,  # [B, H, Tq], written
    p_grad_query,  # [B, H, Tq, D]
    H,
    G,
    Tq,
    T,
    nodes,
    block_size,
    fanout,
    levels,
    w,
    scale,
    CAUSAL: tl.constexpr,
    MASS_BIAS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    Tq, T, nodes, block_size, fanout, levels, w, scale = _narrow(Tq, T, nodes, block_size, fanout, levels, w, scale)
    i_bh = tl.program_id(1).to(tl.int64)
    i_bg = i_bh // H * G + i_bh % H // (H // G)
    length, first = length_of(p_lengths, i_bh // H, T), T - Tq
    t, t_end = _query_tile(block_size, first, length, BM, SEVERAL)
    o_t, o_d, o_v = t + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    m_t = (o_t >= first) & (o_t < t_end)
    row = (i_bh * Tq + o_t - first)[:, None]
    m_o = m_t[:, None] & (o_v < DV)[None, :]
    b_q = tl.load(p_query + row * D + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0)  # [BM, BD]
    b_do = tl.load(p_grad_out + row * DV + o_v[None, :], mask=m_o, other=0)  # [BM, BV]
    b_o = tl.load(p_out + row * DV + o_v[None, :], mask=m_o, other=0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    b_lse = tl.load(p_lse + i_bh * Tq + o_t - first, mask=m_t, other=0)
    o_k, o_w = i_bg * T, i_bg * nodes
    b_dq = _query_gradient_all(
        b_q, b_do, b_lse, b_delta, p_key + o_k * D, p_value + o_k * DV, p_pooled_key + o_w * D,
        p_pooled_value + o_w * DV, o_t, tl.maximum(t, first), t_end, length, T, block_size, fanout, levels, w, scale,
        CAUSAL, MASS_BIAS, D, DV, BD, BV, BM, BN, SEVERAL, PRECISION,
    )  # fmt: skip
    spoilt = (CAUSAL or SEVERAL) and _is_spoilt(b_dq)
    stored = m_t
    if p_lengths is not None:
        b_dq = tl.where(m_t[:, None], b_dq, 0.0)
        stored = o_t < _query_tile(block_size, first, T, BM, SEVERAL)[1]
    m_q = stored[:, None] & (o_d < D)[None, :]
    tl.store(p_delta + i_bh * Tq + o_t - first, b_delta, mask=stored)
    tl.store(p_grad_query + row * D + o_d[None, :], (b_dq * scale).to(p_grad_query.dtype.element_ty), mask=m_q)
    if CAUSAL or SEVERAL:  # noqa: SIM102  (a constexpr decides first)
        if spoilt:
            tl.debug_barrier()
            for one in range(tl.maximum(t, first), t_end):
                i_row = i_bh * Tq + one - first
                o_one, m_one, m_row = i_row * DV + o_v[None, :], o_v[None, :] < DV, o_d[None, :] < D
                b_do_row = tl.load(p_grad_out + o_one, mask=m_one, other=0)
                b_out_row = tl.load(p_out + o_one, mask=m_one, other=0)
                b_row = _query_gradient_all(
                    tl.load(p_query + i_row * D + o_d[None, :], mask=m_row, other=0), b_do_row,
                    tl.load(p_lse + i_row + tl.arange(0, 1)),
                    tl.sum(b_out_row.to(tl.float32) * b_do_row.to(tl.float32), 1), p_key + o_k * D,
                    p_value + o_k * DV, p_pooled_key + o_w * D, p_pooled_value + o_w * DV, one + tl.arange(0, 1), one,
                    one + 1, length, T, block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, DV, BD, BV, 1, BN,
                    False, PRECISION,
                )  # fmt: skip
                b_row = (b_row * scale).to(p_grad_query.dtype.element_ty)
                tl.store(p_grad_query + i_row * D + o_d[None, :], b_row, mask=m_row)


@triton.jit(do_not_specialize=_NUMBERS)
def attention_key_gradient_kernel(
    p_query,  # [B, H, Tq, D]
    p_key,  # [B, G, T, D] of tokens or [B, G, nodes, D]
    p_value,
    p_lengths,  # [B], or None
    p_lse,  # [B, H, Tq]
    p_grad_out,  # [B, H, Tq, DV]
    p_delta,  # [B, H, Tq]
    p_grad_key,  # of nodes [B, G, SPLITS, nodes, D], float32; of tokens [B, G, T, D]
    p_grad_value,
    p_node_grad_key,  # of tokens: the gradients of the nodes, as far as the first part holds the whole of level 1
    p_node_grad_value,
    p_pool,  # of tokens: [G, D] of level 1, or None
    p_pool_lse,  # of tokens, with p_pool: [B, G, nodes of level 1], as the unpool kernel leaves them
    p_pool_slope,
    H,
    G,
    Tq,
    T,
    nodes,
    block_size,
    fanout,
    levels,
    w,
    scale,
    TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASS_BIAS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # More queries see a node than a token, and more at each level. So a node's queries are cut into SPLITS parts. The
    # programs of the top level take longest and come first. Tokens come after all nodes, in a launch of their own.
    Tq, T, nodes, block_size, fanout, levels, w, scale = _narrow(Tq, T, nodes, block_size, fanout, levels, w, scale)
    i_bg = tl.program_id(1).to(tl.int64)
    group = H // G
    length, first = length_of(p_lengths, i_bg // G, T), T - Tq
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    part_of_queries, parts, row = 0, 1, 0
    if TOKENS:
        span, factor, top = tl.full((), 1, tl.int32), block_size, levels == 0
    else:
        part_of_queries, parts = tile % SPLITS, SPLITS
        tile = tile // SPLITS
        level, span, factor = 1, block_size, fanout
        while tile >= tl.cdiv(T // span, BN):
            tile -= tl.cdiv(T // span, BN)
            row += T // span
            span = tl.minimum(span.to(tl.int64) * fanout, T).to(tl.int32)
            level += 1
        top = level == levels
    above = _above(span, factor, T)
    count = length // span
    complete = tl.where(top, 0, (length // above) * factor)  # children of complete parents
    o_n, o_d, o_v = tile * BN + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    last = tl.minimum(tile * BN + BN, count) - 1
    m_n, m_d, m_v = (o_n < count)[:, None], (o_d < D)[None, :], (o_v < DV)[None, :]
    of_head = i_bg * T if TOKENS else i_bg * nodes
    at = (of_head + row + o_n)[:, None]
    b_k = tl.load(p_key + at * D + o_d[None, :], mask=m_n & m_d, other=0)  # [BN, BD]
    b_v = tl.load(p_value + at * DV + o_v[None, :], mask=m_n & m_v, other=0)  # [BN, BV]
    bias = tl.log(tl.cast(span, tl.float32)) if MASS_BIAS else 0.0
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BV], tl.float32)

    # Two runs of queries, after the nodes and before them, hold all that see any of the nodes. A mask says which.
    after = tile * BN if TOKENS else tl.minimum(span.to(tl.int64) * (tile * BN + w), length).to(tl.int32)
    after_end = tl.where(top, length, tl.minimum(above.to(tl.int64) * (last // factor + w), length).to(tl.int32))
    before = tl.minimum(above.to(tl.int64) * tl.maximum(tile * BN // factor - w + 1, 0), length).to(tl.int32)
    before = tl.where(last < complete, before, 0)
    if TOKENS:
        before_end = after
    else:
        before_end = tl.minimum(span.to(tl.int64) * tl.maximum(last - w + 1, 0), after).to(tl.int32)
    for part in range(1 if CAUSAL else 2):
        begin, end = tl.where(part == 0, after, before), tl.where(part == 0, after_end, before_end)
        begin = tl.maximum(begin, first)
        steps = tl.where(last < tile * BN, 0, tl.maximum(tl.cdiv(end - begin, BM), 0))
        share = tl.cdiv(group * steps, parts)
        for step in range(part_of_queries * share, tl.minimum((part_of_queries + 1) * share, group * steps)):
            i_bh = i_bg // G * H + i_bg % G * group + step // steps
            o_t = begin + step % steps * BM + tl.arange(0, BM)
            m_t = o_t < end
            o_q = i_bh * Tq + o_t - first
            b_q = tl.load(p_query + o_q[:, None] * D + o_d[None, :], mask=m_t[:, None] & m_d, other=0)  # [BM, BD]
            b_do = tl.load(p_grad_out + o_q[:, None] * DV + o_v[None, :], mask=m_t[:, None] & m_v, other=0)  # [BM, BV]
            b_lse = tl.load(p_lse + o_q, mask=m_t, other=0)
            b_delta = tl.load(p_delta + o_q, mask=m_t, other=0)
            cell, parent = o_t // span, o_t // above  # [BM]
            near = tl.abs(parent[None, :] - (o_n // factor)[:, None]) < w
            seen = m_n & m_t[None, :] & (near | (o_n >= complete)[:, None])
            if not TOKENS:
                seen = seen & (tl.abs(cell[None, :] - o_n[:, None]) >= w)
            if CAUSAL:
                seen = seen & (o_n[:, None] < (cell + (1 if TOKENS else 0))[None, :])
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + bias  # [BN, BM]
            b_p = tl.where(seen, tl.exp(b_s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    b_dk = b_dk * scale
    if TOKENS:
        if levels > 0:  # a token's share of what its node of level 1 has got
            i_node, m_c = (o_n // block_size).to(tl.int64), o_n < complete
            at_node = (i_bg * SPLITS * nodes + i_node)[:, None]
            b_nk = tl.load(p_node_grad_key + at_node * D + o_d[None, :], mask=m_c[:, None] & m_d, other=0)
            b_nv = tl.load(p_node_grad_value + at_node * DV + o_v[None, :], mask=m_c[:, None] & m_v, other=0)
            if p_pool is None:
                b_dk += b_nk / block_size
                b_dv += b_nv / block_size
            else:
                b_pool = tl.load(p_pool + (i_bg % G) * D + o_d, mask=o_d < D, other=0).to(tl.float32)[None, :]
                b_kf, b_vf = b_k.to(tl.float32), b_v.to(tl.float32)
                o_pool = i_bg * (T // block_size) + i_node
                b_lse = tl.load(p_pool_lse + o_pool, mask=m_c, other=0)
                b_slope = tl.load(p_pool_slope + o_pool, mask=m_c, other=0)
                b_w = tl.where(m_c, tl.exp(tl.sum(b_kf * b_pool, 1) * scale - b_lse), 0.0)  # [BN]
                b_e = scale * b_w * (tl.sum(b_kf * b_nk, 1) + tl.sum(b_vf * b_nv, 1) - b_slope)
                b_dk += b_w[:, None] * b_nk + b_e[:, None] * b_pool
                b_dv += b_w[:, None] * b_nv
        m_n = (o_n < T)[:, None]  # padding gets 0
    else:
        at = ((i_bg * SPLITS + part_of_queries) * nodes + row + o_n)[:, None]
    tl.store(p_grad_key + at * D + o_d[None, :], b_dk.to(p_grad_key.dtype.element_ty), mask=m_n & m_d)
    tl.store(p_grad_value + at * DV + o_v[None, :], b_dv.to(p_grad_value.dtype.element_ty), mask=m_n & m_v)
