"""Greedy and beam search through the streaming protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments
from seqaccel.nn.streaming import State

__all__ = ["beam_search"]


@torch.no_grad()
def beam_search(
    module: Any,
    state: State,
    start: Tensor,
    *,
    end: int,
    max_length: int,
    beam_size: int = 1,
    length_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""The likeliest sequences that a decoder emits, found step by step.

    A hypothesis y of n tokens has the score :math:`\sum_t \log p(y_t \mid y_{<t}) / n^\alpha`.

    Args:
        module: a :class:`~seqaccel.nn.Streaming` module whose ``step(tokens, state)`` takes tokens (N,) and returns
            logits (N, V) and the next state.
        state: the state of B streams, before ``start``.
        start: tokens (B,) that begin the sequences; they are no part of the result.
        end: the token that ends a sequence.
        max_length: most tokens of a sequence, ``end`` included.
        beam_size: hypotheses kept for a stream; 1 is greedy search. Default: 1
        length_penalty: :math:`\alpha`. Default: 0

    Returns:
        tokens (B, L) with L ≤ ``max_length``, filled up with ``end``, and scores (B,).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> decoder = snn.PervasiveAttention(10, 10, 8, num_layers=2, growth_rate=8).eval()
        >>> state = decoder.init_state(torch.randint(10, (2, 7)))
        >>> start = torch.zeros(2, dtype=torch.int64)
        >>> tokens, scores = snn.decoding.beam_search(decoder, state, start, end=1, max_length=5, beam_size=3)
        >>> scores.shape
        torch.Size([2])
    """
    where = "beam_search"
    _arguments.tensor(where, "start", start)
    if start.dim() != 1 or start.dtype != torch.int64:
        raise ValueError(
            f"{where}: expected start to be 1-D and torch.int64, but got {start.dtype} of {tuple(start.shape)}"
        )
    for name, value, least in (("end", end, 0), ("max_length", max_length, 1), ("beam_size", beam_size, 1)):
        _arguments.integer(where, name, value, least)
    _arguments.number(where, "length_penalty", length_penalty)
    batch, device = start.shape[0], start.device
    first = torch.arange(batch, device=device).unsqueeze(1) * beam_size  # (B, 1): a stream's first hypothesis
    state = module.select(state, torch.arange(batch, device=device).repeat_interleave(beam_size))
    tokens = start.repeat_interleave(beam_size).unsqueeze(1)
    # Hypotheses of a stream are equal in the beginning, so only one counts.
    scores = torch.full((batch, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0
    finished = torch.zeros(batch * beam_size, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch * beam_size, dtype=torch.int64, device=device)
    for _ in range(max_length):
        logits, state = module.step(tokens[:, -1], state)
        if not 0 <= end < logits.shape[-1]:
            raise ValueError(f"{where}: expected end to be a token below {logits.shape[-1]}, but got {end}")
        gains = torch.log_softmax(logits.float(), -1)
        gains[finished] = -torch.inf  # what has ended only repeats its end
        gains[finished, end] = 0
        vocabulary = gains.shape[-1]
        total = (scores.view(-1, 1) + gains).view(batch, beam_size * vocabulary)
        lengths += ~finished
        scale = lengths.clamp(min=1).double().pow(length_penalty).view(batch, beam_size)
        ranked = (total.view(batch, beam_size, vocabulary) / scale.unsqueeze(-1)).view(batch, -1)
        chosen = ranked.topk(beam_size, dim=-1).indices
        scores = total.gather(1, chosen)
        source = (first + chosen // vocabulary).flatten()
        emitted = (chosen % vocabulary).flatten()
        state = module.select(state, source)
        tokens = torch.cat([tokens[source], emitted.unsqueeze(1)], 1)
        finished = finished[source] | (emitted == end)
        lengths = lengths[source]
        if finished.all():
            break
    scores = scores / lengths.clamp(min=1).to(scores.dtype).pow(length_penalty).view(batch, beam_size)
    best = scores.argmax(1)
    return tokens[first.squeeze(1) + best, 1:], scores.gather(1, best.unsqueeze(1)).squeeze(1)
