"""What the operators of the scans refuse."""

import torch
from torch import Tensor

from seqaccel.kernels.scan.cells import CELLS

__all__ = ["check", "check_columns", "pointers"]


def check(operator: str, first: Tensor, tensors: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    if first.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operator}: expected float32 or float64, but got {first.dtype}")
    for name, (t, shape) in tensors.items():
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{operator}: expected {name} to have shape {shape}, but got {tuple(t.shape)}")
        if t.device != first.device or t.dtype != first.dtype:
            raise ValueError(f"{operator}: expected {name} to have the dtype and the device of the first tensor")


_DTYPES = {"mask_pad": torch.bool, "reset": torch.bool, "cu_seqlens": torch.int64}


def check_columns(operator: str, cell: str, u: Tensor, directions: int, tensors: dict[str, Tensor | None]) -> int:
    """Checks the arguments of a column cell's operator; returns how many values of a column and step u has."""
    if cell not in CELLS:
        raise ValueError(f"{operator}: no cell {cell!r}; there are {', '.join(CELLS)}")
    spec, c_0, packed = CELLS[cell], tensors["c_0"], tensors["cu_seqlens"] is not None
    if u.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise TypeError(f"{operator}: expected float32, float64, float16 or bfloat16, but got {u.dtype}")
    if u.dim() != 3 or c_0 is None or c_0.dim() != 2:
        raise ValueError(f"{operator}: expected u to have 3 dimensions and c_0 2, but u has shape {tuple(u.shape)}")
    (steps, batch, features), (sequences, channels) = u.shape, c_0.shape
    if directions not in (1, 2) or channels < 1 or channels % directions:
        raise ValueError(f"{operator}: directions must be 1 or 2 and divide {channels} channels, but got {directions}")
    values, rest = divmod(features, channels)
    if rest or values not in (spec.inputs, 4 if spec.highway else spec.inputs):
        raise ValueError(f"{operator}: u {tuple(u.shape)} does not fit c_0 {tuple(c_0.shape)}")
    if packed and (batch != 1 or (steps and not sequences)):
        raise ValueError(f"{operator}: with cu_seqlens expected a batch of 1 and a row of c_0 for each sequence")
    shapes = {
        "c_0": (sequences if packed else batch, channels),
        "c": (steps, batch, channels),
        "grad_h": (steps, batch, channels),
        "grad_c_n": (sequences, channels),
        "x": (steps, batch, channels) if spec.highway and values == spec.inputs else None,
        "weight": (spec.weights * channels,) if spec.weights else None,
        "bias": (spec.biases * channels,) if spec.biases else None,
        "mask": {"": None, "BC": (sequences, channels), "TBC": (steps, batch, channels)}[spec.mask],
        "scale": (1,) if spec.highway or spec.mask else None,
        "mask_pad": None if packed else (steps, batch),
        "reset": None if packed else (steps, batch),
        "cu_seqlens": (sequences + 1,),
    }
    for name, t in tensors.items():
        shape = shapes[name]
        if t is None:
            continue
        if shape is None:
            raise ValueError(f"{operator}: {cell} takes no {name} here")
        if tuple(t.shape) != shape:
            raise ValueError(f"{operator}: expected {name} to have shape {shape}, but got {tuple(t.shape)}")
        dtype = _DTYPES.get(name, u.dtype)
        if t.dtype != dtype or t.device != u.device:
            raise TypeError(f"{operator}: expected {name} to be {dtype} on {u.device}")
    return values


def pointers(names: str) -> dict[str, str]:
    """Types of a kernel's pointers, for ``CONFIGURATIONS``."""
    return {f"p_{name}": "*fp32" for name in names.split()}
