"""DTensors, DistributedDataParallel and FSDP2, in two processes of gloo: the checks are distributed_checks.py's."""

import json
import pathlib
import subprocess
import sys

import pytest
from distributed_checks import CHECKS, PROCESSES

SCRIPT = pathlib.Path(__file__).parent / "distributed_checks.py"


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """What went wrong in either process, by the name of the check."""
    store = tmp_path_factory.mktemp("store") / "store"
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), store], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(PROCESSES)
    ]
    found: dict[str, str] = {}
    for process in processes:
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors.decode()
        found |= json.loads(output.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name, failed):
    assert name not in failed, failed[name]
