"""What the tests of the recurrent layers share: problems of any cell, and calls of any backend."""

from __future__ import annotations

import torch
from torch import Tensor

import seqaccel
from seqaccel.functional.rnn import _operator
from seqaccel.functional.rnn._cells import CELLS

ISAS = ["portable", "avx2", "avx512"]
#: A cell, and whether with a projection: every kind of layer there is.
KINDS = [(cell, False) for cell in CELLS] + [(cell, True) for cell, spec in CELLS.items() if spec.projects]
IDS = [cell + ("_projected" if projected else "") for cell, projected in KINDS]
# T, B, I, H: one row and one step, ragged units, whole vectors, rows beyond a tile and beyond a chunk.
SHAPES = [
    (1, 1, 4, 3),
    (2, 1, 19, 70),
    (5, 3, 7, 10),
    (4, 2, 16, 64),
    (3, 9, 33, 37),
    (2, 50, 3, 130),
    (7, 101, 3, 17),
    (3, 20, 8, 257),
]


def projected_size(H: int) -> int:
    return max(1, 2 * H // 3)


def names(cell: str, projected: bool = False) -> list[str]:
    """Of the tensors of a problem, without those that are None."""
    spec = CELLS[cell]
    weights = [name for name in spec.weights if name != "weight_hr" or projected]
    return ["input", "h_0", *(["c_0"] if spec.has_cell_state else []), *weights]


def problem(cell, T, B, I, H, *, projected=False, dtype=torch.float64, requires_grad=True) -> dict[str, Tensor]:
    """input, h_0, c_0 and the weights of a layer, by name, in the range a trained layer has."""
    spec, k = CELLS[cell], H**-0.5
    sizes = {"I": I, "G": spec.gates * H, "H": H, "P": projected_size(H) if projected else H, "3": 3}
    tensors = {"input": torch.randn(T, B, I), "h_0": torch.randn(B, sizes["P"]).tanh()}
    if spec.has_cell_state:
        tensors["c_0"] = torch.randn(B, H)
    for name, shape in spec.weights.items():
        if name in names(cell, projected):
            tensors[name] = torch.empty([sizes[letter] for letter in shape]).uniform_(-k, k)
            if name.startswith("ln_") and name.endswith("weight"):
                tensors[name] = 1 + 0.3 * torch.randn(sizes[shape])
    return {name: tensor.to(dtype).requires_grad_(requires_grad) for name, tensor in tensors.items()}


def call(cell, tensors, backend, **options) -> list[Tensor]:
    """output, h_n and, where there is one, c_n; ``tensors`` by name, those missing being None."""
    weights = [tensors.get(name) for name in CELLS[cell].weights]
    with seqaccel.backend(backend):
        found = _operator.layer(cell, cell, tensors["input"], tensors["h_0"], tensors.get("c_0"), weights, **options)
    return [t for t in found if t is not None]


def results(cell, tensors, backend, grads=None, **options) -> dict[str, Tensor]:
    """Outputs, and the gradient of each tensor, by name; ``grads`` of the outputs are random by default."""
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    outputs = call(cell, tensors, backend, **options)
    found = dict(zip(("output", "h_n", "c_n"), outputs, strict=False))
    gradients = torch.autograd.grad(
        outputs, list(tensors.values()), [g.to(outputs[0].dtype) for g in grads], allow_unused=True
    )
    return found | {f"grad of {name}": g for name, g in zip(tensors, gradients, strict=True)}


def some_lengths(T, B):
    return torch.randint(1, T + 1, (B,)) if B > 1 else torch.tensor([max(1, T - 1)])


def zoneout_masks(cell, tensors, p=0.3):
    """Blend factors of a training step: ``zoneout_h`` and, where there is a c, ``zoneout_c``."""
    T, B = tensors["input"].shape[:2]
    masks = {"zoneout_h": torch.empty(T, B, tensors["h_0"].shape[1]).bernoulli_(p)}
    if CELLS[cell].has_cell_state:
        masks["zoneout_c"] = torch.empty(T, B, tensors["c_0"].shape[1]).bernoulli_(p)
    return masks
