"""Makes a table and plots of benchmark results.

``python -m benchmarks.report FILE.json [--markdown] [--plots FOLDER]``; with ``--bars`` the geometric means of the
recurrent suites beside their bars. Several files are read as one. Ours is the median round, a peer's figure its
fastest round. "speed of ours" is how many times as fast ours is as this contender (in brackets: the quartiles over the
rounds). "ceiling" is the share of what the machine could have done in that time, by operations or by bytes, whichever
binds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import pathlib
from collections.abc import Callable

from benchmarks import plots
from benchmarks.records import cases, duration, machine, numbers, ours, read_all

HEADER = ("case", "contender", "time", "GFLOP/s", "GB/s", "ceiling", "speed of ours")


def rows(data: dict) -> list[tuple[str, ...]]:
    """The table's cells."""
    table = []
    for group, members in itertools.groupby(data["benchmarks"], key=lambda row: row["group"]):
        for i, info in enumerate(row["extra_info"] for row in members):
            low, high = info.get("quartiles_of_speed", [info["fastest_over_fastest"]] * 2)  # older records lack them
            speed = f"{info['speed_of_ours_over_this']:.2f} ({low:.2f} to {high:.2f})"
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


def speed_over(peer: str) -> Callable[[dict[str, dict]], float | None]:
    return lambda case: case[peer]["speed_of_ours_over_this"] if peer in case else None


def time_over(peer: str) -> Callable[[dict[str, dict]], float | None]:
    return lambda case: 1 / case[peer]["speed_of_ours_over_this"] if peer in case else None


def speed_over_faster_peer(case: dict[str, dict]) -> float | None:
    speeds = [case[peer]["speed_of_ours_over_this"] for peer in ("onnxruntime", "openvino") if peer in case]
    return min(speeds, default=None)


def share_of_ceiling(case: dict[str, dict]) -> float | None:
    return ours(case)["percent_of_ceiling"] / 100


def batch(low: int, high: int) -> Callable[[dict[str, int]], bool]:
    return lambda size: low <= size["B"] <= high


def hidden(low: int, high: int) -> Callable[[dict[str, int]], bool]:
    return lambda size: low <= size["H"] <= high


def any_size(size: dict[str, int]) -> bool:
    return True


INFERENCE = ("lstm_inference", "gru_inference", "rnn_inference")
TABLE = (*INFERENCE, "lstm_training", "gru_training", "rnn_training")

#: What is compared, suites, sizes, figure of a case, bar of the geometric mean, bar of the worst case (None: none). The
#: bar is a least, or with "<" in front of the name a most.
BARS = (
    ("LSTM inference, B <= 4, over torch", ("lstm_inference",), batch(1, 4), speed_over("torch"), 1.25, 0.9),
    ("LSTM inference, B >= 16, over torch", ("lstm_inference",), batch(16, 64), speed_over("torch"), 0.97, 0.9),
    ("LSTM training over torch", ("lstm_training",), any_size, speed_over("torch"), 1.2, 0.9),
    ("GRU inference over torch", ("gru_inference",), any_size, speed_over("torch"), 2.0, 1.0),
    ("GRU training over torch", ("gru_training",), any_size, speed_over("torch"), 2.5, 1.0),
    ("RNN inference over torch", ("rnn_inference",), any_size, speed_over("torch"), 1.7, 0.95),
    ("RNN training over torch", ("rnn_training",), any_size, speed_over("torch"), 2.2, 0.95),
    *(
        (f"{suite.replace('_', ' ')} over the faster peer", (suite,), any_size, speed_over_faster_peer, 1.05, 0.85)
        for suite in INFERENCE
    ),
    ("all inference over the faster peer", INFERENCE, any_size, speed_over_faster_peer, 1.05, 0.85),
    *(
        (f"{suite.replace('_', ' ')}, ceiling, H >= 256", (suite,), hidden(256, 1024), share_of_ceiling, 0.8, None)
        for suite in TABLE
    ),
    *(
        (f"{suite.replace('_', ' ')}, ceiling, H = 128", (suite,), hidden(128, 128), share_of_ceiling, 0.65, None)
        for suite in TABLE
    ),
    ("all, ceiling, H >= 256", TABLE, hidden(256, 1024), share_of_ceiling, 0.8, None),
    ("all, ceiling, H = 128", TABLE, hidden(128, 128), share_of_ceiling, 0.65, None),
    *(
        (
            f"< {cell} LSTM training, time over LSTM",
            ("cell_training",),
            lambda size, cell=cell: size["cell"] == cell,
            time_over("seqaccel[cpp] LSTM"),
            bar,
            None,
        )
        for cell, bar in (("peephole", 1.1), ("layer_norm", 1.4), ("multiplicative", 1.5))
    ),
    ("< packed LSTM, time over padded", ("lstm_packed",), any_size, time_over("seqaccel[cpp] padded"), 0.65, None),
    (
        "< LSTM beside busy cores, time over quiet",
        ("lstm_busy_cores",),
        any_size,
        speed_over("seqaccel[cpp] busy"),
        4.0,
        None,
    ),
    ("session step, share of weight reading", ("lstm_session_step",), any_size, share_of_ceiling, 0.8, None),
    ("session step over ONNX Runtime", ("lstm_session_step",), any_size, speed_over("onnxruntime"), 1.05, None),
    (
        "session step, bfloat16 over float32",
        ("lstm_session_step",),
        any_size,
        time_over("seqaccel[cpp] bfloat16"),
        1.6,
        None,
    ),
    ("session step, int8 over float32", ("lstm_session_step",), any_size, time_over("seqaccel[cpp] int8"), 2.5, None),
    ("bfloat16 LSTM inference over torch", ("lstm_inference_bfloat16",), any_size, speed_over("torch"), 1.2, 1.0),
)


def print_bars(data: dict) -> None:
    """One line a bar: the geometric mean of its cases and the worst of them."""
    recorded = cases(data)
    print(f"{'':44} {'mean':>6} {'bar':>6} {'worst':>6} {'bar':>6}  cases")
    for name, suites, wanted, figure, mean_bar, worst_bar in BARS:
        found: dict[str, float] = {}
        void = 0
        for (suite, size), case in recorded.items():
            if suite not in suites or not wanted(numbers(size)):
                continue
            if any(info["void"] for info in case.values()):
                void += 1
                continue
            value = figure(case)
            if value is not None:
                found[f"{suite}[{size}]"] = value
        note = f" ({void} void)" if void else ""
        if not found:
            print(f"{name:44} {'-':>6} {mean_bar:6.2f} {'-':>6} {worst_bar or '':>6}{note}")
            continue
        most = name.startswith("<")
        mean = math.exp(sum(map(math.log, found.values())) / len(found))
        worst = (max if most else min)(found, key=found.__getitem__)
        met = (mean <= mean_bar if most else mean >= mean_bar) and (worst_bar is None or found[worst] >= worst_bar)
        print(
            f"{name:44} {mean:6.2f} {mean_bar:6.2f} {found[worst]:6.2f} {worst_bar or '':>6}  {len(found)}{note}, "
            f"worst {worst}{'' if met else '  MISSED'}"
        )
    print(machine(data))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "files", type=pathlib.Path, nargs="+", metavar="FILE", help="what pytest benchmarks --benchmark-json=FILE wrote"
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--plots", type=pathlib.Path, metavar="FOLDER", help="write figures (PNG) there")
    parser.add_argument("--bars", action="store_true", help="print the recurrent suites' means beside their bars")
    options = parser.parse_args(arguments)
    data = read_all(options.files)
    if options.bars:
        print_bars(data)
    elif options.markdown:
        print_markdown(data)
    else:
        print_table(data)
    for path in plots.write(data, options.plots) if options.plots else []:
        print(path)


if __name__ == "__main__":
    main()
