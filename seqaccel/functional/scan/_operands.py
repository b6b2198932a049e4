"""What the scans share: their operators, and the checks of their operands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel import _common
from seqaccel.functional._registration import once

BACKENDS = ("reference", "cpp", "triton", "cuda")


def operator(name: str, backend: str, register: Callable[[str], None]) -> Callable[..., Any]:
    """The operator of a backend; ``register`` registers what torch must know of the backend's, once."""
    if backend == "triton":
        from seqaccel.kernels import scan as kernels

        once(register, "triton")
        return getattr(kernels, name)
    return getattr(torch.ops.seqaccel, name).default


def in_float32_under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """A running sum is no matrix product: as torch does for cumsum, autocast means float32 here."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not _common.autocast_on(device_type):
        return tensors
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in narrow else t for t in tensors)


def check_alike(
    operator: str, first_name: str, first: Tensor, others: dict[str, Tensor | None], *, may_be_complex: bool = False
) -> None:
    if not (first.is_floating_point() or (may_be_complex and first.is_complex())):
        kinds = "floating point or complex" if may_be_complex else "floating point"
        raise TypeError(f"{operator}: expected {first_name} to be {kinds}, but got {first.dtype}")
    for name, t in others.items():
        if t is None:
            continue
        if t.dtype != first.dtype:
            raise TypeError(
                f"{operator}: expected {name} to have the dtype of {first_name}, {first.dtype}, but got {t.dtype}"
            )
        if t.device != first.device:
            raise RuntimeError(
                f"{operator}: expected all tensors to be on the same device, "
                f"but {first_name} is on {first.device} and {name} is on {t.device}"
            )
