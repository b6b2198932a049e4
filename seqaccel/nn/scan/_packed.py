"""A ``PackedSequence`` as a padded batch, and back; rows lie in its own order, longest first."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def padded(
    title: str, input: PackedSequence, mask_pad: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(T, B, I) and its mask_pad (T, B). What else says where sequences lie is refused."""
    for name, given in (("mask_pad", mask_pad), ("reset", reset), ("cu_seqlens", cu_seqlens)):
        if given is not None:
            raise ValueError(
                f"{title}: expected no {name} with a PackedSequence; give a padded batch, with mask_pad and reset"
            )
    x, lengths = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes))
    mask = torch.arange(x.shape[0]).unsqueeze(1) >= lengths
    return x, mask.to(x.device)


def repacked(output: Tensor, like: PackedSequence) -> PackedSequence:
    """Packs an output (T, B, ·) as the input was."""
    lengths = (like.batch_sizes.unsqueeze(1) > torch.arange(output.shape[1])).sum(0)
    data = pack_padded_sequence(output, lengths).data
    return PackedSequence(data, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
