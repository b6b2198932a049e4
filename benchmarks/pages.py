"""Fills the tables of README.md, docs/benchmarks.md and docs/recipes.md, and draws figures: ``make report``.

A table stands between two comments, of which the first says what it shows::

    <!-- table: PROCESSOR SUITE SUITE … -->
    <!-- end -->

PROCESSOR is a folder of ``benchmarks/results``; its records are read as one, the newest last. A row is a case: our
time, each peer's time, how many times as fast ours is, and the share of the ceiling. Instead of ``table:``, ``means:``
makes one row a suite, the geometric mean over its sizes and the worst; ``edge:`` shows the newest record of
``benchmarks.edge`` in the folder's ``edge``, ``packages:``, ``recipes:`` and ``memory:`` those of the modules of these
names, in folders of these names, ``machine:`` says where each record was made, and ``<!-- jobs -->`` is README's table
(``JOBS``).

``python -m benchmarks.pages --check`` writes nothing; its exit status is 1 where a page differs from the records.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import pathlib
import re
import statistics
import sys

from benchmarks import plots
from benchmarks.records import RESULTS, cases, committed, duration, machine, ours, read, read_all

ROOT = RESULTS.parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "recipes.md")
MARKED = re.compile(
    r"(<!-- (table|means|edge|packages|recipes|memory|machine|jobs):? ?(.*?) -->\n).*?(<!-- end -->)", re.DOTALL
)

Rows = list[list[str]]


@functools.cache
def record(processor: str) -> dict:
    """All records of one processor as one."""
    paths = committed(RESULTS / processor)
    if not paths:
        sys.exit(f"{RESULTS / processor} has no record")
    return read_all(paths)


def newest(processor: str, kind: str) -> pathlib.Path:
    """The last record in a folder of one processor."""
    paths = sorted((RESULTS / processor / kind).glob("*.json"))
    if not paths:
        sys.exit(f"{RESULTS / processor / kind} has no record")
    return paths[-1]


def sound(processor: str, suite: str) -> dict[str, dict[str, dict]]:
    """The cases of a suite by size, without those that are void."""
    found = {
        size: case
        for (name, size), case in cases(record(processor)).items()
        if name == suite and not any(info["void"] for info in case.values())
    }
    if not found:
        sys.exit(f"the records of {processor} have no sound case of {suite}")
    return found


def markdown(header: list[str], rows: Rows, left: int = 1) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def share(case: dict[str, dict]) -> str:
    info = ours(case)
    return f"{info['percent_of_ceiling']:.0f}%"


def table(processor: str, suites: list[str]) -> str:
    """A row a case; the peers are those of the first suite."""
    chosen = [(suite, size, case) for suite in suites for size, case in sound(processor, suite).items()]
    peers = list(dict.fromkeys(name for *_, case in chosen for name in case if name != ours(case)["contender"]))
    rows = []
    for suite, size, case in chosen:
        row = [suite.replace("_", " ")] if len(suites) > 1 else []
        row += [size.replace(",", ", "), duration(ours(case)["seconds"])]
        for peer in peers:
            info = case.get(peer)
            row.append(f"{duration(info['seconds'])} ({info['speed_of_ours_over_this']:.2f}×)" if info else "–")
        rows.append([*row, share(case)])
    first = ["suite"] if len(suites) > 1 else []
    return markdown([*first, "size", "ours", *peers, "ceiling"], rows, len(first) + 1)


def mean(values: list[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f} ({min(values):.2f})" if values else "–"


def means(processor: str, suites: list[str]) -> str:
    """A row a suite: geometric mean and, in brackets, the worst, of the speed over torch and over the better peer."""
    rows = []
    for suite in suites:
        found = sound(processor, suite).values()
        speeds = [{name: info["speed_of_ours_over_this"] for name, info in case.items()} for case in found]
        others = [
            min(value for name, value in speed.items() if name in ("onnxruntime", "openvino"))
            for speed in speeds
            if speed.keys() & {"onnxruntime", "openvino"}
        ]
        ceiling = [ours(case)["percent_of_ceiling"] for case in found]
        rows.append(
            [
                suite.replace("_", " "),
                str(len(speeds)),
                mean([speed["torch"] for speed in speeds if "torch" in speed]),
                mean(others),
                f"{statistics.geometric_mean(ceiling):.0f}% ({min(ceiling):.0f}%)",
            ]
        )
    return markdown(
        ["suite", "cases", "faster than torch", "faster than the better of ONNX Runtime and OpenVINO", "ceiling"], rows
    )


def edge(processor: str) -> str:
    """A row a runtime of each network: median and 99.9th percentile of a step."""
    found = json.loads(newest(processor, "edge").read_text())
    threads = list(next(iter(found["nets"].values())))
    rows = [
        [net, name, *(" / ".join(map(duration, by_threads[n][name])) for n in threads)]
        for net, by_threads in found["nets"].items()
        for name in by_threads[threads[0]]
    ]
    header = ["network", "runtime", *(f"{n} thread{'s' * (n != '1')}" for n in threads)]
    about = f"{found['processor']}; torch {found['torch']}; commit {found['commit']}; {found['date']}"
    return f"{markdown(header, rows, 2)}\n{found['calls']:,} calls of each; {about}.\n"


#: README's rows: the job, what one would run instead, PROCESSOR, suite, size (None: the mean over all), its peers.
JOBS = (
    ("train a GRU, float32, 16 sizes", "`torch.nn.GRU`", "amd-epyc-25-17", "gru_training", None, ("torch",)),
    (
        "train an LSTM, bfloat16, batch 64, 256 steps, 128 units",
        "`torch.nn.LSTM`",
        "nvidia-h100-80gb-hbm3",
        "rnn_training_gpu",
        "kind=LSTM,B=64,T=256,H=128,dtype=bfloat16",
        ("torch",),
    ),
    (
        "one streaming step of an LSTM, 512 units",
        "`LSTMCell`; ONNX Runtime",
        "amd-epyc-25-17",
        "session_step",
        "cell=LSTM,B=1,H=512",
        ("torch cell", "onnxruntime"),
    ),
)
FIGURES = "amd-epyc-25-17"  # whose record the figures are drawn from
PROCESSORS = {"amd-epyc-25-17": "2 Zen 4 cores", "nvidia-h100-80gb-hbm3": "NVIDIA H100"}


def jobs() -> str:
    """README's table."""
    rows = []
    for job, instead, processor, suite, size, peers in JOBS:
        found = sound(processor, suite)
        chosen = list(found.values()) if size is None else [found[size]]
        said = []
        for peer in peers:
            speeds = [case[peer]["speed_of_ours_over_this"] for case in chosen]
            worst = f" ({min(speeds):.1f}× at worst)" if len(speeds) > 1 else ""
            said.append(f"{statistics.geometric_mean(speeds):.1f}×{worst}")
        rows.append([job, instead, "; ".join(said), PROCESSORS[processor]])
    return markdown(["job, against the same layer", "instead of", "faster", "measured on"], rows, 2)


def filled(text: str) -> str:
    """The page with its tables made anew."""

    def make(match: re.Match[str]) -> str:
        opening, kind, words, closing = match.groups()
        if kind == "jobs":
            return f"{opening}{jobs()}{closing}"
        processor, *suites = words.split()
        if kind == "edge":
            return f"{opening}\n{edge(processor)}\n{closing}"
        if kind == "machine":
            made = "".join(f"- {machine(read(path))}.\n" for path in committed(RESULTS / processor))
            return f"{opening}\n{made}\n{closing}"
        if kind in ("packages", "recipes", "memory"):
            module = importlib.import_module(f"benchmarks.{kind}")  # needs torch, unlike the rest
            return f"{opening}\n{module.table_of(newest(processor, kind))}\n{closing}"
        rows = means(processor, suites) if kind == "means" else table(processor, suites)
        return f"{opening}\n{rows}\n{closing}"

    return MARKED.sub(make, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    options = parser.parse_args(arguments)
    stale = []
    for page in PAGES:
        old = page.read_text()
        new = filled(old)
        if new != old:
            stale.append(page.name)
            if not options.check:
                page.write_text(new)
    if not options.check:
        plots.write(record(FIGURES), ROOT / "docs" / "static")
    if options.check and stale:
        print(f"{' and '.join(stale)}: the tables are not those of the records; run make report", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
