"""Tile sizes, the operators and the table of what is compiled offline."""

import dataclasses

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, precision, wrap_triton
from seqaccel.kernels.attention.block_sparse.attend import (
    block_sparse_forward_kernel,
    block_sparse_key_gradient_kernel,
    block_sparse_query_gradient_kernel,
)


def _block(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


#: Tiles: (kernel, bytes per element) -> padded head dimension -> (query rows BM, key rows BN, warps, stages). "query"
#: is the gradient of the query, "key" those of key and value. No GPU has measured them.
_TILES = {
    ("forward", 4): {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 1)},
    ("forward", 2): {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    ("query", 4): {64: (32, 32, 8, 2), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("query", 2): {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)},
    ("key", 4): {64: (32, 16, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("key", 2): {64: (32, 32, 4, 2), 128: (32, 32, 4, 2), 256: (32, 32, 8, 1)},
}


def _tile(kernel: str, itemsize: int, width: int, block_size: int) -> tuple[int, int, int, int]:
    BM, BN, warps, stages = _TILES[kernel, itemsize][max(64, width)]
    most = max(16, triton.next_power_of_2(block_size))
    return min(BM, most), min(BN, most), warps, stages


def _lists(layout: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """How many blocks each row of a layout (B, H, rows, blocks) names, and which, one list after another; and how many
    lists lie between two batch entries and two heads, which may share them."""
    shared = [layout.shape[i] > 1 and layout.stride(i) == 0 for i in (0, 1)]
    layout = layout[: 1 if shared[0] else None, : 1 if shared[1] else None]
    _, H, rows, _ = layout.shape
    count = layout.sum(-1, dtype=torch.int32).contiguous()
    index = layout.to(torch.uint8).argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    return count, index, 0 if shared[0] else H * rows, 0 if shared[1] else rows


def _checked(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, block_size: int, causal: bool
) -> tuple[Tensor, int]:
    """The layout of the blocks that there are, without those that causality hides, and the size of these."""
    B, H, Tq, D = query.shape
    G, Tk = key.shape[1:3]
    blocks = (triton.cdiv(Tq, block_size), triton.cdiv(Tk, block_size))
    ok = key.shape == (B, G, Tk, D) and value.shape[:3] == key.shape[:3] and G > 0 and H % G == 0
    ok = ok and layout.shape[:2] == (B, H) and layout.shape[2] >= blocks[0] and layout.shape[3] >= blocks[1]
    if not ok or layout.dtype != torch.bool:
        raise RuntimeError("block_sparse_attention (triton): shapes of query, key, value and layout do not match")
    reason = refusal(query, value)
    if reason:
        raise RuntimeError(f"block_sparse_attention (triton): {reason}")
    layout = layout[:, :, : blocks[0], : blocks[1]]
    return layout.tril() if causal else layout, min(block_size, max(Tq, Tk, 1))


def refusal(query: Tensor, value: Tensor) -> str | None:
    """Why the kernels do not support queries and values of this dtype and shape, or None."""
    B, H, Tq, D = query.shape
    T = max(Tq, value.shape[2])
    D = max(D, value.shape[3])
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, float16 or bfloat16, but got {query.dtype}"
    if D > 256:
        return f"expected a head dimension of at most 256, but got {D}"
    if T * D >= 1 << 31:
        return f"expected T * D below 2^31, but got {T} * {D}"
    if B * H > 65535:
        return f"expected at most 65535 batch * heads, but got {B} * {H}"
    return None


def _numbers(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, block_size: int, causal: bool, scale: float
) -> tuple[tuple[Tensor, Tensor], tuple[int | float, ...], dict[str, int | bool | str]]:
    """The lists of a layout, and the kernels' other arguments."""
    count, index, batch_rows, head_rows = _lists(layout)
    D, DV = query.shape[3], value.shape[3]
    sizes = (query.shape[1], key.shape[1], query.shape[2], key.shape[2], block_size, batch_rows, head_rows)
    flags: dict[str, int | bool | str] = dict(CAUSAL=causal, D=D, DV=DV, BD=_block(D), BV=_block(DV))
    flags["PRECISION"] = precision(query.dtype, torch.backends.cuda.matmul)
    return (count, index), (*sizes, index.shape[-1], float(scale)), flags


@operator(torch.library.triton_op, "seqaccel::block_sparse_attention_forward_triton", mutates_args={})
def block_sparse_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Tensor, block_size: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    layout, block_size = _checked(query, key, value, layout, block_size, causal)
    B, H, Tq, _ = query.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = query.new_empty(B, H, Tq, value.shape[3])
    lse = torch.empty(B, H, Tq, dtype=torch.float32, device=query.device)
    if lse.numel() == 0:
        return out, lse
    if key.shape[2] == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    lists, sizes, flags = _numbers(query, key, value, layout, block_size, causal, scale)
    BM, BN, warps, stages = _tile("forward", query.element_size(), max(flags["BD"], flags["BV"]), block_size)
    wrap_triton(block_sparse_forward_kernel)[(triton.cdiv(block_size, BM) * layout.shape[2], B * H)](
        query, key, value, *lists, out, lse, *sizes, **flags, BM=BM, BN=BN, num_warps=warps, num_stages=stages
    )
    return out, lse


@operator(torch.library.triton_op, "seqaccel::block_sparse_attention_backward_triton", mutates_args={})
def block_sparse_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layout, block_size = _checked(query, key, value, layout, block_size, causal)
    B, H, Tq, _ = query.shape
    G, Tk = key.shape[1:3]
    if lse.shape != (B, H, Tq) or out.shape != grad_out.shape or out.shape != (B, H, Tq, value.shape[3]):
        raise RuntimeError("block_sparse_attention (triton): what the forward pass saved does not match the inputs")
    query, key, value, out = query.contiguous(), key.contiguous(), value.contiguous(), out.contiguous()
    grad_out, lse = grad_out.contiguous(), lse.contiguous()
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if lse.numel() == 0 or Tk == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    delta = torch.empty_like(lse)
    lists, sizes, flags = _numbers(query, key, value, layout, block_size, causal, scale)
    width = max(flags["BD"], flags["BV"])
    BM, BN, warps, stages = _tile("query", query.element_size(), width, block_size)
    wrap_triton(block_sparse_query_gradient_kernel)[(triton.cdiv(block_size, BM) * layout.shape[2], B * H)](
        query, key, value, *lists, out, lse, grad_out, delta, grad_query, *sizes, **flags, BM=BM, BN=BN,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    lists, sizes, flags = _numbers(query, key, value, layout.mT, block_size, causal, scale)
    BM, BN, warps, stages = _tile("key", query.element_size(), width, block_size)
    wrap_triton(block_sparse_key_gradient_kernel)[(triton.cdiv(block_size, BN) * layout.shape[3], B * G)](
        query, key, value, *lists, lse, grad_out, delta, grad_key, grad_value, *sizes, **flags, BM=BM, BN=BN,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad_query, grad_key, grad_value


def _configuration(kind: str, dtype: str, D: int, causal: bool, product: str = "ieee") -> Configuration:
    kernel, pointers, wide = {
        "forward": (block_sparse_forward_kernel, "query key value out", "lse"),
        "query": (block_sparse_query_gradient_kernel, "query key value out grad_out grad_query", "lse delta"),
        "key": (block_sparse_key_gradient_kernel, "query key value grad_out grad_key grad_value", "lse delta"),
    }[kind]
    BM, BN, warps, stages = _tile(kind, 4 if dtype == "fp32" else 2, _block(D), 64)
    signature = {f"p_{name}": f"*{dtype}" for name in pointers.split()}
    signature |= {f"p_{name}": "*fp32" for name in wide.split()}
    signature |= {"p_count": "*i32", "p_index": "*i32", "scale": "fp32"}
    signature |= dict.fromkeys(("H", "G", "Tq", "Tk", "block_size", "batch_rows", "head_rows", "blocks"), "i32")
    constexprs = dict(CAUSAL=causal, D=D, DV=D, BD=_block(D), BV=_block(D), BM=BM, BN=BN, PRECISION=product)
    return Configuration(kernel, signature, constexprs, warps, stages)


CONFIGURATIONS = [
    *(
        _configuration(kind, dtype, D, causal)
        for kind in ("forward", "query", "key")
        for dtype, D, causal in (("fp32", 64, True), ("bf16", 64, False), ("bf16", 128, True), ("bf16", 256, True))
    ),
    # Only for sm_80, whose GPUs have the least shared memory. In float32 with 256 dimensions every tile of the query's
    # gradient spills.
    *(
        dataclasses.replace(_configuration(kind, "fp32", D, True, product), most_arch=80, spills=spills)
        for kind in ("forward", "query", "key")
        for D, product, spills in ((128, "tf32", 0), (256, "ieee", 208 if kind == "query" else 0), (256, "tf32", 0))
    ),
]
