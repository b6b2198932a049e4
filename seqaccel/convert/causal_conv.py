"""Causal convolutions of torch.nn: in a Sequential, a Conv1d behind padding on the left or before a chomp."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as _module
from torch.nn.utils.weight_norm import WeightNorm

from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class
from seqaccel.functional import causal_conv1d

#: torch's padding layers, and what our operator calls them.
PADDINGS: dict[type, str] = {
    torch.nn.ConstantPad1d: "zeros",
    torch.nn.ZeroPad1d: "zeros",
    torch.nn.ReplicationPad1d: "replicate",
}

#: torch's activations without options, which the operator runs too.
ACTIVATIONS: dict[type, str] = {
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
}


#: Classes that cut off the last steps (locuslab's, asteroid's), and their attribute for how many.
CHOMPS = {"Chomp1d": "chomp_size", "_Chop1d": "chop_size"}


class Block(NamedTuple):
    """Layers of a Sequential that are one call of the operator."""

    layers: list[Any]
    conv: Any
    padding_mode: str
    activation: str | None = None
    dropout: Any = None


def _is_conv(module: Any) -> bool:
    return (
        plain_class(module) is torch.nn.Conv1d
        and "forward" not in module.__dict__
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_chomp(module: Any) -> bool:
    return type(module).__name__ in CHOMPS


def _cut(chomp: Any) -> int:
    """How many steps a chomp says that it cuts off."""
    return getattr(chomp, CHOMPS[type(chomp).__name__])


def block_at(layers: list[Any], i: int) -> Block | None:
    """The causal convolution that begins at layer ``i``, with the activation and the dropout behind it."""
    first, second = layers[i], layers[i + 1] if i + 1 < len(layers) else None
    if second is None:
        return None
    mode = PADDINGS.get(type(first)) if "forward" not in first.__dict__ else None
    if mode is not None and _is_conv(second):
        context = (second.kernel_size[0] - 1) * second.dilation[0]
        if (*first.padding, *second.padding) != (context, 0, 0) or getattr(first, "value", 0) != 0:
            return None
        conv = second
    elif _is_chomp(second) and _is_conv(first):
        context = (first.kernel_size[0] - 1) * first.dilation[0]
        if first.padding != (context,) or _cut(second) != context or context == 0 or first.stride != (1,):
            return None
        conv, mode = first, "zeros"
    else:
        return None
    found = Block(layers[i : i + 2], conv, mode)
    rest = iter(layers[i + 2 :])
    following = next(rest, None)
    if type(following) in ACTIVATIONS and "forward" not in following.__dict__:
        found = found._replace(layers=[*found.layers, following], activation=ACTIVATIONS[type(following)])
        following = next(rest, None)
    if type(following) is torch.nn.Dropout and "forward" not in following.__dict__:
        found = found._replace(layers=[*found.layers, following], dropout=following)
    return found


def has_hooks(layer: torch.nn.Module) -> bool:
    """Whether a call of the layer runs a hook, but for weight norm's of the older style."""
    before = layer._forward_pre_hooks
    return bool(
        layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or (before and not all(isinstance(hook, WeightNorm) for hook in before.values()))
        or _module._global_forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_backward_pre_hooks
        or _module._global_backward_hooks
    )


def causal_conv(conv: Any, x: Tensor, padding_mode: str, activation: str | None = None, dropout: float = 0.0) -> Tensor:
    """y of a Conv1d's weights and x (B, C, T) or (C, T), which no layer has padded."""
    y = causal_conv1d(
        x if x.dim() == 3 else x.unsqueeze(0),
        conv.weight,
        conv.bias,
        stride=conv.stride[0],
        dilation=conv.dilation[0],
        groups=conv.groups,
        padding_mode=padding_mode,
        activation=activation,
        dropout=dropout,
    )
    return y if x.dim() == 3 else y.squeeze(0)


class CausalSequential(Unscriptable, torch.nn.Sequential):
    """A Sequential that runs its causal convolutions as one operator each. Layers with hooks run as they are."""

    def forward(self, input: Any) -> Any:
        layers, i = list(self), 0
        while i < len(layers):
            block = block_at(layers, i) if isinstance(input, Tensor) else None
            if block is None or any(map(has_hooks, block.layers)):
                input = layers[i](input)
                i += 1
                continue
            for hook in block.conv._forward_pre_hooks.values():  # weight norm of the older style makes the weight
                hook(block.conv, None)
            dropout = block.dropout.p if block.dropout is not None and block.dropout.training else 0.0
            input = causal_conv(block.conv, input, block.padding_mode, block.activation, dropout)
            i += len(block.layers)
        return input


def _cuts_the_end(chomp: Any) -> bool:
    """Whether a chomp removes the last steps, as many as it says."""
    x = torch.arange(_cut(chomp) + 2.0).view(1, 1, -1)
    y = chomp(x)
    return isinstance(y, Tensor) and torch.equal(y, x[..., :2])


def sequential(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of a Sequential with a causal convolution in it."""
    kind: Any = plain_class(module)
    if not issubclass(kind, torch.nn.Sequential):
        return None
    layers = list(module.children())
    found = [block for i in range(len(layers)) if (block := block_at(layers, i)) is not None]
    if not found:
        return None
    if kind.forward is not torch.nn.Sequential.forward:
        return "a Sequential with a forward of its own"
    chomps = [layer for block in found for layer in block.layers if _is_chomp(layer)]
    wrong = next((chomp for chomp in chomps if not _cuts_the_end(chomp)), None)
    if wrong is not None:
        name = type(wrong).__name__
        return f"its {name} does not cut off the last {CHOMPS[name]} steps"
    return Swap(
        "seqaccel.functional.causal_conv1d",
        CausalSequential if kind is torch.nn.Sequential else combined(kind, CausalSequential),
        runs=tuple(block.conv for block in found),
    )
