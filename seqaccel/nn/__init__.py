"""Drop-in modules."""

from seqaccel.nn import attention, conv, rnn, scan
from seqaccel.nn import decoding as decoding
from seqaccel.nn import utils as utils
from seqaccel.nn.attention import *  # noqa: F403
from seqaccel.nn.conv import *  # noqa: F403
from seqaccel.nn.rnn import *  # noqa: F403
from seqaccel.nn.scan import *  # noqa: F403
from seqaccel.nn.streaming import Streaming

__all__ = ["Streaming"]
__all__ += attention.__all__ + conv.__all__ + rnn.__all__ + scan.__all__
