"""Loads the compiled operators; says why where they cannot be loaded."""

import ctypes
import functools
import importlib
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent


def _find(name: str) -> Path | None:
    return next(iter(sorted(_FOLDER.glob(f"{name}.*so"))), None)


def _load(name: str) -> str | None:
    """Registers the operators of ``seqaccel/<name>*.so``; returns why that failed, or None."""
    library = _find(name)
    if library is None:
        return f"seqaccel/{name} was not built"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} could not be loaded: {error}"
    return None


#: The library that holds the C++ kernels.
cpp_path = _find("_C")

#: Why the C++ operators are missing, or None.
cpp_error: str | None = _load("_C")


def _hidden_installation() -> Path | None:
    """Where the package is installed, if this is another copy: Python looks in its working directory first."""
    places = (Path(entry or ".").absolute() / "seqaccel" for entry in sys.path)
    return next((place for place in places if (place / "__init__.py").exists() and not place.samefile(_FOLDER)), None)


#: How to end the lack of the C++ operators.
cpp_cure: str = "`python -m seqaccel.info` says more."
if cpp_path is None and (_FOLDER.parent / "setup.py").exists():
    cpp_cure = f"{_FOLDER.parent} is a source tree: `python setup.py build_ext --inplace` there builds them."
    hidden = _hidden_installation()
    if hidden is not None:
        raise ImportError(
            f"Python imports seqaccel from the source tree {_FOLDER.parent}, which is not built, and not the installed "
            f"{hidden}. Start Python in another folder, or with `python -P`, or build the tree: {cpp_cure}"
        )

_ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
_LIBRARY = torch.library.Library("seqaccel", "IMPL")
if cpp_error is None:
    _LIBRARY.impl("isa", lambda: _ISAS[torch.ops.seqaccel.isa_number(False)], "CompositeExplicitAutograd")
    _LIBRARY.impl("best_isa", lambda: _ISAS[torch.ops.seqaccel.isa_number(True)], "CompositeExplicitAutograd")


def _import_autograd() -> tuple[Any, str | None]:
    """The module of ``csrc/autograd`` built for this torch; or None, and why."""
    version = torch.__version__
    release = version if "a" in version.split("+")[0] or "dev" in version else version.split("+")[0]
    name = f"_autograd_{re.sub(r'[^0-9a-zA-Z]', '_', release)}"
    if cpp_error is not None:
        return None, cpp_error
    try:
        return importlib.import_module(f"seqaccel.{name}"), None
    except ImportError as error:
        return None, f"the package was built with another torch ({error})"


#: Recurrent layers' call and autograd in C++, or None: then Python does their work, in more time; and why.
autograd, autograd_error = _import_autograd()

#: Why the CUDA operators are missing, or None.
cuda_error: str | None = (
    _load("_cuda") if torch.version.cuda else "this torch is a build without CUDA: install one with it (pytorch.org)"
)
if cuda_error is not None and torch.version.cuda and _find("_cuda") is None:
    cuda_error += ": build the package where nvcc is on PATH, or with SEQACCEL_CUDA=1 and CUDA_HOME"

#: Why Triton is missing, or None.
triton_error: str | None = (
    None
    if importlib.util.find_spec("triton")
    else "the package triton is not installed: pip install 'seqaccel[gpu]' brings it"
)


@functools.cache
def triton_build_error() -> str | None:
    """Why Triton cannot build a kernel's launcher here, or None: it needs a C compiler and Python's headers."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler: neither CC in the environment nor gcc or clang on PATH"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(include) / "Python.h").exists():
        return f"Triton finds no Python.h in {include}: the package of Python's headers is not installed"
    return None


@functools.cache
def cuda_device_error(index: int) -> str | None:
    """Why the CUDA operators cannot run on a GPU (no code for it, an old driver), or None."""
    question = ctypes.CDLL(str(_find("_cuda"))).seqaccel_cuda_error
    question.restype = ctypes.c_char_p
    answer = question(ctypes.c_int(index))
    return None if answer is None else answer.decode()
