"""The check of ``cu_seqlens``, which all families share."""

import itertools

import torch
from torch import Tensor

from seqaccel import _common
from seqaccel.functional import _onnx

__all__ = ["check_offsets"]


def check_offsets(name: str, cu_seqlens: Tensor, steps: int, batch: int) -> None:
    """Offsets (N + 1,) that ascend from 0 to ``steps``, for a batch of 1."""
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}: expected cu_seqlens to be torch.int64 of shape (N + 1,), N at least 1, "
            f"but got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"{name}: expected a batch of 1 with cu_seqlens, but got {batch}")
    if _common.transforms_active() or _onnx.exporting() or cu_seqlens.device.type != "cpu" or cu_seqlens.is_meta:
        return  # where nothing waits for values: kernels keep offsets in range
    if torch.compiler.is_compiling() or _common.is_distributed(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != steps or any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{name}: expected cu_seqlens to ascend from 0 to {steps}, but got {ends!r:.60}")
