"""Causal convolutions."""

from seqaccel.functional.conv._causal_conv1d import activate, causal_conv1d, last_steps
from seqaccel.functional.conv._causal_conv2d import causal_conv2d
from seqaccel.functional.conv._causal_conv_transpose1d import causal_conv_transpose1d, conv_of_phases
from seqaccel.functional.conv._checks import ACTIVATIONS, GATED, PADDING_MODES
from seqaccel.functional.conv._convolutional_gru import GATES as GRU_GATES
from seqaccel.functional.conv._convolutional_gru import convolutional_gru
from seqaccel.functional.conv._residual_block import temporal_block
from seqaccel.functional.conv._wavenet_layer import wavenet_layer

__all__ = [
    "ACTIVATIONS",
    "GATED",
    "GRU_GATES",
    "PADDING_MODES",
    "activate",
    "causal_conv1d",
    "causal_conv2d",
    "causal_conv_transpose1d",
    "conv_of_phases",
    "convolutional_gru",
    "last_steps",
    "temporal_block",
    "wavenet_layer",
]
