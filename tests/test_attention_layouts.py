"""The ready layouts of block-sparse attention, against loops over their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqaccel.functional import block_sparse_attention, top_k_layout
from seqaccel.functional.attention import layouts


def drawn(n, sees, causal):
    return torch.tensor([[bool(sees(i, j)) and (j <= i or not causal) for j in range(n)] for i in range(n)]).view(n, n)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, 40),
    block_size=st.integers(1, 5),
    window=st.integers(1, 4),
    other=st.integers(1, 4),
    causal=st.booleans(),
)
def test_layouts(length, block_size, window, other, causal):
    n, common = -(-length // block_size), dict(block_size=block_size, causal=causal)
    near = lambda i, j: abs(i - j) < window  # noqa: E731
    chosen = [1, 3]
    expected = {
        "window": near,
        "global": lambda i, j: near(i, j) or i < other or j < other,
        "strided": lambda i, j: near(i, j) or (i - j) % other == 0,
        "longformer": lambda i, j: i in chosen or j in chosen or any(abs(i - j) == other * m for m in range(window)),
    }
    found = {
        "window": layouts.sliding_window(length, window, **common),
        "global": layouts.global_window(length, window, other, **common),
        "strided": layouts.strided(length, window, other, **common),
        "longformer": layouts.longformer(length, window, chosen, dilation=other, **common),
    }
    for name, sees in expected.items():
        assert torch.equal(found[name], drawn(n, sees, causal)), name


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [None, 3])
def test_big_bird(causal, heads):
    common = dict(block_size=4, causal=causal)
    base = layouts.global_window(78, 2, 1, **common)
    layout = layouts.big_bird(78, 2, 1, 3, seed=5, num_heads=heads, **common)
    assert layout.shape == (*([heads] if heads else []), 20, 20)
    free = (~base).tril() if causal else ~base
    added = layout & ~base
    assert (base & ~layout).sum() == 0 and not (added & ~free).any()
    assert torch.equal(added.sum(-1), free.sum(-1).clamp(max=3).expand(layout.shape[:-1]))
    assert torch.equal(layout, layouts.big_bird(78, 2, 1, 3, seed=5, num_heads=heads, **common))
    assert not torch.equal(layout, layouts.big_bird(78, 2, 1, 3, seed=6, num_heads=heads, **common))


@pytest.mark.parametrize("n", [7, 12, 13])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 1), (7, 1), (3, 4)])
def test_dilated(n, kernel_size, dilation):
    causal = layouts.dilated(n, kernel_size, dilation, block_size=1, causal=True)
    assert torch.equal(
        causal, drawn(n, lambda i, j: (i - j) % dilation == 0 and 0 <= (i - j) // dilation < kernel_size, True)
    )
    if kernel_size * dilation > n:
        with pytest.raises(ValueError, match="to be at most the number of blocks"):
            layouts.dilated(n, kernel_size, dilation, block_size=1)
        return
    layout = layouts.dilated(n, kernel_size, dilation, block_size=1)
    for i in range(n):
        group = [j for j in range(n) if j % dilation == i % dilation]
        windows = [group[s : s + kernel_size] for s in range(len(group) - kernel_size + 1)]
        best = min((w for w in windows if i in w), key=lambda w: abs(sum(w) / len(w) - i))
        assert layout[i].nonzero().flatten().tolist() == best
    with pytest.raises(ValueError, match="kernel_size to be odd"):
        layouts.dilated(n, 2, block_size=1)


@pytest.mark.parametrize("causal", [True, False])
def test_top_k(causal):
    B, H, G, Tq, Tk, size, k = 2, 4, 2, 45, 52, 8, 3
    query, key = torch.randn(B, H, Tq, 6), torch.randn(B, G, Tk, 6)
    layout = top_k_layout(query, key, k, block_size=size, causal=causal)
    assert layout.shape == (B, H, 6, 7) and layout.dtype == torch.bool
    for b in range(B):
        for h in range(H):
            means = [key[b, h // 2, j * size : (j + 1) * size].mean(0) for j in range(7)]
            for i in range(6):
                block = query[b, h, i * size : (i + 1) * size]
                row = block[0] if causal else block.mean(0)
                scores = [float(row @ m) for m in means]
                wanted = sorted(range(i) if causal else range(7), key=lambda j: -scores[j])
                wanted = [i, *wanted][:k] if causal else wanted[:k]
                assert layout[b, h, i].nonzero().flatten().tolist() == sorted(wanted)


def test_top_k_does_not_see_the_future():
    size, T = 8, 50
    query, key, value = torch.randn(3, 1, 2, T, 6)

    def attend(query, key, value):
        layout = top_k_layout(query, key, 2, block_size=size, causal=True)
        return block_sparse_attention(query, key, value, layout, block_size=size, causal=True)

    expected = attend(query, key, value)
    for t in range(0, T - 1, 3):
        later = [tensor.clone() for tensor in (query, key, value)]
        for tensor in later:
            tensor[:, :, t + 1 :] = 5 * torch.randn_like(tensor[:, :, t + 1 :])
        assert torch.equal(attend(*later)[:, :, : t + 1], expected[:, :, : t + 1])


def test_ties_take_the_first_blocks():
    layout = top_k_layout(torch.ones(1, 1, 8, 2), torch.ones(1, 1, 8, 2), 2, block_size=2)
    assert torch.equal(layout[0, 0], torch.tensor([[True, True, False, False]] * 4))


def test_errors():
    with pytest.raises(ValueError, match="sliding_window: expected window to be at least 1, but got 0"):
        layouts.sliding_window(10, 0, block_size=2)
    with pytest.raises(TypeError, match="strided: expected stride to be an int"):
        layouts.strided(10, 1, 2.0, block_size=2)
    with pytest.raises(TypeError, match="longformer: expected global_blocks to be an int"):
        layouts.longformer(10, 1, ["a"], block_size=2)
    q = torch.randn(1, 2, 8, 4)
    with pytest.raises(ValueError, match="k to be at least 1"):
        top_k_layout(q, q, 0, block_size=2)
    with pytest.raises(ValueError, match="multiple of key's heads, 3"):
        top_k_layout(q, q.expand(1, 2, 8, 4)[:, :1].expand(1, 3, 8, 4), 1, block_size=2)
    with pytest.raises(ValueError, match=r"expected query \(B, H, Tq, D\)"):
        top_k_layout(q[0], q, 1, block_size=2)
    for wrong in (None, 1):
        with pytest.raises(TypeError, match="longformer: expected global_blocks to be a list of ints"):
            layouts.longformer(10, 1, wrong, block_size=2)
    with pytest.raises(ValueError, match="expected window to be an int of 64 bits"):
        layouts.sliding_window(10, 1 << 70, block_size=2)
    with pytest.raises(TypeError, match="expected key to be floating point"):
        top_k_layout(q, q.long(), 1, block_size=2)
    with pytest.raises(ValueError, match="expected key to be on query's device"):
        top_k_layout(q, q.to("meta"), 1, block_size=2)
    with pytest.raises(ValueError, match="expected layout to have shape"):
        block_sparse_attention(q, q, q, torch.ones(4, dtype=torch.bool), block_size=2)


def test_a_block_may_be_longer_than_the_sequence():
    q = torch.randn(1, 2, 8, 4)
    assert torch.equal(top_k_layout(q, q, 1, block_size=1 << 60), torch.ones(1, 2, 1, 1, dtype=torch.bool))
