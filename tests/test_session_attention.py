"""Sessions of layers that attend to earlier steps: rings of keys and values, streams of different ages, states."""

import copy
import math
import pickle

import pytest
import torch
from instruction_sets import NARROW_ISAS, isa_fixture
from tolerances import assert_close

import seqaccel
from seqaccel import backends, nn

isa = isa_fixture(NARROW_ISAS)

PRECISIONS = ["float32", "bfloat16", "int8"]

NETWORKS = {
    "one_head": lambda: nn.SRUpp(5, 19, 8),
    "heads": lambda: nn.SRUpp(19, 19, 21, num_heads=3, rescale=True),
    "wide": lambda: nn.SRUpp(40, 33, 150, 1, num_heads=2, attn_layer_norm=False),
    "norm": lambda: nn.SRUpp(5, 19, 6, layer_norm=True, attention_every_n_layers=2),
    "norm_after": lambda: nn.SRUpp(5, 19, 6, 3, layer_norm=True, normalize_after=True, attention_last_n_layers=2),
    "projected_first": lambda: nn.SRUpp(7, 19, 6, num_heads=6, proj_input_to_hidden_first=True),
}


def drawn(network):
    """With an alpha that lets attention matter: it starts at 0."""
    torch.manual_seed(len(network))
    module = NETWORKS[network]().eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("alpha", "norm.weight", "norm.bias")):
                parameter.add_(0.5 + 0.3 * torch.rand_like(parameter))
    return module


def whole(module, x, memory_length):
    """The output for all steps at once, each of which sees so many before it; in float64."""
    ahead = torch.arange(len(x)) - torch.arange(len(x)).unsqueeze(1)
    mask = torch.zeros(len(x), len(x), dtype=torch.float64)
    mask[(ahead > 0) | (ahead < -memory_length)] = -math.inf
    with torch.no_grad(), seqaccel.backend("reference"):
        return copy.deepcopy(module).double()(x.double(), attn_mask=mask)[0]


def run(session, x):
    """By steps and by chunks of every kind."""
    parts = [session.step(x[0])[None], session.extend(x[1:1]), session.extend(x[1:17]), session.extend(x[17:19])]
    return torch.cat(parts + [session.step(x_t)[None] for x_t in x[19:24]] + [session.extend(x[24:])])


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_and_chunks_give_what_the_module_gives(network, weights, isa, poison):
    module = drawn(network)
    for batch_size, memory_length, steps in ((1, 70, 110), (3, 7, 60), (40, 1, 30)):
        x = torch.randn(steps, batch_size, module.input_size)
        found = run(seqaccel.Session(module, batch_size, weights, memory_length=memory_length), x)
        assert_close(found, whole(module, x, memory_length), f"session_{weights}", torch.float32)


@pytest.mark.parametrize("network", ["heads", "norm_after"])
def test_streams_of_different_ages_give_what_the_modules_give(network):
    module, generator = drawn(network), torch.Generator().manual_seed(0)
    session, state = seqaccel.Session(module, 3, memory_length=4), module.init_state(3, memory_length=4)
    with torch.no_grad():
        for i in range(40):
            x = torch.randn(1 + i % 3, 3, module.input_size)
            found = session.extend(x)
            wanted, state = module.extend(x, state)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
            if i % 4 == 1:
                mask = torch.rand(3, generator=generator) < 0.4
                session.reset(mask)
                state = module.reset(state, mask)
            if i % 4 == 3:
                indices = torch.randint(3, (3,), generator=generator)
                session.select(indices)
                state = module.select(state, indices)


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_a_stream_without_an_input_keeps_its_state(steps):
    """Chunks of 100 steps of three streams are longer than what runs at a time."""
    module = drawn("heads")
    session, x = seqaccel.Session(module, 3, memory_length=6), torch.randn(9 + steps, 3, module.input_size)
    session.extend(x[:9])
    before, alone = session.state_dict(), copy.copy(session)
    advance = torch.tensor([True, False, True])
    y = session.extend(x[9:], advance=advance)
    torch.testing.assert_close(y[:, advance], alone.extend(x[9:])[:, advance])
    assert not y[:, 1].any()
    assert all(torch.equal(session.state_dict()[name][:, 1], before[name][:, 1]) for name in before)
    torch.testing.assert_close(session.extend(x[9:])[:, 1], alone.fork(3).extend(x)[9:, 1])


@pytest.mark.parametrize("weights", PRECISIONS)
def test_states_go_on_where_they_were(weights, isa):
    """Also where another session's ring begins at another slot, and in copies, forks and pickles."""
    module = drawn("norm_after")
    session, other = (seqaccel.Session(module, 2, weights, memory_length=5) for _ in range(2))
    x = torch.randn(12, 2, 5)
    other.extend(x[:4])
    for steps in (3, 4):
        session.extend(x[:steps])
        session.reset(torch.tensor([False, True]))
        session.extend(x[:1])
        saved = session.state_dict()
        assert {name: tuple(t.shape) for name, t in saved.items()} == {
            "c": (3, 2, 19), "age": (2, 2), "memory": (2, 2, 5, 12)
        }  # fmt: skip
        assert (
            saved["age"][0].tolist() == [min(5, (steps + 1) * (steps - 2)), 1] and not saved["memory"][:, 1, :4].any()
        )
        copies = [copy.copy(session), pickle.loads(pickle.dumps(session))]
        wanted = session.extend(x)
        other.load_state_dict(saved)
        assert all(torch.equal(one.extend(x), wanted) for one in (other, *copies))
        assert torch.equal(session.fork(2).extend(x), seqaccel.Session(module, 2, weights, memory_length=5).extend(x))
        session.load_state_dict(saved)


def test_ages_out_of_range_are_as_the_nearest_in_range():
    session, x = seqaccel.Session(drawn("one_head"), 4, memory_length=5), torch.randn(3, 4, 5)
    session.extend(x)
    state = session.state_dict()
    session.load_state_dict(state | {"age": torch.tensor([math.inf, -math.inf, math.nan, 1e30]).expand(2, 4)})
    assert session.state_dict()["age"].tolist() == 2 * [[5, 0, 0, 5]]
    assert session.extend(x).isfinite().all()


@pytest.mark.parametrize("weights", PRECISIONS)
def test_among_other_layers(weights, isa):
    module = torch.nn.Sequential(
        torch.nn.Embedding(20, 6), nn.SRUpp(6, 9, 4, num_heads=2), nn.LSTM(9, 7),
        torch.nn.LayerNorm(7), nn.SRUpp(7, 7, 4, 1), torch.nn.Linear(7, 3), torch.nn.GELU(),
    )  # fmt: skip
    for part in (module[1], module[4]):
        for layer in part.rnn_lst:
            torch.nn.init.constant_(layer.transform_module.alpha, 0.7)
    x = torch.randint(20, (40, 3))
    session = seqaccel.Session(module, 3, weights, memory_length=8)
    h = module[0](x).double()
    h = whole(module[1], h, 8)
    h = module[3](copy.deepcopy(module[2])(h.float())[0]).detach()
    wanted = torch.nn.functional.gelu(module[5](whole(module[4], h, 8).float())).detach()
    assert_close(run(session, x), wanted.double(), f"session_{weights}", torch.float32)
    assert {"1.c", "1.age", "1.memory", "2.h", "4.c", "4.age", "4.memory"} <= set(session.state_dict())


def test_infinite_logits_stay_in_their_stream():
    """As in a softmax: NaN. A reset ends it."""
    module = drawn("one_head")
    session, clean = (seqaccel.Session(module, 2, memory_length=3) for _ in range(2))
    x = torch.randn(6, 2, 5)
    spoilt = x.clone()
    spoilt[1, 1] = math.inf
    y, wanted = session.extend(spoilt), clean.extend(x)
    assert y[1:, 1].isnan().all() and torch.equal(y[:, 0], wanted[:, 0])
    session.reset(torch.tensor([False, True]))
    torch.testing.assert_close(session.extend(x)[:, 1], clean.fork(2).extend(x)[:, 1])


def test_int8_sums_are_the_same_on_every_instruction_set():
    module, outputs = drawn("heads"), []
    x = torch.randn(9, 3, 19)
    for name in NARROW_ISAS:
        try:
            with backends.isa(name):
                outputs.append(seqaccel.Session(module, 3, "int8", memory_length=4).extend(x[:1]))
        except RuntimeError:
            continue
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


def test_bad_arguments_are_named():
    module = NETWORKS["heads"]()
    with pytest.raises(ValueError, match="memory_length: a Session of SRUpp needs to know"):
        seqaccel.Session(module)
    for length in (0, 2**24 + 1, True, 2.0):
        with pytest.raises(
            ValueError, match=f"memory_length: expected an integer from 1 to 16777216, but got {length}"
        ):
            seqaccel.Session(module, memory_length=length)
    with pytest.raises(ValueError, match="memory_length: nothing attends in LSTM"):
        seqaccel.Session(nn.LSTM(2, 3), memory_length=3)
    with pytest.raises(ValueError, match="bidirectional"):
        seqaccel.Session(nn.SRUpp(3, 4, 2, bidirectional=True), memory_length=3)
    with pytest.raises(RuntimeError, match="not enough memory for a Session of this batch_size"):
        seqaccel.Session(module, 2**31 - 1, memory_length=2**24)
    session = seqaccel.Session(module, memory_length=3)
    with pytest.raises(ValueError, match="state_dict: expected 'memory' of shape"):
        session.load_state_dict(session.state_dict() | {"memory": torch.zeros(2, 1, 4, 42)})
