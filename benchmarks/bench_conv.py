"""Dilated causal convolutions and the TCN against the same from ``F.conv1d``.

The stock contender pads on the left and runs ``F.conv1d``, relu and, in a TCN, dropout as separate operators, with the
same weight norm on both sides. "torch, cut" lets ``F.conv1d`` pad on both sides and cuts off the end. ``pytorch-tcn``
joins where it is installed.
"""

import functools
import importlib.util

import gpu_peers
import torch
import torch.nn.functional as F
from harness import Case, suite
from step_peers import step_peers
from torch import nn

import seqaccel
import seqaccel.functional as SF
import seqaccel.nn as snn

CONVOLUTIONS = [
    {"B": 8, "C": 150, "T": 512, "K": 6, "d": 1},
    {"B": 8, "C": 150, "T": 512, "K": 6, "d": 8},
    {"B": 4, "C": 64, "T": 4096, "K": 3, "d": 64},
    {"B": 1, "C": 25, "T": 784, "K": 7, "d": 8},
    {"B": 16, "C": 256, "T": 1024, "K": 3, "d": 16},
]
DEPTHWISE = [
    {"B": 8, "C": 256, "T": 1024, "K": 4, "d": 1},
    {"B": 4, "C": 64, "T": 4096, "K": 3, "d": 64},
    {"B": 1, "C": 256, "T": 16384, "K": 3, "d": 64},
]
NETWORKS = [{"B": 8, "C": 64, "T": 1024, "K": 3, "levels": 4}]


def forced(function, backend="cpp"):
    def run():
        with seqaccel.backend(backend):
            return function()

    return run


def convolution(B, C, T, K, d, groups=1, activation="relu"):
    """The tensors of a case, and our forward and torch's two: x, weight, bias -> activation(conv)."""
    x = torch.randn(B, C, T)
    weight = torch.randn(C, C // groups, K) / (C // groups * K) ** 0.5
    bias = torch.randn(C)
    context, activate = (K - 1) * d, getattr(F, activation)

    def ours(x, weight, bias):
        return SF.causal_conv1d(x, weight, bias, dilation=d, groups=groups, activation=activation)

    def stock(x, weight, bias):
        return activate(F.conv1d(F.pad(x, (context, 0)), weight, bias, dilation=d, groups=groups))

    def cut(x, weight, bias):
        return activate(F.conv1d(x, weight, bias, padding=context, dilation=d, groups=groups)[..., :T])

    return [x, weight, bias], {"seqaccel[cpp]": ours, "torch": stock, "torch, cut": cut}


def inference(function, tensors):
    def run():
        with torch.inference_mode():
            return function(*tensors)

    return run


def training(function, tensors):
    tensors = [t.clone().requires_grad_() for t in tensors]
    grad = torch.randn(function(*tensors).shape, generator=torch.Generator().manual_seed(0))  # the same for all

    def run():
        return torch.autograd.grad(function(*tensors), tensors, grad)

    return run


def cost(B, C, T, K, groups=1):
    """Operations of one convolution, and its bytes: x and the weight read, y written."""
    return 2 * B * C * C // groups * T * K, 4 * (2 * B * C * T + C * C // groups * K)


CONTENDERS = ["seqaccel[cpp]", "torch", "torch, cut"]


def convolution_case(make, passes, B, C, T, K, d, groups=1):
    tensors, functions = convolution(B, C, T, K, d, groups)
    flops, moved = cost(B, C, T, K, groups)
    return Case(
        contenders(functions, lambda function: make(function, tensors)), flops=passes * flops, bytes=passes * moved
    )


@suite(CONVOLUTIONS, CONTENDERS)
def bench_causal_conv1d_inference(B, C, T, K, d):
    return convolution_case(inference, 1, B, C, T, K, d)


@suite([{"B": 4, "C": 256, "T": 4096, "K": 3, "d": d} for d in (1, 16)], [*CONTENDERS, "seqaccel[cpp] float32"])
def bench_causal_conv1d_inference_bfloat16(B, C, T, K, d):
    wide, functions = convolution(B, C, T, K, d)
    flops, moved = cost(B, C, T, K)
    runs = contenders(functions, lambda function: inference(function, [t.bfloat16() for t in wide]))
    runs["seqaccel[cpp] float32"] = forced(inference(functions["seqaccel[cpp]"], wide))
    return Case(runs, flops=flops, bytes=moved // 2, dtype=torch.bfloat16)


@suite(CONVOLUTIONS, CONTENDERS)
def bench_causal_conv1d_training(B, C, T, K, d):
    return convolution_case(training, 3, B, C, T, K, d)


@suite(DEPTHWISE, CONTENDERS)
def bench_depthwise_inference(B, C, T, K, d):
    return convolution_case(inference, 1, B, C, T, K, d, groups=C)


@suite(DEPTHWISE, CONTENDERS)
def bench_depthwise_training(B, C, T, K, d):
    return convolution_case(training, 3, B, C, T, K, d, groups=C)


GRIDS = [{"B": 4, "C": 64, "T": 48, "S": 48, "K": 5}]


@suite(GRIDS, ["seqaccel[cpp]", "torch"])
def bench_causal_conv2d_inference(B, C, T, S, K):
    """A kernel of K x K taps, of which K // 2 + 1 rows count; torch's has only these."""
    rows = K // 2 + 1
    x, bias = torch.randn(B, C, T, S), torch.randn(C)
    weight = torch.randn(C, C, rows, K) / (C * rows * K) ** 0.5

    def ours(x, weight, bias):
        return SF.causal_conv2d(x, weight, bias, activation="relu")

    def stock(x, weight, bias):
        return torch.relu(F.conv2d(F.pad(x, (K // 2, K // 2, rows - 1, 0)), weight, bias))

    tensors = [x, weight, bias]
    return Case(
        {"seqaccel[cpp]": forced(inference(ours, tensors)), "torch": inference(stock, tensors)},
        flops=2 * B * C * C * T * S * rows * K,
        bytes=4 * (2 * B * C * T * S + C * C * rows * K),
    )


UNITS = [{"B": 32, "C": 24, "W": 4, "N": 17}, {"B": 32, "C": 24, "W": 4, "N": 41}, {"B": 8, "C": 128, "W": 4, "N": 64}]


@suite(UNITS, ["seqaccel[cpp]", "torch"])
def bench_convolutional_gru_training(B, C, W, N):
    """A step with kernels of 3 x 3."""
    x, weight, bias = torch.randn(B, C, W, N), torch.randn(3 * C, C, 3, 3) / (9 * C) ** 0.5, torch.randn(3 * C)

    def ours(x, weight_gates, bias_gates, weight, bias):
        return SF.convolutional_gru(x, weight_gates, bias_gates, weight, bias)

    def stock(x, weight_gates, bias_gates, weight, bias):
        gates = (1.2 * torch.sigmoid(F.conv2d(x, weight_gates, bias_gates, padding=1)) - 0.1).clamp(0, 1)
        u, r = gates.chunk(2, 1)
        return u * x + (1 - u) * torch.tanh(F.conv2d(r * x, weight, bias, padding=1))

    tensors = [x, weight[: 2 * C].clone(), bias[: 2 * C].clone(), weight[2 * C :].clone(), bias[2 * C :].clone()]
    return Case(
        {"seqaccel[cpp]": forced(training(ours, tensors)), "torch": training(stock, tensors)},
        flops=3 * 2 * B * W * N * 27 * C * C,
        bytes=4 * (20 * B * C * W * N + 54 * C * C),
    )


class StockBlock(nn.Module):
    """A TCN level as one writes it in torch."""

    def __init__(self, channels, kernel_size, dilation, dropout):
        super().__init__()
        self.context, self.dropout = (kernel_size - 1) * dilation, dropout
        self.conv1, self.conv2 = (
            nn.utils.parametrizations.weight_norm(nn.Conv1d(channels, channels, kernel_size, dilation=dilation))
            for _ in range(2)
        )

    def forward(self, x):
        z = x
        for conv in (self.conv1, self.conv2):
            z = F.dropout(torch.relu(conv(F.pad(z, (self.context, 0)))), self.dropout, self.training)
        return torch.relu(z + x)


def networks(C, K, levels, dropout):
    """Our TCN, torch's with its weights, and pytorch-tcn's where it is installed, by contender."""
    ours = snn.TCN(C, [C] * levels, K, dropout)
    stock = nn.Sequential(*(StockBlock(C, K, 2**i, dropout) for i in range(levels)))
    stock.load_state_dict({name.removeprefix("network."): value for name, value in ours.state_dict().items()})
    modules = {"seqaccel[cpp]": ours, "torch": stock}
    if importlib.util.find_spec("pytorch_tcn"):
        from pytorch_tcn import TCN

        modules["pytorch-tcn"] = TCN(C, [C] * levels, K, dropout=dropout)
    return modules


def network_cost(B, C, T, K, levels):
    flops, moved = cost(B, C, T, K)
    return 2 * levels * flops, 2 * levels * moved


def train(module, x, grad):
    def run():
        module.zero_grad(set_to_none=True)
        y = module(x)
        y.backward(grad)
        return y

    return run


def contenders(modules, make):
    return {
        name: forced(make(module)) if name.startswith("seqaccel") else make(module) for name, module in modules.items()
    }


@suite([{**size, "dropout": p} for size in NETWORKS for p in (0.2, 0.0)], ["seqaccel[cpp]", "torch", "pytorch-tcn"])
def bench_tcn_training(B, C, T, K, levels, dropout):
    x, grad = torch.randn(B, C, T), torch.randn(B, C, T)
    flops, moved = network_cost(B, C, T, K, levels)
    modules = networks(C, K, levels, dropout)
    return Case(
        contenders(modules, lambda module: train(module, x, grad)),
        flops=3 * flops,
        bytes=3 * moved,
        same=() if dropout else ("torch",),  # each draws masks of its own
    )


@suite(NETWORKS, ["seqaccel[cpp]", "torch", "pytorch-tcn"])
def bench_tcn_inference(B, C, T, K, levels):
    x = torch.randn(B, C, T)
    flops, moved = network_cost(B, C, T, K, levels)
    modules = networks(C, K, levels, 0.0)
    return Case(
        contenders(modules, lambda module: inference(module.eval(), [x])),
        flops=flops,
        bytes=moved,
    )


class StockWaveNet(nn.Module):
    """A WaveNet as one writes it in torch."""

    def __init__(self, channels, kernel_size, layers):
        super().__init__()
        self.channels = channels
        self.input = nn.Conv1d(channels, channels, 1)
        self.gates = nn.ModuleList(nn.Conv1d(channels, 2 * channels, kernel_size, dilation=2**i) for i in range(layers))
        self.outputs = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 1) for _ in range(layers))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, channels, 1)
        )

    def forward(self, x):
        x, skips = self.input(x), 0
        for gate, output in zip(self.gates, self.outputs, strict=True):
            v = gate(F.pad(x, ((gate.kernel_size[0] - 1) * gate.dilation[0], 0)))
            filtered, opened = v.chunk(2, 1)
            y = output(torch.tanh(filtered) * torch.sigmoid(opened))
            x, skips = x + y[:, : self.channels], skips + y[:, self.channels :]
        return self.head(skips)


WAVENETS = [{"B": 1, "C": 64, "T": 16384, "K": 2, "levels": 10}, {"B": 4, "C": 32, "T": 8192, "K": 3, "levels": 8}]


def wavenets(C, K, levels):
    """Our WaveNet, and torch's with its weights."""
    ours, stock = snn.WaveNet(C, None, C, C, layers=levels, kernel_size=K), StockWaveNet(C, K, levels)
    names = {"head.1": "head.3", "head.0": "head.1"}
    for i in range(levels):
        names |= {f"layers.{i}.conv": f"gates.{i}", f"layers.{i}.output": f"outputs.{i}"}
    parts = {name: name.rpartition(".") for name in ours.state_dict()}
    stock.load_state_dict(
        {f"{names.get(part, part)}.{kind}": ours.state_dict()[name] for name, (part, _, kind) in parts.items()}
    )
    return {"seqaccel[cpp]": ours, "torch": stock}


def wavenet_cost(B, C, T, K, levels):
    """Operations of the layers, input and head, and the bytes of the layers: x and skips read and written."""
    products = levels * (2 * C * C * K + 2 * C * C) + 3 * C * C
    return 2 * B * T * products, 4 * levels * (4 * B * C * T + 2 * C * C * (K + 1))


@suite(WAVENETS, ["seqaccel[cpp]", "torch"])
def bench_wavenet_inference(B, C, T, K, levels):
    x = torch.randn(B, C, T)
    flops, moved = wavenet_cost(B, C, T, K, levels)
    modules = wavenets(C, K, levels)
    return Case(contenders(modules, lambda m: inference(m.eval(), [x])), flops=flops, bytes=moved)


@suite(WAVENETS, ["seqaccel[cpp]", "torch"])
def bench_wavenet_training(B, C, T, K, levels):
    x, grad = torch.randn(B, C, T), torch.randn(B, C, T)
    flops, moved = wavenet_cost(B, C, T, K, levels)
    modules = wavenets(C, K, levels)
    return Case(contenders(modules, lambda m: train(m, x, grad)), flops=3 * flops, bytes=3 * moved)


@suite([{"net": "LSTM 16"}, {"net": "WaveNet 16x18"}], ["seqaccel[session]", "onnxruntime"])
def bench_conv_session_step(net):
    """A sample of an audio network, batch 1, on one thread."""
    if net == "LSTM 16":
        module = nn.LSTM(1, 16)
        weights = 4 * 16 * (1 + 16)
    else:
        module = snn.WaveNet(1, 1, 16, 16, layers=9, stacks=2).eval()
        weights = 18 * (2 * 16 * 16 * 2 + 2 * 16 * 16)
    x_t = torch.randn(1, 1)
    session = seqaccel.Session(module)
    runs = {"seqaccel[session]": functools.partial(session.step, x_t)} | step_peers(module, x_t, ("onnxruntime",))
    return Case(runs, flops=2 * weights, bytes=4 * weights)


@suite(
    [{"B": 1, "C": 64, "K": 3, "levels": 8}],
    ["seqaccel[session]", "seqaccel[step]", "onnxruntime", "pytorch-tcn"],
)
def bench_tcn_session_step(B, C, K, levels):
    """One time step: a session's, the module's, ONNX Runtime's on one thread, and pytorch-tcn's with its buffers."""
    module = snn.TCN(C, [C] * levels, K, 0.0).eval()
    session, x_t = seqaccel.Session(module, B), torch.randn(B, C)
    carried = [module.init_state(B)]

    def step():
        with torch.no_grad():
            y, carried[0] = module.step(x_t, carried[0])
        return y

    runs = {"seqaccel[session]": functools.partial(session.step, x_t), "seqaccel[step]": step}
    runs |= step_peers(module, x_t, ("onnxruntime",))
    if importlib.util.find_spec("pytorch_tcn"):
        from pytorch_tcn import TCN

        theirs = TCN(C, [C] * levels, kernel_size=K, dropout=0.0).eval()
        runs["pytorch-tcn"] = inference(theirs.inference, [x_t.unsqueeze(-1)])
    weights = 2 * levels * C * C * K
    return Case(runs, flops=2 * B * weights, bytes=4 * weights)


@suite([{"B": 64, "C": 64, "K": 3, "levels": 8, "T": 64}], ["seqaccel[session]", "seqaccel[sequence]"])
def bench_tcn_session_sequence(B, C, K, levels, T):
    """T steps of a session, and the module on the whole sequence."""
    module = snn.TCN(C, [C] * levels, K, 0.0).eval()
    session, x = seqaccel.Session(module, B), torch.randn(B, C, T)
    rows = list(x.permute(2, 0, 1).contiguous())

    def steps():
        for x_t in rows:
            session.step(x_t)

    flops, _ = network_cost(B, C, T, K, levels)
    runs = {"seqaccel[session]": steps, "seqaccel[sequence]": forced(inference(module, [x]))}
    return Case(runs, flops=flops, bytes=4 * 2 * levels * C * C * K)


@suite([{"B": B, "C": 64, "K": 3, "levels": 4} for B in (1, 64)], ["seqaccel[cpp]", "torch"])
def bench_tcn_step(B, C, K, levels):
    """One time step: ours from its carried state; torch over the receptive field, as it has no state."""
    modules = networks(C, K, levels, 0.0)
    ours, stock = modules["seqaccel[cpp]"].eval(), modules["torch"].eval()
    window = torch.randn(B, C, ours.receptive_field)
    with torch.no_grad():
        _, state = ours.extend(window[..., :-1], ours.init_state(B))
    x_t = window[..., -1].contiguous()
    flops, _ = network_cost(B, C, 1, K, levels)
    weights = 2 * levels * C * C * K
    return Case(
        {
            "seqaccel[cpp]": forced(inference(lambda x: ours.step(x, state)[0], [x_t])),
            "torch": inference(lambda x: stock(x)[..., -1], [window]),
        },
        flops=flops,
        bytes=4 * (weights + 2 * sum(part.numel() for block in state for part in block)),
    )


def training_gpu(B, C, T, K, d, groups, dtype, activation):
    tensors, functions = convolution(B, C, T, K, d, groups, activation)
    ours, stock = functions["seqaccel[cpp]"], functions["torch"]
    kind = getattr(torch, dtype)
    tensors = [t.to("cuda", kind).requires_grad_() for t in tensors]
    grad = torch.randn(B, C, T, device="cuda", dtype=kind)
    flops, moved = cost(B, C, T, K, groups)

    def training(function):
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad)

    runs = {f"seqaccel[{name}]": forced(training(ours), name) for name in ("triton", "auto")}
    runs["torch"] = training(stock)
    if activation == "silu":
        runs |= gpu_peers.depthwise(*tensors, grad, runs["seqaccel[triton]"]())
    return Case(runs, flops=3 * flops, bytes=3 * moved * kind.itemsize // 4, dtype=kind)


@suite(
    [
        {**size, "dtype": dtype}
        for size in (
            {"B": 32, "C": 256, "T": 4096, "K": 3, "d": 16, "groups": 1},
            {"B": 16, "C": 2048, "T": 2048, "K": 4, "d": 1, "groups": 2048},
            {"B": 16, "C": 256, "T": 1024, "K": 3, "d": 16, "groups": 1},
            {"B": 32, "C": 64, "T": 4096, "K": 3, "d": 1, "groups": 1},
            {"B": 16, "C": 512, "T": 4095, "K": 3, "d": 1, "groups": 1},
        )
        for dtype in ("float32", "bfloat16")
    ],
    ["seqaccel[triton]", "seqaccel[auto]", "torch"],
    device="cuda",
)
def bench_causal_conv1d_training_gpu(B, C, T, K, d, groups, dtype):
    return training_gpu(B, C, T, K, d, groups, dtype, "relu")


@suite(
    [{"B": 16, "C": 2048, "T": 2048, "K": 4, "dtype": dtype} for dtype in ("float32", "bfloat16")],
    ["seqaccel[triton]", "seqaccel[auto]", "torch", "causal-conv1d", "flash-linear-attention"],
    device="cuda",
)
def bench_depthwise_training_gpu(B, C, T, K, dtype):
    """With SiLU, as in the packages."""
    return training_gpu(B, C, T, K, 1, C, dtype, "silu")
