"""Additive and multiplicative attention, with every pair of query and key in memory."""

import torch
from torch import Tensor

__all__ = ["additive_weights", "masked_softmax"]


def masked_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last dimension where ``mask`` is true; 0 elsewhere, and in rows where it is true nowhere."""
    if mask is None:
        return torch.softmax(logits, -1)
    kept = mask | ~mask.any(-1, keepdim=True)  # a row of -inf alone would give NaN, in its gradient too
    return torch.softmax(logits.masked_fill(~kept, -torch.inf), -1).masked_fill(~mask, 0)


def additive_weights(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax_j(sum_h weight_h tanh(query_ih + key_jh)): (B, Tq, Tk) of (B, Tq, H), (B, Tk, H) and (H,).

    ``mask``: bool, (B, 1, Tk) or (B, Tq, Tk), true where a query attends to a key.
    """
    logits = torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3)) @ weight
    return masked_softmax(logits, mask)
