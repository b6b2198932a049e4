"""The residual block of a TCN as one operator: against the published form, the reference and its parts."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import USABLE_ISAS
from test_conv import STOCK_ACTIVATIONS, run
from tolerances import assert_close, error
from torch.utils._python_dispatch import TorchDispatchMode

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn
from seqaccel.reference import conv as reference

# B, C, O, T, K, dilation: tails of tiles, taps beyond the start, few columns, one channel.
SHAPES = [
    (1, 1, 1, 1, 2, 1),
    (2, 3, 5, 7, 2, 1),
    (3, 17, 17, 129, 3, 40),
    (2, 65, 70, 151, 2, 3),
    (1, 40, 9, 3, 3, 1),
    (70, 4, 4, 2, 2, 1),
]
OPTIONS = [
    dict(),
    dict(norm=True),
    dict(norm=True, use_gate=True, bias=False),
    dict(activation="tanh", norm=True),
    dict(activation="silu", use_gate=True),
    dict(activation="leaky_relu", bias=False),
    dict(activation=None),
]


def case(shape, options, dtype=torch.float64):
    B, C, O, T, K, dilation = shape
    options = dict(options)
    norm, bias, rows = options.pop("norm", False), options.pop("bias", True), O * (1 + options.get("use_gate", False))
    sizes = {"x": (B, C, T), "weight_1": (rows, C, K), "weight_2": (O, O, K)}
    if bias:
        sizes |= {"bias_1": (rows,), "bias_2": (O,)}
    if norm:
        sizes |= {"g_1": (rows, 1, 1), "g_2": (O, 1, 1)}
    if C != O:
        sizes |= {"downsample_weight": (O, C, 1)} | ({"downsample_bias": (O,)} if bias else {})
    generator = torch.Generator().manual_seed(C + 10 * O + T)
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    for name in {"weight_1", "weight_2", "downsample_weight"} & set(tensors):
        tensors[name] /= tensors[name][0].numel() ** 0.5
    return {name: t.to(dtype) for name, t in tensors.items()}, {"dilation": dilation, **options}


def on(backend):
    def function(x, weight_1, weight_2, bias_1=None, **arguments):
        with seqaccel.backend(backend):
            return SF.temporal_block(x, weight_1, bias_1, weight_2, **arguments)

    return function


def published(
    x, weight_1, weight_2, bias_1=None, bias_2=None, g_1=None, g_2=None, downsample_weight=None, downsample_bias=None,
    *, dilation, activation="relu", use_gate=False,
):  # fmt: skip
    """As locuslab's code and pytorch-tcn have it: padded on both sides and cut."""

    def convolution(x, v, g, bias):
        weight = v if g is None else v * g / v.flatten(1).norm(dim=1)[:, None, None]
        padding = (weight.shape[2] - 1) * dilation
        return F.conv1d(x, weight, bias, padding=padding, dilation=dilation)[..., : x.shape[2]]

    phi = STOCK_ACTIVATIONS[activation]
    z = (STOCK_ACTIVATIONS["glu"] if use_gate else phi)(convolution(x, weight_1, g_1, bias_1))
    r = x if downsample_weight is None else F.conv1d(x, downsample_weight, downsample_bias)
    return phi(r + phi(convolution(z, weight_2, g_2, bias_2)))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference_is_the_published_block(options, backend):
    for shape in SHAPES:
        tensors, call = case(shape, options)
        expected = run(published, tensors, call)
        for name, value in run(on(backend), tensors, call).items():
            assert error(value, expected[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cpp_matches_reference(options, isa, poison):
    for shape in SHAPES:
        tensors, call = case(shape, options)
        expected = run(on("reference"), tensors, call)
        narrow = {name: t.float() for name, t in tensors.items()}
        exact = run(on("reference"), {name: t.double() for name, t in narrow.items()}, call)
        with seqaccel.backends.isa(isa):
            for name, value in run(on("cpp"), tensors, call).items():
                assert error(value, expected[name]) < 1e-13, (shape, name)
            for name, value in run(on("cpp"), narrow, call).items():
                assert_close(value, exact[name], "conv_block", torch.float32, backward=name != "y", what=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_dropout_is_that_of_the_reference_and_of_two_convolutions(options):
    tensors, call = case((2, 17, 20, 61, 3, 2), options)

    def composed(x, weight_1, weight_2, bias_1=None, bias_2=None, g_1=None, g_2=None, downsample_weight=None,
                 downsample_bias=None, *, dilation, dropout, activation="relu", use_gate=False):  # fmt: skip
        weights = [reference.weight_norm(v, g) for v, g in ((weight_1, g_1), (weight_2, g_2))]
        options = {"dilation": dilation, "dropout": dropout}
        with seqaccel.backend("cpp"):
            z = SF.causal_conv1d(x, weights[0], bias_1, activation="glu" if use_gate else activation, **options)
            r = SF.causal_conv1d(x, downsample_weight, downsample_bias)
            s = SF.causal_conv1d(z, weights[1], bias_2, activation=activation, residual=r, **options)
        return STOCK_ACTIVATIONS[activation](s)

    results = []
    for function in (on("cpp"), on("reference"), composed):
        torch.manual_seed(11)
        results.append(run(function, tensors, {**call, "dropout": 0.3}))
    for other in results[1:]:
        for name, value in results[0].items():
            assert error(value, other[name]) < 1e-13, name


def test_dropout_keeps_its_share_and_scales_it():
    x, weight = torch.ones(4, 50, 200), torch.eye(50)[..., None]
    for p in (0.25, 0.5, 1.0):
        seed = torch.tensor([3, 4])
        none = [None] * 2
        operands = (x, weight, *none, weight, *none, *none, seed, None, 1, "none", "none", False, p, True)
        y, z, *_ = torch.ops.seqaccel.temporal_block_forward(*operands)
        kept = (z != 0).double().mean().item()
        assert abs(kept - (1 - p)) < 0.01
        again = (y != x).double().mean().item()  # kept twice, by independent masks
        assert abs(again - (1 - p) ** 2) < 0.01
        scale = 1 / (1 - p) if p < 1 else 0.0
        assert torch.equal(z.unique(), torch.tensor([0.0, scale]).unique())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_every_order(backend):
    for options in (dict(norm=True, activation="tanh"), dict(use_gate=True, activation="sigmoid")):
        tensors, call = case((2, 3, 4, 9, 2, 2), options)
        names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

        def function(*arguments, names=names, call=call):
            torch.manual_seed(7)
            return on(backend)(**dict(zip(names, arguments, strict=True)), **call, dropout=0.25)

        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("O", [4, 6])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_any_part_of_the_gradients(activation, O, poison):
    tensors, call = case((2, 4, O, 11, 3, 2), dict(norm=True, activation=activation))
    everything = run(on("cpp"), tensors, call)
    grad = torch.randn(2, O, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = [{"x"}, {"x", "weight_1"}, {"x", "weight_1", "g_1", "bias_1"}, {"g_2", "g_1"}, {"weight_1", "weight_2"}]
    parts += [{name} for name in tensors] + [set(tensors) - {name} for name in tensors]
    for left_out in parts:
        given = {name: t.clone().requires_grad_(name not in left_out) for name, t in tensors.items()}
        wanted = {name: t for name, t in given.items() if t.requires_grad}
        grads = torch.autograd.grad(on("cpp")(**given, **call), list(wanted.values()), grad)
        for name, found in zip(wanted, grads, strict=True):
            assert error(found, everything[f"grad of {name}"]) < 1e-13, (left_out, name)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_empty(backend):
    for B, T in ((0, 5), (2, 0)):
        tensors, call = case((B, 3, 4, T, 2, 1), dict(norm=True))
        found = run(on(backend), tensors, call)
        assert found["y"].shape == (B, 4, T)
        for name, t in tensors.items():
            assert torch.equal(found[f"grad of {name}"], torch.zeros_like(t)), name


def test_strides_do_not_matter():
    tensors, call = case((3, 6, 6, 20, 3, 2), dict(norm=True))
    expected = run(on("cpp"), tensors, call)
    strided = {name: t.transpose(0, -1).contiguous().transpose(0, -1) for name, t in tensors.items()}
    grad = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = run(on("cpp"), strided, call, grad.transpose(0, 1).contiguous().transpose(0, 1))
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    one = tensors | {"x": tensors["x"][:1, :1].expand(3, 6, 20), "bias_1": tensors["bias_1"][:1].expand(6)}
    copied = {name: t.contiguous() for name, t in one.items()}
    assert torch.equal(on("cpp")(**one, **call), on("cpp")(**copied, **call))


def test_nothing_after_a_step_moves_it():
    tensors, call = case((2, 17, 20, 70, 3, 4), dict(norm=True), torch.float32)
    y = on("cpp")(**tensors, **call)
    for t in (1, 20, 64, 69):
        changed = tensors["x"].clone()
        changed[..., t:] = float("nan")
        assert torch.equal(on("cpp")(**tensors | {"x": changed}, **call)[..., :t], y[..., :t])


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_block_is_one_operator_and_one_node():
    block = snn.TemporalBlock(3, 5, 3, 2)
    x = torch.randn(2, 3, 20)
    y = block(x)
    assert y.grad_fn.name() == "_TemporalBlockBackward"
    parents = {node.name() for node, _ in y.grad_fn.next_functions if node is not None}
    assert parents == {"torch::autograd::AccumulateGrad"}
    with Seen() as seen:
        block(x).sum().backward()
    ours = [name for name in seen.names if "seqaccel" in name]
    assert ours == ["seqaccel.temporal_block_forward.default", "seqaccel.temporal_block_backward.default"]
    assert not [name for name in seen.names if "conv" in name or "weight_norm" in name or "add" in name]


def both_ways(block, x):
    """Output and gradients by one operator and, behind a hook, by one for each convolution."""
    results = []
    handle = None
    for hooked in (False, True):
        if hooked:
            handle = block.conv1.register_forward_hook(lambda *_: None)
        torch.manual_seed(5)
        y = block(x)
        grads = torch.autograd.grad(y, [x, *block.parameters()], torch.cos(y.detach()))
        results.append([y, *grads])
    handle.remove()
    return results


@pytest.mark.parametrize("options", [{}, {"use_norm": None}, {"use_gate": True}, {"activation": "gelu"}], ids=str)
def test_module_with_a_hook_gives_the_same(options):
    for channels in (3, 5):
        block = snn.TemporalBlock(channels, 5, 3, 2, dropout=0.4, dtype=torch.float64, **options)
        x = torch.randn(2, channels, 20, dtype=torch.float64, requires_grad=True)
        for found, expected in zip(*both_ways(block, x), strict=True):
            assert error(found, expected) < 1e-13


def test_module_sees_what_became_of_its_convolutions():
    x = torch.randn(2, 5, 20)
    calls = []

    def block():
        return snn.TemporalBlock(5, 5, 3, 2, dropout=0.0)

    for hook in ("register_forward_pre_hook", "register_forward_hook"):
        for name in ("conv1", "conv2"):
            b = block()
            getattr(getattr(b, name), hook)(lambda *_: calls.append(1))
            b(x)
            assert calls.pop() == 1 and not calls

    class Doubled(torch.nn.Module):
        def forward(self, x, **options):
            return 2 * x

    b = block()
    b.conv1 = Doubled()
    assert torch.equal(b(x), torch.relu(x + b.conv2(2 * x)))
    b = block()
    b.conv1.activation = "tanh"
    assert torch.allclose(b(x), torch.relu(x + b.conv2(b.conv1(x))), atol=1e-6)
    b = block()
    b.conv2.padding_mode = "replicate"
    assert torch.allclose(b(x), torch.relu(x + b.conv2(b.conv1(x))), atol=1e-6)
    b = block()
    torch.nn.utils.parametrizations.spectral_norm(b.conv2)  # over weight norm
    b.eval()
    assert torch.allclose(b(x), torch.relu(x + b.conv2(b.conv1(x))), atol=1e-6)
    b = block()
    for conv in (b.conv1, b.conv2):
        torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    assert torch.allclose(b(x), torch.relu(x + b.conv2(b.conv1(x))), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_and_autocast(dtype):
    block, x = snn.TemporalBlock(4, 6, 3, 2, dropout=0.0), torch.randn(2, 4, 30)
    expected = block(x)
    assert error(block.to(dtype)(x.to(dtype)).double(), expected.double()) < 0.05
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            found = block.float()(x)
        assert found.dtype == dtype and error(found.double(), expected.double()) < 0.05


def test_operators_refuse_what_would_read_out_of_bounds():
    forward, backward = torch.ops.seqaccel.temporal_block_forward, torch.ops.seqaccel.temporal_block_backward
    x, v1, v2, g, b = (
        torch.randn(2, 4, 9),
        torch.randn(6, 4, 3),
        torch.randn(6, 6, 2),
        torch.randn(6, 1, 1),
        torch.ones(6),
    )
    good = dict(x=x, weight_1=v1, g_1=g, bias_1=b, weight_2=v2, g_2=g, bias_2=b)
    good |= dict(downsample_weight=torch.randn(6, 4, 1), downsample_bias=b, seed=None, reset=None)
    options = (1, "relu", "relu", True, 0.0)
    y, z, saved_1, saved_2 = forward(*good.values(), *options, True)
    bad = [("x", x[0]), ("x", x[:, :3]), ("weight_2", v2[:5]), ("weight_1", v1[..., 0]), ("weight_2", v2[:, :5]),
           ("g_1", b), ("g_2", g[:3]), ("bias_1", b[:1]), ("bias_2", b.double()), ("downsample_weight", v1),
           ("downsample_weight", None), ("downsample_bias", g), ("reset", torch.zeros(2, 8, dtype=torch.bool)),
           ("reset", torch.zeros(2, 9))]  # fmt: skip
    for name, value in bad:
        with pytest.raises(RuntimeError, match=name):
            forward(*{**good, name: value}.values(), *options, True)
    none = ("relu", "relu", True, 0.0)
    refused = [(0, *none), (1 << 60, *none), (1, "elu", *none[1:]), (1, "relu", "glu", True, 0.0)]
    for wrong in [*refused, (1, *none[:3], 0.5), (1, *none[:3], 2.0)]:
        with pytest.raises(RuntimeError):
            forward(*good.values(), *wrong, True)
    with pytest.raises(RuntimeError, match="seed"):
        forward(*{**good, "seed": torch.ones(1, dtype=torch.int64)}.values(), 1, "relu", "relu", True, 0.5, True)
    saved = dict(grad_y=torch.ones_like(y), y=y, z=z, saved_1=saved_1, saved_2=saved_2)
    inputs = {name: t for name, t in good.items() if "bias" not in name}
    backward(*saved.values(), *inputs.values(), *options, 511)
    bad = [("grad_y", y[:1]), ("y", None), ("y", y[..., 1:]), ("z", z[:1]), ("saved_1", z), ("saved_2", z)]
    for name, value in [*bad, ("saved_2", saved_2[:1]), ("g_1", None), ("downsample_weight", None)]:
        with pytest.raises(RuntimeError):
            backward(*{**saved, **inputs, name: value}.values(), *options, 511)


@pytest.mark.parametrize("make", [lambda: snn.TCN(3, [4], dropout=0.1).eval(), lambda: snn.CausalConv1d(3, 4, 2)])
def test_compiles_with_dynamic_shapes_and_floats(make):
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 3, 7)
    torch.testing.assert_close(compiled(x), module(x))
