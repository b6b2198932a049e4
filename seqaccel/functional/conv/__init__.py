"""Causal convolutions."""

from seqaccel.functional.conv._causal_conv1d import ACTIVATIONS, GATED, causal_conv1d
from seqaccel.functional.conv._causal_conv2d import causal_conv2d

__all__ = ["ACTIVATIONS", "GATED", "causal_conv1d", "causal_conv2d"]
