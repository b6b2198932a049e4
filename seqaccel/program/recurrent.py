"""Recurrent layers and cells."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seqaccel.functional.rnn import CELLS
from seqaccel.nn.rnn import LiGRU
from seqaccel.nn.rnn._base import Recurrent
from seqaccel.nn.rnn._cells import GRUCell, LSTMCell, RNNCell
from seqaccel.program._describe import describe
from seqaccel.program._layers import Program


@describe.register(RNNCell)
@describe.register(LSTMCell)
@describe.register(GRUCell)
def _recurrent_cell(module: Any, program: Program, name: str) -> None:
    if isinstance(module, RNNCell):
        kind = f"rnn_{module.nonlinearity}"
    else:
        kind = "lstm" if isinstance(module, LSTMCell) else "gru"
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]
    hidden = module.hidden_size
    for part in "hc" if kind == "lstm" else "h":
        program.keep(name + part, part, hidden)
    program.add(kind, module.input_size, hidden, *weights, *[None] * (kind == "lstm"), hidden=hidden)


@describe.register
def _ligru(module: LiGRU, program: Program, name: str) -> None:
    """The products of the input are a Linear with its norm; the layer's own multiply them by 1."""
    if module.bidirectional:
        raise ValueError("module: a bidirectional LiGRU cannot run step by step")
    program.batch_first = program.batch_first or module.batch_first
    hidden = module.hidden_size
    for k in range(module.num_layers):
        weight_ih, weight_hh = getattr(module, f"weight_ih_l{k}"), getattr(module, f"weight_hh_l{k}")
        linear = nn.Linear(weight_ih.shape[1], 2 * hidden, bias=False, device="meta")
        linear.weight = weight_ih
        describe(linear, program, name)
        describe(module.get_submodule(f"norm_l{k}"), program, name)
        kind, width, bias = f"ligru_{module.nonlinearity}", 2 * hidden, None
        if module.normalization == "batch_norm":  # in eval mode part of the Linear, which the layer has itself
            before = program.layers.pop()
            width, (weight, bias) = before.inputs, before.weights
        else:
            weight = torch.eye(width, dtype=weight_hh.dtype, device=weight_hh.device)
        program.keep(name + "h", "h", hidden)
        program.add(kind, width, hidden, weight, weight_hh, bias, None, hidden=hidden)


@describe.register
def _recurrent(module: Recurrent, program: Program, name: str) -> None:
    if "cpp" not in CELLS[module.cell].backends:
        raise TypeError(f"module: a Session runs C++ kernels, which {type(module).__name__} has not")
    if module.bidirectional:
        raise ValueError(f"module: a bidirectional {type(module).__name__} cannot run step by step")
    program.batch_first = program.batch_first or module.batch_first
    hidden, outputs = module.hidden_size, module.proj_size or module.hidden_size
    zoneout_h, zoneout_c = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout, module.zoneout)
    for layer in range(module.num_layers):
        program.keep(name + "h", "h", outputs)
        if CELLS[module.cell].has_cell_state:
            program.keep(name + "c", "c", hidden)
        program.add(
            module.cell,
            module.input_size if layer == 0 else outputs,
            outputs,
            *module._layer_weights(layer),
            hidden=hidden,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
        )
