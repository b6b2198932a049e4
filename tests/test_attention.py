"""Hierarchical attention, the function: covers, definition, every backend, gradients, errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_cases import all_spans, brute_force, cover
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, NARROW_ISAS, USABLE_NARROW_ISAS, isa_fixture
from offline import check_configurations
from tolerances import assert_as_good_as, assert_close, error

import seqaccel
from seqaccel import backends
from seqaccel.functional import hierarchical_attention
from seqaccel.reference import attention as reference

# T, block_size, fanout, levels, local_blocks, causal, mass_bias, P, (heads, key heads, D)
CASES = [
    (1, 2, None, None, 2, True, True, 0, (1, 1, 4)),
    (7, 2, None, None, 1, True, True, 1, (2, 1, 3)),
    (40, 4, None, None, 2, True, True, 0, (2, 2, 16)),
    (41, 4, 3, None, 1, True, True, 2, (4, 2, 20)),
    (63, 3, 2, None, 3, True, False, 1, (2, 2, 5)),
    (65, 16, 2, 1, 2, True, True, 0, (1, 1, 64)),
    (50, 7, None, 0, 2, True, True, 0, (2, 1, 8)),
    (33, 64, None, None, 2, True, True, 1, (2, 2, 32)),
    (1, 2, None, None, 2, False, True, 0, (1, 1, 4)),
    (40, 4, None, None, 2, False, True, 0, (2, 2, 16)),
    (47, 4, 2, None, 1, False, True, 2, (4, 2, 20)),
    (64, 4, 4, None, 1, False, True, 1, (2, 2, 5)),
    (61, 3, 2, 2, 2, False, False, 0, (2, 1, 9)),
    (50, 7, None, 0, 2, False, True, 0, (2, 1, 8)),
    (33, 64, None, None, 2, False, True, 0, (2, 2, 32)),
]
# Longer than one tile of queries, than one chunk of keys, and than one segment of the backward pass.
LONG_CASES = [
    (2100, 32, 4, None, 2, True, True, 1, (2, 1, 24)),
    (2500, 70, 3, None, 2, True, True, 0, (1, 1, 32)),
    (2101, 130, 2, None, 1, False, True, 1, (2, 2, 16)),
    (2100, 16, None, None, 2, False, True, 0, (1, 1, 80)),
    (2050, 64, None, 0, 2, True, True, 0, (1, 1, 16)),
]


def unpack(case):
    T, block_size, fanout, levels, local_blocks, causal, mass_bias, P, (H, G, D) = case
    keywords = dict(
        block_size=block_size,
        fanout=fanout,
        levels=levels,
        local_blocks=local_blocks,
        causal=causal,
        mass_bias=mass_bias,
    )
    return T, P, H, G, D, keywords


def make_inputs(case, B=2, dtype=torch.float64):
    T, P, H, G, D, keywords = unpack(case)
    inputs = [torch.randn(B, heads, T, D) for heads in (H, G, G)] + [torch.randn(P, G, D) if P else None]
    return [t if t is None else t.to(dtype) for t in inputs], keywords


def with_grads(function, inputs, grad_out):
    """The output and the gradients of the inputs that are there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    present = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, present, grad_out.to(out.dtype), allow_unused=True)
    return out, [torch.zeros_like(t) if g is None else g for g, t in zip(grads, present, strict=True)]


def expected_of(inputs, keywords, grad_out):
    wide = [None if t is None else t.double() for t in inputs]
    return with_grads(lambda *x: reference.hierarchical_attention(*x, **keywords), wide, grad_out.double())


@functools.cache
def solved(case):
    """Inputs, which float32 holds exactly, and what the reference makes of them in float64."""
    inputs, keywords = make_inputs(case, B=2 if case[0] < 200 else 1, dtype=torch.float32)
    grad_out = torch.randn_like(inputs[0])
    return inputs, keywords, grad_out, *expected_of(inputs, keywords, grad_out)


def options(keywords, D):
    fanout = keywords["fanout"] or keywords["block_size"]
    levels = -1 if keywords["levels"] is None else keywords["levels"]
    return (
        keywords["block_size"],
        fanout,
        levels,
        keywords["local_blocks"],
        keywords["causal"],
        keywords["mass_bias"],
        D**-0.5,
    )


isa = isa_fixture(ISAS)


# The definition


@settings(max_examples=100, deadline=None)
@given(
    T=st.integers(1, 300),
    block_size=st.integers(2, 9),
    fanout=st.integers(2, 5),
    levels=st.one_of(st.none(), st.integers(0, 3)),
    w=st.integers(1, 3),
    causal=st.booleans(),
)
def test_cover_is_exact_and_disjoint(T, block_size, fanout, levels, w, causal):
    spans = all_spans(T, block_size, fanout, levels)
    for t in range(0, T, max(1, T // 40)):
        positions = sorted(
            p for level, j in cover(t, T, spans, w, causal) for p in range(j * spans[level], (j + 1) * spans[level])
        )
        assert positions == list(range(t + 1 if causal else T))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case):
    inputs, keywords = make_inputs(case, B=1)
    torch.testing.assert_close(
        reference.hierarchical_attention(*inputs, **keywords), brute_force(*inputs, **keywords), rtol=0, atol=1e-12
    )


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 70),
    block_size=st.integers(2, 8),
    fanout=st.integers(2, 4),
    levels=st.one_of(st.none(), st.integers(0, 3)),
    w=st.integers(1, 3),
    causal=st.booleans(),
    P=st.integers(0, 2),
    D=st.integers(1, 20),
)
def test_cpp_and_reference_are_the_definition(T, block_size, fanout, levels, w, causal, P, D):
    case = (T, block_size, fanout, levels, w, causal, True, P, (2, 1, D))
    inputs, keywords = make_inputs(case, B=1)
    expected = brute_force(*inputs, **keywords)
    for backend in ("reference", "cpp"):
        with seqaccel.backend(backend):
            torch.testing.assert_close(hierarchical_attention(*inputs, **keywords), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("pooled", [False, True], ids=["mean", "attention"])
@pytest.mark.parametrize("causal", [True, False])
def test_equal_tokens_within_blocks_give_dense_attention(backend, pooled, causal):
    block_size, fanout, T = 4, 3, 12 * 9
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (T, T // 36, T // 36))
    k, v = (t.repeat_interleave(36, dim=2) for t in (k, v))  # the widest node stands for 36 tokens
    pool = torch.randn(2, 2, 8, dtype=torch.float64) if pooled else None
    with seqaccel.backend(backend):
        out = hierarchical_attention(
            q, k, v, pool, block_size=block_size, fanout=fanout, levels=3, local_blocks=1, causal=causal
        )
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_constant_values_come_out(backend, case):
    (q, k, v, pool), keywords = make_inputs(case)
    v = torch.randn_like(v[:, :, :1]).expand_as(v)
    with seqaccel.backend(backend):
        out = hierarchical_attention(q, k, v, pool, **keywords)
    group = q.shape[1] // v.shape[1]
    torch.testing.assert_close(out, v.repeat_interleave(group, dim=1), rtol=0, atol=1e-12)


# The C++ kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_cpp_forward_and_gradients(isa, poison, case, dtype):
    inputs, keywords, grad_out, expected, expected_grads = solved(case)
    inputs = [t if t is None else t.to(dtype) for t in inputs]
    with seqaccel.backend("cpp"):
        out, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), inputs, grad_out)
    assert out.dtype == dtype
    assert_close(out, expected, "attention", dtype, what="out")
    for name, grad, wanted in zip(("query", "key", "value", "pool_query"), grads, expected_grads, strict=False):
        if case[0] * wanted.abs().max() > 1e-12:  # a gradient that is 0 in exact arithmetic has no scale
            assert_close(grad, wanted, "attention", dtype, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("causal", [True, False])
def test_dense_case_is_as_good_as_torch(isa, causal):
    inputs = [torch.randn(1, 2, 500, 64) for _ in range(3)]
    grad_out = torch.randn(1, 2, 500, 64)

    def stock(*x):
        return F.scaled_dot_product_attention(*x, is_causal=causal)

    expected = with_grads(stock, [t.double() for t in inputs], grad_out)
    theirs = with_grads(stock, inputs, grad_out)
    with seqaccel.backend("cpp"):
        ours = with_grads(lambda *x: hierarchical_attention(*x, levels=0, causal=causal), inputs, grad_out)
    assert_as_good_as(ours[0], theirs[0], expected[0], what="out")
    for name, a, b, c in zip(("query", "key", "value"), ours[1], theirs[1], expected[1], strict=True):
        assert_as_good_as(a, b, c, what=f"gradient of {name}")


def test_large_logits_and_special_values(isa):
    q, k, v = (torch.randn(1, 1, 100, 16) for _ in range(3))
    expected = reference.hierarchical_attention(40 * q.double(), 40 * k.double(), v.double(), block_size=8)
    with seqaccel.backend("cpp"):
        torch.testing.assert_close(
            hierarchical_attention(40 * q, 40 * k, v, block_size=8).double(), expected, rtol=0, atol=2e-3
        )
        k[0, 0, 50, 3] = math.nan
        out = hierarchical_attention(q, k, v, block_size=8)
    assert out[0, 0, :50].isfinite().all()
    assert out[0, 0, 50:].isnan().all()


@pytest.mark.parametrize("case", [CASES[3], CASES[10], LONG_CASES[0], LONG_CASES[2]], ids=str)
def test_the_same_bits_each_time_and_for_any_number_of_threads(case):
    inputs, keywords = make_inputs(case, dtype=torch.float32)
    grad_out = torch.randn_like(inputs[0])
    results = []
    with seqaccel.backend("cpp"):
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            try:
                out, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), inputs, grad_out)
            finally:
                torch.set_num_threads(2)
            results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "change",
    [dict(block_size=2**62), dict(fanout=2**62), dict(local_blocks=2**62), dict(levels=10**6), dict(levels=0)],
    ids=str,
)
@pytest.mark.parametrize("causal", [True, False])
def test_sizes_beyond_the_sequence(change, causal):
    inputs = [torch.randn(1, 2, 50, 8, dtype=torch.float64) for _ in range(3)]
    keywords = {**dict(block_size=4, fanout=3, local_blocks=2, causal=causal), **change}
    expected = reference.hierarchical_attention(*inputs, **keywords)
    with seqaccel.backend("cpp"):
        torch.testing.assert_close(hierarchical_attention(*inputs, **keywords), expected, rtol=0, atol=1e-12)
    if "levels" not in change and "fanout" not in change:
        dense = F.scaled_dot_product_attention(*inputs, is_causal=causal)
        torch.testing.assert_close(expected, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_layouts(backend):
    keywords = dict(block_size=8, local_blocks=1)
    q, k, v = (torch.randn(2, 4, 60, 16, dtype=torch.float64) for _ in range(3))
    expected = reference.hierarchical_attention(q, k, v, **keywords)
    projected = torch.stack([q, k, v], 2).permute(0, 3, 2, 1, 4).contiguous()  # (B, T, 3, H, D)
    packed = [projected[:, :, i].transpose(1, 2) for i in range(3)]
    layouts = {
        "time outside heads": packed,
        "last dimension strided": [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)],
        "every second": [torch.stack([t, t], 2).flatten(2, 3).view(2, 4, 2, 60, 16)[:, :, 1] for t in (q, k, v)],
    }
    with seqaccel.backend(backend):
        for name, tensors in layouts.items():
            out, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), tensors, torch.ones_like(q))
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-12, msg=name)
            assert all(g.shape == q.shape for g in grads)
        shared = q[:1, :1].expand(2, 4, 60, 16)
        torch.testing.assert_close(
            hierarchical_attention(shared, k, v, **keywords),
            reference.hierarchical_attention(shared.contiguous(), k, v, **keywords),
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(0, 2, 10, 4), (2, 2, 0, 4), (0, 2, 0, 4)])
@pytest.mark.parametrize("P", [0, 1])
def test_empty(backend, shape, P):
    inputs = [torch.randn(shape) for _ in range(3)] + [torch.randn(1, 2, 4) if P else None]
    with seqaccel.backend(backend):
        out, grads = with_grads(lambda *x: hierarchical_attention(*x, block_size=4), inputs, torch.zeros(shape))
    assert out.shape == shape
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", [CASES[3], CASES[4], CASES[10], CASES[12]], ids=str)
def test_gradcheck(backend, case):
    case = (min(case[0], 14), *case[1:8], (2, 1, 2))
    inputs, keywords = make_inputs(case, B=1)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(lambda *x: hierarchical_attention(*x, **keywords), leaves)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradgradcheck(backend):
    inputs, keywords = make_inputs((9, 2, None, None, 1, True, True, 1, (2, 1, 2)), B=1)
    leaves = [t.requires_grad_() for t in inputs]
    with seqaccel.backend(backend):
        assert torch.autograd.gradgradcheck(lambda *x: hierarchical_attention(*x, **keywords), leaves, fast_mode=True)


def test_only_the_gradients_that_are_needed():
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    k.requires_grad_()
    with seqaccel.backend("cpp"):
        hierarchical_attention(q, k, v, block_size=4).sum().backward()
    assert k.grad is not None


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[10]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case, dtype):
    inputs, keywords = make_inputs(case, dtype=dtype)
    rest = options(keywords, inputs[0].shape[-1])
    forward, backward = (
        torch.ops.seqaccel.hierarchical_attention_forward,
        torch.ops.seqaccel.hierarchical_attention_backward,
    )
    inputs += [None, None]
    torch.library.opcheck(forward, (*inputs, *rest))
    saved = forward(*inputs, *rest)
    torch.library.opcheck(backward, (torch.randn_like(inputs[0]), *inputs, *saved, *rest))
    transposed = [t if t is None or t.dim() == 3 else t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    torch.library.opcheck(forward, (*transposed, *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, poison):
    for case in (*CASES[1::2], LONG_CASES[0], LONG_CASES[3]):
        inputs, keywords = make_inputs(case, dtype=dtype, B=1)
        grad_out = torch.randn_like(inputs[0])
        expected, expected_grads = expected_of(inputs, keywords, grad_out)
        for isa in USABLE_NARROW_ISAS:
            with seqaccel.backend("cpp"), backends.isa(isa):
                out, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), inputs, grad_out)  # noqa: B023
            assert out.dtype == dtype
            assert_close(out, expected, "attention", dtype)
            for grad, wanted in zip(grads, expected_grads, strict=True):
                assert grad.dtype == dtype
                assert_close(grad, wanted, "attention", dtype, backward=True)


# torch's machinery


def test_autocast():
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hierarchical_attention(q, k, v, block_size=4)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), hierarchical_attention(q, k, v, block_size=4), rtol=0, atol=0.05)


def test_inference_mode():
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    expected = hierarchical_attention(q, k, v, block_size=4)
    with torch.inference_mode():
        assert torch.equal(hierarchical_attention(q, k, v, block_size=4), expected)


def test_functorch():
    q, k, v = (torch.randn(3, 2, 2, 20, 4, dtype=torch.float64) for _ in range(3))

    def loss(q, k, v):
        return hierarchical_attention(q, k, v, block_size=4).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    leaf = q.clone().requires_grad_()
    torch.stack([loss(*x) for x in zip(leaf, k, v, strict=True)]).sum().backward()
    torch.testing.assert_close(grads, leaf.grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(q, k, v, p):
        return hierarchical_attention(q * 2, k, v, p, block_size=4)

    for T in (40, 41) if dynamic else (40,):
        inputs = [torch.randn(2, 2, T, 8) for _ in range(3)] + [torch.randn(1, 2, 8)]
        grad_out = torch.randn(2, 2, T, 8)
        expected = with_grads(lambda q, k, v, p: hierarchical_attention(q * 2, k, v, p, block_size=4), inputs, grad_out)
        found = with_grads(compiled, inputs, grad_out)
        for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a, b)


def test_export():
    class Net(torch.nn.Module):
        def forward(self, q, k, v):
            return hierarchical_attention(q, k, v, block_size=4)

    inputs = tuple(torch.randn(1, 2, 40, 8) for _ in range(3))
    program = torch.export.export(Net(), inputs)
    assert any("hierarchical_attention_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Net()(*inputs))


# Errors

Q = torch.randn(2, 4, 10, 8)
LENGTHS = torch.tensor([10, 4])
ONE_ROW = dict(query=Q[:1], key=Q[:1], value=Q[:1])
BAD = [
    (dict(query=Q[0]), ValueError, r"query to have shape \(B, heads, T, D\), but got \(4, 10, 8\)"),
    (dict(key=Q[..., :7]), ValueError, r"expected key to have shape \(2, heads, T, 8\)"),
    (dict(key=Q[:, :, :9], value=Q[:, :, :9]), ValueError, "at most as many queries as keys.*10 queries and 9 keys"),
    (dict(value=Q[:, :2]), ValueError, r"value to have key's batch, heads and length, \(2, 4, 10\)"),
    (dict(value=Q[..., :0]), ValueError, "value to have at least one element a head"),
    (dict(lengths=LENGTHS, cu_seqlens=LENGTHS), ValueError, "cu_seqlens or lengths, but got both"),
    (dict(lengths=LENGTHS, query=Q[:, :, 1:]), ValueError, "as many queries as keys with lengths, but got 9 and 10"),
    (dict(lengths=LENGTHS + 1), ValueError, r"lengths between 0 and 10, but got \[11, 5\]"),
    (dict(lengths=LENGTHS[:1]), ValueError, r"lengths to be torch.int64 of shape \(2,\).*use block_sparse_attention"),
    (dict(lengths=Q[:, 0, :, 0] > 0), ValueError, "torch.bool.*for other masks.*use block_sparse_attention"),
    (dict(lengths=LENGTHS.to("meta")), ValueError, "lengths to be on query's device"),
    (dict(lengths=[10, 4]), TypeError, "lengths to be a Tensor"),
    (dict(cu_seqlens=torch.tensor([0, 10])), ValueError, "a batch of 1 with cu_seqlens, but got 2"),
    (dict(cu_seqlens=LENGTHS, **ONE_ROW), ValueError, "cu_seqlens to ascend from 0 to 10"),
    (dict(cu_seqlens=LENGTHS.int(), **ONE_ROW), ValueError, "cu_seqlens to be torch.int64"),
    (dict(key=Q[:, :3], value=Q[:, :3]), ValueError, "multiple of key's heads, 3"),
    (dict(key=Q.double()), TypeError, "key to have query's dtype, torch.float32, but got torch.float64"),
    (dict(query=Q.long()), TypeError, "query to be floating point, but got torch.int64"),
    (dict(value=Q.to("meta")), ValueError, "value to be on query's device, cpu, but it is on meta"),
    (dict(value=None), TypeError, "value to be a Tensor, but got NoneType"),
    (dict(pool_query=torch.randn(2, 3, 8)), ValueError, r"pool_query to have shape \(P, 4, 8\)"),
    (dict(pool_query=torch.randn(0, 4, 8)), ValueError, "P >= 1"),
    (dict(block_size=1), ValueError, "block_size to be at least 2, but got 1"),
    (dict(block_size=2.0), TypeError, "block_size to be an int, but got float"),
    (dict(fanout=1), ValueError, "fanout to be at least 2"),
    (dict(levels=-1), ValueError, "levels to be at least 0"),
    (dict(local_blocks=0), ValueError, "local_blocks to be at least 1"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors(change, kind, message):
    with pytest.raises(kind, match=message):
        hierarchical_attention(**{**dict(query=Q, key=Q, value=Q), **change})


def test_the_operator_checks_what_it_reads():
    forward, backward = (
        torch.ops.seqaccel.hierarchical_attention_forward,
        torch.ops.seqaccel.hierarchical_attention_backward,
    )
    q, rest = torch.randn(1, 2, 10, 4), (4, 4, -1, 2, True, True, 0.5)
    nothing = (None, None, None)
    saved = forward(q, q, q, *nothing, *rest)
    for wrong in (
        (q[0], q, q, *nothing),
        (q, q[:, :, :9], q, *nothing),
        (q, q, q[:, :, :9], *nothing),
        (q, q, q.double(), *nothing),
        (q, q, q, torch.randn(1, 3, 4), None, None),
        (q, q, q, None, torch.tensor([0, 10]), torch.tensor([10])),
        (q, q, q, None, torch.tensor([0]), None),
        (q, q, q, None, torch.tensor([0, 10], dtype=torch.int32), None),
        (q.expand(2, -1, -1, -1), *[q.expand(2, -1, -1, -1)] * 2, None, torch.tensor([0, 10]), None),
        (q[:, :, 1:], q, q, None, torch.tensor([0, 10]), None),
        (q[:, :, 1:], q, q, None, None, torch.tensor([10])),
        (q, q, q, None, None, torch.tensor([10, 10])),
    ):
        with pytest.raises(RuntimeError, match="seqaccel: expected"):
            forward(*wrong, *rest)
    for bad in ((1, 4, -1, 2), (4, 1, -1, 2), (4, 4, -1, 0)):
        with pytest.raises(RuntimeError, match="seqaccel: expected"):
            forward(q, q, q, *nothing, *bad, *rest[4:])
    for i in range(4):
        short = [t[..., :-1, :] if t.dim() == 4 else t[..., :-1] for t in (saved[i],)]
        with pytest.raises(RuntimeError, match="seqaccel: expected"):
            backward(q, q, q, q, *nothing, *saved[:i], *short, *saved[i + 1 :], *rest)


def test_backend_torch_is_refused():
    with seqaccel.backend("torch"), pytest.raises(RuntimeError, match="no backend 'torch'"):
        hierarchical_attention(Q, Q, Q)


# Triton, in the interpreter where there is no GPU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# One case for each path of the kernels: the interpreter takes seconds for one. Of one step the gradients are 0.
@pytest.mark.parametrize("case", [case for i, case in enumerate(CASES) if i not in (0, 2, 8, 9, 11)], ids=str)
def test_triton_forward_and_gradients(poison, case):
    inputs, keywords, grad_out, expected, expected_grads = solved(case)
    inputs = [t if t is None else t.to(DEVICE) for t in inputs]
    with seqaccel.backend("triton"):
        out, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), inputs, grad_out.to(DEVICE))
    assert_close(out, expected, "attention", torch.float32, what="out")
    for name, grad, wanted in zip(("query", "key", "value", "pool_query"), grads, expected_grads, strict=False):
        if wanted.abs().max() > 1e-12:
            assert_close(grad, wanted, "attention", torch.float32, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("case", [CASES[3], CASES[10]], ids=str)
def test_triton_gradients_in_parts(monkeypatch, poison, case):
    """Long sequences cut the queries of a node into parts."""
    from seqaccel.kernels.attention.hierarchical import launchers

    monkeypatch.setattr(launchers, "_splits", lambda T, nodes: 3)
    inputs, keywords, grad_out, _, expected_grads = solved(case)
    inputs = [t if t is None else t.to(DEVICE) for t in inputs]
    with seqaccel.backend("triton"):
        _, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), inputs, grad_out.to(DEVICE))
    for name, grad, wanted in zip(("query", "key", "value", "pool_query"), grads, expected_grads, strict=False):
        assert_close(grad, wanted, "attention", torch.float32, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("shape", [(0, 2, 10, 4), (2, 2, 0, 4), (1, 2, 1, 4)])
def test_triton_at_the_edges(shape):
    inputs = [torch.randn(shape, device=DEVICE) for _ in range(3)] + [torch.randn(1, 2, 4, device=DEVICE)]
    with seqaccel.backend("triton"):
        out, grads = with_grads(
            lambda *x: hierarchical_attention(*x, block_size=4), inputs, torch.ones(shape, device=DEVICE)
        )
        with pytest.raises(RuntimeError, match="expected float32, float16 or bfloat16, but got torch.float64"):
            hierarchical_attention(*[t.double() for t in inputs], block_size=4)
    torch.testing.assert_close(out, inputs[2])  # one token attends to itself
    torch.testing.assert_close(grads[2], torch.ones(shape, device=DEVICE))


def test_triton_configurations_compile():
    check_configurations("seqaccel.kernels.attention.hierarchical")


# Of one token the gradients are 0 in exact arithmetic.
GPU_CASES = [*(case for case in CASES if case[0] > 1), *LONG_CASES, (9000, 16, 8, None, 2, True, True, 1, (1, 1, 64))]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_triton_on_a_gpu(case, dtype):
    inputs, keywords, grad_out, *_ = solved(case)
    inputs = [t if t is None else t.to(dtype) for t in inputs]
    expected, expected_grads = expected_of(inputs, keywords, grad_out.to(dtype))
    inputs = [t if t is None else t.cuda() for t in inputs]
    with seqaccel.backend("triton"):
        out, grads = with_grads(lambda *x: hierarchical_attention(*x, **keywords), inputs, grad_out.to(dtype).cuda())
    # Half precision rounds weights, pooled keys and saved outputs too, not only the result.
    limit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[dtype]
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    errors = [error(found, wanted) for found, wanted in pairs]
    assert max(errors) <= limit, errors


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("D", [4, 33])
def test_the_future_does_not_reach_the_past(backend, bad, D):
    """A key or value that is not finite changes no output before it, and no gradient of a query before it."""
    T = 90
    query, key, value = (torch.randn(1, 2, T, D) for _ in range(3))
    options = dict(block_size=16, local_blocks=2)
    for isa in USABLE_NARROW_ISAS if backend == "cpp" else ["portable"]:
        if isa == "avx512_bf16":  # its kernels of float32 are those of avx512
            query, key, value = query.bfloat16(), key.bfloat16(), value.bfloat16()
        with seqaccel.backend(backend), backends.isa(isa):
            good = query.clone().requires_grad_()
            expected = hierarchical_attention(good, key, value, **options)
            for at in (1, 17, 40, 63, 88):
                for spoilt in (1, 2):
                    tensors = [query.clone().requires_grad_(), key.clone(), value.clone()]
                    tensors[spoilt][:, :, at, :2] = bad
                    out = hierarchical_attention(*tensors, **options)
                    assert torch.equal(out[:, :, :at], expected[:, :, :at])
                    assert spoilt == 1 or not out[:, :, at:, 0].isfinite().any()
                    if backend == "cpp":
                        grad = torch.autograd.grad(out[:, :, :at].sum(), tensors[0])[0]
                        whole = torch.autograd.grad(expected[:, :, :at].sum(), good, retain_graph=True)[0]
                        assert torch.equal(grad[:, :, :at], whole[:, :, :at])


@pytest.mark.parametrize("isa", NARROW_ISAS, indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("D", [4, 33])
def test_a_spoilt_query_stays_apart(isa, bad, D):
    """A query, or a gradient of its output, that is not finite changes nothing of other queries and unseen keys."""
    T, options = 90, (16, 4, -1, 2, True, True, 0.5)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        query, grad_out = torch.randn(2, 2, 4, T, D, dtype=dtype)
        key, value = torch.randn(2, 2, 2, T, D, dtype=dtype)
        pool_query = torch.randn(1, 2, D, dtype=dtype)

        def outputs_and_gradients(query, grad_out, key=key, value=value, pool_query=pool_query):
            inputs = (query, key, value, pool_query, None, None)
            saved = torch.ops.seqaccel.hierarchical_attention_forward(*inputs, *options)
            gradients = torch.ops.seqaccel.hierarchical_attention_backward(grad_out, *inputs, *saved, *options)
            return [saved[0], saved[1].unsqueeze(3), *gradients[:3]]

        expected = outputs_and_gradients(query, grad_out)
        for at in (0, 1, 17, 40, 63, 88):
            for spoilt in (0, 1):
                tensors = [query.clone(), grad_out.clone()]
                tensors[spoilt][1, 3, at, :2] = bad  # of the second key head
                found = outputs_and_gradients(*tensors)
                for name, a, b in zip(("out", "lse", "query", "key", "value"), found, expected, strict=True):
                    reached = torch.zeros(a.shape[:3], dtype=torch.bool)
                    if name in ("key", "value"):
                        reached[1, 1, : at + 1] = True
                    else:
                        reached[1, 3, at] = True
                    assert torch.equal(a[~reached], b[~reached]), (name, at, spoilt)
                assert not found[2 + spoilt * 2][1].isfinite().all()


def test_scores_of_minus_infinity_have_no_weight(isa):
    """Also where the first scores of a query, here that of its own token alone, are -inf."""
    query, key, value = torch.randn(3, 1, 1, 40, 4)
    query, key[:, :, 8] = query.abs(), -math.inf
    with seqaccel.backend("cpp"):
        out = hierarchical_attention(query, key, value, block_size=4, local_blocks=1)
    assert out.isfinite().all()
    torch.testing.assert_close(out, reference.hierarchical_attention(query, key, value, block_size=4, local_blocks=1))
