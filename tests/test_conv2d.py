"""Convolutions of grids, causal along one dimension: the operator on every backend, and the module."""

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import USABLE_ISAS
from test_conv import EPILOGUES, STOCK_ACTIVATIONS, assert_within_bound, run
from tolerances import error

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn
from seqaccel.reference.conv import GATED

# B, C, O, (T, S), (K_t, K_s), dilation, groups: rows and columns narrower than the taps reach, tails of tiles, groups.
SHAPES = [
    (1, 1, 1, (1, 1), (1, 1), 1, 1),
    (2, 3, 5, (7, 6), (2, 3), 1, 1),
    (1, 7, 13, (9, 33), (3, 5), (2, 1), 1),
    (2, 17, 6, (4, 2), (3, 7), (3, 2), 1),
    (2, 6, 10, (11, 13), (2, 3), (1, 2), 2),
    (1, 5, 15, (6, 17), (1, 5), 3, 5),
    (3, 20, 40, (1, 5), (3, 3), 1, 1),
    (2, 4, 4, (30, 9), (4, 1), 2, 4),
    (1, 24, 9, (25, 20), (2, 3), 1, 1),
    (2, 6, 6, (5, 4), (3, 5), (1, 2), 6),
    (2, 3, 6, (30, 37), (3, 3), (2, 1), 3),
]


def case(shape, epilogue, dtype=torch.float64):
    B, C, O, grid, taps, dilation, groups = shape
    options = {k: v for k, v in epilogue.items() if not isinstance(v, bool)}
    rows = O * (2 if options.get("activation") in GATED else 1)
    d = dilation if isinstance(dilation, int) else dilation[0]
    sizes = {"x": (B, C, *grid), "weight": (rows, C // groups, *taps), "bias": (rows,)}
    if epilogue.get("residual"):
        sizes["residual"] = (B, O, *grid)
    if epilogue.get("initial_state"):
        sizes["initial_state"] = (B, C, (taps[0] - 1) * d, grid[1])
    generator = torch.Generator().manual_seed(C + 10 * O)
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    tensors["weight"] /= tensors["weight"][0].numel() ** 0.5
    return {name: t.to(dtype) for name, t in tensors.items()}, {"dilation": dilation, "groups": groups, **options}


def on(backend):
    def function(**arguments):
        with seqaccel.backend(backend):
            return SF.causal_conv2d(**arguments)

    return function


def masked(x, weight, bias=None, residual=None, initial_state=None, activation=None, output_activation=None, **options):
    """By a kernel of 2 K_t - 1 rows, of which the last K_t - 1 are zero, on rows below and above that are zero."""
    taps, width = weight.shape[2:]
    d, e = options["dilation"] if isinstance(options["dilation"], tuple) else (options["dilation"],) * 2
    above = (taps - 1) * d
    first = x.new_zeros(*x.shape[:2], above, x.shape[3]) if initial_state is None else initial_state
    kernel = torch.cat([weight, weight.new_zeros(*weight.shape[:2], taps - 1, width)], 2)
    y = F.conv2d(torch.cat([first, x], 2), kernel, bias, padding=(above, width // 2 * e), **options)[:, :, above:]
    y = STOCK_ACTIVATIONS[activation](y)
    y = y if residual is None else y + residual
    return F.relu(y) if output_activation == "relu" else y


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_reference_is_a_masked_convolution(epilogue, backend):
    for shape in SHAPES:
        tensors, options = case(shape, epilogue)
        expected = run(masked, tensors, options)
        for name, value in run(on(backend), tensors, options).items():
            assert error(value, expected[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_every_order(backend):
    for shape in SHAPES[1:4]:
        tensors, options = case(shape, dict(activation="tanh", residual=True, initial_state=True))
        names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

        def function(*arguments, names=names, options=options):
            torch.manual_seed(7)
            return on(backend)(**dict(zip(names, arguments, strict=True)), **options, dropout=0.25)

        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp", "triton"])
def test_empty(backend):
    for x, weight in (((0, 4, 5, 6), (6, 4, 2, 3)), ((2, 4, 0, 6), (6, 4, 2, 3)), ((2, 4, 5, 0), (6, 4, 2, 3))):
        tensors = {"x": torch.randn(x), "weight": torch.randn(weight), "bias": torch.randn(6)}
        found = run(on(backend), tensors, {})
        assert found["y"].shape == (x[0], 6, *x[2:])
        assert torch.equal(found["grad of weight"], torch.zeros(weight))


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_cpp_matches_reference(epilogue, isa, poison):
    for shape in (*SHAPES, (2, 5, 70, (40, 48), (3, 5), 1, 1), (1, 3, 4, (5, 3), (2, 5), (1, 9), 1)):
        tensors, options = case(shape, epilogue)
        expected = run(on("reference"), tensors, options)
        narrow = {name: t.float() for name, t in tensors.items()}
        exact = run(on("reference"), {name: t.double() for name, t in narrow.items()}, options)
        with seqaccel.backends.isa(isa):
            for name, value in run(on("cpp"), tensors, options).items():
                assert error(value, expected[name]) < 1e-13, (shape, name)
            assert_within_bound(run(on("cpp"), narrow, options), exact)


@pytest.mark.parametrize("epilogue", [EPILOGUES[i] for i in (2, 3, 11)], ids=str)
def test_triton_matches_reference(epilogue, poison):
    for shape in (SHAPES[1], (1, 4, 6, (5, 3), (2, 3), (1, 2), 2), (2, 4, 4, (5, 3), (3, 3), (2, 1), 4)):
        tensors, options = case(shape, epilogue)
        narrow = {name: t.float() for name, t in tensors.items()}
        exact = run(on("reference"), {name: t.double() for name, t in narrow.items()}, options)
        assert_within_bound(run(on("triton"), narrow, options), exact)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_triton_on_a_gpu(dtype, bound, allow_tf32):
    allow_tf32(False)
    for shape in ((2, 64, 96, (40, 48), (3, 5), 1, 1), (2, 32, 32, (33, 17), (2, 3), (2, 1), 32)):
        tensors, options = case(shape, EPILOGUES[3])
        tensors = {name: t.to("cuda", dtype) for name, t in tensors.items()}
        exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
        for name, value in run(on("triton"), tensors, options).items():
            assert error(value, exact[name]) < bound, (shape, name)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_dropout_draws_the_mask_of_the_reference(backend):
    dtype, bound = (torch.float64, 1e-13) if backend == "cpp" else (torch.float32, 1e-6)
    tensors, options = case(SHAPES[1], dict(activation="relu", residual=True), dtype)
    results = []
    for name in (backend, "reference"):
        torch.manual_seed(11)
        results.append(run(on(name), tensors, {**options, "dropout": 0.3}))
    for name, value in results[0].items():
        assert error(value, results[1][name]) < bound, name


def test_operators_refuse_what_would_read_out_of_bounds():
    forward = torch.ops.seqaccel.causal_conv2d_forward
    x, w = torch.randn(2, 4, 5, 9), torch.randn(6, 4, 2, 3)
    good = dict(x=x, weight=w, bias=None, residual=None, history=None, seed=None, reset=None)
    options = (1, 1, 1, "none", False, 0.0, True)
    forward(*good.values(), *options)
    for name, value in [
        ("x", x[0]),
        ("weight", w[0]),
        ("weight", w[..., :2]),
        ("bias", torch.randn(5)),
        ("residual", x),
        ("history", x),
        ("history", torch.randn(2, 4, 9)),
        ("reset", torch.zeros(2, 45, dtype=torch.bool)),
        ("reset", torch.zeros(2, 5)),
    ]:
        with pytest.raises(RuntimeError, match=name):
            forward(*{**good, name: value}.values(), *options)
    for bad in [(0, 1, 1), (1, 0, 1), (1, 1, 3), (1 << 60, 1, 1), (1, 1 << 60, 1)]:
        with pytest.raises(RuntimeError):
            forward(*good.values(), *bad, *options[3:])


def test_no_row_sees_a_later_one():
    tensors, options = case(SHAPES[2], {})
    x, t = tensors["x"], 5
    expected = SF.causal_conv2d(**tensors, **options)
    x[:, :, t:] = float("nan")
    found = SF.causal_conv2d(**tensors, **options)
    assert torch.equal(found[:, :, :t], expected[:, :, :t]) and found[:, :, t:].isnan().all()


def test_module_takes_over_a_masked_kernel():
    theirs = torch.nn.Conv2d(4, 6, 5, padding=2)
    with torch.no_grad():
        theirs.weight[:, :, 3:] = 0
    ours = snn.CausalConv2d(4, 6, 5)
    assert ours.weight.shape == (6, 4, 3, 5)
    ours.load_masked(theirs.weight)
    ours.bias = theirs.bias
    x = torch.randn(2, 4, 7, 9)
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours(x[0]), theirs(x[0]), atol=1e-6)
    with pytest.raises(ValueError, match=r"expected weight to have shape \(6, 4, 5, 5\)"):
        ours.load_masked(theirs.weight[:, :, :3])
    assert repr(ours) == "CausalConv2d(4, 6, kernel_size=(3, 5))"


@pytest.mark.parametrize("splits", [(1, 1, 1, 1, 1, 1, 1), (3, 0, 4), (7,)])
def test_streams(splits):
    conv = snn.CausalConv2d(3, 4, (3, 3), dilation=(2, 1), activation="tanh").double()
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    expected, state = conv(x), conv.init_state(2)
    found = []
    for rows in x.split(splits, 2):
        y, state = conv.extend(rows, state)
        found.append(y)
    assert torch.allclose(torch.cat(found, 2), expected, atol=1e-12)
    state = conv.init_state(2, width=5)
    for t in range(7):
        y_t, state = conv.step(x[:, :, t], state)
        assert torch.allclose(y_t, expected[:, :, t], atol=1e-12)
    fresh = conv.reset(state, torch.tensor([True, False]))
    assert not fresh[0][0].any() and torch.equal(fresh[0][1], state[0][1])


def test_errors_name_the_argument():
    x, w = torch.randn(2, 4, 5, 9), torch.randn(6, 4, 2, 3)
    for arguments, options, kind, message in [
        ((x.long(), w), {}, TypeError, "x to have a floating point dtype"),
        ((x[0], w), {}, ValueError, "expected x to be 4D"),
        ((x, w[..., :2]), {}, ValueError, "odd K_s"),
        ((x, w.double()), {}, RuntimeError, "expected weight to have the dtype of x"),
        ((x, w[:, :3]), {}, ValueError, "expected x to have 3 channels, but got 4 channels instead"),
        ((x, w[:5, :2]), {"groups": 2}, ValueError, "divisible by groups=2, but got 5"),
        ((x, w, torch.randn(5)), {}, ValueError, r"expected bias to have shape \(6,\), but got \(5,\)"),
        ((x, w), {"residual": x}, ValueError, r"expected residual to have shape \(2, 6, 5, 9\)"),
        ((x, w), {"initial_state": x}, ValueError, r"expected initial_state to have shape \(2, 4, 1, 9\)"),
        ((x, w), {"dilation": (1, 2, 3)}, ValueError, "an int or a tuple of two"),
        ((x, w), {"activation": "elu"}, ValueError, "expected activation to be one of"),
        ((x, w), {"activation": []}, ValueError, "expected activation to be one of"),
    ]:
        with pytest.raises(kind, match=message):
            SF.causal_conv2d(*arguments, **options)
    with pytest.raises(ValueError, match="odd kernel_size"):
        snn.CausalConv2d(4, 4, 4)


@pytest.mark.parametrize("dilation", [1 << 22, 1 << 34])
def test_depthwise_taps_far_away_take_no_memory(dilation):
    x, weight = torch.randn(1, 4, 6, 5, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    y = SF.causal_conv2d(x, weight, dilation=(dilation, 1), groups=4)
    expected = SF.causal_conv2d(x, weight[:, :, -1:], groups=4)
    torch.testing.assert_close(y, expected)
    for found, wanted in zip(
        torch.autograd.grad(y.sum(), (x, weight)), torch.autograd.grad(expected.sum(), (x, weight)), strict=True
    ):
        torch.testing.assert_close(found, wanted)
    row = SF.causal_conv1d(x.flatten(2), weight[:, :, 0], dilation=dilation, groups=4)
    torch.testing.assert_close(row, SF.causal_conv1d(x.flatten(2), weight[:, :, 0, -1:], groups=4))
    for found, wanted in zip(
        torch.autograd.grad(row.sum(), (x, weight)),
        (weight[:, :, 0, -1:].expand_as(x), F.pad(x.sum((0, 2, 3)).view(4, 1, 1, 1), (2, 0, 0, 2))),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
