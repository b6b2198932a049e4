"""SRU in Triton.

SRU feeds its state back through the gates, so its steps are sequential. A program takes BC columns (batch x channels),
one per thread, and loads step s + 1 while it computes step s.

It runs one pass over memory. Gradients are deterministic: there are no atomics, and torch sums over the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration, operator, wrap_triton
from seqaccel.kernels._math import sigmoid, tanh
from seqaccel.kernels.scan.checks import check, pointers

__all__ = ["CONFIGURATIONS", "sru_backward", "sru_forward"]

NO_SKIP, INPUT, PROJECTED = 0, 1, 2  # what stands for the input in the highway connection: HIGHWAY
_BC, _WARPS = 64, 2  # one column a thread; 8192 columns (B = 32, H = 256) make 128 programs


@triton.jit
def _load_step(p_u, p_x, scale_x, offset, mask, HIGHWAY: tl.constexpr, K: tl.constexpr):
    u_0 = tl.load(p_u + offset * K, mask=mask, other=0)
    u_1 = tl.load(p_u + offset * K + 1, mask=mask, other=0)
    u_2 = tl.load(p_u + offset * K + 2, mask=mask, other=0)
    if HIGHWAY == 2:
        skip = tl.load(p_u + offset * K + 3, mask=mask, other=0)
    elif HIGHWAY == 1:
        skip = tl.load(p_x + offset, mask=mask, other=0) * scale_x
    else:
        skip = tl.zeros_like(u_0)
    return u_0, u_1, u_2, skip


# An integer that becomes 1, or divisible by 16, would be another compilation.
@triton.jit(do_not_specialize=["T", "B"])
def sru_forward_kernel(
    p_u,  # [T, B, C, K]
    p_x,  # [T, B, C]
    p_weight_c,  # [2, C]
    p_bias,  # [2, C]
    p_c_0,  # [B, C]
    p_mask_c,  # [B, C]
    p_mask_pad,  # [T, B]
    p_scale_x,  # [1]
    p_h,  # [T, B, C]
    p_c_n,  # [B, C]
    p_c,  # [T, B, C]
    T,
    B,
    C,
    H,
    HIGHWAY: tl.constexpr,
    TANH: tl.constexpr,
    HAS_MASK_C: tl.constexpr,
    HAS_MASK_PAD: tl.constexpr,
    HAS_SCALE_X: tl.constexpr,
    SAVE_C: tl.constexpr,
    BC: tl.constexpr,
):
    K: tl.constexpr = 4 if HIGHWAY == 2 else 3
    columns = tl.cast(B, tl.int64) * C
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)  # [BC], as all below
    m_c = column < columns
    o_zero = tl.zeros([BC], dtype=tl.int32)
    channel = column % C
    backwards = channel >= H
    w_f = tl.load(p_weight_c + channel, mask=m_c, other=0)
    w_r = tl.load(p_weight_c + C + channel, mask=m_c, other=0)
    b_f = tl.load(p_bias + channel, mask=m_c, other=0)
    b_r = tl.load(p_bias + C + channel, mask=m_c, other=0)
    c = tl.load(p_c_0 + column, mask=m_c, other=0)
    scale_x = tl.load(p_scale_x) if HAS_SCALE_X else 1.0
    if HAS_MASK_C:
        drop = tl.load(p_mask_c + column, mask=m_c, other=0)
    offset = tl.where(backwards, T - 1, 0) * columns + column
    stride = tl.where(backwards, -columns, columns)
    u_0, u_1, u_2, skip = _load_step(p_u, p_x, scale_x, offset, m_c, HIGHWAY, K)
    for s in range(T):
        ahead = offset + stride
        m_ahead = m_c & (s + 1 + o_zero < T)
        v_0, v_1, v_2, next_skip = _load_step(p_u, p_x, scale_x, ahead, m_ahead, HIGHWAY, K)
        forget = sigmoid(u_1 + w_f * c + b_f)
        reset = sigmoid(u_2 + w_r * c + b_r)
        state = u_0 + forget * (c - u_0)
        if HAS_MASK_C:
            reset = reset * drop
        if HAS_MASK_PAD:
            t = tl.where(backwards, T - 1 - s, s).to(tl.int64)
            padding = tl.load(p_mask_pad + t * B + column // C, mask=m_c, other=1) != 0
            state = tl.where(padding, c, state)
        activated = tanh(state) if TANH else state
        h = skip + reset * (activated - skip)
        if HAS_MASK_PAD:
            h = tl.where(padding, 0.0, h)
        c = state
        tl.store(p_h + offset, h, mask=m_c)
        if SAVE_C:
            tl.store(p_c + offset, c, mask=m_c)
        u_0, u_1, u_2, skip = v_0, v_1, v_2, next_skip
        offset = ahead
    tl.store(p_c_n + column, c, mask=m_c)


@triton.jit(do_not_specialize=["T", "B"])
def sru_backward_kernel(
    p_grad_h,  # [T, B, C]
    p_grad_c_n,  # [B, C]
    p_u,  # [T, B, C, K]
    p_x,  # [T, B, C]
    p_weight_c,  # [2, C]
    p_bias,  # [2, C]
    p_c_0,  # [B, C]
    p_mask_c,  # [B, C]
    p_mask_pad,  # [T, B]
    p_scale_x,  # [1]
    p_c,  # [T, B, C]
    p_grad_u,  # [T, B, C, K]
    p_grad_x,  # [T, B, C]
    p_sums,  # [4, B, C]
    p_grad_c_0,  # [B, C]
    T,
    B,
    C,
    H,
    HIGHWAY: tl.constexpr,
    TANH: tl.constexpr,
    HAS_MASK_C: tl.constexpr,
    HAS_MASK_PAD: tl.constexpr,
    HAS_SCALE_X: tl.constexpr,
    HAS_GRAD_C_N: tl.constexpr,
    BC: tl.constexpr,
):
    K: tl.constexpr = 4 if HIGHWAY == 2 else 3
    columns = tl.cast(B, tl.int64) * C
    column = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)  # [BC], as all below
    m_c = column < columns
    o_zero = tl.zeros([BC], dtype=tl.int32)
    channel = column % C
    backwards = channel >= H
    w_f = tl.load(p_weight_c + channel, mask=m_c, other=0)
    w_r = tl.load(p_weight_c + C + channel, mask=m_c, other=0)
    b_f = tl.load(p_bias + channel, mask=m_c, other=0)
    b_r = tl.load(p_bias + C + channel, mask=m_c, other=0)
    c_0 = tl.load(p_c_0 + column, mask=m_c, other=0)
    scale_x = tl.load(p_scale_x) if HAS_SCALE_X else 1.0
    if HAS_MASK_C:
        drop = tl.load(p_mask_c + column, mask=m_c, other=0)
    grad_c = tl.zeros_like(c_0)
    if HAS_GRAD_C_N:
        grad_c += tl.load(p_grad_c_n + column, mask=m_c, other=0)
    sum_w_f, sum_w_r = tl.zeros_like(c_0), tl.zeros_like(c_0)
    sum_b_f, sum_b_r = tl.zeros_like(c_0), tl.zeros_like(c_0)
    offset = tl.where(backwards, 0, T - 1) * columns + column  # the last step of the column's direction
    stride = tl.where(backwards, columns, -columns)
    state = tl.load(p_c + offset, mask=m_c, other=0)
    u_0, u_1, u_2, skip = _load_step(p_u, p_x, scale_x, offset, m_c, HIGHWAY, K)
    grad_h = tl.load(p_grad_h + offset, mask=m_c, other=0)
    for s in range(T):
        ahead = offset + stride
        m_ahead = m_c & (s + 1 + o_zero < T)
        c = tl.where(m_ahead, tl.load(p_c + ahead, mask=m_ahead, other=0), c_0)
        v_0, v_1, v_2, next_skip = _load_step(p_u, p_x, scale_x, ahead, m_ahead, HIGHWAY, K)
        next_grad_h = tl.load(p_grad_h + ahead, mask=m_ahead, other=0)
        forget = sigmoid(u_1 + w_f * c + b_f)
        reset = sigmoid(u_2 + w_r * c + b_r)
        through = grad_h * reset
        if HAS_MASK_C:
            through *= drop
        if TANH:
            activated = tanh(state)
            grad_state = grad_c + through * (1.0 - activated * activated)
        else:
            activated = state
            grad_state = grad_c + through
        grad_reset = through * (activated - skip) * (1.0 - reset)
        grad_forget = grad_state * (c - u_0) * (forget * (1.0 - forget))
        grad_value = grad_state * (1.0 - forget)
        grad_skip = grad_h - through
        carried = grad_state * forget + grad_forget * w_f + grad_reset * w_r
        if HAS_MASK_PAD:
            t = tl.where(backwards, s, T - 1 - s).to(tl.int64)
            padding = tl.load(p_mask_pad + t * B + column // C, mask=m_c, other=1) != 0
            grad_reset = tl.where(padding, 0.0, grad_reset)
            grad_forget = tl.where(padding, 0.0, grad_forget)
            grad_value = tl.where(padding, 0.0, grad_value)
            grad_skip = tl.where(padding, 0.0, grad_skip)
            carried = tl.where(padding, grad_c, carried)
        tl.store(p_grad_u + offset * K, grad_value, mask=m_c)
        tl.store(p_grad_u + offset * K + 1, grad_forget, mask=m_c)
        tl.store(p_grad_u + offset * K + 2, grad_reset, mask=m_c)
        if HIGHWAY == 2:
            tl.store(p_grad_u + offset * K + 3, grad_skip, mask=m_c)
        elif HIGHWAY == 1:
            tl.store(p_grad_x + offset, grad_skip * scale_x, mask=m_c)
        sum_w_f += grad_forget * c
        sum_w_r += grad_reset * c
        sum_b_f += grad_forget
        sum_b_r += grad_reset
        grad_c = carried
        state = c
        u_0, u_1, u_2, skip = v_0, v_1, v_2, next_skip
        grad_h = next_grad_h
        offset = ahead
    tl.store(p_sums + column, sum_w_f, mask=m_c)
    tl.store(p_sums + columns + column, sum_w_r, mask=m_c)
    tl.store(p_sums + 2 * columns + column, sum_b_f, mask=m_c)
    tl.store(p_sums + 3 * columns + column, sum_b_r, mask=m_c)
    tl.store(p_grad_c_0 + column, grad_c, mask=m_c)


def _highway(operator, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, others=()) -> int:
    """Checks an SRU's arguments; returns what stands for the input in its highway connection."""
    steps, batch, features = u.shape
    channels = c_0.shape[-1]
    if features not in (3 * channels, 4 * channels) or (features == 4 * channels and x is not None):
        raise ValueError(f"{operator}: u {tuple(u.shape)} does not fit c_0 {tuple(c_0.shape)} and x")
    if directions not in (1, 2) or channels % directions:
        raise ValueError(f"{operator}: directions must be 1 or 2 and divide {channels} channels, but got {directions}")
    shapes = {
        "x": (x, (steps, batch, channels)),
        "weight_c": (weight_c, (2 * channels,)),
        "bias": (bias, (2 * channels,)),
        "c_0": (c_0, (batch, channels)),
        "mask_c": (mask_c, (batch, channels)),
        "mask_pad": (mask_pad, (steps, batch)),
        "scale_x": (scale_x, (1,)),
    }
    check(operator, u, shapes | {f"operand {i}": (t, (steps, batch, channels)) for i, t in enumerate(others)})
    return PROJECTED if features == 4 * channels else NO_SKIP if x is None else INPUT


def _pointer(t: Tensor | None, instead: Tensor) -> Tensor:
    if t is None:
        return instead
    return t.contiguous().view(torch.uint8) if t.dtype == torch.bool else t.contiguous()


@operator(torch.library.triton_op, "seqaccel::sru_forward_triton", mutates_args={})
def sru_forward(
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor,
    mask_c: Tensor | None,
    mask_pad: Tensor | None,
    scale_x: Tensor | None,
    directions: int,
    use_tanh: bool,
    save_c: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    highway = _highway("sru_forward_triton", u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions)
    (steps, batch, _), channels = u.shape, c_0.shape[1]
    u, c_0 = u.contiguous(), c_0.contiguous()
    h = u.new_empty(steps, batch, channels)
    c = torch.empty_like(h) if save_c else u.new_empty(0)
    if h.numel() == 0:
        return h, c_0.clone(), c
    c_n = torch.empty_like(c_0)
    wrap_triton(sru_forward_kernel)[(triton.cdiv(batch * channels, _BC),)](
        u,
        _pointer(x, u),
        weight_c.contiguous(),
        bias.contiguous(),
        c_0,
        _pointer(mask_c, u),
        _pointer(mask_pad, u),
        _pointer(scale_x, u),
        h,
        c_n,
        c if save_c else h,
        steps,
        batch,
        channels,
        channels // directions,
        HIGHWAY=highway,
        TANH=use_tanh,
        HAS_MASK_C=mask_c is not None,
        HAS_MASK_PAD=mask_pad is not None,
        HAS_SCALE_X=scale_x is not None,
        SAVE_C=save_c,
        BC=_BC,
        num_warps=_WARPS,
    )
    return h, c_n, c


@operator(torch.library.triton_op, "seqaccel::sru_backward_triton", mutates_args={})
def sru_backward(
    grad_h: Tensor,
    grad_c_n: Tensor | None,
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor,
    mask_c: Tensor | None,
    mask_pad: Tensor | None,
    scale_x: Tensor | None,
    c: Tensor,
    directions: int,
    use_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    highway = _highway(
        "sru_backward_triton", u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, (grad_h, c)
    )
    (steps, batch, _), channels = u.shape, c_0.shape[1]
    u = u.contiguous()
    grad_u = torch.empty_like(u)
    grad_x = u.new_empty((0,) if x is None else x.shape)
    if u.numel() == 0:
        grad_c_0 = torch.zeros_like(c_0) if grad_c_n is None else grad_c_n.clone()
        return grad_u, grad_x, torch.zeros_like(weight_c), torch.zeros_like(bias), grad_c_0
    grad_c_0 = u.new_empty(batch, channels)
    sums = u.new_empty(4, batch, channels)
    wrap_triton(sru_backward_kernel)[(triton.cdiv(batch * channels, _BC),)](
        grad_h.contiguous(),
        _pointer(grad_c_n, u),
        u,
        _pointer(x, u),
        weight_c.contiguous(),
        bias.contiguous(),
        c_0.contiguous(),
        _pointer(mask_c, u),
        _pointer(mask_pad, u),
        _pointer(scale_x, u),
        c.contiguous(),
        grad_u,
        grad_u if x is None else grad_x,
        sums,
        grad_c_0,
        steps,
        batch,
        channels,
        channels // directions,
        HIGHWAY=highway,
        TANH=use_tanh,
        HAS_MASK_C=mask_c is not None,
        HAS_MASK_PAD=mask_pad is not None,
        HAS_SCALE_X=scale_x is not None,
        HAS_GRAD_C_N=grad_c_n is not None,
        BC=_BC,
        num_warps=_WARPS,
    )
    return grad_u, grad_x, sums[:2].sum(1).view(-1), sums[2:].sum(1).view(-1), grad_c_0


_SIZES = {"T": "i32", "B": "i32", "C": "i32", "H": "i32"}
_OPERANDS = "u x weight_c bias c_0 mask_c mask_pad scale_x"
_ALL_MASKS = {"TANH": True, "HAS_MASK_C": True, "HAS_MASK_PAD": True, "HAS_SCALE_X": True, "BC": _BC}

#: Every highway, with everything optional switched on.
CONFIGURATIONS = [
    *(
        Configuration(
            sru_forward_kernel,
            pointers(_OPERANDS + " h c_n c") | _SIZES,
            {"HIGHWAY": highway, "SAVE_C": True, **_ALL_MASKS},
            num_warps=_WARPS,
        )
        for highway in (NO_SKIP, INPUT, PROJECTED)
    ),
    *(
        Configuration(
            sru_backward_kernel,
            pointers("grad_h grad_c_n " + _OPERANDS + " c grad_u grad_x sums grad_c_0") | _SIZES,
            {"HIGHWAY": highway, "HAS_GRAD_C_N": True, **_ALL_MASKS},
            num_warps=_WARPS,
        )
        for highway in (NO_SKIP, INPUT, PROJECTED)
    ),
]
