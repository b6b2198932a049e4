"""The Triton kernels of a WaveNet layer."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import error

import seqaccel
import seqaccel.functional as SF
from seqaccel.kernels import conv

# B, C, G, S, T, K, dilation: tails of tiles, several tiles of time and of rows, taps beyond the start, no skip channel.
SHAPES = [(2, 5, 7, 9, 37, 3, 4), (1, 20, 40, 70, 70, 2, 8), (1, 16, 16, 3, 65, 2, 1), (1, 3, 33, 0, 9, 3, 5)]
OPTIONAL = ("bias", "output_bias", "skip", "condition", "global_condition", "history")
NAMES = ("x", "weight", "bias", "output_weight", "output_bias", "skip", "condition", "global_condition", "history")
#: What the backward operator returns, and the gradient of y and of s' it gets.
RESULTS = ("x", "weight", "bias", "output_weight", "output_bias", "condition", "global_condition", "history")


def operands(shape, given=OPTIONAL, dtype=torch.float32, device="cpu"):
    B, C, G, S, T, K, dilation = shape
    sizes = {
        "x": (B, C, T), "weight": (2 * G, C, K), "bias": (2 * G,), "output_weight": (C + S, G, 1),
        "output_bias": (C + S,), "skip": (B, S, T), "condition": (B, 2 * G, T), "global_condition": (B, 2 * G),
        "history": (B, C, (K - 1) * dilation),
    }  # fmt: skip
    tensors = {name: torch.randn(sizes[name]) for name in NAMES if name not in OPTIONAL or name in given}
    tensors["weight"] /= (C * K) ** 0.5
    tensors["output_weight"] /= G**0.5
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def plain(x, weight, output_weight, dilation, bias=None, output_bias=None, skip=0, condition=0, global_condition=None,
          history=None):  # fmt: skip
    """The layer as published, in torch."""
    context = (weight.shape[2] - 1) * dilation
    padded = F.pad(x, (context, 0)) if history is None else torch.cat([history, x], -1)
    v = F.conv1d(padded, weight, bias, dilation=dilation) + condition
    if global_condition is not None:
        v = v + global_condition.unsqueeze(-1)
    value, gate = v.chunk(2, 1)
    out = F.conv1d(value.tanh() * gate.sigmoid(), output_weight, output_bias)
    return x + out[:, : x.shape[1]], skip + out[:, x.shape[1] :]


def check(tensors, dilation, bound, residual=True):
    """Outputs and gradients, all in one call and each alone, are those of float64."""
    exact = {name: t.double().requires_grad_() for name, t in tensors.items()}
    expected = plain(**exact, dilation=dilation)
    y, skip, saved = conv.wavenet_layer_forward(*map(tensors.get, NAMES), None, dilation, residual, True)
    assert error(skip, expected[1]) < bound and (y.numel() == 0 if not residual else error(y, expected[0]) < bound)
    grads = torch.randn_like(tensors["x"]) if residual else None, torch.randn_like(skip)
    first = 0 if residual else 1
    doubles = [g.double() for g in grads[first:]]
    wanted = torch.autograd.grad(expected[first:], list(exact.values()), doubles, allow_unused=True)
    wanted = dict(zip(exact, wanted, strict=True))
    given = (
        *grads,
        saved,
        tensors["x"],
        tensors["weight"],
        tensors["output_weight"],
        tensors.get("history"),
        None,
        dilation,
    )
    found = dict(zip(RESULTS, conv.wavenet_layer_backward(*given, 255), strict=True))
    for i, name in enumerate(RESULTS):
        if name in tensors:
            assert error(found[name], wanted[name]) < bound, name
            alone = conv.wavenet_layer_backward(*given, 1 << i)
            assert torch.equal(alone[i], found[name]) and sum(t.numel() for t in alone) == found[name].numel(), name


@pytest.mark.parametrize("given", [OPTIONAL, ()], ids=["everything", "nothing"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_is_the_published_one(shape, given, poison):
    check(operands(shape, given), shape[-1], 2e-6)


def test_last_layer_has_only_a_skip_connection(poison):
    check(operands(SHAPES[0]), 4, 2e-6, residual=False)


def test_float16():
    check(operands(SHAPES[0], dtype=torch.float16), 4, 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 64, 64, 64, 1000, 2, 64), (2, 96, 128, 200, 515, 3, 7)], ids=str)
def test_layer_on_a_gpu(shape, dtype, bound, allow_tf32):
    allow_tf32(False)
    check(operands(shape, dtype=dtype, device="cuda"), shape[-1], bound)


@pytest.mark.parametrize("shape", [SHAPES[0], (1, 3, 130, 4, 6, 2, 1)], ids=str)
def test_public_function(shape):
    """With more gates than a program holds, too."""
    results, dilation = [], shape[-1]
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        tensors = {name: t.requires_grad_() for name, t in operands(shape).items()}
        given = {name.replace("history", "initial_state"): t for name, t in tensors.items()}
        with seqaccel.backend(backend):
            y, skip = SF.wavenet_layer(**given, dilation=dilation)
        grads = torch.autograd.grad((y, skip), list(tensors.values()), (torch.ones_like(y), torch.ones_like(skip)))
        results.append((y, skip, *grads))
    for name, ours, expected in zip(("y", "s", *tensors), *results, strict=True):
        assert error(ours, expected) < 2e-6, name


def test_nothing_of_the_future():
    """Not even a NaN."""
    tensors, t = operands(SHAPES[0]), 20
    expected = conv.wavenet_layer_forward(*map(tensors.get, NAMES), None, 4, True, False)
    tensors["x"][..., t:] = float("nan")
    found = conv.wavenet_layer_forward(*map(tensors.get, NAMES), None, 4, True, False)
    for ours, wanted in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(ours[..., :t], wanted[..., :t])


def test_empty_and_refused():
    tensors = operands((2, 5, 7, 9, 0, 3, 4))
    y, skip, saved = conv.wavenet_layer_forward(*map(tensors.get, NAMES), None, 4, True, True)
    grads = conv.wavenet_layer_backward(
        y, skip, saved, tensors["x"], tensors["weight"], tensors["output_weight"], tensors["history"], None, 4, 255
    )
    assert y.shape == (2, 5, 0) and skip.shape == (2, 9, 0) and not any(grad.any() for grad in grads)
    tensors = operands((1, 3, 129, 4, 5, 2, 1))
    with pytest.raises(RuntimeError, match="up to 128 gates"):
        conv.wavenet_layer_forward(*map(tensors.get, NAMES), None, 1, True, True)
    tensors = operands(SHAPES[0])
    tensors["skip"] = tensors["skip"][..., 1:]
    with pytest.raises(ValueError, match="expected skip to be torch.float32 of shape"):
        conv.wavenet_layer_forward(*map(tensors.get, NAMES), None, 4, True, True)
