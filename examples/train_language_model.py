"""Trains byte-level language models on real text, with seqaccel's modules and with what torch has in their place.

    python examples/train_language_model.py                           # four kinds of model on Python's own library
    python examples/train_language_model.py --data FILE --model lstm  # one's own text, one model
    python examples/train_language_model.py --model sru --steps 2000 --resume
    python examples/train_language_model.py --stable         # an RNN and an LSTM, kept stable and not
    python examples/train_language_model.py --model lstm --quantize  # what int8 and bfloat16 weights cost in bits

Each model is an embedding, a sequence module and a linear layer. Both contenders of a pair start from the same weights
where their parameters are the same, and take their steps in turn on the same batches, so that both meet the same
machine. The validation text is other files (of one file: its last tenth).

``--stable`` asks what stability costs (Miller and Hardt 2019): both contenders are seqaccel's, and one is projected
after each step. A stable model forgets, so its outputs from the latest k inputs are close to those from all.
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
import sysconfig
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from language_models import RECIPES, STABLE, LanguageModel, Recipe, same_start
from provenance import provenance
from torch import Tensor, nn

import seqaccel
import seqaccel.nn as snn


class UserError(Exception):
    """Something the user can mend: reported in one line, exit code 2."""


def standard_library() -> tuple[bytes, bytes]:
    """Training and validation text: the sources of Python's standard library, one file in sixteen for validation."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not left_out.intersection(name.parts):
            held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % 16 == 0
            parts[held_out].append(path.read_bytes())
    return b"\n".join(parts[False]), b"\n".join(parts[True])


def own_text(path: pathlib.Path) -> tuple[bytes, bytes]:
    """Training and validation text of one file: its first nine tenths, and its last."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: {error.strerror}") from error
    if not text.strip():
        raise UserError(f"--data {path}: the file is empty")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 text (byte {error.start} is 0x{text[error.start]:02x})") from error
    if b"\0" in text:
        raise UserError(f"--data {path}: not text (byte {text.index(0)} is 0x00)")
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def tokens_of(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T): the bytes from each start on, and those that follow them."""
    taken = torch.stack([text[start : start + length + 1] for start in starts.tolist()]).long().to(device)
    return taken[:, :-1], taken[:, 1:]


class Contender:
    """One model with its optimiser and what its steps took."""

    def __init__(self, name: str, model: nn.Module, learning_rate: float) -> None:
        self.name = name
        self.model = model
        self.learning_rate = learning_rate
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        self.bits: list[float] = []  # training loss by step, in bits per byte
        self.seconds: list[float] = []

    def train_step(self, inputs: Tensor, targets: Tensor, step: int, context: Callable[[], object]) -> None:
        start = time.perf_counter()
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * warm_up_and_decay(step)
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        with context():
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.bits.append(loss.item() / math.log(2))
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]], context: Callable[[], object]) -> float:
        """Bits per byte."""
        self.model.eval()
        total = count = 0.0
        for inputs, targets in batches:
            with context():
                logits = self.model(inputs)
            total += F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item()
            count += targets.numel()
        return total / count / math.log(2)

    @torch.no_grad()
    def validate_truncated(self, batches: Iterable[tuple[Tensor, Tensor]], k: int | None, skipped: int) -> float:
        """Bits per byte, each output from its latest k inputs (None: from all), without the first of a sequence."""
        self.model.eval()
        total = count = 0.0
        for inputs, targets in batches:
            x = self.model.embedding(inputs)
            y = self.model.body(x) if k is None else self.model.body.truncated(x, k)
            logits, targets = self.model.head(y[:, skipped:]), targets[:, skipped:]
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            count += targets.numel()
        return total / count / math.log(2)

    def validate_quantized(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Bits per byte by the precision that the recurrent layers' weights are packed in."""
        found = {}
        for weights in PRECISIONS:
            seqaccel.quantize(self.model, weights)
            found[weights] = self.validate(batches, contextlib.nullcontext)
            seqaccel.revert(self.model)
        return found

    def state_dict(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "bits": self.bits,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.bits, self.seconds = list(state["bits"]), list(state["seconds"])


def warm_up_and_decay(step: int) -> float:
    """Linear warm-up over 20 steps, then the inverse square root: the same however many steps are still to come."""
    return min((step + 1) / 20, math.sqrt(100 / max(100, step + 1)))


def save(path: pathlib.Path, step: int, recipe: Recipe, contenders: list[Contender], options: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save({"step": step, "options": options, "models": {c.name: c.state_dict() for c in contenders}}, partial)
    os.replace(partial, path)


def load(path: pathlib.Path, contenders: list[Contender], options: dict) -> int:
    """Restores the contenders from a checkpoint; returns the steps it has seen."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        found = checkpoint["options"]
        if found != options:
            names = ", ".join(k for k in options if found.get(k) != options[k])
            raise UserError(f"{path}: the checkpoint was made with other settings ({names})")
        missing = [c.name for c in contenders if c.name not in checkpoint["models"]]
        if missing:
            raise UserError(f"{path}: the checkpoint has no {', '.join(missing)} (it was made with --no-compare)")
        for contender in contenders:
            contender.load_state_dict(checkpoint["models"][contender.name])
        return int(checkpoint["step"])
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes torch.load raise
        raise UserError(f"{path}: not a checkpoint of this program ({type(error).__name__})") from error


def sample(model: LanguageModel, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """Continues ``prompt`` one byte at a time through the streaming step."""
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    out = bytearray(prompt)
    with torch.inference_mode():
        state = model.init_state(1)
        for i in range(len(prompt) + count - 1):
            logits, state = model.step(torch.tensor([out[i]], device=device), state)
            if i + 1 >= len(prompt):
                weights = (logits[0].double().cpu() / temperature).softmax(0)
                out.append(int(torch.multinomial(weights, 1, generator=generator)))
    return bytes(out)


@dataclasses.dataclass
class Result:
    """What a pair of contenders came to; the second entry of each list is the stock model's, where it was trained."""

    model: str
    titles: list[str]
    names: list[str]
    tokens_per_step: int
    validation_bits: list[float]
    tokens_per_second: list[float]
    bits: list[list[float]]
    seconds: list[list[float]]
    text: str
    truncated_bits: list[dict[str, float]]  # with --stable, by k
    quantized_bits: dict[str, float]  # of the first contender, with --quantize, by the precision of the weights
    settings: dict  # sizes, learning rates, the bound on forget gates
    run: dict


def run(key: str, arguments: argparse.Namespace, train: Tensor, validation: Tensor) -> Result:
    """Trains one pair."""
    from tqdm import tqdm

    recipe = (STABLE if arguments.stable else RECIPES)[key]
    changes = {
        "hidden_size": arguments.hidden_size,
        "num_layers": arguments.num_layers,
        "batch_size": arguments.batch_size,
        "length": arguments.length,
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "learning_rate_of_ours": arguments.learning_rate_of_ours,
        "forget": arguments.forget,
    }
    recipe = dataclasses.replace(recipe, **{k: v for k, v in changes.items() if v is not None})
    for name, text in (("training", train), ("validation", validation)):
        if len(text) < recipe.length + 1:
            raise UserError(f"{name} text: {len(text)} bytes, but {key} needs {recipe.length + 1} (see --length)")
    if key == "attention" and recipe.hidden_size % 64:
        raise UserError(f"--hidden-size {recipe.hidden_size}: attention needs a multiple of 64")

    device = torch.device(arguments.device)
    origin = provenance(__file__, arguments.command, device)  # now: the sources may change during the run
    dtype = getattr(torch, arguments.dtype)

    def context():
        return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()

    def build(body: Callable[[int, int], nn.Module], title: str, learning_rate: float) -> Contender:
        torch.manual_seed(arguments.seed)
        model = LanguageModel(recipe.hidden_size, body(recipe.hidden_size, recipe.num_layers))
        model = model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        return Contender(title, model, learning_rate)

    names = ("stable", "unstable") if arguments.stable else ("seqaccel", "torch")
    contenders = [build(recipe.ours, names[0], recipe.learning_rate_of_ours or recipe.learning_rate)]
    if arguments.compare:
        contenders.append(build(recipe.stock, names[1], recipe.learning_rate))
        same_start(contenders[0].model, contenders[1].model, recipe.paired)
    if arguments.stable:
        snn.utils.stabilize_after(contenders[0].optimiser, contenders[0].model, forget=recipe.forget)

    options = {
        "model": key,
        "stable": arguments.stable,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "text": hashlib.sha256(train.numpy().tobytes()).hexdigest(),
        **{name: getattr(recipe, name) for name in changes if name != "steps"},
    }
    checkpoint = arguments.out / f"{'stable-' if arguments.stable else ''}{key}.pt"
    done = load(checkpoint, contenders, options) if arguments.resume and checkpoint.exists() else 0

    bar = tqdm(total=recipe.steps, initial=min(done, recipe.steps), desc=f"{recipe.title:<22}", unit="step")
    step = done
    try:
        for step in range(done, recipe.steps):
            choice = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
            starts = torch.randint(len(train) - recipe.length, (recipe.batch_size,), generator=choice)
            inputs, targets = windows(train, starts, recipe.length, device)
            for contender in contenders[:: 1 if step % 2 else -1]:  # in turn, so that neither always goes first
                torch.manual_seed(arguments.seed + step)
                contender.train_step(inputs, targets, step, context)
            bar.set_postfix({c.name: f"{statistics.fmean(c.bits[-20:]):.2f} bits" for c in contenders})
            bar.update()
            if (step + 1) % arguments.save_every == 0 or step + 1 == recipe.steps:
                save(checkpoint, step + 1, recipe, contenders, options)
    except KeyboardInterrupt:
        if all(len(c.bits) == step for c in contenders):
            save(checkpoint, step, recipe, contenders, options)
        raise
    finally:
        bar.close()

    count = min(max(1, (len(validation) - 1) // recipe.length), max(1, arguments.validation_bytes // recipe.length))
    starts = torch.linspace(0, len(validation) - 1 - recipe.length, count).long()
    batches = [windows(validation, part, recipe.length, device) for part in starts.split(recipe.batch_size)]
    truncated_bits = []
    if arguments.stable:
        length = 4 * max(TRUNCATED)
        starts = torch.linspace(0, max(0, len(validation) - 1 - length), 16).long()
        longer = [windows(validation, part, min(length, len(validation) - 1), device) for part in starts.split(4)]
        for contender in contenders:
            bits = {k: contender.validate_truncated(longer, k, max(TRUNCATED)) for k in [*TRUNCATED, None]}
            truncated_bits.append({"all" if k is None else str(k): value for k, value in bits.items()})
    tokens = recipe.batch_size * recipe.length
    return Result(
        model=key,
        titles=[recipe.title, recipe.stock_title][: len(contenders)],
        names=[c.name for c in contenders],
        tokens_per_step=tokens,
        validation_bits=[c.validate(batches, context) for c in contenders],
        tokens_per_second=[tokens / statistics.median(c.seconds) if c.seconds else math.nan for c in contenders],
        bits=[c.bits for c in contenders],
        seconds=[c.seconds for c in contenders],
        text=sample(
            contenders[0].model, arguments.prompt.encode(), arguments.sample, arguments.temperature, arguments.seed
        ).decode(errors="replace"),
        truncated_bits=truncated_bits,
        quantized_bits=contenders[0].validate_quantized(batches) if arguments.quantize and key in QUANTIZED else {},
        settings={name: getattr(recipe, name) for name in changes},
        run=origin,
    )


TRUNCATED = (13, 25, 50, 100)  # steps
PRECISIONS = ("int8", "bfloat16")  # of packed weights
QUANTIZED = ("lstm", "rnn")  # models whose layers ``seqaccel.quantize`` packs


def print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    stable = bool(results[0].truncated_bits)
    table = Table(
        title=f"byte-level language models: {'stable beside unstable' if stable else 'seqaccel beside torch'}"
    )
    table.add_column("stable" if stable else "seqaccel")
    table.add_column("unstable" if stable else "instead of")
    other = "unstable" if stable else "torch's"
    for name in ("bits/byte", other, "tokens/s", other, "speed"):
        table.add_column(name, justify="right")
    for result in results:
        bits = [f"{value:.3f}" for value in result.validation_bits]
        speed = [f"{value:,.0f}" for value in result.tokens_per_second]
        if len(bits) == 2:
            ratio = f"{result.tokens_per_second[0] / result.tokens_per_second[1]:.2f}x"
            table.add_row(*result.titles, *bits, *speed, ratio)
        else:
            table.add_row(result.titles[0], "", bits[0], "", speed[0], "", "")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    if stable:
        table = Table(title="perplexity by the inputs that an output has seen")
        for name in ("", *results[0].truncated_bits[0]):
            table.add_column(name, justify="right" if name else "left")
        for result in results:
            for title, bits in zip(result.titles, result.truncated_bits, strict=True):
                table.add_row(title, *(f"{2**value:.3f}" for value in bits.values()))
        console.print(table)
    if any(result.quantized_bits for result in results):
        table = Table(title="bits/byte by the weights of the recurrent layers")
        for name in ("", "float32", *PRECISIONS):
            table.add_column(name, justify="right" if name else "left")
        for result in results:
            if result.quantized_bits:
                values = (result.validation_bits[0], *result.quantized_bits.values())
                table.add_row(result.titles[0], *(f"{value:.4f}" for value in values))
        console.print(table)


def plot(results: list[Result], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(1, math.ceil(len(results) / 2)) if len(results) > 1 else 1
    rows = math.ceil(len(results) / columns)
    figure = plt.figure(figsize=(4.2 * columns + 4.6, 3 * rows + 0.4), layout="constrained")
    losses, throughput = figure.subfigures(1, 2, width_ratios=[4.2 * columns, 4.6])
    panels = losses.subplots(rows, columns, squeeze=False).flat
    names, colours = max((result.names for result in results), key=len), ("tab:blue", "tab:orange")
    for panel, result in zip(panels, results, strict=False):
        for i, (bits, seconds) in enumerate(zip(result.bits, result.seconds, strict=True)):
            width = max(1, len(bits) // 40)
            smooth = [statistics.fmean(bits[max(0, n - width) : n + 1]) for n in range(len(bits))]
            elapsed = [sum(seconds[: n + 1]) for n in range(len(seconds))]
            label = f"{result.titles[i]} ({names[i]})" if i == 0 else result.titles[i]
            panel.plot(elapsed, smooth, color=colours[i], label=label)
        panel.set(xlabel="seconds of training", ylabel="bits per byte")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.axis("off")
    bars = throughput.subplots()
    for i in range(max(len(result.titles) for result in results)):
        pairs = [(n, result) for n, result in enumerate(results) if len(result.titles) > i]
        places = [n + 0.4 * i for n, _ in pairs]
        bars.bar(places, [r.tokens_per_second[i] / 1e3 for _, r in pairs], 0.38, color=colours[i], label=names[i])
    for n, result in enumerate(results):
        if len(result.titles) == 2:
            ours, stock = result.tokens_per_second
            bars.text(n + 0.2, max(ours, stock) / 1e3, f"{ours / stock:.2f}x", ha="center", va="bottom")
    bars.set_xticks([n + 0.2 for n in range(len(results))], [result.model for result in results])
    bars.set(ylabel="thousand tokens per second of training")
    bars.margins(y=0.12)
    bars.legend(fontsize=8)
    bars.set_axisbelow(True)
    bars.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
        return value

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=list(dict.fromkeys([*RECIPES, *STABLE, "all"])), default="all", help="a pair (default: all)")
    add("--stable", action="store_true", help=f"a model kept stable beside one that is not ({', '.join(STABLE)})")
    add("--data", type=pathlib.Path, metavar="FILE", help="text to learn (default: Python's standard library)")
    add("--steps", type=positive, help="training steps in all")
    add("--batch-size", type=positive)
    add("--length", type=positive, metavar="T", help="bytes a training sequence has")
    add("--hidden-size", type=positive)
    add("--num-layers", type=positive)
    add("--learning-rate", type=float, help="of both models")
    add("--learning-rate-of-ours", type=float, help="of the first of the two models, where it is another one")
    add("--forget", type=float, help="of a stable LSTM: the largest value of a forget gate")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--dtype", choices=["float32", "bfloat16", "float64"], default="float32", help="bfloat16: by autocast")
    add(
        "--backend",
        choices=seqaccel.backends.NAMES,
        help="of seqaccel's operators (default: SEQACCEL_BACKEND, else auto)",
    )
    add("--quantize", action="store_true", help="also validate the recurrent models with int8 and bfloat16 weights")
    add("--no-compare", dest="compare", action="store_false", help="train seqaccel's models only")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/language-model"), help="folder for what is written")
    add("--resume", action="store_true", help="go on from the checkpoints in that folder")
    add("--save-every", type=positive, default=100, metavar="STEPS", help="between checkpoints")
    add("--validation-bytes", type=positive, default=1 << 16, help="how much validation text is used")
    add("--sample", type=positive, default=300, metavar="BYTES", help="text to sample from each model")
    add("--prompt", default="def ", help="what sampled text begins with")
    add("--temperature", type=float, default=0.7)
    add("--seed", type=int, default=0)
    add("--threads", type=positive, help="threads of the CPU (default: torch's)")
    options = parser.parse_args(arguments)
    if not options.prompt:
        parser.error("argument --prompt: must not be empty")
    if options.model not in ("all", *(STABLE if options.stable else RECIPES)):
        parser.error(f"argument --model: {options.model} goes {'without' if options.stable else 'with'} --stable")
    if options.quantize and (options.device != "cpu" or options.dtype != "float32"):
        parser.error("argument --quantize: needs --device cpu and --dtype float32")
    if options.quantize and options.model not in ("all", *QUANTIZED):
        parser.error(f"argument --quantize: {options.model} has no recurrent layer to pack")
    options.command = sys.argv[1:] if arguments is None else arguments
    if options.temperature <= 0:
        parser.error("argument --temperature: must be above 0")
    return options


def train_all(arguments: argparse.Namespace) -> None:
    try:
        device = torch.device(arguments.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device}: {str(error).splitlines()[0]}") from error
    missing = seqaccel.backends.why_missing(seqaccel.backends.current(), device.type)
    if missing and seqaccel.backends.current() != "auto":
        raise UserError(f"backend {seqaccel.backends.current()} is not available: {missing}")
    arguments.device = device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: {error.strerror}") from error
    train, validation = map(tokens_of, own_text(arguments.data) if arguments.data else standard_library())
    source = arguments.data or "Python's standard library"
    print(
        f"{source}: {len(train):,} bytes to train on, {len(validation):,} to validate on; {device}, {arguments.dtype}"
    )

    results = []
    recipes = STABLE if arguments.stable else RECIPES
    for key in recipes if arguments.model == "all" else [arguments.model]:
        results.append(run(key, arguments, train, validation))
        print(f"\n{results[-1].titles[0]} writes:\n{results[-1].text}\n", flush=True)
    print_table(results)
    plot(results, arguments.out / "training.png")
    record = [dataclasses.asdict(result) for result in results]
    (arguments.out / "results.json").write_text(json.dumps(record, indent=1))
    print(f"wrote {arguments.out / 'training.png'}, {arguments.out / 'results.json'} and the checkpoints beside them")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    chosen = seqaccel.backend(options.backend) if options.backend else contextlib.nullcontext()
    try:
        with chosen:
            train_all(options)
    except UserError as error:
        print(f"train_language_model: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "no backend" not in str(error):
            raise
        print(f"train_language_model: {error} (see --backend, --model)", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
