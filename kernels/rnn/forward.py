"""The forward operator, and what both share: which kernels run, what is allocated, what is saved.

The input projection and the weight gradients are matrix products over all steps. Between them runs either one launch
for all steps, where ``tiles.py`` has the size, or, for each step, ``torch.mm`` into buffers allocated before the loop
and one launch (two for cells with two dependent products, or with a projection). Nothing waits for the GPU.

Both operators are opaque custom operators: under torch.compile a traced loop over steps would be unrolled.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import operator
from seqaccel.kernels.rnn import around, persistent, step
from seqaccel.kernels.rnn.cells import CELLS, Cell
from seqaccel.kernels.rnn.checks import check
from seqaccel.kernels.rnn.tiles import precision_of, refuse, tiles_of

POINTS = 256  # hidden units per program in the kernels of one step


def row_warps(block: int) -> int:
    """Warps for one step of a row of ``block`` normalised units, so that up to 2048 units do not spill."""
    return 4 if block <= 512 else 8 if block <= 2048 else 16


def norm_warps(block: int) -> int:
    """Warps for rows of ``block`` elements to normalise, so that up to 8192 elements do not spill."""
    return max(4, min(32, block // 256))


def point_options(spec: Cell, hidden: int) -> dict[str, int]:
    """A block of units; the whole row if the cell normalises it."""
    if not spec.norm:
        return {"BLOCK": POINTS, "num_warps": 4}
    block = max(POINTS, triton.next_power_of_2(hidden))
    return {"BLOCK": block, "num_warps": row_warps(block)}


def grid_of(batch: int, width: int, block: int) -> tuple[int, int]:
    return batch, triton.cdiv(width, block)


def _carries(cell: str, zoneout_c: Tensor | None) -> bool:
    return CELLS[cell].carries or zoneout_c is not None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def float_copy(x: Tensor) -> Tensor:
    """A float32 copy."""
    return x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def zoneout_of(z: Tensor | None) -> tuple[Tensor | None, int]:
    return (None, 0) if z is None else (z.contiguous(), int(z.numel() != 1))


def begins_of(reset: Tensor | None, lengths: Tensor | None, reverse: bool) -> Tensor | None:
    """Which steps start from a state of zero, in the direction of a pass: [T, B] int8. In reverse an episode begins at
    its last step, and the last one of a row at its end, from the given state."""
    if reset is None:
        return None
    begins = torch.cat((reset[1:], torch.zeros_like(reset[:1]))) if reverse else reset.contiguous()
    if lengths is not None:
        step = torch.arange(begins.shape[0], device=begins.device).unsqueeze(1) + int(reverse)
        begins = begins & (step < lengths)
    return begins.view(torch.int8)


def drop_first(states: Sequence[Tensor | None], begins: Tensor, reverse: bool) -> None:
    """Zeroes, in place, states [B, ·] of rows in which an episode begins with the first step of a pass."""
    first = begins[-1 if reverse else 0].bool().unsqueeze(1)
    for state in states:
        if state is not None:
            state.masked_fill_(first, 0)


def _biases(spec: Cell, bias_ih: Tensor | None, bias_hh: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The biases of the input projection and of the recurrent product."""
    return (bias_ih, bias_hh) if spec.separate else (_sum(bias_ih, bias_hh), None)


def vectors_of(spec: Cell, extra: Sequence[Tensor | None]) -> Tensor | None:
    if not spec.vectors:
        return None
    return torch.stack([w for w in extra[2:] if w is not None]) if spec.norm else extra[1].contiguous()


def contiguous(weights: Sequence[Tensor | None]) -> list[Any]:
    return [None if w is None else w.contiguous() for w in weights]


def saved_shapes(
    cell: str, zoneout_c: Tensor | None, steps: int, batch: int, hidden: int
) -> list[tuple[tuple[int, ...], bool]]:
    """Shape of each saved tensor, and whether it is float32 whatever the input is.

    In this order, each if the cell has it: activated gates (the GRUs' with W_hn h' + b_hn behind them), c, the carried
    c where it is another, W_hh h' before its layer norm, W_mx x and W_mh h'.
    """
    spec = CELLS[cell]
    sequence = (steps, batch, hidden)
    shapes: list[tuple[tuple[int, ...], bool]] = []
    if spec.saved:
        shapes.append(((steps, batch, spec.saved * hidden), False))
    if spec.has_c:
        shapes += [(sequence, True)] * (1 + _carries(cell, zoneout_c))
    if spec.norm:
        shapes.append(((steps, batch, spec.gates * hidden), False))
    if spec.multiplies:
        shapes += [(sequence, False)] * 2
    return shapes


def unpack(cell: str, zoneout_c: Tensor | None, saved: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """gates, cells, carried, products, m_x, m_h; None for what the cell does not have."""
    spec, rest = CELLS[cell], iter(saved)
    has = (spec.saved > 0, spec.has_c, spec.has_c and _carries(cell, zoneout_c), spec.norm)
    return tuple(next(rest) if there else None for there in (*has, spec.multiplies, spec.multiplies))


def _layer_norm_rows(x: Tensor, gamma: Tensor, bias: Tensor | None) -> None:
    """In place, over the last dimension."""
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    around.rows_forward_kernel[(x.numel() // width,)](x, gamma, bias, width, BLOCK=block, num_warps=norm_warps(block))


@operator(
    torch.library.custom_op,
    "seqaccel::rnn_forward_triton",
    mutates_args=(),
    schema="(str cell, Tensor input, Tensor h_0, Tensor? c_0, Tensor?[] weights, Tensor? lengths, Tensor? zoneout_h, "
    "Tensor? zoneout_c, bool reverse, bool save, Tensor? reset=None) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def rnn_forward(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save, reset=None):
    """output, h_n, c_n (empty for a cell without c), and where ``save`` what ``saved_shapes`` lists (else nothing)."""
    sizes = check(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reset)
    spec, steps, batch, hidden = CELLS[cell], sizes["T"], sizes["B"], sizes["H"]
    weight_ih, weight_hh, bias_ih, bias_hh, *extra = contiguous(weights)
    lengths = None if lengths is None else lengths.contiguous()
    dtype = input.dtype
    weight_hr = extra[0] if spec.projects else None
    bias_x, bias_r = _biases(spec, bias_ih, bias_hh)
    h = float_copy(h_0)
    c = float_copy(c_0) if spec.has_c else None
    output = input.new_empty(steps, batch, sizes["P"])
    x = None
    if steps and batch:
        flat = input.flatten(0, 1)
        if weight_ih is None:  # a copy: training writes its gates here
            x = flat.clone(memory_format=torch.contiguous_format) if bias_x is None else flat + bias_x
        elif spec.norm or bias_x is None:
            x = torch.matmul(flat, weight_ih.t())
        else:
            x = torch.addmm(bias_x, flat, weight_ih.t())
        x = x.view(steps, batch, spec.gates * hidden)
        if spec.norm:
            _layer_norm_rows(x, extra[0], bias_x)
    shapes = saved_shapes(cell, zoneout_c, steps, batch, hidden) if save else []
    in_place = x is not None and save and spec.saved == spec.gates  # the activated gates overwrite x
    saved = [x] if in_place else []
    for shape, wide in shapes[len(saved) :]:
        saved.append(input.new_empty(shape, dtype=torch.float32 if wide else dtype))
    if x is not None:
        begins = begins_of(reset, lengths, reverse)
        if begins is not None:
            drop_first((h, None if spec.constant_c else c), begins, reverse)
        _run_forward(
            cell, spec, input, x, h, c, output, weight_hh, bias_r, weight_hr, extra, lengths, begins, zoneout_h,
            zoneout_c, reverse, saved,
        )  # fmt: skip
    c_n = input.new_empty(0) if c is None else c.to(dtype)
    return output, h.to(dtype), c_n, saved


def _run_forward(
    cell, spec, input, x, h, c, output, weight_hh, bias_r, weight_hr, extra, lengths, begins, zoneout_h, zoneout_c,
    reverse, saved,
):  # fmt: skip
    steps, batch, outputs = output.shape
    hidden, dtype = weight_hh.shape[0] // spec.gates, x.dtype
    save = bool(saved)
    gates, cells, carried, products, m_x, m_h = unpack(cell, zoneout_c, saved) if save else (None,) * 6
    zone_h, zone_c = zoneout_of(zoneout_h), zoneout_of(zoneout_c)
    vectors = vectors_of(spec, extra)
    constants = {"GATES": spec.gates, "SAVED": spec.saved, "VECTORS": spec.vectors, "HAS_C": spec.has_c}
    tiles = tiles_of(spec, weight_hh, batch, weight_hr is not None)
    if tiles is not None:
        exchange = None
        if tiles[0].groups:
            exchange = x.new_empty(2, batch, hidden)
            exchange[0] = h
        try:
            for first, grid, arrived in tiles[0].launches(batch, x.device):
                persistent.persistent_forward_kernel[grid](
                    x, weight_hh, bias_r, vectors, lengths, begins, zone_h[0], zone_c[0], h, c, output, gates, cells,
                    carried, exchange, arrived, steps, batch, hidden, first, zone_h[1], zone_c[1], FORWARD=spec.forward,
                    **constants, REVERSE=reverse, PRECISION=precision_of(x.dtype), **tiles[0].constants(),
                    **tiles[0].options(),
                )  # fmt: skip
            return
        except RuntimeError as error:
            refuse(error, tiles[0], x.device)
    options = point_options(spec, hidden)
    transposed = weight_hh.t()
    gamma = extra[1] if spec.norm else None
    # Products read h in their own dtype. In float32 this is h itself.
    operand = h if dtype == torch.float32 else h.to(dtype)
    operand_out = None if operand is h else operand
    product = x.new_empty(batch, (spec.gates - spec.first) * hidden)
    grid = grid_of(batch, hidden, options["BLOCK"])
    if weight_hr is not None:
        inner, projected = x.new_empty(batch, hidden), x.new_empty(batch, outputs)
        project = weight_hr.t()
    if spec.first:
        first_product, inner = x.new_empty(batch, spec.first * hidden), x.new_empty(batch, hidden)
        first_weight, transposed = weight_hh[: spec.first * hidden].t(), weight_hh[spec.first * hidden :].t()
    if spec.multiplies:
        inner = x.new_empty(batch, hidden)
        mx = torch.matmul(input, extra[0].t(), out=m_x)
        mh = x.new_empty(batch, hidden) if m_h is None else m_h
        first_weight = extra[1].t()
    for s in range(steps):
        t = steps - 1 - s if reverse else s
        following = -1 if s + 1 == steps else t - 1 if reverse else t + 1
        left = operand
        if spec.first:
            torch.mm(operand, first_weight, out=first_product)
            around.reset_forward_kernel[grid](x, first_product, h, inner, t, batch, hidden, **options)
            left = inner
        elif spec.multiplies:
            mh_t = mh if m_h is None else mh[t]
            torch.mm(operand, first_weight, out=mh_t)
            around.multiply_forward_kernel[grid](mx, mh_t, inner, t, batch, hidden, **options)
            left = inner
        if products is not None:
            product = products[t]
        torch.mm(left, transposed, out=product)
        step.forward_kernel[grid](
            x, product, bias_r, gamma, vectors, lengths, begins, zone_h[0], zone_c[0], h,
            operand_out if weight_hr is None else inner, c, output, gates, cells, carried, t, following, batch, hidden,
            zone_h[1], zone_c[1], FORWARD=spec.forward, FIRST=spec.first, CONSTANT_C=spec.constant_c,
            **constants, PROJECTED=weight_hr is not None, **options,
        )  # fmt: skip
        if weight_hr is not None:
            torch.mm(inner, project, out=projected)
            step.project_forward_kernel[grid_of(batch, outputs, POINTS)](
                projected, lengths, begins, zone_h[0], h, operand_out, output, t, following, batch, outputs, zone_h[1],
                BLOCK=POINTS, num_warps=4,
            )  # fmt: skip


@rnn_forward.register_fake
def _(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse, save, reset=None):
    steps, batch = input.shape[:2]
    hidden, outputs = weights[1].shape[0] // CELLS[cell].gates, weights[1].shape[1]
    shapes = saved_shapes(cell, zoneout_c, steps, batch, hidden) if save else ()
    return (
        input.new_empty(steps, batch, outputs),
        input.new_empty(batch, outputs),
        input.new_empty((batch, hidden) if CELLS[cell].has_c else (0,)),
        [input.new_empty(shape, dtype=torch.float32 if wide else input.dtype) for shape, wide in shapes],
    )
