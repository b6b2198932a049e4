"""Attention in plain PyTorch."""

from seqaccel.reference.attention.block_sparse import block_sparse_attention, visible
from seqaccel.reference.attention.hierarchical import hierarchical_attention, level_spans, pool_level

__all__ = ["block_sparse_attention", "hierarchical_attention", "level_spans", "pool_level", "visible"]
