"""Drop-in modules."""

from seqaccel.nn.attention import HierarchicalAttention
from seqaccel.nn.conv import TCN, CausalConv1d
from seqaccel.nn.rnn import LSTM
from seqaccel.nn.scan import SRU, SRUCell
from seqaccel.nn.streaming import Streaming

__all__ = ["LSTM", "SRU", "TCN", "CausalConv1d", "HierarchicalAttention", "SRUCell", "Streaming"]
