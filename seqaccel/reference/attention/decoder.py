"""The recurrence of an attention decoder, step by step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel.reference.attention.additive import additive_weights, masked_softmax
from seqaccel.reference.rnn import lstm_cell

__all__ = ["attention_lstm", "attention_lstm_step"]

Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def attention_lstm_step(
    x: Tensor,  # (B, 4H)
    h: Tensor,  # (B, H)
    c: Tensor,  # (B, H)
    running: Tensor | None,  # (B, 1): which sequences have this step
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_weight: Tensor | None,
    query_bias: Tensor | None,
    score_weight: Tensor | None,
    context_weight: Tensor,
    weight_hh: Tensor,
) -> Step:
    """The new h and c, and this step's output (B, H), context (B, M) and weights (B, S)."""
    seen = None if mask is None else mask.unsqueeze(1)
    query = (h if query_weight is None else F.linear(h, query_weight, query_bias)).unsqueeze(1)
    if score_weight is None:
        weights = masked_softmax(query @ key.transpose(1, 2), seen)
    else:
        weights = additive_weights(query, key, score_weight, seen)
    context, weights = (weights @ value).squeeze(1), weights.squeeze(1)
    gates = x + F.linear(context, context_weight)
    h_new, c_new = lstm_cell(gates, h, c, (None, weight_hh, None, None, None))
    assert c_new is not None
    if running is None:
        return h_new, c_new, h_new, context, weights
    output, context, weights = (t.masked_fill(~running, 0) for t in (h_new, context, weights))
    return torch.where(running, h_new, h), torch.where(running, c_new, c), output, context, weights


def attention_lstm(
    pre: Tensor,  # (B, T, 4H): the input's part of the gates, with biases
    key: Tensor,  # (B, S, A)
    value: Tensor,  # (B, S, M)
    mask: Tensor | None,  # (B, S), true where a step attends to a key
    lengths: Tensor | None,  # (B,)
    h_0: Tensor,  # (B, H)
    c_0: Tensor,  # (B, H)
    query_weight: Tensor | None,  # (A, H); None: the query is h
    query_bias: Tensor | None,  # (A,)
    score_weight: Tensor | None,  # (A,): additive attention; None: dot products
    context_weight: Tensor,  # (4H, M)
    weight_hh: Tensor,  # (4H, H)
) -> Step:
    """Outputs (B, T, H), the last h and c (B, H), contexts (B, T, M) and weights of the attention (B, T, S).

    A step attends with the h before it: context_t = attention(h_{t-1}), h_t, c_t = LSTM(pre_t + W context_t, h_{t-1},
    c_{t-1}). Past a sequence's length outputs, contexts and weights are 0 and the state stays.
    """
    constants = (key, value, mask, query_weight, query_bias, score_weight, context_weight, weight_hh)
    h, c, steps = h_0, c_0, []
    for t, x in enumerate(pre.unbind(1)):  # whose backward pass is one, not one a step
        running = None if lengths is None else (t < lengths).unsqueeze(1)
        h, c, *of_step = attention_lstm_step(x, h, c, running, *constants)
        steps.append(of_step)
    if not steps:
        B, S, M = value.shape
        return h.new_zeros(B, 0, h.shape[1]), h, c, value.new_zeros(B, 0, M), value.new_zeros(B, 0, S)
    output, context, weights = (torch.stack(parts, 1) for parts in zip(*steps, strict=True))
    return output, h, c, context, weights
