"""LSTM, GRU and RNN of ``torch.nn`` in ONNX Runtime and OpenVINO, each where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy
import torch

#: The ONNX operators' gates as places in torch's order: LSTM i, o, f, c; GRU z, r, h.
GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def onnx_model(stock: torch.nn.RNNBase, x: torch.Tensor) -> bytes:
    """One ONNX operator with the weights of ``stock`` (one layer, one direction), for inputs of the shape of ``x``."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind, _, nonlinearity = stock.mode.partition("_")

    def initializer(name: str, *parts: torch.Tensor) -> onnx.TensorProto:
        gates = [part.detach().chunk(len(GATES[kind])) for part in parts]
        return numpy_helper.from_array(torch.cat([part[g] for part in gates for g in GATES[kind]])[None].numpy(), name)

    attributes: dict[str, object] = {"hidden_size": stock.hidden_size}
    if kind == "GRU":
        attributes["linear_before_reset"] = 1
    if kind == "RNN":
        attributes["activations"] = [nonlinearity.capitalize()]
    shape = list(x.shape)
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, ["x", "w", "r", "b"], ["y"], **attributes)],
            kind,
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 1, shape[1], stock.hidden_size])],
            [
                initializer("w", stock.weight_ih_l0),
                initializer("r", stock.weight_hh_l0),
                initializer("b", stock.bias_ih_l0, stock.bias_hh_l0),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    ).SerializeToString()


def _onnxruntime(model: bytes, x: numpy.ndarray) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})[0]


def _openvino(model: bytes, x: numpy.ndarray) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)[0]


def peers(stock: torch.nn.RNNBase, x: torch.Tensor, names: tuple[str, ...] = ("onnxruntime", "openvino")) -> dict:
    """The layer's outputs (T, 1, B, H) as functions of no arguments, by the name of the peer. Checked against torch."""
    found = {}
    if importlib.util.find_spec("onnx") is None:
        return found
    with torch.no_grad():
        expected = stock(x)[0][:, None].numpy()
    for name, make in (("onnxruntime", _onnxruntime), ("openvino", _openvino)):
        if name in names and importlib.util.find_spec(name):
            run = make(onnx_model(stock, x), x.numpy())
            numpy.testing.assert_allclose(run(), expected, atol=1e-4)
            found[name] = run
    return found
