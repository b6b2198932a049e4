"""Additive and multiplicative attention, the functions: definition, every backend, gradients, masks, torch's ways."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import ISAS, isa_fixture
from offline import check_configurations
from tolerances import assert_close

import seqaccel
from seqaccel.functional import additive_attention, multiplicative_attention

# B, Tq, Tk, H, V, dimensions of the mask (0: none)
CASES = [
    (1, 1, 1, 1, 1, 0),
    (2, 1, 70, 33, 5, 2),
    (2, 5, 7, 16, 3, 3),
    (3, 9, 131, 40, 8, 2),
    (1, 66, 65, 7, 9, 3),
    (2, 4, 64, 64, 4, 0),
    (2, 3, 35, 133, 4, 3),
]


def problem(case, dtype=torch.float32):
    B, Tq, Tk, H, V, dims = case
    q, k, v, w = torch.randn(B, Tq, H), torch.randn(B, Tk, H), torch.randn(B, Tk, V), torch.randn(H) * H**-0.5
    mask = None
    if dims:
        mask = torch.rand(*((B, Tk) if dims == 2 else (B, Tq, Tk))) < 0.6
        mask[0, ...] |= True
        mask[-1, ..., 0] = True
        if dims == 3:
            mask[-1, -1] = False  # a query without keys
    return [t.to(dtype) for t in (q, k, v, w)], mask


def with_grads(function, inputs, grads):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    return out, torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])


def pair_by_pair(query, key, value, weight, mask):
    """Each output from the formula, in loops."""
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    weights = query.new_zeros(*query.shape[:2], key.shape[1])
    for b in range(query.shape[0]):
        for i in range(query.shape[1]):
            row = torch.ones(key.shape[1], dtype=torch.bool) if mask is None else mask[b]
            seen = [j for j in range(key.shape[1]) if (row if row.dim() == 1 else row[i])[j]]
            if seen:
                logits = torch.stack([(weight * torch.tanh(query[b, i] + key[b, j])).sum() for j in seen])
                weights[b, i, seen] = torch.softmax(logits, 0)
                out[b, i] = weights[b, i, seen] @ value[b, seen]
    return out, weights


@functools.cache
def solved(case):
    inputs, mask = problem(case)
    B, Tq, Tk, _, V, _ = case
    grads = torch.randn(B, Tq, V), torch.randn(B, Tq, Tk)
    wide = [t.double() for t in inputs]
    with seqaccel.backend("reference"):
        expected = with_grads(lambda *x: additive_attention(*x, mask=mask, need_weights=True), wide, grads)
    return inputs, mask, grads, *expected


isa = isa_fixture(ISAS)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_definition_is_the_formula(case):
    inputs, mask, _, expected, _ = solved(case)
    found = pair_by_pair(*(t.double() for t in inputs), mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_forward_and_gradients(isa, poison, case, dtype):
    inputs, mask, grads, expected, expected_grads = solved(case)
    inputs = [t.to(dtype) for t in inputs]
    with seqaccel.backend("cpp"):
        found, found_grads = with_grads(lambda *x: additive_attention(*x, mask=mask, need_weights=True), inputs, grads)
    for name, a, b in zip(("out", "weights"), found, expected, strict=True):
        assert_close(a, b, "attention", dtype, what=name)
    for name, a, b in zip(("query", "key", "value", "weight"), found_grads, expected_grads, strict=True):
        if b.abs().max() > 1e-12:  # a gradient that is 0 in exact arithmetic has no scale
            assert_close(a, b, "attention", dtype, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("function", [additive_attention, multiplicative_attention])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_query_without_keys_gives_0(backend, function, poison):
    inputs, mask = problem(CASES[2], torch.float64)
    inputs = inputs if function is additive_attention else inputs[:3]
    B, Tq, Tk, _, V, _ = CASES[2]
    with seqaccel.backend(backend):
        (out, weights), grads = with_grads(
            lambda *x: function(*x, mask=mask, need_weights=True),
            inputs,
            (torch.ones(B, Tq, V), torch.randn(B, Tq, Tk)),
        )
    assert (out[-1, -1] == 0).all() and (weights[~mask] == 0).all() and (grads[0][-1, -1] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).double())


def test_scale_normalises_the_weight():
    inputs, mask = problem(CASES[3], torch.float64)
    query, key, value, v = inputs
    g = torch.tensor([1.7], dtype=torch.float64)
    expected = additive_attention(query, key, value, 1.7 * v / v.norm(), mask=mask)
    for scale in (1.7, g, g[0]):
        torch.testing.assert_close(additive_attention(query, key, value, v * 3, scale=scale, mask=mask), expected)
    leaves = [t.requires_grad_() for t in (v, g)]
    assert torch.autograd.gradcheck(
        lambda v, g: additive_attention(query[:, :2], key[:, :3], value[:, :3], v, scale=g), leaves
    )


def test_the_same_bits_each_time_and_for_any_number_of_threads():
    inputs, mask, grads, *_ = solved(CASES[3])
    results = []
    with seqaccel.backend("cpp"):
        for threads in (2, 2, 1):
            torch.set_num_threads(threads)
            try:
                weights = torch.ops.seqaccel.additive_attention_forward(*inputs[:2], inputs[3], mask[:, None])
                back = torch.ops.seqaccel.additive_attention_backward(grads[1], *inputs[:2], inputs[3], weights)
            finally:
                torch.set_num_threads(2)
            results.append([weights, *back])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_step_by_step_is_the_whole():
    """One query at a time has the bits of all at once: a step of a decoder is its part of the training pass."""
    (query, key, value, weight), mask = problem((2, 9, 70, 33, 5, 2))
    with seqaccel.backend("cpp"):
        whole = additive_attention(query, key, value, weight, mask=mask, need_weights=True)[1]
        for i in range(9):
            step = additive_attention(query[:, i : i + 1], key, value, weight, mask=mask, need_weights=True)[1]
            assert torch.equal(step, whole[:, i : i + 1])


def test_strides():
    inputs, mask = problem(CASES[3], torch.float64)
    query, key, value, weight = inputs
    mask = mask[:, None].expand(-1, query.shape[1], -1)
    with seqaccel.backend("cpp"):
        expected = additive_attention(query, key, value, weight, mask=mask.contiguous())
        strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (query, key, value)]
        found = additive_attention(*strided, weight.repeat_interleave(2)[::2], mask=mask)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("B", "Tq", "Tk"), [(2, 0, 5), (2, 5, 0), (1, 0, 0), (0, 5, 5)])
def test_empty(backend, B, Tq, Tk):
    inputs, _ = problem((B, Tq, Tk, 4, 3, 0))
    with seqaccel.backend(backend):
        for function, given in ((additive_attention, inputs), (multiplicative_attention, inputs[:3])):
            (out,), grads = with_grads(lambda *x, f=function: (f(*x),), given, [torch.ones(B, Tq, 3)])
            assert out.shape == (B, Tq, 3) and (out == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dims", [0, 2, 3])
def test_gradcheck(backend, dims):
    inputs, mask = problem((2, 5, 6, 3, 2, dims), torch.float64)
    leaves = [t.requires_grad_() for t in inputs]

    def function(*x):
        return additive_attention(*x, mask=mask, need_weights=True)

    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_keys_that_nobody_attends_to_stay_apart():
    """What is not finite in them reaches no weight and no gradient of queries, other keys and the vector."""
    (query, key, value, weight), mask = problem(CASES[3])
    spoilt = key.masked_fill(~mask[..., None], math.nan)
    results = []
    with seqaccel.backend("cpp"):
        for keys in (key, spoilt):
            leaves = [t.clone().requires_grad_() for t in (query, keys, weight)]
            weights = additive_attention(leaves[0], leaves[1], value, leaves[2], mask=mask, need_weights=True)[1]
            results.append([weights, *torch.autograd.grad(weights.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = CASES[3]
    inputs, mask = problem(case, dtype)
    grads = torch.randn(*case[:2], case[4]).to(dtype), torch.randn(*case[:3]).to(dtype)
    wide = [t.double() for t in inputs]
    with seqaccel.backend("reference"):
        expected = with_grads(lambda *x: additive_attention(*x, mask=mask, need_weights=True), wide, grads)
    with seqaccel.backend("cpp"):
        found = with_grads(lambda *x: additive_attention(*x, mask=mask, need_weights=True), inputs, grads)
    for a, b in zip(found[0], expected[0], strict=True):
        assert a.dtype == dtype
        assert_close(a, b, "attention", dtype)
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.dtype == dtype
        assert_close(a, b, "attention", dtype, backward=True)


# Triton, in the interpreter where there is no GPU

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_triton(case, inputs, mask, grads):
    inputs, grads = [t.to(DEVICE) for t in inputs], [t.to(DEVICE) for t in grads]
    mask = None if mask is None else mask.to(DEVICE)
    with seqaccel.backend("triton"):
        return with_grads(lambda *x: additive_attention(*x, mask=mask, need_weights=True), inputs, grads)


@pytest.mark.parametrize("programs", [1, 1024])
@pytest.mark.parametrize("case", [CASES[0], (2, 1, 70, 33, 5, 2), (2, 5, 7, 16, 3, 3), (2, 3, 75, 130, 4, 2)], ids=str)
def test_triton_forward_and_gradients(monkeypatch, poison, case, programs):
    """With few programs one runs through several tiles of keys."""
    from seqaccel.kernels.attention.additive import launchers

    monkeypatch.setattr(launchers, "_PROGRAMS", programs)
    inputs, mask, grads, expected, expected_grads = solved(case)
    found, found_grads = on_triton(case, inputs, mask, grads)
    for name, a, b in zip(("out", "weights"), found, expected, strict=True):
        assert_close(a, b, "attention", torch.float32, what=name)
    for name, a, b in zip(("query", "key", "value", "weight"), found_grads, expected_grads, strict=True):
        if b.abs().max() > 1e-12:
            assert_close(a, b, "attention", torch.float32, backward=True, what=f"gradient of {name}")
    for a, b in zip(found_grads, on_triton(case, inputs, mask, grads)[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("B", "Tq", "Tk"), [(2, 0, 5), (2, 5, 0), (0, 5, 5)])
def test_triton_at_the_edges(B, Tq, Tk):
    inputs, _ = problem((B, Tq, Tk, 4, 3, 0))
    (out, _), grads = on_triton(None, inputs, None, [torch.ones(B, Tq, 3), torch.ones(B, Tq, Tk)])
    assert out.shape == (B, Tq, 3) and (out == 0).all() and all((g == 0).all() for g in grads)
    with pytest.raises(RuntimeError, match="expected float32, float16 or bfloat16, but got torch.float64"):
        on_triton(None, [t.double() for t in inputs], None, [])


def test_triton_keeps_hidden_pairs_apart():
    """A key that is not finite reaches the queries that attend to it, and the keys that those see, alone."""
    (query, key, value, weight), mask = problem((2, 5, 20, 16, 3, 3))
    mask[0, :, 7], mask[0, 2, 7] = False, True
    spoilt = key.clone()
    spoilt[0, 7] = math.nan
    grads = torch.randn(2, 5, 3), torch.randn(2, 5, 20)
    (_, expected), expected_grads = on_triton(None, (query, key, value, weight), mask, grads)
    (_, found), found_grads = on_triton(None, (query, spoilt, value, weight), mask, grads)
    queries = torch.ones(2, 5, dtype=torch.bool)
    queries[0, 2] = False
    assert torch.equal(found[queries], expected[queries]) and found[0, 2][mask[0, 2]].isnan().all()
    assert (found[~mask] == 0).all()
    assert torch.equal(found_grads[0][queries], expected_grads[0][queries])
    keys = ~torch.stack([mask[0, 2], torch.zeros(20, dtype=torch.bool)])
    assert torch.equal(found_grads[1][keys], expected_grads[1][keys])


def test_triton_float16(poison):
    """Calculated in float32 and rounded once. The interpreter's bfloat16 is wrong: that runs on a GPU only."""
    case = (2, 5, 20, 33, 3, 2)
    inputs, mask = problem(case, torch.float16)
    grads = [torch.randn(2, 5, 3).half(), torch.randn(2, 5, 20).half()]
    found = on_triton(case, inputs, mask, grads)
    with seqaccel.backend("reference"):
        expected = with_grads(
            lambda *x: additive_attention(*x, mask=mask, need_weights=True), [t.double() for t in inputs], grads
        )
    for backward in (False, True):
        for a, b in zip(found[backward], expected[backward], strict=True):
            assert a.dtype == torch.float16
            assert_close(a, b, "attention", torch.float16, backward=backward)


def test_triton_second_derivatives():
    inputs, mask = problem((2, 3, 4, 5, 2, 2))
    values = []
    for backend in ("triton", "reference"):
        leaves = [t.to(DEVICE).requires_grad_() for t in inputs]
        with seqaccel.backend(backend):
            out = additive_attention(*leaves, mask=mask.to(DEVICE))
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
            values.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*values)


def test_triton_configurations_compile():
    check_configurations("seqaccel.kernels.attention.additive")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, (16, 50, 400, 512, 64, 2), (64, 1, 1000, 256, 32, 2)], ids=str)
def test_triton_on_a_gpu(case, dtype):
    inputs, mask = problem(case, dtype)
    grads = torch.randn(*case[:2], case[4]).to(dtype), torch.randn(*case[:3]).to(dtype)
    with seqaccel.backend("cpp"):
        expected = with_grads(
            lambda *x: additive_attention(*x, mask=mask, need_weights=True), [t.double() for t in inputs], grads
        )
    found = on_triton(case, inputs, mask, grads)
    for backward, names in enumerate((("out", "weights"), ("query", "key", "value", "weight"))):
        for name, a, b in zip(names, found[backward], expected[backward], strict=True):
            if b.abs().max() > 1e-12:
                assert_close(a, b, "attention", dtype, backward=bool(backward), what=name)


# multiplicative


@pytest.mark.parametrize("general", [False, True])
def test_multiplicative(general):
    (query, key, value, _), mask = problem(CASES[2], torch.float64)
    weight = torch.randn(16, 16, dtype=torch.float64) if general else None
    projected = query @ weight if general else query
    some = mask.any(-1, keepdim=True)
    for scale in (None, 0.3):
        expected = F.scaled_dot_product_attention(
            projected, key, value, attn_mask=mask | ~some, scale=1.0 if scale is None else scale
        )
        found, weights = multiplicative_attention(query, key, value, weight, scale=scale, mask=mask, need_weights=True)
        torch.testing.assert_close(found, expected * some)
        torch.testing.assert_close(weights @ value, found)
    assert torch.equal(
        multiplicative_attention(query, key, value, weight, mask=mask[:, 0]),
        multiplicative_attention(query, key, value, weight, mask=mask[:, :1].expand(mask.shape)),
    )


# torch's machinery

BOTH = pytest.mark.parametrize(
    "function",
    [additive_attention, lambda q, k, v, w, **rest: multiplicative_attention(q, k, v, torch.diag(w), **rest)],
)


@BOTH
def test_autocast_and_inference_mode(function):
    inputs, mask = problem(CASES[3])
    leaves = [t.requires_grad_() for t in inputs]
    expected = function(*leaves, mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = function(*leaves, mask=mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.1)
    torch.autograd.grad(out.sum(), leaves)
    with torch.inference_mode():
        torch.testing.assert_close(function(*leaves, mask=mask), expected)


def test_functorch():
    inputs, mask = problem((3, 4, 5, 6, 2, 2), torch.float64)
    *stacked, w = inputs
    stacked = [torch.stack([t, -t]) for t in stacked]

    def loss(q, k, v, w):
        return additive_attention(q, k, v, w, mask=mask, scale=2.0).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, 0, None))(*stacked, w)
    leaf = stacked[0].clone().requires_grad_()
    torch.stack([loss(*x, w) for x in zip(leaf, *stacked[1:], strict=True)]).sum().backward()
    torch.testing.assert_close(grads, leaf.grad)


@pytest.mark.parametrize("dynamic", [False, True])
@BOTH
def test_compile(function, dynamic):
    def doubled(q, k, v, w, mask):
        return function(q * 2, k, v, w, mask=mask, need_weights=True)

    compiled = torch.compile(doubled, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (9, 10) if dynamic else (9,):
        inputs, mask = problem((2, T, T + 3, 16, 4, 2))
        grads = torch.randn(2, T, 4), torch.randn(2, T, T + 3)
        found = with_grads(lambda *x, m=mask: compiled(*x, m), inputs, grads)
        torch.testing.assert_close(found, with_grads(lambda *x, m=mask: doubled(*x, m), inputs, grads))


def test_export():
    class Net(torch.nn.Module):
        def forward(self, q, k, v, w, mask):
            return additive_attention(q, k, v, w, mask=mask)

    inputs, mask = problem(CASES[3])
    program = torch.export.export(Net(), (*inputs, mask))
    assert any("additive_attention_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs, mask), Net()(*inputs, mask))


@pytest.mark.parametrize("case", CASES[1:4], ids=str)
def test_opcheck(case):
    (query, key, _, weight), mask = problem(case)
    given = (query.requires_grad_(), key.requires_grad_(), weight.requires_grad_())
    rows = mask if mask.dim() == 3 else mask[:, None]
    forward, backward = torch.ops.seqaccel.additive_attention_forward, torch.ops.seqaccel.additive_attention_backward
    torch.library.opcheck(forward, (*given, rows))
    plain = [t.detach() for t in given]
    weights = forward(*plain, rows)
    torch.library.opcheck(backward, (torch.randn_like(weights), *plain, weights))


def test_memory():
    """No tensor that autograd saves or a kernel makes has a dimension for pairs and one for features."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            results = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(results):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return results

    inputs, mask = problem((2, 50, 60, 40, 8, 2))
    with seqaccel.backend("cpp"), Sizes():
        with_grads(lambda *x: (additive_attention(*x, mask=mask),), inputs, [torch.ones(2, 50, 8)])
    assert largest <= 2 * 50 * 60


def test_errors():
    q, k, v, w = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 6), torch.randn(4)
    for function, last in ((additive_attention, w), (multiplicative_attention, torch.eye(4))):
        for wrong, message in (
            ((q[0], k, v, last), "query"),
            ((q, k[:1], v, last), "key"),
            ((q, k, v[:, :4], last), "value"),
            ((q, k[..., :3], v, last), "key|weight"),
            ((q, k, v, last[:3]), "weight"),
        ):
            with pytest.raises(ValueError, match=message):
                function(*wrong)
        with pytest.raises(TypeError, match="dtype"):
            function(q, k.double(), v, last)
        with pytest.raises(TypeError, match="bool"):
            function(q, k, v, last, mask=torch.ones(2, 5))
        with pytest.raises(ValueError, match="mask"):
            function(q, k, v, last, mask=torch.ones(2, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="scale"):
            function(q, k, v, last, scale=torch.ones(2))


# modules


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_additive_module(normalize, bias):
    module = seqaccel.nn.AdditiveAttention(5, 6, 8, normalize, bias, dtype=torch.float64)
    query, key = torch.randn(2, 4, 5, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    value, mask = torch.randn(2, 7, 3, dtype=torch.float64), torch.rand(2, 7) < 0.7
    mask[:, 0] = True
    given = dict(module.named_parameters())
    w = given["weight"] * given["scale"] / given["weight"].norm() if normalize else given["weight"]
    b = given["query_proj.bias"] if bias else 0
    e = torch.tanh(
        (query @ given["query_proj.weight"].mT + b)[:, :, None] + (key @ given["key_proj.weight"].mT)[:, None]
    )
    weights = torch.softmax((e @ w).masked_fill(~mask[:, None], -math.inf), -1)
    found = module(query, key, value, mask=mask, need_weights=True)
    torch.testing.assert_close(found, (weights @ value, weights))
    torch.testing.assert_close(module(query, key, mask=mask), weights @ key)
    keys = module.key_proj(key)
    for t in range(4):
        step = module.attend(query[:, t : t + 1], keys, value, mask=mask)
        torch.testing.assert_close(step, found[0][:, t : t + 1])
    expected = torch.autograd.grad((weights @ value).square().sum(), list(module.parameters()))
    torch.testing.assert_close(torch.autograd.grad(found[0].square().sum(), list(module.parameters())), expected)
    other = seqaccel.nn.AdditiveAttention(5, 6, 8, normalize, bias, dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(query, key), module(query, key))


@pytest.mark.parametrize("general", [False, True])
def test_multiplicative_module(general):
    module = seqaccel.nn.MultiplicativeAttention(6, 9 if general else None, general, scale=0.5)
    query, key = torch.randn(2, 4, 6), torch.randn(2, 7, 9 if general else 6)
    expected = multiplicative_attention(query, key, key, module.weight, scale=0.5, need_weights=True)
    torch.testing.assert_close(module(query, key, need_weights=True), expected)
    with pytest.raises(ValueError, match="key_size"):
        seqaccel.nn.MultiplicativeAttention(6, 9, general=False)
