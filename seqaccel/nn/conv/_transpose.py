"""A causal transposed convolution as a module."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqaccel.functional.conv import causal_conv_transpose1d
from seqaccel.nn.conv._base import Convolution, check_chunk, check_step, single
from seqaccel.nn.streaming import State

__all__ = ["CausalConvTranspose1d"]


class CausalConvTranspose1d(Convolution):
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

    transposed = True

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
        self.kernel_size = single(title, "kernel_size", kernel_size)
        self.stride = single(title, "stride", stride)
        self.dilation = single(title, "dilation", dilation)
        self._create(in_channels, out_channels, groups, bias, activation, device, dtype)

    @property
    def context(self) -> int:
        """How many time steps of x before the present an output sees: (K-1)·dilation // stride."""
        return (self.kernel_size - 1) * self.dilation // self.stride

    def forward(
        self,
        x: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        reset: Tensor | None = None,
    ) -> Any:
        """x (B, C, T) or (C, T); the keyword arguments are :func:`~seqaccel.functional.causal_conv_transpose1d`'s."""
        if not isinstance(x, Tensor):
            options: dict[str, Any] = {"initial_state": initial_state, "return_final_state": return_final_state}
            return self._instead("x", x, **options, reset=reset)
        if x.dim() == 2:
            tensors = {"x": x, "initial_state": initial_state, "reset": reset}
            return self._unbatched(tensors, return_final_state=return_final_state)
        return causal_conv_transpose1d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            initial_state=initial_state,
            return_final_state=return_final_state,
            reset=reset,
        )

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, C, T): y (B, O, T·stride) and the state after it."""
        check_chunk(self, x, state, "history")
        y, history = self.forward(x, initial_state=state[0], return_final_state=True)
        return y, (history,)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, C): the step's outputs (B, O, stride) and the state after it."""
        check_step(self, x_t)
        return self.extend(x_t.unsqueeze(-1), state)
