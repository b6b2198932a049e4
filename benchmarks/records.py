"""Reads and keeps the records of benchmark runs: what ``pytest benchmarks --benchmark-json=FILE`` wrote.

``python -m benchmarks.records FILE`` keeps one under ``results``: ``make record``.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import sys
from collections.abc import Iterable

RESULTS = pathlib.Path(__file__).parent / "results"


def read(path: pathlib.Path) -> dict:
    """One record; exits with one line where the file is something else."""
    try:
        data = json.loads(path.read_text())
        data["benchmarks"] = [row for row in data["benchmarks"] if "contender" in row["extra_info"]]
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a result of pytest benchmarks --benchmark-json")
    return data


def committed(folder: pathlib.Path) -> list[pathlib.Path]:
    """The records in a processor's folder, the newest last."""
    return sorted(folder.glob("*.json"), key=lambda path: (json.loads(path.read_text())["datetime"], path.name))


def read_all(paths: Iterable[pathlib.Path]) -> dict:
    """Several records as one; of a case that was run again, the last that is not void."""
    results = [read(path) for path in paths]
    rows: dict[tuple[str, str], dict] = {}
    for row in itertools.chain.from_iterable(data["benchmarks"] for data in results):
        key = row["group"], row["extra_info"]["contender"]
        if key not in rows or not row["extra_info"]["void"]:
            rows[key] = row
    return results[-1] | {"benchmarks": sorted(rows.values(), key=lambda row: row["group"])}


def cases(data: dict) -> dict[tuple[str, str], dict[str, dict]]:
    """What was recorded of each contender, by suite and size, in the order of the suites' sizes."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in data["benchmarks"]:
        info = row["extra_info"] | {
            "family": pathlib.Path(row["fullname"].partition("::")[0]).stem.removeprefix("bench_")
        }
        found.setdefault((info["suite"], info["size"]), {})[info["contender"]] = info
    return dict(sorted(found.items(), key=lambda case: (case[0][0], _in_order(case[0][1]))))


def ours(case: dict[str, dict]) -> dict:
    """What was recorded of our own contender of a case."""
    return next(info for info in case.values() if info["contender"] == info["ours"])


def numbers(size: str) -> dict[str, int | float | str]:
    """``"B=1,H=128"`` as a dict."""
    values: dict[str, int | float | str] = {}
    for part in size.split(","):
        key, _, value = part.partition("=")
        values[key] = int(value) if value.isdigit() else float(value) if re.fullmatch(r"\d*\.\d+", value) else value
    return values


def _in_order(size: str) -> list[tuple[str, float, str]]:
    return [
        (key, value, "") if isinstance(value, int | float) else (key, 0.0, value)
        for key, value in numbers(size).items()
    ]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    unit, scale = next(
        pair for pair in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= pair[1] or pair[0] == "µs"
    )
    value = seconds / scale
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def processor(data: dict) -> str:
    """The processor's name, with its family and model: cloud machines hide the rest of the name."""
    cpu = data["machine_info"].get("cpu", {})
    return f"{cpu.get('brand_raw', 'unknown processor')} (family {cpu.get('family')}, model {cpu.get('model')})"


def machine(data: dict) -> str:
    """One line: processor or GPU, threads, versions, commit."""
    info = data["machine_info"].get("seqaccel", {})
    commit = (data.get("commit_info") or {}).get("id", "unknown")[:12]
    return (
        f"{info.get('gpu') or processor(data)}, {info.get('threads')} threads, {info.get('isa')}; "
        f"torch {info.get('torch')}, seqaccel {info.get('seqaccel')}; commit {commit}; {data.get('datetime', '')[:10]}"
    )


def folder(data: dict) -> str:
    """The name under ``results`` of this record's machine."""
    cpu = data["machine_info"].get("cpu", {})
    name = data["machine_info"].get("seqaccel", {}).get("gpu") or (
        f"{cpu.get('brand_raw', 'unknown')} {cpu.get('family')} {cpu.get('model')}"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def keep(path: pathlib.Path) -> pathlib.Path:
    """Writes what the tables need of a run into the folder of its machine; returns the file."""
    data = read(path)
    data["benchmarks"] = [{key: row[key] for key in ("group", "fullname", "extra_info")} for row in data["benchmarks"]]
    commit = (data.get("commit_info") or {}).get("id", "unknown")[:7]
    kept = RESULTS / folder(data) / f"{data['datetime'][:10]}-{commit}.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(data) + "\n")
    return kept


if __name__ == "__main__":
    print(keep(pathlib.Path(sys.argv[1])))
