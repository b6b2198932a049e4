"""CausalConv1d and TCN: their torch.nn and locuslab counterparts, streams, checkpoints, compilation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import error
from torch import nn

import seqaccel.nn as snn


def modules():
    return {
        "conv": snn.CausalConv1d(5, 6, 3, dilation=4, activation="relu"),
        "grouped": snn.CausalConv1d(6, 12, 2, dilation=3, groups=6, bias=False),
        "one tap": snn.CausalConv1d(5, 6, 1),
        "tcn": snn.TCN(5, [7, 7, 4], 3),
    }


def width(module):
    return module.num_inputs if isinstance(module, snn.TCN) else module.in_channels


def test_causal_conv1d_is_conv1d():
    torch.manual_seed(3)
    theirs = nn.Conv1d(6, 8, 3, dilation=2, groups=2)
    torch.manual_seed(3)
    ours = snn.CausalConv1d(6, 8, (3,), dilation=(2,), groups=2)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, 30)
    expected = theirs(F.pad(x, (4, 0)))
    assert torch.allclose(ours(x), expected, atol=1e-5)
    assert torch.allclose(ours(x[0]), expected[0], atol=1e-5)
    assert repr(ours) == "CausalConv1d(6, 8, kernel_size=3, dilation=2, groups=2)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(in_channels=5, groups=2), "in_channels must be divisible by groups"),
        (dict(out_channels=5, groups=2), "out_channels must be divisible by groups"),
        (dict(kernel_size=0), "kernel_size must be a positive integer"),
        (dict(activation="elu"), "activation must be one of"),
    ],
)
def test_causal_conv1d_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        snn.CausalConv1d(**{**dict(in_channels=4, out_channels=4, kernel_size=3), **arguments})


def test_weight_norm():
    conv = nn.utils.parametrizations.weight_norm(snn.CausalConv1d(4, 6, 3))
    plain = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 12)
    assert torch.allclose(conv(x), plain(F.pad(x, (2, 0))), atol=1e-6)


class Chomp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[..., : -self.size].contiguous()


class PeerBlock(nn.Module):
    """A level of the public TCN from torch.nn: pads both sides, cuts the right one."""

    def __init__(self, inputs, outputs, taps, dilation, dropout, weight_norm):
        super().__init__()
        padding = (taps - 1) * dilation
        self.conv1 = weight_norm(nn.Conv1d(inputs, outputs, taps, padding=padding, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outputs, outputs, taps, padding=padding, dilation=dilation))
        first = [self.conv1, Chomp(padding), nn.ReLU(), nn.Dropout(dropout)]
        second = [self.conv2, Chomp(padding), nn.ReLU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*first, *second)
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        return F.relu(self.net(x) + (x if self.downsample is None else self.downsample(x)))


class Peer(nn.Module):
    def __init__(self, inputs, channels, taps=2, dropout=0.2, weight_norm=nn.utils.weight_norm):
        super().__init__()
        widths = [inputs, *channels]
        self.network = nn.Sequential(
            *(PeerBlock(widths[i], widths[i + 1], taps, 2**i, dropout, weight_norm) for i in range(len(channels)))
        )

    def forward(self, x):
        return self.network(x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("style", ["old", "new", "removed"])
@pytest.mark.parametrize("keys", ["all", "without duplicates", "only duplicates"])
def test_tcn_loads_locuslab_checkpoints(style, keys):
    new = nn.utils.parametrizations.weight_norm
    peer = Peer(3, [5, 5, 7], 3, weight_norm=new if style == "new" else nn.utils.weight_norm)
    for block in peer.network:
        for conv in (block.conv1, block.conv2):
            if style != "new":
                nn.init.uniform_(conv.weight_g, 0.5, 1.5)
            if style == "removed":
                nn.utils.remove_weight_norm(conv)
    state = peer.state_dict()
    if keys == "without duplicates":
        state = {k: v for k, v in state.items() if ".net." not in k}
    elif keys == "only duplicates":
        state = {k: v for k, v in state.items() if ".net." in k or "downsample" in k}
    before = dict(state)
    tcn = snn.TCN(3, [5, 5, 7], 3)
    assert tcn.load_state_dict(state).missing_keys == []
    assert dict(state) == before, "the caller's dictionary changed"
    x = torch.randn(2, 3, 40)
    grad = torch.randn(2, 7, 40)
    ours, theirs = tcn.eval()(x), peer.eval()(x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    ours.backward(grad)
    theirs.backward(grad)
    assert torch.allclose(tcn.network[0].conv1.bias.grad, peer.network[0].conv1.bias.grad, rtol=1e-4, atol=1e-4)
    again = snn.TCN(3, [5, 5, 7], 3)
    again.load_state_dict(tcn.state_dict())
    assert torch.equal(again.eval()(x), ours)


def test_tcn_inside_a_module_loads_and_reports_what_does_not_fit():
    peer, tcn = nn.ModuleDict({"tcn": Peer(3, [4], 2)}), nn.ModuleDict({"tcn": snn.TCN(3, [4], 2)})
    tcn.load_state_dict(peer.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*tcn\.network\.0\.conv3\.weight"):
        tcn.load_state_dict({**peer.state_dict(), "tcn.network.0.conv3.weight": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        snn.TCN(3, [5], 2).load_state_dict(peer["tcn"].state_dict())


def test_tcn_starts_as_the_peer_does():
    """In effect: conv1 and conv2 keep torch.nn.Conv1d's draw, the 1x1 convolution's weight is N(0, 0.01^2)."""
    block = snn.TCN(64, [128], 4).network[0]
    bound = (64 * 4) ** -0.5
    weight = block.conv1.weight
    assert weight.abs().max() <= bound * 1.001 and abs(weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert abs(block.downsample.weight.std() / 0.01 - 1) < 0.05
    assert torch.allclose(
        block.conv1.parametrizations.weight.original0.flatten(), weight.flatten(1).norm(dim=1), rtol=1e-5
    )


def test_tcn_is_causal_with_the_receptive_field_it_names():
    tcn = snn.TCN(2, [6, 6, 6], 3).double().eval()
    assert tcn.receptive_field == 1 + 2 * 2 * 7
    x = torch.randn(1, 2, 80, dtype=torch.float64, requires_grad=True)
    grad = torch.autograd.grad(tcn(x)[0, :, 60].abs().sum(), x)[0].abs().sum((0, 1))
    assert grad[61:].eq(0).all() and grad[: 60 - tcn.receptive_field + 1].eq(0).all()


def test_tcn_trains_with_dropout_as_torch_does_on_average():
    tcn, x = snn.TCN(4, [16], 2, dropout=0.3), torch.randn(1, 4, 20)
    block = tcn.network[0]
    z = torch.stack([block.conv1(x, dropout=0.3) for _ in range(400)])
    clean = block.conv1(x)
    positive = clean > 0.05
    assert ((z.mean(0) / clean)[positive].mean() - 1).abs() < 0.02
    assert ((z == 0).float().mean(0)[positive].mean() - 0.3).abs() < 0.02
    assert not torch.equal(tcn(x), tcn(x)) and torch.equal(tcn.eval()(x), tcn(x))


@pytest.mark.parametrize("name", list(modules()))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_chunking_gives_what_one_call_gives(name, data):
    module = modules()[name].double().eval()
    x = torch.randn(3, width(module), 40, dtype=torch.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    state, parts = module.init_state(3), []
    for begin, end in zip([0, *cuts], [*cuts, 40], strict=True):
        if end - begin == 1 and data.draw(st.booleans()):
            y, state = module.step(x[..., begin], state)
            parts.append(y.unsqueeze(-1))
        else:
            y, state = module.extend(x[..., begin:end], state)
            parts.append(y)
    assert torch.allclose(torch.cat(parts, -1), module(x), atol=1e-12)


@pytest.mark.parametrize("name", list(modules()))
def test_streams_are_independent(name, tmp_path):
    module = modules()[name].double().eval()
    x = torch.randn(4, width(module), 30, dtype=torch.float64)
    with torch.no_grad():
        _, state = module.extend(x[..., :10], module.init_state(4))
    torch.save(state, tmp_path / "state.pt")
    kept = copy.deepcopy(state)
    state = module.reset(torch.load(tmp_path / "state.pt"), torch.tensor([False, True, False, True]))
    y, _ = module.extend(x[..., 10:], state)
    for stream, start in enumerate([0, 10, 0, 10]):
        assert torch.allclose(y[stream], module(x[stream : stream + 1, :, start:])[0, :, 10 - start :], atol=1e-12)
    chosen = torch.tensor([2, 0, 2])
    y, _ = module.extend(x[chosen][..., 10:], module.select(kept, chosen))
    assert torch.allclose(y, module(x)[chosen][..., 10:], atol=1e-12)


def test_gradient_flows_through_the_state():
    conv = snn.CausalConv1d(3, 4, 3, dilation=2, activation="tanh").double()
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    first, state = conv.extend(x[..., :5], conv.init_state(2))
    second, _ = conv.extend(x[..., 5:], state)
    (through,) = torch.autograd.grad(torch.cat([first, second], -1).square().sum(), x)
    (whole,) = torch.autograd.grad(conv(x).square().sum(), x)
    assert torch.allclose(through, whole, atol=1e-12)


@pytest.mark.parametrize("name", list(modules()))
def test_copies_pickles_and_dtypes(name):
    module = modules()[name].eval()
    x = torch.randn(2, width(module), 25)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)) if "tcn" not in name else copy.copy(module)):
        assert torch.equal(twin(x), expected)
    other = copy.deepcopy(module)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    assert error(copy.deepcopy(module).to(torch.bfloat16)(x.bfloat16()), expected) < 0.05
    assert error(copy.deepcopy(module).double()(x.double()), expected) < 1e-6
    assert module.to("meta")(x.to("meta")).shape == expected.shape


@pytest.mark.parametrize("name", list(modules()))
def test_compile_and_export(name):
    torch._dynamo.reset()
    module = modules()[name].eval()
    x = torch.randn(2, width(module), 25)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("B"), 2: torch.export.Dim("T")},))
    again = torch.randn(3, width(module), 31)
    assert torch.allclose(exported.module()(again), module(again), atol=1e-6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grad = torch.randn_like(module(x))
    results = []
    for function in (module, compiled):
        module.zero_grad()
        y = function(x)
        y.backward(grad)
        results.append([y, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
    state = module.init_state(2)
    assert torch.allclose(step(x[..., 0], state)[0], module.step(x[..., 0], state)[0], atol=1e-6)


def test_compiled_training_runs_the_operators_with_inductor():
    torch._dynamo.reset()
    tcn, x = snn.TCN(3, [4, 4], 2, dropout=0.0), torch.randn(2, 3, 20)
    tcn(x).sum().backward()
    expected = [p.grad.clone() for p in tcn.parameters()]
    tcn.zero_grad()
    torch.compile(tcn, fullgraph=True)(x).sum().backward()
    for p, grad in zip(tcn.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-5)


def test_pickle_with_and_without_weight_norm():
    def copied(module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return pickle.loads(pickle.dumps(torch.load(file, weights_only=False)))

    tcn, x = snn.TCN(4, [6, 6]).eval(), torch.randn(2, 4, 9)
    found = copied(tcn)
    assert torch.equal(found(x), tcn(x)) and list(found.state_dict()) == list(tcn.state_dict())
    gain = found.network[0].conv1.parametrizations.weight.original0
    found(x).sum().backward()
    assert gain.grad.abs().sum() > 0
    with torch.no_grad():
        gain.mul_(2)
    assert not torch.equal(found(x), tcn(x)) and torch.equal(copy.deepcopy(found)(x), found(x))
    older = {"weight_g": torch.ones(6, 1, 1), "weight_v": torch.ones(6, 4, 2), "bias": torch.zeros(6)}
    found.network[0].conv1.load_state_dict(older)
    assert gain.eq(1).all()
    for block in tcn.network:
        for conv in (block.conv1, block.conv2):
            nn.utils.parametrize.remove_parametrizations(conv, "weight")
    found = copied(tcn)
    assert torch.equal(found(x), tcn(x)) and type(found.network[0].conv1) is snn.CausalConv1d
