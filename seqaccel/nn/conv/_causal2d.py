"""A convolution of a grid, causal along one dimension, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.conv import causal_conv2d
from seqaccel.nn.conv._base import Convolution
from seqaccel.nn.streaming import State

__all__ = ["CausalConv2d"]


def _pair(title: str, name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{title}: expected {name} to be an int or a tuple of two, but got {value!r}")
    for n in pair:
        _arguments.integer(title, name, n, 1)
    return pair


class CausalConv2d(Convolution):
    r"""2-D convolution of a grid (T, S), causal along T and centred along S.

    .. math::
        y_{b,o,t,s} = \varphi\Bigl(b_o + \sum_{c,k,l} W_{o,c,k,l}\,
            x_{b,c,\,t-(K_t-1-k)d_t,\,s+(l-\lfloor K_s/2\rfloor)d_s}\Bigr)

    The output has the grid of the input, and row t sees no later row: the convolution of pervasive attention (Elbayad
    et al., 2018), with target steps along T and source steps along S. The operator is
    :func:`seqaccel.functional.causal_conv2d`.

    The weight holds the taps that count only. A masked k x k kernel has zeros in its k // 2 last rows; this one has
    the other (k + 1) // 2 rows, and takes over the weight of a masked one by ``conv.load_masked(weight)``.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: an int k, odd, for the (k + 1) // 2 causal rows of a k x k kernel; or a tuple (K_t, K_s), K_s odd,
            of which all rows count.
        dilation: distance between taps, an int or a tuple (d_t, d_s). Default: 1
        groups: blocks of channels convolved apart. Default: 1
        bias: whether there is a bias. Default: True
        activation: one of :func:`~seqaccel.functional.causal_conv1d`'s, or None; ``"glu"`` and ``"gated"`` halve the
            channels. Default: None
        device, dtype: of the parameters.

    Attributes:
        weight: (O, C / groups, K_t, K_s), uniform in ±1/sqrt(C/groups · K_t · K_s) at first.
        bias: (O,), likewise.

    Shape: x (B, C, T, S) or (C, T, S); output (B, O, T, S) or (O, T, S), with ``"glu"`` or ``"gated"`` O / 2 channels.
    State of B streams over rows: ``(history,)``, history (B, C, (K_t-1)·d_t, S). A step takes a row x_t (B, C, S).

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> conv = snn.CausalConv2d(4, 8, 5, activation="relu")
        >>> y = conv(torch.randn(2, 4, 6, 9))
        >>> state = conv.init_state(2)
        >>> y_t, state = conv.step(torch.randn(2, 4, 9), state)
        >>> conv.weight.shape, y.shape, y_t.shape
        (torch.Size([8, 4, 3, 5]), torch.Size([2, 8, 6, 9]), torch.Size([2, 8, 9]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        rows, columns = _pair(title, "kernel_size", kernel_size)
        if columns % 2 == 0:
            raise ValueError(f"{title}: expected an odd kernel_size along S, but got {kernel_size!r}")
        self.kernel_size = (rows if isinstance(kernel_size, (tuple, list)) else (rows + 1) // 2, columns)
        self.dilation = _pair(title, "dilation", dilation)
        self._create(in_channels, out_channels, groups, bias, activation, device, dtype)

    def load_masked(self, weight: Tensor) -> None:
        """Takes over the weight (O, C / groups, K, K_s) of a masked kernel: of its K = 2 K_t - 1 rows the first K_t."""
        rows, columns = self.kernel_size
        _arguments.tensor(type(self).__name__, "weight", weight)
        expected = (*self.weight.shape[:2], 2 * rows - 1, columns)
        if weight.shape != expected:
            raise ValueError(
                f"{type(self).__name__}: expected weight to have shape {expected}, but got {tuple(weight.shape)}"
            )
        with torch.no_grad():
            self.weight.copy_(weight[:, :, :rows])

    @property
    def context(self) -> int:
        """How many rows before the present one an output sees: (K_t-1)·d_t."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(
        self,
        x: Tensor,
        *,
        dropout: float = 0.0,
        residual: Tensor | None = None,
        output_activation: str | None = None,
        initial_state: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, T, S) or (C, T, S); the keyword arguments are :func:`~seqaccel.functional.causal_conv2d`'s."""
        if not isinstance(x, Tensor):
            given = {"residual": residual, "output_activation": output_activation, "initial_state": initial_state}
            given["reset"] = reset
            return self._instead("x", x, dropout=dropout, **given)
        if x.dim() == 3:
            tensors = {"x": x, "residual": residual, "initial_state": initial_state, "reset": reset}
            return self._unbatched(tensors, dropout=dropout, output_activation=output_activation)
        return causal_conv2d(
            x,
            self.weight,
            self.bias,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            dropout=dropout,
            residual=residual,
            output_activation=output_activation,
            initial_state=initial_state,
            reset=reset,
        )

    def init_state(
        self,
        batch_size: int,
        *,
        width: int = 0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """``(history,)``: zeros (batch_size, in_channels, context, width).

        Args:
            batch_size: number of streams.
            width: columns S of a row. Default: those of the first row that comes.
            device, dtype: of the state; the parameters' by default.
        """
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        _arguments.integer(type(self).__name__, "width", width, 0)
        shape = (batch_size, self.in_channels, self.context, width)
        device, dtype = device or self.weight.device, dtype or self.weight.dtype
        return (torch.zeros(shape, device=device, dtype=dtype),)

    def _matching_state(self, state: State, first: Tensor) -> State:
        return (torch.zeros_like(first),)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Rows x (B, C, T, S): y (B, O, T, S) and the state after them."""
        title = type(self).__name__
        _arguments.tensor(title, "x", x)
        _arguments.states(title, "state", state, ("history",))
        if x.dim() != 4:
            raise ValueError(f"{title}: expected x to be 4D (B, C, T, S), but got a tensor of size {list(x.shape)}")
        (history,) = state
        if history.dim() == 4 and history.shape[3] == 0:
            history = history.new_zeros(*history.shape[:3], x.shape[3])
        last = torch.cat([history, x], 2).narrow(2, x.shape[2], history.shape[2])
        return self.forward(x, initial_state=history), (last.contiguous(),)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """A row x_t (B, C, S): y_t (B, O, S) and the state after it."""
        return self._step(x_t, state, 2, "3D (B, C, S)")
