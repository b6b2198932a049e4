"""Linear scan in Triton.

h_t = a_t h_{t-1} + b_t: a step is the affine map (a_t, b_t). Maps compose: (a, b), then (a', b'), is
(a' a, a' b + b'). A program takes BD channels of one sequence and walks through time in tiles of BT steps. It loads a
tile at once, composes its maps with an associative scan, and applies them to the carried state. So BT * BD elements are
in flight, where a loop over steps would wait for memory at each step. A tile holds 1024 or 2048 elements.

It runs one pass over memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, wrap_triton
from seqaccel.kernels.scan.checks import check, pointers

__all__ = ["CONFIGURATIONS", "linear_scan_backward", "linear_scan_forward"]


@triton.jit
def _compose(a_1, b_1, a_2, b_2):
    return a_2 * a_1, a_2 * b_1 + b_2


@triton.jit
def linear_scan_forward_kernel(
    p_a,  # [B, T, D]
    p_b,  # [B, T, D]
    p_h_0,  # [B, D]
    p_h,  # [B, T, D]
    T,
    D,
    HAS_H_0: tl.constexpr,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_h = tl.zeros([BD], dtype=p_h.dtype.element_ty)
    if HAS_H_0:
        b_h += tl.load(p_h_0 + i_b * D + o_d, mask=m_d, other=0)
    o_i = tl.arange(0, BT)
    for i_t in range(tl.cdiv(T, BT)):
        o_s = i_t * BT + o_i
        o_t = T - 1 - o_s if REVERSE else o_s
        mask = (o_s < T)[:, None] & m_d[None, :]
        offset = (i_b * T + o_t)[:, None] * D + o_d[None, :]  # [BT, BD]
        b_a = tl.load(p_a + offset, mask=mask, other=1)
        b_b = tl.load(p_b + offset, mask=mask, other=0)
        b_a, b_b = tl.associative_scan((b_a, b_b), 0, _compose)
        b_hs = b_a * b_h[None, :] + b_b
        tl.store(p_h + offset, b_hs, mask=mask)
        b_h = tl.sum(tl.where((o_i == BT - 1)[:, None], b_hs, 0), 0)


@triton.jit
def linear_scan_backward_kernel(
    p_grad_h,  # [B, T, D]
    p_a,  # [B, T, D]
    p_h,  # [B, T, D]
    p_h_0,  # [B, D]
    p_grad_a,  # [B, T, D]
    p_grad_b,  # [B, T, D]
    p_grad_h_0,  # [B, D]
    T,
    D,
    HAS_H_0: tl.constexpr,
    REVERSE: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    # grad_b_t = grad_h_t + a_{t+1} grad_b_{t+1}, grad_a_t = grad_b_t h_{t-1}, in the order of the forward scan.
    i_b = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_g = tl.zeros([BD], dtype=p_grad_h.dtype.element_ty)
    o_i = tl.arange(0, BT)
    for i_t in range(tl.cdiv(T, BT)):
        o_s = i_t * BT + o_i
        if REVERSE:
            o_t = o_s
            step = -1
        else:
            o_t = T - 1 - o_s
            step = 1
        mask = (o_s < T)[:, None] & m_d[None, :]
        offset = (i_b * T + o_t)[:, None] * D + o_d[None, :]  # [BT, BD]
        b_a = tl.load(p_a + offset + step * D, mask=mask & (o_s > 0)[:, None], other=1)
        b_b = tl.load(p_grad_h + offset, mask=mask, other=0)
        b_h = tl.load(p_h + offset - step * D, mask=mask & (o_s < T - 1)[:, None], other=0)
        if HAS_H_0:
            last = (o_s == T - 1)[:, None] & m_d[None, :]
            p_first = p_h_0 + i_b * D + o_d[None, :] + tl.zeros([BT, 1], dtype=tl.int32)
            b_h += tl.load(p_first, mask=last, other=0)
        b_a, b_b = tl.associative_scan((b_a, b_b), 0, _compose)
        b_gs = b_a * b_g[None, :] + b_b
        tl.store(p_grad_b + offset, b_gs, mask=mask)
        tl.store(p_grad_a + offset, b_gs * b_h, mask=mask)
        b_g = tl.sum(tl.where((o_i == BT - 1)[:, None], b_gs, 0), 0)
    p_first_a = p_a + (i_b * T + (T - 1 if REVERSE else 0)) * D
    tl.store(p_grad_h_0 + i_b * D + o_d, b_g * tl.load(p_first_a + o_d, mask=m_d, other=0), mask=m_d)


# Channels of a tile -> (steps of a tile, warps).
_TILES = {32: (64, 4), 16: (128, 8), 8: (256, 8), 1: (1024, 4)}


def _tile(batch: int, width: int) -> tuple[int, int, int]:
    """(BT, BD, warps): narrower and longer where there are fewer sequences and channels than programs run at once."""
    many = batch * width >= 32 * 264
    channels = 32 if width > 16 and many else 16 if width > 8 else 8 if width > 1 else 1
    steps, warps = _TILES[channels]
    return steps, channels, warps


def _check_batch(operator: str, batch: int) -> None:
    if batch > 65535:
        raise ValueError(f"{operator}: expected a batch of at most 65535, but got {batch}; the CUDA kernels take more")


@operator(torch.library.triton_op, "seqaccel::linear_scan_forward_triton", mutates_args={})
def linear_scan_forward(a: Tensor, b: Tensor, h_0: Tensor | None, reverse: bool) -> Tensor:
    batch, steps, width = a.shape
    _check_batch("linear_scan_forward_triton", batch)
    shape = (batch, steps, width)
    check("linear_scan_forward_triton", a, {"b": (b, shape), "h_0": (h_0, (batch, width))})
    a, b = a.contiguous(), b.contiguous()
    h = torch.empty_like(a)
    if h.numel() == 0:
        return h
    BT, BD, warps = _tile(batch, width)
    wrap_triton(linear_scan_forward_kernel)[(triton.cdiv(width, BD), batch)](
        a,
        b,
        a if h_0 is None else h_0.contiguous(),
        h,
        steps,
        width,
        HAS_H_0=h_0 is not None,
        REVERSE=reverse,
        BT=BT,
        BD=BD,
        num_warps=warps,
    )
    return h


@operator(torch.library.triton_op, "seqaccel::linear_scan_backward_triton", mutates_args={})
def linear_scan_backward(
    grad_h: Tensor, a: Tensor, h: Tensor, h_0: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, width = a.shape
    _check_batch("linear_scan_backward_triton", batch)
    shape = (batch, steps, width)
    check("linear_scan_backward_triton", a, {"grad_h": (grad_h, shape), "h": (h, shape), "h_0": (h_0, (batch, width))})
    grad_h, a, h = grad_h.contiguous(), a.contiguous(), h.contiguous()
    grad_a, grad_b = torch.empty_like(a), torch.empty_like(a)
    if a.numel() == 0:
        return grad_a, grad_b, a.new_zeros(batch, width)
    grad_h_0 = a.new_empty(batch, width)
    BT, BD, warps = _tile(batch, width)
    wrap_triton(linear_scan_backward_kernel)[(triton.cdiv(width, BD), batch)](
        grad_h,
        a,
        h,
        a if h_0 is None else h_0.contiguous(),
        grad_a,
        grad_b,
        grad_h_0,
        steps,
        width,
        HAS_H_0=h_0 is not None,
        REVERSE=reverse,
        BT=BT,
        BD=BD,
        num_warps=warps,
    )
    return grad_a, grad_b, grad_h_0


_SIZES = {"T": "i32", "D": "i32"}

#: Every tile.
CONFIGURATIONS = [
    *(
        Configuration(
            linear_scan_forward_kernel,
            pointers("a b h_0 h") | _SIZES,
            {"HAS_H_0": True, "REVERSE": reverse, "BT": steps, "BD": channels},
            num_warps=warps,
        )
        for reverse, (channels, (steps, warps)) in zip((False, True, False, True), _TILES.items(), strict=True)
    ),
    *(
        Configuration(
            linear_scan_backward_kernel,
            pointers("grad_h a h h_0 grad_a grad_b grad_h_0") | _SIZES,
            {"HAS_H_0": True, "REVERSE": reverse, "BT": steps, "BD": channels},
            num_warps=warps,
        )
        for reverse, (channels, (steps, warps)) in zip((False, True, False, True), _TILES.items(), strict=True)
    ),
]
