"""The layers that a Session runs, as its kernels know them, from a module: one file a family.

``trace`` takes the modules that none of them knows.
"""

from seqaccel.program import attention, columns, conv, recurrent  # noqa: F401 (they register what they describe)
from seqaccel.program._describe import FUNCTIONS, described
from seqaccel.program._layers import Layer, Program, State
from seqaccel.program.attention import pyramid_levels
from seqaccel.program.containers import Concatenation, Residual

__all__ = ["FUNCTIONS", "Concatenation", "Layer", "Program", "Residual", "State", "described", "pyramid_levels"]
