"""Fuzzes every C++ operator, sessions and modules.

Half of the calls are valid, some with a NaN among the values. Each must agree with the same call of the portable
instruction set, one thread, contiguous tensors and float64, NaNs included. The others have one to three arguments
mutated according to their types in the schema: sizes (huge ones by expanding), dtypes, strides, values, missing
tensors, lists of other lengths, strings. They must raise an ordinary error, or succeed with the shapes that the
operator's shape function says.

The operators are those that torch's dispatcher has; one without a generator of valid arguments in ``fuzz_cases.py`` is
an error. Calls are made in child processes. A call that crashes or hangs is printed with its seed, which repeats it:

    python tests/fuzz_operators.py --calls 50000 --seed 1
    python tests/fuzz_operators.py --calls 1 --seed 40213
    python tests/fuzz_operators.py --operator rnn_backward --operator session
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from fuzz_cases import (
    CELLS,
    GENERATORS,
    MODULES,
    OPERATORS,
    Arguments,
    Target,
    boolean,
    describe,
    has_no_memory,
    map_tensors,
    targets,
    tensors_of,
)
from instruction_sets import NARROW_ISAS, USABLE_NARROW_ISAS
from torch import Tensor

from seqaccel import backends

CHUNK = 1000  # calls of a child process
FOUND = 3  # a child's exit status where a call was wrong without a crash
EXPECTED_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError)
SHAPE_ERRORS = (
    *EXPECTED_ERRORS,
    AttributeError,
    KeyError,
)  # those of a shape function, which a tensor on "meta" goes to


# ---- mutations ----


def in_float64(t: Tensor) -> Tensor:
    """A copy in float64 or complex128 of what is floating point or complex."""
    return t.to(torch.complex128) if t.is_complex() else t.double() if t.is_floating_point() else t


def rearranged(rng: random.Random, t: Tensor) -> Tensor:
    """The same values in another layout of memory."""
    kind = rng.randrange(6)
    if kind == 0 and t.dim() > 1:
        order = rng.sample(range(t.dim()), t.dim())
        return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])
    if kind == 1 and t.dim() > 0:
        dim = rng.randrange(t.dim())
        return t.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)]
    if kind == 2:  # not aligned to more than an element, at the very end of its memory
        return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)
    if kind == 3 and t.dim() > 0:  # strides of dimensions of one element are arbitrary
        return t.as_strided(t.shape, [rng.choice([1, 7]) if n == 1 else s for n, s in zip(t.shape, t.stride())])  # noqa: B905
    return t


# Of what is not calculated in float64, relative to the largest value.
TOLERANCES = {torch.float32: 1e-3, torch.complex64: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
DTYPES += [torch.bool, torch.complex64]
INTEGERS = [0, 1, -1, 2, 3, 7, 64, -5, 1 << 20, 1 << 31, -(1 << 31), 1 << 40, 1 << 62, -(1 << 63), (1 << 63) - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e30, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan]
SIZES = [0, 1, 2, 3, 1 << 33, 1 << 40, (1 << 62) + (1 << 20)]


def resized(rng: random.Random, t: Tensor) -> Tensor:
    shape = list(t.shape)
    kind = rng.randrange(4)
    if kind == 0 or not shape:
        shape.insert(rng.randint(0, len(shape)), rng.choice([0, 1, 1, 2]))
    elif kind == 1:
        del shape[rng.randrange(len(shape))]
    else:
        dim = rng.randrange(len(shape))
        shape[dim] = max(0, rng.choice([0, 1, shape[dim] - 1, shape[dim] + 1, rng.randrange(100)]))
    return torch.ones(shape, dtype=t.dtype)


def huge(rng: random.Random, t: Tensor) -> Tensor:
    """Sizes beyond any memory, or whose product overflows, of a tensor of one element or none."""
    shape = [rng.choice([size, rng.choice(SIZES)]) for size in t.shape] or [1 << 40]
    if math.prod(shape) >= 1 << 60:  # torch refuses these
        shape[rng.randrange(len(shape))] = 0
    if math.prod(size or 1 for size in shape) >= 1 << 63:
        shape = [min(size, 1 << 20) for size in shape]
    return torch.zeros(0 if 0 in shape else 1, dtype=t.dtype).as_strided(shape, [0] * len(shape))


def special(rng: random.Random, t: Tensor) -> Tensor:
    """Some values that no weight has, or all of them."""
    t = t.clone(memory_format=torch.contiguous_format)
    values, wide = (FLOATS, torch.float64) if t.is_floating_point() else (INTEGERS, torch.int64)
    if t.dtype == torch.bool or t.is_complex() or t.numel() == 0:
        return t
    if not t.is_floating_point():
        low, high = torch.iinfo(t.dtype).min, torch.iinfo(t.dtype).max
        values = [value for value in values if low <= value <= high]
    for _ in range(rng.randint(1, 4)):
        t.view(-1)[rng.randrange(t.numel())] = torch.tensor(rng.choice(values), dtype=wide).to(t.dtype)
    return torch.full_like(t, t.view(-1)[0].item()) if rng.random() < 0.2 else t


def without_memory(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def mutated_tensor(rng: random.Random, t: Tensor) -> Any:
    if t.layout != torch.strided or t.is_meta or has_no_memory(t):
        return t  # torch itself has little to do with these
    choices: list[tuple[int, Callable[[], Any]]] = [
        (6, lambda: resized(rng, t)),
        (3, lambda: t.to(rng.choice(DTYPES))),
        (3, lambda: rearranged(rng, t)),
        (4, lambda: special(rng, t)),
        (3, lambda: huge(rng, t)),
        (1, lambda: t.new_empty(t.shape, device="meta")),
        (1, lambda: without_memory(t)),
        (1, lambda: torch._efficientzerotensor(t.shape, dtype=t.dtype)),
        (1, lambda: t.new_zeros(()).expand(t.shape)),
        (1, lambda: t.to(torch.complex64).conj().imag.to(t.dtype) if t.is_floating_point() else t),
        (1, lambda: torch._neg_view(t) if t.is_floating_point() else t),
        (1, lambda: t.clone().requires_grad_() if t.is_floating_point() else t),
        (1, lambda: t.to_sparse() if t.dim() else t),
        (1, lambda: torch.nn.Parameter(t, requires_grad=False)),
        (1, lambda: rng.choice([None, 1.0, "tensor", [t]])),
    ]
    weights, makers = zip(*choices, strict=True)
    return rng.choices(makers, weights)[0]()


def random_text(rng: random.Random) -> str:
    words = [
        *CELLS,
        *NARROW_ISAS,
        *MODULES,
        "none",
        "relu",
        "tanh",
        "exp",
        "auto",
        "",
        "x" * 5000,
        "lstm\0",
        "ä☃",
        "%s%n",
        "LSTM",
    ]
    return rng.choice(words)


def mutated(rng: random.Random, kind: str, value: Any, others: list[Tensor]) -> Any:
    """Another value of an argument, by its type in the schema."""
    if kind.startswith("Optional["):
        kind = kind.removeprefix("Optional[").removesuffix("]")
        if value is None:
            return rng.choice(others) if others else torch.zeros(1)
        if rng.random() < 0.3:
            return None
    if kind.startswith("List["):
        inner, items = kind.removeprefix("List[").removesuffix("]"), list(value)
        choice = rng.randrange(6)
        if choice == 0:
            return []
        if choice == 1:
            return items[: rng.randint(0, len(items))]
        if choice == 2:
            return items + [rng.choice(items)] * rng.choice([1, 2, 50]) if items else items
        if choice == 3 and "Optional" in inner:
            return [None if boolean(rng) else item for item in items]
        if choice == 4:
            rng.shuffle(items)
        elif items:
            i = rng.randrange(len(items))
            items[i] = mutated(rng, inner, items[i], others)
        return items
    if kind == "Tensor":
        if others and rng.random() < 0.1:
            return rng.choice(others)  # one memory for two arguments
        return mutated_tensor(rng, value) if isinstance(value, Tensor) else value
    if kind == "int":
        return rng.choice([value + 1, value - 1, 2 * value, *INTEGERS]) if isinstance(value, int) else value
    if kind == "float":
        return rng.choice(FLOATS)
    if kind == "bool":
        return not value
    if kind == "str":
        return random_text(rng)
    raise AssertionError(f"fuzz_operators.mutated: no mutation of the type {kind}")


def poison(rng: random.Random, arguments: Arguments) -> None:
    """Puts a NaN into one of the tensors."""
    tensors = [t for t in tensors_of(arguments) if t.is_floating_point() and t.numel()]
    if tensors:
        t = rng.choice(tensors)
        t.view(-1)[rng.randrange(t.numel())] = math.nan


# ---- one call ----


class Finding(Exception):
    """A call that is wrong without a crash."""


class Call:
    """The call of a seed: an operator and arguments."""

    def __init__(self, seed: int, targets: dict[str, Target]) -> None:
        self.rng = random.Random(seed)
        self.name = self.rng.choice(list(targets))
        self.target = targets[self.name]
        self.rng.seed(seed)  # the arguments do not depend on how the operator was chosen
        torch.manual_seed(seed)
        OPERATORS.set_isa("auto")
        torch.set_num_threads(1)
        self.arguments = GENERATORS[self.name](self.rng)
        self.isa, self.threads = self.rng.choice(USABLE_NARROW_ISAS), self.rng.choice([1, 2, 2, 3])
        self.kind = self.rng.choices(["valid", "valid with a NaN", "mutated"], [4, 1, 5])[0]
        self.valid = self.kind != "mutated"
        self.plain, self.written, types = self.arguments, self.target.written, self.target.types
        if self.kind == "valid with a NaN":
            poison(self.rng, self.plain)
        if self.valid:
            self.arguments = {
                name: value if name in self.written else map_tensors(lambda t: rearranged(self.rng, t), value)
                for name, value in self.arguments.items()
            }
        elif self.arguments:
            others = tensors_of(self.arguments)
            self.arguments = dict(self.arguments)
            count = min(len(self.arguments), self.rng.choice([1, 1, 2, 3]))
            for name in self.rng.sample(list(self.arguments), count):
                self.arguments[name] = mutated(self.rng, types[name], self.arguments[name], others)

    def __str__(self) -> str:
        return f"{self.name}({describe(self.arguments)}) [{self.kind}, {self.isa}, {self.threads} threads]"

    def call(self, arguments: Arguments, isa: str, threads: int) -> Any:
        torch.set_num_threads(threads)
        with backends.isa(isa):
            return self.target.call(**arguments)

    def on_meta(self) -> bool:
        return any(t.is_meta for t in tensors_of(self.arguments))

    def make(self) -> None:
        """Raises Finding where something is wrong."""
        if not self.valid:
            try:
                found = self.call(self.arguments, self.isa, self.threads)
            except SHAPE_ERRORS as error:
                if not str(error) or not (isinstance(error, EXPECTED_ERRORS) or self.on_meta()):
                    raise Finding(f"raised {error!r}") from error
                return
            self.check_shapes(found)
            return
        before = map_tensors(Tensor.clone, {n: v for n, v in self.arguments.items() if n not in self.written})
        plain = map_tensors(Tensor.clone, self.plain)
        try:
            found = self.call(self.arguments, self.isa, self.threads)
        except EXPECTED_ERRORS as error:
            raise Finding(f"a valid call raised {type(error).__name__}: {error}") from error
        for name, value in before.items():
            for was, is_now in zip(tensors_of(value), tensors_of(self.arguments[name]), strict=True):
                if not torch.equal(was.nan_to_num(), is_now.nan_to_num()):
                    raise Finding(f"the operator wrote to its input {name}")
        self.check_shapes(found)
        narrow = self.name == "rnn_forward_bfloat16" or self.arguments.get("weights") in ("bfloat16", "int8")
        if not narrow and self.name != "session":
            plain = map_tensors(in_float64, plain)
        expected = self.call(plain, "portable", 1)
        pairs = [("result", found, expected), *((name, self.arguments[name], plain[name]) for name in self.written)]
        for name, ours, theirs in pairs:
            if isinstance(ours, str):
                continue
            for i, (a, b) in enumerate(zip(tensors_of(ours), tensors_of(theirs), strict=True)):
                self.compare(f"{name} {i}", a, b, 5e-2 if narrow else TOLERANCES.get(a.dtype, 1e-8))

    def compare(self, name: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        if found.shape != expected.shape:
            raise Finding(f"{name} has shape {list(found.shape)}, in float64 {list(expected.shape)}")
        if found.numel() == 0:
            return
        found, expected = in_float64(found), in_float64(expected.to(found.dtype))
        if found.is_complex():
            found, expected = torch.view_as_real(found), torch.view_as_real(expected)
        if not torch.equal(found.isnan(), expected.isnan()):
            raise Finding(f"{name} is NaN where the call in float64 is not, or the other way round")
        if not torch.equal(found.isfinite(), expected.isfinite()):
            raise Finding(f"{name} is finite where the call in float64 is not, or the other way round")
        finite = found.isfinite()
        found, expected = found[finite], expected[finite]
        if finite.sum() == 0:
            return
        error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        if error > tolerance * (1 + scale):
            raise Finding(f"{name} differs by {error:.3g} from the call in float64, of values up to {scale:.3g}")

    def check_shapes(self, found: Any) -> None:
        """What a call gave is what the operator's shape function says."""
        if not self.target.has_shape_function:
            return
        try:
            expected = self.target.call(**map_tensors(lambda t: t.new_empty(t.shape, device="meta"), self.arguments))
        except SHAPE_ERRORS as error:
            if self.valid:
                raise Finding(f"the shape function refuses what the operator took: {error!r}") from error
            return
        for i, (a, b) in enumerate(zip(tensors_of(found), tensors_of(expected), strict=True)):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise Finding(f"result {i} is {describe(a)}, but the shape function says {describe(b)}")


# ---- processes ----


def child(first: int, count: int, chosen: list[str] | None, progress: Path) -> int:
    """Makes the calls of ``count`` seeds; ``progress`` holds the one that runs. Returns the exit status."""
    if not os.environ.get("ASAN_OPTIONS") and not os.environ.get("TSAN_OPTIONS"):  # whose shadow needs terabytes
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (3 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    faulthandler.enable()
    every = targets()
    selected = {name: every[name] for name in chosen or every}
    status = 0
    with progress.open("w") as file:
        for seed in range(first, first + count):
            file.seek(0)
            file.write(f"{seed}\ngenerating arguments")
            file.truncate()
            file.flush()
            call = Call(seed, selected)
            file.seek(0)
            file.write(f"{seed}\n{call}")
            file.truncate()
            file.flush()
            try:
                call.make()
            except Finding as finding:
                status = FOUND
                print(f"seed {seed}: {finding}\n  {call}", flush=True)
    return status


def run(first: int, count: int, chosen: list[str] | None, patience: float) -> int:
    """Makes the calls in child processes. Returns how many processes found something."""
    findings, end = 0, first + count
    options = list(itertools.chain.from_iterable(("--operator", name) for name in chosen or []))
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        while first < end:
            calls = min(CHUNK, end - first)
            progress.write_text(f"{first}\nimporting")
            command = [sys.executable, __file__, "--seed", str(first), "--calls", str(calls), *options]
            process = subprocess.Popen([*command, "--child", str(progress)])
            hung = False
            while process.poll() is None:
                time.sleep(0.02)
                if time.time() - progress.stat().st_mtime > patience:
                    hung = True
                    process.send_signal(6)  # faulthandler prints where it hangs
                    time.sleep(1)
                    process.kill()
                    process.wait()
            if process.returncode == 0:
                first += calls
                continue
            findings += 1
            if process.returncode == FOUND and not hung:
                first += calls
                continue
            seed, call = progress.read_text().split("\n", 1)
            print(f"seed {seed}: {'hung' if hung else f'ended with status {process.returncode}'}\n  {call}")
            again = f"{sys.executable} {__file__} {' '.join(options)}"
            print(f"  {again} --seed {seed} --calls 1\n  after the calls before it:", flush=True)
            print(f"  {again} --seed {first} --calls {int(seed) - first + 1}", flush=True)
            first = int(seed) + 1
    return findings


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="how many (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next has the next (default: 0)")
    parser.add_argument(
        "--operator",
        action="append",
        help="call only this one; may be given again",
    )
    parser.add_argument("--patience", type=float, default=120, help="seconds until a call hangs (default: 120)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(options.seed, options.calls, options.operator, options.child)
    known = targets()
    for name in options.operator or []:
        if name not in known:
            parser.error(f"there is no operator {name!r}; there are {', '.join(known)}")
    begin = time.monotonic()
    findings = run(options.seed, options.calls, options.operator, options.patience)
    elapsed, last = time.monotonic() - begin, options.seed + options.calls - 1
    print(f"{options.calls} calls, seeds {options.seed} to {last}, in {elapsed:.0f} s: {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
