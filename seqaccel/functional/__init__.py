"""The operators as functions."""

from seqaccel.functional import _dispatch as _dispatch  # registers kernels
from seqaccel.functional import _testing as _testing  # registers operators
from seqaccel.functional.attention import hierarchical_attention
from seqaccel.functional.conv import causal_conv1d
from seqaccel.functional.rnn import (
    gru,
    layer_norm_gru,
    layer_norm_lstm,
    lstm,
    multiplicative_lstm,
    peephole_lstm,
    rnn,
)
from seqaccel.functional.scan import linear_scan, sru, sru_layer

__all__ = [
    "causal_conv1d",
    "gru",
    "hierarchical_attention",
    "layer_norm_gru",
    "layer_norm_lstm",
    "linear_scan",
    "lstm",
    "multiplicative_lstm",
    "peephole_lstm",
    "rnn",
    "sru",
    "sru_layer",
]
