"""One step of any cell: what follows the matrix products, and what surrounds a cell (zoneout, lengths, projection).

``step_forward`` and ``step_backward`` hold the step itself; ``store_forward`` and ``load_backward`` store and load what
the backward step needs of the forward step. The kernels here run one step; a program has a block of one row's hidden
units (all of them where a row is normalised). The kernels of ``persistent.py`` run all steps.

Offsets: ``row`` is t * B + b, ``unit`` the hidden unit, so row * H + unit points into [T, B, H].
"""

import triton
import triton.language as tl

from seqaccel.kernels.rnn.cells import normalize, normalize_backward


@triton.jit
def load_tiles(p, o, H, mask, COUNT: tl.constexpr, FIRST: tl.constexpr = 0):
    """Tiles FIRST ... COUNT-1 of those at p + o + k H, float32."""
    b = ()
    for k in tl.static_range(FIRST, COUNT):
        b += (tl.load(p + o + k * H, mask=mask, other=0.0).to(tl.float32),)
    return b


@triton.jit
def store_tiles(p, o, H, b, mask):
    for k in tl.static_range(len(b)):
        tl.store(p + o + k * H, b[k].to(p.dtype.element_ty), mask=mask)


@triton.jit
def keep(b, running):
    """b where the row's sequence is running, else 0. ``running`` is None without lengths."""
    return b if running is None else tl.where(running, b, 0.0)


@triton.jit
def begins_at(p_begins, t, B, b):
    """Whether an episode of row b begins with step t, which is none where it is negative; None without resets."""
    found = None
    if p_begins is not None:
        s = b * 0 + t
        found = tl.load(p_begins + s * B + b, mask=(b < B) & (s >= 0), other=0) != 0
    return found


@triton.jit
def restarted(b, begins):
    """Zero where an episode begins."""
    return b if begins is None else tl.where(begins, 0.0, b)


@triton.jit
def keep_tiles(b, running):
    kept = ()
    for k in tl.static_range(len(b)):
        kept += (keep(b[k], running),)
    return kept


@triton.jit
def apply_zoneout_and_lengths(b_new, b_old, p_zoneout, stride, o, running, mask):
    """The state after the step: Z old + (1 - Z) new under zoneout; the old one where the row's sequence is over."""
    b = b_new
    if p_zoneout is not None:
        b_z = tl.load(p_zoneout + o * stride, mask=mask, other=0.0).to(tl.float32)
        b = b_z * b_old + (1.0 - b_z) * b_new
    return b if running is None else tl.where(running, b, b_old)


@triton.jit
def zoneout_backward(b_d, p_zoneout, stride, o, mask):
    """Gradients of new and old from that of the zoned-out state."""
    b_old = tl.zeros_like(b_d)
    if p_zoneout is not None:
        b_z = tl.load(p_zoneout + o * stride, mask=mask, other=0.0).to(tl.float32)
        b_old = b_z * b_d
        b_d = b_d - b_old
    return b_d, b_old


@triton.jit
def step_forward(
    b_x,
    b_r,
    b_h,
    b_c,
    b_v,
    o,
    running,
    mask,
    p_zoneout_h,
    p_zoneout_c,
    zoneout_h_stride,
    zoneout_c_stride,
    H,
    FORWARD: tl.constexpr,
    HAS_C: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    """What to save of the step (s, fresh), h and c after it. Where PROJECTED, h is o tanh(c), before zoneout."""
    b_s, b_fresh, b_c_new, b_h_new = FORWARD(b_x, b_r, b_h, b_c, b_v, mask, H)
    if HAS_C:
        b_c = apply_zoneout_and_lengths(b_c_new, b_c, p_zoneout_c, zoneout_c_stride, o, running, mask)
    if not PROJECTED:
        b_h_new = apply_zoneout_and_lengths(b_h_new, b_h, p_zoneout_h, zoneout_h_stride, o, running, mask)
    return b_s, b_fresh, b_h_new, b_c


@triton.jit
def store_forward(
    b_s,
    b_fresh,
    b_h,
    b_c,
    row,
    unit,
    running,
    mask,
    p_output,
    p_gates,
    p_cells,
    p_carried,
    H,
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    """Stores the results of ``step_forward``."""
    o = row * H + unit
    if HAS_C:
        if p_carried is not None:
            tl.store(p_cells + o, b_fresh, mask=mask)
            tl.store(p_carried + o, b_c, mask=mask)
        elif p_cells is not None:
            tl.store(p_cells + o, b_c, mask=mask)
    if p_gates is not None:
        store_tiles(p_gates, row * SAVED * H + unit, H, b_s, mask)
    if not PROJECTED:
        tl.store(p_output + o, keep(b_h, running).to(p_output.dtype.element_ty), mask=mask)


@triton.jit
def load_backward(
    row,
    earlier_row,
    inner,
    inner_h,
    b,
    unit,
    mask,
    p_gates,
    p_cells,
    p_carried,
    p_c_0,
    p_output,
    p_h_0,
    H,
    SAVED: tl.constexpr,
    HAS_C: tl.constexpr,
    USES_OUTPUT: tl.constexpr,
    USES_H: tl.constexpr,
    begins=None,
    CONSTANT_C: tl.constexpr = False,
):
    """What ``step_backward`` needs of the forward pass: s, h_new, h, fresh, c; zeros for what the cell has no use for.

    inner: whether the step that came before this one exists, inner_h: and its row was running, so that its state is in
    the saved tensors rather than in p_c_0 and p_h_0. begins: whether an episode begins with this step.
    """
    o = row * H + unit
    o_earlier, o_state = earlier_row * H + unit, b * H + unit
    b_s = load_tiles(p_gates, row * SAVED * H + unit, H, mask, SAVED)
    b_none = tl.where(mask, 0.0, 0.0)
    b_h_new, b_h, b_fresh, b_c = b_none, b_none, b_none, b_none
    if USES_OUTPUT:
        b_h_new = tl.load(p_output + o, mask=mask, other=0.0).to(tl.float32)
    if USES_H:
        b_h_earlier = tl.load(p_output + o_earlier, mask=mask & inner_h, other=0.0).to(tl.float32)
        b_h = tl.where(inner_h, b_h_earlier, tl.load(p_h_0 + o_state, mask=mask, other=0.0).to(tl.float32))
    if HAS_C:
        b_fresh = tl.load(p_cells + o, mask=mask, other=0.0)
        p_c = p_cells if p_carried is None else p_carried
        b_c_earlier = tl.load(p_c + o_earlier, mask=mask & inner, other=0.0)
        b_c = tl.where(inner, b_c_earlier, tl.load(p_c_0 + o_state, mask=mask, other=0.0).to(tl.float32))
    b_h = restarted(b_h, begins)
    if not CONSTANT_C:
        b_c = restarted(b_c, begins)
    return b_s, b_h_new, b_h, b_fresh, b_c


@triton.jit
def step_backward(
    b_saved,
    b_dh,
    b_dc,
    b_v,
    row,
    unit,
    running,
    mask,
    p_zoneout_h,
    p_zoneout_c,
    zoneout_h_stride,
    zoneout_c_stride,
    p_grad_x,
    p_grad_norm,
    H,
    BACKWARD: tl.constexpr,
    GATES: tl.constexpr,
    HAS_C: tl.constexpr,
    PROJECTED: tl.constexpr,
):
    """Gradients of r, of h but for what goes through r, and of c; stores that of x. b_saved: from ``load_backward``."""
    o = row * H + unit
    b_s, b_h_new, b_h, b_fresh, b_c = b_saved
    b_dh_old, b_dc_old = tl.zeros_like(b_dh), b_dc
    b_dh_new, b_dc_new = b_dh, b_dc
    if HAS_C:
        b_dc_new, b_dc_old = zoneout_backward(b_dc, p_zoneout_c, zoneout_c_stride, o, mask)
    if not PROJECTED:
        b_dh_new, b_dh_old = zoneout_backward(b_dh, p_zoneout_h, zoneout_h_stride, o, mask)
    b_dx, b_dr, b_dh_prev, b_dc_prev, b_dy = BACKWARD(b_s, b_h_new, b_h, b_fresh, b_c, b_v, b_dh_new, b_dc_new, mask, H)
    store_tiles(p_grad_x, row * GATES * H + unit, H, keep_tiles(b_dx, running), mask)
    if p_grad_norm is not None:
        tl.store(p_grad_norm + o, keep(b_dy, running), mask=mask)
    if HAS_C:
        b_dc_new = b_dc_old + b_dc_prev
        b_dc = b_dc_new if running is None else tl.where(running, b_dc_new, b_dc)
    return keep_tiles(b_dr, running), b_dh_old + b_dh_prev, b_dc


# ---- one step ----


@triton.jit(do_not_specialize=["t", "following", "B"])
def forward_kernel(
    p_x,  # [T, B, G*H] W_ih x + b; may be p_gates
    p_product,  # [B, (G-FIRST)*H] W_hh h'
    p_bias,  # [G*H] added to the product, or None
    p_gamma,  # [G*H] scale of the product's layer norm, or None
    p_vectors,  # [VECTORS, H]
    p_lengths,  # [B] or None
    p_begins,  # [T, B] int8 or None: an episode begins with the step, in this pass's direction
    p_zoneout_h,  # [T, B, H] or [1] or None
    p_zoneout_c,  # [T, B, H] or [1] or None
    p_h,  # [B, H] float32: h', overwritten by h; both as the step after it sees them
    p_operand,  # [B, H] h for the next product in its dtype, or None where that is p_h; o tanh(c) where PROJECTED
    p_c,  # [B, H] float32: c', overwritten by c
    p_output,  # [T, B, H]
    p_gates,  # [T, B, SAVED*H] or None
    p_cells,  # [T, B, H] float32, or None
    p_carried,  # [T, B, H] float32: c where it is not what p_cells holds, or None
    t,
    following,  # time of the next step, or -1
    B,
    H,
    zoneout_h_stride,  # 0: one number for all units
    zoneout_c_stride,
    FORWARD: tl.constexpr,
    GATES: tl.constexpr,
    FIRST: tl.constexpr,
    SAVED: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_C: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    PROJECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < H
    row = tl.cast(t, tl.int64) * B + b
    running = None
    if p_lengths is not None:
        running = t < tl.load(p_lengths + b)
    b_x = load_tiles(p_x, row * GATES * H + unit, H, mask, GATES)
    b_r = load_tiles(p_product, b * (GATES - FIRST) * H + unit, H, mask, GATES - FIRST)
    if p_gamma is not None:
        b_r, _ = normalize(b_r, mask, H)
        b_gamma = load_tiles(p_gamma, unit, H, mask, GATES)
        b_scaled = ()
        for k in tl.static_range(GATES):
            b_scaled += (b_r[k] * b_gamma[k],)
        b_r = b_scaled
    if p_bias is not None:
        b_bias = load_tiles(p_bias, unit, H, mask, GATES)
        b_sum = ()
        for k in tl.static_range(GATES):
            b_sum += (b_r[k] + b_bias[k],)
        b_r = b_sum
    b_v = load_tiles(p_vectors, unit, H, mask, VECTORS)
    b_h = tl.zeros([BLOCK], tl.float32)
    if not PROJECTED:
        b_h = tl.load(p_h + b * H + unit, mask=mask, other=0.0)
    b_c = b_h
    if HAS_C:
        b_c = tl.load(p_c + b * H + unit, mask=mask, other=0.0)
    b_s, b_fresh, b_h, b_c = step_forward(
        b_x, b_r, b_h, b_c, b_v, row * H + unit, running, mask, p_zoneout_h, p_zoneout_c, zoneout_h_stride,
        zoneout_c_stride, H, FORWARD, HAS_C, PROJECTED,
    )  # fmt: skip
    store_forward(
        b_s, b_fresh, b_h, b_c, row, unit, running, mask, p_output, p_gates, p_cells, p_carried, H, SAVED, HAS_C,
        PROJECTED,
    )  # fmt: skip
    begins = begins_at(p_begins, following, B, b)
    if HAS_C:
        if not CONSTANT_C:
            b_c = restarted(b_c, begins)
        tl.store(p_c + b * H + unit, b_c, mask=mask)
    if not PROJECTED:
        b_h = restarted(b_h, begins)
        tl.store(p_h + b * H + unit, b_h, mask=mask)
    if p_operand is not None:
        tl.store(p_operand + b * H + unit, b_h.to(p_operand.dtype.element_ty), mask=mask)


@triton.jit
def arriving(p_grad_output, p_product, p_dh, o, o_state, mask, cut):
    """The gradient of h from all that reads it, and the same without the part of grad_output. cut: an episode begins
    with the step after this one, which does not read h."""
    b_dh = tl.load(p_dh + o_state, mask=mask, other=0.0)
    b_dh += tl.load(p_product + o_state, mask=mask, other=0.0).to(tl.float32)
    b_dh = restarted(b_dh, cut)
    b_held = b_dh
    if p_grad_output is not None:
        b_dh += tl.load(p_grad_output + o, mask=mask, other=0.0).to(tl.float32)
    return b_dh, b_held


@triton.jit(do_not_specialize=["t", "earlier", "later", "B"])
def backward_kernel(
    p_grad_output,  # [T, B, H] or None
    p_product,  # [B, H] gradient of h through the product of the step before in this pass; of o tanh(c) where PROJECTED
    p_gates,  # [T, B, SAVED*H]
    p_products,  # [T, B, G*H] W_hh h' where it is normalised, or None
    p_gamma,  # [G*H] or None
    p_vectors,  # [VECTORS, H]
    p_cells,  # [T, B, H] float32
    p_carried,  # [T, B, H] float32 or None
    p_c_0,  # [B, H]
    p_output,  # [T, B, H]
    p_h_0,  # [B, H]
    p_lengths,  # [B] or None
    p_begins,  # [T, B] int8 or None
    p_zoneout_h,  # [T, B, H] or [1] or None
    p_zoneout_c,  # [T, B, H] or [1] or None
    p_dh,  # [B, H] float32: gradient of h but for p_product and p_grad_output; overwritten by that of h'
    p_dc,  # [B, H] float32: gradient of c, overwritten by that of c'
    p_grad_x,  # [T, B, G*H]
    p_grad_r,  # [T, B, G*H] where it is not grad_x, or None
    p_grad_products,  # [T, B, G*H] gradient of p_products, or None
    p_grad_norm,  # [T, B, H] float32: gradient of the layer norm of c, or None
    t,
    earlier,  # time of the step before in the forward pass, or -1
    later,  # time of the step after it, or -1
    B,
    H,
    zoneout_h_stride,
    zoneout_c_stride,
    BACKWARD: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    VECTORS: tl.constexpr,
    HAS_C: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    USES_OUTPUT: tl.constexpr,
    USES_H: tl.constexpr,
    PROJECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < H
    row = tl.cast(t, tl.int64) * B + b
    earlier_row = tl.cast(earlier, tl.int64) * B + b
    o_state = b * H + unit
    s_earlier = tl.zeros_like(unit) + earlier
    inner = s_earlier >= 0
    inner_h = inner
    running = None
    if p_lengths is not None:
        length = tl.load(p_lengths + b)
        running = t < length
        inner_h = inner & (s_earlier < length)
    cut = begins_at(p_begins, later, B, b)
    if PROJECTED:
        b_dh = tl.load(p_product + o_state, mask=mask, other=0.0).to(tl.float32)
        b_held = b_dh
    else:
        b_dh, b_held = arriving(p_grad_output, p_product, p_dh, row * H + unit, o_state, mask, cut)
    b_dc = b_dh
    if HAS_C:
        b_dc = tl.load(p_dc + o_state, mask=mask, other=0.0)
        if not CONSTANT_C:
            b_dc = restarted(b_dc, cut)
    b_v = load_tiles(p_vectors, unit, H, mask, VECTORS)
    b_saved = load_backward(
        row, earlier_row, inner, inner_h, b, unit, mask, p_gates, p_cells, p_carried, p_c_0, p_output, p_h_0, H,
        SAVED, HAS_C, USES_OUTPUT, USES_H, begins_at(p_begins, t, B, b), CONSTANT_C,
    )  # fmt: skip
    b_dr, b_dh_prev, b_dc = step_backward(
        b_saved, b_dh, b_dc, b_v, row, unit, running, mask, p_zoneout_h, p_zoneout_c, zoneout_h_stride,
        zoneout_c_stride, p_grad_x, p_grad_norm, H, BACKWARD, GATES, HAS_C, PROJECTED,
    )  # fmt: skip
    o_gates = row * GATES * H + unit
    if p_grad_r is not None:
        store_tiles(p_grad_r, o_gates, H, b_dr, mask)
    if p_products is not None:
        b_hat, b_rstd = normalize(load_tiles(p_products, o_gates, H, mask, GATES), mask, H)
        b_gamma = load_tiles(p_gamma, unit, H, mask, GATES)
        b_d = ()
        for k in tl.static_range(GATES):
            b_d += (b_dr[k] * b_gamma[k],)
        store_tiles(p_grad_products, o_gates, H, normalize_backward(b_hat, b_rstd, b_d, mask, H), mask)
    if HAS_C:
        tl.store(p_dc + o_state, b_dc, mask=mask)
    if not PROJECTED:
        if running is not None:
            b_dh_prev = tl.where(running, b_dh_prev, b_held)
        tl.store(p_dh + o_state, b_dh_prev, mask=mask)


# ---- projection: h = W_hr (o tanh(c)) ----


@triton.jit(do_not_specialize=["t", "following", "B"])
def project_forward_kernel(
    p_product,  # [B, P] W_hr (o tanh(c))
    p_lengths,
    p_begins,
    p_zoneout_h,
    p_h,  # [B, P] float32, as in forward_kernel
    p_operand,
    p_output,  # [T, B, P]
    t,
    following,
    B,
    P,
    zoneout_h_stride,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < P
    o, o_state = (tl.cast(t, tl.int64) * B + b) * P + unit, b * P + unit
    running = None
    if p_lengths is not None:
        running = t < tl.load(p_lengths + b)
    b_h = tl.load(p_h + o_state, mask=mask, other=0.0)
    b_new = tl.load(p_product + o_state, mask=mask, other=0.0).to(tl.float32)
    b_h = apply_zoneout_and_lengths(b_new, b_h, p_zoneout_h, zoneout_h_stride, o, running, mask)
    tl.store(p_output + o, keep(b_h, running).to(p_output.dtype.element_ty), mask=mask)
    b_h = restarted(b_h, begins_at(p_begins, following, B, b))
    tl.store(p_h + o_state, b_h, mask=mask)
    if p_operand is not None:
        tl.store(p_operand + o_state, b_h.to(p_operand.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["t", "later", "B"])
def project_backward_kernel(
    p_grad_output,  # [T, B, P] or None
    p_product,  # [B, P]
    p_lengths,
    p_begins,
    p_zoneout_h,
    p_dh,  # [B, P] float32, as in backward_kernel
    p_grad_projected,  # [T, B, P] gradient of W_hr (o tanh(c))
    t,
    later,
    B,
    P,
    zoneout_h_stride,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < P
    o, o_state = (tl.cast(t, tl.int64) * B + b) * P + unit, b * P + unit
    cut = begins_at(p_begins, later, B, b)
    b_dh, b_held = arriving(p_grad_output, p_product, p_dh, o, o_state, mask, cut)
    b_dh, b_old = zoneout_backward(b_dh, p_zoneout_h, zoneout_h_stride, o, mask)
    if p_lengths is not None:
        running = t < tl.load(p_lengths + b)
        b_dh, b_old = tl.where(running, b_dh, 0.0), tl.where(running, b_old, b_held)
    tl.store(p_grad_projected + o, b_dh.to(p_grad_projected.dtype.element_ty), mask=mask)
    tl.store(p_dh + o_state, b_old, mask=mask)
