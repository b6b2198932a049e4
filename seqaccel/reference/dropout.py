"""Dropout masks by a counter-based generator: what ``csrc/common/dropout.h`` calculates, in tensor arithmetic."""

import torch
from torch import Tensor

__all__ = ["dropped", "kept", "skip_rows"]

_WORD = 0xFFFFFFFF


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _logical_shift(z: Tensor, n: int) -> Tensor:
    return (z >> n) & ((1 << (64 - n)) - 1)


def skip_rows(seed: Tensor, rows: int) -> Tensor:
    """The seed whose masks are those of ``seed`` from this row on."""
    return seed + _signed(rows * 0x9E3779B97F4A7C15 % (1 << 64))


def kept(seed: Tensor, row: Tensor, element: Tensor, p: float) -> Tensor:
    """Which elements of which rows a dropout of probability ``p`` keeps; ``row`` and ``element`` broadcast.

    Element t of row r is kept when hash(t; key(seed, r)) >= round(p * 2**32).
    """
    z = seed + (row + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _logical_shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _logical_shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _logical_shift(z, 31)
    first, second = z & _WORD, _logical_shift(z, 32)
    h = (element * 0x9E3779B9 + first) & _WORD
    h = h ^ (h >> 16)
    h = (h * 0x21F0AAAD + second) & _WORD
    h = h ^ (h >> 15)
    h = (h * 0x735A2D97) & _WORD
    h = h ^ (h >> 15)
    return h >= min(round(p * 2**32), _WORD)


def dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """``x`` / (1 - p) where ``keep``, else 0."""
    return torch.where(keep, x * (1 / (1 - p) if p < 1 else 0.0), 0.0)
