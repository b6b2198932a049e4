"""seqaccel.nn.SRU: the `sru` package's results and checkpoints, streaming, and what a module must survive."""

from __future__ import annotations

import copy
import io
import pathlib
import pickle

import pytest
import sru_package
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqaccel
from seqaccel import backends
from seqaccel.nn import SRU

DOUBLE = torch.float64
RECORDED = sru_package.load(str(pathlib.Path(__file__).parent / "data" / "sru.npz"))

CPP = pytest.param(
    "cpp", marks=pytest.mark.skipif(backends.why_missing("cpp", "cpu") is not None, reason="no C++ kernels")
)
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(backends.why_missing("triton", "cpu") is not None, reason="no Triton interpreter"),
)


def part(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def build(case):
    arguments, tensors = RECORDED[case]
    arguments = dict(arguments)
    if "custom_m" in arguments:
        arguments["custom_m"] = sru_package.custom(arguments["custom_m"])
    return SRU(**arguments), tensors


# ---- the package ----


@pytest.mark.parametrize("backend", ["reference", CPP, TRITON])
@pytest.mark.parametrize("case", RECORDED)
def test_agrees_with_the_package(case, backend, poison):
    model, tensors = build(case)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in part(tensors, "state/").items()
    }
    model = model.double()
    model.load_state_dict(part(tensors, "state/"))
    model.eval()
    inputs = {k: v.clone() for k, v in part(tensors, "in/").items()}
    mask_pad = inputs.pop("mask_pad", None)
    mask_pad = None if mask_pad is None else mask_pad.bool()
    masks = iter(part(tensors, "mask/").values())
    if part(tensors, "mask/"):
        model.train()
        for layer in model.rnn_lst:
            layer._dropout_mask = lambda *_: next(masks)
    for t in inputs.values():
        t.requires_grad_()
    chosen = "auto" if case == "custom_weights" and backend != "reference" else backend
    with seqaccel.backend(chosen):
        output, c_n = model(inputs["x"], inputs.get("c0"), mask_pad)
        assert_close(output, tensors["out/output"], "scan", DOUBLE, what="output")
        assert_close(c_n, tensors["out/c_n"], "scan", DOUBLE, what="c_n")
        grad_outputs = [tensors["gradout/output"], tensors["gradout/c_n"]]
        torch.autograd.backward([output, c_n], grad_outputs)
    found = {k: v.grad for k, v in (*inputs.items(), *model.named_parameters()) if v.grad is not None}
    wanted = part(tensors, "grad/")
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert_close(found[name], grad, "scan", DOUBLE, backward=True, what=f"grad {name}")
    if "inference/output" in tensors:
        with torch.no_grad(), seqaccel.backend(chosen):
            model.float().eval()
            c0 = inputs["c0"].float() if "c0" in inputs else None
            output, c_n = model(inputs["x"].float(), c0, mask_pad)
        torch.testing.assert_close(output.double(), tensors["inference/output"], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(c_n.double(), tensors["inference/c_n"], rtol=1e-5, atol=2e-6)


def test_starts_as_the_package_does():
    model = SRU(300, 200, num_layers=2, dropout=0.36, rescale=True, highway_bias=-2.0, bidirectional=True)
    first, second = model.rnn_lst
    scale = (1 + 2 * torch.tensor(-2.0).exp()).sqrt().item()
    for layer in (first, second):
        assert layer.scale_x.item() == pytest.approx(scale)
        assert (layer.bias[:400] == 0).all() and (layer.bias[400:] == -2).all()
        assert layer.weight_c.var().item() == pytest.approx(0.5, rel=0.2)
        matrices = layer.weight.view(layer.weight.shape[0], -1, layer.num_matrices)
        variance = matrices.var(dim=(0, 1)) * layer.weight.shape[0]
        kept = 0.64 if layer is first else 1.0
        wanted = [kept, 0.5, 0.5, scale**2][: layer.num_matrices]
        torch.testing.assert_close(variance, torch.tensor(wanted), rtol=0.03, atol=0)
    assert (SRU(3, 4, v1=True).rnn_lst[0].weight_c == 0).all()
    assert not SRU(3, 4, v1=True).rnn_lst[0].weight_c.requires_grad


@pytest.mark.parametrize("projection_size", [0, 2])
def test_loads_checkpoints_of_version_3(projection_size):
    model = SRU(5, 4, projection_size=projection_size)
    checkpoint = {}
    for name, t in model.state_dict().items():
        if name.endswith(".weight"):
            name = name.replace(
                ".weight", ".transform_module.1.weight" if projection_size else ".transform_module.weight"
            )
            t = t.t()
        elif name.endswith(".weight_proj"):
            name, t = name.replace(".weight_proj", ".transform_module.0.weight"), t.t()
        checkpoint[name] = t.clone()
    other = SRU(5, 4, projection_size=projection_size)
    other.load_state_dict(checkpoint)
    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(other(x), model(x))


# ---- training ----


def test_dropout_is_of_the_training_mode_and_not_on_the_last_layer():
    model = SRU(6, 6, num_layers=2, dropout=0.5)
    assert [layer.dropout for layer in model.rnn_lst] == [0.5, 0.0]
    x = torch.randn(4, 3, 6)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])
    assert SRU(6, 6, dropout=1.0)(x)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", CPP])
def test_double_backward(backend):
    model = SRU(3, 2, bidirectional=True, rescale=True).double()
    x = torch.randn(3, 2, 3, dtype=DOUBLE, requires_grad=True)
    with seqaccel.backend(backend):
        assert torch.autograd.gradgradcheck(lambda t: model(t)[0], x)


def test_autocast_returns_float32():
    model = SRU(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, c_n = model(torch.randn(4, 2, 8))
    assert output.dtype == c_n.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_module(dtype):
    model = SRU(8, 8).to(dtype)
    output, c_n = model(torch.randn(4, 2, 8, dtype=dtype))
    assert output.dtype == c_n.dtype == dtype
    output.sum().backward()


def test_packed_sequences():
    model = SRU(3, 4, bidirectional=True)
    lengths = [3, 5, 1]
    x = torch.randn(5, 3, 3)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, c_n = model(packed)
    assert isinstance(output, PackedSequence)
    padded, _ = pad_packed_sequence(output)
    for b, length in enumerate(lengths):
        alone, c_alone = model(x[:length, b : b + 1])
        torch.testing.assert_close(padded[:length, b : b + 1], alone)
        torch.testing.assert_close(c_n[:, b : b + 1], c_alone)
        assert (padded[length:, b] == 0).all()


# ---- streaming ----


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_any_split_gives_what_one_call_gives(chunks, layer_norm, rescale, seed):
    torch.manual_seed(seed)
    model = SRU(5, 7, num_layers=3, layer_norm=layer_norm, rescale=rescale).eval()
    x = torch.randn(sum(chunks), 2, 5)
    with torch.no_grad():
        whole, c_n = model(x)
        state, parts = model.init_state(2), []
        for chunk in x.split(chunks) if sum(chunks) else [x]:
            y, state = model.extend(chunk, state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(state[0].transpose(0, 1), c_n)


def test_streams_step_reset_select_and_save():
    model = SRU(3, 4, num_layers=2).eval()
    x = torch.randn(6, 3, 3)
    with torch.no_grad():
        state = model.init_state(3)
        assert state[0].shape == (3, 2, 4)
        for t in range(3):
            y, state = model.step(x[t], state)
            assert y.shape == (3, 4)
        before = state[0].clone()
        fresh = model.reset(state, torch.tensor([True, False, True]))
        assert torch.equal(state[0], before)
        assert (fresh[0][[0, 2]] == 0).all() and torch.equal(fresh[0][1], before[1])
        picked = model.select(state, torch.tensor([2, 2, 0, 1]))
        assert torch.equal(picked[0], before[[2, 2, 0, 1]])
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        (loaded,) = torch.load(file)
        assert torch.equal(loaded, before)
        restarted, _ = model.extend(x[3:], fresh)
        torch.testing.assert_close(restarted[:, 0], model(x[3:])[0][:, 0])
        torch.testing.assert_close(restarted[:, 1], model(x)[0][3:, 1])


def test_bidirectional_refuses_to_stream():
    model = SRU(3, 4, bidirectional=True)
    state = (torch.zeros(2, 2, 8),)
    for call in (
        lambda: model.init_state(2),
        lambda: model.extend(torch.zeros(1, 2, 3), state),
        lambda: model.step(torch.zeros(2, 3), state),
        lambda: model.reset(state, torch.ones(2, dtype=torch.bool)),
    ):
        with pytest.raises(RuntimeError, match="bidirectional SRU sees the future"):
            call()


# ---- the module ----


def test_copies_and_pickles():
    model = SRU(3, 4, layer_norm=True, projection_size=2).eval()
    x = torch.randn(4, 2, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x)[0], model(x)[0])
    assert "3, 4" in repr(model) and "projection_size=2" in repr(model)


@pytest.mark.parametrize("training", [False, True])
def test_compiles(training):
    model = SRU(3, 4, rescale=True, layer_norm=True).train(training)
    x = torch.randn(5, 2, 3)
    expected, _ = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual, _ = compiled(x)
    torch.testing.assert_close(actual, expected)
    if training:
        grads = torch.autograd.grad(expected.square().sum(), model.rnn_lst.parameters())
        actual_grads = torch.autograd.grad(actual.square().sum(), model.rnn_lst.parameters())
        for a, e in zip(actual_grads, grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [CPP, "reference"])
def test_batched_gradients(backend):
    layer, x = SRU(8, 8).double(), torch.randn(4, 2, 8, dtype=DOUBLE)
    with backends.backend(backend):
        found = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x, vectorize=True)
        expected = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(1, 1, 64), (64, 16, 64)], ids=str)
def test_exports_with_gradients_on(shape):
    layer, x = SRU(64, 64), torch.randn(shape)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x)[0], layer(x)[0])


def test_exports():
    model = SRU(3, 4).eval()
    x = torch.randn(5, 2, 3)
    steps = torch.export.Dim("steps", min=2, max=100)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: steps},))
    longer = torch.randn(9, 2, 3)
    torch.testing.assert_close(program.module()(longer), model(longer))


def test_empty_sequences_and_batches():
    model = SRU(3, 4)
    c0 = torch.randn(2, 2, 4)
    output, c_n = model(torch.zeros(0, 2, 3), c0)
    assert output.shape == (0, 2, 4) and torch.equal(c_n, c0)
    output, c_n = model(torch.zeros(5, 0, 3))
    assert output.shape == (5, 0, 4) and c_n.shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.zeros(2, 3)), ValueError, "input to be 3-D"),
        (lambda m: m(torch.zeros(4, 2, 5)), ValueError, "Expected 3, got 5"),
        (lambda m: m(torch.zeros(4, 2, 3), torch.zeros(2, 3, 4)), ValueError, r"Expected hidden size \(2, 2, 4\)"),
        (lambda m: m(torch.zeros(4, 2, 3), None, torch.zeros(2, 4)), ValueError, r"mask_pad to have shape \(4, 2\)"),
        (lambda m: m(torch.zeros(4, 2, 3), torch.zeros(2, 2, 4).double()), TypeError, "c_0 to have the dtype of input"),
        (lambda m: m.step(torch.zeros(1, 2, 3), m.init_state(2)), ValueError, "x_t to be 2-D"),
        (lambda m: m.reset(m.init_state(2), torch.zeros(3, dtype=torch.bool)), ValueError, "mask to be bool of shape"),
        (lambda m: SRU(0, 4), ValueError, "input_size must be greater than zero"),
        (lambda m: SRU(3, 4, num_layers=0), ValueError, "num_layers must be greater than zero"),
        (lambda m: SRU(3, 4, dropout=1.5), ValueError, "dropout should be a number in range"),
        (lambda m: SRU(3, 4, custom_m=[torch.nn.Linear(3, 16)]), ValueError, "one custom_m a layer, 2, but got 1"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(SRU(3, 4))
