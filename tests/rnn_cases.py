"""What the tests of the recurrent layers share: problems of any cell, and calls of any backend."""

from __future__ import annotations

import contextlib

import pytest
import torch
from instruction_sets import ISAS, isa_fixture
from torch import Tensor

import seqaccel
from seqaccel import nn
from seqaccel.functional.rnn import CELLS
from seqaccel.functional.rnn._layers import Direction, layer
from seqaccel.nn.rnn._base import Recurrent

# T, B, I, H: one row and one step, ragged units, whole vectors, rows beyond a tile and beyond a chunk, weights that a
# backward pass does not pack.
SHAPES = [
    (1, 1, 4, 3),
    (2, 1, 19, 70),
    (5, 3, 7, 10),
    (4, 2, 16, 64),
    (3, 9, 33, 37),
    (2, 50, 3, 130),
    (7, 101, 3, 17),
    (3, 20, 8, 257),
    (2, 35, 5, 112),
]


@contextlib.contextmanager
def one_thread():
    """For torch's recurrent operators: on a busy machine their threads wait for each other, twenty times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kinds(backend: str) -> list[tuple[str, bool]]:
    """Every cell that a backend runs, without and with a projection."""
    found = []
    for cell, spec in CELLS.items():
        if backend in spec.backends:
            found.append((cell, False))
            if spec.projects and backend not in spec.without_projection:
                found.append((cell, True))
    return found


def modules(backend: str = "reference") -> dict[str, type[Recurrent]]:
    """The module of each cell that a backend runs, made without options."""
    recurrent = [t for t in (getattr(nn.rnn, name) for name in nn.rnn.__all__) if issubclass(t, Recurrent)]
    found = {t(1, 1).cell: t for t in recurrent}
    return {cell: t for cell, t in found.items() if backend in CELLS[cell].backends}


def each_kind(backend: str):
    """Parametrizes a test with ``cell`` and ``projected``."""
    found = kinds(backend)
    names = [cell + "_projected" * projected for cell, projected in found]
    return pytest.mark.parametrize("cell, projected", found, ids=names)


def each_cell(backend: str):
    return pytest.mark.parametrize("cell", [cell for cell, projected in kinds(backend) if not projected])


isa = isa_fixture(ISAS)


def names(cell: str, projected: bool = False) -> list[str]:
    """Of the tensors of a problem, without those that are None."""
    spec = CELLS[cell]
    weights = [name for name in spec.weights if name != "weight_hr" or projected]
    return ["input", "h_0", *(["c_0"] if spec.has_cell_state else []), *weights]


def problem(cell, T, B, I, H, *, projected=False, dtype=torch.float64, requires_grad=True) -> dict[str, Tensor]:
    """input, h_0, c_0 and the weights of a layer, by name, in the range a trained layer has."""
    spec, k = CELLS[cell], H**-0.5
    P = max(1, 2 * H // 3) if projected else H
    sizes = {"I": I, "G": spec.gates * H, "H": H, "P": P, "3": 3}
    tensors = {"input": torch.randn(T, B, I), "h_0": torch.randn(B, P).tanh()}
    if spec.has_cell_state:
        tensors["c_0"] = torch.randn(B, H)
    for name in names(cell, projected)[2 + spec.has_cell_state :]:
        shape = [sizes[letter] for letter in spec.weights[name]]
        tensors[name] = torch.empty(shape).uniform_(-k, k)
        if name.startswith("ln_") and name.endswith("weight"):
            tensors[name] = 1 + 0.3 * torch.randn(shape)
    return {name: tensor.to(dtype).requires_grad_(requires_grad) for name, tensor in tensors.items()}


def weights_of(cell, tensors) -> list[Tensor | None]:
    return [tensors.get(name) for name in CELLS[cell].weights]


def call(cell, tensors, backend, **options) -> list[Tensor]:
    """output, h_n and, where there is one, c_n; ``tensors`` by name, those missing being None."""
    with seqaccel.backend(backend):
        lengths, reset = options.pop("lengths", None), options.pop("reset", None)
        direction = Direction(tensors["h_0"], tensors.get("c_0"), weights_of(cell, tensors), **options)
        found = layer(cell, cell, tensors["input"], direction, lengths, reset)
    return [t for t in found if t is not None]


def results(cell, tensors, backend, grads, **options) -> dict[str, Tensor]:
    """Outputs, and the gradient of each tensor from those of the outputs, by name."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    with contextlib.nullcontext() if backend == "cpp" else one_thread():
        outputs = call(cell, tensors, backend, **options)
        found = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
        grads = [g.to(outputs[0].dtype) for g in grads]
        gradients = torch.autograd.grad(outputs, list(tensors.values()), grads)
    return found | {f"grad of {name}": g for name, g in zip(tensors, gradients, strict=True)}


def random_grads(cell, tensors, **options) -> list[Tensor]:
    """Gradients of the outputs."""
    with torch.no_grad():
        return [torch.randn_like(t) for t in call(cell, tensors, "reference", **options)]


def some_lengths(T, B):
    return torch.randint(1, T + 1, (B,)) if B != 1 else torch.tensor([max(1, T - 1)])


def zoneout_masks(cell, tensors, p=0.3):
    """Blend factors of a training step: ``zoneout_h`` and, where there is a c, ``zoneout_c``."""
    T, B = tensors["input"].shape[:2]
    masks = {"zoneout_h": torch.empty(T, B, tensors["h_0"].shape[1]).bernoulli_(p)}
    if CELLS[cell].has_cell_state:
        masks["zoneout_c"] = torch.empty(T, B, tensors["c_0"].shape[1]).bernoulli_(p)
    return masks


def variant(number, cell, tensors, backends) -> dict:
    """One of four ways to call a layer: as it is; reversed, lengths; reversed, zoned out; lengths, expected zoneout."""
    T, B = tensors["input"].shape[:2]
    spec = CELLS[cell]
    zoned = spec.zoneout and not set(backends) & set(spec.without_zoneout)
    options = {"reverse": number in (1, 2), "lengths": some_lengths(T, B) if number % 2 else None}
    if zoned and number == 2:
        options |= zoneout_masks(cell, tensors)
    elif zoned and number == 3:
        options |= {"zoneout_h": 0.1} | ({"zoneout_c": 0.2} if spec.has_cell_state else {})
    return options
