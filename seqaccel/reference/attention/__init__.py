"""Attention in plain PyTorch."""

from seqaccel.reference.attention.additive import additive_weights, masked_softmax
from seqaccel.reference.attention.block_sparse import block_sparse_attention, visible
from seqaccel.reference.attention.decoder import attention_lstm, attention_lstm_step
from seqaccel.reference.attention.hierarchical import attention_pool, hierarchical_attention, level_spans, pool_level
from seqaccel.reference.attention.memory import novelty_gate

__all__ = [
    "additive_weights",
    "attention_lstm",
    "attention_lstm_step",
    "attention_pool",
    "block_sparse_attention",
    "hierarchical_attention",
    "level_spans",
    "masked_softmax",
    "novelty_gate",
    "pool_level",
    "visible",
]
