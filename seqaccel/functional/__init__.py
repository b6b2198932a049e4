"""The operators as functions."""

from seqaccel.functional.attention import hierarchical_attention
from seqaccel.functional.conv import causal_conv1d
from seqaccel.functional.rnn import lstm
from seqaccel.functional.scan import linear_scan, sru, sru_layer

__all__ = ["causal_conv1d", "hierarchical_attention", "linear_scan", "lstm", "sru", "sru_layer"]
