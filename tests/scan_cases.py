"""What the tests of the scans share: problems, and comparisons with the float64 definition."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

import seqaccel
from seqaccel import backends
from seqaccel.functional import linear_scan, sru

DOUBLE = torch.float64
HALF = [torch.bfloat16, torch.float16]
COMPLEX = [torch.complex64, torch.complex128]

needs_cpp = pytest.mark.skipif(backends.why_missing("cpp", "cpu") is not None, reason="no C++ kernels")
needs_triton = pytest.mark.skipif(backends.why_missing("triton", "cpu") is not None, reason="no Triton interpreter")
CPP = pytest.param("cpp", marks=needs_cpp)
TRITON = pytest.param("triton", marks=needs_triton)
EVERY_BACKEND = ["reference", CPP, TRITON]


def instruction_sets():
    if backends.why_missing("cpp", "cpu") is not None:
        return []
    names = ["portable", "avx2", "avx512"]
    return names[: names.index(torch.ops.seqaccel.best_isa().removesuffix("_bf16")) + 1]


def to(tensors, dtype, grad=True):
    """Copies of a dict of float64 tensors in another dtype; masks and None stay."""
    return {
        name: t
        if t is None or t.dtype == torch.bool
        else t.detach().to(dtype).requires_grad_(grad and name not in ("mask_c", "scale_x"))
        for name, t in tensors.items()
    }


def rounded(*shape):
    """Normal numbers that every dtype holds exactly, so that all backends start from the same inputs."""
    return torch.randn(*shape, dtype=DOUBLE).bfloat16().double()


def linear_inputs(batch, steps, width, with_h_0=True, sequences=None, is_complex=False):
    """``sequences``: of cu_seqlens; the batch otherwise."""
    a, b = torch.rand(batch, steps, width, dtype=DOUBLE).bfloat16().double(), rounded(batch, steps, width)
    h_0 = rounded(batch if sequences is None else sequences, width) if with_h_0 else None
    if is_complex:
        a = torch.polar(a, torch.randn_like(a)).to(torch.complex64).to(torch.complex128)
        b, h_0 = (None if t is None else torch.complex(t, rounded(*t.shape)) for t in (b, h_0))
    return {"a": a, "b": b, "h_0": h_0}


def run_linear(inputs, grads, **options):
    """h and h_last, and the gradients of the inputs."""
    results = linear_scan(inputs["a"], inputs["b"], inputs["h_0"], return_last=True, **options)
    leaves = {name: t for name, t in inputs.items() if t is not None}
    pairs = [(r, g.to(r.dtype)) for g, r in zip(grads, results, strict=True) if r.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, leaves.values(), grads, allow_unused=True)
    return results, {
        name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)
    }


def check_linear(sizes, dtype, reverse=False, with_h_0=True, offsets=None, against="reference"):
    """``offsets``: of cu_seqlens, a list. ``against``: the backend that calculates in float64."""
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    sequences = sizes[0] if offsets is None else len(offsets) - 1
    inputs = linear_inputs(*sizes, with_h_0, sequences, dtype.is_complex)
    grads = rounded(*sizes), rounded(sequences, sizes[2])
    options = {"reverse": reverse, "cu_seqlens": cu_seqlens}
    with seqaccel.backend(against):
        expected, expected_grads = run_linear(
            to(inputs, torch.complex128 if dtype.is_complex else DOUBLE), grads, **options
        )
    actual, found = run_linear(to(inputs, dtype), grads, **options)
    for name, result, wanted in zip(("h", "h_last"), actual, expected, strict=True):
        assert result.dtype == dtype and result.shape == wanted.shape
        assert_close(result, wanted, "scan", dtype, what=name)
    for name, g in found.items():
        bound = "scan_of_saved_states" if name == "a" else "scan"
        assert_close(g, expected_grads[name], bound, dtype, backward=True, what=f"grad {name}")
    with torch.no_grad():
        typed = to(inputs, dtype)
        assert torch.equal(linear_scan(typed["a"], typed["b"], typed["h_0"], **options), actual[0])


def sru_inputs(steps, batch, hidden, directions=1, highway="input", masks=False):
    channels = directions * hidden
    return {
        "u": rounded(steps, batch, channels * (4 if highway == "projected" else 3)),
        "x": rounded(steps, batch, channels) if highway == "input" else None,
        "weight_c": rounded(2 * channels) / 2,
        "bias": rounded(2 * channels) / 2,
        "c_0": rounded(batch, channels),
        "mask_c": (torch.rand(batch, channels) < 0.7).double() * 1.5 if masks else None,
        "mask_pad": torch.rand(steps, batch) < 0.3 if masks else None,
        "scale_x": torch.tensor([1.75], dtype=DOUBLE) if masks else None,
    }


def run_sru(inputs, grads, **options):
    required = ("u", "x", "weight_c", "bias", "c_0")
    masks = {name: inputs[name] for name in ("mask_c", "mask_pad", "scale_x")}
    results = sru(*(inputs[name] for name in required), **masks, **options)
    leaves = {name: inputs[name] for name in required if inputs[name] is not None}
    found = torch.autograd.grad(
        results, leaves.values(), [g.to(r.dtype) for g, r in zip(grads, results, strict=True)], allow_unused=True
    )
    return results, {
        name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)
    }


def check_sru(sizes, dtype, directions=1, highway="input", masks=False, use_tanh=False, least=0.0):
    """``least``: errors are relative to no less."""
    inputs = sru_inputs(*sizes, directions, highway, masks)
    steps, batch, hidden = sizes
    grads = rounded(steps, batch, directions * hidden), rounded(batch, directions * hidden)
    options = {"directions": directions, "use_tanh": use_tanh}
    with seqaccel.backend("reference"):
        expected, expected_grads = run_sru(to(inputs, DOUBLE), grads, **options)
    typed = to(inputs, dtype)
    actual, found = run_sru(typed, grads, **options)
    with torch.no_grad():
        masks = {name: typed[name] for name in ("mask_c", "mask_pad", "scale_x")}
        inference = sru(*(typed[name] for name in ("u", "x", "weight_c", "bias", "c_0")), **masks, **options)

    def scaled(t):
        return torch.cat([t.flatten(), t.new_full((1,), least)])

    for name, result, wanted, without_grad in zip(("h", "c_n"), actual, expected, inference, strict=True):
        assert result.dtype == dtype and result.shape == wanted.shape
        assert_close(scaled(result), scaled(wanted), "scan", dtype, what=name)
        assert torch.equal(result, without_grad)
    for name, g in found.items():
        assert g.shape == expected_grads[name].shape
        assert_close(scaled(g), scaled(expected_grads[name]), "scan", dtype, backward=True, what=f"grad {name}")
