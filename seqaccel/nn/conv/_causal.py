"""A causal convolution as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from seqaccel import _arguments
from seqaccel.functional.conv import PADDING_MODES, causal_conv1d
from seqaccel.nn.conv._base import Convolution, check_chunk, single
from seqaccel.nn.streaming import State, step_at_once

__all__ = ["CausalConv1d", "is_only_forward", "is_plain"]


class CausalConv1d(Convolution):
    r"""Dilated causal 1-D convolution with the parameters of :class:`torch.nn.Conv1d`.

    .. math::
        y_{b,o,t} = \varphi\Bigl(b_o + \sum_{c,k} W_{o,c,k}\, x_{b,c,\,ts-(K-1-k)d}\Bigr)

    Without a stride s the output is as long as the input. Step t sees nothing of x after t s. The operator is
    :func:`seqaccel.functional.causal_conv1d`. ``torch.nn.utils.parametrizations.weight_norm`` works on the module.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: taps K; an int or a tuple of one.
        stride: s: outputs are at every s-th step of x, from the first. Default: 1
        dilation: distance between taps. Default: 1
        groups: blocks of channels convolved apart. Default: 1
        bias: whether there is a bias. Default: True
        padding_mode: what x is before its start: ``"zeros"``, or ``"replicate"``: its first value. Default: "zeros"
        activation: one of :func:`~seqaccel.functional.causal_conv1d`'s, or None; ``"glu"`` and ``"gated"`` halve the
            channels. Default: None
        channels_last: the x and y are (B, T, channels), as a residual is; states stay (B, C, context). Default: False
        device, dtype: of the parameters.

    Attributes:
        weight: (O, C / groups, K), uniform in ±1/sqrt(C/groups · K) at first, as torch.nn.Conv1d's.
        bias: (O,), likewise.

    Shape: x (B, C, T) or (C, T); output (B, O, U) or (O, U), U being T / s rounded up; with ``"glu"`` or ``"gated"``
    O / 2 channels.
    State of B streams: ``(history,)``, history (B, C, (K-1)·dilation); with ``"replicate"`` ``(history, started)``,
    started (B,) saying which streams have a history. A step costs O(K·C·O/groups) and one copy of the history. With a
    stride, ``extend`` takes chunks whose length is a multiple of it, and there is no ``step``.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> conv = snn.CausalConv1d(4, 8, 3, dilation=2, activation="relu")
        >>> y = conv(torch.randn(2, 4, 10))
        >>> state = conv.init_state(2)
        >>> y_t, state = conv.step(torch.randn(2, 4), state)
        >>> y.shape, y_t.shape
        (torch.Size([2, 8, 10]), torch.Size([2, 8]))
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
        padding_mode: str = "zeros",
        activation: str | None = None,
        channels_last: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        self.kernel_size = single(title, "kernel_size", kernel_size)
        self.stride = single(title, "stride", stride)
        self.dilation = single(title, "dilation", dilation)
        self.padding_mode, self.channels_last = padding_mode, channels_last
        _arguments.flag(title, "channels_last", channels_last)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, but got {padding_mode!r}")
        self._create(in_channels, out_channels, groups, bias, activation, device, dtype)

    @property
    def context(self) -> int:
        """How many time steps before the present an output sees: (K-1)·dilation."""
        return (self.kernel_size - 1) * self.dilation

    def forward(
        self,
        x: Tensor,
        *,
        dropout: float = 0.0,
        residual: Tensor | None = None,
        output_activation: str | None = None,
        initial_state: Tensor | None = None,
        return_final_state: bool = False,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """x (B, C, T) or (C, T); the keyword arguments are :func:`~seqaccel.functional.causal_conv1d`'s.

        Without a batch ``reset`` is (T,). With ``cu_seqlens`` the states are (N, C, context) for an x (C, T) too.
        """
        options: dict[str, Any] = {
            "dropout": dropout,
            "output_activation": output_activation,
            "return_final_state": return_final_state,
        }
        if not isinstance(x, Tensor):
            tensors = {"residual": residual, "initial_state": initial_state, "reset": reset, "cu_seqlens": cu_seqlens}
            return self._instead("x", x, **options, **tensors)
        if x.dim() == 2:
            return self._unbatched(
                {"x": x, "residual": residual, "initial_state": initial_state, "reset": reset}, cu_seqlens, **options
            )
        return causal_conv1d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
            padding_mode=self.padding_mode,
            activation=self.activation,
            dropout=dropout,
            residual=residual,
            output_activation=output_activation,
            initial_state=initial_state,
            return_final_state=return_final_state,
            reset=reset,
            cu_seqlens=cu_seqlens,
            channels_last=self.channels_last,
        )

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """``(history,)``: zeros (batch_size, in_channels, context); with ``"replicate"`` ``(history, started)``."""
        state = super().init_state(batch_size, device=device, dtype=dtype)
        if self.padding_mode == "zeros":
            return state
        return *state, torch.zeros(batch_size, device=state[0].device, dtype=torch.bool)

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, C, T): y (B, O, U) and the state after it. T must be a multiple of the stride."""
        layout = "(B, T, C)" if self.channels_last else "(B, C, T)"
        check_chunk(self, x, state, "history", *["started"] * (self.padding_mode != "zeros"), layout=layout)
        time = 1 if self.channels_last else 2
        if self.stride > 1 and x.shape[time] % self.stride:
            raise ValueError(
                f"{type(self).__name__}: expected x of extend to have a multiple of stride={self.stride} steps, but "
                f"got {x.shape[time]}"
            )
        if self.padding_mode == "zeros":
            y, history = self.forward(x, initial_state=state[0], return_final_state=True)
            return y, (history,)
        history, started = state
        if x.shape[time] > 0:
            first = x.narrow(time, 0, 1)
            first = first.transpose(1, 2) if self.channels_last else first
            history = torch.where(started.view(-1, 1, 1), history, first)
            started = torch.ones_like(started)
        y, history = self.forward(x, initial_state=history, return_final_state=True)
        return y, (history, started)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, C): y_t (B, O) and the state after it. Not with a stride."""
        if self.stride > 1:
            raise RuntimeError(
                f"{type(self).__name__}: step has no output at every step of x with stride={self.stride}; call extend "
                "with a multiple of stride steps"
            )
        return step_at_once(self, x_t, state) or self._step(x_t, state, 1 if self.channels_last else 2)


def is_only_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs its ``forward`` and no hook."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_backward_pre_hooks
        or _module._global_backward_hooks
    )


def is_plain(conv: nn.Module, activation: str | None) -> bool:
    """Whether it is a causal convolution without hooks, with this activation, and with no option but its dilation."""
    return (
        isinstance(conv, CausalConv1d)
        and type(conv).forward is CausalConv1d.forward
        and "forward" not in conv.__dict__
        and is_only_forward(conv)
        and (conv.activation, conv.padding_mode) == (activation, "zeros")
        and conv.stride == conv.groups == 1
        and not conv.channels_last
    )
