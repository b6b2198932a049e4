"""Causal convolutions and networks of them."""

from seqaccel.nn.conv._causal import CausalConv1d
from seqaccel.nn.conv._causal2d import CausalConv2d
from seqaccel.nn.conv._pervasive import PervasiveAttention
from seqaccel.nn.conv._tcn import TCN, TemporalBlock
from seqaccel.nn.conv._transpose import CausalConvTranspose1d

__all__ = ["TCN", "CausalConv1d", "CausalConv2d", "CausalConvTranspose1d", "PervasiveAttention", "TemporalBlock"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # what a pickle names: the files inside may be divided otherwise one day
