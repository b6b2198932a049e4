"""The values of a traced step: where each of them lies.

A tensor of the step is a tensor of addresses, one for each of its values: so views, slices, padding and concatenation
are torch's own operators on addresses, and no layer. A layer that computes reads its input from one other layer's
output, in order: where the addresses are not in order, a layer ``gather`` puts them so.

The step is traced with two streams. A value of one stream that depends on the other one is an error.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from seqaccel.program._layers import Program

STREAMS = 2
_STREAM, _LAYER = 1 << 48, 1 << 28  # address: stream * _STREAM + (layer + 1) * _LAYER + place in its output
_STATES, _HIDDEN = 1 << 18, 1 << 19  # the first of states of the step before, and of parts that only a layer sees
ZERO = -1


class Unsupported(Exception):
    """What a session does not run, and why."""


def axis_of_streams(index: Tensor) -> int:
    """The dimension of the batch."""
    for axis in range(index.dim()):
        if index.shape[axis] == STREAMS:
            first, second = index.unbind(axis)
            if torch.equal(torch.where(first < 0, first, first + _STREAM), second):
                return axis
    raise Unsupported("the output of a stream depends on another stream, or the batch is part of another dimension")


class Places:
    """Adds layers to a program that compute on addressed values."""

    def __init__(self, program: Program, name: str) -> None:
        self.program = program
        self.name = name
        self.states: list[tuple[str, tuple[int, ...]]] = []  # name, shape of a stream
        self.pasts: dict[int, int] = {}  # the layers that give states
        self.gathered: dict[bytes, int] = {}

    # ---- addresses ----

    @staticmethod
    def _addresses(layer: int, shape: tuple[int, ...], start: int = 0) -> Tensor:
        """(B, *shape): values of a layer's output in order."""
        count = int(torch.Size(shape).numel())
        one = torch.arange(start, start + count).view(shape) + (layer + 1) * _LAYER
        return torch.stack([one + b * _STREAM for b in range(STREAMS)])

    def output(self, layer: int, *shape: int) -> Tensor:
        """The output of a layer, (B, *shape); -1: the input."""
        return self._addresses(layer, shape)

    def state(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A state of the step before, (B, *shape)."""
        self.states.append((name, shape))
        return self._addresses(_STATES + len(self.states) - 1, shape)

    def hidden(self, layer: int, width: int) -> Tensor:
        """A part of a layer's state that is no output."""
        return self._addresses(_HIDDEN + layer, (width,))

    def state_at(self, index: Tensor) -> tuple[int, int] | None:
        """The state that a tensor (B, n) is n consecutive values of, and the first one's place."""
        row = self._row(index)
        state, start = divmod(int(row[0]) - (_STATES + 1) * _LAYER, _LAYER)
        consecutive = torch.equal(row, torch.arange(len(row)) + row[0])
        return (state, start) if 0 <= state < len(self.states) and consecutive else None

    @staticmethod
    def _row(index: Tensor) -> Tensor:
        """Addresses of stream 0, of a tensor with the batch first."""
        if axis_of_streams(index) != 0:
            raise Unsupported("the output of a stream depends on another stream")
        return index[0].flatten()

    def _past(self, state: int) -> int:
        """The layer that gives a state."""
        if state not in self.pasts:
            name, shape = self.states[state]
            width = int(torch.Size(shape).numel())
            self.program.keep(self.name + name, "c", *shape)
            self.pasts[state] = self._add("past", self.program.width(-1), width, source=-1, hidden=width)
        return self.pasts[state]

    def _readable(self, row: Tensor) -> Tensor:
        """Addresses of layers' outputs in place of those of states."""
        row = row.clone()
        for layer in (row[row >= 0] // _LAYER - 1).unique().tolist():
            if layer >= _HIDDEN:
                raise Unsupported("the state c of an LSTM, or the state of a layer of seqaccel, is read in its step")
            if layer >= _STATES:
                where = row // _LAYER - 1 == layer
                row[where] += (self._past(layer - _STATES) - layer) * _LAYER
        return row

    def in_order(self, index: Tensor) -> int:
        """A layer whose output has these values, (B, ...), in order."""
        return self._made_of(self._readable(self._row(index)))

    def _made_of(self, row: Tensor) -> int:
        count = row.numel()
        layer, start = divmod(int(row[0]), _LAYER) if count else (0, 0)
        whole = count > 0 and row[0] >= 0 and start == 0 and count == self.program.width(layer - 1)
        if whole and torch.equal(row, torch.arange(count) + row[0]):
            return layer - 1
        key = row.numpy().tobytes()
        if key not in self.gathered:
            self.gathered[key] = self._gather(row)
        return self.gathered[key]

    def _gather(self, row: Tensor) -> int:
        count = row.numel()
        layers = row.div(_LAYER, rounding_mode="floor")
        breaks = (row[1:] != row[:-1] + 1) | (layers[1:] != layers[:-1])
        starts = [0, *(breaks.nonzero().flatten() + 1).tolist(), count] if count else [0]
        moves = [
            (self.program.back(int(layers[a]) - 1), int(row[a]) % _LAYER, a, b - a)
            for a, b in itertools.pairwise(starts)
            if row[a] >= 0
        ]
        return self._add("gather", self.program.width(-1), count, source=-1, moves=moves)

    def _add(self, kind: str, inputs: int, outputs: int, *weights: Tensor | None, source: int, **options: Any) -> int:
        if "skip" in options:
            options["skip"] = self.program.back(options["skip"])
        return self.program.add(kind, inputs, outputs, *weights, source=self.program.back(source), **options)

    def _whole(self, index: Tensor) -> tuple[int, Tensor]:
        """A layer with just these values, (B, ...), as they lie if they can, and the place of each in its output."""
        row = self._readable(self._row(index))
        count = row.numel()
        values, order = row.sort()
        distinct = count > 0 and values[0] >= 0 and bool((values[1:] > values[:-1]).all())
        if not distinct:
            return self._made_of(row), torch.arange(count)
        return self._made_of(values), torch.empty_like(order).index_copy(0, order, torch.arange(count))

    def _placed(self, layer: int, places: Tensor, like: Tensor, axis: int) -> Tensor:
        """Values of a layer in the order of ``like``, (B, ...), whose batch was dimension ``axis``."""
        one = places.view(like.shape[1:]) + (layer + 1) * _LAYER
        return torch.stack([one + b * _STREAM for b in range(STREAMS)]).movedim(0, axis)

    # ---- what layers compute ----

    def unary(self, kind: str, x: Tensor, parameter: float = 0.0) -> Tensor:
        axis = axis_of_streams(x)
        x = x.movedim(axis, 0)
        layer, places = self._whole(x)
        width = places.numel()
        return self._placed(self._add(kind, width, width, source=layer, parameter=parameter), places, x, axis)

    def activated(self, kind: str, x: Tensor, parameter: float, alone: bool) -> Tensor:
        """An activation, by the layer whose output it is, where that layer can and nothing else reads it."""
        axis = axis_of_streams(x)
        layer, _ = self._whole(x.movedim(axis, 0))
        if alone and 0 <= layer == self.program.last:
            made = self.program.layers[layer]
            if made.kind == "linear" and made.activation == "none" and not made.skip:
                made.activation, made.parameter = kind, parameter
                return x
        return self.unary(kind, x, parameter)

    def binary(self, kind: str, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.broadcast_tensors(a, b)
        axis = axis_of_streams(a)
        a, b = a.movedim(axis, 0), b.movedim(axis, 0)
        (first, places), (second, others) = self._whole(a), self._whole(b)
        if not torch.equal(places, others):
            first, second = self.in_order(a), self.in_order(b)
            places = torch.arange(places.numel())
        width = places.numel()
        return self._placed(self._add(kind, width, width, source=first, skip=second), places, a, axis)

    def affine(self, x: Tensor, gain: Tensor | float | None = None, shift: Tensor | float | None = None) -> Tensor:
        """x * gain + shift, with constants that broadcast."""
        constants = [None if c is None else torch.as_tensor(c, dtype=torch.float32) for c in (gain, shift)]
        shape = torch.broadcast_shapes(x.shape, *[c.shape for c in constants if c is not None])
        x = x.expand(shape)
        axis = axis_of_streams(x)
        x = x.movedim(axis, 0)
        layer, places = self._whole(x)
        width = places.numel()
        weights: list[Tensor | None] = []
        for c in constants:
            if c is None:
                weights.append(None)
                continue
            one, two = c.expand(shape).unbind(axis)
            if not torch.equal(one, two):
                raise Unsupported("a constant differs between streams")
            weights.append(torch.empty(width).index_copy(0, places, one.flatten()))
        return self._placed(self._add("batch_norm", width, width, *weights, source=layer), places, x, axis)

    def constant(self, value: Tensor) -> Tensor:
        """Addresses of a constant."""
        value = value.detach().float()
        if not value.any():
            return torch.full(value.shape, ZERO)
        axis = next((i for i, n in enumerate(value.shape) if n == STREAMS and torch.equal(*value.unbind(i))), None)
        if axis is None:
            raise Unsupported("a constant has no dimension of the batch")
        one = value.select(axis, 0)
        layer = self._add("gather", self.program.width(-1), one.numel(), source=-1)
        layer = self._add("batch_norm", one.numel(), one.numel(), None, one.flatten(), source=layer)
        return self.output(layer, *one.shape).movedim(0, axis)

    def rows(self, kind: str, x: Tensor, dims: list[int], outputs: int | None = None, **options: Any) -> Tensor:
        """A layer of rows, which are the values along ``dims``: the same number of outputs, or ``outputs`` of each."""
        axis, dims = axis_of_streams(x), [d % x.dim() for d in dims]
        if axis in dims:
            raise Unsupported("it goes over the dimension of the batch")
        rest = [d for d in range(x.dim()) if d != axis and d not in dims]
        order = [axis, *rest, *dims]
        moved = x.permute(order)
        count = int(torch.Size([x.shape[d] for d in dims]).numel())
        frames = moved[0].numel() // count if count else 0
        weights = options.pop("weights", ())
        layer = self._add(
            kind, count, outputs or count, *weights, source=self.in_order(moved), frames=frames, **options
        )
        if outputs is None:
            return self.output(layer, *moved.shape[1:]).permute([order.index(d) for d in range(x.dim())])
        made = self.output(layer, *[x.shape[d] for d in rest], outputs)  # (B, *rest, outputs)
        kept = [axis, *rest]
        return made.permute([*[kept.index(d) for d in range(x.dim()) if d in kept], made.dim() - 1])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.rows("linear", x, [-1], weight.shape[0], weights=(weight, bias))

    def convolution(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], dilation: list[int], groups: int
    ) -> Tensor:
        """Of padded x (B, C, ...). The taps of an output are gathered to a row of [taps, C]; those that are zero in all
        rows are left out."""
        taps = weight.shape[2:]
        spatial = len(taps)
        if axis_of_streams(x) != 0 or x.dim() != spatial + 2:
            raise Unsupported("a convolution's input is (B, C, T)")
        for i, (k, s, d) in enumerate(zip(taps, stride, dilation, strict=True)):
            x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
        x = x.movedim(1, -1).flatten(1 + spatial)  # (B, *T, taps * C)
        matrix = block_matrix(weight, groups).flatten(1)
        used = (x >= 0).flatten(0, -2).any(0)
        if not used.any():
            used[0] = True
        return self.linear(x[..., used], matrix[:, used], bias).movedim(-1, 1)


def block_matrix(weight: Tensor, groups: int) -> Tensor:
    """The weight (O, C / groups, ...) of a convolution as (O, ..., C), with zeros between groups."""
    weight = weight.detach().movedim(1, -1)
    if groups == 1:
        return weight
    whole = weight.new_zeros(*weight.shape[:-1], groups * weight.shape[-1])
    for i, block in enumerate(weight.chunk(groups)):
        rows, columns = block.shape[0], block.shape[-1]
        whole[i * rows : (i + 1) * rows, ..., i * columns : (i + 1) * columns] = block
    return whole
