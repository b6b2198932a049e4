"""The package ``pytorch-tcn`` (causal): checkpoints load into :class:`seqaccel.nn.TCN`, and its layers convert."""

import re
from typing import Any

import torch
from torch import Tensor

from seqaccel import nn
from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class
from seqaccel.convert.causal_conv import causal_conv, has_hooks
from seqaccel.nn.checkpoints import loads


@loads(nn.TCN)
def drop_buffers(module: nn.TCN, state_dict: dict[str, Any], prefix: str) -> None:
    """Removes the package's stream buffers; the parameters have the names of the module at ``prefix``."""
    buffers = re.compile(re.escape(prefix) + r"network\.\d+\.conv[12]\.(padder\.)?buffer")
    for key in [key for key in state_dict if buffers.fullmatch(key)]:
        del state_dict[key]


class TemporalConv1d(Unscriptable, torch.nn.Conv1d):
    """The package's convolution, where it does not stream, by our operator."""

    def forward(self, x: Any, inference: bool = False, in_buffer: Any = None, buffer_io: Any = None) -> Any:
        padder: Any = self.padder
        plain = isinstance(x, Tensor) and not inference and in_buffer is None
        if not plain or has_hooks(padder) or has_hooks(padder.pad):
            return super().forward(x, inference, in_buffer, buffer_io)  # type: ignore[call-arg]
        return causal_conv(self, x, "zeros" if isinstance(padder.pad, torch.nn.ConstantPad1d) else "replicate")


def temporal_conv(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``pytorch_tcn.TemporalConv1d``."""
    kind: Any = plain_class(module)
    if (kind.__name__, kind.__module__.partition(".")[0]) != ("TemporalConv1d", "pytorch_tcn"):
        return None
    m: Any = module
    if not m.causal:
        return "not causal"
    if not isinstance(m.padder.pad, (torch.nn.ConstantPad1d, torch.nn.ReplicationPad1d)):
        return f"padding by {type(m.padder.pad).__name__}"
    return Swap("seqaccel.functional.causal_conv1d", combined(TemporalConv1d, kind))
