"""The column cells (recurrences that are elementwise in their state): every backend against loops of scalars."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import CPP, DOUBLE, EVERY_BACKEND, TRITON, instruction_sets, needs_cpp, needs_triton, rounded
from tolerances import assert_close

import seqaccel
import seqaccel.functional as SF
from seqaccel import backends
from seqaccel.functional.scan import CELLS, _columns
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


# ---- every backend ----

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


KINDS = {
    "plain": {},
    "two directions": {"directions": 2},
    "masks": {"directions": 2, "masks": True},
    "packed": {"directions": 2, "masks": True, "offsets": [0, 9, 9, 10, 37]},
}
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


@pytest.mark.parametrize("backend", ["reference", CPP])
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
        # Sequences of their own, against the same packed and, where they begin alike, against resets.
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
        reset[[end for end in ends[1:] if end < T]] = True
        found, _ = call(cell, operands | {"reset": reset})
        h, _ = call(cell, operands | packed | {"c_0": operands["c_0"].expand(len(lengths), -1)})
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


def offsets(*ends):
    return {"cu_seqlens": torch.tensor(ends)}


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
        (lambda u: SF.min_lstm(u, reset=torch.ones(4, 3)), TypeError, "min_lstm: expected reset to be torch.bool"),
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
