"""Train in parallel, run step by step: one protocol for every causal module."""

from typing import Any

import torch
from torch import Tensor

State = tuple[Any, ...]


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
        """The state of ``batch_size`` streams that have seen nothing.

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
        """The state with the streams where ``mask`` (B,) is true starting anew."""
        first = state
        while not isinstance(first, Tensor):
            first = first[0]
        if mask.dtype != torch.bool or mask.shape != first.shape[:1]:
            raise ValueError(
                f"reset: expected mask to be bool of shape ({first.shape[0]},), "
                f"but got {mask.dtype} of {tuple(mask.shape)}"
            )
        fresh = self._matching_state(state, first)
        return _map(state, lambda old, new: torch.where(mask.view(-1, *[1] * (old.dim() - 1)), new, old), fresh)

    def _matching_state(self, state: State, first: Tensor) -> State:
        """A fresh state of the same structure as ``state``."""
        return self.init_state(first.shape[0], device=first.device, dtype=first.dtype)

    def select(self, state: State, indices: Tensor) -> State:
        """The states of the streams ``indices`` (N,), in that order; an index may come more than once (beam search)."""
        return _map(state, lambda part: part.index_select(0, indices))
