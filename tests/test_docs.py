"""The examples of docstrings, README and docs/ run, and what those pages list is what there is."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import seqaccel

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples() -> dict[str, doctest.DocTest]:
    found = {}
    for module in pkgutil.walk_packages(seqaccel.__path__, "seqaccel."):
        if not module.name.startswith(("seqaccel.kernels", "seqaccel._")):
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
    names = {name.rpartition(".")[2] for name in EXAMPLES}
    assert {item.__name__ for item in public} - names == {"SRUCell", "Streaming"}  # SRU's and the modules' show them


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "adding-a-cell.md"], ids=lambda page: page.name
)
def test_examples_of_pages(page, tmp_path, monkeypatch):
    """The blocks of one page run one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, str(page), "exec"), scope)
