"""Tile sizes, the operators and the table of what is compiled offline."""

import dataclasses

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, precision, wrap_triton
from seqaccel.kernels.attention.hierarchical.attend import (
    attention_forward_kernel,
    attention_key_gradient_kernel,
    attention_query_gradient_kernel,
)
from seqaccel.kernels.attention.hierarchical.pyramid import pool_kernel, unpool_kernel


def _block(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


#: Tiles: (kernel, bytes per element) -> padded head dimension -> (query rows BM, key rows BN, warps, stages). "query"
#: is the gradient of the query, "key" those of key and value of a node, "token" of a token. A tile of 128 queries holds
#: two blocks of 64. Where registers or 99 KiB of shared memory do not allow that, a tile lies in one block. Those
#: of several blocks, and those of "key" and "token" for 16 bits and 64 dimensions, were not timed on a GPU.
#: `_configuration` says which spill registers.
_TILES = {
    ("forward", 4): {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 1)},
    ("forward", 2): {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    ("query", 4): {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("query", 2): {64: (128, 64, 8, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)},
    ("key", 4): {64: (32, 16, 8, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("key", 2): {64: (32, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
    ("token", 4): {64: (32, 16, 8, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("token", 2): {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}


def _tile(kernel: str, itemsize: int, BD: int, most: int) -> tuple[int, int, int, int]:
    """``most``: queries that a tile may have."""
    BM, BN, warps, stages = _TILES[kernel, itemsize][max(64, BD)]
    return min(BM, max(16, triton.next_power_of_2(most))), BN, warps, stages


def _several(block_size: int, BM: int) -> bool:
    """Whether a tile of queries holds several blocks, of which neighbours share most of the keys that they see."""
    return 2 * block_size <= BM


def _precision(dtype: torch.dtype) -> str:
    return precision(dtype, torch.backends.cuda.matmul)


def _splits(Tq: int, nodes: int) -> int:
    """How many parts a node's queries are cut into in the gradients of key and value: of all nodes at most Tq."""
    return max(1, min(16, triton.next_power_of_2(Tq // 1024), Tq // max(1, nodes)))


def _sizes(T: int, block_size: int, fanout: int, levels: int, w: int) -> tuple[int, int, int, list[int]]:
    """block_size, fanout and w, limited where more makes no difference, and the spans S_0, S_1, … of the levels."""
    block_size, fanout = min(block_size, T + 1), min(fanout, T + 1)
    spans, factor = [1], block_size
    while (levels < 0 or len(spans) <= levels) and spans[-1] * factor <= T:
        spans.append(spans[-1] * factor)
        factor = fanout
    return block_size, fanout, min(w, T // block_size + 2), spans


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
) -> None:
    B, H, Tq, D = query.shape
    G, T = key.shape[1:3]
    ok = key.shape == (B, G, T, D) and value.shape[:3] == key.shape[:3] and G > 0 and H % G == 0 and Tq <= T
    ok = ok and (pool_query is None or pool_query.shape == (pool_query.shape[0], G, D))
    ok = ok and (lengths is None or (lengths.shape == (B,) and lengths.dtype == torch.int64 and Tq == T))
    if not ok:
        raise RuntimeError(
            "hierarchical_attention (triton): shapes of query, key, value, pool_query and lengths do not match"
        )
    reason = refusal(query, key, value, cu_seqlens)
    if reason:
        raise RuntimeError(f"hierarchical_attention (triton): {reason}")


def refusal(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None, dropout: float = 0.0
) -> str | None:
    """Why the kernels do not support these inputs, or None."""
    if dropout > 0:
        return "expected no dropout; use the backend 'reference'"
    B, H, _, D = query.shape
    T, D = key.shape[2], max(D, value.shape[3])
    if cu_seqlens is not None:
        return "expected no cu_seqlens; give each sequence a row, with lengths, or use the backend 'reference'"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, float16 or bfloat16, but got {query.dtype}"
    if D > 256:
        return f"expected a head dimension of at most 256, but got {D}"
    if T * D >= 1 << 31:
        return f"expected T * D below 2^31, but got {T} * {D}"
    if B * H > 65535:
        return f"expected at most 65535 batch * heads, but got {B} * {H}"
    return None


def _query_tiles(T: int, Tq: int, block_size: int, BM: int) -> int:
    """Tiles of the blocks that hold queries, the last Tq of T positions."""
    if _several(block_size, BM):
        width = BM // block_size * block_size
        return triton.cdiv(T, width) - (T - Tq) // width
    return triton.cdiv(block_size, BM) * (triton.cdiv(T, block_size) - (T - Tq) // block_size)


@operator(torch.library.triton_op, "seqaccel::hierarchical_attention_forward_triton", mutates_args={})
def hierarchical_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    block_size: int,
    fanout: int,
    levels: int,
    local_blocks: int,
    causal: bool,
    mass_bias: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check(query, key, value, pool_query, cu_seqlens, lengths)
    B, H, Tq, D = query.shape
    G, T, DV = key.shape[1], *value.shape[2:]
    block_size, fanout, w, spans = _sizes(T, block_size, fanout, levels, local_blocks)
    counts = [T // span for span in spans]
    nodes = sum(counts[1:])
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    pool_query = None if pool_query is None else pool_query.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    out = query.new_empty(B, H, Tq, DV)
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=query.device)
    pooled_key, pooled_value = key.new_empty(B, G, nodes, D), value.new_empty(B, G, nodes, DV)
    if lse.numel() == 0:
        return out, lse, pooled_key.zero_(), pooled_value.zero_()
    BD, BV = _block(D), _block(DV)
    rows = 0
    for level in range(1, len(spans)):
        below = (key, value) if level == 1 else (pooled_key, pooled_value)
        wrap_triton(pool_kernel)[(counts[level], B * G)](
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
            DV=DV,
            BD=BD,
            BV=BV,
            BC=16,
            num_warps=4,
        )
        rows += counts[level]
    BM, BN, warps, stages = _tile("forward", query.element_size(), max(BD, BV), Tq)
    wrap_triton(attention_forward_kernel)[(_query_tiles(T, Tq, block_size, BM), B * H)](
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        lengths,
        out,
        lse,
        H,
        G,
        Tq,
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
        DV=DV,
        BD=BD,
        BV=BV,
        BM=BM,
        BN=BN,
        SEVERAL=_several(block_size, BM),
        PRECISION=_precision(query.dtype),
        num_warps=warps,
        num_stages=stages,
    )
    return out, lse, pooled_key, pooled_value


@operator(torch.library.triton_op, "seqaccel::hierarchical_attention_backward_triton", mutates_args={})
def hierarchical_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
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
    _check(query, key, value, pool_query, cu_seqlens, lengths)
    B, H, Tq, D = query.shape
    G, T, DV = key.shape[1], *value.shape[2:]
    block_size, fanout, w, spans = _sizes(T, block_size, fanout, levels, local_blocks)
    counts = [T // span for span in spans]
    nodes = sum(counts[1:])
    ok = pooled_key.shape == (B, G, nodes, D) and pooled_value.shape == (B, G, nodes, DV)
    if not ok or lse.shape != (B, H, Tq) or out.shape != (B, H, Tq, DV) or grad_out.shape != out.shape:
        raise RuntimeError("hierarchical_attention (triton): what the forward pass saved does not match the inputs")
    query, key, value, out = query.contiguous(), key.contiguous(), value.contiguous(), out.contiguous()
    grad_out, lse = grad_out.contiguous(), lse.contiguous()
    pooled_key, pooled_value = pooled_key.contiguous(), pooled_value.contiguous()
    pool_query = None if pool_query is None else pool_query.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grad_pool = query.new_zeros((0, G, D)) if pool_query is None else torch.zeros_like(pool_query, dtype=torch.float32)
    if lse.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_pool.to(query.dtype)
    delta = torch.empty_like(lse)
    BD, BV = _block(D), _block(DV)
    sizes = (H, G, Tq, T, nodes, block_size, fanout, len(spans) - 1, w, float(scale))
    flags = dict(CAUSAL=causal, MASS_BIAS=mass_bias, D=D, DV=DV, BD=BD, BV=BV, PRECISION=_precision(query.dtype))
    BM, BN, warps, stages = _tile("query", query.element_size(), max(BD, BV), Tq)
    wrap_triton(attention_query_gradient_kernel)[(_query_tiles(T, Tq, block_size, BM), B * H)](
        query,
        key,
        value,
        pooled_key,
        pooled_value,
        lengths,
        out,
        lse,
        grad_out,
        delta,
        grad_query,
        *sizes,
        **flags,
        BM=BM,
        BN=BN,
        SEVERAL=_several(block_size, BM),
        num_warps=warps,
        num_stages=stages,
    )
    # Gradients of nodes: what queries give them, then, from the top down, their share of their parents'. A token's
    # kernel fetches its share itself, so that its gradient is written once, in its dtype.
    splits = _splits(Tq, nodes)
    node_grads = [lse.new_empty(B, G, splits, nodes, width) for width in (D, DV)]
    if nodes:
        BM, BN, warps, stages = _tile("key", query.element_size(), max(BD, BV), Tq)
        tiles = sum(triton.cdiv(count, BN) for count in counts[1:])
        given = (query, pooled_key, pooled_value, lengths, lse, grad_out, delta, *node_grads, *[None] * 5)
        wrap_triton(attention_key_gradient_kernel)[(splits * tiles, B * G)](
            *given, *sizes, **flags, TOKENS=False, BM=BM, BN=BN, SPLITS=splits, num_warps=warps, num_stages=stages
        )
    pool, pool_lse, pool_slope = None, None, None
    for level in range(len(spans) - 1, 0, -1):
        row = sum(counts[1:level])
        below = (key, value) if level == 1 else (pooled_key, pooled_value)
        share = None
        if pool_query is not None:
            i_pool = min(level, pool_query.shape[0]) - 1
            pool, share = pool_query[i_pool], lse.new_empty(B, G, counts[level], D)
            if level == 1:
                pool_lse, pool_slope = lse.new_empty(B, G, counts[1]), lse.new_empty(B, G, counts[1])
        wrap_triton(unpool_kernel)[(counts[level], B * G)](
            *below,
            lengths,
            pool,
            *node_grads,
            share,
            pool_lse,
            pool_slope,
            T if level == 1 else nodes,
            0 if level == 1 else row - counts[level - 1],
            T,
            spans[level],
            row,
            0 if level == 1 else row - counts[level - 1],
            nodes,
            spans[level] // spans[level - 1],
            G,
            float(scale),
            TOKENS=level == 1,
            D=D,
            DV=DV,
            BD=BD,
            BV=BV,
            BC=16,
            SPLITS=splits,
            num_warps=4,
        )
        if share is not None:
            grad_pool[i_pool] += share.sum((0, 2))
    BM, BN, warps, stages = _tile("token", query.element_size(), max(BD, BV), Tq)
    given = (query, key, value, lengths, lse, grad_out, delta, grad_key, grad_value, *node_grads, pool, pool_lse)
    wrap_triton(attention_key_gradient_kernel)[(triton.cdiv(T, BN), B * G)](
        *given, pool_slope, *sizes, **flags, TOKENS=True, BM=BM, BN=BN, SPLITS=splits, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_pool.to(query.dtype)


def _configuration(
    kind: str, dtype: str, D: int, causal: bool, product: str = "ieee", padded: bool = False
) -> Configuration:
    """``kind``: as of the tiles; "token" is that of a key's gradient for tokens."""
    kernel, pointers, wide, absent = {
        "forward": (attention_forward_kernel, "query key value pooled_key pooled_value out", "lse", ""),
        "query": (
            attention_query_gradient_kernel,
            "query key value pooled_key pooled_value out grad_out grad_query",
            "lse delta",
            "",
        ),
        "key": (
            attention_key_gradient_kernel,
            "query key value grad_out",
            "lse delta grad_key grad_value",
            "node_grad_key node_grad_value pool pool_lse pool_slope",
        ),
        "token": (
            attention_key_gradient_kernel,
            "query key value grad_out grad_key grad_value pool",
            "lse delta node_grad_key node_grad_value pool_lse pool_slope",
            "",
        ),
    }[kind]
    BM, BN, warps, stages = _tile(kind, 4 if dtype == "fp32" else 2, _block(D), 128)
    signature = {f"p_{name}": f"*{dtype}" for name in pointers.split()}
    signature |= {f"p_{name}": "*fp32" for name in wide.split()}
    signature |= dict.fromkeys(("H", "G", "Tq", "T", "nodes", "block_size", "fanout", "levels", "w"), "i32")
    signature["scale"] = "fp32"
    constexprs = dict(CAUSAL=causal, MASS_BIAS=True, D=D, DV=D, BD=_block(D), BV=_block(D), BM=BM, BN=BN)
    constexprs |= {"PRECISION": product} | {f"p_{name}": None for name in absent.split()}
    if padded:
        signature["p_lengths"] = "*i64"
    else:
        constexprs["p_lengths"] = None
    if kind in ("key", "token"):
        constexprs |= dict(SPLITS=4, TOKENS=kind == "token")
    else:
        constexprs["SEVERAL"] = _several(64, BM)
    if kind == "token" and not causal:  # one row for the mean of pooling
        for name in ("p_pool", "p_pool_lse", "p_pool_slope"):
            del signature[name]
            constexprs[name] = None
    # Bytes spilled: 24 in float32 on sm_80, 72 in 16 bits on sm_100. Most are addresses, stored before the loops and
    # loaded after them.
    return Configuration(kernel, signature, constexprs, warps, stages, spills=72)


def _pool_configuration(kernel, tensors: str, wide: str, numbers: str, dtype: str, D: int) -> Configuration:
    signature = {f"p_{name}": f"*{dtype}" for name in tensors.split()}
    signature |= {f"p_{name}": "*fp32" for name in wide.split()}
    signature |= dict.fromkeys(numbers.split(), "i32")
    signature["scale"] = "fp32"
    constexprs = dict(D=D, DV=D, BD=_block(D), BV=_block(D), BC=16)
    if kernel is unpool_kernel:
        signature["p_lengths"] = "*i64"
        constexprs |= dict(SPLITS=4, TOKENS=True)
    return Configuration(kernel, signature, constexprs, 4, 3)


CONFIGURATIONS = [
    *(
        _configuration(kind, dtype, D, causal, padded=padded)
        for kind in ("forward", "query", "key", "token")
        for dtype, D, causal, padded in (
            ("fp32", 64, True, True),
            ("bf16", 64, False, False),
            ("bf16", 128, True, False),
        )
    ),
    # Only for sm_80, whose GPUs have the least shared memory. In float32 with 256 dimensions every tile of the query's
    # gradient spills.
    *(
        dataclasses.replace(_configuration(kind, dtype, D, True, product), most_arch=80, spills=spills)
        for kind in ("forward", "query", "key", "token")
        for dtype, D, product, spills in (
            ("bf16", 64, "ieee", 0),
            ("fp32", 128, "tf32", 0),
            ("bf16", 256, "ieee", 0),
            ("fp32", 256, "ieee", 224),
        )
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
        "grad_key grad_value grad_pool pool_lse pool_slope",
        "head_rows first_row T span node_row child_row nodes children G",
        "bf16",
        64,
    ),
]
