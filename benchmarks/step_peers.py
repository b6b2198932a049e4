"""One step of a network in other runtimes: TorchScript, ONNX Runtime, OpenVINO, tract, each where it is installed.

Each reads the state that it wrote at the step before.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

import seqaccel
import seqaccel.nn as snn


class OneStep(nn.Module):
    """A step of a module by torch's operators, with its state as flat inputs and outputs.

    Args:
        module: a causal module of seqaccel.nn, or a Sequential of torch.nn's LSTM or GRU, and modules without state.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.eval()
        self.parts = list(module) if isinstance(module, nn.Sequential) else [module]

    def state(self, x_t: Tensor) -> list[Tensor]:
        """Zeros of the state's shapes."""
        found: list[Tensor] = []
        for part in self.parts:
            if isinstance(part, nn.RNNBase):
                size = part.num_layers, len(x_t), part.hidden_size
                found += [x_t.new_zeros(size) for _ in range(2 if isinstance(part, nn.LSTM) else 1)]
            elif isinstance(part, snn.TCN):
                found += [ring for level in part.init_state(len(x_t)) for ring in level]
            elif hasattr(part, "init_state"):
                found += part.init_state(len(x_t))
        return found

    def forward(self, x_t: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        after: list[Tensor] = []
        for part in self.parts:
            rest = state[len(after) :]
            if isinstance(part, nn.LSTM):
                x_t, (h, c) = part(x_t[None], rest[:2])
                x_t, after = x_t[0], [*after, h, c]
            elif isinstance(part, nn.RNNBase):
                x_t, h = part(x_t[None], rest[0])
                x_t, after = x_t[0], [*after, h]
            elif isinstance(part, snn.TCN):
                x_t, levels = part.step(x_t, tuple(zip(rest[::2], rest[1::2], strict=True)))
                after += [ring for level in levels for ring in level]
            elif hasattr(part, "init_state"):
                x_t, rings = part.step(x_t, rest)
                after += rings
            else:
                x_t = part(x_t)
        return x_t, *after


def _onnx(step: OneStep, x_t: Tensor, state: list[Tensor]) -> bytes:
    file = io.BytesIO()
    names = [f"state_{i}" for i in range(len(state))]
    outputs = ["y", *(f"next_{name}" for name in names)]
    torch.onnx.export(step, (x_t, *state), file, input_names=["x", *names], output_names=outputs, dynamo=False)
    return file.getvalue()


def _onnxruntime(model: bytes, x_t: Tensor, state: list[Tensor], threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [f"state_{i}" for i in range(len(state))]
    feed = {"x": x_t.numpy()} | {name: part.numpy() for name, part in zip(names, state, strict=True)}

    def run() -> object:
        y, *after = session.run(None, feed)
        feed.update(zip(names, after, strict=True))
        return y

    return run


def _openvino(model: bytes, x_t: Tensor, state: list[Tensor], threads: int) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(core.read_model(model), "CPU", settings).create_infer_request()
    feed = {i: part.numpy().copy() for i, part in enumerate([x_t, *state])}

    def run() -> object:
        result = request.infer(feed, share_inputs=True)
        for i in range(1, len(feed)):
            feed[i] = result[i]
        return result[0]

    return run


def _tract(model: bytes, x_t: Tensor, state: list[Tensor], threads: int) -> Callable[[], object]:
    import tempfile

    import tract

    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(model)
        file.flush()
        runnable = tract.onnx().load(file.name).into_model().into_runnable()
    feed = [tract.Tensor.from_numpy(part.numpy()) for part in (x_t, *state)]

    def run() -> object:
        feed[1:] = (outputs := runnable.run(feed))[1:]
        return outputs[0].to_numpy()

    return run


def _torchscript(step: OneStep, x_t: Tensor, state: list[Tensor]) -> Callable[[], object]:
    traced = torch.jit.optimize_for_inference(torch.jit.trace(step, (x_t, *state), check_trace=False))
    carried = [state]

    @torch.inference_mode()
    def run() -> object:
        y, *carried[0] = traced(x_t, *carried[0])
        return y

    return run


def step_peers(module: nn.Module, x_t: Tensor, names: tuple[str, ...], threads: int = 1) -> dict[str, Callable]:
    """A step as functions of no arguments, by the name of the runtime. Checked against the module's first step."""
    runtimes = {"onnxruntime": _onnxruntime, "openvino": _openvino, "tract": _tract}
    step = OneStep(module)
    state = step.state(x_t)
    found: dict[str, Callable[[], object]] = {}
    with torch.no_grad(), seqaccel.backend("reference"):
        expected = step(x_t, *state)[0]
        if "torchscript" in names:
            found["torchscript"] = _torchscript(step, x_t, state)
        present = [name for name in runtimes if name in names and importlib.util.find_spec(name)]
        if present and importlib.util.find_spec("onnx"):
            model = _onnx(step, x_t, state)
            found |= {name: runtimes[name](model, x_t, state, threads) for name in present}
    for run in found.values():
        torch.testing.assert_close(torch.as_tensor(run()), expected, atol=1e-4, rtol=1e-3)
    return found
