"""Figures of a record: speed-up over batch and width, roofline, time against sequence length, streaming latency."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from benchmarks.records import cases, machine, numbers, ours

Cases = dict[tuple[str, str], dict[str, dict]]

HEAT = [f"{kind}_{mode}" for mode in ("inference", "training") for kind in ("lstm", "gru", "rnn")]
LENGTHS = "sequence_length"
WIDTH = 256  # of its layers


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
    norm = matplotlib.colors.LogNorm(1 / 6, 6)  # white is 1
    for panel, suite in zip(axes.flat, HEAT, strict=True):
        table = tables.get(suite)
        if table is None:
            panel.set_axis_off()
            continue
        batches, widths = (sorted(set(column)) for column in zip(*table, strict=True))
        grid = [[table.get((batch, width), float("nan")) for width in widths] for batch in batches]
        image = panel.imshow(grid, norm=norm, cmap="RdBu", origin="lower", aspect="auto")
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                if value == value:
                    colour = "black" if 0.2 < norm(value) < 0.8 else "white"
                    panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
        panel.set_xticks(range(len(widths)), widths)
        panel.set_yticks(range(len(batches)), batches)
        panel.set_facecolor("0.85")  # of a case that is void
        kind, mode = suite.split("_")
        panel.set(title=f"{kind.upper()}, {mode}", xlabel="hidden size")
    for panel in axes[:, 0]:
        panel.set_ylabel("batch size")
    bar = figure.colorbar(image, ax=axes, label="times as fast as torch.nn", shrink=0.8, extend="both")
    bar.set_ticks([0.2, 0.5, 1, 2, 5], labels=["0.2", "0.5", "1", "2", "5"])
    bar.minorticks_off()
    return figure


def job(info: dict) -> str | None:
    """What a point of the roofline stands for: a recurrence's intensity is about its batch size."""
    if info["device"] != "cpu" or not info["flops"] or "bfloat16" in info["suite"]:
        return None
    if info["family"] == "rnn":
        batch = numbers(info["size"]).get("B", 1)
        return "recurrent, batch of 1 to 4" if batch <= 4 else "recurrent, larger batches"
    if info["family"] == "scan":
        return "linear scan" if info["suite"].startswith("linear_scan") else "SRU and its kin"
    return {"conv": "convolution", "attention": "attention"}.get(info["family"])


def roofline(plt: Any, cases: Cases) -> Any:
    """Rate of each case of ours against its arithmetic intensity, below the machine's ceilings.

    A recurrence reads its weights once a step, from the cache. The dotted lines are medians.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    gemm, copy, cache = [], [], []
    for case in cases.values():
        info = ours(case)
        if name := job(info):
            rate = info["flops"] / info["seconds"]
            points.setdefault(name, []).append((info["flops"] / info["bytes"], rate / 1e9))
            for ceilings in (info["ceilings_before"], info["ceilings_after"]):
                gemm.append(ceilings["gemm"] / 1e9)
                copy.append(ceilings["copy"] / 1e9)
                cache.append(ceilings["cache"] / 1e9)
    if not points:
        return None
    figure, panel = plt.subplots(figsize=(8, 5.5), layout="constrained")
    peak = max(gemm)
    low = min(x for each in points.values() for x, _ in each) / 2
    high = 2 * max(x for each in points.values() for x, _ in each)
    for bandwidth, name, style in ((max(copy), "memory", "-"), (max(cache), "cache", "--")):
        corner = peak / bandwidth
        panel.plot(
            [low, corner, max(high, corner)],
            [low * bandwidth, peak, peak],
            style,
            color="black",
            linewidth=1,
            label=f"{name}: {bandwidth:.0f} GB/s, {peak:.0f} GFLOP/s",
        )
    for colour, (name, marker) in enumerate(zip(sorted(points), "^DsoPv", strict=False)):
        median = statistics.median(x for x, _ in points[name])
        look = {"color": f"C{colour}", "marker": marker, "label": f"{name}: {median:.3g} FLOP/byte"}
        panel.scatter(*zip(*points[name], strict=True), s=22, alpha=0.7, linewidths=0, **look)
        panel.axvline(median, color=f"C{colour}", linestyle=":", linewidth=1)
    panel.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="GFLOP/s")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="lower right")
    return figure


def sequence_length(plt: Any, cases: Cases) -> Any:
    """Time of one training step of a layer of each family against the number of steps."""
    import matplotlib.ticker

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
    kinds = {name: name.split()[-1] for name in lines}  # ours and torch's of a kind have one colour
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    for name, points in lines.items():
        steps, seconds = zip(*sorted(points), strict=True)
        style = "o--" if name.startswith("torch") else "o-"
        panel.plot(steps, [1e3 * s for s in seconds], style, color=colours[kinds[name]], markersize=4, label=name)
    panel.set(xscale="log", yscale="log", xlabel="steps T", ylabel="forward and backward (ms)")
    panel.set_xscale("log", base=2)
    ticks = sorted({steps for points in lines.values() for steps, _ in points})
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
    panel.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, title=f"one layer of {WIDTH}, one sequence", title_fontsize=8)
    return figure


#: Suites of one step of one stream, and the kind of model where the size does not name it.
STREAMS = {
    "session_step": "",
    "lstm_session_step": "LSTM",
    "sru_step": "SRU",
    "tcn_session_step": "TCN",
    "conv_session_step": "",
    "hierarchical_attention_step": "hierarchical attention",
}


def contender_of_stream(name: str) -> str:
    """The name in the figure: ``Session`` is ours, its weights float32 if nothing else is said."""
    if not name.startswith("seqaccel"):
        return {"torch": "torch: layer, dense attention"}.get(name, name)
    kind = name.partition("]")[2].strip() or name.partition("[")[2].rstrip("]")
    return {"cpp": "Session", "session": "Session", "step": "module.step", "module": "module.step"}.get(
        kind, f"Session, {kind}"
    )


def streaming(plt: Any, cases: Cases) -> Any:
    """Time of one step of one stream, ours beside each peer."""
    rows: dict[str, dict[str, float]] = {}
    for suite, kind in STREAMS.items():
        for (name, size), case in cases.items():
            if name == suite and numbers(size).get("B", 1) == 1 and len(case) > 1:
                words = [part.rpartition("=")[2] if part[:4] in ("cell", "net=") else part for part in size.split(",")]
                label = ", ".join(([kind] if kind else []) + [word for word in words if word != "B=1"])
                row = rows.setdefault(label, {})
                for contender, info in case.items():
                    row.setdefault(contender_of_stream(contender), info["seconds"])
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    names.sort(key=lambda name: not name.startswith(("Session", "module")))  # ours first
    figure, panel = plt.subplots(figsize=(9, 1.5 + 0.32 * len(rows)), layout="constrained")
    for index, name in enumerate(names):
        at = [(1e6 * row[name], place) for place, row in enumerate(rows.values()) if name in row]
        marker = "o" if name.startswith(("Session", "module")) else "x"
        panel.scatter(*zip(*at, strict=True), marker=marker, color=f"C{index}", label=name, zorder=3)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=8)
    panel.invert_yaxis()
    panel.set(xscale="log", xlabel="one step (µs)")
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
