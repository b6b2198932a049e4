"""The package sru: checkpoints of version 3 load into :class:`seqaccel.nn.SRU`, and layers of version 2 convert."""

from typing import Any

import torch

from seqaccel import nn
from seqaccel.convert._swap import Asked, Swap, combined, plain_class
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


def cell(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``sru.SRUCell``, a layer of ``sru.SRU``, by the same parameters."""
    kind: Any = plain_class(module)
    if (kind.__name__, kind.__module__.partition(".")[0]) != ("SRUCell", "sru"):
        return None
    m: Any = module
    if not hasattr(m, "activation_type") or not hasattr(m, "weight_c_init"):
        return "of another version of the package than 2.6"
    options = {"use_tanh": m.activation_type == 1, "nn_rnn_compatible_return": False}
    return Swap("seqaccel.nn.SRUCell", combined(nn.SRUCell, kind), options)
