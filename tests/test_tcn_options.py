"""TCN's options against what the package `pytorch-tcn` computes (tests/tcn_package.py)."""

import pathlib
import pickle

import numpy as np
import pytest
import torch
from tcn_package import CASES

import seqaccel
import seqaccel.nn as snn

DATA = pathlib.Path(__file__).parent / "data" / "tcn.npz"


def recorded(name):
    arguments = {key: value for key, value in CASES[name].items() if key != "kernel_initializer"}
    module = snn.TCN(**arguments, dropout=0.0).double()
    with np.load(DATA) as data:
        values = {key.split("/")[1]: torch.from_numpy(data[key]) for key in data.files if key.startswith(name + "/")}
    module.load_state_dict({key[6:]: t for key, t in values.items() if key.startswith("state.")})
    return module, values


@pytest.mark.parametrize("name", CASES)
def test_parity_with_the_package(name):
    module, values = recorded(name)
    x = values["x"].clone().requires_grad_()
    y = module(x)
    assert torch.allclose(y, values["y"], rtol=1e-10, atol=1e-11)
    (y * values["weight"]).sum().backward()
    found = {f"grad.{key}": p.grad for key, p in module.named_parameters()} | {"grad.x": x.grad}
    assert found.keys() == {key for key in values if key.startswith("grad.")}
    for key, grad in found.items():
        assert torch.allclose(grad, values[key], rtol=1e-8, atol=1e-9), key


@pytest.mark.parametrize("name", CASES)
def test_streams_and_sessions(name):
    module, values = recorded(name)
    time, x = (1 if module.input_shape == "NLC" else 2), values["x"]
    module.eval()
    for recording in (True, False):
        with torch.set_grad_enabled(recording):
            state, parts = module.init_state(2), []
            for t in range(6):
                y, state = module.step(x.select(time, t), state)
                parts.append(y.unsqueeze(time))
            y, state = module.extend(x.narrow(time, 6, 7), state)
            assert torch.allclose(torch.cat([*parts, y], time), values["y"], rtol=1e-10, atol=1e-11)
    module.float()
    with torch.no_grad():
        x, expected = x.float(), module(x.float())
        session = seqaccel.Session(module, 2)
        assert torch.allclose(session.extend(x), expected, rtol=1e-4, atol=1e-4)
        session.reset()
        state = module.init_state(2)
        for t in range(5):
            assert torch.allclose(session.step(x.select(time, t)), expected.select(time, t), rtol=1e-4, atol=1e-4)
            y, state = module.step(x.select(time, t), state)
            assert torch.allclose(y, expected.select(time, t), rtol=1e-4, atol=1e-4)
        assert torch.allclose(pickle.loads(pickle.dumps(module))(x), expected)
    assert module.receptive_field == 1 + 2 * (module.kernel_size - 1) * sum(module.dilations)


@pytest.mark.parametrize("name", ["leaky_relu", "gate", "all"])
def test_gradcheck(name):
    module, values = recorded(name)
    x = values["x"].narrow(1 if module.input_shape == "NLC" else 2, 0, 4).clone().requires_grad_()
    assert torch.autograd.gradcheck(module, x, fast_mode=True)


def test_an_older_checkpoint_has_buffers_elsewhere():
    module, values = recorded("skip")
    state = {"network.0.conv1.buffer": torch.zeros(1), **{k[6:]: t for k, t in values.items() if k[:6] == "state."}}
    outer = torch.nn.Sequential(snn.TCN(**CASES["skip"], dropout=0.0).double())
    outer.load_state_dict({f"0.{key}": t for key, t in state.items()})
    assert torch.equal(outer(values["x"]), module(values["x"]))


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"causal": "no"},
        {"dilations": [1]},
        {"dilations": [1, 0]},
        {"dilations": 3},
        {"dilation_reset": 0},
        {"use_norm": "batch_norm"},
        {"activation": "glu"},
        {"activation": None},
        {"activation": []},
        {"use_skip_connections": "no"},
        {"input_shape": "LNC"},
        {"use_gate": "yes"},
        {"output_projection": 0},
        {"output_activation": "glu"},
    ],
    ids=str,
)
def test_errors(options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        snn.TCN(3, [4, 4], **options)
