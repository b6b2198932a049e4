"""Checkpoints of locuslab's ``TemporalConvNet``, which load into :class:`seqaccel.nn.TCN` as they are."""

from typing import Any

import torch

from seqaccel import nn
from seqaccel.nn.checkpoints import loads


@loads(nn.TCN)
def rename_keys(module: nn.TCN, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames, in place, the keys to those of the module at ``prefix``.

    ``net.0`` is ``conv1`` and ``net.4`` is ``conv2``; ``weight_g`` and ``weight_v`` are the parametrization's
    ``original0`` and ``original1``. A plain ``weight`` (weight norm removed) becomes v, and its norm
    g, where the module has weight norm.
    """
    modules = {"conv1": "conv1", "conv2": "conv2", "net.0": "conv1", "net.4": "conv2"}
    weights = {"weight_g": "original0", "weight_v": "original1"}
    start = f"{prefix}network."
    for key in [key for key in state_dict if key.startswith(start)]:
        level, _, rest = key[len(start) :].partition(".")
        part = next((m for m in modules if rest.startswith(f"{m}.")), None)
        if not level.isdigit() or part is None:
            continue
        parameter = rest[len(part) + 1 :]
        target = f"{start}{level}.{modules[part]}."
        value = state_dict.pop(key)
        if parameter == "weight" and module.use_norm is not None:
            state_dict.setdefault(f"{target}parametrizations.weight.original1", value)
            norm = torch.linalg.vector_norm(value, dim=(1, 2), keepdim=True)
            state_dict.setdefault(f"{target}parametrizations.weight.original0", norm)
            continue
        if parameter in weights:
            parameter = f"parametrizations.weight.{weights[parameter]}"
        if parameter.startswith("parametrizations") or parameter in ("weight", "bias"):
            state_dict.setdefault(f"{target}{parameter}", value)
        else:
            state_dict[key] = value
