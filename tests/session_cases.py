"""Sessions of a user's module and of a list of layers, for the fuzzers and the tests of memory. Inputs: 4 values."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import seqaccel

State = tuple[Tensor, Tensor]


class Traced(torch.nn.Module):
    """A cell that no kernel knows and one of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.cell = torch.nn.Linear(9, 10), torch.nn.GRUCell(5, 6)

    def init_state(self, batch_size: int) -> State:
        return torch.zeros(batch_size, 5), torch.zeros(batch_size, 6)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        own, known = state
        value, gate = self.gates(torch.cat([x_t, own], -1)).chunk(2, -1)
        gate = gate.sigmoid()
        own = gate * own + (1 - gate) * value.tanh()
        known = self.cell(F.softmax(own, -1), known)
        return torch.cat([own, F.gelu(known)], -1), (own, known)


def layers() -> list[torch.nn.Module]:
    both = seqaccel.Concatenation(
        torch.nn.Identity(), seqaccel.Residual(seqaccel.nn.LSTM(4, 4)), torch.nn.GRU(4, 5, num_layers=2)
    )
    return [both, seqaccel.Residual(torch.nn.Linear(13, 13), torch.nn.Tanh()), seqaccel.nn.SRU(13, 5)]


#: What makes the module, and the example of a step that tracing needs.
SESSIONS: dict[str, tuple[Callable[[], torch.nn.Module | list[torch.nn.Module]], Tensor | None]] = {
    "traced": (Traced, torch.zeros(1, 4)),
    "list": (layers, None),
}


def make(name: str, weights: str = "float32") -> seqaccel.Session:
    """A session of one stream, always with the same weights."""
    module, example = SESSIONS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return seqaccel.Session(module(), 1, weights, example=example)


@functools.cache
def _packed(name: str, weights: str, isa: str) -> seqaccel.Session:
    return make(name, weights)


def session(name: str, weights: str, batch_size: int) -> seqaccel.Session:
    """A session at its initial state; modules are traced and packed once for each instruction set."""
    return _packed(name, weights, torch.ops.seqaccel.isa()).fork(batch_size)
