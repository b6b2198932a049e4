"""A causal convolution as a module."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from seqaccel import _arguments
from seqaccel.functional.conv import ACTIVATIONS, GATED, PADDING_MODES, causal_conv1d
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import State, Streaming, step_at_once

__all__ = ["CausalConv1d", "check_chunk", "check_step", "single"]


def check_chunk(module: nn.Module, x: Tensor, state: State, *names: str, layout: str = "(B, C, T)") -> None:
    title = type(module).__name__
    _arguments.tensor(title, "x", x)
    _arguments.states(title, "state", state, names)
    if x.dim() != 3:
        raise ValueError(f"{title}: expected x to be 3D {layout}, but got a tensor of size {list(x.shape)}")


def check_step(module: nn.Module, x_t: Tensor) -> None:
    title = type(module).__name__
    _arguments.tensor(title, "x_t", x_t)
    if x_t.dim() != 2:
        raise ValueError(f"{title}: expected x_t to be 2D (B, C), but got a tensor of size {list(x_t.shape)}")


def single(title: str, name: str, value: int | tuple[int]) -> int:
    """An int of at least 1, or a tuple of one."""
    if isinstance(value, (tuple, list)):
        if len(value) != 1:
            raise ValueError(f"{title}: expected {name} to be an int or a tuple of one, but got {value!r}")
        value = value[0]
    _arguments.integer(title, name, value)
    if value < 1:
        raise ValueError(f"{name} must be a positive integer, but got {value}")
    return value


class CausalConv1d(Leaf, Streaming, nn.Module):
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
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = single(title, "kernel_size", kernel_size)
        self.stride = single(title, "stride", stride)
        self.dilation = single(title, "dilation", dilation)
        self.padding_mode, self.activation, self.channels_last = padding_mode, activation, channels_last
        _arguments.integer(title, "in_channels", in_channels, 0)
        _arguments.integer(title, "out_channels", out_channels, 0)
        single(title, "groups", groups)
        _arguments.flags(title, bias=bias, channels_last=channels_last)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}, but got {padding_mode!r}")
        if in_channels % groups:
            raise ValueError(f"in_channels must be divisible by groups, but got {in_channels} and {groups}")
        if out_channels % groups:
            raise ValueError(f"out_channels must be divisible by groups, but got {out_channels} and {groups}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, but got {activation!r}")
        if activation in GATED and out_channels % 2:
            raise ValueError(f"out_channels must be even for activation={activation!r}, but got {out_channels}")
        self.weight = nn.Parameter(
            torch.empty(
                out_channels,
                in_channels // groups,
                self.kernel_size,
                device=device,
                dtype=dtype,
            )
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """With a parametrization too, such as weight norm, whose modules torch refuses to pickle."""
        kind = type(self).__mro__[1] if is_parametrized(self) else type(self)
        state = {**self.__dict__, "_load_state_dict_pre_hooks": OrderedDict()}
        for key, hook in self._load_state_dict_pre_hooks.items():
            if "weight_norm.<locals>" not in getattr(
                getattr(hook, "hook", hook), "__qualname__", ""
            ):  # a local function
                state["_load_state_dict_pre_hooks"][key] = hook
        return object.__new__, (kind,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        parametrizations: Any = self._modules.get("parametrizations")
        if parametrizations is not None and not all(hasattr(type(self), name) for name in parametrizations):
            parametrize._inject_new_class(self)
            for name, applied in parametrizations.items():
                parametrize._inject_property(self, name)
                if type(applied[0]).__name__ == "_WeightNorm" and name == "weight":  # loads the older form
                    self._load_state_dict_pre_hooks.update(weight_norm(nn.Linear(1, 1))._load_state_dict_pre_hooks)

    def reset_parameters(self) -> None:
        """Draws the parameters as torch.nn.Conv1d does, through the weight's parametrization where there is one."""
        weight = self.weight.detach()
        if weight.numel() == 0:
            return
        bound = (weight.shape[1] * self.kernel_size) ** -0.5
        nn.init.uniform_(weight, -bound, bound)
        if is_parametrized(self, "weight"):
            self.weight = weight  # type: ignore[assignment]
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

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
    ) -> Any:
        """x (B, C, T) or (C, T); the keyword arguments are :func:`~seqaccel.functional.causal_conv1d`'s."""
        if not isinstance(x, Tensor):
            given = {"residual": residual, "output_activation": output_activation, "initial_state": initial_state}
            return self._instead("x", x, dropout=dropout, return_final_state=return_final_state, **given)
        unbatched = x.dim() == 2
        if unbatched:
            _arguments.optional_tensors(type(self).__name__, residual=residual, initial_state=initial_state)
            x = x.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
            initial_state = None if initial_state is None else initial_state.unsqueeze(0)
        found = causal_conv1d(
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
            channels_last=self.channels_last,
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
        """``(history,)``: zeros (batch_size, in_channels, context); with ``"replicate"`` ``(history, started)``."""
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        weight = self.weight
        device = device or weight.device
        history = torch.zeros(batch_size, self.in_channels, self.context, device=device, dtype=dtype or weight.dtype)
        if self.padding_mode == "zeros":
            return (history,)
        return history, torch.zeros(batch_size, device=device, dtype=torch.bool)

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
        found = step_at_once(self, x_t, state)
        if found is not None:
            return found
        check_step(self, x_t)
        if self.stride > 1:
            raise RuntimeError(
                f"{type(self).__name__}: step has no output at every step of x with stride={self.stride}; call extend "
                "with a multiple of stride steps"
            )
        time = 1 if self.channels_last else 2
        y, state = self.extend(x_t.unsqueeze(time), state)
        return y.squeeze(time), state

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        if self.stride != 1:
            text += f", stride={self.stride}"
        if self.dilation != 1:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.channels_last:
            text += ", channels_last=True"
        return text
