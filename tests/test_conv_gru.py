"""A convolutional GRU on a grid: the operator on every backend, the module and the Neural GPU."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import USABLE_ISAS
from test_conv import run
from tolerances import assert_close, error

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn

# B, C, (W, N), taps of the gates, taps of the candidate: kernels larger than the grid, one row, one column, tails of
# tiles, many tiles.
SHAPES = [
    (1, 1, (1, 1), (1, 1), (1, 1)),
    (2, 3, (4, 7), (3, 3), (3, 3)),
    (1, 7, (5, 33), (5, 3), (3, 7)),
    (2, 5, (2, 3), (7, 9), (9, 5)),
    (3, 4, (1, 20), (1, 3), (3, 1)),
    (2, 6, (9, 1), (3, 3), (5, 1)),
    (1, 9, (8, 16), (3, 1), (1, 5)),
    (2, 24, (4, 65), (3, 3), (3, 3)),
    (1, 40, (3, 2), (3, 3), (3, 3)),
    (1, 130, (2, 2), (3, 1), (3, 1)),
]
GATES = ("hard", "sigmoid")
each_gate = pytest.mark.parametrize("gates", GATES)


def case(shape, dtype=torch.float64, bias=True):
    """Arguments of gates of all kinds: some of the saturating ones are 0, some 1."""
    B, C, grid, gate_taps, taps = shape
    generator = torch.Generator().manual_seed(C + 10 * B)
    sizes = {"x": (B, C, *grid), "weight_gates": (2 * C, C, *gate_taps), "weight_candidate": (C, C, *taps)}
    sizes |= {"bias_gates": (2 * C,), "bias_candidate": (C,)} if bias else {}
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    for name, scale in (("weight_gates", 3.0), ("weight_candidate", 1.0)):
        tensors[name] *= scale / tensors[name][0].numel() ** 0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def on(backend):
    def function(bias_gates=None, **arguments):
        with seqaccel.backend(backend):
            return SF.convolutional_gru(bias_gates=bias_gates, **arguments)

    return function


def plain(x, weight_gates, weight_candidate, bias_gates=None, bias_candidate=None, gates="hard"):
    """By torch's own convolution; u and r apart."""

    def conv(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    biases = (None, None) if bias_gates is None else bias_gates.chunk(2)
    values = [torch.sigmoid(conv(x, w, b)) for w, b in zip(weight_gates.chunk(2), biases, strict=True)]
    if gates == "hard":
        values = [torch.clamp(1.2 * g - 0.1, 0, 1) for g in values]
    u, r = values
    return u * x + (1 - u) * torch.tanh(conv(r * x, weight_candidate, bias_candidate))


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@each_gate
def test_every_backend_is_the_plain_composition(backend, gates):
    for shape in SHAPES:
        for bias in (True, False):
            tensors = case(shape, bias=bias)
            expected = run(plain, tensors, {"gates": gates})
            for name, value in run(on(backend), tensors, {"gates": gates}).items():
                assert error(value, expected[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("isa", USABLE_ISAS)
@each_gate
def test_cpp_matches_reference(isa, gates, poison):
    for shape in SHAPES:
        narrow = case(shape, torch.float32)
        exact = run(on("reference"), {name: t.double() for name, t in narrow.items()}, {"gates": gates})
        with seqaccel.backends.isa(isa):
            for name, value in run(on("cpp"), narrow, {"gates": gates}).items():
                assert_close(value, exact[name], "conv_gru", torch.float32, backward=name.startswith("grad"), what=name)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@each_gate
def test_gradients_of_every_order(backend, gates):
    for shape in ((1, 2, (2, 3), (3, 3), (1, 3)), (2, 1, (3, 1), (3, 1), (3, 3))):
        tensors = case(shape)
        names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

        def function(*arguments, names=names):
            return on(backend)(**dict(zip(names, arguments, strict=True)), gates=gates)

        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


def test_gradients_alone():
    """Each gradient is the same whichever others are asked for."""
    tensors = case(SHAPES[1])
    expected = run(on("cpp"), tensors, {})
    for name in tensors:
        inputs = {key: t.clone().requires_grad_(key == name) for key, t in tensors.items()}
        y = on("cpp")(**inputs)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y.backward(grad)
        assert torch.equal(inputs[name].grad, expected[f"grad of {name}"]), name


def test_saturated_gates_keep_the_state():
    """A bias of 100 makes hard update gates 1: the state stays bit for bit, and nothing reaches the weights."""
    tensors = case(SHAPES[1], torch.float32)
    tensors["bias_gates"] += torch.cat([torch.full((3,), 100.0), torch.zeros(3)])
    found = run(on("cpp"), tensors, {})
    assert torch.equal(found["y"], tensors["x"])
    for name in ("weight_gates", "bias_gates", "weight_candidate", "bias_candidate"):
        assert not found[f"grad of {name}"].any()


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_empty(backend):
    for size in ((0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (2, 0, 5, 6)):
        C = size[1]
        tensors = {"x": torch.randn(size), "weight_gates": torch.randn(2 * C, C, 3, 3), "bias_gates": torch.ones(2 * C)}
        found = run(on(backend), tensors | {"weight_candidate": torch.randn(C, C, 3, 3)}, {})
        assert found["y"].shape == size and found["grad of weight_gates"].shape == (2 * C, C, 3, 3)
        assert not found["grad of weight_gates"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_16_bit_values_have_gates_of_float32(dtype, backend):
    tensors = case(SHAPES[2], dtype)
    exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, {})
    found = run(on(backend), tensors, {})
    assert found["y"].dtype == dtype
    assert error(found["y"], exact["y"]) < torch.finfo(dtype).eps * (1 if backend == "cpp" else 4)


def test_nan_stays_within_the_kernel():
    tensors = case(SHAPES[1], torch.float32)
    tensors["x"][0, 1, 0, 0] = torch.nan
    tensors["weight_candidate"].zero_()
    y, exact = on("cpp")(**tensors), on("reference")(**tensors)
    assert torch.equal(y.isnan(), exact.isnan()) and y[1].isfinite().all() and y[0, :, :, 4:].isfinite().all()


def test_the_unit():
    torch.manual_seed(0)
    unit = snn.ConvolutionalGRU(6, (3, 5)).double()
    assert repr(unit) == "ConvolutionalGRU(6, kernel_size=(3, 5), gates='hard')"
    x = torch.randn(2, 6, 4, 7, dtype=torch.float64)
    weights = dict(unit.named_parameters())
    torch.testing.assert_close(unit(x), plain(x, **weights))
    torch.testing.assert_close(unit(x[0]), unit(x)[0])
    assert (unit.bias_gates == 1).all() and (unit.bias_candidate == 0).all()
    spread = unit.weight_gates.detach().square().mean() * unit.weight_gates[0].numel()
    assert 0.8 < spread < 1.2
    bare = snn.ConvolutionalGRU(6, gates="sigmoid", bias=False).double()
    torch.testing.assert_close(bare(x), plain(x, bare.weight_gates, bare.weight_candidate, gates="sigmoid"))
    with pytest.raises(ValueError, match="kernel_size to be odd"):
        snn.ConvolutionalGRU(6, (3, 4))


def test_the_neural_gpu():
    torch.manual_seed(0)
    model = snn.NeuralGPU(5, 6, width=3, output_vocabulary=4, dropout=0.5).double()
    tokens = torch.randint(5, (2, 7))
    with torch.no_grad():
        model.eval()
        grid = torch.zeros(2, 6, 3, 7, dtype=torch.float64)
        grid[:, :, 0] = model.embedding(tokens).transpose(1, 2)
        for _ in range(7):
            for layer in model.layers:
                grid = plain(grid, **dict(layer.named_parameters()))
        expected = grid[:, :, 0].transpose(1, 2) @ model.output.weight.t() + model.output.bias
        torch.testing.assert_close(model(tokens), expected)
        torch.testing.assert_close(model(tokens, steps=7), expected)
        model.train()
        assert not torch.equal(model(tokens), model(tokens))
        first = model(tokens, steps=0)
        torch.testing.assert_close(first, model.output(model.embedding(tokens)))
    with pytest.raises(ValueError, match="tokens to be 2-D"):
        model(tokens[0])
    with pytest.raises(ValueError, match="steps"):
        model(tokens, steps=-1)


def test_memory_of_the_backward():
    """x, the gates and the candidate: 4 values for each of x."""
    x = torch.randn(2, 8, 4, 9, requires_grad=True)
    unit, kept = snn.ConvolutionalGRU(8), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        unit(x)
    parameters = {p.data_ptr() for p in unit.parameters()}
    assert sum(t.numel() for t in kept if t.data_ptr() not in parameters) == 4 * x.numel()
