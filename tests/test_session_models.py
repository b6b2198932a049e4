"""Sessions of modules that a user wrote, and of lists of layers: against the modules, step by step."""

import copy
import importlib.util
import pathlib
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqaccel
from seqaccel import nn

I, H = 6, 20


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


class TwoLayers(torch.nn.Module):
    """Two recurrent layers side by side, torch's and ours, concatenated, and a residual head."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.LSTM(I, H, 2)
        self.b = nn.GRU(I, H)
        self.norm = torch.nn.LayerNorm(2 * H)
        self.body = torch.nn.Linear(2 * H, 2 * H)
        self.head = torch.nn.Linear(2 * H, 3)

    def init_state(self, batch_size):
        return {"a": (zeros(2, batch_size, H), zeros(2, batch_size, H)), "b": self.b.init_state(batch_size)}

    def step(self, x_t, state):
        a, a_state = self.a(x_t.unsqueeze(0), state["a"])
        b, b_state = self.b.step(x_t, state["b"])
        y = torch.cat([a[0], b], -1)
        y = y + F.gelu(self.body(self.norm(y)))
        return self.head(y), {"a": a_state, "b": b_state}


class Encoder(torch.nn.Module):
    """A convolutional encoder with strides within a step's samples, the samples before in the state, an LSTMCell."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv1d(1, 8, 8, stride=4)
        self.conv2 = torch.nn.Conv1d(8, 12, 3, stride=2, padding=1, groups=2)
        self.bn = torch.nn.BatchNorm1d(12)
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2.0)
        self.cell = torch.nn.LSTMCell(12, H)
        self.out = torch.nn.Conv1d(H, 2, 1)

    def init_state(self, batch_size):
        return zeros(batch_size, 4), (zeros(batch_size, H), zeros(batch_size, H))

    def step(self, x_t, state):
        before, (h, c) = state
        x = F.pad(torch.cat([before, x_t], 1), (0, 4), mode="reflect")
        real, imaginary = self.conv1(x.unsqueeze(1)).relu().chunk(2, 1)
        z = torch.sqrt(real**2 + imaginary**2 + 0.1)
        z = self.bn(self.conv2(torch.cat([z, z], 1))).relu().mean(-1)
        h, c = self.cell(z, (h, c))
        return torch.sigmoid(self.out(h.relu().unsqueeze(-1))).squeeze(-1), (x_t[:, -4:], (h, c))


class OwnCell(torch.nn.Module):
    """A cell that no kernel knows, and a window of past inputs; batch second in the state."""

    def __init__(self):
        super().__init__()
        self.x, self.h = torch.nn.Linear(I, 2 * H), torch.nn.Linear(H, 2 * H, bias=False)
        self.decay = torch.nn.Parameter(torch.rand(H))
        self.window = torch.nn.Linear(3 * I, H)

    def init_state(self, batch_size):
        return [zeros(batch_size, 3, I), zeros(1, batch_size, H)]

    def step(self, x_t, state):
        window, h = state
        window = torch.roll(window, -1, 1)
        window[:, -1] = x_t
        value, gate = (self.x(x_t) + self.h(h[0])).chunk(2, -1)
        gate = torch.sigmoid(gate)
        new = gate * h[0] * self.decay + (1 - gate) * torch.tanh(value)
        return F.softmax(new - self.window(window.flatten(1)) / 2, -1), [window, new[None]]


class Layers(torch.nn.Module):
    """Streaming layers of ours in a user's module."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, I)
        self.tcn = nn.CausalConv1d(I, I, 3, dilation=2, activation="relu")
        self.sru = nn.SRU(I, H, num_layers=2)
        self.cell = nn.LSTMCell(H, H)
        self.weight = torch.nn.Parameter(torch.randn(H, 5))

    def init_state(self, batch_size):
        cell = zeros(batch_size, H), zeros(batch_size, H)
        return self.tcn.init_state(batch_size), self.sru.init_state(batch_size), cell

    def step(self, token, state):
        tcn, sru, cell = state
        x = self.embed(token)
        y, tcn = self.tcn.step(x, tcn)
        y, sru = self.sru.step(y + x, sru)
        h, c = self.cell(y, cell)
        return (h - y).clamp(-0.5, 0.5) @ self.weight, (tcn, sru, (h, c))


class Stateless(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(I, H), torch.nn.Linear(I, H)
        self.norm = torch.nn.RMSNorm(H)
        self.register_buffer("scale", torch.rand(H))

    def forward(self, x):
        y = self.norm(self.a(x) * torch.sigmoid(self.b(x)))
        return F.leaky_relu(y * self.scale - 0.1, 0.2), None

    def step(self, x, state):
        return self.forward(x)[0], state

    def init_state(self, batch_size):
        return ()


MODELS = {
    "two layers": (TwoLayers, zeros(1, I)),
    "encoder": (Encoder, zeros(1, 16)),
    "own cell": (OwnCell, zeros(1, I)),
    "layers": (Layers, torch.zeros(1, dtype=torch.int64)),
    "stateless": (Stateless, zeros(1, I)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    make, example = MODELS[request.param]
    return make().eval(), example


def inputs(example, T, B):
    if example.dtype == torch.int64:
        return torch.randint(11, (T, B))
    return torch.randn(T, B, *example.shape[1:])


@torch.no_grad()
def run(module, x, state=None):
    """The module's own steps."""
    state = module.init_state(x.shape[1]) if state is None else state
    y = []
    for x_t in x:
        y_t, state = module.step(x_t, state)
        y.append(y_t)
    return torch.stack(y)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_a_user_s_module(model):
    """Steps, chunks, forks, copies, pickles, select, reset and streams without an input."""
    module, example = model
    x = inputs(example, 7, 3)
    session = seqaccel.Session(module, 3, example=example)
    expected = run(module, x)
    close(torch.stack([session.step(x_t) for x_t in x[:4]]), expected[:4])
    others = [copy.copy(session), pickle.loads(pickle.dumps(session))]
    close(session.extend(x[4:]), expected[4:])
    for other in others:
        close(other.extend(x[4:]), expected[4:])
    close(session.fork(2).extend(x[:, :2]), expected[:, :2])
    other = session.fork(3)
    other.extend(x[:4])
    saved = {key: value.clone() for key, value in other.state_dict().items()}
    other.select(torch.tensor([2, 0, 0]))
    close(other.extend(x[4:][:, [2, 0, 0]]), expected[4:][:, [2, 0, 0]])
    other.load_state_dict(saved)
    other.reset(torch.tensor([False, True, False]))
    close(other.extend(x[:3])[:, 1], expected[:3, 1])
    other.load_state_dict(saved)
    y = other.step(x[0], advance=torch.tensor([False, False, True]))
    assert not y[:2].any()
    close(other.extend(x[4:])[:, :2], expected[4:, :2])


def test_files(model, tmp_path):
    """A file holds the weights and the state, and does not need the class."""
    module, example = model
    x = inputs(example, 4, 2)
    session = seqaccel.Session(module, 2, "int8", example=example)
    session.extend(x[:2])
    session.save(tmp_path / "a")
    loaded = seqaccel.Session.load(tmp_path / "a")
    assert torch.equal(loaded.extend(x[2:]), session.extend(x[2:]))
    torch.save({"format": "other"}, tmp_path / "b")
    with pytest.raises(ValueError, match="holds no Session"):
        seqaccel.Session.load(tmp_path / "b")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_precisions(weights):
    torch.manual_seed(0)
    module, example = Encoder().eval(), zeros(1, 16)
    x = inputs(example, 5, 2)
    got = seqaccel.Session(module, 2, weights, example=example).extend(x)
    close(got, run(module, x), 0.1)


def test_names_of_states():
    session = seqaccel.Session(TwoLayers(), example=zeros(1, I))
    assert {name: tuple(t.shape) for name, t in session.state_dict().items()} == {
        "a.h": (2, 1, H),
        "a.c": (2, 1, H),
        "b.h": (1, 1, H),
    }
    assert set(seqaccel.Session(OwnCell(), example=zeros(1, I)).state_dict()) == {"state.0", "state.1"}


def test_the_module_stays_as_it_was():
    module = Layers().train()
    before = {name: dict(part.__dict__) for name, part in module.named_modules()}
    seqaccel.Session(module, example=torch.zeros(1, dtype=torch.int64))
    assert all(dict(part.__dict__) == before[name] for name, part in module.named_modules())


def test_a_user_s_module_among_layers():
    """Behind a recurrent layer no example is needed."""
    torch.manual_seed(0)

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(H // 2, 4)

        def forward(self, x):
            return self.linear(F.glu(x, -1)).exp()

    lstm, head = torch.nn.LSTM(I, H), Head()
    x = torch.randn(5, 2, I)
    session = seqaccel.Session([lstm, head, torch.nn.Linear(4, 2)], 2)
    final = torch.nn.Sequential(*[torch.nn.Linear(4, 2)])
    session = seqaccel.Session([lstm, head, final], 2)
    with torch.no_grad():
        close(session.extend(x), final(head(lstm(x)[0])))


def test_lists_with_residuals_and_concatenation():
    torch.manual_seed(0)
    lstm, gru, linear = nn.LSTM(I, I), torch.nn.GRU(I, H), torch.nn.Linear(2 * I + H, 2 * I + H)
    both = seqaccel.Concatenation(torch.nn.Identity(), seqaccel.Residual(lstm), gru)
    session = seqaccel.Session([both, seqaccel.Residual(linear, torch.nn.Tanh()), torch.nn.Linear(2 * I + H, 3)], 2)
    session = seqaccel.Session([both, seqaccel.Residual(linear, torch.nn.Tanh())], 2)
    x = torch.randn(5, 2, I)
    with torch.no_grad():
        z = torch.cat([x, x + lstm(x)[0], gru(x)[0]], -1)
        close(session.extend(x), z + torch.tanh(linear(z)))
    assert list(session.state_dict()) == ["0.1.0.h", "0.1.0.c", "0.2.h"]
    with pytest.raises(TypeError, match="list of layers for a Session"):
        both(x)


def test_torch_s_causal_convolution():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.ConstantPad1d((4, 0), 0.0), torch.nn.Conv1d(I, 8, 3, dilation=2), torch.nn.ReLU(),
        torch.nn.ZeroPad1d((1, 0)), torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 4, 2)),
    )  # fmt: skip
    x = torch.randn(2, I, 9)
    session = seqaccel.Session(model, 2)
    with torch.no_grad():
        close(session.extend(x), model(x))
        session.reset()
        close(torch.stack([session.step(x[..., t]) for t in range(9)], -1), model(x))


OPERATORS = {
    "functions": lambda x: torch.log(x.abs() + 1) + F.softplus(x) * torch.exp(-x.square()) + F.hardsigmoid(x),
    "more functions": lambda x: F.relu6(4 * x) + F.elu(x, 0.7) + F.silu(x) + F.gelu(F.hardswish(x), approximate="tanh"),
    "division": lambda x: 2.0 / (x.abs() + 1) + x / 3 - (1 - x) / (x * x + 2).rsqrt() + x.abs().sqrt() ** 3,
    "extremes": lambda x: torch.maximum(x, x.flip(-1)) - torch.minimum(x, 0.5 * x).clamp_min(-0.3),
    "movement": lambda x: torch.stack([x[:, ::2], x[:, 1::2]], 1).transpose(1, 2).reshape(x.shape[0], -1).roll(1, -1),
    "broadcast": lambda x: (x.view(-1, 2, 3) * x[:, None, :3] + x.view(-1, 3, 2).mT).flatten(1),
    "rows": lambda x: F.softmax(x.view(-1, 2, 3), 1).sum(-1) + F.layer_norm(x.view(-1, 2, 3), (2, 3)).mean(1)[:, :2],
    "constants": lambda x: torch.cat([x, torch.ones_like(x[:, :2]), x.new_zeros(len(x), 1)], -1) + torch.arange(9.0),
    "frames": lambda x: F.linear(x.view(-1, 2, 3), torch.arange(12.0).view(4, 3), torch.ones(4)).movedim(1, 2),
    "2d": lambda x: F.conv2d(x.view(-1, 1, 2, 3), torch.arange(8.0).view(2, 1, 2, 2), padding=(1, 0), stride=(1, 2)),
    "padding": lambda x: F.conv1d(F.pad(x.view(-1, 2, 3), (2, 1), "replicate"), torch.ones(3, 2, 3), padding="same"),
    "itself": lambda x: x,
    "parts": lambda x: x.unflatten(1, (2, 3)).select(2, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    torch.manual_seed(0)

    class Module(torch.nn.Module):
        def forward(self, x):
            return OPERATORS[name](x)

    x = torch.randn(4, 3, I)
    session = seqaccel.Session(Module(), 3, example=zeros(1, I))
    expected = torch.stack([OPERATORS[name](x_t) for x_t in x])
    close(torch.stack([session.step(x_t) for x_t in x]), expected)
    close(session.extend(x), expected)


class Takes(torch.nn.Module):
    """A step given as a function."""

    def __init__(self, function, state=lambda batch_size: zeros(batch_size, H)):
        super().__init__()
        self.cell, self.ours = torch.nn.GRUCell(I, H), nn.GRU(I, H)
        self.function, self.init_state = function, state

    def step(self, x, state):
        return self.function(self, x, state)


WRONG = {
    "operator": (lambda m, x, s: (x.sort().values, s), TypeError, r"run aten.sort \(node sort, .*test_session_m"),
    "streams": (lambda m, x, s: (x - x.mean(0), s), TypeError, "goes over the dimension of the batch"),
    "mixed": (lambda m, x, s: (x.flip(0), s), TypeError, "depends on another stream"),
    "two outputs": (lambda m, x, s: ((x, x), s), TypeError, "one tensor as output"),
    "no state": (lambda m, x, s: x, TypeError, "return the output and the state"),
    "structure": (lambda m, x, s: (x, (s,)), TypeError, "another structure"),
    "dropped": (lambda m, x, s: (m.cell(x, s), s), TypeError, "return the state of cell. as it is"),
    "changed": (lambda m, x, s: (m.cell(x, s * 2), s), TypeError, "what the step before has returned"),
    "branch": (lambda m, x, s: (x if x.sum() > 0 else -x, s), TypeError, "torch.export cannot trace the step of Takes"),
    "product": (lambda m, x, s: (x @ s[:, :I].T, s), TypeError, "two tensors that depend on the input"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_a_session_does_not_run(name):
    function, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        seqaccel.Session(Takes(function), example=zeros(1, I))


def test_arguments():
    plain = Takes(lambda m, x, s: (x, s))
    with pytest.raises(TypeError, match="needs an example of its input"):
        seqaccel.Session(plain)
    with pytest.raises(ValueError, match="example: expected"):
        seqaccel.Session(plain, example=torch.zeros(()))
    with pytest.raises(ValueError, match="example: expected float32 or int64"):
        seqaccel.Session(plain, example=zeros(1, I).double())
    with pytest.raises(ValueError, match="begins with zeros"):
        seqaccel.Session(Takes(lambda m, x, s: (x, s), lambda n: torch.ones(n, H)), example=zeros(1, I))
    with pytest.raises(ValueError, match="one dimension of the batch"):
        seqaccel.Session(Takes(lambda m, x, s: (x, s), lambda n: zeros(H)), example=zeros(1, I))
    with pytest.raises(TypeError, match="nothing to run"):
        seqaccel.Session([seqaccel.Residual()])
    with pytest.raises(ValueError, match="has layers that give 20"):
        seqaccel.Session(seqaccel.Residual(nn.LSTM(I, H)))


def test_init_state_of_the_caller():
    """A module whose forward takes a state."""

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = torch.nn.GRU(I, H, batch_first=True)

        def forward(self, x, h):
            y, h = self.gru(x.unsqueeze(1), h)
            return y[:, 0], h

    torch.manual_seed(0)
    module, x = Cell(), torch.randn(5, 2, I)
    session = seqaccel.Session(module, 2, example=x[0], init_state=lambda batch_size: zeros(1, batch_size, H))
    with torch.no_grad():
        close(session.extend(x), module.gru(x.transpose(0, 1))[0].transpose(0, 1))


def test_voice_activity():
    """The network of Silero VAD in the example."""
    path = pathlib.Path(__file__).parent.parent / "examples" / "voice_activity.py"
    specification = importlib.util.spec_from_file_location("voice_activity", path)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    torch.manual_seed(0)
    model, (x, _) = example.VoiceActivity().eval(), example.bursts(2, 5)
    session = seqaccel.Session(model, 2, example=x[:, 0])
    with torch.no_grad():
        close(session.extend(x.transpose(0, 1))[..., 0].T, example.run(model, x))
