"""Greedy and beam search through the streaming protocol."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments
from seqaccel.nn.streaming import State

__all__ = ["beam_search"]


def _coverage(attended: Tensor, valid: Tensor) -> Tensor:
    """The sum of log min(1, attention) over the positions that count."""
    least = torch.finfo(torch.float32).tiny  # of a position without any, instead of -infinity
    return attended.float().clamp(least, 1.0).log().masked_fill(~valid, 0).sum(1)


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
    length_offset: float = 0.0,
    coverage_penalty: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""The likeliest sequences that a decoder emits, found step by step.

    A hypothesis y of n tokens has the score

    .. math::
        \sum_t \log p(y_t \mid y_{<t}) \;/\; \Bigl(\frac{\gamma + n}{\gamma + 1}\Bigr)^\alpha
        + \beta \sum_j \log \min\Bigl(1, \sum_t p_{tj}\Bigr)

    where :math:`p_{tj}` is the attention that position j of the source has at step t.

    Args:
        module: a :class:`~seqaccel.nn.Streaming` module whose ``step(tokens, state)`` takes tokens (N,) and returns
            logits (N, V) and the next state.
        state: the state of B streams, before ``start``.
        start: tokens (B,) that begin the sequences; they are no part of the result.
        end: the token that ends a sequence.
        max_length: most tokens of a sequence, ``end`` included.
        beam_size: hypotheses kept for a stream; 1 is greedy search. Default: 1
        length_penalty: :math:`\alpha`. Default: 0
        length_offset: :math:`\gamma`, which GNMT has as 5. Default: 0
        coverage_penalty: :math:`\beta`: prefers hypotheses that attend to every position. The module must have
            ``coverage(state)``, as :class:`~seqaccel.nn.AttentionLSTMDecoder` has. Default: 0

    Returns:
        tokens (B, L) with L ≤ ``max_length``, filled up with ``end``, and scores (B,).

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Source: the penalties: Wu et al., "Google's neural machine translation system", 2016.

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
    for name, number in {
        "length_penalty": length_penalty, "length_offset": length_offset, "coverage_penalty": coverage_penalty,
    }.items():  # fmt: skip
        _arguments.number(where, name, number)
    if length_offset < 0:
        raise ValueError(f"{where}: expected length_offset to be at least 0, but got {length_offset}")
    if coverage_penalty and not hasattr(module, "coverage"):
        raise TypeError(
            f"{where}: coverage_penalty needs a module with coverage(state), but {type(module).__name__} has none"
        )
    batch, device = start.shape[0], start.device
    first = torch.arange(batch, device=device).unsqueeze(1) * beam_size  # (B, 1): a stream's first hypothesis
    state = module.select(state, torch.arange(batch, device=device).repeat_interleave(beam_size))
    tokens = start.repeat_interleave(beam_size).unsqueeze(1)
    # Hypotheses of a stream are equal in the beginning, so only one counts.
    scores = torch.full((batch, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0
    finished = torch.zeros(batch * beam_size, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch * beam_size, dtype=torch.int64, device=device)
    penalties = torch.zeros(batch * beam_size, device=device)

    def normalised(scores: Tensor) -> Tensor:
        """Scores (batch, beam_size, ...) of the hypotheses as they are."""
        scale = ((length_offset + lengths.clamp(min=1).double()) / (length_offset + 1)).pow(length_penalty)
        shape = batch, beam_size, *[1] * (scores.dim() - 2)
        return scores / scale.to(scores.dtype).view(shape) + penalties.to(scores.dtype).view(shape)

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
        if coverage_penalty:
            penalties = torch.where(finished, penalties, coverage_penalty * _coverage(*module.coverage(state)))
        ranked = normalised(total.view(batch, beam_size, vocabulary).double()).view(batch, -1)
        chosen = ranked.topk(beam_size, dim=-1).indices
        scores = total.gather(1, chosen)
        source = (first + chosen // vocabulary).flatten()
        emitted = (chosen % vocabulary).flatten()
        state = module.select(state, source)
        tokens = torch.cat([tokens[source], emitted.unsqueeze(1)], 1)
        finished = finished[source] | (emitted == end)
        lengths, penalties = lengths[source], penalties[source]
        if finished.all():
            break
    scores = normalised(scores)
    best = scores.argmax(1)
    return tokens[first.squeeze(1) + best, 1:], scores.gather(1, best.unsqueeze(1)).squeeze(1)
