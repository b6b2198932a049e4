"""Hierarchical attention by brute force, in float64, from the definition: an explicit list of nodes a query."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_spans(T: int, block_size: int, fanout: int, levels: int | None) -> list[int]:
    """S_0, ..., S_n with n = ``levels``, or the smallest n with S_n >= T."""
    spans = [1, block_size]
    if levels is None:
        while spans[-1] < T:
            spans.append(spans[-1] * fanout)
    else:
        while len(spans) <= levels:
            spans.append(spans[-1] * fanout)
        spans = spans[: levels + 1]
    return spans


def cover(t: int, T: int, spans: list[int], w: int, causal: bool) -> list[tuple[int, int]]:
    """The (level, node) that the query at ``t`` attends to."""
    top = len(spans) - 1
    nodes: list[tuple[int, int]] = []

    def add(level: int, begin: int, end: int) -> None:
        assert begin >= end or (begin % spans[level] == 0 and end % spans[level] == 0)
        nodes.extend((level, j) for j in range(begin // spans[level], end // spans[level]) if begin < end)

    previous = t + 1
    for level in range(top + 1):
        start = 0 if level == top else spans[level + 1] * max(0, t // spans[level + 1] - (w - 1))
        add(level, start, previous)
        previous = start
    if causal:
        return nodes
    complete = [T if s == 1 else s * (T // s) for s in spans]
    e = t + 1
    for level in range(top):
        reach = max(e, min(complete[level + 1], spans[level + 1] * (t // spans[level + 1] + w)))
        add(level, e, reach)
        e = reach
    reach = max(e, complete[top])
    add(top, e, reach)
    e = reach
    for level in range(top - 1, -1, -1):
        add(level, max(e, complete[level + 1]), complete[level])
    return nodes


def brute_force(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None = None,
    *,
    block_size: int,
    fanout: int | None = None,
    levels: int | None = None,
    local_blocks: int = 2,
    causal: bool = True,
    mass_bias: bool = True,
    scale: float | None = None,
) -> Tensor:
    B, H, T, D = query.shape
    G = key.shape[1]
    scale = 1 / math.sqrt(D) if scale is None else scale
    spans = all_spans(T, block_size, fanout or block_size, levels)
    out = torch.zeros(B, H, T, value.shape[3], dtype=torch.float64)
    covers = [cover(t, T, spans, local_blocks, causal) for t in range(T)]
    for b in range(B):
        for g in range(G):
            keys = [list(key[b, g].double())]
            values = [list(value[b, g].double())]
            for level in range(1, len(spans)):
                n = spans[level] // spans[level - 1]
                level_keys, level_values = [], []
                for j in range(len(keys[-1]) // n):
                    k = torch.stack(keys[-1][j * n : (j + 1) * n])
                    v = torch.stack(values[-1][j * n : (j + 1) * n])
                    if pool_query is None:
                        weight = torch.full((n,), 1 / n, dtype=torch.float64)
                    else:
                        weight = torch.softmax(
                            k @ pool_query[min(level, len(pool_query)) - 1, g].double() * scale, dim=0
                        )
                    level_keys.append(weight @ k)
                    level_values.append(weight @ v)
                keys.append(level_keys)
                values.append(level_values)
            for h in range(g * (H // G), (g + 1) * (H // G)):
                for t in range(T):
                    k = torch.stack([keys[level][j] for level, j in covers[t]])
                    v = torch.stack([values[level][j] for level, j in covers[t]])
                    bias = torch.tensor(
                        [math.log(spans[level]) if mass_bias else 0.0 for level, _ in covers[t]], dtype=torch.float64
                    )
                    out[b, h, t] = torch.softmax(k @ query[b, h, t].double() * scale + bias, dim=0) @ v
    return out
