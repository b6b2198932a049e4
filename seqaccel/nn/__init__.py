"""Drop-in modules."""

from seqaccel.nn.attention import HierarchicalAttention
from seqaccel.nn.conv import TCN, CausalConv1d
from seqaccel.nn.rnn import (
    GRU,
    LSTM,
    RNN,
    GRUCell,
    LayerNormGRU,
    LayerNormLSTM,
    LSTMCell,
    MultiplicativeLSTM,
    PeepholeLSTM,
    RNNCell,
)
from seqaccel.nn.scan import SRU, SRUCell
from seqaccel.nn.streaming import Streaming

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SRU",
    "TCN",
    "CausalConv1d",
    "GRUCell",
    "HierarchicalAttention",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "MultiplicativeLSTM",
    "PeepholeLSTM",
    "RNNCell",
    "SRUCell",
    "Streaming",
]
