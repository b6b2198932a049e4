"""Peak memory of one call beyond its inputs and results, beside torch's operators.

``python -m benchmarks.memory [--json FILE]``. Each figure comes from a process of its own, as what a process has freed
before would hide a peak. A first call at a small size starts the threads and loads the code.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import seqaccel.functional as F
import seqaccel.nn as snn
from benchmarks import packages

ROOT = pathlib.Path(__file__).parent.parent


Function = Callable[..., Tensor | tuple]  # a function of the inputs, or a module; of a tuple the first item counts


@dataclasses.dataclass(frozen=True)
class Job:
    size: str
    shapes: Sequence[tuple[int, ...]]  # of the inputs
    small: Sequence[tuple[int, ...]]  # of the first call
    ours: Callable[[], Function]
    torch: Callable[[], Function] | None = None
    training: bool = True


def recurrent(kind: str) -> Job:
    T, B, H = 512, 16, 512
    theirs = (lambda: getattr(nn, kind)(H, H)) if hasattr(nn, kind) else None
    return Job(f"B={B}, T={T}, H=I={H}", [(T, B, H)], [(2, 2, H)], lambda: getattr(snn, kind)(H, H), theirs)


def hierarchical(training: bool) -> Job:
    T = 131_072
    shapes, small = 3 * [(1, 4, T, 64)], 3 * [(1, 4, 256, 64)]
    return Job(f"T={T:,}, 4 heads of 64", shapes, small, lambda: F.hierarchical_attention, training=training)


def broadcast_form(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(query[:, :, None] + key[:, None]) @ weight, -1) @ value


JOBS = {
    "additive attention, training": Job(
        "B=16, Tq=50, Tk=400, H=512",
        [(16, 50, 512), (16, 400, 512), (16, 400, 512), (512,)],
        [(2, 4, 16), (2, 4, 16), (2, 4, 16), (16,)],
        lambda: F.additive_attention,
        lambda: broadcast_form,
    ),
    "hierarchical attention, inference": hierarchical(training=False),
    "hierarchical attention, training": hierarchical(training=True),
    **{f"{kind}, training": recurrent(kind) for kind in ("LSTM", "GRU", "SRU")},
}


def _kilobytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1])


def _here(job: Job, ours: bool) -> int:
    """Bytes beyond inputs, outputs and gradients."""
    function = (job.ours if ours else job.torch)()
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []

    def run(shapes: Sequence[tuple[int, ...]]) -> int:
        inputs = [torch.randn(shape, requires_grad=job.training) for shape in shapes]
        before = _kilobytes("VmRSS:")
        with torch.set_grad_enabled(job.training):
            y = function(*inputs)
            results = [y[0] if isinstance(y, tuple) else y]
        if job.training:
            results.append(torch.ones_like(results[0]))
            results += torch.autograd.grad(results[0], inputs + parameters, results[1])
        return (_kilobytes("VmHWM:") - before) * 1024 - sum(result.nbytes for result in results)

    run(job.small)
    return run(job.shapes)


def peak(name: str, ours: bool = True) -> int:
    """Bytes that a job takes at its peak beyond inputs, outputs and gradients (Linux)."""
    command = [sys.executable, "-m", "benchmarks.memory", "--here", name, *(["--torch"] if not ours else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    return int(done.stdout)


def megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.0f} MB"


def table_of(path: pathlib.Path) -> str:
    """What the page has of a record."""
    return packages.page_of_rows(path, markdown)


def markdown(rows: list[dict]) -> str:
    lines = [("float32", "size", "inputs", "ours", "torch"), ("---", "---", "---:", "---:", "---:")]
    lines += [(row["name"], row["size"], *(megabytes(row[key]) for key in ("inputs", "ours", "torch"))) for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, help="the record to write")
    parser.add_argument("--here", choices=list(JOBS), help=argparse.SUPPRESS)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.here:
        print(_here(JOBS[options.here], not options.torch))
        return 0
    rows = []
    for name, job in JOBS.items():
        inputs = sum(4 * torch.Size(shape).numel() for shape in job.shapes)
        theirs = peak(name, ours=False) if job.torch else None
        rows.append({"name": name, "size": job.size, "inputs": inputs, "ours": peak(name), "torch": theirs})
    print(markdown(rows), end="")
    if options.json:
        packages.write_rows(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
