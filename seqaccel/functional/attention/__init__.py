"""Attention."""

from seqaccel.functional.attention import layouts
from seqaccel.functional.attention.additive import additive_attention, multiplicative_attention
from seqaccel.functional.attention.block_sparse import block_sparse_attention
from seqaccel.functional.attention.decoder import attention_lstm
from seqaccel.functional.attention.hierarchical import hierarchical_attention
from seqaccel.functional.attention.layouts import top_k_layout
from seqaccel.functional.attention.memory import novelty_gate
from seqaccel.functional.attention.pool import attention_pool

__all__ = [
    "additive_attention",
    "attention_lstm",
    "attention_pool",
    "block_sparse_attention",
    "hierarchical_attention",
    "layouts",
    "multiplicative_attention",
    "novelty_gate",
    "top_k_layout",
]
