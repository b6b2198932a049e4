"""What ``torch.onnx.export`` records in place of our kernels: torch's operators, and ONNX's Scan for loops over time.

Recurrent layers that ONNX has operators for are in ``seqaccel.functional.rnn._onnx``.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel.reference import scan as reference

# Attention has the levels whose nodes are shorter. A level more costs every T its keys, and seconds of export.
LONGEST_NODE = 1 << 16


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is recording; the second question alone would take 2 us a call."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def detached(*tensors: Tensor | None) -> list[Any]:
    """The tensors without autograd, which an ONNX model has not and torch's scan takes amiss."""
    return [None if t is None else t.detach() for t in tensors]


def loop(
    step: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], Any]],
    state: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reverse: bool = False,
) -> tuple[list[Tensor], Any]:
    """The last state, and the outputs (T, ...) of ``step(state, inputs of one step)``, as one Scan for any T.

    A step returns new tensors: no output may be an input or another output.
    """
    from torch._higher_order_ops.scan import scan

    # Contiguous copies: scan takes no views at an offset that depends on B, as a layer's part of a module's state is,
    # and the state of every step has the same strides.
    state = [part.clone(memory_format=torch.contiguous_format) for part in state]
    return scan(step, state, list(inputs), reverse=reverse)


def linear_scan(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    return_last: bool,
) -> tuple[Tensor, Tensor]:
    """``seqaccel.reference.scan.linear_scan``."""
    a, b, h_0 = detached(a, b, h_0)
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = b.new_zeros(sequences, b.shape[2]) if h_0 is None else h_0
    start, starts = first, []
    if cu_seqlens is not None:
        start = b.new_zeros(1, b.shape[2])
        flags, b = reference.restarted(a, b, h_0, cu_seqlens, reverse)
        starts = [flags]
    elif reset is not None:
        starts = [reference.begins(reset, reverse).t().unsqueeze(2)]

    def step(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        h = inputs[0] * state[0] + inputs[1]
        if starts:
            h = torch.where(inputs[2], inputs[1], h)
        return [h], h.clone()

    h = loop(step, [start], [a.transpose(0, 1), b.transpose(0, 1), *starts], reverse)[1].transpose(0, 1)
    return h, reference.final_states(h, first, cu_seqlens, reverse) if return_last else h.new_empty(0, h.shape[2])


def columns(
    cell: str,
    u: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    c_0: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    mask_pad: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    directions: int,
) -> tuple[Tensor, Tensor]:
    """``seqaccel.reference.scan.columns``: each direction is a loop over calls of it with one step."""
    u, x, weight, bias, c_0, mask, scale = detached(u, x, weight, bias, c_0, mask, scale)
    scale = None if scale is None else scale.reshape(())  # in a loop's graph a size of 1 is a symbol
    packed, fresh = cu_seqlens is not None, c_0
    if cu_seqlens is not None:
        fresh, mask, mask_pad, reset = reference.packed_steps(cu_seqlens, c_0, mask, u.shape[0])
    channels = c_0.shape[-1]
    hidden, width = channels // directions, u.shape[-1] // directions
    outputs, states = [], []
    for d in range(directions):
        half = slice(d * hidden, (d + 1) * hidden)

        def rows(t: Tensor | None, d: int = d) -> Tensor | None:
            return t if t is None or t.dim() == 3 else t.view(-1, directions, hidden)[:, d].reshape(-1)

        begins = reset
        if reset is not None and d == 1:  # against time a sequence begins before the step it meets
            begins = torch.cat([reset[1:], torch.zeros_like(reset[:1])])
        own_weight, own_bias, own_mask = rows(weight), rows(bias), None if mask is None else mask[..., half]
        optional = {
            "u": u[..., d * width : (d + 1) * width],
            "x": None if x is None else x[..., half],
            "weight": own_weight[..., 2 * d * hidden : 2 * (d + 1) * hidden]
            if own_weight is not None and own_weight.dim() == 3
            else None,
            "mask": own_mask if own_mask is not None and own_mask.dim() == 3 else None,
            "mask_pad": mask_pad,
            "begins": begins,
            "fresh": fresh[:, half] if packed else None,
        }
        of_steps = {name: t for name, t in optional.items() if t is not None}
        of_all = {"weight": own_weight, "mask": own_mask, "fresh": torch.zeros_like(c_0[:, half])}

        def step(
            state: list[Tensor], inputs: list[Tensor], of_steps=of_steps, of_all=of_all, own_bias=own_bias
        ) -> tuple[list[Tensor], Any]:
            at: dict[str, Any] = of_all | {name: t.unsqueeze(0) for name, t in zip(of_steps, inputs, strict=True)}
            c = state[0].view(at["u"].shape[1], hidden)  # in a loop's graph the sizes of a state are symbols
            if "begins" in at:
                c = torch.where(at["begins"][0].unsqueeze(1), at["fresh"], c)
            h, c = reference.columns(
                cell, at["u"], at.get("x"), at["weight"], own_bias, c, at["mask"], scale, at.get("mask_pad")
            )
            return [c], ([h.squeeze(0), c.clone()] if packed else h.squeeze(0))

        start = fresh[-1 if d else 0, None, half] if packed else c_0[:, half]
        (c_n,), found = loop(step, [start], list(of_steps.values()), d == 1)
        if cu_seqlens is not None:
            found, after = found
            c_n = reference.last_states(cu_seqlens, c_0[:, half], after.squeeze(1), d == 1)
        outputs.append(found)
        states.append(c_n)
    return torch.cat(outputs, -1), torch.cat(states, -1)


def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None,
    cu_seqlens: Tensor | None,
    lengths: Tensor | None,
    block_size: int,
    fanout: int,
    levels: int,
    local_blocks: int,
    causal: bool,
    mass_bias: bool,
    scale: float,
) -> Tensor:
    """``seqaccel.reference.attention.hierarchical_attention``: one graph for any T, with all levels that T may need.

    A level without a node in T tokens changes nothing. No size is ever 0 or 1, which would tie the graph to a T: each
    level has two rows that no query sees past its nodes.
    """
    if cu_seqlens is not None:
        raise RuntimeError("hierarchical_attention: cu_seqlens is not exported to ONNX; give padded rows and lengths")
    B, H, Tq, D = query.shape
    G, T, Dv = key.shape[1], *value.shape[2:]
    spans = [1]
    while len(spans) - 1 != levels and spans[-1] * (fanout if len(spans) > 1 else block_size) < LONGEST_NODE:
        spans.append(spans[-1] * (fanout if len(spans) > 1 else block_size))
    start = (T - Tq) // block_size * block_size  # of the block of the first query
    blocks = (T - start) // block_size + 2
    rows = H // G * block_size  # of a block: its queries of every head of a key head
    steps = torch.arange(max(block_size, fanout), device=query.device)
    first = start + block_size * torch.arange(blocks, device=query.device).unsqueeze(1)
    place = first + steps[:block_size]
    t = place.unsqueeze(1).expand(-1, H // G, -1).reshape(blocks, rows, 1)
    query = (scale * query).view(B, G, H // G, Tq, D)[:, :, :, (place - (T - Tq)).clamp(0, Tq - 1)]
    query = query.transpose(2, 3).reshape(B, G, blocks, rows, D)
    pair = torch.cat([key, value], dim=-1)
    end: Any = T  # of each sequence
    if lengths is not None:
        end = lengths.view(B, 1, 1)
        pair = pair.where((torch.arange(T, device=query.device) < end).unsqueeze(3), 0.0)
    pair = F.pad(pair, (0, 0, 0, 2))  # [B, G, nodes of a level + 2, D + Dv]
    logits, values = [], []
    for level, span in enumerate(spans):
        count, most = end // span, T // span
        if level + 1 == len(spans):
            node, chosen = torch.arange(most + 2, device=query.device).unsqueeze(0), pair.unsqueeze(2)
        else:
            children = spans[level + 1] // span
            complete = end // spans[level + 1] * children
            parent = first // spans[level + 1] - (local_blocks - 1)
            reach = (local_blocks if causal else 2 * local_blocks - 1) * children
            window = parent * children + torch.arange(reach, device=query.device)
            window = torch.where(window < complete, window, count)
            rest = complete + steps[:children]
            node = torch.cat([window, rest.expand(*window.shape[:-1], children)], dim=-1)  # [(B,) blocks, nodes]
            if lengths is None:
                chosen = pair[:, :, node.clamp(0, most)]
            else:
                row = torch.arange(B, device=query.device).view(B, 1, 1)
                chosen = pair.transpose(1, 2)[row, node.clamp(0, most)].permute(0, 3, 1, 2, 4)
        count = count if lengths is None else count.unsqueeze(3)
        node, cell = node.unsqueeze(-2), t // span
        seen = (node >= 0) & (node < count)
        if level > 0:
            seen = seen & ((cell - node).abs() >= local_blocks)
        if causal:
            seen = seen & (node < cell + int(level == 0))
        logit = query @ chosen[..., :D].transpose(3, 4) + (math.log(span) if mass_bias else 0.0)
        logits.append(logit.masked_fill(~(seen if lengths is None else seen.unsqueeze(1)), -math.inf))
        values.append(chosen[..., D:])
        if level + 1 < len(spans):
            parent = torch.arange(T // spans[level + 1] + 2, device=query.device).unsqueeze(1)
            pair = pair[:, :, (parent * children + steps[:children]).clamp_max(most)]
            if pool_query is None:
                pair = pair.mean(3)
            else:
                row = pool_query[min(level + 1, pool_query.shape[0]) - 1].view(G, 1, D, 1)
                pair = (torch.softmax(scale * (pair[..., :D] @ row), dim=3) * pair).sum(3)
    weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1).split([logit.shape[-1] for logit in logits], dim=-1)
    out = sum(weight @ value for weight, value in zip(weights[1:], values[1:], strict=True)) + weights[0] @ values[0]
    out = out.view(B, G, blocks, H // G, block_size, Dv).transpose(2, 3).reshape(B, H, blocks * block_size, Dv)
    place = torch.arange(Tq, device=query.device) + (T - Tq)
    out = out.index_select(2, place - start)
    return out if lengths is None else out.where((place < end).unsqueeze(3), 0.0)
