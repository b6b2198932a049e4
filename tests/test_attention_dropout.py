"""Dropout of the weights of hierarchical attention: kernels, masks, modules."""

import pytest
import torch
from instruction_sets import USABLE_ISAS
from tolerances import assert_close
from torch import nn

import seqaccel
from seqaccel import backends
from seqaccel.functional import _onnx, hierarchical_attention
from seqaccel.nn import HierarchicalAttention, HierarchicalAttentionEncoder

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# B, Tq, T, block_size, fanout, levels, local_blocks, causal, P, (heads, key heads, D, Dv), sequences
CASES = [
    (2, 41, 41, 4, 3, None, 1, True, 2, (4, 2, 20, 6), {}),
    (2, 70, 70, 16, 2, None, 2, False, 0, (2, 1, 5, 9), {}),
    (1, 6, 50, 4, None, None, 2, True, 1, (2, 2, 8, 8), {}),
    (1, 150, 150, 64, None, 0, 2, True, 0, (1, 1, 16, 16), {}),
    (1, 90, 90, 4, None, None, 1, True, 1, (2, 1, 8, 8), {"cu_seqlens": torch.tensor([0, 37, 37, 88, 90])}),
    (3, 60, 60, 4, 2, None, 2, False, 2, (2, 1, 8, 3), {"lengths": torch.tensor([33, 0, 60])}),
]
LONG = (1, 2100, 2100, 32, 4, None, 2, True, 1, (2, 1, 24, 8), {})  # of several segments of the backward pass


def make_inputs(case, dtype):
    B, Tq, T, block_size, fanout, levels, local_blocks, causal, P, (H, G, D, Dv), sequences = case
    shapes = [(B, H, Tq, D), (B, G, T, D), (B, G, T, Dv)] + ([(P, G, D)] if P else [])
    keywords = dict(block_size=block_size, fanout=fanout, levels=levels, local_blocks=local_blocks, causal=causal)
    return [torch.randn(shape).to(dtype) for shape in shapes], keywords | sequences


def attend(inputs, keywords, seed=7, **more):
    torch.manual_seed(seed)
    return hierarchical_attention(*inputs, **keywords, **more)


def results(backend, inputs, keywords, grads, p):
    """Output, logsumexp, and gradients of the inputs through both."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with seqaccel.backend(backend):
        out, lse = attend(leaves, keywords, dropout_p=p, return_logsumexp=True)
    seen = lse.isfinite()
    total = (out.double() * grads[0]).sum() + (lse[seen].double() * grads[1][seen]).sum()
    return [out, lse[seen], *torch.autograd.grad(total, leaves)]


def compare(case, dtype, p):
    inputs, keywords = make_inputs(case, dtype)
    grads = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]), torch.randn(inputs[0].shape[:3])
    grads = [g.to(dtype).double() for g in grads]
    expected = results("reference", [t.double() for t in inputs], keywords, grads, p)
    found = results("cpp", inputs, keywords, grads, p)
    names = ("out", "lse", "query", "key", "value", "pool_query")
    for name, a, b in zip(names, found, expected, strict=False):
        if b.abs().max() > 1e-12:  # a gradient that is 0 in exact arithmetic has no scale
            assert_close(a, b, "attention", dtype, backward=name not in names[:2], what=name)


# The kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_the_definition_with_the_same_masks(poison, case, dtype):
    compare(case, dtype, 0.3)


@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_instruction_sets(poison, isa):
    with backends.isa(isa):
        for dtype in DTYPES:
            compare(CASES[0], dtype, 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_of_the_backward_pass(poison, dtype):
    compare(LONG, dtype, 0.3)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_gradcheck(backend, case):
    case = (*case[:9], (2, 1, 2, 3), case[10])
    inputs, keywords = make_inputs(case, torch.float64)
    inputs[0] = inputs[0][:, :, -14:] if not case[10] else inputs[0]
    leaves = [t.requires_grad_() for t in inputs]
    with seqaccel.backend(backend):
        assert torch.autograd.gradcheck(lambda *x: attend(x, keywords, dropout_p=0.4), leaves, fast_mode=True)


def test_gradgradcheck():
    inputs, keywords = make_inputs((1, 9, 9, 2, None, None, 1, True, 1, (2, 1, 2, 2), {}), torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    with seqaccel.backend("cpp"):
        assert torch.autograd.gradgradcheck(lambda *x: attend(x, keywords, dropout_p=0.4), leaves, fast_mode=True)


# The masks


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_kept_weights_are_divided_by_their_rate(backend, p):
    """Values of one unit each make the output the weights."""
    T = 200
    query, key = torch.randn(2, 2, 2, T, 8, dtype=torch.float64)
    value = torch.eye(T, dtype=torch.float64).expand(2, 2, T, T)
    with seqaccel.backend(backend):
        weight = hierarchical_attention(query, key, value, levels=0)
        dropped = attend([query, key, value], {"levels": 0}, dropout_p=p)
    keep = dropped != 0
    torch.testing.assert_close(dropped, torch.where(keep, weight / (1 - p), 0.0))
    n = int((weight != 0).sum())
    assert abs(keep.sum() / n - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    masks = keep[:, :, T // 2 :, : T // 2].flatten(0, 2).double() - (1 - p)  # of all rows, and between them
    between = (masks @ masks.T / (T // 2 * p * (1 - p))).fill_diagonal_(0)
    assert between.abs().max() < 7 / (T // 2) ** 0.5


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_node_is_dropped_as_one(backend):
    T = 64
    query, key = torch.randn(2, 1, 1, T, 8, dtype=torch.float64)
    value = torch.eye(T, dtype=torch.float64).expand(1, 1, T, T)
    with seqaccel.backend(backend):
        out = attend([query, key, value], {"block_size": 4, "local_blocks": 1}, dropout_p=0.5)
    last = out[0, 0, -1]  # sees level 2, then level 1, then the tokens of its block
    for span in last[:48].split(16) + last[48:60].split(4):
        assert (span == span[0]).all()
    assert 0 < (last != 0).sum() < T


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_expectation_is_the_output_without_dropout(backend):
    query, key, value = torch.randn(3, 1, 2, 40, 4, dtype=torch.float64)
    rows = [t.expand(400, -1, -1, -1) for t in (query, key, value)]
    with seqaccel.backend(backend):
        expected = hierarchical_attention(query, key, value, block_size=4)
        found = attend(rows, {"block_size": 4}, dropout_p=0.3)
    deviation = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected[0]).abs() < 6 * deviation + 1e-12).all()


def test_a_seed_repeats_the_masks():
    inputs, keywords = make_inputs(CASES[0], torch.float32)
    first = attend(inputs, keywords, dropout_p=0.3)
    assert torch.equal(first, attend(inputs, keywords, dropout_p=0.3))
    assert not torch.equal(first, hierarchical_attention(*inputs, **keywords, dropout_p=0.3))
    assert not torch.equal(first, attend(inputs, keywords, seed=8, dropout_p=0.3))
    assert torch.equal(attend(inputs, keywords, dropout_p=0), hierarchical_attention(*inputs, **keywords))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(first, attend(inputs, keywords, dropout_p=0.3))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_all_weights_dropped(backend):
    inputs, keywords = make_inputs(CASES[0], torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    with seqaccel.backend(backend):
        out = hierarchical_attention(*leaves, **keywords, dropout_p=1.0)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_nothing_but_the_seed_is_stored():
    def stored(p):
        sizes = []
        leaves = [t.requires_grad_() for t in torch.randn(3, 1, 2, 200, 8).unbind()]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes), lambda _: None):
            hierarchical_attention(*leaves, dropout_p=p)
        return sum(sizes)

    assert stored(0.3) - stored(0.0) == 8


def test_dropout_under_no_grad_and_autocast():
    inputs, keywords = make_inputs(CASES[0], torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(attend(inputs, keywords, dropout_p=0.3), attend(inputs, keywords, dropout_p=0.3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend([t.float() for t in inputs], keywords, dropout_p=0.3)
    torch.testing.assert_close(found, attend(inputs, keywords, dropout_p=0.3), check_dtype=False)


# Compilation, export, transforms


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    def function(q, k, v, p):
        return hierarchical_attention(q * 2, k, v, p, block_size=4, dropout_p=0.3)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (40, 41) if dynamic else (40,):
        found = []
        leaves = [torch.randn(2, 2, T, 8, requires_grad=True) for _ in range(3)]
        leaves.append(torch.randn(1, 2, 8, requires_grad=True))
        grad_out = torch.randn(2, 2, T, 8)
        for run in (function, compiled):
            torch.manual_seed(5)
            out = run(*leaves)
            found.append([out, *torch.autograd.grad(out, leaves, grad_out)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_export():
    class Net(nn.Module):
        def forward(self, q, k, v):
            return hierarchical_attention(q, k, v, block_size=4, dropout_p=0.3)

    inputs = tuple(torch.randn(1, 2, 40, 8) for _ in range(3))
    program = torch.export.export(Net(), inputs)
    assert any("hierarchical_attention_forward" in str(node.target) for node in program.graph.nodes)
    found = []
    for run in (program.module(), Net()):
        torch.manual_seed(5)
        found.append(run(*inputs))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(dtype):
    forward, backward = (
        torch.ops.seqaccel.hierarchical_attention_forward,
        torch.ops.seqaccel.hierarchical_attention_backward,
    )
    (query, key, value, pool_query), _ = make_inputs(CASES[0], dtype)
    inputs, options = (query, key, value, pool_query, None, None), (4, 3, -1, 1, True, True, 0.5)
    drops = (0.3, torch.tensor([3]))
    torch.library.opcheck(forward, (*inputs, *options, *drops))
    saved = forward(*inputs, *options, *drops)
    grads = torch.randn_like(saved[0]), torch.randn_like(saved[1])
    torch.library.opcheck(backward, (grads[0], *inputs, *saved, *options, grads[1], *drops))


def test_vmap():
    query, key, value = torch.randn(3, 3, 2, 2, 20, 4).unbind()

    def function(q, k, v):
        return hierarchical_attention(q, k, v, block_size=4, dropout_p=0.3)

    torch.manual_seed(3)
    same = torch.func.vmap(function, randomness="same")(query, key, value)
    torch.manual_seed(3)
    torch.testing.assert_close(same[0], function(query[0], key[0], value[0]))


# Refusals


def test_triton_refuses_dropout():
    query = torch.randn(1, 2, 10, 4)
    with seqaccel.backend("triton"), pytest.raises(RuntimeError, match=r"\(triton\): expected no dropout.*'reference'"):
        hierarchical_attention(query, query, query, dropout_p=0.1)


def test_onnx_refuses_dropout(monkeypatch):
    monkeypatch.setattr(_onnx, "exporting", lambda: True)
    query = torch.randn(1, 2, 10, 4)
    with pytest.raises(RuntimeError, match="dropout is not exported to ONNX; export in eval mode"):
        hierarchical_attention(query, query, query, dropout_p=0.1)


def test_the_operator_checks_dropout():
    forward, query = torch.ops.seqaccel.hierarchical_attention_forward, torch.randn(1, 2, 10, 4)
    for drops in ((0.3, None), (0.3, torch.tensor([1.0])), (0.3, torch.tensor([1, 2])), (1.5, torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="seqaccel: expected dropout"):
            forward(query, query, query, None, None, None, 4, 4, -1, 2, True, True, 0.5, *drops)


# Modules


def test_module_drops_in_training_alone():
    attention = HierarchicalAttention(8, 2, 0.4, batch_first=True, block_size=4)
    plain = HierarchicalAttention(8, 2, batch_first=True, block_size=4)
    plain.load_state_dict(attention.state_dict())
    x, found = torch.randn(2, 30, 8), []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(attention(x, x, x)[0])
    assert torch.equal(*found) and not torch.allclose(found[0], plain(x, x, x)[0])
    q, k, v = attention._project(x, x, x)
    torch.manual_seed(1)
    heads = hierarchical_attention(q, k, v, block_size=4, dropout_p=0.4)
    torch.testing.assert_close(found[0], attention._joined(heads, True))
    assert "dropout=0.4" in repr(attention) and attention.dropout == 0.4
    torch.testing.assert_close(attention.eval()(x, x, x)[0], plain(x, x, x)[0])


def test_streams_drop_in_training_alone():
    attention = HierarchicalAttention(8, 2, 0.5, batch_first=True, block_size=4)
    x = torch.randn(2, 30, 8)
    state = attention.init_state(2)
    assert not torch.allclose(attention.extend(x, state)[0], attention.extend(x, state)[0])
    attention.eval()
    torch.testing.assert_close(attention.extend(x, state)[0], attention(x, x, x)[0])


def test_encoder_drops_weights_of_attention():
    encoder = HierarchicalAttentionEncoder(8, 2, 2, 12, 0.3, batch_first=True, block_size=4)
    assert [layer.self_attn.dropout for layer in encoder.layers] == [0.3, 0.3]
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(2, 30, 8)
    assert not torch.allclose(encoder(x), encoder(x))
    assert torch.equal(encoder.eval()(x), encoder(x))
