"""Causal convolutions on a GPU, in Triton: of sequences and of grids.

``epilogue.py`` has what follows a convolution and its gradient, ``taps.py`` where taps meet x and what tells sequences
apart, ``product.py`` dense convolutions, ``depthwise.py`` depthwise ones, and ``operators.py`` puts them together.
"""

from seqaccel.kernels.conv.configurations import CONFIGURATIONS
from seqaccel.kernels.conv.operators import (
    causal_conv1d_backward,
    causal_conv1d_forward,
    causal_conv2d_backward,
    causal_conv2d_forward,
    fits,
)

__all__ = [
    "CONFIGURATIONS",
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv2d_backward",
    "causal_conv2d_forward",
    "fits",
]
