"""Build of the native parts, and the build backend; pyproject.toml holds everything else.

Environment:
    SEQACCEL_NO_EXTENSIONS=1  build the pure-Python package on purpose
    SEQACCEL_CUDA=0/1         leave out, or insist on, the CUDA extension (default: built when nvcc is found)
    TORCH_CUDA_ARCH_LIST      GPU architectures (default "8.0+PTX;9.0a"; the PTX serves later chips)
    SEQACCEL_SANITIZE         build with gcc's sanitizers: "address,undefined" or "thread" ("make sanitize" sets it)
    MAX_JOBS                  compile jobs
"""

import os
import platform
import re
import shutil
import sys
from pathlib import Path

import setuptools
import setuptools.build_meta

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"seqaccel: building needs setuptools 77 or later, but this is {setuptools.__version__}: "
        "pip install --upgrade setuptools"
    )

ROOT = Path(__file__).parent.resolve()
PURE = os.environ.get("SEQACCEL_NO_EXTENSIONS") == "1"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
]
# Of a build with sanitizers, of every extension. SEQACCEL_SANITIZE also stops the reuse of memory: csrc/common/reuse.h.
SANITIZE = os.environ.get("SEQACCEL_SANITIZE")
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-DSEQACCEL_SANITIZE"] if SANITIZE else []
SANITIZERS = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
INSTRUCTION_SETS = ["portable", "avx2", "avx512"] if platform.machine() in ("x86_64", "AMD64") else ["portable"]
BF16_KERNELS = {  # compiled for AVX-512 with BF16 and VNNI too
    "cpu/attention/block_sparse/narrow_kernels.h",
    "cpu/attention/hierarchical/narrow_kernels.h",
    "cpu/conv/narrow_kernels.h",
    "cpu/packed/kernels.h",
}


def kernel_sources():
    """One translation unit for each kernel file and instruction set, written under build/isa."""
    folder = ROOT / "build" / "isa"
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for kernels in sorted(ROOT.glob("csrc/cpu/**/*kernels.h")):
        include = kernels.relative_to(ROOT / "csrc").as_posix()
        wide = ["avx512_bf16"] if include in BF16_KERNELS and len(INSTRUCTION_SETS) > 1 else []
        for isa in INSTRUCTION_SETS + wide:
            text = f'#define SEQACCEL_ISA_{isa.upper()}\n#include "cpu/base/isa.h"\n#include "{include}"\n'
            source = folder / f"{include[4:-2].replace('/', '_')}_{isa}.cpp"
            if not source.exists() or source.read_text() != text:
                source.write_text(text)
            sources.append(source.relative_to(ROOT).as_posix())
    for source in set(folder.glob("*.cpp")) - {ROOT / source for source in sources}:
        source.unlink()  # of an older version
    return sources


def native_sources(pattern):
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


def cuda_home():
    """The CUDA toolkit to build with, or None: SEQACCEL_CUDA decides, else whether nvcc is found."""
    wanted = os.environ.get("SEQACCEL_CUDA")
    if wanted not in (None, "", "0", "1"):
        sys.exit(f"seqaccel: SEQACCEL_CUDA must be 0 or 1, but it is {wanted!r}")
    if wanted == "0":
        return None
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for home in candidates:
        if home and (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return home
    if wanted == "1":
        sys.exit("seqaccel: SEQACCEL_CUDA=1, but no CUDA toolkit was found: put nvcc on PATH or set CUDA_HOME")
    return None


def require_compiler():
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(
            f"seqaccel: no C++ compiler: {compiler!r} was not found. Install one (Debian: apt install g++), "
            "or set SEQACCEL_NO_EXTENSIONS=1 to build the pure-Python package, served by the reference and Triton."
        )


def extensions():
    if PURE:
        return [], {}
    require_compiler()
    try:
        import pybind11
        import torch
        import torch.utils.cpp_extension as cpp
    except ImportError as error:
        sys.exit(
            f"seqaccel: building needs torch and pybind11 in this environment ({error}). "
            "Install them first and pass --no-build-isolation to pip, or set SEQACCEL_NO_EXTENSIONS=1."
        )
    modules = [
        cpp.CppExtension(
            "seqaccel._C",
            native_sources("csrc/cpu/**/*.cpp") + kernel_sources(),
            include_dirs=[str(ROOT / "csrc")],
            py_limited_api=True,
            extra_compile_args={"cxx": CXX_FLAGS + STABLE_ABI + SANITIZE_FLAGS + SANITIZERS},
            extra_link_args=["-fopenmp", "-Wl,-z,noexecstack", *SANITIZERS],
        )
    ]
    session = native_sources("csrc/session/*.cpp")
    if session:
        modules.append(
            setuptools.Extension(
                "seqaccel._session",
                session,
                include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
                extra_compile_args={
                    "cxx": ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", *SANITIZE_FLAGS, *SANITIZERS]
                },
                extra_link_args=SANITIZERS,
                language="c++",
            )
        )
    # By torch's C++ API, which holds for one version: its name says which, and without it Python does its work.
    version = torch.__version__
    release = version if "a" in version.split("+")[0] or "dev" in version else version.split("+")[0]
    modules.append(
        cpp.CppExtension(
            f"seqaccel._autograd_{re.sub(r'[^0-9a-zA-Z]', '_', release)}",
            native_sources("csrc/autograd/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            optional=True,
            extra_compile_args={"cxx": ["-O2", "-g0", "-fvisibility=hidden", *SANITIZE_FLAGS, *SANITIZERS]},
            extra_link_args=SANITIZERS,
        )
    )
    home = cuda_home()
    cuda = native_sources("csrc/cuda/**/*.cu")
    if home and cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
        cpp.CUDA_HOME = home
        modules.append(
            cpp.CppExtension(
                "seqaccel._cuda",
                cuda,
                include_dirs=[str(ROOT / "csrc"), f"{home}/include"],
                library_dirs=[f"{home}/lib64"],
                libraries=["cudart_static", "dl", "rt", "pthread"],
                py_limited_api=True,
                extra_compile_args={
                    "cxx": ["-O3", "-g0", "-DUSE_CUDA", *STABLE_ABI],
                    "nvcc": ["-O3", "-DUSE_CUDA", "--threads=2", *STABLE_ABI],
                },
                extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
            )
        )

    class BuildExtension(cpp.BuildExtension):
        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                if not ext.optional:
                    raise
                self.warn(f"{ext.name} is left out: {error}")

    return modules, {"build_ext": BuildExtension.with_options(use_ninja=True)}


# ---- the build backend ----

# pyproject.toml names this file as the backend: only a backend can make requirements depend on the environment, and the
# script that uses them is the place that needs no further file. setuptools runs it as __main__.

build_wheel = setuptools.build_meta.build_wheel
build_editable = setuptools.build_meta.build_editable
prepare_metadata_for_build_wheel = setuptools.build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = setuptools.build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings=None):
    return [] if PURE else ["torch>=2.10", "pybind11>=2.13", "ninja"]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings=None):
    return []


def build_sdist(sdist_directory, config_settings=None):
    os.environ["SEQACCEL_NO_EXTENSIONS"] = "1"  # MANIFEST.in lists the sources
    return setuptools.build_meta.build_sdist(sdist_directory, config_settings)


if __name__ == "__main__":
    modules, commands = extensions()
    setuptools.setup(ext_modules=modules, cmdclass=commands)
