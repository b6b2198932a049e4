"""``convert`` on whole models: what is replaced, what stays and why, and that nothing else changes."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqaccel
from seqaccel.convert import measure

LAYERS = {
    "RNN": lambda: torch.nn.RNN(4, 5, nonlinearity="relu", bidirectional=True),
    "GRU": lambda: torch.nn.GRU(4, 5, num_layers=2, batch_first=True, bias=False),
    "LSTM": lambda: torch.nn.LSTM(4, 5, proj_size=3),
    "RNNCell": lambda: torch.nn.RNNCell(4, 5, nonlinearity="relu"),
    "GRUCell": lambda: torch.nn.GRUCell(4, 5),
    "LSTMCell": lambda: torch.nn.LSTMCell(4, 5, bias=False),
}


def input_of(name):
    return torch.randn(3, 4) if name.endswith("Cell") else torch.randn(7, 3, 4)


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(6, 10, num_layers=2, bidirectional=True)
        self.head = torch.nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[0])


class WithMethods(torch.nn.LSTM):
    """Adds methods, one of the name of a stream's, and a forward around torch's."""

    def step(self):
        return "mine"

    def forward(self, input, hx=None):
        output, state = super().forward(input * 2, hx)
        return output + 1, state


class OwnForward(torch.nn.GRU):
    def forward(self, input, hx=None):
        return torch.nn.GRU.forward(self, input, hx)


class OwnName(torch.nn.LSTM):
    zoneout = 0.3


class Loop(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = torch.nn.GRUCell(3, 3)

    def forward(self, x):
        h = torch.zeros(x.shape[1], 3)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


class Gates(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, x):
        h = torch.zeros(x.shape[1], 3)
        for x_t in x:
            z, n = self.linear(torch.cat([x_t, h], 1)).chunk(2, 1)
            h = h + torch.sigmoid(z) * (torch.tanh(n) - h)
        return h


def gradients(model, x):
    output = model(x)
    output = output[0] if isinstance(output, tuple) else output
    return output.detach(), torch.autograd.grad(output.square().sum(), list(model.parameters()))


def converted_rows(model, **options):
    converted, report = seqaccel.convert(model, report=True, **options)
    assert converted is model
    return {row.path: row for row in report}


def test_the_converted_model_computes_the_same_with_the_same_parameters():
    model, x = Tagger(), torch.randn(7, 2, 6)
    expected, parameters, keys = model(x), list(model.parameters()), list(model.state_dict())
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    assert seqaccel.convert(model) is model
    assert [*map(id, model.parameters())] == [*map(id, parameters)] and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    model(x).sum().backward()
    optimiser.step()
    restored = Tagger()
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored(x), model(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_replaced_layer_is_of_both_classes(name):
    layer, x = LAYERS[name](), input_of(name)
    expected, text, attributes = layer(x), repr(layer), {**vars(layer)}
    assert seqaccel.convert(layer) is layer and repr(layer) == text
    assert isinstance(layer, getattr(torch.nn, name)) and isinstance(layer, getattr(seqaccel.nn, name))
    torch.testing.assert_close(layer(x), expected)
    if not name.endswith("Cell"):
        assert layer.mode.startswith(name) and layer.flatten_parameters() is None
        assert [id(w) for w in layer._flat_weights] == [id(w) for part in layer.all_weights for w in part]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        torch.testing.assert_close(other(x), expected)
        torch.testing.assert_close(seqaccel.revert(other)(x), expected, rtol=0, atol=0)
    seqaccel.revert(layer)
    assert type(layer) is getattr(torch.nn, name) and vars(layer).keys() == attributes.keys()
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", LAYERS)
def test_fullgraph(name):
    layer, x = LAYERS[name](), input_of(name)
    expected = layer(x)
    assert type(seqaccel.convert(layer)) is not getattr(seqaccel.nn, name)
    seqaccel.convert(layer, fullgraph=True)
    assert type(layer) is getattr(seqaccel.nn, name)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), expected)
    assert type(seqaccel.revert(layer)) is getattr(torch.nn, name)


def test_without_fullgraph_compilation_breaks_at_the_layer():
    model, x = seqaccel.convert(Tagger()), torch.randn(7, 2, 6)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_trajectories_are_packed():
    """What TorchRL does with a batch whose trajectories end early."""

    class Policy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(4, 5, batch_first=True)

        def forward(self, x, lengths):
            if not isinstance(self.lstm, torch.nn.LSTM):
                return self.lstm(x, mask=lengths)
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

    model, x, lengths = Policy(), torch.randn(3, 6, 4), torch.tensor([2, 6, 3])
    expected = model(x, lengths)
    torch.testing.assert_close(seqaccel.convert(model)(x, lengths), expected)


@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, WithMethods], ids=lambda kind: kind.__name__)
def test_weight_norm(kind, old_style):
    model, x = torch.nn.Sequential(kind(4, 5)), torch.randn(6, 2, 4)
    if old_style:
        with pytest.warns(FutureWarning):
            torch.nn.utils.weight_norm(model[0], "weight_hh_l0")
    else:
        weight_norm(model[0], "weight_hh_l0")
    before, keys = gradients(model, x), list(model.state_dict())
    assert converted_rows(model)["0"].target == "seqaccel.nn.LSTM"
    assert isinstance(model[0], seqaccel.nn.LSTM) and list(model.state_dict()) == keys
    torch.testing.assert_close(gradients(model, x), before)
    seqaccel.revert(model)
    assert not isinstance(model[0], seqaccel.nn.LSTM)
    torch.testing.assert_close(gradients(model, x), before, rtol=0, atol=0)


def test_parametrizations_come_and_go():
    layer, x = torch.nn.LSTM(4, 5), torch.randn(6, 2, 4)
    weight_norm(layer, "weight_hh_l0")
    expected = layer(x)[0]
    seqaccel.convert(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert isinstance(layer, seqaccel.nn.LSTM) and isinstance(layer, torch.nn.LSTM)
    torch.testing.assert_close(layer(x)[0], expected)
    weight_norm(layer, "weight_ih_l0")
    seqaccel.revert(layer)
    torch.testing.assert_close(layer(x)[0], expected)
    parametrize.remove_parametrizations(layer, "weight_ih_l0")
    assert type(layer) is torch.nn.LSTM


def test_a_subclass_keeps_its_methods():
    layer, x = WithMethods(4, 5), torch.randn(6, 2, 4)
    before = gradients(layer, x)
    seqaccel.convert(layer)
    assert isinstance(layer, seqaccel.nn.LSTM) and isinstance(layer, WithMethods) and layer.step() == "mine"
    torch.testing.assert_close(gradients(layer, x), before)
    other = pickle.loads(pickle.dumps(layer))
    assert type(other) is type(layer)
    torch.testing.assert_close(gradients(other, x), before)
    assert type(seqaccel.revert(layer)) is WithMethods
    torch.testing.assert_close(gradients(layer, x), before, rtol=0, atol=0)


class LSTM(torch.nn.Module):
    """No class of torch.nn's."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: OwnForward(4, 5), "its own forward does not call super"),
        (lambda: OwnName(4, 5), "its zoneout would take the place of ours"),
        (Loop, "its forward calls a cell in a Python loop"),
        (Gates, "its forward computes gates in a Python loop"),
        (LSTM, "not derived from a class of torch.nn"),
        (lambda: torch.jit.script(torch.nn.LSTM(4, 5)), "a TorchScript module"),
    ],
    ids=lambda value: "" if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_what_stays_is_reported(make, reason):
    model = torch.nn.Sequential(make())
    kind = type(model[0])
    row = converted_rows(model)["0"]
    assert type(model[0]) is kind and row.target == "" and row.reason.startswith(reason)


def test_a_wrapper_of_torch_s_name_is_no_row_of_its_own():
    wrapper = type("GRU", (torch.nn.Module,), {})()  # speechbrain's
    wrapper.rnn = torch.nn.GRU(4, 5)
    assert list(converted_rows(torch.nn.Sequential(wrapper))) == ["0.rnn"]


def test_config_and_filter():
    model = torch.nn.Sequential(torch.nn.LSTM(4, 4), torch.nn.GRU(4, 4), torch.nn.LSTM(4, 4))
    rows = converted_rows(model, config={"GRU": False}, filter_fn=lambda module, path: path != "2")
    assert [bool(row.target) for row in rows.values()] == [True, False, False]
    assert [row.reason for row in rows.values()] == ["", "left out by config", "left out by filter_fn"]
    subclass = torch.nn.Sequential(WithMethods(4, 4))
    assert "fullgraph" in converted_rows(subclass, fullgraph=True)["0"].reason


def test_attention_is_replaced_only_by_name():
    model, x = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(2, 9, 16)
    expected, keys = model(x), list(model.state_dict())
    assert not converted_rows(model) and type(model.self_attn) is torch.nn.MultiheadAttention
    rows = converted_rows(model, config={"MultiheadAttention": {"block_size": 4, "causal": False}})
    assert rows["self_attn"].target == "seqaccel.nn.HierarchicalAttention" and list(model.state_dict()) == keys
    assert type(model.self_attn) is seqaccel.nn.HierarchicalAttention and model.self_attn.block_size == 4
    same = seqaccel.nn.HierarchicalAttention(16, 2, batch_first=True, block_size=4, causal=False)
    same.load_state_dict(model.self_attn.state_dict())
    torch.testing.assert_close(model.self_attn(x, x, x)[0], same(x, x, x)[0])
    torch.testing.assert_close(seqaccel.revert(model)(x), expected, rtol=0, atol=0)
    dropped = torch.nn.Sequential(torch.nn.MultiheadAttention(16, 2, dropout=0.1))
    assert converted_rows(dropped, config={"MultiheadAttention": True})["0"].target and dropped[0].dropout == 0.1
    biased = torch.nn.Sequential(torch.nn.MultiheadAttention(16, 2, add_bias_kv=True))
    assert "add_bias_kv" in converted_rows(biased, config={"MultiheadAttention": True})["0"].reason


def test_patch_torch():
    before = torch.nn.LSTM(3, 4)
    seqaccel.patch_torch()
    try:

        class Derived(torch.nn.LSTM):
            pass

        made = [getattr(torch.nn, name)(3, 4) for name in LAYERS]
        assert all(isinstance(layer, getattr(seqaccel.nn, name)) for name, layer in zip(LAYERS, made, strict=True))
        x, layer = torch.randn(5, 2, 3), Derived(3, 4)
        layer.load_state_dict(before.state_dict())
        torch.testing.assert_close(layer(x), before(x))
        assert isinstance(layer, seqaccel.nn.LSTM) and not converted_rows(layer) and type(layer) is Derived
    finally:
        seqaccel.unpatch_torch()
    assert type(torch.nn.LSTM(3, 4)) is type(before) and torch.nn.modules.LSTM is type(before)
    assert all(isinstance(layer, getattr(torch.nn, name)) for name, layer in zip(LAYERS, made, strict=True))


def test_reports_are_tables():
    _, report = seqaccel.convert(torch.nn.Sequential(Tagger(), Loop()), report=True)
    lines = str(report).splitlines()
    assert len(lines) == 3 + len(report) and lines[1].split() == ["path", "from", "to", "why", "not"]
    assert lines[3].split() == ["0.encoder", "torch.nn.LSTM", "seqaccel.nn.LSTM"]
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    assert "0.encoder" in console.export_text()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": None}, TypeError, "expected model to be a torch.nn.Module, but got NoneType"),
        ({"model": torch.nn.LSTM}, TypeError, "but got the class LSTM"),
        ({"config": ["LSTM"]}, TypeError, "expected config to be a mapping"),
        ({"config": {"Lstm": True}}, ValueError, "config has \\['Lstm'\\]; expected names of"),
        ({"config": {"LSTM": "yes"}}, TypeError, "config\\['LSTM'\\]"),
        ({"filter_fn": "LSTM"}, TypeError, "expected filter_fn to be callable"),
        ({"report": "yes"}, TypeError, "report"),
        ({"fullgraph": None}, TypeError, "fullgraph"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        seqaccel.convert(**({"model": torch.nn.LSTM(3, 4)} | arguments))
    with pytest.raises(TypeError, match="expected model"):
        seqaccel.revert(None)


# ---- convolutions ----


class Chomp1d(torch.nn.Module):
    def __init__(self, chomp_size):
        super().__init__()
        self.chomp_size = chomp_size

    def forward(self, x):
        return x[:, :, : -self.chomp_size].contiguous()


def old_weight_norm(module):
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(module)


class Level(torch.nn.Module):
    """A level of locuslab's TCN."""

    def __init__(self, inputs, outputs, kernel_size, dilation, norm, dropout=0.0):
        super().__init__()
        pad = (kernel_size - 1) * dilation
        options = {"padding": pad, "dilation": dilation}
        self.conv1 = norm(torch.nn.Conv1d(inputs, outputs, kernel_size, **options))
        self.conv2 = norm(torch.nn.Conv1d(outputs, outputs, kernel_size, **options))
        first = [self.conv1, Chomp1d(pad), torch.nn.ReLU(), torch.nn.Dropout(dropout)]
        second = [self.conv2, Chomp1d(pad), torch.nn.ReLU(), torch.nn.Dropout(dropout)]
        self.net = torch.nn.Sequential(*first, *second)
        self.downsample = torch.nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        return torch.relu(self.net(x) + (x if self.downsample is None else self.downsample(x)))


def assert_converts(model, x, targets):
    before, keys = gradients(model, x), list(model.state_dict())
    rows = converted_rows(model)
    assert {path: row.target for path, row in rows.items() if row.target} == targets
    torch.testing.assert_close(gradients(model, x), before)
    assert list(model.state_dict()) == keys
    seqaccel.revert(model)
    torch.testing.assert_close(gradients(model, x), before, rtol=0, atol=0)
    return rows


@pytest.mark.parametrize("norm", [weight_norm, old_weight_norm, lambda conv: conv], ids=["new", "old", "none"])
def test_locuslab_s_network(norm):
    model = torch.nn.Sequential(Level(3, 5, 3, 1, norm), Level(5, 5, 3, 2, norm))
    rows = assert_converts(model, torch.randn(2, 3, 12), dict.fromkeys(["0.net", "1.net"], CONVOLUTION))
    assert len(rows) == 2  # the convolutions inside are not reported again


CONVOLUTION = "seqaccel.functional.causal_conv1d"
PADDED = {
    "constant": lambda: [torch.nn.ConstantPad1d((4, 0), 0.0), torch.nn.Conv1d(3, 4, 3, dilation=2), torch.nn.SiLU()],
    "zero, stride": lambda: [torch.nn.ZeroPad1d((2, 0)), torch.nn.Conv1d(3, 4, 3, stride=2, bias=False)],
    "replicate, groups": lambda: [torch.nn.ReplicationPad1d((1, 0)), torch.nn.Conv1d(3, 3, 2, groups=3)],
    "two": lambda: [
        torch.nn.Conv1d(3, 3, 1),
        *PADDED["constant"](),
        torch.nn.ZeroPad1d((1, 0)),
        torch.nn.Conv1d(4, 2, 2),
    ],
}
NOT_CAUSAL = {
    "value": lambda: [torch.nn.ConstantPad1d((2, 0), 1.0), torch.nn.Conv1d(3, 4, 3)],
    "right": lambda: [torch.nn.ConstantPad1d((1, 1), 0.0), torch.nn.Conv1d(3, 4, 3)],
    "more": lambda: [torch.nn.ConstantPad1d((3, 0), 0.0), torch.nn.Conv1d(3, 4, 3)],
    "padded twice": lambda: [torch.nn.ConstantPad1d((2, 0), 0.0), torch.nn.Conv1d(3, 4, 3, padding=1)],
    "same": lambda: [torch.nn.Conv1d(3, 4, 3, padding="same"), torch.nn.ReLU()],
    "strided chomp": lambda: [torch.nn.Conv1d(3, 4, 3, padding=2, stride=2), Chomp1d(2)],
}


@pytest.mark.parametrize("name", PADDED)
def test_padded_convolutions(name):
    model = torch.nn.Sequential(*PADDED[name]())
    for x in (torch.randn(2, 3, 11), torch.randn(3, 11)):
        assert_converts(model, x, {"": CONVOLUTION})
    seqaccel.convert(model)
    x = torch.randn(2, 3, 11)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert isinstance(copy.deepcopy(model), torch.nn.Sequential) and len(pickle.loads(pickle.dumps(model))) == len(
        model
    )


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_other_convolutions_stay(name):
    rows = assert_converts(torch.nn.Sequential(*NOT_CAUSAL[name]()), torch.randn(2, 3, 11), {})
    assert [row.reason for row in rows.values()] == ["no causal padding or Chomp1d beside it in a Sequential"]


@pytest.mark.parametrize("make", [lambda: torch.nn.LSTM(3, 4), lambda: torch.nn.Sequential(*PADDED["constant"]())])
def test_scripting_is_refused(make):
    model = seqaccel.convert(make())
    with pytest.raises(RuntimeError, match="cannot be scripted"):
        torch.jit.script(model)
    torch.jit.script(seqaccel.revert(model))


def test_layers_with_hooks_run_as_they_are():
    model, x, seen = seqaccel.convert(torch.nn.Sequential(*PADDED["constant"]())), torch.randn(2, 3, 11), []
    expected = model(x)
    model[1].register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].shape[2], output.shape[2])))
    torch.testing.assert_close(model(x), expected)
    assert seen == [(15, 11)]


def test_dropout_behind_a_convolution():
    model = seqaccel.convert(torch.nn.Sequential(Level(3, 5, 3, 1, weight_norm, dropout=0.5)))
    x = torch.randn(2, 3, 50)
    zeros = (model[0].net(x) == 0).float().mean()
    assert 0.6 < zeros < 0.9 and not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_a_chomp_of_another_kind():
    class Chomp1d(torch.nn.Module):  # cuts off the beginning
        chomp_size = 2

        def forward(self, x):
            return x[:, :, 2:]

    model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 3, padding=2), Chomp1d())
    assert assert_converts(model, torch.randn(2, 3, 11), {})[""].reason.startswith("its Chomp1d does not")


class _Chop1d(torch.nn.Module):
    """asteroid's: ConvTasNet has it behind a convolution per channel."""

    def __init__(self, chop_size):
        super().__init__()
        self.chop_size = chop_size

    def forward(self, x):
        return x[..., : -self.chop_size].contiguous()


def test_asteroid_s_causal_block():
    causal = torch.nn.Sequential(torch.nn.Conv1d(5, 5, 3, padding=4, dilation=2, groups=5), _Chop1d(4))
    model = torch.nn.Sequential(torch.nn.Conv1d(3, 5, 1), torch.nn.PReLU(), causal, torch.nn.PReLU())
    rows = assert_converts(model, torch.randn(2, 3, 12), {"2": CONVOLUTION})
    assert list(rows) == ["2"]


# ---- packages: stand-ins with the attributes that the conversion reads ----


class _ResidualBlock(torch.nn.Module):
    """A level of darts' TCNModel."""

    __module__ = "darts.models.forecasting.tcn_model"

    def __init__(self, inputs, outputs, level, levels, norm=lambda conv: conv):
        super().__init__()
        self.dilation_base, self.kernel_size, self.nr_blocks_below, self.num_layers = 2, 3, level, levels
        self.dropout1, self.dropout2 = torch.nn.Dropout(0.0), torch.nn.Dropout(0.0)
        self.conv1 = norm(torch.nn.Conv1d(inputs, 4, 3, dilation=2**level))
        self.conv2 = norm(torch.nn.Conv1d(4, outputs, 3, dilation=2**level))
        if inputs != outputs:
            self.conv3 = torch.nn.Conv1d(inputs, outputs, 1)

    def forward(self, x):
        pad = (2 * self.dilation_base**self.nr_blocks_below, 0)
        y = self.dropout1(torch.relu(self.conv1(torch.nn.functional.pad(x, pad))))
        y = self.conv2(torch.nn.functional.pad(y, pad))
        y = self.dropout2(torch.relu(y) if self.nr_blocks_below < self.num_layers - 1 else y)
        return y + (self.conv3(x) if self.conv1.in_channels != self.conv2.out_channels else x)


@pytest.mark.parametrize("norm", [weight_norm, lambda conv: conv], ids=["weight norm", "none"])
def test_darts(norm):
    model = torch.nn.Sequential(
        _ResidualBlock(3, 4, 0, 3, norm), _ResidualBlock(4, 4, 1, 3), _ResidualBlock(4, 2, 2, 3)
    )
    x = torch.randn(2, 3, 11)
    rows = assert_converts(model, x, dict.fromkeys("012", CONVOLUTION))
    assert list(rows) == list("012")  # the convolutions inside are not reported again
    seqaccel.convert(model)
    seen, expected = [], model(x)
    model[0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[2]))
    torch.testing.assert_close(model(x), expected)
    assert seen == [13]
    other = _ResidualBlock(3, 4, 0, 2)
    other.kernel_size = 2
    assert converted_rows(torch.nn.Sequential(other))["0"].reason == "not the block that darts 0.48 has"


class TemporalPad1d(torch.nn.Module):
    def __init__(self, pad):
        super().__init__()
        self.pad = pad

    def forward(self, x, inference=False, buffer_io=None):
        return x if inference else self.pad(x)


class TemporalConv1d(torch.nn.Conv1d):
    __module__ = "pytorch_tcn.conv"

    def __init__(self, pad, causal=True):
        super().__init__(3, 4, 3)
        self.causal, self.padder = causal, TemporalPad1d(pad)

    def forward(self, x, inference=False, in_buffer=None, buffer_io=None):
        return super().forward(self.padder(x, inference=inference, buffer_io=buffer_io))


def test_pytorch_tcn():
    pads = [torch.nn.ConstantPad1d((2, 0), 0.0), torch.nn.ReplicationPad1d((2, 0))]
    for pad in pads:
        model, x = torch.nn.ModuleDict({"conv": weight_norm(TemporalConv1d(pad))}), torch.randn(2, 3, 11)
        model.forward = lambda x, model=model: model["conv"](x)
        assert_converts(model, x, {"conv": CONVOLUTION})
        streamed = model["conv"](x, inference=True)
        seqaccel.convert(model)
        torch.testing.assert_close(model["conv"](x, inference=True), streamed, rtol=0, atol=0)
    reasons = [
        converted_rows(torch.nn.Sequential(conv))["0"].reason
        for conv in (TemporalConv1d(pads[0], causal=False), TemporalConv1d(torch.nn.CircularPad1d((2, 0))))
    ]
    assert reasons == ["not causal", "padding by CircularPad1d"]


class Sequential(torch.nn.Module):
    """Keras's: a list of layers that torch does not see."""

    __module__ = "keras.src.models.sequential"

    def __init__(self, layers):
        super().__init__()
        vars(self)["layers"] = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_keras():
    wrapper = torch.nn.ModuleDict({"module": torch.nn.Sequential(torch.nn.Conv1d(3, 3, 1), torch.nn.GRU(11, 4))})
    wrapper.forward = wrapper["module"].forward
    model = torch.nn.Sequential(Sequential([torch.nn.ReLU(), wrapper]))
    before = model(torch.ones(2, 3, 11))[0]
    assert list(converted_rows(model)) == ["0.layers.1.module.1"]
    assert isinstance(wrapper["module"][1], seqaccel.nn.GRU)
    torch.testing.assert_close(model(torch.ones(2, 3, 11))[0], before)
    assert type(seqaccel.revert(model) and wrapper["module"][1]) is torch.nn.GRU


class SRUCell(torch.nn.Module):
    """A layer of sru 2.6 without options but tanh."""

    __module__ = "sru.modules"

    def __init__(self, size, use_tanh):
        super().__init__()
        plain = seqaccel.nn.SRUCell(size, size, use_tanh=use_tanh)
        attributes = {k: v for k, v in vars(plain).items() if k not in ("use_tanh", "nn_rnn_compatible_return")}
        vars(self).update(attributes, activation_type=int(use_tanh))

    def forward(self, input, c0=None, mask_pad=None):
        c = torch.zeros_like(input[0]) if c0 is None else c0
        w_f, w_r = self.weight_c.chunk(2)
        b_f, b_r = self.bias.chunk(2)
        outputs = []
        for x, u in zip(input, input @ self.weight, strict=True):
            u0, u1, u2 = u.unflatten(1, (-1, 3)).unbind(2)
            f, r = torch.sigmoid(u1 + w_f * c + b_f), torch.sigmoid(u2 + w_r * c + b_r)
            c = f * c + (1 - f) * u0
            skip = x * self.scale_x
            outputs.append(skip + r * ((torch.tanh(c) if self.activation_type else c) - skip))
        return torch.stack(outputs), c


@pytest.mark.parametrize("use_tanh", [False, True])
def test_sru(use_tanh):
    assert_converts(torch.nn.Sequential(SRUCell(4, use_tanh)), torch.randn(6, 2, 4), {"0": "seqaccel.nn.SRUCell"})


# ---- measuring ----


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.norm = torch.nn.LSTM(3, 4), torch.nn.BatchNorm1d(4)
        self.head, self.unused = torch.nn.GRU(4, 4), torch.nn.LSTM(3, 3)

    def forward(self, x, *, scale):
        return self.head(self.norm(self.lstm(x)[0].transpose(1, 2)).transpose(1, 2) * scale)


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 1e-4)
    monkeypatch.setattr(measure, "ROUNDS", 2)


def example():
    return {"x": torch.randn(4, 2, 3), "scale": torch.tensor(2.0)}


@pytest.mark.parametrize("converted", [False, True])
def test_benchmark_changes_nothing(brief, converted):
    model = Model()
    if converted:
        seqaccel.convert(model, fullgraph=True)
    kinds, before = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    inputs, random = example(), torch.get_rng_state()
    report = seqaccel.benchmark(model, inputs, progress=False)
    assert [row.path for row in report] == ["lstm", "head", "unused", "(model)"]
    for row in report:
        called = row.path != "unused"
        assert all((value > 0) is called for value in row[2:7]), row
    assert [type(m) for m in model.modules()] == kinds and all(m.training for m in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    rows = list(seqaccel.benchmark(model.eval(), example(), config={"GRU": False}, progress=False))
    assert [row.path for row in rows] == ["lstm", "unused", "(model)"] and rows[0].training != rows[0].training
    assert [type(m) for m in model.modules()] == kinds


@dataclasses.dataclass
class Prediction:
    value: torch.Tensor
    state: object = None


def test_a_model_that_returns_a_dataclass_is_timed_backward(brief):
    class Forecast(torch.nn.LSTM):
        def forward(self, x):
            return Prediction(super().forward(x)[0])

    seen, model = [], torch.nn.Sequential(Forecast(3, 4))
    model[0].weight_hh_l0.register_hook(seen.append)
    seqaccel.benchmark(model, torch.randn(5, 2, 3), progress=False)
    assert seen


@pytest.mark.parametrize("whole", [True, False])
def test_optimize_keeps_what_is_faster(monkeypatch, whole):
    times = {"lstm": (3.0, 1.0), "head": (1.0, 2.0), "(model)": (4.0, 3.0 if whole else 5.0)}
    model = Model()
    names = {**{module: path for path, module in model.named_modules()}, model: "(model)"}

    def compared(run, devices, use_ours):
        use_ours(True)
        use_ours(False)
        return times[names[run.args[-1].function]]

    monkeypatch.setattr(measure, "_compared", compared)
    report = seqaccel.optimize(model, example(), progress=False)
    assert [row.faster for row in report] == [True, False, False, whole]
    kept = [isinstance(layer, seqaccel.nn.Streaming) for layer in (model.lstm, model.head, model.unused)]
    assert kept == [whole, False, False]
    assert "3" in str(report).splitlines()[3].split() and str(report).splitlines()[3].endswith("yes")


def test_a_failing_example_leaves_the_model_as_it_was(brief):
    model = seqaccel.convert(Model())
    with pytest.raises(TypeError, match="scale"):
        seqaccel.optimize(model, torch.randn(4, 2, 3))
    assert isinstance(model.lstm, seqaccel.nn.LSTM) and all(m.training for m in model.modules())
    for call in (seqaccel.benchmark, seqaccel.optimize):
        with pytest.raises(TypeError, match=f"{call.__name__}: expected model"):
            call(None, example())
        with pytest.raises(TypeError, match="expected filter_fn"):
            call(model, example(), filter_fn=3)
        with pytest.raises(TypeError, match="expected call to be callable"):
            call(model, example(), call="forward")
        with pytest.raises(TypeError, match="progress"):
            call(model, example(), progress="yes")
