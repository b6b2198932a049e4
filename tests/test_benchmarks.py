"""The harness tells a kernel of ours from a call to torch's, and its report says what was measured."""

import json
import pathlib
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import seqaccel

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent)]

import gpu_peers  # noqa: E402
import harness  # noqa: E402

from benchmarks import compare, pages, plots, records  # noqa: E402

SUITE = """
import torch
from harness import Case, suite

@suite([dict(n=96)], ["seqaccel[cpp]", "torch", "absent"])
def bench_product(n):
    a, b = torch.randn(n, n), torch.randn(n, n)
    contenders = {"seqaccel[cpp]": lambda: a @ b, "torch": lambda: [a @ b for _ in range(20)][0]}
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


def test_contenders_of_one_job_are_compared():
    x = torch.randn(3, 4)

    def check(theirs, **options):
        contenders = {"seqaccel[cpp]": lambda: (x, [2 * x]), "torch": lambda: theirs}
        harness.assert_parity(harness.Case(contenders, flops=1, bytes=1, **options))

    check((x + 1e-6, [2 * x]))
    check((x + 1, [2 * x]), same=())
    check((x + 1e-2, [2 * x]), dtype=torch.bfloat16)
    for wrong in ((x + 1, [2 * x]), (x, [2 * x + 1e-2]), (x,), None):
        with pytest.raises(AssertionError):
            check(wrong)


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
    assert all("data" not in row["stats"] for row in data["benchmarks"])

    def report(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.report", *arguments]
        return subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)

    done = report(str(tmp_path / "out.json"), "--markdown", "--plots", str(tmp_path / "plots"))
    assert done.returncode == 0, done.stderr
    assert "| product[n=96] | seqaccel[cpp] |" in done.stdout
    done = report(str(tmp_path / "bench_it.py"))
    assert done.returncode != 0 and done.stderr.count("\n") == 1


def record(
    ratios: dict[str, float], path: pathlib.Path, scale: float = 1.0, date: str = "2026-01-01T00:00", **more: object
) -> pathlib.Path:
    """A record whose cases took torch as many times as long; ``more`` goes into each row."""
    rows = []
    for case, ratio in ratios.items():
        suite, _, size = case.rstrip("]").partition("[")
        for contender, seconds in (("seqaccel[cpp]", 1e-3), ("torch", ratio * 1e-3)):
            info = {
                "contender": contender, "ours": "seqaccel[cpp]", "suite": suite, "size": size, "device": "cpu",
                "seconds": scale * seconds, "speed_of_ours_over_this": seconds / 1e-3, "quartiles_of_speed": [1.0, 2.0],
                "tflops": 0.1, "gbytes_per_s": 9.0, "percent_of_ceiling": 50.0, "bound": "compute", "void": False,
                "flops": 1e8, "bytes": 1e6, "ceilings_before": dict(gemm=2e11, copy=2e10, cache=1e11),
                "ceilings_after": dict(gemm=2e11, copy=2e10, cache=1e11),
            }  # fmt: skip
            rows.append({"group": case, "fullname": "benchmarks/bench_rnn.py::x", "extra_info": info | more})
    cpu = {"brand_raw": "AMD EPYC", "family": 25, "model": 17}
    machine = {"cpu": cpu, "seqaccel": {"threads": 2, "isa": "avx2", "gpu": None}}
    path.write_text(json.dumps({"benchmarks": rows, "machine_info": machine, "datetime": date}))
    return path


def test_compare_finds_what_fell_against_torch(tmp_path, capsys):
    old = record({"a[n=1]": 2.0, "a[n=2]": 1.0, "b[n=1]": 4.0}, tmp_path / "old.json")
    slower_machine = record({"a[n=1]": 2.1, "a[n=2]": 0.95, "c[n=1]": 9.0}, tmp_path / "new.json", scale=3.0)
    assert compare.main([str(old), str(slower_machine)]) == 0
    out = capsys.readouterr().out
    assert "2 cases in both, 2 in one only: new/old 0.999" in out and "differs by 5% in either direction" in out
    assert compare.main([str(old), str(slower_machine), "--threshold", "0.04"]) == 1
    assert "a[n=2] over torch: 1.00 -> 0.95 (-5%)" in capsys.readouterr().out
    void = record({"a[n=1]": 1.0}, tmp_path / "void.json", void=True)
    with pytest.raises(SystemExit, match="no sound case in common"):
        compare.main([str(old), str(void)])


def test_compare_takes_the_committed_records_of_the_processor(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    new = record({"a[n=1]": 1.0, "b[n=1]": 1.0}, tmp_path / "new.json")
    with pytest.raises(SystemExit, match="amd-epyc-25-17 has no record to compare with"):
        compare.main([str(new)])
    folder = tmp_path / "amd-epyc-25-17"
    folder.mkdir()
    record({"a[n=1]": 8.0, "b[n=1]": 1.0}, folder / "2025-12-31-z.json", date="2025-12-31T00:00")
    record({"a[n=1]": 2.0}, folder / "2025-12-31-a.json", date="2025-12-31T09:00")
    record({"a[n=1]": 1.0}, folder / "new.json")
    assert compare.main([str(folder / "new.json")]) == 1  # it is no baseline of itself
    out = capsys.readouterr().out
    assert "a[n=1] over torch: 2.00 -> 1.00 (-50%)" in out and "1 cases in both, 1 in one only" in out


def test_figures_are_drawn_from_a_record(tmp_path):
    ratios = {f"{suite}[B={B},H={H},T=128]": 1.5 for suite in plots.HEAT for B in (1, 4) for H in (128, 256)}
    ratios |= {f"sequence_length[T={T}]": 2.0 for T in (128, 512)} | {"session_step[cell=LSTM,B=1,H=128]": 3.0}
    written = plots.write(records.read(record(ratios, tmp_path / "r.json")), tmp_path)
    assert [path.name for path in written] == ["heat_map.png", "roofline.png", "sequence_length.png", "streaming.png"]


def test_tables_of_pages_are_made_from_records(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    record({"a[B=2,H=16]": 2.0, "a[B=16,H=2]": 8.0}, tmp_path / "here" / "1.json")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    pages.record.cache_clear()
    text = pages.filled(
        "before\n<!-- table: here a -->\nold\n<!-- end -->\n<!-- means: here a -->\n<!-- end -->\nafter\n"
    )
    assert "| B=2, H=16 | 1 ms | 2 ms (2.00×) | 50% |\n| B=16, H=2 | 1 ms | 8 ms (8.00×) | 50% |" in text
    assert "| a | 2 | 4.00 (2.00) | – | 50% (50%) |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n") and pages.filled(text) == text
    with pytest.raises(SystemExit, match="no sound case of b"):
        pages.filled("<!-- table: here b -->\n<!-- end -->")
    pages.record.cache_clear()


def test_tables_in_the_documentation_are_those_of_the_records():
    assert all(pages.MARKED.search(page.read_text()) for page in pages.PAGES)
    assert pages.main(["--check"]) == 0


def flashrnn_by_its_documentation(Wx, R, b, states=None, function="lstm", backend="cuda_fused", dtype="bfloat16"):
    """Wx (B, T, G, 1, H), R (G, 1, H, H), b (G, 1, H): h (1, B, T, 1, H), and the last."""
    w, R, b = Wx.squeeze(3), R.squeeze(1), b.squeeze(1)
    h, c, outputs = torch.zeros_like(w[:, 0, 0]), 0, []
    for w_t in w.unbind(1):
        r_t = torch.einsum("bp,gdp->bgd", h, R)
        if function == "lstm":
            i, f, z, o = (w_t + r_t + b).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
        elif function == "gru":
            n, r, z = r_t[:, 0] + b[0], *(w_t[:, :2] + r_t[:, 1:] + b[1:3]).sigmoid().unbind(1)
            h = z * h + (1 - z) * torch.tanh(w_t[:, 2] + b[3] + r * n)
        else:
            h = torch.tanh(w_t + r_t + b).squeeze(1)
        outputs.append(h)
    states = torch.stack(outputs, 1)[None, :, :, None]
    return states, states[:, :, -1:]


def test_peers_on_a_gpu_are_called_as_documented(monkeypatch):
    def provide(path, **names):
        monkeypatch.setitem(sys.modules, path, types.SimpleNamespace(**names))

    def convolution(x, weight, bias, activation):
        context = weight.shape[1] - 1
        return F.silu(F.conv1d(F.pad(x, (context, 0)), weight[:, None], bias, groups=len(weight)))

    def of_rows(x, weight, bias, activation):
        return convolution(x.mT, weight, bias, activation).mT, None

    def scan(x, g):
        return seqaccel.functional.linear_scan(g.exp(), x), None

    monkeypatch.setattr(gpu_peers, "present", lambda package: package != "torchrl")
    for package in ("flashrnn", "fla", "fla.ops", "fla.modules"):
        provide(package, __path__=[])
    provide("flashrnn.flashrnn", flashrnn=flashrnn_by_its_documentation)
    provide("fla.ops.hgrn", chunk_hgrn=scan)
    provide("fla.modules.convolution", causal_conv1d=of_rows)
    provide("causal_conv1d", causal_conv1d_fn=convolution)

    for stock in (torch.nn.LSTM(5, 6), torch.nn.GRU(5, 6), torch.nn.RNN(5, 6)):
        x, grad = torch.randn(7, 2, 5, requires_grad=True), torch.randn(7, 2, 6)

        def make(module, x=x, grad=grad):
            return lambda: torch.autograd.grad(module(x)[0], [x, *module.parameters()], grad)

        assert set(gpu_peers.flashrnn(stock, make, make(stock)())) == {"flashrnn"}
        assert set(gpu_peers.flashrnn(stock, lambda module, x=x: lambda: module(x), stock(x)[:1])) == {"flashrnn"}

    a, b = torch.rand(2, 7, 3).requires_grad_(), torch.randn(2, 7, 3, requires_grad=True)
    grad = torch.randn(2, 7, 3)
    grads = torch.autograd.grad(seqaccel.functional.linear_scan(a, b), (a, b), grad)
    assert len(gpu_peers.scan(a, b, grad, grads)) == 1

    tensors = [torch.randn(s, requires_grad=True) for s in ((2, 3, 7), (3, 1, 4), (3,))]
    y = seqaccel.functional.causal_conv1d(*tensors, groups=3, activation="silu")
    grad = torch.randn(y.shape)
    grads = torch.autograd.grad(y, tensors, grad)
    assert set(gpu_peers.depthwise(*tensors, grad, grads)) == {"causal-conv1d", "flash-linear-attention"}
    with pytest.raises(AssertionError, match="causal-conv1d is"):
        gpu_peers.depthwise(*tensors, grad, [-g for g in grads])
    provide("causal_conv1d", causal_conv1d_fn=None)
    with pytest.warns(UserWarning, match="causal-conv1d is left out: TypeError"):
        assert len(gpu_peers.depthwise(*tensors, grad, grads)) == 1
