"""A WaveNet layer as one kernel: gated dilated convolution, residual and skip connection.

    z  = tanh(W_f * x + b_f + c_f + g_f) . sigmoid(W_g * x + b_g + c_g + g_g)
    x' = x + R z + r
    s' = s + S z + q

A program has all G gates of a tile of time: z stays in registers for the second product, whose rows are those of R,
then of S. Sums are float32. The backward pass is a kernel that ends at the gradient before the gates, and then the
products of ``product.py``. Letters: G gates, C channels of x, S of the skip connection, t time steps, k taps, B batch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import operator, wrap_triton
from seqaccel.kernels._math import sigmoid, tanh
from seqaccel.kernels.conv.epilogue import PLAIN
from seqaccel.kernels.conv.product import (
    kind_of,
    padded,
    precision_of,
    product,
    stage,
    stage_gradient,
    stage_weight,
    sum_parts,
    weight_parts,
)
from seqaccel.kernels.conv.taps import WHOLE, Sequences, Taps, sequences_of

#: Gates of a program -> (time steps, channels and rows of x' and s' per multiplication, warps, stages). The largest
#: that spill no registers and fit 99 KiB of shared memory; no GPU has run them.
TILES = {
    "ieee": {16: (32, 16, 32, 4, 2), 32: (32, 16, 32, 4, 2), 64: (32, 16, 64, 8, 2), 128: (32, 16, 32, 8, 2)},
    "tf32": {16: (64, 16, 64, 4, 2), 32: (64, 16, 64, 4, 2), 64: (64, 16, 64, 8, 3), 128: (32, 16, 32, 8, 2)},
    "half": {16: (64, 32, 64, 4, 2), 32: (64, 32, 64, 4, 2), 64: (64, 64, 64, 8, 3), 128: (64, 64, 32, 8, 3)},
}


@triton.jit(do_not_specialize=["lead"])
def wavenet_forward_kernel(
    p_x,  # [B, lead + T, PC], staged after its history
    p_first,  # [B, T] int32 or None: the first of the lead + T steps that a step sees
    p_weight,  # [K, 2 * G, PC]
    p_bias,  # [2 * G]
    p_condition,  # [B, 2 * G, T]
    p_global,  # [B, 2 * G]
    p_output_weight,  # [C + S, PG]
    p_output_bias,  # [C + S]
    p_residual, p_skip,  # [B, C, T], [B, S, T]
    p_y, p_next,  # [B, C, T], [B, S, T]
    p_saved,  # [B, 2 * G, T]: tanh, then sigmoid
    T, lead, C, PC, G, PG, S, K, dilation,
    PRECISION: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(1).to(tl.int64)
    o_g = tl.arange(0, BG)[:, None]
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)[None, :]
    o_c = tl.arange(0, BC)
    value = tl.zeros([BG, BT], dtype=tl.float32)
    gate = value
    p_x += i_b * (lead + T) * PC
    lower = o_t * 0
    if p_first is not None:
        lower = tl.load(p_first + i_b * T + o_t, mask=o_t < T, other=0)
    for i in range(K * tl.cdiv(PC, BC)):
        k, c = i % K, i // K * BC + o_c
        at = lead + o_t - (K - 1 - k) * dilation
        b_x = tl.load(  # [BC, BT]
            p_x + at * PC + c[:, None], mask=(c[:, None] < PC) & (at >= lower) & (at < lead + T), other=0.0
        )
        p_w = p_weight + (k * 2 * G + o_g) * PC + c[None, :]
        within = (o_g < G) & (c[None, :] < PC)
        value = tl.dot(tl.load(p_w, mask=within, other=0.0), b_x, value, input_precision=PRECISION)
        gate = tl.dot(tl.load(p_w + G * PC, mask=within, other=0.0), b_x, gate, input_precision=PRECISION)
    if p_bias is not None:
        value += tl.load(p_bias + o_g, mask=o_g < G, other=0.0).to(tl.float32)
        gate += tl.load(p_bias + G + o_g, mask=o_g < G, other=0.0).to(tl.float32)
    if p_global is not None:
        value += tl.load(p_global + i_b * 2 * G + o_g, mask=o_g < G, other=0.0).to(tl.float32)
        gate += tl.load(p_global + i_b * 2 * G + G + o_g, mask=o_g < G, other=0.0).to(tl.float32)
    valid, o_v = (o_g < G) & (o_t < T), o_g * T + o_t
    if p_condition is not None:
        p_condition += i_b * 2 * G * T
        value += tl.load(p_condition + o_v, mask=valid, other=0.0).to(tl.float32)
        gate += tl.load(p_condition + G * T + o_v, mask=valid, other=0.0).to(tl.float32)
    value, gate = tanh(value), sigmoid(gate)
    if p_saved is not None:
        p_saved += i_b * 2 * G * T
        tl.store(p_saved + o_v, value.to(p_saved.dtype.element_ty), mask=valid)
        tl.store(p_saved + G * T + o_v, gate.to(p_saved.dtype.element_ty), mask=valid)
    b_z = (value * gate).to(p_x.dtype.element_ty)  # [BG, BT]; 0 beyond G, where tanh is
    first = C
    if p_y is not None:
        first = 0
    for start in range(first, C + S, BR):
        r = start + tl.arange(0, BR)[:, None]
        b_w = tl.load(  # [BR, BG]
            p_output_weight + r * PG + tl.arange(0, BG)[None, :],
            mask=(r < C + S) & (tl.arange(0, BG)[None, :] < PG),
            other=0.0,
        )
        out = tl.dot(b_w, b_z, input_precision=PRECISION)
        if p_output_bias is not None:
            out += tl.load(p_output_bias + r, mask=r < C + S, other=0.0).to(tl.float32)
        if p_y is not None:
            at, mask = i_b * C * T + r * T + o_t, (r < C) & (o_t < T)
            x = tl.load(p_residual + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_y + at, (out + x).to(p_y.dtype.element_ty), mask=mask)
        at, mask = i_b * S * T + (r - C) * T + o_t, (r >= C) & (r < C + S) & (o_t < T)
        if p_skip is not None:
            out += tl.load(p_skip + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_next + at, out.to(p_next.dtype.element_ty), mask=mask)


@triton.jit
def _to_gates(
    dz, p_grad, p_weight, t, T, R, PR, PG, PRECISION: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Adds what R rows of outputs, with weight [R, PG], give to the gradient of z [BG, BT]; grad [T, PR]."""
    o_g = tl.arange(0, BG)[:, None]
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        b_w = tl.load(  # [BG, BR]
            p_weight + r[None, :] * PG + o_g, mask=(r[None, :] < R) & (o_g < PG), other=0.0
        )
        b_d = tl.load(p_grad + t * PR + r[:, None], mask=(r[:, None] < PR) & (t < T), other=0.0)  # [BR, BT]
        dz = tl.dot(b_w, b_d, dz, input_precision=PRECISION)
    return dz


@triton.jit
def wavenet_gate_kernel(
    p_grad_y, p_grad_skip,  # [B, T, PC], [B, T, PS], staged
    p_output_weight,  # [C + S, PG]
    p_saved,  # [B, 2 * G, T]
    p_g,  # [B, T, P]
    p_z,  # [B, T, PG]
    p_grad_condition,  # [B, 2 * G, T]
    p_sums,  # [B * tiles of T, 2 * G], fp32
    T, C, PC, S, PS, G, PG, P,
    PRECISION: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The gradient before the gates, staged; z, staged, for the gradient of the output's weight; and sums over time."""
    i_b = tl.program_id(1).to(tl.int64)
    o_g = tl.arange(0, BG)[:, None]
    t = tl.program_id(0) * BT + tl.arange(0, BT)[None, :]
    dz = tl.zeros([BG, BT], dtype=tl.float32)
    if p_grad_y is not None:
        dz = _to_gates(dz, p_grad_y + i_b * T * PC, p_output_weight, t, T, C, PC, PG, PRECISION, BG, BR)
    if p_grad_skip is not None:
        p_last = p_output_weight + C * PG
        dz = _to_gates(dz, p_grad_skip + i_b * T * PS, p_last, t, T, S, PS, PG, PRECISION, BG, BR)
    valid, o_v = (o_g < G) & (t < T), o_g * T + t
    p_saved += i_b * 2 * G * T
    a = tl.load(p_saved + o_v, mask=valid, other=0.0).to(tl.float32)
    s = tl.load(p_saved + G * T + o_v, mask=valid, other=0.0).to(tl.float32)
    value = tl.where(valid, dz * s * (1 - a * a), 0.0)
    gate = tl.where(valid, dz * a * s * (1 - s), 0.0)
    if p_z is not None:
        p_z += i_b * T * PG
        tl.store(p_z + (t * PG + o_g), (a * s).to(p_z.dtype.element_ty), mask=(o_g < PG) & (t < T))
    if p_grad_condition is not None:
        p_grad_condition += i_b * 2 * G * T
        tl.store(p_grad_condition + o_v, value.to(p_grad_condition.dtype.element_ty), mask=valid)
        tl.store(p_grad_condition + G * T + o_v, gate.to(p_grad_condition.dtype.element_ty), mask=valid)
    p_g += i_b * T * P
    tl.store(p_g + (t * P + o_g), value.to(p_g.dtype.element_ty), mask=valid)
    tl.store(p_g + G + (t * P + o_g), gate.to(p_g.dtype.element_ty), mask=valid)
    rest = tl.zeros([BG, BT], dtype=p_g.dtype.element_ty)
    tl.store(p_g + 2 * G + (t * P + o_g), rest, mask=(o_g < P - 2 * G) & (t < T))
    if p_sums is not None:
        p_sums += (i_b * tl.num_programs(0) + tl.program_id(0)) * 2 * G + tl.arange(0, BG)
        tl.store(p_sums, tl.sum(value, 1), mask=tl.arange(0, BG) < G)
        tl.store(p_sums + G, tl.sum(gate, 1), mask=tl.arange(0, BG) < G)


def layer_fits(x: Any, weight: Any, output_weight: Any) -> bool:
    """Whether a program holds all gates, and offsets within a sequence fit 32 bits; of three shapes."""
    rows, _, taps = weight
    widest = max(padded(x[1]), padded(rows), padded(output_weight[0]))
    return rows // 2 <= max(TILES["half"]) and widest * x[2] < 1 << 31 and max(x[0], taps) <= 65535


def _first(sequences: Sequences, lead: int) -> Tensor | None:
    """The first step that each step may see [B, T], of ``lead`` steps of the history and x: of its episode, or 0."""
    if sequences.begin is None or sequences.row is None:
        return None
    return torch.where(sequences.row < 0, sequences.begin + lead, 0)


def _check(
    x: Tensor, weight: Tensor, output_weight: Tensor, taps: Taps, reset: Tensor | None, **tensors: Tensor | None
) -> None:
    """``tensors`` are checked by their names."""
    name = "wavenet_layer"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"{name}: backend 'triton' takes float32, float16 and bfloat16, but got {x.dtype}")
    (batch, channels, length), rows, outputs = x.shape, weight.shape[0], output_weight.shape[0]
    of_gates, of_skip = (batch, rows, length), (batch, outputs - channels, length)
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (rows, channels, taps.count), "output_weight": (outputs, rows // 2, 1), "bias": (rows,),
        "output_bias": (outputs,), "skip": of_skip, "grad_skip": of_skip, "condition": of_gates, "saved": of_gates,
        "global_condition": (batch, rows), "history": (batch, channels, taps.context), "grad_y": tuple(x.shape),
    }  # fmt: skip
    for argument, t in {**tensors, "weight": weight, "output_weight": output_weight}.items():
        if t is not None and (t.shape != shapes[argument] or t.dtype != x.dtype):
            raise ValueError(
                f"{name}: expected {argument} to be {x.dtype} of shape {shapes[argument]}, "
                f"but got {t.dtype} of {tuple(t.shape)}"
            )
    if reset is not None and (reset.shape != (batch, length) or reset.dtype != torch.bool):
        raise ValueError(f"{name}: expected reset to be torch.bool of shape {(batch, length)}")
    extended = (batch, channels, length + taps.context)
    if rows % 2 or outputs < channels or not layer_fits(extended, weight.shape, output_weight.shape):
        raise RuntimeError(
            f"{name}: backend 'triton' takes up to {max(TILES['half'])} gates and fewer than 2^31 values a sequence, "
            f"but got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )


def _tile(x: Tensor, gates: int) -> tuple[int, tuple[int, int, int, int, int]]:
    table = TILES[kind_of(x.dtype)]
    side = next(side for side in table if side >= gates)
    return side, table[side]


def _contiguous(*tensors: Any) -> Any:
    return [None if t is None else t.contiguous() for t in tensors]


@operator(torch.library.triton_op, "seqaccel::wavenet_layer_forward_triton", mutates_args={})
def wavenet_layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor | None,
    skip: Tensor | None,
    condition: Tensor | None,
    global_condition: Tensor | None,
    history: Tensor | None,
    reset: Tensor | None,
    dilation: int,
    residual: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like ``seqaccel::wavenet_layer_forward``: x' or nothing, s', and tanh and sigmoid of the gates or nothing."""
    taps = Taps(weight.shape[2], dilation)
    _check(
        x, weight, output_weight, taps, reset, bias=bias, output_bias=output_bias, skip=skip, condition=condition,
        global_condition=global_condition, history=history,
    )  # fmt: skip
    (batch, channels, length), gates = x.shape, weight.shape[0] // 2
    skips = output_weight.shape[0] - channels
    y = x.new_empty(x.shape if residual else (0,))
    next_skip = x.new_empty((batch, skips, length))
    saved = x.new_empty((batch, 2 * gates, length) if save else (0,))
    if batch * length == 0:
        return y, next_skip, saved
    bias, output_bias, skip, condition, global_condition = _contiguous(
        bias, output_bias, skip, condition, global_condition
    )
    staged, lead = stage(x, 1, history), 0 if history is None else taps.context
    first = _first(sequences_of(x, reset, None), lead)
    inner, outer = stage_weight(weight, 1), stage_weight(output_weight, 1)
    side, (steps, depth, height, warps, stages) = _tile(x, gates)
    wrap_triton(wavenet_forward_kernel)[(triton.cdiv(length, steps), batch)](
        staged, first, inner, bias, condition, global_condition, outer, output_bias,
        x.contiguous() if residual else None, skip, y if residual else None, next_skip, saved if save else None,
        length, lead, channels, staged.shape[3], gates, outer.shape[2], skips, taps.count, dilation,
        PRECISION=precision_of(x.dtype), BG=side, BT=steps, BC=depth, BR=height, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y, next_skip, saved


@operator(torch.library.triton_op, "seqaccel::wavenet_layer_backward_triton", mutates_args={})
def wavenet_layer_backward(
    grad_y: Tensor | None,
    grad_skip: Tensor | None,
    saved: Tensor,
    x: Tensor,
    weight: Tensor,
    output_weight: Tensor,
    history: Tensor | None,
    reset: Tensor | None,
    dilation: int,
    wants: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like ``seqaccel::wavenet_layer_backward``: empty where a gradient is unwanted.

    Returns the gradients of x, weight, bias, output_weight, output_bias, condition, global_condition and history.
    """
    taps = Taps(weight.shape[2], dilation)
    _check(
        x, weight, output_weight, taps, reset, grad_y=grad_y, grad_skip=grad_skip, saved=saved, history=history
    )  # fmt: skip
    grad_y, grad_skip, saved = _contiguous(grad_y, grad_skip, saved)
    (batch, channels, length), rows, outputs = x.shape, weight.shape[0], output_weight.shape[0]
    gates, skips = rows // 2, outputs - channels
    shapes = (
        x.shape, weight.shape, (rows,), output_weight.shape, (outputs,), saved.shape, (batch, rows),
        (batch, channels, taps.context),
    )  # fmt: skip
    grads = [x.new_zeros(shape if wants >> i & 1 else (0,)) for i, shape in enumerate(shapes)]
    if batch * length == 0:
        return tuple(grads)  # type: ignore[return-value]
    wants_x, wants_weight, wants_bias, wants_outer, wants_outer_bias, wants_condition, wants_global, wants_history = (
        bool(wants >> i & 1) for i in range(8)
    )
    given = [
        None if grad is None else stage_gradient(grad, None, None, None, None, count, 1, PLAIN, wants_outer_bias)
        for grad, count in ((grad_y, channels), (grad_skip, skips))
    ]
    d_y, d_skip = (None if pair is None else pair[0] for pair in given)
    outer = stage_weight(output_weight, 1)
    side, (steps, _, height, warps, stages) = _tile(x, gates)
    tiles = triton.cdiv(length, steps)
    g = x.new_empty((batch, length, 1, padded(rows)))
    z = x.new_empty((batch, length, 1, padded(gates))) if wants_outer else None
    sums = x.new_empty((batch * tiles, rows), dtype=torch.float32) if wants_bias or wants_global else None
    wrap_triton(wavenet_gate_kernel)[(tiles, batch)](
        d_y, d_skip, outer, saved, g, z, grads[5] if wants_condition else None, sums,
        length, channels, padded(channels), skips, padded(skips), gates, outer.shape[2], g.shape[3],
        PRECISION=precision_of(x.dtype), BG=side, BT=steps, BR=height, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if wants_x or wants_history:
        transposed = stage_weight(weight, 1, transposed=True)
    sequences = sequences_of(x, reset, None)
    if wants_x:
        product(g, transposed, grads[0], 0, 1, taps, sequences, residual=grad_y)
    if wants_history:
        near = g
        if sequences.row is not None:  # what the episode that goes on from the history has
            near = torch.where((sequences.row >= 0)[:, :, None, None], g, 0.0)
        product(near, transposed, grads[7], -taps.context, 1, taps, WHOLE)
    if wants_weight:
        begin = _first(sequences, 0 if history is None else taps.context)
        parts = weight_parts(g, stage(x, 1, history), rows, channels, history is not None, taps, begin)
        grads[1] = sum_parts(parts, weight)
    if wants_bias and sums is not None:
        grads[2] = sum_parts(sums, grads[2])
    if wants_global and sums is not None:
        grads[6] = sums.view(batch, tiles, rows).sum(1).to(x.dtype)
    for pair, part in zip(given, (slice(0, channels), slice(channels, outputs)), strict=True):
        if pair is not None and z is not None:
            like = grads[3][part]
            grads[3][part] = sum_parts(weight_parts(pair[0], z, like.shape[0], gates, False, Taps(1, 1), None), like)
        if pair is not None and pair[1] is not None:
            grads[4][part] = sum_parts(pair[1], grads[4][part])
    return tuple(grads)  # type: ignore[return-value]
