"""Options of the benchmarks, and what they add to pytest-benchmark's JSON."""

from __future__ import annotations

import harness
import pytest
import torch

import seqaccel
from seqaccel import backends

#: Their versions are recorded.
PACKAGES = ("triton", "numpy", "onnxruntime", "causal-conv1d", "flash-linear-attention", "flashrnn", "torchrl")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=harness.seconds_per_case, help="time that one case may take")


def pytest_configure(config: pytest.Config) -> None:
    harness.seconds_per_case = config.getoption("--seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    import importlib.metadata

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = torch.cuda.is_available()
    machine_info["seqaccel"] = {
        "seqaccel": seqaccel.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "isa": torch.ops.seqaccel.isa() if backends.why_missing("cpp", "cpu") is None else None,
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "backends": {device: backends.available(device) for device in (["cpu", "cuda"] if gpu else ["cpu"])},
    }


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """A summary by case: the ratio of our speed to each peer's, and whether the run was void; rounds are left out."""
    cases: dict[str, dict] = {}
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        info = row["extra_info"]
        if "contender" in info:
            case = cases.setdefault(row["group"], {"ours": info["ours"], "void": info["void"], "ratios": {}})
            if info["contender"] != info["ours"]:
                case["ratios"][info["contender"]] = info["speed_of_ours_over_this"]
    output_json["cases"] = cases
