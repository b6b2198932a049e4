"""Four synthetic tasks with published results: the adding problem, copy memory, a long lag, and counting.

    python examples/synthetic.py --task adding                     # a TCN, 600 steps
    python examples/synthetic.py --task copy --model tcn lstm      # 1,000 blanks
    python examples/synthetic.py --task forget-bias --seed 0 1 2   # an LSTM whose forget gates start at three biases
    python examples/synthetic.py --task counting --seed 0 1 2 3 4  # an LSTM without and with peepholes

``adding``: of 600 random numbers two are marked, and the last output is to be their sum (mean squared error; answering
1 is 0.167). ``copy``: ten symbols, 1,000 blanks, a sign, then the ten symbols again (cross entropy of all outputs).
Both have the TCN of Bai et al. 2018 (table 2) and its optimisers, the data of its public scripts (50,000 and 10,000
sequences, the same in every epoch), and recurrent models of as many parameters. ``forget-bias``: the first of 100
symbols is to be said at the end. Jozefowicz et al. 2015: a large first bias of the forget gates, "such as 1 or 2", lets
an LSTM learn long lags. ``counting``: a^n b^n, where the network says after each b whether the string ends. It is
trained on n of up to 10; the result is the largest n up to which all strings are right, of those up to 1,023 (Gers and
Schmidhuber 2001; peepholes: Gers et al. 2002).

Each run writes a JSON record to ``--out``, and a figure shows all runs of the task there. A run whose record is there
is not repeated, and a run that was stopped goes on from its checkpoint: give the same command again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from provenance import provenance
from torch import Tensor, nn
from tqdm import tqdm

import seqaccel
import seqaccel.nn as snn


class UserError(Exception):
    """Something the user can mend: reported in one line, exit code 2."""


class Convolutional(nn.Module):
    """Bai et al.'s network: 8 levels, kernels of 8; (B, T, I) to (B, T, O)."""

    def __init__(self, inputs: int, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.tcn = snn.TCN(inputs, [channels] * 8, kernel_size=8, dropout=dropout)
        self.head = nn.Linear(channels, outputs)
        nn.init.normal_(self.head.weight, 0.0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tcn(x.transpose(1, 2)).transpose(1, 2))


class Recurrent(nn.Module):
    """(B, T, I) to (B, T, O)."""

    def __init__(self, rnn: nn.Module, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(hidden_size, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def recurrent(module: Callable[..., nn.Module], inputs: int, size: int, outputs: int, **options: Any) -> nn.Module:
    return Recurrent(module(inputs, size, batch_first=True, **options), size, outputs)


@dataclasses.dataclass(frozen=True)
class Settings:
    length: int
    steps: int
    batches: int  # of the training data
    batch_size: int
    learning_rate: float
    optimizer: str
    clip: float
    goal: float  # validation loss that ends a run
    check_every: int  # steps between two checks
    first_length: int = 0  # of the first sequences in training; 0: length
    ready: float = 0.01  # training loss between two checks at which the length doubles
    last_rate: float = 1.0  # share of the learning rate that is left at the last step; it falls linearly


@dataclasses.dataclass(frozen=True)
class Task:
    title: str
    settings: Settings
    models: dict[str, Callable[[], nn.Module]]
    plain: tuple[str, ...]  # the models of a run without --model
    published: dict[str, float] = dataclasses.field(default_factory=dict)  # Bai et al. 2018, table 1
    reported: str = "loss"

    def batch(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (B, T, I), and what ``loss`` compares with."""
        raise NotImplementedError

    def loss(self, network: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    def test(self, network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """What the record says of unseen sequences."""
        return {"loss": mean_loss(self, network, batches)}


class Adding(Task):
    def batch(self, count, length, generator):
        numbers = torch.rand(count, length, generator=generator)
        marked = torch.rand(count, length, generator=generator).topk(2, dim=1).indices
        marks = torch.zeros(count, length).scatter_(1, marked, 1.0)
        return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)

    def loss(self, network, x, target):
        return F.mse_loss(network(x)[:, -1, 0], target)


class Copy(Task):
    symbols = 10

    def batch(self, count, length, generator):
        N = self.symbols
        said = torch.randint(1, 9, (count, N), generator=generator)
        x = torch.cat([said, torch.zeros(count, length - 1), torch.full((count, N + 1), 9.0)], 1)
        return x.unsqueeze(2), torch.cat([torch.zeros(count, length + N, dtype=torch.long), said], 1)

    def loss(self, network, x, target):
        return F.cross_entropy(network(x).flatten(0, 1), target.flatten())

    def test(self, network, batches):
        found = [(network(x)[:, -self.symbols :].argmax(2) == y[:, -self.symbols :]).float().mean() for x, y in batches]
        return super().test(network, batches) | {"right": torch.stack(found).mean().item()}


class Recall(Task):
    symbols = 8

    def batch(self, count, length, generator):
        said = torch.randint(self.symbols, (count, 1), generator=generator)
        noise = torch.randint(self.symbols, (count, length - 1), generator=generator) + self.symbols
        return F.one_hot(torch.cat([said, noise], 1), 2 * self.symbols).float(), said.squeeze(1)

    def loss(self, network, x, target):
        return F.cross_entropy(network(x)[:, -1], target)

    def test(self, network, batches):
        found = [(network(x)[:, -1].argmax(1) == y).float().mean() for x, y in batches]
        return super().test(network, batches) | {"right": torch.stack(found).mean().item()}


class Counting(Task):
    """Inputs: begin, a, b. The network answers at each b: 1 after the last one. ``length`` is the largest n."""

    ignored = -100

    def strings(self, n: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.arange(2 * int(n.max()) + 1)
        n = n.unsqueeze(1)
        x = F.one_hot(torch.where(t == 0, 0, torch.where(t <= n, 1, 2)), 3).float()
        target = torch.where((t > n) & (t <= 2 * n), (t == 2 * n).long(), self.ignored)
        return x * (t <= 2 * n).unsqueeze(2), target

    def batch(self, count, length, generator):
        return self.strings(torch.randint(1, length + 1, (count,), generator=generator))

    def loss(self, network, x, target):
        return F.cross_entropy(network(x).flatten(0, 1), target.flatten(), ignore_index=self.ignored)

    def test(self, network, batches):
        n, longest = 1, 0
        while longest == n - 1 and n <= 1000:  # in one pass, those up to twice as long
            x, target = self.strings(torch.arange(n, 2 * n))
            right = ((network(x).argmax(2) == target) | (target == self.ignored)).all(1)
            longest += int(right.long().cumprod(0).sum())
            n *= 2
        return super().test(network, batches) | {"longest": longest}


TASKS: dict[str, Task] = {
    "adding": Adding(
        "adding problem",
        Settings(600, 9000, 1562, 32, 6e-3, "Adam", 0.1, 3e-5, 100, first_length=50, last_rate=0.0),
        {
            "tcn": lambda: Convolutional(2, 24, 1, 0.0),
            "lstm": lambda: recurrent(snn.LSTM, 2, 130, 1),
            "gru": lambda: recurrent(snn.GRU, 2, 150, 1),
            "rnn": lambda: recurrent(snn.RNN, 2, 260, 1),
        },
        ("tcn",),
        {"tcn": 5.8e-5, "lstm": 0.164, "gru": 5.3e-5, "rnn": 0.177},
    ),
    "copy": Copy(
        "copy memory",
        Settings(1000, 15_600, 312, 32, 5e-4, "RMSprop", 1.0, 2e-5, 200),
        {
            "tcn": lambda: Convolutional(1, 10, 10, 0.05),
            "lstm": lambda: recurrent(snn.LSTM, 1, 62, 10),
            "gru": lambda: recurrent(snn.GRU, 1, 71, 10),
            "rnn": lambda: recurrent(snn.RNN, 1, 125, 10),
        },
        ("tcn",),
        {"tcn": 3.5e-5, "lstm": 0.0204, "gru": 0.0197, "rnn": 0.0202},
    ),
    "forget-bias": Recall(
        "recall over a long lag",
        Settings(100, 3000, 100_000, 64, 2e-3, "Adam", 1.0, 1e-3, 50),
        {f"bias-{bias}": lambda bias=bias: recurrent(snn.LSTM, 16, 48, 8, forget_bias=bias) for bias in (0, 1, 5)},
        ("bias-0", "bias-1", "bias-5"),
        reported="right",
    ),
    "counting": Counting(
        "counting $a^n b^n$",
        Settings(10, 4000, 100_000, 16, 1e-2, "Adam", 1.0, 0.0, 100),
        {
            "lstm": lambda: recurrent(snn.LSTM, 3, 4, 2),
            "peephole-lstm": lambda: recurrent(snn.PeepholeLSTM, 3, 4, 2),
        },
        ("lstm", "peephole-lstm"),
        reported="longest",
    ),
}


@torch.no_grad()
def mean_loss(task: Task, network: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    return sum(task.loss(network, x, y).item() for x, y in batches) / len(batches)


class Training:
    """A network, its optimiser, and how far training has come."""

    def __init__(self, task: Task, network: nn.Module, settings: Settings) -> None:
        self.task, self.network, self.settings = task, network, settings
        self.optimizer = getattr(torch.optim, settings.optimizer)(network.parameters(), lr=settings.learning_rate)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, settings.last_rate, settings.steps)
        self.best = {name: value.clone() for name, value in network.state_dict().items()}
        self.best_valid, self.step, self.seconds = math.inf, 0, 0.0
        self.length = min(settings.first_length or settings.length, settings.length)
        self.curve: list[tuple[int, float, float]] = []  # step, training loss, validation loss

    def advance(self, seed: int, valid: list[tuple[Tensor, Tensor]]) -> None:
        """To the next check."""
        settings, total, began = self.settings, 0.0, time.process_time()
        count = min(settings.check_every, settings.steps - self.step)
        self.network.train()
        for _ in range(count):
            number = self.step % settings.batches  # the data, batch by batch, are drawn anew, alike in every epoch
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            x, target = self.task.batch(settings.batch_size, self.length, generator)
            loss = self.task.loss(self.network, x, target)
            self.optimizer.zero_grad()
            loss.backward()
            if settings.clip > 0:
                nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
            self.optimizer.step()
            self.scheduler.step()
            total += loss.item()
            self.step += 1
        self.seconds += time.process_time() - began
        self.network.eval()
        self.curve.append((self.step, total / count, mean_loss(self.task, self.network, valid)))
        if total / count <= settings.ready:
            self.length = min(2 * self.length, settings.length)
        if self.curve[-1][2] <= self.best_valid:
            self.best_valid = self.curve[-1][2]
            self.best = {name: value.clone() for name, value in self.network.state_dict().items()}

    def ended(self) -> bool:
        return self.step >= self.settings.steps or self.best_valid <= self.settings.goal

    def state_dict(self) -> dict[str, Any]:
        progress = {name: getattr(self, name) for name in ("best", "best_valid", "step", "seconds", "length", "curve")}
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "progress": progress,
            "random": torch.get_rng_state(),  # dropout
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for name, value in state["progress"].items():
            setattr(self, name, value)
        torch.set_rng_state(state["random"])


VALID_SEED, TEST_SEED = 1_000_000_007, 1_000_000_009


def unseen(task: Task, settings: Settings, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [task.batch(min(100, count - begin), settings.length, generator) for begin in range(0, count, 100)]


def run(name: str, model: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains one model, or goes on from its checkpoint, and returns its record."""
    task = TASKS[name]
    changes = {key: getattr(options, key) for key in OVERRIDES if getattr(options, key) is not None}
    settings = dataclasses.replace(task.settings, **changes)
    what = {
        "task": name,
        "model": model,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "unseen": options.unseen,
    }
    record = options.out / f"{name}-{model}-{seed}.json"
    if record.exists():
        found = json.loads(record.read_text())
        if any(found.get(key) != value for key, value in what.items()):
            raise UserError(f"{record} was made with other settings: delete it or name another --out")
        return found
    origin = provenance(__file__, sys.argv[1:], "cpu")  # now: the sources may change during the run
    torch.manual_seed(seed)
    training = Training(task, task.models[model](), settings)
    checkpoint = record.with_suffix(".pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["what"] != what:
            raise UserError(f"{checkpoint} was made with other settings: delete it or name another --out")
        training.load_state_dict(state)

    def save() -> None:
        partial = checkpoint.with_suffix(".part")
        torch.save({"what": what, **training.state_dict()}, partial)
        os.replace(partial, checkpoint)

    valid, saved = unseen(task, settings, options.unseen, VALID_SEED), time.monotonic()
    with tqdm(total=settings.steps, initial=training.step, desc=f"{record.stem:<24}", disable=None) as bar:
        while not training.ended():
            before = training.step
            training.advance(seed, valid)
            bar.update(training.step - before)
            bar.set_postfix(train=f"{training.curve[-1][1]:.2e}", valid=f"{training.curve[-1][2]:.2e}")
            if time.monotonic() - saved > options.save_every:
                save()
                saved = time.monotonic()
    save()
    training.network.load_state_dict(training.best)
    training.network.eval()
    with torch.no_grad():
        test = task.test(training.network, unseen(task, settings, options.unseen, TEST_SEED))
    found = {
        **what,
        "parameters": sum(p.numel() for p in training.network.parameters()),
        "steps": training.step,
        "seconds": round(training.seconds, 1),  # CPU time of the training steps
        "valid": training.best_valid,
        "test": test,
        "published": task.published.get(model),
        "curve": training.curve,
        **origin,
    }
    record.write_text(json.dumps(found) + "\n")
    checkpoint.unlink()
    return found


def plot(name: str, records: list[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    task = TASKS[name]
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained", width_ratios=(2, 1))
    shown = [model for model in task.models if any(record["model"] == model for record in records)]
    for i, model in enumerate(shown):
        for record in records:
            if record["model"] == model:
                steps, _, valid = zip(*record["curve"], strict=True)
                first = record["seed"] == min(r["seed"] for r in records if r["model"] == model)
                panels[0].plot(steps, valid, color=f"C{i}", linewidth=1, label=model if first else None)
                panels[1].plot(i, record["test"][task.reported], "o", color=f"C{i}", alpha=0.6)
        if model in task.published:
            label = "Bai et al. 2018" if i == 0 else None
            panels[1].plot(i, task.published[model], "_", color="black", markersize=18, label=label)
    panels[0].set(xlabel="training steps", ylabel="validation loss", yscale="log", title=task.title)
    panels[0].legend(fontsize=8)
    panels[1].set(ylabel={"loss": "test loss", "right": "right answers", "longest": "right up to n"}[task.reported])
    panels[1].set_xticks(range(len(shown)), shown)
    panels[1].set_xlim(-0.5, len(shown) - 0.5)
    if task.reported == "right":
        panels[1].set_ylim(-0.02, 1.02)
    elif task.reported == "longest":
        panels[1].set_yscale("symlog", linthresh=1)  # it may be 0
        panels[1].set_yticks([0, 1, 10, 100, 1000], ["0", "1", "10", "100", "1,000"])
        panels[1].set_ylim(0, 1500)
        panels[1].axhline(records[0]["settings"]["length"], color="grey", linestyle="--", label="trained up to")
    else:
        panels[1].set_yscale("log")
        low, high = panels[1].get_ylim()
        panels[1].set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))  # whole decades
    if panels[1].get_legend_handles_labels()[1]:
        panels[1].legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


OVERRIDES = [field.name for field in dataclasses.fields(Settings)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="adding")
    add("--model", nargs="+", help="of the task's models, or all (default: what its claim needs)")
    add("--seed", nargs="+", type=int, default=[0], help="a run for each (default: 0)")
    add("--unseen", type=int, default=1000, help="sequences of validation and of the test (default: 1,000)")
    add("--save-every", type=float, default=20.0, metavar="SECONDS", help="between checkpoints (default: 20)")
    add("--backend", choices=seqaccel.backends.NAMES, help="of seqaccel's operators")
    add("--threads", type=int, default=1, help="threads of the CPU (default: 1)")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/synthetic"), help="folder of records and figures")
    for field in dataclasses.fields(Settings):
        kind = {"int": int, "float": float, "str": str}[field.type]
        add(f"--{field.name.replace('_', '-')}", type=kind, help="instead of the task's own")
    options = parser.parse_args()
    task = TASKS[options.task]
    models = list(task.plain) if options.model is None else options.model
    options.model = list(task.models) if "all" in models else models
    for model in options.model:
        if model not in task.models:
            parser.error(f"argument --model: {options.task} has {', '.join(task.models)}, not {model}")
    if options.optimizer is not None and not hasattr(torch.optim, options.optimizer):
        parser.error(f"argument --optimizer: torch.optim has no {options.optimizer}")
    for name in ("length", "steps", "batches", "batch_size", "check_every", "unseen", "threads"):
        value = getattr(options, name)
        if value is not None and value < (2 if name == "length" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {2 if name == 'length' else 1}")
    return options


def run_all(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seed:
        for model in options.model:
            found = run(options.task, model, seed, options)
            results = ", ".join(f"{key} {value:.3g}" for key, value in found["test"].items())
            published = "" if found["published"] is None else f"; published {found['published']:.3g}"
            print(
                f"{options.task}, {model}, seed {seed}: test {results}{published} ({found['parameters']:,} parameters, "
                f"{found['steps']} steps, {found['seconds']:.0f} s)",
                flush=True,
            )
    records = [json.loads(path.read_text()) for path in sorted(options.out.glob(f"{options.task}-*.json"))]
    picture = options.out / f"{options.task}.png"
    plot(options.task, records, picture)
    print(f"wrote {picture} and a record of each run beside it")


def main() -> int:
    options = parse()
    try:
        with seqaccel.backend(options.backend) if options.backend else contextlib.nullcontext():
            run_all(options)
    except UserError as error:
        print(f"synthetic: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
