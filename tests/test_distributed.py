"""DTensors, DistributedDataParallel and FSDP2, in two processes of gloo: the checks are distributed_checks.py's."""

import json
import pathlib
import subprocess
import sys

from distributed_checks import CHECKS, PROCESSES

SCRIPT = pathlib.Path(__file__).parent / "distributed_checks.py"


def test_two_processes(tmp_path):
    """All checks in one test: most of its time is the start of the processes."""
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), tmp_path / "store"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for rank in range(PROCESSES)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
        found = json.loads(output.splitlines()[-1])
        assert found["passed"] + len(found["failed"]) == len(CHECKS)
        assert not found["failed"], "\n".join(f"{name}: {trace}" for name, trace in found["failed"].items())
