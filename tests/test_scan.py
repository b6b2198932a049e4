"""Linear scan: every backend against the float64 definition."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import (
    COMPLEX,
    DOUBLE,
    EVERY_BACKEND,
    HALF,
    check_linear,
    instruction_sets,
    linear_inputs,
    needs_cpp,
    needs_triton,
    run_linear,
    to,
)
from tolerances import assert_close

import seqaccel
from seqaccel import backends
from seqaccel.functional import join_summaries, linear_scan, scan_summary
from seqaccel.reference import scan as reference


def test_linear_scan_reference_is_the_loop():
    inputs = linear_inputs(3, 11, 2)
    a, b, h = (t.numpy() for t in inputs.values())
    rows = []
    for t in range(11):
        h = a[:, t] * h + b[:, t]
        rows.append(h)
    found, last = reference.linear_scan(*inputs.values())
    np.testing.assert_array_equal(found.numpy(), np.stack(rows, 1))
    np.testing.assert_array_equal(last.numpy(), rows[-1])
    flipped, _ = reference.linear_scan(inputs["a"].flip(1), inputs["b"].flip(1), inputs["h_0"], reverse=True)
    np.testing.assert_array_equal(flipped.flip(1).numpy(), np.stack(rows, 1))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, *HALF, *COMPLEX])
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


OFFSETS = [[0, 9], [0, 0, 4, 5, 5, 9], [0, 1, 9, 9]]


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, *HALF, *COMPLEX])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_h_0", [False, True])
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_linear_scan_sequences_in_one_row(offsets, reverse, with_h_0, dtype, poison):
    with seqaccel.backend("cpp"):
        for width in (1, 3, 40):
            check_linear((1, 9, width), dtype, reverse, with_h_0, offsets)
        check_linear((1, 0, 3), dtype, reverse, True, [0, 0])
        check_linear((1, 0, 3), dtype, reverse, True, [0])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2, 16, 19])
def test_linear_scan_cut_in_time(width, reverse, dtype, poison):
    """Fewer columns than threads can share: by the threads at once, and as by one thread."""
    steps, sequences = 120_000 // width, torch.tensor([0, 5, 120_000 // width])
    tensors = linear_inputs(1, steps, width, True, 2, dtype.is_complex)
    tensors = to(tensors, dtype)
    grads = torch.randn(1, steps, width).to(dtype), torch.randn(2, width).to(dtype)
    with seqaccel.backend("cpp"):
        found, found_grads = run_linear(tensors, grads, reverse=reverse, cu_seqlens=sequences)
        torch.set_num_threads(1)
        try:
            expected, expected_grads = run_linear(tensors, grads, reverse=reverse, cu_seqlens=sequences)
        finally:
            torch.set_num_threads(2)
    for ours, wanted in zip((*found, *found_grads.values()), (*expected, *expected_grads.values()), strict=True):
        assert_close(ours, wanted, "scan_of_saved_states", dtype, backward=True)


@needs_cpp
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
def test_linear_scan_cut_in_time_gives_what_the_loop_gives(bad):
    """Where a composed state is not finite the chunks run one after the other: the bits are those of one thread."""
    a, b = torch.rand(1, 60_000, 2), torch.randn(1, 60_000, 2)
    a[:, 100:140] = 1.0
    spoilt = {
        "b": (a, b.index_fill(1, torch.tensor([200]), bad)),
        "a": (a.index_fill(1, torch.tensor([30_000]), bad), b),
    }
    if bad == 3e38:
        spoilt = {"product overflows": (a.index_fill(1, torch.arange(25_000, 25_009), bad), b * 0)}
    for name, (p, q) in spoilt.items():
        h_0 = torch.ones(1, 2)
        with seqaccel.backend("cpp"):
            found = linear_scan(p, q, h_0)
            torch.set_num_threads(1)
            try:
                expected = linear_scan(p, q, h_0)
            finally:
                torch.set_num_threads(2)
        assert torch.equal(found.isnan(), expected.isnan()), name
        torch.testing.assert_close(found, expected, equal_nan=True, msg=name)


@needs_cpp
def test_linear_scan_carries_narrow_types_in_float32():
    a, b = torch.ones(1, 4000, 3, dtype=torch.bfloat16), torch.full((1, 4000, 3), 1e-3, dtype=torch.bfloat16)
    for backend in ("reference", "cpp"):
        with seqaccel.backend(backend):
            h = linear_scan(a, b)
            torch.testing.assert_close(h[0, -1], (4000 * b[0, 0].float()).bfloat16())


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, *HALF, *COMPLEX])
def test_linear_scan_instruction_sets(isa, dtype, poison):
    with seqaccel.backend("cpp"), backends.isa(isa):
        for width, reverse in itertools.product([1, 2, 3, 7, 15, 16, 17, 37, 128], [False, True]):
            check_linear((2, 20, width), dtype, reverse)
            check_linear((1, 50, width), dtype, reverse, False, [0, 3, 3, 50])


def test_linear_scan_saves_a_and_h():
    saved = []
    a, b = torch.rand(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_scan(a * 1.0, b * 1.0, return_last=True)
    assert sum(saved) == 2 * a.numel()


@needs_cpp
@needs_triton
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [(2, 7, 5), (1, 1100, 1), (1, 40, 70), (2, 1, 3), (2, 5000, 1)], ids=str)
def test_linear_scan_triton(sizes, reverse, poison):
    """The last one is cut into chunks of time."""
    with seqaccel.backend("triton"):
        check_linear(sizes, torch.float32, reverse, with_h_0=sizes[1] % 2 == 1, against="cpp")


@needs_cpp
@needs_triton
@pytest.mark.parametrize(("dtype", "reverse"), [(torch.float32, False), (torch.float16, True)])
def test_linear_scan_triton_sequences_in_one_row(dtype, reverse, poison):
    """The last ones are cut into chunks of time, of which some have no steps."""
    with seqaccel.backend("triton"):
        for offsets, width in [(OFFSETS[1], 5), ([0, 1, 6200], 1)]:
            check_linear((1, offsets[-1], width), dtype, reverse, bool(width - 1), offsets, against="cpp")
        nothing = torch.ones(1, 0, 2)
        assert linear_scan(nothing, nothing, cu_seqlens=torch.tensor([0])).shape == (1, 0, 2)


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 70), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_linear_scan_any_size(batch, steps, width, reverse, with_h_0, seed):
    torch.manual_seed(seed)
    with seqaccel.backend("cpp"):
        check_linear((batch, steps, width), torch.float32, reverse, with_h_0)


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.complex64]),
    st.integers(0, 2**31),
)
def test_linear_scan_in_pieces(lengths, width, reverse, dtype, seed):
    """Sequences split by cu_seqlens, run alone, and streamed through h_0 and h_last in chunks give one result; so do
    the summaries of two chunks."""
    torch.manual_seed(seed)
    offsets = [0, *itertools.accumulate(lengths)]
    tensors = to(linear_inputs(1, offsets[-1], width, True, len(lengths), dtype.is_complex), dtype, grad=False)
    a, b, h_0 = tensors.values()
    close = {"rtol": 1e-4, "atol": 1e-5}
    with seqaccel.backend("cpp"):
        h, last = linear_scan(a, b, h_0, cu_seqlens=torch.tensor(offsets), reverse=reverse, return_last=True)
        for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
            rows, state = (a[:, begin:end], b[:, begin:end]), h_0[n : n + 1]
            alone, alone_last = linear_scan(*rows, state, reverse=reverse, return_last=True)
            torch.testing.assert_close(alone, h[:, begin:end], **close)
            torch.testing.assert_close(alone_last, last[n : n + 1], **close)
            cut = int(torch.randint(end - begin + 1, ()))
            chunks = [tuple(t[:, :cut] for t in rows), tuple(t[:, cut:] for t in rows)]
            streamed, now = [], state
            for chunk in reversed(chunks) if reverse else chunks:
                part, now = linear_scan(*chunk, now, reverse=reverse, return_last=True)
                streamed.append(part)
            torch.testing.assert_close(torch.cat(streamed[::-1] if reverse else streamed, 1), alone, **close)
            torch.testing.assert_close(now, alone_last, **close)
            if not reverse:
                product, offset = join_summaries(scan_summary(*chunks[0]), scan_summary(*chunks[1]))
                torch.testing.assert_close(product * state + offset, alone_last, **close)


def test_scan_summary_gradients_and_types():
    a, b = torch.rand(2, 5, 3, dtype=DOUBLE), torch.randn(2, 5, 3, dtype=DOUBLE)
    a[0, 2, 1] = a[1, 1:3, 2] = 0
    inputs = [a.requires_grad_(), b.requires_grad_()]
    assert torch.autograd.gradcheck(lambda *t: join_summaries(scan_summary(*t), scan_summary(*t)), inputs)
    narrow = scan_summary(a.detach().bfloat16(), b.detach().bfloat16(), dim=1)
    assert [t.dtype for t in narrow] == [torch.bfloat16] * 2 and narrow[0].shape == (2, 3)
    empty = scan_summary(torch.ones(2, 0, 3), torch.ones(2, 0, 3))
    assert torch.equal(empty[0], torch.ones(2, 3)) and torch.equal(empty[1], torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"join_summaries: expected second to be a tuple \(product, last state\)"):
        join_summaries(empty, (empty[0],))


@needs_cpp
def test_offsets_of_any_value_stay_in_range():
    """Those of a raw call, whose values nothing checks: all rows are written, and none beyond the end."""
    a, b, h_0 = torch.rand(1, 9, 5), torch.randn(1, 9, 5), torch.randn(3, 5)
    for offsets in ([-7, 2**40, -(2**40), 3], [9, 9, 9, 9], [5, 4, 3, 2], [0, 3, 6, 9]):
        for reverse in (False, True):
            arguments = h_0, torch.tensor(offsets), None, reverse
            h, last = torch.ops.seqaccel.linear_scan_forward(a, b, *arguments, True)
            assert h.isfinite().all() and last.isfinite().all()
            for grad in torch.ops.seqaccel.linear_scan_backward(h, last, a, h, *arguments):
                assert grad.isfinite().all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_linear_scan_dim(backend, dim):
    a, b = torch.rand(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    h_0 = torch.randn(a.movedim(dim, 0).shape[1:])
    expected = reference.linear_scan(
        a.movedim(dim, 0).reshape(1, a.shape[dim], -1),
        b.movedim(dim, 0).reshape(1, a.shape[dim], -1),
        h_0.reshape(1, -1),
    )[0]
    expected = expected.reshape(a.movedim(dim, 0).shape).movedim(0, dim)
    with seqaccel.backend(backend):
        h, last = linear_scan(a, b, h_0, dim=dim, return_last=True)
        torch.testing.assert_close(h, expected)
        assert torch.equal(last, h.select(dim, -1))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_linear_scan_broadcasts_and_takes_any_layout(backend):
    a, b = torch.rand(6, requires_grad=True), torch.randn(2, 9, 12)[:, ::2, ::2].requires_grad_()
    with seqaccel.backend(backend):
        h = linear_scan(a, b, torch.zeros(1, 6))
        grads = torch.autograd.grad(h.sum(), (a, b))
    full = a.expand(2, 5, 6)
    expected, _ = reference.linear_scan(full, b.contiguous())
    torch.testing.assert_close(h, expected)
    for actual, wanted in zip(grads, torch.autograd.grad(expected.sum(), (a, b)), strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_linear_scan_empty(backend):
    with seqaccel.backend(backend):
        for shape in [(2, 0, 3), (0, 4, 3), (2, 4, 0)]:
            a = torch.ones(shape, requires_grad=True)
            h_0 = torch.ones(shape[0], shape[2], requires_grad=True)
            h, last = linear_scan(a, a, h_0, return_last=True)
            assert h.shape == shape and last.shape == h_0.shape
            (h.sum() + last.sum()).backward()
            assert a.grad.shape == shape and (shape[1] > 0 or torch.equal(h_0.grad, torch.ones_like(h_0)))


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
        h, _ = torch.ops.seqaccel.linear_scan_forward(a, b, None, None, None, reverse, False)
        grads = torch.ops.seqaccel.linear_scan_backward(grad, None, a, h, None, None, None, reverse)
        return dict(zip("hab", (h, *grads[:2]), strict=True))

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
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 5]], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_linear_scan_gradients_by_differences(backend, offsets, is_complex, reverse):
    sequences = 2 if offsets is None else 3
    tensors = linear_inputs(2 if offsets is None else 1, 5, 2 + is_complex, True, sequences, is_complex)
    inputs = [t.requires_grad_() for t in tensors.values()]
    cu_seqlens = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)

    def run(*tensors):
        return linear_scan(*tensors, reverse=reverse, cu_seqlens=cu_seqlens, return_last=True)

    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 5)), ValueError, r"broadcast, but got \(2, 3, 4\) and \(2, 3, 5\)"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(2, 5)), ValueError, r"h_0 to have shape \(2, 4\)"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4).double()), TypeError, "b to have the dtype of a, torch.float32"),
        (
            (torch.ones(2, 3, 4).int(), torch.ones(2, 3, 4).int()),
            TypeError,
            "floating point or complex, but got torch.int32",
        ),
        ((torch.ones(3), torch.ones(3)), IndexError, "Dimension out of range"),
        ((*[torch.ones(2, 3, 4)] * 2, None, torch.tensor([0, 3])), ValueError, r"a batch of 1 .* shape \(2, 3, 4\)"),
        ((*[torch.ones(1, 3, 4)] * 2, None, torch.tensor([0, 4])), ValueError, r"cu_seqlens to ascend .* 3, .* \[0, 4"),
        ((*[torch.ones(1, 3, 4)] * 2, None, torch.tensor([0, 2, 1, 3])), ValueError, "cu_seqlens to ascend"),
        ((*[torch.ones(1, 3, 4)] * 2, None, torch.tensor([0])), ValueError, "offsets of a sequence, but got one"),
        ((*[torch.ones(1, 3, 4)] * 2, None, torch.tensor([0.0, 3])), TypeError, "cu_seqlens to be int32 or int64"),
        ((*[torch.ones(1, 3, 4)] * 2, None, torch.tensor([[0, 3]])), ValueError, r"shape \(sequences \+ 1,\)"),
        ((*[torch.ones(1, 3, 4)] * 2, torch.ones(1, 4), torch.tensor([0, 1, 3])), None, ""),
        ((*[torch.ones(1, 3, 4)] * 2, torch.ones(3, 4), torch.tensor([0, 1, 3])), ValueError, r"shape \(2, 4\)"),
        ((torch.ones(2, 3, 4), torch.ones(2, 3, 4, device="meta")), RuntimeError, "same device"),
    ],
)
def test_linear_scan_errors(arguments, error, message):
    *tensors, cu_seqlens = arguments if len(arguments) == 4 else (*arguments, None)
    if error is None:
        linear_scan(*tensors, cu_seqlens=cu_seqlens)
        return
    with pytest.raises(error, match=message):
        linear_scan(*tensors, cu_seqlens=cu_seqlens)
