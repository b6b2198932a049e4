"""How every benchmark of this package is measured.

A suite is a function that builds one case for one size: the contenders as functions of no arguments, and what the job
costs at the least. Ours comes first, with its backend forced and named in brackets::

    import seqaccel, torch
    from harness import Case, suite

    @suite([dict(B=1, T=128, H=512), dict(B=32, T=128, H=512)], ["seqaccel[cpp]", "torch", "onnxruntime"])
    def bench_lstm_training(B, T, H):
        x = torch.randn(T, B, H)
        ours, stock = seqaccel.nn.LSTM(H, H), torch.nn.LSTM(H, H)

        def train(module, backend="auto"):
            def run():
                with seqaccel.backend(backend):
                    module(x)[0].sum().backward()
            return run

        return Case(
            {"seqaccel[cpp]": train(ours, "cpp"), "torch": train(stock)},  # a name left out is skipped
            flops=3 * 2 * T * B * 8 * H * H,  # additions and multiplications of the whole job
            bytes=4 * (4 * T * B * H + 3 * 8 * H * H),  # each input read once, each output written once
        )

``pytest benchmarks`` runs it, one pytest-benchmark group a size and one row a contender; ``-k``, ``--benchmark-json``
and the other options work; ``--seconds`` sets the time a case may take; ``--benchmark-disable`` calls each contender
once. A contender that a machine lacks is left out of the case, and its row is skipped.

What is done with a case:

- All contenders run interleaved in one process, round by round, in rotating order, with the garbage collector off. A
  pause before each round keeps the threads of one contender out of the next one's time. Calls outside the clock, for
  as long as the pause took, keep out what the pause itself costs, as the ceilings are measured without one: on a
  virtual machine, RNN training calls of 6.6 ms after 20 ms of idleness took 1.10, 1.06, 1.03, 1.02 and 1.01 of their
  time, those of 0.7 ms 1.69, 1.16, 1.05 and 1.05. Calls of more than ten pauses need none.
- The machine's ceilings (rate of the faster GEMM of torch's and ours, copy bandwidth from memory, copy bandwidth at
  the case's footprint) are measured before and after. If one moved by more than 10% the run is void: it is repeated, up
  to three times in all, and what is void then is recorded as void and reported so.
- Our figure is the median round. A peer's figure is its fastest round.
- Contenders that do the same job (``Case.same``; by default "torch") must return what ours returns.
- A contender named ``seqaccel[cpp]``, ``[triton]`` or ``[cuda]`` is profiled first: no torch operator of ``STOCK`` may
  run in it.
- On a GPU the times are those of ``triton.testing.do_bench`` (events, L2 flushed): write ``suite(…, device="cuda")``,
  which marks the suite ``gpu``, and make the tensors there.

A peer with its own thread pool must not spin between calls (ONNX Runtime: ``session.intra_op.allow_spinning`` = "0").
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import pytest
import torch

#: torch's operators for the jobs of this package: a kernel of ours calls none of them.
STOCK = (
    "aten::lstm",
    "aten::gru",
    "aten::rnn_tanh",
    "aten::rnn_relu",
    "aten::lstm_cell",
    "aten::gru_cell",
    "aten::_thnn_fused",
    "aten::mkldnn_rnn_layer",
    "aten::_cudnn_rnn",
    "aten::conv1d",
    "aten::conv2d",
    "aten::convolution",
    "aten::_convolution",
    "aten::mkldnn_convolution",
    "aten::cudnn_convolution",
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product",
    "aten::_flash_attention",
    "aten::_efficient_attention",
    "aten::_native_multi_head_attention",
    "aten::_transformer_encoder_layer_fwd",
    "aten::softmax",
    "aten::_softmax",
    "aten::cumsum",
    "aten::cumprod",
)

#: Seconds between one contender's round and the next one's: the threads of the one before stop spinning meanwhile.
PAUSE = 0.02

#: Seconds a case may take, ceilings and repeats not counted; ``--seconds`` sets it.
seconds_per_case = 1.5


@dataclasses.dataclass
class Case:
    """One job at one size.

    Args:
        contenders: functions of no arguments by name, ours first.
        flops: floating-point operations of the job.
        bytes: bytes the job moves at the least.
        footprint: bytes of the memory they lie in, where the job goes over it more than once. Default: ``bytes``
        dtype: of the GEMM whose rate is the ceiling.
        forbidden: operators that a contender of ours must not run; a name stands for all that begin with it.
        same: contenders that do our job, not one of the same purpose: what they return must be what ours returns.
        device: set by ``suite``.
    """

    contenders: Mapping[str, Callable[[], object]]
    flops: float
    bytes: float
    footprint: float | None = None
    dtype: torch.dtype = torch.float32
    forbidden: Sequence[str] = STOCK
    same: Sequence[str] = ("torch",)
    device: str = "cpu"


@dataclasses.dataclass
class Ceilings:
    """What the machine gives at this moment: FLOP/s and bytes/s (read plus written)."""

    gemm: float
    copy: float
    cache: float

    def moved(self, other: Ceilings) -> float:
        """The largest relative change of a ceiling between two measurements."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return max(abs(a - b) / max(a, b) for a, b in pairs)

    def floor(self, case: Case) -> tuple[float, str]:
        """The least seconds the case can take, and whether operations or bytes decide it."""
        compute, memory = case.flops / self.gemm, case.bytes / max(self.copy, self.cache)
        return (compute, "compute") if compute >= memory else (memory, "memory")


def _seconds(function: Callable[[], object], iterations: int, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(iterations):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / iterations
    start = time.perf_counter()
    for _ in range(iterations):
        function()
    return (time.perf_counter() - start) / iterations


def _fastest(function: Callable[[], object], device: str, budget: float = 0.3) -> float:
    """The fastest of the rounds, of at least 4 ms each, that ``budget`` seconds hold."""
    function()
    iterations = max(1, math.ceil(4e-3 / max(_seconds(function, 1, device), 1e-9)))
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < budget:
        best = min(best, _seconds(function, iterations, device))
    return best


class Probe:
    """Measures the machine's ceilings, each time over the same memory.

    The GEMM is the faster of torch's and ours: on an AMD core with 512-bit units torch's is half as fast.

    Args:
        footprint: bytes that the cache bandwidth is measured over.
        device, dtype: of the matrices of the GEMM.
    """

    def __init__(self, footprint: float, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        n, large = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
        self.device = device
        self.matrices = [torch.randn(n, n, device=device).to(dtype) for _ in range(3)]
        half = int(min(max(footprint / 2, 1 << 15), large))
        self.buffers = [torch.ones(size, dtype=torch.uint8, device=device) for size in (large, large, half, half)]

    def __call__(self) -> Ceilings:
        a, b, out = self.matrices
        products = [lambda: torch.mm(a, b, out=out)]
        if self.device == "cpu" and a.dtype in (torch.float32, torch.float64):
            products.append(lambda: torch.ops.seqaccel.mm(a, b))
        source, target, near_source, near_target = self.buffers
        budget = 0.1 if self.device == "cuda" else 0.15
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions and recurrent layers are by default
        try:
            return Ceilings(
                gemm=2 * len(a) ** 3 / min(_fastest(product, self.device, budget) for product in products),
                copy=2 * len(source) / _fastest(lambda: target.copy_(source), self.device, budget),
                cache=2 * len(near_source) / _fastest(lambda: near_target.copy_(near_source), self.device, budget),
            )
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


def ran_operators(function: Callable[[], object]) -> set[str]:
    """The names of the operators that run in one call of ``function``."""
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return {event.key for event in profiler.key_averages()}


def assert_own_kernels(function: Callable[[], object], forbidden: Iterable[str] = STOCK) -> None:
    """Asserts, with torch's profiler, that no operator whose name begins with a ``forbidden`` one runs in a call."""
    found = sorted(name for name in ran_operators(function) if name.startswith(tuple(forbidden)))
    assert not found, f"torch's own operators do the job: {', '.join(found)}"


def _tensors(result: object) -> list[torch.Tensor]:
    """The tensors of a contender's result, in order."""
    if isinstance(result, torch.Tensor):
        return [result.detach().float()]
    if isinstance(result, torch.nn.utils.rnn.PackedSequence):
        return [result.data.detach().float()]
    return [t for part in result for t in _tensors(part)] if isinstance(result, (tuple, list)) else []


def assert_parity(case: Case) -> None:
    """Asserts that the contenders of ``case.same`` return what ours returns, before anything is timed."""
    ours, *_ = case.contenders
    bound = 1e-3 if case.dtype == torch.float32 else 5e-2
    for name in case.same:
        if name in case.contenders:
            expected, found = (_tensors(case.contenders[contender]()) for contender in (name, ours))
            assert expected and len(found) == len(expected), f"{name} and {ours} return nothing that can be compared"
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=bound * b.abs().max().item())


def _rounds_cpu(case: Case, budget: float) -> dict[str, list[float]]:
    """Seconds of one iteration, by contender and round; contenders interleaved."""
    loops, warm_up = {}, {}
    for name, function in case.contenders.items():
        function()
        once = _seconds(function, 1, "cpu")
        loops[name] = max(1, math.ceil(5e-3 / max(once, 1e-9)))
        warm_up[name] = PAUSE if once < 10 * PAUSE else 0.0
    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    order, start, enabled = list(case.contenders), time.perf_counter(), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for round_ in itertools.count():
            for name in order[round_ % len(order) :] + order[: round_ % len(order)]:
                time.sleep(PAUSE)
                warm = time.perf_counter() + warm_up[name]
                while time.perf_counter() < warm:
                    case.contenders[name]()
                times[name].append(_seconds(case.contenders[name], loops[name], "cpu"))
            if (round_ >= 2 and time.perf_counter() - start > budget) or round_ >= 300:
                return times
    finally:
        if enabled:
            gc.enable()


def _rounds_cuda(case: Case, budget: float) -> dict[str, list[float]]:
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in case.contenders}
    passes, share = 4, budget * 1e3 / 4 / len(case.contenders)
    for _ in range(passes):
        for name, function in case.contenders.items():
            times[name] += [t / 1e3 for t in do_bench(function, warmup=25, rep=min(share, 200), return_mode="all")]
    return times


@dataclasses.dataclass
class Measured:
    """The rounds of a case's contenders, and the ceilings around them."""

    case: Case
    times: dict[str, list[float]]
    before: Ceilings
    after: Ceilings
    runs: int

    @property
    def void(self) -> bool:
        return self.before.moved(self.after) > 0.1

    def figure(self, name: str) -> float:
        """Seconds: our median round, a peer's fastest."""
        rounds = self.times[name]
        return statistics.median(rounds) if name.startswith("seqaccel") else min(rounds)

    def record(self, name: str) -> dict[str, object]:
        """What goes into the JSON beside the times."""
        best = Ceilings(
            *(max(p) for p in zip(dataclasses.astuple(self.before), dataclasses.astuple(self.after), strict=True))
        )
        floor, bound = best.floor(self.case)
        seconds = self.figure(name)
        ours = next(iter(self.case.contenders))
        speeds = [a / b for a, b in zip(self.times[name], self.times[ours], strict=False)]
        return {
            "contender": name,
            "backend": name.partition("[")[2].rstrip("]") or name,
            "device": self.case.device,
            "seconds": seconds,
            "tflops": self.case.flops / seconds / 1e12,
            "gbytes_per_s": self.case.bytes / seconds / 1e9,
            "percent_of_ceiling": 100 * floor / seconds,
            "bound": bound,
            "speed_of_ours_over_this": seconds / self.figure(ours),
            "quartiles_of_speed": statistics.quantiles(speeds, n=4)[::2],
            "fastest_over_fastest": min(self.times[name]) / min(self.times[ours]),
            "ours": ours,
            "flops": self.case.flops,
            "bytes": self.case.bytes,
            "ceilings_before": dataclasses.asdict(self.before),
            "ceilings_after": dataclasses.asdict(self.after),
            "void": self.void,
            "runs": self.runs,
        }


def measure(case: Case, attempts: int = 3) -> Measured:
    """Runs a case; a run whose ceilings moved is repeated, ``attempts`` runs in all."""
    assert_parity(case)
    for name, function in case.contenders.items():
        if name.startswith(("seqaccel[cpp]", "seqaccel[triton]", "seqaccel[cuda]")):
            assert_own_kernels(function, case.forbidden)
    rounds = _rounds_cuda if case.device == "cuda" else _rounds_cpu
    probe = Probe(case.footprint or case.bytes, case.device, case.dtype)
    for attempt in range(1, attempts + 1):
        before = probe()
        times = rounds(case, seconds_per_case)
        result = Measured(case, times, before, probe(), attempt)
        if not result.void:
            break
    else:
        warnings.warn(f"void: the machine's ceilings moved by {result.before.moved(result.after):.0%}", stacklevel=2)
    case.contenders = dict.fromkeys(case.contenders, lambda: None)  # lets go of the tensors
    return result


class _Clock:
    """Moves only by the times that were measured, so that pytest-benchmark computes its statistics from them."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, times: Iterable[float]) -> Callable[[], None]:
        rest = iter(times)

        def target() -> None:
            self.now += next(rest)

        return target


_clock = _Clock()


def _read_clock() -> float:
    return _clock()


def suite(
    sizes: Sequence[Mapping[str, object]] | Mapping[str, Mapping[str, object]],
    contenders: Sequence[str],
    device: str = "cpu",
) -> Callable[[Callable[..., Case]], Callable[..., None]]:
    """Makes a pytest-benchmark suite of a function that builds a ``Case``.

    Args:
        sizes: keyword arguments of the function, one group each; a mapping names the groups.
        contenders: every name that a case may have, ours first; one row each.
        device: ``"cpu"`` or ``"cuda"``: where the contenders run.
    """
    named = (
        dict(sizes)
        if isinstance(sizes, Mapping)
        else {",".join(f"{k}={v}" for k, v in size.items()): size for size in sizes}
    )
    # Ids that -k can name: -k "lstm_training and B1-T128".
    ids = {size: size.replace("=", "").replace(",", "-") for size in named}
    rows = [pytest.param(size, name, id=f"{ids[size]}-{name}") for size in named for name in contenders]

    def decorate(build: Callable[..., Case]) -> Callable[..., None]:
        title = build.__name__.removeprefix("bench_").removeprefix("test_")

        def make(size: str) -> Case:
            return dataclasses.replace(build(**named[size]), device=device)

        @functools.cache
        def measured(size: str) -> Measured:
            return measure(make(size))

        @pytest.mark.benchmark(timer=_read_clock)
        @pytest.mark.parametrize(("size", "contender"), rows)
        def run(benchmark, size: str, contender: str) -> None:
            benchmark.group = f"{title}[{size}]"
            if benchmark.disabled:
                case = make(size)
                if contender not in case.contenders:
                    pytest.skip(f"{contender} is not there on this machine")
                assert_parity(dataclasses.replace(case, same=[contender] if contender in case.same else ()))
                benchmark(case.contenders[contender])
                return
            result = measured(size)
            if contender not in result.times:
                pytest.skip(f"{contender} is not there on this machine")
            benchmark.extra_info.update(result.record(contender), suite=title, size=size)
            times = result.times[contender]
            benchmark.pedantic(_clock.advance(times), rounds=len(times), iterations=1, warmup_rounds=0)

        run.__name__ = run.__qualname__ = build.__name__
        run.__doc__ = build.__doc__
        run.__module__ = build.__module__
        return pytest.mark.gpu(run) if device == "cuda" else run

    return decorate
