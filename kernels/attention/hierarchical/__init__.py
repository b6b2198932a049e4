"""Hierarchical attention in Triton.

Node j of level l stands for the tokens [j S_l, (j + 1) S_l). With c_l = t // S_l, the query at t sees it iff

    |c_l - j| >= w (level >= 1), and its parent does not exist, is not complete, or is nearer than w to c_{l+1},

and, where causal, it ends at t or before. A query therefore sees one run of nodes per level (causal: all on the left),
or at most three, and so does all of its block. A tile of nodes is seen by one run of queries (causal), or two. Both
follow from the position alone.

Forward, and for the gradient of the query, a program takes BM queries: a part of a block, or as many neighbouring
blocks as fit. It loads the runs of all its queries, and a mask removes what a query does not see. Neighbours share most
keys. Counted for the forward pass with T = 8192, blocks of 64, fanout 64, two local blocks, causal, 16 bits and 64
dimensions, mean over the programs of a head:

    queries of a program   keys loaded   per query   steps of BN keys   scores per query
    one block of 64            190          2.97       6.4 of 32             206
    two blocks                 254          1.98       4.5 of 64             285

For the gradients of key and value a program takes BN nodes of any level; the parts of a node's queries are summed on
the way down, without atomics. The gradient flows down the pyramid, one program per node. Tokens come last: a program
takes BN of them, adds their share of their node's gradient and writes them once, in their dtype.

Queries are the last Tq of T positions. Of a row with padding the kernels read its tokens alone, ``lengths`` of them;
its nodes lie where those of T tokens would.

    p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)

Products of float32 are IEEE unless torch's TF32 switch is on. Scores, sums and gradients are float32.
"""

from seqaccel.kernels.attention.hierarchical.launchers import (
    CONFIGURATIONS,
    hierarchical_attention_backward,
    hierarchical_attention_forward,
)

__all__ = ["CONFIGURATIONS", "hierarchical_attention_backward", "hierarchical_attention_forward"]
