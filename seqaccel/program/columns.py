"""Layers whose recurrence is elementwise: SRU and its kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seqaccel.nn.scan import SRU, SRUCell, SRUpp
from seqaccel.nn.scan._base import Columns
from seqaccel.nn.scan._sru_pp import Attention, Projection
from seqaccel.program._describe import describe
from seqaccel.program._layers import Program


@describe.register(SRU)
@describe.register(SRUpp)
def _sru(module: Any, program: Program, name: str) -> None:
    if module.input_to_hidden is not None:
        describe(module.input_to_hidden, program, name)
    for cell in module.rnn_lst:
        describe(cell, program, name)


@describe.register
def _sru_cell(module: SRUCell, program: Program, name: str) -> None:
    custom = getattr(module, module._custom)
    if not isinstance(custom, Attention | Projection | None):
        raise TypeError("module: a Session does not run an SRU with custom_m")
    if module.bidirectional:
        raise ValueError("module: a bidirectional SRU cannot run step by step")
    inputs, hidden, matrices, norm = module.input_size, module.hidden_size, module.num_matrices, module.layer_norm
    source = program.last
    if norm is not None and not module.normalize_after:
        describe(norm, program, name)
    if custom is not None:
        weight = _attention(custom, program, name)
    else:
        weight = module.weight.detach()
        if module.weight_proj is not None:
            program.add("linear", inputs, module.weight_proj.shape[1], module.weight_proj.t(), None)
    skips = module.has_skip_term and matrices == 3
    program.keep(name + "c", "c", hidden)
    program.add(
        "sru_tanh" if module.use_tanh else "sru",
        weight.shape[0],
        hidden,
        weight.view(-1, hidden, matrices).permute(2, 1, 0).flatten(0, 1),
        None,
        module.bias,
        module.weight_c,
        hidden=hidden,
        matrices=matrices,
        skip=program.back(source) if skips else 0,
        parameter=module.scale_x.item() if module.rescale and skips else 1.0,
    )
    if norm is not None and module.normalize_after:
        describe(norm, program, name)


def _attention(module: Attention | Projection, program: Program, name: str) -> Tensor:
    """Adds the transform of an SRU++ layer but for its last product, whose weight (inner, 3H or 4H) it returns."""
    describe(module.linear1, program, name)
    last = module.linear2
    if isinstance(module, Attention):
        length, query, last = program.memory_length, program.last, module.linear3
        if length is None:
            raise ValueError(
                "memory_length: a Session of SRUpp needs to know to how many steps before it a step attends"
            )
        weight, inner = module.linear2.weight.detach().clone(), last.in_features
        weight[inner:] *= module.alpha.detach()
        program.add("linear", inner, 2 * inner, weight, None)
        program.keep(name + "age", "n")
        program.keep(name + "memory", "m", length, 2 * inner)
        program.add(
            "attention",
            2 * inner,
            inner,
            skip=program.back(query),
            taps=length + 1,
            heads=module.num_heads,
            parameter=1.0,
        )
    if module.layer_norm is not None:
        describe(module.layer_norm, program, name)
    return last.weight.detach().t()


@describe.register
def _columns(module: Columns, program: Program, name: str) -> None:
    if module.bidirectional:
        raise ValueError(f"module: a bidirectional {type(module).__name__} cannot run step by step")
    program.batch_first = program.batch_first or module.batch_first
    hidden = module.hidden_size
    for k in range(module.num_layers):
        weight, weight_hh, bias = module._weights(k)
        inputs = module.input_size if k == 0 else hidden
        now, before = weight.detach().split(inputs, 1) if module._window == 2 else (weight, None)
        program.keep(name + module._state_name, "c", hidden)
        if before is not None:
            program.keep(f"{name}x_{k}", "x", inputs)
        program.add(
            module.cell,
            inputs,
            hidden,
            now,
            before,
            bias,
            weight_hh,
            hidden=hidden,
            matrices=module._spec.inputs,
            parameter=1.0 - getattr(module, "zoneout", 0.0),
        )
