"""The column cells, each once: one step, its derivative, and the traits that the loops need.

A cell is elementwise in its state; the products over all steps are done before. It works on tiles of any shape, in
float32 or float64:

    forward(v, c, m, skip) -> (state, h)
        v      tuple of K pre-activations: u, plus bias, plus weight times c in the rows that have one
        c      the state before the step
        m      dropout or zoneout mask; 1 if there is none
        skip   what stands for the input in the highway connection; 0 if there is none
    backward(v, c, state, m, skip, dh, dc) -> (dv, dc, dskip)
        dc     gradient of the state after the step; returned: of the state before it, but for what goes through v

Weights, biases, padding, resets and the walk through time belong to the loops (``columns.py``).

A kernel names its cell by a string, and ``cell_forward`` and ``cell_backward`` find the cell's functions.
(Inductor writes a kernel's constexprs into its own source code: it can write a string, but not a function.)
"""

import dataclasses
from typing import Any

import triton
import triton.language as tl

from seqaccel.kernels._math import sigmoid, tanh


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the loops need to know of a cell.

    Args:
        inputs: K, the pre-activations. With ``highway`` u may have one more, the projected input.
        first: the first pre-activation that weight and bias are added to; they have a row for each from there on.
        weights: rows of weight.
        biases: rows of bias.
        separate: the output is not the state.
        highway: it takes x or a projected input, scale multiplies x, and K is innermost in u.
        mask: its shape, a letter a dimension: (B, C) or (T, B, C). In the latter case scale multiplies it.
    """

    inputs: int
    first: int = 0
    weights: int = 0
    biases: int = 0
    separate: bool = False
    highway: bool = False
    mask: str = ""


#: The cells by name. Each row stands behind its two functions.
CELLS: dict[str, Cell] = {}


# ---- SRU. f, r = sigmoid(v_1), sigmoid(v_2);  c = f c' + (1 - f) v_0;  h = skip + m r (g(c) - skip) ----


@triton.jit
def _sru_state(v, c):
    forget = sigmoid(v[1])
    return v[0] + forget * (c - v[0])


@triton.jit
def _sru_backward(v, c, activated, slope, m, skip, dh, dc):
    """``activated`` is g(c) and ``slope`` its derivative."""
    forget, reset = sigmoid(v[1]), sigmoid(v[2])
    through = dh * m * reset
    d = dc + through * slope
    d_forget = d * (c - v[0]) * (forget * (1.0 - forget))
    d_reset = through * (activated - skip) * (1.0 - reset)
    return (d * (1.0 - forget), d_forget, d_reset), d * forget, dh - through


@triton.jit
def sru_forward(v, c, m, skip):
    state = _sru_state(v, c)
    return state, skip + m * sigmoid(v[2]) * (state - skip)


@triton.jit
def sru_backward(v, c, state, m, skip, dh, dc):
    return _sru_backward(v, c, state, 1.0, m, skip, dh, dc)


@triton.jit
def sru_tanh_forward(v, c, m, skip):
    state = _sru_state(v, c)
    return state, skip + m * sigmoid(v[2]) * (tanh(state) - skip)


@triton.jit
def sru_tanh_backward(v, c, state, m, skip, dh, dc):
    activated = tanh(state)
    return _sru_backward(v, c, activated, 1.0 - activated * activated, m, skip, dh, dc)


_SRU: dict[str, Any] = {"first": 1, "weights": 2, "biases": 2, "separate": True, "highway": True, "mask": "BC"}
CELLS["sru"] = Cell(3, **_SRU)
CELLS["sru_tanh"] = Cell(3, **_SRU)


# ---- QRNN. z, f, o = tanh(v_0), sigmoid(v_1), sigmoid(v_2);  c = c' + m (1 - f) (z - c');  h = o c, or c ----


@triton.jit
def f_pool_forward(v, c, m, skip):
    state = c + m * (1.0 - sigmoid(v[1])) * (tanh(v[0]) - c)
    return state, state


@triton.jit
def f_pool_backward(v, c, state, m, skip, dh, dc):
    z, f = tanh(v[0]), sigmoid(v[1])
    fresh = m * (1.0 - f)
    d = dc + dh
    return (d * fresh * (1.0 - z * z), -d * (z - c) * fresh * f), d * (1.0 - fresh), skip


@triton.jit
def fo_pool_forward(v, c, m, skip):
    state, _ = f_pool_forward(v, c, m, skip)
    return state, sigmoid(v[2]) * state


@triton.jit
def fo_pool_backward(v, c, state, m, skip, dh, dc):
    o = sigmoid(v[2])
    dv, dc, _ = f_pool_backward(v, c, state, m, skip, dh * o, dc)
    return (dv[0], dv[1], dh * state * (o * (1.0 - o))), dc, skip


CELLS["f_pool"] = Cell(2, biases=2, mask="TBC")
CELLS["fo_pool"] = Cell(3, biases=3, separate=True, mask="TBC")


# ---- IndRNN. c = phi(v), whose weight is the recurrent one ----


@triton.jit
def indrnn_relu_forward(v, c, m, skip):
    state = tl.where(v[0] < 0.0, 0.0, v[0])
    return state, state


@triton.jit
def indrnn_relu_backward(v, c, state, m, skip, dh, dc):
    return (tl.where(state <= 0.0, 0.0, dc + dh),), tl.zeros_like(dc), skip


@triton.jit
def indrnn_tanh_forward(v, c, m, skip):
    state = tanh(v[0])
    return state, state


@triton.jit
def indrnn_tanh_backward(v, c, state, m, skip, dh, dc):
    return ((dc + dh) * (1.0 - state * state),), tl.zeros_like(dc), skip


CELLS["indrnn_relu"] = Cell(1, weights=1, biases=1)
CELLS["indrnn_tanh"] = Cell(1, weights=1, biases=1)


# ---- minGRU and minLSTM: c = f c' + (1 - f) candidate. The candidate is v, or g(v) = v + 1/2, sigmoid(v) below 0 ----


@triton.jit
def _positive(v):
    return tl.where(v < 0.0, sigmoid(v), v + 0.5)


@triton.jit
def _positive_slope(v):
    below = sigmoid(v)
    return tl.where(v < 0.0, below * (1.0 - below), 1.0)


@triton.jit
def _mingru_backward(v, c, candidate, slope, skip, d):
    z = sigmoid(v[0])
    return (d * (candidate - c) * (z * (1.0 - z)), d * z * slope), d * (1.0 - z), skip


@triton.jit
def mingru_forward(v, c, m, skip):
    state = c + sigmoid(v[0]) * (v[1] - c)
    return state, state


@triton.jit
def mingru_backward(v, c, state, m, skip, dh, dc):
    return _mingru_backward(v, c, v[1], 1.0, skip, dc + dh)


@triton.jit
def mingru_g_forward(v, c, m, skip):
    return mingru_forward((v[0], _positive(v[1])), c, m, skip)


@triton.jit
def mingru_g_backward(v, c, state, m, skip, dh, dc):
    return _mingru_backward(v, c, _positive(v[1]), _positive_slope(v[1]), skip, dc + dh)


CELLS["mingru"] = Cell(2, biases=2)
CELLS["mingru_g"] = Cell(2, biases=2)


@triton.jit
def _share(f, i):
    """sigmoid(f) / (sigmoid(f) + sigmoid(i)), which is finite where both underflow, and the two's slopes 1 - sigmoid.

    sigmoid(x) = e^min(x, 0) / (1 + e^-|x|), so that the quotient of the two has one exponential that may be large.
    """
    small_f, small_i = tl.exp(-tl.abs(f)), tl.exp(-tl.abs(i))
    quotient = tl.exp(tl.where(i < 0.0, i, 0.0) - tl.where(f < 0.0, f, 0.0)) * ((1.0 + small_f) / (1.0 + small_i))
    slope_f = tl.where(f < 0.0, 1.0, small_f) / (1.0 + small_f)
    slope_i = tl.where(i < 0.0, 1.0, small_i) / (1.0 + small_i)
    return 1.0 / (1.0 + quotient), slope_f, slope_i


@triton.jit
def _minlstm_backward(v, c, candidate, slope, skip, d):
    share, slope_f, slope_i = _share(v[0], v[1])
    d_share = d * (c - candidate) * (share * (1.0 - share))
    return (d_share * slope_f, -d_share * slope_i, d * (1.0 - share) * slope), d * share, skip


@triton.jit
def minlstm_forward(v, c, m, skip):
    share, _, _ = _share(v[0], v[1])
    state = v[2] + share * (c - v[2])
    return state, state


@triton.jit
def minlstm_backward(v, c, state, m, skip, dh, dc):
    return _minlstm_backward(v, c, v[2], 1.0, skip, dc + dh)


@triton.jit
def minlstm_g_forward(v, c, m, skip):
    return minlstm_forward((v[0], v[1], _positive(v[2])), c, m, skip)


@triton.jit
def minlstm_g_backward(v, c, state, m, skip, dh, dc):
    return _minlstm_backward(v, c, _positive(v[2]), _positive_slope(v[2]), skip, dc + dh)


CELLS["minlstm"] = Cell(3, biases=3)
CELLS["minlstm_g"] = Cell(3, biases=3)


@triton.jit
def cell_forward(v, c, m, skip, CELL: tl.constexpr):
    if CELL == "sru":
        result = sru_forward(v, c, m, skip)
    elif CELL == "sru_tanh":
        result = sru_tanh_forward(v, c, m, skip)
    elif CELL == "f_pool":
        result = f_pool_forward(v, c, m, skip)
    elif CELL == "fo_pool":
        result = fo_pool_forward(v, c, m, skip)
    elif CELL == "indrnn_relu":
        result = indrnn_relu_forward(v, c, m, skip)
    elif CELL == "indrnn_tanh":
        result = indrnn_tanh_forward(v, c, m, skip)
    elif CELL == "mingru":
        result = mingru_forward(v, c, m, skip)
    elif CELL == "mingru_g":
        result = mingru_g_forward(v, c, m, skip)
    elif CELL == "minlstm":
        result = minlstm_forward(v, c, m, skip)
    elif CELL == "minlstm_g":
        result = minlstm_g_forward(v, c, m, skip)
    else:
        tl.static_assert(False, "no such cell")
    return result


@triton.jit
def cell_backward(v, c, state, m, skip, dh, dc, CELL: tl.constexpr):
    if CELL == "sru":
        result = sru_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "sru_tanh":
        result = sru_tanh_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "f_pool":
        result = f_pool_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "fo_pool":
        result = fo_pool_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "indrnn_relu":
        result = indrnn_relu_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "indrnn_tanh":
        result = indrnn_tanh_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "mingru":
        result = mingru_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "mingru_g":
        result = mingru_g_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "minlstm":
        result = minlstm_backward(v, c, state, m, skip, dh, dc)
    elif CELL == "minlstm_g":
        result = minlstm_g_backward(v, c, state, m, skip, dh, dc)
    else:
        tl.static_assert(False, "no such cell")
    return result
