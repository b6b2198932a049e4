"""Models of other people's packages before and after ``seqaccel.convert``: same outputs, same losses, how much faster.

    pip install -r benchmarks/packages.txt
    python -m benchmarks.packages                      # all of package_models.py, a table
    python -m benchmarks.packages "darts*" --report    # those that match, with what convert did
    python -m benchmarks.packages --json FILE          # adds the rows to a record
    python -m benchmarks.packages --json FILE --resume # those that the record lacks of this commit
    python -m benchmarks.packages --table FILE         # the Markdown table of a record

``make report`` puts the table of a processor's newest record, in ``benchmarks/results/PROCESSOR/packages``, into the
pages (``benchmarks/pages.py``).

Each model runs inference and a training step (forward, loss, backward, Adam) with its own code and converted, in
turns, in one process; the figures are the median rounds. A package that is not installed is a row that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fnmatch
import gc
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import seqaccel
from benchmarks.package_models import MODELS, Subject

#: Steps of Adam whose losses must agree, and how far, relative to the loss: float32 rounding, which training amplifies.
STEPS, LOSS_TOLERANCE = 4, 1e-4
#: Largest difference of an output, relative to the largest output.
OUTPUT_TOLERANCE = 1e-4


class Times(NamedTuple):
    """Medians over the rounds: seconds of a call before and after, and the ratio of the two in a round."""

    before: float
    after: float
    ratio: float


@dataclasses.dataclass
class Result:
    """What one model gave."""

    name: str
    size: str = ""
    package: str = ""
    commit: str = ""
    converted: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    output_error: float = 0.0
    loss_error: float = 0.0
    inference: Times | None = None
    training: Times | None = None
    optimized: Times | None = None
    problem: str = ""


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested result, dataclasses and mappings among it."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in dataclasses.fields(value)])
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def floats(value: Any) -> list[Tensor]:
    return [t.detach().clone() for t in tensors(value) if t.is_floating_point()]


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of its tensor; infinity where shapes differ."""
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True) if a.numel()]
    errors = [((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs]
    return max(errors, default=0.0)


class Runner:
    """The subject's calls, for either side: ``use`` chooses which."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.model = subject, subject.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.chosen: Callable[[str], bool] = lambda path: True  #: which layers ``use`` converts

    def use(self, converted: bool) -> Any:
        if not converted:
            return seqaccel.revert(self.model)
        return seqaccel.convert(self.model, filter_fn=lambda _, path: self.chosen(path), report=True)[1]

    def inference(self) -> Any:
        with torch.no_grad():
            return self.model(*self.subject.inputs)

    def output(self) -> list[Tensor]:
        self.model.eval()
        torch.manual_seed(1)
        return floats(self.inference())

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters, 1e-3)

    def step(self, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = self.subject.loss()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def losses(self) -> list[Tensor]:
        """Losses of some steps of Adam from the start, dropout off: its random numbers come in another order."""
        self.model.train()
        dropped = [(m, m.p) for m in self.model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]
        layers = [(m, m.dropout) for m in self.model.modules() if isinstance(m, torch.nn.RNNBase)]
        try:
            for module, _ in dropped:
                module.p = 0.0
            for layer, _ in layers:
                layer.dropout = 0.0
            torch.manual_seed(1)
            optimizer = self.optimizer()
            return [torch.stack([self.step(optimizer) for _ in range(STEPS)])]
        finally:
            for module, p in dropped:
                module.p = p
            for layer, p in layers:
                layer.dropout = p
            self.model.load_state_dict(self.start)
            self.model.zero_grad()


def compared(run: Callable[[], Any], use: Callable[[bool], Any], seconds: float) -> Times:
    """Times ``run`` before and after; both take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    count, rounds, end = 1, 0, float("inf")
    gc.collect()
    gc.disable()
    try:
        while rounds < 3 or time.perf_counter() < end:
            for converted in (False, True) if rounds % 2 else (True, False):
                use(converted)
                run()  # fills the caches and pools of this side
                start = time.perf_counter()
                for _ in range(count):
                    run()
                times[converted].append((time.perf_counter() - start) / count)
            if end == float("inf"):  # the first round counts calls for 20 ms and is no figure
                count = max(1, int(0.02 / max(times[0][0], 1e-7)))
                end = time.perf_counter() + seconds
                times = ([], [])
                continue
            rounds += 1
    finally:
        gc.enable()
    use(False)
    ratios = [before / after for before, after in zip(*times, strict=True)]
    return Times(*map(statistics.median, (*times, ratios)))


def measured(name: str, subject: Subject, seconds: float, optimize: bool = False) -> Result:
    """Checks a model and times it; at the end it is as before. Without seconds there are no figures."""
    runner = Runner(subject)
    result = Result(name, subject.size)
    before = runner.output()
    report = runner.use(True)
    result.converted = [f"{row.path or 'the model'}: {row.source} → {row.target}" for row in report if row.target]
    result.left = [f"{row.path or 'the model'}: {row.source}: {row.reason}" for row in report if row.reason]
    ours, our_losses = runner.output(), runner.losses()
    runner.use(False)
    theirs, their_losses = runner.output(), runner.losses()
    result.output_error, result.loss_error = difference(ours, theirs), difference(our_losses, their_losses)
    if not before:
        result.problem = "no tensor of floats among the outputs"
    elif not all(map(torch.equal, before, theirs)):
        result.problem = "outputs after revert differ from those before convert"
    elif not result.output_error <= OUTPUT_TOLERANCE:
        result.problem = f"outputs differ by {result.output_error:.1e}"
    elif not result.loss_error <= LOSS_TOLERANCE:
        result.problem = f"losses differ by {result.loss_error:.1e}"
    if seconds <= 0:
        return result
    subject.model.eval()
    result.inference = compared(runner.inference, runner.use, seconds)
    subject.model.train()
    optimizer = runner.optimizer()
    result.training = compared(lambda: runner.step(optimizer), runner.use, seconds)
    if optimize:
        rows = list(seqaccel.optimize(subject.model, (), call=subject.loss, progress=False))
        kept = {row.path for row in rows[:-1] if row.faster} if rows and rows[-1].faster else set()
        runner.chosen = kept.__contains__
        result.optimized = compared(lambda: runner.step(optimizer), runner.use, seconds)
        runner.use(False)
    return result


def installed(needs: str) -> str | None:
    """Name and version of the distribution that a module comes from, or ``None``: it is not there."""
    top = needs.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        return None
    found = importlib.metadata.packages_distributions().get(top)
    return f"{found[0].lower()} {importlib.metadata.version(found[0])}" if found else top


def run(name: str, seconds: float, optimize: bool = False) -> Result:
    """The row of one model."""
    row = MODELS[name]
    package = f"torch {torch.__version__}" if row.needs is None else installed(row.needs)
    if package is None:
        return Result(name, problem="not installed")
    torch.manual_seed(0)
    result = measured(name, row.build(), seconds, optimize)
    result.package, result.commit = package, commit()
    return result


def processor() -> str:
    """The processor's name as the system has it."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the sources, with "-dirty" if they were changed since; records are no sources."""

    def git(*arguments: str) -> str:
        root = pathlib.Path(__file__).parent.parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + "-dirty" * bool(changed)


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "isa": torch.ops.seqaccel.isa(),
        "torch": torch.__version__,
        "seqaccel": seqaccel.__version__,
        "date": datetime.date.today().isoformat(),
    }


def read(path: pathlib.Path) -> dict[str, Result]:
    """The rows of a record, in the order of ``MODELS``; none where there is no file."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for row in rows:
        row.update({key: Times(*row[key]) for key in ("inference", "training", "optimized") if row[key]})
    found = {row["name"]: Result(**row) for row in rows}
    return {name: found[name] for name in MODELS if name in found}


def write(path: pathlib.Path, results: list[Result]) -> None:
    """Adds rows to a record; a model that is there is replaced."""
    rows = read(path) | {result.name: result for result in results}
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [dataclasses.asdict(rows[name]) for name in MODELS if name in rows]
    path.write_text(json.dumps({"machine": machine(), "rows": ordered}, indent=1, ensure_ascii=False) + "\n")


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """A record of one run: its rows, and where they were made."""
    record = {"machine": machine(), "commit": commit(), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def page_of_rows(path: pathlib.Path, markdown: Callable[[list[dict[str, Any]]], str]) -> str:
    """What a page has of such a record."""
    record = json.loads(path.read_text())
    return f"{markdown(record['rows'])}\n{origin(record['machine'], [record['commit']])}.\n"


def missing(path: pathlib.Path, names: list[str], seconds: float, optimize: bool) -> list[str]:
    """The models whose row in a record is not there, of another commit or without what is asked for now."""
    rows, now = read(path), commit()

    def there(row: Result) -> bool:
        same = row.commit == now and not now.endswith("-dirty")
        return same and bool(row.training or seconds <= 0) and bool(row.optimized or not optimize or seconds <= 0)

    return [name for name in names if name not in rows or not there(rows[name])]


HEADER = ("model", "size", "converted", "outputs", "losses", "inference", "ratio", "training step", "ratio", "optimize")


def cells(result: Result) -> tuple[str, ...]:
    """A line of the table."""

    def times(found: Times | None) -> tuple[str, str]:
        if found is None:
            return "", ""
        return f"{found.before * 1e3:.3g} → {found.after * 1e3:.3g} ms", f"{found.ratio:.2f}"

    if not result.package:
        return result.name, result.problem, *[""] * (len(HEADER) - 2)
    layers = f"{len(result.converted)} of {len(result.converted) + len(result.left)}"
    errors = f"{result.output_error:.0e}", f"{result.loss_error:.0e}"
    return (
        result.name, result.size, layers, *errors, *times(result.inference), *times(result.training),
        times(result.optimized)[1],
    )  # fmt: skip


def print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="models before and after seqaccel.convert", caption=", ".join(map(str, [*machine().values(), commit()]))
    )
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i < 2 else "right")
    for result in results:
        table.add_row(*cells(result))
    console = Console()
    Console(width=None if console.is_terminal else 180).print(table)


def markdown(results: list[Result]) -> str:
    rule = tuple("---" if i < 2 else "---:" for i in range(len(HEADER)))
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEADER, rule, *map(cells, results)))


def origin(about: dict[str, Any], commits: Iterable[str]) -> str:
    """One line: processor, threads, versions and commits of a record."""
    named = ", ".join(filter(None, dict.fromkeys(commits))) or "not recorded"
    return (
        f"{about['processor']}, {about['threads']} threads, {about['isa']}; torch {about['torch']}, "
        f"seqaccel {about['seqaccel']}; commit {named}; {about['date']}"
    )


def table_of(path: pathlib.Path) -> str:
    """What a page has of a record."""
    results = list(read(path).values())
    about = json.loads(path.read_text())["machine"]
    return f"{markdown(results)}\n{origin(about, [result.commit for result in results])}.\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models to run, by name or pattern; default: all")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument(
        "--seconds", type=float, default=8, help="time for inference and for training, each; 0: no times"
    )
    parser.add_argument("--optimize", action="store_true", help="also time the training step after seqaccel.optimize")
    parser.add_argument(
        "--report", action="store_true", help="print each layer that convert replaced, or why it did not"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's")
    parser.add_argument("--json", type=pathlib.Path, help="the record to add the rows to")
    parser.add_argument("--resume", action="store_true", help="leave out the models that the record has of this commit")
    parser.add_argument("--table", type=pathlib.Path, metavar="RECORD", help="print a record as Markdown and end")
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown(list(read(options.table).values())), end="")
        return 0
    if options.resume and not options.json:
        parser.error("argument --resume: needs --json")
    patterns = options.names or ["*"]
    names = [name for name in MODELS if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if options.list or not names:
        print("\n".join(MODELS))
        return 0 if options.list else 2
    if options.resume:
        names = missing(options.json, names, options.seconds, options.optimize)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = []
    for name in names:
        results.append(run(name, options.seconds, options.optimize))
        if options.report:
            print(name, *results[-1].converted, *results[-1].left, sep="\n  ")
        if options.json and results[-1].package:
            write(options.json, results[-1:])
    print_table(results)
    wrong = [f"{result.name}: {result.problem}" for result in results if result.package and result.problem]
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
