"""The closed-form continuous-time network: every backend, the modules, and ncps's layer in a model."""

import pytest
import torch
from instruction_sets import ISAS, isa_fixture
from torch import nn

import seqaccel
from seqaccel.functional import cfc

isa = isa_fixture(ISAS)
MODES = ["default", "no_gate", "pure"]


class LeCun(nn.Module):
    def forward(self, x):
        return 1.7159 * torch.tanh(0.666 * x)


class Cell(nn.Module):
    """ncps.torch.CfCCell, from its paper."""

    def __init__(self, inputs, hidden, mode, activation, units, layers):
        super().__init__()
        self.mode, self.backbone_layers, parts, width = mode, layers, [], inputs + hidden
        for _ in range(layers):
            parts += [nn.Linear(width, units), activation()]
            width = units
        self.backbone = nn.Sequential(*parts) if parts else None
        self.ff1 = nn.Linear(width, hidden)
        if mode == "pure":
            self.w_tau, self.A = nn.Parameter(torch.randn(1, hidden)), nn.Parameter(torch.randn(1, hidden))
        else:
            self.ff2, self.time_a, self.time_b = (nn.Linear(width, hidden) for _ in range(3))

    def forward(self, x, h, span):
        v = torch.cat([x, h], 1)
        v = v if self.backbone is None else self.backbone(v)
        if self.mode == "pure":
            f = self.ff1(v)
            return self.A - self.A * torch.exp(-span * (self.w_tau.abs() + f.abs())) * f
        f, g = self.ff1(v).tanh(), self.ff2(v).tanh()
        t = (self.time_a(v) * span + self.time_b(v)).sigmoid()
        return f + t * g if self.mode == "no_gate" else f * (1 - t) + t * g


class Layer(nn.Module):
    """ncps.torch.CfC."""

    def __init__(self, *args, batch_first=True, return_sequences=True):
        super().__init__()
        self.rnn_cell, self.fc, self.use_mixed = Cell(*args), nn.Linear(args[1], 3), False
        self.batch_first, self.return_sequences, self.state_size = batch_first, return_sequences, args[1]

    def forward(self, input, hx=None, timespans=None):
        x = input.transpose(0, 1) if self.batch_first else input
        spans = torch.ones(x.shape[:2]) if timespans is None else timespans
        spans = spans.t() if self.batch_first and timespans is not None else spans
        h, outputs = x.new_zeros(x.shape[1], self.state_size) if hx is None else hx, []
        for x_t, span in zip(x, spans, strict=True):
            h = self.rnn_cell(x_t, h, span.unsqueeze(1))
            outputs.append(self.fc(h))
        output = torch.stack(outputs, 1 if self.batch_first else 0) if self.return_sequences else outputs[-1]
        return output, h


def problem(mode, units, T=5, B=3, H=10, dtype=torch.float64):
    """x, h_0, weights, biases, timespans, w_tau and A."""
    rows = [*units, H * (1 if mode == "pure" else 4)]
    weights = [torch.randn(n, k, dtype=dtype) * k**-0.5 for n, k in zip(rows, [H, *units], strict=True)]
    biases = [torch.randn(n, dtype=dtype) for n in rows[1:]]
    vectors = [torch.randn(H, dtype=dtype) for _ in range(2)] if mode == "pure" else [None, None]
    x, h_0 = torch.randn(T, B, rows[0], dtype=dtype), torch.randn(B, H, dtype=dtype)
    return x, h_0, weights, biases, torch.rand(T, B, dtype=dtype) + 0.3, *vectors


def results(backend, arguments, mode, activation, grad):
    """The output, and the gradient of every tensor."""
    leaves = torch.utils._pytree.tree_map(lambda t: None if t is None else t.clone().requires_grad_(), arguments)
    *operands, w_tau, A = leaves
    with seqaccel.backend(backend):
        output = cfc(*operands, mode=mode, activation=activation, w_tau=w_tau, A=A)
        wanted = [t for t in torch.utils._pytree.tree_leaves(leaves) if t is not None]
        return [output, *torch.autograd.grad(output, wanted, grad, materialize_grads=True, allow_unused=True)]


@pytest.mark.parametrize("spans", [True, False])
@pytest.mark.parametrize(
    "units, sizes", [([7], (5, 3, 10)), ([], (3, 1, 4)), ([70, 33], (4, 50, 19)), ([128], (30, 9, 64))], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_cpp_is_the_reference(isa, poison, mode, units, sizes, spans):
    arguments = list(problem(mode, units, *sizes))
    if not spans:
        arguments[4] = None
    activation = ["lecun_tanh", "tanh", "relu"][len(units)]
    grad = torch.randn(*sizes, dtype=torch.float64)
    expected = results("reference", arguments, mode, activation, grad)
    for ours, exact in zip(results("cpp", arguments, mode, activation, grad), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    narrow = [None if t is None else [u.float() for u in t] if isinstance(t, list) else t.float() for t in arguments]
    for ours, exact in zip(results("cpp", narrow, mode, activation, grad.float()), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item() + 1e-5)
    with torch.no_grad(), seqaccel.backend("cpp"):
        *operands, w_tau, A = arguments
        output = cfc(*operands, mode=mode, activation=activation, w_tau=w_tau, A=A)
    torch.testing.assert_close(output, expected[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype):
    arguments = problem("default", [7], dtype=dtype)
    wide = torch.utils._pytree.tree_map(lambda t: None if t is None else t.float(), arguments)
    torch.testing.assert_close(cfc(*arguments[:5]), cfc(*wide[:5]).to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers, activation", [(0, LeCun), (1, LeCun), (2, nn.ReLU)])
def test_ncps_in_a_model(mode, layers, activation):
    """Converted, with its own parameters, it gives the same results; so does ours with its state_dict."""
    kind = type("CfC", (Layer,), {"__module__": "ncps.torch.cfc"})
    for options in ({}, {"batch_first": False}, {"return_sequences": False}):
        model = kind(4, 6, mode, activation, 5, layers, **options)
        model.rnn_cell.backbone_layers = layers
        x, h_0 = torch.randn(5, 5, 4), torch.randn(5, 6)
        one, spans = torch.randn(1, 5, 4) if model.batch_first else torch.randn(5, 1, 4), torch.rand(5)
        spans = spans.view(1, 5) if model.batch_first else spans.view(5, 1)
        calls = ((x,), (x, h_0), (one, None, spans))
        expected = [model(*call) for call in calls]
        seqaccel.convert(model)
        assert isinstance(model, Layer) and type(model) is not kind
        for call, wanted in zip(calls, expected, strict=True):
            torch.testing.assert_close(model(*call), wanted)
        assert type(seqaccel.revert(model)) is kind
    ours = seqaccel.nn.CfC(4, 6, mode, "relu" if activation is nn.ReLU else "lecun_tanh", 5, layers)
    ours.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("fc.")})
    model.fc, model.batch_first, model.return_sequences = nn.Identity(), False, True
    spans = torch.rand(5, 5)
    torch.testing.assert_close(ours(x, h_0, spans), model(x, h_0, spans))


def test_convert_says_why_not():
    kind = type("CfC", (Layer,), {"__module__": "ncps.torch.cfc"})
    mixed, other = kind(4, 6, "default", LeCun, 5, 1), kind(4, 6, "default", nn.SiLU, 5, 1)
    mixed.use_mixed = True
    for model, reason in ((mixed, "mixed_memory"), (other, "SiLU")):
        _, report = seqaccel.convert(model, report=True)
        assert reason in report.rows[0].reason and type(model) is kind


@pytest.mark.parametrize("batch_first", [False, True])
def test_module(batch_first):
    """A call, chunks, steps and the cell in a loop agree; so does one sequence without a batch."""
    module = seqaccel.nn.CfC(4, 6, backbone_units=5, backbone_layers=2, batch_first=batch_first)
    x, spans = torch.randn(7, 3, 4), torch.rand(7, 3)
    swap = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    output, h_n = module(swap(x), None, swap(spans))
    state, h, parts = module.init_state(3), None, []
    for first, count in ((0, 2), (2, 0), (2, 4)):
        part, state = module.extend(
            swap(x[first : first + count]), state, timespans=swap(spans[first : first + count])
        )  # fmt: skip
        parts.append(swap(part))
    y, state = module.step(x[6], state, spans[6])
    torch.testing.assert_close(torch.cat([*parts, y[None]]), swap(output))
    torch.testing.assert_close(state[0], h_n)
    for x_t, span in zip(x, spans, strict=True):
        h = module.rnn_cell(x_t, h, span)
    torch.testing.assert_close(h, h_n)
    torch.testing.assert_close(module(x[:, 1], None, spans[:, 1]), (swap(output)[:, 1], h_n[1]))
    torch.testing.assert_close(module.rnn_cell(x[0, 1], None, spans[0, 1]), swap(output)[0, 1])
    assert torch.equal(module.reset(state, torch.tensor([True, False, True]))[0][[0, 2]], torch.zeros(2, 6))


def test_gradgradcheck():
    arguments = problem("pure", [3], T=2, B=1, H=2)
    tensors = [t.requires_grad_() for t in torch.utils._pytree.tree_leaves(arguments)]

    def call(x, h_0, first, second, bias, spans, w_tau, A):
        return cfc(x, h_0, [first, second], [bias], spans, mode="pure", w_tau=w_tau, A=A)

    assert torch.autograd.gradcheck(call, tensors) and torch.autograd.gradgradcheck(call, tensors)
