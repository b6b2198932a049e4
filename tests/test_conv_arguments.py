"""causal_conv1d's stride, padding, states and layouts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import error

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn

BACKENDS = ["reference", "cpp", "torch", "triton"]
# C, O, K, stride, dilation, groups: the stride divides the dilation or not, is above K, shares a factor with it.
STRIDED = [
    (3, 5, 3, 2, 1, 1),
    (3, 5, 3, 2, 2, 1),
    (4, 6, 5, 3, 2, 2),
    (4, 4, 4, 4, 6, 4),
    (2, 3, 2, 5, 3, 1),
    (3, 2, 1, 3, 1, 1),
    (2, 4, 7, 2, 5, 1),
    (2, 2, 6, 6, 4, 1),
]


def operands(C, O, K, dilation, groups, T, dtype=torch.float64):
    torch.manual_seed(C + 10 * O + 100 * K + T)
    x, weight, bias = torch.randn(2, C, T), torch.randn(O, C // groups, K), torch.randn(O)
    return [t.to(dtype) for t in (x, weight, bias, torch.randn(2, C, (K - 1) * dilation))]


def stock(x, weight, bias, state, stride, dilation, groups):
    return F.conv1d(torch.cat([state, x], -1), weight, bias, stride, dilation=dilation, groups=groups)


def on(backend, *arguments, **options):
    with seqaccel.backend(backend):
        return SF.causal_conv1d(*arguments, **options)


@pytest.mark.parametrize("T", [0, 1, 5, 24, 41])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", STRIDED, ids=str)
def test_stride(shape, backend, T):
    C, O, K, stride, dilation, groups = shape
    dtype = torch.float32 if backend == "triton" else torch.float64
    tolerance = 1e-5 if backend == "triton" else 1e-13
    options = dict(stride=stride, dilation=dilation, groups=groups)
    for started in (False, True):
        x, weight, bias, state = operands(C, O, K, dilation, groups, T, dtype)
        if not started:
            state = torch.zeros_like(state)
        wanted = [t.requires_grad_() for t in (x, weight, bias, state)]
        y = on(backend, x, weight, bias, initial_state=state if started else None, **options)
        assert y.shape == (2, O, -(-T // stride))
        if T == 0:
            continue
        expected = stock(*(t.double() for t in wanted), **options)
        assert error(y, expected) < tolerance
        grad = torch.randn_like(expected)
        found = torch.autograd.grad(y, wanted, grad.to(dtype), allow_unused=True)
        for name, ours, theirs in zip("xwbs", found, torch.autograd.grad(expected, wanted, grad), strict=True):
            if ours is not None:
                assert error(ours, theirs) < tolerance, name
        assert started == (found[3] is not None)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("shape", [STRIDED[1], STRIDED[2]], ids=str)
def test_gradcheck(shape, backend):
    C, O, K, stride, dilation, groups = shape
    tensors = [t.requires_grad_() for t in operands(C, O, K, dilation, groups, 9)]
    for channels_last, mode in itertools.product((False, True), ("given", "zeros", "replicate")):

        def function(x, weight, bias, state, channels_last=channels_last, mode=mode):
            return on(
                backend, x.transpose(1, 2) if channels_last else x, weight, bias, stride=stride, dilation=dilation,
                groups=groups, channels_last=channels_last, activation="tanh", return_final_state=True,
                initial_state=state if mode == "given" else None, padding_mode="zeros" if mode == "given" else mode,
            )  # fmt: skip

        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_replicate_is_torchs_padding(backend, stride):
    for K, dilation, T in ((3, 2, 11), (4, 5, 2), (1, 1, 4)):
        x, weight, bias, state = operands(3, 5, K, dilation, 1, T, torch.float32)
        options = dict(stride=stride, dilation=dilation)
        expected = F.conv1d(F.pad(x, (state.shape[2], 0), "replicate"), weight, bias, **options)
        y, final = on(backend, x, weight, bias, padding_mode="replicate", return_final_state=True, **options)
        assert error(y, expected) < 1e-5
        assert torch.equal(final, F.pad(x, (state.shape[2], 0), "replicate")[..., T:])
        y = on(backend, x, weight, bias, padding_mode="replicate", initial_state=state, **options)
        assert error(y, on(backend, x, weight, bias, initial_state=state, **options)) == 0
        assert on(backend, x[..., :0], weight, padding_mode="replicate", **options).shape == (2, 5, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_last_is_the_transpose(backend):
    x, weight, bias, state = operands(4, 6, 3, 2, 2, 15, torch.float32)
    options = dict(dilation=2, groups=2, activation="relu", initial_state=state, return_final_state=True)
    for stride in (1, 2):
        residual = torch.randn(2, 6, -(-15 // stride))
        expected, final = on(backend, x, weight, bias, residual=residual, stride=stride, **options)
        for layout in (lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2).contiguous()):
            y, last = on(
                backend,
                layout(x),
                weight,
                bias,
                residual=layout(residual),
                stride=stride,
                channels_last=True,
                **options,
            )
            assert torch.equal(y, expected.transpose(1, 2)) and torch.equal(last, final)
    with pytest.raises(ValueError, match=r"x to be 3D \(B, T, C\)"):
        SF.causal_conv1d(x[0], weight, channels_last=True)
    with pytest.raises(ValueError, match=r"residual to have shape \(2, 15, 6\)"):
        SF.causal_conv1d(x.transpose(1, 2), weight, groups=2, residual=torch.randn(2, 6, 15), channels_last=True)


@pytest.mark.parametrize("T", [0, 1, 4, 5, 30])
def test_final_state(T):
    x, weight, _, state = operands(3, 5, 3, 2, 1, T)
    for given_state in (None, state):
        x.requires_grad_(), state.requires_grad_()
        _, final = SF.causal_conv1d(x, weight, dilation=2, initial_state=given_state, return_final_state=True)
        before = torch.zeros_like(state) if given_state is None else state
        assert torch.equal(final, torch.cat([before, x], -1)[..., T:])
        assert final.untyped_storage().nbytes() == final.numel() * 8  # not the whole of x
        if T:
            (grad,) = torch.autograd.grad(final.sum(), x)
            assert torch.equal(grad[0, 0], (torch.arange(T) >= T - 4).double())


def test_layouts_and_narrow_types():
    x, weight, bias, state = operands(4, 6, 3, 2, 1, 15, torch.float32)
    options = dict(stride=3, dilation=2, return_final_state=True)
    expected, final = SF.causal_conv1d(x, weight, bias, initial_state=state, **options)
    odd = [t.flip(-1).transpose(0, -1).contiguous().transpose(0, -1).flip(-1) for t in (x, weight, bias, state)]
    y, last = SF.causal_conv1d(odd[0], odd[1], odd[2], initial_state=odd[3], **options)
    assert torch.equal(y, expected) and torch.equal(last, final)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [t.to(dtype) for t in (x, weight, bias, state)]
        y, last = SF.causal_conv1d(*narrow[:3], initial_state=narrow[3], **options)
        exact, _ = SF.causal_conv1d(*(t.double() for t in narrow[:3]), initial_state=narrow[3].double(), **options)
        assert y.dtype == last.dtype == dtype and error(y, exact) <= torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        y, last = SF.causal_conv1d(x, weight, bias, initial_state=state, **options)
    assert y.dtype == torch.bfloat16 and torch.equal(last, final)


def test_transforms():
    x, weight, bias, _ = operands(3, 5, 3, 2, 1, 12)

    def loss(x, weight):
        y, last = SF.causal_conv1d(
            x, weight, bias, stride=3, dilation=2, padding_mode="replicate", return_final_state=True
        )
        return y.square().sum() + last.square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), (0, None))(torch.stack([x, 2 * x]), weight)
    for i in range(2):
        for ours, theirs in zip(grads, torch.func.grad(loss, (0, 1))((i + 1) * x, weight), strict=True):
            assert torch.allclose(ours[i], theirs)


MODULES = {
    "stride": lambda: snn.CausalConv1d(4, 6, 3, stride=2, activation="relu"),
    "stride of a dilation": lambda: snn.CausalConv1d(4, 6, 4, stride=3, dilation=6, groups=2),
    "replicate": lambda: snn.CausalConv1d(4, 6, 3, dilation=3, padding_mode="replicate"),
    "channels last": lambda: snn.CausalConv1d(4, 6, 3, dilation=2, channels_last=True, activation="glu"),
    "all": lambda: snn.CausalConv1d(4, 6, 5, stride=2, padding_mode="replicate", channels_last=True),
}


@pytest.mark.parametrize("name", MODULES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_chunking_gives_what_one_call_gives(name, data):
    module = MODULES[name]().double()
    time = 1 if module.channels_last else 2
    x = torch.randn(3, 4, 36, dtype=torch.float64)
    x = x.transpose(1, 2) if module.channels_last else x
    cuts = sorted(data.draw(st.lists(st.integers(0, 36 // module.stride), max_size=5)))
    state, parts = module.init_state(3), []
    for begin, end in itertools.pairwise([0, *(module.stride * cut for cut in cuts), 36]):
        if end - begin == 1 and module.stride == 1:
            y, state = module.step(x.select(time, begin), state)
            parts.append(y.unsqueeze(time))
        else:
            y, state = module.extend(x.narrow(time, begin, end - begin), state)
            parts.append(y)
    assert torch.allclose(torch.cat(parts, time), module(x), atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_streams_are_independent(name):
    module = MODULES[name]().double()
    time = 1 if module.channels_last else 2
    x = torch.randn(4, *((30, 4) if module.channels_last else (4, 30)), dtype=torch.float64)
    before, after = x.split(12, time)[0], x.narrow(time, 12, 18)
    _, state = module.extend(before, module.init_state(4))
    state = module.reset(state, torch.tensor([False, True, False, True]))
    y, _ = module.extend(after[[1, 0]], module.select(state, torch.tensor([1, 0])))
    assert torch.allclose(y[0], module(after[1:2])[0], atol=1e-12)
    assert torch.allclose(y[1], module(x[:1])[0].narrow(time - 1, 12 // module.stride, 18 // module.stride), atol=1e-12)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_and_exported(name):
    torch._dynamo.reset()
    module = MODULES[name]().eval()
    x = torch.randn(2, *((24, 4) if module.channels_last else (4, 24)))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for sizes in (x, torch.cat([x, x], 1 if module.channels_last else 2)):
        found, expected = [
            torch.autograd.grad(f(sizes).square().sum(), list(module.parameters())) for f in (compiled, module)
        ]
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    dims = {0: torch.export.Dim.AUTO, (1 if module.channels_last else 2): torch.export.Dim.AUTO}
    exported = torch.export.export(module, (x,), dynamic_shapes=(dims,)).module()
    again = torch.randn(3, *((36, 4) if module.channels_last else (4, 36)))
    assert torch.allclose(exported(again), module(again), atol=1e-6)


def test_unbatched_and_what_is_printed():
    module = MODULES["all"]()
    x = torch.randn(20, 4)
    y, state = module(x, return_final_state=True)
    assert y.shape == (10, 6) and torch.equal(y, module(x[None])[0]) and state.shape == (4, 4)
    assert repr(module).endswith("kernel_size=5, stride=2, padding_mode='replicate', channels_last=True)")


def test_errors():
    module = MODULES["stride"]()
    with pytest.raises(RuntimeError, match="call extend"):
        module.step(torch.randn(2, 4), module.init_state(2))
    with pytest.raises(ValueError, match="multiple of stride=2 steps, but got 3"):
        module.extend(torch.randn(2, 4, 3), module.init_state(2))
    with pytest.raises(ValueError, match="stride=1, but got 2"):
        seqaccel.Session(module, 1)
    with pytest.raises(ValueError, match="padding_mode='zeros', but got 'replicate'"):
        seqaccel.Session(MODULES["replicate"](), 1)


def test_a_session_takes_the_modules_layout():
    module = MODULES["channels last"]().eval()
    x = torch.randn(2, 9, 4)
    with torch.no_grad():
        assert torch.allclose(seqaccel.Session(module, 2).extend(x), module(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_long_filters(dtype):
    """Depthwise, by FFT: as the kernel, with states, bias, residual and gradients."""
    for T, K, options in ((512, 512, {}), (777, 600, {"activation": "gelu"}), (530, 1024, {"activation": "glu"})):
        x, weight, bias, state = operands(4, 4, K, 1, 4, T, dtype)
        weight = weight / K**0.5
        tensors = [t.requires_grad_() for t in (x, weight, bias, state)]
        residual = torch.randn(2, 2 if options.get("activation") == "glu" else 4, T).to(dtype)
        for started in (True, False):
            wanted = tensors if started else tensors[:3]
            results = []
            for backend in ("auto", "cpp"):
                with seqaccel.backend(backend), torch.profiler.profile() as profile:
                    y = SF.causal_conv1d(
                        x, weight, bias, groups=4, residual=residual, initial_state=state if started else None,
                        output_activation="relu", **options,
                    )  # fmt: skip
                assert ("aten::fft_rfft" in {event.key for event in profile.key_averages()}) == (backend == "auto")
                grad = torch.ones_like(y).cumsum(-1) / T
                results.append([y, *torch.autograd.grad(y, wanted, grad)])
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
            for ours, theirs in zip(*results, strict=True):
                assert ours.dtype == dtype and error(ours, theirs) < tolerance
    exact = SF.causal_conv1d(*(t.double() for t in (x, weight, bias)), groups=4)
    assert error(SF.causal_conv1d(x, weight, bias, groups=4), exact) < {torch.float64: 1e-12}.get(dtype, 0.01)


def test_long_filters_gradcheck():
    x, weight, bias, state = (t.requires_grad_() for t in operands(2, 2, 513, 1, 2, 515))

    def function(x, weight, bias, state):
        return SF.causal_conv1d(x, weight, bias, groups=2, activation="tanh", initial_state=state)

    assert torch.autograd.gradcheck(function, (x, weight, bias, state), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, state), fast_mode=True)


def test_when_long_filters_stay_with_the_kernel():
    x, weight, *_ = operands(4, 4, 512, 1, 4, 600, torch.float32)
    exported = torch.export.export(Long(weight), (x,), dynamic_shapes=({2: torch.export.Dim("T", min=2)},)).module()
    for T in (1, 511, 512, 600):
        found = SF.causal_conv1d(x[..., :T], weight, groups=4)
        with seqaccel.backend("cpp"):
            assert error(found, SF.causal_conv1d(x[..., :T], weight, groups=4)) < 1e-5
        if T > 1:
            assert error(exported(x[..., :T]), found) < 1e-5


class Long(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x):
        return SF.causal_conv1d(x, self.weight, groups=4)
