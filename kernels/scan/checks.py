"""What the operators of the scans refuse."""

import torch
from torch import Tensor

__all__ = ["check", "pointers"]


def check(operator: str, first: Tensor, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    if first.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operator}: expected float32 or float64, but got {first.dtype}")
    for name, (t, shape) in tensors.items():
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{operator}: expected {name} to have shape {shape}, but got {tuple(t.shape)}")
        if t.device != first.device or (t.dtype != first.dtype and name != "mask_pad"):
            raise ValueError(f"{operator}: expected {name} to have the dtype and the device of the first tensor")


def pointers(names: str) -> dict[str, str]:
    """Types of a kernel's pointers, for ``CONFIGURATIONS``."""
    return {f"p_{name}": "*u8" if name == "mask_pad" else "*fp32" for name in names.split()}
