"""attention_pool: the pyramid of keys and values alone; and the logsumexp of hierarchical attention."""

import math

import pytest
import torch
from instruction_sets import USABLE_ISAS
from tolerances import assert_close

import seqaccel
from seqaccel import backends
from seqaccel.functional import attention_pool, hierarchical_attention
from seqaccel.reference import attention as reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# T, block_size, fanout, levels, P, (heads, D, Dv)
CASES = [
    (40, 4, None, None, 0, (2, 16, 16)),
    (41, 4, 3, None, 2, (2, 20, 5)),
    (63, 3, 2, 2, 1, (1, 5, 9)),
    (300, 64, 2, None, 1, (2, 64, 32)),
    (33, 64, None, None, 1, (2, 8, 8)),
    (64, 8, 2, 0, 0, (1, 4, 4)),
    (0, 4, None, None, 1, (2, 4, 3)),
]


def make_inputs(case, dtype=torch.float64, B=2):
    T, block_size, fanout, levels, P, (G, D, Dv) = case
    inputs = [torch.randn(B, G, T, D), torch.randn(B, G, T, Dv)] + ([torch.randn(P, G, D)] if P else [])
    return [t.to(dtype) for t in inputs], dict(block_size=block_size, fanout=fanout, levels=levels)


def by_hand(key, value, pool_query=None, *, block_size, fanout, levels):
    """Node by node."""
    pairs, n = [], block_size
    while (levels is None or len(pairs) < levels) and key.shape[2] >= n:
        nodes = []
        for j in range(key.shape[2] // n):
            k, v = key[:, :, j * n : (j + 1) * n], value[:, :, j * n : (j + 1) * n]
            if pool_query is None:
                nodes.append((k.mean(2), v.mean(2)))
            else:
                pool = pool_query[min(len(pairs), pool_query.shape[0] - 1)]
                w = torch.softmax((k * pool[:, None]).sum(-1) / math.sqrt(key.shape[3]), -1)[..., None]
                nodes.append(((w * k).sum(2), (w * v).sum(2)))
        key, value = (torch.stack(t, 2) for t in zip(*nodes, strict=True))
        pairs.append((key, value))
        n = fanout or block_size
    return pairs


def with_grads(function, inputs, grads):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = [t for pair in function(*leaves) for t in pair]
    if not out:
        return []
    total = sum((t.double() * g[: t.numel()].view(t.shape)).sum() for t, g in zip(out, grads, strict=False))
    return [*out, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_nodes_by_hand(case, poison):
    for dtype in DTYPES:
        inputs, keywords = make_inputs(case, dtype)
        grads = [torch.randn(2000 * 64).double() for _ in range(20)]
        expected = with_grads(lambda *x: by_hand(*x, **keywords), [t.double() for t in inputs], grads)  # noqa: B023
        found = {"reference": with_grads(lambda *x: reference.attention_pool(*x, **keywords), inputs, grads)}  # noqa: B023
        for isa in USABLE_ISAS:
            with seqaccel.backend("cpp"), backends.isa(isa):
                found[isa] = with_grads(lambda *x: attention_pool(*x, **keywords), inputs, grads)  # noqa: B023
        for name, results in found.items():
            if name == "reference" and dtype not in (torch.float64, torch.float32):
                continue
            assert len(results) == len(expected)
            for i, (a, b) in enumerate(zip(results, expected, strict=True)):
                assert a.dtype == dtype
                assert_close(a, b, "attention_pool", dtype, backward=i >= len(expected) - len(inputs), what=name)


def test_its_nodes_are_those_of_hierarchical_attention():
    inputs, _ = make_inputs((300, 16, 4, None, 1, (2, 8, 8)), torch.float32)
    key, value, pool = inputs
    *_, pooled_key, pooled_value = torch.ops.seqaccel.hierarchical_attention_forward(
        key, key, value, pool, None, None, 16, 4, -1, 2, True, True, 8**-0.5
    )
    pairs = attention_pool(key, value, pool, block_size=16, fanout=4)
    assert torch.equal(torch.cat([k for k, _ in pairs], 2), pooled_key)
    assert torch.equal(torch.cat([v for _, v in pairs], 2), pooled_value)


def test_gradients_of_every_order_and_torch():
    inputs, keywords = make_inputs((13, 2, 3, None, 2, (1, 3, 2)), B=1)
    leaves = [t.requires_grad_() for t in inputs]

    def function(*x):
        return tuple(t for pair in attention_pool(*x, **keywords) for t in pair)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*leaves), function(*leaves), strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(f(*leaves)[0].square().sum(), leaves) for f in (compiled, function)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(Pool(), tuple(t.detach() for t in leaves))
    torch.testing.assert_close(exported.module()(*leaves)[0], function(*leaves)[0])
    torch.testing.assert_close(
        torch.func.grad(lambda k: function(k, *leaves[1:])[0].square().sum())(leaves[0]),
        torch.autograd.grad(function(*leaves)[0].square().sum(), leaves[0])[0],
    )
    arguments = (*leaves, 2, 3, -1, 0.5)
    torch.library.opcheck(torch.ops.seqaccel.attention_pool_forward, arguments)


class Pool(torch.nn.Module):
    def forward(self, key, value, pool_query):
        return attention_pool(key, value, pool_query, block_size=2, fanout=3)[0]


def test_logsumexp():
    """Also of padded rows; its gradient; and two attentions joined by it."""
    q, k, v = (torch.randn(2, 2, 50, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    for lengths in (None, torch.tensor([50, 13])):
        keywords = dict(block_size=4, fanout=3, lengths=lengths, return_logsumexp=True)
        results = {}
        for backend in ("reference", "cpp"):
            with seqaccel.backend(backend):
                out, lse = hierarchical_attention(q, k, v, **keywords)
            finite = lse.masked_fill(lse.isinf(), 0.0)
            grads = torch.autograd.grad((out * 0.3).sum() + finite.sin().sum(), (q, k, v), retain_graph=True)
            alone = torch.autograd.grad(finite.sin().sum(), (q, k), create_graph=True)
            again = torch.autograd.grad(alone[0].square().sum(), (q, k))
            results[backend] = (out, lse, *grads, *alone, *again)
        for a, b in zip(*results.values(), strict=True):
            torch.testing.assert_close(a, b)
        if lengths is not None:
            assert (lse[1, :, 13:] == -math.inf).all()
    dense = torch.logsumexp(
        (q @ k.mT * 8**-0.5).masked_fill(~torch.ones(50, 50, dtype=torch.bool).tril(), -math.inf), -1
    )
    out, lse = hierarchical_attention(q, k, v, levels=0, return_logsumexp=True)
    torch.testing.assert_close(lse, dense)
    compiled = torch.compile(hierarchical_attention, fullgraph=True, backend="aot_eager")
    out, lse = compiled(q, k, v, levels=0, return_logsumexp=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), q), torch.autograd.grad(dense.sum(), q))
    half = hierarchical_attention(*(t.detach().bfloat16() for t in (q, k, v)), levels=0, return_logsumexp=True)
    assert half[0].dtype == torch.bfloat16
    assert half[1].dtype == torch.float32
