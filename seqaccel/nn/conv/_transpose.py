"""A causal transposed convolution as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqaccel import _arguments
from seqaccel.functional.conv import ACTIVATIONS, GATED, causal_conv_transpose1d
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.conv._causal import check_chunk, check_step, single
from seqaccel.nn.streaming import State, Streaming

__all__ = ["CausalConvTranspose1d"]


class CausalConvTranspose1d(Leaf, Streaming, nn.Module):
    r"""Causal transposed 1-D convolution with the parameters of :class:`torch.nn.ConvTranspose1d`.

    A sequence becomes ``stride`` times as long: T steps give the first T·stride outputs of torch's module, which has
    more on the right. The operator is :func:`seqaccel.functional.causal_conv_transpose1d`.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: taps K; an int or a tuple of one.
        stride: outputs per step of x. Default: 1
        dilation: distance between taps, in outputs. Default: 1
        groups: blocks of channels convolved apart. Default: 1
        bias: whether there is a bias. Default: True
        activation: one of :func:`~seqaccel.functional.causal_conv1d`'s, or None; ``"glu"`` and ``"gated"`` halve the
            channels. Default: None
        device, dtype: of the parameters.

    Attributes:
        weight: (C, O / groups, K), uniform in ±1/sqrt(O/groups · K) at first, as torch.nn.ConvTranspose1d's.
        bias: (O,), likewise.

    Shape: x (B, C, T) or (C, T); output (B, O, T·stride) or (O, T·stride), with ``"glu"`` or ``"gated"`` O / 2
    channels.

    State of B streams: ``(history,)``, history (B, C, (K-1)·dilation // stride). A step gives ``stride`` outputs,
    (B, O, stride).

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> conv = snn.CausalConvTranspose1d(4, 8, 6, stride=3)
        >>> y = conv(torch.randn(2, 4, 10))
        >>> y_t, state = conv.step(torch.randn(2, 4), conv.init_state(2))
        >>> y.shape, y_t.shape
        (torch.Size([2, 8, 30]), torch.Size([2, 8, 3]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        *,
        stride: int | tuple[int] = 1,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = single(title, "kernel_size", kernel_size)
        self.stride = single(title, "stride", stride)
        self.dilation = single(title, "dilation", dilation)
        self.activation = activation
        _arguments.integer(title, "in_channels", in_channels, 0)
        _arguments.integer(title, "out_channels", out_channels, 0)
        _arguments.integer(title, "groups", groups, 1)
        _arguments.flag(title, "bias", bias)
        if in_channels % groups:
            raise ValueError(f"in_channels must be divisible by groups, but got {in_channels} and {groups}")
        if out_channels % groups:
            raise ValueError(f"out_channels must be divisible by groups, but got {out_channels} and {groups}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, but got {activation!r}")
        if activation in GATED and out_channels % 2:
            raise ValueError(f"out_channels must be even for activation={activation!r}, but got {out_channels}")
        factory = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels // groups, self.kernel_size, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **factory))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as torch.nn.ConvTranspose1d does."""
        if self.weight.numel() == 0:
            return
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def context(self) -> int:
        """How many time steps of x before the present an output sees: (K-1)·dilation // stride."""
        return (self.kernel_size - 1) * self.dilation // self.stride

    def forward(self, x: Tensor, *, initial_state: Tensor | None = None, return_final_state: bool = False) -> Any:
        """x (B, C, T) or (C, T); the keyword arguments are :func:`~seqaccel.functional.causal_conv_transpose1d`'s."""
        if not isinstance(x, Tensor):
            return self._instead("x", x, initial_state=initial_state, return_final_state=return_final_state)
        unbatched = x.dim() == 2
        if unbatched:
            _arguments.optional_tensors(type(self).__name__, initial_state=initial_state)
            x = x.unsqueeze(0)
            initial_state = None if initial_state is None else initial_state.unsqueeze(0)
        found = causal_conv_transpose1d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
        if not unbatched:
            return found
        return tuple(t.squeeze(0) for t in found) if return_final_state else found.squeeze(0)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """``(history,)``: zeros (batch_size, in_channels, context)."""
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        shape = (batch_size, self.in_channels, self.context)
        return (torch.zeros(shape, device=device or self.weight.device, dtype=dtype or self.weight.dtype),)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, C, T): y (B, O, T·stride) and the state after it."""
        check_chunk(self, x, state, "history")
        y, history = self.forward(x, initial_state=state[0], return_final_state=True)
        return y, (history,)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, C): the step's outputs (B, O, stride) and the state after it."""
        check_step(self, x_t)
        return self.extend(x_t.unsqueeze(-1), state)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name in ("stride", "dilation", "groups"):
            if getattr(self, name) != 1:
                text += f", {name}={getattr(self, name)}"
        if self.bias is None:
            text += ", bias=False"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text
