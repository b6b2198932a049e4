"""The recurrent cells, each once: its update, its derivative, and the traits that the loops need.

A cell works on float32 tiles of any shape whose last axis is hidden units, so that one definition serves the kernels of
one step and those of all steps:

    forward(x, r, h, c, v, mask, H) -> (s, fresh, c, h)
        x, r   tuples, a tile a gate: W_ih x + b, and the recurrent product with what is added to it
        h, c   the state before the step
        v      tuple of the cell's own weights of a unit: peepholes, or scale and shift of a layer norm
        s      tuple of what the derivative needs: activated gates
        fresh  c as it is before a layer norm of the carried c
    backward(s, h_new, h, fresh, c, v, dh, dc, mask, H) -> (dx, dr, dh_prev, dc_prev, dy)
        dx, dr gradients of x and r;  dh_prev: of h, but for what goes through r
        dy     gradient of what the layer norm of c gives

Cells without c return h in its place. Zoneout, lengths and projections are the loops' (``step.py``).
"""

import dataclasses
from typing import Any

import triton
import triton.language as tl

from seqaccel.kernels._math import sigmoid, tanh

EPSILON = tl.constexpr(1e-5)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What the loops need to know of a cell.

    Args:
        forward, backward: the update and its derivative.
        gates: G, the rows of weight_hh in units of H.
        saved: tiles of s.
        has_c: the state has a c.
        constant_c: c holds factors that neither a step nor a reset changes.
        uses_output: the derivative needs h_new.
        uses_h: it needs h.
        separate: dr is not dx.
        norm: the input projection and the recurrent product are layer-normalised.
        carries: the carried c is not ``fresh``.
        vectors: tiles of v.
        first: gates before this one have no part in the last product (theirs is a product before it).
        projects: it may have weight_hr.
        multiplies: the last product's operand is W_mx x times W_mh h'.
        persistent: the persistent kernels have it.
        given: weight_ih may be missing: the input is W_ih x itself.
        weights: shapes of the weights, a letter a dimension: G for G * H, H, I, P, or a number. Biases and weight_hr
            may be None.
    """

    forward: Any
    backward: Any
    gates: int = 4
    saved: int = 4
    has_c: bool = True
    constant_c: bool = False
    uses_output: bool = False
    uses_h: bool = False
    separate: bool = False
    norm: bool = False
    carries: bool = False
    vectors: int = 0
    first: int = 0
    projects: bool = False
    multiplies: bool = False
    persistent: bool = False
    given: bool = False
    weights: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        own: tuple[str, ...] = ("PH",) * self.projects + ("HI", "HH") * self.multiplies
        if self.norm:
            own += ("G", "G") + ("H",) * self.vectors
        elif self.vectors:
            own += (f"{self.vectors}H",)
        object.__setattr__(self, "weights", ("GI", "GP", "G", "G", *own))


#: The cells by name. Each row stands behind the two functions that it names.
CELLS: dict[str, Cell] = {}
_RNN: dict[str, Any] = {"gates": 1, "saved": 0, "has_c": False, "uses_output": True, "persistent": True}
_GRU: dict[str, Any] = {"gates": 3, "has_c": False, "uses_h": True}


# ---- layer norm of a row that a tuple of [H] tiles holds together ----


@triton.jit
def normalize(b, mask, H):
    """x_hat = (x - mean) / sqrt(variance + 1e-5) over all tiles of b, and 1 / sqrt(...). Masked units hold 0."""
    total = tl.sum(b[0])
    for k in tl.static_range(1, len(b)):
        total += tl.sum(b[k])
    mean = total / (len(b) * H)
    hat = ()
    for k in tl.static_range(len(b)):
        hat += (tl.where(mask, b[k] - mean, 0.0),)
    square = tl.sum(hat[0] * hat[0])
    for k in tl.static_range(1, len(b)):
        square += tl.sum(hat[k] * hat[k])
    rstd = 1.0 / tl.sqrt(square / (len(b) * H) + EPSILON)
    scaled = ()
    for k in tl.static_range(len(b)):
        scaled += (hat[k] * rstd,)
    return scaled, rstd


@triton.jit
def normalize_backward(hat, rstd, d, mask, H):
    """Gradient of x from d, that of x_hat: rstd (d - mean(d) - x_hat mean(d x_hat)). Masked units of d hold 0."""
    total = tl.sum(d[0])
    dot = tl.sum(d[0] * hat[0])
    for k in tl.static_range(1, len(d)):
        total += tl.sum(d[k])
        dot += tl.sum(d[k] * hat[k])
    total, dot = total / (len(d) * H), dot / (len(d) * H)
    b = ()
    for k in tl.static_range(len(d)):
        b += (tl.where(mask, rstd * (d[k] - total - hat[k] * dot), 0.0),)
    return b


# ---- h = phi(x + r) ----


@triton.jit
def rnn_tanh_forward(x, r, h, c, v, mask, H):
    h = tanh(x[0] + r[0])
    return (), h, h, h


@triton.jit
def rnn_tanh_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    d = dh * (1.0 - h_new * h_new)
    return (d,), (d,), tl.zeros_like(dh), dc, dc


@triton.jit
def rnn_relu_forward(x, r, h, c, v, mask, H):
    h = x[0] + r[0]
    h = tl.where(h < 0.0, 0.0, h)
    return (), h, h, h


@triton.jit
def rnn_relu_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    d = tl.where(h_new <= 0.0, 0.0, dh)
    return (d,), (d,), tl.zeros_like(dh), dc, dc


CELLS["rnn_tanh"] = Cell(rnn_tanh_forward, rnn_tanh_backward, **_RNN)
CELLS["rnn_relu"] = Cell(rnn_relu_forward, rnn_relu_backward, **_RNN)


# ---- i, f, o = sigmoid(x + r), g = tanh(x + r);  c = f c' + i g;  h = o tanh(c).  Gates in the order i, f, g, o ----


@triton.jit
def lstm_gates(x, r):
    return sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1]), tanh(x[2] + r[2]), sigmoid(x[3] + r[3])


@triton.jit
def lstm_gates_backward(s, c, tanh_c, dh, dc):
    """Gradients of the four pre-activations; dc is that of the new c, tanh_c what o multiplies."""
    i, f, g, o = s[0], s[1], s[2], s[3]
    return dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g), dh * tanh_c * o * (1.0 - o)


@triton.jit
def lstm_forward(x, r, h, c, v, mask, H):
    s = lstm_gates(x, r)
    c = s[1] * c + s[0] * s[2]
    return s, c, c, s[3] * tanh(c)


@triton.jit
def lstm_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    tanh_c = tanh(fresh)
    dc += dh * s[3] * (1.0 - tanh_c * tanh_c)
    d = lstm_gates_backward(s, c, tanh_c, dh, dc)
    return d, d, tl.zeros_like(dh), dc * s[1], dc


CELLS["lstm"] = Cell(lstm_forward, lstm_backward, projects=True, persistent=True)
CELLS["multiplicative_lstm"] = Cell(lstm_forward, lstm_backward, multiplies=True)


# ---- peepholes v = p_i, p_f, p_o: i and f also see p c', o sees p_o c ----


@triton.jit
def peephole_lstm_forward(x, r, h, c, v, mask, H):
    i, f = sigmoid(x[0] + r[0] + v[0] * c), sigmoid(x[1] + r[1] + v[1] * c)
    g = tanh(x[2] + r[2])
    c = f * c + i * g
    o = sigmoid(x[3] + r[3] + v[2] * c)
    return (i, f, g, o), c, c, o * tanh(c)


@triton.jit
def peephole_lstm_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    tanh_c = tanh(fresh)
    do = dh * tanh_c * s[3] * (1.0 - s[3])
    dc += dh * s[3] * (1.0 - tanh_c * tanh_c) + do * v[2]
    d = lstm_gates_backward(s, c, tanh_c, dh, dc)
    return d, d, tl.zeros_like(dh), dc * s[1] + d[0] * v[0] + d[1] * v[1], dc


CELLS["peephole_lstm"] = Cell(peephole_lstm_forward, peephole_lstm_backward, vectors=3, projects=True, persistent=True)


# ---- layer norm of c, v = scale, shift: h = o tanh(LN(c)); the carried c is c, or LN(c) ----


@triton.jit
def layer_norm_lstm_forward(x, r, h, c, v, mask, H):
    s = lstm_gates(x, r)
    c = tl.where(mask, s[1] * c + s[0] * s[2], 0.0)
    hat, _ = normalize((c,), mask, H)
    return s, c, c, s[3] * tanh(hat[0] * v[0] + v[1])


@triton.jit
def layer_norm_lstm_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    hat, rstd = normalize((fresh,), mask, H)
    tanh_c = tanh(hat[0] * v[0] + v[1])
    dy = dh * s[3] * (1.0 - tanh_c * tanh_c)
    dc += normalize_backward(hat, rstd, (dy * v[0],), mask, H)[0]
    d = lstm_gates_backward(s, c, tanh_c, dh, dc)
    return d, d, tl.zeros_like(dh), dc * s[1], dy


CELLS["layer_norm_lstm"] = Cell(layer_norm_lstm_forward, layer_norm_lstm_backward, norm=True, vectors=2)


@triton.jit
def layer_norm_lstm_normalized_cell_forward(x, r, h, c, v, mask, H):
    s = lstm_gates(x, r)
    fresh = tl.where(mask, s[1] * c + s[0] * s[2], 0.0)
    hat, _ = normalize((fresh,), mask, H)
    c = hat[0] * v[0] + v[1]
    return s, fresh, c, s[3] * tanh(c)


@triton.jit
def layer_norm_lstm_normalized_cell_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    hat, rstd = normalize((fresh,), mask, H)
    tanh_c = tanh(hat[0] * v[0] + v[1])
    dy = dc + dh * s[3] * (1.0 - tanh_c * tanh_c)
    dc = normalize_backward(hat, rstd, (dy * v[0],), mask, H)[0]
    d = lstm_gates_backward(s, c, tanh_c, dh, dc)
    return d, d, tl.zeros_like(dh), dc * s[1], dy


CELLS["layer_norm_lstm_normalized_cell"] = Cell(
    layer_norm_lstm_normalized_cell_forward,
    layer_norm_lstm_normalized_cell_backward,
    norm=True,
    vectors=2,
    carries=True,
)


# ---- r, z = sigmoid(x + r);  n = tanh(x + r r_n);  h = (1 - z) n + z h'.  Gates in the order r, z, n ----


@triton.jit
def gru_forward(x, r, h, c, v, mask, H):
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    h = n + z * (h - n)
    return (reset, z, n, r[2]), h, h, h


@triton.jit
def gru_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    reset, z, n, r_n = s[0], s[1], s[2], s[3]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    dz = dh * (h - n) * z * (1.0 - z)
    d_reset = dn * r_n * reset * (1.0 - reset)
    return (d_reset, dz, dn), (d_reset, dz, dn * reset), dh * z, dc, dc


CELLS["gru"] = Cell(gru_forward, gru_backward, **_GRU, separate=True, persistent=True)
CELLS["layer_norm_gru"] = Cell(gru_forward, gru_backward, **_GRU, separate=True, norm=True)


# ---- n = tanh(x + W_hn (r h')): r and z come activated, r[0] is the product behind r h' ----


@triton.jit
def gru_reset_before_forward(x, r, h, c, v, mask, H):
    n = tanh(x[2] + r[0])
    h = n + x[1] * (h - n)
    return (x[0], x[1], n), h, h, h


@triton.jit
def gru_reset_before_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    z, n = s[1], s[2]
    dn = dh * (1.0 - z) * (1.0 - n * n)
    return (tl.zeros_like(dn), dh * (h - n) * z * (1.0 - z), dn), (dn,), dh * z, dc, dc


CELLS["gru_reset_before"] = Cell(gru_reset_before_forward, gru_reset_before_backward, **_GRU, saved=3, first=2)


# ---- z = sigmoid(x_z + r_z), n = phi(x_a + r_a);  h = z h' + (1 - z) n, or n times c, which no step changes ----


@triton.jit
def ligru_relu_forward(x, r, h, c, v, mask, H):
    n, z = x[0] + r[0], sigmoid(x[1] + r[1])
    n = tl.where(n < 0.0, 0.0, n)
    h = z * h + (1.0 - z) * n
    return (n, z), h, h, h


@triton.jit
def ligru_relu_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    n, z = s[0], s[1]
    d = tl.where(n <= 0.0, 0.0, dh * (1.0 - z)), dh * (h - n) * z * (1.0 - z)
    return d, d, dh * z, dc, dc


@triton.jit
def ligru_relu_masked_forward(x, r, h, c, v, mask, H):
    n, z = x[0] + r[0], sigmoid(x[1] + r[1])
    n = tl.where(n < 0.0, 0.0, n)
    return (n, z), c, c, z * h + (1.0 - z) * (c * n)


@triton.jit
def ligru_relu_masked_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    n, z = s[0], s[1]
    d = tl.where(n <= 0.0, 0.0, dh * (1.0 - z) * c), dh * (h - c * n) * z * (1.0 - z)
    return d, d, dh * z, dc + dh * (1.0 - z) * n, dc


@triton.jit
def ligru_tanh_forward(x, r, h, c, v, mask, H):
    n, z = tanh(x[0] + r[0]), sigmoid(x[1] + r[1])
    h = z * h + (1.0 - z) * n
    return (n, z), h, h, h


@triton.jit
def ligru_tanh_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    n, z = s[0], s[1]
    d = dh * (1.0 - z) * (1.0 - n * n), dh * (h - n) * z * (1.0 - z)
    return d, d, dh * z, dc, dc


@triton.jit
def ligru_tanh_masked_forward(x, r, h, c, v, mask, H):
    n, z = tanh(x[0] + r[0]), sigmoid(x[1] + r[1])
    return (n, z), c, c, z * h + (1.0 - z) * (c * n)


@triton.jit
def ligru_tanh_masked_backward(s, h_new, h, fresh, c, v, dh, dc, mask, H):
    n, z = s[0], s[1]
    d = dh * (1.0 - z) * c * (1.0 - n * n), dh * (h - c * n) * z * (1.0 - z)
    return d, d, dh * z, dc + dh * (1.0 - z) * n, dc


_LIGRU: dict[str, Any] = {"gates": 2, "saved": 2, "uses_h": True, "given": True}
CELLS["ligru_relu"] = Cell(ligru_relu_forward, ligru_relu_backward, has_c=False, **_LIGRU)
CELLS["ligru_relu_masked"] = Cell(ligru_relu_masked_forward, ligru_relu_masked_backward, constant_c=True, **_LIGRU)
CELLS["ligru_tanh"] = Cell(ligru_tanh_forward, ligru_tanh_backward, has_c=False, **_LIGRU)
CELLS["ligru_tanh_masked"] = Cell(ligru_tanh_masked_forward, ligru_tanh_masked_backward, constant_c=True, **_LIGRU)
