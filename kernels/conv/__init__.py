"""Causal convolutions on a GPU, in Triton: of sequences and of grids.

``epilogue.py`` has what follows a convolution and its gradient, ``taps.py`` where taps meet x and what tells sequences
apart, ``product.py`` dense convolutions, ``depthwise.py`` depthwise ones, and ``operators.py`` puts them together.
``wavenet.py`` has a layer of WaveNet.
"""

from seqaccel.kernels.conv.configurations import CONFIGURATIONS
from seqaccel.kernels.conv.operators import (
    causal_conv1d_backward,
    causal_conv1d_forward,
    causal_conv2d_backward,
    causal_conv2d_forward,
    fits,
)
from seqaccel.kernels.conv.wavenet import layer_fits, wavenet_layer_backward, wavenet_layer_forward

__all__ = [
    "CONFIGURATIONS",
    "causal_conv1d_backward",
    "causal_conv1d_forward",
    "causal_conv2d_backward",
    "causal_conv2d_forward",
    "fits",
    "layer_fits",
    "wavenet_layer_backward",
    "wavenet_layer_forward",
]
