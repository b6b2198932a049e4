"""Hierarchical attention of values of another size, of last queries, packed and padded sequences."""

import functools
import itertools
import math

import pytest
import torch
from attention_cases import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import ISAS, isa_fixture
from tolerances import assert_close

import seqaccel
from seqaccel.functional import hierarchical_attention
from seqaccel.reference import attention as reference

# block_size, fanout, levels, local_blocks, causal, P, (heads, key heads, D, Dv)
CASES = [
    (4, None, None, 2, True, 0, (2, 1, 8, 3)),
    (4, 3, None, 1, True, 2, (4, 2, 5, 20)),
    (16, 2, 1, 2, True, 1, (2, 2, 16, 64)),
    (7, None, 0, 2, True, 0, (1, 1, 4, 33)),
    (4, 2, None, 1, False, 2, (4, 2, 20, 7)),
    (3, 2, 2, 2, False, 0, (2, 1, 9, 16)),
    (64, None, None, 2, False, 0, (1, 1, 32, 1)),
]
LENGTHS = [37, 0, 64, 1, 130, 3]
OFFSETS = [0, *itertools.accumulate(LENGTHS)]


def keywords_of(case):
    block_size, fanout, levels, local_blocks, causal, *_ = case
    return dict(block_size=block_size, fanout=fanout, levels=levels, local_blocks=local_blocks, causal=causal)


def make_inputs(case, B, T, dtype=torch.float64, Tq=None):
    *_, P, (H, G, D, Dv) = case
    shapes = [(B, H, T if Tq is None else Tq, D), (B, G, T, D), (B, G, T, Dv)] + ([(P, G, D)] if P else [])
    return [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in shapes] + ([] if P else [None])


def with_grads(function, inputs, grad_out):
    """The output and the gradients of the inputs that are there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    present = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(out, present, grad_out.to(out.dtype), allow_unused=True)
    return out, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, present, strict=True))


def check(found, expected, dtype):
    for name, a, b in zip(("out", "query", "key", "value", "pool_query"), found, expected, strict=False):
        if b.abs().max() > 1e-12:  # a gradient that is 0 in exact arithmetic has no scale
            assert_close(a, b, "attention", dtype, backward=name != "out", what=name)


isa = isa_fixture(ISAS)


# The size of values, and queries that are the last positions


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("queries", [1, 6, 50])
def test_last_queries_and_values_of_another_size_are_the_definition(backend, case, queries):
    query, key, value, pool_query = make_inputs(case, 1, 50)
    expected = brute_force(query, key, value, pool_query, **keywords_of(case))
    with seqaccel.backend(backend):
        out = hierarchical_attention(query[:, :, 50 - queries :], key, value, pool_query, **keywords_of(case))
    torch.testing.assert_close(out, expected[:, :, 50 - queries :], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries", [1, 70, 2080, 2100])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[5]], ids=str)
def test_gradients_of_last_queries(poison, case, queries, dtype):
    """Long enough for several segments of the backward pass."""
    inputs = make_inputs(case, 1, 2100, dtype, queries)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    wide = [None if t is None else t.double() for t in inputs]
    expected = with_grads(functools.partial(reference.hierarchical_attention, **keywords_of(case)), wide, grad_out)
    with seqaccel.backend("cpp"):
        found = with_grads(functools.partial(hierarchical_attention, **keywords_of(case)), inputs, grad_out)
    check(found, expected, dtype)


def test_decoding_with_a_cache_is_the_whole_sequence():
    q, k, v = torch.randn(3, 2, 4, 100, 16).unbind()
    whole = hierarchical_attention(q, k, v, block_size=8)
    for t in (0, 7, 8, 63, 99):
        step = hierarchical_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], block_size=8)
        torch.testing.assert_close(step, whole[:, :, t : t + 1])


@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (16, 16), (32, 128), (128, 64), (256, 256)])
def test_head_sizes(isa, D, Dv):
    case = (16, None, None, 2, True, 1, (2, 1, D, Dv))
    inputs = make_inputs(case, 1, 150, torch.float32)
    grad_out = torch.randn(1, 2, 150, Dv)
    wide = [t.double() for t in inputs]
    expected = with_grads(functools.partial(reference.hierarchical_attention, block_size=16), wide, grad_out)
    with seqaccel.backend("cpp"):
        check(
            with_grads(functools.partial(hierarchical_attention, block_size=16), inputs, grad_out),
            expected,
            torch.float32,
        )


# Packed and padded sequences


def one_by_one(function, inputs):
    """The output for each sequence alone, one after the other."""
    query, key, value, pool_query = inputs
    parts = [
        function(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], pool_query) for a, b in itertools.pairwise(OFFSETS)
    ]
    return torch.cat(parts, 2)


def padded(t, fill=math.nan):
    """Rows of a packed tensor (1, heads, total, D), with padding."""
    rows = t.new_full((len(LENGTHS), t.shape[1], max(LENGTHS) + 5, t.shape[3]), fill)
    for b, (first, end) in enumerate(itertools.pairwise(OFFSETS)):
        rows[b, :, : end - first] = t[0, :, first:end]
    return rows


def packed(rows):
    return torch.cat([rows[b : b + 1, :, :n] for b, n in enumerate(LENGTHS)], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_sequences_are_sequences_alone(isa, poison, case, dtype):
    inputs = make_inputs(case, 1, OFFSETS[-1], dtype)
    call = functools.partial(hierarchical_attention, **keywords_of(case))
    grad_out = torch.randn(1, inputs[0].shape[1], OFFSETS[-1], inputs[2].shape[3])
    wide = [None if t is None else t.double() for t in inputs]
    with seqaccel.backend("reference"):
        expected = with_grads(lambda *x: one_by_one(call, x), wide, grad_out)
    with seqaccel.backend("cpp"):
        found = with_grads(functools.partial(call, cu_seqlens=torch.tensor(OFFSETS)), inputs, grad_out)
        assert torch.equal(found[0], one_by_one(call, inputs))
    check(found, expected, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_sequences_are_packed_sequences(poison, backend, case):
    inputs = make_inputs(case, 1, OFFSETS[-1])
    call = functools.partial(hierarchical_attention, **keywords_of(case))
    grad_out = torch.randn(1, inputs[0].shape[1], OFFSETS[-1], inputs[2].shape[3], dtype=torch.float64)
    rows = [*(padded(t) for t in inputs[:3]), inputs[3]]
    with seqaccel.backend(backend):
        expected = with_grads(functools.partial(call, cu_seqlens=torch.tensor(OFFSETS)), inputs, grad_out)
        found = with_grads(functools.partial(call, lengths=torch.tensor(LENGTHS)), rows, padded(grad_out))
    past = torch.arange(max(LENGTHS) + 5) >= torch.tensor(LENGTHS)[:, None]
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert not a.transpose(1, 2)[past].any()
        if backend == "cpp":
            assert torch.equal(packed(a), b)
        else:
            torch.testing.assert_close(packed(a), b)
    if inputs[3] is not None:
        torch.testing.assert_close(found[4], expected[4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_half_precision(poison, case, dtype):
    inputs = make_inputs(case, 1, OFFSETS[-1], dtype)
    call = functools.partial(hierarchical_attention, **keywords_of(case))
    grad_out = torch.randn(1, 4, OFFSETS[-1], inputs[2].shape[3]).to(dtype)
    offsets = torch.tensor(OFFSETS)
    with seqaccel.backend("reference"):
        expected = with_grads(functools.partial(call, cu_seqlens=offsets), [t.double() for t in inputs], grad_out)
    with seqaccel.backend("cpp"):
        found = with_grads(functools.partial(call, cu_seqlens=offsets), inputs, grad_out)
        rows = [*(padded(t) for t in inputs[:3]), inputs[3]]
        of_rows = with_grads(functools.partial(call, lengths=torch.tensor(LENGTHS)), rows, padded(grad_out))
    check(found, expected, dtype)
    for a, b in zip(of_rows[:4], found[:4], strict=True):
        assert torch.equal(packed(a), b)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_a_spoilt_sequence_stays_apart(isa, bad, causal):
    inputs = make_inputs(CASES[1], 1, OFFSETS[-1], torch.float32)
    grad_out = torch.randn(1, 4, OFFSETS[-1], 20)
    call = functools.partial(hierarchical_attention, block_size=4, causal=causal, cu_seqlens=torch.tensor(OFFSETS))
    with seqaccel.backend("cpp"):
        expected = with_grads(call, inputs, grad_out)
        for spoilt in (0, 2, 4):
            first, end = OFFSETS[spoilt], OFFSETS[spoilt + 1]
            for which in range(4):
                tensors = [t.clone() for t in (*inputs[:3], grad_out)]
                tensors[which][:, :, first:end] = bad
                found = with_grads(call, [*tensors[:3], inputs[3]], tensors[3])
                for a, b in zip(found[:4], expected[:4], strict=True):
                    assert torch.equal(a[:, :, :first], b[:, :, :first])
                    assert torch.equal(a[:, :, end:], b[:, :, end:])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    block_size=st.integers(2, 8),
    fanout=st.integers(2, 4),
    levels=st.one_of(st.none(), st.integers(0, 3)),
    w=st.integers(1, 3),
    causal=st.booleans(),
    P=st.integers(0, 1),
)
def test_any_lengths(lengths, block_size, fanout, levels, w, causal, P):
    case = (block_size, fanout, levels, w, causal, P, (2, 1, 3, 4))
    T = max(lengths)
    inputs = make_inputs(case, len(lengths), T)
    with seqaccel.backend("cpp"):
        out = hierarchical_attention(*inputs, **keywords_of(case), lengths=torch.tensor(lengths))
    for b, n in enumerate(lengths):
        row = [t[b : b + 1, :, :n] for t in inputs[:3]]
        expected = brute_force(*row, inputs[3], **keywords_of(case))
        torch.testing.assert_close(out[b : b + 1, :, :n], expected, rtol=0, atol=1e-12)
        assert not out[b, :, n:].any()


def test_several_segments_and_threads():
    """The same bits for any number of threads; sequences of several segments beside empty and short ones."""
    lengths = [0, 2500, 0, 40, 1300]
    case = (16, 4, None, 2, True, 1, (2, 1, 8, 5))
    inputs = make_inputs(case, 1, sum(lengths), torch.float32)
    grad_out = torch.randn(1, 2, sum(lengths), 5)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    call = functools.partial(hierarchical_attention, **keywords_of(case), cu_seqlens=offsets)
    results = []
    with seqaccel.backend("cpp"):
        for threads in (2, 1):
            torch.set_num_threads(threads)
            try:
                results.append(with_grads(call, inputs, grad_out))
            finally:
                torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with seqaccel.backend("reference"):
        expected = with_grads(call, [t.double() for t in inputs], grad_out)
    check(results[0], expected, torch.float32)


def test_offsets_and_lengths_out_of_range_stay_in_the_tensors():
    """What the operator does where nothing looks at the values: they are limited, and what they leave out is 0."""
    tensors, options = make_inputs(CASES[1], 1, 20), (4, 3, -1, 1, True, True, 0.5)
    ops = torch.ops.seqaccel
    for offsets, limited in (([-5, 3, 2, 99], [0, 3, 3, 20]), ([4, 9], [4, 9]), ([30, 40], [20, 20])):
        results = [
            ops.hierarchical_attention_forward(*tensors, torch.tensor(given), None, *options)
            for given in (offsets, limited)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        out = reference.hierarchical_attention(
            *tensors, block_size=4, fanout=3, local_blocks=1, scale=0.5, cu_seqlens=torch.tensor(offsets)
        )
        torch.testing.assert_close(results[0][0], out)
    for length, limited in ((-3, 0), (50, 20)):
        results = [
            ops.hierarchical_attention_forward(*tensors, None, torch.tensor([given]), *options)
            for given in (length, limited)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Triton, in the interpreter where there is no GPU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_triton(case, inputs, grad_out, **given):
    inputs = [None if t is None else t.to(DEVICE) for t in inputs]
    with seqaccel.backend("triton"):
        return with_grads(
            functools.partial(hierarchical_attention, **keywords_of(case), **given), inputs, grad_out.to(DEVICE)
        )


@pytest.mark.parametrize(("case", "queries"), [(CASES[1], 33), (CASES[2], 1), (CASES[4], 9), (CASES[5], 70)], ids=str)
def test_triton_last_queries_and_values_of_another_size(poison, case, queries):
    inputs = make_inputs(case, 1, 70, torch.float32, queries)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    wide = [None if t is None else t.double() for t in inputs]
    expected = with_grads(functools.partial(reference.hierarchical_attention, **keywords_of(case)), wide, grad_out)
    check(on_triton(case, inputs, grad_out), expected, torch.float32)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_triton_padded_sequences(monkeypatch, poison, case, splits):
    """What is in the padding reaches nothing, and its outputs and gradients are 0."""
    from seqaccel.kernels.attention.hierarchical import launchers

    monkeypatch.setattr(launchers, "_splits", lambda T, nodes: splits)
    lengths = torch.tensor([40, 0, 13])
    inputs = make_inputs(case, 3, 40, torch.float32)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    wide = [None if t is None else t.double() for t in inputs]
    given = functools.partial(reference.hierarchical_attention, **keywords_of(case), lengths=lengths)
    expected = with_grads(given, wide, grad_out)
    past = (torch.arange(40) >= lengths[:, None])[:, None, :, None]
    spoilt = [t.masked_fill(past, math.nan) for t in (*inputs[:3], grad_out)]
    found = on_triton(case, [*spoilt[:3], inputs[3]], spoilt[3], lengths=lengths.to(DEVICE))
    check(found, expected, torch.float32)
    assert all((t.masked_select(past.to(DEVICE)) == 0).all() for t in found[:4])


# A tile of 128 queries holds two blocks of 64 or three of 40, and lies in one of 100.
TILE_CASES = [
    ((64, 2, None, 2, True, 1, (2, 1, 8, 24)), 200),
    ((64, None, None, 1, False, 0, (2, 2, 20, 7)), 130),
    ((40, 4, None, 1, False, 2, (2, 1, 16, 5)), 200),
    ((100, 2, None, 2, True, 0, (1, 1, 9, 16)), 200),
]


@pytest.mark.parametrize(("case", "queries"), TILE_CASES, ids=str)
def test_triton_tiles_of_several_blocks(monkeypatch, poison, case, queries):
    """The tiles of 16 bits, in float32: with all queries of padded rows, and with the last."""
    from seqaccel.kernels.attention.hierarchical import launchers

    monkeypatch.setattr(launchers, "_TILES", {key: launchers._TILES[key[0], 2] for key in launchers._TILES})
    lengths = torch.tensor([200, 150]) if queries == 200 else None
    inputs = make_inputs(case, 2, 200, torch.float32, queries)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    wide = [None if t is None else t.double() for t in inputs]
    given = functools.partial(reference.hierarchical_attention, **keywords_of(case), lengths=lengths)
    expected = with_grads(given, wide, grad_out)
    check(on_triton(case, inputs, grad_out, lengths=lengths), expected, torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_infinities_stay_in_their_block():
    """A tile holds two blocks of 16. The second sees the first as a node, whose tokens have no weight of their own."""
    query, key, value = torch.randn(3, 1, 1, 32, 4, device=DEVICE)
    keywords = dict(block_size=16, local_blocks=1, causal=False)
    with seqaccel.backend("triton"):
        expected = hierarchical_attention(query, key, value, **keywords)
        value[0, 0, 3, 1] = math.inf
        out = hierarchical_attention(query, key, value, **keywords)
    assert (out[..., 1] == math.inf).all()
    others = [0, 2, 3]
    torch.testing.assert_close(out[..., others], expected[..., others])


def test_triton_refuses_cu_seqlens():
    q = torch.randn(1, 2, 10, 4, device=DEVICE)
    with seqaccel.backend("triton"), pytest.raises(RuntimeError, match="no cu_seqlens; give each sequence a row"):
        hierarchical_attention(q, q, q, cu_seqlens=torch.tensor([0, 10], device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["last", "lengths"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4], CASES[6]], ids=str)
def test_triton_on_a_gpu(case, kind, dtype):
    inputs = make_inputs(case, 3, 700, dtype, 333 if kind == "last" else None)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]).to(dtype)
    lengths = torch.tensor([700, 1, 413]) if kind == "lengths" else None
    wide = [None if t is None else t.double() for t in inputs]
    given = functools.partial(reference.hierarchical_attention, **keywords_of(case), lengths=lengths)
    expected = with_grads(given, wide, grad_out)
    found = on_triton(case, inputs, grad_out, lengths=None if lengths is None else lengths.cuda())
    limit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}[dtype]
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu().double() - b).abs().max() <= limit * b.abs().max()


# torch's machinery


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", ["last", "cu_seqlens", "lengths"])
def test_gradcheck(backend, kind):
    case = (2, None, None, 1, True, 1, (2, 1, 2, 3))
    inputs = make_inputs(case, 1 if kind == "cu_seqlens" else 2, 9, Tq=4 if kind == "last" else None)
    offsets = {"cu_seqlens": torch.tensor([0, 5, 9]), "lengths": torch.tensor([9, 4])}
    given = {kind: offsets[kind]} if kind in offsets else {}
    leaves = [t.requires_grad_() for t in inputs]

    def call(*tensors):
        return hierarchical_attention(*tensors, **keywords_of(case), **given)

    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("kind", ["last", "cu_seqlens", "lengths"])
def test_opcheck(kind):
    case, options = CASES[1], (4, 3, -1, 1, True, True, 0.5)
    inputs = make_inputs(case, 1 if kind == "cu_seqlens" else 2, 20, torch.float32, Tq=6 if kind == "last" else None)
    inputs.append(torch.tensor([0, 12, 20]) if kind == "cu_seqlens" else None)
    inputs.append(torch.tensor([20, 11]) if kind == "lengths" else None)
    forward = torch.ops.seqaccel.hierarchical_attention_forward
    torch.library.opcheck(forward, (*inputs, *options))
    saved = forward(*inputs, *options)
    backward = torch.ops.seqaccel.hierarchical_attention_backward
    torch.library.opcheck(backward, (torch.randn_like(saved[0]), *inputs, *saved, *options))


def test_vmap_and_functional_gradients_of_padded_rows():
    inputs = make_inputs(CASES[1], 2, 20)
    lengths = torch.tensor([20, 11])

    def loss(q, k, v, p):
        return hierarchical_attention(q, k, v, p, block_size=4, lengths=lengths).square().sum()

    leaves = [t.requires_grad_() for t in inputs]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2, 3))(*inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


class Net(torch.nn.Module):
    def __init__(self, queries=None):
        super().__init__()
        self.queries = queries

    def forward(self, q, k, v, p, cu_seqlens=None, lengths=None):
        q = q if self.queries is None else q[:, :, -self.queries :]
        return hierarchical_attention(q * 2, k, v, p, block_size=4, cu_seqlens=cu_seqlens, lengths=lengths)


@pytest.mark.parametrize("kind", ["whole", "last", "cu_seqlens", "lengths"])
def test_compiled_once_for_any_length(kind):
    """One graph forward and one backward serve all T, numbers of sequences and batches."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, net = CompileCounterWithBackend("aot_eager"), Net(3 if kind == "last" else None)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for T, sequences in ((40, 6), (41, 3), (9, 8), (300, 6), (1100, 7)):  # at first no two sizes are equal
        inputs = make_inputs(CASES[1], 1 if kind == "cu_seqlens" else sequences, T, torch.float32)
        offsets = torch.linspace(0, T, sequences + 1).long() if kind == "cu_seqlens" else None
        lengths = torch.linspace(2, T, sequences).long() if kind == "lengths" else None
        given = (*inputs, offsets, lengths)
        found, expected = compiled(*given), net(*given)
        torch.testing.assert_close(found, expected)
        leaves = [t.requires_grad_() for t in inputs]
        grad_out = torch.randn_like(found)
        results = [torch.autograd.grad(f(*leaves, offsets, lengths), leaves, grad_out) for f in (compiled, net)]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2  # without and with gradients


@pytest.mark.parametrize("kind", ["last", "cu_seqlens", "lengths"])
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_any_length(kind, strict):
    T, N = torch.export.Dim("T", min=4), torch.export.Dim("N")
    net = Net(3 if kind == "last" else None)
    rows = 1 if kind == "cu_seqlens" else 2

    def given(steps, sequences):
        offsets = torch.linspace(0, steps, sequences + 1).long() if kind == "cu_seqlens" else None
        lengths = torch.tensor([steps, steps // 2]) if kind == "lengths" else None
        return *make_inputs(CASES[1], rows, steps, torch.float32), offsets, lengths

    shapes = ({2: T}, {2: T}, {2: T}, None, {0: N} if kind == "cu_seqlens" else None, {} if kind == "lengths" else None)
    program = torch.export.export(net, given(30, 3), dynamic_shapes=shapes, strict=strict).module()
    for steps in (4, 5, 33, 400):
        inputs = given(steps, 4)
        torch.testing.assert_close(program(*inputs), net(*inputs))
