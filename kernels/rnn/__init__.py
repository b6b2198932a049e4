"""Recurrent cells on a GPU: one layer, one direction, in Triton.

``cells.py`` defines each cell's update and derivative once. ``step.py`` runs one step after its matrix product,
``persistent.py`` all steps in one launch (``tiles.py``: which cells and sizes), ``around.py`` what surrounds a step;
``forward.py`` and ``backward.py`` have the operators, ``checks.py`` what they refuse, ``configurations.py`` lists
what is shipped.

State is float32; input and weights may be float32, float16 or bfloat16. Past a row's length the state stays and the
output is 0. T time, B batch, I input, H hidden, P the width of h (H, or the projection's), G gates.
"""

from seqaccel.kernels.rnn.backward import rnn_backward
from seqaccel.kernels.rnn.configurations import CONFIGURATIONS
from seqaccel.kernels.rnn.forward import rnn_forward

__all__ = ["CONFIGURATIONS", "rnn_backward", "rnn_forward"]
