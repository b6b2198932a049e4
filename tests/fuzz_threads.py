"""Calls every C++ operator, and sessions, from several Python threads at once; the results must be those of one thread.

Made for the thread sanitizer ("make sanitize"), under which it also reports what two threads touch without an order:

    python tests/fuzz_threads.py --calls 200 --threads 4 --openmp 2
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fuzz_cases import GENERATORS, describe, map_tensors, operators, tensors_of
from torch import Tensor

import seqaccel

Job = tuple[str, Callable[[], Any]]  # a description, and what gives tensors


def operator_jobs(count: int, seed: int) -> list[Job]:
    every = {name: operator for name, operator in operators().items() if name != "set_isa"}  # the whole process's
    jobs: list[Job] = []
    for number in range(seed, seed + count):
        rng = random.Random(number)
        torch.manual_seed(number)
        name = rng.choice(list(every))
        operator, arguments = every[name].call, GENERATORS[name](rng)

        def call(operator=operator, arguments=arguments) -> list[Tensor]:
            own = map_tensors(Tensor.clone, arguments)  # an operator may write to one
            return tensors_of([operator(**own), own])

        jobs.append((f"seed {number}: {name}({describe(arguments)})", call))
    return jobs


def session_jobs(shared: dict[str, seqaccel.Session], module: torch.nn.Module) -> list[Job]:
    """Sessions of each thread's own over the same module, and over the same packed weights."""
    xs = torch.randn(4, 3, 2, 5)

    def steps(weights: str, forked: bool) -> list[Tensor]:
        session = shared[weights].fork(2) if forked else seqaccel.Session(module, 2, weights)
        found = [session.extend(x) for x in xs]
        session.reset(torch.tensor([True, False]))
        session.load_state_dict(session.state_dict())
        return [*found, copy.copy(session).step(xs[0, 0]), session.step(xs[0, 0])]

    return [
        (f"a session of its own, {weights}, forked: {forked}", functools.partial(steps, weights, forked))
        for weights in shared
        for forked in (False, True)
    ]


def differs(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True))


def run(jobs: list[Job], shared: dict[str, seqaccel.Session], threads: int, openmp: int) -> list[str]:
    """What went wrong."""
    torch.set_num_threads(openmp)
    expected = [call() for _, call in jobs]
    wrong: list[str] = []
    start = threading.Barrier(threads)

    def work(thread: int) -> None:
        torch.set_num_threads(openmp)
        start.wait()
        order = list(range(len(jobs)))
        random.Random(thread // 2).shuffle(order)  # two threads at a time make the same calls
        for i in order:
            try:
                if differs(jobs[i][1](), expected[i]):
                    wrong.append(f"another result in thread {thread}: {jobs[i][0]}")
                for session in shared.values():  # whose results depend on who came first
                    session.step(torch.ones(2, 5))
                    session.state_dict()
            except Exception as error:
                wrong.append(f"{error!r} in thread {thread}: {jobs[i][0]}")

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="of each thread (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first call (default: 0)")
    parser.add_argument("--threads", type=int, default=4, help="Python threads (default: 4)")
    parser.add_argument("--openmp", type=int, default=2, help="OpenMP threads of each call (default: 2)")
    options = parser.parse_args(arguments)
    module = torch.nn.Sequential(seqaccel.nn.LSTM(5, 20), torch.nn.Linear(20, 3))
    shared = {weights: seqaccel.Session(module, 2, weights) for weights in ("float32", "bfloat16", "int8")}
    jobs = operator_jobs(options.calls, options.seed) + session_jobs(shared, module)
    wrong = run(jobs, shared, options.threads, options.openmp)
    print("\n".join(wrong))
    print(f"{len(jobs)} calls in each of {options.threads} threads: {len(wrong)} findings")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
