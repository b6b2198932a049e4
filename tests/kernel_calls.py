"""Small calls of every Triton operator, by what they run: for tests that hold for all of them."""

from __future__ import annotations

import functools

import torch
from rnn_cases import kinds, problem, weights_of, zoneout_masks

from seqaccel.functional.rnn import CELLS
from seqaccel.kernels import conv, rnn, scan
from seqaccel.kernels.attention import additive, block_sparse, hierarchical
from seqaccel.kernels.scan.cells import CELLS as COLUMN_CELLS


def _rnn(cell, projected, T=3, B=2):
    tensors = problem(cell, T, B, 5, 6, projected=projected, dtype=torch.float32, requires_grad=False)
    zoneout = (None, None)
    if CELLS[cell].zoneout:
        masks = {name: mask.float() for name, mask in zoneout_masks(cell, tensors).items()}
        zoneout = masks["zoneout_h"], masks.get("zoneout_c")
    weights, lengths = weights_of(cell, tensors), torch.arange(B) * 2 % T + 1
    given = (cell, tensors["input"], tensors["h_0"], tensors.get("c_0"), weights, lengths, *zoneout)
    yield "rnn_forward", rnn.rnn_forward, (*given, False, True)
    output, h_n, c_n, saved = rnn.rnn_forward(*given, False, True)
    grads = (torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n) if c_n.numel() else None)
    needs = [True] * (1 + len(weights))
    yield "rnn_backward", rnn.rnn_backward, (cell, *grads, *given[1:], output, saved, False, needs)


def _linear_scan(T=3, B=2, packed=False):
    a, b, offsets = torch.rand(B, T, 3), torch.randn(B, T, 3), None
    if packed:
        a, b, offsets = a.view(1, -1, 3), b.view(1, -1, 3), torch.arange(B + 1) * T
    h_0, reset = torch.randn(B, 3), None if packed else torch.arange(B * T).view(B, T) % 2 == 0
    yield "linear_scan_forward", scan.linear_scan_forward, (a, b, h_0, offsets, reset, False, True)
    h, h_last = scan.linear_scan_forward(a, b, h_0, offsets, reset, False, True)
    grads = torch.randn_like(h), torch.randn_like(h_last)
    yield "linear_scan_backward", scan.linear_scan_backward, (*grads, a, h, h_0, offsets, reset, False)


def _columns(cell, T=3, B=2, packed=False):
    spec, sequences, B = COLUMN_CELLS[cell], 3 if packed else B, 1 if packed else B
    C = 4
    mask = {"": None, "BC": torch.rand(sequences, C), "TBC": torch.rand(T, B, C)}[spec.mask]
    given = (
        torch.randn(T, B, spec.inputs * C),
        torch.randn(T, B, C) if spec.highway else None,
        torch.randn(spec.weights * C) if spec.weights else None,
        torch.randn(spec.biases * C),
        torch.randn(sequences, C),
        mask,
        None if mask is None else torch.tensor([1.5]),
        None if packed else torch.arange(T)[:, None] >= torch.arange(B),
        None if packed else torch.arange(T)[:, None] == torch.arange(B),
        torch.tensor([0, T // 2, T // 2, T]) if packed else None,
        2,
    )
    yield "column_forward", scan.column_forward, (cell, *given, True)
    h, c_n, c = scan.column_forward(cell, *given, True)
    given = (torch.randn_like(h), torch.randn_like(c_n), *given[:-1], c if c.numel() else h, 2)
    yield "column_backward", scan.column_backward, (cell, *given)


def _conv(channels, groups, T=9, B=2, activation="silu", sequences=None):
    """``sequences``: "reset" or "cu_seqlens"."""
    B = 1 if sequences == "cu_seqlens" else B
    rows = 8 if activation == "gated" else 4
    x, weight, bias = torch.randn(B, channels, T), torch.randn(rows, channels // groups, 3), torch.randn(rows)
    reset = torch.arange(T).expand(B, T) % 4 == 1 if sequences == "reset" else None
    offsets = torch.tensor([0, T // 2, T // 2, T]) if sequences == "cu_seqlens" else None
    history = torch.randn(B if offsets is None else 3, channels, 4)
    residual, seed, options = torch.randn(B, 4, T), torch.tensor([7]), (2, groups, activation, True, 0.25)
    given = (x, weight, bias, residual, history, seed, reset, offsets, *options)
    yield "causal_conv1d_forward", conv.causal_conv1d_forward, (*given, True)
    y, saved = conv.causal_conv1d_forward(*given, True)
    given = (torch.randn_like(y), y, saved, x, weight, *given[4:8], torch.randn_like(x), *options, True, 31)
    yield "causal_conv1d_backward", conv.causal_conv1d_backward, given


def _conv2d(channels, groups, T=4, B=2, resets=False):
    x, weight, bias = torch.randn(B, channels, T, 5), torch.randn(4, channels // groups, 2, 3), torch.randn(4)
    residual, history, seed = torch.randn(B, 4, T, 5), torch.randn(B, channels, 2, 5), torch.tensor([7])
    options = (2, 1, groups, "silu", True, 0.25)
    reset = torch.arange(T).expand(B, T) % 4 == 1 if resets else None
    given = (x, weight, bias, residual, history, seed, reset, *options)
    yield "causal_conv2d_forward", conv.causal_conv2d_forward, (*given, True)
    y, saved = conv.causal_conv2d_forward(*given, True)
    given = (torch.randn_like(y), y, saved, x, weight, history, seed, reset, *options, True, 31)
    yield "causal_conv2d_backward", conv.causal_conv2d_backward, given


def _wavenet_layer(T=9, B=2, resets=False):
    C, G, S = 5, 6, 3
    x, weight, bias = torch.randn(B, C, T), torch.randn(2 * G, C, 2), torch.randn(2 * G)
    output_weight, output_bias, skip = torch.randn(C + S, G, 1), torch.randn(C + S), torch.randn(B, S, T)
    condition, global_condition, history = torch.randn(B, 2 * G, T), torch.randn(B, 2 * G), torch.randn(B, C, 3)
    reset = torch.arange(T).expand(B, T) % 4 == 1 if resets else None
    conditions = condition, global_condition, history, reset
    given = (x, weight, bias, output_weight, output_bias, skip, *conditions, 3, True, True)
    yield "wavenet_layer_forward", conv.wavenet_layer_forward, given
    y, next_skip, saved = conv.wavenet_layer_forward(*given)
    grads = torch.randn_like(y), torch.randn_like(next_skip)
    given = (*grads, saved, x, weight, output_weight, history, reset, 3, 255)
    yield "wavenet_layer_backward", conv.wavenet_layer_backward, given


def _attention(T=9, B=1, padded=False):
    query, key, value = torch.randn(B, 2, T, 4), torch.randn(B, 1, T, 4), torch.randn(B, 1, T, 5)
    lengths = torch.arange(B) % T + 1 if padded else None
    given, options = (query, key, value, torch.randn(2, 1, 4), None, lengths), (2, 2, -1, 1, True, True, 0.4)
    yield "hierarchical_attention_forward", hierarchical.hierarchical_attention_forward, (*given, *options)
    saved = hierarchical.hierarchical_attention_forward(*given, *options)
    given = (torch.randn_like(saved[0]), *given, *saved, *options)
    yield "hierarchical_attention_backward", hierarchical.hierarchical_attention_backward, given


def _block_sparse_attention(T=9, B=1):
    query, key, value = torch.randn(B, 2, T, 4), torch.randn(B, 1, T + 3, 4), torch.randn(B, 1, T + 3, 5)
    layout = torch.rand(B, 2, -(-T // 4), -(-(T + 3) // 4)) < 0.7
    given, options = (query, key, value, layout), (4, True, 0.4)
    yield "block_sparse_attention_forward", block_sparse.block_sparse_attention_forward, (*given, *options)
    out, lse = block_sparse.block_sparse_attention_forward(*given, *options)
    given = (torch.randn_like(out), *given, out, lse, *options)
    yield "block_sparse_attention_backward", block_sparse.block_sparse_attention_backward, given


def _additive_attention(T=9, B=1):
    query, key, weight = torch.randn(B, T, 40), torch.randn(B, T + 3, 40), torch.randn(40)
    mask = torch.rand(B, 1, T + 3) < 0.7
    yield "additive_attention_forward", additive.additive_attention_forward, (query, key, weight, mask)
    attention = additive.additive_attention_forward(query, key, weight, mask)
    given = (torch.randn_like(attention), query, key, weight, attention)
    yield "additive_attention_backward", additive.additive_attention_backward, given


#: Each value, called (with T and B), gives the name, the operator and the arguments of a forward and a backward call.
TABLE = {
    **{
        f"rnn {cell}{' projected' * projected}": functools.partial(_rnn, cell, projected)
        for cell, projected in kinds("triton")
    },
    "linear_scan": _linear_scan,
    "linear_scan packed": functools.partial(_linear_scan, packed=True),
    **{f"columns {cell}": functools.partial(_columns, cell) for cell in COLUMN_CELLS},
    "columns packed": functools.partial(_columns, "fo_pool", packed=True),
    "conv": functools.partial(_conv, 6, 1),
    "conv gated": functools.partial(_conv, 6, 1, activation="gated"),
    "conv depthwise": functools.partial(_conv, 4, 4),
    **{
        f"conv{' depthwise' * (groups > 1)} {sequences}": functools.partial(_conv, 4, groups, sequences=sequences)
        for groups in (1, 4)
        for sequences in ("reset", "cu_seqlens")
    },
    "wavenet layer": _wavenet_layer,
    "wavenet layer reset": functools.partial(_wavenet_layer, resets=True),
    "conv2d": functools.partial(_conv2d, 6, 1),
    "conv2d reset": functools.partial(_conv2d, 6, 1, resets=True),
    "conv2d depthwise": functools.partial(_conv2d, 4, 4),
    "attention": _attention,
    "attention padded": functools.partial(_attention, padded=True),
    "block_sparse": _block_sparse_attention,
    "additive": _additive_attention,
}


@functools.cache
def calls_of(name):
    return list(TABLE[name]())
