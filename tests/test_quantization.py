"""Recurrent layers with packed int8 and bfloat16 weights inside a model."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqaccel

pytestmark = pytest.mark.skipif(seqaccel._extension.cpp_error is not None, reason="needs the C++ kernels")

T, B, I, H = 7, 5, 12, 16
LAYERS = {
    "lstm": lambda **options: torch.nn.LSTM(I, H, **options),
    "gru": lambda **options: torch.nn.GRU(I, H, **options),
    "rnn": lambda **options: torch.nn.RNN(I, H, **options),
    "projection": lambda **options: torch.nn.LSTM(I, H, proj_size=6, **options),
    "peephole": lambda **options: seqaccel.nn.PeepholeLSTM(I, H, zoneout=0.2, **options),
    "layer norm": lambda **options: seqaccel.nn.LayerNormGRU(I, H, **options),
}
OPTIONS = {
    "one": {},
    "batch first": {"num_layers": 2, "batch_first": True},
    "bidirectional": {"num_layers": 2, "bidirectional": True, "bias": False},
}
#: Largest difference of an output or a state from float32.
BOUNDS = {"int8": 0.08, "bfloat16": 0.03}


def tensors(result):
    output, state = result
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


@pytest.mark.parametrize("weights", BOUNDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_outputs_and_states(name, options, weights):
    if name == "layer norm" and options == "bidirectional":
        options = "one"
    layer = LAYERS[name](**OPTIONS[options]).eval()
    x = torch.randn(B, T, I) if layer.batch_first else torch.randn(T, B, I)
    lengths = torch.tensor([3, T, 1, T, 5])
    packed = pack_padded_sequence(x, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    _, state = layer(x)
    state = tuple(map(torch.randn_like, state)) if isinstance(state, tuple) else torch.randn_like(state)
    calls = [(x,), (x, state), (packed,), (packed, state), (x.select(0 if layer.batch_first else 1, 2),)]
    expected = [tensors(layer(*call)) for call in calls]
    keys = list(layer.state_dict())
    assert seqaccel.quantize(layer, weights) is layer and f"weights={weights}" in repr(layer)
    found = [tensors(layer(*call)) for call in calls]
    torch.testing.assert_close(found, expected, atol=BOUNDS[weights], rtol=0)
    assert not all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert list(layer.state_dict()) == keys
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(tensors(other(x)), found[0], rtol=0, atol=0)
    seqaccel.revert(layer)
    torch.testing.assert_close([tensors(layer(*call)) for call in calls], expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_episodes_inside_a_sequence(options):
    layer = seqaccel.nn.LSTM(I, H, **OPTIONS[options]).eval()
    x, reset = torch.randn(T, B, I), torch.rand(T, B) < 0.4
    if layer.batch_first:
        x, reset = x.transpose(0, 1), reset.T
    _, state = layer(x)
    expected = tensors(layer(x, state, reset=reset))
    seqaccel.quantize(layer, "bfloat16")
    torch.testing.assert_close(tensors(layer(x, state, reset=reset)), expected, atol=BOUNDS["bfloat16"], rtol=0)


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.encoder = torch.nn.Embedding(9, I), torch.nn.GRU(I, H, bidirectional=True)
        self.cell, self.head = torch.nn.GRUCell(2 * H, 4), torch.nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.cell(self.encoder(self.embedding(tokens))[0][-1]))


def test_a_model_and_its_errors():
    model = Tagger()
    batches = [torch.randint(9, (T, B)) for _ in range(3)]
    quantized, report = seqaccel.quantize(model, loader=[(batch,) for batch in batches])
    assert quantized is model and model.training
    rows = {row.path: row for row in report}
    assert list(rows) == ["encoder", "cell", "(model)"] and rows["encoder"].target == "int8"
    assert 0 < rows["encoder"].error < 0.02 and 0 < rows["(model)"].error < 0.02
    assert rows["cell"].reason.startswith("a cell") and type(model.cell) is torch.nn.GRUCell
    model(batches[0]).sum().backward()  # trains in float32
    assert model.encoder.weight_hh_l0.grad.abs().sum() > 0
    assert isinstance(model.encoder, torch.nn.GRU) and not model.eval()(batches[0]).isnan().any()


@torch.no_grad()
def test_changed_weights_are_packed_again():
    layer, x = torch.nn.LSTM(I, H).eval(), torch.randn(T, B, I)
    weight_norm(layer, "weight_hh_l0")
    seqaccel.quantize(layer, "bfloat16")
    before = layer(x)[0]
    layer.parametrizations.weight_hh_l0.original0.mul_(3)
    after = layer(x)[0]
    assert not torch.allclose(before, after, atol=1e-2)
    torch.testing.assert_close(seqaccel.revert(layer)(x)[0], after, atol=BOUNDS["bfloat16"], rtol=0)


def test_what_stays_and_bad_arguments():
    model = torch.nn.Sequential(torch.nn.LSTM(I, H), torch.nn.LSTM(H, H).double(), torch.nn.LSTM(H, H))
    seqaccel.convert(model[2])
    _, report = seqaccel.quantize(model, filter_fn=lambda module, path: path != "2", report=True)
    assert [row.target for row in report] == ["int8", "", ""]
    assert "expected float32 parameters" in report.rows[1].reason and report.rows[2].reason == "left out by filter_fn"
    assert isinstance(model[2], seqaccel.nn.LSTM)
    with pytest.raises(ValueError, match="expected weights to be one of"):
        seqaccel.quantize(model, "int4")
    with pytest.raises(TypeError, match="expected model"):
        seqaccel.quantize(None)
    with pytest.raises(TypeError, match="report"):
        seqaccel.quantize(model, report="yes")
    layer = model[0].eval()
    with pytest.raises(RuntimeError, match="cannot record"):
        torch.jit.trace(layer, torch.randn(T, B, I))
