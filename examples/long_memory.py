"""Recalls a token over 10,000 positions: hierarchical attention beside dense attention, an LSTM, an SRU and a TCN.

    python examples/long_memory.py                        # the needle, five models
    python examples/long_memory.py --model hierarchical   # one of them
    python examples/long_memory.py --task copy            # copy memory over 1,000 positions

``needle``: three pairs of a key and a value lie anywhere in a sequence of noise. At its end the keys are asked for, and
each answer is its key's value, one of eight. ``copy``: ten symbols, 1,000 blanks, then the ten symbols again
(Hochreiter and Schmidhuber 1997; the form of Bai et al. 2018).

Every model has the same budget, in seconds of CPU time that training takes. Training starts on short sequences: the
length doubles when 9 of 10 answers are right. Every accuracy that is reported is measured at full length, on sequences
that training has not seen. The curves and a record of the run are written to the folder ``--out``. The figure shows
every model that has a record there, so models can be trained one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import seqaccel.nn as snn


class Needle:
    """Pairs of a key and a value in noise. Tokens: noise, then keys, keys that are asked for, values."""

    noise, keys, classes, answers = 32, 8, 8, 3
    vocabulary = noise + 2 * keys + classes
    length, start = 10_000, 128

    def batch(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, T), the answers (B, N) at its last N positions, and where they were told (B, N)."""
        N = self.answers
        tokens = torch.randint(self.noise, (count, length), generator=generator)
        key = torch.rand(count, self.keys, generator=generator).argsort(1)[:, :N]
        value = torch.randint(self.classes, (count, N), generator=generator)
        place = 2 * torch.rand(count, (length - N) // 2, generator=generator).topk(N, dim=1).indices
        tokens.scatter_(1, place, self.noise + key)
        tokens.scatter_(1, place + 1, self.noise + 2 * self.keys + value)
        tokens[:, -N:] = self.noise + self.keys + key  # topk's order is random: so is the order of the questions
        return tokens, value, place + 1


class Copy:
    """Tokens: blank, eight symbols, and the sign that asks for them."""

    classes, answers = 8, 10
    vocabulary = classes + 2
    length, start = 1000, 8

    def batch(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, length + 20), the answers (B, 10) at its last 10 positions, and where they were told (B, 10)."""
        N = self.answers
        symbols = torch.randint(self.classes, (count, N), generator=generator)
        tokens = torch.zeros(count, length + 2 * N, dtype=torch.long)
        tokens[:, :N] = symbols + 1
        tokens[:, -N - 1 :] = self.classes + 1
        return tokens, symbols, torch.arange(N).expand(count, N)


TASKS = {"needle": Needle(), "copy": Copy()}


class Attention(nn.Module):
    """Two layers. The rotary base is large: most of a head's width must hardly turn over 10,000 positions. With three
    local blocks of 16 a node at this length stands for at most 256 tokens, which seldom hold two needles."""

    def __init__(self, size: int, levels: int | None) -> None:
        super().__init__()
        self.encoder = snn.HierarchicalAttentionEncoder(
            size,
            max(1, size // 32),
            2,
            size,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            rotary_base=1e8,
            pool_query=1,
            block_size=16,
            local_blocks=3,
            levels=levels,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Recurrent(nn.Module):
    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.transpose(0, 1))[0].transpose(0, 1)


class Convolutional(nn.Module):
    """A TCN that sees 12,277 positions."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.tcn = snn.TCN(size, [size] * 10, kernel_size=7, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.tcn(x.transpose(1, 2)).transpose(1, 2)


# (B, T, H) to (B, T, H). Dense attention is the same encoder without levels: that runs faster than
# scaled_dot_product_attention.
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "hierarchical": lambda size: Attention(size, levels=None),
    "dense": lambda size: Attention(size, levels=0),
    "lstm": lambda size: Recurrent(snn.LSTM(size, size, 2)),
    "sru": lambda size: Recurrent(snn.SRU(size, size, 4)),
    "tcn": Convolutional,
}
TITLES = {
    "hierarchical": "hierarchical attention",
    "dense": "dense attention",
    "lstm": "LSTM",
    "sru": "SRU",
    "tcn": "TCN",
}


class Network(nn.Module):
    """Embedding, a sequence model, and a classifier of its last outputs: tokens (B, T) to logits (B, N, classes)."""

    def __init__(self, task: Needle | Copy, model: str, size: int) -> None:
        super().__init__()
        self.answers = task.answers
        self.embedding = nn.Embedding(task.vocabulary, size)
        self.body = MODELS[model](size)
        self.head = nn.Linear(size, task.classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens))[:, -self.answers :])


@dataclasses.dataclass
class Result:
    """What a model came to. A depth is where an answer was told: tenths of the sequence, from its begin on."""

    task: str
    model: str
    seed: int
    length: int
    parameters: int
    steps: int
    seconds: float  # CPU time of training
    trained_length: int  # the curriculum came this far
    accuracy: float
    by_depth: list[float | None]
    curve: list[tuple[float, float]]  # seconds, accuracy at full length


@torch.no_grad()
def test(
    network: Network, task: Needle | Copy, length: int, sequences: int, seed: int
) -> tuple[float, list[float | None]]:
    """Accuracy on unseen sequences of this length, and by depth."""
    generator = torch.Generator().manual_seed(seed)
    right, depth = [], []
    for begin in range(0, sequences, 4):
        tokens, answers, place = task.batch(min(4, sequences - begin), length, generator)
        right.append((network(tokens).argmax(-1) == answers).flatten())
        depth.append((place * 10 // tokens.shape[1]).flatten())
    found, tenth = torch.cat(right).double(), torch.cat(depth)
    by_depth = [found[tenth == i].mean().item() if (tenth == i).any() else None for i in range(10)]
    return found.mean().item(), by_depth


def train(model: str, options: argparse.Namespace) -> Result:
    """Trains one model until its budget is spent or it has reached the goal at full length."""
    task = TASKS[options.task]
    torch.manual_seed(options.seed)
    network = Network(task, model, options.hidden_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(options.seed + 1)
    length, recent, since, step, seconds, next_test = min(task.start, options.length), 0.0, 0, 0, 0.0, 0.0
    curve: list[tuple[float, float]] = []
    with tqdm(total=options.seconds, desc=f"{model:>12}", unit="s", disable=None, bar_format=BAR) as bar:
        while seconds < options.seconds and (options.steps is None or step < options.steps):
            if seconds >= next_test:
                curve.append((seconds, test(network, task, options.length, options.check, CHECK_SEED)[0]))
                next_test = seconds + options.check_every
                if length == options.length and min(recent, curve[-1][1]) >= options.goal:
                    break
            began = time.process_time()
            tokens, answers, _ = task.batch(max(4, options.tokens // length), length, generator)
            for group in optimizer.param_groups:
                spent = seconds / options.seconds
                group["lr"] = options.learning_rate * min(
                    (step + 1) / 30, max(0.05, math.cos(math.pi / 2 * spent) ** 2)
                )
            logits = network(tokens)
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            accuracy = (logits.argmax(-1) == answers).double().mean().item()
            recent, since, step = 0.8 * recent + 0.2 * accuracy, since + 1, step + 1
            spent = time.process_time() - began
            seconds += spent
            bar.update(min(spent, bar.total - bar.n))
            bar.set_postfix(length=length, right=f"{recent:.0%}", test=f"{curve[-1][1]:.0%}")
            if recent > 0.9 and since >= 8 and length < options.length:
                length, recent, since = min(2 * length, options.length), 0.45, 0
    accuracy, by_depth = test(network, task, options.length, options.unseen, TEST_SEED)
    curve.append((seconds, accuracy))
    parameters = sum(p.numel() for p in network.parameters())
    found = (parameters, step, seconds, length, accuracy, by_depth, curve)
    return Result(options.task, model, options.seed, options.length, *found)


CHECK_SEED, TEST_SEED = 1_000_003, 1_000_033  # the last test is on sequences that decided nothing before
BAR = "{desc} {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"


def plot(results: list[Result], chance: float, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    needle = results[0].task == "needle"
    figure, panels = plt.subplots(1, 1 + needle, figsize=(5.4 * (1 + needle), 3.8), layout="constrained", squeeze=False)
    curves = panels[0, 0]
    for i, name in enumerate(MODELS):
        for result in results:
            if result.model == name:
                label, colour = f"{TITLES[name]} ({result.accuracy:.1%})", f"C{i}"
                curves.plot(*zip(*result.curve, strict=True), marker=".", color=colour, label=label)
                if needle:
                    depths = [(10 * n + 5, share) for n, share in enumerate(result.by_depth) if share is not None]
                    panels[0, 1].plot(*zip(*depths, strict=True), marker=".", color=colour)
    curves.set(xlabel="seconds of training (CPU time)", title=f"{results[0].length:,} positions")
    curves.legend(fontsize=8, loc="center right")
    if needle:
        panels[0, 1].set(xlabel="where the needle lies (% of the sequence)", title="after training", xlim=(0, 100))
    for panel in panels.flat:
        panel.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
        panel.set(ylabel="right answers", ylim=(-0.02, 1.02))
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--task", choices=list(TASKS), default="needle")
    add("--model", choices=[*MODELS, "all"], default="all", help="which to train (default: all)")
    add("--seconds", type=float, default=300.0, help="CPU time of a model's training (default: 300)")
    add("--steps", type=int, help="most training steps of a model (default: what the time allows)")
    add("--length", type=int, help="positions (default: 10,000 for the needle, 1,000 for copy)")
    add("--tokens", type=int, default=4096, help="tokens per step, at least 4 sequences (default: 4096)")
    add("--hidden-size", type=int, default=128, help="width of the models, a multiple of 32 (default: 128)")
    add("--learning-rate", type=float, default=2e-3, help="largest learning rate (default: 0.002)")
    add("--goal", type=float, default=0.995, help="share of right answers that ends a training (default: 0.995)")
    add("--check", type=int, default=16, help="sequences of a test during training (default: 16)")
    add("--check-every", type=float, default=20.0, help="seconds between two tests (default: 20)")
    add("--unseen", type=int, default=100, help="sequences of the last test (default: 100)")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1, help="threads of the CPU (default: 1)")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/long-memory"), help="folder for what is written")
    options = parser.parse_args()
    task = TASKS[options.task]
    options.length = task.length if options.length is None else options.length
    for name in ("steps", "length", "tokens", "hidden_size", "check", "unseen", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    if options.task == "needle" and options.length < 4 * task.answers:
        parser.error(f"argument --length: must be at least {4 * task.answers}")
    if options.hidden_size % 32:
        parser.error("argument --hidden-size: must be a multiple of 32")
    if options.seconds <= 0:
        parser.error("argument --seconds: must be above 0")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for model in MODELS if options.model == "all" else [options.model]:
        result = train(model, options)
        record = options.out / f"{options.task}-{model}.json"
        record.write_text(json.dumps(dataclasses.asdict(result), indent=1))
        print(
            f"{options.task}, {TITLES[model]}: {result.accuracy:.1%} right at {result.length:,} positions "
            f"({result.steps} steps, {result.seconds:.0f} s, trained on up to {result.trained_length:,})",
            flush=True,
        )
    records = [options.out / f"{options.task}-{model}.json" for model in MODELS]
    results = [Result(**json.loads(record.read_text())) for record in records if record.exists()]
    results = [result for result in results if result.length == options.length]
    picture = options.out / f"{options.task}.png"
    plot(results, 1 / task.classes, picture)
    print(f"wrote {picture} and a record of each model beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
