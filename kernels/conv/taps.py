"""Where the taps of a convolution meet x, and what tells sequences in one row apart.

Time is one axis. A grid [T, S] is read as T * S steps; its taps are across a row and down the rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import wrap_triton
from seqaccel.kernels.conv.epilogue import Epilogue, gradient_at

FOLD = 1024  # steps per program where sequences are folded


class Taps(NamedTuple):
    """The distances of taps, in steps."""

    count: int  # all of them
    down: int  # between rows of taps: the dilation; in a grid times its width
    across: int = 1  # taps in a row
    side: int = 0  # between those
    width: int = 1  # of the grid

    @property
    def context(self) -> int:
        """The steps before x that taps meet."""
        return (self.count // self.across - 1) * self.down


@triton.jit
def tap_at(k, o_t, first, K, down, across, side, width, DIRECTION: tl.constexpr, GRID: tl.constexpr):
    """The steps that tap k meets from the steps ``o_t``, and whether they are in the grid's columns."""
    if GRID:
        aside = (k % across - across // 2) * side
        at = first + o_t + DIRECTION * ((K // across - 1 - k // across) * down - aside)
        column = o_t % width - DIRECTION * aside
        return at, (column >= 0) & (column < width)
    else:
        return first + o_t + DIRECTION * (K - 1 - k) * down, o_t >= 0


class Sequences(NamedTuple):
    """The sequences of a call; what is None is not told apart."""

    begin: Tensor | None  # [B, T] int32: where the sequence of each step begins,
    end: Tensor | None  # and ends
    row: Tensor | None  # [B, T] int32: of the history; -1: zeros are before the sequence
    bounds: Tensor | None  # [N + 1] int64: offsets of packed sequences


WHOLE = Sequences(None, None, None, None)


def sequences_of(x: Tensor, reset: Tensor | None, cu_seqlens: Tensor | None, width: int = 1) -> Sequences:
    """Of x (B, C, T * width). Offsets of any value stay within x: the first sequence begins at 0 and the last one ends
    with x."""
    batch, _, length = x.shape
    if (reset is None and cu_seqlens is None) or length == 0:
        return WHOLE
    t = torch.arange(length, device=x.device)
    if reset is not None:
        reset = torch.nn.functional.pad(reset.unsqueeze(2), (0, width - 1)).flatten(1)  # the first column of a row
        begin = torch.where(reset, t, 0).cummax(1).values
        begun = reset.to(torch.int32).cummax(1).values
        follows = torch.where(reset, t, length).flip(1).cummin(1).values.flip(1)  # the first reset from t on
        end = torch.cat([follows[:, 1:], follows.new_full((batch, 1), length)], 1)
        row = torch.arange(batch, device=x.device)[:, None] * (1 - begun) - begun
        return Sequences(*(s.to(torch.int32).contiguous() for s in (begin, end, row)), None)
    assert cu_seqlens is not None
    inner = cu_seqlens[1:-1].clamp(0, length).cummax(0).values
    row = torch.searchsorted(inner, t, right=True)
    bounds = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), length)])
    found = (s.to(torch.int32).unsqueeze(0) for s in (bounds[row], bounds[row + 1], row))
    return Sequences(*found, bounds)


@triton.jit(do_not_specialize=["L", "context"])
def conv_fold_kernel(
    p_grad_y, p_y, p_pre, p_active, p_seed, p_end, p_row, p_bounds,
    p_folded,  # [N, rows, context]
    rows, outputs, L, context, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """folded[n, o, u]: v's gradient u steps after the beginning of the sequence with history n."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    program = tl.program_id(0).to(tl.int64)
    n, row = program // rows, program % rows
    u = tl.program_id(1) * BT + tl.arange(0, BT)
    i_b = n
    start = tl.zeros([], dtype=tl.int64)
    stop = start + L
    if p_bounds is not None:
        i_b = n * 0
        start = tl.load(p_bounds + n)
        stop = tl.load(p_bounds + n + 1)
    elif p_end is not None:
        stop = tl.where(tl.load(p_row + n * L) < 0, 0, tl.load(p_end + n * L)).to(tl.int64)
    t = start + u
    _, g = gradient_at(
        p_grad_y, p_y, p_pre, p_active, p_seed, i_b, row, t, t < stop, outputs, L, threshold, scale,
        ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip
    b_folded = tl.where(t < stop, g, 0.0)
    tl.store(p_folded + (n * rows + row) * context + u, b_folded.to(p_folded.dtype.element_ty), mask=u < context)


def fold(
    grad_y: Tensor, y: Tensor | None, pre: Tensor | None, active: Tensor | None, rows: int, context: int,
    sequences: Sequences, count: int, epilogue: Epilogue,
) -> Tensor:  # fmt: skip
    """The gradients of v within ``context`` of the beginnings of sequences, for ``count`` histories.

    A history's gradient is made of them, and its share of the weight's.
    """
    outputs, length = grad_y.shape[1:]
    bounds = sequences.bounds
    folded = grad_y.new_zeros((count, rows, context))
    if folded.numel() and grad_y.numel():
        wrap_triton(conv_fold_kernel)[(count * rows, triton.cdiv(context, FOLD))](
            grad_y, y, pre, active, epilogue.seed, sequences.end if bounds is None else None,
            sequences.row if bounds is None else None, bounds, folded,
            rows, outputs, length, context, *epilogue.numbers, **epilogue.options, BT=FOLD, num_warps=4,
        )  # fmt: skip
    return folded
