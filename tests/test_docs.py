"""The examples of docstrings, README and docs/ run, and what those pages list is what there is."""

import doctest
import importlib
import pathlib
import pkgutil
import re
import runpy

import pytest

import seqaccel

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples() -> dict[str, doctest.DocTest]:
    found = {}
    for module in pkgutil.walk_packages(seqaccel.__path__, "seqaccel."):
        if not module.name.startswith(("seqaccel.kernels", "seqaccel._", "seqaccel.integrations.")):
            for test in doctest.DocTestFinder().find(importlib.import_module(module.name)):
                if test.examples:
                    found[test.name] = test
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name):
    assert not doctest.DocTestRunner().run(EXAMPLES[name]).failed


def test_every_public_name_has_an_example():
    public = [getattr(seqaccel.nn, name) for name in seqaccel.nn.__all__]
    public += [getattr(seqaccel.functional, name) for name in seqaccel.functional.__all__]
    public += [seqaccel.Session, seqaccel.backend, seqaccel.convert, seqaccel.from_haste, seqaccel.from_mlstm]
    public += [seqaccel.from_mingru, seqaccel.from_qrnn, seqaccel.revert, seqaccel.patch_torch, seqaccel.unpatch_torch]
    public += [seqaccel.benchmark, seqaccel.optimize, seqaccel.quantize, seqaccel.Residual, seqaccel.Concatenation]
    names = {name.rpartition(".")[2] for name in EXAMPLES}
    assert {item.__name__ for item in public} - names == {"Streaming"}  # the modules' show it


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "adding-a-cell.md"], ids=lambda page: page.name
)
def test_examples_of_pages(page, tmp_path, monkeypatch):
    """The blocks of one page run one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, str(page), "exec"), scope)


def test_variables_are_listed():
    """Every environment variable of the package, its build and its tests has a row in docs/environment.md."""
    sources = [ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run", *(ROOT / "seqaccel").rglob("*.py")]
    sources += [*(ROOT / "tests").glob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    pattern = r"""(?:environ(?:\.get)?[\[(]|getenv\()\s*"(\w+)"|\$\{(SEQACCEL_\w+)"""
    used = {name for path in sources for pair in re.findall(pattern, path.read_text()) for name in pair if name}
    listed = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    assert used - listed <= {"ASAN_OPTIONS", "TSAN_OPTIONS", "PATH"}, used - listed


def test_named_tests_are_there():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+\.py::\w+)`", page.read_text())}
    assert named
    for file, test in (name.split("::") for name in sorted(named)):
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.M), f"{file} has no {test}"


def test_picture_of_levels():
    """What docs/draw_attention.py reads off the operator: each row is a query's tokens and nodes, in order."""
    spans_seen = runpy.run_path(str(ROOT / "docs" / "draw_attention.py"))["spans_seen"]
    causal, both = spans_seen(True), spans_seen(False)
    assert causal.unique().tolist() == [0, 1, 4, 16, 64] and (causal.triu(1) == 0).all()
    assert (both > 0).all() and both.tril().equal(causal) and both.flip(0, 1).equal(both)
    assert causal[219].unique_consecutive(return_counts=True)[1].tolist() == [128, 64, 20, 8, 36]
