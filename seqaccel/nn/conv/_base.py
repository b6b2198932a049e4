"""What the convolutions and the networks of them share: parameters, calls without a batch, states and steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized

from seqaccel import _arguments
from seqaccel.functional.conv import ACTIVATIONS, GATED
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import State, Streaming

__all__ = ["ConvStream", "Convolution", "check_chunk", "check_step", "single"]


def check_chunk(
    module: nn.Module, x: Tensor, state: State, *names: str, layout: str = "(B, C, T)", reset: Tensor | None = None
) -> None:
    title = type(module).__name__
    _arguments.tensor(title, "x", x)
    _arguments.states(title, "state", state, names)
    if x.dim() != 3:
        raise ValueError(f"{title}: expected x to be 3D {layout}, but got a tensor of size {list(x.shape)}")
    if reset is not None:
        _arguments.reset(title, reset, (x.shape[0], x.shape[2]), x.device)


def check_step(module: nn.Module, x_t: Tensor, layout: str = "2D (B, C)") -> None:
    title = type(module).__name__
    _arguments.tensor(title, "x_t", x_t)
    if x_t.dim() != int(layout[0]):
        raise ValueError(f"{title}: expected x_t to be {layout}, but got a tensor of size {list(x_t.shape)}")


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


class ConvStream(Leaf, Streaming, nn.Module):
    """Base of the causal convolutions and of the networks of them."""

    def _with_history(self) -> Sequence[Any]:
        """The convolutions whose past inputs are the state, in its order."""
        raise NotImplementedError

    @property
    def receptive_field(self) -> int:
        """Time steps that an output sees, itself included."""
        return 1 + sum(conv.context for conv in self._with_history())

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """A tuple of histories (batch_size, channels, context), all zeros."""
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        return tuple(conv.init_state(batch_size, device=device, dtype=dtype)[0] for conv in self._with_history())

    def _step(
        self, x_t: Tensor, state: State, time: int, layout: str = "2D (B, C)", **conditions: Any
    ) -> tuple[Tensor, State]:
        """``extend`` of one step; ``time`` is its axis, in the input and in the output."""
        check_step(self, x_t, layout)
        y, state = self.extend(x_t.unsqueeze(time), state, **conditions)
        return y.squeeze(time), state


#: Options that ``extra_repr`` leaves out where they have one of these values.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "stride": (1,),
    "dilation": (1, (1, 1)),
    "groups": (1,),
    "bias": (True,),
    "padding_mode": ("zeros",),
    "activation": (None,),
    "channels_last": (False,),
}


class Convolution(ConvStream):
    """Base of the modules that are one convolution with an activation: ``weight`` and ``bias``.

    A subclass sets ``kernel_size`` and its own options, then calls ``_create``.
    """

    kernel_size: Any
    transposed = False

    def _create(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        bias: bool,
        activation: str | None,
        device: Any,
        dtype: Any,
    ) -> None:
        """Checks and makes what all of them have."""
        title = type(self).__name__
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
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.activation = activation
        taps = self.kernel_size if isinstance(self.kernel_size, tuple) else (self.kernel_size,)
        channels = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        self.weight = nn.Parameter(torch.empty(channels[0], channels[1] // groups, *taps, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters as torch.nn's convolutions do, through the weight's parametrization if it has one."""
        weight = self.weight.detach()
        if weight.numel() == 0:
            return
        bound = weight[0].numel() ** -0.5
        nn.init.uniform_(weight, -bound, bound)
        if is_parametrized(self, "weight"):
            self.weight = weight  # type: ignore[assignment]
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

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

    def _with_history(self) -> Sequence[Any]:
        return (self,)

    @property
    def context(self) -> int:
        """How many time steps before the present an output sees."""
        raise NotImplementedError

    def _unbatched(self, tensors: dict[str, Tensor | None], cu_seqlens: Tensor | None = None, **options: Any) -> Any:
        """``forward`` of tensors without a batch, the first being x. The states of packed sequences have one."""
        _arguments.optional_tensors(type(self).__name__, **tensors)
        state = None
        if cu_seqlens is not None:
            options["cu_seqlens"], state = cu_seqlens, "initial_state"
        found = self.forward(
            **{name: t if t is None or name == state else t.unsqueeze(0) for name, t in tensors.items()}, **options
        )
        if not isinstance(found, tuple):
            return found.squeeze(0)
        y, final_state = found
        return y.squeeze(0), final_state if state else final_state.squeeze(0)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """``(history,)``: zeros (batch_size, in_channels, context)."""
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        weight, shape = self.weight, (batch_size, self.in_channels, self.context)
        return (torch.zeros(shape, device=device or weight.device, dtype=dtype or weight.dtype),)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        for name, plain in _PLAIN.items():
            value = self.bias is not None if name == "bias" else getattr(self, name, plain[0])
            if value not in plain:
                text += f", {name}={value!r}"
        return text
