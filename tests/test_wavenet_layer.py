"""The operator of a WaveNet layer: on every backend against the paper's equations in torch."""

import pytest
import torch
import torch.nn.functional as F
from test_conv import USABLE_ISAS
from tolerances import assert_close, error

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn

# B, C, G, S, T, K, dilation: tails of tiles, taps beyond the start, short rows, tiles of a row, no skip channel.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 5, 4, 7, 2, 1),
    (1, 7, 13, 2, 64, 3, 2),
    (3, 17, 6, 9, 129, 3, 40),
    (2, 65, 70, 66, 151, 2, 3),
    (1, 20, 33, 5, 300, 2, 512),
    (70, 4, 4, 3, 2, 2, 1),
    (1, 130, 9, 7, 33, 5, 8),
    (5, 3, 4, 0, 20, 2, 3),
]
ALL = ("bias", "output_bias", "skip", "condition", "global_condition", "initial_state")
OPTIONS = [(), ALL, ("bias", "output_bias", "skip"), ("condition",), ("global_condition", "initial_state")]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))


def inputs(shape, given=ALL, dtype=torch.float64):
    B, C, G, S, T, K, dilation = shape
    sizes = {
        "x": (B, C, T),
        "weight": (2 * G, C, K),
        "bias": (2 * G,),
        "output_weight": (C + S, G, 1),
        "output_bias": (C + S,),
        "skip": (B, S, T),
        "condition": (B, 2 * G, T),
        "global_condition": (B, 2 * G),
        "initial_state": (B, C, (K - 1) * dilation),
    }
    generator = torch.Generator().manual_seed(sum(shape))
    tensors = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    for name in ("weight", "output_weight"):
        tensors[name] /= tensors[name][0].numel() ** 0.5
    return {name: t.to(dtype) if name not in ALL or name in given else None for name, t in tensors.items()}


def paper(
    x,
    weight,
    bias,
    output_weight,
    output_bias,
    skip,
    condition,
    global_condition,
    initial_state,
    dilation,
    residual=True,
):
    """The layer as one writes it in torch."""
    context = (weight.shape[2] - 1) * dilation
    padded = F.pad(x, (context, 0)) if initial_state is None else torch.cat([initial_state, x], -1)
    v = F.conv1d(padded, weight, bias, dilation=dilation)
    if condition is not None:
        v = v + condition
    if global_condition is not None:
        v = v + global_condition[..., None]
    value, gate = v.chunk(2, 1)
    out = F.conv1d(torch.tanh(value) * torch.sigmoid(gate), output_weight, output_bias)
    y, s = out[:, : x.shape[1]], out[:, x.shape[1] :]
    return x + y if residual else None, s if skip is None else skip + s


def on(backend):
    def function(**arguments):
        with seqaccel.backend(backend):
            return SF.wavenet_layer(**arguments)

    return function


def run(function, tensors, dilation, residual=True):
    """The results, and the gradients of every tensor."""
    tensors = {name: t if t is None else t.clone().requires_grad_() for name, t in tensors.items()}
    y, skip = function(**tensors, dilation=dilation, residual=residual)
    outputs = {"skip'": skip} if y is None else {"y": y, "skip'": skip}
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs.values()]
    given = {name: t for name, t in tensors.items() if t is not None}
    found = torch.autograd.grad(list(outputs.values()), list(given.values()), grads, materialize_grads=True)
    return outputs | {f"grad of {name}": grad for name, grad in zip(given, found, strict=True)}


def assert_same(found, expected, bound=1e-12):
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.shape == expected[name].shape and error(value, expected[name]) < bound, name


@each_shape
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_definition_is_the_papers(shape, backend):
    for given in OPTIONS:
        for residual in (True, False):
            tensors = inputs(shape, given)
            expected = run(paper, tensors, shape[-1], residual)
            assert_same(run(on(backend), tensors, shape[-1], residual), expected)


@each_shape
@pytest.mark.parametrize("isa", USABLE_ISAS)
def test_cpp_is_the_papers(shape, isa, poison):
    for given in ((), ALL):
        for residual in (True, False):
            tensors, narrow = inputs(shape, given), inputs(shape, given, torch.float32)
            exact = run(
                paper, {name: t if t is None else t.double() for name, t in narrow.items()}, shape[-1], residual
            )
            with seqaccel.backends.isa(isa):
                assert_same(run(on("cpp"), tensors, shape[-1], residual), run(paper, tensors, shape[-1], residual))
                found = run(on("cpp"), narrow, shape[-1], residual)
            for name, value in found.items():
                assert_close(value, exact[name], "wavenet_layer", torch.float32, backward="grad" in name, what=name)


def test_a_long_layer_saves_past_the_caches():
    shape = (1, 64, 64, 64, 16384, 2, 512)
    tensors = {name: t if t is None else t.float() for name, t in inputs(shape, ("bias", "skip")).items()}
    exact = run(paper, {name: t if t is None else t.double() for name, t in tensors.items()}, 512)
    theirs = run(paper, tensors, 512)
    for name, value in run(on("cpp"), tensors, 512).items():
        assert error(value, exact[name]) <= 2 * error(theirs[name], exact[name]) + 1e-7, name


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(("B", "T", "K", "dilation"), [(1, 700, 3, 100), (3, 130, 2, 200), (40, 9, 2, 3)])
def test_any_number_of_threads(B, T, K, dilation, threads):
    shape = (B, 40, 40, 40, T, K, dilation)  # enough work to wake them
    tensors = inputs(shape)
    expected = run(paper, tensors, dilation)
    torch.set_num_threads(threads)
    try:
        found = [run(on("cpp"), tensors, dilation) for _ in range(2)]
    finally:
        torch.set_num_threads(2)
    assert_same(found[0], expected)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_every_order(backend):
    for shape in ((2, 3, 5, 4, 7, 2, 1), (1, 4, 3, 2, 20, 3, 4)):
        tensors = inputs(shape)
        names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

        def function(*arguments, names=names, dilation=shape[-1]):
            return on(backend)(**dict(zip(names, arguments, strict=True)), dilation=dilation)

        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("outputs", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("needed", [*inputs(SHAPES[1])])
def test_one_gradient_alone(needed, outputs):
    tensors, found = inputs((2, 3, 5, 4, 150, 2, 70)), []
    tensors[needed].requires_grad_()
    for function in (on("cpp"), paper):
        results = function(**tensors, dilation=70)
        loss = sum(results[i].square().sum() for i in outputs) + 0 * tensors[needed].sum()
        found.append(torch.autograd.grad(loss, tensors[needed])[0])
    assert error(*found) < 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0), (0, 0)])
def test_empty(backend, B, T):
    found = run(on(backend), inputs((B, 3, 4, 2, T, 2, 3)), 3)
    assert found["y"].shape == (B, 3, T) and found["skip'"].shape == (B, 2, T)
    for name in ("weight", "bias", "output_weight", "output_bias", "initial_state"):
        assert not found[f"grad of {name}"].any()


def test_layouts_of_any_strides():
    shape = (2, 6, 5, 4, 40, 3, 2)
    tensors = inputs(shape)
    expected = run(paper, tensors, 2)
    strided = {
        name: torch.stack([t, t], -1)[..., 0].mT.contiguous().mT if t.dim() == 3 else t for name, t in tensors.items()
    }
    found = SF.wavenet_layer(**strided, dilation=2)
    assert error(found[0], expected["y"]) < 1e-12 and error(found[1], expected["skip'"]) < 1e-12
    row = {
        **tensors,
        "x": tensors["x"][:1].expand(2, -1, -1),
        "condition": tensors["global_condition"][..., None].expand(-1, -1, 40),
    }
    for a, b in zip(SF.wavenet_layer(**row, dilation=2), paper(**row, dilation=2), strict=True):
        assert error(a, b) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_rounded_once(dtype):
    tensors = inputs((2, 6, 5, 4, 40, 3, 2), dtype=dtype)
    exact = on("cpp")(**{name: t.float() for name, t in tensors.items()}, dilation=2)
    for found, wanted in zip(on("cpp")(**tensors, dilation=2), exact, strict=True):
        assert found.dtype == dtype and torch.equal(found, wanted.to(dtype))


def test_no_step_sees_a_later_one():
    tensors = inputs((2, 20, 13, 9, 200, 3, 20))
    before = SF.wavenet_layer(**tensors, dilation=20)
    for name in ("x", "skip", "condition"):
        tensors[name][..., 101:] = float("nan")
    for found, wanted in zip(SF.wavenet_layer(**tensors, dilation=20), before, strict=True):
        assert torch.equal(found[..., :101], wanted[..., :101]) and found[..., 101:].isnan().all()


def test_operators_refuse_what_would_read_out_of_bounds():
    ops, tensors = torch.ops.seqaccel, inputs((2, 3, 4, 5, 9, 2, 3))
    tensors["history"] = tensors.pop("initial_state")
    rest = {"reset": None, "dilation": 3, "residual": True, "save": True}
    _, skip, saved = ops.wavenet_layer_forward(**tensors, **rest)
    for name, t in tensors.items():
        for bad in (t[..., :-1], t[0], t.float()):
            with pytest.raises(RuntimeError):
                ops.wavenet_layer_forward(**tensors | {name: bad}, **rest)
    for wrong in [*({"dilation": d} for d in (0, 2, 1 << 60)), {"reset": torch.zeros(2, 8, dtype=torch.bool)}]:
        with pytest.raises(RuntimeError):
            ops.wavenet_layer_forward(**tensors, **rest | wrong)
    good = {name: tensors[name] for name in ("x", "weight", "output_weight", "history")}
    good |= {"grad_y": tensors["x"], "grad_skip": skip, "saved": saved, "reset": None}
    ops.wavenet_layer_backward(**good, dilation=3, wants=255)
    for name in ("grad_y", "grad_skip", "saved"):
        with pytest.raises(RuntimeError, match=name):
            ops.wavenet_layer_backward(**good | {name: good[name][..., :-1]}, dilation=3, wants=255)


def test_a_wavenet_runs_no_other_convolution():
    net = snn.WaveNet(3, 4, 8, 8, layers=3, condition_channels=2, global_channels=2)
    x, c, g = torch.randn(2, 3, 50), torch.randn(2, 2, 50), torch.randn(2, 2)
    with torch.profiler.profile() as profile:
        net(x, condition=c, global_condition=g).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["seqaccel::wavenet_layer_forward"] == counts["seqaccel::wavenet_layer_backward"] == 3
    assert not [name for name in counts if "mkldnn" in name or name.startswith("aten::conv") or "tanh" in name]


def test_a_step_of_a_wide_layer_is_dot_products():
    tensors = inputs((1, 300, 300, 4, 1, 2, 3), dtype=torch.float32)
    for T, counted in ((1, 0), (9, 1)):
        for name in ("x", "skip", "condition"):
            tensors[name] = tensors[name][..., :1].expand(-1, -1, T)
        with torch.profiler.profile() as profile:
            found = SF.wavenet_layer(**tensors, dilation=3)
        calls = [event.count for event in profile.key_averages() if event.key == "seqaccel::wavenet_layer_forward"]
        assert sum(calls) == counted
        for a, b in zip(found, paper(**tensors, dilation=3), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("conditions", [{}, {"condition_channels": 2, "global_channels": 2}])
def test_a_layer_with_a_hook_gives_the_same(conditions):
    layer, x = snn.WaveNetLayer(3, 4, dilation=2, **conditions).double(), torch.randn(2, 3, 9, dtype=torch.float64)
    given = {"condition": torch.randn(2, 2, 9), "global_condition": torch.randn(2, 2)} if conditions else {}
    given = {name: t.double() for name, t in given.items()}
    expected, calls = layer(x, **given), []
    for conv in (layer.conv, layer.output):
        conv.register_forward_hook(lambda *_: calls.append(1))
    for found, wanted in zip(layer(x, **given), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert len(calls) == (1 if conditions else 2)  # a condition is added inside of conv


def test_a_replaced_forward_runs():
    layer, x = snn.WaveNetLayer(3, 4), torch.randn(2, 3, 9)
    layer.output.forward = lambda z: z.new_zeros(2, 7, 9)
    y, skip = layer(x)
    assert torch.equal(y, x) and not skip.any()
