"""Causal convolutions and networks of them."""

from seqaccel.nn.conv._causal import CausalConv1d
from seqaccel.nn.conv._causal2d import CausalConv2d
from seqaccel.nn.conv._language_model import GatedConvLM
from seqaccel.nn.conv._neural_gpu import ConvolutionalGRU, NeuralGPU
from seqaccel.nn.conv._pervasive import PervasiveAttention
from seqaccel.nn.conv._tcn import TCN, TemporalBlock
from seqaccel.nn.conv._transpose import CausalConvTranspose1d
from seqaccel.nn.conv._wavenet import GatedConv1d, WaveNet, WaveNetLayer

__all__ = ["TCN", "CausalConv1d", "CausalConv2d", "CausalConvTranspose1d", "GatedConv1d", "GatedConvLM"]
__all__ += ["ConvolutionalGRU", "NeuralGPU", "PervasiveAttention", "TemporalBlock", "WaveNet", "WaveNetLayer"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # what a pickle names: the files inside may be divided otherwise one day
