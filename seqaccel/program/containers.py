"""Sequences of layers, and in a Session's list what adds or concatenates them."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from seqaccel.convert.causal_conv import block_at
from seqaccel.program._describe import describe
from seqaccel.program._layers import Program
from seqaccel.program.conv import convolution

__all__ = ["Concatenation", "Residual"]


class Residual(nn.Sequential):
    """In a :class:`~seqaccel.Session`: its input plus what its layers make of it.

    It is a list of layers for a session, and has no ``forward`` of its own: a recurrent layer in it gives its output,
    without its state.

    Example:
        >>> import torch, seqaccel
        >>> block = seqaccel.Residual(seqaccel.nn.LSTM(8, 16), torch.nn.Linear(16, 8))
        >>> seqaccel.Session([block, torch.nn.ReLU()]).step(torch.randn(1, 8)).shape
        torch.Size([1, 8])
    """

    def forward(self, x: Any) -> Any:
        raise TypeError(f"{type(self).__name__} is a list of layers for a Session: it runs there only")


class Concatenation(Residual):
    """In a :class:`~seqaccel.Session`: the outputs of its layers, each of which has its input, one after the other.

    A branch of several layers is a ``torch.nn.Sequential``, and one that passes the input on a ``torch.nn.Identity``.

    Example:
        >>> import torch, seqaccel
        >>> both = seqaccel.Concatenation(seqaccel.nn.LSTM(8, 16), seqaccel.nn.GRU(8, 4), torch.nn.Identity())
        >>> seqaccel.Session(both).step(torch.randn(1, 8)).shape
        torch.Size([1, 28])
    """


@describe.register
def _sequential(module: nn.Sequential, program: Program, name: str) -> None:
    layers, i = list(module.named_children()), 0
    while i < len(layers):
        block = block_at([layer for _, layer in layers], i)
        if block is None:
            describe(layers[i][1], program, f"{name}{layers[i][0]}.")
            i += 1
            continue
        at = next(j for j, (_, layer) in enumerate(layers) if layer is block.conv)
        _causal(block, program, f"{name}{layers[at][0]}.")
        i += len(block.layers)


def _causal(block: Any, program: Program, name: str) -> None:
    """Padding and a Conv1d of torch, as a causal convolution."""
    conv = block.conv
    for hook in conv._forward_pre_hooks.values():  # weight norm of the older style makes the weight
        hook(conv, None)
    seen = types.SimpleNamespace(
        weight=conv.weight, bias=conv.bias, in_channels=conv.in_channels, groups=conv.groups, stride=conv.stride[0],
        dilation=conv.dilation[0], context=(conv.kernel_size[0] - 1) * conv.dilation[0], activation=block.activation,
        padding_mode=block.padding_mode, channels_last=False,
    )  # fmt: skip
    convolution(seen, program, name)


def _read(program: Program, layer: int) -> None:
    """Makes the output of a layer the last one's."""
    width = program.width(layer)
    inputs = program.width(-1)
    program.add("gather", inputs, width, source=program.back(-1), moves=[(program.back(layer), 0, 0, width)])


def _branch(module: nn.Module, program: Program, name: str, source: int) -> int:
    if program.last != source:
        _read(program, source)
    describe(module, program, name)
    return program.last


@describe.register
def _residual(module: Residual, program: Program, name: str) -> None:
    source = program.last
    _sequential(module, program, name)
    if program.last == source:
        raise TypeError("module: there is nothing to run in an empty Residual")
    width, added = program.width(source), program.width(program.last)
    if added != width:
        raise ValueError(f"module: a Residual of {width} features has layers that give {added}")
    program.add("add", width, width, skip=program.back(source))


@describe.register
def _concatenation(module: Concatenation, program: Program, name: str) -> None:
    source = program.last
    branches: list[int] = [_branch(part, program, f"{name}{child}.", source) for child, part in module.named_children()]
    if not program.layers:
        raise TypeError("module: there is nothing to run in a Concatenation without layers")
    moves, place = [], 0
    for branch in branches:
        moves.append((program.back(branch), 0, place, program.width(branch)))
        place += program.width(branch)
    program.add("gather", program.width(-1), place, source=program.back(-1), moves=moves)
