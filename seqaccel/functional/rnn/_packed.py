"""Packed sequences to padded ones and back. torch's functions with a backward pass of one copy, not one a length."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqaccel import _common


def _pad(data: Tensor, batch_sizes: Tensor) -> Tensor:
    return pad_packed_sequence(PackedSequence(data, batch_sizes))[0]


def _pack(padded: Tensor, lengths: Tensor) -> Tensor:
    return pack_padded_sequence(padded, lengths).data


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, data, batch_sizes, lengths):
        ctx.batch_sizes, ctx.lengths = batch_sizes, lengths
        return _pad(data, batch_sizes)

    @staticmethod
    def backward(ctx, grad):
        return _Pack.apply(grad, ctx.batch_sizes, ctx.lengths), None, None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, batch_sizes, lengths):
        ctx.batch_sizes, ctx.lengths = batch_sizes, lengths
        return _pack(padded, lengths)

    @staticmethod
    def backward(ctx, grad):
        return _Pad.apply(grad, ctx.batch_sizes, ctx.lengths), None, None


def _recorded(tensor: Tensor) -> bool:
    return _common.needs_grad(tensor) and not _common.transforms_active() and not torch.compiler.is_compiling()


def lengths_of(batch_sizes: Tensor) -> Tensor:
    """Lengths (B,), longest first, of sequences of which ``batch_sizes`` (T,) run at each step."""
    if not torch.compiler.is_compiling() and (int(batch_sizes[-1]) < 1 or bool((batch_sizes.diff() > 0).any())):
        raise ValueError(f"expected batch_sizes not to increase and to be positive, but got {batch_sizes.tolist()}")
    # Not int(), which torch.export cannot record.
    rows = torch.arange(batch_sizes[0].item(), device=batch_sizes.device)
    return (batch_sizes.unsqueeze(1) > rows).sum(0)


def batch_sizes_of(lengths: Tensor) -> Tensor:
    """The inverse, of lengths longest first; on the CPU, where torch wants it."""
    steps = torch.arange(int(lengths[0]), device=lengths.device)
    return (lengths.unsqueeze(0) > steps.unsqueeze(1)).sum(1).cpu()


def pad(data: Tensor, batch_sizes: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, ·), zero past each sequence's end, from packed rows (N, ·)."""
    return _Pad.apply(data, batch_sizes, lengths) if _recorded(data) else _pad(data, batch_sizes)


def pack(padded: Tensor, batch_sizes: Tensor, lengths: Tensor) -> Tensor:
    """Packed rows (N, ·) from (T, B, ·)."""
    return _Pack.apply(padded, batch_sizes, lengths) if _recorded(padded) else _pack(padded, lengths)
