"""The column cells' one road: checks, the operators, autograd, and the layer of a product and a recurrence in one.

The functions of single cells (``sru``, ``fo_pool``, ...) name their arguments and call ``recurrence``.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._matmul import add_mm_, mm
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


_DIFFERENTIABLE = 5  # of u and the operands: u, x, weight, bias, c_0


class _Columns(torch.autograd.Function):
    """Saves u, x and the states: the gates are computed again in backward. A list ``kept`` takes what the operator
    saved."""

    @staticmethod
    def forward(ctx, kept, cell, backend, *inputs):
        h, c_n, c = call(_operator("column_forward", backend), cell, *inputs, True)
        if kept is not None:
            kept.append(c)
        _save(ctx, cell, backend, inputs, h, c)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        inputs, c = _saved(ctx)
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *first: reference.columns(ctx.cell, *first, *inputs[_DIFFERENTIABLE:]),
                inputs[:_DIFFERENTIABLE],
                (grad_h, grad_c_n),
                ctx.needs_input_grad[3 : 3 + _DIFFERENTIABLE],
            )
        else:
            grads = _gradients(ctx, inputs, c, grad_h, grad_c_n)
        return None, None, None, *grads, *[None] * 6


def _save(ctx: Any, cell: str, backend: str, inputs: tuple[Any, ...], h: Tensor, c: Tensor, *others: Tensor) -> None:
    """Keeps the states for backward: those of a cell whose output is its state are h."""
    *tensors, directions = inputs
    h_is_c = not CELLS[cell].saves_states(inputs[7] is not None)
    ctx.save_for_backward(*others, *tensors, h if h_is_c else c)
    ctx.cell, ctx.backend, ctx.directions = cell, backend, directions
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[tuple[Any, ...], Tensor]:
    *tensors, c = ctx.saved_tensors
    return (*tensors, ctx.directions), c


def _gradients(
    ctx: Any, inputs: tuple[Any, ...], c: Tensor, grad_h: Tensor | None, grad_c_n: Tensor | None
) -> tuple[Any, ...]:
    """Of u, x, weight, bias and c_0 by the operator."""
    if grad_h is None:
        grad_h = torch.zeros_like(c)
    *tensors, directions = inputs
    found = call(_operator("column_backward", ctx.backend), ctx.cell, grad_h, grad_c_n, *tensors, c, directions)
    return tuple([None if t is None else grad for t, grad in zip(inputs, found, strict=False)])


class _ColumnLayer(torch.autograd.Function):
    """Matrix product and recurrence in one: saves what _Columns saves and the product's input (often x).

    One product adds to the gradient of x in place. SRU's weight (I, C * K) has a gradient that is made transposed: MKL
    takes 8.4 ms for (768 x 4096)(4096 x 256) and 9.7 ms for the transposed product.
    """

    @staticmethod
    def forward(ctx, cell, backend, same, input, weight, x, *rest):
        ctx.same = same
        steps, batch, features = input.shape
        matrix = weight if CELLS[cell].interleaved else weight.t()
        u = call(mm, input.reshape(steps * batch, features), matrix, backend).view(steps, batch, matrix.shape[1])
        inputs = (u, input if same else x, *rest)
        h, c_n, c = call(_operator("column_forward", backend), cell, *inputs, True)
        _save(ctx, cell, backend, inputs, h, c, input, weight)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        (input, weight, *inputs), c = _saved(ctx)
        interleaved = CELLS[ctx.cell].interleaved
        unused = (None,) * 6
        if torch.is_grad_enabled():

            def layer(input, weight, x, *first):
                u = input @ (weight if interleaved else weight.t())
                return reference.columns(
                    ctx.cell, u, input if ctx.same else x, *first, *inputs[_DIFFERENTIABLE:]
                )  # fmt: skip

            given = (input, weight, None if ctx.same else inputs[1], *inputs[2:_DIFFERENTIABLE])
            grads = _common.differentiable_backward(
                layer, given, (grad_h, grad_c_n), ctx.needs_input_grad[3 : 4 + _DIFFERENTIABLE]
            )
            return None, None, None, *grads, *unused
        grad_u, grad_x, *grads = _gradients(ctx, inputs, c, grad_h, grad_c_n)
        rows, features = input.shape[0] * input.shape[1], input.shape[2]
        grad_u = grad_u.view(rows, grad_u.shape[2])
        matrix = weight.t() if interleaved else weight
        grad_input = grad_weight = None
        if ctx.needs_input_grad[4]:
            grad_weight = call(mm, grad_u.t(), input.reshape(rows, features), ctx.backend)
            grad_weight = grad_weight.t() if interleaved else grad_weight
        if ctx.needs_input_grad[3]:
            if ctx.same:
                grad_input = call(add_mm_, grad_x.view(rows, features), grad_u, matrix, ctx.backend)
                grad_input = grad_input.view(input.shape)
            else:
                grad_input = call(mm, grad_u, matrix, ctx.backend).view(input.shape)
        return None, None, None, grad_input, grad_weight, None if ctx.same else grad_x, *grads, *unused


# ---- checks ----


def check_types(caller: Caller, directions: Any, scale: Any = None, **tensors: Any) -> None:
    """Of operands by their own names; each may be left out."""
    for key, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            _arguments.tensor(caller.name, caller.called(key), value, optional=True)
    if not isinstance(scale, Tensor) and scale is not None:
        _arguments.number(caller.name, caller.called("scale"), scale)
    _arguments.integer(caller.name, "directions", directions)


@_common.unrecorded
def _check_offsets(name: str, cu_seqlens: Tensor, u: Tensor, steps: int, batch: int, others: tuple[Any, Any]) -> None:
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name}: expected cu_seqlens to be torch.int64 of shape (N + 1,), N at least 1, "
            f"but got {cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"{name}: expected a batch of 1 with cu_seqlens, but got {batch}")
    if others[0] is not None or others[1] is not None:
        raise ValueError(f"{name}: expected no mask_pad and no reset with cu_seqlens, which says where sequences begin")
    if _common.transforms_active() or _onnx.exporting() or cu_seqlens.device.type != "cpu" or cu_seqlens.is_meta:
        return  # where nothing waits for values: kernels keep offsets in range
    if torch.compiler.is_compiling() or _common.is_distributed(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != steps or any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{name}: expected cu_seqlens to ascend from 0 to {steps}, but got {ends!r:.60}")


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
        _check_offsets(name, cu_seqlens, first, steps, batch, (mask_pad, reset))
        sequences = cu_seqlens.shape[0] - 1
    if c_0 is None:
        c_0 = first.new_zeros(sequences, channels)
    if scale is not None:
        scale = scale.reshape(-1) if isinstance(scale, Tensor) else first.new_full((1,), scale)
    of_steps = weight is not None and weight.dim() == 3 and spec.skip
    wide = (steps, batch, channels)
    expected = (
        ("x", x, wide),
        ("weight", weight, (steps, batch, 2 * channels) if of_steps else (spec.weights * channels,)),
        ("bias", bias, (spec.biases * channels,)),
        ("c_0", c_0, (sequences, channels)),
        ("mask", mask, (sequences, channels) if spec.mask == "BC" else wide),
        ("scale", scale, (1,)),
        ("mask_pad", mask_pad, (steps, batch)),
        ("reset", reset, (steps, batch)),
        ("cu_seqlens", cu_seqlens, None),
    )
    dtype, device = first.dtype, first.device
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: expected {first_name} to be floating point, but got {dtype}")
    for i, (key, tensor, wanted) in enumerate(expected):
        if tensor is None:
            continue
        if wanted is not None and tensor.shape != wanted:
            key = caller.called(key)
            raise ValueError(f"{name}: expected {key} to have shape {wanted}, but got {tuple(tensor.shape)}")
        if i < 6:
            if tensor.dtype != dtype:
                key = caller.called(key)
                raise TypeError(
                    f"{name}: expected {key} to have the dtype of {first_name}, {dtype}, but got {tensor.dtype}"
                )
        elif i < 8 and tensor.dtype != torch.bool:
            raise TypeError(f"{name}: expected {key} to be torch.bool, but got {tensor.dtype}")
        if tensor.device != device:
            key = caller.called(key)
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, "
                f"but {first_name} is on {device} and {key} is on {tensor.device}"
            )
    for key, tensor in (("mask", mask), ("scale", scale)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{name}: {caller.called(key)} is not differentiated: it must not require grad")
    return Operands(x, weight, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens, directions)


# ---- the calls ----


def _run(cell: str, backend: str, u: Tensor, operands: Operands) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.columns(cell, u, *operands)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        h, c_n, _ = _operator("column_forward", backend)(cell, u, *operands, False)
    elif _common.needs_grad(u, operands.x, operands.weight, operands.bias, operands.c_0):
        h, c_n = _Columns.apply(None, cell, backend, u, *operands)
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
        return _ColumnLayer.apply(cell, backend, same, input, weight, None if same else x, *operands[1:])
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
    h, c_n = _Columns.apply(kept, cell, backend, *inputs)
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
