"""Queries against the runs of nodes they see: forward, and the gradients of queries, keys and values."""

import triton
import triton.language as tl


@triton.jit
def _above(span, factor, T):
    """Tokens per node one level up, at most T + 1: there is no difference between wider nodes."""
    return tl.minimum(tl.cast(span, tl.int64) * factor, T + 1).to(tl.int32)


@triton.jit
def _narrow(T, nodes, block_size, fanout, levels, w, scale):
    """Inductor may pass these as int64 and float64."""
    return (
        tl.cast(T, tl.int32), tl.cast(nodes, tl.int32), tl.cast(block_size, tl.int32), tl.cast(fanout, tl.int32),
        tl.cast(levels, tl.int32), tl.cast(w, tl.int32), tl.cast(scale, tl.float32),
    )  # fmt: skip


@triton.jit
def _product_below(a, b, most):
    """min(a * b, most); a * b may have more than 32 bits."""
    return tl.minimum(tl.cast(a, tl.int64) * b, most).to(tl.int32)


@triton.jit
def _node_run(part, t, T, span, above, fanout, top, w):
    """Nodes [begin, end) of a level >= 1 that the block of the query at t sees: left, right, right with no parent."""
    cell, parent = t // span, t // above
    count = T // span
    complete = tl.where(top, count, (T // above) * fanout)
    if part == 0:
        begin = tl.where(top, 0, fanout * tl.maximum(parent - w + 1, 0))
        end = tl.maximum(cell - w + 1, 0)
    elif part == 1:
        begin = cell + w
        end = tl.where(top, count, _product_below(fanout, parent + w, complete))
    else:
        begin = tl.maximum(cell + w, complete)
        end = count
    return begin, end


@triton.jit
def _token_run(part, t, T, block_size, has_levels, w, CAUSAL: tl.constexpr, t_end):
    """Tokens [begin, end) that the tile of queries [t, t_end) sees: near ones, and those with no parent."""
    begin = tl.where(has_levels, block_size * tl.maximum(t // block_size - w + 1, 0), 0)
    complete = tl.where(has_levels, (T // block_size) * block_size, T)
    if CAUSAL:
        end = t_end
    elif part == 0:
        end = tl.where(has_levels, _product_below(block_size, t // block_size + w, complete), T)
    else:
        begin = tl.maximum(begin, complete)
        end = T
    return begin, end


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
    b_q, b_out, b_most, b_sum, p_key, p_value, begin, end, bias, o_t, scale,
    DIAGONAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        mask = (o_n < end)[:, None] & (o_d < D)[None, :]
        offsets = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
        b_k = tl.load(p_key + offsets, mask=mask, other=0)  # [BN, BD]
        b_v = tl.load(p_value + offsets, mask=mask, other=0)
        b_s = _scores(b_q, b_k, PRECISION) * scale + bias  # [BM, BN]
        seen = (o_n < end)[None, :]
        if DIAGONAL:
            seen = seen & (o_n[None, :] <= o_t[:, None])
        b_s = tl.where(seen, b_s, -float("inf"))
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_new[:, None])
        decay = tl.exp(b_most - b_new)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_out = b_out * decay[:, None] + _weighted(b_p, b_v, PRECISION)
        b_most = b_new
    return b_out, b_most, b_sum


@triton.jit
def _attend_all(
    b_q, p_key, p_value, p_pooled_key, p_pooled_value, o_t, t, t_end, T, block_size, fanout, levels, w, scale,
    CAUSAL: tl.constexpr, MASS_BIAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens and nodes of all levels that the tile of queries [t, t_end) sees; the pointers are its head's."""
    b_out = tl.zeros([BM, BD], tl.float32)
    b_most = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if t < t_end:
        for part in tl.static_range(1 if CAUSAL else 2):
            begin, end = _token_run(part, t, T, block_size, levels > 0, w, CAUSAL, t_end)
            b_out, b_most, b_sum = _attend(
                b_q, b_out, b_most, b_sum, p_key, p_value, begin, end, 0.0, o_t, scale, CAUSAL, D, BD, BN, PRECISION,
            )  # fmt: skip
        span = block_size
        row = tl.zeros((), tl.int64)
        for level in range(1, levels + 1):
            above = _above(span, fanout, T)
            bias = tl.log(tl.cast(span, tl.float32)) if MASS_BIAS else 0.0
            for side in range(1 if CAUSAL else 3):
                begin, end = _node_run(side, t, T, span, above, fanout, level == levels, w)
                b_out, b_most, b_sum = _attend(
                    b_q, b_out, b_most, b_sum, p_pooled_key + row * D, p_pooled_value + row * D, begin, end, bias, o_t,
                    scale, False, D, BD, BN, PRECISION,
                )  # fmt: skip
            row += T // span
            span = above
    return b_out, b_most, b_sum


# Without do_not_specialize Triton makes a number that is 1 a constant, and `_narrow` could not cast it.
_NUMBERS = ["H", "G", "T", "nodes", "block_size", "fanout", "levels", "w"]


@triton.jit(do_not_specialize=_NUMBERS)
def attention_forward_kernel(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,
    p_pooled_key,  # [B, G, nodes, D]
    p_pooled_value,
    p_out,  # [B, H, T, D]
    p_lse,  # [B, H, T]
    H,
    G,
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
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T, nodes, block_size, fanout, levels, w, scale = _narrow(T, nodes, block_size, fanout, levels, w, scale)
    i_bh = tl.program_id(1).to(tl.int64)
    i_bg = i_bh // H * G + i_bh % H // (H // G)
    tiles = tl.cdiv(block_size, BM)
    i_block = tl.program_id(0) // tiles
    t = i_block * block_size + tl.program_id(0) % tiles * BM
    t_end = tl.minimum(tl.minimum(T, (i_block + 1) * block_size), t + BM)
    o_t, o_d = t + tl.arange(0, BM), tl.arange(0, BD)
    m_q = (o_t < t_end)[:, None] & (o_d < D)[None, :]
    o_q = (i_bh * T + o_t)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_query + o_q, mask=m_q, other=0)  # [BM, BD]
    o_tokens, o_nodes = i_bg * T * D, i_bg * nodes * D
    b_out, b_most, b_sum = _attend_all(
        b_q, p_key + o_tokens, p_value + o_tokens, p_pooled_key + o_nodes, p_pooled_value + o_nodes, o_t, t, t_end, T,
        block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, BD, BM, BN, PRECISION,
    )  # fmt: skip
    spoilt = CAUSAL and _is_spoilt(b_out)
    tl.store(p_out + o_q, (b_out / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + i_bh * T + o_t, b_most + tl.log(b_sum), mask=o_t < t_end)
    if CAUSAL:  # noqa: SIM102  (a constexpr decides first)
        if spoilt:
            # A NaN in the future of a row reaches it through the mask, since 0 times NaN is NaN. The rows run again one
            # by one, and read nothing of their future.
            tl.debug_barrier()
            for row in range(t, t_end):
                o_row = (i_bh * T + row) * D + o_d[None, :]
                b_row, _, b_total = _attend_all(
                    tl.load(p_query + o_row, mask=o_d[None, :] < D, other=0), p_key + o_tokens, p_value + o_tokens,
                    p_pooled_key + o_nodes, p_pooled_value + o_nodes, row + tl.arange(0, 1), row, row + 1, T,
                    block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, BD, 1, BN, PRECISION,
                )  # fmt: skip
                b_row = (b_row / b_total[:, None]).to(p_out.dtype.element_ty)
                tl.store(p_out + o_row, b_row, mask=o_d[None, :] < D)


@triton.jit
def _query_gradient(
    b_q, b_do, b_lse, b_delta, b_dq, p_key, p_value, begin, end, bias, o_t, scale,
    DIAGONAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BD)
    for n in range(begin, end, BN):
        o_n = n + tl.arange(0, BN)
        mask = (o_n < end)[:, None] & (o_d < D)[None, :]
        offsets = o_n.to(tl.int64)[:, None] * D + o_d[None, :]
        b_k = tl.load(p_key + offsets, mask=mask, other=0)  # [BN, BD]
        b_v = tl.load(p_value + offsets, mask=mask, other=0)
        b_s = _scores(b_q, b_k, PRECISION) * scale + bias  # [BM, BN]
        seen = (o_n < end)[None, :]
        if DIAGONAL:
            seen = seen & (o_n[None, :] <= o_t[:, None])
        b_p = tl.where(seen, tl.exp(b_s - b_lse[:, None]), 0.0)
        b_dp = _scores(b_do, b_v, PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += _weighted(b_ds, b_k, PRECISION)
    return b_dq


@triton.jit
def _query_gradient_all(
    b_q, b_do, b_lse, b_delta, p_key, p_value, p_pooled_key, p_pooled_value, o_t, t, t_end, T, block_size, fanout,
    levels, w, scale,
    CAUSAL: tl.constexpr, MASS_BIAS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_dq = tl.zeros([BM, BD], tl.float32)
    if t < t_end:
        for part in tl.static_range(1 if CAUSAL else 2):
            begin, end = _token_run(part, t, T, block_size, levels > 0, w, CAUSAL, t_end)
            b_dq = _query_gradient(
                b_q, b_do, b_lse, b_delta, b_dq, p_key, p_value, begin, end, 0.0, o_t, scale, CAUSAL, D, BD, BN,
                PRECISION,
            )  # fmt: skip
        span = block_size
        row = tl.zeros((), tl.int64)
        for level in range(1, levels + 1):
            above = _above(span, fanout, T)
            bias = tl.log(tl.cast(span, tl.float32)) if MASS_BIAS else 0.0
            for side in range(1 if CAUSAL else 3):
                begin, end = _node_run(side, t, T, span, above, fanout, level == levels, w)
                b_dq = _query_gradient(
                    b_q, b_do, b_lse, b_delta, b_dq, p_pooled_key + row * D, p_pooled_value + row * D, begin, end,
                    bias, o_t, scale, False, D, BD, BN, PRECISION,
                )  # fmt: skip
            row += T // span
            span = above
    return b_dq


@triton.jit(do_not_specialize=_NUMBERS)
def attention_query_gradient_kernel(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,
    p_pooled_key,  # [B, G, nodes, D]
    p_pooled_value,
    p_out,  # [B, H, T, D]
    p_lse,  # [B, H, T]
    p_grad_out,  # [B, H, T, D]
    p_delta,  # [B, H, T], written
    p_grad_query,  # [B, H, T, D]
    H,
    G,
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
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T, nodes, block_size, fanout, levels, w, scale = _narrow(T, nodes, block_size, fanout, levels, w, scale)
    i_bh = tl.program_id(1).to(tl.int64)
    i_bg = i_bh // H * G + i_bh % H // (H // G)
    tiles = tl.cdiv(block_size, BM)
    i_block = tl.program_id(0) // tiles
    t = i_block * block_size + tl.program_id(0) % tiles * BM
    t_end = tl.minimum(tl.minimum(T, (i_block + 1) * block_size), t + BM)
    o_t, o_d = t + tl.arange(0, BM), tl.arange(0, BD)
    m_t = o_t < t_end
    m_q = m_t[:, None] & (o_d < D)[None, :]
    o_q = (i_bh * T + o_t)[:, None] * D + o_d[None, :]
    b_q = tl.load(p_query + o_q, mask=m_q, other=0)  # [BM, BD]
    b_do = tl.load(p_grad_out + o_q, mask=m_q, other=0)
    b_o = tl.load(p_out + o_q, mask=m_q, other=0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    b_lse = tl.load(p_lse + i_bh * T + o_t, mask=m_t, other=0)
    o_tokens, o_nodes = i_bg * T * D, i_bg * nodes * D
    b_dq = _query_gradient_all(
        b_q, b_do, b_lse, b_delta, p_key + o_tokens, p_value + o_tokens, p_pooled_key + o_nodes,
        p_pooled_value + o_nodes, o_t, t, t_end, T, block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, BD, BM,
        BN, PRECISION,
    )  # fmt: skip
    tl.store(p_delta + i_bh * T + o_t, b_delta, mask=m_t)
    tl.store(p_grad_query + o_q, (b_dq * scale).to(p_grad_query.dtype.element_ty), mask=m_q)
    if CAUSAL:  # noqa: SIM102  (a constexpr decides first)
        if _is_spoilt(b_dq):
            tl.debug_barrier()
            for row in range(t, t_end):
                o_row, m_row = (i_bh * T + row) * D + o_d[None, :], o_d[None, :] < D
                b_do_row = tl.load(p_grad_out + o_row, mask=m_row, other=0)
                b_out_row = tl.load(p_out + o_row, mask=m_row, other=0)
                b_row = _query_gradient_all(
                    tl.load(p_query + o_row, mask=m_row, other=0), b_do_row,
                    tl.load(p_lse + i_bh * T + row + tl.arange(0, 1)),
                    tl.sum(b_out_row.to(tl.float32) * b_do_row.to(tl.float32), 1), p_key + o_tokens,
                    p_value + o_tokens, p_pooled_key + o_nodes, p_pooled_value + o_nodes, row + tl.arange(0, 1), row,
                    row + 1, T, block_size, fanout, levels, w, scale, CAUSAL, MASS_BIAS, D, BD, 1, BN, PRECISION,
                )  # fmt: skip
                tl.store(p_grad_query + o_row, (b_row * scale).to(p_grad_query.dtype.element_ty), mask=m_row)


@triton.jit(do_not_specialize=_NUMBERS)
def attention_key_gradient_kernel(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,
    p_pooled_key,  # [B, G, nodes, D]
    p_pooled_value,
    p_lse,  # [B, H, T]
    p_grad_out,  # [B, H, T, D]
    p_delta,  # [B, H, T]
    p_grad_key,  # [B, G, T + SPLITS * nodes, D], float32: tokens, then nodes by part
    p_grad_value,
    H,
    G,
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
    BD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # More queries see a node than a token, and more at each level. So a node's queries are cut into SPLITS parts. The
    # programs of the top level take longest and come first.
    T, nodes, block_size, fanout, levels, w, scale = _narrow(T, nodes, block_size, fanout, levels, w, scale)
    i_bg = tl.program_id(1).to(tl.int64)
    group = H // G
    token_tiles = tl.cdiv(T, BN)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    part_of_queries = tl.where(tile < token_tiles, 0, (tile - token_tiles) % SPLITS)
    parts = tl.where(tile < token_tiles, 1, SPLITS)
    tile = tl.where(tile < token_tiles, tile, token_tiles + (tile - token_tiles) // SPLITS)
    level, row = 0, 0
    span = tl.full((), 1, tl.int32)
    while tile >= tl.cdiv(T // span, BN):
        tile -= tl.cdiv(T // span, BN)
        row += T // span
        span = tl.minimum(span.to(tl.int64) * tl.where(level == 0, block_size, fanout), T).to(tl.int32)
        level += 1
    factor = tl.where(level == 0, block_size, fanout)
    above = _above(span, factor, T)
    top = level == levels
    count = T // span
    complete = tl.where(top, 0, (T // above) * factor)  # children of complete parents
    o_n, o_d = tile * BN + tl.arange(0, BN), tl.arange(0, BD)
    last = tl.minimum(tile * BN + BN, count) - 1
    m_k = (o_n < count)[:, None] & (o_d < D)[None, :]
    if level == 0:
        o_k = (i_bg * T + o_n)[:, None] * D + o_d[None, :]
        b_k = tl.load(p_key + o_k, mask=m_k, other=0)  # [BN, BD]
        b_v = tl.load(p_value + o_k, mask=m_k, other=0)
    else:
        o_k = (i_bg * nodes + row - T + o_n)[:, None] * D + o_d[None, :]
        b_k = tl.load(p_pooled_key + o_k, mask=m_k, other=0)
        b_v = tl.load(p_pooled_value + o_k, mask=m_k, other=0)
    bias = tl.log(tl.cast(span, tl.float32)) if MASS_BIAS else 0.0
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)

    # Two runs of queries, after the nodes and before them, hold all that see any of the nodes. A mask says which.
    after = tl.where(level == 0, tile * BN, tl.minimum(span.to(tl.int64) * (tile * BN + w), T).to(tl.int32))
    after_end = tl.where(top, T, tl.minimum(above.to(tl.int64) * (last // factor + w), T).to(tl.int32))
    before = tl.where(
        last < complete, tl.minimum(above.to(tl.int64) * tl.maximum(tile * BN // factor - w + 1, 0), T).to(tl.int32), 0
    )
    before_end = tl.minimum(
        tl.where(level == 0, after, tl.minimum(span.to(tl.int64) * tl.maximum(last - w + 1, 0), T).to(tl.int32)), after
    )
    for part in range(1 if CAUSAL else 2):
        begin, end = tl.where(part == 0, after, before), tl.where(part == 0, after_end, before_end)
        steps = tl.maximum(tl.cdiv(end - begin, BM), 0)
        share = tl.cdiv(group * steps, parts)
        for step in range(part_of_queries * share, tl.minimum((part_of_queries + 1) * share, group * steps)):
            i_bh = i_bg // G * H + i_bg % G * group + step // steps
            o_t = begin + step % steps * BM + tl.arange(0, BM)
            m_t = o_t < end
            m_q = m_t[:, None] & (o_d < D)[None, :]
            o_q = (i_bh * T + o_t)[:, None] * D + o_d[None, :]
            b_q = tl.load(p_query + o_q, mask=m_q, other=0)  # [BM, BD]
            b_do = tl.load(p_grad_out + o_q, mask=m_q, other=0)
            b_lse = tl.load(p_lse + i_bh * T + o_t, mask=m_t, other=0)
            b_delta = tl.load(p_delta + i_bh * T + o_t, mask=m_t, other=0)
            cell, parent = o_t // span, o_t // above  # [BM]
            seen = (o_n < count)[:, None] & m_t[None, :]
            near = tl.abs(parent[None, :] - (o_n // factor)[:, None]) < w
            seen = seen & (near | (o_n >= complete)[:, None])
            seen = seen & ((level == 0) | (tl.abs(cell[None, :] - o_n[:, None]) >= w))
            if CAUSAL:
                seen = seen & (o_n[:, None] < (cell + tl.where(level == 0, 1, 0))[None, :])
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale + bias  # [BN, BM]
            b_p = tl.where(seen, tl.exp(b_s - b_lse[None, :]), 0.0)
            b_dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PRECISION)
    o_g = (i_bg * (T + SPLITS * nodes) + part_of_queries * nodes + row + o_n)[:, None] * D + o_d[None, :]
    tl.store(p_grad_key + o_g, b_dk * scale, mask=m_k)
    tl.store(p_grad_value + o_g, b_dv, mask=m_k)
