"""Weights of other packages: their layouts are written out as loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import seqaccel

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


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("gru", [False, True])
def test_haste_s_layers_in_a_model(gru, norms):
    kind = type("LSTM", (Haste,), {"__module__": "haste_pytorch.lstm"})
    layer, x = kind(4, 6, gru, norms, zoneout=0.3, batch_first=norms).eval(), torch.randn(5, 3, 4, dtype=torch.float64)
    expected, h, c = layer(x)
    before = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    _, report = seqaccel.convert(torch.nn.Sequential(layer), report=True)
    assert [row.target for row in report] == ["seqaccel.nn.LSTM"] and isinstance(layer, kind)
    output, state = layer(x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state if gru else state[0], h[None])
    if not gru:
        torch.testing.assert_close(state[1], c[None])
    after = torch.autograd.grad(output.square().sum(), list(layer.parameters()))
    torch.testing.assert_close(after, before)
    first, state = layer(x[:, :2] if norms else x[:2])
    rest, _ = layer(x[:, 2:] if norms else x[2:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1 if norms else 0), expected)
    assert type(seqaccel.revert(layer)) is kind


def test_haste_s_indrnn_in_a_model():
    class IndRNN(torch.nn.Module):
        __module__ = "haste_pytorch.indrnn"
        batch_first, zoneout = False, 0.0

        def __init__(self):
            super().__init__()
            for name, shape in (("kernel", (3, 4)), ("recurrent_scale", (4,)), ("bias", (4,))):
                self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))

    layer, x, h, rows = IndRNN(), torch.randn(5, 2, 3), torch.randn(2, 4), []
    output, h_n = seqaccel.convert(layer)(x, h[None])
    for x_t in x:
        h = torch.tanh(x_t @ layer.kernel + layer.bias + h * layer.recurrent_scale)
        rows.append(h)
    torch.testing.assert_close(output, torch.stack(rows))
    torch.testing.assert_close(h_n, h[None])
    zoned = IndRNN()
    zoned.zoneout = 0.1
    _, report = seqaccel.convert(zoned, report=True)
    assert [row.reason for row in report] == ["an IndRNN with zoneout"]


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


# ---- quasi-recurrent networks ----


def qrnn_weights(inputs, hidden, layers, window, gates):
    sizes = [inputs] + [hidden] * (layers - 1)
    weights = {}
    for i, size in enumerate(sizes):
        weights[f"layers.{i}.linear.weight"] = torch.randn(gates * hidden, window * size)
        weights[f"layers.{i}.linear.bias"] = torch.randn(gates * hidden)
    return weights


@pytest.mark.parametrize("window, gates, layers", [(1, 3, 1), (2, 3, 2), (2, 2, 3), (1, 2, 2)])
def test_from_qrnn(window, gates, layers):
    weights, x, hidden = qrnn_weights(3, 4, layers, window, gates), torch.randn(6, 2, 3), torch.randn(layers, 2, 4)
    given = {"window": window, "output_gate": gates == 3} if layers == 1 else {}
    module = seqaccel.from_qrnn(weights, zoneout=0.25, **given).eval()
    output, c_n = module(x, hidden)
    rows = x
    for i in range(layers):
        c, outputs, previous = hidden[i], [], torch.zeros_like(rows[0])
        for x_t in rows:
            source = torch.cat([x_t, previous], 1) if window == 2 else x_t
            y = source @ weights[f"layers.{i}.linear.weight"].T + weights[f"layers.{i}.linear.bias"]
            z, f, *o = y.chunk(gates, 1)
            f = torch.sigmoid(f) * (1 - 0.25)  # the package weighs the new value by f
            c = f * torch.tanh(z) + (1 - f) * c
            outputs.append(torch.sigmoid(o[0]) * c if o else c)
            previous = x_t
        rows = torch.stack(outputs)
        torch.testing.assert_close(c_n[i], c)
    torch.testing.assert_close(output, rows)


def test_from_qrnn_takes_a_module_s_options():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(6, 8)
            self.window, self.zoneout, self.output_gate = 2, 0.1, False

    class Package(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.dropout = torch.nn.ModuleList([Layer()]), 0.3

    module = seqaccel.from_qrnn(Package().eval())
    assert not module.training
    assert repr(module) == "QRNN(3, 4, dropout=0.3, window=2, zoneout=0.1, output_gate=False)"


def test_from_qrnn_names_what_does_not_fit():
    weights = qrnn_weights(3, 4, 2, 2, 3)
    with pytest.raises(ValueError, match="expected weights layers.0.linear.weight"):
        seqaccel.from_qrnn({"linear.weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="no QRNN has a second layer of 12 rows and 8 features"):
        seqaccel.from_qrnn(weights, window=1)
    with pytest.raises(ValueError, match=r"bias_ih_l0 to have shape \(12,\), but got \(5,\)"):
        seqaccel.from_qrnn(weights | {"layers.0.linear.bias": torch.zeros(5)})


# ---- IndRNN, minGRU, minLSTM ----


def test_from_haste_indrnn():
    weights = {"kernel": torch.randn(3, 4), "recurrent_scale": torch.randn(4), "bias": torch.randn(4)}
    module = seqaccel.from_haste(weights, batch_first=True)
    x, h, rows = torch.randn(2, 5, 3), torch.zeros(2, 4), []
    for t in range(5):
        h = torch.tanh(x[:, t] @ weights["kernel"] + weights["bias"] + h * weights["recurrent_scale"])
        rows.append(h)
    output, h_n = module(x)
    torch.testing.assert_close(output, torch.stack(rows, 1))
    torch.testing.assert_close(h_n[0], h)
    with pytest.raises(ValueError, match="an IndRNN has no zoneout"):
        seqaccel.from_haste(weights, zoneout=0.1)


@pytest.mark.parametrize("is_lstm", [False, True])
def test_from_mingru(is_lstm):
    def g(v):
        return torch.where(v >= 0, v + 0.5, v.sigmoid())

    name = "to_hidden_and_f_i_gate.weight" if is_lstm else "to_hidden_and_gate.weight"
    weight, x = torch.randn(12 if is_lstm else 8, 3), torch.randn(2, 5, 3)
    h, rows = torch.zeros(2, 4), []
    for t in range(5):
        v, *gates = (x[:, t] @ weight.T).chunk(3 if is_lstm else 2, 1)
        keep = 1 - gates[0].sigmoid()
        if is_lstm:
            keep = gates[0].sigmoid() / (gates[0].sigmoid() + gates[1].sigmoid())
        h = keep * h + (1 - keep) * g(v)
        rows.append(h)
    module = seqaccel.from_mingru({name: weight})
    assert type(module) is (seqaccel.nn.MinLSTM if is_lstm else seqaccel.nn.MinGRU)
    torch.testing.assert_close(module(x)[0], torch.stack(rows, 1))
    with pytest.raises(ValueError, match="to_out.weight"):
        seqaccel.from_mingru({name: weight, "to_out.weight": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match=f"expected {name} to have shape"):
        seqaccel.from_mingru({name: torch.zeros(7, 3)})
