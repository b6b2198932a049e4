"""Learns an audio effect, then runs it block by block as a plug-in would.

    python examples/audio_effect.py                    # a WaveNet
    python examples/audio_effect.py --model lstm

The effect is made here, as are the sounds: an amplifier whose drive sags while the sound is loud, with a coupling
capacitor and a low-pass behind it. So an output depends on the last tenth of a second. The network learns it from pairs
of clips, by the share of the energy that it gets wrong. Then a :class:`seqaccel.Session` runs an unseen sound in blocks
that arrive one after another. The script prints the error, the real-time factor (time needed per time played) and the
largest time of a block, which must stay below the time that a block plays.
"""

from __future__ import annotations

import argparse
import gc
import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

import seqaccel
from seqaccel import functional as SF
from seqaccel import nn

RATE = 16_000  # samples per second


def smoothed(x: Tensor, seconds: float) -> Tensor:
    """A low-pass of first order with this time constant; x (B, T)."""
    keep = math.exp(-1 / (RATE * seconds))
    return SF.linear_scan(torch.full_like(x, keep).unsqueeze(-1), (1 - keep) * x.unsqueeze(-1)).squeeze(-1)


def effect(x: Tensor) -> Tensor:
    """The amplifier: x (B, T), y (B, T)."""
    loudness = smoothed(x.abs(), 0.03)
    shaped = torch.tanh(6 / (1 + 4 * loudness) * x + loudness)
    return smoothed(shaped - smoothed(shaped, 0.01), 0.0001)


def sounds(count: int, samples: int, generator: torch.Generator) -> Tensor:
    """Plucked strings (B, T): a few notes with harmonics that die away, at different loudness."""
    t = torch.arange(samples) / RATE
    x = torch.zeros(count, samples)
    for _ in range(3):
        pitch, start, loudness, decay = torch.rand(4, count, 1, generator=generator)
        since = (t - start * samples / RATE).clamp(min=0)
        for harmonic in range(1, 6):
            wave = torch.sin(2 * math.pi * harmonic * 80 * 2 ** (3 * pitch) * since) / harmonic
            x += loudness**2 * wave * torch.exp(-since * harmonic * (1 + 9 * decay))
    return x / 2


class Network(torch.nn.Module):
    """x (B, T): y (B, T)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers: torch.nn.Module
        if kind == "wavenet":
            self.layers = nn.WaveNet(1, 1, 16, 16, layers=9, stacks=2)
        else:
            self.layers = torch.nn.Sequential(nn.LSTM(1, 16), torch.nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "wavenet":
            return self.layers(x.unsqueeze(1)).squeeze(1)
        lstm, head = self.layers  # type: ignore[misc]
        return head(lstm(x.t().unsqueeze(-1))[0]).squeeze(-1).t()


def wrong(found: Tensor, wanted: Tensor) -> Tensor:
    """The share of the energy that is wrong."""
    return (found - wanted).square().sum() / wanted.square().sum()


def train(network: Network, options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps, pct_start=0.1)
    with tqdm(range(options.steps), desc=options.model, unit="step", disable=None) as bar:
        for _ in bar:
            x = sounds(options.batch_size, options.samples, generator)
            loss = wrong(network(x), effect(x))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(wrong=f"{loss.item():.2%}")


def play(network: Network, x: Tensor, block: int) -> tuple[Tensor, list[float]]:
    """The output for x (1, T), whose blocks arrive one after another, and the seconds that each of them took."""
    session = seqaccel.Session(network.layers)
    parts, seconds = [], []
    dims = (0, 1, 2) if network.kind == "wavenet" else (2, 0, 1)  # from (B, C, T)
    session.extend(x[None, :, :block].permute(dims))  # allocates
    session.reset()
    gc.disable()
    for part in x[None].split(block, -1):
        begin = time.perf_counter()
        y = session.extend(part.permute(dims))
        seconds.append(time.perf_counter() - begin)
        parts.append(y.flatten())
    gc.enable()
    return torch.cat(parts)[None], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["wavenet", "lstm"], default="wavenet")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips per step (default: 8)")
    parser.add_argument("--samples", type=int, default=2048, help="samples per clip (default: 2048)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="largest learning rate (default: 0.01)")
    parser.add_argument("--block", type=int, default=64, help="samples per block in the end (default: 64)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of the unseen sound (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("steps", "batch_size", "samples", "block"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    torch.manual_seed(options.seed)
    network = Network(options.model)
    began = time.perf_counter()
    train(network, options)
    print(f"{options.model}: {options.steps} steps in {time.perf_counter() - began:.0f} s")

    clips = math.ceil(options.seconds * RATE / 8000)
    x = sounds(clips, 8000, torch.Generator().manual_seed(options.seed + 1)).view(1, -1)
    with torch.no_grad():
        whole = network.eval()(x)
    y, seconds = play(network, x, options.block)
    length = options.block / RATE
    print(f"error on an unseen sound: {wrong(y, effect(x)):.2%} of the energy")
    print(f"blocks and the whole sound agree to {(y - whole).abs().max():.0e}")
    print(f"real-time factor: {sum(seconds) / (x.shape[1] / RATE):.4f}")
    print(f"largest block: {max(seconds) * 1e3:.2f} ms of the {length * 1e3:.2f} ms that it plays")


if __name__ == "__main__":
    main()
