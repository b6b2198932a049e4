"""No call of an operator and no training step of a module loses memory."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import pickle
import random
from collections.abc import Callable

import pytest
import session_cases
import torch
from fuzz_cases import GENERATORS, MODULES, Arguments, inputs_of, operators, tensors_of

import seqaccel

CALLS = 2000
ALLOWED = 8 * CALLS  # bytes

OPERATORS = operators()


class MallocInfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bytes_in_use() -> int:
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs mallinfo2 of glibc 2.33 or later")
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def lost(function: Callable[[], object], calls: int = CALLS) -> int:
    """Bytes that so many calls do not give back, the second time too: what others make once does not count."""
    for _ in range(100):  # what is made once: pools, tables, caches
        function()
    found = []
    for _ in range(2):
        before = bytes_in_use()
        for _ in range(calls):
            function()
        found.append(bytes_in_use() - before)
    return min(found)


def examples(name: str) -> list[Arguments]:
    """The smallest valid call that does something, of each cell where the operator has cells."""
    smallest: dict[object, tuple[int, Arguments]] = {}
    for seed in range(100 if "cell" in GENERATORS[name](random.Random(0)) else 10):
        arguments = GENERATORS[name](random.Random(seed))
        sizes = [t.numel() for t in tensors_of(arguments)]
        cell = arguments.get("cell")
        if all(sizes) and (cell not in smallest or sum(sizes) < smallest[cell][0]):
            smallest[cell] = sum(sizes), arguments
    return [arguments for _, arguments in smallest.values()]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_lose_no_memory(name):
    for arguments in examples(name):
        assert lost(lambda arguments=arguments: OPERATORS[name].call(**arguments)) <= ALLOWED, arguments.get("cell")


def test_refused_calls_lose_no_memory():
    arguments = {"input": torch.randn(4), "function": "a name that is too long for a small string"}

    def refused() -> None:
        with pytest.raises(RuntimeError):
            torch.ops.seqaccel.elementwise(**arguments)

    assert lost(refused) <= ALLOWED


def test_modules_are_all_here():
    public = {name for name in seqaccel.nn.__all__ if issubclass(getattr(seqaccel.nn, name), torch.nn.Module)}
    assert public == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_training_steps_lose_no_memory(name):
    make, shape = MODULES[name]
    module, x = make(), torch.randn(shape, requires_grad=True)
    inputs = inputs_of(name, x)

    def step() -> None:
        output = module(*inputs)
        (output if isinstance(output, torch.Tensor) else output[0]).sum().backward()
        x.grad = None
        module.zero_grad()

    assert lost(step) <= ALLOWED


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_sessions_lose_no_memory(weights):
    module = torch.nn.Sequential(
        seqaccel.nn.LSTM(4, 5), seqaccel.nn.SRUpp(5, 6, 2, 1), seqaccel.nn.HierarchicalAttention(6, 2)
    )
    make = functools.partial(seqaccel.Session, module, 2, weights, memory_length=3)
    session, x = make(), torch.randn(2, 4)
    assert lost(lambda: session.step(x)) <= ALLOWED
    assert lost(make) <= ALLOWED
    assert lost(lambda: copy.copy(session.fork(3))) <= ALLOWED
    assert lost(lambda: pickle.loads(pickle.dumps(session))) <= ALLOWED


@pytest.mark.parametrize("name", session_cases.SESSIONS)
def test_sessions_of_any_model_lose_no_memory(name, tmp_path):
    session, x, path = session_cases.session(name, "float32", 2), torch.randn(2, 4), tmp_path / "session"

    def through_a_file() -> None:
        session.save(path)
        seqaccel.Session.load(path)

    assert lost(lambda: session.step(x)) <= ALLOWED
    assert lost(lambda: copy.copy(session.fork(3))) <= ALLOWED
    slow = [through_a_file, lambda: pickle.loads(pickle.dumps(session))]
    if name == "list":  # tracing runs torch's own compiler
        slow.append(lambda: session_cases.make(name))
    for function in slow:
        assert lost(function, CALLS // 10) <= ALLOWED // 10
