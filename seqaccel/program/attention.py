"""Hierarchical attention and Transformers of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from seqaccel.nn.attention import HierarchicalAttention, HierarchicalAttentionEncoder
from seqaccel.program._describe import FUNCTIONS, activation_of, describe
from seqaccel.program._layers import Program

_MOST_TOKENS = 2**24  # of a stream, where nothing else is said


def pyramid_levels(module: HierarchicalAttention, max_length: int | None) -> tuple[int, int]:
    """The levels that streams of so many steps need, level 0 among them, and the slots of the highest one."""
    if max_length is None:
        if module.levels is not None:
            raise ValueError(
                "max_length: a Session of HierarchicalAttention with a number of levels needs to know how many steps "
                "a stream has"
            )
        max_length = _MOST_TOKENS
    top = 0
    while not module._is_top(top) and module.local_blocks * module._span(top + 1) < max_length:
        top += 1
    span = module._span(top)
    return top + 1, (
        max_length // span + 1 if module._is_top(top) else module._span(top + 1) // span * module.local_blocks
    )


def pyramid_parts(module: HierarchicalAttention, levels: int, top_slots: int) -> list[tuple[int, int, int, int]]:
    """Slots of each level, and where its keys, sums and moments begin in the memory of a head; the last row has the end
    of all of them."""
    d, place, rows = module.head_dim, 0, []
    for level in range(levels):
        slots = (
            top_slots if level + 1 == levels else module.local_blocks * (module._span(level + 1) // module._span(level))
        )
        rows.append((slots, place, place + 2 * slots * d))
        place += 2 * slots * d + 2 * d * (level > 0)
    parts = [(*row, place + 2 * max(level - 1, 0)) for level, row in enumerate(rows)]
    end = place + 2 * (levels - 1)
    return [*parts, (0, end, end, end)]


@describe.register
def _hierarchical(module: HierarchicalAttention, program: Program, name: str) -> None:
    program.batch_first = program.batch_first or module.batch_first
    _attends(module, program, name)


def _attends(module: HierarchicalAttention, program: Program, name: str, **options: Any) -> int:
    if not module.causal:
        raise ValueError("module: HierarchicalAttention(causal=False) cannot run step by step")
    if module.in_proj_weight is None:
        raise ValueError(
            "module: HierarchicalAttention with kdim or vdim cannot run step by step: a stream has one input"
        )
    E = module.embed_dim
    width = module.in_proj_weight.shape[0]
    count, top_slots = program.pyramid or pyramid_levels(module, program.max_length)
    size = -(-pyramid_parts(module, count, top_slots)[-1][1] // 16) * 16
    program.add("linear", E, width, module.in_proj_weight, module.in_proj_bias)
    program.keep(name + "age", "a")
    program.keep(name + "memory", "p", module.num_kv_heads, size)
    program.add(
        "hierarchical",
        width,
        E,
        module.pool_query,
        hidden=size,
        heads=module.num_heads,
        block_size=module.block_size,
        fanout=module.fanout,
        levels=count,
        local_blocks=module.local_blocks,
        top_slots=top_slots,
        limited=not module._is_top(count - 1),
        mass_bias=module.mass_bias,
        pool_rows=0 if module.pool_query is None else module.pool_query.shape[0],
        parameter=module.rotary_base or 0.0,
    )
    return program.add("linear", E, E, module.out_proj.weight, module.out_proj.bias, **options)


@describe.register
def _transformer_layer(module: nn.TransformerEncoderLayer, program: Program, name: str) -> None:
    program.batch_first = program.batch_first or module.self_attn.batch_first
    _encoder_layer(module, program, name)


def _encoder_layer(module: Any, program: Program, name: str) -> None:
    """A layer with the names of ``torch.nn.TransformerEncoderLayer``."""
    if not isinstance(module.self_attn, HierarchicalAttention):
        raise TypeError(
            "module: a Session runs Transformer layers whose self_attn is HierarchicalAttention, "
            f"but got {type(module.self_attn).__name__}"
        )
    function = module.activation
    found = activation_of(function) if isinstance(function, nn.Module) else (FUNCTIONS.get(function), 0.0)
    kind, parameter = found or (None, 0.0)
    if kind is None or kind == "softmax":
        raise TypeError(f"module: a Session does not run a feed-forward with the activation {function}")
    source = program.last
    if module.norm_first:
        describe(module.norm1, program, name)
    x = _attends(module.self_attn, program, name, skip=len(program.layers) + 2 - source)
    if not module.norm_first:
        describe(module.norm1, program, name)
        x = program.last
    else:
        describe(module.norm2, program, name)
    first, second = module.linear1, module.linear2
    program.add(
        "linear", first.in_features, first.out_features, first.weight, first.bias, activation=kind, parameter=parameter
    )
    program.add("linear", second.in_features, second.out_features, second.weight, second.bias, skip=program.back(x))
    if not module.norm_first:
        describe(module.norm2, program, name)


@describe.register(nn.TransformerEncoder)
@describe.register(HierarchicalAttentionEncoder)
def _encoder(module: Any, program: Program, name: str) -> None:
    layers = list(module.layers)
    if not layers:
        raise TypeError(f"module: there is nothing to run in a {type(module).__name__} without layers")
    batch_first = (
        module.batch_first if isinstance(module, HierarchicalAttentionEncoder) else layers[0].self_attn.batch_first
    )
    program.batch_first = program.batch_first or batch_first
    positions = getattr(module, "positions", None)
    length = program.max_length
    if positions is not None:
        rows, width = positions.weight.shape
        if length is not None and length > rows:
            raise ValueError(f"max_length: expected at most max_positions={rows}, but got {length}")
        program.keep(name + "position", "a")
        program.add("positions", width, width, positions.weight, hidden=rows)
        program.max_length = rows if length is None else length
    for layer in layers:
        _encoder_layer(layer, program, name)
    program.max_length = length
    if module.norm is not None:
        describe(module.norm, program, name)
