"""Compiles a family's shipped Triton configurations for GPUs that are not there, and reads what each of them uses.

In a test::

    from offline import check_configurations

    def test_triton_configurations():
        check_configurations("seqaccel.kernels.scan")

By hand, as a table: ``python tests/offline.py seqaccel.kernels.scan [80 90 100]``.

A test compiles each row for the first architecture it is for, which has the least shared memory, and the last row of
each kernel for the others too. SEQACCEL_TEST_ALL=1 ("make test-all") compiles every row for every architecture. On
sm_90 the rows also run: under ``make gpu``.

The compilation runs in processes of its own, one for each core: under ``TRITON_INTERPRET=1``, which the tests set on a
machine without a GPU, ``@triton.jit`` makes interpreted functions, and those cannot be compiled. Triton's cache
(``TRITON_CACHE_DIR``, ``~/.triton/cache``) holds what was compiled under a hash of the kernel's source, the
configuration and Triton itself, so only what changed is compiled again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

#: Bytes a block may use, of the GPUs that a compilation stands for: Triton gives sm_86, sm_89 and sm_120 (99 KiB) the
#: same layouts as sm_80.
SHARED_MEMORY = {80: (99 << 10, 163 << 10), 90: (227 << 10,), 100: (227 << 10,)}


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one configuration uses on one architecture."""

    kernel: str
    arch: int
    constexprs: dict
    num_warps: int
    num_stages: int
    registers: int
    stack: int  # bytes a thread; more than 0: registers spilled, or an array in local memory
    local: int
    shared: int  # bytes a block
    spills: int  # bytes a thread that the configuration may spill
    least_shared: int  # bytes a block may use on the GPUs that the configuration is for
    copies: list[int]  # the sizes of its asynchronous copies to shared memory, in bytes
    loads: list[int]  # and of its loads from memory

    def problems(self) -> list[str]:
        """What keeps this configuration from being shipped."""
        found = []
        if self.stack + self.local > self.spills:
            found.append(f"spills {self.stack + self.local} bytes a thread")
        limit = min(size for size in SHARED_MEMORY[self.arch] if size >= self.least_shared)
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, a chip it is for has {limit}")
        return found

    def __str__(self) -> str:
        constants = " ".join(f"{k}={v}" for k, v in self.constexprs.items())
        return (
            f"sm_{self.arch:<4}{self.kernel}[{constants}] warps={self.num_warps} stages={self.num_stages}: "
            f"{self.registers} registers, {self.stack} stack, {self.local} local, {self.shared} shared"
        )


def cuobjdump() -> str:
    """The path of cuobjdump: the Triton wheel's own, else the one on PATH."""
    import triton

    bundled = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("cuobjdump is neither in the Triton wheel nor on PATH")
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """``{"REG": …, "STACK": …, "SHARED": …, "LOCAL": …}`` of the only kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([cuobjdump(), "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line)}


def compile_configuration(configuration, arch: int) -> Usage:
    """Compiles one ``seqaccel.kernels._launch.Configuration`` for ``sm_<arch>``; needs ``TRITON_INTERPRET`` unset."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, names = configuration.kernel, configuration.kernel.arg_names
    known = {**configuration.signature, **configuration.constexprs}
    if set(known) != set(names):
        raise ValueError(
            f"{kernel.__name__}: missing {sorted(set(names) - set(known))}, unknown {sorted(set(known) - set(names))}"
        )
    signature = {n: "constexpr" if n in configuration.constexprs else configuration.signature[n] for n in names}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in configuration.multiples_of_16]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in configuration.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    used, ptx = resources(compiled.asm["cubin"]), compiled.asm["ptx"]
    return Usage(
        kernel=kernel.__name__,
        arch=arch,
        constexprs={k: getattr(v, "__name__", str(v)) for k, v in configuration.constexprs.items()},
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        shared=max(used.get("SHARED", 0), compiled.metadata.shared),
        spills=configuration.spills,
        least_shared=configuration.least_shared,
        copies=sorted({int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.[^;]*?, (0x\w+)", ptx)}),
        loads=sorted({int(v or 1) * int(b) // 8 for v, b in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)}),
    )


def usages(module: str, timeout: float = 600) -> list[Usage]:
    """Compiles the rows of ``module.CONFIGURATIONS``, in processes of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--json", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return [Usage(**row) for row in json.loads(done.stdout)]


def check_configurations(module: str) -> list[Usage]:
    """Asserts that every configuration of ``module`` compiles, spills no more than it may and fits the chip."""
    found = usages(module)
    assert found, f"{module}.CONFIGURATIONS is empty"
    wrong = [f"{usage}: {problem}" for usage in found for problem in usage.problems()]
    assert not wrong, "\n".join(wrong)
    return found


def architectures(module: str, everything: bool) -> list[tuple[int, int]]:
    """Rows of ``module.CONFIGURATIONS``, by number, and an architecture to compile each for."""
    table = importlib.import_module(module).CONFIGURATIONS
    newest = max(SHARED_MEMORY)
    last = {configuration.kernel: row for row, configuration in enumerate(table) if configuration.most_arch >= newest}
    return [
        (row, arch)
        for row, configuration in enumerate(table)
        for arch in SHARED_MEMORY
        if configuration.least_arch <= arch <= configuration.most_arch
        if everything or arch == configuration.least_arch or row == last[configuration.kernel]
    ]


def compile_row(module: str, row: int, arch: int) -> Usage:
    return compile_configuration(importlib.import_module(module).CONFIGURATIONS[row], arch)


def main(arguments: list[str]) -> int:
    as_json = arguments[:1] == ["--json"]
    module, *archs = arguments[1:] if as_json else arguments
    everything = not as_json or bool(os.environ.get("SEQACCEL_TEST_ALL"))
    jobs = [(module, row, arch) for row, arch in architectures(module, everything) if not archs or str(arch) in archs]
    fork = multiprocessing.get_context("fork")  # what was imported is there
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), fork) as processes:
        rows = list(processes.map(compile_row, *zip(*jobs, strict=True)))
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        for row in rows:
            print(row, *row.problems(), sep="; ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
