"""The gated convolutional language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel import _arguments
from seqaccel.functional.conv import last_steps
from seqaccel.nn.conv._base import ConvStream
from seqaccel.nn.conv._wavenet import GatedConv1d
from seqaccel.nn.streaming import State

__all__ = ["GatedConvLM"]


class GatedConvLM(ConvStream):
    r"""Gated convolutional language model: an embedding, blocks of gated convolutions, a projection onto all words.

    .. math::
        h^{(0)} &= \mathrm{glu}(W_0 * \mathrm{embedding}(u)), \qquad \mathrm{glu}(W * x) = (A * x + a) \odot
        \sigma(B * x + b) \\
        h^{(l+1)} &= h^{(l)} + \mathrm{glu}(W_3 * \mathrm{glu}(W_2 * \mathrm{glu}(W_1 * h^{(l)}))) \\
        y &= P h^{(L)} + p

    W_0 and W_2 have K taps and are causal; W_1 and W_3 are 1×1 and go down to the bottleneck and up again. Without a
    bottleneck a block is one convolution: :math:`h^{(l+1)} = h^{(l)} + \mathrm{glu}(W_1 * h^{(l)})`.

    Args:
        num_embeddings: number of words V.
        embedding_dim: features of a word. Default: 128
        channels: of h. Default: 512
        num_layers: number of blocks L. Default: 8
        kernel_size: taps K. Default: 25
        bottleneck_channels: rows of W_1 and W_2; None: no bottleneck. Default: 128
        dropout: probability, after the embedding and every gated convolution, in training. Default: 0
        cutoffs: those of :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`, which then takes the projection's place; the
            output is the log-probabilities. Default: a :class:`torch.nn.Linear` onto all words
        device, dtype: of the parameters.

    Attributes:
        embedding: :class:`torch.nn.Embedding`.
        input: W_0, a :class:`GatedConv1d`.
        blocks: ``torch.nn.ModuleList`` of ``torch.nn.ModuleList`` of :class:`GatedConv1d`.
        projection: :class:`torch.nn.Linear` or :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`.
        receptive_field: time steps that an output sees, itself included.

    Shape: x (B, T) int64; output (B, T, V).
    State of B streams: a tuple of histories (B, channels, K-1) of the convolutions with K taps.

    Raises:
        TypeError, ValueError: an argument's type or value does not fit; the message says which one.

    Source: Dauphin, Fan, Auli, Grangier, Language Modeling with Gated Convolutional Networks, 2017. The paper's weight
    norm is ``torch.nn.utils.parametrizations.weight_norm`` of each convolution.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> model = snn.GatedConvLM(50, 8, 16, num_layers=2, kernel_size=4, bottleneck_channels=4)
        >>> words = torch.randint(50, (2, 12))
        >>> model(words).shape
        torch.Size([2, 12, 50])
        >>> model.loss(words[:, :-1], words[:, 1:]).backward()
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int = 128,
        channels: int = 512,
        num_layers: int = 8,
        kernel_size: int = 25,
        *,
        bottleneck_channels: int | None = 128,
        dropout: float = 0.0,
        cutoffs: Sequence[int] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        for name, value in {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "channels": channels,
            "num_layers": num_layers,
            "kernel_size": kernel_size,
        }.items():
            _arguments.integer(title, name, value, 1)
        if bottleneck_channels is not None:
            _arguments.integer(title, "bottleneck_channels", bottleneck_channels, 1)
        _arguments.probability(title, "dropout", dropout)
        if cutoffs is not None and (not isinstance(cutoffs, Sequence) or isinstance(cutoffs, str)):
            raise TypeError(f"{title}: expected cutoffs to be a list of ints, but got {type(cutoffs).__name__}")
        self.num_embeddings, self.channels, self.kernel_size, self.dropout = (
            num_embeddings,
            channels,
            kernel_size,
            dropout,
        )
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(num_embeddings, embedding_dim, **where)
        self.input = GatedConv1d(embedding_dim, channels, kernel_size, **where)
        narrow = bottleneck_channels
        shapes = (
            [(channels, channels, kernel_size)]
            if narrow is None
            else [(channels, narrow, 1), (narrow, narrow, kernel_size), (narrow, channels, 1)]
        )
        self.blocks = nn.ModuleList(
            nn.ModuleList(GatedConv1d(*shape, **where) for shape in shapes) for _ in range(num_layers)
        )
        self.projection: nn.Linear | nn.AdaptiveLogSoftmaxWithLoss = (
            nn.Linear(channels, num_embeddings, **where)
            if cutoffs is None
            else nn.AdaptiveLogSoftmaxWithLoss(channels, num_embeddings, list(cutoffs), **where)
        )

    def reset_parameters(self) -> None:
        """Draws the parameters as torch.nn's modules of these kinds do."""
        for module in (self.embedding, *self._convolutions(), self.projection):
            module.reset_parameters()

    def _blocks(self) -> list[list[GatedConv1d]]:
        return [cast(list[GatedConv1d], list(cast(nn.ModuleList, block))) for block in self.blocks]

    def _convolutions(self) -> list[GatedConv1d]:
        return [self.input, *(conv for block in self._blocks() for conv in block)]

    def _with_history(self) -> list[GatedConv1d]:
        return [self.input, *(block[len(block) // 2] for block in self._blocks())]

    def forward(self, x: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """x (B, T) int64: logits (B, T, V), with ``cutoffs`` log-probabilities.

        ``reset`` (B, T) bool: a document begins where it is true, and sees no word before.
        """
        if not isinstance(x, Tensor):
            return self._instead("x", x, reset=reset)
        self._check(x, reset)
        return self._projected(self._run(x, None, reset)[0])

    def loss(self, x: Tensor, target: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of the words ``target`` (B, T) int64 that follow each word of x (B, T).

        With ``cutoffs`` it costs less than the log-probabilities of all words. ``reset`` as in ``forward``.
        """
        self._check(x, reset)
        _arguments.tensor(type(self).__name__, "target", target)
        if target.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: expected target to have shape {tuple(x.shape)}, but got {tuple(target.shape)}"
            )
        h = self._run(x, None, reset)[0].flatten(0, 1)
        if isinstance(self.projection, nn.AdaptiveLogSoftmaxWithLoss):
            return self.projection(h, target.flatten()).loss
        return F.cross_entropy(self.projection(h), target.flatten())

    def _check(self, x: Tensor, reset: Tensor | None) -> None:
        title = type(self).__name__
        _arguments.tensor(title, "x", x)
        if x.dim() != 2:
            raise ValueError(f"{title}: expected x to be 2D (B, T), but got a tensor of size {list(x.shape)}")
        if reset is not None:
            _arguments.reset(title, reset, tuple(x.shape), x.device)

    def _projected(self, h: Tensor) -> Tensor:
        if isinstance(self.projection, nn.AdaptiveLogSoftmaxWithLoss):
            return self.projection.log_prob(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        return self.projection(h)

    def _run(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, State]:
        """h (B, T, channels), and where a state is given the one after it."""
        dropout = self.dropout if self.training else 0.0
        histories: list[Any] = [None] * (len(self.blocks) + 1) if state is None else list(state)
        after = []
        h = F.dropout(self.embedding(x), dropout, training=dropout > 0).transpose(1, 2)
        if state is not None:
            after.append(last_steps(histories[0], h, reset))
        episodes = {} if reset is None else {"reset": reset}
        h = self.input(h, dropout=dropout, initial_state=histories[0], **episodes)
        for block, history in zip(self._blocks(), histories[1:], strict=True):
            z = h
            for i, conv in enumerate(block):
                residual = h if i == len(block) - 1 else None
                if i != len(block) // 2:
                    z = conv(z, dropout=dropout, residual=residual)
                    continue
                if state is not None:
                    after.append(last_steps(history, z, reset))
                z = conv(z, dropout=dropout, residual=residual, initial_state=history, **episodes)
            h = z
        return h.transpose(1, 2), tuple(after)

    def extend(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """x (B, T) int64: output (B, T, V) and the state after it; ``reset`` as in ``forward``."""
        self._check(x, reset)
        _arguments.states(type(self).__name__, "state", state, ("history",) * (len(self.blocks) + 1))
        h, after = self._run(x, state, reset)
        return self._projected(h), after

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B,) int64: output (B, V) and the state after it."""
        return self._step(x_t, state, 1, "1D (B,)")

    def extra_repr(self) -> str:
        return f"receptive_field={self.receptive_field}, dropout={self.dropout}"
