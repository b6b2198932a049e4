"""Recurrent layers: the public calls (``_functions``), a layer of any cell (``_operator``), the cells (``_cells``)."""

from seqaccel.functional.rnn._functions import (
    gru,
    layer_norm_gru,
    layer_norm_lstm,
    lstm,
    multiplicative_lstm,
    peephole_lstm,
    rnn,
)

__all__ = [
    "gru",
    "layer_norm_gru",
    "layer_norm_lstm",
    "lstm",
    "multiplicative_lstm",
    "peephole_lstm",
    "rnn",
]
