"""Linear scan and SRU, beside what one would have run instead.

`sru` is the package of that name (2.6), whose training on a CPU is a Python loop; `torch.nn.LSTM` has the same width.
`torch loop` is the recurrence written in PyTorch; `torch a*b`, the product of the same tensors, moves as much
memory forward and shows what a memory-bound operator of torch reaches.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import gpu_peers
import torch
from harness import Case, suite

import seqaccel
from seqaccel.reference import scan as reference


def load_sru():
    """The `sru` package, or None: it compiles its C++ code when it is imported."""
    if importlib.util.find_spec("sru") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sru
    return sru


def on(backend, function):
    """The function with one backend forced."""

    def run():
        with seqaccel.backend(backend):
            return function()

    return run


def training(module, x, grad):
    """Forward, and backward to the input and every parameter."""
    x = x.clone().requires_grad_()

    def run():
        module.zero_grad()
        x.grad = None
        module(x)[0].backward(grad)

    return run


def inference(module, x):
    """Forward without autograd."""

    @torch.no_grad()
    def run():
        return module(x)[0]

    return run


def linear_scan_case(B, T, D, device, backends, train):
    a, b = torch.rand(B, T, D, device=device), torch.randn(B, T, D, device=device)
    grad = torch.randn_like(b)
    leaves = a.clone().requires_grad_(), b.clone().requires_grad_()

    def run(function):
        if train:
            return lambda: torch.autograd.grad(function(*leaves), leaves, grad)
        return lambda: function(a, b)

    contenders = {f"seqaccel[{name}]": on(name, run(seqaccel.functional.linear_scan)) for name in backends}
    contenders |= {"torch loop": run(lambda *t: reference.linear_scan(*t)[0]), "torch a*b": run(torch.mul)}
    if T > 4096 or B * T * D >= 1 << 22:
        del contenders["torch loop"]  # seconds a call
    if train and device == "cuda":
        contenders |= gpu_peers.scan(*leaves, grad, contenders[f"seqaccel[{backends[0]}]"]())
    arrays, operations = (8, 5) if train else (3, 2)
    return Case(contenders, flops=operations * B * T * D, bytes=4 * arrays * B * T * D)


LINEAR = [{"B": 8, "T": 1024, "D": 256}, {"B": 1, "T": 4096, "D": 1024}, {"B": 4, "T": 4096, "D": 1}]
LINEAR += [{"B": 8, "T": 4096, "D": 1024}, {"B": 1, "T": 65536, "D": 16}]  # from memory; too few columns to share
LINEAR_ROWS = ["torch loop", "torch a*b"]


@suite(LINEAR, ["seqaccel[cpp]", *LINEAR_ROWS])
def bench_linear_scan_inference(B, T, D):
    return linear_scan_case(B, T, D, "cpu", ["cpp"], train=False)


@suite(LINEAR, ["seqaccel[cpp]", *LINEAR_ROWS])
def bench_linear_scan_training(B, T, D):
    return linear_scan_case(B, T, D, "cpu", ["cpp"], train=True)


@suite(LINEAR, ["seqaccel[cpp]"])
def bench_linear_scan_backward(B, T, D):
    a, b = torch.rand(B, T, D, requires_grad=True), torch.randn(B, T, D, requires_grad=True)
    grad = torch.randn(B, T, D)
    with seqaccel.backend("cpp"):
        h = seqaccel.functional.linear_scan(a, b)

    def backward():
        return torch.autograd.grad(h, (a, b), grad, retain_graph=True)

    return Case({"seqaccel[cpp]": backward}, flops=3 * B * T * D, bytes=4 * 5 * B * T * D)


@suite(
    [{"B": 8, "T": 16384, "D": 1536}, {"B": 1, "T": 16384, "D": 1024}, {"B": 64, "T": 65536, "D": 1}],
    ["seqaccel[cuda]", "seqaccel[triton]", "torch a*b", "flash-linear-attention"],
    "cuda",
)
def bench_linear_scan_training_gpu(B, T, D):
    case = linear_scan_case(B, T, D, "cuda", ["cuda", "triton"], train=True)
    case.contenders.pop("torch loop", None)
    return case


def products(x, features, train):
    """The matrix products of a layer on x (T, B, d) alone, by torch's library and by our GEMM."""
    rows, weight = x.flatten(0, 1), torch.randn(x.shape[2], features)
    grad = torch.randn(rows.shape[0], features)

    def run(mm):
        def calls():
            mm(rows, weight)
            if train:
                mm(grad, weight.t())
                mm(grad.t(), rows)

        return calls

    return {"products, torch": run(torch.mm), "products, ours": run(torch.ops.seqaccel.mm.default)}


def sru_case(B, T, d, device, backends, train):
    torch.manual_seed(0)
    ours, lstm = seqaccel.nn.SRU(d, d, num_layers=1).to(device), torch.nn.LSTM(d, d).to(device)
    x, grad = torch.randn(T, B, d, device=device), torch.randn(T, B, d, device=device)

    def run(module):
        return training(module, x, grad) if train else inference(module, x)

    contenders = {f"seqaccel[{name}]": on(name, run(ours)) for name in backends}
    contenders["torch.nn.LSTM"] = run(lstm)
    if device == "cpu":
        contenders |= products(x, 3 * d, train)
        narrow = seqaccel.nn.SRU(d, d, num_layers=1).bfloat16()
        x_narrow, grad_narrow = x.bfloat16(), grad.bfloat16()
        run_narrow = training(narrow, x_narrow, grad_narrow) if train else inference(narrow, x_narrow)
        contenders["seqaccel[cpp] bfloat16"] = on("cpp", run_narrow)
    if package := load_sru():
        theirs = package.SRU(d, d, num_layers=1).to(device)
        theirs.load_state_dict(ours.state_dict())
        contenders["sru"] = run(theirs)
    count = 3 if train else 1
    elements, weights = T * B * d, 3 * d * d
    arrays = 1 + 3 + 1 + 1 if not train else (1 + 3 + 2) + (1 + 3 + 1 + 1 + 3 + 1)
    return Case(contenders, flops=count * 2 * elements * 3 * d, bytes=4 * (arrays * elements + count * weights))


SRU = [{"B": 32, "T": 128, "d": 256}, {"B": 1, "T": 1024, "d": 512}, {"B": 16, "T": 256, "d": 256}]
SRU_GPU_ROWS = ["torch.nn.LSTM", "sru"]
SRU_ROWS = ["products, torch", "products, ours", "seqaccel[cpp] bfloat16", *SRU_GPU_ROWS]


@suite(SRU, ["seqaccel[cpp]", *SRU_ROWS])
def bench_sru_training(B, T, d):
    return sru_case(B, T, d, "cpu", ["cpp"], train=True)


@suite(SRU, ["seqaccel[cpp]", *SRU_ROWS])
def bench_sru_inference(B, T, d):
    return sru_case(B, T, d, "cpu", ["cpp"], train=False)


@suite([{"B": 64, "T": 1024, "d": 1024}], ["seqaccel[cuda]", "seqaccel[triton]", *SRU_GPU_ROWS], "cuda")
def bench_sru_training_gpu(B, T, d):
    return sru_case(B, T, d, "cuda", ["cuda", "triton"], train=True)


STEP_ROWS = ["seqaccel[cpp] bfloat16", "seqaccel[cpp] int8", "seqaccel[cpp] module", "torch.nn.LSTM", "sru"]


@suite([{"H": 256, "layers": 2}, {"H": 512, "layers": 4}], ["seqaccel[cpp]", *STEP_ROWS])
def bench_sru_step(H, layers):
    """One step of one stream: a Session, the module, torch's LSTM, and the package's call of one step."""
    model, lstm = seqaccel.nn.SRU(H, H, num_layers=layers).eval(), torch.nn.LSTM(H, H, num_layers=layers)
    x = torch.randn(1, H)
    state = model.init_state(1)
    h_c = torch.zeros(layers, 1, H), torch.zeros(layers, 1, H)
    contenders = {"seqaccel[cpp]": functools.partial(seqaccel.Session(model).step, x)}
    for weights in ("bfloat16", "int8"):
        contenders[f"seqaccel[cpp] {weights}"] = functools.partial(seqaccel.Session(model, 1, weights).step, x)
    contenders["seqaccel[cpp] module"] = on("cpp", torch.no_grad()(functools.partial(model.step, x, state)))
    contenders["torch.nn.LSTM"] = torch.no_grad()(functools.partial(lstm, x[None], h_c))
    if package := load_sru():
        theirs = package.SRU(H, H, num_layers=layers).eval()
        theirs.load_state_dict(model.state_dict())
        contenders["sru"] = torch.no_grad()(functools.partial(theirs, x[None]))
    return Case(contenders, flops=layers * 2 * 3 * H * H, bytes=4 * layers * 3 * H * H)


# ---- QRNN, minGRU, minLSTM, IndRNN ----


class HeinsenMinGRU(torch.nn.Module):
    """minGRU with the candidate g as its paper writes it in torch: a cumulative sum of logarithms."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        gate, candidate = torch.nn.functional.linear(x, self.layer.weight_ih_l0, self.layer.bias_ih_l0).chunk(2, -1)
        log_g = torch.where(candidate >= 0, (candidate.relu() + 0.5).log(), -torch.nn.functional.softplus(-candidate))
        kept = -torch.nn.functional.softplus(gate).cumsum(0)
        return (kept + (log_g - torch.nn.functional.softplus(-gate) - kept).logcumsumexp(0)).exp(), None


COLUMNS = {
    "QRNN": lambda d: seqaccel.nn.QRNN(d, d),
    "MinGRU": lambda d: seqaccel.nn.MinGRU(d, d, candidate="g"),
    "MinLSTM": lambda d: seqaccel.nn.MinLSTM(d, d),
    "IndRNN": lambda d: seqaccel.nn.IndRNN(d, d),
}


@suite(
    [{"layer": name, "B": 32, "T": 128, "d": 256} for name in COLUMNS],
    ["seqaccel[cpp]", "seqaccel.nn.SRU", "torch.nn.LSTM", "torch, Heinsen's scan"],
)
def bench_columns_training(layer, B, T, d):
    """SRU has three products; its time times the layer's products over three is what these are measured by."""
    torch.manual_seed(0)
    ours, x, grad = COLUMNS[layer](d), torch.randn(T, B, d), torch.randn(T, B, d)
    if layer == "IndRNN":
        torch.nn.init.uniform_(ours.weight_hh_l0, 0, 0.9)
    contenders = {
        "seqaccel[cpp]": on("cpp", training(ours, x, grad)),
        "seqaccel.nn.SRU": on("cpp", training(seqaccel.nn.SRU(d, d, num_layers=1), x, grad)),
        "torch.nn.LSTM": training(torch.nn.LSTM(d, d), x, grad),
    }
    if layer == "MinGRU":
        contenders["torch, Heinsen's scan"] = training(HeinsenMinGRU(ours), x, grad)
    rows, elements = ours.weight_ih_l0.shape[0], T * B * d
    arrays = 6 + 3 * rows // d
    return Case(contenders, flops=3 * 2 * elements * rows, bytes=4 * (arrays * elements + 3 * rows * d))
