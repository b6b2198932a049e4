"""Dense convolutions: implicit matrix products, tap by tap.

    forward   y[o, t]     = sum_{k,c} W[o, c, k] x[c, t - s_k]      then the epilogue
    data      dx[c, t]    = sum_{k,o} W[o, c, k] g[o, t + s_k]      the same kernel, direction +1, W transposed
    weight    dW[o, c, k] = sum_{b,t} g[o, t] x[c, t - s_k]         partial sums over parts of b and t, then their sum

with ``s_k = (K-1-k) dilation``. Nothing is unfolded in memory. Operands are staged first: time before channels, and the
channels of a group padded with zeros to a multiple of 16. A tile at any step then begins at a multiple of 16 bytes, so
that its loads are vectors whatever the dilation and the length. Taps are the inner loop: those of one block of channels
meet nearly the same rows of x, which stay in the L2. Letters: o outputs, c channels, t time steps, k taps, B batch,
G groups; C and O are padded where an operand is staged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import precision, wrap_triton
from seqaccel.kernels.conv.epilogue import PLAIN, Epilogue, finish, gradient_at
from seqaccel.kernels.conv.taps import Sequences, Taps, tap_at

_PROGRAMS = 264  # the least number of programs for a weight gradient: 2 per multiprocessor of an H100
_STAGE = 64  # channels and steps of a tile that is staged
_SUM = 256  # elements per program of the sum over parts


@triton.jit(do_not_specialize=["lead"])
def conv_stage_kernel(
    p_x,  # [B, G * R, T]
    p_before,  # [B, G * R, lead]
    p_staged,  # [B, lead + T, G, C]
    T, lead, R, C, G, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Puts time before channels, what is before x first, and pads R channels of a group to C with zeros."""
    i_bg = tl.program_id(2).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    c = tl.program_id(1) * BC + tl.arange(0, BC)[:, None]
    t = tl.program_id(0) * BT + tl.arange(0, BT)[None, :]
    at = t
    if p_before is not None:
        at = t - lead
    v = tl.load(p_x + i_bg * R * T + c * T + at, mask=(c < R) & (at >= 0) & (at < T), other=0.0)
    if p_before is not None:
        v += tl.load(p_before + i_bg * R * lead + c * lead + t, mask=(c < R) & (t < lead), other=0.0)
    tl.store(p_staged + i_b * (lead + T) * G * C + (t * G + i_g) * C + c, v, mask=(c < C) & (t < lead + T))


@triton.jit
def conv_gradient_kernel(
    p_grad_y, p_y, p_pre, p_active, p_seed,
    p_g,  # [B, T, G, O]
    p_grad_residual,  # [B, outputs, T]
    p_sums,  # [B * tiles of T, G * R], fp32
    T, outputs, R, O, G, threshold, scale,
    ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The gradient of v from that of y, staged; the residual's on the way, and sums over time for the bias's."""
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    i_bg = tl.program_id(2).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    row = (i_g * R + o)[:, None]
    t = tl.program_id(0) * BT + tl.arange(0, BT)[None, :]
    valid = (o[:, None] < R) & (t < T)
    d, g = gradient_at(
        p_grad_y, p_y, p_pre, p_active, p_seed, i_b, row, t, valid, outputs, T, threshold, scale,
        ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip
    g = tl.where(valid, g, 0.0)
    if p_grad_residual is not None:
        p_grad_residual += i_b * outputs * T + row * T + t
        tl.store(p_grad_residual, d.to(p_grad_residual.dtype.element_ty), mask=valid & (row < outputs))
    tl.store(
        p_g + i_b * T * G * O + (t * G + i_g) * O + o[:, None], g.to(p_g.dtype.element_ty),
        mask=(o[:, None] < O) & (t < T),
    )  # fmt: skip
    if p_sums is not None:
        part = i_b * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_sums + (part * G + i_g) * R + o, tl.sum(g, 1), mask=o < R)


# Triton compiles anew where an integer becomes 1 or divisible by 16. That pays for L, by which results are stored.
@triton.jit(do_not_specialize=["T", "first", "context"])
def conv_product_kernel(
    p_x,  # [B, T, G, C]
    p_history,  # [N, context, G, C]
    p_bound,  # [B, L]
    p_row,  # [B, L]
    p_weight,  # [K, G * O, C]; of "glu" and "gated" [K, 2 * O, C]
    p_bias, p_residual, p_seed, p_y, p_pre, p_active,
    T, L, first, context, C, O, K, G, down, across, side, width, threshold, scale,
    DIRECTION: tl.constexpr, GRID: tl.constexpr, ACTIVATION: tl.constexpr, RELU: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BO: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y[b, o, i] = sum_{k,c} weight[k, o, c] x[b, first + i + DIRECTION * s_k, c], with the epilogue.

    ``bound`` is where the sequence of a step begins, or for direction +1 ends; rows of the history are before it.
    """
    GATED: tl.constexpr = ACTIVATION == "glu" or ACTIVATION == "gated"
    scale = tl.cast(scale, tl.float32)  # Inductor passes float64
    i_bg = tl.program_id(2).to(tl.int64)
    i_b, i_g = i_bg // G, i_bg % G
    o_o = tl.program_id(1) * BO + tl.arange(0, BO)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.arange(0, BC)
    lower, upper = o_t * 0, o_t * 0 + T
    if p_bound is not None:
        bound = tl.load(p_bound + i_b * L + o_t, mask=o_t < L, other=0)
        if DIRECTION < 0:
            lower = bound
        else:
            upper = bound
    if p_history is not None:
        i_n = tl.load(p_row + i_b * L + o_t, mask=o_t < L, other=0).to(tl.int64)
        p_before = p_history + ((i_n * context + context - lower) * G + i_g) * C  # of step 0
    acc = tl.zeros([BO, BT], dtype=tl.float32)
    gate = acc
    p_x += (i_b * T * G + i_g) * C  # 64 bits up to here, 32 within a sequence
    p_weight += i_g * O * C
    for i in range(K * tl.cdiv(C, BC)):
        k, c = i % K, i // K * BC + o_c
        at, there = tap_at(k, o_t, first, K, down, across, side, width, DIRECTION, GRID)
        b_x = tl.load(  # [BC, BT]
            p_x + at[None, :] * (G * C) + c[:, None],
            mask=(c[:, None] < C) & (there & (at >= lower) & (at < upper))[None, :],
            other=0.0,
        )
        if p_history is not None:
            b_x += tl.load(
                p_before[None, :] + at[None, :] * (G * C) + c[:, None],
                mask=(c[:, None] < C) & (there & (at < lower) & (o_t < L) & (i_n >= 0))[None, :],
                other=0.0,
            )
        p_w = p_weight + k * (G * O * (2 if GATED else 1)) * C + o_o[:, None] * C + c[None, :]
        within = (o_o[:, None] < O) & (c[None, :] < C)
        acc = tl.dot(tl.load(p_w, mask=within, other=0.0), b_x, acc, input_precision=PRECISION)
        if GATED:
            gate = tl.dot(tl.load(p_w + O * C, mask=within, other=0.0), b_x, gate, input_precision=PRECISION)
    there = o_o[:, None] < O
    finish(
        acc, gate, i_b, (i_g * O).to(tl.int32) + o_o[:, None], o_t[None, :], there, there & (o_t[None, :] < L),
        p_bias, p_residual, p_seed, p_y, p_pre, p_active, G * O, L, threshold, scale, ACTIVATION, RELU, DROPOUT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "T", "S", "lead", "per_split"])
def conv_weight_kernel(
    p_g,  # [B, T, G, PO]
    p_x,  # [B, S, G, PC]
    p_begin,  # [B, T]
    p_partial,  # [splits, K, G * O, C], fp32
    B, T, S, lead, C, PC, O, PO, K, G, down, across, side, width, per_split,
    GRID: tl.constexpr, PRECISION: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial[i, k, o, c] = sum over the i-th part of all (b, tile of t) of g[b, t, o] x[b, lead + t - s_k, c]."""
    tiles_c = tl.cdiv(C, BC)
    i_k, i_g = tl.program_id(1) // G, tl.program_id(1) % G
    o_o = tl.program_id(0) // tiles_c * BO + tl.arange(0, BO)
    o_c = tl.program_id(0) % tiles_c * BC + tl.arange(0, BC)
    i_s = tl.program_id(2)
    steps = tl.cdiv(T, BT)
    acc = tl.zeros([BO, BC], dtype=tl.float32)
    for i in range(i_s * per_split, (i_s + 1) * per_split):
        b = (i // steps).to(tl.int64)
        t = i % steps * BT + tl.arange(0, BT)
        valid = t < tl.where(b < B, T, 0)
        at, there = tap_at(i_k, t, lead, K, down, across, side, width, -1, GRID)
        lower = at * 0
        if p_begin is not None:
            lower = tl.load(p_begin + b * T + t, mask=valid, other=0)
        b_g = tl.load(  # [BT, BO]
            p_g + (b * T * G + i_g) * PO + t[:, None] * (G * PO) + o_o[None, :],
            mask=(o_o[None, :] < PO) & valid[:, None],
            other=0.0,
        )
        b_x = tl.load(  # [BT, BC]
            p_x + (b * S * G + i_g) * PC + at[:, None] * (G * PC) + o_c[None, :],
            mask=(o_c[None, :] < PC) & (valid & there & (at >= lower) & (at < S))[:, None],
            other=0.0,
        )
        acc = tl.dot(tl.trans(b_g), b_x, acc, input_precision=PRECISION)
    tl.store(
        p_partial + ((tl.cast(i_s, tl.int64) * K + i_k) * G + i_g) * O * C + o_o[:, None] * C + o_c[None, :],
        acc,
        mask=(o_o[:, None] < O) & (o_c[None, :] < C),
    )


@triton.jit(do_not_specialize=["parts"])
def conv_sum_kernel(p_partial, p_sum, parts, K, M, BP: tl.constexpr, BN: tl.constexpr):
    """sum[m, k] = sum_i partial[i, k, m], in the order of i."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_p = tl.arange(0, BP)[:, None]
    acc = tl.zeros([BN], dtype=tl.float32)
    for i in range(0, parts, BP):
        part = (i + o_p).to(tl.int64)
        acc += tl.sum(
            tl.load(p_partial + part * K * M + n[None, :], mask=(part < parts) & (n < K * M)[None, :], other=0.0), 0
        )
    tl.store(p_sum + n % M * K + n // M, acc.to(p_sum.dtype.element_ty), mask=n < K * M)


#: Tiles of products: output channels -> (time steps, channels per multiplication, warps, stages). TF32 and 16 bits were
#: tuned on an H100, with another order of the loop. Without tensor cores larger tiles spill registers. A tile of 256
#: channels and 64 steps would load 25% more bytes per operation than one of 128 and 128; with 128 steps it spills.
_PRODUCT = {
    "ieee": {16: (64, 16, 4, 2), 32: (64, 16, 4, 2), 64: (64, 16, 8, 2)},
    "tf32": {16: (64, 16, 4, 2), 32: (64, 16, 4, 2), 64: (64, 16, 4, 3), 128: (64, 16, 4, 3)},
    "half": {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3)},
}
#: Those of GPUs with more than 99 KiB of shared memory, where they differ.
_MORE = 163 << 10
_PRODUCT_MORE = {"half": {128: (128, 64, 8, 4)}}
_WITH_HISTORY = 2  # stages: what is read of x and of the history is added before it is staged
#: Tiles of weight gradients: channels of a side -> (time steps per multiplication, warps, stages).
_WEIGHT = {
    "ieee": {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 8, 2)},
    "tf32": {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 3), 128: (32, 8, 3)},
    "half": {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 3), 128: (64, 8, 3)},
}


def precision_of(dtype: torch.dtype) -> str:
    """torch's own switch for convolutions decides; its default is TF32."""
    return precision(dtype, torch.backends.cudnn.conv)


def kind_of(dtype: torch.dtype) -> str:
    return precision_of(dtype) if dtype == torch.float32 else "half"


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use."""
    if device.type != "cuda":
        return 99 << 10  # Triton's interpreter
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _side(table: dict[int, tuple[int, ...]], channels: int) -> int:
    """The side of the tile for this many channels: the smallest that holds them, or the largest there is."""
    return next((side for side in table if side >= channels), max(table))


def padded(channels: int) -> int:
    """Channels of a group where they are staged."""
    return triton.cdiv(channels, 16) * 16


def stage(x: Tensor, groups: int, before: Tensor | None = None) -> Tensor:
    """x [B, G * R, T], after what is before it, as [B, lead + T, G, C]: x itself if its memory is in this order."""
    batch, channels, length = x.shape
    group_channels = channels // groups
    if before is None and groups == 1 and channels % 16 == 0 and x.transpose(1, 2).is_contiguous():
        return x.transpose(1, 2).unsqueeze(2)
    lead = 0 if before is None else before.shape[2]
    staged = x.new_empty((batch, lead + length, groups, padded(group_channels)))
    if staged.numel():
        grid = (triton.cdiv(lead + length, _STAGE), triton.cdiv(staged.shape[3], _STAGE), batch * groups)
        wrap_triton(conv_stage_kernel)[grid](
            x.contiguous(), None if before is None else before.contiguous(), staged,
            length, lead, group_channels, staged.shape[3], groups, BC=_STAGE, BT=_STAGE, num_warps=4,
        )  # fmt: skip
    return staged


def stage_gradient(
    grad_y: Tensor, y: Tensor | None, pre: Tensor | None, active: Tensor | None, grad_residual: Tensor | None,
    rows: int, groups: int, epilogue: Epilogue, sums: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """v's gradient as [B, T, G, O] from y's [B, outputs, T], and its sums over tiles of time [parts, rows]."""
    batch, outputs, length = grad_y.shape
    group_rows = rows // groups
    g = grad_y.new_empty((batch, length, groups, padded(group_rows)))
    tiles = triton.cdiv(length, _STAGE)
    parts = grad_y.new_empty((batch * tiles, rows), dtype=torch.float32) if sums else None
    if g.numel():
        wrap_triton(conv_gradient_kernel)[(tiles, triton.cdiv(g.shape[3], _STAGE), batch * groups)](
            grad_y, y, pre, active, epilogue.seed, g, grad_residual, parts, length, outputs, group_rows, g.shape[3],
            groups, *epilogue.numbers, **epilogue.options, BO=_STAGE, BT=_STAGE, num_warps=8,
        )  # fmt: skip
    return g, parts


def stage_weight(weight: Tensor, groups: int, transposed: bool = False) -> Tensor:
    """The weight (G * O, C, K) as [K, G * O, padded C]; transposed as [K, G * C, padded O]."""
    if transposed:
        weight = weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)
    rest = padded(weight.shape[1]) - weight.shape[1]
    return F.pad(weight.permute(2, 0, 1), (0, rest)).contiguous()


def product(
    x: Tensor, weight: Tensor, y: Tensor, first: int, direction: int, taps: Taps, sequences: Sequences,
    history: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None,
    pre: Tensor | None = None, active: Tensor | None = None, epilogue: Epilogue = PLAIN,
) -> None:  # fmt: skip
    """Launches the product: x, weight and history as they are staged, y [B, G * O, L]."""
    batch, length, groups, channels = x.shape
    rows, steps = y.shape[1:]
    if y.numel() == 0:
        return
    outputs = rows // groups
    kind = kind_of(x.dtype)
    table = _PRODUCT[kind]
    if _shared_memory(x.device) >= _MORE:
        table = table | _PRODUCT_MORE.get(kind, {})
    side = _side(table, outputs * epilogue.halves)
    block, depth, warps, stages = table[side]
    side = max(16, side // epilogue.halves)
    stages = stages if history is None else _WITH_HISTORY
    wrap_triton(conv_product_kernel)[(triton.cdiv(steps, block), triton.cdiv(outputs, side), batch * groups)](
        x, history, sequences.begin if direction < 0 else sequences.end, sequences.row, weight,
        bias, residual, epilogue.seed, y, pre, active,
        length, steps, first, taps.context, channels, outputs, taps.count, groups, *taps[1:], *epilogue.numbers,
        DIRECTION=direction, GRID=taps.across > 1, **epilogue.options,
        PRECISION=precision_of(x.dtype), BO=side, BT=block, BC=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def _splits(tiles: int, programs: int) -> tuple[int, int]:
    """How many parts to cut the sum over ``tiles`` (b, tile of t) into for enough programs, and the tiles per part."""
    splits = max(1, min(triton.cdiv(tiles, 4), triton.cdiv(_PROGRAMS, max(1, programs))))
    return splits, triton.cdiv(tiles, splits)


def weight_parts(
    g: Tensor, x: Tensor, rows: int, channels: int, has_history: bool, taps: Taps, begin: Tensor | None
) -> Tensor:
    """Parts of the weight's gradient [parts, K, G * O, C] of g and x as they are staged, x after its history or not."""
    batch, length, groups, _ = g.shape
    outputs, lead = rows // groups, taps.context if has_history else 0
    table = _WEIGHT[kind_of(x.dtype)]
    side = _side(table, max(outputs, channels))
    steps, warps, stages = table[side]
    tiles = triton.cdiv(outputs, side) * triton.cdiv(channels, side)
    splits, per_split = _splits(batch * triton.cdiv(length, steps), tiles * taps.count * groups)
    if g.numel() == 0 or rows * channels == 0:
        return g.new_zeros((1, taps.count, rows, channels), dtype=torch.float32)
    partial = g.new_empty((splits, taps.count, rows, channels), dtype=torch.float32)
    wrap_triton(conv_weight_kernel)[(tiles, taps.count * groups, splits)](
        g, x, begin, partial, batch, length, x.shape[1], lead, channels, x.shape[3], outputs, g.shape[3], taps.count,
        groups, *taps[1:], per_split, GRID=taps.across > 1,
        PRECISION=precision_of(x.dtype), BO=side, BC=side, BT=steps, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return partial


def sum_parts(parts: Tensor, like: Tensor) -> Tensor:
    """The sum over parts [parts, K, M] or [parts, M] in their order, with the shape (M, K) and dtype of ``like``."""
    total = like.new_zeros(like.shape)
    taps = parts.shape[1] if parts.dim() > 2 else 1
    if total.numel() and parts.numel():
        wrap_triton(conv_sum_kernel)[(triton.cdiv(total.numel(), _SUM),)](
            parts, total, parts.shape[0], taps, total.numel() // taps, BP=8, BN=_SUM, num_warps=4
        )
    return total
