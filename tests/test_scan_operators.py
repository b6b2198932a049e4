"""Operators of the scans: schemas, refusals, determinism, transforms, autocast, GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from offline import check_configurations
from scan_cases import (
    CPP,
    DOUBLE,
    check_linear,
    check_sru,
    linear_inputs,
    needs_cpp,
    needs_triton,
    run_sru,
    sru_inputs,
    to,
)

import seqaccel
from seqaccel.functional import linear_scan, sru


@needs_cpp
@pytest.mark.parametrize("suffix", ["", pytest.param("_triton", marks=needs_triton)])
def test_operators_pass_opcheck(suffix):
    if suffix:
        import seqaccel.kernels.scan  # noqa: F401
    operators = torch.ops.seqaccel
    # wrap_triton cannot be traced in the interpreter, so the Triton operators' fake is checked where there is a GPU.
    options = {"test_utils": ("test_schema", "test_autograd_registration")} if suffix else {}
    x = to(linear_inputs(2, 6, 3), torch.float32, grad=False)
    for h_0, packed in itertools.product((None, x["h_0"]), (False, True)):
        a, b, offsets, reset = x["a"], x["b"], None, torch.arange(12).view(2, 6) % 4 == 0
        if packed:
            reset = None
            a, b, offsets = a.reshape(1, 12, 3), b.reshape(1, 12, 3), torch.tensor([0, 5, 12])
        forward = getattr(operators, "linear_scan_forward" + suffix)
        torch.library.opcheck(forward, (a, b, h_0, offsets, reset, packed, not packed), **options)
        backward = getattr(operators, "linear_scan_backward" + suffix)
        torch.library.opcheck(backward, (b, h_0, a, b, h_0, offsets, reset, packed), **options)


@needs_cpp
def test_operators_refuse_what_does_not_fit():
    operators = torch.ops.seqaccel
    a = torch.ones(2, 3, 4)
    for arguments in [
        (a, torch.ones(2, 3, 5), None, None),
        (a, a.double(), None, None),
        (a, a, torch.ones(2, 3), None),
        (a[0], a[0], None, None),
        (a.long(), a.long(), None, None),
        (a, a, None, torch.tensor([0, 3])),
        (a[:1], a[:1], None, torch.tensor([0, 3], dtype=torch.int32)),
        (a[:1], a[:1], None, torch.tensor([0])),
        (a[:1], a[:1], torch.ones(1, 4), torch.tensor([0, 2, 3])),
    ]:
        with pytest.raises(RuntimeError, match="seqaccel: "):
            operators.linear_scan_forward(*arguments, None, False, True)
    for reset, message in [(torch.zeros(2, 4, dtype=torch.bool), "shape"), (torch.zeros(2, 3), "dtype")]:
        with pytest.raises(RuntimeError, match=f"seqaccel: .*reset.*{message}"):
            operators.linear_scan_forward(a, a, None, None, reset, False, True)
    with pytest.raises(RuntimeError, match="reset or cu_seqlens"):
        operators.linear_scan_forward(a[:1], a[:1], None, torch.tensor([0, 3]), a[:1, :, 0] > 2, False, True)
    with pytest.raises(RuntimeError, match="expected h to have shape"):
        operators.linear_scan_backward(a, None, a, a[:, :2], None, None, None, False)


@needs_cpp
def test_same_bits_every_time():
    a, b = torch.rand(3, 400, 130), torch.randn(3, 400, 130)
    inputs = to(sru_inputs(130, 5, 70, 2, "input", True), torch.float32)
    grads = torch.randn(130, 5, 140), torch.randn(5, 140)
    with seqaccel.backend("cpp"):
        first, first_grads = run_sru(inputs, grads, directions=2)
        scan = linear_scan(a, b)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            try:
                again, again_grads = run_sru(inputs, grads, directions=2)
                assert torch.equal(linear_scan(a, b), scan)
            finally:
                torch.set_num_threads(2)
            assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
            assert all(torch.equal(first_grads[name], again_grads[name]) for name in first_grads)


@pytest.mark.parametrize("backend", ["reference", CPP])
def test_functions_under_transforms_and_compilation(backend):
    a, b = torch.rand(2, 5, 3), torch.randn(2, 5, 3)
    s = to(sru_inputs(4, 2, 3), torch.float32, grad=False)
    rest = [s[name] for name in ("x", "weight_c", "bias", "c_0")]
    with seqaccel.backend(backend):
        torch.testing.assert_close(torch.vmap(linear_scan)(a, b), linear_scan(a, b))
        leaf = a.clone().requires_grad_()
        (expected,) = torch.autograd.grad(linear_scan(leaf, b).square().sum(), leaf)
        torch.testing.assert_close(torch.func.grad(lambda t: linear_scan(t, b).square().sum())(a), expected)
        leaf = s["u"].clone().requires_grad_()
        (expected,) = torch.autograd.grad(sru(leaf, *rest)[0].square().sum(), leaf)
        torch.testing.assert_close(torch.func.grad(lambda t: sru(t, *rest)[0].square().sum())(s["u"]), expected)

        compiled = torch.compile(lambda t, *r: sru(t, *r)[0].square().sum(), fullgraph=True, backend="aot_eager")
        leaf = s["u"].clone().requires_grad_()
        (actual,) = torch.autograd.grad(compiled(leaf, *rest), leaf)
        torch.testing.assert_close(actual, expected)
        compiled = torch.compile(lambda p, q: linear_scan(p, q, reverse=True), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(a, b), linear_scan(a, b, reverse=True))


@pytest.mark.parametrize("backend", ["reference", CPP])
def test_packed_linear_scan_under_transforms_and_compilation(backend):
    a, b, h_0 = torch.rand(1, 9, 3), torch.randn(1, 9, 3), torch.randn(2, 3)
    cu_seqlens = torch.tensor([0, 4, 9])

    def both(a, b, h_0, cu_seqlens=cu_seqlens):
        return linear_scan(a, b, h_0, cu_seqlens=cu_seqlens, return_last=True)

    def loss(*tensors):
        h, h_last = both(*tensors)
        return h.square().sum() + h_last.sum()

    with seqaccel.backend(backend):
        stacked = [torch.stack((t, 2 * t)) for t in (a, b, h_0)]
        mapped = torch.vmap(both)(*stacked)
        torch.testing.assert_close([t[1] for t in mapped], list(both(2 * a, 2 * b, 2 * h_0)))
        leaves = [t.clone().requires_grad_() for t in (a, b, h_0)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(torch.func.grad(loss, argnums=(0, 1, 2))(a, b, h_0), expected)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for offsets in ([0, 4, 9], [0, 0, 6, 9]):
            offsets = torch.tensor(offsets)
            leaves = [t.clone().requires_grad_() for t in (a, b, torch.randn(len(offsets) - 1, 3))]
            expected = torch.autograd.grad(loss(*leaves, offsets), leaves)
            torch.testing.assert_close(torch.autograd.grad(compiled(*leaves, offsets), leaves), expected)
        program = torch.export.export(Both(), (a, b, h_0, cu_seqlens))
        torch.testing.assert_close(program.module()(a, b, h_0, cu_seqlens), both(a, b, h_0))
    if backend == "cpp":
        forward = torch.ops.seqaccel.linear_scan_forward
        mapped = torch.vmap(lambda *t: forward(*t, cu_seqlens, None, False, True))(*stacked)
        torch.testing.assert_close([t[1] for t in mapped], list(both(2 * a, 2 * b, 2 * h_0)))


class Both(torch.nn.Module):
    def forward(self, a, b, h_0, cu_seqlens):
        return linear_scan(a, b, h_0, cu_seqlens=cu_seqlens, return_last=True)


@needs_cpp
def test_autocast_means_float32():
    a = torch.rand(2, 5, 3).bfloat16()
    s = to(sru_inputs(4, 2, 3), torch.bfloat16, grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_scan(a, torch.rand(2, 5, 3)).dtype == torch.float32
        h, c_n = sru(s["u"], s["x"].float(), s["weight_c"], s["bias"], s["c_0"].float())
    assert h.dtype == c_n.dtype == torch.float32


def test_a_missing_backend_is_an_error():
    a = torch.ones(1, 2, 3)
    with seqaccel.backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' is not available"):
        linear_scan(a, a)
    with seqaccel.backend("torch"), pytest.raises(RuntimeError, match="no backend 'torch'"):
        linear_scan(a, a)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_on_a_gpu(backend, dtype, poison):
    with torch.device("cuda"), seqaccel.backend(backend):
        # The second, third and fourth are cut into chunks of time.
        for sizes in [(2, 7, 5), (1, 9000, 1), (3, 1500, 8), (2, 3000, 40), (4, 64, 2000), (1, 1, 1)]:
            for reverse, with_h_0 in itertools.product([False, True], [False, True]):
                check_linear(sizes, dtype, reverse, with_h_0)
        for sizes, offsets in [((1, 70, 40), [0, 0, 3, 70]), ((1, 9000, 3), [0, 1, 9000])]:
            check_linear(sizes, dtype, offsets=offsets)
        if backend == "cuda":
            for sizes in [(2, 70, 40), (1, 9000, 1)]:
                check_linear(sizes, torch.complex64)
        for sizes in [(5, 2, 3), (70, 3, 17), (33, 4, 300), (1, 1, 1)]:
            for directions, highway, masks in itertools.product([1, 2], ["none", "input", "projected"], [False, True]):
                check_sru(sizes, dtype, directions, highway, masks, use_tanh=masks)


def test_triton_configurations():
    check_configurations("seqaccel.kernels.scan")
