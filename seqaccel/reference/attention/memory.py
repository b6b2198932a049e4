"""The novelty gate in plain PyTorch: the definition."""

import torch
from torch import Tensor

__all__ = ["novelty_gate"]


def _units(vectors: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)


def novelty_gate(
    vectors: Tensor, kept: Tensor, size: Tensor, *, threshold: float, window: int, capacity: int
) -> Tensor:
    """Where each of ``vectors`` (B, T, E) belongs, (B, T), after ``size`` (B,) rows of ``kept`` (B, N, E).

    A vector takes the next row where its largest cosine similarity to the last ``window`` rows is below ``threshold``
    and there are fewer than ``capacity``; else it belongs to the first of the most similar rows. A NaN is like nothing.
    """
    B, T, _ = vectors.shape
    N = kept.shape[1]
    memory = torch.cat([_units(kept), torch.zeros_like(vectors)], 1)
    size = size.clamp(0, N)
    row = torch.arange(N + T, device=vectors.device)
    slots = []
    units = _units(vectors)
    for t in range(T):
        last = size.unsqueeze(1)
        seen = (row < last) & (row >= last - window)
        similar = torch.einsum("bne,be->bn", memory, units[:, t])
        similar = similar.masked_fill(~seen | similar.isnan(), -torch.inf)
        most = similar.amax(1)
        first = (size - window).clamp(min=0)
        best = torch.where(most == -torch.inf, first, (similar == most.unsqueeze(1)).to(torch.int8).argmax(1))
        novel = (size == 0) | ((most < threshold) & (size < capacity))
        slots.append(torch.where(novel, size, best))
        joins = novel.unsqueeze(1) & (row == last)
        memory = torch.where(joins.unsqueeze(2), units[:, t].unsqueeze(1), memory)
        size = size + novel
    return torch.stack(slots, 1) if slots else size.new_zeros(B, 0)
