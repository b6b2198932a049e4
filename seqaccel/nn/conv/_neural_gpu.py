"""The Neural GPU: convolutional gated recurrent units on a grid over a sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel import _arguments, _common
from seqaccel.functional.conv import GRU_GATES, convolutional_gru
from seqaccel.nn._leaf import Leaf

__all__ = ["ConvolutionalGRU", "NeuralGPU"]


def _odd(title: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    for n in pair:
        _arguments.integer(title, "kernel_size", n, 1)
    if len(pair) != 2 or not all(n % 2 for n in pair):
        raise ValueError(f"{title}: expected kernel_size to be odd, an int or a tuple of two, but got {value!r}")
    return pair


class ConvolutionalGRU(Leaf, nn.Module):
    r"""A convolutional gated recurrent unit: a step from one grid (W, N) of vectors to the next.

    .. math::
        u &= \varphi(K_u * x + b_u), \quad r = \varphi(K_r * x + b_r) \\
        y &= u \odot x + (1 - u) \odot \tanh(K * (r \odot x) + b)

    The convolutions are centred, so it sees both sides and does not stream. The operator is
    :func:`seqaccel.functional.convolutional_gru`.

    Args:
        channels: C, width of a vector.
        kernel_size: an odd int, or a tuple of two, along W and along N. Default: 3
        gates: :math:`\varphi`: ``"hard"``, :math:`\max(0, \min(1, 1.2\,\sigma - 0.1))`, or ``"sigmoid"``.
            Default: ``"hard"``
        bias: whether there are biases. Default: True
        device, dtype: of the parameters.

    Attributes:
        weight_gates: K_u, then K_r, (2 C, C, K_w, K_n), at first uniform with a variance of 1 / (C K_w K_n).
        bias_gates: (2 C,), at first 1: a unit begins by keeping most of what it has.
        weight_candidate: K, (C, C, K_w, K_n), as those of the gates.
        bias_candidate: (C,), at first 0.

    Shape: x and output (B, C, W, N) or (C, W, N).

    Source: Kaiser, Sutskever, Neural GPUs Learn Algorithms, 2016.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> unit = snn.ConvolutionalGRU(24)
        >>> state = torch.randn(2, 24, 4, 17)
        >>> for _ in range(17):
        ...     state = unit(state)
        >>> state.shape
        torch.Size([2, 24, 4, 17])
    """

    weight_gates: Tensor
    bias_gates: Tensor | None
    weight_candidate: Tensor
    bias_candidate: Tensor | None

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        gates: str = "hard",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        _arguments.integer(title, "channels", channels, 1)
        _arguments.flag(title, "bias", bias)
        if gates not in GRU_GATES:
            raise ValueError(f"{title}: expected gates to be one of {GRU_GATES}, but got {gates!r}")
        self.channels, self.kernel_size, self.gates = channels, _odd(title, kernel_size), gates
        for name, outputs in (("gates", 2 * channels), ("candidate", channels)):
            weight = torch.empty(outputs, channels, *self.kernel_size, device=device, dtype=dtype)
            setattr(self, f"weight_{name}", nn.Parameter(weight))
            of_bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
            self.register_parameter(f"bias_{name}", of_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights; gates begin with a bias of 1."""
        for name, start in (("gates", 1.0), ("candidate", 0.0)):
            weight, bias = getattr(self, f"weight_{name}"), getattr(self, f"bias_{name}")
            bound = (3 / weight[0].numel()) ** 0.5
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.constant_(bias, start)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, W, N) or (C, W, N): the grid after one step."""
        if not isinstance(x, Tensor):
            return self._instead("x", x)
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return convolutional_gru(
            x, self.weight_gates, self.bias_gates, self.weight_candidate, self.bias_candidate, gates=self.gates
        )

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, gates={self.gates!r}"
        return text if self.bias_gates is not None else text + ", bias=False"


class NeuralGPU(Leaf, nn.Module):
    r"""Neural GPU: learns an algorithm that transforms a sequence in as many steps as it has positions.

    The embedded tokens are the first of W rows of a grid; the others are zero. A step sends the grid through
    ``num_layers`` convolutional gated recurrent units (:class:`ConvolutionalGRU`), and every step has the same ones.
    After the last step a linear layer reads the first row.

    Args:
        vocabulary: number of tokens.
        channels: C, width of a vector. Default: 24
        width: W, rows of the grid. Default: 4
        num_layers: units of a step. Default: 2
        kernel_size: of the units, odd. Default: 3
        output_vocabulary: number of tokens of the output. Default: ``vocabulary``
        gates: of the units, ``"hard"`` or ``"sigmoid"``. Default: ``"hard"``
        dropout: probability that a value of the grid is zeroed after a step, in training. Default: 0
        device, dtype: of the parameters.

    Shape: tokens (B, N), int64; output, logits of the token at each position, (B, N, output_vocabulary).

    Source: Kaiser, Sutskever, Neural GPUs Learn Algorithms, 2016.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> model = snn.NeuralGPU(4)
        >>> model(torch.randint(4, (2, 17))).shape
        torch.Size([2, 17, 4])
    """

    def __init__(
        self,
        vocabulary: int,
        channels: int = 24,
        width: int = 4,
        num_layers: int = 2,
        kernel_size: int | tuple[int, int] = 3,
        *,
        output_vocabulary: int | None = None,
        gates: str = "hard",
        dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        outputs = vocabulary if output_vocabulary is None else output_vocabulary
        sizes = {"vocabulary": vocabulary, "channels": channels, "width": width, "num_layers": num_layers}
        for name, value in (sizes | {"output_vocabulary": outputs}).items():
            _arguments.integer(title, name, value, 1)
        _arguments.probability(title, "dropout", dropout)
        where = {"device": device, "dtype": dtype}
        self.width, self.dropout = width, dropout
        self.embedding = nn.Embedding(vocabulary, channels, **where)
        self.layers = nn.ModuleList(
            ConvolutionalGRU(channels, kernel_size, gates=gates, **where) for _ in range(num_layers)
        )
        self.output = nn.Linear(channels, outputs, **where)

    @_common.unrecorded
    def _check(self, tokens: Tensor, steps: int | None) -> None:
        title = type(self).__name__
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{title}: expected tokens to be 2-D and torch.int64, but got {tokens.dtype} of {tuple(tokens.shape)}"
            )
        if steps is not None:
            _arguments.integer(title, "steps", steps, 0)

    def forward(self, tokens: Tensor, steps: int | None = None) -> Tensor:
        """tokens (B, N): logits (B, N, output_vocabulary) after ``steps`` steps, by default N."""
        if not isinstance(tokens, Tensor):
            return self._instead("tokens", tokens, steps)
        self._check(tokens, steps)
        grid = F.pad(self.embedding(tokens).transpose(1, 2).unsqueeze(2), (0, 0, 0, self.width - 1))
        for _ in range(tokens.shape[1] if steps is None else steps):
            for layer in self.layers:
                grid = layer(grid)
            grid = F.dropout(grid, self.dropout, self.training)
        return self.output(grid[:, :, 0].transpose(1, 2))

    def extra_repr(self) -> str:
        return f"width={self.width}, dropout={self.dropout}"
