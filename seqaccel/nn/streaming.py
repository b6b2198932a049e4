"""Train in parallel, run step by step: one protocol for every causal module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments

State = tuple[Any, ...]

#: A step in eval mode without gradients, or None where ``extend`` has to do it. ``seqaccel._steps`` sets it.
step_outside_of_training: Callable[[Any, Tensor, State], tuple[Tensor, State] | None] | None = None


def step_at_once(module: Any, x_t: Tensor, state: State) -> tuple[Tensor, State] | None:
    """A step by kernels for steps, or None where they do not do the same as ``extend``."""
    if torch.compiler.is_compiling() or module.training or torch.is_grad_enabled() or step_outside_of_training is None:
        return None
    return step_outside_of_training(module, x_t, state)


def _check(where: str, state: Any) -> Tensor:
    """A state, a nested tuple of tensors; returns its first tensor."""
    if isinstance(state, Tensor):
        return state
    # A part may be empty: the mark of a state of fixed size.
    parts = (
        [part for part in state if not (isinstance(part, tuple) and not part)]
        if isinstance(state, (tuple, list))
        else []
    )
    if not parts:
        kind = "an empty one" if isinstance(state, (tuple, list)) else type(state).__name__
        raise TypeError(f"{where}: expected state to be a (nested) tuple of tensors, but got {kind}")
    first, *_ = [_check(where, part) for part in parts]
    return first


def _map(state: Any, function: Any, *others: Any) -> Any:
    if isinstance(state, Tensor):
        return function(state, *others)
    return tuple(_map(part, function, *(other[i] for other in others)) for i, part in enumerate(state))


class Streaming:
    """Mixin of the modules that run on a stream, chunk by chunk or step by step.

    A state is a (nested) tuple of tensors whose dimension 0 is the batch: every stream of the batch is independent and
    has its own age. States are values: no method changes one in place, and ``torch.save`` stores them. Any split of a
    sequence into chunks gives what one call gives.
    """

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The initial state of ``batch_size`` streams.

        Args:
            batch_size: number of streams.
            device, dtype: of the state; the parameters' by default.
        """
        raise NotImplementedError

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for a chunk ``x`` (laid out as in ``forward``), and the state after it."""
        raise NotImplementedError

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for one time step: ``x_t`` and the output are what ``extend`` has, without the time axis."""
        raise NotImplementedError

    def reset(self, state: State, mask: Tensor) -> State:
        """The state with the streams where ``mask`` (B,) is true set to their initial state."""
        first = _check("reset", state)
        _arguments.mask("reset", "mask", mask, first.shape[:1])
        fresh = self._matching_state(state, first)
        return _map(state, lambda old, new: torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new, old), fresh)

    def _matching_state(self, state: State, first: Tensor) -> State:
        """A fresh state of the same structure as ``state``."""
        return self.init_state(first.shape[0], device=first.device, dtype=first.dtype)

    def select(self, state: State, indices: Tensor) -> State:
        """The states of the streams ``indices`` (N,), in that order; an index may repeat (beam search)."""
        first = _check("select", state)
        _arguments.tensor("select", "indices", indices)
        if indices.dim() != 1 or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"select: expected indices to be 1-D and torch.int64, but got {indices.dtype} of {tuple(indices.shape)}"
            )
        try:
            return _map(state, lambda part: part.index_select(0, indices))
        except IndexError:
            raise IndexError(
                f"select: expected indices between 0 and {first.shape[0] - 1}, but got {indices.tolist()}"
            ) from None
