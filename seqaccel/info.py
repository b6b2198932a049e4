"""``python -m seqaccel.info``: what is installed, what runs here, and why what is missing is missing."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform

import torch

import seqaccel
from seqaccel import _extension, backends

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, list[str]]:
    """The instruction set whose kernels run, and those that this processor can run."""
    active, usable = torch.ops.seqaccel.isa(), []
    for name in INSTRUCTION_SETS:
        try:
            with backends.isa(name):
                usable.append(name)
        except RuntimeError:
            pass
    return active, usable


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["none that this torch can use"]
    found = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        found.append(f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB")
    return found


def _why_missing(name: str, reason: str) -> str:
    """The reason; of a GPU's backend where there is no GPU, what it would take."""
    errors = {"triton": _extension.triton_error, "cuda": _extension.cuda_error}
    if name not in errors or torch.cuda.is_available():
        return reason
    return "; ".join(text for text in ("it needs a GPU that torch can use", errors[name]) if text)


def _for_auto() -> str:
    """The GPU backends that ``auto`` may choose, each with its operators or, if these are fewer, the others."""
    found = []
    for backend in ("cuda", "triton"):
        verified = [operator for operator, names in backends.VERIFIED.items() if backend in names]
        others = [operator for operator in backends.VERIFIED if operator not in verified]
        named = ", ".join(verified) if len(verified) <= len(others) else f"all but {', '.join(others) or 'none'}"
        found.append(f"{backend} for {named or 'none'}")
    return "; ".join(found)


def report() -> str:
    """The report, as text."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    lines = [
        f"seqaccel  {seqaccel.__version__} in {pathlib.Path(seqaccel.__file__).parent}",
        f"Python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch     {torch.__version__}, {cuda}",
        f"triton    {_version('triton')}",
        f"CPU       {_processor()}; {torch.get_num_threads()} threads",
    ]
    if backends.why_missing("cpp", "cpu") is None:
        active, usable = instruction_sets()
        lines.append(f"          runs the {active} kernels; has {', '.join(usable)}")
        autograd = "in C++" if _extension.autograd_error is None else f"in Python: {_extension.autograd_error}"
        lines.append(f"          recurrent layers' autograd is {autograd}")
    lines += [f"GPU       {gpu}" for gpu in _gpus()]
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        lines.append(f"backends for tensors on {device}:")
        for name, reason in backends.available(device).items():
            state = "available" if reason is None else f"missing: {_why_missing(name, reason)}"
            if reason is None and (untaken := backends.why_not_auto(name, torch.device(device))):
                state += f", but auto does not take it: {untaken}"
            lines.append(f"  {name:<10}{state}")
    lines.append(f"on a GPU auto may choose {_for_auto()}")
    settings = sorted(name for name in os.environ if name.startswith("SEQACCEL_") or name == "TRITON_INTERPRET")
    lines += [f"{name}={os.environ[name]}" for name in settings]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
