"""Sessions against the modules they run: every cell, precision and instruction set, streams, states, bad input."""

import copy
import functools
import io
import math
import pathlib
import pickle
import threading
import warnings

import pytest
import torch
from instruction_sets import NARROW_ISAS, isa_fixture
from rnn_cases import modules
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import seqaccel
from seqaccel import backends, nn

PRECISIONS = ["float32", "bfloat16", "int8"]


def random_norms(module):
    """Layer norms with drawn gains and biases, those of the gates about 0.3: with 1 a layer expands differences."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("ln_"):
                parameter.add_(0.3 * torch.randn_like(parameter))
                parameter.mul_(1.0 if name.startswith("ln_c") else 0.3)
    return module


def maker(module, projected=False, **options):
    """Makes of (input_size, hidden_size, **keywords) a module that a session runs."""

    def make(input_size, hidden_size, **keywords):
        size = {"proj_size": (hidden_size + 1) // 2} if projected else {}
        return random_norms(module(input_size, hidden_size, **size, **options, **keywords))

    return make


def ligru(**options):
    """As ``maker``; with running statistics."""

    def make(input_size, hidden_size, **keywords):
        module = nn.LiGRU(input_size, hidden_size, **options, **keywords)
        for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
            if "norm" in name and value.is_floating_point():
                value.data.uniform_(0.5, 1.5)
        return module

    return make


def sru(**options):
    """As ``maker``; an SRU has a bias always."""

    def make(input_size, hidden_size, bias=True, **keywords):
        return nn.SRU(input_size, hidden_size, **{"num_layers": 1} | keywords, **options)

    return make


#: Every cell as it is, and with what else a session does.
CELLS = {cell: maker(module) for cell, module in modules("cpp").items()} | {
    "rnn_relu": maker(nn.RNN, nonlinearity="relu"),
    "lstm_projected": maker(nn.LSTM, projected=True),
    "lstm_zoned": maker(nn.LSTM, zoneout=(0.2, 0.4)),
    "gru_zoned": maker(nn.GRU, zoneout=0.3, recurrent_dropout=0.5),
    "gru_reset_before": maker(nn.GRU, reset_after=False),
    "peephole_lstm_projected": maker(nn.PeepholeLSTM, projected=True),
    "layer_norm_lstm_normalized_cell": maker(nn.LayerNormLSTM, normalize_cell=True, zoneout=(0.2, 0.4)),
    "ligru": ligru(),
    "ligru_tanh_norm": ligru(nonlinearity="tanh", normalization="layer_norm"),
    "sru": sru(),
    "sru_tanh": sru(use_tanh=True, rescale=True, highway_bias=-1.0),
    "sru_no_skip": sru(has_skip_term=False),
    "sru_norm": sru(layer_norm=True),
    "sru_norm_projected": sru(layer_norm=True, projection_size=4),
    "sru_projected_first": sru(projection_size=4, proj_input_to_hidden_first=True),
    "sru_norm_after": sru(layer_norm=True, normalize_after=True),
    "qrnn": maker(nn.QRNN, zoneout=0.3),
    "qrnn_window": maker(nn.QRNN, window=2),
    "qrnn_no_output_gate": maker(nn.QRNN, window=2, output_gate=False),
    "indrnn": maker(nn.IndRNN),
    "indrnn_tanh": maker(nn.IndRNN, nonlinearity="tanh"),
    "min_gru": maker(nn.MinGRU),
    "min_gru_g": maker(nn.MinGRU, candidate="g"),
    "min_lstm": maker(nn.MinLSTM),
    "min_lstm_g": maker(nn.MinLSTM, candidate="g"),
}


isa = isa_fixture(NARROW_ISAS)


def expected(module, x, dtype=torch.float64):
    """The module's output on (T, B, …), by the float64 reference."""
    module = copy.deepcopy(module).eval().to(dtype)
    with torch.no_grad(), seqaccel.backend("reference"):
        x = x.to(dtype) if x.is_floating_point() else x
        for part in module if isinstance(module, torch.nn.Sequential) else [module]:
            x = part(x.flatten(0, -2)).view_as(x) if isinstance(part, torch.nn.BatchNorm1d) else part(x)
            x = x[0] if isinstance(x, tuple) else x
    return x


def assert_same(actual, wanted, weights="float32", cell=""):
    normed = "layer_norm_" if cell.startswith("layer_norm_lstm") else ""
    assert_close(actual, wanted, f"session_{normed}{weights}", torch.float32)


def run(session, x):
    """By steps and by chunks of every kind."""
    parts = [session.step(x[0])[None], session.extend(x[1:1]), session.extend(x[1:17]), session.extend(x[17:19])]
    return torch.cat(parts + [session.step(x_t)[None] for x_t in x[19:]])


# Layers, streams, inputs, units, bias: one unit, tails of every vector, one block and many, more streams than a chunk.
SHAPES = [(1, 1, 5, 64, True), (2, 3, 6, 19, True), (3, 29, 33, 33, False), (1, 1, 1, 1, True), (1, 2, 70, 150, False)]


@functools.cache
def case(cell, num_layers, batch_size, input_size, hidden_size, bias, steps=23):
    """A module, an input and the output that it gives."""
    module = CELLS[cell](input_size, hidden_size, num_layers=num_layers, bias=bias)
    x = torch.randn(steps, batch_size, input_size)
    return module, x, expected(module, x)


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_and_chunks_give_what_the_module_gives(cell, weights, isa, poison):
    for shape in SHAPES:
        if "lstm_projected" in cell and shape[3] == 1:
            continue  # a projection is smaller than the state
        module, x, wanted = case(cell, *shape)
        assert_same(run(seqaccel.Session(module, shape[1], weights), x), wanted, weights, cell)


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_wide_layers_and_long_chunks(cell, weights):
    module, x, wanted = case(cell, 1, 2, 130, 260, True, steps=140)
    assert_same(seqaccel.Session(module, 2, weights).extend(x), wanted, weights, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_int8_sums_are_the_same_on_every_instruction_set(cell):
    module, x = CELLS[cell](33, 70), torch.randn(9, 3, 33)
    outputs = []
    for name in NARROW_ISAS:
        try:
            with backends.isa(name):
                outputs.append(seqaccel.Session(module, 3, "int8").extend(x[:1]))
        except RuntimeError:
            continue
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", PRECISIONS)
def test_a_sequential(weights, isa):
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 13),
        seqaccel.nn.LSTM(13, 37, num_layers=2),
        torch.nn.LayerNorm(37),
        torch.nn.Sequential(torch.nn.Linear(37, 70), torch.nn.GELU(), torch.nn.Dropout(0.5)),
        seqaccel.nn.LSTM(70, 9),
        torch.nn.Identity(),
        torch.nn.Linear(9, 50, bias=False),
    )
    x = torch.randint(0, 50, (23, 3))
    session = seqaccel.Session(model, 3, weights)
    wanted = expected(torch.nn.Sequential(*model[:3], *model[3], *model[4:]), x)
    assert_same(run(session, x), wanted, weights)
    assert {name: tuple(t.shape) for name, t in session.state_dict().items()} == {
        "1.h": (2, 3, 37),
        "1.c": (2, 3, 37),
        "4.h": (1, 3, 9),
        "4.c": (1, 3, 9),
    }
    with pytest.raises(IndexError, match="index 50 is out of range for an embedding of 50"):
        session.step(torch.tensor([0, 50, 1]))
    with pytest.raises(TypeError, match="x: expected int64"):
        session.step(torch.zeros(3))


ACTIVATIONS = [
    torch.nn.ReLU(),
    torch.nn.Tanh(),
    torch.nn.Sigmoid(),
    torch.nn.SiLU(),
    torch.nn.GELU(),
    torch.nn.GELU(approximate="tanh"),
    torch.nn.LeakyReLU(0.2),
    torch.nn.ELU(0.7),
    torch.nn.Hardswish(),
    torch.nn.Softmax(-1),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation, isa):
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), activation)
    x = 5 * torch.randn(19, 7)
    assert_same(seqaccel.Session(model, 19).step(x), expected(model, x))


def test_layer_norm_without_weights():
    model = torch.nn.Sequential(torch.nn.LayerNorm(37, elementwise_affine=False))
    x = 5 * torch.randn(3, 37) + 100
    torch.testing.assert_close(seqaccel.Session(model, 3).step(x), model(x), rtol=1e-5, atol=1e-5)


def make(num_layers=2, batch_size=3, batch_first=False, input_size=5, hidden_size=19):
    module = seqaccel.nn.LSTM(input_size, hidden_size, num_layers, batch_first=batch_first)
    return module, seqaccel.Session(module, batch_size)


def test_batch_first_follows_the_module():
    module, session = make(batch_first=True)
    x = torch.randn(3, 11, 5)
    assert_same(session.extend(x), expected(module, x))


def test_inputs_of_any_strides():
    module, session = make()
    x = torch.randn(5, 3, 22).transpose(0, 2)[::2]
    wanted = expected(module, x)
    assert_same(session.extend(x), wanted)
    session.reset()
    assert_same(torch.stack([session.step(x_t) for x_t in x]), wanted)


def test_the_session_keeps_its_own_weights():
    module, session = make()
    x = torch.randn(4, 3, 5)
    wanted = expected(module, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    del module
    assert_same(session.extend(x), wanted)


@pytest.mark.parametrize("weights", PRECISIONS)
def test_nan_stays_in_its_stream_until_the_reset(weights):
    module = seqaccel.nn.LSTM(5, 19)
    session, clean = (seqaccel.Session(module, 3, weights) for _ in range(2))
    x = torch.randn(4, 3, 5)
    spoilt = x.clone()
    spoilt[1, 1, 2] = float("nan")
    y, wanted = session.extend(spoilt), clean.extend(x)
    assert y[1:, 1].isnan().all()
    assert torch.equal(y[:, [0, 2]], wanted[:, [0, 2]])
    session.reset(torch.tensor([False, True, False]))
    assert session.step(x[0]).isfinite().all()


@pytest.mark.parametrize("steps", [3, 4])
def test_reset_starts_the_chosen_streams_anew(steps):
    module, session = make()
    x, mask = torch.randn(9, 3, 5), torch.tensor([True, False, True])
    session.extend(x[:steps])
    session.reset(mask)
    after = session.extend(x[steps:])
    assert_same(after[:, mask], expected(module, x[steps:])[:, mask])
    assert_same(after[:, ~mask], expected(module, x)[steps:, ~mask])
    session.reset()
    assert_same(session.extend(x), expected(module, x))


@pytest.mark.parametrize("steps", [3, 4])
def test_select_moves_streams(steps):
    module, session = make()
    x, indices = torch.randn(9, 3, 5), torch.tensor([2, 2, 0])
    session.extend(x[:steps])
    session.select(indices)
    joined = torch.cat([x[:steps, indices], x[steps:]])
    assert_same(session.extend(x[steps:]), expected(module, joined)[steps:])


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_state_dict_goes_on_where_it_was(cell, weights):
    module = CELLS[cell](5, 19, num_layers=2)
    session, other = seqaccel.Session(module, 3, weights), seqaccel.Session(module, 3, weights)
    x = torch.randn(9, 3, 5)
    session.extend(x[:3])
    saved = session.state_dict()
    first = session.extend(x[3:])
    other.load_state_dict(saved)
    assert torch.equal(other.extend(x[3:]), first)
    if "h" in saved:
        assert saved["h"].shape == (2, 3, first.shape[-1])
    if "c" in saved:
        assert saved["c"].shape == (2, 3, 19)


def test_narrow_weights_keep_a_trained_models_bits_per_byte():
    """The demo's LSTM loses less than 0.0005 bits per byte in int8; here a small one, trained for some seconds."""
    text = pathlib.Path(torch.nn.modules.rnn.__file__).read_bytes()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    train, validation = data[:-8200], data[-8200:-8]
    model = torch.nn.Sequential(torch.nn.Embedding(256, 48), seqaccel.nn.LSTM(48, 96), torch.nn.Linear(96, 256))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        starts = torch.randint(0, len(train) - 65, (16,))
        windows = torch.stack([train[i : i + 65] for i in starts], 1)
        optimiser.zero_grad()
        logits = model[2](model[1](model[0](windows[:-1]))[0])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[1:].flatten()).backward()
        optimiser.step()
    rows = validation.view(8, -1).T.contiguous()
    bits = {}
    for weights in PRECISIONS:
        logits = seqaccel.Session(model, 8, weights).extend(rows[:-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[1:].flatten())
        bits[weights] = loss.item() / math.log(2)
    assert bits["float32"] < 5, "the model has not learnt"
    assert abs(bits["int8"] - bits["float32"]) < 0.02
    assert abs(bits["bfloat16"] - bits["float32"]) < 0.005


def test_bad_modules_are_named():
    with pytest.raises(TypeError, match="module: expected a recurrent layer or cell of seqaccel.nn .* but got Conv1d"):
        seqaccel.Session(torch.nn.Conv1d(2, 2, 2))
    with pytest.raises(TypeError, match="a Session does not run an SRU with custom_m"):
        seqaccel.Session(nn.SRU(3, 4, custom_m=torch.nn.Linear(3, 16)))
    with pytest.raises(TypeError, match="nothing to run"):
        seqaccel.Session(torch.nn.Sequential())
    with pytest.raises(TypeError, match="must not begin with ReLU"):
        seqaccel.Session(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(TypeError, match="an Embedding must come first"):
        seqaccel.Session(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(3, 2)))
    with pytest.raises(ValueError, match="linear gives 3 features, but lstm takes 4"):
        seqaccel.Session(torch.nn.Sequential(torch.nn.Linear(2, 3), seqaccel.nn.LSTM(4, 2)))
    with pytest.raises(ValueError, match="a LayerNorm of the last dimension"):
        seqaccel.Session(torch.nn.Sequential(torch.nn.LayerNorm((2, 3))))
    with pytest.raises(ValueError, match="max_norm"):
        seqaccel.Session(torch.nn.Sequential(torch.nn.Embedding(2, 3, max_norm=1.0)))
    with pytest.raises(ValueError, match="a bidirectional LSTM cannot run step by step"):
        seqaccel.Session(seqaccel.nn.LSTM(2, 3, bidirectional=True))
    with pytest.raises(ValueError, match="float32 parameters on the CPU, but lstm has torch.float64"):
        seqaccel.Session(seqaccel.nn.LSTM(2, 3).double())
    with pytest.raises(ValueError, match="int8 takes up to 65536 features, but linear has 65537"):
        seqaccel.Session(torch.nn.Linear(65537, 1), weights="int8")


def test_bad_arguments_are_named():
    module, session = make()
    with pytest.raises(ValueError, match="weights: expected 'float32', 'bfloat16' or 'int8', but got 'int3'"):
        seqaccel.Session(module, weights="int3")
    for size in (0, 2**31, 2**57):
        with pytest.raises(ValueError, match=f"batch_size: expected an integer from 1 to 2147483647, but got {size}"):
            seqaccel.Session(module, size)
    with pytest.raises(RuntimeError, match="not enough memory for a Session of this batch_size"):
        seqaccel.Session(seqaccel.nn.LSTM(5, 2000), 2**31 - 1)
    with pytest.raises(RuntimeError, match="not enough memory for a Session of this batch_size"):
        seqaccel.Session(seqaccel.nn.LSTM(5, 2000)).fork(2**31 - 1)
    for size in (0, 2**31, True, None):
        with pytest.raises(ValueError, match=f"batch_size: expected an integer from 1 to 2147483647, but got {size}"):
            session.fork(size)
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 5\), but got \(3, 4\)"):
        session.step(torch.randn(3, 4))
    with pytest.raises(TypeError, match="x: expected float32"):
        session.step(torch.randn(3, 5).double())
    with pytest.raises(ValueError, match=r"x: expected shape \(T, 3, 5\)"):
        session.extend(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"expected mask to be bool of shape \(3,\)"):
        session.reset(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="indices: expected 3 integers from 0 to 2"):
        session.select(torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="indices: expected 3 integers"):
        session.select(torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match="state_dict: expected the keys"):
        session.load_state_dict({"h": torch.zeros(2, 3, 19)})
    with pytest.raises(ValueError, match="state_dict: expected 'c' of shape"):
        session.load_state_dict({"h": torch.zeros(2, 3, 19), "c": torch.zeros(2, 3, 18)})
    session.load_state_dict({"h": torch.ones(2, 3, 19), "c": torch.ones(2, 3, 19)})
    with pytest.raises(ValueError, match="state_dict: expected 'c' to hold real values"):
        session.load_state_dict({"h": torch.zeros(2, 3, 19), "c": torch.zeros(2, 3, 19, device="meta")})
    assert all(bool((state == 1).all()) for state in session.state_dict().values()), "changed by half"


def near_overflow(count):
    """Pre-activations about which e^-x overflows, in float32."""
    return torch.cat([torch.linspace(-89.2, -87.8, count), torch.linspace(87.8, 89.2, count)])


@pytest.mark.parametrize("weights", PRECISIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_saturated_gates(isa, cell, weights):
    """Whichever gate it is: a number, and the definition's."""
    module = CELLS[cell](3, 70)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias_ih"):
                values = near_overflow(35).repeat(parameter.numel() // 70)
                parameter.copy_(values[torch.randperm(len(values))])
            elif not name.startswith("ln_"):
                parameter.zero_()
    x = torch.zeros(3, 2, 3)
    found = seqaccel.Session(module, 2, weights).extend(x)
    torch.testing.assert_close(found.double(), expected(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Sigmoid", "Tanh", "SiLU", "GELU", "ELU", "LeakyReLU", "ReLU", "Hardswish"])
def test_activations_of_every_magnitude(isa, kind):
    activation = getattr(torch.nn, kind)()
    x = torch.cat([near_overflow(500), torch.linspace(-20, 20, 500), torch.tensor([1e30, -1e30, float("nan")])])
    identity = torch.nn.Linear(1, 1)
    with torch.no_grad():
        identity.weight.fill_(1)
        identity.bias.zero_()
    found = seqaccel.Session(torch.nn.Sequential(identity, activation), len(x)).step(x.view(-1, 1)).view(-1)
    torch.testing.assert_close(found, activation(x), rtol=1e-5, atol=1e-6, equal_nan=True)


def test_threads_take_turns():
    """h counts the steps; state_dict, select and reset see whole ones."""
    counter = seqaccel.nn.RNN(1, 64, num_layers=2, nonlinearity="relu")
    with torch.no_grad():
        for parameter in counter.parameters():
            parameter.zero_()
        for layer in range(2):
            getattr(counter, f"weight_hh_l{layer}").copy_(torch.eye(64))
            getattr(counter, f"bias_ih_l{layer}").fill_(1)
    session, errors = seqaccel.Session(counter, 2), []

    def work(steps):
        for i in range(40):
            if i % 8 == 0:
                h = session.state_dict()["h"]
                if not torch.equal(h, h[0, 0, 0].expand_as(h)):
                    errors.append(h)
                session.select(torch.tensor([1, 0]))
            session.extend(torch.zeros(steps, 2, 1))

    threads = [threading.Thread(target=work, args=(steps,)) for steps in (1, 2, 37, 130)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert bool((session.state_dict()["h"] == 40 * (1 + 2 + 37 + 130)).all())


def test_values_that_are_not_those_in_memory():
    """The negative bit and zero tensors, in weights, inputs and states."""
    module, session = make()
    x = torch.randn(3, 5)
    plain = session.step(x)
    state = session.state_dict()
    negated = copy.deepcopy(module)
    for name, parameter in module.named_parameters():
        at, _, leaf = name.rpartition(".")
        owner = negated.get_submodule(at)
        del owner._parameters[leaf]
        setattr(owner, leaf, torch._neg_view(-parameter.detach()))
    other = seqaccel.Session(negated, 3)
    assert torch.equal(other.step(torch._neg_view(-x)), plain)
    other.load_state_dict({name: torch._neg_view(-t) for name, t in state.items()})
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    zero = torch._efficientzerotensor((3, 5))
    session.load_state_dict(state)
    assert torch.equal(other.step(zero), session.step(torch.zeros(3, 5)))


def test_tensors_without_memory_are_refused():
    module, session = make()
    with FakeTensorMode(), pytest.raises((RuntimeError, ValueError), match="memory"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the address of a fake tensor
        session.step(torch.empty(3, 5))
    freed = torch.randn(3, 5)
    freed.untyped_storage().resize_(0)
    for call in (lambda: session.step(freed), lambda: session.extend(freed.view(1, 3, 5))):
        with pytest.raises(RuntimeError, match="x: expected a tensor with memory"):
            call()
    module.weight_hh_l0.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="module: expected parameters with memory, but"):
        seqaccel.Session(module)


def test_torch_s_own_layers_and_cells():
    for name in ("RNN", "LSTM", "GRU"):
        module = getattr(torch.nn, name)(5, 7, 2)
        x = torch.randn(6, 3, 5)
        torch.testing.assert_close(seqaccel.Session(module, 3).extend(x), module(x)[0], atol=1e-5, rtol=1e-5)
        assert type(module) is getattr(torch.nn, name)
        for package in (torch.nn, seqaccel.nn):
            cell, state, wanted = getattr(package, f"{name}Cell")(5, 7), None, []
            for x_t in x:
                state = cell(x_t, state)
                wanted.append(state[0] if name == "LSTM" else state)
            found = seqaccel.Session(cell, 3)
            torch.testing.assert_close(found.extend(x), torch.stack(wanted), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.state_dict()["h"][0], wanted[-1], atol=1e-5, rtol=1e-5)
    with pytest.raises(TypeError, match="module: expected a recurrent layer"):
        seqaccel.Session(type("Other", (torch.nn.LSTM,), {})(5, 7))


@pytest.mark.parametrize("width", [1, 7, 70])
def test_normalisations_and_softmax(isa, width):
    norm, bare = torch.nn.BatchNorm1d(width), torch.nn.BatchNorm1d(width, affine=False)
    # Of one feature x near 0, RMSNorm multiplies an error by 1 / sqrt(eps): by 2,900 with float32's eps, the default.
    gained = torch.nn.RMSNorm(width, eps=1e-2)
    default = torch.nn.RMSNorm(width, elementwise_affine=False)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var, gained.weight):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    x = 5 * torch.randn(9, 3, width)
    x[0, 0] = torch.linspace(-60, 60, width)
    linear, bias_free = torch.nn.Linear(width, width), torch.nn.Linear(width, width, bias=False)
    for layers in (
        [gained], [norm], [linear, norm, bare], [bias_free, norm], [seqaccel.nn.GRU(width, width), norm],
        [linear, torch.nn.Softmax(-1)], [linear, torch.nn.Tanh(), bare, gained, torch.nn.Softmax(-1)],
    ):  # fmt: skip
        model = torch.nn.Sequential(*layers)
        assert_same(seqaccel.Session(model, 3).extend(x), expected(model, x))
    found = seqaccel.Session(torch.nn.Sequential(default), 3).extend(x)
    assert_same(found, expected(torch.nn.RMSNorm(width, torch.finfo(torch.float32).eps, elementwise_affine=False), x))
    assert_same(found, default(x))


def test_softmax_of_every_magnitude():
    inf, nan, x = float("inf"), float("nan"), torch.randn(9, 20)
    x[0], x[1, 3], x[2, 3], x[3, 7], x[4], x[5], x[6, 0] = -inf, -inf, inf, nan, 1e38, nan, nan
    unchanged = torch.nn.BatchNorm1d(20, eps=0.0, affine=False)
    model = torch.nn.Sequential(unchanged, torch.nn.Softmax(-1))
    torch.testing.assert_close(seqaccel.Session(model, 9).step(x), x.softmax(-1), equal_nan=True)


def test_layers_that_a_session_refuses():
    with pytest.raises(ValueError, match="a Softmax of dim=-1"):
        seqaccel.Session(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Softmax(0)))
    with pytest.raises(ValueError, match="running statistics"):
        seqaccel.Session(torch.nn.BatchNorm1d(3, track_running_stats=False))


@pytest.mark.parametrize("weights", PRECISIONS)
def test_copies_and_forks(weights):
    """They give the same bits, from the same state or from none, and go their own ways."""
    model = torch.nn.Sequential(
        torch.nn.Embedding(20, 9), seqaccel.nn.LayerNormLSTM(9, 13, 2), torch.nn.LayerNorm(13), torch.nn.Linear(13, 4)
    )
    session = seqaccel.Session(model, 3, weights)
    x, rest = torch.randint(20, (5, 3)), torch.randint(20, (4, 3))
    fresh = session.fork(3)
    from_start = session.extend(x)
    saved = io.BytesIO()
    torch.save(session, saved)
    saved.seek(0)
    others = [copy.copy(session), copy.deepcopy(session), pickle.loads(pickle.dumps(session))]
    others.append(torch.load(saved, weights_only=False))
    wanted = session.extend(rest)
    for other in others:
        assert torch.equal(other.extend(rest), wanted) and other.batch_size == 3
    assert torch.equal(fresh.extend(x), from_start)
    one = session.fork()
    del session, fresh
    torch.testing.assert_close(one.extend(x[:, :1]), from_start[:, :1])
    assert torch.equal(one.fork(3).extend(x), from_start)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_is_forked_and_pickled(cell, isa):
    """Also where the instruction set at hand, torch's default dtype and its default device are others by then."""
    session = seqaccel.Session(CELLS[cell](5, 19), 2)
    x = torch.randn(7, 2, 5)
    pickled = pickle.dumps(session)
    wanted = session.extend(x)
    try:
        torch.set_default_dtype(torch.float64)
        with backends.isa("portable"), torch.device("meta"):
            loaded, fork = pickle.loads(pickled), session.fork(2)
            copied = copy.copy(session)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loaded.extend(x), wanted) and torch.equal(fork.extend(x), wanted)
    assert torch.equal(copied.extend(x), session.extend(x))


def test_a_pickle_of_another_version_is_refused(monkeypatch):
    pickled = pickle.dumps(make()[1])
    monkeypatch.setattr(seqaccel.session, "__version__", "9.9.9")
    with pytest.raises(RuntimeError, match="this Session was pickled by seqaccel .*, not 9.9.9: make it anew"):
        pickle.loads(pickled)


def test_forks_run_at_the_same_time():
    """Threads that make forks of one session, run them and let go of them; the session goes before its forks do."""
    module = torch.nn.Sequential(torch.nn.RMSNorm(9), seqaccel.nn.GRU(9, 64), torch.nn.Linear(64, 4))
    x = torch.randn(30, 2, 9)
    session, found = seqaccel.Session(module, 2), []
    wanted = session.fork(2).extend(x)

    def work(session):
        for _ in range(30):
            session = session.fork(2)
            found.append(torch.equal(session.extend(x), wanted))

    threads = [threading.Thread(target=work, args=(session,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    del session
    for thread in threads:
        thread.join()
    assert found == [True] * 120


def test_forks_hold_the_weights_once():
    """A session of 8 MB of weights, and fifty more of it."""

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096

    session = seqaccel.Session(seqaccel.nn.LSTM(512, 512))
    before = resident()
    forks = [session.fork() for _ in range(50)]
    assert resident() - before < 20 << 20 and len(forks) == 50
