"""Linear scan: every backend against the float64 definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import (
    DOUBLE,
    EVERY_BACKEND,
    HALF,
    check_linear,
    instruction_sets,
    linear_inputs,
    needs_cpp,
    needs_triton,
)

import seqaccel
from seqaccel import backends
from seqaccel.functional import linear_scan
from seqaccel.reference import scan as reference


def test_linear_scan_reference_is_the_loop():
    inputs = linear_inputs(3, 11, 2)
    a, b, h = (t.numpy() for t in inputs.values())
    rows = []
    for t in range(11):
        h = a[:, t] * h + b[:, t]
        rows.append(h)
    np.testing.assert_array_equal(reference.linear_scan(*inputs.values()).numpy(), np.stack(rows, 1))
    flipped = reference.linear_scan(inputs["a"].flip(1), inputs["b"].flip(1), inputs["h_0"], True)
    np.testing.assert_array_equal(flipped.flip(1).numpy(), np.stack(rows, 1))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, *HALF])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_h_0", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(2, 7, 5), (1, 1000, 1), (3, 37, 1), (2, 50, 40), (1, 9, 2000), (1, 1, 1), (2, 1, 17), (70, 9, 129), (1, 66, 33)],
    ids=str,
)
def test_linear_scan_cpp(sizes, reverse, with_h_0, dtype, poison):
    with seqaccel.backend("cpp"):
        check_linear(sizes, dtype, reverse, with_h_0)


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_linear_scan_instruction_sets(isa, dtype, poison):
    with seqaccel.backend("cpp"), backends.isa(isa):
        for sizes, reverse in itertools.product([(2, 133, 1), (3, 20, 37), (2, 30, 128)], [False, True]):
            check_linear(sizes, dtype, reverse)


def test_linear_scan_saves_a_and_h():
    saved = []
    a, b = torch.rand(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_scan(a * 1.0, b * 1.0)
    assert sum(saved) == 2 * a.numel()


@needs_triton
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(2, 7, 5), (1, 1100, 1), (1, 40, 70), (2, 1, 3)], ids=str)
def test_linear_scan_triton(sizes, reverse, poison):
    with seqaccel.backend("triton"):
        check_linear(sizes, torch.float32, reverse, with_h_0=sizes[1] % 2 == 1)


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 70), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_linear_scan_any_size(batch, steps, width, reverse, with_h_0, seed):
    torch.manual_seed(seed)
    with seqaccel.backend("cpp"):
        check_linear((batch, steps, width), torch.float32, reverse, with_h_0)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_linear_scan_dim(backend, dim):
    a, b = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    h_0 = torch.randn(a.movedim(dim, 0).shape[1:])
    expected = reference.linear_scan(
        a.movedim(dim, 0).reshape(1, a.shape[dim], -1),
        b.movedim(dim, 0).reshape(1, a.shape[dim], -1),
        h_0.reshape(1, -1),
    )
    expected = expected.reshape(a.movedim(dim, 0).shape).movedim(0, dim)
    with seqaccel.backend(backend):
        torch.testing.assert_close(linear_scan(a, b, h_0, dim=dim), expected)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_linear_scan_broadcasts_and_takes_any_layout(backend):
    a, b = torch.rand(6, requires_grad=True), torch.randn(2, 9, 12)[:, ::2, ::2].requires_grad_()
    with seqaccel.backend(backend):
        h = linear_scan(a, b, torch.zeros(1, 6))
        grads = torch.autograd.grad(h.sum(), (a, b))
    full = a.expand(2, 5, 6)
    expected = reference.linear_scan(full, b.contiguous())
    torch.testing.assert_close(h, expected)
    for actual, wanted in zip(grads, torch.autograd.grad(expected.sum(), (a, b)), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_linear_scan_empty(backend):
    with seqaccel.backend(backend):
        for shape in [(2, 0, 3), (0, 4, 3), (2, 4, 0)]:
            a = torch.ones(shape, requires_grad=True)
            h = linear_scan(a, a, torch.ones(shape[0], shape[2]))
            assert h.shape == shape
            h.sum().backward()
            assert a.grad.shape == shape


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("width", [1, 3])
def test_linear_scan_passes_nan_and_infinity(backend, width):
    a, b = torch.full((1, 40, width), 0.5), torch.ones(1, 40, width)
    b[:, 20] = float("nan")
    with seqaccel.backend(backend):
        h = linear_scan(a, b)
        assert not h[:, :20].isnan().any() and h[:, 20:].isnan().all()
        b[:, 20] = float("inf")
        h = linear_scan(a, b)
        assert h[:, :20].isfinite().all() and (h[:, 20:] == float("inf")).all()


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_linear_scan_keeps_a_spoilt_step_apart(isa, width, reverse, bad):
    """What is not finite reaches later outputs and earlier gradients of its own column; without h_0 the first
    coefficient, which multiplies nothing, reaches no output."""
    steps, column = 50, width - 1
    tensors = {
        "a": torch.rand(2, steps, width),
        "b": torch.randn(2, steps, width),
        "grad": torch.randn(2, steps, width),
    }

    def outputs_and_gradients(a, b, grad):
        h = torch.ops.seqaccel.linear_scan_forward(a, b, None, reverse)
        return dict(
            zip("hab", (h, *torch.ops.seqaccel.linear_scan_backward(grad, a, h, None, reverse)[:2]), strict=True)
        )

    with backends.isa(isa):
        expected = outputs_and_gradients(**tensors)
        for name, place in itertools.product(tensors, (0, 7, 20, steps - 1)):
            spoilt = {other: t.clone() for other, t in tensors.items()}
            at = steps - 1 - place if reverse else place
            spoilt[name][1, at, column] = bad
            found = outputs_and_gradients(**spoilt)
            order = torch.arange(steps).flip(0) if reverse else torch.arange(steps)
            reads = (order >= place) & ((name != "a") | (place > 0))
            reached = {
                "h": reads if name != "grad" else order < 0,
                "a": (order > place if name != "grad" else order <= place) & (order > 0),
                "b": order < place if name == "a" else order <= place if name == "grad" else order < 0,
            }
            if name == "a":
                reached["a"] = order > 0
            for result, value in found.items():
                kept = torch.ones_like(value, dtype=torch.bool)
                kept[1, reached[result], column] = False
                assert torch.equal(value[kept], expected[result][kept]), (name, place, result)


@needs_cpp
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_linear_scan_gradients_by_differences(backend, width, reverse):
    inputs = [t.requires_grad_() for t in linear_inputs(2, 5, width).values()]
    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(lambda *t: linear_scan(*t, reverse=reverse), inputs)
        assert torch.autograd.gradgradcheck(lambda *t: linear_scan(*t, reverse=reverse), inputs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 5)), ValueError, r"broadcast, but got \(2, 3, 4\) and \(2, 3, 5\)"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 5)), ValueError, r"h_0 to have shape \(2, 4\)"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4).double()), TypeError, "b to have the dtype of a, torch.float32"),
        ((torch.ones(2, 3, 4).int(), torch.ones(2, 3, 4).int()), TypeError, "floating point, but got torch.int32"),
        ((torch.ones(3), torch.ones(3)), IndexError, "Dimension out of range"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta")), RuntimeError, "same device"),
    ],
)
def test_linear_scan_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_scan(*arguments)
