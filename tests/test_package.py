"""The package as its users get it: the report, and the wheel without compiled parts."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

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
    here |= {f"seqaccel/kernels/{p.relative_to(ROOT / 'kernels').as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}
    assert names == here


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
