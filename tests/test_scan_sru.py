"""The recurrence of SRU: every backend against the float64 definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import (
    DOUBLE,
    EVERY_BACKEND,
    HALF,
    check_sru,
    instruction_sets,
    needs_cpp,
    needs_triton,
    rounded,
    sru_inputs,
    to,
)

import seqaccel
from seqaccel import backends
from seqaccel.functional import sru, sru_layer
from seqaccel.reference import scan as reference


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("highway", ["none", "input", "projected"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("masks", [False, True])
def test_sru_cpp(highway, directions, masks, dtype, poison):
    with seqaccel.backend("cpp"):
        for sizes, use_tanh in itertools.product([(5, 2, 3), (70, 3, 17), (4, 2, 64), (3, 2, 700), (1, 1, 1)], (0, 1)):
            check_sru(sizes, dtype, directions, highway, masks, bool(use_tanh))


@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_sru_instruction_sets(isa, dtype, poison):
    with seqaccel.backend("cpp"), backends.isa(isa):
        for highway, use_tanh in itertools.product(["none", "input", "projected"], [False, True]):
            check_sru((5, 3, 37), dtype, 2, highway, True, use_tanh)


@needs_cpp
@pytest.mark.parametrize("dtype", HALF)
def test_sru_half_precision(dtype, poison):
    with seqaccel.backend("cpp"):
        check_sru((20, 3, 17), dtype, 1, "input", True)


@needs_triton
@pytest.mark.parametrize("highway", ["none", "input", "projected"])
@pytest.mark.parametrize("masks", [False, True])
def test_sru_triton(highway, masks, poison):
    with seqaccel.backend("triton"):
        check_sru((6, 3, 23), torch.float32, 2, highway, masks, use_tanh=masks)


@needs_cpp
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 20),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(1, 2),
    st.sampled_from(["none", "input", "projected"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_sru_any_size(steps, batch, hidden, directions, highway, masks, seed):
    torch.manual_seed(seed)
    with seqaccel.backend("cpp"):
        # A lone state may be near 0: the float32 reference misses the bound then too. Inputs are of size 1.
        check_sru((steps, batch, hidden), torch.float32, directions, highway, masks, least=1.0)


@needs_cpp
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("highway", ["none", "input", "projected"])
def test_sru_gradients_by_differences(backend, highway):
    inputs = sru_inputs(3, 2, 2, 2, highway, masks=True)
    masks = {name: inputs.pop(name) for name in ("mask_c", "mask_pad", "scale_x")}
    names = [name for name, t in inputs.items() if t is not None]
    leaves = [inputs[name].requires_grad_() for name in names]

    def function(*tensors):
        given_tensors = {"x": None, **dict(zip(names, tensors, strict=True))}
        return sru(*(given_tensors[name] for name in inputs), **masks, directions=2, use_tanh=True)

    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_sru_one_result_used(backend):
    inputs = to(sru_inputs(4, 2, 3), torch.float32)
    required = [inputs[name] for name in ("u", "x", "weight_c", "bias", "c_0")]
    for which in (0, 1):
        expected = torch.autograd.grad(reference.columns("sru", *required)[which].sum(), required, allow_unused=True)
        with seqaccel.backend(backend):
            actual = torch.autograd.grad(sru(*required)[which].sum(), required, allow_unused=True)
        for a, e, t in zip(actual, expected, required, strict=True):
            torch.testing.assert_close(
                torch.zeros_like(t) if a is None else a, torch.zeros_like(t) if e is None else e, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("case", ["same", "other", "projected", "frozen"])
def test_sru_layer_is_the_product_and_the_recurrence(backend, case, poison):
    s = to(sru_inputs(6, 3, 4, highway="projected" if case == "projected" else "input", masks=True), DOUBLE)
    features = 4 if case == "same" else 5
    x = s["x"]
    given_input = x if case == "same" else rounded(6, 3, features).requires_grad_(case != "frozen")
    weight = rounded(features, 16 if case == "projected" else 12).requires_grad_()
    masks = {name: s[name] for name in ("mask_c", "mask_pad", "scale_x")}
    leaves = [t for t in (given_input, weight, x, s["weight_c"], s["bias"], s["c_0"]) if t is not None]
    leaves = list({id(t): t for t in leaves if t.requires_grad}.values())
    with seqaccel.backend(backend):
        actual = sru_layer(given_input, weight, x, s["weight_c"], s["bias"], s["c_0"], **masks)
        expected = reference.columns(
            "sru", given_input @ weight, x, s["weight_c"], s["bias"], s["c_0"], s["mask_c"], s["scale_x"], s["mask_pad"]
        )
        grads = rounded(6, 3, 4), rounded(3, 4)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        found = torch.autograd.grad(actual, leaves, grads, retain_graph=True)
        again = torch.autograd.grad(actual, leaves, grads)
        for f, g, e in zip(found, again, torch.autograd.grad(expected, leaves, grads), strict=True):
            torch.testing.assert_close(f, e)
            assert torch.equal(f, g)
        if backend != "triton":

            def function(*tensors):
                by_id = {id(t): v for t, v in zip(leaves, tensors, strict=True)}
                operands = (given_input, weight, x, s["weight_c"], s["bias"], s["c_0"])
                return sru_layer(*(by_id.get(id(t), t) for t in operands), **masks)

            assert torch.autograd.gradgradcheck(function, leaves)


def test_sru_layer_errors():
    with pytest.raises(ValueError, match=r"expected input \(T, B, I\) and weight"):
        sru_layer(torch.ones(4, 2, 3), torch.ones(4, 9), None, torch.ones(6), torch.ones(6))
    with pytest.raises(ValueError, match="9 or 12 features, but got 10"):
        sru_layer(torch.ones(4, 2, 3), torch.ones(3, 10, requires_grad=True), None, torch.ones(6), torch.ones(6))


def test_sru_weights_of_each_step():
    inputs = to(sru_inputs(4, 2, 3), torch.float32, grad=False)
    once = sru(inputs["u"], inputs["x"], inputs["weight_c"], inputs["bias"])
    w_f, w_r = inputs["weight_c"].view(2, 3)
    weights = torch.stack([w_f, w_r], -1).view(-1).expand(4, 2, 6)
    torch.testing.assert_close(sru(inputs["u"], inputs["x"], weights, inputs["bias"]), once)
    with seqaccel.backend("triton"), pytest.raises(RuntimeError, match="no backend 'triton'"):
        sru(inputs["u"], inputs["x"], weights, inputs["bias"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.ones(4, 9)}, ValueError, "u to have 3 dimensions"),
        ({"u": torch.ones(4, 2, 10)}, ValueError, "9 or 12 features, but got 10"),
        ({"u": torch.ones(4, 2, 12)}, ValueError, "x to be None where u holds the projected input"),
        ({"x": torch.ones(4, 2, 4)}, ValueError, r"x to have shape \(4, 2, 3\), but got \(4, 2, 4\)"),
        ({"bias": torch.ones(5)}, ValueError, "bias to have shape"),
        ({"c_0": torch.ones(3, 3)}, ValueError, r"c_0 to have shape \(2, 3\)"),
        ({"c_0": torch.ones(2, 3).double()}, TypeError, "c_0 to have the dtype of u, torch.float32"),
        ({"mask_pad": torch.ones(4, 2)}, TypeError, "mask_pad to be torch.bool"),
        ({"mask_pad": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask_pad to have shape \(4, 2\)"),
        ({"mask_c": torch.ones(2, 3, requires_grad=True)}, RuntimeError, "mask_c is not differentiated"),
        ({"directions": 3}, ValueError, "directions to be 1 or 2, but got 3"),
    ],
)
def test_sru_errors(change, error, message):
    arguments = {"u": torch.ones(4, 2, 9), "x": torch.ones(4, 2, 3), "weight_c": torch.ones(6), "bias": torch.ones(6)}
    with pytest.raises(error, match=message):
        sru(**(arguments | change))


@needs_cpp
@pytest.mark.parametrize("dtype, edge", [(torch.float32, 88.55), (torch.float64, 709.9)])
def test_saturated_gates_of_sru(dtype, edge):
    """Pre-activations about which e^-x overflows."""
    near = torch.linspace(-0.7, 0.7, 501, dtype=dtype)
    gate = torch.cat([near - edge, near + edge])
    u = torch.stack([torch.ones_like(gate), gate, gate.flip(0)], -1).view(1, 1, -1)
    c_0, weights, results = torch.zeros(1, len(gate), dtype=dtype), torch.zeros(2 * len(gate), dtype=dtype), []
    for backend in ("cpp", "reference"):
        for isa in instruction_sets():
            values = u.clone().requires_grad_()
            with seqaccel.backend(backend), backends.isa(isa):
                h, c_n = sru(values, None, weights, weights, c_0)
                results.append((h, c_n, *torch.autograd.grad(h.sum() + c_n.sum(), values)))
    for found in results:
        for a, b in zip(found, results[-1], strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets())
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("k", [3, 4])
def test_padding_has_no_say(isa, k, directions):
    """No output or gradient sees what lies at padding, not even NaN."""
    steps, batch, channels = 6, 3, 37 * directions
    padding = torch.arange(steps).unsqueeze(1) >= torch.tensor([6, 2, 1])
    tensors = {"u": torch.randn(steps, batch, channels * k), "x": torch.randn(steps, batch, channels)}
    if k == 4:
        del tensors["x"]
    tensors |= {"weight_c": torch.randn(2 * channels), "bias": torch.randn(2 * channels)}
    tensors["c_0"] = torch.randn(batch, channels)
    grads = [torch.randn(steps, batch, channels), torch.randn(batch, channels)]

    def run(spoil):
        place = padding.unsqueeze(2)
        leaves = {name: t.masked_fill(place, spoil) if spoil and t.dim() == 3 else t for name, t in tensors.items()}
        leaves = {name: t.clone().requires_grad_() for name, t in leaves.items()}
        outputs = sru(**({"x": None} | leaves), mask_pad=padding, directions=directions)
        spoilt = [grads[0].masked_fill(place, spoil) if spoil else grads[0], grads[1]]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), spoilt)]

    with seqaccel.backend("cpp"), backends.isa(isa):
        expected = run(None)
        for bad in (float("nan"), float("inf")):
            for found, wanted in zip(run(bad), expected, strict=True):
                assert torch.equal(found, wanted)
