"""Trained recurrent nets solved for all time steps at once: how many sweeps that takes, and how long.

    python examples/parallel_in_time.py                       # an LSTM, a stable LSTM and a GRU
    python examples/parallel_in_time.py --model gru --data FILE
    python examples/parallel_in_time.py --stage train count   # and later --stage time, on a quiet machine

Each model is a byte-level language model of 384 units, trained for 90 seconds of CPU time. ``count`` takes the model
before training, after a third of it and at its end, and runs its layer by ``parallel_in_time`` over text that training
has not seen, in float64: the number of sweeps, and the largest difference from the run step by step. ``time`` is a
forward and backward pass of the trained layer in float32, both ways in turns.

Each model has a JSON record in ``--out``. What is in the record is not done again: a run that was stopped goes on when
the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from language_models import RECIPES, Bounded, LanguageModel, Recurrent
from provenance import provenance
from torch import Tensor, nn
from tqdm import tqdm
from train_language_model import Contender, UserError, own_text, standard_library, tokens_of, windows

import seqaccel.nn as snn
from seqaccel.functional import parallel_in_time

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "lstm": lambda size: Recurrent(snn.LSTM(size, size)),
    "stable-lstm": lambda size: Bounded(snn.LSTM(size, size)),
    "gru": lambda size: Recurrent(snn.GRU(size, size)),
}
SHARES = (0.0, 1 / 3, 1.0)  # of the training at which sweeps are counted
COUNT_TOLERANCE, TIME_TOLERANCE = 1e-6, 1e-5  # in float64 and float32
LARGEST_ERROR = 100.0  # of a result, in tolerances: a chunk whose start is off by one may enlarge that
STAGES = ("train", "count", "time")


def text_of(path: pathlib.Path | None) -> tuple[str, bytes, bytes]:
    """The name of the text, what to train on and what to validate on."""
    if path is None and (folder := os.environ.get("SEQACCEL_DATA")):
        path = pathlib.Path(folder) / "shakespeare.txt"
    return (path.name, *own_text(path)) if path else ("Python's standard library", *standard_library())


def train(name: str, options: argparse.Namespace, text: Tensor, validation: Tensor) -> list[dict[str, Any]]:
    """The model at each of ``SHARES``."""
    recipe = dataclasses.replace(RECIPES["lstm"], hidden_size=options.hidden_size)
    torch.manual_seed(options.seed)
    model = LanguageModel(recipe.hidden_size, MODELS[name](recipe.hidden_size))
    contender = Contender(name, model, recipe.learning_rate)
    if name.startswith("stable"):
        snn.utils.stabilize_after(contender.optimiser, contender.model)
    device = torch.device("cpu")
    starts = torch.linspace(0, len(validation) - 1 - recipe.length, 64).long()
    batches = [windows(validation, part, recipe.length, device) for part in starts.split(recipe.batch_size)]
    seconds, step, found = 0.0, 0, []
    with tqdm(total=options.seconds, desc=f"{name:<12}", disable=None, bar_format=BAR) as bar:
        for share in SHARES:
            while seconds < share * options.seconds:
                began = time.process_time()
                choice = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
                starts = torch.randint(len(text) - recipe.length, (recipe.batch_size,), generator=choice)
                inputs, targets = windows(text, starts, recipe.length, device)
                contender.train_step(inputs, targets, step, contextlib.nullcontext)
                spent = time.process_time() - began
                seconds, step = seconds + spent, step + 1
                bar.update(min(spent, bar.total - bar.n))
                bar.set_postfix(bits=f"{statistics.fmean(contender.bits[-20:]):.2f}")
            state = {key: value.clone() for key, value in contender.model.state_dict().items()}
            bits = contender.validate(batches, contextlib.nullcontext)
            found.append({"seconds": seconds, "steps": step, "bits": bits, "state": state})
    return found


BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"


def model_of(name: str, size: int, state: dict[str, Tensor]) -> LanguageModel:
    model = LanguageModel(size, MODELS[name](size))
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def inputs_of(model: LanguageModel, text: Tensor) -> Tensor:
    """What the recurrent layer sees of a text: (T, 1, H)."""
    x = model.embedding(text.long()).unsqueeze(1)
    return x.tanh() if isinstance(model.body, Bounded) else x


@torch.no_grad()
def factor(model: LanguageModel) -> float | None:
    """What two states of the layer are proven to approach each other by, at each step; ``None``: infinite."""
    bound = 1.0 if isinstance(model.body, Bounded) else float(model.embedding.weight.abs().max())
    found = snn.utils.contraction_factor(model.body.rnn, input_bound=bound)
    return found if math.isfinite(found) else None


@torch.no_grad()
def counted(rnn: nn.Module, x: Tensor, tolerance: float) -> dict[str, float]:
    """The sweeps of a sequence, and the largest difference from the run step by step."""
    y, _, (counts,) = parallel_in_time(rnn, x, tolerance)
    error = float((y - rnn(x)[0]).abs().max())
    if not error <= LARGEST_ERROR * tolerance:
        raise RuntimeError(f"parallel_in_time differs by {error:.1e} from the run step by step, T={len(x)}")
    return {"sweeps": counts.sweeps, "chunks_redone": counts.chunks_redone, "error": error}


def timed(rnn: nn.Module, x: Tensor, tolerance: float, rounds: int) -> dict[str, float]:
    """Seconds of a forward and backward pass, both ways in turns: the median of the rounds after the first."""
    x, grad = x.clone().requires_grad_(), torch.randn_like(x)
    runs = {"plain": lambda: rnn(x)[0], "parallel": lambda: parallel_in_time(rnn, x, tolerance)[0]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(1 + rounds):
        for name, run in runs.items():
            rnn.zero_grad()
            x.grad = None
            began = time.perf_counter()
            run().backward(grad)
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def run(name: str, options: argparse.Namespace, source: str, text: Tensor, validation: Tensor) -> dict[str, Any]:
    """Does what is missing in the record of a model, and returns it."""
    path = options.out / f"{name}.json"
    weights = path.with_suffix(".pt")
    what = {
        "model": name,
        "hidden_size": options.hidden_size,
        "seed": options.seed,
        "seconds": options.seconds,
        "text": {"name": source, "sha256": hashlib.sha256(text.numpy().tobytes()).hexdigest()},
    }
    record = json.loads(path.read_text()) if path.exists() else {**what, "trained": [], "times": {}}
    if any(record.get(key) != value for key, value in what.items()):
        raise UserError(f"{path} was made with other settings: delete it or name another --out")
    origin = provenance(__file__, sys.argv[1:], "cpu")  # now: the sources may change during the run

    def save() -> None:
        path.write_text(json.dumps(record, indent=1) + "\n")

    if "train" in options.stage and not record["trained"]:
        found = train(name, options, text, validation)
        torch.save([each.pop("state") for each in found], weights)
        record["trained"], record["run"] = [{**each, "counts": {}} for each in found], origin
        save()
    if not record["trained"]:
        raise UserError(f"{name} is not trained yet: --stage train")
    if not weights.exists():
        raise UserError(f"{weights}: no such file: delete {path}, or name another --out")
    states = torch.load(weights, weights_only=True)
    if "count" in options.stage:
        for state, each in zip(states, record["trained"], strict=True):
            model = model_of(name, options.hidden_size, state).double()
            each["contraction_factor"] = factor(model)
            for length in options.lengths:
                if str(length) not in each["counts"]:
                    x = inputs_of(model, validation[:length])
                    each["counts"][str(length)] = counted(model.body.rnn, x, COUNT_TOLERANCE)
                    save()
    if "time" in options.stage:
        model = model_of(name, options.hidden_size, states[-1])
        for length in options.lengths:
            if str(length) not in record["times"]:
                rnn, x = model.body.rnn, inputs_of(model, validation[:length])
                found = counted(rnn, x, TIME_TOLERANCE) | timed(rnn, x, TIME_TOLERANCE, options.rounds)
                record["times"][str(length)] = found
                record["timed"] = origin
                save()
    return record


def print_tables(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    counts = Table(title=f"sweeps to {COUNT_TOLERANCE:g}, float64")
    lengths = list(dict.fromkeys(length for r in records for each in r["trained"] for length in each["counts"]))
    for column in ("model", "trained for", "bits/byte", "contraction factor", *(f"T={length}" for length in lengths)):
        counts.add_column(column, justify="left" if column == "model" else "right")
    times = Table(title=f"forward and backward, float32, to {TIME_TOLERANCE:g}")
    for column in ("model", "T", "sweeps", "step by step", "parallel_in_time"):
        times.add_column(column, justify="left" if column == "model" else "right")
    for r in records:
        for each in r["trained"]:
            bound = each.get("contraction_factor")
            sweeps = [str(each["counts"][length]["sweeps"]) if length in each["counts"] else "" for length in lengths]
            proven = f"{bound:.3f}" if bound is not None and bound < 1 else "≥ 1"
            counts.add_row(r["model"], f"{each['seconds']:.0f} s", f"{each['bits']:.3f}", proven, *sweeps)
        for length, each in r["times"].items():
            seconds = [f"{each[way] * 1e3:,.1f} ms" for way in ("plain", "parallel")]
            times.add_row(r["model"], length, str(each["sweeps"]), *seconds)
    for table in (counts, times):
        if table.row_count:
            console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, nargs="+", default=list(MODELS), help="default: all")
    add("--stage", choices=STAGES, nargs="+", default=list(STAGES), help="what to do (default: all)")
    add(
        "--data",
        type=pathlib.Path,
        metavar="FILE",
        help="text to learn (default: shakespeare.txt in the folder SEQACCEL_DATA, or Python's library without it)",
    )
    add("--seconds", type=float, default=90.0, help="CPU time of a model's training (default: 90)")
    add("--lengths", type=int, nargs="+", default=[256, 1024, 4096], metavar="T", help="default: 256 1024 4096")
    add("--hidden-size", type=int, default=384, help="default: 384")
    add("--rounds", type=int, default=3, help="of a time (default: 3)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="threads of the CPU (default: 1)")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/parallel-in-time"), help="folder for what is written")
    options = parser.parse_args()
    for name in ("hidden_size", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    if min(options.lengths) < 1:
        parser.error("argument --lengths: must be at least 1")
    if options.seconds < 0:
        parser.error("argument --seconds: must be at least 0")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    try:
        source, *parts = text_of(options.data)
        text, validation = map(tokens_of, parts)
        needed = max(*options.lengths, RECIPES["lstm"].length + 1)
        if len(validation) < needed:
            raise UserError(f"{source}: {len(validation)} bytes of validation text, but --lengths needs {needed}")
        options.out.mkdir(parents=True, exist_ok=True)
        print_tables([run(name, options, source, text, validation) for name in options.model])
    except UserError as error:
        print(f"parallel_in_time: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
