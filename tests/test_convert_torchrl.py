"""``convert`` on TorchRL's LSTMModule and GRUModule: results are those of the episodes run one by one."""

import copy
import itertools
import pickle

import pytest
import torch

import seqaccel


def apart(layer, x, stored, is_init):
    """Each episode in a call of its own, from the state stored with its first step."""
    B, T = is_init.shape
    last = [torch.zeros_like(part) for part in stored]
    outputs = [[] for _ in range(B)]
    for b in range(B):
        bounds = [0, *(t for t in range(1, T) if is_init[b, t]), T]
        for begin, end in itertools.pairwise(bounds):
            state = tuple(part[b, begin].unsqueeze(1) for part in stored)
            y, state = layer(x[b : b + 1, begin:end], state if len(state) > 1 else state[0])
            outputs[b].append(y)
            for given, part in zip(last, state if isinstance(state, tuple) else (state,), strict=True):
                given[b, end - 1] = part.squeeze(1)
    return torch.cat([torch.cat(row, 1) for row in outputs]), *last


class LSTMModule(torch.nn.Module):
    """What TorchRL's does in recurrent mode. Its backend "triton" gets trajectories as they are."""

    __module__ = "torchrl.modules.tensordict_module.rnn"

    def __init__(self, **options):
        super().__init__()
        self.lstm = torch.nn.LSTM(3, 4, batch_first=True, dtype=torch.float64, **options)
        self.recurrent_backend = "pad"

    def forward(self, x, is_init, h, c):
        return getattr(self, f"_lstm_{self.recurrent_backend}_with_resets")(x, h, c, is_init)

    def _lstm_pad_with_resets(self, x, h, c, is_init):
        return apart(self.lstm, x, (h, c), is_init)

    def _lstm_triton_with_resets(self, x, h, c, is_init):
        raise NotImplementedError

    def make_python_based(self):
        layer = torch.nn.ModuleList([self.lstm])
        layer.forward = self.lstm.forward
        self.lstm = layer


class GRUModule(torch.nn.Module):
    __module__ = LSTMModule.__module__

    def __init__(self, **options):
        super().__init__()
        self.gru = torch.nn.GRU(3, 4, batch_first=True, dtype=torch.float64, **options)
        self.recurrent_backend = "pad"

    def forward(self, x, is_init, h):
        return getattr(self, f"_gru_{self.recurrent_backend}_with_resets")(x, h, is_init)

    def _gru_pad_with_resets(self, x, h, is_init):
        return apart(self.gru, x, (h,), is_init)

    def _gru_triton_with_resets(self, x, h, is_init):
        raise NotImplementedError


EPISODES = {
    "random": lambda B, T: torch.rand(B, T) < 0.3,
    "none": lambda B, T: torch.zeros(B, T, dtype=torch.bool),
    "every step": lambda B, T: torch.ones(B, T, dtype=torch.bool),
    "of equal length": lambda B, T: (torch.arange(T) % 3 == 0).repeat(B, 1),
    "at the last step": lambda B, T: (torch.arange(T) == T - 1).repeat(B, 1),
}


def inputs(module, is_init):
    layer = module.lstm if hasattr(module, "lstm") else module.gru
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    sizes = (layer.proj_size or 4, 4)[: 2 if hasattr(module, "lstm") else 1]
    shapes = [(3,), *((rows, size) for size in sizes)]
    x, *stored = (torch.randn(*is_init.shape, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    return x, is_init, *stored


def results(module, arguments):
    """Outputs, and gradients of all that has one."""
    outputs = module(*arguments)
    torch.manual_seed(1)
    loss = sum((output * torch.randn(output.shape)).sum() for output in outputs)
    wanted = [*module.parameters(), *(t for t in arguments if t.requires_grad)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("episodes", EPISODES)
@pytest.mark.parametrize("kind", [LSTMModule, GRUModule])
def test_episodes_run_in_one_call(kind, episodes):
    module = kind()
    arguments = inputs(module, EPISODES[episodes](5, 9))
    expected, backend = results(module, arguments), module.recurrent_backend
    converted, report = seqaccel.convert(module, report=True)
    name = kind.__name__.removesuffix("Module")
    assert [row.target for row in report] == ["its episodes in one call", f"seqaccel.nn.{name}"]
    assert isinstance(converted, kind) and not [row.reason for row in report if row.reason]
    torch.testing.assert_close(results(module, arguments), expected)
    for other in (copy.deepcopy(module), seqaccel.convert(module)):
        torch.testing.assert_close(results(other, arguments), expected)
    assert type(seqaccel.revert(module)) is kind and module.recurrent_backend == backend
    torch.testing.assert_close(results(module, arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 7), (4, 1), (1, 1), (2, 40)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"num_layers": 2, "bias": False}, {"proj_size": 2}, {"bidirectional": True}],
    ids=lambda o: next(iter(o)),
)
def test_layers_of_any_options(options, shape):
    module = LSTMModule(**options)
    arguments = inputs(module, EPISODES["random"](*shape))
    expected = results(module, arguments)
    torch.testing.assert_close(results(seqaccel.convert(module), arguments), expected)
    seqaccel.convert(module, {"LSTM": False})
    torch.testing.assert_close(results(module, arguments), expected)
    seqaccel.convert(module, fullgraph=True)  # the layer is no instance of torch.nn.LSTM
    torch.testing.assert_close(results(module, arguments), expected)


def test_strides_and_stored_states_without_gradients():
    module, is_init = LSTMModule(), EPISODES["random"](6, 5).t()
    x, state = torch.randn(3, 6, 5, dtype=torch.float64).permute(2, 1, 0), torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    arguments = x, is_init, state.expand(5, 6, 1, 4), state.expand(5, 6, 1, 4)
    expected = results(module, arguments)
    torch.testing.assert_close(results(seqaccel.convert(module), arguments), expected)


def test_a_layer_that_is_exchanged_later():
    module = LSTMModule()
    arguments = inputs(module, EPISODES["random"](3, 5))
    expected = results(module, arguments)
    seqaccel.convert(module).make_python_based()
    torch.testing.assert_close(results(module, arguments), expected)


def changed(**attributes):
    module = LSTMModule()
    vars(module).update(attributes)
    return module


def python_based():
    module = LSTMModule()
    module.make_python_based()
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (python_based, "python_based"),
        (lambda: changed(recurrent_backend="scan"), "its recurrent_backend is scan"),
        (type("Own", (LSTMModule,), {"forward": lambda self, *_: None}), "its own forward"),
        (type("LSTMModule", (torch.nn.Module,), {"__module__": "torchrl.modules"}), "not the module"),
    ],
    ids=["python_based", "scan", "own forward", "another version"],
)
def test_what_stays_is_reported(make, reason):
    module = make()
    row = next(iter(seqaccel.convert(module, report=True)[1]))
    assert row.target == "" and row.reason.startswith(reason)


def test_config():
    module = LSTMModule()
    report = seqaccel.convert(module, {"torchrl": False}, report=True)[1]
    assert [row.reason for row in report] == ["left out by config", ""] and type(module) is LSTMModule


def test_scripting_is_refused():
    with pytest.raises(RuntimeError, match="revert first"):
        torch.jit.script(seqaccel.convert(LSTMModule()))


@pytest.mark.parametrize("name", ["LSTMModule", "GRUModule"])
@pytest.mark.parametrize("batch", [(6,), (2, 3), ()], ids=str)
def test_the_package(name, batch):
    modules = pytest.importorskip("torchrl.modules")
    from tensordict import TensorDict

    T, states = 20, ["h", "c"][: 2 if name == "LSTMModule" else 1]
    module = getattr(modules, name)(
        3, 8, num_layers=2, in_keys=["x", *states], out_keys=["y", *(("next", s) for s in states)]
    ).double()

    def run():
        """The tensordict after the call, and the gradients."""
        torch.manual_seed(2)
        leaves = {"x": torch.randn(*batch, T, 3, dtype=torch.float64, requires_grad=True)}
        for state in states:
            leaves[state] = torch.randn(*batch, T, 2, 8, dtype=torch.float64, requires_grad=True)
        is_init = torch.rand(*batch, T, 1) < 0.2
        td = TensorDict({**leaves, "is_init": is_init}, [*batch, T])
        with modules.set_recurrent_mode(True):
            td = module(td)
        outputs = [td["y"], *(td["next", state] for state in states)]
        loss = sum((output * torch.randn(output.shape)).sum() for output in outputs)
        kept = {key: value.detach() for key, value in td.items(True, True)}
        return kept, torch.autograd.grad(loss, [*module.parameters(), *leaves.values()])

    expected = run()
    rows = seqaccel.convert(module, report=True)[1]
    assert [row.target for row in rows] == ["its episodes in one call", f"seqaccel.nn.{name.removesuffix('Module')}"]
    torch.testing.assert_close(run(), expected)
    assert type(pickle.loads(pickle.dumps(module))) is type(module)
    step = TensorDict({"x": torch.randn(4, 3), "is_init": torch.tensor([[True], [False]] * 2)}, [4]).double()
    step["is_init"] = step["is_init"].bool()
    step.update({state: torch.randn(4, 2, 8, dtype=torch.float64) for state in states})
    found = module(step.clone())  # a step of a rollout is TorchRL's own code
    torch.testing.assert_close(found.to_dict(), seqaccel.revert(module)(step.clone()).to_dict())
    assert module.recurrent_backend == "pad"
    torch.testing.assert_close(run(), expected, rtol=0, atol=0)
