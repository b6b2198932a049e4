"""The layers that a Session runs, as its kernels know them, from a module: one file a family."""

from seqaccel.program import attention, columns, conv, recurrent  # noqa: F401 (they register what they describe)
from seqaccel.program._describe import FUNCTIONS, described
from seqaccel.program._layers import Layer, Program, State
from seqaccel.program.attention import pyramid_levels

__all__ = ["FUNCTIONS", "Layer", "Program", "State", "described", "pyramid_levels"]
