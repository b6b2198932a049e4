"""Peak memory of attention, each case in a process of its own: what a process has freed before would hide it."""

import subprocess
import sys

import pytest

MEASURE = """
import gc, sys, torch, seqaccel

def kilobytes(field):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(field)).split()[1])

def peak(run, inputs):  # bytes beyond inputs, outputs and gradients
    grads = run(inputs(True))  # threads and code, at a small size
    leaves = inputs(False)
    before = kilobytes("VmRSS:")
    results = run(leaves)
    return (kilobytes("VmHWM:") - before) * 1024 - sum(t.nbytes for t in results)
"""

ADDITIVE = """
def inputs(small):
    B, Tq, Tk, H = (2, 4, 4, 16) if small else (16, 50, 400, 512)
    return [torch.randn(*s, requires_grad=True) for s in ((B, Tq, H), (B, Tk, H), (B, Tk, H), (H,))]

def run(leaves):
    out = seqaccel.functional.additive_attention(*leaves)
    return out.detach(), *torch.autograd.grad(out.sum(), leaves)
"""

HIERARCHICAL = """
def inputs(small):
    return [torch.randn(1, 4, 256 if small else 131072, 64, requires_grad=True) for _ in range(3)]

def run(leaves):
    with torch.no_grad():
        return (seqaccel.functional.hierarchical_attention(*leaves),)
"""

# The broadcast form holds at least the tanh (B, Tq, Tk, H) and its gradient at one time.
BROADCAST = 2 * 4 * 16 * 50 * 400 * 512
OPERANDS = 4 * 4 * 4 * 131072 * 64  # query, key, value and output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("case", "bound"), [(ADDITIVE, 0.1 * BROADCAST), (HIERARCHICAL, 0.04 * OPERANDS)], ids=["additive", "hierarchical"]
)
def test_peak_memory(case, bound):
    program = f"{MEASURE}{case}\nprint(peak(run, inputs))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= bound
