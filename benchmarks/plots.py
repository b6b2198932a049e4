"""Figures of a record: speed-up over batch and width, roofline, time against sequence length, streaming latency."""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks.records import cases, machine, numbers, ours

Cases = dict[tuple[str, str], dict[str, dict]]

HEAT = [f"{kind}_{mode}" for mode in ("inference", "training") for kind in ("lstm", "gru", "rnn")]
FAMILIES = {"rnn": "recurrent", "scan": "scan", "conv": "convolution", "attention": "attention"}
LENGTHS = "sequence_length"


def write(data: dict, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes each figure that the record has cases for; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    sound = {key: case for key, case in cases(data).items() if not any(info["void"] for info in case.values())}
    written = []
    for draw in (heat_map, roofline, sequence_length, streaming):
        figure = draw(plt, sound)
        if figure is not None:
            figure.supxlabel(machine(data), fontsize=6, color="grey")
            written.append(folder / f"{draw.__name__}.png")
            figure.savefig(written[-1], dpi=150)
            plt.close(figure)
    return written


def heat_map(plt: Any, cases: Cases) -> Any:
    """Speed over torch by batch and hidden size: a panel a suite."""
    import matplotlib.colors

    tables: dict[str, dict[tuple[int, int], float]] = {}
    for (suite, size), case in cases.items():
        if suite in HEAT and "torch" in case:
            at = numbers(size)
            tables.setdefault(suite, {})[at["B"], at["H"]] = case["torch"]["speed_of_ours_over_this"]
    if not tables:
        return None
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), layout="constrained", squeeze=False)
    norm = matplotlib.colors.TwoSlopeNorm(1, 0.5, 5)
    for panel, suite in zip(axes.flat, HEAT, strict=True):
        table = tables.get(suite)
        if table is None:
            panel.set_axis_off()
            continue
        batches, widths = (sorted(set(column)) for column in zip(*table, strict=True))
        grid = [[table.get((batch, width), float("nan")) for width in widths] for batch in batches]
        image = panel.imshow(grid, norm=norm, cmap="RdYlGn", origin="lower", aspect="auto")
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                if value == value:
                    panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9)
        panel.set_xticks(range(len(widths)), widths)
        panel.set_yticks(range(len(batches)), batches)
        kind, mode = suite.split("_")
        panel.set(title=f"{kind.upper()}, {mode}", xlabel="hidden size", ylabel="batch size")
    figure.colorbar(image, ax=axes, label="speed over torch.nn (times)", shrink=0.8)
    return figure


def roofline(plt: Any, cases: Cases) -> Any:
    """Rate of each case of ours against its operations per byte, below the machine's ceilings.

    A recurrence reads its weights once a step, so few operations come to a byte, and those bytes come from the cache.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    gemm, copy, cache = [], [], []
    for case in cases.values():
        info = ours(case)
        if info["family"] in FAMILIES and info["device"] == "cpu" and info["flops"] and "bfloat16" not in info["suite"]:
            rate = info["flops"] / info["seconds"]
            points.setdefault(info["family"], []).append((info["flops"] / info["bytes"], rate / 1e9))
            for ceilings in (info["ceilings_before"], info["ceilings_after"]):
                gemm.append(ceilings["gemm"] / 1e9)
                copy.append(ceilings["copy"] / 1e9)
                cache.append(ceilings["cache"] / 1e9)
    if not points:
        return None
    figure, panel = plt.subplots(figsize=(8, 5.5), layout="constrained")
    peak, memory = (sorted(values)[len(values) // 2] for values in (gemm, copy))
    low = min(x for family in points.values() for x, _ in family) / 2
    high = 2 * max(x for family in points.values() for x, _ in family)
    for bandwidth, name, style in ((memory, "memory", "-"), (max(cache), "cache", "--")):
        corner = peak / bandwidth
        panel.plot(
            [low, corner, max(high, corner)],
            [low * bandwidth, peak, peak],
            style,
            color="black",
            linewidth=1,
            label=f"{name}: {bandwidth:.0f} GB/s, {peak:.0f} GFLOP/s",
        )
    for family, marker in zip(FAMILIES, "osD^", strict=True):
        if family in points:
            panel.scatter(*zip(*points[family], strict=True), s=22, marker=marker, alpha=0.75, label=FAMILIES[family])
    panel.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GFLOP/s", title="Roofline")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    return figure


def sequence_length(plt: Any, cases: Cases) -> Any:
    """Time of one training step of a layer of each family against the number of steps."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for (suite, size), case in cases.items():
        if suite == LENGTHS:
            for name, info in case.items():
                lines.setdefault(name.replace("seqaccel[cpp]", "seqaccel"), []).append(
                    (numbers(size)["T"], info["seconds"])
                )
    if not lines:
        return None
    figure, panel = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, points in lines.items():
        steps, seconds = zip(*sorted(points), strict=True)
        panel.plot(steps, [1e3 * s for s in seconds], "o--" if name.startswith("torch") else "o-", label=name)
    panel.set(xscale="log", yscale="log", xlabel="steps T", ylabel="forward and backward (ms)")
    panel.set_xscale("log", base=2)
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize=8)
    return figure


def streaming(plt: Any, cases: Cases) -> Any:
    """Time of one step of one stream, ours beside each peer."""
    chosen = {key: case for key, case in cases.items() if key[0].endswith("session_step") and len(case) > 1}
    if not chosen:
        return None
    names = list(dict.fromkeys(name for case in chosen.values() for name in case))
    figure, panel = plt.subplots(figsize=(9, 1.5 + 0.42 * len(chosen)), layout="constrained")
    for index, name in enumerate(names):
        at = [(row, case[name]["seconds"]) for row, case in enumerate(chosen.values()) if name in case]
        marker = "o" if name.startswith("seqaccel") else "x"
        panel.scatter(
            [1e6 * seconds for _, seconds in at], [row for row, _ in at], marker=marker, color=f"C{index}", label=name
        )
    panel.set_yticks(
        range(len(chosen)), [f"{suite.removesuffix('_session_step')} {size}" for suite, size in chosen], fontsize=8
    )
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel="one step (µs)")
    panel.grid(alpha=0.3, which="both", axis="x")
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
