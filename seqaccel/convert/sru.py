"""Checkpoints of version 3 of the package sru, which load into :class:`seqaccel.nn.SRU` as they are."""

from typing import Any

from seqaccel import nn
from seqaccel.nn.checkpoints import loads


@loads(nn.SRUCell)
def rename_keys(module: nn.SRUCell, state_dict: dict[str, Any], prefix: str) -> None:
    """Renames, in place, the keys of matrices that lie transposed in ``transform_module``."""
    old, new = prefix + "transform_module.", prefix + "weight"
    if old + "weight" in state_dict:
        state_dict[new] = state_dict.pop(old + "weight").t()
    elif old + "1.weight" in state_dict:
        state_dict[new + "_proj"] = state_dict.pop(old + "0.weight").t()
        state_dict[new] = state_dict.pop(old + "1.weight").t()
