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
#: is the gradient of the query, "key" those of key and value. The tiles for 16 bits were tuned on an H100.
#: `_configuration` says which of them spill registers.
_TILES = {
    ("forward", 4): {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 1)},
    ("forward", 2): {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    ("query", 4): {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("query", 2): {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)},
    ("key", 4): {64: (32, 16, 8, 2), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    ("key", 2): {64: (64, 32, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 8, 1)},
}


def _tile(kernel: str, itemsize: int, BD: int, block_size: int) -> tuple[int, int, int, int]:
    BM, BN, warps, stages = _TILES[kernel, itemsize][max(64, BD)]
    if kernel != "key":
        BM = min(BM, max(16, triton.next_power_of_2(block_size)))
    return BM, BN, warps, stages


def _precision(dtype: torch.dtype) -> str:
    return precision(dtype, torch.backends.cuda.matmul)


def _splits(T: int, nodes: int) -> int:
    """How many parts a node's queries are cut into in the gradients of key and value: for all nodes at most T parts."""
    return max(1, min(16, triton.next_power_of_2(T // 1024), T // max(1, nodes)))


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
    reason = refusal(query, key, value, cu_seqlens, lengths)
    if reason:
        raise RuntimeError(f"hierarchical_attention (triton): {reason}")
    B, H, T, D = query.shape
    G = key.shape[1]
    ok = key.shape == (B, G, T, D) and G > 0 and H % G == 0
    ok = ok and (pool_query is None or pool_query.shape == (pool_query.shape[0], G, D))
    if not ok:
        raise RuntimeError("hierarchical_attention (triton): shapes of query, key, value and pool_query do not match")


def refusal(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> str | None:
    """Why the kernels do not support these inputs, or None."""
    B, H, T, D = query.shape
    if cu_seqlens is not None or lengths is not None:
        return "cu_seqlens and lengths are not supported; use the backend 'reference'"
    if key.shape[2] != T:
        return "expected as many queries as keys; use the backend 'reference'"
    if value.shape != key.shape:
        return "expected value to have key's shape; use the backend 'reference'"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, float16 or bfloat16, but got {query.dtype}"
    if D > 256:
        return f"expected a head dimension of at most 256, but got {D}"
    if T * D >= 1 << 31:
        return f"expected T * D below 2^31, but got {T} * {D}"
    if B * H > 65535:
        return f"expected at most 65535 batch * heads, but got {B} * {H}"
    return None


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
            BD=BD,
            BC=16,
            num_warps=4,
        )
        rows += counts[level]
    BM, BN, warps, stages = _tile("forward", query.element_size(), BD, block_size)
    grid = (triton.cdiv(block_size, BM) * triton.cdiv(T, block_size), B * H)
    wrap_triton(attention_forward_kernel)[grid](
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
    B, H, T, D = query.shape
    G = key.shape[1]
    block_size, fanout, w, spans = _sizes(T, block_size, fanout, levels, local_blocks)
    counts = [T // span for span in spans]
    nodes = sum(counts[1:])
    if pooled_key.shape != (B, G, nodes, D) or lse.shape != (B, H, T):
        raise RuntimeError("hierarchical_attention (triton): what the forward pass saved does not match the inputs")
    query, key, value, out = query.contiguous(), key.contiguous(), value.contiguous(), out.contiguous()
    grad_out, lse = grad_out.contiguous(), lse.contiguous()
    pooled_key, pooled_value = pooled_key.contiguous(), pooled_value.contiguous()
    pool_query = None if pool_query is None else pool_query.contiguous()
    grad_query = torch.empty_like(query)
    grad_pool = query.new_zeros((0, G, D)) if pool_query is None else torch.zeros_like(pool_query, dtype=torch.float32)
    if query.numel() == 0:
        return grad_query, torch.zeros_like(key), torch.zeros_like(value), grad_pool.to(query.dtype)
    delta = torch.empty_like(lse)
    splits = _splits(T, nodes)
    grad_key = lse.new_empty(B, G, T + splits * nodes, D)
    grad_value = torch.empty_like(grad_key)
    BD = _block(D)
    sizes = (H, G, T, nodes, block_size, fanout, len(spans) - 1, w, float(scale))
    flags = dict(CAUSAL=causal, MASS_BIAS=mass_bias, D=D, BD=BD, PRECISION=_precision(query.dtype))
    BM, BN, warps, stages = _tile("query", query.element_size(), BD, block_size)
    wrap_triton(attention_query_gradient_kernel)[(triton.cdiv(block_size, BM) * triton.cdiv(T, block_size), B * H)](
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
    tiles = [triton.cdiv(count, BN) for count in counts]
    wrap_triton(attention_key_gradient_kernel)[(tiles[0] + splits * sum(tiles[1:]), B * G)](
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
        SPLITS=splits,
        num_warps=warps,
        num_stages=stages,
    )
    for level in range(len(spans) - 1, 0, -1):
        row = sum(counts[:level])  # first row of this level in grad_key
        below = (key, value) if level == 1 else (pooled_key, pooled_value)
        pool = None if pool_query is None else min(level, pool_query.shape[0]) - 1
        share = None if pool is None else lse.new_empty(B, G, counts[level], D)
        wrap_triton(unpool_kernel)[(counts[level], B * G)](
            *below,
            None if pool is None else pool_query[pool],
            grad_key,
            grad_value,
            share,
            T if level == 1 else nodes,
            0 if level == 1 else row - T - counts[level - 1],
            T + splits * nodes,
            row,
            row - counts[level - 1],
            nodes,
            spans[level] // spans[level - 1],
            G,
            float(scale),
            D=D,
            BD=BD,
            BC=16,
            SPLITS=splits,
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


def _configuration(kind: str, dtype: str, D: int, causal: bool, product: str = "ieee") -> Configuration:
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
    constexprs = dict(CAUSAL=causal, MASS_BIAS=True, D=D, BD=_block(D), BM=BM, BN=BN, PRECISION=product)
    if kind == "key":
        constexprs["SPLITS"] = 4
    # Bytes spilled: 24 in float32 on sm_80, 72 in 16 bits on sm_100. Most are addresses, stored before the loops and
    # loaded after them.
    return Configuration(kernel, signature, constexprs, warps, stages, spills=72)


def _pool_configuration(kernel, tensors: str, wide: str, numbers: str, dtype: str, D: int) -> Configuration:
    signature = {f"p_{name}": f"*{dtype}" for name in tensors.split()}
    signature |= {f"p_{name}": "*fp32" for name in wide.split()}
    signature |= dict.fromkeys(numbers.split(), "i32")
    signature["scale"] = "fp32"
    constexprs = dict(D=D, BD=_block(D), BC=16) | ({"SPLITS": 4} if kernel is unpool_kernel else {})
    return Configuration(kernel, signature, constexprs, 4, 3)


CONFIGURATIONS = [
    *(
        _configuration(kind, dtype, D, causal)
        for kind in ("forward", "query", "key")
        for dtype, D, causal in (("fp32", 64, True), ("bf16", 64, False), ("bf16", 128, True))
    ),
    # Only for sm_80, whose GPUs have the least shared memory. In float32 with 256 dimensions every tile of the query's
    # gradient spills.
    *(
        dataclasses.replace(_configuration(kind, dtype, D, True, product), most_arch=80, spills=spills)
        for kind in ("forward", "query", "key")
        for dtype, D, product, spills in (
            ("fp32", 128, "tf32", 0),
            ("bf16", 256, "ieee", 0),
            ("fp32", 256, "ieee", 208),
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
        "grad_key grad_value grad_pool",
        "head_rows first_row grad_rows node_row child_row nodes children G",
        "bf16",
        64,
    ),
]
