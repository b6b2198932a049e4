"""Linear scan in Triton.

h_t = a_t h_{t-1} + b_t: a step is the affine map (a_t, b_t). Maps compose: (a, b), then (a', b'), is
(a' a, a' b + b'). A program takes BD channels of one sequence and walks through time in tiles of BT steps. It loads a
tile at once, composes its maps with an associative scan, and applies them to the carried state. So BT * BD elements are
in flight, where a loop over steps would wait for memory at each step. A tile holds 1024 or 2048 elements.

That is one pass over memory. Where sequences and channels make too few programs, time is cut into chunks: a pass
composes each chunk's map (COMPOSE), a small kernel finds the state before each chunk, and a pass as above starts from
there (APPLY). Narrow types are calculated in float32, which also carries the state.

Sequences lie one after the other: T rows each, or with offsets (PACKED) within T rows in all. N sequences, D channels,
C chunks of time. Where an episode begins within a sequence (p_reset) the coefficient is zero, and a map whose
coefficient is zero ignores what is before it, even if that is not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, wrap_triton
from seqaccel.kernels.scan.checks import pointers

__all__ = ["CONFIGURATIONS", "linear_scan_backward", "linear_scan_forward"]

WHOLE, COMPOSE, APPLY = 0, 1, 2  # PASS


@triton.jit
def _compose(a_1, b_1, a_2, b_2):
    return a_2 * a_1, a_2 * b_1 + b_2


@triton.jit
def _compose_episodes(a_1, b_1, a_2, b_2):
    return tl.where((a_1 == 0) | (a_2 == 0), 0, a_2 * a_1), tl.where(a_2 == 0, b_2, a_2 * b_1 + b_2)


@triton.jit
def _maps_and_states(b_a, b_b, b_h, p_reset):
    """The composed coefficients of a tile [BT, BD], and its states from the state b_h [BD] before it."""
    if p_reset is not None:
        b_a, b_b = tl.associative_scan((b_a, b_b), 0, _compose_episodes)
        b_hs = tl.where(b_a == 0, b_b, b_a * b_h[None, :] + b_b)
    else:
        b_a, b_b = tl.associative_scan((b_a, b_b), 0, _compose)
        b_hs = b_a * b_h[None, :] + b_b
    return b_a, b_hs


@triton.jit
def _joined(b_p, b_a, o_i, p_reset, BT: tl.constexpr):
    """The product of the coefficients so far and of a tile."""
    b_last = tl.sum(tl.where((o_i == BT - 1)[:, None], b_a, 0), 0)
    b_joined = b_p * b_last
    if p_reset is not None:
        b_joined = tl.where((b_p == 0) | (b_last == 0), 0, b_joined)
    return b_joined


@triton.jit
def _sequence(p_offsets, i_n, N, T, PACKED: tl.constexpr):
    """First row and number of steps. Offsets of any value stay within the T rows, and all rows have a sequence."""
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(p_offsets + i_n), 0), T)
        end = tl.minimum(tl.maximum(tl.load(p_offsets + i_n + 1), 0), T)
        begin = tl.where(i_n == 0, 0, begin)
        return begin, tl.maximum(tl.where(i_n == N - 1, T, end) - begin, 0)
    else:
        return i_n * T, i_n * 0 + T


@triton.jit
def _chunk(length, i_c, C, BT: tl.constexpr):
    """Its first step and the one after its last, and whether the last step, or the end of no steps, is in it."""
    steps = tl.cdiv(tl.cdiv(length, BT), C) * BT
    start = tl.minimum(i_c * steps, length)
    stop = tl.minimum(start + steps, length)
    return start, stop, (stop == length) & ((start < length) | (i_c == 0))


@triton.jit(do_not_specialize=["N", "C"])
def linear_scan_forward_kernel(
    p_a,  # [rows, D]
    p_b,  # [rows, D]
    p_h_0,  # [N, D]
    p_offsets,  # [N + 1]
    p_reset,  # [rows] or None
    p_h,  # [rows, D]
    p_h_last,  # [N, D]
    p_map_a,  # [N, C, D]
    p_map_b,  # [N, C, D]; APPLY: the state before each chunk
    N,
    T,
    D,
    C,
    HAS_H_0: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    RETURN_LAST: tl.constexpr,
    PASS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(2)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    dtype: tl.constexpr = p_map_a.dtype.element_ty
    first, length = _sequence(p_offsets, i_n, N, T, PACKED)
    start, stop, is_last = _chunk(length, i_c, C, BT)
    o_map = (i_n * C + i_c) * D
    b_h = tl.zeros([BD], dtype=dtype)
    b_p = tl.zeros([BD], dtype=dtype) + 1
    if PASS == 2:
        b_h += tl.load(p_map_b + o_map + o_d, mask=m_d, other=0)
    elif PASS == 0 and HAS_H_0:
        b_h += tl.load(p_h_0 + i_n * D + o_d, mask=m_d, other=0).to(dtype)
    o_i = tl.arange(0, BT)
    for i_t in range(start, stop, BT):
        o_s = i_t + o_i
        o_t = length - 1 - o_s if REVERSE else o_s
        mask = (o_s < stop)[:, None] & m_d[None, :]
        offset = (first + o_t)[:, None] * D + o_d[None, :]  # [BT, BD]
        b_a = tl.load(p_a + offset, mask=mask, other=1).to(dtype)
        b_b = tl.load(p_b + offset, mask=mask, other=0).to(dtype)
        if p_reset is not None:
            if REVERSE:  # steps t and t + 1 are apart
                b_cut = tl.load(p_reset + first + o_t + 1, mask=(o_s < stop) & (o_s > 0), other=0)
            else:
                b_cut = tl.load(p_reset + first + o_t, mask=o_s < stop, other=0)
            b_a = tl.where((b_cut != 0)[:, None], 0, b_a)
        b_a, b_hs = _maps_and_states(b_a, b_b, b_h, p_reset)
        if PASS == 1:
            b_p = _joined(b_p, b_a, o_i, p_reset, BT)
        else:
            tl.store(p_h + offset, b_hs, mask=mask)
        b_h = tl.sum(tl.where((o_i == BT - 1)[:, None], b_hs, 0), 0)
    if PASS == 1:
        tl.store(p_map_a + o_map + o_d, b_p, mask=m_d)
        tl.store(p_map_b + o_map + o_d, b_h, mask=m_d)
    elif RETURN_LAST and is_last:
        tl.store(p_h_last + i_n * D + o_d, b_h, mask=m_d)


@triton.jit(do_not_specialize=["N", "C"])
def linear_scan_backward_kernel(
    p_grad_h,  # [rows, D]
    p_grad_h_last,  # [N, D]
    p_a,  # [rows, D]
    p_h,  # [rows, D]
    p_h_0,  # [N, D]
    p_offsets,  # [N + 1]
    p_reset,  # [rows] or None
    p_grad_a,  # [rows, D]
    p_grad_b,  # [rows, D]
    p_grad_h_0,  # [N, D]
    p_map_a,  # [N, C, D]
    p_map_b,  # [N, C, D]; APPLY: the gradient before each chunk
    N,
    T,
    D,
    C,
    HAS_H_0: tl.constexpr,
    HAS_GRAD_H_LAST: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSE: tl.constexpr,
    PASS: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    # grad_b_t = grad_h_t + a_{t+1} grad_b_{t+1}, grad_a_t = grad_b_t h_{t-1}, in the order of the forward scan.
    i_n = tl.program_id(1).to(tl.int64)
    i_c = tl.program_id(2)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    dtype: tl.constexpr = p_map_a.dtype.element_ty
    first, length = _sequence(p_offsets, i_n, N, T, PACKED)
    start, stop, is_last = _chunk(length, i_c, C, BT)
    o_map = (i_n * C + i_c) * D
    b_g = tl.zeros([BD], dtype=dtype)
    b_p = tl.zeros([BD], dtype=dtype) + 1
    if PASS == 2:
        b_g += tl.load(p_map_b + o_map + o_d, mask=m_d, other=0)
    elif PASS == 0 and HAS_GRAD_H_LAST:
        b_g += tl.load(p_grad_h_last + i_n * D + o_d, mask=m_d, other=0).to(dtype)
    o_i = tl.arange(0, BT)
    for i_t in range(start, stop, BT):
        o_s = i_t + o_i
        if REVERSE:
            o_t = o_s
            step = -1
        else:
            o_t = length - 1 - o_s
            step = 1
        mask = (o_s < stop)[:, None] & m_d[None, :]
        offset = (first + o_t)[:, None] * D + o_d[None, :]  # [BT, BD]
        b_a = tl.load(p_a + offset + step * D, mask=mask & (o_s > 0)[:, None], other=1).to(dtype)
        b_b = tl.load(p_grad_h + offset, mask=mask, other=0).to(dtype)
        b_apart = o_s < 0  # from the state before
        if p_reset is not None:
            b_here = tl.load(p_reset + first + o_t, mask=o_s < stop, other=0) != 0
            b_after = tl.load(p_reset + first + o_t + 1, mask=(o_s < stop) & (o_t < length - 1), other=0) != 0
            if REVERSE:  # the state before is that of t + 1
                b_cut, b_apart = b_here & (o_s > 0), b_after
            else:
                b_cut, b_apart = b_after, b_here
            b_a = tl.where(b_cut[:, None], 0, b_a)
        b_a, b_gs = _maps_and_states(b_a, b_b, b_g, p_reset)
        if PASS == 1:
            b_p = _joined(b_p, b_a, o_i, p_reset, BT)
        else:
            b_h = tl.load(p_h + offset - step * D, mask=mask & (o_s < length - 1)[:, None], other=0).to(dtype)
            if HAS_H_0:
                edge = (o_s == length - 1)[:, None] & m_d[None, :]
                p_edge = p_h_0 + i_n * D + o_d[None, :] + tl.zeros([BT, 1], dtype=tl.int32)
                b_h += tl.load(p_edge, mask=edge, other=0).to(dtype)
            if p_reset is not None:
                b_h = tl.where(b_apart[:, None], 0, b_h)
            tl.store(p_grad_b + offset, b_gs, mask=mask)
            tl.store(p_grad_a + offset, b_gs * b_h, mask=mask)
        b_g = tl.sum(tl.where((o_i == BT - 1)[:, None], b_gs, 0), 0)
    if PASS == 1:
        tl.store(p_map_a + o_map + o_d, b_p, mask=m_d)
        tl.store(p_map_b + o_map + o_d, b_g, mask=m_d)
    elif is_last:
        if length > 0:
            p_edge_a = p_a + (first + (length - 1 if REVERSE else 0)) * D
            b_g *= tl.load(p_edge_a + o_d, mask=m_d, other=1).to(dtype)
            if not REVERSE and p_reset is not None:
                b_g = tl.where(tl.load(p_reset + first) != 0, 0, b_g)
        tl.store(p_grad_h_0 + i_n * D + o_d, b_g, mask=m_d)


@triton.jit(do_not_specialize=["C"])
def chunk_states_kernel(
    p_first,  # [N, D]
    p_map_a,  # [N, C, D]
    p_map_b,  # [N, C, D]; becomes the state before each chunk
    C,
    D,
    HAS_FIRST: tl.constexpr,
    RESETS: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(1).to(tl.int64)
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_h = tl.zeros([BD], dtype=p_map_a.dtype.element_ty)
    if HAS_FIRST:
        b_h += tl.load(p_first + i_n * D + o_d, mask=m_d, other=0).to(p_map_a.dtype.element_ty)
    for i_c in range(C):
        offset = (i_n * C + i_c) * D + o_d
        b_a = tl.load(p_map_a + offset, mask=m_d, other=1)
        b_b = tl.load(p_map_b + offset, mask=m_d, other=0)
        tl.store(p_map_b + offset, b_h, mask=m_d)
        # A product of coefficients that overflowed does not spoil a state that is zero.
        b_drop = b_h == 0
        if RESETS:
            b_drop = b_drop | (b_a == 0)
        b_h = tl.where(b_drop, b_b, b_a * b_h + b_b)


# Channels of a tile -> (steps of a tile, warps).
_TILES = {32: (64, 4), 16: (128, 8), 8: (256, 8), 1: (1024, 4)}
_ENOUGH = 264  # programs, 2 a multiprocessor of an H100: with fewer, time is cut into chunks
_CHUNKED = 1056  # so that there are about as many
_BD = 128  # channels of a program of chunk_states_kernel


def _tile(sequences: int, width: int) -> tuple[int, int, int]:
    """(BT, BD, warps): narrower and longer where there are fewer sequences and channels than programs run at once."""
    many = sequences * width >= 32 * _ENOUGH
    channels = 32 if width > 16 and many else 16 if width > 8 else 8 if width > 1 else 1
    steps, warps = _TILES[channels]
    return steps, channels, warps


def _chunks(programs: int, steps: int, BT: int) -> int:
    """Chunks of each sequence of so many steps, of at least two tiles."""
    tiles = triton.cdiv(steps, BT)
    return 1 if programs >= _ENOUGH or tiles < 4 else min(triton.cdiv(_CHUNKED, programs), tiles // 2)


_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check(
    name: str,
    a: Tensor,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    whole: dict[str, Tensor],
    states: dict[str, Tensor | None],
) -> int:
    """Number of sequences. ``whole`` have a's shape, ``states`` one row for each sequence."""
    if a.dtype not in _TYPES:
        raise TypeError(f"{name}: expected a to be float16, bfloat16, float32 or float64, but got {a.dtype}")
    if a.dim() != 3:
        raise ValueError(f"{name}: expected a to have 3 dimensions, but got {tuple(a.shape)}")
    sequences = a.shape[0]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64 or cu_seqlens.device != a.device:
            raise ValueError(f"{name}: expected cu_seqlens to be one-dimensional, int64 and on the device of a")
        sequences = cu_seqlens.shape[0] - 1
        if a.shape[0] != 1 or sequences < (1 if a.shape[1] else 0):
            raise ValueError(
                f"{name}: expected a batch of 1 with the offsets of at least one sequence, but got a of shape "
                f"{tuple(a.shape)} and {sequences} sequences"
            )
    if reset is not None:
        if cu_seqlens is not None:
            raise ValueError(f"{name}: expected reset or cu_seqlens, but got both")
        if reset.shape != a.shape[:2] or reset.dtype != torch.bool or reset.device != a.device:
            raise ValueError(f"{name}: expected reset to be bool of shape {tuple(a.shape[:2])} on the device of a")
    if sequences > 65535:
        raise ValueError(f"{name}: expected at most 65535 sequences, but got {sequences}; the CUDA kernels take more")
    row = (sequences, a.shape[2])
    expected = [(k, t, tuple(a.shape)) for k, t in whole.items()] + [(k, t, row) for k, t in states.items()]
    for key, t, shape in expected:
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected {key} to have shape {shape}, but got {tuple(t.shape)}")
        if t.dtype != a.dtype or t.device != a.device:
            raise ValueError(f"{name}: expected {key} to have the dtype and the device of a")
    return sequences


def _maps(a: Tensor, sequences: int) -> tuple[tuple[int, int, int], int, Tensor]:
    """The tile, the number of chunks, and memory for their maps (2, N, C, D)."""
    width = a.shape[2]
    BT, BD, warps = _tile(sequences, width)
    steps = a.shape[0] * a.shape[1] // sequences
    chunks = _chunks(sequences * triton.cdiv(width, BD), steps, BT)
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (BT, BD, warps), chunks, a.new_empty(2, sequences, chunks if chunks > 1 else 0, width, dtype=wide)


def _states(first: Tensor | None, maps: Tensor, resets: bool) -> None:
    _, sequences, chunks, width = maps.shape
    wrap_triton(chunk_states_kernel)[(triton.cdiv(width, _BD), sequences)](
        maps if first is None else first, maps[0], maps[1], chunks, width, HAS_FIRST=first is not None,
        RESETS=resets, BD=_BD,
    )  # fmt: skip


def _bytes(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


@operator(torch.library.triton_op, "seqaccel::linear_scan_forward_triton", mutates_args={})
def linear_scan_forward(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    return_last: bool,
) -> tuple[Tensor, Tensor]:
    sequences = _check("linear_scan_forward_triton", a, cu_seqlens, reset, {"b": b}, {"h_0": h_0})
    a, b = a.contiguous(), b.contiguous()
    h_0 = None if h_0 is None else h_0.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    width = a.shape[2]
    h, h_last = torch.empty_like(a), a.new_empty(sequences if return_last else 0, width)
    if sequences * width == 0 or (a.numel() == 0 and not return_last):
        return h, h_last
    (BT, BD, warps), chunks, maps = _maps(a, sequences)
    for PASS in (WHOLE,) if chunks == 1 else (COMPOSE, APPLY):
        wrap_triton(linear_scan_forward_kernel)[(triton.cdiv(width, BD), sequences, chunks)](
            a,
            b,
            a if h_0 is None else h_0,
            a if cu_seqlens is None else cu_seqlens,
            _bytes(reset),
            h,
            h_last if return_last else h,
            maps[0],
            maps[1],
            sequences,
            a.shape[1],
            width,
            chunks,
            HAS_H_0=h_0 is not None,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
            RETURN_LAST=return_last,
            PASS=PASS,
            BT=BT,
            BD=BD,
            num_warps=warps,
        )
        if PASS == COMPOSE:
            _states(h_0, maps, reset is not None)
    return h, h_last


@operator(torch.library.triton_op, "seqaccel::linear_scan_backward_triton", mutates_args={})
def linear_scan_backward(
    grad_h: Tensor,
    grad_h_last: Tensor | None,
    a: Tensor,
    h: Tensor,
    h_0: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    name, states = "linear_scan_backward_triton", {"h_0": h_0, "grad_h_last": grad_h_last}
    sequences = _check(name, a, cu_seqlens, reset, {"grad_h": grad_h, "h": h}, states)
    grad_h, a, h = grad_h.contiguous(), a.contiguous(), h.contiguous()
    h_0 = None if h_0 is None else h_0.contiguous()
    grad_h_last = None if grad_h_last is None else grad_h_last.contiguous()
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    width = a.shape[2]
    grad_a, grad_b, grad_h_0 = torch.empty_like(a), torch.empty_like(a), a.new_empty(sequences, width)
    if sequences * width == 0:
        return grad_a, grad_b, grad_h_0
    (BT, BD, warps), chunks, maps = _maps(a, sequences)
    for PASS in (WHOLE,) if chunks == 1 else (COMPOSE, APPLY):
        wrap_triton(linear_scan_backward_kernel)[(triton.cdiv(width, BD), sequences, chunks)](
            grad_h,
            a if grad_h_last is None else grad_h_last,
            a,
            h,
            a if h_0 is None else h_0,
            a if cu_seqlens is None else cu_seqlens,
            _bytes(reset),
            grad_a,
            grad_b,
            grad_h_0,
            maps[0],
            maps[1],
            sequences,
            a.shape[1],
            width,
            chunks,
            HAS_H_0=h_0 is not None,
            HAS_GRAD_H_LAST=grad_h_last is not None,
            PACKED=cu_seqlens is not None,
            REVERSE=reverse,
            PASS=PASS,
            BT=BT,
            BD=BD,
            num_warps=warps,
        )
        if PASS == COMPOSE:
            _states(grad_h_last, maps, reset is not None)
    return grad_a, grad_b, grad_h_0


_SIZES = {"N": "i32", "T": "i32", "D": "i32", "C": "i32"}
_OFFSETS = {"p_offsets": "*i64"}
_VARIANTS = [(True, False, WHOLE), (False, True, COMPOSE), (False, True, APPLY), (True, True, WHOLE)]


def _typed(names: str, narrow: str) -> dict[str, str]:
    """Types of a kernel's pointers; maps are float32."""
    return {f"p_{name}": narrow for name in names.split()} | _OFFSETS | pointers("map_a map_b")


#: Every tile, every pass, forward and reverse, in float32 and bfloat16.
CONFIGURATIONS = [
    *(
        Configuration(
            kernel,
            _typed(names, "*bf16" if channels == 32 or PASS == APPLY else "*fp32")
            | ({} if packed else {"p_reset": "*u8"})
            | _SIZES,
            ({"p_reset": None} if packed else {})
            | {
                "HAS_H_0": True,
                "PACKED": packed,
                "REVERSE": reverse,
                flag: True,
                "PASS": PASS,
                "BT": steps,
                "BD": channels,
            },
            num_warps=warps,
        )
        for kernel, names, flag in (
            (linear_scan_forward_kernel, "a b h_0 h h_last", "RETURN_LAST"),
            (
                linear_scan_backward_kernel,
                "grad_h grad_h_last a h h_0 grad_a grad_b grad_h_0",
                "HAS_GRAD_H_LAST",
            ),
        )
        for (channels, (steps, warps)), variants in zip(
            _TILES.items(), ([0, 3], [0, 1, 2], [1, 2], [1, 2, 3]), strict=True
        )
        for packed, reverse, PASS in (_VARIANTS[i] for i in variants)
    ),
    Configuration(
        chunk_states_kernel,
        pointers("first map_a map_b") | {"C": "i32", "D": "i32"},
        {"HAS_FIRST": True, "RESETS": True, "BD": _BD},
    ),
]
