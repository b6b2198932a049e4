"""Problems of the column cells, and the calls that solve them."""

from __future__ import annotations

import pytest
import torch
from scan_cases import DOUBLE, rounded

import seqaccel.functional as SF
from seqaccel.functional.scan import CELLS, _columns

each_cell = pytest.mark.parametrize("cell", CELLS)


def problem(cell, steps, batch, hidden, directions=1, inputs=None, masks=False, offsets=None):
    """The operands of a cell, by name. ``offsets``: sequences packed in a batch of one."""
    spec = CELLS[cell]
    inputs = inputs or spec.inputs
    channels = directions * hidden
    sequences = batch if offsets is None else len(offsets) - 1
    wide = (steps, batch, channels)
    masked = masks and spec.mask
    return {
        "u": rounded(steps, batch, channels * inputs),
        "x": rounded(*wide) if spec.skip and inputs < spec.inputs else None,
        "weight": (rounded(spec.weights * channels) / 2).clamp(-0.875, 0.875) if spec.weights else None,
        "bias": rounded(spec.biases * channels) / 2,
        "c_0": rounded(sequences, channels),
        "mask": (torch.rand((sequences, channels) if spec.mask == "BC" else wide) < 0.7).double() if masked else None,
        "scale": torch.tensor([0.75], dtype=DOUBLE) if masked else None,
        "mask_pad": torch.rand(steps, batch) < 0.3 if masks and offsets is None else None,
        "reset": torch.rand(steps, batch) < 0.3 if masks and offsets is None else None,
        "cu_seqlens": None if offsets is None else torch.tensor(offsets),
        "directions": directions,
    }


FLOATS = ("u", "x", "weight", "bias", "c_0", "mask", "scale")
LEAVES = FLOATS[:5]


def call(cell, operands):
    """By the public function."""
    o = dict(operands)
    rest = {name: o[name] for name in ("mask_pad", "reset", "cu_seqlens", "directions")}
    if cell.startswith("sru"):
        masks = {"mask_c": o["mask"], "scale_x": o["scale"], "use_tanh": cell == "sru_tanh"}
        return SF.sru(o["u"], o["x"], o["weight"], o["bias"], o["c_0"], **masks, **rest)
    if "pool" in cell:
        masks = {"mask": o["mask"], "scale": o["scale"], "output_gate": cell == "fo_pool"}
        return SF.fo_pool(o["u"], o["bias"], o["c_0"], **masks, **rest)
    if cell.startswith("indrnn"):
        return SF.indrnn(o["u"], o["weight"], o["bias"], o["c_0"], nonlinearity=cell.removeprefix("indrnn_"), **rest)
    if cell.startswith("min"):
        function = SF.min_gru if cell.startswith("mingru") else SF.min_lstm
        return function(o["u"], o["bias"], o["c_0"], candidate="g" if cell.endswith("_g") else "linear", **rest)
    return _columns.recurrence(_columns.Caller(cell, {}), cell, *o.values())  # a new cell has no function yet


def converted(operands, dtype, change=lambda t: t):
    """The operands in another dtype, those that have gradients as leaves."""
    found = dict(operands)
    for name in FLOATS:
        if found[name] is not None:
            found[name] = change(found[name].to(dtype)).requires_grad_(name in LEAVES)
    return found


def outputs_and_gradients(cell, operands, grads):
    """By name; a gradient that there is not is zero."""
    results = call(cell, operands)
    leaves = {name: operands[name] for name in LEAVES if operands[name] is not None}
    found = torch.autograd.grad(
        results, list(leaves.values()), [g.to(r.dtype) for g, r in zip(grads, results, strict=True)], allow_unused=True
    )
    return dict(zip(("h", "c_n"), results, strict=True)) | {
        f"grad {name}": torch.zeros_like(t) if g is None else g
        for (name, t), g in zip(leaves.items(), found, strict=True)
    }


def offsets(*ends):
    return {"cu_seqlens": torch.tensor(ends)}


KINDS = {
    "plain": {},
    "two directions": {"directions": 2},
    "masks": {"directions": 2, "masks": True},
    "packed": {"directions": 2, "masks": True, "offsets": [0, 9, 9, 10, 37]},
}
