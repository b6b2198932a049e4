"""A session's layers, as its kernels know them, and the parts of their states."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Layer:
    """A layer, as ``csrc/common/session_table.h`` describes it."""

    kind: str
    inputs: int
    outputs: int
    weights: list[Tensor | None] = dataclasses.field(default_factory=list)
    hidden: int = 0
    matrices: int = 0
    source: int = 1
    skip: int = 0
    taps: int = 1
    frames: int = 1
    moves: list[tuple[int, int, int, int]] = dataclasses.field(default_factory=list)
    dilation: int = 1
    heads: int = 0
    block_size: int = 0
    fanout: int = 0
    levels: int = 0
    local_blocks: int = 0
    top_slots: int = 0
    limited: bool = False
    mass_bias: bool = False
    pool_rows: int = 0
    activation: str = "none"
    relu: bool = False
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    parameter: float = 0.0

    @property
    def width(self) -> int:
        """Values per step and stream that it gives."""
        return self.outputs * self.frames


@dataclasses.dataclass
class State:
    """A part of the state: of which tensor, of which layer, its letter (``csrc/common/session_table.h``), and its shape
    without the batch. The states of one name are stacked by layers, but for inputs kept."""

    name: str
    layer: int
    part: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.part not in "rx"

    @property
    def channels_first(self) -> bool:
        """It lies in C++ as (B, T, C)."""
        return self.part == "r"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.part == "a" else torch.float32


class Program:
    """Layers in the order in which they run, and the parts of their states."""

    def __init__(
        self,
        memory_length: int | None = None,
        max_length: int | None = None,
        pyramid: tuple[int, int] | None = None,
        example: Tensor | None = None,
        init_state: Callable[[int], Any] | None = None,
    ) -> None:
        self.memory_length = memory_length  # earlier steps that a step of an SRUpp attends to
        self.max_length = max_length  # steps of a stream of hierarchical attention
        self.pyramid = pyramid  # its levels and the slots of the highest one, instead of what max_length says
        self.example = example  # an input of a step, where it is needed to trace the first module
        self.init_state = init_state  # of that module, if not its own
        self.layers: list[Layer] = []
        self.states: list[State] = []
        self.batch_first = False  # of recurrent layers
        self.channels_first = False  # begins with a convolution: (B, C, T), or (B, T) indices
        self.input_shape: tuple[int, ...] | None = None  # of a step and stream, where it is not that of the layers
        self.output_shape: tuple[int, ...] | None = None
        self.phases = 1  # outputs per step, which lie in each channel of the last layer

    def add(self, kind: str, inputs: int, outputs: int, *weights: Tensor | None, **options: Any) -> int:
        """Returns the layer's number."""
        if self.phases > 1:
            raise TypeError("module: a CausalConvTranspose1d gives several outputs per step and must come last")
        self.output_shape = None
        self.layers.append(Layer(kind, inputs, outputs, list(weights), **options))
        return len(self.layers) - 1

    def back(self, layer: int) -> int:
        """How far the next layer to be added is behind this one."""
        return len(self.layers) - layer

    @property
    def last(self) -> int:
        """Number of the last layer; -1 is the session's input."""
        return len(self.layers) - 1

    def width(self, layer: int) -> int:
        """Values per step and stream that a layer gives, or the session's input (-1), which has 0 if it is an index."""
        if layer >= 0:
            return self.layers[layer].width
        if self.layers and self.layers[0].kind == "embedding":
            return 0
        if self.layers:
            return self.layers[0].inputs * self.layers[0].frames
        assert self.input_shape is not None
        return math.prod(self.input_shape)

    def keep(self, name: str, part: str, *shape: int) -> None:
        """The next layer has this part of a state."""
        self.states.append(State(name, len(self.layers), part, shape))
