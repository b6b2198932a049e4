"""Attention in plain PyTorch."""

from seqaccel.reference.attention.hierarchical import hierarchical_attention, level_spans, pool_level

__all__ = ["hierarchical_attention", "level_spans", "pool_level"]
