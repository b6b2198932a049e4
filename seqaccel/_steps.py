"""Steps outside of training: a whole network in one call of a session's kernels.

States stay values: the session's own state is a copy of the one that the last step returned. A step that is given
another state loads it first.
"""

from __future__ import annotations

import itertools
import math
import operator
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from seqaccel import _common, _extension, backends
from seqaccel.nn import streaming
from seqaccel.nn.attention import HierarchicalAttention, HierarchicalAttentionEncoder
from seqaccel.nn.attention._encoder import EncoderLayer
from seqaccel.nn.conv import TCN, CausalConv1d, TemporalBlock
from seqaccel.nn.streaming import State
from seqaccel.program import FUNCTIONS, described, pyramid_levels
from seqaccel.session import Session

_VERSION, _TRAINING = operator.attrgetter("_version"), operator.itemgetter("training")
_OPTIONS = operator.itemgetter("dilation", "groups", "activation")
_ACTIVATION = operator.itemgetter("activation")
_NETWORK_OPTIONS = operator.itemgetter("output_activation", "input_shape", "use_skip_connections", "use_gate")
_PYRAMID_OPTIONS = operator.itemgetter(
    "block_size", "fanout", "levels", "local_blocks", "mass_bias", "rotary_base", "num_heads", "num_kv_heads", "causal"
)
_LAYER_OPTIONS = operator.itemgetter("norm_first", "activation")
_EPSILON, _LONGEST = operator.itemgetter("eps"), operator.itemgetter("max_positions")


class _Stepper:
    """A module as it was when its session was made, and the session. It has no reference to the module."""

    def __init__(self, module: nn.Module, ours: Sequence[nn.Module]) -> None:
        """``ours``: the parts whose training mode and attributes matter."""
        modules = list(module.modules())
        self.lock = threading.Lock()
        self.parameters: list[Tensor] = [*module.parameters(), *module.buffers()]  # a weight may be a buffer
        members = [m.__dict__[kind] for m in modules for kind in ("_modules", "_parameters", "_buffers")]
        self.members, self.empty = [d for d in members if d], [d for d in members if not d]
        self.empty += [m.__dict__[kind] for m in modules for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self.attributes = [m.__dict__ for m in ours]
        self.values: list[Tensor] = []
        self.options = self._options(ours)
        self.seen = self._look()
        self.usable = (
            all(map(self._plain, modules))
            and all(
                type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 and p.is_cpu for p in self.parameters
            )
            and not any("forward" in attributes for attributes in self.attributes)
            and not any(self.empty)
        )
        self.width: int | None = None  # of an input, where only this fits
        self.session: Session | None = None
        self.last: State | None = None
        self.parts: list[Tensor] = []
        self.versions: list[int] = []

    def _options(self, ours: Sequence[nn.Module]) -> list[tuple[Callable[[Any], Any], list[dict[str, Any]]]]:
        """What a session depends on, of attributes."""
        raise NotImplementedError

    def _plain(self, module: nn.Module) -> bool:
        """Whether a session does what a part of a network does."""
        raise NotImplementedError

    def _load(self, module: Any, state: State, batch: int) -> bool:
        """Whether the state could be given to the session."""
        raise NotImplementedError

    def _goes_on(self) -> bool:
        """Whether a session may run the next step of the streams that it has."""
        return True

    def _state(self) -> State:
        """The state after a step; sets ``parts``, its tensors that a caller could change."""
        raise NotImplementedError

    def _look(self) -> tuple[Any, ...]:
        """What a session depends on, but not the parameters' values."""
        return (
            list(map(id, itertools.chain.from_iterable(map(dict.values, self.members)))),
            list(map(_VERSION, self.parameters)),
            list(map(Tensor.data_ptr, self.parameters)),
            *(list(map(get, attributes)) for get, attributes in self.options),
            list(map(len, self.attributes)),
        )

    def is_current(self) -> bool:
        return self._look() == self.seen and not any(self.empty)

    def has_these_values(self) -> bool:
        """Also after a change that no version counts, such as through ``.data``."""
        return all(map(torch.equal, self.parameters, self.values))

    def step(self, module: nn.Module, x_t: Tensor, state: State) -> tuple[Tensor, State] | None:
        loaded = (
            state is self.last
            and list(map(_VERSION, self.parts)) == self.versions
            and self.session.batch_size == x_t.shape[0]  # type: ignore[union-attr]
        )
        self.last = None
        if not loaded:
            if self.session is None:
                self.values = [p.detach().clone() for p in self.parameters]
            if not self._load(module, state, x_t.shape[0]):
                return None
        if not self._goes_on():
            return None
        session: Any = self.session
        y = session.step(x_t)
        self.last = self._state()
        self.versions = list(map(_VERSION, self.parts))
        return y, self.last


# ---- convolutions ----


class _ConvStepper(_Stepper):
    def __init__(self, module: Any) -> None:
        super().__init__(module, [m for m in module.modules() if isinstance(m, (CausalConv1d, TemporalBlock, TCN))])
        states = module.init_state(1)
        self.levels = isinstance(module, TCN)
        self.shapes = [tuple(t.shape[1:]) for t in (itertools.chain(*states) if self.levels else states)]
        self.usable = self.usable and all(context > 0 for _, context in self.shapes)
        self.width = next(m.in_channels for m in module.modules() if isinstance(m, CausalConv1d))

    def _options(self, ours: Sequence[nn.Module]) -> list[tuple[Callable[[Any], Any], list[dict[str, Any]]]]:
        return [
            (_OPTIONS, [m.__dict__ for m in ours if isinstance(m, CausalConv1d)]),
            (_ACTIVATION, [m.__dict__ for m in ours]),
            (_NETWORK_OPTIONS, [m.__dict__ for m in ours if isinstance(m, TCN)]),
        ]

    def _plain(self, module: nn.Module) -> bool:
        if type(module).__name__ == "_WeightNorm" or type(module) in (TCN, TemporalBlock, nn.Sequential, nn.ModuleDict):
            return True
        if isinstance(module, ParametrizationList):
            return len(module) == 1 and type(module[0]).__name__ == "_WeightNorm"
        if not isinstance(module, CausalConv1d) or (module.stride, module.padding_mode) != (1, "zeros"):
            return False
        parametrizations: Any = module._modules.get("parametrizations", {})
        kind = type(module).__mro__[1] if list(parametrizations) == ["weight"] else type(module)
        return kind is CausalConv1d and not any(isinstance(value, Tensor) for value in module.__dict__.values())

    def _load(self, module: Any, state: State, batch: int) -> bool:
        try:
            parts = [t for level in state for t in level] if self.levels else list(state)
        except TypeError:
            return False
        fits = len(parts) == len(self.shapes) and all(
            type(t) is Tensor and t.dtype == torch.float32 and t.is_cpu and t.shape == (batch, *shape)
            for t, shape in zip(parts, self.shapes, strict=True)
        )
        if not fits or (self.levels and [len(level) for level in state] != [2] * (len(parts) // 2)):
            return False
        if self.session is None or self.session.batch_size != batch:
            self.session = Session(module, batch) if self.session is None else self.session.fork(batch)
            self.sizes = [(batch, channels, context) for channels, context in self.shapes]
            self.strides = [(channels * context, 1, channels) for channels, context in self.shapes]
            self.keys = [(part.layer, part.part, 0) for part in self.session._states]
        rows = [t.transpose(1, 2).contiguous().resolve_neg() for t in parts]
        self.session._session.write_state(list(map(_address, self.keys, rows)))
        return True

    def _state(self) -> State:
        parts = list(map(torch.empty_strided, self.sizes, self.strides))
        self.session._session.read_state(list(map(_address, self.keys, parts)))  # type: ignore[union-attr]
        self.parts = parts
        return tuple(zip(parts[::2], parts[1::2], strict=True)) if self.levels else tuple(parts)


def _address(key: tuple[int, str, int], part: Tensor) -> tuple[int, str, int, int]:
    return *key, part.data_ptr()


# ---- hierarchical attention ----

# Letters of the parts of a level, in the order of the module's state: keys and values; then the open node's sums.
_RINGS, _SUMS = "kv", "stgw"


class _AttentionStepper(_Stepper):
    """A step changes the ring of level 0 and the sums of level 1, and those of further levels only where a node is
    complete. The new state has the other tensors of the one before."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, list(module.modules()))
        self.whole = isinstance(module, HierarchicalAttentionEncoder)
        self.width = module.d_model if self.whole else module.embed_dim
        self.pyramid: tuple[int, int] | None = None

    def _options(self, ours: Sequence[nn.Module]) -> list[tuple[Callable[[Any], Any], list[dict[str, Any]]]]:
        kinds: list[tuple[Callable[[Any], Any], type[nn.Module]]] = [
            (_PYRAMID_OPTIONS, HierarchicalAttention),
            (_LAYER_OPTIONS, EncoderLayer),
            (_EPSILON, nn.LayerNorm),
            (_LONGEST, HierarchicalAttentionEncoder),
        ]
        return [(get, [m.__dict__ for m in ours if isinstance(m, kind)]) for get, kind in kinds]

    def _plain(self, module: nn.Module) -> bool:
        if isinstance(module, EncoderLayer):
            return FUNCTIONS.get(module.activation) is not None
        if type(module) is HierarchicalAttention:
            return module.causal and module.in_proj_weight is not None
        return type(module) in (
            HierarchicalAttentionEncoder, NonDynamicallyQuantizableLinear, nn.Linear, nn.LayerNorm, nn.Dropout,
            nn.Embedding, nn.ModuleList,
        )  # fmt: skip

    def _load(self, module: Any, state: State, batch: int) -> bool:
        attention: HierarchicalAttention = module.layers[0].self_attn if self.whole else module
        layers = list(state) if self.whole and isinstance(state, tuple) else [state]
        if len(layers) != (len(module.layers) if self.whole else 1):
            return False
        levels = [_levels_of(layer, attention, batch) for layer in layers]
        first = levels[0]
        if first is None or any(
            level is None or [part.shape for parts in level for part in parts] != [p.shape for ps in first for p in ps]
            for level in levels
        ):
            return False
        top, slots = len(first) - 1, first[-1][0].shape[2]
        grows = len(layers[0][-1]) > 0
        # A session with more levels than a state that grows does the same, and serves streams of all ages.
        pyramid = pyramid_levels(attention, None) if grows and attention.levels is None else (top + 1, slots)
        if pyramid[0] <= top or any((len(layer[-1]) > 0) != grows for layer in layers):
            return False
        self.ages = sorted({age for layer in layers for age in layer[0].tolist()})
        self.spans = [attention._span(level) for level in range(top + 1)]
        # The longest streams that the state has room for. With a level above the highest, one of fixed size forgets.
        self.longest = math.inf
        if grows or attention._is_top(top):
            self.longest = (slots + 1 if attention._is_top(top) else 1) * self.spans[-1] - 1
        if self.whole and module.positions is not None:
            self.longest = min(self.longest, module.max_positions)
        if not self._goes_on():
            return False
        if self.session is None or self.pyramid != pyramid:
            self.session, self.pyramid = object.__new__(Session), pyramid
            self.session._pack(described(module, pyramid=pyramid), batch, "float32")
        elif self.session.batch_size != batch:
            self.session = self.session.fork(batch)
        else:
            self.session.reset()
        # The states are ours: nobody else changes them, and they have versions.
        self.layers = [
            [layer[0], *(tuple(t.clone() if t.is_inference() else t for t in parts) for parts in level or ())]
            for layer, level in zip(layers, levels, strict=True)
        ]
        self.marks = [layer[-1:] if not layer[-1] else () for layer in layers]
        self.numbers = [part.layer for part in self.session._states if part.part == "p"]
        rows = [
            (number, letter, level, part.contiguous().resolve_neg())
            for number, (_, *parts_of) in zip(self.numbers, self.layers, strict=True)
            for level, parts in enumerate(parts_of)
            for letter, part in zip(_RINGS + _SUMS, parts, strict=False)
            if part.numel() > 0
        ]
        ages = [part.layer for part in self.session._states if part.part == "a"]
        rows += [
            (number, "a", 0, layer[0].contiguous())
            for number, layer in zip(ages, (layers[0], *layers) if len(ages) > len(layers) else layers, strict=True)
        ]
        self.session._session.write_state([(*key, part.data_ptr()) for *key, part in rows])
        return True

    def _goes_on(self) -> bool:
        return self.ages[-1] < self.longest

    def _state(self) -> State:
        self.ages = [age + 1 for age in self.ages]
        complete = 0  # the highest level that has a new node
        while complete + 1 < len(self.spans) and any(age % self.spans[complete + 1] == 0 for age in self.ages):
            complete += 1
        found: list[tuple[int, str, int, int]] = []
        states = []
        for number, layer in zip(self.numbers, self.layers, strict=True):
            age = torch.empty_like(layer[0])
            found.append((number, "a", 0, age.data_ptr()))
            layer[0] = age
            for level in range(min(complete + 2, len(self.spans))):
                parts = list(layer[level + 1])
                for i, letter in enumerate(_RINGS + _SUMS if level else _RINGS):
                    if (i >= 2 or level <= complete) and parts[i].numel() > 0:
                        parts[i] = torch.empty(parts[i].shape, dtype=torch.float32, device="cpu")
                        found.append((number, letter, level, parts[i].data_ptr()))
                layer[level + 1] = tuple(parts)
            states.append(tuple(layer))
        self.session._session.read_state(found)  # type: ignore[union-attr]
        self.parts = [t for layer in self.layers for t in (layer[0], *itertools.chain.from_iterable(layer[1:]))]
        whole = tuple((*state, *mark) for state, mark in zip(states, self.marks, strict=True))
        return whole if self.whole else whole[0]


def _levels_of(state: Any, attention: HierarchicalAttention, batch: int) -> list[tuple[Tensor, ...]] | None:
    """The levels of a state, or None where a session cannot take them."""
    if not isinstance(state, tuple) or len(state) < 2 or not all(isinstance(level, tuple) for level in state[1:]):
        return None
    age, *levels = state
    levels = levels if levels[-1] else levels[:-1]
    if type(age) is not Tensor or age.dtype != torch.int64 or not age.is_cpu or age.shape != (batch,) or not levels:
        return None
    for level, parts in enumerate(levels):
        top = level + 1 == len(levels) and attention._is_top(level)
        usual = attention.local_blocks * (attention._span(level + 1) // attention._span(level))
        heads, d = attention.num_kv_heads, attention.head_dim
        if len(parts) != (6 if level else 2) or not all(
            type(t) is Tensor and t.dtype == torch.float32 and t.is_cpu for t in parts
        ):
            return None
        slots = parts[0].shape[2] if top and parts[0].dim() == 4 else usual
        shapes = [(batch, heads, slots, d)] * 2 + [(batch, heads, d)] * 2 + [(batch, heads)] * 2
        if [tuple(t.shape) for t in parts] != shapes[: len(parts)]:
            return None
    return levels


# ---- all of them ----


def _stepper_of(module: nn.Module) -> _Stepper:
    kind = (
        _AttentionStepper if isinstance(module, (HierarchicalAttention, HierarchicalAttentionEncoder)) else _ConvStepper
    )
    return kind(module)


_steppers: weakref.WeakKeyDictionary[nn.Module, _Stepper] = weakref.WeakKeyDictionary()


def _step(module: nn.Module, x_t: Tensor, state: State) -> tuple[Tensor, State] | None:
    """A step of a module in eval mode that records no gradients, or None where a session does not do the same."""
    if (
        type(x_t) is not Tensor
        or x_t.dim() != 2
        or x_t.shape[0] == 0
        or x_t.dtype != torch.float32
        or not x_t.is_cpu
        or backends.asked() not in ("auto", "cpp")
        or backends._open_isas
        or _extension.cpp_error is not None
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _common.transforms_active()
        or _common.autocast_on("cpu")
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
    ):
        return None
    stepper = _steppers.get(module)
    if stepper is None:
        if any(t.is_inference() for t in (*module.parameters(), *module.buffers())):  # these have no versions
            return None
        _steppers[module] = _stepper_of(module)
        return None  # a session is made at the second step of the same weights
    if not stepper.usable or not stepper.lock.acquire(blocking=False):
        return None
    try:
        known = stepper.session is None or state is stepper.last or stepper.has_these_values()
        if not known or not stepper.is_current():
            _steppers.pop(module, None)
            return None
        if any(map(_TRAINING, stepper.attributes)):
            return None
        if x_t.shape[1] != stepper.width:
            return None
        if not torch.is_inference_mode_enabled():
            return stepper.step(module, x_t, state)
        with torch.inference_mode(False), torch.no_grad():  # tensors made in that mode have no versions
            return stepper.step(module, x_t, state)
    finally:
        stepper.lock.release()


streaming.step_outside_of_training = _step
