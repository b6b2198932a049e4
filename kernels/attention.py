"""Hierarchical attention in Triton. No GPU has run these kernels yet; ``auto`` does not choose them.

Node j of level l stands for the tokens [j S_l, (j + 1) S_l). With c_l = t // S_l, the query at t sees it iff

    |c_l - j| >= w (level >= 1), and its parent does not exist, is not complete, or is nearer than w to c_{l+1},

and, where causal, it ends at t or before. So for a tile of queries of one aligned block the nodes of a level are one
run (causal: all on the left) or at most three, and for a tile of nodes the queries are one run (causal) or two; both
follow from the tile's place alone. A program takes BM queries (forward, gradient of the query) or BN nodes of any level
(gradients of key and value, no atomics); the gradient then flows down the pyramid, a program a node.

    p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)

Products of float32 are IEEE unless torch's TF32 switch is on. Scores, sums and gradients are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration, wrap

__all__ = ["CONFIGURATIONS", "hierarchical_attention_backward", "hierarchical_attention_forward"]


@triton.jit
def _above(span, factor, T):
    """Tokens of a node one level up, at most T + 1: wider ones are alike."""
    return tl.minimum(span.to(tl.int64) * factor, T + 1).to(tl.int32)


@triton.jit
def pool_kernel(
    p_key,  # [B*G, N_below, D], the first `children` * N rows of a head count
    p_value,
    p_pool,  # [G, D] of this level, or None
    p_pooled_key,  # [B*G, nodes, D]
    p_pooled_value,
    head_rows,  # rows of a head in p_key
    first_row,  # of the level below
    nodes,
    offset,  # first row of this level in p_pooled
    children,
    G,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    i_node, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_c = tl.arange(0, BD), tl.arange(0, BC)
    m_d = o_d < D
    base = (i_head * head_rows + first_row + i_node * children) * D
    b_most = tl.full((), -float("inf"), tl.float32)
    b_sum = tl.zeros((), tl.float32)
    b_k, b_v = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for c in range(0, children, BC):
        mask = (c + o_c < children)[:, None] & m_d[None, :]
        offsets = base + (c + o_c)[:, None] * D + o_d[None, :]
        b_kc = tl.load(p_key + offsets, mask=mask, other=0).to(tl.float32)  # [BC, BD]
        b_vc = tl.load(p_value + offsets, mask=mask, other=0).to(tl.float32)
        if p_pool is not None:
            b_p = tl.load(p_pool + (i_head % G) * D + o_d, mask=m_d, other=0).to(tl.float32)
            b_s = tl.where(c + o_c < children, tl.sum(b_kc * b_p[None, :], 1) * scale, -float("inf"))
        else:
            b_s = tl.where(c + o_c < children, 0.0, -float("inf"))
        b_new = tl.maximum(b_most, tl.max(b_s, 0))
        b_w = tl.exp(b_s - b_new)
        decay = tl.exp(b_most - b_new)
        b_sum = b_sum * decay + tl.sum(b_w, 0)
        b_k = b_k * decay + tl.sum(b_w[:, None] * b_kc, 0)
        b_v = b_v * decay + tl.sum(b_w[:, None] * b_vc, 0)
        b_most = b_new
    out = (i_head * nodes + offset + i_node) * D + o_d
    tl.store(p_pooled_key + out, (b_k / b_sum).to(p_pooled_key.dtype.element_ty), mask=m_d)
    tl.store(p_pooled_value + out, (b_v / b_sum).to(p_pooled_value.dtype.element_ty), mask=m_d)


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
        end = tl.where(top, count, tl.minimum(fanout * (parent + w), complete))
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
        end = tl.where(has_levels, tl.minimum(block_size * (t // block_size + w), complete), T)
    else:
        begin = tl.maximum(begin, complete)
        end = T
    return begin, end


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
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + bias  # [BM, BN]
        seen = (o_n < end)[None, :]
        if DIAGONAL:
            seen = seen & (o_n[None, :] <= o_t[:, None])
        b_s = tl.where(seen, b_s, -float("inf"))
        b_new = tl.maximum(b_most, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_new[:, None])
        decay = tl.exp(b_most - b_new)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        b_out = b_out * decay[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_most = b_new
    return b_out, b_most, b_sum


@triton.jit
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
    b_out = tl.zeros([BM, BD], tl.float32)
    b_most = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    if t < t_end:
        for part in tl.static_range(1 if CAUSAL else 2):
            begin, end = _token_run(part, t, T, block_size, levels > 0, w, CAUSAL, t_end)
            b_out, b_most, b_sum = _attend(
                b_q, b_out, b_most, b_sum, p_key + i_bg * T * D, p_value + i_bg * T * D, begin, end, 0.0, o_t, scale,
                CAUSAL, D, BD, BN, PRECISION,
            )  # fmt: skip
        span = block_size
        row = i_bg * nodes
        for level in range(1, levels + 1):
            above = _above(span, fanout, T)
            bias = tl.log(span.to(tl.float32)) if MASS_BIAS else 0.0
            for side in range(1 if CAUSAL else 3):
                begin, end = _node_run(side, t, T, span, above, fanout, level == levels, w)
                b_out, b_most, b_sum = _attend(
                    b_q, b_out, b_most, b_sum, p_pooled_key + row * D, p_pooled_value + row * D, begin, end, bias, o_t,
                    scale, False, D, BD, BN, PRECISION,
                )  # fmt: skip
            row += T // span
            span = above
    tl.store(p_out + o_q, (b_out / b_sum[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    tl.store(p_lse + i_bh * T + o_t, b_most + tl.log(b_sum), mask=o_t < t_end)


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
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + bias  # [BM, BN]
        seen = (o_n < end)[None, :]
        if DIAGONAL:
            seen = seen & (o_n[None, :] <= o_t[:, None])
        b_p = tl.where(seen, tl.exp(b_s - b_lse[:, None]), 0.0)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PRECISION)
    return b_dq


@triton.jit
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
    b_dq = tl.zeros([BM, BD], tl.float32)
    if t < t_end:
        for part in tl.static_range(1 if CAUSAL else 2):
            begin, end = _token_run(part, t, T, block_size, levels > 0, w, CAUSAL, t_end)
            b_dq = _query_gradient(
                b_q, b_do, b_lse, b_delta, b_dq, p_key + i_bg * T * D, p_value + i_bg * T * D, begin, end, 0.0, o_t,
                scale, CAUSAL, D, BD, BN, PRECISION,
            )  # fmt: skip
        span = block_size
        row = i_bg * nodes
        for level in range(1, levels + 1):
            above = _above(span, fanout, T)
            bias = tl.log(span.to(tl.float32)) if MASS_BIAS else 0.0
            for side in range(1 if CAUSAL else 3):
                begin, end = _node_run(side, t, T, span, above, fanout, level == levels, w)
                b_dq = _query_gradient(
                    b_q, b_do, b_lse, b_delta, b_dq, p_pooled_key + row * D, p_pooled_value + row * D, begin, end,
                    bias, o_t, scale, False, D, BD, BN, PRECISION,
                )  # fmt: skip
            row += T // span
            span = above
    tl.store(p_delta + i_bh * T + o_t, b_delta, mask=m_t)
    tl.store(p_grad_query + o_q, (b_dq * scale).to(p_grad_query.dtype.element_ty), mask=m_q)


@triton.jit
def attention_key_gradient_kernel(
    p_query,  # [B, H, T, D]
    p_key,  # [B, G, T, D]
    p_value,
    p_pooled_key,  # [B, G, nodes, D]
    p_pooled_value,
    p_lse,  # [B, H, T]
    p_grad_out,  # [B, H, T, D]
    p_delta,  # [B, H, T]
    p_grad_key,  # [B, G, T + nodes, D], float32: tokens, then nodes
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
    PRECISION: tl.constexpr,
):
    i_bg = tl.program_id(1).to(tl.int64)
    group = H // G
    tile, level, row = tl.program_id(0), 0, 0
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
    bias = tl.log(span.to(tl.float32)) if MASS_BIAS else 0.0
    b_dk, b_dv = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BD], tl.float32)

    # Queries past the nodes, and before them; each run holds all that see one of the nodes, and a mask says which.
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
        for step in range(group * steps):
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
    o_g = (i_bg * (T + nodes) + row + o_n)[:, None] * D + o_d[None, :]
    tl.store(p_grad_key + o_g, b_dk * scale, mask=m_k)
    tl.store(p_grad_value + o_g, b_dv, mask=m_k)


@triton.jit
def unpool_kernel(
    p_key,  # [B*G, head_rows, D]: the children
    p_value,
    p_pool,  # [G, D] of this level, or None
    p_grad_key,  # [B*G, grad_rows, D], float32: tokens, then nodes
    p_grad_value,
    p_grad_pool,  # [B*G, N, D], float32: a share a node, or None
    head_rows,
    first_row,  # of the children in p_key
    grad_rows,
    node_row,  # of this level in p_grad
    child_row,  # of the children in p_grad
    children,
    G,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    i_node, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_c = tl.arange(0, BD), tl.arange(0, BC)
    m_d = o_d < D
    o_n = (i_head * grad_rows + node_row + i_node) * D + o_d
    b_dk = tl.load(p_grad_key + o_n, mask=m_d, other=0)  # [BD]
    b_dv = tl.load(p_grad_value + o_n, mask=m_d, other=0)
    base = (i_head * head_rows + first_row + i_node * children) * D
    grad_base = (i_head * grad_rows + child_row + i_node * children) * D
    b_most = tl.full((), -float("inf"), tl.float32)
    b_sum, b_slope = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    b_p = tl.zeros([BD], tl.float32)
    if p_pool is not None:
        b_p += tl.load(p_pool + (i_head % G) * D + o_d, mask=m_d, other=0).to(tl.float32)
        for c in range(0, children, BC):
            m_c = c + o_c < children
            offsets = base + (c + o_c)[:, None] * D + o_d[None, :]
            b_kc = tl.load(p_key + offsets, mask=m_c[:, None] & m_d[None, :], other=0).to(tl.float32)
            b_vc = tl.load(p_value + offsets, mask=m_c[:, None] & m_d[None, :], other=0).to(tl.float32)
            b_s = tl.where(m_c, tl.sum(b_kc * b_p[None, :], 1) * scale, -float("inf"))
            b_new = tl.maximum(b_most, tl.max(b_s, 0))
            b_w, decay = tl.exp(b_s - b_new), tl.exp(b_most - b_new)
            b_sum = b_sum * decay + tl.sum(b_w, 0)
            b_slope = b_slope * decay + tl.sum(b_w * tl.sum(b_kc * b_dk[None, :] + b_vc * b_dv[None, :], 1), 0)
            b_most = b_new
        b_slope = b_slope / b_sum
    b_dp = tl.zeros([BD], tl.float32)
    for c in range(0, children, BC):
        m_c = c + o_c < children
        mask = m_c[:, None] & m_d[None, :]
        o_g = grad_base + (c + o_c)[:, None] * D + o_d[None, :]
        b_gk = tl.load(p_grad_key + o_g, mask=mask, other=0)
        b_gv = tl.load(p_grad_value + o_g, mask=mask, other=0)
        if p_pool is not None:
            offsets = base + (c + o_c)[:, None] * D + o_d[None, :]
            b_kc = tl.load(p_key + offsets, mask=mask, other=0).to(tl.float32)
            b_vc = tl.load(p_value + offsets, mask=mask, other=0).to(tl.float32)
            b_s = tl.where(m_c, tl.sum(b_kc * b_p[None, :], 1) * scale, -float("inf"))
            b_w = tl.exp(b_s - b_most) / b_sum
            b_e = scale * b_w * (tl.sum(b_kc * b_dk[None, :] + b_vc * b_dv[None, :], 1) - b_slope)
            b_gk += b_w[:, None] * b_dk[None, :] + b_e[:, None] * b_p[None, :]
            b_gv += b_w[:, None] * b_dv[None, :]
            b_dp += tl.sum(b_e[:, None] * b_kc, 0)
        else:
            b_gk += (b_dk / children)[None, :]
            b_gv += (b_dv / children)[None, :]
        tl.store(p_grad_key + o_g, b_gk, mask=mask)
        tl.store(p_grad_value + o_g, b_gv, mask=mask)
    if p_pool is not None:
        tl.store(p_grad_pool + (i_head * tl.num_programs(0) + i_node) * D + o_d, b_dp, mask=m_d)


# ---- launchers ----


def _block(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


#: (query rows BM, key rows BN, warps, stages) by kernel, element size and padded head dimension: forward, gradient of
#: the query, gradients of key and value. Chosen so that nothing spills on sm_80, sm_90 and sm_100.
_TILES = {
    ("forward", 4): {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 1)},
    ("forward", 2): {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("query", 4): {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("query", 2): {64: (64, 64, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    ("key", 4): {64: (32, 32, 8, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("key", 2): {64: (64, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}


def _tile(kernel: str, itemsize: int, BD: int, block_size: int) -> tuple[int, int, int, int]:
    BM, BN, warps, stages = _TILES[kernel, itemsize][max(64, BD)]
    if kernel != "key":
        BM = min(BM, max(16, triton.next_power_of_2(block_size)))
    return BM, BN, warps, stages


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _sizes(T: int, block_size: int, fanout: int, levels: int, w: int) -> tuple[int, int, int, list[int]]:
    """block_size, fanout and w cut to what changes nothing, and the spans S_0, S_1, … of the levels that hold nodes."""
    block_size, fanout = min(block_size, T + 1), min(fanout, T + 1)
    spans, factor = [1], block_size
    while (levels < 0 or len(spans) <= levels) and spans[-1] * factor <= T:
        spans.append(spans[-1] * factor)
        factor = fanout
    return block_size, fanout, min(w, T // block_size + 2), spans


def _check(query: Tensor, key: Tensor, value: Tensor, pool_query: Tensor | None) -> None:
    B, H, T, D = query.shape
    G = key.shape[1]
    ok = key.shape == (B, G, T, D) and value.shape == key.shape and G > 0 and H % G == 0
    ok = ok and (pool_query is None or pool_query.shape == (pool_query.shape[0], G, D))
    if not ok:
        raise RuntimeError("hierarchical_attention (triton): shapes of query, key, value and pool_query do not match")
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(
            f"hierarchical_attention (triton): expected float32, float16 or bfloat16, but got {query.dtype}"
        )
    if D > 256:
        raise RuntimeError(f"hierarchical_attention (triton): expected a head dimension of at most 256, but got {D}")
    if T * D >= 1 << 31:
        raise RuntimeError(f"hierarchical_attention (triton): expected T * D below 2^31, but got {T} * {D}")


@torch.library.triton_op("seqaccel::hierarchical_attention_forward_triton", mutates_args={})
def hierarchical_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    block_size: int,
    fanout: int,
    levels: int,
    local_blocks: int,
    causal: bool,
    mass_bias: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, pool_query)
    B, H, T, D = query.shape
    G = key.shape[1]
    block_size, fanout, w, spans = _sizes(T, block_size, fanout, levels, local_blocks)
    counts = [T // span for span in spans]
    nodes = sum(counts[1:])
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    pool_query = None if pool_query is None else pool_query.contiguous()
    out = torch.empty_like(query)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=query.device)
    pooled_key, pooled_value = key.new_empty(B, G, nodes, D), key.new_empty(B, G, nodes, D)
    if query.numel() == 0:
        return out, lse, pooled_key, pooled_value
    BD = _block(D)
    rows = 0
    for level in range(1, len(spans)):
        below = (key, value) if level == 1 else (pooled_key, pooled_value)
        wrap(pool_kernel)[(counts[level], B * G)](
            *below,
            None if pool_query is None else pool_query[min(level, pool_query.shape[0]) - 1],
            pooled_key,
            pooled_value,
            T if level == 1 else nodes,
            0 if level == 1 else rows - counts[level - 1],
            nodes,
            rows,
            spans[level] // spans[level - 1],
            G,
            float(scale),
            D=D,
            BD=BD,
            BC=16,
            num_warps=4,
        )
        rows += counts[level]
    BM, BN, warps, stages = _tile("forward", query.element_size(), BD, block_size)
    grid = (triton.cdiv(block_size, BM) * triton.cdiv(T, block_size), B * H)
    wrap(attention_forward_kernel)[grid](
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        out,
        lse,
        H,
        G,
        T,
        nodes,
        block_size,
        fanout,
        len(spans) - 1,
        w,
        float(scale),
        CAUSAL=causal,
        MASS_BIAS=mass_bias,
        D=D,
        BD=BD,
        BM=BM,
        BN=BN,
        PRECISION=_precision(query.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    return out, lse, pooled_key, pooled_value


@torch.library.triton_op("seqaccel::hierarchical_attention_backward_triton", mutates_args={})
def hierarchical_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    out: Tensor,
    lse: Tensor,
    pooled_key: Tensor,
    pooled_value: Tensor,
    block_size: int,
    fanout: int,
    levels: int,
    local_blocks: int,
    causal: bool,
    mass_bias: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, pool_query)
    B, H, T, D = query.shape
    G = key.shape[1]
    block_size, fanout, w, spans = _sizes(T, block_size, fanout, levels, local_blocks)
    counts = [T // span for span in spans]
    nodes = sum(counts[1:])
    if pooled_key.shape != (B, G, nodes, D) or lse.shape != (B, H, T):
        raise RuntimeError("hierarchical_attention (triton): what the forward pass saved does not match the inputs")
    query, key, value, out = query.contiguous(), key.contiguous(), value.contiguous(), out.contiguous()
    grad_out = grad_out.contiguous()
    pool_query = None if pool_query is None else pool_query.contiguous()
    grad_query = torch.empty_like(query)
    grad_pool = query.new_zeros((0, G, D)) if pool_query is None else torch.zeros_like(pool_query, dtype=torch.float32)
    if query.numel() == 0:
        return grad_query, torch.zeros_like(key), torch.zeros_like(value), grad_pool.to(query.dtype)
    delta = torch.empty_like(lse)
    grad_key = lse.new_empty(B, G, T + nodes, D)
    grad_value = torch.empty_like(grad_key)
    BD = _block(D)
    sizes = (H, G, T, nodes, block_size, fanout, len(spans) - 1, w, float(scale))
    flags = dict(CAUSAL=causal, MASS_BIAS=mass_bias, D=D, BD=BD, PRECISION=_precision(query.dtype))
    BM, BN, warps, stages = _tile("query", query.element_size(), BD, block_size)
    wrap(attention_query_gradient_kernel)[(triton.cdiv(block_size, BM) * triton.cdiv(T, block_size), B * H)](
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        out,
        lse,
        grad_out,
        delta,
        grad_query,
        *sizes,
        **flags,
        BM=BM,
        BN=BN,
        num_warps=warps,
        num_stages=stages,
    )
    BM, BN, warps, stages = _tile("key", query.element_size(), BD, block_size)
    wrap(attention_key_gradient_kernel)[(sum(triton.cdiv(count, BN) for count in counts), B * G)](
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        lse,
        grad_out,
        delta,
        grad_key,
        grad_value,
        *sizes,
        **flags,
        BM=BM,
        BN=BN,
        num_warps=warps,
        num_stages=stages,
    )
    for level in range(len(spans) - 1, 0, -1):
        row = sum(counts[:level])  # of this level in grad_key
        below = (key, value) if level == 1 else (pooled_key, pooled_value)
        pool = None if pool_query is None else min(level, pool_query.shape[0]) - 1
        share = None if pool is None else lse.new_empty(B, G, counts[level], D)
        wrap(unpool_kernel)[(counts[level], B * G)](
            *below,
            None if pool is None else pool_query[pool],
            grad_key,
            grad_value,
            share,
            T if level == 1 else nodes,
            0 if level == 1 else row - T - counts[level - 1],
            T + nodes,
            row,
            row - counts[level - 1],
            spans[level] // spans[level - 1],
            G,
            float(scale),
            D=D,
            BD=BD,
            BC=16,
            num_warps=4,
        )
        if pool is not None:
            grad_pool[pool] += share.sum((0, 2))
    return (
        grad_query,
        grad_key[:, :, :T].to(key.dtype, copy=True, memory_format=torch.contiguous_format),
        grad_value[:, :, :T].to(value.dtype, copy=True, memory_format=torch.contiguous_format),
        grad_pool.to(query.dtype),
    )


# ---- what is compiled offline ----


def _configuration(kind: str, dtype: str, D: int, causal: bool) -> Configuration:
    kernel, pointers, wide = {
        "forward": (attention_forward_kernel, "query key value pooled_key pooled_value out", "lse"),
        "query": (
            attention_query_gradient_kernel,
            "query key value pooled_key pooled_value out grad_out grad_query",
            "lse delta",
        ),
        "key": (
            attention_key_gradient_kernel,
            "query key value pooled_key pooled_value grad_out",
            "lse delta grad_key grad_value",
        ),
    }[kind]
    BM, BN, warps, stages = _tile(kind, 4 if dtype == "fp32" else 2, _block(D), 64)
    signature = {f"p_{name}": f"*{dtype}" for name in pointers.split()}
    signature |= {f"p_{name}": "*fp32" for name in wide.split()}
    signature |= dict.fromkeys(("H", "G", "T", "nodes", "block_size", "fanout", "levels", "w"), "i32")
    signature["scale"] = "fp32"
    constexprs = dict(CAUSAL=causal, MASS_BIAS=True, D=D, BD=_block(D), BM=BM, BN=BN, PRECISION="ieee")
    return Configuration(kernel, signature, constexprs, warps, stages)


def _pool_configuration(kernel, tensors: str, wide: str, numbers: str, dtype: str, D: int) -> Configuration:
    signature = {f"p_{name}": f"*{dtype}" for name in tensors.split()}
    signature |= {f"p_{name}": "*fp32" for name in wide.split()}
    signature |= dict.fromkeys(numbers.split(), "i32")
    signature["scale"] = "fp32"
    return Configuration(kernel, signature, dict(D=D, BD=_block(D), BC=16), 4, 3)


CONFIGURATIONS = [
    *(
        _configuration(kind, dtype, D, causal)
        for kind in ("forward", "query", "key")
        for dtype, D, causal in (("fp32", 64, True), ("bf16", 64, False), ("bf16", 128, True))
    ),
    _pool_configuration(
        pool_kernel,
        "key value pool pooled_key pooled_value",
        "",
        "head_rows first_row nodes offset children G",
        "bf16",
        64,
    ),
    _pool_configuration(
        unpool_kernel,
        "key value pool",
        "grad_key grad_value grad_pool",
        "head_rows first_row grad_rows node_row child_row children G",
        "bf16",
        64,
    ),
]
