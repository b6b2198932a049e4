"""Recurrent layers: one layer and direction of each cell as a function (``_functions``); what ``seqaccel.nn`` runs
(``layers``, ``step``); the table of cells (``CELLS``)."""

from seqaccel.functional.rnn import _functions
from seqaccel.functional.rnn._cells import CELLS, CellSpec
from seqaccel.functional.rnn._echo_state import echo_state
from seqaccel.functional.rnn._functions import *  # noqa: F403
from seqaccel.functional.rnn._layers import layers, step
from seqaccel.functional.rnn.stability import truncated

__all__ = ["CELLS", "CellSpec", "echo_state", "layers", "step", "truncated"]
__all__ += _functions.__all__
