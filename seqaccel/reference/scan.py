"""Linear scan and the column cells in plain PyTorch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_NARROW = (torch.float16, torch.bfloat16)  # calculated in float32


def _within(cu_seqlens: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Begin and end of each sequence [N], and the sequence of each step [steps]. No value of the offsets is read."""
    between = offsets(cu_seqlens, steps)
    sequences = between.shape[0] - 1
    begin = torch.cat((torch.zeros_like(between[:1]), between[1:-1]))[:sequences]
    end = torch.cat((between[1:-1], torch.full_like(between[:1], steps)))[:sequences]
    time = torch.arange(steps, device=between.device)
    return begin, end, (time[:, None] >= end[:-1]).sum(1)


def restarted(a: Tensor, b: Tensor, h_0: Tensor | None, cu_seqlens: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The steps that begin a sequence [T, 1], and b with the state after such a step in its place."""
    begin, end, sequence = _within(cu_seqlens, a.shape[1])
    time = torch.arange(a.shape[1], device=a.device)
    starts = (time == ((end - 1) if reverse else begin).index_select(0, sequence)).unsqueeze(1)
    return starts, b if h_0 is None else torch.where(starts, a * h_0.index_select(0, sequence) + b, b)


def begins(reset: Tensor, reverse: bool) -> Tensor:
    """The steps [B, T] whose state before, in the order of the run, is zero."""
    if not reverse:
        return reset
    return torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1)


def _at(h: Tensor, index: Tensor, otherwise: Tensor, empty: Tensor) -> Tensor:
    """Rows of h [1, T, D] by index [N]; ``otherwise`` [N, D] where a sequence is empty."""
    if h.shape[1] == 0:
        return otherwise
    rows = h[0].index_select(0, index.clamp(0, h.shape[1] - 1))
    return torch.where(empty.unsqueeze(1), otherwise, rows)


def final_states(h: Tensor, first: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Tensor:
    """The states after the last steps; ``first`` where a sequence has none."""
    if cu_seqlens is not None:
        return last_states(cu_seqlens, first, h[0], reverse)
    return h[:, 0 if reverse else -1] if h.shape[1] else first


def linear_scan(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
    return_last: bool = True,
) -> tuple[Tensor, Tensor]:
    """``h_t = a_t * h_{t-1} + b_t`` (``reverse``: ``a_t * h_{t+1} + b_t``) over dimension 1.

    Args:
        a, b: [B, T, D].
        h_0: [B, D]; zero by default.
        cu_seqlens: [N + 1] int64, where B = 1: sequence n is the steps [cu_seqlens[n], cu_seqlens[n + 1]), and h_0 is
            [N, D].
        reset: [B, T] bool, true where an episode begins: the state before its first step (reversed: after its last) is
            zero.
        reverse: run from the last step to the first.
        return_last: whether the last states are wanted.

    Returns:
        h [B, T, D], and the state after the last step [B, D] or [N, D]; [0, D] where it is not wanted. A sequence
        without steps ends as it began.
    """
    if a.dtype in _NARROW:
        wide = None if h_0 is None else h_0.float()
        h, h_last = linear_scan(a.float(), b.float(), wide, cu_seqlens, reset, reverse, return_last)
        return h.to(a.dtype), h_last.to(a.dtype)
    steps, width = a.shape[1:]
    starts: Sequence[Tensor | None] = [None] * steps
    state = h_0
    if cu_seqlens is not None:
        flags, b = restarted(a, b, h_0, cu_seqlens, reverse)
        state, starts = None, flags.unbind(0)
    elif reset is not None:
        starts = begins(reset, reverse).unsqueeze(-1).unbind(1)
    rows: list[Tensor] = []
    for t in reversed(range(steps)) if reverse else range(steps):
        row = b[:, t] if state is None else a[:, t] * state + b[:, t]
        start = starts[t]
        state = row if start is None else torch.where(start, b[:, t], row)
        rows.append(state)
    states = torch.stack(rows[::-1] if reverse else rows, dim=1) if rows else a * b
    if not return_last:
        return states, states.new_empty(0, width)
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = a.new_zeros(sequences, width) if h_0 is None else h_0.clone()
    return states, final_states(states, first, cu_seqlens, reverse)


def linear_scan_gradients(
    grad_h: Tensor,
    grad_h_last: Tensor | None,
    a: Tensor,
    h: Tensor,
    h_0: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reset: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h_0 from those of ``linear_scan``'s results: a scan against time.

    ::

        grad_b_t = grad_h_t + conj(a_{t+1}) grad_b_{t+1}, and grad_h_last at the last step
        grad_a_t = grad_b_t conj(h_{t-1})      grad_h_0 = conj(a_1) grad_b_1
    """
    if a.dtype in _NARROW:
        first, last = (None if t is None else t.float() for t in (h_0, grad_h_last))
        grads = linear_scan_gradients(grad_h.float(), last, a.float(), h.float(), first, cu_seqlens, reset, reverse)
        return grads[0].to(a.dtype), grads[1].to(a.dtype), grads[2].to(a.dtype)
    steps, width = a.shape[1:]
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    zeros = a.new_zeros(sequences, width)
    grad_last = zeros if grad_h_last is None else grad_h_last
    first = zeros if h_0 is None else h_0
    if steps == 0:
        return a * h, a * h, grad_last
    if cu_seqlens is None:
        rows = torch.arange(a.shape[0], device=a.device)
        begin, end, sequence = rows * steps, (rows + 1) * steps, rows.repeat_interleave(steps)
    else:
        begin, end, sequence = _within(cu_seqlens, steps)
    empty = begin == end
    at_first, at_last = ((end - 1), begin) if reverse else (begin, end - 1)
    time = torch.arange(sequence.shape[0], device=a.device)
    flat = grad_h.reshape(-1, width)
    index = at_last.clamp(0, flat.shape[0] - 1)
    flat = flat.index_add(0, index, grad_last.masked_fill(empty.unsqueeze(1), 0))
    back = 1 if reverse else -1
    coefficient = a.reshape(-1, width).roll(back, 0).conj().reshape(a.shape)
    grad_b = linear_scan(coefficient, flat.reshape(a.shape), None, cu_seqlens, reset, not reverse, False)[0]
    starts = (time == at_first.index_select(0, sequence)).unsqueeze(1)
    previous = torch.where(starts, first.index_select(0, sequence), h.reshape(-1, width).roll(-back, 0))
    through = (a.conj() * grad_b).reshape(1, -1, width)
    if reset is not None:
        apart = begins(reset, reverse).reshape(-1, 1)
        previous, through = torch.where(apart, 0.0, previous), torch.where(apart, 0.0, through)
    grad_h_0 = _at(through, at_first, grad_last, empty)
    return grad_b * previous.conj().reshape(a.shape), grad_b, grad_h_0


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
    """Offsets in ``steps`` steps: one that is out of range counts as the nearest that is not. They are taken to ascend:
    ONNX has no running maximum."""
    return cu_seqlens.clamp(0, steps)


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
        reset: [T, B] bool, true where an episode begins: the state before that step is zero.
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
    packed, fresh = cu_seqlens is not None, torch.zeros_like(c_0)
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
        state = of(fresh[order[:1]] if packed else c_0, d)
        found: list[Tensor] = [state] * steps
        after: list[Tensor] = [state] * steps
        for t in order:
            if reset is not None and t + d < steps:  # against time a sequence begins before the one it meets
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
