"""Shared set-up of the tests: the installed package, no GPU or a GPU, threads, seeds, poisoned memory."""

from __future__ import annotations

import fcntl
import gc
import os
import pathlib

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by @triton.jit, hence before any kernel is imported

try:
    import seqaccel
except ImportError as error:
    pytest.exit(f"seqaccel is not installed here ({error}); run: pip install -e . --no-build-isolation", returncode=2)

if not os.environ.get("SEQACCEL_NO_EXTENSIONS") and not any(pathlib.Path(seqaccel.__file__).parent.glob("_C*.so")):
    pytest.exit(
        "seqaccel was installed without its extension; run: pip install -e . --no-build-isolation", returncode=2
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped where there is none")
    config.addinivalue_line("markers", "timed: measures time; no other worker runs a test meanwhile")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def collect_and_freeze() -> None:
    """What is alive now stays, modules mostly: the next ``gc.collect()`` passes over it (0.3 s with torch)."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    collect_and_freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton's binding reports what is alive at the end


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    """A test marked ``timed`` runs alone: it has a lock that the other workers' tests share."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    folder = item.config.cache.mkdir("timed")
    with open(folder / "gate", "w") as gate, open(folder / "tests", "w") as tests:
        timed = item.get_closest_marker("timed") is not None
        fcntl.flock(gate, fcntl.LOCK_EX)  # whoever waits for the tests under way holds it, and no test begins
        fcntl.flock(tests, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
        if not timed:
            fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            for lock in (tests, gate):  # a child that lives on has them too
                fcntl.flock(lock, fcntl.LOCK_UN)


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Every test runs with two threads: enough to find a race, the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _set_tf32(products: bool, cudnn: bool) -> None:
    with torch.backends.__allow_nonbracketed_mutation():  # torch.testing._internal, where it is imported, locks them
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, cudnn


@pytest.fixture
def allow_tf32():
    """Sets torch's TF32 switches, of matrix products and of cuDNN, for a test."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield lambda allow: _set_tf32(allow, allow)
    _set_tf32(*before)


@pytest.fixture
def poison():
    """Fresh memory holds NaN: what ``torch.empty`` returns, and what the allocator hands out for a while.

    An output element that a kernel does not write, or a workspace element it reads before writing, shows as a NaN.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    collect_and_freeze()
    blocks = [torch.full((1 << power,), float("nan")) for power in range(4, 22) for _ in range(3)]
    del blocks
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "this torch does not fill fresh memory"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
