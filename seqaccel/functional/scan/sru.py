"""The recurrence of SRU, alone and with its matrix product."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._matmul import add_mm_, mm
from seqaccel.functional._registration import Operator, call, register
from seqaccel.functional.scan._operands import BACKENDS, check_alike, in_float32_under_autocast, operator
from seqaccel.reference import scan as reference


def _operator(name: str, backend: str) -> Callable[..., Any]:
    return operator(name, backend, _register)


def _reference(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh):
    cell = "sru_tanh" if use_tanh else "sru"
    return reference.columns(
        cell, u, x, weight_c, bias, c_0, mask_c, scale_x, mask_pad, None, None, directions
    )  # fmt: skip


class _SRU(torch.autograd.Function):
    """Saves u, x and c: (k + 2) * H values a step and direction; the gates are computed again in backward.
    A list ``kept`` takes c."""

    @staticmethod
    def forward(ctx, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh, backend, kept=None):
        h, c_n, c = call(
            _operator("sru_forward", backend),
            u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh, True,
        )  # fmt: skip
        if kept is not None:
            kept.append(c)
        ctx.save_for_backward(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c)
        ctx.directions, ctx.use_tanh, ctx.backend = directions, use_tanh, backend
        ctx.set_materialize_grads(False)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c = ctx.saved_tensors
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *inputs: _reference(*inputs, mask_c, mask_pad, scale_x, ctx.directions, ctx.use_tanh),
                (u, x, weight_c, bias, c_0),
                (grad_h, grad_c_n),
                ctx.needs_input_grad[:5],
            )
            return *grads, *[None] * 7
        if grad_h is None:
            grad_h = torch.zeros_like(c)
        grad_u, grad_x, grad_weight_c, grad_bias, grad_c_0 = call(
            _operator("sru_backward", ctx.backend),
            grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, ctx.directions, ctx.use_tanh,
        )  # fmt: skip
        grad_x = None if x is None else grad_x
        return grad_u, grad_x, grad_weight_c, grad_bias, grad_c_0, *[None] * 7


class _SRULayer(torch.autograd.Function):
    """Matrix product and recurrence in one: saves what _SRU saves and the product's input (often x).

    One product adds to the gradient of x in place, and the weight's gradient is made transposed: MKL takes 8.4 ms for
    (768 x 4096)(4096 x 256) and 9.7 ms for the transposed product.
    """

    @staticmethod
    def forward(
        ctx, input, weight, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, same, directions, use_tanh, backend
    ):
        ctx.same, x = same, input if same else x
        steps, batch, features = input.shape
        u = call(mm, input.reshape(steps * batch, features), weight, backend).view(steps, batch, weight.shape[1])
        h, c_n, c = call(
            _operator("sru_forward", backend),
            u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh, True,
        )  # fmt: skip
        ctx.save_for_backward(input, weight, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c)
        ctx.directions, ctx.use_tanh, ctx.backend = directions, use_tanh, backend
        ctx.set_materialize_grads(False)
        return h, c_n

    @staticmethod
    def backward(ctx, grad_h, grad_c_n):
        input, weight, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c = ctx.saved_tensors
        unused = (None,) * 7
        if torch.is_grad_enabled():

            def layer(input, weight, x, *rest):
                x = input if ctx.same else x
                return _reference(input @ weight, x, *rest, mask_c, mask_pad, scale_x, ctx.directions, ctx.use_tanh)

            inputs = (input, weight, None if ctx.same else x, weight_c, bias, c_0)
            grads = _common.differentiable_backward(layer, inputs, (grad_h, grad_c_n), ctx.needs_input_grad[:6])
            return *grads, *unused
        if grad_h is None:
            grad_h = torch.zeros_like(c)
        grad_u, grad_x, grad_weight_c, grad_bias, grad_c_0 = call(
            _operator("sru_backward", ctx.backend),
            grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, ctx.directions, ctx.use_tanh,
        )  # fmt: skip
        rows, features = input.shape[0] * input.shape[1], input.shape[2]
        grad_u = grad_u.view(rows, weight.shape[1])
        grad_input = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = call(mm, grad_u.t(), input.reshape(rows, features), ctx.backend).t()
        if ctx.needs_input_grad[0]:
            if ctx.same:
                grad_input = call(add_mm_, grad_x.view(rows, features), grad_u, weight.t(), ctx.backend)
                grad_input = grad_input.view(input.shape)
            else:
                grad_input = call(mm, grad_u, weight.t(), ctx.backend).view(input.shape)
        grad_x = None if x is None or ctx.same else grad_x
        return grad_input, grad_weight, grad_x, grad_weight_c, grad_bias, grad_c_0, *unused


def _check_sru_types(
    name: str, weight_c: Any, bias: Any, x: Any, c_0: Any, mask_c: Any, mask_pad: Any, scale_x: Any, directions: Any,
    use_tanh: Any,
) -> None:  # fmt: skip
    _arguments.tensors(name, weight_c=weight_c, bias=bias)
    _arguments.optional_tensors(name, x=x, c_0=c_0, mask_c=mask_c, mask_pad=mask_pad)
    if not isinstance(scale_x, Tensor) and scale_x is not None:
        _arguments.number(name, "scale_x", scale_x)
    _arguments.integer(name, "directions", directions)
    _arguments.flag(name, "use_tanh", use_tanh)


def _sru_operands(
    shape: tuple[int, ...],
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor | None,
    mask_c: Tensor | None,
    mask_pad: Tensor | None,
    scale_x: Tensor | float | None,
    directions: int,
) -> list[Any]:
    """Checks an SRU's operands, whose u has this shape and the dtype and device of ``u``; fills in what is left out."""
    if len(shape) != 3:
        raise ValueError(f"sru: expected u to have 3 dimensions (T, B, directions * H * k), but got {tuple(shape)}")
    if directions not in (1, 2):
        raise ValueError(f"sru: expected directions to be 1 or 2, but got {directions}")
    if bias.dim() != 1 or bias.shape[0] == 0 or bias.shape[0] % (2 * directions):
        raise ValueError(f"sru: expected bias to have shape (2 * directions * H,), but got {tuple(bias.shape)}")
    steps, batch, features = shape
    channels = bias.shape[0] // 2
    if features not in (3 * channels, 4 * channels):
        raise ValueError(f"sru: expected u to have {3 * channels} or {4 * channels} features, but got {features}")
    if features == 4 * channels and x is not None:
        raise ValueError("sru: expected x to be None where u holds the projected input (k = 4)")
    if c_0 is None:
        c_0 = u.new_zeros(batch, channels)
    scale = u.new_full((1,), scale_x) if isinstance(scale_x, (int, float)) else scale_x
    expected = {
        "x": (x, (steps, batch, channels)),
        "weight_c": (weight_c, (steps, batch, 2 * channels) if weight_c.dim() == 3 else (2 * channels,)),
        "c_0": (c_0, (batch, channels)),
        "mask_c": (mask_c, (batch, channels)),
        "mask_pad": (mask_pad, (steps, batch)),
        "scale_x": (None if scale is None else scale.reshape(-1), (1,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"sru: expected {name} to have shape {shape}, but got {tuple(tensor.shape)}")
    if mask_pad is not None and mask_pad.dtype != torch.bool:
        raise TypeError(f"sru: expected mask_pad to be torch.bool, but got {mask_pad.dtype}")
    for name, tensor in (("mask_c", mask_c), ("scale_x", scale)):
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"sru: {name} is not differentiated: it must not require grad")
    others: dict[str, Tensor | None] = {
        "x": x,
        "weight_c": weight_c,
        "bias": bias,
        "c_0": c_0,
        "mask_c": mask_c,
        "scale_x": scale,
    }
    check_alike("sru", "u", u, others)
    if mask_pad is not None and mask_pad.device != u.device:
        raise RuntimeError(
            "sru: expected all tensors to be on the same device, "
            f"but u is on {u.device} and mask_pad is on {mask_pad.device}"
        )
    return [x, weight_c, bias, c_0, mask_c, mask_pad, None if scale is None else scale.reshape(1)]


def sru(
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor | None = None,
    *,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    scale_x: Tensor | float | None = None,
    directions: int = 1,
    use_tanh: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of a simple recurrent unit, after its matrix product :math:`u = x W` over all steps.

    .. math::
        f_t &= \sigma(u^1_t + w_f \odot c_{t-1} + b_f) \\
        r_t &= \sigma(u^2_t + w_r \odot c_{t-1} + b_r) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot u^0_t \\
        h_t &= s_t + m \odot r_t \odot (g(c_t) - s_t)

    with the skip term s = ``scale_x * x``, :math:`u^3` or 0, the dropout mask m, and g the identity or tanh. At padding
    c is carried over and h is 0. The state is carried in float32 (float64 for float64 inputs); autocast runs it in
    float32.

    Args:
        u: (T, B, directions * H * k), its k matrices innermost: k = 4 where u holds the projected input :math:`u^3`,
            else 3.
        x: (T, B, directions * H), the skip term's input; ``None`` for k = 4, and for k = 3 without a skip term.
        weight_c: (2 * directions * H,), :math:`w_f` then :math:`w_r`; or weights of each step,
            (T, B, 2 * directions * H), one pair :math:`(w_f, w_r)` after the other, on the reference only.
        bias: (2 * directions * H,), :math:`b_f` then :math:`b_r`.
        c_0: (B, directions * H), the state before the first step. Default: zero.
        mask_c: (B, directions * H), the dropout mask, not differentiated. Default: one.
        mask_pad: (T, B) bool, true at padding. Default: no padding.
        scale_x: number, or tensor of one element, not differentiated. Default: 1.
        directions: 1, or 2: the second half of the channels runs against time. Default: 1.
        use_tanh: g is tanh. Default: ``False``.

    Returns:
        h (T, B, directions * H) and the last state c_n (B, directions * H).

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Lei, Zhang, Wang, Dai and Artzi, *Simple Recurrent Units for Highly Parallelizable Recurrence*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> T, B, H = 5, 2, 4
        >>> x, weight = torch.randn(T, B, H), torch.randn(H, 3 * H)
        >>> h, c_n = seqaccel.functional.sru(x @ weight, x, torch.zeros(2 * H), torch.zeros(2 * H))
        >>> h.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    _arguments.tensor("sru", "u", u)
    _check_sru_types("sru", weight_c, bias, x, c_0, mask_c, mask_pad, scale_x, directions, use_tanh)
    return _sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh)


def _sru(
    u: Tensor, x: Tensor | None, weight_c: Tensor, bias: Tensor, c_0: Tensor | None, mask_c: Tensor | None,
    mask_pad: Tensor | None, scale_x: Tensor | float | None, directions: int, use_tanh: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``sru`` with arguments of the right types."""
    u, x, weight_c, bias, c_0, mask_c = in_float32_under_autocast(u, x, weight_c, bias, c_0, mask_c)
    if isinstance(scale_x, Tensor):
        (scale_x,) = in_float32_under_autocast(scale_x)
    operands = _sru_operands(tuple(u.shape), u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions)
    dtype, compute = u.dtype, _common.compute_dtype(u.dtype)
    computed = [t.to(compute) if t is not None and t.is_floating_point() else t for t in (u, *operands)]
    inputs: tuple[Any, ...] = (*computed, directions, use_tanh)
    if _common.transforms_active():
        h, c_n = _reference(*inputs)
    elif _onnx.exporting():
        cell = "sru_tanh" if use_tanh else "sru"
        h, c_n = _onnx.columns(cell, *computed[:6], computed[7], computed[6], None, None, directions)  # type: ignore[call-arg]
    else:
        if weight_c.dim() == 3:
            backend = backends.choose("sru with weights of each step", u, ("reference",))
        else:
            backend = backends.choose("sru", u, BACKENDS)
        if backend == "reference":
            h, c_n = _reference(*inputs)
        elif torch.compiler.is_compiling():  # autograd records the operator itself
            h, c_n, _ = _operator("sru_forward", backend)(*inputs, False)
        elif _common.needs_grad(*inputs[:5]):
            h, c_n = _SRU.apply(*inputs, backend)
        else:
            h, c_n, _ = call(_operator("sru_forward", backend), *inputs, False)
    return h.to(dtype), c_n.to(dtype)


def sru_layer(
    input: Tensor,
    weight: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor | None = None,
    *,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    scale_x: Tensor | float | None = None,
    directions: int = 1,
    use_tanh: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""``sru(input @ weight, x, ...)`` with one backward for both, which saves a pass over the gradient of the input.

    Args:
        input: (T, B, I), what is multiplied; often ``x`` itself.
        weight: (I, directions * H * k).
        x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh: see :func:`sru`.

    Returns:
        h (T, B, directions * H) and the last state c_n (B, directions * H).

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Lei, Zhang, Wang, Dai and Artzi, *Simple Recurrent Units for Highly Parallelizable Recurrence*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> T, B, H = 5, 2, 4
        >>> x, weight = torch.randn(T, B, H), torch.randn(H, 3 * H)
        >>> h, c_n = seqaccel.functional.sru_layer(x, weight, x, torch.zeros(2 * H), torch.zeros(2 * H))
        >>> h.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    _arguments.tensors("sru_layer", input=input, weight=weight)
    _check_sru_types("sru_layer", weight_c, bias, x, c_0, mask_c, mask_pad, scale_x, directions, use_tanh)
    if input.dim() != 3 or weight.dim() != 2 or input.shape[2] != weight.shape[0]:
        raise ValueError(
            "sru_layer: expected input (T, B, I) and weight (I, directions * H * k), "
            f"but got {tuple(input.shape)} and {tuple(weight.shape)}"
        )
    check_alike("sru_layer", "input", input, {} if _common.autocast_on(input.device.type) else {"weight": weight})
    plain = (
        input.dtype in (torch.float32, torch.float64)
        and weight_c.dim() == 1
        and not _common.autocast_on(input.device.type)
        and not _common.transforms_active()
        and not _onnx.exporting()
        and not _common.is_distributed(input)
    )
    backend = backends.choose("sru", input, BACKENDS) if plain else "reference"
    shape = (input.shape[0], input.shape[1], weight.shape[1])
    recorded = _common.needs_grad(input, weight, x, weight_c, bias, c_0)
    compiling = torch.compiler.is_compiling()
    if backend == "reference" or compiling or not recorded:
        if backend == "reference":
            u = input @ weight
        elif compiling:  # autograd records the product itself
            u = mm(input.flatten(0, 1), weight, backend).view(shape)
        else:
            u = call(mm, input.flatten(0, 1), weight, backend).view(shape)
        return _sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh)
    operands = _sru_operands(shape, input, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions)
    same = x is input
    if same:
        operands[0] = None
    return _SRULayer.apply(input, weight, *operands, same, directions, use_tanh, backend)


# ---- the operators' facts ----


def _sru_forward_fake(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh, save_c):
    shape = (u.shape[0], u.shape[1], c_0.shape[1])
    return u.new_empty(shape), u.new_empty(c_0.shape), u.new_empty(shape if save_c else (0,))


def _sru_backward_fake(grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, directions, use_tanh):
    grad_x = u.new_empty((0,) if x is None else x.shape)
    return (
        u.new_empty(u.shape),
        grad_x,
        u.new_empty(weight_c.shape),
        u.new_empty(bias.shape),
        u.new_empty(c_0.shape),
    )


def _sru_definition(*arguments):
    return _reference(*arguments[:10])


def _sru_recorded(backend, *arguments):
    *inputs, save_c = arguments
    kept: list[Tensor] = []
    h, c_n = _SRU.apply(*inputs, backend, kept)
    return h, c_n, kept[0] if save_c else kept[0].new_empty(0)


def _sru_flops(u, x, weight_c, bias, c_0, *_) -> int:
    """19 a value: two gates of two additions, a product and a sigmoid of four, the state's three, the output's four."""
    return 19 * u[0] * math.prod(c_0)


def _register(backend: str) -> None:
    suffix = "" if backend == "cpp" else "_triton"
    operands: dict[str | int, int] = {"u": 1, "x": 1, "c_0": 0, "mask_c": 0, "mask_pad": 1}
    register(
        Operator(
            "sru_forward" + suffix,
            _sru_forward_fake,
            _sru_flops,
            definition=_sru_definition,
            recorded=functools.partial(_sru_recorded, backend),
            batch=operands | {0: 1, 1: 0, 2: 1},
        )
    )
    register(
        Operator(
            "sru_backward" + suffix,
            _sru_backward_fake,
            lambda grad_h, grad_c_n, *operands: 2 * _sru_flops(*operands),
            batch=operands | {"grad_h": 1, "grad_c_n": 0, "c": 1, 0: 1, 1: 1, 4: 0},
            summed=(2, 3),
        )
    )


_register("cpp")
