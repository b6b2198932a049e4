"""QRNN, MinGRU, MinLSTM, IndRNN: against loops over steps of torch's operators, and what a module must survive."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import CPP, DOUBLE, TRITON
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqaccel
from seqaccel import nn

MODULES = {
    "QRNN": nn.QRNN,
    "QRNN of two steps": lambda *a, **k: nn.QRNN(*a, window=2, **k),
    "QRNN without output gate": lambda *a, **k: nn.QRNN(*a, window=2, output_gate=False, **k),
    "MinGRU": nn.MinGRU,
    "MinGRU, g": lambda *a, **k: nn.MinGRU(*a, candidate="g", **k),
    "MinLSTM": nn.MinLSTM,
    "MinLSTM, g": lambda *a, **k: nn.MinLSTM(*a, candidate="g", **k),
    "IndRNN": nn.IndRNN,
    "IndRNN, tanh": lambda *a, **k: nn.IndRNN(*a, nonlinearity="tanh", **k),
}
each_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
STREAMED = ["QRNN of two steps", "MinGRU", "MinLSTM, g", "IndRNN"]
some_modules = pytest.mark.parametrize("make", [MODULES[name] for name in STREAMED], ids=STREAMED)


def g(v):
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


def one_step(model, weights, x, previous, h):
    """(output, state) of one sequence at one step."""
    weight, weight_hh, bias = (weights.get(name) for name in ("weight_ih", "weight_hh", "bias_ih"))
    x = torch.cat([x, previous]) if getattr(model, "window", 1) == 2 else x
    pre = weight @ x + (0 if bias is None else bias)
    if isinstance(model, nn.QRNN):
        z, f, *o = pre.chunk(3 if model.output_gate else 2)
        f = torch.sigmoid(f)
        if model.zoneout:
            f = model.zoneout + (1 - model.zoneout) * f
        c = f * h + (1 - f) * torch.tanh(z)
        return (torch.sigmoid(o[0]) * c if o else c), c
    if isinstance(model, nn.IndRNN):
        h = getattr(torch, model.nonlinearity)(pre + weight_hh * h)
    else:
        candidate = g if model.candidate == "g" else lambda v: v
        if isinstance(model, nn.MinGRU):
            z, v = pre.chunk(2)
            h = (1 - torch.sigmoid(z)) * h + torch.sigmoid(z) * candidate(v)
        else:
            f, i, v = pre.chunk(3)
            f, i = torch.sigmoid(f), torch.sigmoid(i)
            h = f / (f + i) * h + i / (f + i) * candidate(v)
    return h, h


def loop(model, x, hx):
    """The module's results for one sequence (T, I) from a state (layers * directions, H), step by step."""
    D = 2 if model.bidirectional else 1
    last = []
    for k in range(model.num_layers):
        outputs = []
        for d in range(D):
            suffix = f"_l{k}{'_reverse' if d else ''}"
            weights = {n.removesuffix(suffix): p for n, p in model.named_parameters() if n.endswith(suffix)}
            h, previous, rows = hx[k * D + d], torch.zeros_like(x[0]), []
            for x_t in x.flip(0) if d else x:
                y, h = one_step(model, weights, x_t, previous, h)
                previous = x_t
                rows.append(y)
            last.append(h)
            outputs.append(torch.stack(rows[::-1] if d else rows))
        x = torch.cat(outputs, -1)
    return x, torch.stack(last)


@pytest.mark.parametrize("backend", ["reference", CPP, TRITON])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@each_module
def test_is_the_loop(make, options, backend):
    model = make(3, 4, **options).double()
    D = 2 if model.bidirectional else 1
    x = torch.randn(5, 2, 3, dtype=DOUBLE, requires_grad=True)
    hx = torch.randn(model.num_layers * D, 2, 4, dtype=DOUBLE, requires_grad=True)
    leaves = [x, hx, *model.parameters()]
    with seqaccel.backend(backend):
        output, h_n = model(x, hx)
        alone = [loop(model, x[:, b], hx[:, b]) for b in range(2)]
        wanted = tuple(torch.stack(parts, 1) for parts in zip(*alone, strict=True))
        torch.testing.assert_close((output, h_n), wanted)
        grads = torch.randn_like(output), torch.randn_like(h_n)
        found = torch.autograd.grad((output, h_n), leaves, grads)
        torch.testing.assert_close(found, torch.autograd.grad(wanted, leaves, grads))


def test_parameters_are_named_and_shaped_as_torch_has_them():
    model = nn.MinLSTM(3, 4, num_layers=2, bidirectional=True)
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert list(model.state_dict()) == [f"{name}{s}" for s in suffixes for name in ("weight_ih", "bias_ih")]
    assert model.weight_ih_l1_reverse.shape == (12, 8)
    shapes = {name: tuple(p.shape) for name, p in nn.IndRNN(3, 4).named_parameters()}
    assert shapes == {"weight_ih_l0": (4, 3), "weight_hh_l0": (4,), "bias_ih_l0": (4,)}
    assert nn.QRNN(3, 4, window=2).weight_ih_l0.shape == (12, 6)
    assert nn.QRNN(3, 4, output_gate=False, bias=False).weight_ih_l0.shape == (8, 3)


def test_starts_as_linear_layers_do():
    model = nn.IndRNN(400, 300)
    assert model.weight_ih_l0.abs().max() <= 0.05 and model.weight_ih_l0.std().item() == pytest.approx(
        0.05 / 3**0.5, rel=0.02
    )
    assert model.bias_ih_l0.abs().max() <= 0.05 < 0.9 < model.weight_hh_l0.abs().max() <= 1


@each_module
def test_every_layout_is_one(make):
    """batch_first, one sequence without a batch, packed sequences, padding, resets and offsets."""
    model = make(3, 4, num_layers=2, bidirectional=True)
    first = make(3, 4, num_layers=2, bidirectional=True, batch_first=True)
    first.load_state_dict(model.state_dict())
    lengths = [3, 5, 1]
    x, hx = torch.randn(5, 3, 3), torch.randn(4, 3, 4)
    output, h_n = model(x, hx)
    torch.testing.assert_close(first(x.transpose(0, 1), hx), (output.transpose(0, 1), h_n))
    torch.testing.assert_close(model(x[:, 1], hx[:, 1]), (output[:, 1], h_n[:, 1]))

    alone = [model(x[:length, b], hx[:, b]) for b, length in enumerate(lengths)]
    packed, c_n = model(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(packed)
    pad = torch.arange(5).unsqueeze(1) >= torch.tensor(lengths)
    masked, m_n = model(x, hx, mask_pad=pad)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(padded[:length, b], alone[b][0])
        assert (padded[length:, b] == 0).all()
        torch.testing.assert_close(c_n[:, b], alone[b][1])
    torch.testing.assert_close(masked, padded)
    torch.testing.assert_close(m_n, c_n)
    ragged, r_n = first(pack_padded_sequence(x.transpose(0, 1), torch.tensor(lengths), True, False), hx)
    torch.testing.assert_close(ragged.data, packed.data)
    torch.testing.assert_close(r_n, c_n)

    joined = torch.cat([x[:length, b] for b, length in enumerate(lengths)])
    ends = torch.tensor([0, 3, 8, 9])
    for batch in (joined, joined.unsqueeze(1)):
        found, f_n = model(batch, hx, cu_seqlens=ends)
        torch.testing.assert_close(found.view(9, 8), torch.cat([a for a, _ in alone]))
        torch.testing.assert_close(f_n, c_n)
    reset = torch.zeros(9, dtype=torch.bool)
    reset[[3, 8]] = True
    states = torch.zeros(4, 3, 4)
    states[::2, 0], states[1::2, 2] = hx[::2, 0], hx[1::2, 0]  # forwards the first one, against time the last one
    torch.testing.assert_close(model(joined, hx[:, 0], reset=reset)[0], model(joined, states, cu_seqlens=ends)[0])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_split_gives_what_one_call_gives(data):
    make = MODULES[data.draw(st.sampled_from(STREAMED))]
    chunks = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    model = make(3, 4, num_layers=2, batch_first=data.draw(st.booleans()))
    time = 1 if model.batch_first else 0
    x = torch.randn((2, sum(chunks), 3) if model.batch_first else (sum(chunks), 2, 3))
    whole, h_n = model(x)
    state, parts = model.init_state(2), []
    for chunk in x.split(chunks, time) if sum(chunks) else [x]:
        y, state = model.extend(chunk, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, time), whole)
    torch.testing.assert_close(state[0].transpose(0, 1), h_n)


@some_modules
def test_streams_step_reset_and_select(make):
    model = make(3, 4, num_layers=2)
    x = torch.randn(6, 3, 3)
    with torch.no_grad():
        state = model.init_state(3)
        for t in range(3):
            y, state = model.step(x[t], state)
            assert y.shape == (3, 4)
        mask = torch.tensor([True, False, True])
        restarted, _ = model.extend(x[3:], model.reset(state, mask))
        torch.testing.assert_close(restarted[:, [0, 2]], model(x[3:])[0][:, [0, 2]])
        torch.testing.assert_close(restarted[:, 1], model(x)[0][3:, 1])
        picked, _ = model.extend(x[3:, [2, 2]], model.select(state, torch.tensor([2, 2])))
        torch.testing.assert_close(picked, model(x)[0][3:, [2, 2]])


def test_zoneout():
    """Evaluation is the expectation of training; training keeps values as they were."""
    model = nn.QRNN(3, 50, zoneout=0.4).eval()
    x, hx = torch.randn(1, 1, 3), torch.randn(1, 1, 50)
    expected = loop(model, x[:, 0], hx[:, 0])
    torch.testing.assert_close(model(x[:, 0], hx[:, 0]), expected)
    model.train()
    states = torch.stack([model(x, hx)[1] for _ in range(400)])
    assert (states == hx).float().mean().item() == pytest.approx(0.4, abs=0.02)
    torch.testing.assert_close(states.mean(0).flatten(), expected[1].flatten(), atol=0.15, rtol=0)
    assert nn.QRNN(3, 4, zoneout=0.4).eval()(x)[0].isfinite().all()


def test_dropout_is_between_layers():
    model, x = nn.MinGRU(3, 4, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    alone = nn.MinGRU(3, 4, dropout=0.5)
    assert torch.equal(alone(x)[0], alone(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@some_modules
def test_narrow_types(make, dtype):
    model, x = make(3, 4, num_layers=2).to(dtype), torch.randn(5, 2, 3).to(dtype)
    output, h_n = model(x)
    assert output.dtype == h_n.dtype == dtype
    output.sum().backward()
    torch.testing.assert_close(output.float(), copy.deepcopy(model).float()(x.float())[0], atol=0.05, rtol=0.05)


@some_modules
def test_autocast_returns_float32(make):
    model = make(3, 4, num_layers=2, bidirectional=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n = model(torch.randn(5, 2, 3))
    assert output.dtype == h_n.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@some_modules
def test_compiles_as_one_graph(make):
    model, x = make(3, 4, num_layers=2), torch.randn(5, 2, 3)
    expected, _ = model(x)
    actual, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (actual, expected)]
    torch.testing.assert_close(*grads)


@some_modules
def test_copies_and_pickles(make):
    model, x = make(3, 4, num_layers=2), torch.randn(4, 2, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x)[0], model(x)[0])
    assert type(model).__module__ == "seqaccel.nn.scan"


def test_repr():
    assert repr(nn.QRNN(3, 4, 2, window=2)) == "QRNN(3, 4, num_layers=2, window=2)"
    assert repr(nn.IndRNN(3, 4, nonlinearity="tanh")) == "IndRNN(3, 4, nonlinearity='tanh')"


@some_modules
def test_empty_sequences_and_batches(make):
    model, hx = make(3, 4), torch.randn(1, 2, 4)
    output, h_n = model(torch.zeros(0, 2, 3), hx)
    assert output.shape == (0, 2, 4) and torch.equal(h_n, hx)
    output, h_n = model(torch.zeros(5, 0, 3))
    assert output.shape == (5, 0, 4) and h_n.shape == (1, 0, 4)


MASK = torch.zeros(4, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m([1]), TypeError, "MinGRU: expected input to be a Tensor"),
        (lambda m: m(torch.zeros(3)), ValueError, "MinGRU: Expected input to be 2D or 3D, got 1D"),
        (lambda m: m(torch.zeros(4, 2, 5)), RuntimeError, "Expected 3, got 5"),
        (lambda m: m(torch.zeros(4, 2, 3), torch.zeros(2, 4)), RuntimeError, r"Expected hidden size \(1, 2, 4\)"),
        (lambda m: m(torch.zeros(4, 2, 3), [0]), TypeError, "MinGRU: expected hx to be a Tensor or None"),
        (lambda m: m(torch.zeros(4, 2, 3).double()), TypeError, "weight to have the dtype of input"),
        (lambda m: m(torch.zeros(4, 2, 3), reset=MASK.t()), ValueError, r"reset to be bool of shape \(4, 2\)"),
        (lambda m: m(torch.zeros(4, 2, 3), mask_pad=MASK.int()), ValueError, r"mask_pad to be bool of shape \(4, 2\)"),
        (lambda m: m(torch.zeros(4, 2, 3), cu_seqlens=torch.tensor([0, 4])), ValueError, "a batch of 1"),
        (
            lambda m: m(pack_padded_sequence(torch.zeros(4, 1, 3), [4]), reset=MASK),
            ValueError,
            "no reset with a Packed",
        ),
        (lambda m: m.step(torch.zeros(1, 2, 3), m.init_state(2)), ValueError, "x_t to be one step"),
        (lambda m: m.extend(torch.zeros(1, 2, 3), torch.zeros(2, 1, 4)), TypeError, r"state to be a tuple \(h,\)"),
        (lambda m: m.extend(torch.zeros(1, 2, 3), (torch.zeros(2, 2, 4),)), RuntimeError, "Expected hidden size"),
        (lambda m: nn.MinGRU(0, 4), ValueError, "input_size must be greater than zero"),
        (lambda m: nn.MinGRU(3, 4, num_layers="1"), TypeError, "MinGRU: expected num_layers to be an int"),
        (lambda m: nn.MinGRU(3, 4, dropout=2), ValueError, "MinGRU: expected dropout to be between 0 and 1"),
        (lambda m: nn.MinGRU(3, 4, candidate="h"), ValueError, "MinGRU: expected candidate to be 'linear' or 'g'"),
        (lambda m: nn.QRNN(3, 4, window=3), ValueError, "QRNN: expected window to be 1 or 2, but got 3"),
        (lambda m: nn.QRNN(3, 4, zoneout=-1), ValueError, "QRNN: expected zoneout to be between 0 and 1"),
        (lambda m: nn.IndRNN(3, 4, nonlinearity="sin"), ValueError, "IndRNN: expected nonlinearity"),
        (lambda m: nn.IndRNN(3, 4, bidirectional=True).init_state(1), RuntimeError, "IndRNN: a bidirectional module"),
        (lambda m: nn.QRNN(3, 4, window=2).extend(torch.zeros(1, 2, 3), (MASK,)), TypeError, "QRNN: expected state"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.MinGRU(3, 4))
