"""The column cells' one road: checks, the operators, autograd, and the layer of a product and a recurrence in one.

The functions of single cells (``sru``, ``fo_pool``, ...) name their arguments and call ``recurrence``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._matmul import add_mm_, mm
from seqaccel.functional._offsets import check_offsets
from seqaccel.functional._registration import Operator, call, register
from seqaccel.functional.scan._cells import CELLS
from seqaccel.functional.scan._operands import check_alike, in_float32_under_autocast, operator
from seqaccel.reference import scan as reference


def _operator(name: str, backend: str) -> Callable[..., Any]:
    return operator(name, backend, _register)


class Operands(NamedTuple):
    """What an operator takes between u and the states saved."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    c_0: Tensor
    mask: Tensor | None
    scale: Tensor | None
    mask_pad: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None
    directions: int


class Caller(NamedTuple):
    """The public function whose arguments are checked, and what it calls the operands where that is another name."""

    name: str
    names: dict[str, str]

    def called(self, operand: str) -> str:
        return self.names.get(operand, operand)


# Autograd sees u, x, weight, bias and c_0; the rest of an operator's arguments goes as one tuple, since each argument
# of a Function costs time.
Rest = tuple[Any, ...]  # mask, scale, mask_pad, reset, cu_seqlens, directions


_NO_MASKS = (None,) * 5


def _save(ctx: Any, cell: str, backend: str, rest: Rest, h: Tensor, c: Tensor, *tensors: Tensor | None) -> None:
    """Keeps tensors and the states, which are h where that is the cell's output, for the backward pass."""
    mask, scale, mask_pad, reset, cu_seqlens, ctx.directions = rest
    if mask_pad is None and CELLS[cell].output_is_state:
        c = h
    if mask is None and scale is None and mask_pad is None and reset is None and cu_seqlens is None:
        ctx.save_for_backward(c, *tensors)
    else:
        ctx.save_for_backward(c, *tensors, mask, scale, mask_pad, reset, cu_seqlens)
    ctx.cell, ctx.backend = cell, backend
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_h: Tensor | None, grad_c_n: Tensor | None, c: Tensor, rest: Rest, u: Tensor, x: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, c_0: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Of u, x, weight, bias and c_0 by the operator."""
    if grad_h is None:
        grad_h = torch.zeros_like(c)
    *masks, directions = rest
    grad_u, grad_x, grad_weight, grad_bias, grad_c_0 = call(
        _operator("column_backward", ctx.backend),
        ctx.cell, grad_h, grad_c_n, u, x, weight, bias, c_0, *masks, c, directions,
    )  # fmt: skip
    return (
        grad_u,
        None if x is None else grad_x,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        grad_c_0,
    )


class _Columns(torch.autograd.Function):
    """Saves u, x and the states: the gates are computed again in backward. A list ``kept`` takes what the operator
    saved."""

    @staticmethod
    def forward(ctx, kept, cell, backend, rest, *inputs):
        h, c_n, c = call(_operator("column_forward", backend), cell, *inputs, *rest, True)
        if kept is not None:
            kept.append(c)
        _save(ctx, cell, backend, rest, h, c, *inputs)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        c, u, x, weight, bias, c_0, *masks = ctx.saved_tensors
        rest = (*(masks or _NO_MASKS), ctx.directions)
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *inputs: reference.columns(ctx.cell, *inputs, *rest),
                (u, x, weight, bias, c_0),
                (grad_h, grad_c_n),
                ctx.needs_input_grad[4:],
            )
        else:
            grads = _gradients(ctx, grad_h, grad_c_n, c, rest, u, x, weight, bias, c_0)
        return None, None, None, None, *grads


class _ColumnLayer(torch.autograd.Function):
    """Matrix product and recurrence in one: saves what _Columns saves and the product's input (often x).

    One product adds to the gradient of x in place. SRU's weight (I, C * K) has a gradient that is made transposed: MKL
    takes 8.4 ms for (768 x 4096)(4096 x 256) and 9.7 ms for the transposed product.
    """

    @staticmethod
    def forward(ctx, cell, backend, rest, same, interleaved, input, weight, x, recurrent, bias, c_0):
        ctx.same, ctx.interleaved = same, interleaved
        x = input if same else x
        steps, batch, features = input.shape
        matrix = weight if interleaved else weight.t()
        u = call(mm, input.reshape(steps * batch, features), matrix, backend).view(steps, batch, matrix.shape[1])
        h, c_n, c = call(_operator("column_forward", backend), cell, u, x, recurrent, bias, c_0, *rest, True)
        _save(ctx, cell, backend, rest, h, c, input, weight, u, x, recurrent, bias, c_0)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        c, input, weight, u, x, recurrent, bias, c_0, *masks = ctx.saved_tensors
        rest = (*(masks or _NO_MASKS), ctx.directions)
        same, interleaved = ctx.same, ctx.interleaved
        if torch.is_grad_enabled():

            def layer(input, weight, x, *inputs):
                u = input @ (weight if interleaved else weight.t())
                return reference.columns(ctx.cell, u, input if same else x, *inputs, *rest)

            inputs = (input, weight, None if same else x, recurrent, bias, c_0)
            grads = _common.differentiable_backward(layer, inputs, (grad_h, grad_c_n), ctx.needs_input_grad[5:])
            return None, None, None, None, None, *grads
        grad_u, grad_x, *grads = _gradients(ctx, grad_h, grad_c_n, c, rest, u, x, recurrent, bias, c_0)
        rows, features = input.shape[0] * input.shape[1], input.shape[2]
        grad_u = grad_u.view(rows, u.shape[2])
        grad_input = grad_weight = None
        if ctx.needs_input_grad[6]:
            grad_weight = call(mm, grad_u.t(), input.reshape(rows, features), ctx.backend)
            grad_weight = grad_weight.t() if interleaved else grad_weight
        if ctx.needs_input_grad[5]:
            matrix = weight.t() if interleaved else weight
            if same:
                grad_input = call(add_mm_, grad_x.view(rows, features), grad_u, matrix, ctx.backend)
                grad_input = grad_input.view(input.shape)
            else:
                grad_input = call(mm, grad_u, matrix, ctx.backend).view(input.shape)
        return None, None, None, None, None, grad_input, grad_weight, None if same else grad_x, *grads


# ---- checks ----


def check_types(caller: Caller, directions: Any, scale: Any = None, **tensors: Any) -> None:
    """Of operands by their own names; each may be left out."""
    for key, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            _arguments.tensor(caller.name, caller.called(key), value, optional=True)
    if scale is not None and not isinstance(scale, Tensor):
        _arguments.number(caller.name, caller.called("scale"), scale)
    if type(directions) is not int:
        _arguments.integer(caller.name, "directions", directions)


@_common.unrecorded
def _refuse(
    caller: Caller, key: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, first_name: str, first: Tensor
) -> None:
    """Raises where an operand has another shape, dtype or device."""
    name, key, device = caller.name, caller.called(key), first.device
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {key} to have shape {tuple(shape)}, but got {tuple(tensor.shape)}")
    if tensor.dtype != dtype:
        wanted = f"have the dtype of {first_name}, {dtype}" if dtype.is_floating_point else f"be {dtype}"
        raise TypeError(f"{name}: expected {key} to {wanted}, but got {tensor.dtype}")
    if tensor.device != device:
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, "
            f"but {first_name} is on {device} and {key} is on {tensor.device}"
        )


def check(
    caller: Caller, cell: str, shape: tuple[int, ...], first_name: str, first: Tensor, x: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, c_0: Tensor | None, mask: Tensor | None, scale: Tensor | float | None,
    mask_pad: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, directions: int,
) -> Operands:  # fmt: skip
    """The operands of a u of this shape, with the dtype and device of ``first``; fills in what is left out."""
    name, spec = caller.name, CELLS[cell]
    K = spec.inputs
    if len(shape) != 3:
        k = "k" if spec.skip else str(K)
        raise ValueError(
            f"{name}: expected u to have 3 dimensions (T, B, directions * H * {k}), but got {tuple(shape)}"
        )
    if directions not in (1, 2):
        raise ValueError(f"{name}: expected directions to be 1 or 2, but got {directions}")
    steps, batch, features = shape
    rows, size = (spec.biases, bias) if spec.skip else (K, None)
    if size is not None:
        if size.dim() != 1 or size.shape[0] == 0 or size.shape[0] % (rows * directions):
            raise ValueError(
                f"{name}: expected bias to have shape ({rows} * directions * H,), but got {tuple(size.shape)}"
            )
        channels = size.shape[0] // rows
        if features not in ((K - 1) * channels, K * channels):
            raise ValueError(
                f"{name}: expected u to have {(K - 1) * channels} or {K * channels} features, but got {features}"
            )
        if features == K * channels and x is not None:
            raise ValueError(f"{name}: expected x to be None where u holds the projected input (k = {K})")
    else:
        if features == 0 or features % (K * directions):
            raise ValueError(
                f"{name}: expected u to have directions * H * {K} features, {K * directions} times a number, "
                f"but got {features}"
            )
        channels = features // K
    sequences = batch
    if cu_seqlens is not None:
        if mask_pad is not None or reset is not None:
            raise ValueError(
                f"{name}: expected no mask_pad and no reset with cu_seqlens, which says where sequences begin"
            )
        check_offsets(name, cu_seqlens, steps, batch)
        sequences = cu_seqlens.shape[0] - 1
    dtype, device = first.dtype, first.device
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected {first_name} to be floating point, but got {dtype}")
    wide = (steps, batch, channels)
    if x is not None and (x.shape != wide or x.dtype is not dtype or x.device != device):
        _refuse(caller, "x", x, wide, dtype, first_name, first)
    if weight is not None:
        wanted: tuple[int, ...] = (spec.weights * channels,)
        if spec.skip and weight.dim() == 3:
            wanted = (steps, batch, spec.weights * channels)
        if weight.shape != wanted or weight.dtype is not dtype or weight.device != device:
            _refuse(caller, "weight", weight, wanted, dtype, first_name, first)
    if bias is not None:
        wanted = (spec.biases * channels,)
        if bias.shape != wanted or bias.dtype is not dtype or bias.device != device:
            _refuse(caller, "bias", bias, wanted, dtype, first_name, first)
    if c_0 is None:
        c_0 = first.new_zeros(sequences, channels)
    elif c_0.shape != (sequences, channels) or c_0.dtype is not dtype or c_0.device != device:
        _refuse(caller, "c_0", c_0, (sequences, channels), dtype, first_name, first)
    if mask is not None or scale is not None:
        if isinstance(scale, (int, float)):
            scale = first.new_full((1,), scale)
        scale = scale if scale is None else scale.reshape(-1)
        for key, tensor, wanted in (
            ("mask", mask, (sequences, channels) if spec.mask == "BC" else wide),
            ("scale", scale, (1,)),
        ):
            if tensor is None:
                continue
            _refuse(caller, key, tensor, wanted, dtype, first_name, first)
            if tensor.requires_grad:
                raise RuntimeError(f"{name}: {caller.called(key)} is not differentiated: it must not require grad")
    if mask_pad is not None:
        _refuse(caller, "mask_pad", mask_pad, (steps, batch), torch.bool, first_name, first)
    if reset is not None:
        _arguments.reset(name, reset, (steps, batch), device)
    return Operands(x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens, directions)


# ---- the calls ----


def _run(cell: str, backend: str, u: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.columns(cell, u, *operands)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        h, c_n, _ = _operator("column_forward", backend)(cell, u, *operands, False)
    elif _common.needs_grad(u, operands.x, operands.weight, operands.bias, operands.c_0):
        h, c_n = _Columns.apply(None, cell, backend, operands[4:], u, *operands[:4])
    else:
        h, c_n, _ = call(_operator("column_forward", backend), cell, u, *operands, False)
    return h, c_n


def recurrence(caller: Caller, cell: str, u: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """h and the last state from u and operands of the right types: ``Operands``, of which c_0 may be left out."""
    x, weight, bias, c_0, mask, scale, *rest = given
    u, x, weight, bias, c_0, mask = in_float32_under_autocast(u, x, weight, bias, c_0, mask)
    if isinstance(scale, Tensor):
        (scale,) = in_float32_under_autocast(scale)
    operands = check(caller, cell, tuple(u.shape), "u", u, x, weight, bias, c_0, mask, scale, *rest)
    if _common.transforms_active():
        return reference.columns(cell, u, *operands)
    if _onnx.exporting():
        return _onnx.columns(cell, u, *operands)
    if weight is not None and weight.dim() == 3:
        backend = backends.choose(f"{caller.name} with weights of each step", u, ("reference",))
    else:
        backend = backends.choose(cell, u, CELLS[cell].backends)
    return _run(cell, backend, u, operands)


def layer(
    caller: Caller, cell: str, input: Tensor, weight: Tensor, x: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor]:
    """``recurrence`` of the product of the input with the weight, with one backward for both."""
    name, interleaved = caller.name, CELLS[cell].interleaved
    if input.dim() != 3 or weight.dim() != 2 or input.shape[2] != weight.shape[0 if interleaved else 1]:
        wanted = "(I, directions * H * k)" if interleaved else f"(directions * {CELLS[cell].inputs} * H, I)"
        raise ValueError(
            f"{name}: expected input (T, B, I) and weight {wanted}, "
            f"but got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    autocast = _common.autocast_on(input.device.type)
    check_alike(name, "input", input, {} if autocast else {"weight": weight})
    matrix = weight if interleaved else weight.t()
    if autocast or _common.transforms_active() or _onnx.exporting() or _common.is_distributed(input):
        return recurrence(caller, cell, input @ matrix, x, *given)
    shape = (input.shape[0], input.shape[1], matrix.shape[1])
    operands = check(caller, cell, shape, "input", input, x, *given)
    if operands.weight is not None and operands.weight.dim() == 3:
        return recurrence(caller, cell, input @ matrix, *operands)
    backend = backends.choose(cell, input, CELLS[cell].backends)
    if backend == "reference":
        return reference.columns(cell, input @ matrix, *operands)
    if torch.compiler.is_compiling():  # autograd records the product itself
        u = mm(input.flatten(0, 1), matrix, backend).view(shape)
    elif _common.needs_grad(input, weight, x, operands.weight, operands.bias, operands.c_0):
        same = x is input
        inputs = (input, weight, None if same else x, *operands[1:4])
        return _ColumnLayer.apply(cell, backend, operands[4:], same, interleaved, *inputs)
    else:
        u = call(mm, input.flatten(0, 1), matrix, backend).view(shape)
    return _run(cell, backend, u, operands)


# ---- the operators' facts ----


def _forward_fake(cell, u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens, directions, save):
    shape = (u.shape[0], u.shape[1], c_0.shape[1])
    saves = save and CELLS[cell].saves_states(mask_pad is not None)
    return u.new_empty(shape), u.new_empty(c_0.shape), u.new_empty(shape if saves else (0,))


def _backward_fake(
    cell, grad_h, grad_c_n, u, x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens, c, directions
):
    return tuple(u.new_empty((0,) if t is None else t.shape) for t in (u, x, weight, bias, c_0))


def _definition(*arguments):
    return reference.columns(*arguments[:12])


def _recorded(backend, cell, *arguments):
    *inputs, save = arguments
    kept: list[Tensor] = []
    h, c_n = _Columns.apply(kept, cell, backend, tuple(inputs[5:]), *inputs[:5])
    return h, c_n, kept[0] if save else kept[0].new_empty(0)


def _flops(cell, u, x, weight, bias, c_0, *_) -> int:
    return CELLS[cell].operations * u[0] * u[1] * c_0[1]


def _register(backend: str) -> None:
    suffix = "" if backend == "cpp" else "_triton"
    # The mask of a pool has the steps first.
    operands: dict[str | int, int] = {"u": 1, "x": 1, "c_0": 0, "mask": -2, "mask_pad": 1, "reset": 1}
    register(
        Operator(
            "column_forward" + suffix,
            _forward_fake,
            _flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=operands | {0: 1, 1: 0, 2: 1},
            packs=("cu_seqlens", 1),
        )
    )
    register(
        Operator(
            "column_backward" + suffix,
            _backward_fake,
            lambda cell, grad_h, grad_c_n, *operands: 2 * _flops(cell, *operands),
            batch=operands | {"grad_h": 1, "grad_c_n": 0, "c": 1, 0: 1, 1: 1, 4: 0},
            summed=(2, 3),
            packs=("cu_seqlens", 1),
        )
    )


_register("cpp")
