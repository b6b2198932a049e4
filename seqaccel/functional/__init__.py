"""The operators as functions."""

from seqaccel.functional import _dispatch as _dispatch  # registers kernels
from seqaccel.functional import _testing as _testing  # registers operators
from seqaccel.functional.attention import (
    additive_attention,
    attention_lstm,
    attention_pool,
    block_sparse_attention,
    hierarchical_attention,
    multiplicative_attention,
    novelty_gate,
    top_k_layout,
)
from seqaccel.functional.conv import (
    causal_conv1d,
    causal_conv2d,
    causal_conv_transpose1d,
    convolutional_gru,
    temporal_block,
    wavenet_layer,
)
from seqaccel.functional.rnn import _functions as _recurrent
from seqaccel.functional.rnn._cfc import cfc
from seqaccel.functional.rnn._echo_state import echo_state
from seqaccel.functional.rnn._functions import *  # noqa: F403
from seqaccel.functional.rnn.parallel_in_time import parallel_in_time
from seqaccel.functional.rnn.stability import truncated
from seqaccel.functional.scan import (
    column_layer,
    fo_pool,
    indrnn,
    join_summaries,
    linear_scan,
    min_gru,
    min_lstm,
    scan_summary,
    sru,
    sru_layer,
)

__all__ = [
    "additive_attention",
    "attention_lstm",
    "attention_pool",
    "block_sparse_attention",
    "causal_conv1d",
    "causal_conv2d",
    "causal_conv_transpose1d",
    "cfc",
    "column_layer",
    "convolutional_gru",
    "echo_state",
    "fo_pool",
    "hierarchical_attention",
    "indrnn",
    "join_summaries",
]
__all__ += [
    "linear_scan",
    "min_gru",
    "min_lstm",
    "multiplicative_attention",
    "novelty_gate",
    "parallel_in_time",
    "scan_summary",
    "sru",
    "sru_layer",
    "temporal_block",
    "top_k_layout",
    "truncated",
    "wavenet_layer",
    *_recurrent.__all__,
]
