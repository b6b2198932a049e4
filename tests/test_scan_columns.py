"""The column cells (recurrences that are elementwise in their state): every backend against loops of scalars."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scan_cases import DOUBLE, rounded

from seqaccel.functional.scan import CELLS
from seqaccel.reference import scan as reference

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
        "weight": rounded(spec.weights * channels) / 2 if spec.weights else None,
        "bias": rounded(spec.biases * channels) / 2,
        "c_0": rounded(sequences, channels),
        "mask": (torch.rand((sequences, channels) if spec.mask == "BC" else wide) < 0.7).double() if masked else None,
        "scale": torch.tensor([0.75], dtype=DOUBLE) if masked else None,
        "mask_pad": torch.rand(steps, batch) < 0.3 if masks and offsets is None else None,
        "reset": torch.rand(steps, batch) < 0.3 if masks and offsets is None else None,
        "cu_seqlens": None if offsets is None else torch.tensor(offsets),
        "directions": directions,
    }


# ---- the definition ----


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def g(v):
    return v + 0.5 if v >= 0 else sigmoid(v)


def sru(u, c, w, b, x, mask, scale, activation=lambda c: c):
    f, r = sigmoid(u[1] + w[0] * c + b[0]), sigmoid(u[2] + w[1] * c + b[1])
    c = f * c + (1 - f) * u[0]
    skip = u[3] if len(u) == 4 else scale * x
    return skip + mask * r * (activation(c) - skip), c


def pool(u, c, w, b, x, mask, scale):
    f = 1 - scale * mask * (1 - sigmoid(u[1] + b[1]))
    c = f * c + (1 - f) * np.tanh(u[0] + b[0])
    return (sigmoid(u[2] + b[2]) * c if len(u) == 3 else c), c


def indrnn(activation):
    def step(u, h, w, b, *_):
        h = activation(u[0] + w[0] * h + b[0])
        return h, h

    return step


def mingru(candidate):
    def step(u, h, w, b, *_):
        z = sigmoid(u[0] + b[0])
        h = (1 - z) * h + z * candidate(u[1] + b[1])
        return h, h

    return step


def minlstm(candidate):
    def step(u, h, w, b, *_):
        f, i = sigmoid(u[0] + b[0]), sigmoid(u[1] + b[1])
        h = f / (f + i) * h + i / (f + i) * candidate(u[2] + b[2])
        return h, h

    return step


#: A value after a step, and the state, as the papers have them.
SCALARS = {
    "sru": sru,
    "sru_tanh": lambda *arguments: sru(*arguments, np.tanh),
    "fo_pool": pool,
    "f_pool": pool,
    "indrnn_relu": indrnn(lambda v: max(v, 0.0)),
    "indrnn_tanh": indrnn(np.tanh),
    "mingru": mingru(lambda v: v),
    "mingru_g": mingru(g),
    "minlstm": minlstm(lambda v: v),
    "minlstm_g": minlstm(g),
}


def loop(cell, u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens, directions):
    """h and c_n, value by value."""
    arrays = [None if t is None else t.numpy() for t in (u, x, weight, bias, c_0, mask, scale, mask_pad, reset)]
    u, x, weight, bias, c_0, mask, scale, mask_pad, reset = arrays
    (T, B, _), C = u.shape, c_0.shape[1]
    H, K = C // directions, u.shape[2] // C
    h, c_n = np.zeros((T, B, C)), c_0.copy()
    ranges = [(0, T)] * B if cu_seqlens is None else list(itertools.pairwise(cu_seqlens.tolist()))
    for n, d, j in itertools.product(range(len(c_0)), range(directions), range(H)):
        b, channel, c = n if cu_seqlens is None else 0, d * H + j, c_0[n, d * H + j]
        begun = False  # against time: whether a sequence began at the step before
        for t in range(*ranges[n]) if d == 0 else reversed(range(*ranges[n])):
            if reset is not None and (reset[t, b] if d == 0 else begun):
                c = c_0[n, channel]
            begun = reset is not None and reset[t, b]
            if mask_pad is not None and mask_pad[t, b]:
                continue
            at = d * H * K + (j * K + np.arange(K) if cell.startswith("sru") else np.arange(K) * H + j)
            h[t, b, channel], c = SCALARS[cell](
                u[t, b, at],
                c,
                None if weight is None else weight.reshape(-1, C)[:, channel],
                bias.reshape(-1, C)[:, channel],
                None if x is None else x[t, b, channel],
                1.0 if mask is None else mask[n, channel] if mask.ndim == 2 else mask[t, b, channel],
                1.0 if scale is None else scale[0],
            )
        c_n[n, channel] = c
    return h, c_n


@pytest.mark.parametrize("kind", ["plain", "masks", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@each_cell
def test_the_definition_is_the_loop(cell, directions, kind):
    sizes, offsets = ((9, 1, 2), [0, 3, 3, 4, 9]) if kind == "packed" else ((6, 2, 3), None)
    for inputs in (3, 4) if CELLS[cell].skip else (None,):
        operands = problem(cell, *sizes, directions, inputs, kind != "plain", offsets)
        expected = loop(cell, **operands)
        for found, wanted in zip(reference.columns(cell, **operands), expected, strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-14)
