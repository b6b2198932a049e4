"""A session's step allocates nothing in its kernels: every call of malloc by our library and OpenMP's is counted."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from seqaccel import _extension

HERE = pathlib.Path(__file__).parent
COMPILER = shutil.which(os.environ.get("CC", "cc"))

COUNT = """
import ctypes, torch, seqaccel
from seqaccel import nn

torch.set_num_threads(2)
counter = ctypes.CDLL(None)
counter.watch.argtypes = [ctypes.c_size_t] * 2


def lines():
    with open("/proc/self/maps") as file:
        return [line.split() for line in file]


NETWORKS = {
    "tcn": lambda: nn.TCN(6, [8, 8], 3),
    "wide": lambda: nn.TCN(64, [64] * 4, 3),
    "depthwise": lambda: nn.CausalConv1d(6, 6, 3, groups=6),
    "wavenet": lambda: nn.WaveNet(6, 4, 8, 8, layers=3),
    "lstm": lambda: nn.LSTM(6, 200, num_layers=2),
    "layer norm": lambda: nn.LayerNormLSTM(6, 9),
    "gru": lambda: nn.GRU(6, 9),
    "sru": lambda: nn.SRU(6, 9),
    "attention": lambda: nn.HierarchicalAttention(8, 2, block_size=4, pool_query=1, rotary_base=10.0),
    "transformer": lambda: nn.HierarchicalAttentionEncoder(64, 4, 2, 128, positions="learned", block_size=8),
    "added": lambda: torch.nn.Sequential(
        seqaccel.Concatenation(torch.nn.Identity(), seqaccel.Residual(nn.LSTM(6, 6))), torch.nn.Linear(12, 3)
    ),
    "mixed": lambda: torch.nn.Sequential(
        nn.CausalConv1d(6, 8, 3), torch.nn.GELU(), nn.LSTM(8, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 4)
    ),
}
for name in ("seqaccel/_C", "libgomp"):
    found = [place for *_, place in lines() if name in place]
    for place in set(found):
        ranges = [[int(at, 16) for at in line[0].split("-")] for line in lines() if line[-1] == place]
        counter.watch(min(begin for begin, _ in ranges), max(end for _, end in ranges))
for name, make in NETWORKS.items():
    module = make().eval()
    for weights in ("float32", "bfloat16", "int8"):
        for batch in (1, 9):
            before = counter.allocations()
            session = seqaccel.Session(module, batch, weights)
            x_t = torch.randn(session._step_shape)
            session.step(x_t)
            assert counter.allocations() > before, "the counter sees a session's own memory"
            before = counter.allocations()
            for _ in range(20):
                session.step(x_t)
            session.step(x_t, advance=torch.zeros(batch, dtype=torch.bool))
            print(name, weights, batch, counter.allocations() - before)
"""


@pytest.mark.skipif(_extension.cpp_error is not None, reason="no C++ kernels")
@pytest.mark.skipif(COMPILER is None or not sys.platform.startswith("linux"), reason="needs a compiler and glibc")
def test_a_step_allocates_nothing(tmp_path):
    library = tmp_path / "allocations.so"
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", HERE / "allocations.c", "-o", library], check=True)
    given = {**os.environ, "LD_PRELOAD": str(library)}
    run = subprocess.run([sys.executable, "-c", COUNT], env=given, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    rows = run.stdout.splitlines()
    assert len(rows) == 72
    assert [row for row in rows if not row.endswith(" 0")] == []
