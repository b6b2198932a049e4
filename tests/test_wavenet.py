"""GatedConv1d, WaveNet and the gated convolutional language model: against the papers' equations in torch.nn."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

import seqaccel
import seqaccel.nn as snn

MODULES = {
    "wavenet": lambda: snn.WaveNet(3, 5, 8, 9, layers=3, stacks=2),
    "wavenet of three taps": lambda: snn.WaveNet(
        3, None, 6, 7, layers=3, kernel_size=3, input_kernel_size=2, gate_channels=5, head_channels=4, bias=False
    ),
    "wavenet of classes": lambda: snn.WaveNet(11, None, 8, 8, layers=4, embedding=True),
    "local condition": lambda: snn.WaveNet(3, 5, 8, 9, layers=3, condition_channels=2),
    "global condition": lambda: snn.WaveNet(3, 5, 8, 9, layers=3, global_channels=4),
    "both conditions": lambda: snn.WaveNet(3, 5, 8, 9, layers=4, condition_channels=2, global_channels=4),
    "language model": lambda: snn.GatedConvLM(11, 6, 8, 2, 4, bottleneck_channels=5),
    "language model without bottleneck": lambda: snn.GatedConvLM(11, 6, 8, 3, 3, bottleneck_channels=None),
    "adaptive softmax": lambda: snn.GatedConvLM(11, 6, 8, 1, 3, cutoffs=[4, 7]),
}
RUN = [name for name in MODULES if name != "adaptive softmax"]
each = pytest.mark.parametrize("name", MODULES)


def made(name, batch=2, steps=40):
    """The module, its input, and its conditions."""
    torch.manual_seed(5)
    module = MODULES[name]().double().eval()
    words = isinstance(module, snn.GatedConvLM) or module.embedding
    x = torch.randint(11, (batch, steps)) if words else torch.randn(batch, 3, steps, dtype=torch.float64)
    conditions = {}
    if getattr(module, "condition_channels", None):
        conditions["condition"] = torch.randn(batch, module.condition_channels, steps, dtype=torch.float64)
    if getattr(module, "global_channels", None):
        conditions["global_condition"] = torch.randn(batch, module.global_channels, dtype=torch.float64)
    return module, x, conditions


def conv(module, x):
    """A causal convolution from torch's own."""
    padded = F.pad(x, ((module.kernel_size - 1) * module.dilation, 0))
    return F.conv1d(padded, module.weight, module.bias, dilation=module.dilation)


def wavenet(module, x, condition=None, global_condition=None):
    x = F.embedding(x, module.input.weight).mT if module.embedding else conv(module.input, x)
    skips = []
    for layer in module.layers:
        v = conv(layer.conv, x)
        if condition is not None:
            v = v + conv(layer.condition, condition)
        if global_condition is not None:
            v = v + F.linear(global_condition, layer.global_condition.weight)[..., None]
        filtered, gate = v.chunk(2, 1)
        y = conv(layer.output, torch.tanh(filtered) * torch.sigmoid(gate))
        x, skip = x + y[:, : x.shape[1]], y[:, x.shape[1] :]
        skips.append(skip)
    first, second = module.head
    return conv(second, torch.relu(conv(first, torch.relu(sum(skips)))))


def language_model(module, x):
    h = F.glu(conv(module.input, module.embedding(x).mT), 1)
    for block in module.blocks:
        z = h
        for part in block:
            z = F.glu(conv(part, z), 1)
        h = h + z
    if isinstance(module.projection, torch.nn.Linear):
        return module.projection(h.mT)
    return module.projection.log_prob(h.mT.flatten(0, 1)).view(*x.shape, -1)


def definition(module, x, **conditions):
    return wavenet(module, x, **conditions) if isinstance(module, snn.WaveNet) else language_model(module, x)


@each
def test_outputs_and_gradients_are_the_definitions(name):
    module, x, conditions = made(name)
    inputs = [t.requires_grad_() for t in (x, *conditions.values()) if t.is_floating_point()]
    wanted = definition(module, x, **conditions)
    found = module(x, **conditions)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    grad = torch.randn_like(wanted)
    parameters = [*inputs, *module.parameters()]
    theirs = torch.autograd.grad(wanted, parameters, grad, allow_unused=True)
    ours = torch.autograd.grad(found, parameters, grad, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ["glu", "gated"])
def test_gated_conv1d(activation):
    module = snn.GatedConv1d(4, 6, 3, dilation=2, activation=activation).double()
    x = torch.randn(2, 4, 20, dtype=torch.float64)
    value, gate = conv(module, x).chunk(2, 1)
    wanted = (value if activation == "glu" else torch.tanh(value)) * torch.sigmoid(gate)
    torch.testing.assert_close(module(x), wanted, rtol=1e-11, atol=1e-12)
    assert module.out_channels == 6 and repr(module) == (
        f"GatedConv1d(4, 6, kernel_size=3, dilation=2, activation={activation!r})"
    )


@each
def test_nothing_after_a_step_moves_it(name):
    module, x, conditions = made(name)
    y = module(x, **conditions)
    changed = x.clone()
    changed[..., 25:] = changed[..., 25:].flip(-1) if changed.dtype == torch.int64 else 7
    if "condition" in conditions:
        conditions["condition"] = conditions["condition"].clone()
        conditions["condition"][..., 25:] = 7
    again = module(changed, **conditions)
    time = 1 if isinstance(module, snn.GatedConvLM) else 2
    assert torch.equal(again.narrow(time, 0, 25), y.narrow(time, 0, 25))
    assert not torch.equal(again, y)


@pytest.mark.parametrize("options", [{"stacks": 2}, {"kernel_size": 3, "input_kernel_size": 2}])
def test_the_receptive_field_is_what_an_output_sees(options):
    module = snn.WaveNet(3, None, 16, 16, layers=3, **options).double()
    x = torch.randn(1, 3, 60, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[..., 50].sum(), x)
    (seen,) = grad.abs().sum((0, 1)).nonzero(as_tuple=True)
    assert seen.max() == 50 and seen.min() == 50 - module.receptive_field + 1


@each
@pytest.mark.parametrize("cuts", [(0, 1, 40), (1, 2, 3, 17, 17, 40), (39, 40), (5, 30, 31, 40)])
def test_any_chunking_gives_what_one_call_gives(name, cuts):
    module, x, conditions = made(name)
    time = 1 if isinstance(module, snn.GatedConvLM) else 2
    state, parts, begin = module.init_state(2), [], 0
    for end in cuts:
        given = dict(conditions)
        if "condition" in given:
            given["condition"] = given["condition"][..., begin:end]
        if end - begin == 1:
            if "condition" in given:
                given["condition"] = given["condition"][..., 0]
            y, state = module.step(x[..., begin], state, **given)
            parts.append(y.unsqueeze(time))
        else:
            y, state = module.extend(x[..., begin:end], state, **given)
            parts.append(y)
        begin = end
    torch.testing.assert_close(torch.cat(parts, time), module(x, **conditions), rtol=1e-11, atol=1e-12)


def test_a_layer_streams_both_outputs():
    layer = snn.WaveNetLayer(4, 6, 3, 2, condition_channels=2).double()
    x, c = torch.randn(2, 4, 9, dtype=torch.float64), torch.randn(2, 2, 9, dtype=torch.float64)
    (y, skip), state = layer.extend(x[..., :8], layer.init_state(2), condition=c[..., :8])
    (y_t, skip_t), _ = layer.step(x[..., 8], state, condition=c[..., 8])
    for found, last, wanted in zip((y, skip), (y_t, skip_t), layer(x, condition=c), strict=True):
        torch.testing.assert_close(torch.cat([found, last[..., None]], -1), wanted, rtol=1e-11, atol=1e-12)


@each
def test_streams_reset_and_select(name):
    module, x, conditions = made(name, 3)

    def given(rows, steps):
        """The conditions of some rows of the batch and steps."""
        return {key: c[rows][..., steps] if c.dim() == 3 else c[rows] for key, c in conditions.items()}

    every, before, after = [0, 1, 2], slice(20), slice(20, None)
    with torch.no_grad():
        _, state = module.extend(x[..., :20], module.init_state(3), **given(every, before))
        state = module.reset(state, torch.tensor([False, True, False]))
        chosen = [0, 1, 0]
        state = module.select(state, torch.tensor(chosen))
        y, _ = module.extend(x[chosen][..., 20:], state, **given(chosen, after))
        time = 1 if isinstance(module, snn.GatedConvLM) else 2
        fresh, whole = module(x[1:2, ..., 20:], **given([1], after)), module(x, **conditions).narrow(time, 20, 20)
        torch.testing.assert_close(y[1], fresh[0], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(y[2], whole[0], rtol=1e-11, atol=1e-12)


def test_generation_feeds_outputs_back():
    net = snn.WaveNet(11, None, 8, 8, layers=4, embedding=True).eval()
    prompt = torch.randint(11, (2, 6))
    found = net.generate(9, prompt, temperature=0)
    words = prompt
    for _ in range(9):
        words = torch.cat([words, net(words)[..., -1:].argmax(1)], 1)
    assert torch.equal(found, words[:, 6:])
    drawn = [net.generate(9, prompt, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn) and drawn[0].max() < 11
    seen = []
    assert net.generate(4, progress=lambda steps: (seen.append(i) or i for i in steps)).shape == (1, 4)
    assert len(seen) == 3


def test_generation_with_conditions():
    net = snn.WaveNet(2, 2, 8, 8, layers=3, condition_channels=3, global_channels=4).double().eval()
    x = torch.randn(2, 2, 5, dtype=torch.float64)
    c, g = torch.randn(2, 3, 10, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    found = net.generate(6, x, condition=c, global_condition=g)
    for i in range(6):
        y = net(x, condition=c[..., : 5 + i], global_condition=g)[..., -1:]
        torch.testing.assert_close(found[..., i : i + 1], y, rtol=1e-10, atol=1e-12)
        x = torch.cat([x, y], -1)
    with pytest.raises(ValueError, match="condition of 10 steps"):
        net.generate(6, x[..., :5], condition=c[..., :9], global_condition=g)
    with pytest.raises(ValueError, match="expected sample"):
        snn.WaveNet(2, 3, layers=1).generate(2)


def test_loss_is_the_mean_cross_entropy():
    for name in ("language model", "adaptive softmax"):
        module, x, _ = made(name)
        y = language_model(module, x[:, :-1])
        wanted = F.cross_entropy(y.flatten(0, 1), x[:, 1:].flatten())
        torch.testing.assert_close(module.loss(x[:, :-1], x[:, 1:]), wanted)
        with pytest.raises(ValueError, match="target"):
            module.loss(x, x[:, 1:])


def test_dropout_acts_in_training_only():
    module = snn.GatedConvLM(11, 6, 8, 2, 4, bottleneck_channels=5, dropout=0.5)
    x = torch.randint(11, (2, 9))
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))


@each
def test_copies_and_pickles(name):
    module, x, conditions = made(name)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, **conditions), module(x, **conditions))


# ---- sessions ----


def in_session(name, batch=3):
    module, x, conditions = made(name, batch)
    with torch.no_grad():
        wanted = module(x, **conditions)
    if "global_condition" in conditions:
        conditions["global_condition"] = conditions["global_condition"][..., None].expand(-1, -1, x.shape[-1])
    x = torch.cat([x, *conditions.values()], 1) if conditions else x
    x = x.float() if x.is_floating_point() else x
    return module.float(), x, wanted.mT if isinstance(module, snn.GatedConvLM) else wanted


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", RUN)
def test_a_session_gives_what_the_network_gives(name, weights, poison):
    module, x, wanted = in_session(name)
    session = seqaccel.Session(module, 3, weights)
    last = isinstance(module, snn.GatedConvLM)

    def extend(chunk):
        y = session.extend(chunk)
        return y.mT if last else y

    parts = [extend(x[..., :7])]
    parts += [session.step(x[..., t].contiguous())[..., None] for t in range(7, 20)]
    saved = session.state_dict()
    parts.append(extend(x[..., 20:]))
    assert_close(torch.cat(parts, -1), wanted, f"session_{weights}", torch.float32)
    session.load_state_dict(saved)
    assert torch.equal(extend(x[..., 20:]), parts[-1])


def test_session_streams_of_different_ages():
    module, x, _ = in_session("wavenet")
    session = seqaccel.Session(module, 3)
    session.extend(x[..., :20])
    session.reset(torch.tensor([False, True, False]))
    session.select(torch.tensor([0, 1, 0]))
    with torch.no_grad():
        fresh, whole = module(x[..., 20:]), module(torch.cat([x[:1, :, :20], x[2:, :, 20:]], -1))[..., 20:]
    x_t, advance = x[..., 20].contiguous(), torch.tensor([False, True, True])
    first = session.step(x_t, advance=advance)
    assert not first[0].any()
    for stream, wanted in ((1, fresh[1]), (2, whole[0])):
        torch.testing.assert_close(first[stream], wanted[:, 0], rtol=1e-4, atol=1e-5)
    y = session.extend(x[..., 21:])
    torch.testing.assert_close(y[1:], torch.stack([fresh[1], whole[0]])[..., 1:], rtol=1e-4, atol=1e-5)


def test_session_of_a_mixed_stack():
    torch.manual_seed(0)
    parts = (snn.GatedConv1d(5, 12, 3, dilation=2), torch.nn.Linear(12, 9), torch.nn.GELU(), snn.LSTM(9, 8))
    gated, linear, gelu, lstm = parts
    last = snn.CausalConv1d(8, 4, 2, activation="tanh")
    x = torch.randn(3, 5, 20)
    h = lstm(gelu(linear(gated(x).permute(2, 0, 1))))[0]
    wanted = last(h.permute(1, 2, 0))
    for weights in ("float32", "bfloat16", "int8"):
        session = seqaccel.Session(torch.nn.Sequential(*parts, last), 3, weights)
        found = torch.cat([session.extend(x[..., :9]), session.extend(x[..., 9:])], -1)
        assert_close(found, wanted.double(), f"session_{weights}", torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: snn.WaveNetLayer(4, 4), "two outputs"),
        (lambda: snn.WaveNet(4, layers=1, embedding=True, global_channels=2), "embedding and conditions"),
        (MODULES["adaptive softmax"], "cutoffs"),
    ],
)
def test_what_a_session_does_not_run(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        seqaccel.Session(make())
