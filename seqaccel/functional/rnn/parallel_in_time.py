"""A recurrence solved for all time steps at once, by sweeps that each use the states of the one before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqaccel import _arguments
from seqaccel.functional.rnn import _functions
from seqaccel.functional.rnn.stability import cell_of
from seqaccel.functional.scan import linear_scan

__all__ = ["Sweeps", "parallel_in_time"]


class Sweeps(NamedTuple):
    """What :func:`parallel_in_time` did in one layer: sweeps over all steps, and chunks that ran step by step."""

    sweeps: int
    chunks_redone: int


def _sweep(cell: str, h: Tensor, projected: Tensor, h_0: Tensor, c_0: Tensor, weight: Tensor, bias: Tensor) -> Any:
    """h and, of an LSTM, c at every step (T, B, H), by the gates of the given h; r multiplies ``bias`` in a GRU."""
    before = torch.cat([h_0.unsqueeze(0), h[:-1]])
    if cell == "lstm":
        i, f, g, o = (projected + before @ weight.t()).chunk(4, -1)
        c = linear_scan(f.sigmoid(), i.sigmoid() * g.tanh(), c_0, dim=0)
        return o.sigmoid() * c.tanh(), c
    if cell.startswith("rnn"):
        sums = projected + before @ weight.t()
        return (sums.tanh() if cell == "rnn_tanh" else sums.relu()), None
    gates, candidate = projected.split([2 * h.shape[-1], h.shape[-1]], -1)
    of_gates, of_candidate = weight.split([2 * h.shape[-1], h.shape[-1]])
    if cell == "gru":
        r, z = (gates + before @ of_gates.t()).sigmoid().chunk(2, -1)
        n = (candidate + r * (before @ of_candidate.t() + bias)).tanh()
    else:
        r, z = (gates + before @ of_gates.t()).sigmoid().chunk(2, -1)
        n = (candidate + (r * before) @ of_candidate.t() + bias).tanh()
    return linear_scan(z, (1 - z) * n, h_0, dim=0), None


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


class _Solution(torch.autograd.Function):
    """h at every step and the last c, from h and c as they were found. The gradient solves the adjoint equation
    u = grad + J^T u, J being the derivative of a sweep by the states it is given, by sweeps too."""

    @staticmethod
    def forward(ctx, cell, tolerance, h, c, *operands):
        ctx.save_for_backward(h, *operands)
        ctx.cell, ctx.tolerance = cell, tolerance
        return h.clone(), h.new_empty(0) if c is None else c[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_h, grad_c):
        h, *operands = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            new, c = _sweep(ctx.cell, h, *operands)
            outputs, rest = ([new], []) if c is None else ([new, c[-1]], [grad_c])
        # The error of u after a sweep is about that of its change, as the size of the gradient goes.
        scale = ctx.tolerance * float(grad_h.abs().max())
        u = grad_h
        for _ in range(len(h)):
            (through,) = torch.autograd.grad(outputs, h, [u, *rest], retain_graph=True)
            changed, u = _gap(u, grad_h + through), grad_h + through
            if changed <= scale:
                break
        grads = torch.autograd.grad(outputs, operands, [u, *rest], allow_unused=True)
        return None, None, None, None, *grads


def _certify(
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    h: Tensor,
    c: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    tolerance: float,
    chunk: int,
) -> tuple[Tensor, int]:
    """h from the true recurrence in chunks, each begun at what was found for the step before it; a chunk is run again
    where the one before it ends elsewhere. ``c`` is h for cells without."""
    length, batch = x.shape[:2]
    n, whole = length // chunk, length // chunk * chunk
    parts = []
    ends: list[tuple[Tensor, Tensor]] = []
    starts = [(h_0, c_0), *((h[i - 1], c[i - 1]) for i in range(chunk, length, chunk))]
    if n > 0:
        at_once = x[:whole].view(n, chunk, batch, -1).transpose(0, 1).flatten(1, 2)
        first = [torch.cat(part) for part in zip(*starts[:n], strict=True)]
        y, h_n, c_n = run(at_once, *first)
        parts = list(y.view(chunk, n, batch, -1).unbind(1))
        ends = list(zip(h_n.split(batch), c_n.split(batch), strict=True))
    if whole < length:
        y, h_n, c_n = run(x[whole:], *starts[n])
        parts.append(y)
        ends.append((h_n, c_n))
    redone = 0
    fine = []  # whether a chunk's start is where the one before it ends; asked at once, for a GPU waits for an answer
    if len(parts) > 1:
        found, wanted = (torch.stack([torch.stack(pair) for pair in each]) for each in (ends[:-1], starts[1:]))
        fine = ((found - wanted).abs().flatten(1).amax(1) <= tolerance).tolist()
    for i in range(1, len(parts)):
        if not fine[i - 1]:
            parts[i], h_n, c_n = run(x[i * chunk : i * chunk + len(parts[i])], *ends[i - 1])
            ends[i] = (h_n, c_n)
            redone += 1
            if i + 1 < len(parts):
                fine[i] = max(_gap(a, b) for a, b in zip(ends[i], starts[i + 1], strict=True)) <= tolerance
    return torch.cat(parts), redone


def _layer(
    cell: str, x: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor], tolerance: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Sweeps]:
    weight_ih, weight_hh, *biases = weights
    bias, inner = None, x.new_zeros(())  # a GRU's bias that r multiplies
    if biases:
        bias_ih, bias_hh = biases
        if cell == "gru":
            count = 2 * h_0.shape[-1]
            bias, inner = bias_ih + F.pad(bias_hh[:count], (0, count // 2)), bias_hh[count:]
        else:
            bias = bias_ih + bias_hh
    operands = (F.linear(x, weight_ih, bias), h_0, c_0, weight_hh, inner)
    with torch.no_grad():
        h, c = h_0.new_zeros(len(x), *h_0.shape), None
        sweeps, gap = 0, math.inf
        while sweeps < len(x) and not gap <= tolerance:
            before = h
            h, c = _sweep(cell, h, *operands)
            sweeps, gap = sweeps + 1, _gap(h, before)

        def run(x: Tensor, h_0: Tensor, c_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if cell == "lstm":
                y, state = _functions.lstm(x, (h_0, c_0), *weights)
                return y, *state
            if cell.startswith("rnn"):
                y, h_n = _functions.rnn(x, h_0, *weights, nonlinearity=cell[4:])
            else:
                y, h_n = _functions.gru(x, h_0, *weights, reset_after=cell == "gru")
            return y, h_n, h_n

        h, redone = _certify(run, x, h, h if c is None else c, h_0, c_0, tolerance, chunk)
        if cell == "lstm":
            _, c = _sweep(cell, h, *operands)
    h, c_n = _Solution.apply(cell, tolerance, h, c, *operands)
    return h, h[-1], c_n, Sweeps(sweeps, redone)


def parallel_in_time(
    module: Any, x: Tensor, tolerance: float, hx: Any = None, *, chunk: int = 64
) -> tuple[Tensor, Any, list[Sweeps]]:
    r"""A recurrent layer over a sequence without running it step by step.

    A sweep computes the gates of all steps from the states h of the sweep before, in one product, and then c (of a GRU:
    h) by one linear scan. Sweeps go on until no h changes by more than ``tolerance``. Then the true recurrence runs in
    chunks side by side, each from the state found for its start. A chunk counts if the one before it ends within
    ``tolerance`` of that state, else it runs again from that end. So each chunk of the output is exact but for
    a start that is off by ``tolerance`` or less.

    A net that forgets needs few sweeps, whatever the length: a GPU with a long sequence and a small batch gains, a CPU
    loses. The gradient solves the adjoint equation by sweeps of the same kind, to ``tolerance`` times the largest
    gradient of an output.

    Args:
        module: RNN, LSTM or GRU of ``seqaccel.nn`` or ``torch.nn``, in one direction, of any number of layers.
        x: (T, B, I), or (B, T, I) if the module has ``batch_first=True``.
        tolerance: the largest change of h in the last sweep; rounding sets a limit, about 1e-6 for float32.
        hx: the state before the first step, as the module takes it. Default: zero
        chunk: steps of a chunk. Default: 64

    Returns:
        The output and the last state, as the module returns them, and a :class:`Sweeps` for each layer.

    Raises:
        TypeError, ValueError: an argument does not fit, or the module is none of these.

    Example:
        >>> import torch, seqaccel
        >>> lstm, x = seqaccel.nn.LSTM(3, 4), torch.rand(200, 1, 3)
        >>> y, state, (sweeps,) = seqaccel.functional.parallel_in_time(lstm, x, 1e-6)
        >>> torch.allclose(y, lstm(x)[0], atol=1e-5), sweeps.sweeps < 100
        (True, True)
    """
    where = "parallel_in_time"
    cell = cell_of(where, module)
    _arguments.tensor(where, "x", x)
    _arguments.number(where, "tolerance", tolerance)
    _arguments.integer(where, "chunk", chunk, least=1)
    if tolerance < 0:
        raise ValueError(f"{where}: expected tolerance to be at least 0, but got {tolerance}")
    if module.bidirectional:
        raise ValueError(f"{where}: expected a module in one direction")
    if x.dim() != 3 or x.shape[2] != module.input_size or 0 in x.shape[:2]:
        raise ValueError(f"{where}: expected x to be (T, B, {module.input_size}), but got {tuple(x.shape)}")
    if module.batch_first:
        x = x.transpose(0, 1)
    state = hx if cell == "lstm" else None if hx is None else (hx,)
    shape = (module.num_layers, x.shape[1], module.hidden_size)
    if state is None:
        state = (x.new_zeros(shape),) * 2
    else:
        _arguments.states(where, "hx", state, ("h_0", "c_0") if cell == "lstm" else ("h_0",))
        if any(part.shape != shape for part in state):
            raise ValueError(f"{where}: expected hx of {shape}, but got {[tuple(part.shape) for part in state]}")
    output, last, counts = x, [], []
    for i, names in enumerate(module._all_weights):
        if i > 0:
            output = F.dropout(output, module.dropout, module.training)
        weights = [getattr(module, name) for name in names]
        output, h_n, c_n, count = _layer(cell, output, state[0][i], state[-1][i], weights, tolerance, chunk)
        last.append((h_n, c_n))
        counts.append(count)
    h_n, c_n = (torch.stack(part) for part in zip(*last, strict=True))
    return output.transpose(0, 1) if module.batch_first else output, (h_n, c_n) if cell == "lstm" else h_n, counts
