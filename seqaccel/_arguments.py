"""One check for each kind of argument: it names the argument, what was expected and what came.

``where`` is the public function or module. What Python's own types cannot say (a Dynamo symbol for an int) is let
through.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

_WORD = 1 << 63


def _found(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {value!r:.60}"


def tensor(where: str, name: str, value: Any, *, optional: bool = False) -> None:
    """A tensor, or None where it may be left out."""
    if not isinstance(value, Tensor) and not (optional and value is None):
        kind = "None" if value is None else type(value).__name__
        raise TypeError(f"{where}: expected {name} to be a Tensor{' or None' * optional}, but got {kind}")


def tensors(where: str, **values: Any) -> None:
    """Tensors that may not be left out."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            tensor(where, name, value)


def optional_tensors(where: str, **values: Any) -> None:
    """Tensors, or None."""
    for name, value in values.items():
        if value is not None and not isinstance(value, Tensor):
            tensor(where, name, value, optional=True)


def integer(where: str, name: str, value: Any, least: int | None = None) -> None:
    """An int, and no bool, of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{where}: expected {name} to be an int, but got {_found(value)}")
    if not torch.compiler.is_compiling() and type(value) is int and not -_WORD <= value < _WORD:
        raise ValueError(f"{where}: expected {name} to be an int of 64 bits, but got {value}")
    if least is not None and value < least:
        raise ValueError(f"{where}: expected {name} to be at least {least}, but got {value}")


def number(where: str, name: str, value: Any) -> None:
    """A finite real number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{where}: expected {name} to be a number, but got {_found(value)}")
    if isinstance(value, float) and not -math.inf < value < math.inf:  # Dynamo traces no math.isfinite of a symbol
        raise ValueError(f"{where}: expected {name} to be finite, but got {value}")


def probability(where: str, name: str, value: Any) -> None:
    """A number between 0 and 1."""
    number(where, name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{where}: expected {name} to be between 0 and 1, but got {value}")


def flag(where: str, name: str, value: Any) -> None:
    """True or False, or an int or NumPy's for one."""
    if isinstance(value, (bool, int, torch.SymBool)) or type(value).__name__ in ("bool_", "bool"):
        return
    raise TypeError(f"{where}: expected {name} to be a bool, but got {_found(value)}")


def flags(where: str, **values: Any) -> None:
    for name, value in values.items():
        flag(where, name, value)


def states(where: str, name: str, value: Any, names: tuple[str, ...]) -> None:
    """A tuple or list of as many tensors as there are ``names``."""
    expected = f"({', '.join(names)}{',' * (len(names) == 1)})"
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{where}: expected {name} to be a tuple {expected}, but got {type(value).__name__}")
    if len(value) != len(names):
        raise ValueError(f"{where}: expected {name} to be a tuple {expected}, but got {len(value)} values")
    for part_name, part in zip(names, value, strict=True):
        tensor(where, f"{name}'s {part_name}", part)


def mask(where: str, name: str, value: Any, shape: tuple[int, ...]) -> None:
    """A tensor of bool of this shape."""
    tensor(where, name, value)
    if value.dtype != torch.bool or tuple(value.shape) != tuple(shape):
        found = f"{value.dtype} of {tuple(value.shape)}"
        raise ValueError(f"{where}: expected {name} to be bool of shape {tuple(shape)}, but got {found}")


def reset(where: str, value: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Where episodes begin: a tensor of bool of this shape, on the input's device."""
    mask(where, "reset", value, shape)
    if value.device != device:
        raise RuntimeError(
            f"{where}: expected all tensors to be on the same device, "
            f"but input is on {device} and reset is on {value.device}"
        )
