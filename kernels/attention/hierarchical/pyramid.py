"""The pyramid of summaries, a program a node: pooling up, and the gradient back down."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["head_rows", "first_row", "nodes", "offset", "children", "G"])
def pool_kernel(
    p_key,  # [B*G, N_below, D], the first `children` * N rows of a head count
    p_value,
    p_pool,  # [G, D] of this level, or None
    p_pooled_key,  # [B*G, nodes, D]
    p_pooled_value,
    head_rows,  # rows per head in p_key
    first_row,  # first row of the level below
    nodes,
    offset,  # first row of this level in p_pooled
    children,
    G,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
):
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
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


@triton.jit(
    do_not_specialize=[
        "head_rows", "first_row", "grad_rows", "node_row", "child_row", "nodes", "children", "G",
    ]
)  # fmt: skip
def unpool_kernel(
    p_key,  # [B*G, head_rows, D]: the children
    p_value,
    p_pool,  # [G, D] of this level, or None
    p_grad_key,  # [B*G, grad_rows, D], float32: tokens, then nodes by part
    p_grad_value,
    p_grad_pool,  # [B*G, N, D], float32: a share a node, or None
    head_rows,
    first_row,  # first row of the children in p_key
    grad_rows,
    node_row,  # first row of this level in p_grad
    child_row,  # first row of the children in p_grad
    nodes,  # rows per part
    children,
    G,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    SPLITS: tl.constexpr,
):
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    i_node, i_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d, o_c = tl.arange(0, BD), tl.arange(0, BC)
    m_d = o_d < D
    o_n = (i_head * grad_rows + node_row + i_node) * D + o_d
    b_dk = tl.load(p_grad_key + o_n, mask=m_d, other=0)  # [BD]
    b_dv = tl.load(p_grad_value + o_n, mask=m_d, other=0)
    for i in range(1, SPLITS):
        o_part = o_n + tl.cast(i, tl.int64) * nodes * D
        b_dk += tl.load(p_grad_key + o_part, mask=m_d, other=0)
        b_dv += tl.load(p_grad_value + o_part, mask=m_d, other=0)
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
