"""Block-sparse attention in plain PyTorch: the definition."""

import math

import torch
from torch import Tensor

__all__ = ["block_sparse_attention", "visible"]


def visible(layout: Tensor, block_size: int, query_length: int, key_length: int, causal: bool) -> Tensor:
    """Which keys each query sees, (..., Tq, Tk), from the layout of blocks (..., query blocks, key blocks)."""
    query = torch.arange(query_length, device=layout.device)
    key = torch.arange(key_length, device=layout.device)
    seen = layout[..., query // block_size, :][..., key // block_size]
    return seen & (key <= query.unsqueeze(-1)) if causal else seen


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Dense attention with the mask that ``layout`` (..., query blocks, key blocks) stands for.

    A query that sees no key gives 0. What a query does not see cannot reach it, also if it is not finite.
    """
    B, H, Tq, D = query.shape
    G, Tk = key.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    seen = visible(layout, block_size, Tq, Tk, causal).expand(B, H, Tq, Tk)
    some = seen.any(-1, keepdim=True)
    key, value = (t.repeat_interleave(H // max(G, 1), dim=1) for t in (key, value))
    logit = scale * torch.einsum("bhid,bhjd->bhij", query, key)
    logit = logit.masked_fill(~some, 0.0).masked_fill(some & ~seen, -math.inf)
    weight = torch.softmax(logit, dim=-1).masked_fill(~some, 0.0)
    # A weight of 0 does not keep out a value that is not finite: such values are added apart, to the queries that see
    # them.
    special = [math.nan, math.inf, -math.inf]
    fixed = value.detach()
    found = torch.cat([fixed.isnan(), fixed == math.inf, fixed == -math.inf], dim=-1)
    touched = (seen.to(value.dtype) @ found.to(value.dtype) > 0).chunk(3, dim=-1)
    zero = value.new_zeros(())
    unbounded = sum(torch.where(t, torch.full_like(zero, s), zero) for t, s in zip(touched, special, strict=True))
    return weight @ value.masked_fill(~fixed.isfinite(), 0.0) + unbounded
