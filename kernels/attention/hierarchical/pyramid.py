"""The pyramid of summaries, a program a node: pooling up, and the gradient back down."""

import triton
import triton.language as tl

from seqaccel.kernels.attention.hierarchical.attend import length_of


@triton.jit(do_not_specialize=["head_rows", "first_row", "nodes", "offset", "children", "G"])
def pool_kernel(
    p_key,  # [B*G, N_below, D], the first `children` * N rows of a head count
    p_value,  # [B*G, N_below, DV]
    p_pool,  # [G, D] of this level, or None
    p_pooled_key,  # [B*G, nodes, D]
    p_pooled_value,  # [B*G, nodes, DV]
    head_rows,  # rows per head in p_key
    first_row,  # first row of the level below
    nodes,
    offset,  # first row of this level in p_pooled
    children,
    G,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
):
    # Padding is pooled too: nodes with any are never read.
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    i_node, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_v, o_c = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BC)
    m_d, m_v = o_d < D, o_v < DV
    base = i_head * head_rows + first_row + i_node * children
    b_most = tl.full((), -float("inf"), tl.float32)
    b_sum = tl.zeros((), tl.float32)
    b_k, b_v = tl.zeros([BD], tl.float32), tl.zeros([BV], tl.float32)
    for c in range(0, children, BC):
        row, m_c = (base + c + o_c)[:, None], (c + o_c < children)[:, None]
        b_kc = tl.load(p_key + row * D + o_d[None, :], mask=m_c & m_d[None, :], other=0).to(tl.float32)  # [BC, BD]
        b_vc = tl.load(p_value + row * DV + o_v[None, :], mask=m_c & m_v[None, :], other=0).to(tl.float32)  # [BC, BV]
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
    row = i_head * nodes + offset + i_node
    tl.store(p_pooled_key + row * D + o_d, (b_k / b_sum).to(p_pooled_key.dtype.element_ty), mask=m_d)
    tl.store(p_pooled_value + row * DV + o_v, (b_v / b_sum).to(p_pooled_value.dtype.element_ty), mask=m_v)


@triton.jit(
    do_not_specialize=["head_rows", "first_row", "T", "span", "node_row", "child_row", "nodes", "children", "G"]
)
def unpool_kernel(
    p_key,  # [B*G, head_rows, D]: the children
    p_value,  # [B*G, head_rows, DV]
    p_lengths,  # [B], or None
    p_pool,  # [G, D] of this level, or None
    p_grad_key,  # [B*G, SPLITS, nodes, D], float32; the first part takes the sum
    p_grad_value,  # [B*G, SPLITS, nodes, DV], float32
    p_grad_pool,  # with p_pool: [B*G, N, D], float32, a share a node
    p_pool_lse,  # with p_pool, of tokens: [B*G, N], the logsumexp of the pooling's logits
    p_pool_slope,  # and the mean of their gradients
    head_rows,
    first_row,  # first row of the children in p_key
    T,
    span,  # tokens of a node
    node_row,  # first row of this level in p_grad
    child_row,  # first row of the children in p_grad
    nodes,  # rows per part
    children,
    G,
    scale,
    TOKENS: tl.constexpr,  # the children are tokens: their own kernel fetches their share
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    i_node, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_v, o_c = tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BC)
    m_d, m_v = o_d < D, o_v < DV
    b_dp = tl.zeros([BD], tl.float32)
    if i_node < length_of(p_lengths, i_head // G, T) // tl.cast(span, tl.int32):  # else padding is in it
        o_n = i_head * SPLITS * nodes + node_row + i_node
        b_dk, b_dv = tl.zeros([BD], tl.float32), tl.zeros([BV], tl.float32)
        for i in range(SPLITS):
            o_part = o_n + tl.cast(i, tl.int64) * nodes
            b_dk += tl.load(p_grad_key + o_part * D + o_d, mask=m_d, other=0)
            b_dv += tl.load(p_grad_value + o_part * DV + o_v, mask=m_v, other=0)
        base = i_head * head_rows + first_row + i_node * children
        b_most = tl.full((), -float("inf"), tl.float32)
        b_sum, b_slope = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
        b_p = tl.zeros([BD], tl.float32)
        if p_pool is not None:
            b_p += tl.load(p_pool + (i_head % G) * D + o_d, mask=m_d, other=0).to(tl.float32)
            for c in range(0, children, BC):
                m_c, row = c + o_c < children, (base + c + o_c)[:, None]
                b_kc = tl.load(p_key + row * D + o_d[None, :], mask=m_c[:, None] & m_d[None, :], other=0)
                b_vc = tl.load(p_value + row * DV + o_v[None, :], mask=m_c[:, None] & m_v[None, :], other=0)
                b_kc, b_vc = b_kc.to(tl.float32), b_vc.to(tl.float32)
                b_s = tl.where(m_c, tl.sum(b_kc * b_p[None, :], 1) * scale, -float("inf"))
                b_new = tl.maximum(b_most, tl.max(b_s, 0))
                b_w, decay = tl.exp(b_s - b_new), tl.exp(b_most - b_new)
                b_sum = b_sum * decay + tl.sum(b_w, 0)
                b_sw = tl.sum(b_kc * b_dk[None, :], 1) + tl.sum(b_vc * b_dv[None, :], 1)
                b_slope = b_slope * decay + tl.sum(b_w * b_sw, 0)
                b_most = b_new
            b_slope = b_slope / b_sum
        if TOKENS:
            tl.debug_barrier()  # several threads may have loaded the same numbers
            tl.store(p_grad_key + o_n * D + o_d, b_dk, mask=m_d)
            tl.store(p_grad_value + o_n * DV + o_v, b_dv, mask=m_v)
            if p_pool is not None:
                o_pool = i_head * tl.num_programs(0) + i_node
                tl.store(p_pool_lse + o_pool, b_most + tl.log(b_sum))
                tl.store(p_pool_slope + o_pool, b_slope)
        if not TOKENS or p_pool is not None:
            grad_base = i_head * SPLITS * nodes + child_row + i_node * children
            for c in range(0, children, BC):
                m_c, row, row_g = c + o_c < children, (base + c + o_c)[:, None], (grad_base + c + o_c)[:, None]
                m_k, m_w = m_c[:, None] & m_d[None, :], m_c[:, None] & m_v[None, :]
                if p_pool is not None:
                    b_kc = tl.load(p_key + row * D + o_d[None, :], mask=m_k, other=0).to(tl.float32)
                    b_vc = tl.load(p_value + row * DV + o_v[None, :], mask=m_w, other=0).to(tl.float32)
                    b_s = tl.where(m_c, tl.sum(b_kc * b_p[None, :], 1) * scale, -float("inf"))
                    b_w = tl.exp(b_s - b_most) / b_sum
                    b_sw = tl.sum(b_kc * b_dk[None, :], 1) + tl.sum(b_vc * b_dv[None, :], 1)
                    b_e = scale * b_w * (b_sw - b_slope)
                    b_dp += tl.sum(b_e[:, None] * b_kc, 0)
                    b_gk = b_w[:, None] * b_dk[None, :] + b_e[:, None] * b_p[None, :]
                    b_gv = b_w[:, None] * b_dv[None, :]
                else:
                    b_gk, b_gv = (b_dk / children)[None, :], (b_dv / children)[None, :]
                if not TOKENS:
                    o_gk, o_gv = row_g * D + o_d[None, :], row_g * DV + o_v[None, :]
                    b_gk += tl.load(p_grad_key + o_gk, mask=m_k, other=0)
                    b_gv += tl.load(p_grad_value + o_gv, mask=m_w, other=0)
                    tl.store(p_grad_key + o_gk, b_gk, mask=m_k)
                    tl.store(p_grad_value + o_gv, b_gv, mask=m_w)
    if p_pool is not None:
        tl.store(p_grad_pool + (i_head * tl.num_programs(0) + i_node) * D + o_d, b_dp, mask=m_d)
