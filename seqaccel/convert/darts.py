"""The package ``darts``: the residual block of its TCNModel, by our causal convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class
from seqaccel.convert.causal_conv import causal_conv, has_hooks

#: What its forward reads.
_OWN = ("conv1", "conv2", "dropout1", "dropout2", "dilation_base", "kernel_size", "nr_blocks_below", "num_layers")


class ResidualBlock(Unscriptable, torch.nn.Module):
    """Two convolutions padded on the left, each with a ReLU (but the network's last) and dropout; x is added."""

    def forward(self, x: Tensor) -> Tensor:
        m: Any = self
        if has_hooks(m.conv1) or has_hooks(m.conv2):
            return super().forward(x)
        last = m.nr_blocks_below == m.num_layers - 1
        y = m.dropout1(causal_conv(m.conv1, x, "zeros", "relu"))
        y = m.dropout2(causal_conv(m.conv2, y, "zeros", None if last else "relu"))
        return y + (m.conv3(x) if m.conv1.in_channels != m.conv2.out_channels else x)


def residual_block(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``darts.models.forecasting.tcn_model._ResidualBlock``."""
    kind: Any = plain_class(module)
    if (kind.__name__, kind.__module__.partition(".")[0]) != ("_ResidualBlock", "darts"):
        return None
    m: Any = module
    if not all(hasattr(m, name) for name in _OWN):
        return "not the block that darts 0.48 has"
    dilation = m.dilation_base**m.nr_blocks_below
    for conv in (m.conv1, m.conv2):
        taps = (conv.kernel_size, conv.dilation, conv.stride, conv.padding)
        if taps != ((m.kernel_size,), (dilation,), (1,), (0,)):
            return "not the block that darts 0.48 has"
    return Swap("seqaccel.functional.causal_conv1d", combined(ResidualBlock, kind), runs=(m.conv1, m.conv2))
