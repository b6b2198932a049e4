"""One step of small networks, as they run at the edge: median and 99.9th percentile, on one thread and on two.

``python -m benchmarks.edge [--calls 20000] [--out FILE.json]``. Sizes are those of RTNeural's examples (recurrent
layers of 16 to 40 units on audio samples), Neural Amp Modeler (WaveNet of 16 channels), Silero VAD (LSTM of 128) and
DeepFilterNet (GRUs of 256). ``seqaccel.Session`` packs the weights in float32, bfloat16 or int8. Beside it: torch's
modules in inference mode, TorchScript, ONNX Runtime, OpenVINO and tract, each where it is installed
(``pip install -r benchmarks/peers.txt``). All runs of a network take turns of 200 calls in one process; each call is
timed by itself. A percentile of a shared machine contains the other work on it.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import gc
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

import seqaccel
import seqaccel.nn as snn
from benchmarks.records import RESULTS, duration
from benchmarks.step_peers import OneStep, step_peers

TURN = 200
PEERS = ("torchscript", "onnxruntime", "openvino", "tract")

#: A network of torch.nn or seqaccel.nn, by name, and the features of its input.
NETS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "RTNeural: LSTM 16, dense 1": (1, lambda: nn.Sequential(nn.LSTM(1, 16), nn.Linear(16, 1))),
    "RTNeural: LSTM 40, dense 1": (1, lambda: nn.Sequential(nn.LSTM(1, 40), nn.Linear(40, 1))),
    "RTNeural: GRU 16, dense 1": (1, lambda: nn.Sequential(nn.GRU(1, 16), nn.Linear(16, 1))),
    "TCN, 4 levels of 16, K=3": (16, lambda: snn.TCN(16, [16] * 4, 3, 0.0)),
    "Neural Amp Modeler: WaveNet, 2 x 10 layers of 16, K=3": (
        1,
        lambda: snn.WaveNet(1, 1, 16, 16, layers=10, stacks=2, kernel_size=3),
    ),
    "Silero VAD: LSTM 128, dense 1": (128, lambda: nn.Sequential(nn.LSTM(128, 128), nn.Linear(128, 1))),
    "DeepFilterNet: 2 GRUs of 256": (256, lambda: nn.Sequential(nn.GRU(256, 256, 2))),
}


def runners(features: int, make: Callable[[], nn.Module], threads: int) -> dict[str, Callable[[], object]]:
    """A step of one stream as functions of no arguments, ours first."""
    module, x_t = make().eval(), torch.randn(1, features)
    found: dict[str, Callable[[], object]] = {}
    for weights in ("float32", "bfloat16", "int8"):
        found[f"Session, {weights}"] = functools.partial(seqaccel.Session(module, weights=weights).step, x_t)
    step = OneStep(module)
    carried = [step.state(x_t)]

    @torch.inference_mode()
    def stock() -> object:
        with seqaccel.backend("reference"):
            y, *carried[0] = step(x_t, *carried[0])
        return y

    return found | {"torch": stock} | step_peers(module, x_t, PEERS, threads)


def measure(runs: dict[str, Callable[[], object]], calls: int) -> dict[str, tuple[float, float]]:
    """Median and 99.9th percentile of each, in seconds."""
    times: dict[str, list[int]] = {name: [] for name in runs}
    names, clock, enabled = list(runs), time.perf_counter_ns, gc.isenabled()
    gc.disable()
    try:
        for turn in range(-(-calls // TURN)):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                run, kept = runs[name], times[name]
                for _ in range(20):
                    run()
                for _ in range(TURN):
                    start = clock()
                    run()
                    kept.append(clock() - start)
    finally:
        if enabled:
            gc.enable()
    return {
        name: (statistics.median(t) / 1e9, sorted(t)[min(len(t) - 1, int(0.999 * len(t)))] / 1e9)
        for name, t in times.items()
    }


def print_table(record: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="One step of one stream: median / 99.9th percentile", caption=f"{record['processor']}, {record['date']}"
    )
    for name in ("network", "runtime", "1 thread", "2 threads"):
        table.add_column(name)
    for net, by_threads in record["nets"].items():
        table.add_section()
        for i, name in enumerate(by_threads["1"]):
            cells = (" / ".join(map(duration, by_threads[t][name])) if t in by_threads else "" for t in ("1", "2"))
            table.add_row(net if i == 0 else "", name, *cells)
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edge", description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000, help="calls of each runtime (default: 20,000)")
    parser.add_argument("--net", action="append", help="only networks whose name contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--out", type=pathlib.Path, help="the record; networks that it has are not run again")
    options = parser.parse_args(arguments)
    if options.calls < 1:
        parser.error("argument --calls: must be at least 1")
    chosen = {net: make for net, make in NETS.items() if not options.net or any(part in net for part in options.net)}
    if not chosen:
        parser.error("argument --net: no network has that in its name")
    import cpuinfo  # pytest-benchmark brings it

    cpu = cpuinfo.get_cpu_info()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    record = {
        "command": "python -m benchmarks.edge " + " ".join(sys.argv[1:]),
        "processor": f"{cpu.get('brand_raw')} (family {cpu.get('family')}, model {cpu.get('model')})",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "calls": options.calls,
        "nets": {},
    }
    if options.out and options.out.exists():
        record["nets"] = json.loads(options.out.read_text())["nets"]
    for net, (features, make) in chosen.items():
        if net in record["nets"]:
            continue
        figures = {}
        for threads in options.threads:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            figures[str(threads)] = measure(runners(features, make, threads), options.calls)
        record["nets"][net] = figures
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print_table(record)


if __name__ == "__main__":
    main()
