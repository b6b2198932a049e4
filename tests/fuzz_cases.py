"""What the fuzzers call: every C++ operator, sessions and modules, each with a generator of valid arguments."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import session_cases
import torch
from instruction_sets import USABLE_NARROW_ISAS
from torch import Tensor

import seqaccel
from seqaccel.functional.rnn import CELLS
from seqaccel.functional.scan import CELLS as COLUMN_CELLS
from seqaccel.reference.conv import ACTIVATIONS, GATED

Arguments = dict[str, Any]  # by the schema's names
Generator = Callable[[random.Random], Arguments]

OPERATORS = torch.ops.seqaccel
NARROW = [torch.bfloat16, torch.float16]


# ---- valid arguments ----


def sizes(rng: random.Random, *most: int) -> list[int]:
    """A random size up to each bound, small ones more often; seldom 0."""
    return [0 if rng.random() < 0.02 else 1 + int(bound * rng.random() ** 2) for bound in most]


def maybe(rng: random.Random, make: Callable[[], Tensor]) -> Tensor | None:
    return make() if rng.random() < 0.6 else None


def floating(rng: random.Random) -> torch.dtype:
    return torch.float64 if rng.random() < 0.25 else torch.float32


def boolean(rng: random.Random) -> bool:
    return rng.random() < 0.5


def rnn_problem(rng: random.Random, dtype: torch.dtype) -> Arguments:
    """What every operator of a recurrent layer takes."""
    cell = rng.choice([cell for cell, spec in CELLS.items() if "cpp" in spec.backends])
    spec = CELLS[cell]
    T, B, inputs = sizes(rng, 12, 20, 50)
    H = max(1, sizes(rng, 300 if rng.random() < 0.1 else 70)[0])
    projected = spec.projects and boolean(rng)
    P = rng.randint(1, H) if projected else H
    shapes = {"I": inputs, "G": spec.gates * H, "H": H, "P": P, "3": 3}
    weights: list[Tensor | None] = []
    for name, letters in spec.weights.items():
        weight = torch.empty([shapes[letter] for letter in letters], dtype=torch.float64).uniform_(-1, 1)
        weight = weight + 1 if name.startswith("ln_") else weight * H**-0.5
        missing = not projected if name == "weight_hr" else name.startswith("bias") and boolean(rng)
        # The operator of bfloat16 multiplies the input itself.
        if name == "weight_ih" and name in spec.optional and dtype != torch.bfloat16 and boolean(rng):
            missing, inputs = True, spec.gates * H
        weights.append(None if missing else weight.to(dtype))
    lengths = maybe(rng, lambda: torch.randint(0, T + 1, (B,)))
    return {
        "cell": cell,
        "input": torch.randn(T, B, inputs).to(dtype),
        "h_0": torch.randn(B, P).tanh().to(dtype),
        "c_0": torch.randn(B, H).to(dtype) if spec.has_cell_state else None,
        "weights": weights,
        "lengths": lengths,
        "reverse": boolean(rng),
        "reset": maybe(rng, lambda: torch.rand(T, B) < rng.choice([0.1, 0.5, 1.0])),
    }


def rnn_forward(rng: random.Random) -> Arguments:
    dtype = floating(rng)
    arguments = rnn_problem(rng, dtype)
    spec, T = CELLS[arguments["cell"]], arguments["input"].shape[0]
    if arguments["lengths"] is not None and rng.random() < 0.4:  # packed rows, of sequences with the longest first
        arguments["lengths"] = lengths = arguments["lengths"].sort(descending=True)[0]
        rows = (torch.arange(T)[:, None] < lengths).nonzero(as_tuple=True)
        arguments["input"], arguments["reset"] = arguments["input"][rows], None
    for name, state, taken in (
        ("zoneout_h", "h_0", spec.zoneout),
        ("zoneout_c", "c_0", spec.zoneout and spec.has_cell_state),
    ):
        arguments[name] = None
        if taken and rng.random() < 0.3:
            shape = (*arguments["input"].shape[:-1], arguments[state].shape[1])
            arguments[name] = rng.choice([torch.rand(()), torch.rand(1), torch.rand(shape)]).to(dtype)
    return arguments | {"save": boolean(rng)}


def rnn_backward(rng: random.Random) -> Arguments:
    arguments = rnn_forward(rng) | {"save": True}
    output, h_n, c_n, saved = OPERATORS.rnn_forward(**arguments)
    del arguments["save"]
    has_cell = CELLS[arguments["cell"]].has_cell_state
    return arguments | {
        "grad_output": maybe(rng, lambda: torch.randn_like(output)),
        "grad_h_n": maybe(rng, lambda: torch.randn_like(h_n)),
        "grad_c_n": maybe(rng, lambda: torch.randn_like(c_n)) if has_cell else None,
        "output": output,
        "saved": saved,
        "needs": [boolean(rng) for _ in range(1 + len(arguments["weights"]))],
    }


def linear_scan_forward(rng: random.Random) -> Arguments:
    B, T, W = sizes(rng, 4, 200, 70)
    narrow = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    dtype = rng.choice([*narrow, torch.complex64, torch.complex128])
    if rng.random() < 0.1:  # cut in time
        B, T, W = 1, rng.randint(50_000, 80_000), rng.randint(1, 4)
    B, offsets = (1, random_offsets(rng, T)) if boolean(rng) else (B, None)
    sequences = B if offsets is None else len(offsets) - 1
    return {
        "a": torch.rand(B, T, W).to(dtype),
        "b": torch.randn(B, T, W).to(dtype),
        "h_0": maybe(rng, lambda: torch.randn(sequences, W).to(dtype)),
        "cu_seqlens": offsets,
        "reset": None if offsets is not None else maybe(rng, lambda: torch.rand(B, T) < rng.random()),
        "reverse": boolean(rng),
        "return_last": boolean(rng),
    }


def random_offsets(rng: random.Random, steps: int) -> Tensor:
    """Of one to six sequences, some of them empty, in so many steps."""
    return torch.tensor([0, *sorted(rng.randint(0, steps) for _ in range(rng.randint(0, 5))), steps])


def linear_scan_backward(rng: random.Random) -> Arguments:
    arguments = linear_scan_forward(rng) | {"return_last": True}
    h, h_last = OPERATORS.linear_scan_forward(**arguments)
    del arguments["b"], arguments["return_last"]
    return arguments | {
        "h": h,
        "grad_h": torch.randn_like(h),
        "grad_h_last": maybe(rng, lambda: torch.randn_like(h_last)),
    }


def column_forward(rng: random.Random) -> Arguments:
    cell = rng.choice(list(COLUMN_CELLS))
    spec = COLUMN_CELLS[cell]
    T, B, d = sizes(rng, 40, 8, 40)
    directions, packed = rng.choice([1, 2]), rng.random() < 0.3
    channels, dtype = max(1, d) * directions, rng.choice([torch.float32] * 3 + [*NARROW, torch.float64])
    sequences, B = B, 1 if packed else B
    inputs = rng.choice([3, 4]) if spec.skip else spec.inputs
    wide = (T, B, channels)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x = maybe(rng, lambda: random(*wide)) if inputs < spec.inputs else None
    mask = (sequences, channels) if spec.mask == "BC" else wide
    scaled = spec.mask and (not spec.skip or x is not None)
    ends = sorted(rng.randint(0, T) for _ in range(sequences - 1))
    offsets = torch.tensor([0, *ends, T] if sequences else [0])
    return {
        "cell": cell,
        "u": random(T, B, inputs * channels),
        "x": x,
        "weight": maybe(rng, lambda: random(spec.weights * channels)) if spec.weights else None,
        "bias": maybe(rng, lambda: random(spec.biases * channels)),
        "c_0": random(sequences, channels),
        "mask": maybe(rng, lambda: torch.rand(mask).to(dtype)) if spec.mask else None,
        "scale": maybe(rng, lambda: torch.rand(1).to(dtype)) if scaled else None,
        "mask_pad": None if packed else maybe(rng, lambda: torch.rand(T, B) < 0.3),
        "reset": None if packed else maybe(rng, lambda: torch.rand(T, B) < 0.3),
        "cu_seqlens": offsets if packed else None,
        "directions": directions,
        "save": boolean(rng),
    }


def column_backward(rng: random.Random) -> Arguments:
    arguments = column_forward(rng) | {"save": True}
    h, c_n, c = OPERATORS.column_forward(**arguments)
    del arguments["save"]
    saved = COLUMN_CELLS[arguments["cell"]].saves_states(arguments["mask_pad"] is not None)
    return arguments | {
        "grad_h": torch.randn_like(h),
        "grad_c_n": maybe(rng, lambda: torch.randn_like(c_n)),
        "c": c if saved else h,
    }


def causal_conv1d_forward(rng: random.Random) -> Arguments:
    B, T, K, dilation = sizes(rng, 4, 80, 5, 9)
    K, dilation = max(1, K), max(1, dilation)
    groups = rng.choice([1, 1, 2, 5])
    group_channels, outputs = (max(1, size) for size in sizes(rng, 40 // groups, 40 // groups))
    if rng.random() < 0.2:
        group_channels = outputs = 1  # depthwise
    dtype, channels, outputs = floating(rng), group_channels * groups, outputs * groups
    dropout = rng.choice([0.0, 0.0, 0.3, 1.0])
    activation = rng.choice(["none", *(name for name in ACTIVATIONS if groups == 1 or name not in GATED)])
    rows = outputs * (2 if activation in GATED else 1)
    reset = cu_seqlens = None
    if rng.random() < 0.3:
        reset = torch.rand(B, T) < rng.random()
    elif rng.random() < 0.3:
        B = 1
        cu_seqlens = torch.tensor([0, *sorted(rng.randint(0, T) for _ in range(rng.randint(0, 4))), T])
    histories = B if cu_seqlens is None else len(cu_seqlens) - 1
    return {
        "x": torch.randn(B, channels, T, dtype=dtype),
        "weight": torch.randn(rows, group_channels, K, dtype=dtype) * (group_channels * K) ** -0.5,
        "bias": maybe(rng, lambda: torch.randn(rows, dtype=dtype)),
        "residual": maybe(rng, lambda: torch.randn(B, outputs, T, dtype=dtype)),
        "history": maybe(rng, lambda: torch.randn(histories, channels, (K - 1) * dilation, dtype=dtype)),
        "seed": torch.randint(-(1 << 62), 1 << 62, (1,)) if dropout > 0 else None,
        "reset": reset,
        "cu_seqlens": cu_seqlens,
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "relu": boolean(rng),
        "dropout": dropout,
        "save": boolean(rng),
    }


def causal_conv1d_backward(rng: random.Random) -> Arguments:
    arguments = causal_conv1d_forward(rng) | {"save": True}
    y, saved = OPERATORS.causal_conv1d_forward(**arguments)
    has_residual = arguments["residual"] is not None
    for name in ("bias", "residual", "save"):
        del arguments[name]
    return arguments | {
        "grad_y": torch.randn_like(y),
        "y": y,
        "saved": saved,
        "addend": maybe(rng, lambda: torch.randn_like(arguments["x"])),
        "has_residual": has_residual,
        "wants": rng.randrange(32),
    }


def causal_conv2d_forward(rng: random.Random) -> Arguments:
    B, T, S, K, row_dilation, column_dilation = sizes(rng, 3, 12, 12, 4, 3, 5)
    K, row_dilation, column_dilation = max(1, K), max(1, row_dilation), max(1, column_dilation)
    groups = rng.choice([1, 1, 2])
    group_channels, outputs = (max(1, size) for size in sizes(rng, 20 // groups, 20 // groups))
    dtype, channels, outputs = floating(rng), group_channels * groups, outputs * groups
    dropout = rng.choice([0.0, 0.0, 0.3])
    activation = rng.choice(["none", *(name for name in ACTIVATIONS if groups == 1 or name not in GATED)])
    rows = outputs * (2 if activation in GATED else 1)
    weight = torch.randn(rows, group_channels, K, rng.choice([1, 3, 5]), dtype=dtype)
    return {
        "x": torch.randn(B, channels, T, S, dtype=dtype),
        "weight": weight * weight[0].numel() ** -0.5,
        "bias": maybe(rng, lambda: torch.randn(rows, dtype=dtype)),
        "residual": maybe(rng, lambda: torch.randn(B, outputs, T, S, dtype=dtype)),
        "history": maybe(rng, lambda: torch.randn(B, channels, (K - 1) * row_dilation, S, dtype=dtype)),
        "seed": torch.randint(-(1 << 62), 1 << 62, (1,)) if dropout > 0 else None,
        "reset": maybe(rng, lambda: torch.rand(B, T) < rng.random()),
        "row_dilation": row_dilation,
        "column_dilation": column_dilation,
        "groups": groups,
        "activation": activation,
        "relu": boolean(rng),
        "dropout": dropout,
        "save": boolean(rng),
    }


def causal_conv2d_backward(rng: random.Random) -> Arguments:
    arguments = causal_conv2d_forward(rng) | {"save": True}
    y, saved = OPERATORS.causal_conv2d_forward(**arguments)
    has_residual = arguments["residual"] is not None
    for name in ("bias", "residual", "save"):
        del arguments[name]
    found = {"grad_y": torch.randn_like(y), "y": y, "saved": saved}
    return arguments | found | {"has_residual": has_residual, "wants": rng.randrange(32)}


def wavenet_layer_forward(rng: random.Random) -> Arguments:
    B, T, K, dilation = sizes(rng, 4, 200, 4, 40)
    C, G, K, dilation = *(max(1, size) for size in sizes(rng, 20, 20)), max(1, K), max(1, dilation)
    (S,), dtype = sizes(rng, 20), floating(rng)
    return {
        "x": torch.randn(B, C, T, dtype=dtype),
        "weight": torch.randn(2 * G, C, K, dtype=dtype) * (C * K) ** -0.5,
        "bias": maybe(rng, lambda: torch.randn(2 * G, dtype=dtype)),
        "output_weight": torch.randn(C + S, G, 1, dtype=dtype) * G**-0.5,
        "output_bias": maybe(rng, lambda: torch.randn(C + S, dtype=dtype)),
        "skip": maybe(rng, lambda: torch.randn(B, S, T, dtype=dtype)),
        "condition": maybe(rng, lambda: torch.randn(B, 2 * G, T, dtype=dtype)),
        "global_condition": maybe(rng, lambda: torch.randn(B, 2 * G, dtype=dtype)),
        "history": maybe(rng, lambda: torch.randn(B, C, (K - 1) * dilation, dtype=dtype)),
        "reset": maybe(rng, lambda: torch.rand(B, T) < rng.random()),
        "dilation": dilation,
        "residual": boolean(rng),
        "save": boolean(rng),
    }


def wavenet_layer_backward(rng: random.Random) -> Arguments:
    forward = wavenet_layer_forward(rng) | {"save": True, "residual": True}
    y, skip, saved = OPERATORS.wavenet_layer_forward(**forward)
    arguments = {name: forward[name] for name in ("x", "weight", "output_weight", "history", "reset", "dilation")}
    return {
        "grad_y": maybe(rng, lambda: torch.randn_like(y)),
        "grad_skip": maybe(rng, lambda: torch.randn_like(skip)),
        "saved": saved,
        **arguments,
        "wants": rng.randrange(256),
    }


def temporal_block_forward(rng: random.Random) -> Arguments:
    B, C, O, T, K, dilation = sizes(rng, 3, 70, 70, 150, 4, 20)
    C, O, K, dilation = (max(1, size) for size in (C, O, K, dilation))
    dtype, dropout = floating(rng), rng.choice([0.0, 0.0, 0.3])
    first = rng.choice(["none", *ACTIVATIONS])
    rows = O * (2 if first in GATED else 1)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype) / max(1, math.prod(shape[1:])) ** 0.5

    down = tensor(O, C, 1) if C != O or boolean(rng) else None
    return {
        "x": torch.randn(B, C, T, dtype=dtype),
        "weight_1": tensor(rows, C, K),
        "g_1": maybe(rng, lambda: tensor(rows, 1, 1)),
        "bias_1": maybe(rng, lambda: tensor(rows)),
        "weight_2": tensor(O, O, K),
        "g_2": maybe(rng, lambda: tensor(O, 1, 1)),
        "bias_2": maybe(rng, lambda: tensor(O)),
        "downsample_weight": down,
        "downsample_bias": None if down is None else maybe(rng, lambda: tensor(O)),
        "seed": torch.randint(-(1 << 62), 1 << 62, (2,)) if dropout > 0 else None,
        "reset": maybe(rng, lambda: torch.rand(B, T) < rng.random()),
        "dilation": dilation,
        "activation_1": first,
        "activation_2": rng.choice(["none", *(name for name in ACTIVATIONS if name not in GATED)]),
        "relu": boolean(rng),
        "dropout": dropout,
        "save": boolean(rng),
    }


def temporal_block_backward(rng: random.Random) -> Arguments:
    arguments = temporal_block_forward(rng) | {"save": True}
    found = dict(zip(("y", "z", "saved_1", "saved_2"), OPERATORS.temporal_block_forward(**arguments), strict=True))
    wants = 0b111111111 if arguments["downsample_weight"] is not None else 0b1111111
    wants &= ~(4 if arguments["g_1"] is None else 0) & ~(32 if arguments["g_2"] is None else 0)
    for name in ("bias_1", "bias_2", "downsample_bias", "save"):
        del arguments[name]
    return arguments | found | {"grad_y": torch.randn_like(found["y"]), "wants": rng.randrange(512) & wants}


def convolutional_gru_forward(rng: random.Random) -> Arguments:
    B, C, rows, columns = sizes(rng, 3, 20, 9, 70)
    dtype = floating(rng)

    def weight(outputs: int) -> Tensor:
        taps = rng.choice([1, 3, 3, 5]), rng.choice([1, 3, 3, 7])
        return torch.randn(outputs, C, *taps, dtype=dtype) * max(1, C * taps[0] * taps[1]) ** -0.5

    return {
        "x": torch.randn(B, C, rows, columns, dtype=dtype),
        "weight_gates": weight(2 * C),
        "bias_gates": maybe(rng, lambda: torch.randn(2 * C, dtype=dtype)),
        "weight_candidate": weight(C),
        "bias_candidate": maybe(rng, lambda: torch.randn(C, dtype=dtype)),
        "hard": boolean(rng),
        "save": boolean(rng),
    }


def convolutional_gru_backward(rng: random.Random) -> Arguments:
    arguments = convolutional_gru_forward(rng) | {"save": True}
    y, gates, candidate = OPERATORS.convolutional_gru_forward(**arguments)
    for name in ("bias_gates", "bias_candidate", "save"):
        del arguments[name]
    found = {"grad_y": torch.randn_like(y), "gates": gates, "candidate": candidate}
    return arguments | found | {"wants": rng.randrange(32)}


def additive_attention_forward(rng: random.Random) -> Arguments:
    B, Tq, Tk, H = sizes(rng, 3, 20, 150, 70)
    H, dtype = max(1, H), floating(rng)
    return {
        "query": torch.randn(B, Tq, H, dtype=dtype),
        "key": torch.randn(B, Tk, H, dtype=dtype),
        "weight": torch.randn(H, dtype=dtype) * H**-0.5,
        "mask": maybe(rng, lambda: torch.rand(B, rng.choice([1, Tq]), Tk) < rng.random()),
    }


def additive_attention_backward(rng: random.Random) -> Arguments:
    arguments = additive_attention_forward(rng)
    attention = OPERATORS.additive_attention_forward(**arguments)
    del arguments["mask"]
    return arguments | {"attention": attention, "grad_attention": torch.randn_like(attention)}


def attention_lstm_forward(rng: random.Random) -> Arguments:
    B, T, S, H, A, M = sizes(rng, 6, 7, 70, 40, 40, 40)
    H, A, M, dtype = max(1, H), max(1, A), max(1, M), floating(rng)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype) * shape[-1] ** -0.5

    query_weight = maybe(rng, lambda: draw(A, H))
    A = H if query_weight is None else A
    return {
        "pre": draw(B, T, 4 * H),
        "key": draw(B, S, A),
        "value": draw(B, S, M),
        "mask": maybe(rng, lambda: torch.rand(B, S) < rng.random()),
        "lengths": maybe(rng, lambda: torch.randint(1, max(T, 1) + 1, (B,))),
        "h_0": draw(B, H),
        "c_0": draw(B, H),
        "query_weight": query_weight,
        "query_bias": None if query_weight is None else maybe(rng, lambda: draw(A)),
        "score_weight": maybe(rng, lambda: draw(A)),
        "context_weight": draw(4 * H, M),
        "weight_hh": draw(4 * H, H),
    }


def attention_lstm_backward(rng: random.Random) -> Arguments:
    arguments = attention_lstm_forward(rng)
    output, h_n, c_n, context, attention, gates, cells = OPERATORS.attention_lstm_forward(**arguments)
    h_0 = arguments["h_0"]
    h = torch.cat([h_0.unsqueeze(1), output[:, :-1]], 1)[:, : output.shape[1]]
    weight = arguments["query_weight"]
    grads = {"output": output, "h_n": h_n, "c_n": c_n, "context": context, "attention": attention}
    arguments |= {f"grad_{name}": maybe(rng, lambda t=t: torch.randn_like(t)) for name, t in grads.items()}
    for name in ("pre", "mask", "h_0", "query_bias"):
        del arguments[name]
    query = h if weight is None else h @ weight.t()
    return arguments | {"query": query, "attention": attention, "gates": gates, "cells": cells}


def block_sparse_attention_forward(rng: random.Random) -> Arguments:
    B, G, repeats, Tq, Tk, D, Dv = sizes(rng, 2, 3, 3, 300, 300, 70, 70)
    D, dtype = max(1, D), floating(rng)
    size = rng.choice([1, 3, 16, 20, 64, 100, 1000])
    layout = torch.rand(B, G * repeats, -(-Tq // size), -(-Tk // size)) < rng.random()
    return {
        "query": torch.randn(B, G * repeats, Tq, D, dtype=dtype),
        "key": torch.randn(B, G, Tk, D, dtype=dtype),
        "value": torch.randn(B, G, Tk, Dv, dtype=dtype),
        "layout": layout if boolean(rng) else layout[:1, :1].expand(layout.shape),
        "block_size": size,
        "causal": boolean(rng),
        "scale": D**-0.5,
    }


def block_sparse_attention_backward(rng: random.Random) -> Arguments:
    arguments = block_sparse_attention_forward(rng)
    out, lse = OPERATORS.block_sparse_attention_forward(**arguments)
    return arguments | {"out": out, "lse": lse, "grad_out": torch.randn_like(out)}


def attention_pool_forward(rng: random.Random) -> Arguments:
    B, G, T, D, Dv = sizes(rng, 2, 3, 300, 70, 70)
    D, Dv, dtype = max(1, D), max(1, Dv), rng.choice([torch.bfloat16, torch.float16, floating(rng)])
    return {
        "key": torch.randn(B, G, T, D, dtype=dtype),
        "value": torch.randn(B, G, T, Dv, dtype=dtype),
        "pool_query": maybe(rng, lambda: torch.randn(rng.randint(1, 3), G, D, dtype=dtype)),
        "block_size": rng.choice([2, 3, 16, 64]),
        "fanout": rng.choice([2, 3, 16]),
        "levels": rng.choice([-1, 0, 1, 2]),
        "scale": D**-0.5,
    }


def attention_pool_backward(rng: random.Random) -> Arguments:
    arguments = attention_pool_forward(rng)
    keys, values = OPERATORS.attention_pool_forward(**arguments)
    grads = {"grad_pooled_key": torch.randn_like(keys), "grad_pooled_value": torch.randn_like(values)}
    return arguments | grads | {"pooled_key": keys, "pooled_value": values}


def novelty_gate(rng: random.Random) -> Arguments:
    B, T, N, E = sizes(rng, 3, 90, 9, 70)
    E += 1  # the similarities of single values are 1 or -1: the first of equals would be a matter of rounding
    dtype = floating(rng)
    return {
        "vectors": torch.randn(B, T, E, dtype=dtype),
        "kept": torch.randn(B, N, E, dtype=dtype),
        "size": torch.randint(-1, N + 2, (B,)),
        "threshold": rng.uniform(-0.5, 1.0),
        "window": rng.choice([1, 5, 2**62]),
        "capacity": rng.choice([1, 20, 2**62]),
    }


def echo_state(rng: random.Random) -> Arguments:
    T, B, H, N = sizes(rng, 20, 40, 70, 600)
    dtype, N = floating(rng), N if H else 0
    return {
        "drive": torch.randn(T, B, H, dtype=dtype),
        "h_0": torch.randn(B, H, dtype=dtype),
        "rows": torch.tensor([0, *sorted(rng.randint(0, N) for _ in range(H - 1)), N][: H + 1], dtype=torch.int32),
        "columns": torch.randint(max(1, H), (N,), dtype=torch.int32),
        "weight": torch.randn(N, dtype=dtype) * 0.3,
        "leak_rate": rng.choice([1.0, rng.random()]),
        "reset": maybe(rng, lambda: torch.rand(T, B) < 0.3),
    }


def cfc_forward(rng: random.Random) -> Arguments:
    T, B, H = sizes(rng, 12, 20, 40)
    H, dtype, mode = max(1, H), floating(rng), rng.choice(["default", "no_gate", "pure"])
    rows = [rng.randint(1, 70) for _ in range(rng.choice([0, 1, 1, 2, 7]))] + [H if mode == "pure" else 4 * H]
    weights = [torch.randn(n, k, dtype=dtype) * k**-0.5 for n, k in zip(rows, [H, *rows[:-1]], strict=True)]
    vectors = [torch.randn(H, dtype=dtype) if mode == "pure" else None for _ in range(2)]
    return {
        "x": torch.randn(T, B, rows[0], dtype=dtype),
        "h_0": torch.randn(B, H, dtype=dtype),
        "weights": weights,
        "biases": [torch.randn(n, dtype=dtype) for n in rows[1:]],
        "timespans": maybe(rng, lambda: torch.rand(T, B, dtype=dtype)),
        "w": vectors[0],
        "a": vectors[1],
        "mode": mode,
        "activation": rng.choice(["lecun_tanh", "tanh", "relu"]),
        "save": boolean(rng),
        "reset": maybe(rng, lambda: torch.rand(T, B) < rng.random()),
    }


def cfc_backward(rng: random.Random) -> Arguments:
    arguments = cfc_forward(rng) | {"save": True}
    output, saved = OPERATORS.cfc_forward(**arguments)
    shared = {name: arguments[name] for name in ("weights", "timespans", "w", "a", "mode", "activation", "reset")}
    return {"grad_output": torch.randn_like(output), "saved": saved, "keep": boolean(rng), **shared}


def hierarchical_attention_forward(rng: random.Random) -> Arguments:
    B, G, repeats, T, D = sizes(rng, 2, 3, 3, 300, 70)
    D, dtype = max(1, D), floating(rng)
    Dv, kind = rng.choice([D, 1, 33]), rng.choice(["whole", "last", "packed", "padded"])
    B = 1 if kind == "packed" else B
    Tq = rng.randint(0, T) if kind == "last" else T
    offsets = torch.tensor([0, *sorted(rng.randint(0, T) for _ in range(rng.randint(0, 5))), T])
    dropout = rng.choice([0.0, 0.0, 0.3, 1.0])
    return {
        "query": torch.randn(B, G * repeats, Tq, D, dtype=dtype),
        "key": torch.randn(B, G, T, D, dtype=dtype),
        "value": torch.randn(B, G, T, Dv, dtype=dtype),
        "pool_query": maybe(rng, lambda: torch.randn(rng.randint(1, 3), G, D, dtype=dtype)),
        "cu_seqlens": offsets if kind == "packed" else None,
        "lengths": torch.randint(0, T + 1, (B,)) if kind == "padded" else None,
        "block_size": rng.choice([2, 3, 4, 8, 16, 64, 100]),
        "fanout": rng.choice([2, 3, 4, 8, 16, 64]),
        "levels": rng.randint(-1, 5),
        "local_blocks": rng.randint(1, 4),
        "causal": boolean(rng),
        "mass_bias": boolean(rng),
        "scale": D**-0.5,
        "dropout": dropout,
        "seed": torch.randint(-(1 << 62), 1 << 62, (1,)) if dropout > 0 else None,
    }


def hierarchical_attention_backward(rng: random.Random) -> Arguments:
    arguments = hierarchical_attention_forward(rng)
    names = ("out", "lse", "pooled_key", "pooled_value")
    found = dict(zip(names, OPERATORS.hierarchical_attention_forward(**arguments), strict=True))
    grads = {
        "grad_out": torch.randn_like(found["out"]),
        "grad_lse": maybe(rng, lambda: torch.randn_like(found["lse"])),
    }
    return arguments | found | grads


def elementwise(rng: random.Random) -> Arguments:
    function = rng.choice(["exp", "sigmoid", "tanh"])
    x = torch.randn(*sizes(rng, 300), dtype=floating(rng))
    return {"input": x if function == "exp" else x * rng.choice([1, 40]), "function": function}


def matrices(rng: random.Random) -> Arguments:
    M, K, N = sizes(rng, 100, 150, 150)
    dtype = floating(rng)
    return {"input": torch.randn(M, K, dtype=dtype), "mat2": torch.randn(K, N, dtype=dtype)}


def added_matrices(rng: random.Random) -> Arguments:
    arguments = matrices(rng)
    M, N = arguments["input"].shape[0], arguments["mat2"].shape[1]
    return arguments | {"out": torch.randn(M, N, dtype=arguments["input"].dtype)}


#: Valid arguments of each operator.
GENERATORS: dict[str, Generator] = {
    "add_fastest_mm_": added_matrices,
    "attention_lstm_backward": attention_lstm_backward,
    "attention_lstm_forward": attention_lstm_forward,
    "additive_attention_backward": additive_attention_backward,
    "additive_attention_forward": additive_attention_forward,
    "best_isa": lambda rng: {},
    "attention_pool_backward": attention_pool_backward,
    "attention_pool_forward": attention_pool_forward,
    "block_sparse_attention_backward": block_sparse_attention_backward,
    "block_sparse_attention_forward": block_sparse_attention_forward,
    "causal_conv1d_backward": causal_conv1d_backward,
    "causal_conv1d_forward": causal_conv1d_forward,
    "causal_conv2d_backward": causal_conv2d_backward,
    "causal_conv2d_forward": causal_conv2d_forward,
    "column_backward": column_backward,
    "column_forward": column_forward,
    "convolutional_gru_backward": convolutional_gru_backward,
    "convolutional_gru_forward": convolutional_gru_forward,
    "echo_state": echo_state,
    "cfc_backward": cfc_backward,
    "cfc_forward": cfc_forward,
    "elementwise": elementwise,
    "fastest_mm": matrices,
    "hierarchical_attention_backward": hierarchical_attention_backward,
    "hierarchical_attention_forward": hierarchical_attention_forward,
    "isa": lambda rng: {},
    "isa_number": lambda rng: {"best": boolean(rng)},
    "linear_scan_backward": linear_scan_backward,
    "linear_scan_forward": linear_scan_forward,
    "mm": matrices,
    "novelty_gate": novelty_gate,
    "rnn_backward": rnn_backward,
    "rnn_forward": rnn_forward,
    "rnn_forward_bfloat16": lambda rng: rnn_problem(rng, torch.bfloat16),
    "set_isa": lambda rng: {"name": rng.choice(USABLE_NARROW_ISAS)},
    "temporal_block_backward": temporal_block_backward,
    "temporal_block_forward": temporal_block_forward,
    "threads": lambda rng: {},
    "wavenet_layer_backward": wavenet_layer_backward,
    "wavenet_layer_forward": wavenet_layer_forward,
}


# ---- sessions and modules: functions with a schema, as operators have one ----

#: Modules, and the shape of an input; every module of seqaccel.nn is here.
MODULES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "RNN": (lambda: seqaccel.nn.RNN(4, 5), (3, 2, 4)),
    "LSTM": (lambda: seqaccel.nn.LSTM(4, 5, num_layers=2, bidirectional=True), (3, 2, 4)),
    "GRU": (lambda: seqaccel.nn.GRU(4, 5), (3, 2, 4)),
    "LayerNormLSTM": (lambda: seqaccel.nn.LayerNormLSTM(4, 5, normalize_cell=True), (3, 2, 4)),
    "LayerNormGRU": (lambda: seqaccel.nn.LayerNormGRU(4, 5), (3, 2, 4)),
    "PeepholeLSTM": (lambda: seqaccel.nn.PeepholeLSTM(4, 5, proj_size=3), (3, 2, 4)),
    "MultiplicativeLSTM": (lambda: seqaccel.nn.MultiplicativeLSTM(4, 5), (3, 2, 4)),
    "CfC": (lambda: seqaccel.nn.CfC(4, 5, backbone_units=3), (3, 2, 4)),
    "CfCCell": (lambda: seqaccel.nn.CfCCell(4, 5, backbone_units=3), (2, 4)),
    "LiGRU": (lambda: seqaccel.nn.LiGRU(4, 5, normalization="layer_norm"), (3, 2, 4)),
    "SRU": (lambda: seqaccel.nn.SRU(4, 5), (3, 2, 4)),
    "EchoStateNetwork": (lambda: seqaccel.nn.EchoStateNetwork(4, 5, 3, 2, connectivity=0.4), (3, 2, 4)),
    "RNNCell": (lambda: seqaccel.nn.RNNCell(4, 5), (2, 4)),
    "LSTMCell": (lambda: seqaccel.nn.LSTMCell(4, 5), (2, 4)),
    "GRUCell": (lambda: seqaccel.nn.GRUCell(4, 5), (2, 4)),
    "SRUCell": (lambda: seqaccel.nn.SRUCell(4, 5), (3, 2, 4)),
    "SRUpp": (lambda: seqaccel.nn.SRUpp(4, 5, 2), (3, 2, 4)),
    "QRNN": (lambda: seqaccel.nn.QRNN(4, 5, window=2), (3, 2, 4)),
    "MinGRU": (lambda: seqaccel.nn.MinGRU(4, 5, num_layers=2, bidirectional=True), (3, 2, 4)),
    "MinLSTM": (lambda: seqaccel.nn.MinLSTM(4, 5, candidate="g"), (3, 2, 4)),
    "IndRNN": (lambda: seqaccel.nn.IndRNN(4, 5), (3, 2, 4)),
    "CausalConv1d": (lambda: seqaccel.nn.CausalConv1d(4, 5, 3), (2, 4, 7)),
    "CausalConv2d": (lambda: seqaccel.nn.CausalConv2d(4, 5, 3), (2, 4, 6, 7)),
    "CausalConvTranspose1d": (lambda: seqaccel.nn.CausalConvTranspose1d(4, 5, 3, stride=2), (2, 4, 7)),
    "TemporalBlock": (lambda: seqaccel.nn.TemporalBlock(4, 5, 3, 2, dropout=0.0), (2, 4, 7)),
    "TCN": (lambda: seqaccel.nn.TCN(4, [4], dropout=0.0), (2, 4, 7)),
    "PervasiveAttention": (lambda: seqaccel.nn.PervasiveAttention(4, 4, 3, 2, 2, 3, dropout=0.0), (2, 4)),
    "ConvolutionalGRU": (lambda: seqaccel.nn.ConvolutionalGRU(4), (2, 4, 3, 7)),
    "NeuralGPU": (lambda: seqaccel.nn.NeuralGPU(4, 5), (2, 4)),
    "GatedConv1d": (lambda: seqaccel.nn.GatedConv1d(4, 5, 3), (2, 4, 7)),
    "WaveNetLayer": (lambda: seqaccel.nn.WaveNetLayer(4, 5), (2, 4, 7)),
    "WaveNet": (lambda: seqaccel.nn.WaveNet(4, 3, 6, 5, layers=2), (2, 4, 7)),
    "GatedConvLM": (lambda: seqaccel.nn.GatedConvLM(4, 3, 4, 2, 2, bottleneck_channels=3, dropout=0.0), (2, 4)),
    "AdditiveAttention": (lambda: seqaccel.nn.AdditiveAttention(4, 4, 6), (2, 9, 4)),
    "AttentionLSTMDecoder": (lambda: seqaccel.nn.AttentionLSTMDecoder(4, 5, 4, 2), (2, 9, 4)),
    "GNMT": (lambda: seqaccel.nn.GNMT(4, 4, 5, 2, dropout=0.0), (2, 4)),
    "MultiplicativeAttention": (lambda: seqaccel.nn.MultiplicativeAttention(4), (2, 9, 4)),
    "BlockSparseAttention": (lambda: seqaccel.nn.BlockSparseAttention(4, 2, block_size=2), (9, 2, 4)),
    "NoveltyMemory": (lambda: seqaccel.nn.NoveltyMemory(4, 2), (9, 2, 4)),
    "HierarchicalAttention": (lambda: seqaccel.nn.HierarchicalAttention(4, 2, block_size=2), (9, 2, 4)),
    "HierarchicalAttentionEncoder": (
        lambda: seqaccel.nn.HierarchicalAttentionEncoder(4, 2, 2, 5, dropout=0.0, block_size=2),
        (9, 2, 4),
    ),
}


@functools.cache
def module(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The module of this name, always with the same weights."""
    if name not in MODULES:
        raise ValueError(f"there is no module {name!r}")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return MODULES[name][0]().to(dtype)


def inputs_of(name: str, x: Tensor) -> tuple[Tensor, ...]:
    """What the module is called with, made of x."""
    if name in ("PervasiveAttention", "GNMT", "GatedConvLM", "NeuralGPU") and isinstance(x, Tensor):
        if x.device.type == "cpu" and x.numel() > 0 == x.untyped_storage().nbytes():
            raise ValueError("x is without memory: torch's own operators, here and in an embedding, would read it")
        tokens = x.detach().nan_to_num(0.0, 0.0, 0.0).abs().clamp(max=3).long()
        return (tokens,) * (1 if name in ("GatedConvLM", "NeuralGPU") else 2)
    if name == "AttentionLSTMDecoder":
        return x, x
    if name in seqaccel.nn.attention.__all__ and name not in ("HierarchicalAttentionEncoder", "GNMT"):
        return x, x, x
    return (x,)


def training_step(name: str, x: Tensor, state: Tensor | None = None) -> list[Tensor]:
    """Outputs and gradients of a module; ``state`` is the initial one of a module of one state."""
    model = module(name, torch.float64 if isinstance(x, Tensor) and x.dtype == torch.float64 else torch.float32)
    model.zero_grad()
    output = model(*inputs_of(name, x)) if state is None else model(x, state)
    output = output if isinstance(output, Tensor) else output[0]
    output.sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def training_arguments(rng: random.Random) -> Arguments:
    name = rng.choice(list(MODULES))
    x = torch.randn(MODULES[name][1], dtype=floating(rng))
    one_state = name in ("RNN", "GRU", "LayerNormGRU", "LiGRU")
    state = torch.randn(1, 2, 5, dtype=x.dtype) if one_state and boolean(rng) else None
    return {"name": name, "x": x, "state": state}


STREAMED = ["RNN", "GRU", "LayerNormLSTM", "LayerNormGRU", "PeepholeLSTM", "MultiplicativeLSTM", "LiGRU", "SRUpp"]
STREAMED += ["HierarchicalAttention", "HierarchicalAttentionEncoder", *session_cases.SESSIONS]


def loaded(session: seqaccel.Session) -> seqaccel.Session:
    """The session out of a file."""
    with tempfile.TemporaryDirectory() as folder:
        session.save(f"{folder}/session")
        return seqaccel.Session.load(f"{folder}/session")


def session(
    name: str, weights: str, batch_size: int, x_t: Tensor, x: Tensor, mask: Tensor, indices: Tensor, state: list[Tensor]
) -> list[Tensor]:
    """What a session gives by all of its methods."""
    if name in session_cases.SESSIONS:
        streamed = session_cases.session(name, weights, batch_size)
    else:
        streamed = seqaccel.Session(module(name), batch_size, weights, memory_length=3 if name == "SRUpp" else None)
    found = [streamed.step(x_t), streamed.extend(x)]
    streamed.reset(mask)
    streamed.select(indices)
    found += streamed.state_dict().values()
    streamed.load_state_dict(dict(zip(streamed.state_dict(), state, strict=True)))
    others = [streamed.fork(batch_size), copy.copy(streamed), pickle.loads(pickle.dumps(streamed)), loaded(streamed)]
    found += [other.extend(x) for other in others]
    return [*found, streamed.extend(x), *streamed.state_dict().values()]


def session_arguments(rng: random.Random) -> Arguments:
    name, B = rng.choice(STREAMED), rng.randint(1, 20)
    widths = {"PeepholeLSTM": (3, 5), "LayerNormLSTM": (5, 5), "MultiplicativeLSTM": (5, 5)}.get(name, (5,))
    state = [torch.randn(1, B, width).tanh() for width in widths]
    if name == "SRUpp":  # the ages, the memory, c
        state = [4.0 * torch.rand(2, B), torch.randn(2, B, 3, 4), torch.randn(2, B, 5).tanh()]
    if name.startswith("Hierarchical"):
        _, memory = seqaccel.Session(module(name), B).state_dict().values()
        state = [torch.randint(40, memory.shape[:2]), torch.randn_like(memory)]
    if name in session_cases.SESSIONS:
        states = session_cases.session(name, "float32", B).state_dict().values()
        state = [torch.randn_like(part).tanh() for part in states]
    return {
        "name": name,
        "weights": rng.choice(["float32", "bfloat16", "int8"]),
        "batch_size": B,
        "x_t": torch.randn(B, 4),
        "x": torch.randn(*sizes(rng, 9), B, 4),
        "mask": torch.rand(B) < 0.5,
        "indices": torch.randint(0, B, (B,)),
        "state": state,
    }


GENERATORS |= {"training_step": training_arguments, "session": session_arguments}

FUNCTIONS = {
    "training_step(str name, Tensor x, Tensor? state) -> Tensor[]": training_step,
    "session(str name, str weights, int batch_size, Tensor x_t, Tensor x, Tensor mask, Tensor indices, Tensor[] state)"
    " -> Tensor[]": session,
}


# ---- all of it ----


class Target(NamedTuple):
    call: Callable[..., Any]
    schema: torch._C.FunctionSchema

    @property
    def types(self) -> dict[str, str]:
        return {argument.name: str(argument.type) for argument in self.schema.arguments}

    @property
    def written(self) -> set[str]:
        """The arguments that a call writes to."""
        return {argument.name for argument in self.schema.arguments if argument.is_write}

    @property
    def has_shape_function(self) -> bool:
        name = self.schema.name
        return "::" in name and torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta")


def operators() -> dict[str, Target]:
    """Every operator of the package that C++ registered, by name.

    Raises:
        SystemExit: one has no generator of valid arguments, or its arguments are not those of its schema.
    """
    found = {}
    for qualified in torch._C._dispatch_get_all_op_names():
        namespace, name = qualified.split("::")
        if namespace == "seqaccel" and "csrc/cpu" in torch._C._dispatch_dump(qualified):
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(OPERATORS, packet), overload or "default")
            found[name] = Target(operator, operator._schema)
    for name, target in found.items():
        if name not in GENERATORS:
            sys.exit(f"{__file__}: GENERATORS has no generator of valid arguments of the operator {name}")
        given = set(GENERATORS[name](random.Random(0)))
        if given != set(target.types):
            sys.exit(f"{__file__}: the generator of {name} gives {sorted(given)}, but its schema is {target.schema}")
    return dict(sorted(found.items()))


def targets() -> dict[str, Target]:
    """The operators, sessions and modules."""
    schemas = {torch._C.parse_schema(text): function for text, function in FUNCTIONS.items()}
    return operators() | {schema.name: Target(function, schema) for schema, function in schemas.items()}


# ---- what stands at an argument, as a tree of tensors, lists and numbers ----


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_tensors(function, item) for item in value]
    return value


def tensors_of(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def has_no_memory(t: Tensor) -> bool:
    zero_tensor = torch._C._dispatch_keys(t).has(torch._C.DispatchKey.ZeroTensor)
    return zero_tensor or (t.numel() > 0 and t.untyped_storage().nbytes() == 0)


def describe(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={describe(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(describe, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)[:100]
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.layout != torch.strided or value.is_meta:
        return f"{text} meta" if value.is_meta else f"{text} {value.layout}"
    flags = {
        "without memory": has_no_memory(value),
        f"strides {list(value.stride())}": not value.is_contiguous(),
        "negative bit": value.is_neg(),
        "requires grad": value.requires_grad,
    }
    if value.dtype == torch.int64 and value.numel() <= 8 and not has_no_memory(value):
        text += f" = {value.tolist()}"
    return " ".join([text, *(flag for flag, holds in flags.items() if holds)])
