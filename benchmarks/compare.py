"""Compares two records: where our speed over torch fell.

``python -m benchmarks.compare OLD.json NEW.json [--threshold 0.1]``. A case's figure is the ratio of torch's time to
ours, both of one interleaved run, so a slower machine does not count. A case without torch takes its first other
contender. Cases that are void, or in one record only, are counted and left out. The exit status is 1 where a ratio
fell by more than the threshold.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

from benchmarks.records import cases, machine, read


def ratios(data: dict) -> dict[str, float]:
    """The ratio of each sound case, by its name."""
    found = {}
    for (suite, size), case in cases(data).items():
        peers = [info for info in case.values() if info["contender"] != info["ours"]]
        if peers and not any(info["void"] for info in case.values()):
            peer = case.get("torch", peers[0])
            found[f"{suite}[{size}] over {peer['contender']}"] = peer["speed_of_ours_over_this"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=pathlib.Path, help="the earlier record")
    parser.add_argument("new", type=pathlib.Path, help="the later record")
    parser.add_argument("--threshold", type=float, default=0.1, help="fall of a ratio that counts (default: 0.1)")
    options = parser.parse_args(arguments)
    if not 0 < options.threshold < 1:
        parser.error("argument --threshold: must lie between 0 and 1")
    records = [read(path) for path in (options.old, options.new)]
    old, new = (ratios(data) for data in records)
    changes = {name: new[name] / old[name] for name in old if name in new}
    if not changes:
        sys.exit("the records have no sound case in common")
    fallen = sorted((change, name) for name, change in changes.items() if change < 1 - options.threshold)
    for change, name in fallen:
        print(f"{name}: {old[name]:.2f} -> {new[name]:.2f} ({change - 1:+.0%})")
    mean = statistics.geometric_mean(changes.values())
    alone = len(old.keys() ^ new.keys())
    print(f"{len(changes)} cases in both, {alone} in one only: new/old {mean:.3f} (geometric mean)")
    print(f"{len(fallen)} fell by more than {options.threshold:.0%}")
    for name, data in zip(("old", "new"), records, strict=True):
        print(f"{name}: {machine(data)}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
