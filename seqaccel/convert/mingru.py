"""minGRU and minLSTM of the package minGRU-pytorch."""

from collections.abc import Mapping
from typing import Any

import torch

from seqaccel import nn
from seqaccel.convert._weights import reorder, tensors_of

_GRU, _LSTM = "to_hidden_and_gate.weight", "to_hidden_and_f_i_gate.weight"


def from_mingru(source: torch.nn.Module | Mapping[str, Any]) -> nn.MinGRU | nn.MinLSTM:
    r"""A layer that computes what ``minGRU`` or ``minLSTM`` of the package `minGRU-pytorch` computes, with its weights.

    It has the candidate g and no bias, and its input is (B, T, ·). The package applies g to the state that a call
    continues from; ours takes the state as it is.

    Args:
        source: a ``minGRU`` or ``minLSTM``, or its state_dict: ``to_hidden_and_gate.weight`` (2 * H, I), the rows of
            the candidate and of the gate, or ``to_hidden_and_f_i_gate.weight`` (3 * H, I), the rows of the candidate,
            f and i. A projection ``to_out.weight`` is a layer of its own (torch.nn.Linear): give the weights without
            it.

    Returns:
        A new module of one layer, with the weights' dtype and device.

    Raises:
        ValueError: a weight is missing, unknown or has another shape.

    Source: https://github.com/lucidrains/minGRU-pytorch, version 0.2.

    Example:
        >>> import torch, seqaccel
        >>> seqaccel.from_mingru({"to_hidden_and_gate.weight": torch.randn(8, 3)})
        MinGRU(3, 4, bias=False, batch_first=True, candidate='g')
    """
    training = True
    if isinstance(source, torch.nn.Module):
        training, source = source.training, source.state_dict()
    is_lstm = isinstance(source, Mapping) and _LSTM in source
    name, order = (_LSTM, (1, 2, 0)) if is_lstm else (_GRU, (1, 0))
    weight = tensors_of("from_mingru", source, {name}, set())[name]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[0] % len(order):
        raise ValueError(
            f"from_mingru: expected {name} to have shape ({len(order)} * H, I), but got {tuple(weight.shape)}"
        )
    kind: Any = nn.MinLSTM if is_lstm else nn.MinGRU
    module = kind(
        weight.shape[1], weight.shape[0] // len(order), bias=False, batch_first=True, candidate="g",
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    module.load_state_dict({"weight_ih_l0": reorder(weight, order)})
    return module.train(training)
