"""causal_conv1d in bfloat16 and float16 on a CPU: kernels that read and write values of 16 bits."""

import functools

import pytest
import torch
from instruction_sets import USABLE_NARROW_ISAS
from test_conv import EPILOGUES, SHAPES, assert_within_bound, case, identity, inputs, on, run, stock
from test_conv_sequences import problem
from tolerances import assert_as_good_as, assert_close

import seqaccel
import seqaccel.functional as SF

DTYPES = [torch.bfloat16, torch.float16]


def exact_of(tensors, options):
    return run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)


@functools.cache
def cases(dtype):
    """(tensors, options, exact results) of every shape with a third of the epilogues."""
    found = [case(shape, epilogue, dtype) for i, shape in enumerate(SHAPES) for epilogue in EPILOGUES[i % 3 :: 3]]
    return [(tensors, options, exact_of(tensors, options)) for tensors, options in found]


@pytest.mark.parametrize("isa", USABLE_NARROW_ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpp_matches_reference(dtype, isa, poison):
    for tensors, options, exact in cases(dtype):
        with seqaccel.backends.isa(isa):
            assert_within_bound(run(on("cpp"), tensors, options), exact)


@pytest.mark.parametrize("isa", USABLE_NARROW_ISAS)
@pytest.mark.parametrize("kind", ["reset", "cu_seqlens"])
def test_sequences(kind, isa, poison):
    for shape in SHAPES[1:8]:
        tensors, options = problem(kind, shape, dict(activation="gelu", initial_state=True), torch.bfloat16)
        with seqaccel.backends.isa(isa):
            assert_within_bound(run(on("cpp"), tensors, options), exact_of(tensors, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 256, 256, 300, 3, 16, 1), (1, 171, 70, 200, 5, 1, 1), (2, 64, 64, 9000, 4, 2, 64)], ids=identity
)
def test_a_real_size_is_as_accurate_as_torch(shape, dtype):
    """The second depth is odd and more than a panel's, the third is of depthwise pieces."""
    tensors, options = case(shape, dict(activation="relu", residual=True), dtype)
    exact, theirs = exact_of(tensors, options), run(stock, tensors, options)
    for isa in USABLE_NARROW_ISAS:
        with seqaccel.backends.isa(isa):
            for name, value in run(on("cpp"), tensors, options).items():
                assert value.dtype == dtype
                assert_as_good_as(value, theirs[name], exact[name], what=f"{name} {isa}")


@pytest.mark.parametrize("isa", USABLE_NARROW_ISAS)
def test_memory_layouts(isa):
    """Views: transposed, expanded, every second step, and weights and inputs that begin at an odd element."""
    with seqaccel.backends.isa(isa), seqaccel.backend("cpp"):
        for O in (6, 12):
            tensors = inputs((2, 4, O, 50, 3, 2, 1), torch.bfloat16)
            x, weight, bias = tensors["x"], tensors["weight"], tensors["bias"]
            expected = SF.causal_conv1d(x, weight, bias, dilation=2)
            views = {
                "transposed": (x.transpose(1, 2).contiguous().transpose(1, 2), weight),
                "every second": (torch.stack([x, x], -1).flatten(2)[..., ::2], weight),
                "odd": tuple(torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, weight)),
            }
            for name, (view, kernel) in views.items():
                assert torch.equal(SF.causal_conv1d(view, kernel, bias, dilation=2), expected), name
            row = x[:1].expand(2, -1, -1)
            assert torch.equal(SF.causal_conv1d(row, weight, bias, dilation=2)[1], expected[0])


@pytest.mark.parametrize("isa", USABLE_NARROW_ISAS)
def test_special_values(isa):
    """NaN and infinity reach the outputs that see them, and no others."""
    tensors = inputs((1, 5, 7, 90, 3, 2, 1), torch.bfloat16)
    for dtype in DTYPES:
        x, weight = (tensors[name].to(dtype) for name in ("x", "weight"))
        for value in (float("nan"), float("inf")):
            x[0, 2, 41] = value
            with seqaccel.backends.isa(isa), seqaccel.backend("cpp"):
                y = SF.causal_conv1d(x, weight, dilation=2)
            seen = torch.zeros(90, dtype=torch.bool)
            seen[[41, 43, 45]] = True
            assert torch.equal(~y[0].isfinite(), seen.expand(7, 90))
        largest = torch.full((1, 1, 4), torch.finfo(dtype).max, dtype=dtype)
        with seqaccel.backends.isa(isa), seqaccel.backend("cpp"):
            assert torch.equal(SF.causal_conv1d(largest, largest.new_ones(1, 1, 1)), largest)
            assert SF.causal_conv1d(largest, largest.new_full((1, 1, 1), 2.0)).isinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_of_the_function(dtype):
    """A stride, a gate with groups, few and many steps and an FFT: float32's results, rounded."""
    for shape, options in (
        ((2, 6, 8, 33, 4, 2, 2), dict(stride=3, activation="silu")),
        ((2, 6, 8, 33, 4, 2, 2), dict(activation="glu")),
        ((1, 2, 2, 600, 512, 1, 2), dict(activation="relu")),
        ((1, 8, 8, 0, 3, 1, 1), dict(activation="relu")),
    ):
        tensors = inputs(shape, dtype)
        options |= {"dilation": shape[5], "groups": shape[6]}
        exact = SF.causal_conv1d(**{name: t.double() for name, t in tensors.items()}, **options)
        y = SF.causal_conv1d(**tensors, **options)
        assert y.dtype == dtype
        assert_close(y, exact, "conv", dtype, what=str(options))


def test_compiled():
    """One graph, and under autocast the operator in autocast's dtype."""
    tensors, options = case((2, 20, 30, 50, 3, 2, 1), dict(activation="gelu"), torch.bfloat16)
    compiled = torch.compile(on("cpp"), fullgraph=True, backend="aot_eager")
    for name, value in run(compiled, tensors, options).items():
        assert value.dtype == torch.bfloat16
        assert_close(value, exact_of(tensors, options)[name], "conv", torch.bfloat16, backward=name != "y", what=name)
    wide = {name: t.float() for name, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(**wide, **options), on("cpp")(**tensors, **options))
