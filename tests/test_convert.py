"""Swapping the layers of an existing model, and weights of other packages: their layouts are written out as loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import seqaccel

# ---- layers of a model ----


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.LSTM(6, 10, num_layers=2, bidirectional=True)
        self.head = torch.nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.encoder(x)[0])


class OwnLSTM(torch.nn.LSTM):
    pass


def test_the_converted_model_computes_the_same_with_the_same_parameters():
    model, x = Tagger(), torch.randn(7, 2, 6)
    expected, parameters, keys = model(x), list(model.parameters()), list(model.state_dict())
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    assert seqaccel.convert(model) is model
    assert type(model.encoder) is seqaccel.nn.LSTM
    assert [*map(id, model.parameters())] == [*map(id, parameters)] and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), expected)
    assert calls == [1]
    model(x).sum().backward()
    optimiser.step()
    restored = Tagger()
    restored.load_state_dict(model.state_dict())
    torch.testing.assert_close(restored(x), model(x))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (torch.nn.RNN(4, 5, nonlinearity="relu", bidirectional=True), "RNN"),
        (torch.nn.GRU(4, 5, num_layers=2, batch_first=True, bias=False), "GRU"),
        (torch.nn.LSTM(4, 5, proj_size=3), "LSTM"),
        (torch.nn.RNNCell(4, 5, nonlinearity="relu"), "RNNCell"),
        (torch.nn.GRUCell(4, 5), "GRUCell"),
        (torch.nn.LSTMCell(4, 5, bias=False), "LSTMCell"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_layer_of_torchs(layer, name):
    x = torch.randn(3, 4) if name.endswith("Cell") else torch.randn(7, 3, 4)
    expected, text = layer(x), repr(layer)
    assert seqaccel.convert(layer) is layer and type(layer) is getattr(seqaccel.nn, name) and repr(layer) == text
    torch.testing.assert_close(layer(x), expected)


def test_subclasses_are_left_alone():
    assert type(seqaccel.convert(torch.nn.Sequential(OwnLSTM(2, 3)))[0]) is OwnLSTM


# ---- haste ----


class Haste(torch.nn.Module):
    """A layer in haste's layout and terms: x kernel + bias + h recurrent_kernel, gates i, g, f, o or z, r, h."""

    def __init__(self, inputs, hidden, gru, norms, zoneout=0.0, dropout=0.0, batch_first=False):
        super().__init__()
        self.gru, self.norms, self.zoneout, self.dropout, self.batch_first = gru, norms, zoneout, dropout, batch_first
        rows = (3 if gru else 4) * hidden
        shapes = {"kernel": (inputs, rows), "recurrent_kernel": (hidden, rows), "bias": (rows,)}
        shapes |= {"recurrent_bias": (rows,)} if gru else {}
        shapes |= {"gamma": (2, rows)} if norms else {}
        shapes |= {"gamma_h": (hidden,), "beta_h": (hidden,)} if norms and not gru else {}
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape, dtype=torch.float64) * 0.5))

    def forward(self, input):
        """In eval."""
        input = input.transpose(0, 1) if self.batch_first else input
        hidden = self.recurrent_kernel.shape[0]
        h = c = torch.zeros(input.shape[1], hidden, dtype=input.dtype)

        def norm(x, i):
            return F.layer_norm(x, x.shape[-1:], self.gamma[i]) if self.norms else x

        outputs = []
        for x in input:
            old = h
            if self.gru:
                a, d = norm(x @ self.kernel, 0) + self.bias, norm(h @ self.recurrent_kernel, 1) + self.recurrent_bias
                (z, r, g), (rz, rr, rg) = a.chunk(3, 1), d.chunk(3, 1)
                z, r = torch.sigmoid(z + rz), torch.sigmoid(r + rr)
                h = z * h + (1 - z) * torch.tanh(g + r * rg)
            else:
                i, g, f, o = (norm(x @ self.kernel, 0) + norm(h @ self.recurrent_kernel, 1) + self.bias).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                inner = F.layer_norm(c, (hidden,), self.gamma_h, self.beta_h) if self.norms else c
                h = torch.sigmoid(o) * torch.tanh(inner)
            h = self.zoneout * old + (1 - self.zoneout) * h
            outputs.append(h)
        output = torch.stack(outputs)
        return (output.transpose(0, 1) if self.batch_first else output), h, c


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("gru", [False, True])
def test_from_haste(gru, norms, zoneout):
    layer = Haste(4, 6, gru, norms, zoneout, dropout=0.2, batch_first=norms).eval()
    ours = seqaccel.from_haste(layer)
    assert type(ours).__name__ == ("LayerNorm" if norms else "") + ("GRU" if gru else "LSTM")
    assert not ours.training and ours.recurrent_dropout == 0.2 and ours.batch_first == norms
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected, h, c = layer(x)
    output, state = ours(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state if gru else state[0], h[None])
    if not gru:
        torch.testing.assert_close(state[1], c[None])


def test_from_haste_takes_arrays_and_options():
    layer = Haste(4, 6, False, True)
    arrays = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    ours = seqaccel.from_haste(arrays, zoneout=0.1, dropout=0.4, batch_first=True)
    assert (ours.zoneout, ours.recurrent_dropout, ours.batch_first) == ((0.1, 0.0), 0.4, True)
    assert ours.weight_ih_l0.dtype == torch.float64 and ours.weight_ih_l0.requires_grad


def test_from_haste_names_what_does_not_fit():
    weights = dict(Haste(4, 6, True, False).state_dict())
    with pytest.raises(ValueError, match=r"without \['bias'\]"):
        seqaccel.from_haste({k: v for k, v in weights.items() if k != "bias"})
    with pytest.raises(ValueError, match=r"with \['u'\]"):
        seqaccel.from_haste(weights | {"u": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"expected bias to have shape \(18,\), but got \(17,\)"):
        seqaccel.from_haste(weights | {"bias": torch.zeros(17)})
    with pytest.raises(ValueError, match="belong to a layer-norm LSTM"):
        seqaccel.from_haste(weights | {"gamma_h": torch.zeros(6)})
    with pytest.raises(ValueError, match="has gamma_h and beta_h"):
        seqaccel.from_haste(dict(Haste(4, 6, False, False).state_dict()) | {"gamma": torch.zeros(2, 24)})


# ---- multiplicative LSTM ----


def published_mlstm(inputs, hidden, normed, dtype=torch.float64):
    shapes = {"wx": (inputs, 4 * hidden), "wh": (hidden, 4 * hidden), "wmx": (inputs, hidden), "wmh": (hidden, hidden)}
    gains = {"gx": (4 * hidden,), "gh": (4 * hidden,), "gmx": (hidden,), "gmh": (hidden,)} if normed else {}
    shapes |= {"b": (4 * hidden,)} | gains
    return {name: torch.randn(shape, dtype=dtype) / hidden**0.5 for name, shape in shapes.items()}


def mlstm_loop(weights, inputs):
    w = dict(weights)
    if "gx" in w:
        for name in ("wx", "wh", "wmx", "wmh"):
            w[name] = w[name] / w[name].norm(dim=0) * w[name.replace("w", "g")]
    h = c = torch.zeros(inputs.shape[1], w["wh"].shape[0], dtype=inputs.dtype)
    outputs = []
    for x in inputs:
        m = (x @ w["wmx"]) * (h @ w["wmh"])
        i, f, o, u = (x @ w["wx"] + m @ w["wh"] + w["b"]).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(u)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("normed", [False, True])
def test_from_mlstm(normed):
    weights, x = published_mlstm(3, 6, normed), torch.randn(5, 2, 3, dtype=torch.float64)
    expected, h, c = mlstm_loop(weights, x)
    output, (h_n, c_n) = seqaccel.from_mlstm({name: np.asarray(w) for name, w in weights.items()})(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close((h_n, c_n), (h[None], c[None]))


def test_from_mlstm_at_the_published_size():
    weights, x = published_mlstm(64, 4096, False, torch.float32), torch.randn(3, 1, 64)
    expected, _, c = mlstm_loop(weights, x)
    with torch.no_grad():
        output, (_, c_n) = seqaccel.from_mlstm(weights)(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(c_n[0], c)


def test_from_mlstm_names_what_does_not_fit():
    weights = published_mlstm(3, 6, True)
    with pytest.raises(ValueError, match=r"without \['wmh'\]"):
        seqaccel.from_mlstm({k: v for k, v in weights.items() if k != "wmh"})
    with pytest.raises(ValueError, match=r"all gains or none, but got \['gh', 'gmh', 'gmx'\]"):
        seqaccel.from_mlstm({k: v for k, v in weights.items() if k != "gx"})
    with pytest.raises(ValueError, match=r"expected wmh to have shape \(6, 6\)"):
        seqaccel.from_mlstm(weights | {"wmh": torch.zeros(3, 6)})
