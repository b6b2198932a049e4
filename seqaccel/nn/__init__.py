"""Drop-in modules."""

from seqaccel.nn.scan import SRU, SRUCell
from seqaccel.nn.streaming import Streaming

__all__ = ["SRU", "SRUCell", "Streaming"]
