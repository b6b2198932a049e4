"""The column cells (recurrences that are elementwise in their state): every backend against loops of scalars."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from column_cases import KINDS, LEAVES, call, converted, each_cell, outputs_and_gradients, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import CPP, DOUBLE, EVERY_BACKEND, TRITON, instruction_sets, needs_cpp, needs_triton, rounded
from tolerances import assert_close

import seqaccel
from seqaccel import backends
from seqaccel.functional.scan import CELLS
from seqaccel.reference import scan as reference

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
                c = 0.0
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


# ---- every backend ----


def check(cell, dtype, *sizes, **options):
    operands = problem(cell, *sizes, **options)
    wide = (*sizes[:2], operands["c_0"].shape[1])
    grads = rounded(*wide), rounded(*operands["c_0"].shape)
    with seqaccel.backend("reference"):
        expected = outputs_and_gradients(cell, converted(operands, DOUBLE), grads)
    typed = converted(operands, dtype)
    actual = outputs_and_gradients(cell, typed, grads)
    for name, wanted in expected.items():
        assert actual[name].dtype == dtype and actual[name].shape == wanted.shape
        assert_close(actual[name], wanted, "columns", dtype, backward=name.startswith("grad"), what=name)
    with torch.no_grad():
        for name, found in zip(("h", "c_n"), call(cell, typed), strict=True):
            assert torch.equal(found, actual[name])


each_kind = pytest.mark.parametrize("kind", KINDS)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16], ids=str)
@each_kind
@each_cell
def test_cpp(cell, kind, dtype, poison):
    with seqaccel.backend("cpp"):
        for inputs in (3, 4) if CELLS[cell].skip else (None,):
            for batch, hidden in ((3, 5), (1, 67)):
                batch = 1 if kind == "packed" else batch
                check(cell, dtype, 37, batch, hidden, inputs=inputs, **KINDS[kind])


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets())
@each_cell
def test_instruction_sets(cell, isa, poison):
    with seqaccel.backend("cpp"), backends.isa(isa):
        for dtype in (torch.float32, torch.bfloat16):
            check(cell, dtype, 7, 2, 37, **KINDS["masks"])


@needs_triton
@each_kind
@each_cell
def test_triton(cell, kind, poison):
    sizes = (7, 1 if kind == "packed" else 2, 5)
    kind = KINDS[kind] | ({"offsets": [0, 3, 3, 4, 7]} if kind == "packed" else {})
    with seqaccel.backend("triton"):
        check(cell, torch.float32, *sizes, inputs=3 if CELLS[cell].skip else None, **kind)


@pytest.mark.parametrize("backend", [CPP, TRITON])
@pytest.mark.parametrize("steps", [1, 3, 4, 5])
def test_few_steps(backend, steps, poison):
    """About as many as kernels load ahead."""
    with seqaccel.backend(backend):
        for cell in ("sru", "fo_pool", "indrnn_tanh", "minlstm_g"):
            check(cell, torch.float32, steps, 2, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@each_cell
def test_on_a_gpu(cell, backend, dtype, poison):
    with torch.device("cuda"), seqaccel.backend(backend):
        for kind in KINDS:
            for (batch, hidden), inputs in itertools.product(
                ((3, 5), (2, 300)), (3, 4) if CELLS[cell].skip else (None,)
            ):
                check(cell, dtype, 37, 1 if kind == "packed" else batch, hidden, inputs=inputs, **KINDS[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_cell
def test_the_reference_calculates_narrow_types_in_float32(cell, dtype):
    with seqaccel.backend("reference"):
        check(cell, dtype, 5, 2, 3, directions=2)


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_size(data):
    cell = data.draw(st.sampled_from(list(CELLS)))
    T, B, H = (data.draw(st.integers(least, most)) for least, most in ((0, 40), (0, 5), (1, 70)))
    inputs = data.draw(st.sampled_from([3, 4])) if CELLS[cell].skip else None
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    with seqaccel.backend("cpp"):
        check(cell, torch.float32, T, B, H, inputs=inputs, directions=data.draw(st.sampled_from([1, 2])),
              masks=data.draw(st.booleans()))  # fmt: skip


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@each_cell
def test_any_layout(cell, backend):
    """Strides, expanded tensors and negative bits."""
    operands = problem(cell, 6, 2, 4, **KINDS["masks"])
    operands["u"], operands["bias"] = (
        operands["u"][:1].expand(6, -1, -1),
        operands["bias"][:1].expand_as(operands["bias"]),
    )
    grads = rounded(1, 1, 1).expand(6, 2, 8), rounded(2, 8)
    with seqaccel.backend(backend):
        expected = outputs_and_gradients(cell, converted(operands, torch.float32, torch.clone), grads)
        for change in (
            lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0].detach(),
            lambda t: torch._neg_view(-t).detach(),
        ):
            found = outputs_and_gradients(cell, converted(operands, torch.float32, change), grads)
            for name, wanted in expected.items():
                assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize("backend", [CPP])
@pytest.mark.parametrize("kind", ["masks", "packed"])
@each_cell
def test_gradients_by_differences(cell, kind, backend):
    kind, sizes = (
        (KINDS["masks"], (3, 2, 2)) if kind == "masks" else (KINDS["packed"] | {"offsets": [0, 2, 2, 4]}, (4, 1, 2))
    )
    operands = converted(problem(cell, *sizes, **kind), DOUBLE)
    names = [name for name in LEAVES if operands[name] is not None]

    def function(*tensors):
        return call(cell, operands | dict(zip(names, tensors, strict=True)))

    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(function, [operands[name] for name in names])
        if cell != "indrnn_relu":  # whose second derivatives are zero
            assert torch.autograd.gradgradcheck(function, [operands[name] for name in names])


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@each_cell
def test_one_result_used(cell, backend):
    operands = converted(problem(cell, 4, 2, 3), torch.float32)
    leaves = [operands[name] for name in LEAVES if operands[name] is not None]
    for which in (0, 1):
        found = []
        for name in (backend, "reference"):
            with seqaccel.backend(name):
                found.append(torch.autograd.grad(call(cell, operands)[which].sum(), leaves, materialize_grads=True))
        torch.testing.assert_close(*found)


@needs_cpp
@each_cell
def test_saves_its_output_and_nothing_more(cell):
    """Where the output is the state; else the states, too."""
    operands, saved = converted(problem(cell, 5, 2, 4, inputs=3 if CELLS[cell].skip else None), torch.float32), []
    operands["u"] = operands["u"] * 1.0
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h, _ = call(cell, operands)
    wide = [t for t in saved if t.dim() == 3 and t.shape == h.shape and t is not operands["x"]]
    assert any(t.data_ptr() == h.data_ptr() for t in saved) == CELLS[cell].output_is_state
    assert len(wide) == 1 + (CELLS[cell].inputs == 1)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@each_cell
def test_empty(cell, backend):
    with seqaccel.backend(backend):
        for sizes in ((0, 2, 3), (4, 0, 3)):
            operands = converted(problem(cell, *sizes, directions=2), torch.float32)
            h, c_n = call(cell, operands)
            assert h.shape == (*sizes[:2], 6) and torch.equal(c_n, operands["c_0"])
            (h.sum() + c_n.sum()).backward()
            assert operands["u"].grad.shape == operands["u"].shape


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_cell
def test_a_spoilt_step_stays_in_its_column(cell, bad, backend):
    operands = problem(cell, 6, 2, 3, directions=2)
    with seqaccel.backend(backend):
        expected, _ = call(cell, operands)
        spoilt = operands | {"u": operands["u"].clone()}
        spoilt["u"][3, 1] = bad
        found, _ = call(cell, spoilt)
    assert torch.equal(found[:, 0], expected[:, 0])
    assert torch.equal(found[:3, 1, :3], expected[:3, 1, :3]) and torch.equal(found[4:, 1, 3:], expected[4:, 1, 3:])


@needs_cpp
@each_cell
def test_padding_has_no_say(cell):
    """No output or gradient sees what lies at padding, not even NaN."""
    operands = problem(cell, 6, 3, 5, directions=2)
    padding = operands["mask_pad"] = torch.arange(6).unsqueeze(1) >= torch.tensor([6, 2, 1])
    grads = rounded(6, 3, 10), rounded(3, 10)
    with seqaccel.backend("cpp"):
        expected = outputs_and_gradients(cell, converted(operands, torch.float32), grads)
        for name in ("u", "x"):
            if operands[name] is not None:
                operands[name] = operands[name].masked_fill(padding.unsqueeze(2), float("nan"))
        spoilt = grads[0].masked_fill(padding.unsqueeze(2), float("nan")), grads[1]
        found = outputs_and_gradients(cell, converted(operands, torch.float32), spoilt)
    for name, wanted in expected.items():
        assert torch.equal(found[name], wanted), name


@needs_cpp
@pytest.mark.parametrize("cell", ["sru", "fo_pool", "indrnn_relu", "minlstm"])
def test_same_bits_for_any_number_of_threads(cell):
    operands = converted(problem(cell, 130, 5, 70, **KINDS["masks"]), torch.float32)
    grads = rounded(130, 5, 140), rounded(5, 140)
    with seqaccel.backend("cpp"):
        first = outputs_and_gradients(cell, operands, grads)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                again = outputs_and_gradients(cell, operands, grads)
            finally:
                torch.set_num_threads(2)
            for name, t in first.items():
                assert torch.equal(again[name], t), name
