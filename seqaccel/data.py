"""What reads data in the order that recurrent nets need: chunks that carry a state, contiguous batches, a sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments

__all__ = ["ContiguousBatches", "SequencedReplacementSampler", "tbptt"]


def _detached(state: Any) -> Any:
    """A state without its history: a tensor, or tuples, lists and dicts of states; what else it holds stays."""
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {key: _detached(value) for key, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):  # a named one
        return type(state)(*map(_detached, state))
    return type(state)(map(_detached, state)) if isinstance(state, (tuple, list)) else state


class tbptt:
    r"""Truncated back-propagation through time: chunks of k time steps, and the state that goes from one to the next.

    Iterating yields the chunks in order. What is assigned to :attr:`state` is detached, so a chunk's gradient stops at
    its first step. Any state will do: of one module or, as a tuple or dict of states, of a stack.

    Args:
        x: sequences, or a tuple of tensors of as many steps (inputs and targets), which are cut alike.
        k: time steps of a chunk; the last one may be shorter.
        state: the state before the first chunk. Default: none
        dim: the dimension of time; 1 for modules with ``batch_first=True``, -1 for convolutions. Default: 0

    Attributes:
        state: the state before the next chunk.

    Source: Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network
    trajectories, 1990.

    Example:
        >>> import torch, seqaccel
        >>> lstm, x = seqaccel.nn.LSTM(3, 4), torch.randn(10, 2, 3)
        >>> chunks = seqaccel.data.tbptt(x, 4)
        >>> for chunk in chunks:
        ...     y, chunks.state = lstm(chunk, chunks.state)
        ...     y.sum().backward()
        ...     print(len(chunk))
        4
        4
        2
    """

    def __init__(self, x: Tensor | tuple[Tensor, ...], k: int, *, state: Any = None, dim: int = 0) -> None:
        self._parts = x if isinstance(x, (tuple, list)) else (x,)
        if not self._parts:
            raise ValueError("tbptt: expected x to be a tensor or a tuple of tensors, but got an empty one")
        for part in self._parts:
            _arguments.tensor("tbptt", "x", part)
        _arguments.integer("tbptt", "k", k, least=1)
        _arguments.integer("tbptt", "dim", dim)
        if any(not -part.dim() <= dim < part.dim() for part in self._parts):
            raise ValueError(f"tbptt: expected dim to be one of x, but got {dim} for {[p.dim() for p in self._parts]}")
        lengths = [part.shape[dim] for part in self._parts]
        if len(set(lengths)) > 1:
            raise ValueError(f"tbptt: expected the tensors of x to have as many steps each, but got {lengths}")
        self._one, self._k, self._dim, self._length = isinstance(x, Tensor), k, dim, lengths[0]
        self.state = state

    @property
    def state(self) -> Any:
        return self._state

    @state.setter
    def state(self, value: Any) -> None:
        self._state = _detached(value)

    def __len__(self) -> int:
        return -(-self._length // self._k)

    def __iter__(self) -> Iterator[Any]:
        for begin in range(0, self._length, self._k):
            steps = min(self._k, self._length - begin)
            chunk = tuple(part.narrow(self._dim, begin, steps) for part in self._parts)
            yield chunk[0] if self._one else chunk


class ContiguousBatches:
    r"""A stream of tokens as batches in which row b goes on where row b of the batch before ended.

    The stream of N tokens is cut into ``batch_size`` rows of :math:`\lfloor (N - 1) / \mathrm{batch\_size} \rfloor`
    tokens; what is left over at its end is not used. Iterating yields pairs of an input and its target, the input one
    token later, (batch_size, steps) each. A state that a module carries from batch to batch so belongs to its row.

    Args:
        tokens: (N,): a tensor, or anything that slices to what :func:`torch.as_tensor` takes, as ``numpy.memmap`` does
            for a text larger than memory.
        batch_size: rows.
        steps: tokens of a row in a batch; the last batch may have fewer.
        time_first: whether pairs are (steps, batch_size), as :class:`torch.nn.LSTM` has them. Default: False

    :meth:`state_dict` in the middle of an iteration says which batch is next; after :meth:`load_state_dict` iterating
    begins with it.

    Example:
        >>> import torch, seqaccel
        >>> for x, target in seqaccel.data.ContiguousBatches(torch.arange(10), 2, 3):
        ...     print(x.tolist(), target.tolist())
        [[0, 1, 2], [4, 5, 6]] [[1, 2, 3], [5, 6, 7]]
        [[3], [7]] [[4], [8]]
    """

    def __init__(self, tokens: Any, batch_size: int, steps: int, *, time_first: bool = False) -> None:
        where = "ContiguousBatches"
        _arguments.integer(where, "batch_size", batch_size, least=1)
        _arguments.integer(where, "steps", steps, least=1)
        _arguments.flag(where, "time_first", time_first)
        shape = tuple(getattr(tokens, "shape", ())) or (len(tokens),)
        if len(shape) != 1:
            raise ValueError(f"{where}: expected tokens to be of one dimension, but got {shape}")
        if shape[0] <= batch_size:
            raise ValueError(f"{where}: expected more than {batch_size} tokens, one a row, but got {shape[0]}")
        self.tokens, self.batch_size, self.steps, self.time_first = tokens, batch_size, steps, time_first
        self._row = (shape[0] - 1) // batch_size
        self._next = self._first = 0  # the batch after the one that was yielded, and the one an iteration begins with

    def __len__(self) -> int:
        return -(-self._row // self.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, self._first = self._first, 0
        dim = 0 if self.time_first else 1  # of time
        for i in range(first, len(self)):
            begin, count = i * self.steps, min(self.steps, self._row - i * self.steps)
            starts = [b * self._row + begin for b in range(self.batch_size)]
            rows = [torch.as_tensor(self.tokens[start : start + count + 1]) for start in starts]
            batch = torch.stack(rows, 1 - dim)
            self._next = i + 1
            yield batch.narrow(dim, 0, count), batch.narrow(dim, 1, count)
        self._next = 0

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues where :meth:`state_dict` was taken."""
        following = state_dict["next"]
        _arguments.integer("ContiguousBatches.load_state_dict", "next", following, least=0)
        if following > len(self):
            raise ValueError(f"ContiguousBatches.load_state_dict: batch {following} of a stream of {len(self)} batches")
        self._next = self._first = following


class SequencedReplacementSampler(torch.utils.data.Sampler[list[int]]):
    r"""Mini-batches by sequenced-replacement sampling, for ``DataLoader(dataset, batch_sampler=...)``.

    A pool begins as all N samples. Each step draws a batch of m at random from the pool without replacement, then fills
    the pool up with the m samples that are next in the data set's order, beginning again at its end. So a sample is
    drawn as often as another in the long run, and a batch may hold one twice. An epoch is
    :math:`\lceil N / m \rceil` steps; the pool stays from one epoch to the next.

    Args:
        num_samples: N.
        batch_size: samples of a batch, on each rank.
        generator: draws the samples; the same state gives the same batches. Default: a generator with a random seed,
            or with seed 0 if there are several ranks, which must draw alike.
        num_replicas, rank: of the processes that share the data: each gets its part of the m = batch_size times
            num_replicas samples that a step draws. Default: those of ``torch.distributed`` where it is initialised

    :meth:`state_dict` holds the pool, the position and the generator's state. Take it when as many batches were used as
    were drawn: a ``DataLoader`` with workers draws ahead, ``torchdata.stateful_dataloader.StatefulDataLoader`` saves
    the right one.

    Source: Ho et al., Sequenced-Replacement Sampling for Deep Learning, 2018.

    Example:
        >>> import torch, seqaccel
        >>> generator = torch.Generator().manual_seed(0)
        >>> sampler = seqaccel.data.SequencedReplacementSampler(5, 2, generator=generator)
        >>> [len(batch) for batch in sampler]
        [2, 2, 2]
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        where = "SequencedReplacementSampler"
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if num_replicas is None:
            num_replicas = torch.distributed.get_world_size() if distributed else 1
        if rank is None:
            rank = torch.distributed.get_rank() if distributed else 0
        _arguments.integer(where, "num_samples", num_samples, least=1)
        _arguments.integer(where, "batch_size", batch_size, least=1)
        _arguments.integer(where, "num_replicas", num_replicas, least=1)
        _arguments.integer(where, "rank", rank, least=0)
        if rank >= num_replicas:
            raise ValueError(f"{where}: expected rank to be below num_replicas ({num_replicas}), but got {rank}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{where}: expected generator to be a torch.Generator, but got {type(generator).__name__}")
        self._step_size = batch_size * num_replicas
        if self._step_size > num_samples:
            raise ValueError(
                f"{where}: expected at most num_samples ({num_samples}) samples a step, but got batch_size "
                f"{batch_size} on {num_replicas} ranks"
            )
        self.num_samples, self.batch_size, self.num_replicas, self.rank = num_samples, batch_size, num_replicas, rank
        if generator is None:
            seed = 0 if num_replicas > 1 else int(torch.empty((), dtype=torch.int64).random_())
            generator = torch.Generator().manual_seed(seed)
        self.generator = generator
        self._pool = list(range(num_samples))
        self._following = 0  # the sample that enters the pool next
        self._step = self._first = 0  # steps of the epoch that were yielded, and the one an iteration begins with

    def __len__(self) -> int:
        return math.ceil(self.num_samples / self._step_size)

    def _draw(self) -> list[int]:
        pool, drawn = self._pool, []
        places = torch.rand(self._step_size, dtype=torch.float64, generator=self.generator).tolist()
        for i, place in enumerate(places):
            j = i + int(place * (self.num_samples - i))
            drawn.append(pool[j])
            pool[j] = pool[i]  # what is drawn leaves its place to one that is not
            pool[i] = (self._following + i) % self.num_samples
        self._following = (self._following + self._step_size) % self.num_samples
        return drawn

    def __iter__(self) -> Iterator[list[int]]:
        first, self._first = self._first, 0
        for step in range(first, len(self)):
            self._step = step + 1
            yield self._draw()[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the batches to come."""
        return {
            "pool": torch.tensor(self._pool),
            "following": self._following,
            "step": self._step,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken, of a sampler of the same sizes."""
        pool = state_dict["pool"]
        if len(pool) != self.num_samples:
            raise ValueError(
                f"SequencedReplacementSampler.load_state_dict: a pool of {len(pool)} samples, but here are "
                f"{self.num_samples}"
            )
        self._pool, self._following = pool.tolist(), state_dict["following"]
        self._step = self._first = state_dict["step"]
        self.generator.set_state(state_dict["generator"])
