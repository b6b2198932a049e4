"""Block-sparse attention, the function: definition, every backend, gradients, BlockMask, errors."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import ISAS, NARROW_ISAS, USABLE_NARROW_ISAS, isa_fixture
from offline import check_configurations
from tolerances import assert_as_good_as, assert_close, error

import seqaccel
from seqaccel import backends
from seqaccel.functional import block_sparse_attention
from seqaccel.functional.attention import layouts
from seqaccel.reference import attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of Triton, in the interpreter where there is no GPU

# Tq, Tk, block_size, causal, (heads, key heads, D, Dv), dimensions of the layout
CASES = [
    (1, 1, 4, False, (1, 1, 4, 4), 2),
    (40, 40, 4, True, (2, 2, 16, 16), 2),
    (41, 67, 16, False, (4, 2, 20, 9), 3),
    (67, 41, 16, True, (2, 1, 5, 33), 4),
    (150, 150, 20, True, (2, 1, 8, 8), 4),
    (130, 200, 100, False, (2, 2, 16, 24), 3),
    (33, 33, 64, True, (2, 1, 32, 32), 2),
    (50, 61, 3, True, (3, 1, 3, 2), 3),
]
# Longer than one tile of queries, than one chunk of keys, and than one segment of the backward pass.
LONG_CASES = [
    (2100, 2100, 32, True, (2, 1, 24, 24), 2),
    (3100, 700, 70, False, (2, 2, 32, 16), 3),
    (2101, 2500, 130, True, (1, 1, 16, 16), 4),
]


def make_inputs(case, dtype=torch.float64):
    Tq, Tk, block_size, causal, (H, G, D, Dv), dims = case
    B = 2 if Tq < 200 else 1
    q, k, v = torch.randn(B, H, Tq, D), torch.randn(B, G, Tk, D), torch.randn(B, G, Tk, Dv)
    lead = (B, H)[4 - dims :]
    layout = torch.rand(*lead, -(-Tq // block_size), -(-Tk // block_size)) < 0.4
    layout[..., -1, :] = False  # rows without keys
    layout[..., 0, 0] = True
    return [t.to(dtype) for t in (q, k, v)], layout, dict(block_size=block_size, causal=causal)


def with_grads(function, inputs, grad_out):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out, torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def dense(query, key, value, layout, block_size, causal):
    """torch's dense attention with the mask of the layout, made by hand."""
    Tq, Tk = query.shape[2], key.shape[2]
    mask = layout.repeat_interleave(block_size, -2).repeat_interleave(block_size, -1)[..., :Tq, :Tk]
    if causal:
        mask = mask & torch.ones(Tq, Tk, dtype=torch.bool).tril()
    some = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask | ~some, enable_gqa=True)
    return out * some


@functools.cache
def solved(case):
    """Inputs, which float32 holds exactly, and what dense attention makes of them in float64."""
    inputs, layout, keywords = make_inputs(case, torch.float32)
    grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3])
    wide = [t.double() for t in inputs]
    return inputs, layout, keywords, grad_out, *with_grads(lambda *x: dense(*x, layout, **keywords), wide, grad_out)


isa = isa_fixture(ISAS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_dense_attention_with_the_mask(case):
    inputs, layout, keywords, grad_out, expected, expected_grads = solved(case)
    wide = [t.double() for t in inputs]
    with seqaccel.backend("reference"):
        out, grads = with_grads(lambda *x: block_sparse_attention(*x, layout, **keywords), wide, grad_out)
    for found, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_cpp_forward_and_gradients(isa, poison, case, dtype):
    inputs, layout, keywords, grad_out, expected, expected_grads = solved(case)
    inputs = [t.to(dtype) for t in inputs]
    with seqaccel.backend("cpp"):
        out, grads = with_grads(lambda *x: block_sparse_attention(*x, layout, **keywords), inputs, grad_out)
    assert out.dtype == dtype
    assert_close(out, expected, "attention", dtype, what="out")
    for name, grad, wanted in zip(("query", "key", "value"), grads, expected_grads, strict=True):
        if case[0] * wanted.abs().max() > 1e-12:  # a gradient that is 0 in exact arithmetic has no scale
            assert_close(grad, wanted, "attention", dtype, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_query_without_keys_gives_0(backend, poison):
    q, k, v = (torch.randn(1, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    layout = torch.tensor([[True, False, False], [False, False, True], [False, True, False]])
    options = (8, True, 0.5)
    with seqaccel.backend(backend):
        out, grads = with_grads(
            lambda *x: block_sparse_attention(*x, layout, block_size=8, causal=True), [q, k, v], torch.ones_like(q)
        )
    assert out[:, :, :8].abs().min() > 0 and (out[:, :, 8:16] == 0).all()  # block 1 sees a block after it only
    assert (grads[0][:, :, 8:16] == 0).all()
    assert (grads[1][:, :, 16:] == 0).all() and (grads[2][:, :, 16:] == 0).all()
    lse = torch.ops.seqaccel.block_sparse_attention_forward(q, k, v, layout.expand(1, 2, 3, 3), *options)[1]
    assert (lse[:, :, 8:16] == -math.inf).all() and lse[:, :, 16:].isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_full_layout_is_as_good_as_torch(isa, causal):
    inputs = [torch.randn(1, 2, 500, 64) for _ in range(3)]
    grad_out = torch.randn(1, 2, 500, 64)
    layout = torch.ones(8, 8, dtype=torch.bool)

    def stock(*x):
        return F.scaled_dot_product_attention(*x, is_causal=causal)

    expected = with_grads(stock, [t.double() for t in inputs], grad_out)
    theirs = with_grads(stock, inputs, grad_out)
    with seqaccel.backend("cpp"):
        ours = with_grads(lambda *x: block_sparse_attention(*x, layout, block_size=64, causal=causal), inputs, grad_out)
    assert_as_good_as(ours[0], theirs[0], expected[0], what="out")
    for name, a, b, c in zip(("query", "key", "value"), ours[1], theirs[1], expected[1], strict=True):
        assert_as_good_as(a, b, c, what=f"gradient of {name}")


@pytest.mark.parametrize("case", [CASES[4], *LONG_CASES], ids=str)
def test_the_same_bits_each_time_and_for_any_number_of_threads(case):
    inputs, layout, keywords, grad_out, *_ = solved(case)
    results = []
    with seqaccel.backend("cpp"):
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            try:
                out, grads = with_grads(lambda *x: block_sparse_attention(*x, layout, **keywords), inputs, grad_out)
            finally:
                torch.set_num_threads(2)
            results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_strides(backend):
    q, k, v = (torch.randn(2, 4, 60, 16, dtype=torch.float64) for _ in range(3))
    layout = torch.rand(2, 4, 8, 8) < 0.5
    expected = reference.block_sparse_attention(q, k, v, layout, block_size=8)
    projected = torch.stack([q, k, v], 2).permute(0, 3, 2, 1, 4).contiguous()  # (B, T, 3, H, D)
    strided = {
        "time outside heads": [projected[:, :, i].transpose(1, 2) for i in range(3)],
        "last dimension strided": [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)],
    }
    with seqaccel.backend(backend):
        for name, tensors in strided.items():
            for mask in (layout, layout.mT.contiguous().mT, layout.flip(0).flip(0)):
                out, grads = with_grads(
                    lambda *x, mask=mask: block_sparse_attention(*x, mask, block_size=8), tensors, torch.ones_like(q)
                )
                torch.testing.assert_close(out, expected, rtol=0, atol=1e-12, msg=name)
                assert all(g.shape == q.shape for g in grads)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
def test_a_layout_may_have_more_blocks(backend):
    device = DEVICE if backend == "triton" else "cpu"
    q, k, v = (torch.randn(1, 2, T, 8, device=device) for T in (20, 30, 30))
    layout = torch.rand(2, 9, 11, device=device) < 0.5
    layout[..., 0] = True
    with seqaccel.backend(backend):
        out = block_sparse_attention(q, k, v, layout, block_size=8)
        torch.testing.assert_close(out, block_sparse_attention(q, k, v, layout[:, :3, :4], block_size=8))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("lengths", "B"), [((0, 5), 2), ((5, 0), 2), ((0, 0), 1), ((5, 5), 0)])
def test_empty(backend, lengths, B):
    q, k, v = torch.randn(B, 2, lengths[0], 4), torch.randn(B, 2, lengths[1], 4), torch.randn(B, 2, lengths[1], 3)
    layout = torch.ones(-(-lengths[0] // 4), -(-lengths[1] // 4), dtype=torch.bool)
    with seqaccel.backend(backend):
        out, grads = with_grads(
            lambda *x: block_sparse_attention(*x, layout, block_size=4), [q, k, v], torch.ones(B, 2, lengths[0], 3)
        )
    assert out.shape == (B, 2, lengths[0], 3)
    if lengths[1] == 0:
        assert (out == 0).all()
    if 0 in lengths:
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", [CASES[3], CASES[7]], ids=str)
def test_gradcheck(backend, case):
    case = (14, 11, 4, case[3], (2, 1, 2, 3), case[5])
    inputs, layout, keywords = make_inputs(case)
    leaves = [t.requires_grad_() for t in inputs]
    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, layout, **keywords), leaves)
        assert torch.autograd.gradgradcheck(
            lambda *x: block_sparse_attention(*x, layout, **keywords), leaves, fast_mode=True
        )


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_seen_stays_apart(backend, bad):
    """Keys and values that are not finite change no output that does not see them, and no gradient of its query."""
    T, size = 90, 20
    layout = torch.rand(5, 5) < 0.5
    layout.fill_diagonal_(True)
    seen = reference.visible(layout, size, T, T, True)
    query, key, value = torch.randn(3, 1, 2, T, 17)
    keywords = dict(block_size=size, causal=True)
    for isa in USABLE_NARROW_ISAS if backend == "cpp" else ["portable"]:
        if isa == "avx512_bf16":  # its kernels of float32 are those of avx512
            query, key, value = (t.bfloat16() for t in torch.randn(3, 1, 2, T, 18))
        with seqaccel.backend(backend), backends.isa(isa):
            good = query.clone().requires_grad_()
            expected = block_sparse_attention(good, key, value, layout, **keywords)
            for at in (0, 17, 40, 63, 89):
                apart = ~seen[:, at]
                for spoilt in (1, 2):
                    tensors = [query.clone().requires_grad_(), key.clone(), value.clone()]
                    tensors[spoilt][:, :, at, :2] = bad
                    out = block_sparse_attention(*tensors, layout, **keywords)
                    assert torch.equal(out[:, :, apart], expected[:, :, apart])
                    assert spoilt == 1 or not out[:, :, ~apart, 0].isfinite().any()
                    if backend == "cpp" and apart.any():
                        grad = torch.autograd.grad(out[:, :, apart].sum(), tensors[0])[0]
                        whole = torch.autograd.grad(expected[:, :, apart].sum(), good, retain_graph=True)[0]
                        assert torch.equal(grad[:, :, apart], whole[:, :, apart])


@pytest.mark.parametrize("isa", NARROW_ISAS, indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [True, False])
def test_a_spoilt_query_stays_apart(isa, bad, causal):
    """A query, or a gradient of its output, that is not finite changes nothing of other queries and unseen keys."""
    T, size, dtype, D = 90, 20, *((torch.bfloat16, 18) if isa == "avx512_bf16" else (torch.float32, 17))
    layout = (torch.rand(5, 5) < 0.5).expand(2, 4, 5, 5)
    seen = reference.visible(layout[0, 0], size, T, T, causal)
    query, grad_out = torch.randn(2, 2, 4, T, D, dtype=dtype)
    key, value = torch.randn(2, 2, 2, T, D, dtype=dtype)
    options = (size, causal, 0.5)

    def outputs_and_gradients(query, grad_out):
        out, lse = torch.ops.seqaccel.block_sparse_attention_forward(query, key, value, layout, *options)
        gradients = torch.ops.seqaccel.block_sparse_attention_backward(
            grad_out, query, key, value, layout, out, lse, *options
        )
        return [out, lse.unsqueeze(3), *gradients]

    expected = outputs_and_gradients(query, grad_out)
    for at in (0, 1, 17, 40, 63, 88):
        for spoilt in (0, 1):
            tensors = [query.clone(), grad_out.clone()]
            tensors[spoilt][1, 3, at, :2] = bad  # of the second key head
            found = outputs_and_gradients(*tensors)
            for name, a, b in zip(("out", "lse", "query", "key", "value"), found, expected, strict=True):
                reached = torch.zeros(a.shape[:3], dtype=torch.bool)
                if name in ("key", "value"):
                    reached[1, 1] = seen[at]
                else:
                    reached[1, 3, at] = True
                assert torch.equal(a[~reached], b[~reached]), (name, at, spoilt)


@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(case, dtype):
    inputs, layout, keywords = make_inputs(case, dtype)
    layout = layout.expand(*inputs[0].shape[:2], *layout.shape[-2:])
    rest = (layout, keywords["block_size"], keywords["causal"], 0.3)
    forward = torch.ops.seqaccel.block_sparse_attention_forward
    torch.library.opcheck(forward, (*inputs, *rest))
    out, lse = forward(*inputs, *rest)
    backward = torch.ops.seqaccel.block_sparse_attention_backward
    torch.library.opcheck(backward, (torch.randn_like(out), *inputs, layout, out, lse, *rest[1:]))
    torch.library.opcheck(forward, (*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs), *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, poison):
    for case in (*CASES[1::2], LONG_CASES[0]):
        inputs, layout, keywords = make_inputs(case, dtype=dtype)
        grad_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3], dtype=dtype)
        expected = with_grads(lambda *x: dense(*x, layout, **keywords), [t.double() for t in inputs], grad_out)  # noqa: B023
        for isa in USABLE_NARROW_ISAS:
            with seqaccel.backend("cpp"), backends.isa(isa):
                out, grads = with_grads(lambda *x: block_sparse_attention(*x, layout, **keywords), inputs, grad_out)  # noqa: B023
            assert out.dtype == dtype
            assert_close(out, expected[0], "attention", dtype)
            for grad, wanted in zip(grads, expected[1], strict=True):
                assert grad.dtype == dtype
                assert_close(grad, wanted, "attention", dtype, backward=True)


# torch's machinery


def test_autocast_and_inference_mode():
    q, k, v = (torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3))
    layout = torch.rand(10, 10) < 0.5
    expected = block_sparse_attention(q, k, v, layout, block_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block_sparse_attention(q, k, v, layout, block_size=4)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)
    with torch.inference_mode():
        assert torch.equal(block_sparse_attention(q, k, v, layout, block_size=4), expected)


def test_functorch():
    q, k, v = (torch.randn(3, 2, 2, 20, 4, dtype=torch.float64) for _ in range(3))
    layout = torch.rand(5, 5) < 0.5

    def loss(q, k, v):
        return block_sparse_attention(q, k, v, layout, block_size=4).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss))(q, k, v)
    leaf = q.clone().requires_grad_()
    torch.stack([loss(*x) for x in zip(leaf, k, v, strict=True)]).sum().backward()
    torch.testing.assert_close(grads, leaf.grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def function(q, k, v, layout):
        return block_sparse_attention(q * 2, k, v, layout, block_size=4, causal=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (40, 41) if dynamic else (40,):
        inputs = [torch.randn(2, 2, T, 8) for _ in range(3)]
        layout, grad_out = torch.rand(-(-T // 4), -(-T // 4)) < 0.5, torch.randn(2, 2, T, 8)
        expected = with_grads(lambda *x, layout=layout: function(*x, layout), inputs, grad_out)
        found = with_grads(lambda *x, layout=layout: compiled(*x, layout), inputs, grad_out)
        for a, b in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
            torch.testing.assert_close(a, b)


def test_export():
    class Net(torch.nn.Module):
        def forward(self, q, k, v, layout):
            return block_sparse_attention(q, k, v, layout, block_size=4)

    inputs = (*(torch.randn(1, 2, 40, 8) for _ in range(3)), torch.rand(10, 10) < 0.5)
    program = torch.export.export(Net(), inputs)
    assert any("block_sparse_attention_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Net()(*inputs))


# FlexAttention's BlockMask


def flex_mask(kind, T, **keywords):
    from torch.nn.attention.flex_attention import create_block_mask

    kinds = {
        "causal": lambda b, h, i, j: j <= i,
        "blocks": lambda b, h, i, j: (i // 32 - j // 32).abs() % 3 == h,
        "causal in some blocks": lambda b, h, i, j: (j <= i) & ((i // 32 == j // 32) | (j // 32 == 0)),
        "window": lambda b, h, i, j: (i - j).abs() < 40,
        "all": lambda b, h, i, j: i >= 0,
    }
    return kinds[kind], create_block_mask(kinds[kind], 1, 2, T, T, device="cpu", **keywords)


@pytest.mark.parametrize("kind", ["causal", "blocks", "causal in some blocks", "all"])
@pytest.mark.parametrize(("T", "size"), [(128, 32), (131, 32), (128, 64)])
def test_block_mask(kind, T, size):
    if (kind, size) in (("blocks", 64), ("causal in some blocks", 64)):
        pytest.skip("the mask cuts blocks of 64")
    mask_mod, mask = flex_mask(kind, T, BLOCK_SIZE=size)
    q, k, v = (torch.randn(1, 2, T, 8) for _ in range(3))
    where = (torch.arange(2)[:, None, None], torch.arange(T)[:, None], torch.arange(T))
    seen = mask_mod(0, *where).expand(2, T, T)
    for block_size in (size, 16):
        out = block_sparse_attention(q, k, v, mask, block_size=block_size)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None]))


def test_a_block_mask_that_blocks_cannot_express():
    _, mask = flex_mask("window", 128, BLOCK_SIZE=32)
    q = torch.randn(1, 2, 128, 8)
    with pytest.raises(ValueError, match=r"other than by causality .* use torch.nn.attention.flex_attention"):
        block_sparse_attention(q, q, q, mask, block_size=32)
    with pytest.raises(ValueError, match="expected block_size to divide the mask's"):
        block_sparse_attention(q, q, q, mask, block_size=24)
    with pytest.raises(TypeError, match="expected block_mask to be a BlockMask, but got Tensor"):
        layouts.from_block_mask(q, block_size=16)


# Errors

Q, LAYOUT = torch.randn(2, 4, 10, 8), torch.ones(3, 3, dtype=torch.bool)
BAD = [
    (dict(query=Q[0]), ValueError, r"query to have shape \(B, heads, T, D\), but got \(4, 10, 8\)"),
    (dict(key=Q[..., :7]), ValueError, r"expected key to have shape \(2, heads, T, 8\)"),
    (dict(value=Q[:, :2]), ValueError, r"value to have key's batch, heads and length, \(2, 4, 10\)"),
    (dict(key=Q[:, :3], value=Q[:, :3]), ValueError, "multiple of key's heads, 3"),
    (dict(key=Q.double()), TypeError, "key to have query's dtype, torch.float32, but got torch.float64"),
    (dict(query=Q.long()), TypeError, "query to be floating point, but got torch.int64"),
    (dict(value=Q.to("meta")), ValueError, "value to be on query's device, cpu, but it is on meta"),
    (dict(value=None), TypeError, "value to be a Tensor, but got None"),
    (dict(layout=None), TypeError, "layout to be a Tensor or a BlockMask, but got None"),
    (dict(layout=LAYOUT.int()), TypeError, "layout to be bool, but got torch.int32"),
    (dict(layout=LAYOUT[:2]), ValueError, r"layout to have shape \(3, 3\), .*, but got \(2, 3\)"),
    (dict(layout=LAYOUT.expand(3, 3, 3)), ValueError, r"\(4, 3, 3\) or \(2, 4, 3, 3\), but got \(3, 3, 3\)"),
    (dict(layout=LAYOUT.to("meta")), ValueError, "layout to be on query's device, cpu, but it is on meta"),
    (dict(block_size=0), ValueError, "block_size to be at least 1, but got 0"),
    (dict(block_size=2.0), TypeError, "block_size to be an int, but got float"),
    (dict(causal="no"), TypeError, "causal to be a bool"),
    (dict(scale=math.inf), ValueError, "scale to be finite"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors(change, kind, message):
    with pytest.raises(kind, match=message):
        block_sparse_attention(**{**dict(query=Q, key=Q, value=Q, layout=LAYOUT, block_size=4), **change})


def test_the_operator_checks_what_it_reads():
    forward = torch.ops.seqaccel.block_sparse_attention_forward
    backward = torch.ops.seqaccel.block_sparse_attention_backward
    q, layout, rest = torch.randn(1, 2, 10, 4), torch.ones(1, 2, 3, 3, dtype=torch.bool), (4, True, 0.5)
    saved = forward(q, q, q, layout, *rest)
    wrong = [
        (q[0], q, q, layout),
        (q, q[:, :, :5], q, layout),
        (q, q, q.double(), layout),
        (q, q, q, layout[:, :, :2]),
        (q, q, q, layout[0]),
        (q, q, q, layout.byte()),
    ]
    for arguments in wrong:
        with pytest.raises(RuntimeError, match="seqaccel: expected"):
            forward(*arguments, *rest)
    with pytest.raises(RuntimeError, match="seqaccel: expected block_size to be at least 1"):
        forward(q, q, q, layout, 0, True, 0.5)
    for i in range(2):
        short = saved[i][:, :, :-1]
        with pytest.raises(RuntimeError, match="seqaccel: expected"):
            backward(q, q, q, q, layout, *saved[:i], short, *saved[i + 1 :], *rest)


def test_backend_torch_is_refused():
    with seqaccel.backend("torch"), pytest.raises(RuntimeError, match="no backend 'torch'"):
        block_sparse_attention(Q, Q, Q, LAYOUT, block_size=4)


# Triton, in the interpreter where there is no GPU


@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_forward_and_gradients(poison, case):
    inputs, layout, keywords, grad_out, expected, expected_grads = solved(case)
    inputs, layout = [t.to(DEVICE) for t in inputs], layout.to(DEVICE)
    with seqaccel.backend("triton"):
        out, grads = with_grads(lambda *x: block_sparse_attention(*x, layout, **keywords), inputs, grad_out.to(DEVICE))
    assert_close(out, expected, "attention", torch.float32, what="out")
    for name, grad, wanted in zip(("query", "key", "value"), grads, expected_grads, strict=True):
        if wanted.abs().max() > 1e-12:
            assert_close(grad, wanted, "attention", torch.float32, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1)])
def test_triton_at_the_edges(lengths):
    shapes = ((lengths[0], 4), (lengths[1], 4), (lengths[1], 3))
    q, k, v = (torch.randn(2, 2, *shape, device=DEVICE) for shape in shapes)
    layout = torch.ones(-(-lengths[0] // 4), -(-lengths[1] // 4), dtype=torch.bool, device=DEVICE)
    with seqaccel.backend("triton"):
        out, grads = with_grads(
            lambda *x: block_sparse_attention(*x, layout, block_size=4),
            [q, k, v],
            torch.ones(2, 2, lengths[0], 3, device=DEVICE),
        )
        with pytest.raises(RuntimeError, match="expected float32, float16 or bfloat16, but got torch.float64"):
            block_sparse_attention(q.double(), k.double(), v.double(), layout, block_size=4)
    assert out.shape == (2, 2, lengths[0], 3) and (lengths[1] > 0 or (out == 0).all())
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]


def test_triton_configurations_compile():
    check_configurations("seqaccel.kernels.attention.block_sparse")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES + LONG_CASES, ids=str)
def test_triton_on_a_gpu(case, dtype):
    inputs, layout, keywords, grad_out, *_ = solved(case)
    inputs, grad_out = [t.to(dtype) for t in inputs], grad_out.to(dtype)
    expected, expected_grads = with_grads(
        lambda *x: dense(*x, layout, **keywords), [t.double() for t in inputs], grad_out
    )
    on_gpu = [t.cuda() for t in inputs]
    with seqaccel.backend("triton"):
        out, grads = with_grads(
            lambda *x: block_sparse_attention(*x, layout.cuda(), **keywords), on_gpu, grad_out.cuda()
        )
    # Half precision rounds weights and saved outputs too, not only the result.
    limit = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[dtype]
    pairs = zip((out, *grads), (expected, *expected_grads), strict=True)
    errors = [error(found, wanted) for found, wanted in pairs if wanted.abs().max() > 1e-12]
    assert max(errors) <= limit, errors
