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
from seqaccel.functional.conv import ACTIVATIONS, GATED, causal_conv1d
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import State, Streaming

__all__ = ["CausalConv1d", "check_chunk", "check_step", "next_history"]


def next_history(history: Tensor, x: Tensor) -> Tensor:
    """The last time steps of ``history`` followed by ``x``, as many as ``history`` has; shares no memory with them."""
    context, length = history.shape[-1], x.shape[-1]
    if torch.compiler.is_compiling():  # for any length, and with strides that do not depend on it
        last = torch.cat([history, x], -1).narrow(-1, length, context)
    elif length >= context:
        last = x[..., length - context :]
    else:
        return torch.cat([history[..., length:], x], -1)
    return last.clone(memory_format=torch.contiguous_format)


def check_chunk(module: nn.Module, x: Tensor, state: State, *names: str) -> None:
    title = type(module).__name__
    _arguments.tensor(title, "x", x)
    _arguments.states(title, "state", state, names)
    if x.dim() != 3:
        raise ValueError(f"{title}: expected x to be 3D (B, C, T), but got a tensor of size {list(x.shape)}")


def check_step(module: nn.Module, x_t: Tensor) -> None:
    title = type(module).__name__
    _arguments.tensor(title, "x_t", x_t)
    if x_t.dim() != 2:
        raise ValueError(f"{title}: expected x_t to be 2D (B, C), but got a tensor of size {list(x_t.shape)}")


def _single(title: str, name: str, value: int | tuple[int]) -> int:
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
        y_{b,o,t} = \varphi\Bigl(b_o + \sum_{c,k} W_{o,c,k}\, x_{b,c,\,t-(K-1-k)d}\Bigr)

    The output is as long as the input, and step t sees nothing after t. The operator is
    :func:`seqaccel.functional.causal_conv1d`. ``torch.nn.utils.parametrizations.weight_norm`` works on the module.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: taps K; an int or a tuple of one.
        dilation: distance between taps. Default: 1
        groups: blocks of channels convolved apart. Default: 1
        bias: whether there is a bias. Default: True
        activation: one of :func:`~seqaccel.functional.causal_conv1d`'s, or None; ``"glu"`` and ``"gated"`` halve the
            channels. Default: None
        device, dtype: of the parameters.

    Attributes:
        weight: (O, C / groups, K), uniform in ±1/sqrt(C/groups · K) at first, as torch.nn.Conv1d's.
        bias: (O,), likewise.

    Shape: x (B, C, T) or (C, T); output (B, O, T) or (O, T), with ``"glu"`` or ``"gated"`` O / 2 channels.
    State of B streams: ``(history,)``, history (B, C, (K-1)·dilation). A step costs O(K·C·O/groups) and one copy of the
    history.

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
        self.kernel_size = _single(title, "kernel_size", kernel_size)
        self.dilation = _single(title, "dilation", dilation)
        self.activation = activation
        _arguments.integer(title, "in_channels", in_channels, 0)
        _arguments.integer(title, "out_channels", out_channels, 0)
        _single(title, "groups", groups)
        _arguments.flag(title, "bias", bias)
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
        history: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, T) or (C, T); the keyword arguments are :func:`~seqaccel.functional.causal_conv1d`'s."""
        if not isinstance(x, Tensor):
            given = {"residual": residual, "output_activation": output_activation, "history": history}
            return self._instead("x", x, dropout=dropout, **given)
        unbatched = x.dim() == 2
        if unbatched:
            _arguments.optional_tensors(type(self).__name__, residual=residual, history=history)
            x = x.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
            history = None if history is None else history.unsqueeze(0)
        y = causal_conv1d(
            x,
            self.weight,
            self.bias,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            dropout=dropout,
            residual=residual,
            output_activation=output_activation,
            history=history,
        )
        return y.squeeze(0) if unbatched else y

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """``(history,)``: zeros (batch_size, in_channels, context)."""
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        weight = self.weight
        return (
            torch.zeros(
                batch_size,
                self.in_channels,
                self.context,
                device=device or weight.device,
                dtype=dtype or weight.dtype,
            ),
        )

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """x (B, C, T): y (B, O, T) and the state after it."""
        check_chunk(self, x, state, "history")
        (history,) = state
        return self.forward(x, history=history), (next_history(history, x),)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, C): y_t (B, O) and the state after it."""
        check_step(self, x_t)
        y, state = self.extend(x_t.unsqueeze(-1), state)
        return y.squeeze(-1), state

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        if self.dilation != 1:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        return text
