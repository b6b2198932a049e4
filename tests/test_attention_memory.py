"""NoveltyMemory and its gate: brute force in float64, causality, gradients, streams, errors."""

import itertools
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import USABLE_ISAS
from torch import nn

import seqaccel
from seqaccel.functional import novelty_gate
from seqaccel.nn import NoveltyMemory
from seqaccel.nn.attention import _memory


def similar(B, T, E, kinds=5, noise=0.3, dtype=torch.float64):
    """Vectors of a few kinds with noise of different sizes: every threshold divides them."""
    centres = torch.randn(B, kinds, E, dtype=dtype)
    kind = torch.randint(kinds, (B, T, 1)).expand(B, T, E)
    return centres.gather(1, kind) + noise * torch.rand(B, T, 1, dtype=dtype) * torch.randn(B, T, E, dtype=dtype)


def by_hand(vectors, threshold, window=None, capacity=None, kept=()):
    """The gate of one stream, one vector and one product at a time."""
    kept, rows = [list(map(float, k)) for k in kept], []
    for x in vectors.tolist():
        first = max(0, len(kept) - window) if window else 0
        values = []
        for m in kept[first:]:
            norm = math.sqrt(math.fsum(a * a for a in x)) * math.sqrt(math.fsum(a * a for a in m))
            values.append(math.fsum(a * b for a, b in zip(x, m, strict=True)) / norm if norm else 0.0)
        if not kept or (max(values) < threshold and (capacity is None or len(kept) < capacity)):
            rows.append(len(kept))
            kept.append(x)
        else:
            rows.append(first + values.index(max(values)))
    return rows


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(0, 70),
    E=st.integers(2, 40),  # of 1: all similarities are 1 or -1, and rounding breaks ties
    before=st.integers(0, 5),
    threshold=st.sampled_from([-0.5, 0.0, 0.3, 0.8, 0.95, 0.999]),
    window=st.sampled_from([None, 1, 3, 20]),
    capacity=st.sampled_from([None, 1, 7]),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gate_by_hand(backend, B, T, E, before, threshold, window, capacity, seed):
    torch.manual_seed(seed)
    x = similar(B, before + T, E)
    if before and T > 3:
        x[:, before + 3] = 0.0
    kept, x = x[:, :before], x[:, before:]
    size = torch.randint(before + 1, (B,))
    with seqaccel.backend(backend):
        found = novelty_gate(x, kept, size, threshold=threshold, window=window, capacity=capacity)
    assert found.dtype == torch.int64
    for b in range(B):
        assert found[b].tolist() == by_hand(x[b], threshold, window, capacity, kept[b, : size[b]].tolist())


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_and_equal_vectors(isa, dtype):
    x = similar(2, 150, 37, kinds=60, noise=0.0, dtype=dtype)
    with seqaccel.backends.isa(isa):
        rows = novelty_gate(x, threshold=0.9)
        for b in range(2):
            first = [x[b].eq(x[b, t]).all(1).nonzero()[0].item() for t in range(150)]
            assert rows[b].tolist() == [rows[b, t].item() for t in first]
            assert rows[b].tolist() == by_hand(x[b].double(), 0.9)
        noisy = similar(1, 200, 70, kinds=60, noise=1.0, dtype=dtype)
        whole = novelty_gate(noisy, threshold=0.8)[0].tolist()
        kept, size, pieces = torch.zeros(1, 200, 70, dtype=dtype), torch.zeros(1, dtype=torch.int64), []
        for begin, end in itertools.pairwise([0, 1, 2, 19, 40, 97, 200]):
            part = novelty_gate(noisy[:, begin:end], kept, size, threshold=0.8)[0].tolist()
            for t, r in zip(range(begin, end), part, strict=True):
                if r == int(size):
                    kept[0, r] = noisy[0, t]
                    size += 1
            pieces += part
        assert pieces == whole


def test_what_is_not_a_number():
    x = torch.randn(1, 5, 4)
    x[0, 2] = math.nan
    for backend in ("reference", "cpp"):
        with seqaccel.backend(backend):
            assert novelty_gate(x, threshold=1.0)[0].tolist() == [0, 1, 2, 3, 4]
            assert novelty_gate(x, threshold=1.0, capacity=1)[0].tolist() == [0] * 5


def module(**keywords):
    return NoveltyMemory(8, 2, **{**dict(batch_first=True, threshold=0.8), **keywords}).double()


def output_by_hand(memory, query, key, value):
    """The outputs of one sequence, one position at a time."""
    q, k, v = (t[0] for t in memory._project(query, key, value))  # (heads, T, D)
    rows = by_hand(key[0], memory.threshold, memory.window)
    outputs = []
    for t in range(len(rows)):
        counts = [rows[: t + 1].count(n) for n in range(max(rows[: t + 1]) + 1)]
        first = [rows.index(n) for n in range(len(counts))]
        weight = torch.einsum("hd,hnd->hn", q[:, t], k[:, first]) * memory.head_dim**-0.5
        weight = weight.exp() * torch.tensor(counts, dtype=weight.dtype)
        outputs.append(torch.einsum("hn,hnd->hd", weight / weight.sum(1, keepdim=True), v[:, first]).flatten())
    return memory.out_proj(torch.stack(outputs))


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("chunk", [4, 512])
def test_module_by_hand(window, chunk, monkeypatch):
    monkeypatch.setattr(_memory, "_CHUNK", chunk)
    memory = module(window=window, kdim=5, vdim=7)
    query, key = torch.randn(3, 21, 8, dtype=torch.float64), similar(3, 21, 5)
    value = torch.randn(3, 21, 7, dtype=torch.float64)
    out, weights = memory(query, key, value)
    assert weights is None
    for b in range(3):
        one = [t[b : b + 1] for t in (query, key, value)]
        torch.testing.assert_close(out[b], output_by_hand(memory, *one))
        torch.testing.assert_close(memory(*(t[0] for t in one))[0], out[b])
    memory.batch_first = False
    turned = memory(*(t.transpose(0, 1) for t in (query, key, value)))[0]
    torch.testing.assert_close(turned.transpose(0, 1), out)


@pytest.mark.parametrize("repeats", [1, 3])
def test_it_is_dense_attention_where_the_similar_are_equal(repeats):
    stock, memory = nn.MultiheadAttention(8, 2, batch_first=True).double(), module(threshold=0.999)
    assert list(stock.state_dict()) == list(memory.state_dict())
    memory.load_state_dict(stock.state_dict())
    x = torch.randn(2, 6, 8, dtype=torch.float64).repeat(1, repeats, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=torch.float64)
    expected = stock(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(memory(x, x, x)[0], expected)
    torch.testing.assert_close(memory(x, x, x, attn_mask=mask)[0], expected)


def test_gradients():
    memory, x = module(), similar(2, 6, 8)
    parts = [t.requires_grad_() for t in (torch.randn_like(x), x.clone(), torch.randn_like(x))]
    assert torch.autograd.gradcheck(lambda q, v: memory(q, x.detach(), v)[0], (parts[0], parts[2]), fast_mode=True)
    # Keys: the gate is piecewise constant, and 1e-6 crosses no threshold here.
    assert torch.autograd.gradcheck(lambda k: memory(parts[0], k, parts[2])[0], parts[1], fast_mode=True)
    grads = torch.autograd.grad(memory(*parts)[0].square().sum(), [*parts, *memory.parameters()])
    one = [t[:1].detach().requires_grad_() for t in parts]
    by_rows = torch.autograd.grad(output_by_hand(memory, *one).square().sum(), one)
    for found, expected in zip(grads, by_rows, strict=False):
        torch.testing.assert_close(found[:1], expected)
    assert all(g.abs().sum() > 0 for g in grads)


def test_the_future_is_not_seen():
    memory, x = module(), similar(1, 30, 8)
    out = memory(x, x, x)[0]
    for t in range(0, 29, 4):
        later = x.clone()
        later[:, t + 1 :] = similar(1, 29 - t, 8)
        torch.testing.assert_close(memory(later, later, later)[0][:, : t + 1], out[:, : t + 1], rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), max_length=st.sampled_from([None, 40]), seed=st.integers(0, 99))
def test_any_split_of_a_stream(cuts, max_length, seed):
    torch.manual_seed(seed)
    memory, x = module(), similar(3, 40, 8)
    whole = memory(x, x, x)[0]
    state, parts = memory.init_state(3, max_length=max_length), []
    for begin, end in itertools.pairwise([0, *sorted(cuts), 40]):
        y, state = memory.extend(x[:, begin:end], state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state[3].sum(1).tolist() == [40] * 3


@pytest.mark.parametrize("max_length", [None, 40])
def test_streams_are_reset_and_selected(max_length):
    memory, x = module(), similar(3, 30, 8)
    _, state = memory.extend(x, memory.init_state(3, max_length=max_length))
    chosen = memory.select(state, torch.tensor([2, 0, 2]))
    y, _ = memory.step(x[[2, 0, 2], 4], chosen)
    expected, _ = memory.step(x[:, 4], state)
    torch.testing.assert_close(y[1:], memory.step(x[[0, 2], 4], memory.select(state, torch.tensor([0, 2])))[0])
    state = memory.reset(state, torch.tensor([False, True, False]))
    y, state = memory.step(x[:, 4], state)
    torch.testing.assert_close(y[[0, 2]], memory.step(x[[0, 2], 4], memory.select(chosen, torch.tensor([1, 0])))[0])
    torch.testing.assert_close(y[1], memory(x[1:2, 4:5], x[1:2, 4:5], x[1:2, 4:5])[0][0, 0])
    assert state[3][1].sum() == 1 and expected.shape == y.shape


def test_a_full_memory_keeps_nothing_new():
    memory, x = module(threshold=0.99), torch.randn(2, 50, 8, dtype=torch.float64)
    _, state = memory.extend(x, memory.init_state(2, max_length=6))
    assert torch.equal(state[0], x[:, :6]) and state[3].sum(1).tolist() == [50, 50] and state[4] == ()


def test_transformer_layers_take_it():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).double()
    keys = list(layer.state_dict())
    layer.self_attn = module()
    assert list(layer.state_dict()) == keys
    x = similar(2, 22, 8)
    trained = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), trained)
    padding = torch.arange(22) >= torch.tensor([[7], [22]])
    y = layer.self_attn(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(y[0, :7], layer.self_attn(x[0, :7], x[0, :7], x[0, :7])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    memory, x = NoveltyMemory(8, 2, batch_first=True).to(dtype), similar(1, 12, 8).to(dtype)
    wide = NoveltyMemory(8, 2, batch_first=True)
    wide.load_state_dict(memory.state_dict())
    expected = wide(x.float(), x.float(), x.float())[0]
    torch.testing.assert_close(memory(x, x, x)[0].float(), expected, rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x.float(), x.float(), x.float())[0].dtype == torch.bfloat16


def test_long_sequences_are_fast():
    """A fraction of this bound, where the reference's loop takes minutes."""
    memory, x = NoveltyMemory(64, 4, batch_first=True, threshold=0.99), torch.randn(1, 4096, 64)
    with torch.no_grad():
        begin = time.perf_counter()
        memory(x, x, x)
        assert time.perf_counter() - begin < 4


def test_errors():
    with pytest.raises(ValueError, match="threshold to be greater than -1 and at most 1, but got 1.5"):
        NoveltyMemory(8, 2, threshold=1.5)
    with pytest.raises(ValueError, match="window to be at least 1"):
        NoveltyMemory(8, 2, window=0)
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="kept and size together"):
        novelty_gate(x, x, threshold=0.5)
    with pytest.raises(RuntimeError, match="a stream has one input"):
        NoveltyMemory(8, 2, kdim=4).init_state(1)
    with pytest.raises(TypeError, match="what init_state or extend returned"):
        NoveltyMemory(8, 2).extend(x, (x,))
