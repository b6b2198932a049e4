"""The references of the recurrent cells against other implementations: torch.nn, ONNX Runtime, loops over scalars."""

import functools
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from rnn_cases import call, problem, results, some_lengths, zoneout_masks

T, B, I, H = 5, 3, 4, 6


# ---- torch.nn ----

MODES = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell, projected", [*((cell, False) for cell in MODES), ("lstm", True)])
def test_torch(cell, projected, reverse, with_lengths):
    """Outputs and every gradient."""
    tensors = problem(cell, T, B, I, H, projected=projected)
    options = {"reverse": reverse, "lengths": some_lengths(T, B) if with_lengths else None}
    grads = [torch.randn_like(t) for t in call(cell, tensors, "reference", **options)]
    ours, theirs = (results(cell, tensors, backend, grads, **options) for backend in ("reference", "torch"))
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("cell", MODES)
def test_torch_module(cell):
    """The module itself, without the backend ``torch`` in between."""
    tensors = problem(cell, T, B, I, H, requires_grad=False)
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    module = getattr(torch.nn, MODES[cell])(I, H, dtype=torch.float64, **options)
    module.load_state_dict({f"{name}_l0": t for name, t in tensors.items() if name.startswith(("weight", "bias"))})
    state = tensors["h_0"].unsqueeze(0)
    output, last = module(tensors["input"], (state, tensors["c_0"].unsqueeze(0)) if cell == "lstm" else state)
    found = call(cell, tensors, "reference")
    for ours, theirs in zip(found, [output, *(last if cell == "lstm" else [last])], strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape))


# ---- ONNX Runtime ----


def onnx_run(operator, inputs, outputs, reverse, **attributes):
    """One ONNX recurrent operator on float32 arrays; its outputs without the axis of directions."""
    named = {name: array for name, array in inputs.items() if array is not None}
    node = helper.make_node(
        operator, [name if name in named else "" for name in inputs], outputs,
        hidden_size=H, direction="reverse" if reverse else "forward", **attributes,
    )  # fmt: skip
    kind = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
    graph = helper.make_graph(
        [node], "layer",
        [helper.make_tensor_value_info(name, kind[a.dtype], a.shape) for name, a in named.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * (4 - (name != "Y"))) for name in outputs],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(a).squeeze(-3) for a in session.run(None, named)]


def arrays(tensors, order, gates):
    """W, R and B as ONNX orders gates; ``order`` says which of ours each is."""

    def rows(t):
        return torch.cat([t.chunk(gates)[i] for i in order])

    bias = torch.cat((rows(tensors["bias_ih"]), rows(tensors["bias_hh"])))
    found = {"W": rows(tensors["weight_ih"]), "R": rows(tensors["weight_hh"]), "B": bias}
    return {name: t.unsqueeze(0).numpy() for name, t in found.items()}


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "peephole_lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu"])
def test_onnx_runtime(cell, reverse, with_lengths):
    tensors = problem(cell, T, B, I, H, dtype=torch.float32, requires_grad=False)
    lengths = some_lengths(T, B) if with_lengths else None
    inputs = {"X": tensors["input"].numpy()}
    state = {"initial_h": tensors["h_0"].unsqueeze(0).numpy()}
    sequence = {"sequence_lens": None if lengths is None else lengths.int().numpy()}
    if "lstm" in cell:
        peephole = tensors.get("weight_peephole")
        state["initial_c"] = tensors["c_0"].unsqueeze(0).numpy()
        state["P"] = None if peephole is None else peephole[[0, 2, 1]].reshape(1, -1).numpy()  # i, o, f
        inputs |= arrays(tensors, (0, 3, 1, 2), 4) | sequence | state
        theirs = onnx_run("LSTM", inputs, ["Y", "Y_h", "Y_c"], reverse)
    elif "gru" in cell:
        inputs |= arrays(tensors, (1, 0, 2), 3) | sequence | state
        theirs = onnx_run("GRU", inputs, ["Y", "Y_h"], reverse, linear_before_reset=int(cell == "gru"))
    else:
        inputs |= arrays(tensors, (0,), 1) | sequence | state
        theirs = onnx_run("RNN", inputs, ["Y", "Y_h"], reverse, activations=[cell[4:].capitalize()])
    for ours, other in zip(call(cell, tensors, "reference", lengths=lengths, reverse=reverse), theirs, strict=True):
        torch.testing.assert_close(ours, other.reshape(ours.shape), rtol=1e-5, atol=1e-5)


# ---- loops over scalars, from the equations of SPEC's sources ----


def sigma(x):
    return 1 / (1 + math.exp(-x))


def dot(row, vector):
    return sum(w * v for w, v in zip(row, vector, strict=True))


def layer_norm(values, gain, offset=None):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    normal = [g * (v - mean) / math.sqrt(variance + 1e-5) for v, g in zip(values, gain, strict=True)]
    return normal if offset is None else [v + o for v, o in zip(normal, offset, strict=True)]


def layer_norm_lstm_step(w, x, h, c, normalize_cell):
    """haste's LayerNormLSTM: norm over all gates of each product, one bias, h from the normalised c."""
    a = layer_norm([dot(row, x) for row in w["weight_ih"]], w["ln_ih_weight"])
    d = layer_norm([dot(row, h) for row in w["weight_hh"]], w["ln_hh_weight"])
    v = [sum(parts) for parts in zip(a, d, w["bias_ih"], w["bias_hh"], strict=True)]
    i, f, g, o = (v[k * H : (k + 1) * H] for k in range(4))
    c = [sigma(f[j]) * c[j] + sigma(i[j]) * math.tanh(g[j]) for j in range(H)]
    normal = layer_norm(c, w["ln_c_weight"], w["ln_c_bias"])
    return [sigma(o[j]) * math.tanh(normal[j]) for j in range(H)], normal if normalize_cell else c


def layer_norm_gru_step(w, x, h):
    """haste's LayerNormGRU: norm over all gates of each product, a bias behind each, torch's order r, z, n."""
    a = layer_norm([dot(row, x) for row in w["weight_ih"]], w["ln_ih_weight"])
    d = layer_norm([dot(row, h) for row in w["weight_hh"]], w["ln_hh_weight"])
    a = [value + bias for value, bias in zip(a, w["bias_ih"], strict=True)]
    d = [value + bias for value, bias in zip(d, w["bias_hh"], strict=True)]
    new = []
    for j in range(H):
        r, z = sigma(a[j] + d[j]), sigma(a[H + j] + d[H + j])
        n = math.tanh(a[2 * H + j] + r * d[2 * H + j])
        new.append((1 - z) * n + z * h[j])
    return new


def multiplicative_lstm_step(w, x, h, c):
    """Krause et al.: m takes the place of h'."""
    m = [dot(w["weight_mx"][j], x) * dot(w["weight_mh"][j], h) for j in range(H)]
    v = [
        dot(w["weight_ih"][k], x) + dot(w["weight_hh"][k], m) + w["bias_ih"][k] + w["bias_hh"][k] for k in range(4 * H)
    ]
    i, f, g, o = (v[k * H : (k + 1) * H] for k in range(4))
    c = [sigma(f[j]) * c[j] + sigma(i[j]) * math.tanh(g[j]) for j in range(H)]
    return [sigma(o[j]) * math.tanh(c[j]) for j in range(H)], c


def gru_reset_before_step(w, x, h):
    """Cho et al.: the reset gate comes before the product."""
    a = [dot(w["weight_ih"][k], x) + w["bias_ih"][k] + w["bias_hh"][k] for k in range(3 * H)]
    r = [sigma(a[j] + dot(w["weight_hh"][j], h)) for j in range(H)]
    new = []
    for j in range(H):
        z = sigma(a[H + j] + dot(w["weight_hh"][H + j], h))
        n = math.tanh(a[2 * H + j] + dot(w["weight_hh"][2 * H + j], [r[k] * h[k] for k in range(H)]))
        new.append((1 - z) * n + z * h[j])
    return new


def ligru_step(w, x, h, c, phi):
    """Ravanelli et al.: one gate; c are factors of the candidate."""
    v = [dot(w["weight_ih"][k], x) + dot(w["weight_hh"][k], h) for k in range(2 * H)]
    v = [sum(parts) for parts in zip(v, w["bias_ih"], w["bias_hh"], strict=True)]
    mask = [1.0] * H if c is None else c
    z = [sigma(value) for value in v[H:]]
    return [z[j] * h[j] + (1 - z[j]) * mask[j] * phi(v[j]) for j in range(H)], None if c is None else [*c]


STEPS = {
    "layer_norm_lstm": lambda w, x, h, c: layer_norm_lstm_step(w, x, h, c, False),
    "layer_norm_lstm_normalized_cell": lambda w, x, h, c: layer_norm_lstm_step(w, x, h, c, True),
    "layer_norm_gru": lambda w, x, h, c: (layer_norm_gru_step(w, x, h), None),
    "gru_reset_before": lambda w, x, h, c: (gru_reset_before_step(w, x, h), None),
    "multiplicative_lstm": multiplicative_lstm_step,
    **{
        f"ligru_{name}{suffix}": functools.partial(ligru_step, phi=phi)
        for name, phi in (("relu", lambda v: max(v, 0.0)), ("tanh", math.tanh))
        for suffix in ("", "_masked")
    },
}


@pytest.mark.parametrize("zoneout", [False, True])
@pytest.mark.parametrize("cell", STEPS)
def test_loops_over_scalars(cell, zoneout):
    """Also zoneout as Krueger et al. have it: where the mask is 1 the old value stays, h coming from the fresh c."""
    tensors = problem(cell, T, B, I, H, requires_grad=False)
    masks = zoneout_masks(cell, tensors) if zoneout else {}
    found = call(cell, tensors, "reference", **masks)
    w = {name: t.tolist() for name, t in tensors.items()}
    for b in range(B):
        h, c = w["h_0"][b], w["c_0"][b] if "c_0" in w else None
        for t in range(T):
            new_h, new_c = STEPS[cell](w, w["input"][t][b], h, c)
            for state, new, mask in ((h, new_h, masks.get("zoneout_h")), (c, new_c, masks.get("zoneout_c"))):
                for j in range(H):
                    if mask is not None and mask[t, b, j]:
                        new[j] = state[j]
            h, c = new_h, new_c
            torch.testing.assert_close(found[0][t, b], torch.tensor(h, dtype=torch.float64))
        torch.testing.assert_close(found[1][b], torch.tensor(h, dtype=torch.float64))
        if c is not None:
            torch.testing.assert_close(found[2][b], torch.tensor(c, dtype=torch.float64))


@pytest.mark.parametrize("cell, projected", [("lstm", False), ("lstm", True), ("peephole_lstm", True), ("gru", False)])
def test_zoneout_is_a_loop_with_masks(cell, projected):
    """Cells that torch has: step by step through the layer without zoneout, blending outside."""
    tensors = problem(cell, T, B, I, H, projected=projected, requires_grad=False)
    masks = zoneout_masks(cell, tensors)
    found, step = call(cell, tensors, "reference", **masks), dict(tensors)
    for t in range(T):
        _, *states = call(cell, step | {"input": tensors["input"][t : t + 1]}, "reference")
        for name, new, mask in zip(("h_0", "c_0"), states, masks.values(), strict=False):
            step[name] = torch.where(mask[t] == 1, step[name], new)
        torch.testing.assert_close(found[0][t], step["h_0"])
    for name, last in zip(("h_0", "c_0"), found[1:], strict=False):
        torch.testing.assert_close(last, step[name])


def test_expected_zoneout_is_a_blend():
    tensors = problem("gru", 1, B, I, H, requires_grad=False)
    plain = call("gru", tensors, "reference")[1]
    blended = call("gru", tensors, "reference", zoneout_h=0.25)[1]
    torch.testing.assert_close(blended, 0.25 * tensors["h_0"] + 0.75 * plain)
