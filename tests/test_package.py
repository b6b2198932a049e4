"""The package as its users get it: the report, and the wheel without compiled parts."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import seqaccel.info

ROOT = pathlib.Path(__file__).parent.parent


def python(*arguments: str, cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SEQACCEL_")} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, check=False
    )


def test_info_reports_versions_and_every_backend(tmp_path):
    done = python("-m", "seqaccel.info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (seqaccel.__version__, "torch", "triton", "threads", *seqaccel.backends.NAMES[1:]):
        assert word in done.stdout
    assert "cpp       available" in done.stdout


def test_info_names_the_active_instruction_set():
    active, usable = seqaccel.info.instruction_sets()
    assert active in usable and "portable" in usable
    with seqaccel.backends.isa("portable"):
        assert seqaccel.info.instruction_sets()[0] == "portable"


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """The wheel that SEQACCEL_NO_EXTENSIONS=1 builds."""
    tree, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*cache"
    )
    shutil.copytree(ROOT, tree, ignore=left_out)
    command = ["-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree)]
    done = python(*command, cwd=tree, SEQACCEL_NO_EXTENSIONS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def test_pure_wheel_holds_every_python_file_and_nothing_compiled(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(pure_wheel).namelist() if ".dist-info/" not in name}
    here = {f"seqaccel/{p.relative_to(ROOT / 'seqaccel').as_posix()}" for p in (ROOT / "seqaccel").rglob("*.py")}
    here.add("seqaccel/py.typed")
    here |= {f"seqaccel/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    assert names == here


def test_unbuilt_source_tree_does_not_hide_the_installation(pure_wheel, tmp_path):
    """Python started in a clone looks there first: it names the tree and what to do."""
    zipfile.ZipFile(pure_wheel).extractall(tmp_path / "site")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "seqaccel", tree / "seqaccel", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tree / "setup.py").touch()
    done = python("-c", "import seqaccel", cwd=tree, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 1
    for words in (f"source tree {tree}", "not built", str(tmp_path / "site" / "seqaccel"), "python -P"):
        assert words in done.stderr
    alone = python("-c", "import seqaccel", cwd=tree, PYTHONPATH="")
    assert f"{tree} is a source tree: `python setup.py build_ext --inplace`" in alone.stderr
    assert python("-P", "-c", "import seqaccel", cwd=tree, PYTHONPATH=str(tmp_path / "site")).returncode == 0


def test_pure_wheel_warns_once_and_the_reference_serves(pure_wheel, tmp_path):
    zipfile.ZipFile(pure_wheel).extractall(tmp_path / "site")
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import seqaccel, seqaccel.nn
    import torch
    h = seqaccel.functional.linear_scan(torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1))
ours = [w for w in caught if "seqaccel" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
assert h.flatten().tolist() == [1.0, 1.5, 1.75], h
try:
    with seqaccel.backend("cpp"):
        seqaccel.functional.linear_scan(torch.ones(1, 3, 1), torch.ones(1, 3, 1))
except RuntimeError as error:
    assert "was not built" in str(error), error
else:
    raise SystemExit("backend cpp ran without an extension")
print(seqaccel.__file__)
"""
    done = python("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path)), "the installed package was imported instead of the wheel"


def test_without_triton(tmp_path):
    """Everything works, and the backend by name says which extra brings it."""
    program = """
import sys
sys.modules["triton"] = None
import torch, seqaccel, seqaccel.info
for module in (seqaccel.nn.LSTM(4, 5), seqaccel.nn.SRU(4, 5)):
    module(torch.ones(3, 2, 4))[0].sum().backward()
seqaccel.nn.TCN(4, [5])(torch.ones(2, 4, 9)).sum().backward()
seqaccel.nn.HierarchicalAttention(4, 2)(*[torch.ones(3, 2, 4)] * 3)[0].sum().backward()
print(seqaccel.info.report())
with seqaccel.backend("triton"):
    seqaccel.functional.linear_scan(torch.ones(1, 3, 1), torch.ones(1, 3, 1))
"""
    done = python("-c", program, cwd=tmp_path)
    assert "RuntimeError: linear_scan: backend 'triton' is not available" in done.stderr
    assert "pip install 'seqaccel[gpu]'" in done.stderr.splitlines()[-1] and "seqaccel[gpu]" in done.stdout


def test_build_asks_for_torch_only_to_compile():
    program = "import setup; print(setup.get_requires_for_build_wheel(), setup.get_requires_for_build_sdist())"
    assert "torch" in python("-c", program, cwd=ROOT).stdout
    assert python("-c", program, cwd=ROOT, SEQACCEL_NO_EXTENSIONS="1").stdout == "[] []\n"


def test_old_setuptools_is_named():
    program = (
        "import setuptools, runpy; setuptools.__version__ = '70.1.0'; runpy.run_path('setup.py', run_name='__main__')"
    )
    done = python("-c", program, cwd=ROOT)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "setuptools 77 or later, but this is 70.1.0" in done.stderr


def test_public_names():
    assert set(dir(seqaccel)) == {*seqaccel.__all__, "__version__", "backends"}
    for name in seqaccel.nn.__all__:
        module = getattr(seqaccel.nn, name)
        if isinstance(module, type) and issubclass(module, torch.nn.Module):
            assert module.forward.__module__.startswith("seqaccel.nn") and module.forward.__doc__, name
