"""Peak memory of attention, each job in a process of its own."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.memory import peak

# The broadcast form holds at least the tanh (B, Tq, Tk, H) and its gradient at one time.
BROADCAST = 2 * 4 * 16 * 50 * 400 * 512
OPERANDS = 4 * 4 * 4 * 131072 * 64  # query, key, value and output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("job", "bound"),
    [("additive attention, training", 0.1 * BROADCAST), ("hierarchical attention, inference", 0.04 * OPERANDS)],
)
def test_peak_memory(job, bound):
    assert 0 < peak(job) <= bound
