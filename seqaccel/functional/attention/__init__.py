"""Attention."""

from seqaccel.functional.attention.hierarchical import hierarchical_attention

__all__ = ["hierarchical_attention"]
