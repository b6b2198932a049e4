"""The harness tells a kernel of ours from a call to torch's, and its report says what was measured."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness  # noqa: E402

SUITE = """
import torch
from harness import Case, suite

@suite([dict(n=96)], ["seqaccel[cpp]", "torch", "absent"])
def bench_product(n):
    a, b = torch.randn(n, n), torch.randn(n, n)
    contenders = {"seqaccel[cpp]": lambda: a @ b, "torch": lambda: [a @ b for _ in range(20)]}
    return Case(contenders, flops=2 * n**3, bytes=12 * n * n)

@suite([dict()], ["seqaccel[cpp]"])
def bench_pretence():
    x, w = torch.randn(1, 1, 8), torch.randn(1, 1, 2)
    return Case({"seqaccel[cpp]": lambda: torch.nn.functional.conv1d(x, w)}, flops=1, bytes=1)
"""


def test_own_kernels_are_told_from_torch_operators():
    x, lstm = torch.randn(3, 1, 4), torch.nn.LSTM(4, 4)
    harness.assert_own_kernels(lambda: x.sigmoid() @ x.mT)
    for function in (lambda: lstm(x), lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x)):
        with pytest.raises(AssertionError, match="torch's own operators do the job"):
            harness.assert_own_kernels(function)


def test_figures_ratios_and_void_runs():
    case = harness.Case({"seqaccel[cpp]": print, "torch": print}, flops=4e9, bytes=1e6)
    still, slow = harness.Ceilings(100e9, 10e9, 50e9), harness.Ceilings(80e9, 10e9, 50e9)
    times = {"seqaccel[cpp]": [0.1, 0.2, 0.4], "torch": [0.3, 0.5]}
    measured = harness.Measured(case, times, still, still, 1)
    assert measured.figure("seqaccel[cpp]") == 0.2 and measured.figure("torch") == 0.3
    ours, stock = (measured.record(name) for name in times)
    assert stock["speed_of_ours_over_this"] == pytest.approx(1.5)
    assert stock["fastest_over_fastest"] == pytest.approx(3)
    assert ours["tflops"] == pytest.approx(0.02) and ours["gbytes_per_s"] == pytest.approx(0.005)
    assert ours["percent_of_ceiling"] == pytest.approx(20) and ours["bound"] == "compute"
    assert ours["backend"] == "cpp" and not ours["void"]
    assert harness.Measured(case, times, still, slow, 1).void


@pytest.mark.timed
def test_suite_writes_a_record_that_the_report_reads(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # with it pytest-benchmark measures nothing
    (tmp_path / "bench_it.py").write_text(SUITE)
    for name in ("harness.py", "conftest.py"):
        (tmp_path / name).write_text((BENCHMARKS / name).read_text())
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npython_files = bench_*.py\npython_functions = bench_*\nmarkers = gpu\nfilterwarnings = ignore:void\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--seconds=0.05", "--benchmark-json=out.json", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed, 1 skipped" in done.stdout
    assert "torch's own operators do the job: aten::_convolution" in done.stdout
    data = json.loads((tmp_path / "out.json").read_text())
    assert set(data["cases"]) == {"product[n=96]"}
    assert data["cases"]["product[n=96]"]["ratios"]["torch"] > 1.2
    assert data["machine_info"]["seqaccel"]["torch"] == torch.__version__
    report = [sys.executable, str(BENCHMARKS / "report.py")]
    done = subprocess.run(
        [*report, "out.json", "--markdown", "--plots", "plots"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| product[n=96] | seqaccel[cpp] |" in done.stdout
    assert (tmp_path / "plots" / "product.png").exists() or "void" in done.stdout
    done = subprocess.run([*report, "bench_it.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
