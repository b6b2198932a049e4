"""Draws docs/attention-levels.png: at which level each query sees each position, read off the operator's weights.

python docs/draw_attention.py
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, ListedColormap
from torch import Tensor

from seqaccel.functional import hierarchical_attention

T, BLOCK_SIZE, FANOUT = 256, 4, 4
COLOURS = ["#1f3b73", "#2a8fbd", "#7fc8a9", "#f2c45f"]


def spans_seen(causal: bool) -> Tensor:
    """(T, T): of how many tokens the node is through which query t sees position j; 0 where it does not see it.

    Without mass bias equal keys give every token and node the same weight, and a node shares its weight among its
    tokens. Values are one-hot, so that row t of the output is the weight of each position.
    """
    zeros, positions = torch.zeros(1, 1, T, T), torch.eye(T)[None, None]
    weight = hierarchical_attention(
        zeros, zeros, positions, block_size=BLOCK_SIZE, fanout=FANOUT, causal=causal, mass_bias=False
    )[0, 0]
    return torch.where(weight > 0, weight.diagonal()[:, None] / weight, 0.0).round().long()


def draw(path: pathlib.Path) -> None:
    figure = plt.figure(figsize=(11, 6.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4.4, 2.2])
    legend = None
    panels = top.subplots(1, 2)
    for panel, causal in zip(panels, (True, False), strict=True):
        seen = spans_seen(causal)
        spans = [int(span) for span in seen.unique() if span > 0]
        level = sum((seen >= span).long() for span in spans) - 1  # -1 where unseen
        colours = ListedColormap(["white", *COLOURS[: len(spans)]])
        norm = BoundaryNorm(np.arange(-1.5, len(spans)), colours.N)
        panel.imshow(level, cmap=colours, norm=norm, interpolation="nearest")
        title = "causal" if causal else "causal=False"
        panel.set(
            title=title, xlabel="position", ylabel="query", xticks=range(0, T + 1, 64), yticks=range(0, T + 1, 64)
        )
        if causal:
            legend = [
                plt.Rectangle((0, 0), 1, 1, color=COLOURS[i], label=f"level {i}: {span} token{'s' * (span > 1)}")
                for i, span in enumerate(spans)
            ]
            rows(bottom, seen, level, spans)
    top.legend(handles=legend, loc="outside upper center", ncols=len(legend or []), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def rows(figure, seen: Tensor, level: Tensor, spans: list[int]) -> None:
    """What some queries see, node by node."""
    panel = figure.subplots()
    queries = (40, 150, 219)
    for row, t in enumerate(queries):
        nodes = 0
        for i, span in enumerate(spans):
            starts = [j for j in range(0, t + 1, span) if level[t, j] == i]
            panel.broken_barh(
                [(j, span) for j in starts], (row - 0.3, 0.6), color=COLOURS[i], edgecolor="white", linewidth=0.7
            )
            nodes += len(starts)
        panel.text(t + 3, row, f"{t + 1} positions through {nodes} tokens and nodes", va="center", fontsize=9)
    panel.set(xlim=(0, T + 90), ylim=(len(queries) - 0.5, -0.5), xlabel="position", xticks=range(0, T + 1, 64))
    panel.set_yticks(range(len(queries)), [f"query {t}" for t in queries])
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path(__file__).with_name("attention-levels.png"))
