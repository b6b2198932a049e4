"""Recurrent layers in plain PyTorch: one layer, one direction.

T time, B batch, I input, H hidden, G gates, P the width of h: H, or the projection's. A cell is a function of
    x        its input projection at one step, without bias (B, G*H),
    h, c     the old state (B, P) and (B, H); c is None where the cell has none,
    weights  of the layer, in the order of ``seqaccel.functional.rnn``; the first is weight_ih,
that returns the new h and c.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Sequence[Any]  # of tensors, None where the layer does without
State = tuple[Tensor, Tensor | None]

EPSILON = 1e-5  # of layer norm

CELLS: dict[str, Callable[..., State]] = {}
CONSTANT_C: set[str] = set()  # cells whose c holds factors that neither a step nor a reset changes
_Update = TypeVar("_Update", bound=Callable[..., State])


def _cell(name: str, constant_c: bool = False) -> Callable[[_Update], _Update]:
    """Enters a function in ``CELLS``."""

    def enter(update: _Update) -> _Update:
        CELLS[name] = update
        if constant_c:
            CONSTANT_C.add(name)
        return update

    return enter


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def _lstm_gates(pre: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The new c and o from the pre-activations (B, 4H) in the order i, f, g, o."""
    i, f, g, o = pre.chunk(4, -1)
    return f.sigmoid() * c + i.sigmoid() * g.tanh(), o.sigmoid()


@_cell("rnn_tanh")
def rnn_tanh_cell(x: Tensor, h: Tensor, c: None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh = weights
    return (_plus(x, bias_ih) + F.linear(h, weight_hh, bias_hh)).tanh(), None


@_cell("rnn_relu")
def rnn_relu_cell(x: Tensor, h: Tensor, c: None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh = weights
    return (_plus(x, bias_ih) + F.linear(h, weight_hh, bias_hh)).relu(), None


@_cell("lstm")
def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh, weight_hr = weights
    c, o = _lstm_gates(_plus(x, bias_ih) + F.linear(h, weight_hh, bias_hh), c)
    h = o * c.tanh()
    return (h if weight_hr is None else F.linear(h, weight_hr)), c


@_cell("gru")
def gru_cell(x: Tensor, h: Tensor, c: None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh = weights
    x_r, x_z, x_n = _plus(x, bias_ih).chunk(3, -1)
    h_r, h_z, h_n = F.linear(h, weight_hh, bias_hh).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (1 - z) * n + z * h, None


@_cell("gru_reset_before")
def gru_reset_before_cell(x: Tensor, h: Tensor, c: None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh = weights
    size = h.shape[-1]
    x = _plus(_plus(x, bias_ih), bias_hh)
    r, z = (x[..., : 2 * size] + F.linear(h, weight_hh[: 2 * size])).sigmoid().chunk(2, -1)
    n = (x[..., 2 * size :] + F.linear(r * h, weight_hh[2 * size :])).tanh()
    return (1 - z) * n + z * h, None


@_cell("peephole_lstm")
def peephole_lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole = weights
    p_i, p_f, p_o = weight_peephole
    i, f, g, o = (_plus(x, bias_ih) + F.linear(h, weight_hh, bias_hh)).chunk(4, -1)
    c = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    h = (o + p_o * c).sigmoid() * c.tanh()
    return (h if weight_hr is None else F.linear(h, weight_hr)), c


def _layer_norm_lstm(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """The new c, normalised, o, and the new c as it is."""
    _, weight_hh, bias_ih, bias_hh, ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias = weights
    pre = _norm(x, ln_ih_weight) + _norm(F.linear(h, weight_hh), ln_hh_weight)
    c, o = _lstm_gates(_plus(_plus(pre, bias_ih), bias_hh), c)
    return _norm(c, ln_c_weight, ln_c_bias), o, c


@_cell("layer_norm_lstm")
def layer_norm_lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> State:
    normalized, o, c = _layer_norm_lstm(x, h, c, weights)
    return o * normalized.tanh(), c


@_cell("layer_norm_lstm_normalized_cell")
def layer_norm_lstm_normalized_cell(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> State:
    normalized, o, _ = _layer_norm_lstm(x, h, c, weights)
    return o * normalized.tanh(), normalized


@_cell("layer_norm_gru")
def layer_norm_gru_cell(x: Tensor, h: Tensor, c: None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh, ln_ih_weight, ln_hh_weight = weights
    a_r, a_z, a_n = _plus(_norm(x, ln_ih_weight), bias_ih).chunk(3, -1)
    d_r, d_z, d_n = _plus(_norm(F.linear(h, weight_hh), ln_hh_weight), bias_hh).chunk(3, -1)
    r, z = (a_r + d_r).sigmoid(), (a_z + d_z).sigmoid()
    n = (a_n + r * d_n).tanh()
    return (1 - z) * n + z * h, None


@_cell("multiplicative_lstm")
def multiplicative_lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: Weights) -> State:
    """x is the projection by weight_ih and weight_mx together (B, 5H)."""
    _, weight_hh, bias_ih, bias_hh, _, weight_mh = weights
    x, x_m = x.split([4 * h.shape[-1], h.shape[-1]], -1)
    m = x_m * F.linear(h, weight_mh)
    c, o = _lstm_gates(_plus(x, bias_ih) + F.linear(m, weight_hh, bias_hh), c)
    return o * c.tanh(), c


def _ligru(pre: Tensor, h: Tensor, mask: Tensor | None, phi: Callable[[Tensor], Tensor]) -> State:
    """``mask`` (B, H): factors of the candidate, the same at every step."""
    a, z = pre.chunk(2, -1)
    z, n = z.sigmoid(), phi(a)
    n = n if mask is None else mask * n
    return z * h + (1 - z) * n, mask


@_cell("ligru_relu")
@_cell("ligru_relu_masked", constant_c=True)
def ligru_relu_cell(x: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh = weights
    return _ligru(_plus(x, bias_ih) + F.linear(h, weight_hh, bias_hh), h, c, torch.relu)


@_cell("ligru_tanh")
@_cell("ligru_tanh_masked", constant_c=True)
def ligru_tanh_cell(x: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> State:
    _, weight_hh, bias_ih, bias_hh = weights
    return _ligru(_plus(x, bias_ih) + F.linear(h, weight_hh, bias_hh), h, c, torch.tanh)


def project(cell: str, input: Tensor, weights: Weights) -> Tensor:
    """The input projections of all steps, without bias (T, B, G*H)."""
    weight_ih = weights[0]
    if weight_ih is None:
        return input
    if cell == "multiplicative_lstm":
        weight_ih = torch.cat((weight_ih, weights[4]))
    return F.linear(input, weight_ih)


def step(
    cell: str,
    h: Tensor,  # (B, P)
    c: Any,  # (B, H) or None
    weights: Weights,
    x: Tensor,  # of ``project``, at this step (B, G*H)
    zoneout_h: Tensor | None = None,  # (B, P) or one element
    zoneout_c: Tensor | None = None,  # (B, H) or one element
    running: Tensor | None = None,  # (B,): which sequences have this step
    begins: Tensor | None = None,  # (B,): which begin with it, from zero
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The new h and c, and the output (B, P)."""
    if begins is not None:
        h = torch.where(begins.unsqueeze(-1), torch.zeros_like(h), h)
        if c is not None and cell not in CONSTANT_C:
            c = torch.where(begins.unsqueeze(-1), torch.zeros_like(c), c)

    def blend(z: Tensor | None, old: Any, new: Any) -> Any:
        if z is None or new is None:
            return new
        z = z.reshape(()) if z.numel() == 1 else z
        return z * old + (1 - z) * new

    h_new, c_new = CELLS[cell](x, h, c, weights)
    h_new, c_new = blend(zoneout_h, h, h_new), blend(zoneout_c, c, c_new)
    if running is None:
        return h_new, c_new, h_new
    running = running.unsqueeze(-1)
    output = torch.where(running, h_new, torch.zeros_like(h_new))
    return torch.where(running, h_new, h), None if c_new is None else torch.where(running, c_new, c), output


def begins(reset: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """Which steps start from a state of zero (T, B), in the direction of a pass, where episodes begin at ``reset``.

    A pass in reverse begins an episode at its last step. Of a sequence's last one it keeps the given state.
    """
    if reverse:
        reset = torch.cat((reset[1:], torch.zeros_like(reset[:1])))
    if lengths is None:
        return reset
    step = torch.arange(reset.shape[0], device=reset.device).unsqueeze(1) + int(reverse)
    return reset & (step < lengths)


def layer(
    cell: str,
    input: Tensor,  # (T, B, I)
    h_0: Tensor,  # (B, P)
    c_0: Tensor | None,  # (B, H)
    weights: Weights,
    lengths: Tensor | None = None,  # (B,)
    zoneout_h: Tensor | None = None,  # (T, B, P) or one element
    zoneout_c: Tensor | None = None,  # (T, B, H) or one element
    reverse: bool = False,
    reset: Tensor | None = None,  # (T, B)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs (T, B, P) and the last h (B, P) and c (B, H).

    Zoneout Z makes each new state Z * old + (1 - Z) * new, the output being the new h so blended. Past a sequence's
    length the output is 0 and the state stays. An episode begins at each step of ``reset``: it sees nothing of the
    steps before, nor of the given state, but for the c of cells in ``CONSTANT_C``.
    """
    steps = input.shape[0]
    projection = project(cell, input, weights).unbind(0)  # whose backward pass is one, not one a step

    starts = None if reset is None else begins(reset, lengths, reverse)

    def at(z: Tensor | None, t: int) -> Tensor | None:
        return z if z is None or z.numel() == 1 else z[t]

    h, c, outputs = h_0, c_0, []
    for t in reversed(range(steps)) if reverse else range(steps):
        running = None if lengths is None else t < lengths
        start = None if starts is None else starts[t]
        h, c, output = step(cell, h, c, weights, projection[t], at(zoneout_h, t), at(zoneout_c, t), running, start)
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if outputs else h_0.new_zeros(0, *h_0.shape)), h, c


def echo_state(
    drive: Tensor,  # (T, B, H): W_in x + b
    h_0: Tensor,  # (B, H)
    rows: Tensor,  # (H + 1,), int32: where each row of W begins in columns and weight
    columns: Tensor,  # (N,), int32
    weight: Tensor,  # (N,)
    leak_rate: float,
    reset: Tensor | None = None,  # (T, B)
) -> Tensor:
    """States (T, B, H) of a reservoir: h = (1 - a) h' + a tanh(drive + W h'). h' is zero at a reset."""
    H, N = drive.shape[2], weight.shape[0]
    units, counts = torch.arange(H, device=drive.device), (rows[1:] - rows[:-1]).long()
    place = torch.repeat_interleave(units, counts, output_size=N) * H + columns
    dense = weight.new_zeros(H * H).index_add(0, place, weight).view(H, H).t()
    h, outputs = h_0, []
    for t, x in enumerate(drive.unbind(0)):
        if reset is not None:
            h = torch.where(reset[t].unsqueeze(-1), torch.zeros_like(h), h)
        h = (1 - leak_rate) * h + leak_rate * torch.tanh(x + h @ dense)
        outputs.append(h)
    return torch.stack(outputs) if outputs else torch.zeros_like(drive)


LECUN_SCALE, LECUN_SLOPE = 1.7159, 0.666
CFC_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "lecun_tanh": lambda v: LECUN_SCALE * torch.tanh(LECUN_SLOPE * v),
    "tanh": torch.tanh,
    "relu": torch.relu,
}


def cfc_step(
    x: Tensor,  # (B, U_0): the input's part of the first product, with its bias
    h: Tensor,  # (B, H)
    weights: Sequence[Tensor],  # (U_i, U_(i-1)), of h first; the last one has the rows of the heads
    biases: Sequence[Tensor],  # (U_i,), of all products but the first
    span: Tensor | None,  # (B,); None: 1
    w: Tensor | None,  # (H,), of the pure solution
    a: Tensor | None,  # (H,)
    mode: str,
    activation: str,
    begins: Tensor | None = None,  # (B,): which begin with this step, from zero
) -> Tensor:
    """The new h of a closed-form continuous-time recurrence."""
    if begins is not None:
        h = torch.where(begins.unsqueeze(-1), torch.zeros_like(h), h)
    v = x + F.linear(h, weights[0])
    for weight, bias in zip(weights[1:], biases, strict=True):
        v = F.linear(CFC_ACTIVATIONS[activation](v), weight, bias)
    s: Any = 1.0 if span is None else span.unsqueeze(-1)
    if mode == "pure":
        assert w is not None and a is not None
        return a - a * torch.exp(-s * (w.abs() + v.abs())) * v
    f, g, v_a, v_b = v.chunk(4, -1)
    f, g, t = f.tanh(), g.tanh(), (s * v_a + v_b).sigmoid()
    return f + t * g if mode == "no_gate" else f * (1 - t) + t * g


def cfc(
    x: Tensor,  # (T, B, U_0)
    h_0: Tensor,  # (B, H)
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    timespans: Tensor | None,  # (T, B)
    w: Tensor | None,
    a: Tensor | None,
    mode: str,
    activation: str,
    reset: Tensor | None = None,  # (T, B)
) -> Tensor:
    """Outputs (T, B, H). The h before a step of ``reset`` is zero."""
    h, outputs = h_0, []
    spans, begins = ([None] * x.shape[0] if t is None else t.unbind(0) for t in (timespans, reset))
    for x_t, span, start in zip(x.unbind(0), spans, begins, strict=True):
        h = cfc_step(x_t, h, weights, biases, span, w, a, mode, activation, start)
        outputs.append(h)
    return torch.stack(outputs) if outputs else h_0.new_zeros(0, *h_0.shape)
