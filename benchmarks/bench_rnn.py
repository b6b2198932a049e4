"""LSTM beside torch.nn.LSTM and ONNX Runtime: inference, training, one step at a time."""

import io

import torch
from harness import Case, suite

import seqaccel

SIZES = [
    dict(B=1, T=1, H=256),
    dict(B=1, T=128, H=256),
    dict(B=1, T=128, H=512),
    dict(B=16, T=128, H=256),
    dict(B=32, T=128, H=512),
    dict(B=64, T=100, H=128),
]


def layers(B: int, T: int, H: int, device: str = "cpu"):
    """Ours and torch's with the same weights, an input (T, B, H) and a gradient of the output."""
    stock, ours = torch.nn.LSTM(H, H, device=device), seqaccel.nn.LSTM(H, H, device=device)
    ours.load_state_dict(stock.state_dict())
    return ours, stock, torch.randn(T, B, H, device=device), torch.randn(T, B, H, device=device)


def onnx_session(stock: torch.nn.LSTM, x: torch.Tensor):
    """A function that runs the layer in ONNX Runtime, or None where it is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError:
        return None
    file = io.BytesIO()
    try:
        torch.onnx.export(stock.eval(), (x,), file, dynamo=False)
    except Exception:  # the exporter is not there in every torch
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def cost(B: int, T: int, H: int, passes: int) -> dict[str, float]:
    """Two products of T * B rows with 4H x H weights a pass; input, output and weights read or written once a pass."""
    return {"flops": passes * 2.0 * T * B * 8 * H * H, "bytes": passes * 4.0 * (2 * T * B * H + 8 * H * H)}


@suite(SIZES, ["seqaccel[cpp]", "torch", "onnxruntime"])
def bench_lstm_inference(B, T, H):
    ours, stock, x, _ = layers(B, T, H)

    def run_ours():
        with torch.no_grad(), seqaccel.backend("cpp"):
            ours(x)

    def run_stock():
        with torch.no_grad():
            stock(x)

    contenders = {"seqaccel[cpp]": run_ours, "torch": run_stock}
    peer = onnx_session(stock, x)
    if peer is not None:
        contenders["onnxruntime"] = peer
    return Case(contenders, **cost(B, T, H, 1))


def training_case(B: int, T: int, H: int, backend: str, device: str) -> Case:
    ours, stock, x, grad = layers(B, T, H, device)
    x.requires_grad_()

    def train(module, backend):
        def run():
            with seqaccel.backend(backend):
                output = module(x)[0]
                torch.autograd.grad(output, [x, *module.parameters()], grad)

        return run

    contenders = {f"seqaccel[{backend}]": train(ours, backend), "torch": train(stock, "auto")}
    return Case(contenders, **cost(B, T, H, 3))


@suite(SIZES, ["seqaccel[cpp]", "torch"])
def bench_lstm_training(B, T, H):
    return training_case(B, T, H, "cpp", "cpu")


@suite([dict(B=16, T=1024, H=768), dict(B=64, T=256, H=512)], ["seqaccel[triton]", "torch"], device="cuda")
def bench_lstm_training_gpu(B, T, H):
    return training_case(B, T, H, "triton", "cuda")


@suite([dict(B=1, H=256), dict(B=8, H=256)], ["seqaccel[cpp]", "torch"])
def bench_lstm_stream(B, H):
    """16 steps, one at a time, the state carried."""
    ours, stock, x, _ = layers(B, 16, H)

    def run_ours():
        with torch.no_grad(), seqaccel.backend("cpp"):
            state = ours.init_state(B)
            for x_t in x:
                _, state = ours.step(x_t, state)

    def run_stock():
        with torch.no_grad():
            state = None
            for t in range(16):
                _, state = stock(x[t : t + 1], state)

    return Case({"seqaccel[cpp]": run_ours, "torch": run_stock}, **cost(B, 16, H, 1))
