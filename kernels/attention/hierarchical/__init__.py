"""Hierarchical attention in Triton.

Node j of level l stands for the tokens [j S_l, (j + 1) S_l). With c_l = t // S_l, the query at t sees it iff

    |c_l - j| >= w (level >= 1), and its parent does not exist, is not complete, or is nearer than w to c_{l+1},

and, where causal, it ends at t or before. So for a tile of queries of one aligned block the nodes of a level are one
run (causal: all on the left) or at most three, and for a tile of nodes the queries are one run (causal) or two; both
follow from the tile's place alone. A program takes BM queries (forward, gradient of the query) or BN nodes of any level
(gradients of key and value, no atomics: the parts of a node's queries are summed on the way down); the gradient then
flows down the pyramid, a program a node.

    p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)

Products of float32 are IEEE unless torch's TF32 switch is on. Scores, sums and gradients are float32.
"""

from seqaccel.kernels.attention.hierarchical.launchers import (
    CONFIGURATIONS,
    hierarchical_attention_backward,
    hierarchical_attention_forward,
)

__all__ = ["CONFIGURATIONS", "hierarchical_attention_backward", "hierarchical_attention_forward"]
