"""The weights of additive attention in Triton.

    p_ij = softmax_j(e_ij),  e_ij = sum_h w_h tanh(q_ih + k_jh)

Lanes hold neighbouring h. Forward, a program takes BM queries and BN keys and runs through h; a second kernel turns the
logits of a row into weights, in place. Backward, with t = tanh(q_ih + k_jh) calculated again,

    s_ij = p_ij (grad p_ij - sum_j p_ij grad p_ij)
    grad q_ih = w_h sum_j s_ij (1 - t^2),  grad k_jh = w_h sum_i s_ij (1 - t^2),  grad w_h = sum_ij s_ij t

One kernel gives s. In the other a program takes BH of h and some tiles of keys and runs through all queries: it sums
grad k in registers, and its part of grad q in memory of its own. torch adds the parts, in their order: no atomics.
A pair with s = 0, as one that the mask hides, adds nothing, whatever its query and key are.

Sums are float32, and so are the weights.
"""

from seqaccel.kernels.attention.additive.launchers import (
    CONFIGURATIONS,
    additive_attention_backward,
    additive_attention_forward,
)

__all__ = ["CONFIGURATIONS", "additive_attention_backward", "additive_attention_forward"]
