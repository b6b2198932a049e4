"""Attention: in ``torch.nn.MultiheadAttention``'s place, Transformer encoders of it, and that of translation models."""

from seqaccel.nn.attention._additive import AdditiveAttention, MultiplicativeAttention
from seqaccel.nn.attention._block_sparse import BlockSparseAttention
from seqaccel.nn.attention._decoder import GNMT, AttentionLSTMDecoder
from seqaccel.nn.attention._encoder import HierarchicalAttentionEncoder
from seqaccel.nn.attention._hierarchical import HierarchicalAttention
from seqaccel.nn.attention._memory import NoveltyMemory

__all__ = [
    "GNMT",
    "AdditiveAttention",
    "AttentionLSTMDecoder",
    "BlockSparseAttention",
    "HierarchicalAttention",
    "HierarchicalAttentionEncoder",
    "MultiplicativeAttention",
    "NoveltyMemory",
]

for _name in __all__:
    globals()[_name].__module__ = __name__  # what a pickle names: the files inside may be divided otherwise one day
