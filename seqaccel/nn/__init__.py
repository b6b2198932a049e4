"""Drop-in modules."""

from seqaccel.nn import rnn
from seqaccel.nn.attention import HierarchicalAttention
from seqaccel.nn.conv import TCN, CausalConv1d
from seqaccel.nn.rnn import *  # noqa: F403
from seqaccel.nn.scan import SRU, SRUCell
from seqaccel.nn.streaming import Streaming

__all__ = ["SRU", "TCN", "CausalConv1d", "HierarchicalAttention", "SRUCell", "Streaming"]
__all__ += rnn.__all__
