"""Recurrent layers: one layer and direction of each cell as a function (``_functions``); what ``seqaccel.nn`` runs
(``layers``, ``step``); the table of cells (``CELLS``)."""

from seqaccel.functional.rnn._cells import CELLS, CellSpec
from seqaccel.functional.rnn._functions import (
    gru,
    layer_norm_gru,
    layer_norm_lstm,
    lstm,
    multiplicative_lstm,
    peephole_lstm,
    rnn,
)
from seqaccel.functional.rnn._layers import layers, step

__all__ = [
    "CELLS",
    "CellSpec",
    "gru",
    "layer_norm_gru",
    "layer_norm_lstm",
    "layers",
    "lstm",
    "multiplicative_lstm",
    "peephole_lstm",
    "rnn",
    "step",
]
