"""Layers of the package ncps."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import nn
from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class

_ACTIVATIONS: dict[str, str] = {"LeCun": "lecun_tanh", "Tanh": "tanh", "ReLU": "relu"}


def _activations(cell: Any) -> set[str]:
    """Names of the classes in a backbone, but for its linear layers."""
    return {type(layer).__name__ for layer in cell.backbone or () if not isinstance(layer, torch.nn.Linear)}


class _CfC(Unscriptable):
    """ncps's layer, whose loop over steps runs in our kernels."""

    def forward(self: Any, input: Tensor, hx: Tensor | None = None, timespans: Tensor | None = None) -> Any:
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        batch = input.shape[batch_dim] if batched else 1
        if (
            (timespans is not None and (batch > 1 or timespans.numel() != input.numel() // input.shape[-1]))
            or (hx is not None and hx.dim() != input.dim() - 1)
            or input.shape[-2 if self.batch_first or not batched else 0] == 0
        ):
            return super().forward(input, hx, timespans)  # type: ignore[misc]  # as the package has it, or refuses it
        x = input if batched else input.unsqueeze(batch_dim)
        x = x.transpose(0, 1) if self.batch_first else x
        h_0 = hx if batched or hx is None else hx.unsqueeze(0)
        spans = None if timespans is None else timespans.reshape(-1, 1)
        activation = next((_ACTIVATIONS[name] for name in _activations(self.rnn_cell)), "tanh")
        states = nn.CfCCell.run(self.rnn_cell, activation, x, h_0, spans)
        output, h_n = self.fc(states if self.return_sequences else states[-1]), states[-1]
        output = output.transpose(0, 1) if self.return_sequences and self.batch_first else output
        return (output, h_n) if batched else (output.squeeze(batch_dim), h_n[0])


def layer(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``ncps.torch.CfC``."""
    kind: Any = plain_class(module)
    if (kind.__name__, kind.__module__.partition(".")[0]) != ("CfC", "ncps"):
        return None
    m: Any = module
    if hasattr(m, "wired_mode"):
        return "a wired CfC"
    if m.use_mixed:
        return "mixed_memory: an LSTM and a CfC take turns"
    unknown = _activations(m.rnn_cell) - set(_ACTIVATIONS)
    if unknown:
        return f"its backbone has {', '.join(sorted(unknown))}: expected LeCun, Tanh or ReLU"
    if m.rnn_cell.backbone_layers > 7:
        return "more than 7 layers of the backbone"
    return Swap("seqaccel.functional.cfc", combined(_CfC, kind))
