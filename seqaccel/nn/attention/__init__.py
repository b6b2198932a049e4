"""Attention in ``torch.nn.MultiheadAttention``'s place."""

from seqaccel.nn.attention._block_sparse import BlockSparseAttention
from seqaccel.nn.attention._hierarchical import HierarchicalAttention

__all__ = ["BlockSparseAttention", "HierarchicalAttention"]

for _name in __all__:
    globals()[_name].__module__ = __name__  # what a pickle names: the files inside may be divided otherwise one day
