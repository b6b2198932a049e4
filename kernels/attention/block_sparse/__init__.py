"""Block-sparse attention in Triton.

A list per query block names the key blocks that it sees, and one per key block the query blocks that see it; both are
made from the layout by torch's operators. Forward, and for the gradient of the query, a program takes BM queries of one
block and runs through the first list in tiles of BN keys. For the gradients of key and value a program takes BN keys of
one block and runs through the second list, for all query heads of its key head: no atomics.

    p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)

A query that sees no key has lse = -inf, and gives and takes 0. Products of float32 are IEEE unless torch's TF32 switch
is on. Scores, sums and gradients are float32.
"""

from seqaccel.kernels.attention.block_sparse.launchers import (
    CONFIGURATIONS,
    block_sparse_attention_backward,
    block_sparse_attention_forward,
)

__all__ = ["CONFIGURATIONS", "block_sparse_attention_backward", "block_sparse_attention_forward"]
