"""The script that runs other packages' models before and after ``convert``: its checks, record and table."""

import functools
import json
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import package_models, packages  # noqa: E402

ALONE = [name for name, row in package_models.MODELS.items() if row.needs is None]


@pytest.fixture
def one_thread():
    """Two threads would wait for each other where the machine is busy, and the figures do not matter."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_models_without_a_package(one_thread, tmp_path, capsys, monkeypatch):
    for name, build in zip(ALONE, (package_models.language_model, package_models.causal_convolutions), strict=True):
        monkeypatch.setitem(packages.MODELS, name, package_models.Row(functools.partial(build, 8), None))
    record = tmp_path / "cpu" / "packages.json"
    assert packages.main([*ALONE, "--seconds", "0.01", "--optimize", "--report", "--json", str(record)]) == 0
    assert "lstm: torch.nn.LSTM → seqaccel.nn.LSTM" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads(record.read_text())["rows"]}
    assert list(rows) == ALONE and len(ALONE) == 2
    for row in rows.values():
        assert row["converted"] and not row["left"] and not row["problem"]
        assert row["output_error"] < 1e-5 and row["loss_error"] < 1e-5
        assert all(seconds > 0 for what in ("inference", "training", "optimized") for seconds in row[what])
    assert packages.main(["--table", str(record)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| torch: LSTM language model | 3 layers of 8")


def test_the_page_has_the_table_of_the_record(capsys):
    (record,) = (ROOT / "benchmarks" / "results").glob("*/packages/*.json")
    assert packages.main(["--table", str(record)]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "benchmarks.md").read_text()
    for result in packages.read(record).values():
        assert not result.problem and result.converted
        assert min(result.inference.ratio, result.training.ratio) >= 0.97


def test_a_package_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(packages.MODELS, "absent: Model", package_models.Row(print, "no_such_package.models"))
    assert packages.main(["absent: Model", "--json", str(tmp_path / "none.json")]) == 0
    assert "not installed" in capsys.readouterr().out and not (tmp_path / "none.json").exists()
    assert packages.main(["no such model"]) == 2
    assert "absent: Model" in capsys.readouterr().out


def test_what_differs_is_a_problem():
    class Wrong(torch.nn.LSTM):
        def forward(self, *args):
            y, state = super().forward(*args)
            return y + (type(self) is not Wrong) * 0.1, state

    net, x = Wrong(3, 4), torch.randn(5, 2, 3)
    subject = package_models.Subject(net, (x,), lambda: net(x)[0].sum(), "")
    result = packages.measured("wrong", subject, 0)
    assert result.problem.startswith("outputs differ by") and type(net) is Wrong
    assert packages.difference([torch.ones(2)], [torch.ones(3)]) == float("inf")


@pytest.mark.parametrize("name", sorted({row.needs for row in package_models.MODELS.values() if row.needs}))
def test_requirements_name_every_package(name):
    text = (pathlib.Path(packages.__file__).parent / "packages.txt").read_text()
    assert name.partition(".")[0].replace("_", "-") in text
