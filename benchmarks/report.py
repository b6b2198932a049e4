"""Makes a table and plots of benchmark results.

``python -m benchmarks.report FILE.json [--markdown] [--plots FOLDER]``. Ours is the median round, a peer's figure its
fastest round. "speed of ours" is how many times as fast ours is as this contender (in brackets: fastest round over
fastest round). "ceiling" is the share of what the machine could have done in that time, by operations or by bytes,
whichever binds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import sys

HEADER = ("case", "contender", "time", "GFLOP/s", "GB/s", "ceiling", "speed of ours")


def read(path: pathlib.Path) -> dict:
    """The JSON that ``pytest benchmarks --benchmark-json`` wrote; exits with one line where it is something else."""
    try:
        data = json.loads(path.read_text())
        data["benchmarks"] = [row for row in data["benchmarks"] if "contender" in row["extra_info"]]
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        sys.exit(f"{path} is not a result of pytest benchmarks --benchmark-json")
    return data


def duration(seconds: float) -> str:
    unit, scale = next(
        pair for pair in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= pair[1] or pair[0] == "µs"
    )
    return f"{seconds / scale:.3g} {unit}"


def rows(data: dict) -> list[tuple[str, ...]]:
    """The table's cells."""
    table = []
    for group, members in itertools.groupby(data["benchmarks"], key=lambda row: row["group"]):
        for i, info in enumerate(row["extra_info"] for row in members):
            speed = f"{info['speed_of_ours_over_this']:.2f} ({info['fastest_over_fastest']:.2f})"
            table.append(
                (
                    group if i == 0 else "",
                    info["contender"],
                    duration(info["seconds"]),
                    f"{info['tflops'] * 1e3:.4g}",
                    f"{info['gbytes_per_s']:.3g}",
                    f"{info['percent_of_ceiling']:.0f}% {info['bound']}",
                    "void" if info["void"] else "" if info["contender"] == info["ours"] else speed,
                )
            )
    return table


def machine(data: dict) -> str:
    """One line: processor or GPU, threads, versions, commit."""
    info, ours = data["machine_info"], data["machine_info"].get("seqaccel", {})
    processor = ours.get("gpu") or info.get("cpu", {}).get("brand_raw", "unknown processor")
    commit = (data.get("commit_info") or {}).get("id", "unknown")[:12]
    return (
        f"{processor}, {ours.get('threads')} threads, {ours.get('isa')}; torch {ours.get('torch')}, "
        f"seqaccel {ours.get('seqaccel')}; commit {commit}; {data.get('datetime', '')[:10]}"
    )


def print_table(data: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="seqaccel benchmarks", caption=machine(data))
    for i, name in enumerate(HEADER):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=i > 0)
    for row in rows(data):
        if row[0] and table.rows:
            table.add_section()
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def print_markdown(data: dict) -> None:
    print("|", " | ".join(HEADER), "|")
    print("|", " | ".join("---" if i < 2 else "---:" for i in range(len(HEADER))), "|")
    for row in rows(data):
        print("|", " | ".join(row), "|")
    print(f"\n{machine(data)}")


def plot(data: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """One bar chart a suite: the speed of ours over each peer's at each size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    infos = sorted((row["extra_info"] for row in data["benchmarks"]), key=lambda info: info["suite"])
    for suite, group in itertools.groupby(infos, key=lambda info: info["suite"]):
        members = [info for info in group if info["contender"] != info["ours"] and not info["void"]]
        if not members:
            continue
        sizes, peers = (list(dict.fromkeys(info[key] for info in members)) for key in ("size", "contender"))
        figure, axes = plt.subplots(figsize=(2 + 1.6 * len(sizes), 4), layout="constrained")
        width = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            speed = {info["size"]: info["speed_of_ours_over_this"] for info in members if info["contender"] == peer}
            axes.bar(
                [sizes.index(size) + i * width for size in speed], list(speed.values()), width, label=f"over {peer}"
            )
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(
            [i + 0.4 - width / 2 for i in range(len(sizes))], [s.replace(",", "\n") for s in sizes], fontsize=8
        )
        axes.set(title=suite, ylabel="speed of seqaccel (times)")
        axes.legend()
        written.append(folder / f"{suite}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="what pytest benchmarks --benchmark-json=FILE wrote")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plots", type=pathlib.Path, metavar="FOLDER", help="write one PNG a suite there")
    options = parser.parse_args(arguments)
    data = read(options.file)
    if options.markdown:
        print_markdown(data)
    else:
        print_table(data)
    for path in plot(data, options.plots) if options.plots else []:
        print(path)


if __name__ == "__main__":
    main()
