"""Hierarchical attention in plain PyTorch: the definition."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel.reference.dropout import dropped, kept

__all__ = ["attention_pool", "hierarchical_attention", "level_spans", "pool_level"]


def level_spans(length: int, block_size: int, fanout: int, levels: int | None) -> list[int]:
    """Tokens a node stands for, S_0 = 1, S_1, ..., on the levels that hold a complete node in ``length`` tokens."""
    spans = [1]
    factor = block_size
    while (levels is None or len(spans) <= levels) and spans[-1] * factor <= length:
        spans.append(spans[-1] * factor)
        factor = fanout
    return spans


def pool_level(
    key: Tensor, value: Tensor, pool_query: Tensor | None, children: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Keys and values of the nodes above ``key`` and ``value`` (B, heads, N, D): N // children of them.

    ``pool_query`` is (heads, D), or None for the mean.
    """
    nodes = key.shape[2] // children
    key = key[:, :, : nodes * children].unflatten(2, (nodes, children))
    value = value[:, :, : nodes * children].unflatten(2, (nodes, children))
    if pool_query is None:
        return key.mean(3), value.mean(3)
    weight = torch.softmax(scale * torch.einsum("bgncd,gd->bgnc", key, pool_query), dim=-1).unsqueeze(-1)
    return (weight * key).sum(3), (weight * value).sum(3)


def attention_pool(
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None = None,
    *,
    block_size: int = 64,
    fanout: int | None = None,
    levels: int | None = None,
    scale: float | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the nodes of each level, level 1 first. Level l pools with row min(l, P) - 1."""
    scale = key.shape[3] ** -0.5 if scale is None else scale
    spans = level_spans(key.shape[2], block_size, block_size if fanout is None else fanout, levels)
    pairs: list[tuple[Tensor, Tensor]] = []
    for level in range(1, len(spans)):
        row = None if pool_query is None else pool_query[min(level, pool_query.shape[0]) - 1]
        key, value = pool_level(key, value, row, spans[level] // spans[level - 1], scale)
        pairs.append((key, value))
    return pairs


def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None = None,
    *,
    block_size: int = 64,
    fanout: int | None = None,
    levels: int | None = None,
    local_blocks: int = 2,
    causal: bool = True,
    mass_bias: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    return_logsumexp: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends, in one softmax, to near tokens one by one and to farther ones through nodes that pool them.

    Node j of level l stands for the tokens [j S_l, (j + 1) S_l). With c_l = t // S_l the cell of the query at t, the
    query sees the node iff |c_l - j| >= local_blocks (always, on level 0), and its parent is not complete, or is too
    near to be seen itself: |c_{l+1} - parent| < local_blocks; where ``causal``, only nodes that end at t or before.
    Queries are those of the last positions of ``key``. Sequences that ``cu_seqlens`` or ``lengths`` give are attended
    to one by one; what belongs to none is 0. Dropout draws by rows ``rows`` (B, H, Tq), which count the queries, and in
    a row by the sequence's tokens, then its nodes of all levels.
    """
    B, H, Tq, D = query.shape
    G, T, Dv = key.shape[1], *value.shape[2:]
    fanout = block_size if fanout is None else fanout
    scale = D**-0.5 if scale is None else scale
    if cu_seqlens is not None or (lengths is not None and B > 0):
        options = (block_size, fanout, levels, local_blocks, causal, mass_bias, scale)
        rows = torch.arange(B * H * Tq, device=query.device).view(B, H, Tq)
        given = (query, key, value, pool_query, cu_seqlens, lengths, rows, options, dropout, seed)
        out, lse = _of_sequences(*given)
        return (out, lse) if return_logsumexp else out
    spans = level_spans(T, block_size, fanout, levels)
    top = len(spans) - 1
    block = min(block_size, max(T, 1))
    near = min(local_blocks, T // block + 1)
    start = (T - Tq) // block * block  # of the block of the first query
    blocks = (T - start + block - 1) // block
    t = start + torch.arange(blocks * block, device=query.device).view(blocks, block, 1)
    before = T - Tq - start
    query = F.pad(query, (0, 0, before, start + blocks * block - T))
    query = query.reshape(B, G, H // max(G, 1), blocks, block, D)
    logits, values, elements, first = [], [], [], 0
    unbounded: Tensor | float = 0.0
    for level, span in enumerate(spans):
        if level > 0:
            row = None if pool_query is None else pool_query[min(level, pool_query.shape[0]) - 1]
            key, value = pool_level(key, value, row, span // spans[level - 1], scale)
        count = key.shape[2]
        node = torch.arange(count, device=query.device).expand(blocks, count)
        if level < top:
            children = spans[level + 1] // span
            complete = count // children * children
            parent = t[:, 0] // spans[level + 1] - (near - 1)
            reach = (near if causal else 2 * near - 1) * children
            window = parent * children + torch.arange(reach, device=query.device)
            window = torch.where(window < complete, window, -1)
            node = torch.cat([window, node[:, complete:]], dim=1)
        cell = t // span
        seen = (node >= 0).unsqueeze(1)
        if level > 0:
            seen = seen & ((cell - node.unsqueeze(1)).abs() >= near)
        if causal:
            seen = seen & (node.unsqueeze(1) < cell + int(level == 0))
        index = node.clamp_min(0)
        logit = scale * torch.einsum("bghitd,bgijd->bghitj", query, key[:, :, index])
        logits.append((logit + (math.log(span) if mass_bias else 0.0)).masked_fill(~seen, -math.inf))
        # A weight of 0 does not keep out a value that is not finite: what no query of a block sees is 0, and on the
        # diagonal such values are added up in time apart from the others.
        chosen = value[:, :, index].masked_fill(~seen.any(1).unsqueeze(-1), 0.0)
        if causal and level == 0:
            finite = chosen.isfinite()
            place = torch.arange(node.shape[1], device=query.device)
            own = ((node.unsqueeze(1) == t) * place).sum(-1)  # of a query's own token
            until = chosen.detach().masked_fill(finite, 0.0).cumsum(3)
            unbounded = until.gather(3, own[..., None].expand(B, G, blocks, block, Dv)).unsqueeze(2)
            chosen = chosen.masked_fill(~finite, 0.0)
        values.append(chosen)
        elements.append(index + first)
        first += count
    scores = torch.cat(logits, dim=-1)
    weight = torch.softmax(scores, dim=-1)
    if dropout > 0:
        assert seed is not None
        rows = torch.arange(B * H * Tq, device=query.device).view(B, H, Tq) if rows is None else rows
        rows = F.pad(rows, (before, start + blocks * block - T)).reshape(*weight.shape[:-1], 1)
        weight = dropped(weight, kept(seed, rows, torch.cat(elements, dim=1).unsqueeze(1), dropout), dropout)
    out = torch.einsum("bghitj,bgijd->bghitd", weight, torch.cat(values, dim=3)) + unbounded
    out = out.reshape(B, H, blocks * block, Dv)[:, :, before : before + Tq]
    if not return_logsumexp:
        return out
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(-1)
    return out, lse.reshape(B, H, blocks * block)[:, :, before : before + Tq]


def _of_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    rows: Tensor,
    options: tuple,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and logsumexps, by one call per sequence."""
    names = ("block_size", "fanout", "levels", "local_blocks", "causal", "mass_bias", "scale")
    keywords = dict(zip(names, options, strict=True))
    T = key.shape[2]

    def attend(row: slice, time: slice) -> Any:
        q, k, v = (t[row, :, time] for t in (query, key, value))
        drops: dict[str, Any] = {"dropout": dropout, "seed": seed, "rows": rows[row, :, time]}
        return hierarchical_attention(q, k, v, pool_query, **keywords, **drops, return_logsumexp=True)

    def padding(steps: int) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(value.dtype, torch.float32)
        out = value.new_zeros(1, query.shape[1], steps, value.shape[3])
        return out, value.new_full(out.shape[:3], -math.inf, dtype=dtype)

    def join(parts: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, dim), torch.cat(lses, dim)

    if lengths is not None:
        ends = [min(max(end, 0), T) for end in lengths.tolist()]
        return join([join([attend(slice(b, b + 1), slice(end)), padding(T - end)], 2) for b, end in enumerate(ends)], 0)
    assert cu_seqlens is not None
    first, *ends = cu_seqlens.tolist()
    first = min(max(first, 0), T)
    parts = [padding(first)]
    for end in ends:
        end = min(max(end, first), T)
        parts.append(attend(slice(None), slice(first, end)))
        first = end
    return join([*parts, padding(T - first)], 2)
