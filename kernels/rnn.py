"""LSTM on a GPU: one layer, one direction, in Triton.

Not yet run on a GPU: verified in Triton's interpreter and compiled offline.

    pre = W_ih x_t + W_hh h' + b;  i, f, o = sigmoid(pre), g = tanh(pre);  c = f c' + i g;  h = o tanh(c)

The input projection and the weight gradients are one matrix product each over all steps. Between them:

- H <= 64 in 16 bits, or H <= 32 in float32 with torch's TF32 switch on: one launch for all steps. A program owns
  ``BLOCK_B`` rows of the batch and walks through time; programs never wait for each other. W_hh is read from L2 at
  every step, one gate's tile at a time. With more units, or float32 without tensor cores, the tiles spill.
- else one ``torch.mm`` and one pointwise launch a step.

State is float32; input and weights may be float32, float16 or bfloat16. Past a row's length the state stays and the
output is 0.
The operators are opaque custom operators, not traced ones: under torch.compile a loop over steps would be unrolled.

T time, B batch, I input, H hidden; gates [T, B, 4H] in the order i, f, g, o.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqaccel.kernels._launch import Configuration

WHOLE = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}  # largest H that one program's tiles hold
BLOCK_B = 16  # rows of a program: the least that tl.dot takes
POINTS = 256  # hidden units of a pointwise program

# ---- the cell ----


@triton.jit
def tanh(x):
    # The odd series below 0.15 (next term 5.6e-9), where 1 - e cancels.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    e = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.15, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def lstm_cell_forward(b_i, b_f, b_g, b_o, b_c):
    """Activated gates, new c, new h; all float32."""
    b_i, b_f, b_g, b_o = sigmoid(b_i), sigmoid(b_f), tanh(b_g), sigmoid(b_o)
    b_c = b_f * b_c + b_i * b_g
    return b_i, b_f, b_g, b_o, b_c, b_o * tanh(b_c)


@triton.jit
def lstm_cell_backward(b_i, b_f, b_g, b_o, b_c_prev, b_c, b_dh, b_dc):
    """Gradients of the four pre-activations, and of c'; all float32."""
    b_tanh = tanh(b_c)
    b_dc += b_dh * b_o * (1.0 - b_tanh * b_tanh)
    b_di = b_dc * b_g * b_i * (1.0 - b_i)
    b_df = b_dc * b_c_prev * b_f * (1.0 - b_f)
    b_dg = b_dc * b_i * (1.0 - b_g * b_g)
    b_do = b_dh * b_tanh * b_o * (1.0 - b_o)
    return b_di, b_df, b_dg, b_do, b_dc * b_f


@triton.jit
def load_gates(p_gates, o_gates, H, mask):
    """The four gates at o_gates, float32."""
    b_i = tl.load(p_gates + o_gates, mask=mask, other=0.0).to(tl.float32)
    b_f = tl.load(p_gates + o_gates + H, mask=mask, other=0.0).to(tl.float32)
    b_g = tl.load(p_gates + o_gates + 2 * H, mask=mask, other=0.0).to(tl.float32)
    b_o = tl.load(p_gates + o_gates + 3 * H, mask=mask, other=0.0).to(tl.float32)
    return b_i, b_f, b_g, b_o


@triton.jit
def store_gates(p_gates, o_gates, H, b_i, b_f, b_g, b_o, mask):
    dtype = p_gates.dtype.element_ty
    tl.store(p_gates + o_gates, b_i.to(dtype), mask=mask)
    tl.store(p_gates + o_gates + H, b_f.to(dtype), mask=mask)
    tl.store(p_gates + o_gates + 2 * H, b_g.to(dtype), mask=mask)
    tl.store(p_gates + o_gates + 3 * H, b_o.to(dtype), mask=mask)


# ---- one step ----


@triton.jit
def lstm_forward_point_kernel(
    p_gates,  # [T, B, 4H] W_ih x; overwritten by the activated gates where SAVE
    p_product,  # [B, 4H] W_hh h'
    p_bias,  # [4H] or None
    p_lengths,  # [B] or None
    p_h,  # [B, H] h', overwritten by h
    p_c,  # [B, H] float32: c', overwritten by c
    p_output,  # [T, B, H]
    p_cells,  # [T, B, H] float32, written where SAVE
    t,
    B,
    H,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < H
    row = t.to(tl.int64) * B + i_b
    o_gates = row * 4 * H + o_h
    o_state = i_b.to(tl.int64) * H + o_h
    b_i, b_f, b_g, b_o = load_gates(p_gates, o_gates, H, m_h)
    b_ri, b_rf, b_rg, b_ro = load_gates(p_product, i_b.to(tl.int64) * 4 * H + o_h, H, m_h)
    b_i, b_f, b_g, b_o = b_i + b_ri, b_f + b_rf, b_g + b_rg, b_o + b_ro
    if p_bias is not None:
        b_bi, b_bf, b_bg, b_bo = load_gates(p_bias, o_h, H, m_h)
        b_i, b_f, b_g, b_o = b_i + b_bi, b_f + b_bf, b_g + b_bg, b_o + b_bo
    b_c_prev = tl.load(p_c + o_state, mask=m_h, other=0.0)
    b_i, b_f, b_g, b_o, b_c, b_h = lstm_cell_forward(b_i, b_f, b_g, b_o, b_c_prev)
    b_out = b_h
    if p_lengths is not None:
        running = t < tl.load(p_lengths + i_b)
        b_c = tl.where(running, b_c, b_c_prev)
        b_out = tl.where(running, b_h, 0.0)
        b_h = tl.where(running, b_h, tl.load(p_h + o_state, mask=m_h, other=0.0).to(tl.float32))
    tl.store(p_c + o_state, b_c, mask=m_h)
    tl.store(p_h + o_state, b_h.to(p_h.dtype.element_ty), mask=m_h)
    tl.store(p_output + row * H + o_h, b_out.to(p_output.dtype.element_ty), mask=m_h)
    if SAVE:
        tl.store(p_cells + row * H + o_h, b_c, mask=m_h)
        store_gates(p_gates, o_gates, H, b_i, b_f, b_g, b_o, m_h)


@triton.jit
def lstm_backward_point_kernel(
    p_grad_output,  # [T, B, H] or None
    p_product,  # [B, H] grad_gates of the step before in this pass * W_hh, or None
    p_gates,  # [T, B, 4H] activated
    p_cells,  # [T, B, H] float32
    p_c_0,  # [B, H]
    p_lengths,  # [B] or None
    p_dh,  # [B, H] float32: gradient of the state of a row that has not run yet; 0 once it has
    p_dc,  # [B, H] float32
    p_grad_gates,  # [T, B, 4H]
    t,
    earlier,  # the step whose c is c', or -1
    B,
    H,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_h = o_h < H
    row = t.to(tl.int64) * B + i_b
    o_gates = row * 4 * H + o_h
    o_state = i_b.to(tl.int64) * H + o_h
    b_dh = tl.load(p_dh + o_state, mask=m_h, other=0.0)
    if p_product is not None:
        b_dh += tl.load(p_product + o_state, mask=m_h, other=0.0).to(tl.float32)
    b_held = b_dh
    if p_grad_output is not None:
        b_dh += tl.load(p_grad_output + row * H + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_dc = tl.load(p_dc + o_state, mask=m_h, other=0.0)
    b_i, b_f, b_g, b_o = load_gates(p_gates, o_gates, H, m_h)
    b_c = tl.load(p_cells + row * H + o_h, mask=m_h, other=0.0)
    o_earlier = tl.zeros_like(o_h) + earlier
    inner = o_earlier >= 0
    if p_lengths is not None:
        length = tl.load(p_lengths + i_b)
        inner = inner & (o_earlier < length)
    b_c_0 = tl.load(p_c_0 + o_state, mask=m_h, other=0.0).to(tl.float32)
    b_c_earlier = tl.load(p_cells + (earlier.to(tl.int64) * B + i_b) * H + o_h, mask=m_h & inner, other=0.0)
    b_c_prev = tl.where(inner, b_c_earlier, b_c_0)
    b_di, b_df, b_dg, b_do, b_dc_prev = lstm_cell_backward(b_i, b_f, b_g, b_o, b_c_prev, b_c, b_dh, b_dc)
    b_left = tl.zeros_like(b_dh)
    if p_lengths is not None:
        running = t < length
        b_di, b_df = tl.where(running, b_di, 0.0), tl.where(running, b_df, 0.0)
        b_dg, b_do = tl.where(running, b_dg, 0.0), tl.where(running, b_do, 0.0)
        b_dc_prev = tl.where(running, b_dc_prev, b_dc)
        b_left = tl.where(running, 0.0, b_held)
    store_gates(p_grad_gates, o_gates, H, b_di, b_df, b_dg, b_do, m_h)
    tl.store(p_dc + o_state, b_dc_prev, mask=m_h)
    tl.store(p_dh + o_state, b_left, mask=m_h)


# ---- all steps ----


@triton.jit
def lstm_forward_whole_kernel(
    p_gates,  # [T, B, 4H] W_ih x; overwritten by the activated gates where SAVE
    p_weight,  # [4H, H]
    p_bias,  # [4H] or None
    p_lengths,  # [B] or None
    p_h,  # [B, H] h_0, overwritten by h_n
    p_c,  # [B, H] float32: c_0, overwritten by c_n
    p_output,  # [T, B, H]
    p_cells,  # [T, B, H] float32, written where SAVE
    T,
    B,
    H,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_h = tl.arange(0, BLOCK_H)
    m_b, m_h = o_b < B, o_h < H
    mask = m_b[:, None] & m_h[None, :]
    o_state = o_b.to(tl.int64)[:, None] * H + o_h[None, :]
    dtype = p_weight.dtype.element_ty
    b_h = tl.load(p_h + o_state, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_B, BLOCK_H]
    b_c = tl.load(p_c + o_state, mask=mask, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + o_b, mask=m_b, other=0)
    p_transposed = p_weight + o_h[None, :] * H + o_h[:, None]  # [k, unit]
    m_weight = m_h[:, None] & m_h[None, :]
    for s in range(T):
        t = T - 1 - s if REVERSE else s
        row = tl.cast(t, tl.int64) * B + o_b
        o_gates = row[:, None] * 4 * H + o_h[None, :]
        b_i, b_f, b_g, b_o = load_gates(p_gates, o_gates, H, mask)
        if p_bias is not None:
            b_bi, b_bf, b_bg, b_bo = load_gates(p_bias, o_h, H, m_h)
            b_i, b_f, b_g, b_o = b_i + b_bi[None, :], b_f + b_bf[None, :], b_g + b_bg[None, :], b_o + b_bo[None, :]
        b_x = b_h.to(dtype)
        b_w = tl.load(p_transposed, mask=m_weight, other=0.0)
        b_i += tl.dot(b_x, b_w, input_precision=PRECISION)
        b_w = tl.load(p_transposed + H * H, mask=m_weight, other=0.0)
        b_f += tl.dot(b_x, b_w, input_precision=PRECISION)
        b_w = tl.load(p_transposed + 2 * H * H, mask=m_weight, other=0.0)
        b_g += tl.dot(b_x, b_w, input_precision=PRECISION)
        b_w = tl.load(p_transposed + 3 * H * H, mask=m_weight, other=0.0)
        b_o += tl.dot(b_x, b_w, input_precision=PRECISION)
        b_i, b_f, b_g, b_o, b_c_new, b_h_new = lstm_cell_forward(b_i, b_f, b_g, b_o, b_c)
        b_out = b_h_new
        if p_lengths is not None:
            running = (t < b_length)[:, None]
            b_out = tl.where(running, b_h_new, 0.0)
            b_h_new = tl.where(running, b_h_new, b_h)
            b_c_new = tl.where(running, b_c_new, b_c)
        b_h, b_c = b_h_new, b_c_new
        o_row = row[:, None] * H + o_h[None, :]
        tl.store(p_output + o_row, b_out.to(p_output.dtype.element_ty), mask=mask)
        if SAVE:
            tl.store(p_cells + o_row, b_c, mask=mask)
            store_gates(p_gates, o_gates, H, b_i, b_f, b_g, b_o, mask)
    tl.store(p_h + o_state, b_h.to(p_h.dtype.element_ty), mask=mask)
    tl.store(p_c + o_state, b_c, mask=mask)


@triton.jit
def lstm_backward_whole_kernel(
    p_grad_output,  # [T, B, H] or None
    p_weight,  # [4H, H]
    p_gates,  # [T, B, 4H] activated
    p_cells,  # [T, B, H] float32
    p_c_0,  # [B, H]
    p_lengths,  # [B] or None
    p_dh,  # [B, H] float32: gradient of h_n, overwritten by that of h_0
    p_dc,  # [B, H] float32: gradient of c_n, overwritten by that of c_0
    p_grad_gates,  # [T, B, 4H]
    T,
    B,
    H,
    REVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_h = tl.arange(0, BLOCK_H)
    m_b, m_h = o_b < B, o_h < H
    mask = m_b[:, None] & m_h[None, :]
    o_state = o_b.to(tl.int64)[:, None] * H + o_h[None, :]
    dtype = p_weight.dtype.element_ty
    b_dh = tl.load(p_dh + o_state, mask=mask, other=0.0)
    b_dc = tl.load(p_dc + o_state, mask=mask, other=0.0)
    b_c_0 = tl.load(p_c_0 + o_state, mask=mask, other=0.0).to(tl.float32)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + o_b, mask=m_b, other=0)
    p_w = p_weight + o_h[:, None] * H + o_h[None, :]  # [unit, k]
    m_weight = m_h[:, None] & m_h[None, :]
    for s in range(T):
        t = s if REVERSE else T - 1 - s
        earlier = t + 1 if REVERSE else t - 1
        row = tl.cast(t, tl.int64) * B + o_b
        o_row = row[:, None] * H + o_h[None, :]
        o_gates = row[:, None] * 4 * H + o_h[None, :]
        b_held = b_dh
        if p_grad_output is not None:
            b_dh += tl.load(p_grad_output + o_row, mask=mask, other=0.0).to(tl.float32)
        b_i, b_f, b_g, b_o = load_gates(p_gates, o_gates, H, mask)
        b_c = tl.load(p_cells + o_row, mask=mask, other=0.0)
        s_earlier = tl.zeros_like(o_b) + earlier
        inner = (s_earlier >= 0) & (s_earlier < T)
        if p_lengths is not None:
            inner = inner & (s_earlier < b_length)
        o_earlier = (tl.cast(earlier, tl.int64) * B + o_b)[:, None] * H + o_h[None, :]
        b_c_earlier = tl.load(p_cells + o_earlier, mask=mask & inner[:, None], other=0.0)
        b_c_prev = tl.where(inner[:, None], b_c_earlier, b_c_0)
        b_di, b_df, b_dg, b_do, b_dc_prev = lstm_cell_backward(b_i, b_f, b_g, b_o, b_c_prev, b_c, b_dh, b_dc)
        if p_lengths is not None:
            running = (t < b_length)[:, None]
            b_di, b_df = tl.where(running, b_di, 0.0), tl.where(running, b_df, 0.0)
            b_dg, b_do = tl.where(running, b_dg, 0.0), tl.where(running, b_do, 0.0)
            b_dc_prev = tl.where(running, b_dc_prev, b_dc)
        store_gates(p_grad_gates, o_gates, H, b_di, b_df, b_dg, b_do, mask)
        b_w = tl.load(p_w, mask=m_weight, other=0.0)
        b_dh = tl.dot(b_di.to(dtype), b_w, input_precision=PRECISION)
        b_w = tl.load(p_w + H * H, mask=m_weight, other=0.0)
        b_dh += tl.dot(b_df.to(dtype), b_w, input_precision=PRECISION)
        b_w = tl.load(p_w + 2 * H * H, mask=m_weight, other=0.0)
        b_dh += tl.dot(b_dg.to(dtype), b_w, input_precision=PRECISION)
        b_w = tl.load(p_w + 3 * H * H, mask=m_weight, other=0.0)
        b_dh += tl.dot(b_do.to(dtype), b_w, input_precision=PRECISION)
        if p_lengths is not None:
            b_dh = tl.where(running, b_dh, b_held)
        b_dc = b_dc_prev
    tl.store(p_dh + o_state, b_dh, mask=mask)
    tl.store(p_dc + o_state, b_dc, mask=mask)


# ---- launchers ----


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _fits_whole(weight_hh: Tensor) -> bool:
    tensor_cores = weight_hh.dtype != torch.float32 or _precision() == "tf32"
    return tensor_cores and weight_hh.shape[1] <= WHOLE.get(weight_hh.dtype, 0)


def _whole_options(hidden: int) -> dict[str, int]:
    return {"BLOCK_H": max(32, triton.next_power_of_2(hidden)), "BLOCK_B": BLOCK_B, "num_warps": 4, "num_stages": 1}


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@torch.library.custom_op("seqaccel::lstm_forward_triton", mutates_args=())
def lstm_forward(
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, h_n, c_n, and where ``save`` the activated gates and float32 c of every step (else empty)."""
    steps, batch = input.shape[:2]
    hidden = weight_hh.shape[1]
    weight_hh = weight_hh.contiguous()
    gates = torch.matmul(input, weight_ih.t()).contiguous()
    output = input.new_empty(steps, batch, hidden)
    cells = input.new_empty((steps, batch, hidden) if save else (0,), dtype=torch.float32)
    h = h_0.clone(memory_format=torch.contiguous_format)
    c = c_0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    bias = _sum(bias_ih, bias_hh)
    if steps and batch and _fits_whole(weight_hh):
        lstm_forward_whole_kernel[(triton.cdiv(batch, BLOCK_B),)](
            gates, weight_hh, bias, lengths, h, c, output, cells, steps, batch, hidden,
            REVERSE=reverse, SAVE=save, PRECISION=_precision(), **_whole_options(hidden),
        )  # fmt: skip
    elif steps and batch:
        transposed = weight_hh.t()
        for s in range(steps):
            t = steps - 1 - s if reverse else s
            lstm_forward_point_kernel[(batch, triton.cdiv(hidden, POINTS))](
                gates, h @ transposed, bias, lengths, h, c, output, cells, t, batch, hidden,
                SAVE=save, BLOCK=POINTS, num_warps=4,
            )  # fmt: skip
    return output, h, c.to(input.dtype, copy=True), gates if save else gates.new_empty(0), cells


@lstm_forward.register_fake
def _(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, save):
    steps, batch, hidden = input.shape[0], input.shape[1], weight_hh.shape[1]
    return (
        input.new_empty(steps, batch, hidden),
        input.new_empty(batch, hidden),
        input.new_empty(batch, hidden),
        input.new_empty((steps, batch, 4 * hidden) if save else (0,)),
        input.new_empty((steps, batch, hidden) if save else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("seqaccel::lstm_backward_triton", mutates_args=())
def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    needs_input: bool,
    needs_weight_ih: bool,
    needs_weight_hh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, h_0, c_0, weight_ih, weight_hh and the biases; an empty one where it is not needed."""
    steps, batch, hidden = output.shape
    weight_hh, c_0 = weight_hh.contiguous(), c_0.contiguous()
    grad_output = None if grad_output is None else grad_output.contiguous()
    grad_gates = torch.empty_like(gates)
    state = [
        torch.zeros(batch, hidden, dtype=torch.float32, device=input.device)
        if grad is None
        else grad.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for grad in (grad_h_n, grad_c_n)
    ]
    dh, dc = state
    if steps and batch and _fits_whole(weight_hh):
        lstm_backward_whole_kernel[(triton.cdiv(batch, BLOCK_B),)](
            grad_output, weight_hh, gates, cells, c_0, lengths, dh, dc, grad_gates, steps, batch, hidden,
            REVERSE=reverse, PRECISION=_precision(), **_whole_options(hidden),
        )  # fmt: skip
    elif steps and batch:
        product = None
        for s in reversed(range(steps)):
            t = steps - 1 - s if reverse else s
            earlier = -1 if s == 0 else t + 1 if reverse else t - 1
            lstm_backward_point_kernel[(batch, triton.cdiv(hidden, POINTS))](
                grad_output, product, gates, cells, c_0, lengths, dh, dc, grad_gates, t, earlier, batch, hidden,
                BLOCK=POINTS, num_warps=4,
            )  # fmt: skip
            product = grad_gates[t] @ weight_hh
        dh = dh + product.float()
    flat = grad_gates.view(-1, 4 * hidden)
    none = input.new_empty(0)
    h_prev = none
    if needs_weight_hh and steps:
        first = h_0.unsqueeze(0)
        h_prev = torch.cat((output[1:], first) if reverse else (first, output[:-1]))
        if reverse and lengths is not None:
            later = torch.arange(1, steps + 1, device=input.device).unsqueeze(1) < lengths
            h_prev = torch.where(later.unsqueeze(-1), h_prev, first)
    return (
        torch.matmul(grad_gates, weight_ih) if needs_input else none.clone(),
        dh.to(input.dtype, copy=True),
        dc.to(input.dtype, copy=True),
        flat.t() @ input.reshape(-1, input.shape[2]) if needs_weight_ih else none.clone(),
        flat.t() @ h_prev.reshape(-1, hidden) if needs_weight_hh else none.clone(),
        flat.sum(0),
    )


@lstm_backward.register_fake
def _(
    grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weight_ih, weight_hh, output, gates, cells, lengths, reverse,
    needs_input, needs_weight_ih, needs_weight_hh,
):  # fmt: skip
    return (
        input.new_empty(input.shape if needs_input else (0,)),
        input.new_empty(h_0.shape),
        input.new_empty(c_0.shape),
        input.new_empty(weight_ih.shape if needs_weight_ih else (0,)),
        input.new_empty(weight_hh.shape if needs_weight_hh else (0,)),
        input.new_empty(weight_hh.shape[:1]),
    )


# ---- what is shipped ----


def _configurations() -> list[Configuration]:
    rows = []
    for kind, hidden, precision in (("bf16", 32, "ieee"), ("bf16", 64, "ieee"), ("fp32", 32, "tf32")):
        p, options = f"*{kind}", _whole_options(hidden)
        types = {
            **dict.fromkeys(
                ("p_weight", "p_gates", "p_output", "p_h", "p_bias", "p_c_0", "p_grad_output", "p_grad_gates"), p
            ),
            **dict.fromkeys(("p_c", "p_cells", "p_dh", "p_dc"), "*fp32"),
            **dict.fromkeys(("T", "B", "H"), "i32"),
            "p_lengths": "*i64",
        }
        constants = {"REVERSE": False, "BLOCK_H": options["BLOCK_H"], "BLOCK_B": BLOCK_B, "PRECISION": precision}
        for kernel, extra in ((lstm_forward_whole_kernel, {"SAVE": True}), (lstm_backward_whole_kernel, {})):
            rows.append(_configuration(kernel, types, {**constants, **extra}, options["num_stages"]))
    for kind in ("fp32", "bf16"):
        p = f"*{kind}"
        types = {
            **dict.fromkeys(
                ("p_product", "p_gates", "p_output", "p_h", "p_bias", "p_c_0", "p_grad_output", "p_grad_gates"), p
            ),
            **dict.fromkeys(("p_c", "p_cells", "p_dh", "p_dc"), "*fp32"),
            **dict.fromkeys(("t", "earlier", "B", "H"), "i32"),
            "p_lengths": "*i64",
        }
        for kernel, extra in ((lstm_forward_point_kernel, {"SAVE": True}), (lstm_backward_point_kernel, {})):
            rows.append(_configuration(kernel, types, {"BLOCK": POINTS, **extra}, 3))
    return rows


def _configuration(kernel, types: dict[str, str], constants: dict, num_stages: int) -> Configuration:
    signature = {name: types[name] for name in kernel.arg_names if name not in constants}
    return Configuration(kernel, signature, constants, num_warps=4, num_stages=num_stages, multiples_of_16=("H",))


CONFIGURATIONS = _configurations()
