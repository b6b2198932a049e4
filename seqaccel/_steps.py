"""Steps of causal convolutions outside of training: a whole network in one call of a session's kernels.

States stay values: the session's own state is a copy of the one that the last step returned. A step that is given
another state loads it first.
"""

from __future__ import annotations

import itertools
import operator
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from torch.nn.utils.parametrize import ParametrizationList

from seqaccel import _common, _extension, backends
from seqaccel.nn import streaming
from seqaccel.nn.conv import TCN, CausalConv1d, TemporalBlock
from seqaccel.nn.streaming import State
from seqaccel.session import Session

_VERSION, _TRAINING = operator.attrgetter("_version"), operator.itemgetter("training")
_OPTIONS = operator.itemgetter("dilation", "groups", "activation")
_ACTIVATION = operator.itemgetter("activation")
_NETWORK_OPTIONS = operator.itemgetter("output_activation", "input_shape", "use_skip_connections", "use_gate")


def _plain(module: nn.Module) -> bool:
    """Whether a session does what a part of a network does."""
    if type(module).__name__ == "_WeightNorm" or type(module) in (TCN, TemporalBlock, nn.Sequential, nn.ModuleDict):
        return True
    if isinstance(module, ParametrizationList):
        return len(module) == 1 and type(module[0]).__name__ == "_WeightNorm"
    if not isinstance(module, CausalConv1d) or (module.stride, module.padding_mode) != (1, "zeros"):
        return False
    parametrizations: Any = module._modules.get("parametrizations", {})
    kind = type(module).__mro__[1] if list(parametrizations) == ["weight"] else type(module)
    return kind is CausalConv1d and not any(isinstance(value, Tensor) for value in module.__dict__.values())


def _address(key: tuple[int, str], part: Tensor) -> tuple[int, str, int]:
    return *key, part.data_ptr()


class _Stepper:
    """A module as it was when its session was made, and the session. It has no reference to the module."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        ours = [m for m in modules if isinstance(m, (CausalConv1d, TemporalBlock, TCN))]
        self.lock = threading.Lock()
        self.parameters: list[Tensor] = [*module.parameters(), *module.buffers()]  # a weight may be a buffer
        self.convolutions = [m.__dict__ for m in ours if isinstance(m, CausalConv1d)]
        self.networks = [m.__dict__ for m in ours if isinstance(m, TCN)]
        members = [m.__dict__[kind] for m in modules for kind in ("_modules", "_parameters", "_buffers")]
        self.members, self.empty = [d for d in members if d], [d for d in members if not d]
        self.empty += [m.__dict__[kind] for m in modules for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self.attributes = [m.__dict__ for m in ours]
        self.values: list[Tensor] = []
        self.seen = self._look()
        states: State = module.init_state(1)  # type: ignore[operator]
        self.levels = isinstance(module, TCN)
        self.shapes = [tuple(t.shape[1:]) for t in (itertools.chain(*states) if self.levels else states)]
        self.usable = (
            all(map(_plain, modules))
            and all(context > 0 for _, context in self.shapes)
            and all(
                type(p) in (nn.Parameter, Tensor) and p.dtype == torch.float32 and p.is_cpu for p in self.parameters
            )
            and not any("forward" in attributes for attributes in self.attributes)
            and not any(self.empty)
        )
        self.session: Session | None = None
        self.last: State | None = None
        self.parts: list[Tensor] = []

    def _look(self) -> tuple[Any, ...]:
        """What a session depends on, but not the parameters' values."""
        return (
            list(map(id, itertools.chain.from_iterable(map(dict.values, self.members)))),
            list(map(_VERSION, self.parameters)),
            list(map(Tensor.data_ptr, self.parameters)),
            list(map(_OPTIONS, self.convolutions)),
            list(map(_ACTIVATION, self.attributes)),
            list(map(_NETWORK_OPTIONS, self.networks)),
            list(map(len, self.attributes)),
        )

    def is_current(self) -> bool:
        return self._look() == self.seen and not any(self.empty)

    def has_these_values(self) -> bool:
        """Also after a change that no version counts, such as through ``.data``."""
        return all(map(torch.equal, self.parameters, self.values))

    def _load(self, module: nn.Module, state: State, batch: int) -> bool:
        """Whether the state could be given to the session."""
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
            if self.session is None:
                self.values = [p.detach().clone() for p in self.parameters]
            self.session = Session(module, batch) if self.session is None else self.session.fork(batch)
            self.sizes = [(batch, channels, context) for channels, context in self.shapes]
            self.strides = [(channels * context, 1, channels) for channels, context in self.shapes]
            self.keys = [(part.layer, part.part) for part in self.session._states]
        rows = [t.transpose(1, 2).contiguous().resolve_neg() for t in parts]
        self.session._session.write_state(list(map(_address, self.keys, rows)))
        return True

    def step(self, module: nn.Module, x_t: Tensor, state: State) -> tuple[Tensor, State] | None:
        loaded = state is self.last and not any(map(_VERSION, self.parts)) and self.session.batch_size == x_t.shape[0]  # type: ignore[union-attr]
        self.last = None
        if not loaded and not self._load(module, state, x_t.shape[0]):
            return None
        session: Any = self.session
        y = session.step(x_t)
        parts = list(map(torch.empty_strided, self.sizes, self.strides))
        session._session.read_state(list(map(_address, self.keys, parts)))
        new = tuple(zip(parts[::2], parts[1::2], strict=True)) if self.levels else tuple(parts)
        self.last, self.parts = new, parts
        return y, new


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
        _steppers[module] = _Stepper(module)
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
        if x_t.shape[1] != stepper.convolutions[0]["in_channels"]:
            return None
        if not torch.is_inference_mode_enabled():
            return stepper.step(module, x_t, state)
        with torch.inference_mode(False), torch.no_grad():  # tensors made in that mode have no versions
            return stepper.step(module, x_t, state)
    finally:
        stepper.lock.release()


streaming.step_outside_of_training = _step
