"""The column cells in pieces, in layers, as operators; their errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from column_cases import FLOATS, KINDS, LEAVES, call, each_cell, offsets, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import CPP, DOUBLE, EVERY_BACKEND, TRITON, needs_cpp, needs_triton, rounded

import seqaccel
import seqaccel.functional as SF
from seqaccel import backends
from seqaccel.functional.scan import CELLS
from seqaccel.reference import scan as reference

# ---- sequences in pieces ----


def part(operands, steps):
    """The operands of some steps."""
    per_step = {
        name: operands[name][steps]
        for name in ("u", "x", "mask", "mask_pad", "reset")
        if operands[name] is not None and (name != "mask" or operands["mask"].dim() == 3)
    }
    return operands | per_step


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whole_is_streamed_is_reset_is_packed(data):
    cell = data.draw(st.sampled_from(list(CELLS)))
    backend = data.draw(
        st.sampled_from(["reference", "cpp"] if backends.why_missing("cpp", "cpu") is None else ["reference"])
    )
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    directions = data.draw(st.sampled_from([1, 2]))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    T, ends = sum(lengths), np.cumsum([0, *lengths]).tolist()
    operands = problem(cell, T, 1, 3, directions, masks=True) | {"mask_pad": None, "reset": None}
    starts = rounded(len(lengths), 3 * directions)
    mask = operands["mask"]
    with seqaccel.backend(backend):
        # Sequences of their own, against the same packed and, where all but the first begin with zeros, against resets.
        alone = [
            call(cell, part(operands, slice(*ends[n : n + 2])) | {"c_0": starts[n : n + 1]})
            for n in range(len(lengths))
        ]
        packed = offsets(*ends) | {"c_0": starts}
        if mask is not None and mask.dim() == 2:
            packed["mask"] = mask.expand(len(lengths), -1)
        h, c_n = call(cell, operands | packed)
        torch.testing.assert_close(h, torch.cat([h for h, _ in alone]))
        torch.testing.assert_close(c_n, torch.cat([c for _, c in alone]))

        reset = torch.zeros(T, 1, dtype=torch.bool)
        reset[[end for end in ends[1:] if 0 < end < T]] = True
        found, _ = call(cell, operands | {"reset": reset})
        first = next((n for n, length in enumerate(lengths) if length), 0)
        last = len(lengths) - 1 - next((n for n, length in enumerate(reversed(lengths)) if length), 0)
        states = torch.zeros(len(lengths), directions, 3, dtype=DOUBLE)
        states[first, 0] = operands["c_0"][0, :3]
        if directions == 2:  # against time
            states[last, 1] = operands["c_0"][0, 3:]
        h, _ = call(cell, operands | packed | {"c_0": states.flatten(1)})
        torch.testing.assert_close(found, h)
        if directions == 1:
            whole, c_n = call(cell, operands)
            c, rows = operands["c_0"], []
            for n in range(len(lengths)):
                h, c = call(cell, part(operands, slice(*ends[n : n + 2])) | {"c_0": c})
                rows.append(h)
            torch.testing.assert_close(torch.cat(rows), whole)
            torch.testing.assert_close(c, c_n)


# ---- layers ----


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@each_cell
def test_layer_is_the_product_and_the_recurrence(cell, backend, poison):
    spec = CELLS[cell]
    for same in (False, True) if spec.skip else (False,):
        features = 8 if same else 3
        o = problem(cell, 6, 3, 4, inputs=3 if spec.skip else None, **KINDS["masks"])
        input = o["x"] if same else rounded(6, 3, features)
        width = o["u"].shape[2]
        weight = rounded(*((features, width) if spec.interleaved else (width, features)))
        leaves = [input, weight, *(o[name] for name in LEAVES[1:])]
        leaves = list({id(t): t.requires_grad_() for t in leaves if t is not None}.values())
        masks = {name: o[name] for name in ("x", "mask", "scale", "mask_pad", "reset", "directions")}
        grads = rounded(6, 3, 8), rounded(3, 8)
        with seqaccel.backend(backend):
            actual = SF.column_layer(cell, input, weight, o["weight"], o["bias"], o["c_0"], **masks)
            u = input @ (weight if spec.interleaved else weight.t())
            expected = reference.columns(cell, **(o | {"u": u}))
            torch.testing.assert_close(actual, expected)
            found = torch.autograd.grad(actual, leaves, grads)
            torch.testing.assert_close(found, torch.autograd.grad(expected, leaves, grads))
            with torch.no_grad():
                bare = SF.column_layer(cell, input, weight, o["weight"], o["bias"], o["c_0"], **masks)
                torch.testing.assert_close(bare, actual)


@needs_cpp
@each_cell
def test_layer_gradients_of_gradients(cell):
    spec = CELLS[cell]
    weight = rounded(*((3, 2 * spec.inputs) if spec.interleaved else (2 * spec.inputs, 3))).requires_grad_()
    weight_hh = rounded(2 * spec.weights).requires_grad_() if spec.weights else None
    leaves = [rounded(3, 2, 3).requires_grad_(), weight]

    def function(input, weight):
        return SF.column_layer(cell, input, weight, weight_hh)

    with seqaccel.backend("cpp"):
        assert torch.autograd.gradgradcheck(function, leaves)


@needs_cpp
@each_cell
def test_autocast_multiplies_narrow_and_recurs_in_float32(cell):
    spec = CELLS[cell]
    shape = (8, 6 * spec.inputs) if spec.interleaved else (6 * spec.inputs, 8)
    weight = (torch.randn(shape) / 3).requires_grad_()
    weight_hh = torch.zeros(6 * spec.weights) if spec.weights else None
    input = torch.randn(5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        h, c_n = SF.column_layer(cell, input, weight, weight_hh)
    assert h.dtype == c_n.dtype == torch.float32
    u = (input.bfloat16() @ (weight if spec.interleaved else weight.t()).bfloat16()).float()
    torch.testing.assert_close(h, reference.columns(cell, u, None, weight_hh, None, torch.zeros(2, 6))[0])
    h.sum().backward()
    assert weight.grad.dtype == torch.float32


# ---- operators ----


@needs_cpp
@pytest.mark.parametrize("suffix", ["", pytest.param("_triton", marks=needs_triton)])
@pytest.mark.parametrize("cell", ["sru", "fo_pool", "indrnn_relu", "mingru"])
def test_operators_pass_opcheck(cell, suffix):
    if suffix:
        import seqaccel.kernels.scan  # noqa: F401
    # wrap_triton cannot be traced in the interpreter, so the Triton operators' fake is checked where there is a GPU.
    options = {"test_utils": ("test_schema", "test_autograd_registration")} if suffix else {}
    forward, backward = (getattr(torch.ops.seqaccel, f"column_{way}{suffix}") for way in ("forward", "backward"))
    for kind in ({"masks": True}, {"offsets": [0, 1, 4], "directions": 2}):
        o = problem(cell, 4, 1, 3, inputs=3 if cell == "sru" else None, **kind)
        o = {name: t.float() if name in FLOATS and t is not None else t for name, t in o.items()}
        for save in (False, True):
            torch.library.opcheck(forward, (cell, *o.values(), save), **options)
        h, c_n, c = forward(cell, *o.values(), True)
        c = c if c.numel() else h
        *o, directions = o.values()
        torch.library.opcheck(backward, (cell, h, c_n, *o, c, directions), **options)


@needs_cpp
def test_operators_refuse_what_does_not_fit():
    forward, backward = torch.ops.seqaccel.column_forward, torch.ops.seqaccel.column_backward
    good = problem("fo_pool", 4, 2, 3, masks=True)
    h, _, c = forward("fo_pool", *good.values(), True)
    packed = offsets(0, 2, 4)
    for change in (
        {"u": torch.ones(4, 2, 10)},
        {"u": good["u"][0]},
        {"u": good["u"].int()},
        {"x": h},
        {"weight": torch.ones(3)},
        {"bias": torch.ones(3, 3)},
        {"c_0": torch.ones(1, 3)},
        {"mask": torch.ones(2, 3)},
        {"mask": good["mask"].float()},
        {"scale": torch.ones(2)},
        {"mask_pad": torch.ones(4, 2)},
        {"reset": torch.ones(2, 4, dtype=torch.bool)},
        {"directions": 2},
        packed,
        packed | {"mask_pad": None, "reset": None},
    ):
        with pytest.raises(RuntimeError, match="seqaccel: "):
            forward("fo_pool", *(good | change).values(), True)
    with pytest.raises(RuntimeError, match="there is no cell 'lstm'"):
        forward("lstm", *good.values(), True)
    *given, directions = good.values()
    with pytest.raises(RuntimeError, match="expected c to have shape"):
        backward("fo_pool", h, None, *given, c[:3], directions)


@pytest.mark.parametrize("backend", [CPP, TRITON])
@each_cell
def test_offsets_out_of_range_are_kept_in_range(cell, backend):
    if backend == "triton":
        import seqaccel.kernels.scan  # noqa: F401
    suffix = "_triton" if backend == "triton" else ""
    forward, backward = (getattr(torch.ops.seqaccel, f"column_{way}{suffix}") for way in ("forward", "backward"))
    operands = problem(cell, 5, 1, 3, offsets=[0, 2, 5])
    for ends in ([-(2**62), 3, 2**62], [0, 5, 2**40], [4, 2, 1]):
        operands |= offsets(*ends)
        h, c_n, c = forward(cell, *operands.values(), True)
        assert h.shape == (5, 1, 3) and c_n.isfinite().all()
        *given, directions = operands.values()
        backward(cell, h, c_n, *given, c if CELLS[cell].saves_states(False) else h, directions)


@needs_cpp
@pytest.mark.parametrize("cell", ["sru", "fo_pool", "mingru"])
@pytest.mark.parametrize("ends", [(1, 3, 3, 4), (2, 2)])
def test_steps_of_no_sequence_are_zero(cell, ends, poison):
    operands = problem(cell, 5, 1, 3, offsets=[0, *[2] * (len(ends) - 2), 5]) | offsets(*ends)
    h, c_n, c = torch.ops.seqaccel.column_forward(cell, *operands.values(), True)
    for found, wanted in zip((h, c_n), reference.columns(cell, *operands.values()), strict=True):
        torch.testing.assert_close(found, wanted)
    *given, directions = operands.values()
    saved = c if CELLS[cell].saves_states(False) else h
    grads = torch.ops.seqaccel.column_backward(cell, torch.ones_like(h), None, *given, saved, directions)
    assert all(grad.isfinite().all() for grad in grads)


@needs_cpp
@pytest.mark.parametrize("cell", ["sru", "fo_pool", "mingru"])
def test_vmap_folds_the_batch(cell):
    operands = problem(cell, 4, 2, 3, inputs=3 if CELLS[cell].skip else None, masks=True)
    mapped = ["u", *(name for name in ("mask", "mask_pad", "reset") if operands[name] is not None)]
    stacked = [torch.stack([operands[name], operands[name].flip(0)]) for name in mapped]

    def function(*tensors):
        given = operands | dict(zip(mapped, tensors, strict=True))
        return torch.ops.seqaccel.column_forward(cell, *given.values(), False)[:2]

    expected = [torch.stack(parts) for parts in zip(*(function(*(t[i] for t in stacked)) for i in (0, 1)), strict=True)]
    torch.testing.assert_close(list(torch.vmap(function)(*stacked)), expected)


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda u: SF.fo_pool(u[0]), ValueError, r"fo_pool: expected u to have 3 dimensions \(T, B, directions \*"),
        (lambda u: SF.fo_pool(u[..., :5]), ValueError, "fo_pool: expected u to have directions"),
        (lambda u: SF.fo_pool(u, directions=3), ValueError, "fo_pool: expected directions to be 1 or 2, but got 3"),
        (lambda u: SF.fo_pool(u, torch.ones(5)), ValueError, r"bias to have shape \(6,\), but got \(5,\)"),
        (lambda u: SF.fo_pool(u, mask=u[0]), ValueError, r"fo_pool: expected mask to have shape \(4, 3, 2\)"),
        (lambda u: SF.fo_pool(u, scale="1"), TypeError, "fo_pool: expected scale to be a number"),
        (lambda u: SF.min_gru(u, h_0=torch.ones(2, 3)), ValueError, r"min_gru: expected h_0 to have shape \(3, 3\)"),
        (lambda u: SF.min_gru(u, candidate="h"), ValueError, "min_gru: expected candidate to be 'linear' or 'g'"),
        (lambda u: SF.min_lstm(u, h_0=torch.ones(3, 2).double()), TypeError, "h_0 to have the dtype of u"),
        (lambda u: SF.min_lstm(u, reset=torch.ones(4, 3)), ValueError, "min_lstm: expected reset to be bool"),
        (lambda u: SF.min_lstm(u.int()), TypeError, "min_lstm: expected u to be floating point"),
        (lambda u: SF.indrnn(u, torch.ones(5)), ValueError, r"indrnn: expected weight to have shape \(6,\)"),
        (lambda u: SF.indrnn(u, torch.ones(6), nonlinearity="sin"), ValueError, "indrnn: expected nonlinearity"),
        (lambda u: SF.indrnn(u, torch.ones(6, device="meta")), RuntimeError, "weight is on meta"),
        (lambda u: SF.min_gru(u, **offsets(0, 4)), ValueError, "min_gru: expected a batch of 1"),
        (lambda u: SF.min_gru(u[:, :1], **offsets(0, 5)), ValueError, "cu_seqlens to ascend from 0 to 4"),
        (lambda u: SF.min_gru(u[:, :1], **offsets(4)), ValueError, "cu_seqlens to be torch.int64 of shape"),
        (
            lambda u: SF.min_gru(u[:, :1], reset=u[:, :1, 0] > 0, **offsets(0, 4)),
            ValueError,
            "no mask_pad and no reset",
        ),
        (lambda u: SF.column_layer("lstm", u, u[0]), ValueError, "column_layer: expected cell to be one of sru"),
        (lambda u: SF.column_layer("mingru", u, u[0, :, :5]), ValueError, r"weight \(directions \* 2 \* H, I\)"),
        (lambda u: SF.column_layer("mingru", u, u[:, 0], c_0=u), ValueError, r"c_0 to have shape \(3, 2\)"),
        (lambda u: SF.column_layer("indrnn_tanh", u, u[:, 0], u), ValueError, r"weight_hh to have shape \(4,\)"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(4, 3, 6))
