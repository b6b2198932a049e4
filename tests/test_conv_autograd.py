"""The autograd node of causal_conv1d in C++ (csrc/autograd) does what the one in Python does."""

import pytest
import torch
from test_conv import EPILOGUES, case

import seqaccel.functional as SF
from seqaccel import _extension

pytestmark = pytest.mark.skipif(
    _extension.autograd is None and _extension.cpp_error is not None, reason="the package was built without extensions"
)
BOTH = [True, False]
SHAPE = (2, 6, 4, 20, 3, 2, 1)
RESET = torch.arange(40).view(2, 20) % 13 == 4


def call(compiled, monkeypatch, tensors, **options):
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
    y = SF.causal_conv1d(**tensors, **options)
    monkeypatch.undo()
    if y.requires_grad:
        assert ("CausalConvolution" in y.grad_fn.name()) == compiled, y.grad_fn.name()
    return y


def problem(epilogue, dtype=torch.float32, shape=SHAPE):
    tensors, options = case(shape, epilogue, dtype)
    return {name: t.requires_grad_() for name, t in tensors.items()}, options


@pytest.mark.parametrize("dropout, reset", [(0.0, None), (0.3, None), (0.3, RESET)], ids=["", "dropout", "reset"])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_same_bits(epilogue, dropout, reset, monkeypatch):
    tensors, options = problem(epilogue)
    options |= {"dropout": dropout, "reset": reset}
    found = []
    for compiled in BOTH:
        torch.manual_seed(0)
        y = call(compiled, monkeypatch, tensors, **options)
        with torch.no_grad():
            torch.manual_seed(0)
            plain = call(compiled, monkeypatch, tensors, **options)
        grads = torch.autograd.grad(y, tensors.values(), torch.linspace(-1, 1, y.numel()).view_as(y))
        found.append([y, plain, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and torch.equal(ours, theirs)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "initial_state"])
@pytest.mark.parametrize("output_activation", [None, "relu"])
def test_each_gradient_alone(wanted, output_activation, monkeypatch):
    epilogue = dict(activation="silu", residual=True, initial_state=True, output_activation=output_activation)
    tensors, options = problem(epilogue)
    found = []
    for compiled in BOTH:
        given = {name: t if name == wanted else t.detach() for name, t in tensors.items()}
        y = call(compiled, monkeypatch, given, **options)
        found.append(torch.autograd.grad(y.square().sum(), given[wanted])[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("reset", [None, torch.tensor([[False, False, True, False]])], ids=["", "reset"])
def test_second_derivatives_and_batched_gradients(reset, monkeypatch):
    epilogue = dict(activation="tanh", residual=True, initial_state=True)
    tensors, options = problem(epilogue, torch.float64, (1, 2, 2, 4, 2, 1, 1))
    options["reset"] = reset
    assert torch.autograd.gradgradcheck(
        lambda *values: call(True, monkeypatch, dict(zip(tensors, values, strict=True)), **options),
        tuple(tensors.values()),
    )
    y = call(True, monkeypatch, tensors, **options)
    outer = torch.randn(3, *y.shape, dtype=y.dtype)
    batched = torch.autograd.grad(y, tensors.values(), outer, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(outer):
        for ours, one in zip(batched, torch.autograd.grad(y, tensors.values(), grad, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], one)


def test_an_output_changed_in_place_is_an_error(monkeypatch):
    tensors, options = problem(dict(activation="relu"))
    for compiled in BOTH:
        y = call(compiled, monkeypatch, tensors, **options)
        y.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_what_it_declines():
    """Arguments that Python has to serve or to refuse."""
    x, weight = torch.randn(1, 2, 5), torch.randn(4, 2, 3)
    node = _extension.autograd.causal_conv1d
    plain = dict(stride=1, dilation=1, groups=1, activation="relu", dropout=0.0, output_activation=None)

    def asked(x=x, weight=weight, bias=None, residual=None, initial_state=None, reset=None, **changed):
        return node(x, weight, bias, residual, initial_state, reset, *(plain | changed).values())

    assert asked() is not None
    assert asked(reset=torch.zeros(1, 5, dtype=torch.bool)) is not None
    for changed in (
        dict(stride=2),
        dict(stride=True),
        dict(dilation=0),
        dict(dilation=1.0),
        dict(dilation=1 << 70),
        dict(groups=2),
        dict(activation="elu"),
        dict(activation=1),
        dict(dropout=0),
        dict(dropout=1.5),
        dict(dropout=float("nan")),
        dict(output_activation="tanh"),
        dict(x=x.int(), weight=weight.int()),
        dict(x=x.double()),
        dict(x=x[0]),
        dict(x=x.to("meta")),
        dict(x=[1]),
        dict(x=None),
        dict(bias=torch.zeros(3)),
        dict(residual=torch.zeros(1, 4, 4)),
        dict(initial_state=torch.zeros(1, 2, 3)),
        dict(reset=torch.zeros(1, 5)),
        dict(reset=torch.zeros(1, 4, dtype=torch.bool)),
        dict(reset=torch.zeros(1, 5, dtype=torch.bool, device="meta")),
        dict(reset=[[False] * 5]),
        dict(weight=torch.randn(4, 2, 0)),
        dict(weight=torch.randn(4, 2, 600)),
        dict(activation="glu", weight=torch.randn(3, 2, 3)),
    ):
        assert asked(**changed) is None, changed
