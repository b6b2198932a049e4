"""The causal transposed convolution."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tolerances import error

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn

# C, O, K, stride, dilation, groups
SHAPES = [
    (3, 5, 7, 3, 1, 1),
    (4, 6, 4, 2, 1, 2),
    (4, 4, 8, 4, 1, 4),
    (3, 5, 3, 2, 4, 1),
    (2, 3, 4, 6, 2, 1),
    (2, 4, 3, 2, 3, 1),
    (3, 2, 2, 5, 1, 1),
    (3, 2, 1, 3, 1, 1),
    (3, 4, 3, 1, 2, 1),
]


def operands(C, O, K, stride, dilation, groups, T=11, dtype=torch.float64):
    torch.manual_seed(C + 10 * O + 100 * K + T)
    context = (K - 1) * dilation // stride
    shapes = (2, C, T), (C, O // groups, K), (O,), (2, C, context)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def stock(x, weight, bias, state, stride, dilation, groups):
    """Torch's, cut to the outputs of x."""
    full = F.conv_transpose1d(torch.cat([state, x], -1), weight, None, stride, dilation=dilation, groups=groups)
    begin, length = state.shape[2] * stride, x.shape[2] * stride
    return F.pad(full, (0, begin + length - full.shape[2]))[..., begin:] + bias.unsqueeze(-1)


@pytest.mark.parametrize("backend", ["reference", "cpp", "torch"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_cut_on_the_right(shape, backend):
    options = dict(zip(("stride", "dilation", "groups"), shape[3:], strict=True))
    for T, started in itertools.product((1, 2, 11), (False, True)):
        tensors = operands(*shape, T)
        if not started:
            tensors[3].zero_()
        for t in tensors:
            t.requires_grad_()
        with seqaccel.backend(backend):
            y = SF.causal_conv_transpose1d(*tensors[:3], initial_state=tensors[3] if started else None, **options)
        expected = stock(*tensors, **options)
        assert error(y, expected) < 1e-13
        grad = torch.randn_like(expected)
        wanted = tensors if started else tensors[:3]
        found = torch.autograd.grad(y, wanted, grad)
        for ours, theirs in zip(found, torch.autograd.grad(expected, wanted, grad), strict=True):
            assert error(ours, theirs) < 1e-13
    assert SF.causal_conv_transpose1d(tensors[0][..., :0], *tensors[1:3], **options).shape[2] == 0


@pytest.mark.parametrize("shape", SHAPES[:6], ids=str)
def test_gradcheck(shape):
    options = dict(zip(("stride", "dilation", "groups"), shape[3:], strict=True))
    tensors = [t.requires_grad_() for t in operands(*shape, 5)]

    def function(x, weight, bias, state):
        return SF.causal_conv_transpose1d(
            x, weight, bias, activation="tanh", initial_state=state, return_final_state=True, **options
        )

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_activations_layouts_and_narrow_types():
    x, weight, bias, state = operands(4, 6, 6, 3, 1, 1, dtype=torch.float32)
    options = dict(stride=3, initial_state=state)
    plain = SF.causal_conv_transpose1d(x, weight, bias, **options)
    assert error(SF.causal_conv_transpose1d(x, weight, bias, activation="relu", **options), plain.relu()) == 0
    glu = SF.causal_conv_transpose1d(x, weight, bias, activation="glu", **options)
    assert error(glu, F.glu(plain, 1)) < 1e-6
    odd = [t.flip(-1).transpose(0, -1).contiguous().transpose(0, -1).flip(-1) for t in (x, weight, bias, state)]
    assert torch.equal(SF.causal_conv_transpose1d(*odd[:3], stride=3, initial_state=odd[3]), plain)
    narrow = [t.bfloat16() for t in (x, weight, bias, state)]
    y = SF.causal_conv_transpose1d(*narrow[:3], stride=3, initial_state=narrow[3])
    exact = SF.causal_conv_transpose1d(*(t.double() for t in narrow[:3]), stride=3, initial_state=narrow[3].double())
    assert y.dtype == torch.bfloat16 and error(y, exact) <= torch.finfo(torch.bfloat16).eps
    with torch.autocast("cpu", torch.bfloat16):
        assert SF.causal_conv_transpose1d(x, weight, bias, **options).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_streams(shape):
    C, O, K, stride, dilation, groups = shape
    module = snn.CausalConvTranspose1d(C, O, K, stride=stride, dilation=dilation, groups=groups).double()
    x = torch.randn(2, C, 14, dtype=torch.float64)
    whole = module(x)
    state, parts = module.init_state(2), []
    for begin, end in itertools.pairwise([0, 1, 4, 4, 9, 10, 14]):
        if end - begin == 1:
            y, state = module.step(x[..., begin], state)
        else:
            y, state = module.extend(x[..., begin:end], state)
        parts.append(y)
    assert torch.allclose(torch.cat(parts, -1), whole, atol=1e-13)
    changed = x.clone()
    changed[..., 9:] = float("nan")
    assert torch.equal(module(changed)[..., : 9 * stride], whole[..., : 9 * stride])
    y, last = module(x[0], return_final_state=True)
    assert torch.allclose(y, whole[0]) and last.shape == (C, module.context)


def test_parameters_are_torchs():
    stock = torch.nn.ConvTranspose1d(6, 4, 5, stride=2, groups=2)
    module = snn.CausalConvTranspose1d(6, 4, (5,), stride=2, groups=2, activation="silu")
    module.load_state_dict(stock.state_dict())
    x = torch.randn(3, 6, 10)
    assert torch.allclose(module(x), F.silu(stock(x)[..., :20]), atol=1e-6)
    torch.manual_seed(0), stock.reset_parameters()
    torch.manual_seed(0), module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), module.parameters(), strict=True))
    assert repr(module) == "CausalConvTranspose1d(6, 4, kernel_size=5, stride=2, groups=2, activation='silu')"


def test_errors():
    x, weight = torch.randn(2, 4, 5), torch.randn(4, 3, 4)
    for arguments, options, message in (
        ((x[0], weight), {}, "x to be 3D"),
        ((x, weight[0]), {}, "weight to be 3D"),
        ((x[:, :3], weight), {}, "x to have 4 channels"),
        ((x, weight), {"groups": 3}, "divisible by groups=3"),
        ((x, weight, torch.randn(4)), {}, r"bias to have shape \(3,\)"),
        ((x, weight), {"initial_state": x, "stride": 2}, r"initial_state to have shape \(2, 4, 1\)"),
        ((x, weight), {"activation": "glu"}, "even number of output channels"),
        ((x.double(), weight), {}, "weight to have the dtype"),
        ((x.long(), weight), {}, "floating point"),
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError), match="causal_conv_transpose1d: .*" + message):
            SF.causal_conv_transpose1d(*arguments, **options)
