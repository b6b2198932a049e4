"""Drop-in modules."""

from seqaccel.nn import rnn, scan
from seqaccel.nn.attention import HierarchicalAttention
from seqaccel.nn.conv import TCN, CausalConv1d
from seqaccel.nn.rnn import *  # noqa: F403
from seqaccel.nn.scan import *  # noqa: F403
from seqaccel.nn.streaming import Streaming

__all__ = ["TCN", "CausalConv1d", "HierarchicalAttention", "Streaming"]
__all__ += rnn.__all__ + scan.__all__
