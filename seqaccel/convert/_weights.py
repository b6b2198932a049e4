"""Weights by name: checks, and copies into a module."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def reorder(weight: Tensor, order: Sequence[int]) -> Tensor:
    """The gates, blocks of the first dimension, in another order."""
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[i] for i in order])


def tensors_of(title: str, weights: Mapping[str, Any], required: set[str], optional: set[str]) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping):
        raise TypeError(f"{title}: expected weights by name, a mapping, but got {type(weights).__name__}")
    missing, unknown = required - set(weights), set(weights) - required - optional
    if missing or unknown:
        what = [f"without {sorted(missing)}"] if missing else []
        what += [f"with {sorted(unknown)}"] if unknown else []
        raise ValueError(f"{title}: weights {' and '.join(what)}; expected {sorted(required)}")
    return {name: torch.as_tensor(weight).detach() for name, weight in weights.items()}


def check_shapes(title: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{title}: expected {name} to have shape {shapes[name]}, but got {tuple(tensor.shape)}")


def load_first_layer(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """A parameter that ``weights`` does not have becomes zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = weights.get(name.removesuffix("_l0"))
            parameter.zero_() if value is None else parameter.copy_(value)
