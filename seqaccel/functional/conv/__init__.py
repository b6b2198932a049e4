"""Causal convolutions."""

from seqaccel.functional.conv._causal_conv1d import ACTIVATIONS, GATED, causal_conv1d

__all__ = ["ACTIVATIONS", "GATED", "causal_conv1d"]
