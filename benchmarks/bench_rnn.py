"""LSTM, GRU and RNN beside torch.nn, ONNX Runtime and OpenVINO; the other cells beside our LSTM; one step at a time.

``python -m benchmarks.report --bars FILE.json`` prints what these suites say about the bars of the recurrent cells.

The ceiling of a recurrence: its operations at the GEMM rate, or its recurrent weights, read once a step and sweep over
time, at the cache bandwidth over their footprint, whichever takes longer.
"""

import contextlib
import functools
import importlib.util
import multiprocessing

import gpu_peers
import numpy
import torch
from harness import Case, suite
from rnn_peers import peers

import seqaccel

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
TABLE = [dict(B=B, H=H, T=128) for H in (128, 256, 512, 1024) for B in (1, 4, 16, 64)]
PEERS = ["torch", "onnxruntime", "openvino"]
CELLS = {  # module, options, products of H x H in a step
    "peephole": ("PeepholeLSTM", {}, 4),
    "layer_norm": ("LayerNormLSTM", {}, 4),
    "multiplicative": ("MultiplicativeLSTM", {}, 5),
}


def layers(kind: str, B: int, T: int, H: int, device: str = "cpu"):
    """Ours and torch's with the same weights, an input (T, B, H) and a gradient of the output."""
    stock, ours = getattr(torch.nn, kind)(H, H, device=device), getattr(seqaccel.nn, kind)(H, H, device=device)
    ours.load_state_dict(stock.state_dict())
    return ours, stock, torch.randn(T, B, H, device=device), torch.randn(T, B, H, device=device)


def cost(gates: int, B: int, T: int, H: int, training: bool = False) -> dict[str, float]:
    """Input and recurrent product forward, twice as much backward; W_hh read once a step forward and backward."""
    weight = gates * H * H
    return {
        "flops": (3 if training else 1) * 2.0 * T * B * 2 * weight,
        "bytes": (2 if training else 1) * 4.0 * T * weight,
        "footprint": 4.0 * weight,
    }


def inference(function, *arguments, backend="auto"):
    def run():
        with torch.no_grad(), seqaccel.backend(backend):
            return function(*arguments)

    return run


def training(module, x, grad, backend="auto"):
    x = x.requires_grad_()

    def run():
        with seqaccel.backend(backend):
            output = module(x)[0]
            data = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
            return torch.autograd.grad(data, [x, *module.parameters()], grad)

    return run


def inference_case(kind: str, B: int, T: int, H: int) -> Case:
    ours, stock, x, _ = layers(kind, B, T, H)
    contenders = {"seqaccel[cpp]": inference(ours, x, backend="cpp"), "torch": inference(stock, x)}
    return Case(contenders | peers(stock, x), **cost(GATES[kind], B, T, H))


def training_case(kind: str, B: int, T: int, H: int, backend: str = "cpp", device: str = "cpu") -> Case:
    ours, stock, x, grad = layers(kind, B, T, H, device)
    contenders = {f"seqaccel[{backend}]": training(ours, x, grad, backend), "torch": training(stock, x, grad)}
    return Case(contenders, **cost(GATES[kind], B, T, H, True))


@suite(TABLE, ["seqaccel[cpp]", *PEERS])
def bench_lstm_inference(B, T, H):
    return inference_case("LSTM", B, T, H)


@suite(TABLE, ["seqaccel[cpp]", "torch"])
def bench_lstm_training(B, T, H):
    return training_case("LSTM", B, T, H)


@suite([dict(B=32, H=512, T=128)], ["seqaccel[cpp]", "torch"])
def bench_lstm_training_at_peak(B, T, H):
    """Where torch's LSTM runs at the machine's peak; not of the table."""
    return training_case("LSTM", B, T, H)


@suite(TABLE, ["seqaccel[cpp]", *PEERS])
def bench_gru_inference(B, T, H):
    return inference_case("GRU", B, T, H)


@suite(TABLE, ["seqaccel[cpp]", "torch"])
def bench_gru_training(B, T, H):
    return training_case("GRU", B, T, H)


@suite(TABLE, ["seqaccel[cpp]", *PEERS])
def bench_rnn_inference(B, T, H):
    return inference_case("RNN", B, T, H)


@suite(TABLE, ["seqaccel[cpp]", "torch"])
def bench_rnn_training(B, T, H):
    return training_case("RNN", B, T, H)


@suite([dict(B=1, H=128, T=8192)], ["seqaccel[cpp]", "seqaccel[cpp] whole", "torch"])
def bench_lstm_truncated(B, H, T):
    """A stable LSTM over one sequence: chunks of 256 steps side by side, each after 100 steps; and step by step."""
    ours, stock, x, _ = layers("LSTM", B, T, H)
    x = x.clamp_(-1, 1)
    seqaccel.nn.utils.stabilize_(ours)
    stock.load_state_dict(ours.state_dict())
    contenders = {
        "seqaccel[cpp]": inference(lambda: (seqaccel.functional.truncated(ours, x, 100, 256),), backend="cpp"),
        "seqaccel[cpp] whole": inference(ours, x, backend="cpp"),
        "torch": inference(stock, x),
    }
    truncated, whole, theirs = (run()[0] for run in contenders.values())
    torch.testing.assert_close(truncated, whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole, theirs, rtol=0, atol=1e-5)
    return Case(contenders, same=(), **cost(4, B, T, H))  # compared above; torch's has a state beside y


@suite(
    [dict(cell=cell, B=B, H=H, T=128) for cell in CELLS for B, H in ((4, 256), (16, 256), (16, 512))],
    ["seqaccel[cpp]", "seqaccel[cpp] LSTM"],
)
def bench_cell_training(cell, B, T, H):
    """Another cell beside our LSTM of the same size."""
    name, options, gates = CELLS[cell]
    x, grad = torch.randn(T, B, H), torch.randn(T, B, H)
    modules = {
        "seqaccel[cpp]": getattr(seqaccel.nn, name)(H, H, **options),
        "seqaccel[cpp] LSTM": seqaccel.nn.LSTM(H, H),
    }
    contenders = {contender: training(module, x, grad, "cpp") for contender, module in modules.items()}
    return Case(contenders, **cost(gates, B, T, H, True))


@suite(
    [dict(mode=mode, B=B, H=H, T=128) for mode in ("inference", "training") for B, H in ((16, 256), (64, 512))],
    ["seqaccel[cpp]", "seqaccel[cpp] padded", "torch"],
)
def bench_lstm_packed(mode, B, T, H):
    """Lengths drawn from 1 ... T, beside the same batch without lengths, and torch.nn.LSTM on the packed sequence."""
    ours, stock, x, grad = layers("LSTM", B, T, H)
    lengths = torch.randint(1, T + 1, (B,), generator=torch.Generator().manual_seed(0))
    lengths[0] = T
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    if mode == "inference":
        contenders = {
            "seqaccel[cpp]": inference(ours, packed, backend="cpp"),
            "seqaccel[cpp] padded": inference(ours, x, backend="cpp"),
            "torch": inference(stock, packed),
        }
    else:
        data = packed.data.requires_grad_()
        packed_grad = torch.randn_like(data)

        def train(module, backend):
            sequence = packed._replace(data=data)

            def run():
                with seqaccel.backend(backend):
                    output = module(sequence)[0].data
                    return torch.autograd.grad(output, [data, *module.parameters()], packed_grad)

            return run

        contenders = {
            "seqaccel[cpp]": train(ours, "cpp"),
            "seqaccel[cpp] padded": training(ours, x, grad, "cpp"),
            "torch": train(stock, "auto"),
        }
    costs = cost(4, B, T, H, mode == "training")
    return Case(contenders, **costs | {"flops": costs["flops"] * float(lengths.sum()) / (B * T)})


@suite([dict(B=1, H=512)], ["seqaccel[cpp]", "seqaccel[cpp] bfloat16", "seqaccel[cpp] int8", "onnxruntime"])
def bench_lstm_session_step(B, H):
    """One step of one stream, with weights in each precision: the ceiling is to read both float32 weights once."""
    ours, stock, x, _ = layers("LSTM", B, 1, H)
    contenders = {"seqaccel[cpp]": functools.partial(seqaccel.Session(ours, B).step, x[0])}
    for weights in ("bfloat16", "int8"):
        with contextlib.suppress(ValueError):  # a precision that sessions do not have
            session = seqaccel.Session(ours, B, weights)
            contenders[f"seqaccel[cpp] {weights}"] = functools.partial(session.step, x[0])
    costs = {"flops": 2.0 * B * 8 * H * H, "bytes": 4.0 * 8 * H * H}
    return Case(contenders | peers(stock, x, ("onnxruntime",)), **costs)


@suite(
    [dict(cell=cell, B=1, H=H) for cell in GATES for H in (128, 256, 512)],
    ["seqaccel[cpp]", "torch", "torch cell", "onnxruntime"],
)
def bench_session_step(cell, B, H):
    """One step of one stream: a Session beside torch's layer, torch's module of one step, and ONNX Runtime."""
    ours, stock, x, _ = layers(cell, B, 1, H)
    single = getattr(torch.nn, f"{cell}Cell")(H, H)
    state = (torch.zeros(B, H), torch.zeros(B, H)) if cell == "LSTM" else torch.zeros(B, H)
    layer_state = tuple(part[None] for part in state) if cell == "LSTM" else state[None]
    contenders = {
        "seqaccel[cpp]": functools.partial(seqaccel.Session(ours, B).step, x[0]),
        "torch": torch.inference_mode()(functools.partial(stock, x, layer_state)),
        "torch cell": torch.inference_mode()(functools.partial(single, x[0], state)),
    }
    weight = GATES[cell] * 2 * H * H
    torch.testing.assert_close(contenders["seqaccel[cpp]"](), contenders["torch"]()[0][0], rtol=0, atol=1e-4)
    costs = {"flops": 2.0 * B * weight, "bytes": 4.0 * weight}
    return Case(contenders | peers(stock, x, ("onnxruntime",)), same=(), **costs)  # a session's next step is another


def _spin(busy) -> None:
    while True:
        if busy.wait(1.0):
            sum(range(10_000))


@suite([dict(B=32, H=512, T=128)], ["seqaccel[cpp]", "seqaccel[cpp] busy", "torch", "torch busy"])
def bench_lstm_busy_cores(B, T, H):
    """Alone, and while another process spins on every core."""
    ours, stock, x, _ = layers("LSTM", B, T, H)
    context = multiprocessing.get_context("spawn")
    busy = context.Event()
    for _ in range(torch.get_num_threads()):
        context.Process(target=_spin, args=(busy,), daemon=True).start()

    def beside_others(function):
        def run():
            busy.set()
            try:
                return function()
            finally:
                busy.clear()

        return run

    contenders = {"seqaccel[cpp]": inference(ours, x, backend="cpp"), "torch": inference(stock, x)}
    contenders |= {f"{name} busy": beside_others(function) for name, function in contenders.items()}
    return Case(contenders, **cost(4, B, T, H))


@suite([dict(B=B, H=H, T=128) for H in (256, 512) for B in (1, 16)], ["seqaccel[cpp]", "torch"])
def bench_lstm_inference_bfloat16(B, T, H):
    ours, stock, x, _ = layers("LSTM", B, T, H)
    ours, stock, x = ours.bfloat16(), stock.bfloat16(), x.bfloat16()
    costs = cost(4, B, T, H)
    costs = {"flops": costs["flops"], "bytes": costs["bytes"] / 2, "footprint": costs["footprint"] / 2}
    contenders = {"seqaccel[cpp]": inference(ours, x, backend="cpp"), "torch": inference(stock, x)}
    return Case(contenders, dtype=torch.bfloat16, **costs)


ON_A_GPU = [
    dict(kind=kind, B=64, T=256, H=H, dtype=dtype)
    for kind in GATES
    for H, dtype in ((64, "bfloat16"), (128, "bfloat16"), (128, "float32"), (512, "bfloat16"), (512, "float32"))
] + [
    dict(kind="LSTM", B=B, T=256, H=H, dtype=dtype)
    for B, H, dtype in (
        (16, 512, "bfloat16"),
        (256, 512, "bfloat16"),
        (64, 256, "bfloat16"),
        (64, 1024, "bfloat16"),
        (16, 512, "float16"),
        (64, 512, "float16"),
    )
]


def gpu_case(kind: str, B: int, T: int, H: int, dtype: str, train: bool) -> Case:
    """Our kernels forced where they run all steps in one launch; ``auto``; torch, which for 16 and 32 bits is cuDNN."""
    wanted = getattr(torch, dtype)
    ours, stock, x, grad = (part.to(wanted) for part in layers(kind, B, T, H, "cuda"))
    backends = ["auto"] if (H, dtype) == (128, "float32") else ["triton", "auto"]
    contenders = {}
    for name in backends:
        contenders[f"seqaccel[{name}]"] = training(ours, x, grad, name) if train else inference(ours, x, backend=name)
    if train:
        contenders["torch"] = training(stock, x, grad)
        contenders |= gpu_peers.flashrnn(stock, lambda module: training(module, x, grad), contenders["torch"]())
    else:
        contenders["torch"] = inference(stock, x)
        contenders |= gpu_peers.flashrnn(stock, lambda module: inference(module, x), contenders["torch"]()[:1])
    costs = cost(GATES[kind], B, T, H, train)
    scale = wanted.itemsize / 4
    costs |= {"bytes": costs["bytes"] * scale, "footprint": costs["footprint"] * scale}
    return Case(contenders, dtype=wanted, **costs)


@suite(ON_A_GPU, ["seqaccel[triton]", "seqaccel[auto]", "torch", "flashrnn"], device="cuda")
def bench_rnn_inference_gpu(kind, B, T, H, dtype):
    return gpu_case(kind, B, T, H, dtype, train=False)


@suite(ON_A_GPU, ["seqaccel[triton]", "seqaccel[auto]", "torch", "flashrnn"], device="cuda")
def bench_rnn_training_gpu(kind, B, T, H, dtype):
    return gpu_case(kind, B, T, H, dtype, train=True)


@suite(
    [dict(B=64, T=256, H=H) for H in (128, 512)],
    ["seqaccel[triton]", "torchrl triton", "torchrl pad"],
    device="cuda",
)
def bench_lstm_episodes_training_gpu(B, T, H):
    """Episodes of 64 steps on average, which begin from zeros, in float32."""
    ours, stock, x, grad = layers("LSTM", B, T, H, "cuda")
    reset = torch.rand(T, B, device="cuda") < 1 / 64
    reset[0] = True
    x.requires_grad_()

    def run():
        with seqaccel.backend("triton"):
            return torch.autograd.grad(ours(x, reset=reset)[0], [x, *ours.parameters()], grad)

    contenders = {"seqaccel[triton]": run} | gpu_peers.episodes(stock, x, reset, grad, run())
    return Case(contenders, **cost(4, B, T, H, True))


@suite(
    [dict(cell=cell, B=32, T=128, H=H) for cell in CELLS for H in (64, 256)],
    ["seqaccel[triton]", "seqaccel[reference]"],
    device="cuda",
)
def bench_cell_training_gpu(cell, B, T, H):
    """Cells that torch does not have, beside the same in plain PyTorch."""
    name, options, gates = CELLS[cell]
    module = getattr(seqaccel.nn, name)(H, H, **options).to("cuda", torch.bfloat16)
    x, grad = (torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    contenders = {f"seqaccel[{name}]": training(module, x, grad, name) for name in ("triton", "reference")}
    return Case(contenders, dtype=torch.bfloat16, **cost(gates, B, T, H, True))


@suite([dict(B=1, H=256), dict(B=8, H=256)], ["seqaccel[cpp]", "torch"])
def bench_lstm_stream(B, H):
    """16 steps, one at a time, the state carried."""
    ours, stock, x, _ = layers("LSTM", B, 16, H)

    def run_ours():
        with torch.no_grad(), seqaccel.backend("cpp"):
            state = ours.init_state(B)
            for x_t in x:
                y, state = ours.step(x_t, state)
            return y

    def run_stock():
        with torch.no_grad():
            state = None
            for t in range(16):
                y, state = stock(x[t : t + 1], state)
            return y[0]

    return Case({"seqaccel[cpp]": run_ours, "torch": run_stock}, **cost(4, B, 16, H))


@suite([dict(H=2000, T=500, connectivity=c) for c in (0.1, 0.01)], ["seqaccel[cpp]", "scipy", "reservoirpy"])
def bench_echo_state(H, T, connectivity):
    """The states of a reservoir of one stream, drive included, beside a loop of SciPy's sparse product and NumPy."""
    module = seqaccel.nn.EchoStateNetwork(1, H, 1, connectivity=connectivity)
    x = torch.randn(T, 1, 1)
    inputs, bias = x[:, 0].numpy(), module.bias_l0.numpy()
    contenders = {"seqaccel[cpp]": inference(lambda: module.reservoir(x)[0][:, 0])}
    if importlib.util.find_spec("scipy"):
        from scipy import sparse

        w = (module.weight_hh_l0.numpy(), module.columns_l0.numpy(), module.rows_l0.numpy())
        w, w_in = sparse.csr_matrix(w, shape=(H, H)), module.weight_ih_l0.numpy()

        def loop():
            drive, h, states = inputs @ w_in.T + bias, numpy.zeros(H, numpy.float32), []
            for row in drive:
                h = numpy.tanh(w @ h + row)
                states.append(h)
            return torch.from_numpy(numpy.stack(states))

        contenders["scipy"] = loop
        if importlib.util.find_spec("reservoirpy"):
            from reservoirpy.nodes import Reservoir

            node = Reservoir(W=w, Win=w_in, bias=bias, lr=1.0, activation="tanh")
            contenders["reservoirpy"] = lambda: torch.from_numpy(node.run(inputs))
    for contender in contenders.values():
        torch.testing.assert_close(contender().float(), contenders["seqaccel[cpp]"](), rtol=0, atol=1e-4)
    values = module.weight_hh_l0.numel()
    return Case(contenders, flops=2.0 * T * values, bytes=8.0 * T * values, footprint=8.0 * values)


def _trained(module, x, grad, backend: str | None = None):
    """Forward and backward of a module whose output, or first output, gets this gradient."""
    leaf, parameters = x.clone().requires_grad_(), [p for p in module.parameters() if p.requires_grad]

    def run():
        with seqaccel.backend(backend or "auto"):
            output = module(leaf)
            return torch.autograd.grad(
                output if isinstance(output, torch.Tensor) else output[0], [leaf, *parameters], grad
            )

    return run


@suite(
    [dict(B=B, H=512, T=100, mode=mode) for B in (8, 16) for mode in ("inference", "training")],
    ["seqaccel[cpp]", "seqaccel[reference]", "speechbrain", "speechbrain converted"],
)
def bench_ligru(B, H, T, mode):
    """A bidirectional layer with batch norm, beside speechbrain's loop over steps, which the reference is too."""
    ours = seqaccel.nn.LiGRU(H, H, batch_first=True, bidirectional=True)
    x, grad = torch.randn(B, T, H), torch.randn(B, T, 2 * H)
    modules = {"seqaccel[cpp]": (ours, "cpp"), "seqaccel[reference]": (ours, "reference")}
    if importlib.util.find_spec("speechbrain"):
        from speechbrain.nnet.RNN import LiGRU

        for name in ("speechbrain", "speechbrain converted"):
            modules[name] = (LiGRU(H, x.shape, bidirectional=True), None)
        seqaccel.convert(modules["speechbrain converted"][0])
    if mode == "training":
        contenders = {name: _trained(module, x, grad, backend) for name, (module, backend) in modules.items()}
    else:
        contenders = {n: inference(m.eval(), x, backend=backend or "auto") for n, (m, backend) in modules.items()}
    return Case(contenders, **cost(4, B, T, H, mode == "training"))


@suite(
    [dict(B=B, H=64, T=128, mode=mode) for B in (1, 16, 64) for mode in ("inference", "training")],
    ["seqaccel[cpp]", "ncps"],
)
def bench_cfc(B, H, T, mode):
    """ncps's default: a backbone of one layer with 128 units; beside its loop over steps."""
    x, grad, units = torch.randn(B, T, 32), torch.randn(B, T, H), 128
    ours = seqaccel.nn.CfC(32, H, batch_first=True)
    modules = {"seqaccel[cpp]": (ours, "cpp")}
    if importlib.util.find_spec("ncps"):
        from ncps.torch import CfC

        modules["ncps"] = (CfC(32, H), None)
        ours.load_state_dict(modules["ncps"][0].state_dict())
    if mode == "training":
        contenders = {name: _trained(module, x, grad, backend) for name, (module, backend) in modules.items()}
    else:
        contenders = {n: inference(m.eval(), x, backend=backend or "auto") for n, (m, backend) in modules.items()}
    weight = units * (32 + H) + 4 * H * units
    passes = 3 if mode == "training" else 1
    return Case(contenders, flops=passes * 2.0 * T * B * weight, bytes=4.0 * T * weight, footprint=4.0 * weight)
