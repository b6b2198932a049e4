"""The models of the language-model demo: what they are of seqaccel, and what a user would have run instead."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqaccel

VOCABULARY = 256


class Recurrent(nn.Module):
    """A recurrent module (T, B, H), seqaccel's or torch's, as the body of a model: (B, T, H) to (B, T, H)."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)

    def init_state(self, batch_size: int):
        return self.rnn.init_state(batch_size)

    def step(self, x_t: Tensor, state):
        return self.rnn.step(x_t, state)

    def truncated(self, x: Tensor, k: int) -> Tensor:
        """``forward``, but each output from its latest k inputs only."""
        return seqaccel.functional.truncated(self.rnn, x.transpose(0, 1), k).transpose(0, 1)


class Bounded(Recurrent):
    """A recurrent module behind tanh: the proof of a stable LSTM needs inputs of at most 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.tanh())

    def step(self, x_t: Tensor, state):
        return super().step(x_t.tanh(), state)

    def truncated(self, x: Tensor, k: int) -> Tensor:
        return super().truncated(x.tanh(), k)


class Convolutional(nn.Module):
    """A convolutional network (B, H, T) as the body of a model."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.transpose(1, 2)).transpose(1, 2)

    def init_state(self, batch_size: int):
        return self.network.init_state(batch_size)

    def step(self, x_t: Tensor, state):
        return self.network.step(x_t, state)


class Conv1dTCN(nn.Module):
    """seqaccel's TCN from ``F.conv1d``: blocks of two weight-normed causal convolutions and a residual."""

    def __init__(self, channels: int, num_levels: int, kernel_size: int) -> None:
        super().__init__()

        def convolution(level: int) -> nn.Module:
            layer = nn.Conv1d(channels, channels, kernel_size, dilation=2**level)
            return nn.utils.parametrizations.weight_norm(layer)

        self.blocks = nn.ModuleList(nn.ModuleList(convolution(level) for _ in range(2)) for level in range(num_levels))

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.blocks:
            y = x
            for layer in layers:
                past = (layer.kernel_size[0] - 1) * layer.dilation[0]
                y = F.relu(F.conv1d(F.pad(y, (past, 0)), layer.weight, layer.bias, dilation=layer.dilation))
            x = F.relu(x + y)
        return x


class DenseAttention(nn.Module):
    """Causal dense self-attention with the parameters of ``torch.nn.MultiheadAttention``."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, w, b).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


class CausalConv1d(nn.Conv1d):
    """A causal convolution (B, H, T)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - 1, 0)))


class Transformer(nn.Module):
    """Pre-norm blocks of causal attention and a feed-forward network on (B, T, H).

    Sinusoidal positions and a short causal convolution of the input come first. The convolution tells a position which
    bytes are before it, which attention alone takes thousands of steps to learn.
    """

    def __init__(self, hidden_size: int, attentions: list[nn.Module], convolution: nn.Module) -> None:
        super().__init__()
        self.convolution = convolution
        self.attentions = nn.ModuleList(attentions)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(2 * len(attentions)))
        self.feed_forwards = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size))
            for _ in attentions
        )
        frequency = torch.exp(torch.arange(0, hidden_size, 2) * (-math.log(1e4) / hidden_size))
        self.register_buffer("frequency", frequency, persistent=False)

    def positions(self, t: Tensor) -> Tensor:
        angle = t[..., None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        for i, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            y = self.norms[2 * i](x)
            x = x + attention(y, y, y)[0]
            x = x + feed_forward(self.norms[2 * i + 1](x))
        return x

    def init_state(self, batch_size: int):
        age = torch.zeros(batch_size, dtype=torch.long, device=self.frequency.device)
        states = tuple(attention.init_state(batch_size) for attention in self.attentions)
        return age, self.convolution.init_state(batch_size), states

    def step(self, x_t: Tensor, state):
        age, before, states = state
        y, before = self.convolution.step(x_t, before)
        x, after = x_t + y + self.positions(age), []
        for i, (attention, feed_forward) in enumerate(zip(self.attentions, self.feed_forwards, strict=True)):
            y, new = attention.step(self.norms[2 * i](x), states[i])
            after.append(new)
            x = x + y
            x = x + feed_forward(self.norms[2 * i + 1](x))
        return x, (age + 1, before, tuple(after))


class LanguageModel(nn.Module):
    """Embedding, body, linear: bytes (B, T) to logits (B, T, 256)."""

    def __init__(self, hidden_size: int, body: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden_size)
        self.body = body
        self.head = nn.Linear(hidden_size, VOCABULARY)
        nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))

    def init_state(self, batch_size: int):
        return self.body.init_state(batch_size)

    def step(self, tokens_t: Tensor, state):
        """Bytes (B,) to logits (B, 256)."""
        y, state = self.body.step(self.embedding(tokens_t), state)
        return self.head(y), state


def lstm(size: int, layers: int) -> nn.Module:
    return Recurrent(seqaccel.nn.LSTM(size, size, layers))


def torch_lstm(size: int, layers: int) -> nn.Module:
    return Recurrent(nn.LSTM(size, size, layers))


def bounded_rnn(size: int, layers: int) -> nn.Module:
    return Bounded(seqaccel.nn.RNN(size, size, layers))


def bounded_lstm(size: int, layers: int) -> nn.Module:
    return Bounded(seqaccel.nn.LSTM(size, size, layers))


def sru(size: int, layers: int) -> nn.Module:
    return Recurrent(seqaccel.nn.SRU(size, size, layers))


def tcn(size: int, layers: int) -> nn.Module:
    return Convolutional(seqaccel.nn.TCN(size, [size] * layers, kernel_size=3, dropout=0.0))


def conv1d_tcn(size: int, layers: int) -> nn.Module:
    return Convolutional(Conv1dTCN(size, layers, kernel_size=3))


def hierarchical(size: int, layers: int) -> nn.Module:
    heads = size // 64
    attentions = [seqaccel.nn.HierarchicalAttention(size, heads, batch_first=True) for _ in range(layers)]
    return Transformer(size, attentions, seqaccel.nn.CausalConv1d(size, size, 4))


def dense(size: int, layers: int) -> nn.Module:
    return Transformer(size, [DenseAttention(size, size // 64) for _ in range(layers)], CausalConv1d(size, 4))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A pair of contenders and the sizes at which they are compared."""

    title: str
    stock_title: str
    ours: Callable[[int, int], nn.Module]
    stock: Callable[[int, int], nn.Module]
    hidden_size: int
    num_layers: int
    batch_size: int
    length: int
    steps: int
    learning_rate: float
    paired: bool = True  # both have the same parameters, in the same order where their names differ
    learning_rate_of_ours: float | None = None  # where it is another one
    forget: float = 0.64  # of a stable LSTM: the largest value of a forget gate


RECIPES = {
    "lstm": Recipe("LSTM", "torch.nn.LSTM", lstm, torch_lstm, 384, 1, 8, 256, 250, 3e-3),
    "sru": Recipe("SRU", "torch.nn.LSTM", sru, torch_lstm, 256, 2, 16, 256, 220, 4e-3, paired=False),
    "tcn": Recipe("TCN", "F.conv1d", tcn, conv1d_tcn, 128, 5, 8, 512, 300, 3e-3),
    "attention": Recipe("hierarchical attention", "dense attention", hierarchical, dense, 256, 2, 1, 4096, 190, 2e-3),
}
# Pairs of the same model, whose first is kept stable.
STABLE = {
    "rnn": Recipe("stable RNN", "RNN", bounded_rnn, bounded_rnn, 256, 1, 16, 256, 300, 2e-3),
    "lstm": Recipe(
        "stable LSTM",
        "LSTM",
        bounded_lstm,
        bounded_lstm,
        hidden_size=256,
        num_layers=1,
        batch_size=16,
        length=64,
        steps=300,
        learning_rate=3e-3,
        learning_rate_of_ours=1e-2,
        forget=0.9,
    ),
}


def same_start(ours: nn.Module, stock: nn.Module, paired: bool) -> None:
    """Gives ``stock`` the weights of ``ours``: by name, and in order where the names differ."""
    source, target = dict(ours.named_parameters()), dict(stock.named_parameters())
    with torch.no_grad():
        shared = [name for name in target if name in source and target[name].shape == source[name].shape]
        for name in shared:
            target[name].copy_(source[name])
        rest = [name for name in target if name not in shared]
        if paired and rest:
            others = [value for name, value in source.items() if name not in shared and "pool_query" not in name]
            for name, value in zip(rest, others, strict=True):
                target[name].copy_(value.view_as(target[name]))
