"""Sessions of hierarchical attention and of Transformers of it: rings per level, streams of different ages, states."""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
from instruction_sets import NARROW_ISAS, isa_fixture
from tolerances import assert_close

import seqaccel
from seqaccel import nn

isa = isa_fixture(NARROW_ISAS)

PRECISIONS = ["float32", "bfloat16", "int8"]


def attention(width, heads, **keywords):
    return nn.HierarchicalAttention(width, heads, **{"block_size": 4, **keywords})


def encoder(width, heads, **keywords):
    given = {"block_size": 4, "norm_first": True, "activation": "gelu", **keywords}
    return nn.HierarchicalAttentionEncoder(width, heads, 2, 24, **given)


def torchs(**keywords):
    layer = torch.nn.TransformerEncoderLayer(18, 3, 24, activation=torch.nn.SiLU(), **keywords)
    layer.self_attn = attention(18, 3, rotary_base=100.0)
    return torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(18), enable_nested_tensor=False)


NETWORKS = {
    "mean": lambda: attention(18, 3),
    "pooled": lambda: attention(18, 3, pool_query=2, fanout=2, bias=False),
    "near": lambda: attention(40, 2, local_blocks=1, mass_bias=False, pool_query=1),
    "far": lambda: attention(12, 1, block_size=2, local_blocks=3, fanout=3),
    "one_level": lambda: attention(18, 3, levels=1),
    "dense": lambda: attention(66, 1, levels=0),
    "rotary": lambda: attention(20, 2, rotary_base=50.0, pool_query=3),
    "grouped": lambda: attention(24, 6, pool_query=1, rotary_base=20.0, num_kv_heads=2),
    "encoder": lambda: encoder(18, 3),
    "encoder_rotary": lambda: encoder(12, 3, norm_first=False, activation="relu"),
    "encoder_learned": lambda: encoder(18, 3, positions="learned", max_positions=200, pool_query=1, bias=False),
    "torch": torchs,
    "torch_norm_first": lambda: torchs(norm_first=True),
}


def drawn(network):
    """With parameters none of which is one or zero."""
    torch.manual_seed(len(network))
    module = NETWORKS[network]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def width_of(module):
    return next(p for name, p in module.named_parameters() if name.endswith("out_proj.weight")).shape[0]


def session_of(module, *arguments):
    bounded = isinstance(module, nn.HierarchicalAttention) and module.levels is not None
    return seqaccel.Session(module, *arguments, max_length=200 if bounded else None)


def whole(module, x):
    """The output for all steps at once, in float64."""
    module = copy.deepcopy(module).double()
    with torch.no_grad(), seqaccel.backend("reference"):
        x = x.double()
        return module(x, x, x)[0] if isinstance(module, nn.HierarchicalAttention) else module(x)


def run(session, x):
    """By steps and by chunks of every kind."""
    parts = [session.step(x[0])[None], session.extend(x[1:1]), session.extend(x[1:17]), session.extend(x[17:19])]
    return torch.cat(parts + [session.step(x_t)[None] for x_t in x[19:40]] + [session.extend(x[40:])])


@functools.cache
def case(network, batch_size, steps):
    module = drawn(network)
    x = torch.randn(steps, batch_size, width_of(module))
    return module, x, whole(module, x)


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_and_chunks_give_what_the_module_gives(network, weights, isa, poison):
    for batch_size, steps in ((1, 150), (3, 70), (40, 43)):
        module, x, wanted = case(network, batch_size, steps)
        assert_close(run(session_of(module, batch_size, weights), x), wanted, f"session_{weights}", torch.float32)


@pytest.mark.parametrize("network", NETWORKS)
def test_streams_of_different_ages_give_what_the_modules_give(network):
    """Reset, selected and without input now and then, beside the sequences as they are."""
    module, generator = drawn(network), torch.Generator().manual_seed(0)
    session, seen = session_of(module, 3), [torch.zeros(0, width_of(module)) for _ in range(3)]
    for i in range(20):
        x = torch.randn(1 + i % 4, 3, width_of(module))
        advance = torch.rand(3, generator=generator) < 0.8
        found = session.extend(x, advance=advance) if i % 2 else session.extend(x)
        advance |= i % 2 == 0
        for b in range(3):
            if advance[b]:
                seen[b] = torch.cat([seen[b], x[:, b]])
                torch.testing.assert_close(
                    found[:, b].double(), whole(module, seen[b][:, None])[-len(x) :, 0], rtol=1e-4, atol=1e-5
                )
            else:
                assert not found[:, b].any()
        if i % 7 == 3:
            mask = torch.rand(3, generator=generator) < 0.3
            session.reset(mask)
            seen = [s[:0] if new else s for s, new in zip(seen, mask.tolist(), strict=True)]
        if i % 7 == 6:
            indices = torch.randint(3, (3,), generator=generator)
            session.select(indices)
            seen = [seen[i] for i in indices.tolist()]


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("network", ["near", "encoder_learned", "torch"])
def test_states_go_on_where_they_were(network, weights, isa):
    """Also in another session, and in copies, forks and pickles."""
    module = drawn(network)
    session, other = (session_of(module, 2, weights) for _ in range(2))
    x = torch.randn(30, 2, width_of(module))
    other.extend(x[:4])
    session.extend(x[:21])
    session.reset(torch.tensor([False, True]))
    session.extend(x[:2])
    saved = session.state_dict()
    assert saved["age"].dtype == torch.int64
    assert saved["age"].tolist() == [[23, 2]] * (1 if network == "near" else 2)
    assert ("position" in saved) == (network == "encoder_learned")
    copies = [copy.copy(session), pickle.loads(pickle.dumps(session))]
    wanted = session.extend(x)
    other.load_state_dict(saved)
    assert all(torch.equal(one.extend(x), wanted) for one in (other, *copies))
    assert torch.equal(session.fork(2).extend(x), session_of(module, 2, weights).extend(x))


@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_language_model(weights, isa):
    model = torch.nn.Sequential(
        torch.nn.Embedding(20, 18), encoder(18, 3), nn.LSTM(18, 7), torch.nn.Linear(7, 5)
    ).eval()
    tokens = torch.randint(20, (90, 3))
    session = seqaccel.Session(model, 3, weights)
    wanted = model[3](model[2](whole(model[1], model[0](tokens)).float())[0]).detach()
    assert_close(run(session, tokens), wanted.double(), f"session_{weights}", torch.float32)
    assert {"1.age", "1.memory", "2.h", "2.c"} == set(session.state_dict())


def test_memory_grows_with_the_logarithm_of_the_length():
    module = attention(8, 2)
    sizes = [seqaccel.Session(module, max_length=4**n).state_dict()["memory"].numel() for n in (3, 6, 9, 12)]
    first, *others = (b - a for a, b in itertools.pairwise(sizes))
    assert all(abs(more - first) <= 32 for more in others)


@pytest.mark.parametrize("network", ["mean", "dense"])
def test_a_stream_beyond_its_stated_length_forgets_the_oldest(network):
    module = drawn(network)
    session, other = (seqaccel.Session(module, max_length=10) for _ in range(2))
    x = torch.randn(150, 1, width_of(module))
    other.extend(torch.randn(64, 1, width_of(module)))
    found, wanted = session.extend(torch.cat([x[:64], x]))[64:], other.extend(x)
    assert not torch.allclose(found[0], wanted[0])
    torch.testing.assert_close(found[70:], wanted[70:])


def test_ages_out_of_range_are_as_the_nearest_in_range():
    session = seqaccel.Session(drawn("encoder_learned"), 3)
    x = torch.randn(3, 3, 18)
    session.extend(x)
    state = session.state_dict()
    ages = torch.tensor([-(2**63), 2**63 - 1, 7])
    session.load_state_dict(state | {"age": ages.expand(2, 3)})
    assert session.state_dict()["age"].tolist() == 2 * [[0, 2**62, 7]]
    assert session.extend(x).shape == (3, 3, 18)
    session.load_state_dict(state | {"position": ages.expand(1, 3)})
    with pytest.raises(IndexError, match="is longer than the embedding of 200 positions"):
        session.step(x[0])


def test_infinite_values_stay_in_their_stream():
    """A reset ends them."""
    module = drawn("pooled")
    session, clean = (seqaccel.Session(module, 2) for _ in range(2))
    x = torch.randn(60, 2, 18)
    spoilt = x.clone()
    spoilt[1, 1] = math.inf
    y, wanted = session.extend(spoilt), clean.extend(x)
    assert y[1:, 1].isnan().all() and torch.equal(y[:, 0], wanted[:, 0])
    session.reset(torch.tensor([False, True]))
    assert torch.equal(session.extend(x)[:, 1], clean.fork(2).extend(x)[:, 1])


def test_streams_end_with_learned_positions():
    module = drawn("encoder_learned")
    session = seqaccel.Session(module, 2)
    x = torch.randn(199, 2, 18)
    session.extend(x)
    before = session.state_dict()
    with pytest.raises(IndexError, match="x: a stream of 199 steps, and 2 more, is longer than the embedding of 200"):
        session.extend(x[:2])
    assert all(torch.equal(value, before[name]) for name, value in session.state_dict().items())
    session.step(x[0])
    with pytest.raises(IndexError, match="x: a stream of 200 steps, and 1 more"):
        session.step(x[0])
    session.reset(torch.tensor([True, False]))
    session.step(x[0], advance=torch.tensor([True, False]))


def test_bad_arguments_are_named():
    for length in (0, 2**62 + 1, True, 2.0):
        with pytest.raises(ValueError, match=f"max_length: expected an integer from 1 to {2**62}, but got {length}"):
            seqaccel.Session(attention(8, 2), max_length=length)
    with pytest.raises(ValueError, match="max_length: nothing attends by hierarchical attention in LSTM"):
        seqaccel.Session(nn.LSTM(2, 3), max_length=3)
    with pytest.raises(ValueError, match="max_length: a Session of HierarchicalAttention with a number of levels"):
        seqaccel.Session(attention(8, 2, levels=1))
    with pytest.raises(ValueError, match="max_length: expected at most max_positions=9, but got 10"):
        seqaccel.Session(encoder(8, 2, positions="learned", max_positions=9), max_length=10)
    with pytest.raises(ValueError, match=r"HierarchicalAttention\(causal=False\) cannot run step by step"):
        seqaccel.Session(encoder(8, 2, causal=False))
    with pytest.raises(ValueError, match="with kdim or vdim cannot run step by step"):
        seqaccel.Session(attention(8, 2, kdim=5))
    with pytest.raises(TypeError, match="whose self_attn is HierarchicalAttention, but got MultiheadAttention"):
        seqaccel.Session(torch.nn.TransformerEncoderLayer(8, 2))
    with pytest.raises(TypeError, match="a feed-forward with the activation"):
        seqaccel.Session(encoder(8, 2, activation=torch.sin))
    with pytest.raises(RuntimeError, match="not enough memory for a Session of this batch_size"):
        seqaccel.Session(attention(8, 2, levels=0), max_length=2**50)
