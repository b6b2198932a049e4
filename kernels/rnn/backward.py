"""The backward operator: the steps in reverse, then the matrix products over all of them."""

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import operator
from seqaccel.kernels.rnn import around, persistent, step
from seqaccel.kernels.rnn.cells import CELLS
from seqaccel.kernels.rnn.checks import check, check_backward
from seqaccel.kernels.rnn.forward import (
    POINTS,
    begins_of,
    contiguous,
    drop_first,
    float_copy,
    grid_of,
    norm_warps,
    point_options,
    saved_shapes,
    unpack,
    vectors_of,
    zoneout_of,
)
from seqaccel.kernels.rnn.tiles import precision_of, refuse, tiles_of


def _h_prev(output: Tensor, h_0: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """h' of every step [T, B, P]."""
    first = h_0.unsqueeze(0)
    h_prev = torch.cat((output[1:], first) if reverse else (first, output[:-1]))
    if reverse and lengths is not None:
        later = torch.arange(1, output.shape[0] + 1, device=output.device).unsqueeze(1) < lengths
        h_prev = torch.where(later.unsqueeze(-1), h_prev, first)
    return h_prev


def _layer_norm_rows_backward(x: Tensor, dy: Tensor, gamma: Tensor, needs_dx: bool) -> tuple[Tensor | None, Tensor]:
    """Gradients of x, in dy's dtype, and of gamma."""
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    programs = min(rows, 512)
    dx = torch.empty_like(dy) if needs_dx else None
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    around.rows_backward_kernel[(programs,)](
        x, dy, gamma, dx, partial, rows, width, triton.cdiv(rows, programs), BLOCK=block, num_warps=norm_warps(block)
    )
    return dx, partial.sum(0).to(gamma.dtype)


@operator(
    torch.library.custom_op,
    "seqaccel::rnn_backward_triton",
    mutates_args=(),
    schema="(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, Tensor? c_0, "
    "Tensor?[] weights, Tensor? lengths, Tensor? zoneout_h, Tensor? zoneout_c, Tensor output, Tensor[] saved, "
    "bool reverse, bool[] needs, Tensor? reset=None) -> (Tensor, Tensor, Tensor, Tensor[])",
)
def rnn_backward(
    cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, output, saved,
    reverse, needs, reset=None,
):  # fmt: skip
    """Gradients of input, h_0, c_0 (empty for a cell without c) and of each weight; empty where not needed."""
    sizes = check(cell, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reset)
    spec, steps, batch = CELLS[cell], sizes["T"], sizes["B"]
    expected = saved_shapes(cell, zoneout_c, steps, batch, sizes["H"])
    grads = ((grad_output, "TBP"), (grad_h_n, "BP"), (grad_c_n if spec.has_c else None, "BH"))
    check_backward(cell, grads, output, saved, expected, sizes, needs)
    weight_ih, weight_hh, _, _, *extra = contiguous(weights)
    lengths = None if lengths is None else lengths.contiguous()
    h_0, output, saved = h_0.contiguous(), output.contiguous(), [t.contiguous() for t in saved]
    dh = h_0.new_zeros(h_0.shape, dtype=torch.float32) if grad_h_n is None else float_copy(grad_h_n)
    dc = None
    if spec.has_c:
        dc = c_0.new_zeros(c_0.shape, dtype=torch.float32) if grad_c_n is None else float_copy(grad_c_n)
    needs = [needs[0], *(need and w is not None for need, w in zip(needs[1:], weights, strict=True))]
    if steps and batch:
        sweep = _Sweep(
            cell, spec, input, h_0, c_0, weight_ih, weight_hh, extra, lengths, begins_of(reset, lengths, reverse),
            zoneout_h, zoneout_c, output, saved, reverse, dh, dc,
        )  # fmt: skip
        dh = sweep.run(None if grad_output is None else grad_output.contiguous())
        if sweep.begins is not None:
            drop_first((dh, None if spec.constant_c else dc), sweep.begins, reverse)
        grad_input, grads = sweep.weight_gradients(needs)
    else:
        grad_input = torch.zeros_like(input) if needs[0] else None
        grads = [None if not need else torch.zeros_like(w) for need, w in zip(needs[1:], weights, strict=True)]
    dtype = input.dtype
    return (
        input.new_empty(0) if grad_input is None else grad_input,
        dh.to(dtype),
        input.new_empty(0) if dc is None else dc.to(dtype),
        [input.new_empty(0) if grad is None else grad.to(dtype) for grad in grads],
    )


class _Sweep:
    """The backward pass of one layer and direction: the steps in reverse, then the products over all of them."""

    def __init__(
        self, cell, spec, input, h_0, c_0, weight_ih, weight_hh, extra, lengths, begins, zoneout_h, zoneout_c, output,
        saved, reverse, dh, dc,
    ):  # fmt: skip
        self.spec, self.input, self.h_0, self.reverse, self.lengths = spec, input, h_0, reverse, lengths
        self.begins = begins
        self.c_0 = None if c_0 is None else c_0.contiguous()
        self.weight_ih, self.weight_hh, self.extra, self.output = weight_ih, weight_hh, extra, output
        self.dh, self.dc = dh, dc
        self.zone_h, self.zone_c = zoneout_of(zoneout_h), zoneout_of(zoneout_c)
        self.gates, self.cells, self.carried, self.products, self.m_x, self.m_h = unpack(cell, zoneout_c, saved)
        steps, batch, _ = output.shape
        self.hidden = hidden = weight_hh.shape[0] // spec.gates
        self.weight_hr = extra[0] if spec.projects else None
        self.grad_x = input.new_empty(steps, batch, spec.gates * hidden)
        self.grad_r = torch.empty_like(self.grad_x) if spec.separate else None
        self.grad_products = torch.empty_like(self.grad_x) if spec.norm else None
        self.grad_norm = None if not (spec.norm and spec.has_c) else torch.empty_like(self.cells)
        self.grad_projected = None if self.weight_hr is None else torch.empty_like(output)
        self.grad_m_x = torch.empty_like(self.m_x) if spec.multiplies else None
        self.grad_m_h = torch.empty_like(self.m_h) if spec.multiplies else None
        # The gradient of the product with W_hh, which the transposed W_hh multiplies.
        self.grad_last = next(g for g in (self.grad_products, self.grad_r, self.grad_x) if g is not None)

    def run(self, grad_output: Tensor | None) -> Tensor:
        """Returns the gradient of h_0 and leaves that of c_0 in ``dc``."""
        spec, hidden = self.spec, self.hidden
        steps, batch, outputs = self.output.shape
        vectors = vectors_of(spec, self.extra)
        constants = {
            "BACKWARD": spec.backward, "GATES": spec.gates, "SAVED": spec.saved, "VECTORS": spec.vectors,
            "HAS_C": spec.has_c, "USES_OUTPUT": spec.uses_output, "USES_H": spec.uses_h,
        }  # fmt: skip
        tiles = tiles_of(spec, self.weight_hh, batch, self.weight_hr is not None)
        if tiles is not None:
            try:
                for first, grid, arrived in tiles[1].launches(batch, self.output.device):
                    persistent.persistent_backward_kernel[grid](
                        grad_output, self.weight_hh, self.gates, vectors, self.cells, self.carried, self.c_0,
                        self.output, self.h_0, self.lengths, self.begins, self.zone_h[0], self.zone_c[0], self.dh,
                        self.dc, self.grad_x, self.grad_r, arrived, steps, batch, hidden, first, self.zone_h[1],
                        self.zone_c[1], **constants,
                        REVERSE=self.reverse, PRECISION=precision_of(self.output.dtype), **tiles[1].constants(),
                        **tiles[1].options(),
                    )  # fmt: skip
                return self.dh
            except RuntimeError as error:
                refuse(error, tiles[1], self.output.device)
        options = point_options(spec, hidden)
        grid = grid_of(batch, hidden, options["BLOCK"])
        gamma = self.extra[1] if spec.norm else None
        product = self.output.new_zeros(batch, outputs)
        through = product  # with a projection: the gradient of o tanh(c)
        if self.weight_hr is not None:
            through = self.output.new_empty(batch, hidden)
        split = spec.first * hidden
        inner = self.output.new_empty(batch, hidden) if split or spec.multiplies else None
        for s in reversed(range(steps)):
            t = steps - 1 - s if self.reverse else s
            earlier = -1 if s == 0 else t + 1 if self.reverse else t - 1
            later = -1 if s + 1 == steps else t - 1 if self.reverse else t + 1
            if self.weight_hr is not None:
                step.project_backward_kernel[grid_of(batch, outputs, POINTS)](
                    grad_output, product, self.lengths, self.begins, self.zone_h[0], self.dh, self.grad_projected, t,
                    later, batch, outputs, self.zone_h[1], BLOCK=POINTS, num_warps=4,
                )  # fmt: skip
                torch.mm(self.grad_projected[t], self.weight_hr, out=through)
            step.backward_kernel[grid](
                grad_output, through, self.gates, self.products, gamma, vectors, self.cells, self.carried, self.c_0,
                self.output, self.h_0, self.lengths, self.begins, self.zone_h[0], self.zone_c[0], self.dh, self.dc,
                self.grad_x, self.grad_r, self.grad_products, self.grad_norm, t, earlier, later, batch, hidden,
                self.zone_h[1], self.zone_c[1], **constants, CONSTANT_C=spec.constant_c,
                PROJECTED=self.weight_hr is not None, **options,
            )  # fmt: skip
            grad = self.grad_last[t]
            if split:
                torch.mm(grad[:, split:], self.weight_hh[split:], out=inner)
                around.reset_backward_kernel[grid](
                    inner, self.gates, self.output, self.h_0, self.lengths, self.begins, self.dh, self.grad_x, t,
                    earlier, batch, hidden, **options,
                )  # fmt: skip
                torch.mm(grad[:, :split], self.weight_hh[:split], out=product)
            elif spec.multiplies:
                torch.mm(grad, self.weight_hh, out=inner)
                around.multiply_backward_kernel[grid](
                    inner, self.m_x, self.m_h, self.lengths, self.grad_m_x, self.grad_m_h, t, batch, hidden, **options
                )
                torch.mm(self.grad_m_h[t], self.extra[1], out=product)
            else:
                torch.mm(grad, self.weight_hh, out=product)
        return self.dh + product.float()

    def weight_gradients(self, needs: list[bool]) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of input and of the weights."""
        spec, hidden, extra = self.spec, self.hidden, self.extra
        grads: list[Tensor | None] = [None] * (len(needs) - 1)
        wants = [*needs[1:], False, False, False, False, False, False]  # in the order of the weights
        flat = self.input.flatten(0, 1)
        grad_x = self.grad_x.view(-1, spec.gates * hidden)
        grad_last = self.grad_last.view(grad_x.shape)
        grad_a = grad_x
        if spec.norm and (needs[0] or wants[0] or wants[4]):
            a = torch.matmul(flat, self.weight_ih.t())
            grad_a, grads[4] = _layer_norm_rows_backward(a, grad_x, extra[0], needs[0] or wants[0])
        grad_input = None
        if needs[0]:
            grad_input = grad_a if self.weight_ih is None else torch.matmul(grad_a, self.weight_ih)
            grad_input = grad_input.view(self.input.shape)
        if wants[0]:
            grads[0] = grad_a.t() @ flat
        if wants[2]:
            grads[2] = grad_x.sum(0)
        grad_r = grad_x if self.grad_r is None else self.grad_r.view(grad_x.shape)
        if wants[3]:
            grads[3] = grad_r.sum(0)
        h_prev = None
        if wants[1] or (spec.multiplies and wants[5]):
            h_prev = self._cut(_h_prev(self.output, self.h_0, self.lengths, self.reverse)).reshape(grad_x.shape[0], -1)
        if wants[1]:
            if spec.first:
                split = spec.first * hidden
                reset = self.gates.view(grad_x.shape)[:, :hidden]
                grads[1] = torch.cat((grad_x[:, :split].t() @ h_prev, grad_x[:, split:].t() @ (reset * h_prev)))
            elif spec.multiplies:
                grads[1] = grad_x.t() @ (self.m_x * self.m_h).view(-1, hidden)
            else:
                grads[1] = grad_last.t() @ h_prev
        if spec.norm:
            if wants[5]:
                _, grads[5] = _layer_norm_rows_backward(self.products, grad_r, extra[1], False)
            if wants[6]:
                _, grads[6] = _layer_norm_rows_backward(self.cells, self.grad_norm, extra[2], False)
            if wants[7]:
                grads[7] = self.grad_norm.sum((0, 1))
        elif spec.multiplies:
            if needs[0]:
                grad_input = grad_input + torch.matmul(self.grad_m_x, extra[0])
            if wants[4]:
                grads[4] = self.grad_m_x.view(-1, hidden).t() @ flat
            if wants[5]:
                grads[5] = self.grad_m_h.view(-1, hidden).t() @ h_prev
        elif spec.projects:
            if wants[4]:
                inner = (self.gates[..., 3 * hidden :] * self.cells.tanh()).to(self.output.dtype)
                grads[4] = self.grad_projected.flatten(0, 1).t() @ inner.view(-1, hidden)
            if wants[5]:
                grads[5] = self._peepholes()
        return grad_input, grads

    def _cut(self, state: Tensor) -> Tensor:
        """The state before every step [T, B, ·], zero where an episode begins."""
        return state if self.begins is None else state.masked_fill(self.begins.bool().unsqueeze(-1), 0)

    def _peepholes(self) -> Tensor:
        """Gradient of the peepholes: i and f read the c before the step, o the one after it."""
        hidden, first = self.hidden, self.c_0.float().unsqueeze(0)
        c = self.cells if self.carried is None else self.carried
        c_prev = self._cut(torch.cat((c[1:], first) if self.reverse else (first, c[:-1])))
        i, f, _, o = self.grad_x.split(hidden, -1)
        return torch.stack([(d * seen).sum((0, 1)) for d, seen in ((i, c_prev), (f, c_prev), (o, self.cells))])


@rnn_backward.register_fake
def _(
    cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, output, saved,
    reverse, needs, reset=None,
):  # fmt: skip
    return (
        input.new_empty(input.shape if needs[0] else (0,)),
        input.new_empty(h_0.shape),
        input.new_empty((0,) if c_0 is None else c_0.shape),
        [
            input.new_empty(w.shape if need and w is not None else (0,))
            for need, w in zip(needs[1:], weights, strict=True)
        ],
    )
