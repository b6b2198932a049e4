"""Convolutions with resets: the episodes of a row give what they give apart."""

from __future__ import annotations

import itertools

import pytest
import torch
from scan_cases import instruction_sets
from tolerances import error

import seqaccel
import seqaccel.functional as SF
from seqaccel import nn
from seqaccel.backends import why_missing

B, T = 2, 9
CPP = pytest.param("cpp", marks=pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no C++ kernels"))
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(why_missing("triton", "cpu") is not None, reason="no Triton interpreter")
)
DOUBLE = torch.float64


def masks(batch=B, steps=T):
    """Some, none and all; some begin with the first step."""
    yield torch.rand(batch, steps) < 0.3
    yield torch.zeros(batch, steps, dtype=torch.bool)
    yield torch.ones(batch, steps, dtype=torch.bool)
    yield torch.arange(steps).expand(batch, steps) == 2 * torch.arange(batch).unsqueeze(1)


def apart(function, reset, of_steps, of_rows, of_all, state=None, time=-1):
    """The outputs of ``function``, called for each stream and episode.

    Args:
        of_steps: tensors by name, batch first, with the steps at ``time``; these are cut.
        of_rows: tensors with the batch first.
        of_all: other arguments.
        state: the name of one of ``of_rows`` that the first episode has, unless it begins at the first step.
    """
    rows = []
    for b in range(len(reset)):
        starts = sorted({0, *reset[b].nonzero().flatten().tolist(), reset.shape[1]})
        parts = []
        for begin, end in itertools.pairwise(starts):
            given = {name: t[b : b + 1].narrow(time, begin, end - begin) for name, t in of_steps.items()}
            given |= {name: t[b : b + 1] for name, t in of_rows.items()}
            if state is not None and (begin > 0 or reset[b, 0]):
                given[state] = torch.zeros_like(given[state])
            found = function(**given, **of_all)
            parts.append(found if isinstance(found, tuple) else (found,))
        rows.append([torch.cat(outputs, time) for outputs in zip(*parts, strict=True)])
    return tuple(torch.cat(outputs) for outputs in zip(*rows, strict=True))


def check(function, reset, of_steps, of_rows, of_all, bound, state=None, time=-1):
    """Results and gradients with ``reset`` are those of the episodes apart in float64 by the reference."""
    leaves = of_steps | of_rows | of_all
    results = {}
    for name, convert in (("found", lambda t: t), ("expected", torch.Tensor.double)):
        typed = {
            key: convert(t.detach()).requires_grad_() if isinstance(t, torch.Tensor) else t for key, t in leaves.items()
        }
        groups = [{key: typed[key] for key in group} for group in (of_steps, of_rows, of_all)]
        if name == "found":
            outputs = function(**typed, reset=reset)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = [torch.randn_like(y) for y in outputs]
        else:
            with seqaccel.backend("reference"):
                outputs = apart(function, reset, *groups, state, time)
        tensors = [t for t in typed.values() if isinstance(t, torch.Tensor)]
        gradients = torch.autograd.grad(
            outputs, tensors, [g.to(outputs[0].dtype) for g in grads], allow_unused=True, materialize_grads=True
        )
        results[name] = (*outputs, *gradients)
    for i, (found, wanted) in enumerate(zip(results["found"], results["expected"], strict=True)):
        assert found.shape == wanted.shape
        assert error(found.detach(), wanted.detach()) < bound, i


def bounds(backend):
    if backend != "triton":
        yield DOUBLE, 1e-13
    if backend in ("cpp", "triton"):
        yield torch.float32, 2e-6


@pytest.mark.parametrize("backend", ["reference", CPP, TRITON, "torch"])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(activation="silu", groups=2), dict(activation="relu", groups=4), dict(activation="gated")],
    ids=str,
)
def test_causal_conv2d(options, backend, poison):
    S, groups = 5, options.get("groups", 1)
    for dtype, bound in bounds(backend):
        for mask, kernel in zip(masks(), [(3, 3), (2, 1), (3, 3), (3, 5)], strict=True):
            weight = torch.randn(8, 4 // groups, *kernel, dtype=dtype)
            context = 2 * (kernel[0] - 1)
            with seqaccel.backend(backend):
                check(
                    lambda **t: SF.causal_conv2d(**t, dilation=(2, 1), **options),
                    mask,
                    {"x": torch.randn(B, 4, T, S, dtype=dtype)},
                    {"initial_state": torch.randn(B, 4, context, S, dtype=dtype)},
                    {"weight": weight, "bias": torch.randn(8, dtype=dtype)},
                    bound,
                    state="initial_state",
                    time=2,
                )


@pytest.mark.parametrize("backend", ["reference", CPP, TRITON, "torch"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_temporal_block(activation, backend, poison):
    for dtype, bound in bounds(backend):
        for mask, gate in zip(masks(), [False, True, False, True], strict=True):
            weights = {
                "weight_1": torch.randn(12 if gate else 6, 4, 3, dtype=dtype),
                "bias_1": torch.randn(12 if gate else 6, dtype=dtype),
                "weight_2": torch.randn(6, 6, 3, dtype=dtype),
                "g_2": torch.rand(6, 1, 1, dtype=dtype) + 0.5,
                "downsample_weight": torch.randn(6, 4, 1, dtype=dtype),
            }
            options = {"dilation": 2, "activation": activation, "use_gate": gate}
            with seqaccel.backend(backend):
                check(
                    lambda **t: SF.temporal_block(bias_2=None, **t, **options),  # noqa: B023
                    mask,
                    {"x": torch.randn(B, 4, T, dtype=dtype)},
                    {},
                    weights,
                    bound,
                )


@pytest.mark.parametrize("backend", ["reference", CPP, TRITON, "torch"])
@pytest.mark.parametrize("with_state", [False, True])
def test_wavenet_layer(with_state, backend, poison):
    for dtype, bound in bounds(backend):
        for mask in masks():
            rows = {"global_condition": torch.randn(B, 12, dtype=dtype)}
            if with_state:
                rows["initial_state"] = torch.randn(B, 5, 4, dtype=dtype)
            with seqaccel.backend(backend):
                check(
                    lambda **t: SF.wavenet_layer(bias=None, dilation=2, **t),
                    mask,
                    {
                        "x": torch.randn(B, 5, T, dtype=dtype),
                        "skip": torch.randn(B, 3, T, dtype=dtype),
                        "condition": torch.randn(B, 12, T, dtype=dtype),
                    },
                    rows,
                    {"weight": torch.randn(12, 5, 3, dtype=dtype), "output_weight": torch.randn(8, 6, 1, dtype=dtype)},
                    bound,
                    state="initial_state" if with_state else None,
                )


def spoilt_functions():
    """A function of x (1, 4, 24) or a grid, by name."""
    weight, square = torch.randn(4, 4, 3), torch.randn(8, 6, 1)
    grid, kernels = torch.randn(4, 4, 3, 3), torch.randn(8, 1, 3, 5)
    gates, down = torch.randn(12, 4, 3), torch.randn(4, 4, 2)
    yield "grid", (5,), lambda x, reset: SF.causal_conv2d(x, grid, dilation=(2, 1), reset=reset)
    yield "depthwise grid", (5,), lambda x, reset: SF.causal_conv2d(x, kernels, dilation=(2, 1), groups=4, reset=reset)
    yield "block", (), lambda x, reset: SF.temporal_block(x, weight, None, down, None, dilation=2, reset=reset)
    yield "layer", (), lambda x, reset: SF.wavenet_layer(x, gates, None, square, dilation=2, reset=reset)[0]


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no C++ kernels")
@pytest.mark.parametrize("isa", instruction_sets())
def test_what_is_not_finite_stays_in_its_episode(isa):
    """In x, and in the gradient of the outputs."""
    reset = torch.zeros(1, 24, dtype=torch.bool)
    reset[0, [8, 13]] = True
    with seqaccel.backend("cpp"), seqaccel.backends.isa(isa):
        for name, columns, function in spoilt_functions():
            x, bad = torch.randn(1, 4, 24, *columns), torch.zeros(24, dtype=torch.bool)
            bad[8:13] = True

            def run(x, grad=None, function=function):
                x = x.clone().requires_grad_()
                y = function(x, reset=reset)
                grad = torch.ones_like(y) if grad is None else grad
                return y.detach(), torch.autograd.grad(y, x, grad)[0]

            y, grad_x = run(x)
            for value in (float("nan"), float("inf")):
                spoilt, grad = x.clone(), torch.ones_like(y)
                spoilt[:, :, bad] = grad[:, :, bad] = value
                assert torch.equal(run(spoilt)[0][:, :, ~bad], y[:, :, ~bad]), name
                assert torch.equal(run(x, grad)[1][:, :, ~bad], grad_x[:, :, ~bad]), name


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no C++ kernels")
@pytest.mark.parametrize("isa", instruction_sets())
def test_long_depthwise_rows(isa, poison):
    """Longer than a strip and than the context, with several outputs of a channel; grids of many rows."""
    with seqaccel.backend("cpp"), seqaccel.backends.isa(isa):
        for (kernel, dilation), density in itertools.product([(4, 1), (3, 40)], [0.01, 0.1]):
            check(
                lambda **t: SF.causal_conv1d(**t, dilation=dilation, groups=3, activation="relu"),  # noqa: B023
                torch.rand(2, 1300) < density,
                {"x": torch.randn(2, 3, 1300, dtype=DOUBLE)},
                {"initial_state": torch.randn(2, 3, (kernel - 1) * dilation, dtype=DOUBLE)},
                {"weight": torch.randn(6, 1, kernel, dtype=DOUBLE)},
                1e-13,
                state="initial_state",
            )
            check(
                lambda **t: SF.causal_conv2d(**t, groups=3),
                torch.rand(2, 70) < density,
                {"x": torch.randn(2, 3, 70, 9, dtype=DOUBLE)},
                {"initial_state": torch.randn(2, 3, 2, 9, dtype=DOUBLE)},
                {"weight": torch.randn(6, 1, 3, 3, dtype=DOUBLE)},
                1e-13,
                state="initial_state",
                time=2,
            )


@pytest.mark.skipif(why_missing("cpp", "cpu") is not None, reason="no C++ kernels")
def test_long_rows():
    """Rows that threads share, longer than a tile and than the context."""
    for shape, dilation in (((2, 20, 700), 40), ((1, 6, 2100), 3)):
        mask = torch.rand(shape[0], shape[2]) < 0.01
        C = shape[1]
        state = {"initial_state": torch.randn(shape[0], C, 2 * dilation, dtype=DOUBLE)}
        with seqaccel.backend("cpp"):
            check(
                lambda **t: SF.wavenet_layer(bias=None, dilation=dilation, **t),  # noqa: B023
                mask,
                {"x": torch.randn(shape, dtype=DOUBLE)},
                state,
                {"weight": torch.randn(2 * C, C, 3, dtype=DOUBLE), "output_weight": torch.randn(C + 3, C, 1).double()},
                1e-12,
                state="initial_state",
            )
            check(
                lambda **t: SF.temporal_block(bias_1=None, dilation=dilation, **t),  # noqa: B023
                mask,
                {"x": torch.randn(shape, dtype=DOUBLE)},
                {},
                {"weight_1": torch.randn(C, C, 3, dtype=DOUBLE), "weight_2": torch.randn(C, C, 2, dtype=DOUBLE)},
                1e-12,
            )


# ---- modules: the constructor, the input of so many steps, and the axis of its steps ----


def sequence(length):
    return torch.randn(B, 4, length)


def words(length):
    return torch.randint(7, (B, length))


MODULES = {
    "CausalConv1d": (lambda: nn.CausalConv1d(4, 6, 3, dilation=2, activation="silu"), sequence, 2),
    "CausalConv1d depthwise": (lambda: nn.CausalConv1d(4, 4, 5, groups=4), sequence, 2),
    "CausalConv1d channels_last": (
        lambda: nn.CausalConv1d(4, 6, 3, channels_last=True),
        lambda length: sequence(length).mT,
        1,
    ),
    "GatedConv1d": (lambda: nn.GatedConv1d(4, 6, 3), sequence, 2),
    "CausalConv2d": (lambda: nn.CausalConv2d(4, 6, 3), lambda length: torch.randn(B, 4, length, 5), 2),
    "CausalConvTranspose1d": (lambda: nn.CausalConvTranspose1d(4, 6, 5, stride=2), sequence, 2),
    "TemporalBlock": (lambda: nn.TemporalBlock(4, 6, 3, 2, dropout=0.0), sequence, 2),
    "TCN": (lambda: nn.TCN(4, [6, 6], 3, dropout=0.0), sequence, 2),
    "TCN options": (
        lambda: nn.TCN(
            4, [6, 5], 3, 0.0, activation="gelu", use_gate=True, use_skip_connections=True, input_shape="NLC",
            output_projection=3,
        ),
        lambda length: sequence(length).mT,
        1,
    ),
    "WaveNetLayer": (lambda: nn.WaveNetLayer(4, 5, 3, dilation=2), sequence, 2),
    "WaveNet": (lambda: nn.WaveNet(4, 5, 6, 6, layers=3, input_kernel_size=2), sequence, 2),
    "WaveNet of words": (lambda: nn.WaveNet(7, residual_channels=6, layers=2, embedding=True), words, -1),
    "GatedConvLM": (lambda: nn.GatedConvLM(7, 4, 6, 2, 3, bottleneck_channels=4), words, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_their_episodes_apart(name):
    make, inputs, time = MODULES[name]
    for dtype, close in ((torch.float32, (1e-4, 1e-5)), (DOUBLE, (1e-9, 1e-12))):
        model = make().to(dtype)
        for mask in masks():
            x = inputs(T)
            x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
            leaves = [x, *model.parameters()] if x.requires_grad else list(model.parameters())
            y = model(x, reset=mask)
            (y, *others) = y if isinstance(y, tuple) else (y,)
            wanted, *wanted_others = apart(model, mask, {"x": x}, {}, {}, time=time)
            grad = torch.randn_like(y)
            found = torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True)
            expected = torch.autograd.grad(wanted, leaves, grad, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(
                (y, *others, *found), (wanted, *wanted_others, *expected), rtol=close[0], atol=close[1]
            )


STREAMS = ["TemporalBlock", "TCN", "TCN options", "WaveNetLayer", "WaveNet", "WaveNet of words", "GatedConvLM"]


@pytest.mark.parametrize("name", STREAMS)
def test_chunks_with_resets(name):
    """A chunk goes on from the state up to its first reset; the state after it is that of the last episode."""
    make, inputs, time = MODULES[name]
    model = make().eval()
    before, x, after = inputs(4), inputs(T), inputs(3)
    first = lambda found: found[0] if isinstance(found, tuple) else found  # noqa: E731
    for mask in masks():
        _, state = model.extend(before, model.init_state(B))
        y, state = model.extend(x, state, reset=mask)
        z, _ = model.extend(after, state)
        whole = torch.cat([before, x, after], time)
        reset = torch.nn.functional.pad(mask, (4, 3))
        expected = first(model(whole, reset=reset))
        found = torch.cat([first(y), first(z)], time)
        torch.testing.assert_close(found, expected.narrow(time, 4, T + 3), rtol=1e-4, atol=1e-5)


def test_strided_and_unbatched():
    conv, mask = nn.CausalConv1d(4, 6, 3, stride=2), torch.rand(B, T) < 0.3
    x = sequence(T)
    plain = nn.CausalConv1d(4, 6, 3)
    plain.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x, reset=mask), plain(x, reset=mask)[..., ::2])
    for model in (plain, nn.CausalConv2d(4, 6, 3), nn.CausalConvTranspose1d(4, 6, 5, stride=2)):
        x = torch.randn(B, 4, T, 5) if isinstance(model, nn.CausalConv2d) else sequence(T)
        torch.testing.assert_close(model(x[1], reset=mask[1]), model(x, reset=mask)[1])


@pytest.mark.parametrize("name", MODULES)
def test_errors_name_the_argument(name):
    make, inputs, _ = MODULES[name]
    model, x, mask = make(), inputs(T), torch.zeros(B, T, dtype=torch.bool)
    for bad in (mask.int(), mask.t(), mask[:, :4], mask.to("meta"), [True]):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="reset"):
            model(x, reset=bad)


@pytest.mark.parametrize("name", ["TCN", "WaveNet", "CausalConv2d"])
def test_compiled(name):
    make, inputs, _ = MODULES[name]
    model, x, mask = make(), inputs(T), torch.rand(B, T) < 0.3
    expected = model(x, reset=mask)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, reset=mask), expected)
