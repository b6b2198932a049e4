"""Dilated causal convolutions of sequences, and of grids along one dimension.

``v[b,o,t] = bias[o] + sum_{c,k} weight[o,c,k] * x[b,c,stride t - (K-1-k) dilation]``, where ``x`` before its start is
``history`` or zero; ``y = relu?(residual + dropout(activation(v)))``.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel.reference.dropout import dropped, kept


def _gated(v: Tensor) -> Tensor:
    value, gate = v.chunk(2, 1)
    return torch.tanh(value) * torch.sigmoid(gate)


#: Those of ``GATED`` halve the channels.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "glu": functools.partial(F.glu, dim=1),
    "gated": _gated,
}
GATED = ("glu", "gated")


def dropout_mask(seed: Tensor, shape: tuple[int, int, int], p: float) -> Tensor:
    """Which elements a dropout of probability ``p`` keeps: bool of ``shape`` (B, C, T)."""
    batch, channels, length = shape
    row = torch.arange(batch * channels, device=seed.device).unsqueeze(-1)
    return kept(seed, row, torch.arange(length, device=seed.device), p).view(shape)


def _inner_offsets(cu_seqlens: Tensor, length: int) -> Tensor:
    """Where the second sequence begins, the third, ... Those of an ONNX graph ascend: ONNX has no running maximum."""
    inner = cu_seqlens[1:-1].clamp(0, length)
    return inner if torch.onnx.is_in_onnx_export() else inner.cummax(0).values


def origins(x: Tensor, reset: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each time step of x (B, C, T): where its sequence begins, and which row of the history is before that, -1 for
    zeros; (B, T).

    Offsets of any value stay within x: the first sequence begins at 0 and the last one ends with x.
    """
    batch, _, length = x.shape
    t = torch.arange(length, device=x.device)
    if reset is not None:
        number = reset.long().cumsum(1)  # of the sequence; 0: the one that goes on from the history
        first = number.new_zeros(batch, length + 1)
        first = first.scatter(1, torch.where(reset, number, 0), torch.where(reset, t, 0))
        return first.gather(1, number), torch.where(number > 0, -1, torch.arange(batch, device=x.device)[:, None])
    assert cu_seqlens is not None
    inner = _inner_offsets(cu_seqlens, length)
    row = (inner[:, None] <= t).sum(0)
    begins = torch.cat([inner.new_zeros(1), inner])[row]
    return begins[None], row[None]


def taps(
    x: Tensor, history: Tensor | None, kernel_size: int, dilation: int, origin: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """What each tap meets (B, C, T): x some steps before, or the history where the sequence begins after that."""
    begins, row = origin
    channels, length = x.shape[1:]
    t = torch.arange(length, device=x.device)
    context = (kernel_size - 1) * dilation
    found = []
    for k in range(kernel_size):
        shift = (kernel_size - 1 - k) * dilation
        inside = (t - shift >= begins)[:, None]
        shifted = F.pad(x, (shift, 0))[..., :length]
        if history is None or context == 0:
            found.append(torch.where(inside, shifted, 0.0))
        else:
            at = (context + t - shift - begins).clamp(0, context - 1)  # of the history
            before = history[row.clamp(min=0)[:, None], torch.arange(channels, device=x.device)[:, None], at[:, None]]
            found.append(torch.where(inside, shifted, torch.where(row[:, None] < 0, 0.0, before)))
    return found


def final_state(
    x: Tensor, history: Tensor | None, context: int, reset: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The last steps of each row or sequence, as many as ``context``: before a start there is the history, before an
    episode that ``reset`` begins there are zeros."""
    _, channels, length = x.shape
    count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    n, channel = torch.arange(count, device=x.device), torch.arange(channels, device=x.device)[:, None]
    if history is None:
        history = x.new_zeros(count, channels, context)
    if length == 0:
        return history.clone()
    if cu_seqlens is None:
        assert reset is not None
        begin = torch.where(reset, torch.arange(length, device=x.device), 0).amax(1)
        end, of = begin.new_full((count,), length), n
        history = torch.where(reset.any(1)[:, None, None], 0.0, history)
    else:
        ends = _inner_offsets(cu_seqlens, length)
        begin = torch.cat([ends.new_zeros(1), ends])
        end, of = torch.cat([ends, ends.new_full((1,), length)]), torch.zeros_like(n)
    t = end[:, None] - context + torch.arange(context, device=x.device)
    values = x[of[:, None, None], channel, t.clamp(0, length - 1)[:, None]]
    if context == 0:
        return values
    before = history[n[:, None, None], channel, (context + t - begin[:, None]).clamp(0, context - 1)[:, None]]
    return torch.where((t >= begin[:, None])[:, None], values, before)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    history: Tensor | None = None,
    seed: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    relu: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """x (B, C, T), weight (O, C/groups, K), bias (O,), residual (B, Y, U), history (B, C, (K-1) d): y (B, Y, U).

    U is T / stride rounded up; Y is O, or half of it with a gated activation. Where ``reset`` (B, T) is true an
    episode begins, with zeros before it. ``cu_seqlens`` (N + 1) divides an x of one row into N
    sequences; then history is (N, C, (K-1) d).
    """
    batch, channels, length = x.shape
    outputs, group_channels, kernel_size = weight.shape
    context = (kernel_size - 1) * dilation
    if reset is None and cu_seqlens is None:
        padded = F.pad(x, (context, 0)) if history is None else torch.cat([history, x], -1)
        met = [padded[..., k * dilation : k * dilation + length] for k in range(kernel_size)]
    else:
        met = taps(x, history, kernel_size, dilation, origins(x, reset, cu_seqlens))
    w = weight.view(groups, outputs // groups, group_channels, kernel_size)
    products = [
        torch.einsum("goc,bgct->bgot", w[..., k], met[k][..., ::stride].unflatten(1, (groups, channels // groups)))
        for k in range(kernel_size)
    ]
    y = sum(products[1:], products[0]).reshape(batch, outputs, -(-length // stride))
    if bias is not None:
        y = y + bias.unsqueeze(-1)
    return epilogue(y, residual, seed, activation, relu, dropout)


def weight_norm(v: Tensor, g: Tensor | None) -> Tensor:
    """g v / |v|, the norm over each output channel; v where there is no g."""
    return v if g is None else v * (g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))


def temporal_block(
    x: Tensor,
    weight_1: Tensor,
    g_1: Tensor | None,
    bias_1: Tensor | None,
    weight_2: Tensor,
    g_2: Tensor | None,
    bias_2: Tensor | None,
    downsample_weight: Tensor | None,
    downsample_bias: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None = None,
    *,
    dilation: int,
    activation_1: str | None,
    activation_2: str | None,
    relu: bool,
    dropout: float,
) -> Tensor:
    """``relu?(r + dropout(activation_2(W_2 * z + b_2)))``, ``z = dropout(activation_1(W_1 * x + b_1))``.

    r is x, or its convolution with the downsample weight; W = g v / |v| where there is a g. The two values of ``seed``
    are those of z and of y.
    """
    weight_1, weight_2 = weight_norm(weight_1, g_1), weight_norm(weight_2, g_2)
    first, second = (None, None) if seed is None else (seed[:1], seed[1:])
    options: dict[str, Any] = {"reset": reset, "dilation": dilation, "dropout": dropout}
    z = causal_conv1d(x, weight_1, bias_1, seed=first, activation=activation_1, **options)
    r = x if downsample_weight is None else causal_conv1d(x, downsample_weight, downsample_bias)
    return causal_conv1d(z, weight_2, bias_2, r, seed=second, activation=activation_2, relu=relu, **options)


def row_taps_of(
    x: Tensor, history: Tensor | None, count: int, dilation: int, reset: Tensor | None = None
) -> list[Tensor]:
    """What each row of taps meets (B, C, T, S): x some rows before, zeros before an episode that ``reset`` begins."""
    length, above = x.shape[2], (count - 1) * dilation
    rows = F.pad(x, (0, 0, above, 0)) if history is None else torch.cat([history, x], 2)
    met = [rows[:, :, k * dilation : k * dilation + length] for k in range(count)]
    if reset is None:
        return met
    begins, row = origins(x[..., 0] if x.shape[3] else x.sum(3), reset, None)
    t = torch.arange(length, device=x.device)
    seen = [(t - above + k * dilation >= begins) | (row >= 0) for k in range(count)]
    return [torch.where(there[:, None, :, None], part, 0.0) for there, part in zip(seen, met, strict=True)]


def causal_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    history: Tensor | None = None,
    seed: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str | None = None,
    relu: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """x (B, C, T, S), weight (O, C/groups, K, L), residual (B, Y, T, S), history (B, C, (K-1) dilation[0], S): y.

    ``v[b,o,t,s] = bias[o] + sum_{c,k,l} weight[o,c,k,l] * x[b,c,t - (K-1-k) d, s + (l - L//2) e]`` with d and e the
    dilations and zeros beside the rows. Where ``reset`` (B, T) is true an episode begins, with zeros above it.
    """
    batch, channels, length, width = x.shape
    outputs, group_channels, row_taps, column_taps = weight.shape
    d, e = dilation
    side = column_taps // 2 * e
    met = row_taps_of(x, history, row_taps, d, reset)
    grids = [F.pad(rows, (side, side)).unflatten(1, (groups, channels // groups)) for rows in met]
    w = weight.view(groups, outputs // groups, group_channels, row_taps, column_taps)
    products = [
        torch.einsum("goc,bgcts->bgots", w[..., k, j], grids[k][..., j * e : j * e + width])
        for k in range(row_taps)
        for j in range(column_taps)
    ]
    y = sum(products[1:], products[0]).reshape(batch, outputs, length * width)
    if bias is not None:
        y = y + bias.unsqueeze(-1)
    residual = None if residual is None else residual.flatten(2)
    return epilogue(y, residual, seed, activation, relu, dropout).unflatten(-1, (length, width))


def wavenet_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None = None,
    skip: Tensor | None = None,
    condition: Tensor | None = None,
    global_condition: Tensor | None = None,
    history: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    dilation: int = 1,
) -> tuple[Tensor, Tensor]:
    """x (B, C, T), weight (2G, C, K), output_weight (C + S, G, 1), condition (B, 2G, T): y (B, C, T), skip (B, S, T).

    ``z = tanh(v_f) * sigmoid(v_g)`` of ``v = conv(x) + condition + global_condition``; ``y, skip = x, skip`` plus the
    rows of ``output_weight * z``.
    """
    v = causal_conv1d(x, weight, bias, condition, history, None, reset, dilation=dilation)
    if global_condition is not None:
        v = v + global_condition.unsqueeze(-1)
    out = causal_conv1d(_gated(v), output_weight, output_bias)
    y, s = out.split([x.shape[1], out.shape[1] - x.shape[1]], 1)
    return x + y, s.contiguous() if skip is None else skip + s


def epilogue(
    v: Tensor, residual: Tensor | None, seed: Tensor | None, activation: str | None, relu: bool, dropout: float
) -> Tensor:
    """y from v = conv + bias."""
    y = v if activation is None else ACTIVATIONS[activation](v)
    if dropout > 0:
        assert seed is not None
        y = dropped(y, dropout_mask(seed, (y.shape[0], y.shape[1], y.shape[2]), dropout), dropout)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def convolutional_gru(
    x: Tensor,
    weight_gates: Tensor,
    bias_gates: Tensor | None,
    weight_candidate: Tensor,
    bias_candidate: Tensor | None = None,
    *,
    hard: bool = True,
) -> Tensor:
    """x (B, C, W, N), weight_gates (2 C, C, K, L), weight_candidate (C, C, K', L'), all of K odd: y (B, C, W, N).

    ``u x + (1 - u) c`` with ``u, r = s(weight_gates * x + bias_gates)``, ``c = tanh(weight_candidate * (r x) + bias)``
    and centred convolutions; s is the sigmoid, or with ``hard`` ``max(0, min(1, 1.2 sigmoid - 0.1))``.
    """

    def centred(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ahead = weight.shape[2] // 2
        return causal_conv2d(F.pad(x, (0, 0, 0, ahead)), weight, bias)[:, :, ahead:]

    gates = torch.sigmoid(centred(x, weight_gates, bias_gates))
    if hard:
        gates = (1.2 * gates - 0.1).clamp(0, 1)
    u, r = gates.chunk(2, 1)
    return u * x + (1 - u) * torch.tanh(centred(r * x, weight_candidate, bias_candidate))
