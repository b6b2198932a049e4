"""A Neural GPU is trained to add binary numbers of up to 8 bits, then tested on longer ones.

    python examples/neural_gpu.py
    python examples/neural_gpu.py --bits 10 --test 16 24 --seed 1

A problem is one sequence, both numbers with a plus sign between, the lowest bit first: 011+101 is 6 + 5, and the
answer 1101 begins where the problem does. So bits that belong together lie apart, and the network moves them through
its grid (Kaiser and Sutskever 2016). It starts with one bit, and a bit is added when 93 of 100 sums are right. With
the last bit the learning rate begins to fall. What is tested has the average of the latest parameters. Carries over
many bits are rare among random pairs, so half of the pairs for training are drawn to have them.

An eighth of all pairs of numbers of more than 3 bits is never trained on. Training ends when sums of each length that
it may see are all right. Then the script tests pairs that it has not seen: of each length, and of the longer ones of
``--test``, which no training has prepared the network for. It writes a record of the run to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from provenance import provenance
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import seqaccel.nn as snn

PLUS, IGNORED = 2, -100
FEW = 3  # pairs of so few bits are all trained on


def encode(a: Tensor, b: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Problems (B, 2 bits + 1) and their answers, (B, 2 bits + 1), of which the first bits + 1 count."""

    def digits(number: Tensor, count: int) -> Tensor:
        return number.unsqueeze(1) >> torch.arange(count) & 1

    problem = torch.cat([digits(a, bits), torch.full_like(a, PLUS).unsqueeze(1), digits(b, bits)], 1)
    answer = torch.full_like(problem, IGNORED)
    answer[:, : bits + 1] = digits(a + b, bits + 1)
    return problem, answer


def unseen(a: Tensor, b: Tensor, bits: int) -> Tensor:
    """Which pairs training leaves out."""
    mixed = (a * 0x9E3779B1 + b * 0x85EBCA77 + bits * 0xC2B2AE3D) & 0xFFFFFFFF
    return (((mixed ^ mixed >> 15) * 0x2C1B3C6D & 0xFFFFFFFF) >> 29 == 0) & (bits > FEW)


def pairs(count: int, bits: int, new: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pairs of numbers that training leaves out, or pairs for training: in half of these carries go far."""
    a, b, *masks = torch.randint(2**bits, (5, 16 * count + 64), generator=generator)
    if not new:  # only an eighth of the bits of every second pair are alike, the others pass a carry on
        b[::2] = (a ^ (2**bits - 1) ^ masks[0] & masks[1] & masks[2])[::2]
    kept = unseen(a, b, bits) == new
    return a[kept][:count], b[kept][:count]


def all_unseen(bits: int) -> tuple[Tensor, Tensor]:
    number = torch.arange(2**bits)
    a, b = number.repeat_interleave(2**bits), number.repeat(2**bits)
    kept = unseen(a, b, bits)
    return a[kept], b[kept]


def right(logits: Tensor, answer: Tensor) -> Tensor:
    """Of each problem, whether the whole answer is right."""
    return ((logits.argmax(-1) == answer) | (answer == IGNORED)).all(1)


@torch.no_grad()
def accuracy(model: nn.Module, numbers: tuple[Tensor, Tensor], bits: int) -> float:
    model.eval()
    parts = zip(*(t.split(512) for t in encode(*numbers, bits)), strict=True)
    found = torch.cat([right(model(problem), answer) for problem, answer in parts])
    model.train()
    return found.double().mean().item()


def train(
    model: nn.Module, average: AveragedModel, options: argparse.Namespace
) -> tuple[int, list[tuple[int, float, int]]]:
    """Returns the number of steps, and for each length where the curriculum got to it: bits, seconds, steps."""
    optimizer = torch.optim.Adamax(model.parameters(), lr=options.learning_rate)
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, options.decay)
    generator = torch.Generator().manual_seed(options.seed)
    bits, recent, came = 1, 0.0, [(1, 0.0, 0)]
    began = time.process_time()
    with tqdm(range(1, options.steps + 1), desc="training", unit="step", disable=None) as bar:
        for step in bar:
            easier = torch.rand((), generator=generator) < 0.3
            length = int(torch.randint(1, bits + 1, (), generator=generator)) if easier else bits
            problem, answer = encode(*pairs(options.batch_size, length, False, generator), length)
            logits = model(problem)
            loss = F.cross_entropy(logits.transpose(1, 2), answer, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(model)
            if bits == options.bits:
                decay.step()
            if length == bits:
                recent = 0.9 * recent + 0.1 * right(logits, answer).double().mean().item()
            bar.set_postfix(bits=bits, right=f"{recent:.0%}", loss=f"{loss.item():.4f}")
            if recent > 0.93 and bits < options.bits:
                bits, recent = bits + 1, 0.0
                came.append((bits, round(time.process_time() - began, 1), step))
                tqdm.write(f"{bits} bits after {step} steps, {came[-1][1]:.0f} s of CPU time", file=sys.stderr)
            elif bits == options.bits and recent > 0.98 and step % 100 == 0:
                checks = ((pairs(4096, n, False, generator), n) for n in range(options.bits, 0, -1))
                if all(accuracy(average, numbers, n) == 1 for numbers, n in checks):
                    break
    return step, came


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bits", type=int, default=8, help="of the numbers that training comes to (default: 8)")
    add("--test", type=int, nargs="*", default=[10, 12, 16], help="longer numbers (default: 10 12 16)")
    add("--steps", type=int, default=4_000, help="most training steps (default: 4,000)")
    add("--channels", type=int, default=24, help="of the grid (default: 24)")
    add("--batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=5e-3)
    add("--decay", type=float, default=0.999, help="of the learning rate, per step with --bits (default: 0.999)")
    add("--dropout", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: all)")
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/neural-gpu"), help="folder of the record")
    options = parser.parse_args()
    for name in ("bits", "steps", "channels", "batch_size", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    if options.bits > 10:
        parser.error("argument --bits: must be at most 10: all pairs are tested")
    if any(not 1 <= bits <= 60 for bits in options.test):
        parser.error("argument --test: must be from 1 to 60")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = snn.NeuralGPU(3, options.channels, output_vocabulary=2, dropout=options.dropout)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    began = time.process_time()
    steps, curriculum = train(model, average, options)
    seconds = time.process_time() - began
    print(f"{steps} steps, {seconds:.0f} s of CPU time, {sum(p.numel() for p in model.parameters()):,} parameters")
    tests, generator = {}, torch.Generator().manual_seed(1_000_003)
    for bits in [*range(FEW + 1, options.bits + 1), *(n for n in options.test if n > options.bits)]:
        numbers = all_unseen(bits) if bits <= options.bits else pairs(1000, bits, True, generator)
        tests[bits] = accuracy(average, numbers, bits)
        print(f"{bits:>3} bits: {tests[bits]:.2%} of {len(numbers[0])} unseen sums are right", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    record = {"settings": settings, "steps": steps, "seconds": round(seconds, 1), "curriculum": curriculum}
    record |= {"unseen": tests} | provenance(__file__, sys.argv[1:], "cpu")
    (options.out / f"addition-{options.seed}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(tests[bits] == 1 for bits in tests if bits <= options.bits) else 1


if __name__ == "__main__":
    sys.exit(main())
