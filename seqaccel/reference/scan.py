"""Linear scan and the column cells in plain PyTorch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, h_0: Tensor | None = None, reverse: bool = False) -> Tensor:
    """``h_t = a_t * h_{t-1} + b_t`` (``reverse``: ``a_t * h_{t+1} + b_t``) over dimension 1.

    Args:
        a, b: [B, T, D].
        h_0: [B, D]; zero by default.
        reverse: run from the last step to the first.

    Returns:
        h [B, T, D].
    """
    steps = list(zip(a.unbind(1), b.unbind(1), strict=True))
    h = h_0
    rows: list[Tensor] = []
    for a_t, b_t in reversed(steps) if reverse else steps:
        h = b_t if h is None else a_t * h + b_t
        rows.append(h)
    if not rows:
        return a * b
    return torch.stack(rows[::-1] if reverse else rows, dim=1)


def linear_scan_gradients(
    grad_h: Tensor, a: Tensor, h: Tensor, h_0: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h_0 [B, D] from that of ``h = linear_scan(a, b, h_0, reverse)``: a scan against time."""
    steps, zeros = a.shape[1], torch.zeros_like(a[:, :1])
    edge = a.new_zeros(a.shape[0], a.shape[2]) if h_0 is None else h_0
    if reverse:
        a_next, h_prev = torch.cat((zeros, a[:, :-1]), 1), torch.cat((h[:, 1:], edge.unsqueeze(1)), 1)
    else:
        a_next, h_prev = torch.cat((a[:, 1:], zeros), 1), torch.cat((edge.unsqueeze(1), h[:, :-1]), 1)
    grad_b = linear_scan(a_next, grad_h, None, not reverse)
    through = a * grad_b
    return grad_b * h_prev[:, :steps], grad_b, (through[:, -1:] if reverse else through[:, :1]).sum(1)


Rows = Sequence[Any]  # of one kind: inputs, recurrent weights or biases; 0 where there are none


def _sru(u: Rows, c: Tensor, weight: Rows, bias: Rows, x: Any, mask: Any, scale: Any, tanh: bool = False) -> Any:
    """Lei et al. 2018: x is the skip term, unless u holds it; mask multiplies r, scale x."""
    forget = torch.sigmoid(u[1] + weight[0] * c + bias[0])
    reset = torch.sigmoid(u[2] + weight[1] * c + bias[1])
    c = u[0] + forget * (c - u[0])
    activated = torch.tanh(c) if tanh else c
    reset = reset if mask is None else reset * mask
    skip = u[3] if len(u) == 4 else x if x is None or scale is None else x * scale
    return (reset * activated if skip is None else skip + reset * (activated - skip)), c


def _f_pool(u: Rows, c: Tensor, weight: Rows, bias: Rows, x: Any, mask: Any, scale: Any) -> Any:
    """Bradbury et al. 2017: mask (zoneout) and scale multiply 1 - f."""
    keep = torch.sigmoid(-(u[1] + bias[1]))
    keep = keep if mask is None else keep * mask
    keep = keep if scale is None else keep * scale
    c = c + keep * (torch.tanh(u[0] + bias[0]) - c)
    return c, c


def _fo_pool(u: Rows, c: Tensor, weight: Rows, bias: Rows, x: Any, mask: Any, scale: Any) -> Any:
    c, _ = _f_pool(u, c, weight, bias, x, mask, scale)
    return torch.sigmoid(u[2] + bias[2]) * c, c


def _indrnn(activation: Callable[[Tensor], Tensor], u: Rows, h: Tensor, weight: Rows, bias: Rows, *_: Any) -> Any:
    """Li et al. 2018."""
    h = activation(u[0] + weight[0] * h + bias[0])
    return h, h


def _linear(v: Tensor) -> Tensor:
    return v


def _g(v: Tensor) -> Tensor:
    """Positive for every v, continuous, and about linear in v where that is large."""
    return torch.where(v >= 0, v + 0.5, torch.sigmoid(v))


def _mingru(candidate: Callable[[Tensor], Tensor], u: Rows, h: Tensor, weight: Rows, bias: Rows, *_: Any) -> Any:
    """Feng et al. 2024."""
    h = h + torch.sigmoid(u[0] + bias[0]) * (candidate(u[1] + bias[1]) - h)
    return h, h


def _minlstm(candidate: Callable[[Tensor], Tensor], u: Rows, h: Tensor, weight: Rows, bias: Rows, *_: Any) -> Any:
    """Feng et al. 2024: the share i / (f + i) of the gates, from their logarithms."""
    log_forget, log_input = (torch.nn.functional.logsigmoid(u[i] + bias[i]) for i in (0, 1))
    h = h + torch.sigmoid(log_input - log_forget) * (candidate(u[2] + bias[2]) - h)
    return h, h


class Cell(NamedTuple):
    """A cell: one step from (inputs, state, recurrent weights, biases, x, mask, scale) to (output, state)."""

    step: Callable[..., tuple[Tensor, Tensor]]
    weights: int  # rows
    biases: int


COLUMN_CELLS = {
    "sru": Cell(_sru, 2, 2),
    "sru_tanh": Cell(functools.partial(_sru, tanh=True), 2, 2),
    "fo_pool": Cell(_fo_pool, 0, 3),
    "f_pool": Cell(_f_pool, 0, 2),
    "indrnn_relu": Cell(functools.partial(_indrnn, torch.relu), 1, 1),
    "indrnn_tanh": Cell(functools.partial(_indrnn, torch.tanh), 1, 1),
    "mingru": Cell(functools.partial(_mingru, _linear), 0, 2),
    "mingru_g": Cell(functools.partial(_mingru, _g), 0, 2),
    "minlstm": Cell(functools.partial(_minlstm, _linear), 0, 3),
    "minlstm_g": Cell(functools.partial(_minlstm, _g), 0, 3),
}


def offsets(cu_seqlens: Tensor, steps: int) -> Tensor:
    """Ascending offsets in ``steps`` steps: one that is out of range or order counts as the nearest that is not."""
    return cu_seqlens.clamp(0, steps).cummax(0).values


def packed_steps(
    cu_seqlens: Tensor, c_0: Tensor, mask: Tensor | None, steps: int
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """What packed sequences are as one: the state [T, C] that each step's sequence begins with and its mask [T, 1, C],
    mask_pad [T, 1] outside of them and reset [T, 1]."""
    ends, step = offsets(cu_seqlens, steps), torch.arange(steps, device=cu_seqlens.device)
    sequence = (step[:, None] >= ends[1:]).sum(1).clamp(max=ends.shape[0] - 2)
    outside = (step < ends[0]) | (step >= ends[-1])
    begins = torch.cat([sequence[:1] < 0, sequence[1:] != sequence[:-1]])
    if mask is not None and mask.dim() == 2:
        mask = mask[sequence].unsqueeze(1)
    return c_0[sequence], mask, outside.unsqueeze(1), begins.unsqueeze(1)


def last_states(cu_seqlens: Tensor, c_0: Tensor, c: Tensor, against_time: bool) -> Tensor:
    """The last states [N, C] of packed sequences, from the states c [T, C]."""
    steps = c.shape[0]
    ends = offsets(cu_seqlens, steps)
    last = torch.cat([c, c_0[:1]])[ends[:-1] if against_time else ends[1:] - 1]
    return torch.where((ends[1:] == ends[:-1])[:, None], c_0, last)


def _rows_of_steps(t: Tensor | None, rows: int, d: int, directions: int, hidden: int, steps: int) -> list[Rows]:
    """The rows of one direction's weight or bias at each step."""
    if t is None:
        return [[0.0] * rows] * steps
    if t.dim() == 3:
        return [step.unbind(-1) for step in t.unflatten(2, (directions, hidden, rows))[:, :, d].unbind(0)]
    return [t.reshape(rows, directions, hidden)[:, d].unbind(0)] * steps


def columns(
    cell: str,
    u: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    c_0: Tensor,
    mask: Tensor | None = None,
    scale: Tensor | None = None,
    mask_pad: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    directions: int = 1,
) -> tuple[Tensor, Tensor]:
    """A recurrence that is elementwise in its state (``COLUMN_CELLS``), after its matrix product u over all steps.

    C = directions * H channels. Narrow types are calculated in float32.

    Args:
        cell: a key of ``COLUMN_CELLS``.
        u: [T, B, C * K], viewed [T, B, directions, K, H] (SRU: [T, B, directions, H, K]).
        x: [T, B, C], the skip term of SRU.
        weight: [rows * C], viewed [rows, directions, H]: what multiplies the state. SRU also takes weights of each
            step [T, B, C * 2], viewed [T, B, directions, H, 2].
        bias: [rows * C], viewed [rows, directions, H].
        c_0: [B, C], the state before the first step; [N, C] with cu_seqlens.
        mask: SRU: [B, C] ([N, C] with cu_seqlens); the pools: [T, B, C].
        scale: [1].
        mask_pad: [T, B] bool, true at padding, where the state is carried over and h is 0.
        reset: [T, B] bool, true where a sequence begins: the state before that step is c_0's row.
        cu_seqlens: [N + 1], offsets of N sequences in T steps of B = 1; h is 0 outside of them.
        directions: 2 runs the second half of the channels against time.

    Returns:
        h [T, B, C] and the last state c_n, like c_0.
    """
    steps, batch, features = u.shape
    channels = c_0.shape[-1]
    hidden, dtype = channels // directions, u.dtype
    if dtype in (torch.float16, torch.bfloat16):
        u, c_0 = u.float(), c_0.float()
        x, weight, bias, mask, scale = (t if t is None else t.float() for t in (x, weight, bias, mask, scale))
    if cell.startswith("sru"):
        parts = u.reshape(steps, batch, directions, hidden, features // channels).unbind(-1)
    else:
        parts = u.reshape(steps, batch, directions, features // channels, hidden).unbind(3)
    packed, fresh = cu_seqlens is not None, c_0
    if cu_seqlens is not None:
        fresh, mask, mask_pad, reset = packed_steps(cu_seqlens, c_0, mask, steps)

    def of(t: Tensor, d: int) -> Tensor:
        """The direction's channels."""
        return t[..., d * hidden : (d + 1) * hidden]

    step, weight_rows, bias_rows = COLUMN_CELLS[cell]
    outputs, states = [], []
    for d in range(directions):
        weights = _rows_of_steps(weight, weight_rows, d, directions, hidden, steps)
        biases = _rows_of_steps(bias, bias_rows, d, directions, hidden, steps)
        order = list(range(steps) if d == 0 else reversed(range(steps)))
        state = of(fresh[order[:1]] if packed else fresh, d)
        found: list[Tensor] = [state] * steps
        after: list[Tensor] = [state] * steps
        for t in order:
            if reset is not None and 0 < t + d < steps:  # against time a sequence begins before the one it meets
                state = torch.where(reset[t + d, :, None], of(fresh[t : t + 1] if packed else fresh, d), state)
            h, new = step(
                [part[t, :, d] for part in parts],
                state,
                weights[t],
                biases[t],
                None if x is None else of(x[t], d),
                None if mask is None else of(mask[t] if mask.dim() == 3 else mask, d),
                scale,
            )
            if mask_pad is not None:
                padding = mask_pad[t, :, None]
                new, h = torch.where(padding, state, new), torch.where(padding, torch.zeros_like(h), h)
            state = new
            found[t], after[t] = h, state
        outputs.append(torch.stack(found) if steps else of(u, 0))
        if cu_seqlens is not None:
            state = last_states(cu_seqlens, of(c_0, d), torch.cat([*after, of(c_0[:0], d)]), d == 1)
        states.append(state)
    return torch.cat(outputs, -1).to(dtype), torch.cat(states, -1).to(dtype)
