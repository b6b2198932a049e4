"""Pervasive attention: a convolutional network over the grid of target and source positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel import _arguments, _common
from seqaccel.functional.conv import causal_conv2d
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.conv._causal2d import CausalConv2d
from seqaccel.nn.streaming import State, Streaming

__all__ = ["PervasiveAttention"]

POOLING = ("max", "mean", "sum")
NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class _DenseLayer(nn.Module):
    """norm, relu, 1×1 to ``4 growth``, norm, relu, causal 2-D convolution to ``growth``; on (B, T, S, C)."""

    def __init__(self, channels: int, growth: int, kernel_size: int, norm: Any, where: dict[str, Any]) -> None:
        super().__init__()
        inner = 4 * growth
        self.norm1 = norm(channels, **where)
        self.reduce = nn.Linear(channels, inner, bias=False, **where)
        self.norm2 = norm(inner, **where)
        self.conv = CausalConv2d(inner, growth, kernel_size, **where)

    def forward(self, x: Tensor, valid: Tensor | None, history: Tensor | None) -> tuple[Tensor, Tensor]:
        """New features (B, T, S, growth), and what the convolution sees, (B, 4 growth, T, S)."""
        rows = x.flatten(0, 2)
        inner = torch.relu(self.norm2(self.reduce(torch.relu(self.norm1(rows)))))
        seen = inner.view(*x.shape[:3], inner.shape[-1])
        if valid is not None:
            seen = seen * valid[:, None, :, None]
        seen = seen.permute(0, 3, 1, 2).contiguous()
        new = causal_conv2d(seen, self.conv.weight, self.conv.bias, initial_state=history)
        return new.permute(0, 2, 3, 1), seen


class PervasiveAttention(Leaf, Streaming, nn.Module):
    r"""Translates one sequence into another with a DenseNet over the grid (target position × source position).

    With embeddings s of the source and e of the target, which is shifted by one,

    .. math::
        x^0_{t,j} &= W [s_j; e_t] \\
        x^{l} &= [x^{l-1};\ \mathrm{dropout}(K_l * \mathrm{relu}(\mathrm{norm}(V_l\,
            \mathrm{relu}(\mathrm{norm}(x^{l-1})))))] \\
        y_t &= U\, \mathrm{pool}_j\, \mathrm{relu}(\mathrm{norm}(x^L_{t,j})) + b

    The convolution K_l sees (k+1)/2 rows of the target, the present one and those before it, and k positions of the
    source with j in their middle. So y_t depends on the whole source and on the target up to t only.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens.
        embedding_dim: width of both embeddings.
        num_layers: L, the dense layers. Default: 8
        growth_rate: channels that a layer adds. Default: 32
        kernel_size: k, odd. Default: 5
        channels: width of x^0. Default: ``embedding_dim``
        pooling: over the source positions that are not padding: ``"max"``, ``"mean"``, or ``"sum"``, which is divided
            by the square root of their number. Default: ``"max"``
        norm: ``"layer"`` or ``"batch"``. Batch norm, as published, mixes positions in training: then an output sees the
            statistics of later ones. Default: ``"layer"``
        max_positions: learned embeddings of so many positions are added to both sides; None: none are. Default: None
        dropout: probability, in training: of embeddings, of a layer's new features and of what is pooled. Default: 0.2
        device, dtype: of the parameters.

    Shape: source (B, S) and target (B, T), int64; ``source_padding_mask`` (B, S) bool, true where a token is padding;
    output, the logits of the tokens that follow: (B, T, target_vocabulary).
    State of B streams: ``(source, valid, position, histories)``: x^0's part of the source (B, channels, S), which of
    its positions count (B, S), the number of tokens so far (B,), and for each layer the rows that its convolution still
    sees (B, 4·growth_rate, (k-1)/2, S).

    Source: Elbayad, Besacier, Verbeek, Pervasive Attention, 2018.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> model = snn.PervasiveAttention(12, 10, 16, num_layers=3, growth_rate=8).eval()
        >>> source, target = torch.randint(12, (2, 7)), torch.randint(10, (2, 5))
        >>> logits = model(source, target)
        >>> state = model.init_state(source)
        >>> first, state = model.extend(target[:, :3], state)
        >>> last, state = model.extend(target[:, 3:], state)
        >>> torch.allclose(torch.cat([first, last], 1), logits, atol=1e-5)
        True
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        embedding_dim: int,
        num_layers: int = 8,
        growth_rate: int = 32,
        kernel_size: int = 5,
        channels: int | None = None,
        pooling: str = "max",
        norm: str = "layer",
        max_positions: int | None = None,
        dropout: float = 0.2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        channels = embedding_dim if channels is None else channels
        sizes = {
            "source_vocabulary": source_vocabulary,
            "target_vocabulary": target_vocabulary,
            "embedding_dim": embedding_dim,
            "num_layers": num_layers,
            "growth_rate": growth_rate,
            "kernel_size": kernel_size,
            "channels": channels,
        }
        for name, value in sizes.items():
            _arguments.integer(title, name, value, 1)
        if kernel_size % 2 == 0:
            raise ValueError(f"{title}: expected kernel_size to be odd, but got {kernel_size}")
        if pooling not in POOLING:
            raise ValueError(f"{title}: expected pooling to be one of {POOLING}, but got {pooling!r}")
        if norm not in NORMS:
            raise ValueError(f"{title}: expected norm to be one of {tuple(NORMS)}, but got {norm!r}")
        if max_positions is not None:
            _arguments.integer(title, "max_positions", max_positions, 1)
        _arguments.probability(title, "dropout", dropout)
        self.kernel_size, self.pooling, self.dropout, self.max_positions = kernel_size, pooling, dropout, max_positions
        where = {"device": device, "dtype": dtype}
        self.source_embedding = nn.Embedding(source_vocabulary, embedding_dim, **where)
        self.target_embedding = nn.Embedding(target_vocabulary, embedding_dim, **where)
        self.source_positions = None if max_positions is None else nn.Embedding(max_positions, embedding_dim, **where)
        self.target_positions = None if max_positions is None else nn.Embedding(max_positions, embedding_dim, **where)
        self.source_projection = nn.Linear(embedding_dim, channels, bias=False, **where)
        self.target_projection = nn.Linear(embedding_dim, channels, bias=False, **where)
        self.layers = nn.ModuleList(
            _DenseLayer(channels + i * growth_rate, growth_rate, kernel_size, NORMS[norm], where)
            for i in range(num_layers)
        )
        width = channels + num_layers * growth_rate
        self.norm = NORMS[norm](width, **where)
        self.output = nn.Linear(width, target_vocabulary, **where)

    def _embedded(
        self, tokens: Tensor, embedding: nn.Embedding, positions: nn.Embedding | None, first: Tensor | None
    ) -> Tensor:
        x = embedding(tokens)
        if positions is not None:
            length = tokens.shape[1]
            self._check_positions(length, first)
            at = torch.ones_like(tokens).cumsum(1) - 1  # sharded as the tokens are
            x = x + positions(at if first is None else at + first.unsqueeze(1))
        return F.dropout(x, self.dropout, self.training)

    @_common.unrecorded
    def _check_positions(self, length: int, first: Tensor | None) -> None:
        if torch.compiler.is_compiling() or length == 0:
            return
        most = length if first is None or first.numel() == 0 else int(first.max()) + length
        if self.max_positions is not None and most > self.max_positions:
            raise ValueError(
                f"{type(self).__name__}: expected at most max_positions={self.max_positions} positions, but got {most}"
            )

    @_common.unrecorded
    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        title = type(self).__name__
        _arguments.tensor(title, name, tokens)
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{title}: expected {name} to be 2-D and torch.int64, but got {tokens.dtype} of {tuple(tokens.shape)}"
            )

    def _source(self, source: Tensor, source_padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x^0's part of the source, (B, S, channels), and which positions count, (B, S); None: all."""
        self._check_tokens("source", source)
        if source_padding_mask is not None:
            _arguments.mask(type(self).__name__, "source_padding_mask", source_padding_mask, tuple(source.shape))
        x = self.source_projection(self._embedded(source, self.source_embedding, self.source_positions, None))
        return x, None if source_padding_mask is None else ~source_padding_mask

    def _run(
        self,
        source: Tensor,
        valid: Tensor | None,
        target: Tensor,
        position: Tensor | None,
        histories: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        e = self._embedded(target, self.target_embedding, self.target_positions, position)
        x = source.unsqueeze(1) + self.target_projection(e).unsqueeze(2)  # (B, T, S, channels)
        kept = []
        for i, layer in enumerate(self.layers):
            new, seen = layer(x, valid, None if histories is None else histories[i])
            x = torch.cat([x, F.dropout(new, self.dropout, self.training)], -1)
            if histories is not None:
                rows = histories[i].shape[2]
                joined = torch.cat([histories[i], seen], 2)
                kept.append(joined[:, :, joined.shape[2] - rows :].contiguous())
        x = torch.relu(self.norm(x.flatten(0, 2))).view(x.shape)
        return self.output(F.dropout(self._pooled(x, valid), self.dropout, self.training)), tuple(kept)

    def _pooled(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Over the source positions that count; zero where none does."""
        if not torch.jit.is_tracing() and x.shape[2] == 0:
            return x.sum(2)
        if self.pooling == "max":  # no value is below zero, so that positions that do not count may be zero
            return (x if valid is None else x * valid[:, None, :, None]).amax(2)
        if valid is None:
            total, count = x.sum(2), x.new_full((x.shape[0], 1, 1), x.shape[2])
        else:
            total = (x * valid[:, None, :, None]).sum(2)
            count = valid.sum(1).clamp(min=1).to(x.dtype).view(-1, 1, 1)
        return total / (count if self.pooling == "mean" else count.sqrt())

    def forward(self, source: Tensor, target: Tensor, source_padding_mask: Tensor | None = None) -> Tensor:
        """source (B, S), target (B, T): logits (B, T, target_vocabulary)."""
        if not isinstance(source, Tensor):
            return self._instead("source", source, target, source_padding_mask)
        self._check_tokens("target", target)
        self._check_batch("target", target, source.shape[0])
        x, valid = self._source(source, source_padding_mask)
        return self._run(x, valid, target, None, None)[0]

    @_common.unrecorded
    def _check_batch(self, name: str, tokens: Tensor, batch: int) -> None:
        if tokens.shape[0] != batch:
            raise ValueError(
                f"{type(self).__name__}: expected {name} to have a batch of {batch} as source has, "
                f"but got {tokens.shape[0]}"
            )

    def init_state(self, source: Tensor, source_padding_mask: Tensor | None = None) -> State:  # type: ignore[override]
        """The state of the streams that will be decoded from ``source`` (B, S)."""
        x, valid = self._source(source, source_padding_mask)
        if valid is None:
            valid = torch.ones_like(source, dtype=torch.bool)
        return self._fresh(x, valid)

    def _fresh(self, source: Tensor, valid: Tensor) -> State:
        batch, length, _ = source.shape
        histories = tuple(
            source.new_zeros(batch, layer.conv.in_channels, (self.kernel_size - 1) // 2, length)  # type: ignore
            for layer in self.layers
        )
        return source, valid, torch.zeros(batch, dtype=torch.int64, device=source.device), histories

    def _matching_state(self, state: State, first: Tensor) -> State:
        return self._fresh(state[0], state[1])

    def extend(self, target: Tensor, state: State) -> tuple[Tensor, State]:
        """target (B, T): logits (B, T, target_vocabulary) of the tokens that follow, and the state after it."""
        self._check_tokens("target", target)
        if not isinstance(state, (tuple, list)) or len(state) != 4:
            raise TypeError(f"{type(self).__name__}: expected state to be what init_state returns")
        source, valid, position, histories = state
        self._check_batch("target", target, source.shape[0])
        logits, histories = self._run(source, valid, target, position, histories)
        return logits, (source, valid, position + target.shape[1], histories)

    def step(self, target_t: Tensor, state: State) -> tuple[Tensor, State]:
        """target_t (B,): logits (B, target_vocabulary) and the state after it."""
        _arguments.tensor(type(self).__name__, "target_t", target_t)
        if target_t.dim() != 1:
            raise ValueError(
                f"{type(self).__name__}: expected target_t to be 1-D (B,), but got a tensor of {list(target_t.shape)}"
            )
        logits, state = self.extend(target_t.unsqueeze(1), state)
        return logits.squeeze(1), state

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, pooling={self.pooling!r}, dropout={self.dropout}"
