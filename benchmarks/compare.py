"""Compares two records: where our speed over torch fell.

``python -m benchmarks.compare [OLD.json] NEW.json [--threshold 0.1]``. Without OLD.json, NEW.json is compared with the
committed records of its processor, read as one, the newest last. A case's figure is the ratio of torch's time to ours,
both of one interleaved run, so a slower machine does not count. A case without torch takes its first other contender.
Cases that are void, or in one record only, are counted and left out. The exit status is 1 where a ratio fell by more
than the threshold.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

from benchmarks import records


def ratios(data: dict) -> dict[str, float]:
    """The ratio of each sound case, by its name."""
    found = {}
    for (suite, size), case in records.cases(data).items():
        peers = [info for info in case.values() if info["contender"] != info["ours"]]
        if peers and not any(info["void"] for info in case.values()):
            peer = case.get("torch", peers[0])
            found[f"{suite}[{size}] over {peer['contender']}"] = peer["speed_of_ours_over_this"]
    return found


def baseline(path: pathlib.Path, data: dict) -> dict:
    """The committed records of the processor of ``data``, as one, without ``path`` itself."""
    folder = records.RESULTS / records.folder(data)
    others = [other for other in records.committed(folder) if other.resolve() != path.resolve()]
    if not others:
        sys.exit(f"{folder} has no record to compare with: name the earlier one too")
    return records.read_all(others)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "old",
        type=pathlib.Path,
        nargs="?",
        help="the earlier record (default: those of the same processor under benchmarks/results)",
    )
    parser.add_argument("new", type=pathlib.Path, help="the later record")
    parser.add_argument("--threshold", type=float, default=0.1, help="fall of a ratio that counts (default: 0.1)")
    options = parser.parse_args(arguments)
    if not 0 < options.threshold < 1:
        parser.error("argument --threshold: must lie between 0 and 1")
    later = records.read(options.new)
    earlier = records.read(options.old) if options.old else baseline(options.new, later)
    old, new = ratios(earlier), ratios(later)
    changes = {name: new[name] / old[name] for name in old if name in new}
    if not changes:
        sys.exit("the records have no sound case in common")
    fallen = sorted((change, name) for name, change in changes.items() if change < 1 - options.threshold)
    for change, name in fallen:
        print(f"{name}: {old[name]:.2f} -> {new[name]:.2f} ({change - 1:+.0%})")
    mean = statistics.geometric_mean(changes.values())
    typical = statistics.geometric_mean(max(change, 1 / change) for change in changes.values())
    alone = len(old.keys() ^ new.keys())
    print(f"{len(changes)} cases in both, {alone} in one only: new/old {mean:.3f} (geometric mean)")
    print(f"a ratio differs by {typical - 1:.0%} in either direction (geometric mean)")
    print(f"{len(fallen)} fell by more than {options.threshold:.0%}")
    print(f"old: {records.machine(earlier)}")
    print(f"new: {records.machine(later)}")
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
