"""Dilated causal convolutions: the operator on every backend."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import USABLE_ISAS
from tolerances import assert_as_good_as, assert_as_good_on_average, assert_close, error, mean_error

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn
from seqaccel.functional.conv import ACTIVATIONS
from seqaccel.reference import conv as reference
from seqaccel.reference.conv import GATED

# B, C, O, T, K, dilation, groups: every tail of a register tile, many panels, taps beyond the start, few columns, wide
# layers over few steps.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 5, 7, 2, 1, 1),
    (1, 7, 13, 64, 3, 2, 1),
    (3, 17, 6, 129, 3, 40, 1),
    (2, 65, 70, 151, 2, 3, 1),
    (1, 130, 9, 33, 5, 8, 1),
    (2, 6, 10, 100, 3, 5, 2),
    (2, 12, 12, 700, 4, 3, 12),
    (3, 5, 15, 40, 3, 30, 5),
    (1, 40, 70, 3, 3, 1, 1),
    (8, 20, 12, 1, 3, 2, 1),
    (70, 4, 4, 2, 2, 1, 2),
    (40, 80, 70, 1, 7, 1, 1),
    (70, 200, 180, 1, 3, 1, 1),
    (2, 96, 130, 16, 5, 4, 1),
]
REAL_SHAPES = [
    (4, 96, 150, 640, 3, 16, 1),
    (2, 64, 64, 1024, 3, 4, 1),
    (2, 150, 150, 512, 6, 1, 1),
    (2, 64, 64, 512, 4, 2, 4),
    (2, 128, 128, 512, 4, 2, 128),
]
EPILOGUES = [
    dict(),
    dict(activation="relu"),
    dict(activation="relu", residual=True, output_activation="relu"),
    dict(activation="tanh", initial_state=True),
    dict(activation="sigmoid", residual=True),
    dict(activation="silu", initial_state=True, output_activation="relu"),
    dict(activation="leaky_relu"),
    dict(activation="leaky_relu", residual=True, output_activation="relu"),
    dict(activation="gelu", residual=True),
    dict(activation="gelu_tanh", initial_state=True),
    dict(activation="glu", residual=True, output_activation="relu"),
    dict(activation="gated", initial_state=True),
]


def inputs(shape, dtype=torch.float32, residual=False, initial_state=False, bias=True, halves=1):
    """The tensors of a call by argument name, in float64's values rounded to ``dtype``; the weight has ``halves`` times
    the output channels."""
    B, C, O, T, K, dilation, groups = shape
    generator = torch.Generator().manual_seed(B + 10 * C + 100 * O + 1000 * T)
    sizes = {"x": (B, C, T), "weight": (halves * O, C // groups, K)}
    if bias:
        sizes["bias"] = (halves * O,)
    if residual:
        sizes["residual"] = (B, O, T)
    if initial_state:
        sizes["initial_state"] = (B, C, (K - 1) * dilation)
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    tensors["weight"] /= max(1, C // groups * K) ** 0.5
    return {name: t.to(dtype) for name, t in tensors.items()}


def run(function, tensors, options, grad=None):
    """Output and gradients of every tensor, for the gradient ``grad`` of the output."""
    tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    y = function(**tensors, **options)
    if grad is None:
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(y, list(tensors.values()), grad.to(y), allow_unused=True, materialize_grads=True)
    return {"y": y, **{f"grad of {name}": g for name, g in zip(tensors, grads, strict=True)}}


def on(backend):
    def function(**arguments):
        with seqaccel.backend(backend):
            return SF.causal_conv1d(**arguments)

    return function


STOCK_ACTIVATIONS = {
    None: lambda v: v,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "glu": lambda v: F.glu(v, 1),
    "gated": lambda v: v.chunk(2, 1)[0].tanh() * v.chunk(2, 1)[1].sigmoid(),
}


def stock(x, weight, bias=None, residual=None, initial_state=None, activation=None, output_activation=None, **options):
    """The same from torch.nn.functional, independent of the package."""
    context = (weight.shape[2] - 1) * options["dilation"]
    padded = F.pad(x, (context, 0)) if initial_state is None else torch.cat([initial_state, x], -1)
    y = F.conv1d(padded, weight, bias, **options)
    y = STOCK_ACTIVATIONS[activation](y)
    y = y if residual is None else y + residual
    return F.relu(y) if output_activation == "relu" else y


def case(shape, epilogue, dtype=torch.float32):
    options = {k: v for k, v in epilogue.items() if not isinstance(v, bool)}
    halves = 2 if epilogue.get("activation") in GATED else 1
    tensors = inputs(shape, dtype, halves=halves, **{k: v for k, v in epilogue.items() if isinstance(v, bool)})
    return tensors, {"dilation": shape[5], "groups": shape[6], **options}


def assert_accurate(ours, theirs, exact):
    """Outputs and gradients within twice torch's own error; those of fewer than 4096 elements within the bound."""
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        if value.numel() >= 4096:
            assert_as_good_as(value, theirs[name], exact[name], what=name)
        else:
            assert_close(value, exact[name], "conv", value.dtype, backward=name != "y", what=name)


def assert_within_bound(ours, exact):
    for name, value in ours.items():
        assert_close(value, exact[name], "conv", value.dtype, backward=name != "y", what=f"{name} {tuple(value.shape)}")


def identity(shape):
    return "-".join(map(str, shape)) if isinstance(shape, tuple) else None


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_reference_is_torch(epilogue):
    for shape in SHAPES:
        tensors, options = case(shape, epilogue, torch.float64)
        expected = run(stock, tensors, options)
        for name, value in run(on("reference"), tensors, options).items():
            assert error(value, expected[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_cpp_matches_reference(epilogue, isa, poison):
    for shape in SHAPES:
        tensors, options = case(shape, epilogue, torch.float64)
        expected = run(on("reference"), tensors, options)
        narrow = {name: t.float() for name, t in tensors.items()}
        exact = run(on("reference"), {name: t.double() for name, t in narrow.items()}, options)
        with seqaccel.backends.isa(isa):
            for name, value in run(on("cpp"), tensors, options).items():
                assert error(value, expected[name]) < 1e-13, (shape, name)
            assert_within_bound(run(on("cpp"), narrow, options), exact)


@pytest.mark.parametrize("epilogue", [EPILOGUES[0], EPILOGUES[2], EPILOGUES[3]], ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=identity)
def test_cpp_at_a_real_size_is_as_accurate_as_torch(shape, epilogue):
    tensors, options = case(shape, epilogue)
    exact = run(stock, {name: t.double() for name, t in tensors.items()}, options)
    theirs = run(stock, tensors, options)
    for isa in USABLE_ISAS:
        with seqaccel.backends.isa(isa):
            assert_accurate(run(on("cpp"), tensors, options), theirs, exact)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_triton_matches_reference(epilogue, poison):
    for i in (1, 2, 6, 8, 10):
        tensors, options = case(SHAPES[i], epilogue)
        exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
        assert_within_bound(run(on("triton"), tensors, options), exact)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("channels", [(3, 3), (2, 4)], ids=str)
def test_triton_depthwise_in_vectors(channels, dtype, bound, poison):
    """Every remainder of a tap's distance by the 4 or 8 steps of a vector."""
    C, O = channels
    for dilation in (1, 2, 3, 5, 8, 13):
        tensors, options = case((2, C, O, 48, 3, dilation, C), EPILOGUES[2 if dilation % 2 else 8], dtype)
        exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
        for name, value in run(on("triton"), tensors, options).items():
            assert error(value, exact[name]) < bound, (dilation, name)


def test_triton_reads_channels_last_as_it_is():
    tensors, options = case((2, 16, 7, 37, 3, 5, 1), EPILOGUES[1])
    expected = run(on("triton"), tensors, options)
    last = {**tensors, "x": tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    for name, value in run(on("triton"), last, options).items():
        assert torch.equal(value, expected[name]), name


def test_triton_at_a_real_size_is_as_accurate_as_torch():
    tensors, options = case((1, 64, 64, 256, 3, 4, 1), EPILOGUES[2])
    exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
    assert_accurate(run(on("triton"), tensors, options), run(stock, tensors, options), exact)


def test_triton_configurations_compile_without_spills():
    from offline import check_configurations

    # Whatever the dilation and the length, operands come in vectors of 16 bytes (8 in the smallest tile).
    for usage in check_configurations("seqaccel.kernels.conv"):
        if usage.arch != 80:
            continue
        if usage.kernel.startswith("conv_depthwise") and usage.constexprs["V"] != "1":
            assert 16 in usage.loads and usage.shared <= 16, usage  # steps are shifted in registers
        if usage.kernel in ("conv_product_kernel", "wavenet_forward_kernel", "wavenet_gate_kernel"):
            assert 16 in usage.copies and min(usage.copies) >= 8, usage
        if usage.kernel == "conv_weight_kernel":
            assert 16 in usage.copies, usage


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tf32"),
    [(torch.float32, False), (torch.float32, True), (torch.float16, True), (torch.bfloat16, True)],
    ids=["float32", "tf32", "float16", "bfloat16"],
)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("shape", REAL_SHAPES, ids=identity)
def test_triton_on_a_gpu(shape, epilogue, dtype, tf32, allow_tf32):
    allow_tf32(tf32)
    tensors, options = case(shape, epilogue, dtype)
    tensors = {name: t.cuda() for name, t in tensors.items()}
    exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
    theirs = run(stock, tensors, options)
    ours = run(on("triton"), tensors, options)
    errors = {name: (mean_error(ours[name], exact[name]), mean_error(theirs[name], exact[name])) for name in ours}
    assert_as_good_on_average(errors, dtype, tf32, kinked="relu" in epilogue.values())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cpp_on_any_shape(data):
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    shape = (
        data.draw(st.integers(0, 4)),
        groups * data.draw(st.integers(1, 20)),
        groups * data.draw(st.integers(1, 20)),
        data.draw(st.integers(0, 150)),
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 60)),
        groups,
    )
    epilogue = dict(
        activation=data.draw(st.sampled_from(ACTIVATIONS)),
        output_activation=data.draw(st.sampled_from([None, "relu"])),
        residual=data.draw(st.booleans()),
        initial_state=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    tensors, options = case(shape, epilogue, torch.float64)
    with seqaccel.backends.isa(data.draw(st.sampled_from(USABLE_ISAS))):
        ours = run(on("cpp"), tensors, options)
    for name, value in run(on("reference"), tensors, options).items():
        assert error(ours[name], value) < 1e-13, name


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [(2, 4, 6, 5, 3, 2, 2), (1, 3, 6, 4, 2, 1, 3), (2, 2, 3, 9, 2, 3, 1)], ids=identity)
def test_gradients_of_every_order(shape, backend):
    for activation in ACTIVATIONS:
        tensors, _ = case(shape, dict(activation=activation, residual=True, initial_state=True), torch.float64)
        names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]
        for output_activation in (None, "relu"):

            def function(*arguments, names=names, options=(activation, output_activation)):
                torch.manual_seed(7)
                return on(backend)(
                    **dict(zip(names, arguments, strict=True)),
                    dilation=shape[5],
                    groups=shape[6],
                    dropout=0.25,
                    activation=options[0],
                    output_activation=options[1],
                )

            assert torch.autograd.gradcheck(function, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("needed", ["x", "weight", "bias", "residual", "initial_state"])
def test_one_gradient_alone(needed):
    shape = (2, 6, 7, 30, 3, 4, 1)
    tensors, options = case(shape, dict(activation="relu", residual=True, initial_state=True))
    everything = run(on("cpp"), tensors, options)
    tensors[needed].requires_grad_()
    y = on("cpp")(**tensors, **options)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
    (found,) = torch.autograd.grad(y, tensors[needed], grad)
    assert torch.equal(found, everything[f"grad of {needed}"])


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_the_mask_of_the_reference(p, activation, backend):
    tensors, options = case((2, 5, 7, 45, 2, 3, 1), dict(activation=activation, residual=True))
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(11)
        results.append(run(on(name), tensors, {**options, "dropout": p}))
    for name, value in results[0].items():
        assert error(value, results[1][name]) < 2e-6, name


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_mask_is_bernoulli(p):
    masks = torch.stack([reference.dropout_mask(torch.tensor([seed]), (4, 8, 4096), p) for seed in (0, 1, 2)]).double()
    n, std = masks.numel(), (p * (1 - p)) ** 0.5
    assert abs(masks.mean() - (1 - p)) < 5 * std / n**0.5
    centred = (masks - (1 - p)) / std
    for lag in (1, 2, 16, 1024):
        assert abs((centred[..., lag:] * centred[..., :-lag]).mean()) < 5 / n**0.5, f"time steps {lag} apart"
    rows = centred.flatten(0, 2)
    between = (rows @ rows.T / rows.shape[1]).fill_diagonal_(0)  # seeds, batches and channels against each other
    assert between.abs().max() < 6 / rows.shape[1] ** 0.5


def test_dropout_follows_torchs_generator():
    tensors, options = case((2, 5, 7, 45, 2, 3, 1), dict(activation="relu"))
    first, second = (on("cpp")(**tensors, **options, dropout=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = on("cpp")(**tensors, **options, dropout=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_operators_pass_opcheck(backend, epilogue):
    if backend == "triton":
        import seqaccel.kernels.conv  # noqa: F401  registers the operators
    suffix = "" if backend == "cpp" else "_triton"
    forward = getattr(torch.ops.seqaccel, f"causal_conv1d_forward{suffix}").default
    backward = getattr(torch.ops.seqaccel, f"causal_conv1d_backward{suffix}").default
    groups = 1 if epilogue.get("activation") in GATED else 2
    tensors, options = case((2, 4, 6, 20, 3, 2, groups), epilogue)
    relu = options.get("output_activation") == "relu"
    activation = options.get("activation") or "none"
    seed = torch.tensor([3])
    # An interpreted Triton kernel cannot be traced.
    tests = ("test_schema", "test_faketensor") if backend == "cpp" else ("test_schema",)
    for dropout in (0.0, 0.5):
        optional = [tensors.get(name) for name in ("x", "weight", "bias", "residual", "initial_state")]
        arguments = (*optional, seed, None, None, 2, groups, activation, relu, dropout, True)
        torch.library.opcheck(forward, arguments, test_utils=tests)
        y, saved = forward(*arguments)
        for wants in (31, 5):
            torch.library.opcheck(
                backward,
                (
                    torch.randn_like(y), y, saved, tensors["x"], tensors["weight"], tensors.get("initial_state"), seed,
                    None, None, torch.randn_like(tensors["x"]), 2, groups, activation, relu, dropout,
                    "residual" in tensors, wants,
                ),
                test_utils=tests,
            )  # fmt: skip


def test_operators_refuse_what_would_read_out_of_bounds():
    forward, backward = torch.ops.seqaccel.causal_conv1d_forward, torch.ops.seqaccel.causal_conv1d_backward
    x, w = torch.randn(2, 4, 9), torch.randn(6, 2, 3)
    good = dict(x=x, weight=w, bias=None, residual=None, history=None, seed=None, reset=None, cu_seqlens=None)
    plain = (2, 2, "relu", False, 0.0, True)
    y, saved = forward(*good.values(), *plain)
    wrong = [
        ("x", torch.randn(2, 4)),
        ("x", x.half()),
        ("weight", w.double()),
        ("weight", torch.randn(6, 4, 3)),
        ("weight", torch.randn(5, 2, 3)),
        ("weight", torch.randn(6, 2, 0)),
        ("bias", torch.randn(5)),
        ("residual", torch.randn(2, 6, 8)),
        ("history", torch.randn(2, 4, 3)),
        ("reset", torch.zeros(2, 9)),
        ("reset", torch.zeros(2, 8, dtype=torch.bool)),
        ("cu_seqlens", torch.tensor([0, 9])),
    ]
    for name, value in wrong:
        with pytest.raises(RuntimeError, match=name):
            forward(*{**good, name: value}.values(), *plain)
    for options in [(0, 2, "relu"), (2, 0, "relu"), (2, 3, "relu"), (1 << 60, 2, "relu"), (2, 2, "nosuch")]:
        with pytest.raises(RuntimeError):
            forward(*good.values(), *options, False, 0.0, True)
    for dropout in (-0.1, 1.1, float("nan"), 0.5):  # 0.5: there is no seed
        with pytest.raises(RuntimeError, match="dropout"):
            forward(*good.values(), 2, 2, "relu", False, dropout, True)
    rest = (*[None] * 4, 2, 2, "relu", False, 0.0, False, 31)
    backward(y, y, saved, x, w, None, *rest)
    for arguments in [
        (y[..., :-1], y, saved, x, w, None),
        (y, None, saved, x, w, None),
        (y, y[:1], saved, x, w, None),
        (y, y, saved, x, w, torch.randn(2, 4, 5)),
    ]:
        with pytest.raises(RuntimeError):
            backward(*arguments, *rest)
    with pytest.raises(RuntimeError, match="saved"):  # a residual's relu keeps bytes
        backward(y, y, saved, x, w, None, *rest[:-2], True, 31)


def test_errors_name_the_argument():
    x, w = torch.randn(2, 4, 9), torch.randn(6, 4, 3)
    for arguments, options, kind, message in [
        (([1.0], w), {}, TypeError, "argument 'x' must be Tensor, not list"),
        ((x.long(), w), {}, TypeError, "x to have a floating point dtype"),
        ((x[0], w), {}, ValueError, "expected x to be 3D"),
        ((x, w[0]), {}, ValueError, "expected weight to be 3D"),
        ((x, w[..., :0]), {}, ValueError, "K >= 1"),
        ((x, w.double()), {}, RuntimeError, "expected weight to have the dtype of x"),
        ((x, w[:, :3]), {}, ValueError, r"expected x to have 3 channels, but got 4 channels instead"),
        ((x, w[:5, :2]), {"groups": 2}, ValueError, "divisible by groups=2, but got 5"),
        ((x, w, torch.randn(5)), {}, ValueError, r"expected bias to have shape \(6,\), but got \(5,\)"),
        ((x, w), {"residual": x}, ValueError, r"expected residual to have shape \(2, 6, 9\)"),
        ((x, w), {"initial_state": x}, ValueError, r"expected initial_state to have shape \(2, 4, 2\)"),
        ((x, w), {"dilation": 0}, ValueError, "expected dilation to be positive, but got 0"),
        ((x, w), {"groups": 1.0}, TypeError, "argument 'groups' must be int, not float"),
        ((x, w), {"activation": "elu"}, ValueError, "expected activation to be one of"),
        ((x, w), {"output_activation": "tanh"}, ValueError, "expected output_activation to be"),
        ((x, w), {"dropout": 1.5}, ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
        ((x, w.to("meta")), {}, RuntimeError, "on the same device, but weight is on meta"),
    ]:
        with pytest.raises(kind, match=message):
            SF.causal_conv1d(*arguments, **options)
    with pytest.raises(RuntimeError, match="no backend 'cuda'"), seqaccel.backend("cuda"):
        SF.causal_conv1d(x, w)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"), seqaccel.backend("triton"):
        SF.causal_conv1d(x.double(), w.double())


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "torch"])
@pytest.mark.parametrize(
    "shape", [(0, 4, 6, 9, 3, 2, 1), (2, 4, 6, 0, 3, 2, 1), (2, 0, 6, 9, 3, 2, 1), (2, 4, 0, 9, 3, 2, 1)]
)
def test_empty(shape, backend):
    tensors, options = case(shape, dict(activation="relu", residual=True, output_activation="relu"))
    expected = run(on("reference"), tensors, options)
    for name, value in run(on(backend), tensors, options).items():
        assert value.shape == expected[name].shape
        assert error(value, expected[name]) < 1e-6, name


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_any_layout(backend):
    tensors, options = case((3, 6, 8, 21, 3, 2, 1), dict(activation="relu", residual=True, initial_state=True))
    expected = run(on("reference"), tensors, options)
    strided = {
        "x": tensors["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "weight": tensors["weight"].flip(0).flip(0).permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "bias": torch.stack([tensors["bias"], tensors["bias"]], 1)[:, 0],
        "residual": tensors["residual"][:, :1].expand(3, 8, 21),
        "initial_state": tensors["initial_state"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    tensors["residual"] = strided["residual"].contiguous()
    expected = run(on("reference"), tensors, options)
    y = on(backend)(**strided, **options)
    assert error(y, expected["y"]) < 1e-6
    strided["x"].requires_grad_()
    grad = torch.ones(()).expand(3, 8, 21)
    (found,) = torch.autograd.grad(on(backend)(**strided, **options), strided["x"], grad)
    assert error(found, run(on("reference"), tensors, options, torch.ones(3, 8, 21))["grad of x"]) < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_deterministic(threads):
    tensors, options = case((5, 33, 40, 300, 3, 7, 1), dict(activation="relu", residual=True))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = run(on("cpp"), tensors, options)
        for _ in range(5):
            for name, value in run(on("cpp"), tensors, options).items():
                assert torch.equal(value, first[name]), name
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_pass_as_in_torch():
    tensors, options = case((1, 3, 4, 40, 2, 3, 1), dict(activation="relu"))
    tensors["x"][0, 0, 5], tensors["x"][0, 1, 20] = float("nan"), float("inf")
    expected = run(stock, tensors, options)
    found = run(on("cpp"), tensors, options)
    for name in ("y", "grad of x"):
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_a_spoilt_step_stays_apart(isa, shape, bad):
    """An input, or a gradient of an output, that is not finite reaches only what a tap connects it to."""
    B, C, O, T, K, dilation, groups = shape
    tensors, options = case(shape, dict())
    grad = torch.randn(B, O, T)
    c, o, t = C // 2, O // 2, T // 3
    with seqaccel.backends.isa(isa):
        expected = run(on("cpp"), tensors, options, grad)
        spoilt = tensors | {"x": tensors["x"].clone()}
        spoilt["x"][-1, c, t] = bad
        found = run(on("cpp"), spoilt, options, grad)
        group = c // (C // groups)
        own = slice(group * (O // groups), (group + 1) * (O // groups))
        reached = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in expected.items()}
        reached["y"][-1, own, t : t + K * dilation : dilation] = True
        reached["grad of weight"][own, c % (C // groups)] = True
        for name, value in found.items():
            assert torch.equal(value[~reached[name]], expected[name][~reached[name]]), name
        grad[-1, o, t] = bad
        found = run(on("cpp"), tensors, options, grad)
        group = o // (O // groups)
        own = slice(group * (C // groups), (group + 1) * (C // groups))
        reached = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in expected.items()}
        for k in range(min(K, t // dilation + 1)):
            reached["grad of x"][-1, own, t - k * dilation] = True
        reached["grad of weight"][o] = reached["grad of bias"][o] = True
        for name, value in found.items():
            assert torch.equal(value[~reached[name]], expected[name][~reached[name]]), name


@pytest.mark.parametrize("K", [2, 4])
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_a_spoilt_tap_stays_apart(isa, K):
    """Depthwise: a weight that is not finite reaches no gradient of an input that it is not multiplied with."""
    for T in (1, 7, 74):
        tensors, options = case((2, 5, 5, T, K, 3, 5), dict(initial_state=True))
        grad = torch.randn(2, 5, T)
        with seqaccel.backends.isa(isa):
            expected = run(on("cpp"), tensors, options, grad)
            for k in range(K):
                spoilt = tensors | {"weight": tensors["weight"].clone()}
                spoilt["weight"][4, 0, k] = float("nan")
                found = run(on("cpp"), spoilt, options, grad)
                joined, exact = (torch.cat([r["grad of initial_state"], r["grad of x"]], 2) for r in (found, expected))
                reached = torch.zeros_like(joined, dtype=torch.bool)
                reached[:, 4, k * 3 : k * 3 + T] = True
                assert joined[reached].isnan().all() and torch.equal(joined[~reached], exact[~reached])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype):
    tensors, options = case((2, 20, 30, 50, 3, 2, 1), dict(activation="relu", residual=True), dtype)
    exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
    for name, value in run(on("cpp"), tensors, options).items():
        assert value.dtype == dtype
        assert error(value, exact[name]) <= torch.finfo(dtype).eps, name


def test_autocast():
    conv = snn.CausalConv1d(8, 8, 3, activation="relu")
    x = torch.randn(2, 8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        assert conv(y).dtype == torch.bfloat16
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert error(y, conv(x)) < 0.02


def test_functorch():
    conv = snn.CausalConv1d(4, 4, 3, activation="tanh")
    parameters, x = dict(conv.named_parameters()), torch.randn(5, 2, 4, 9)

    def loss(parameters, x):
        return torch.func.functional_call(conv, parameters, (x,)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(5):
        conv.zero_grad()
        loss(parameters, x[i]).backward()
        assert torch.allclose(grads["weight"][i], conv.weight.grad, atol=1e-4)


def test_torch_backend_is_torch():
    for epilogue in EPILOGUES:
        tensors, options = case(SHAPES[3], epilogue, torch.float64)
        expected = run(stock, tensors, options)
        for name, value in run(on("torch"), tensors, options).items():
            assert error(value, expected[name]) < 1e-13, name


def test_cpp_runs_no_operator_of_torchs():
    nets = {
        "seqaccel::temporal_block_backward": snn.TCN(8, [16, 16], 3),
        "seqaccel::causal_conv1d_backward": torch.nn.Sequential(snn.CausalConv1d(8, 8, 3), snn.CausalConv1d(8, 8, 3)),
    }
    own = ("seqaccel", "CausalConv1d")
    for backward, net in nets.items():
        with torch.profiler.profile() as profile, seqaccel.backend("cpp"):
            net(torch.randn(2, 8, 100)).sum().backward()
        names = {event.key for event in profile.key_averages()}
        assert backward in names
        assert not [name for name in names if "conv" in name.lower() and not any(part in name for part in own)]
        assert not [name for name in names if "mkldnn" in name or name in ("aten::bmm", "aten::mm", "aten::addmm")]


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("dtype, edge", [(torch.float32, 88.55), (torch.float64, 709.9)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_where_an_exponential_overflows(isa, dtype, edge, activation):
    near = torch.linspace(-0.7, 0.7, 1001, dtype=dtype)
    x = torch.cat([near - edge, near + edge]).view(1, 1, -1).requires_grad_()
    one, results = torch.ones(2 if activation in GATED else 1, 1, 1, dtype=dtype), []
    for backend in ("cpp", "reference"):
        with seqaccel.backend(backend), seqaccel.backends.isa(isa):
            y = SF.causal_conv1d(x, one, activation=activation)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
    for found, expected in zip(*results, strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-30)
