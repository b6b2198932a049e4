"""Recurrent layers: every backend of every cell against the float64 reference, outputs and every gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rnn_cases import (
    SHAPES,
    call,
    each_cell,
    each_kind,
    isa,  # noqa: F401
    kinds,
    problem,
    random_grads,
    results,
    variant,
)
from tolerances import assert_as_good_as, assert_close

from seqaccel.functional.rnn import CELLS


def stock(cell, options):
    """What a backend's error is measured by: torch's operator, or the reference at that precision, plain PyTorch."""
    spec = CELLS[cell]
    zoned = options.get("zoneout_h") is not None
    return "torch" if "torch" in spec.backends and not (zoned and "torch" in spec.without_zoneout) else "reference"


def rms_errors(cell, projected, shape, backend, number, count):
    """Root mean square errors of ``backend`` and of the stock operator in float32, by name, over some problems.

    The largest error of the few values of a small layer is a lottery; its mean square over some problems is not.
    """
    squares = {}
    for _ in range(count):
        tensors = problem(cell, *shape, projected=projected, dtype=torch.float32)
        doubles = {name: t.double() for name, t in tensors.items()}
        options = variant(number, cell, tensors, [backend])
        grads = [g.float() for g in random_grads(cell, doubles, **options)]
        expected = results(cell, doubles, "reference", grads, **options)
        for column, contender in enumerate((backend, stock(cell, options))):
            for name, found in results(cell, tensors, contender, grads, **options).items():
                square = (found.detach().double() - expected[name].detach()).square().mean().item() / count
                squares.setdefault(name, [0.0, 0.0])[column] += square
    return {name: (ours**0.5, theirs**0.5) for name, (ours, theirs) in squares.items()}


@pytest.mark.parametrize("shape", SHAPES[1::2], ids=str)
@each_kind("cpp")
def test_cpp_is_as_good_as_torch(isa, cell, projected, shape):  # noqa: F811
    number = SHAPES.index(shape) // 2
    count = 8 if shape[1] * shape[3] < 100 else 3
    for name, (ours, theirs) in rms_errors(cell, projected, shape, "cpp", number, count).items():
        assert ours <= 2 * theirs, f"{name}: error {ours:.3g}, the stock operator's {theirs:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind("cpp")
def test_cpp_is_the_reference(isa, poison, cell, projected, shape):  # noqa: F811
    for number in (0, 1) if SHAPES.index(shape) % 2 else (2, 3):
        tensors = problem(cell, *shape, projected=projected)
        options = variant(number, cell, tensors, ["cpp"])
        grads = random_grads(cell, tensors, **options)
        expected = results(cell, tensors, "reference", grads, **options)
        for name, found in results(cell, tensors, "cpp", grads, **options).items():
            assert_close(found, expected[name], "rnn", torch.float64, backward="grad" in name, what=f"{name} {number}")
        with torch.no_grad():
            for found, exact in zip(call(cell, tensors, "cpp", **options), expected.values(), strict=False):
                assert_close(found, exact, "rnn", torch.float64, what=f"without grad {number}")


@settings(deadline=None, max_examples=80)
@given(
    kind=st.sampled_from(kinds("cpp")), T=st.integers(0, 5), B=st.integers(0, 14), I=st.integers(1, 40),
    H=st.integers(1, 70), number=st.integers(0, 3), biases=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_cpp_on_any_shape(kind, T, B, I, H, number, biases, dtype):
    cell, projected = kind
    tensors = problem(cell, T, B, I, H, projected=projected, dtype=dtype)
    options = variant(number if T else number & 2, cell, tensors, ["cpp"])
    for bit, name in enumerate(("bias_ih", "bias_hh")):
        if not biases >> bit & 1:
            del tensors[name]
    found = []
    for backend in ("cpp", "reference"):
        outputs = call(cell, tensors, backend, **options)
        loss = sum((t * t).sum() for t in outputs)
        grads = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, materialize_grads=True)
        found.append([*outputs, *grads])
    # Layer norm of a few equal values divides by their small spread.
    tolerance = (1e-3 if "layer_norm" in cell else 1e-4) if dtype == torch.float32 else 1e-9
    for ours, expected in zip(*found, strict=True):
        scale = max([1.0, *expected.detach().abs().flatten().tolist()])
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("reverse", [False, True])
@each_kind("cpp")
def test_padding_has_no_say(isa, cell, projected, reverse):  # noqa: F811
    """No output or gradient sees what lies past a sequence's end, not even NaN: in inputs or in their gradients."""
    lengths = torch.tensor([1, 4, 2, 3, 1, 4, 3])
    padding = torch.arange(4).unsqueeze(1) >= lengths
    tensors = problem(cell, 4, 7, 5, 19, projected=projected, dtype=torch.float32)
    options = {"reverse": reverse, "lengths": lengths}
    grads = random_grads(cell, tensors, **options)
    expected = results(cell, tensors, "cpp", grads, **options)
    padded = tensors["input"].detach().masked_fill(padding.unsqueeze(2), float("nan"))
    spoilt = [grads[0].masked_fill(padding.unsqueeze(2), float("inf")), *grads[1:]]
    for name, found in results(cell, tensors | {"input": padded}, "cpp", spoilt, **options).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_kind("cpp")
def test_a_spoilt_row_stays_apart(isa, cell, projected, bad):  # noqa: F811
    tensors = problem(cell, 4, 7, 5, 19, projected=projected, dtype=torch.float32)
    grads = random_grads(cell, tensors)
    expected = results(cell, tensors, "cpp", grads)
    spoilt = tensors["input"].detach().clone()
    spoilt[1, 3, 0] = bad
    others = torch.tensor([0, 1, 2, 4, 5, 6])
    found = results(cell, tensors | {"input": spoilt}, "cpp", grads)
    for name in found.keys() & {"output", "h_n", "c_n", "grad of input", "grad of h_0", "grad of c_0"}:
        dim = 1 if name in ("output", "grad of input") else 0
        assert torch.equal(found[name].index_select(dim, others), expected[name].index_select(dim, others)), name


# ---- types ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_kind("cpp")
def test_narrow_types_are_computed_in_float32(cell, projected, dtype):
    tensors = problem(cell, 6, 3, 5, 20, projected=projected, dtype=torch.float32)
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    doubles = {name: t.double() for name, t in tensors.items()}
    options = variant(3, cell, tensors, ["cpp"])
    grads = [g.to(dtype) for g in random_grads(cell, doubles, **options)]
    expected = results(cell, doubles, "reference", grads, **options)
    theirs = results(cell, tensors, stock(cell, options), grads, **options)
    for name, ours in results(cell, tensors, "cpp", grads, **options).items():
        assert ours.dtype == dtype
        assert_as_good_as(ours, theirs[name], expected[name], what=name)


@each_cell("cpp")
def test_nan_and_infinity_pass_through(cell):
    tensors = problem(cell, 5, 6, 3, 20, dtype=torch.float32, requires_grad=False)
    tensors["input"][2, 1, 0] = float("nan")
    tensors["input"][1, 4, 2] = float("inf")
    for ours, expected in zip(call(cell, tensors, "cpp"), call(cell, tensors, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)
    # A row's NaN stays with the row, and padding is never read.
    output = call(cell, tensors, "cpp", lengths=torch.tensor([5, 2, 5, 5, 1, 5]))[0]
    assert output.isfinite().all()
