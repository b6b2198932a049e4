"""The script that runs other packages' models before and after ``convert``: its checks, record and table."""

import functools
import json
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import package_models, packages, pages, recipes  # noqa: E402

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
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert len(lines) == 4 and lines[2].startswith("| torch: LSTM language model | 3 layers of 8")
    page = packages.table_of(record)
    assert page.startswith(table) and f"commit {rows[ALONE[0]]['commit']}; " in page


def test_resume_leaves_out_what_is_there(monkeypatch, tmp_path):
    record, ran, now = tmp_path / "packages.json", [], "abc"

    def run(name, seconds, optimize):
        ran.append(name)
        times = packages.Times(1.0, 1.0, 1.0)
        return packages.Result(name, package="torch", commit=now, training=times, optimized=times if optimize else None)

    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(packages, "commit", lambda: now)
    command = ["torch:*", "--json", str(record), "--resume"]
    expected = []
    for more, commit, count in (([], "abc", 2), ([], "abc", 0), (["--optimize"], "abc", 2), ([], "abd", 2)):
        now = commit
        expected += ALONE[:count]
        assert packages.main([*command, *more]) == 0 and ran == expected
    now = "abd-dirty"
    assert packages.main(["torch: LSTM*", *command[1:]]) == 0 and packages.main(["torch: LSTM*", *command[1:]]) == 0
    assert len(ran) == len(expected) + 2
    with pytest.raises(SystemExit):
        packages.main(["--resume"])


def test_pages_have_the_newest_record(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    for name, size in (("2026-01-01", "old"), ("2026-01-02", "new")):
        packages.write(tmp_path / "cpu" / "packages" / f"{name}.json", [packages.Result(ALONE[0], size, "torch")])
    text = pages.filled("<!-- packages: cpu -->\n<!-- end -->\n")
    assert f"| {ALONE[0]} | new | 0 of 0 |" in text and "old" not in text and pages.filled(text) == text
    with pytest.raises(SystemExit, match="has no record"):
        pages.filled("<!-- recipes: cpu -->\n<!-- end -->\n")


def test_recipes(one_thread, monkeypatch, tmp_path, capsys):
    for name, make in (("minGRU", recipes.min_gru), ("selective scan", recipes.selective_scan)):
        monkeypatch.setitem(recipes.RECIPES, name, functools.partial(make, 8))
    record = tmp_path / "recipes.json"
    assert recipes.main(["--seconds", "0.01", "--json", str(record)]) == 0
    table = capsys.readouterr().out
    assert "| minGRU | minGRU-pytorch's scan | B=8, T=8, I=H=256 |" in table and "| selective scan |" in table
    assert recipes.table_of(record).startswith(table)


def test_the_page_has_the_table_of_the_record(capsys):
    record = max((ROOT / "benchmarks" / "results").glob("*/packages/*.json"))
    assert packages.main(["--table", str(record)]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "benchmarks.md").read_text()
    for result in packages.read(record).values():
        assert not result.problem and result.converted
        times = (result.inference, result.training, result.optimized)
        assert min(each.ratio for each in times if each) >= 0.97


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
