"""Programs of one launch that wait for each other, in Triton's interpreter, which runs one after the other.

Each program is a thread of which one runs at a time; where the kernel waits, counts itself in, or reads what others
stored, another may take over, by chance. Only so many are resident, as on a GPU: one that has begun is never put aside
for one that has not.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading

import triton.language as tl
from triton.runtime import interpreter

from seqaccel.kernels.rnn import persistent


class Deadlock(RuntimeError):
    """Every resident program waits."""


class _Program(threading.Thread):
    def __init__(self, place, run):
        super().__init__(daemon=True)
        self.place, self.go, self.waits, self.error = place, threading.Semaphore(0), False, None
        self._run = run

    def run(self):
        self.go.acquire()
        try:
            self._run()
        except BaseException as error:
            self.error = error


class Scheduler:
    """Runs the programs of each launch; ``resident``: how many have room at once, None: all."""

    def __init__(self, seed: int, resident: int | None = None):
        self.random, self.resident = random.Random(seed), resident
        self.current, self.back = None, threading.Semaphore(0)

    def launch(self, grid, run):
        waiting = [_Program(place, run) for place in itertools.product(*map(range, grid))]
        running: list[_Program] = []
        while waiting or running:
            while waiting and (self.resident is None or len(running) < self.resident):
                running.append(waiting.pop(0))
                running[-1].start()
            able = [program for program in running if not program.waits]
            if not able:
                raise Deadlock(f"{len(running)} of {len(running) + len(waiting)} programs wait")
            program = self.current = self.random.choice(able)
            interpreter.interpreter_builder.set_grid_idx(*program.place)
            program.go.release()
            while program.is_alive() and not self.back.acquire(timeout=0.001):
                pass
            if program.error is not None:
                raise program.error
            if not program.is_alive():
                running.remove(program)

    def switch(self):
        """Another program may go on."""
        program = self.current
        self.back.release()
        program.go.acquire()

    def arrive(self, p_arrived):
        self.switch()
        tl.atomic_add(p_arrived, 1)
        for program in threading.enumerate():
            if isinstance(program, _Program):
                program.waits = False
        self.switch()

    def wait(self, p_arrived, count):
        while (tl.load(p_arrived) < count).handle.data.item():
            self.current.waits = True
            self.switch()
        self.switch()


def interleave(monkeypatch, scheduler: Scheduler, waits: bool = True) -> None:
    """From here on, launches run their programs by ``scheduler``; without ``waits`` none waits for another."""
    product = persistent.cooperative_product

    def cooperative_product(*arguments, **options):
        scheduler.switch()
        found = product(*arguments, **options)
        scheduler.switch()
        return found

    def call(self, *arguments, **options):
        known = inspect.getfullargspec(self.fn)
        options = {k: v for k, v in options.items() if k in known.args or k in known.kwonlyargs}
        scope = interpreter._patch_lang(self.fn)
        try:
            given = inspect.getcallargs(self.fn, *arguments, **options)
            given = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
            grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
            interpreter.interpreter_builder.set_grid_dim(*grid)
            scheduler.launch(grid, lambda: self.fn(**given))
        finally:
            scope.restore()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    monkeypatch.setattr(persistent, "arrive", scheduler.arrive)
    monkeypatch.setattr(persistent, "wait", scheduler.wait if waits else lambda p_arrived, count: scheduler.switch())
    monkeypatch.setattr(persistent, "cooperative_product", cooperative_product)
