"""The temporal convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from seqaccel import _arguments
from seqaccel.functional.conv import last_steps
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.checkpoints import Checkpoints
from seqaccel.nn.conv._causal import CausalConv1d, check_chunk, check_step
from seqaccel.nn.streaming import State, Streaming, step_at_once

__all__ = ["TCN", "TemporalBlock"]


class TemporalBlock(Leaf, Streaming, nn.Module):
    r"""One level of a :class:`TCN`.

    .. math::
        z &= \mathrm{dropout}(\mathrm{relu}(W_1 * x + b_1)) \\
        y &= \mathrm{relu}(x' + \mathrm{dropout}(\mathrm{relu}(W_2 * z + b_2)))

    with causal dilated convolutions, weights W = g·v/‖v‖ (the norm over each output channel), and x' = x, or its 1×1
    convolution ``downsample`` where the numbers of channels differ. Each line is one operator.

    Args:
        in_channels, out_channels: numbers of channels.
        kernel_size: taps of both convolutions.
        dilation: of both.
        dropout: probability, in training. Default: 0.2

    State: ``(history of conv1, history of conv2)``.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> block = snn.TemporalBlock(4, 8, kernel_size=3, dilation=2)
        >>> block(torch.randn(2, 4, 10)).shape
        torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int,
        dropout: float = 0.2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options = {
            "dilation": dilation,
            "activation": "relu",
            "device": device,
            "dtype": dtype,
        }
        self.conv1 = weight_norm(CausalConv1d(in_channels, out_channels, kernel_size, **options))
        self.conv2 = weight_norm(CausalConv1d(out_channels, out_channels, kernel_size, **options))
        self.downsample = (
            CausalConv1d(in_channels, out_channels, 1, device=device, dtype=dtype)
            if in_channels != out_channels
            else None
        )
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter as torch.nn.Conv1d does, but the weight of ``downsample`` from N(0, 0.01²).

        That is what locuslab's code does in effect: it overwrites ``conv1.weight`` and ``conv2.weight`` too, but those
        are recomputed from g and v, which it leaves alone.
        """
        self.conv1.reset_parameters()
        self.conv2.reset_parameters()
        if self.downsample is not None:
            self.downsample.reset_parameters()
            nn.init.normal_(self.downsample.weight, 0.0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, T): y (B, O, T)."""
        if not isinstance(x, Tensor):
            return self._instead("x", x)
        return self._run(x, None, None)[1]

    def _run(self, x: Tensor, history1: Tensor | None, history2: Tensor | None) -> tuple[Tensor, Tensor]:
        dropout = self.dropout if self.training else 0.0
        z = self.conv1(x, dropout=dropout, initial_state=history1)
        residual = x if self.downsample is None else self.downsample(x)
        y = self.conv2(
            z,
            dropout=dropout,
            residual=residual,
            output_activation="relu",
            initial_state=history2,
        )
        return z, y

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """``(history of conv1, history of conv2)``: zeros (batch_size, channels, context)."""
        where = {"device": device, "dtype": dtype}
        return (
            *self.conv1.init_state(batch_size, **where),
            *self.conv2.init_state(batch_size, **where),
        )

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, C, T): y (B, O, T) and the state after it."""
        check_chunk(self, x, state, "history of conv1", "history of conv2")
        z, y = self._run(x, *state)
        return y, (last_steps(state[0], x), last_steps(state[1], z))

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, C): y_t (B, O) and the state after it."""
        found = step_at_once(self, x_t, state)
        if found is not None:
            return found
        check_step(self, x_t)
        y, state = self.extend(x_t.unsqueeze(-1), state)
        return y.squeeze(-1), state


class TCN(Leaf, Streaming, Checkpoints, nn.Module):
    r"""Temporal convolutional network: a stack of :class:`TemporalBlock`, level i with dilation 2^i.

    Constructor, forward and checkpoints of locuslab's ``TemporalConvNet``: its state_dict loads, with old-style weight
    norm (``weight_g``, ``weight_v``) or torch's parametrizations, with or without its duplicates
    ``network.{i}.net.0.*`` (conv1) and ``network.{i}.net.4.*`` (conv2).

    Args:
        num_inputs: input channels.
        num_channels: output channels of each level.
        kernel_size: taps of every convolution. Default: 2
        dropout: probability, in training. Default: 0.2
        device, dtype: of the parameters.

    Attributes:
        network: ``torch.nn.Sequential`` of the blocks. Parameters of level i: ``network.{i}.conv{1,2}.bias``,
            ``network.{i}.conv{1,2}.parametrizations.weight.original{0,1}`` (g and v) and
            ``network.{i}.downsample.{weight,bias}``.
        receptive_field: time steps that an output sees, itself included.

    Shape: x (B, num_inputs, T); output (B, num_channels[-1], T).
    State of B streams: a tuple of the blocks' states.

    Source: Bai, Kolter, Koltun, An Empirical Evaluation of Generic Convolutional and Recurrent Networks, 2018.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> tcn = snn.TCN(4, [8, 8], kernel_size=3).eval()
        >>> x = torch.randn(2, 4, 10)
        >>> state = tcn.init_state(2)
        >>> first, state = tcn.extend(x[..., :7], state)
        >>> rest, state = tcn.extend(x[..., 7:], state)
        >>> torch.allclose(torch.cat([first, rest], -1), tcn(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        num_inputs: int,
        num_channels: Sequence[int],
        kernel_size: int = 2,
        dropout: float = 0.2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_channels, Sequence) or isinstance(num_channels, str):
            raise TypeError(f"TCN: expected num_channels to be a list of ints, but got {type(num_channels).__name__}")
        num_channels = list(num_channels)
        if not num_channels:
            raise ValueError("num_channels must not be empty")
        for width in num_channels:
            _arguments.integer("TCN", "num_channels", width, 1)
        _arguments.integer("TCN", "num_inputs", num_inputs, 1)
        _arguments.integer("TCN", "kernel_size", kernel_size, 1)
        _arguments.number("TCN", "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
        self.num_inputs, self.num_channels, self.kernel_size, self.dropout = (
            num_inputs,
            num_channels,
            kernel_size,
            dropout,
        )
        widths = [num_inputs, *num_channels]
        self.network = nn.Sequential(
            *(
                TemporalBlock(widths[i], widths[i + 1], kernel_size, 2**i, dropout, device, dtype)
                for i in range(len(num_channels))
            )
        )

    @property
    def _blocks(self) -> list[TemporalBlock]:
        return cast(list[TemporalBlock], list(self.network))

    @property
    def receptive_field(self) -> int:
        return 1 + 2 * sum((self.kernel_size - 1) * 2**i for i in range(len(self.num_channels)))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, num_inputs, T): y (B, num_channels[-1], T)."""
        if not isinstance(x, Tensor):
            return self._instead("x", x)
        return self.network(x)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """A tuple of the blocks' states, all zeros."""
        return tuple(block.init_state(batch_size, device=device, dtype=dtype) for block in self._blocks)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, num_inputs, T): y (B, num_channels[-1], T) and the state after it."""
        _arguments.tensor("TCN", "x", x)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.num_channels):
            raise TypeError(f"TCN: expected state to be a tuple of {len(self.num_channels)} levels' states")
        states = []
        for block, block_state in zip(self._blocks, state, strict=True):
            x, block_state = block.extend(x, block_state)
            states.append(block_state)
        return x, tuple(states)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, num_inputs): y_t (B, num_channels[-1]) and the state after it."""
        found = step_at_once(self, x_t, state)
        if found is not None:
            return found
        check_step(self, x_t)
        y, state = self.extend(x_t.unsqueeze(-1), state)
        return y.squeeze(-1), state

    def extra_repr(self) -> str:
        return f"{self.num_inputs}, {self.num_channels}, kernel_size={self.kernel_size}, dropout={self.dropout}"
