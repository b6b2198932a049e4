"""What every Triton operator must do, whichever family it is of."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from kernel_calls import TABLE, calls_of  # noqa: E402
from rnn_cases import problem, weights_of  # noqa: E402

import seqaccel  # noqa: E402
from seqaccel.functional.rnn._layers import Direction, layer  # noqa: E402
from seqaccel.kernels import _launch, _math  # noqa: E402
from seqaccel.kernels.attention import hierarchical  # noqa: E402
from seqaccel.kernels.attention.hierarchical import attend  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")


every_call = pytest.mark.parametrize("calls", TABLE)
one_of_each = pytest.mark.parametrize("calls", ["rnn lstm", "linear_scan", "columns sru", "conv", "attention"])


def flat(found):
    return [
        t
        for part in ([found] if isinstance(found, torch.Tensor) else found)
        for t in (part if isinstance(part, list) else [part])
    ]


@interpreted
def test_every_operator_is_in_the_table():
    names = {f"seqaccel::{name}_triton" for calls in TABLE for name, *_ in calls_of(calls)}
    assert names == set(_launch.OPERATORS)


def strided(value):
    """The same values, every other element of memory: between them lies what would be seen."""
    if isinstance(value, list):
        return [strided(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    between = torch.full_like(value, float("nan") if value.is_floating_point() else 1)
    return torch.stack((value, between), -1)[..., 0]


@interpreted
@every_call
def test_tensors_with_strides(calls):
    for name, operator, arguments in calls_of(calls):
        expected = flat(operator(*arguments))
        found = flat(operator(*map(strided, arguments)))
        for i, (ours, wanted) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(ours, wanted), f"{name}, result {i}"


@pytest.fixture(scope="module")
def front_end():
    """What Triton's front end says of the kernels, by rule."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(pathlib.Path(__file__).with_name("front_end.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("rule", ["inductor", "amd", "found", "specialised"])
def test_front_end(rule, front_end):
    assert not front_end[rule], "\n".join(front_end[rule])


class Through(TorchDispatchMode):
    """Sees every operator, as counters of operations and selective checkpointing do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def negated(value):
    """The same values by torch's negative bit."""
    if isinstance(value, list):
        return [negated(v) for v in value]
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return torch._neg_view(value.neg()) if is_float else value


@interpreted
@pytest.mark.parametrize("mode", [contextlib.nullcontext, Through], ids=["plain", "dispatched"])
@pytest.mark.parametrize("calls", ["rnn lstm", "columns sru", "conv"])
def test_tensors_with_the_negative_bit(calls, mode):
    for name, operator, arguments in calls_of(calls):
        expected = flat(operator(*arguments))
        with mode():
            found = flat(operator(*map(negated, arguments)))
        assert all(map(torch.equal, found, expected)), name


@interpreted
def test_expanded_lengths():
    for lengths in (torch.tensor([3]).expand(2), torch.tensor([[1, 3], [2, 3]])[:, 0]):
        for name, operator, arguments in calls_of("rnn lstm"):
            at = next(i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.dtype == torch.int64)
            found, expected = (
                flat(operator(*arguments[:at], given, *arguments[at + 1 :]))
                for given in (lengths, lengths.clone(memory_format=torch.contiguous_format))
            )
            assert all(map(torch.equal, found, expected)), name


@interpreted
@one_of_each
def test_device_of_the_tensors(calls, monkeypatch):
    """Launches happen on the tensors' device, called plainly or by the dispatcher."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(_launch, "_is_elsewhere", lambda t: True)
    monkeypatch.setattr(torch.cuda, "device", Device)
    with Through():
        for count, (name, operator, arguments) in enumerate(calls_of(calls), 1):
            operator(*arguments)
            assert entered == [torch.device("cpu")] * len(entered) and len(entered) >= count, name


@triton.jit
def _every_function(p_x, p_sigmoid, p_tanh, p_silu, N: tl.constexpr):
    o = tl.arange(0, N)
    x = tl.load(p_x + o)
    tl.store(p_sigmoid + o, _math.sigmoid(x))
    tl.store(p_tanh + o, _math.tanh(x))
    tl.store(p_silu + o, _math.silu(x))


def _all_numbers(dtype, count):
    """Floats over the whole range, evenly by their bits; more of those where the functions bend; and the edges."""
    whole = torch.int32 if dtype == torch.float32 else torch.int64
    bits = torch.arange(count) * (2 * torch.iinfo(whole).max // count) + torch.iinfo(whole).min
    x = bits.to(whole).view(dtype)
    edges = [88.38, 88.5, 88.72, 90.0, 104.0, 709.74, 709.9, 710.08, 745.2, 0.0, 0.2, 0.25, 1e-30, float("inf")]
    middle = torch.linspace(-120, 120, count // 4, dtype=dtype)
    special = torch.tensor([*edges, *(-edge for edge in edges), float("nan")], dtype=dtype)
    x[: count // 4] = middle
    x[count // 2 : count // 2 + len(special)] = special
    return x


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalar_functions_of_all_numbers(dtype):
    """No NaN from a number, and within a few roundings of float64; what is nearly 0 may be 0."""
    x = _all_numbers(dtype, 1 << 19)
    found = {name: torch.empty_like(x) for name in ("sigmoid", "tanh", "silu")}
    _every_function[(1,)](x, *found.values(), N=len(x))
    finfo, exact = torch.finfo(dtype), x.double()
    expected = {"sigmoid": exact.sigmoid(), "tanh": exact.tanh(), "silu": torch.nn.functional.silu(exact)}
    for name, ours in found.items():
        is_nan = x.isnan() | (x == -float("inf")) if name == "silu" else x.isnan()  # -inf * 0, as torch has it
        assert torch.equal(ours.isnan(), is_nan), name
        ours, wanted = ours.double(), expected[name]
        slack = 4 * finfo.eps * wanted.abs() + (0 if name == "tanh" else 200 * finfo.tiny)
        right = is_nan | (ours == wanted) | ((ours - wanted).abs() <= slack)
        assert right.all(), f"{name} of {x[~right][:5].tolist()}: {ours[~right][:5].tolist()}"


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("spoilt", "number"), [("key", float("nan")), ("value", float("nan")), ("value", -float("inf"))], ids=str
)
def test_attention_sees_nothing_of_the_future(spoilt, number):
    """Not even a NaN, in the tile of a query: 0 times NaN would be NaN."""
    tensors = dict(zip(("query", "key", "value"), torch.randn(3, 1, 1, 24, 4), strict=True))
    grad, options, t = torch.randn(1, 1, 24, 4), (16, 2, -1, 1, True, True, 0.5), 20

    def outputs_and_gradients(tensors):
        saved = hierarchical.hierarchical_attention_forward(*tensors.values(), None, None, None, *options)
        backward = hierarchical.hierarchical_attention_backward(
            grad, *tensors.values(), None, None, None, *saved, *options
        )
        return saved[0], backward[0]

    expected = outputs_and_gradients(tensors)
    tensors[spoilt] = tensors[spoilt].clone()
    tensors[spoilt][0, 0, t, 1] = number
    for found, wanted in zip(outputs_and_gradients(tensors), expected, strict=True):
        torch.testing.assert_close(found[:, :, :t], wanted[:, :, :t])
    if spoilt == "value":
        assert (outputs_and_gradients(tensors)[0][:, :, t:, 1] - number).isnan().all()


@triton.jit
def _one_run(p, t, T, span, above, fanout, w):
    begin, end = attend._node_run(1, t, T, span, above, fanout, False, w)
    tl.store(p, begin)
    tl.store(p + 1, end)


@interpreted
def test_runs_of_nodes_beyond_32_bits():
    """To the right of a query, where fanout * (parent + w) has 37 bits."""
    found = torch.zeros(2, dtype=torch.int32)
    T, span, fanout, w = 1 << 20, 2, 1 << 18, (1 << 19) - 2
    _one_run[(1,)](found, 0, T, span, span * fanout, fanout, w)
    assert found.tolist() == [w, T // span]


def test_no_kernel_reads_a_subclass():
    """Not in a list either: quantised and distributed weights go through the dispatcher."""

    class Quantised(torch.Tensor):
        pass

    plain, other = torch.zeros(2), torch.zeros(2).as_subclass(Quantised)
    assert not _launch._traced((plain, [plain, None], 1, "cell"))
    assert _launch._traced((plain, other)) and _launch._traced((plain, [plain, None, other]))


def test_lengths_on_a_gpu_are_not_read_back():
    """Their values stay where they are: any device but the CPU would wait for them."""
    lengths = torch.empty(3, dtype=torch.int64, device="meta")  # whose values nothing can read
    tensors = {name: t.to("meta") for name, t in problem("lstm", 4, 3, 5, 6, dtype=torch.float32).items()}
    weights = weights_of("lstm", tensors)
    with seqaccel.backend("reference"):
        direction = Direction(tensors["h_0"], tensors["c_0"], weights)
        output, *_ = layer("lstm", "lstm", tensors["input"], direction, lengths)
    assert output.shape == (4, 3, 6)
