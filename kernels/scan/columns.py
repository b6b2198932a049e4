"""Column cells in Triton: one forward and one backward kernel over the cells of ``cells.py``.

The state feeds back through the gates, so the steps are sequential. A column is one channel of one sequence. A program
takes BC columns, one per thread, and loads step s + AHEAD while it computes step s. Both directions run at once: the
second half of the channels walks against time. The backward kernel walks each column the other way and computes the
gates again.

Arithmetic and the carried state are float32 (float64 for float64), whatever the tensors hold. Gradients are
deterministic: a thread sums its column over time, and torch sums over the batch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, wrap_triton
from seqaccel.kernels.scan.cells import CELLS, cell_backward, cell_forward
from seqaccel.kernels.scan.checks import check_columns

__all__ = ["CONFIGURATIONS", "column_backward", "column_forward"]

_BC, _WARPS = 64, 2  # 8192 columns (B = 32, H = 256) make 128 programs


@triton.jit
def _widen(b):
    return b if b.dtype == tl.float64 else b.to(tl.float32)


@triton.jit
def _columns(
    p_cu_seqlens, T, B, C, H, N, U: tl.constexpr, HIGHWAY: tl.constexpr, AGAINST: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """The program's columns, [BC] each, and their walk through time; AGAINST: the other way.

    Returns column (sequence * C + channel), channel, whether it exists and whether it runs against time, its row of
    the batch and number of steps, the first time of the walk and the way to the next; and o_u and stride: value k of a
    column is at o_u + k * stride in a row of u.
    """
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    m_c = column < tl.cast(N, tl.int64) * C
    channel, n = column % C, column // C
    backwards = channel >= H
    begin = tl.zeros_like(n)
    end, row = begin + T, n
    if p_cu_seqlens is not None:
        # Whatever the offsets are: within [0, T], ascending, and every step belongs to a sequence.
        begin = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + n, mask=m_c & (n > 0), other=0), 0), T)
        end = tl.load(p_cu_seqlens + n + 1, mask=m_c & (n < N - 1), other=T)
        end = tl.maximum(tl.minimum(end, T), begin)
        row = tl.zeros_like(n)
    from_end = ~backwards if AGAINST else backwards
    first, dt = tl.where(from_end, end - 1, begin), tl.where(from_end, -1, 1)
    if HIGHWAY:
        o_u, stride = channel * U, 1
    else:
        o_u, stride = channel + tl.where(backwards, (U - 1) * H, 0), H
    return column, channel, m_c, backwards, row, tl.where(m_c, end - begin, 0), first, dt, o_u, stride


@triton.jit
def _load_rows(p, channel, C, m_c, ROWS: tl.constexpr):
    """ROWS tiles of p [ROWS, C], none if p is None."""
    b = ()
    if p is not None:
        for k in tl.static_range(ROWS):
            b += (_widen(tl.load(p + k * C + channel, mask=m_c, other=0)),)
    return b


@triton.jit
def _load_step(
    p_u, p_x, p_mask, p_mask_pad, p_reset, t, row, channel, backwards, o_u, stride, inside, T, B, C,
    U: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """What the step at time t reads: tiles of u, x and mask as they are stored, whether it is padding, and
    whether an episode begins: the state before it is zero. What the call does not have may be anything."""
    o_row = t * B + row
    o = o_row * C + channel
    b_u = ()
    for k in tl.static_range(U):
        b_u += (tl.load(p_u + o_row * C * U + o_u + k * stride, mask=inside, other=0),)
    b_x, b_mask = b_u[0], b_u[0]
    if p_x is not None:
        b_x = tl.load(p_x + o, mask=inside, other=0)
    if MASK == "TBC" and p_mask is not None:
        b_mask = tl.load(p_mask + o, mask=inside, other=0)
    padding, start = ~inside, ~inside
    if p_mask_pad is not None:
        padding = tl.load(p_mask_pad + o_row, mask=inside, other=1) != 0
    if p_reset is not None:
        # An episode begins at t. Against time begins the one that ends there.
        later = tl.where(backwards, 1, 0)
        start = tl.load(p_reset + o_row + later * B, mask=inside & (t + later < T), other=0) != 0
    return b_u, b_x, b_mask, padding, start


@triton.jit
def _operands(
    b_step, b_c, b_bias, b_weight, b_drop, scale, p_x, p_mask,
    U: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """A cell's v, m and skip, of what ``_load_step`` loaded and the state c before the step."""
    v = ()
    for k in tl.static_range(K):
        b_v = _widen(b_step[0][k])
        if k >= FIRST:
            if len(b_bias) > 0:
                b_v += b_bias[k - FIRST]
            if len(b_weight) > 0:
                b_v += b_weight[k - FIRST] * b_c
        v += (b_v,)
    m = b_drop
    if MASK == "TBC":
        m = scale
        if p_mask is not None:
            m = _widen(b_step[2]) * scale
    skip = tl.zeros_like(b_c)
    if U > K:
        skip = _widen(b_step[0][K])
    elif p_x is not None:
        skip = _widen(b_step[1]) * scale
    return v, m, skip


@triton.jit
def _load_step_backward(
    p_grad_h, p_c, p_u, p_x, p_mask, p_mask_pad, p_reset, s, length, first, dt, row, channel, backwards, o_u, stride,
    T, B, C, U: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """That of ``_load_step``, the gradient of h, and the state after the step before; s counts from the last step."""
    t = first + dt * s
    b_step = _load_step(
        p_u, p_x, p_mask, p_mask_pad, p_reset, t, row, channel, backwards, o_u, stride, s < length, T, B, C, U, MASK
    )
    b_dh = tl.load(p_grad_h + (t * B + row) * C + channel, mask=s < length, other=0)
    b_earlier = tl.load(p_c + ((t + dt) * B + row) * C + channel, mask=s + 1 < length, other=0)
    return b_step, b_dh, b_earlier


# An integer that becomes 1, or divisible by 16, would be another compilation.
@triton.jit(do_not_specialize=["T", "B", "N"])
def column_forward_kernel(
    p_u,  # [T, B, directions, K, H], or where HIGHWAY [T, B, directions, H, 3 or 4]
    p_x,  # [T, B, C] or None
    p_weight,  # [WEIGHTS, C] or None
    p_bias,  # [BIASES, C] or None
    p_c_0,  # [N, C]
    p_mask,  # [N, C] or [T, B, C], as MASK says, or None
    p_scale,  # [1] or None
    p_mask_pad,  # [T, B] or None
    p_reset,  # [T, B] or None
    p_cu_seqlens,  # [N + 1] or None
    p_h,  # [T, B, C]
    p_c_n,  # [N, C]
    p_c,  # [T, B, C] or None
    T,
    B,
    C,
    H,
    N,  # B, or the number of packed sequences
    CELL: tl.constexpr,
    U: tl.constexpr,  # values of a column and step in u: K, or 4 where it holds the projected input
    K: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    HIGHWAY: tl.constexpr,
    MASK: tl.constexpr,
    BC: tl.constexpr,
    AHEAD: tl.constexpr,
):
    column, channel, m_c, backwards, row, length, first, dt, o_u, stride = _columns(
        p_cu_seqlens, T, B, C, H, N, U, HIGHWAY, False, BC
    )
    b_weight, b_bias = _load_rows(p_weight, channel, C, m_c, WEIGHTS), _load_rows(p_bias, channel, C, m_c, BIASES)
    b_c_0 = _widen(tl.load(p_c_0 + column, mask=m_c, other=0))
    b_drop, scale = 1.0, 1.0
    if p_scale is not None:
        scale = _widen(tl.load(p_scale))
    if MASK == "BC" and p_mask is not None:
        b_drop = _widen(tl.load(p_mask + column, mask=m_c, other=0))
    b_c = b_c_0
    b_steps = ()
    for i in tl.static_range(AHEAD):
        b_steps += (_load_step(
            p_u, p_x, p_mask, p_mask_pad, p_reset, first + dt * i, row, channel, backwards, o_u, stride, i < length, T,
            B, C, U, MASK,
        ),)  # fmt: skip
    for s_0 in range(0, T if p_cu_seqlens is None else tl.max(length), AHEAD):
        b_ahead = ()
        for i in tl.static_range(AHEAD):
            s = s_0 + i
            inside = s < length
            b_ahead += (_load_step(
                p_u, p_x, p_mask, p_mask_pad, p_reset, first + dt * (s + AHEAD), row, channel, backwards, o_u, stride,
                s + AHEAD < length, T, B, C, U, MASK,
            ),)  # fmt: skip
            if p_reset is not None:
                b_c = tl.where(b_steps[i][4], 0.0, b_c)
            v, m, skip = _operands(b_steps[i], b_c, b_bias, b_weight, b_drop, scale, p_x, p_mask, U, K, FIRST, MASK)
            b_state, b_h = cell_forward(v, b_c, m, skip, CELL)
            b_c = tl.where(inside, b_state, b_c) if p_mask_pad is None else tl.where(b_steps[i][3], b_c, b_state)
            if p_mask_pad is not None:
                b_h = tl.where(b_steps[i][3], 0.0, b_h)
            o = ((first + dt * s) * B + row) * C + channel
            tl.store(p_h + o, b_h, mask=inside)
            if p_c is not None:
                tl.store(p_c + o, b_c, mask=inside)
        b_steps = b_ahead
    tl.store(p_c_n + column, b_c, mask=m_c)


@triton.jit(do_not_specialize=["T", "B", "N"])
def column_backward_kernel(
    p_grad_h,  # [T, B, C]
    p_grad_c_n,  # [N, C] or None
    p_u,  # these as above
    p_x,
    p_weight,
    p_bias,
    p_c_0,
    p_mask,
    p_scale,
    p_mask_pad,
    p_reset,
    p_cu_seqlens,
    p_c,  # [T, B, C]
    p_grad_u,  # as u
    p_grad_x,  # [T, B, C] or None
    p_grad_weight,  # [WEIGHTS, N, C] or None: before the sum over N, as the next
    p_grad_bias,  # [BIASES, N, C] or None
    p_grad_c_0,  # [N, C]
    T,
    B,
    C,
    H,
    N,
    CELL: tl.constexpr,
    U: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    HIGHWAY: tl.constexpr,
    MASK: tl.constexpr,
    BC: tl.constexpr,
    AHEAD: tl.constexpr,
):
    column, channel, m_c, backwards, row, length, first, dt, o_u, stride = _columns(
        p_cu_seqlens, T, B, C, H, N, U, HIGHWAY, True, BC
    )
    b_weight, b_bias = _load_rows(p_weight, channel, C, m_c, WEIGHTS), _load_rows(p_bias, channel, C, m_c, BIASES)
    b_c_0 = _widen(tl.load(p_c_0 + column, mask=m_c, other=0))
    b_drop, scale = 1.0, 1.0
    if p_scale is not None:
        scale = _widen(tl.load(p_scale))
    if MASK == "BC" and p_mask is not None:
        b_drop = _widen(tl.load(p_mask + column, mask=m_c, other=0))
    b_dc = tl.zeros_like(b_c_0)  # of the state after a step
    if p_grad_c_n is not None:
        b_dc += _widen(tl.load(p_grad_c_n + column, mask=m_c, other=0))
    b_dweight, b_dbias = (), ()
    for _ in tl.static_range(len(b_weight)):
        b_dweight += (tl.zeros_like(b_c_0),)
    for _ in tl.static_range(len(b_bias)):
        b_dbias += (tl.zeros_like(b_c_0),)
    b_state = tl.load(p_c + (first * B + row) * C + channel, mask=length > 0, other=0)  # after a step
    b_steps = ()
    for i in tl.static_range(AHEAD):
        b_steps += (_load_step_backward(
            p_grad_h, p_c, p_u, p_x, p_mask, p_mask_pad, p_reset, i, length, first, dt, row, channel, backwards, o_u,
            stride, T, B, C, U, MASK,
        ),)  # fmt: skip
    for s_0 in range(0, T if p_cu_seqlens is None else tl.max(length), AHEAD):
        b_ahead = ()
        for i in tl.static_range(AHEAD):
            s = s_0 + i
            inside = s < length
            b_ahead += (_load_step_backward(
                p_grad_h, p_c, p_u, p_x, p_mask, p_mask_pad, p_reset, s + AHEAD, length, first, dt, row, channel,
                backwards, o_u, stride, T, B, C, U, MASK,
            ),)  # fmt: skip
            b_step, b_dh, b_earlier = b_steps[i]
            b_c = tl.where(s + 1 < length, _widen(b_earlier), b_c_0)  # before the step
            if p_reset is not None:
                b_c = tl.where(b_step[4], 0.0, b_c)
            v, m, skip = _operands(b_step, b_c, b_bias, b_weight, b_drop, scale, p_x, p_mask, U, K, FIRST, MASK)
            dv, b_through, b_dskip = cell_backward(v, b_c, _widen(b_state), m, skip, _widen(b_dh), b_dc, CELL)
            o_row = (first + dt * s) * B + row
            held = ~inside if p_mask_pad is None else b_step[3]
            b_du, b_sums, b_products = (), (), ()
            for k in tl.static_range(K):
                b_dv = tl.where(held, 0.0, dv[k])
                b_du += (b_dv,)
                if k >= FIRST:
                    if len(b_bias) > 0:
                        b_sums += (b_dbias[k - FIRST] + b_dv,)
                    if len(b_weight) > 0:
                        b_products += (b_dweight[k - FIRST] + b_dv * b_c,)
                        b_through += b_dv * b_weight[k - FIRST]
            b_dbias, b_dweight = b_sums, b_products
            b_dskip = tl.where(held, 0.0, b_dskip)
            if U > K:
                b_du += (b_dskip,)
            elif p_grad_x is not None:
                tl.store(p_grad_x + o_row * C + channel, b_dskip * scale, mask=inside)
            for k in tl.static_range(U):
                tl.store(p_grad_u + o_row * C * U + o_u + k * stride, b_du[k], mask=inside)
            b_dc = tl.where(held, b_dc, b_through)
            if p_reset is not None:
                b_dc = tl.where(b_step[4], 0.0, b_dc)
            b_state = b_earlier
        b_steps = b_ahead
    for k in tl.static_range(len(b_dweight)):
        tl.store(p_grad_weight + k * tl.cast(N, tl.int64) * C + column, b_dweight[k], mask=m_c)
    for k in tl.static_range(len(b_dbias)):
        tl.store(p_grad_bias + k * tl.cast(N, tl.int64) * C + column, b_dbias[k], mask=m_c)
    tl.store(p_grad_c_0 + column, b_dc, mask=m_c)


def _constants(cell: str, values: int, double: bool) -> dict[str, Any]:
    """Constexprs of the kernels, for u of so many values a column and step.

    Of float64 fewer steps are loaded ahead: their values take twice the registers.
    """
    spec = CELLS[cell]
    return {
        "CELL": cell, "U": values, "K": spec.inputs, "FIRST": spec.first, "WEIGHTS": spec.weights,
        "BIASES": spec.biases, "HIGHWAY": spec.highway, "MASK": spec.mask, "BC": _BC,
        "AHEAD": 2 if double else 4,
    }  # fmt: skip


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    found = [None if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t is not None and t.dtype == torch.bool else t for t in found]


@operator(torch.library.triton_op, "seqaccel::column_forward_triton", mutates_args={})
def column_forward(
    cell: str,
    u: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    c_0: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    mask_pad: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    directions: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = {"x": x, "weight": weight, "bias": bias, "c_0": c_0, "mask": mask, "scale": scale, "mask_pad": mask_pad,
             "reset": reset, "cu_seqlens": cu_seqlens}  # fmt: skip
    values = check_columns("column_forward_triton", cell, u, directions, given)
    steps, batch, sequences, channels = *u.shape[:2], *c_0.shape
    h, c_n = u.new_empty(steps, batch, channels), u.new_empty(sequences, channels)
    save = save and (CELLS[cell].separate or mask_pad is not None)
    c = torch.empty_like(h) if save else u.new_empty(0)
    if h.numel() == 0:
        return h, c_0.clone(), c
    u, *operands = _contiguous(u, *given.values())
    wrap_triton(column_forward_kernel)[(triton.cdiv(sequences * channels, _BC),)](
        u, *operands, h, c_n, c if save else None, steps, batch, channels, channels // directions, sequences,
        **_constants(cell, values, u.dtype == torch.float64), num_warps=_WARPS,
    )  # fmt: skip
    return h, c_n, c


@operator(torch.library.triton_op, "seqaccel::column_backward_triton", mutates_args={})
def column_backward(
    cell: str,
    grad_h: Tensor,
    grad_c_n: Tensor | None,
    u: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    c_0: Tensor,
    mask: Tensor | None,
    scale: Tensor | None,
    mask_pad: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    c: Tensor,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = {"x": x, "weight": weight, "bias": bias, "c_0": c_0, "mask": mask, "scale": scale, "mask_pad": mask_pad,
             "reset": reset, "cu_seqlens": cu_seqlens, "c": c, "grad_h": grad_h, "grad_c_n": grad_c_n}  # fmt: skip
    values = check_columns("column_backward_triton", cell, u, directions, given)
    steps, batch, sequences, channels = *u.shape[:2], *c_0.shape
    grad_u, grad_c_0 = u.new_empty(u.shape), u.new_empty(c_0.shape)
    grad_x, grad_weight, grad_bias = (u.new_empty(0 if t is None else t.shape) for t in (x, weight, bias))
    if u.numel() == 0:
        grad_c_0 = torch.zeros_like(c_0) if grad_c_n is None else grad_c_n.clone()
        return grad_u, grad_x, grad_weight.zero_(), grad_bias.zero_(), grad_c_0
    double = u.dtype == torch.float64
    wide = torch.float64 if double else torch.float32
    sums = [
        None if t is None else t.new_empty(t.shape[0] // channels, sequences, channels, dtype=wide)
        for t in (weight, bias)
    ]
    u, *operands, c, grad_h, grad_c_n = _contiguous(u, *given.values())
    wrap_triton(column_backward_kernel)[(triton.cdiv(sequences * channels, _BC),)](
        grad_h, grad_c_n, u, *operands, c, grad_u, None if x is None else grad_x, *sums, grad_c_0, steps, batch,
        channels, channels // directions, sequences, **_constants(cell, values, double), num_warps=_WARPS,
    )  # fmt: skip
    grad_weight, grad_bias = (
        empty if s is None else s.sum(1).view(-1).to(u.dtype)
        for s, empty in zip(sums, (grad_weight, grad_bias), strict=True)
    )
    return grad_u, grad_x, grad_weight, grad_bias, grad_c_0


# ---- what is shipped ----


def _configuration(kernel: Any, cell: str, values: int, kind: str) -> Configuration:
    """With everything optional that goes together; the kernels of 16-bit tensors with packed sequences."""
    spec, packed = CELLS[cell], kind == "bf16"
    has = {
        **dict.fromkeys(("p_weight", "p_grad_weight"), spec.weights > 0),
        **dict.fromkeys(("p_bias", "p_grad_bias"), spec.biases > 0),
        **dict.fromkeys(("p_x", "p_grad_x"), spec.highway and values == spec.inputs),
        **dict.fromkeys(("p_mask", "p_scale"), spec.mask != ""),
        **dict.fromkeys(("p_mask_pad", "p_reset"), not packed),
        "p_cu_seqlens": packed,
    }
    absent = {name: None for name in kernel.arg_names if not has.get(name, True)}
    constants = _constants(cell, values, kind == "fp64") | absent
    types = {
        **dict.fromkeys("TBCHN", "i32"),
        **dict.fromkeys(("p_mask_pad", "p_reset"), "*u8"),
        **dict.fromkeys(("p_grad_weight", "p_grad_bias"), "*fp64" if kind == "fp64" else "*fp32"),
        "p_cu_seqlens": "*i64",
    }
    signature = {name: types.get(name, f"*{kind}") for name in kernel.arg_names if name not in constants}
    return Configuration(kernel, signature, constants, num_warps=_WARPS)


#: Every cell in float32, and in bfloat16; the cells that take the most registers in the other types. SRU reads x, and
#: the projected input where it has tanh.
CONFIGURATIONS = [
    _configuration(kernel, cell, 4 if cell == "sru_tanh" else spec.inputs, kind)
    for kernel in (column_forward_kernel, column_backward_kernel)
    for kind in ("fp32", "bf16", "fp16", "fp64")
    for cell, spec in CELLS.items()
    if kind in ("fp32", "bf16") or cell in ("sru_tanh", "fo_pool", "minlstm_g")
]
