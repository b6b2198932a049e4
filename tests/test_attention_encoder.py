"""HierarchicalAttentionEncoder: torch.nn.TransformerEncoder's place, positions, streaming."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqaccel.nn import HierarchicalAttention, HierarchicalAttentionEncoder

T = 50
POSITIONS = ["rotary", "learned", None]


def encoder(**keywords):
    torch.manual_seed(0)
    given = {"batch_first": True, "dropout": 0.0, "block_size": 4, **keywords}
    made = HierarchicalAttentionEncoder(8, 2, 2, 12, **given).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # none stays one or zero
    return made


def inputs(steps=T):
    return torch.randn(2, steps, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def causal_mask(steps=T):
    return torch.ones(steps, steps, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_without_levels_it_is_torchs(causal, norm_first, final_norm, activation, bias):
    options = {"norm_first": norm_first, "activation": activation, "bias": bias}
    ours = encoder(positions=None, levels=0, causal=causal, final_norm=final_norm, **options)
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, **options)
    norm = nn.LayerNorm(8, bias=bias) if final_norm else None
    stock = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).double()
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    x, mask = inputs(), causal_mask() if causal else None
    expected = stock(x, mask)
    torch.testing.assert_close(ours(x, mask), expected)
    torch.testing.assert_close(ours(x), expected)
    expected.square().sum().backward()
    ours(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_dropout_is_torchs():
    ours = encoder(positions=None, levels=0, dropout=0.3)
    stock = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 12, 0.3, batch_first=True), 2, enable_nested_tensor=False
    ).double()
    stock.load_state_dict(ours.state_dict())
    for layer in (*stock.layers, *ours.layers):
        layer.self_attn.dropout = 0.0  # drawn otherwise
    x = inputs()[:1]  # random numbers are drawn in the order of memory, which is another for a batch
    torch.manual_seed(2)
    expected = stock(x, causal_mask())
    torch.manual_seed(2)
    found = ours(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, ours(x))
    assert torch.equal(ours.eval()(x), ours(x))


def test_rotary_positions_by_complex_numbers():
    attention = HierarchicalAttention(8, 2, batch_first=True, levels=0, rotary_base=100.0).double()
    x = inputs()
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, 2)
    q, k, v = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in projected)
    angle = torch.arange(T, dtype=torch.float64).outer(100.0 ** -(torch.arange(2, dtype=torch.float64) / 2))
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(*t.chunk(2, 3)) * turn for t in (q, k))
    logits = (q @ k.mH).real / 2
    weights = torch.softmax(logits.masked_fill(causal_mask(), -torch.inf), 3)
    expected = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, x, x)[0], expected)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_stream_is_the_whole(positions, norm_first):
    model, x = encoder(positions=positions, norm_first=norm_first, pool_query=1).eval(), inputs()
    expected = model(x)
    for sizes in ([1] * T, [7, 1, 30, 2, 1, 9], [T], [0, 20, 30]):
        for max_length in (None, T):
            state, outputs = model.init_state(2, max_length=max_length), []
            for piece in x.split(sizes, 1):
                if piece.shape[1] == 1:
                    y, state = model.step(piece[:, 0], state)
                    y = y.unsqueeze(1)
                else:
                    y, state = model.extend(piece, state)
                outputs.append(y)
            torch.testing.assert_close(torch.cat(outputs, 1), expected)


@pytest.mark.parametrize("max_length", [None, T])
@pytest.mark.parametrize("positions", POSITIONS)
def test_streams_of_different_ages(positions, max_length):
    model, x = encoder(positions=positions, batch_first=False).eval(), inputs().transpose(0, 1)
    _, state = model.extend(x[:13], model.init_state(2, max_length=max_length))
    state = model.reset(state, torch.tensor([True, False]))
    state = model.select(state, torch.tensor([1, 0, 1]))
    state = pickle.loads(pickle.dumps(state))
    y, _ = model.extend(x[13:30, [1, 0, 1]], state)
    torch.testing.assert_close(y[:, [0, 2]], model(x[:30])[13:, [1, 1]])
    torch.testing.assert_close(y[:, 1], model(x[13:30])[:, 0])


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("keywords", [dict(), dict(causal=False), dict(num_kv_heads=1)], ids=str)
def test_padding(positions, keywords):
    model, x = encoder(positions=positions, **keywords), inputs()
    padding = torch.arange(T).expand(2, T) >= torch.tensor([[T], [30]])
    padded = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(padded[0], model(x)[0])
    torch.testing.assert_close(padded[1, :30], model(x[1:, :30])[0])
    packed = model(torch.cat([x[0], x[1, :30]]).unsqueeze(0), cu_seqlens=torch.tensor([0, T, T, T + 30]))
    torch.testing.assert_close(packed[0, :T], padded[0])
    torch.testing.assert_close(packed[0, T:], padded[1, :30])


@pytest.mark.parametrize("positions", POSITIONS)
def test_layouts_padding_and_copies(positions):
    model, x = encoder(positions=positions), inputs()
    expected = model(x)
    torch.testing.assert_close(model(x[0]), expected[0])
    other = encoder(positions=positions, batch_first=False)
    torch.testing.assert_close(other(x.transpose(0, 1)).transpose(0, 1), expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)
    padding = torch.arange(T).expand(2, T) >= torch.tensor([[T], [30]])
    padded = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(padded[1, :30], model(x[1:, :30])[0])
    later = x.clone()
    later[:, 31:] += 1.0
    assert torch.equal(model(later)[:, :31], expected[:, :31])


@pytest.mark.parametrize("positions", POSITIONS)
def test_trains(positions):
    model = encoder(positions=positions, max_positions=T, pool_query=1)
    x = inputs().requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None and x.grad.abs().min() > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_positions_tell_orders_apart():
    """Of equal tokens: without positions all outputs are equal."""
    x = inputs(1).expand(2, T, 8)
    same = encoder(positions=None, causal=False)(x)
    torch.testing.assert_close(same, same[:, :1].expand_as(same))
    learned = encoder(positions="learned", causal=False)(x)
    assert not torch.allclose(learned[:, 0], learned[:, 1])


def test_refusals():
    both_ways = encoder(causal=False)
    with pytest.raises(RuntimeError, match="cannot run on a stream"):
        both_ways.init_state(2)
    with pytest.raises(ValueError, match="src_key_padding_mask: expected padding after each sequence only"):
        both_ways(inputs(), src_key_padding_mask=torch.arange(T).expand(2, T) < 3)
    learned = encoder(positions="learned", max_positions=9)
    with pytest.raises(ValueError, match="at most max_positions=9 positions, but got 10"):
        learned(inputs(10))
    _, state = learned.extend(inputs(9), learned.init_state(2))
    with pytest.raises(ValueError, match="at most max_positions=9 positions, but got 10"):
        learned.step(inputs(1)[:, 0], state)
    with pytest.raises(ValueError, match="max_length to be at most max_positions=9"):
        learned.init_state(2, max_length=10)
    with pytest.raises(ValueError, match="heads of an even width"):
        HierarchicalAttentionEncoder(6, 2, 1)
    with pytest.raises(TypeError, match="expected state to be what"):
        learned.extend(inputs(), state[:1])


def test_bfloat16_and_autocast():
    model, x = encoder(), inputs()
    expected = model(x)
    narrow = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.double(), expected, rtol=0, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model.float()(x.float())
    torch.testing.assert_close(cast.double(), expected, rtol=0, atol=0.1)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_step_with_a_state_of_fixed_size_reads_no_value(positions):
    """A tensor on the device "meta" has none to read, so that on a GPU nothing waits."""
    model = encoder(positions=positions, pool_query=1).eval().to("meta")
    state = model.init_state(2, max_length=T)
    for piece in inputs().to("meta").split([1, 9, 40], 1):
        y, state = model.extend(piece, state)
    y, state = model.step(torch.empty(2, 8, dtype=torch.float64, device="meta"), state)
    assert y.shape == (2, 8)
