"""Tile sizes, the operators and the table of what is compiled offline."""

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, wrap_triton
from seqaccel.kernels.attention.additive.attend import (
    additive_gradients_kernel,
    additive_logits_kernel,
    additive_softmax_gradient_kernel,
    additive_softmax_kernel,
)

# No GPU has measured these. Lanes lie along h: a warp for 32 of them.

#: Logits: (queries, keys) of a tile, whose 32 sums a lane holds in registers. One query, as of a decoder's step, gets
#: half of them, so that there are more programs.
_TILES = {1: (1, 16), 2: (2, 16), 4: (4, 8)}

#: Gradients: a lane holds so many keys and their gradients.
_KEYS = 32

#: Programs of the gradients' kernel that keep a large GPU busy. Beyond them parts of grad q would only take memory.
_PROGRAMS = 1024


# Comparisons give these numbers, which are constants of kernels: a compiler's symbols may stand for the sizes.


def _width(H: int) -> tuple[int, int]:
    """Neighbouring h of a program, and warps."""
    BH = next(n for n in (32, 64, 128) if n >= H or n == 128)
    return BH, BH // 32


def _row(Tk: int) -> tuple[int, int]:
    """Weights of a row at a time, and warps."""
    BN = next(n for n in (64, 256, 1024) if Tk <= n or n == 1024)
    return BN, max(1, BN // 256)


def _check(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None = None) -> None:
    B, Tq, H = query.shape
    Tk = key.shape[1]
    ok = key.shape == (B, Tk, H) and weight.shape == (H,) and key.dtype == weight.dtype == query.dtype
    if mask is not None:
        ok = ok and mask.dtype == torch.bool and (mask.shape == (B, 1, Tk) or mask.shape == (B, Tq, Tk))
    if not ok:
        raise RuntimeError("additive_attention (triton): shapes or dtypes of query, key, weight and mask do not match")
    reason = refusal(query)
    if reason:
        raise RuntimeError(f"additive_attention (triton): {reason}")


def refusal(query: Tensor) -> str | None:
    """Why the kernels do not support queries of this dtype, or None."""
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"expected float32, float16 or bfloat16, but got {query.dtype}"
    return None


@operator(torch.library.triton_op, "seqaccel::additive_attention_forward_triton", mutates_args={})
def additive_attention_forward(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    _check(query, key, weight, mask)
    (B, Tq, H), Tk = query.shape, key.shape[1]
    attention = torch.empty(B, Tq, Tk, dtype=torch.float32, device=query.device)
    if attention.numel() == 0:
        return attention
    query, key, weight = query.contiguous(), key.contiguous(), weight.contiguous()
    rows = 1 if mask is None else mask.shape[1]
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    (BM, BN), (BH, warps) = _TILES[1 if Tq == 1 else 2 if Tq == 2 else 4], _width(H)
    wrap_triton(additive_logits_kernel)[(B * triton.cdiv(Tq, BM) * triton.cdiv(Tk, BN),)](
        query, key, weight, mask, attention, Tq, Tk, H, rows, BM=BM, BN=BN, BH=BH, num_warps=warps
    )
    BN, warps = _row(Tk)
    wrap_triton(additive_softmax_kernel)[(B * Tq,)](attention, mask, Tq, Tk, rows, BN=BN, num_warps=warps)
    return attention


@operator(torch.library.triton_op, "seqaccel::additive_attention_backward_triton", mutates_args={})
def additive_attention_backward(
    grad_attention: Tensor, query: Tensor, key: Tensor, weight: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(query, key, weight)
    (B, Tq, H), Tk = query.shape, key.shape[1]
    if attention.shape != (B, Tq, Tk) or attention.dtype != torch.float32 or grad_attention.shape != attention.shape:
        raise RuntimeError("additive_attention (triton): what the forward pass saved does not match the inputs")
    query, key, weight, attention = query.contiguous(), key.contiguous(), weight.contiguous(), attention.contiguous()
    grad_key = torch.empty_like(key)
    if attention.numel() == 0:
        return torch.zeros_like(query), grad_key.zero_(), torch.zeros_like(weight)
    grad_logits = torch.empty_like(attention)
    BN, warps = _row(Tk)
    wrap_triton(additive_softmax_gradient_kernel)[(B * Tq,)](
        attention, grad_attention.contiguous(), grad_logits, Tk, BN=BN, num_warps=warps
    )
    BH, warps = _width(H)
    slices, tiles = triton.cdiv(H, BH), triton.cdiv(Tk, _KEYS)
    share = triton.cdiv(tiles, min(tiles, triton.cdiv(_PROGRAMS, B * slices)))
    parts = triton.cdiv(tiles, share)  # none without a tile
    grad_query = torch.empty(B, parts, Tq, H, dtype=torch.float32, device=query.device)
    grad_weight = torch.empty(B, parts, H, dtype=torch.float32, device=query.device)
    wrap_triton(additive_gradients_kernel)[(B * parts * slices,)](
        query, key, weight, grad_logits, grad_query, grad_key, grad_weight, Tq, Tk, H, parts,
        BN=_KEYS, BH=BH, num_warps=warps,
    )  # fmt: skip
    return grad_query.sum(1).to(query.dtype), grad_key, grad_weight.sum((0, 1)).to(weight.dtype)


def _logits(dtype: str, Tq: int, H: int, masked: bool) -> Configuration:
    signature = dict.fromkeys(("p_query", "p_key", "p_weight"), f"*{dtype}") | {"p_attention": "*fp32"}
    signature |= dict.fromkeys(("Tq", "Tk", "H", "mask_rows"), "i32")
    (BM, BN), (BH, warps) = _TILES[Tq], _width(H)
    constexprs: dict[str, int | None] = dict(BM=BM, BN=BN, BH=BH)
    if masked:
        signature["p_mask"] = "*u8"
    else:
        constexprs["p_mask"] = None
    return Configuration(additive_logits_kernel, signature, constexprs, warps)


def _gradients(dtype: str, H: int) -> Configuration:
    signature = dict.fromkeys(("p_query", "p_key", "p_weight", "p_grad_key"), f"*{dtype}")
    signature |= dict.fromkeys(("p_grad_logits", "p_grad_query", "p_grad_weight"), "*fp32")
    signature |= dict.fromkeys(("Tq", "Tk", "H", "parts"), "i32")
    BH, warps = _width(H)
    return Configuration(additive_gradients_kernel, signature, dict(BN=_KEYS, BH=BH), warps)


CONFIGURATIONS = [
    *(
        _logits(dtype, Tq, H, masked)
        for dtype, Tq, H, masked in (("fp32", 1, 512, False), ("fp32", 2, 64, True), ("bf16", 4, 512, True))
    ),
    Configuration(
        additive_softmax_kernel,
        {"p_attention": "*fp32", "p_mask": "*u8", "Tq": "i32", "Tk": "i32", "mask_rows": "i32"},
        dict(BN=1024),
        4,
    ),
    Configuration(
        additive_softmax_gradient_kernel,
        {"p_attention": "*fp32", "p_grad_attention": "*fp32", "p_grad_logits": "*fp32", "Tk": "i32"},
        dict(BN=1024),
        4,
    ),
    *(_gradients(dtype, H) for dtype, H in (("fp32", 512), ("fp32", 32), ("bf16", 512))),
]
