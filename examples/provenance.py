"""What a record of a run says of where it came from."""

from __future__ import annotations

import contextlib
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence

import torch

import seqaccel


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit(folder: pathlib.Path) -> str:
    """The commit of the sources, with "-dirty" if they were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def provenance(script: str, arguments: Sequence[str], device: object) -> dict:
    path = pathlib.Path(script)
    return {
        "command": shlex.join(["python", f"examples/{path.name}", *arguments]),
        "commit": commit(path.parent),
        "backend": seqaccel.backends.current(),
        "machine": {"cpu": processor(), "threads": torch.get_num_threads(), "device": str(device)},
        "versions": {"torch": torch.__version__, "python": ".".join(map(str, sys.version_info[:3]))},
    }
