"""Linear scan and the recurrence of SRU."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel import backends
from seqaccel.functional import _arguments, _common, _onnx
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.reference import scan as reference

__all__ = ["linear_scan", "sru", "sru_layer"]

_BACKENDS = ("reference", "cpp", "triton", "cuda")


def _operator(name: str, backend: str) -> Callable[..., Any]:
    if backend == "triton":
        from seqaccel.kernels import scan as kernels

        once(_register, "triton")
        return getattr(kernels, name)
    return getattr(torch.ops.seqaccel, name).default


def _mm(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """a @ b; on a CPU by torch's library or by our kernels, whichever is faster on its cores."""
    return torch.ops.seqaccel.fastest_mm.default(a, b) if backend == "cpp" else torch.mm(a, b)


def _add_mm_(out: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    """out += a @ b, likewise."""
    if backend != "cpp" or _common.is_batched(a):
        return out.addmm_(a, b)
    torch.ops.seqaccel.add_fastest_mm_.default(out, a, b)
    return out


def _in_float32_under_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """A running sum is no matrix product: as torch does for cumsum, autocast means float32 here."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not _common.autocast_on(device_type):
        return tensors
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in narrow else t for t in tensors)


def _check_alike(operator: str, first_name: str, first: Tensor, others: dict[str, Tensor | None]) -> None:
    if not first.is_floating_point():
        raise TypeError(f"{operator}: expected {first_name} to be floating point, but got {first.dtype}")
    for name, t in others.items():
        if t is None:
            continue
        if t.dtype != first.dtype:
            raise TypeError(
                f"{operator}: expected {name} to have the dtype of {first_name}, {first.dtype}, but got {t.dtype}"
            )
        if t.device != first.device:
            raise RuntimeError(
                f"{operator}: expected all tensors to be on the same device, "
                f"but {first_name} is on {first.device} and {name} is on {t.device}"
            )


# ---- linear scan ----


class _LinearScan(torch.autograd.Function):
    """Saves a and h: 2 * D values a step. Backward is one scan against time."""

    @staticmethod
    def forward(ctx, a, b, h_0, reverse, backend):
        h = call(_operator("linear_scan_forward", backend), a, b, h_0, reverse)
        ctx.save_for_backward(a, h_0, h)
        ctx.reverse, ctx.backend = reverse, backend
        return h

    @staticmethod
    def backward(ctx, grad_h):
        a, h_0, h = ctx.saved_tensors
        if torch.is_grad_enabled():
            grad_a, grad_b, grad_h_0 = reference.linear_scan_gradients(grad_h, a, h, h_0, ctx.reverse)
        else:
            backward = _operator("linear_scan_backward", ctx.backend)
            grad_a, grad_b, grad_h_0 = call(backward, grad_h, a, h, h_0, ctx.reverse)
        return grad_a, grad_b, None if h_0 is None else grad_h_0, None, None


def linear_scan(a: Tensor, b: Tensor, h_0: Tensor | None = None, *, reverse: bool = False, dim: int = -2) -> Tensor:
    r"""Every state of an elementwise linear recurrence.

    .. math::
        h_t = a_t \odot h_{t-1} + b_t \qquad \text{or, reversed,} \qquad h_t = a_t \odot h_{t+1} + b_t

    The state is carried in float32 (float64 for float64 inputs); autocast runs it in float32. Where elements of one
    sequence are adjacent in memory (``dim=-1``), and on a GPU, kernels form products of neighbouring coefficients (up
    to 16; on a GPU 2048, or where there are few sequences and channels a part of the sequence): coefficients that are
    infinite, or so large that these products overflow, can give NaN where the loop would not.

    Args:
        a: coefficients, with the steps along ``dim``, e.g. (B, T, D). ``a`` and ``b`` may be broadcast against each
            other.
        b: inputs, of the same dtype and device.
        h_0: the state before the first step (reversed: after the last), the shape of ``a`` and ``b`` without ``dim``,
            e.g. (B, D), or one that expands to it. Default: zero.
        reverse: run from the last step to the first. Default: ``False``.
        dim: the dimension of time. Default: -2.

    Returns:
        h, the broadcast shape of ``a`` and ``b``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit.
        IndexError: ``dim`` is out of range.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: the primitive under Blelloch, *Prefix sums and their applications*, 1990; Martin and Cundy, *Parallelizing
    linear recurrent neural nets over sequence length*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> a, b = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
        >>> seqaccel.functional.linear_scan(a, b).flatten()
        tensor([1.0000, 1.5000, 1.7500])
        >>> seqaccel.functional.linear_scan(a, b, torch.full((1, 1), 2.0), reverse=True).flatten()
        tensor([2., 2., 2.])
    """
    _arguments.tensors("linear_scan", a=a, b=b)
    _arguments.tensor("linear_scan", "h_0", h_0, optional=True)
    _arguments.flag("linear_scan", "reverse", reverse)
    _arguments.integer("linear_scan", "dim", dim)
    a, b, h_0 = _in_float32_under_autocast(a, b, h_0)
    _check_alike("linear_scan", "a", a, {"b": b, "h_0": h_0})
    if a.shape != b.shape:
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            raise ValueError(
                "linear_scan: expected a and b to have shapes that broadcast, "
                f"but got {tuple(a.shape)} and {tuple(b.shape)}"
            ) from None
    if not -a.dim() <= dim < a.dim():
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-a.dim()}, {a.dim() - 1}], but got {dim})"
        )
    dim %= a.dim()
    before, steps, after = a.shape[:dim], a.shape[dim], a.shape[dim + 1 :]
    if h_0 is not None and h_0.shape != before + after:
        try:
            h_0 = h_0.expand(before + after)
        except RuntimeError:
            raise ValueError(
                f"linear_scan: expected h_0 to have shape {tuple(before + after)}, but got {tuple(h_0.shape)}"
            ) from None
    shape, dtype = a.shape, a.dtype
    batch, width = math.prod(before), math.prod(after)
    compute = _common.compute_dtype(dtype)
    a, b = (t.to(compute).reshape(batch, steps, width) for t in (a, b))
    h_0 = None if h_0 is None else h_0.to(compute).reshape(batch, width)
    if _common.transforms_active():
        h = reference.linear_scan(a, b, h_0, reverse)
    elif _onnx.exporting():
        h = _onnx.linear_scan(a, b, h_0, reverse)
    else:
        prefer = None
        if a.device.type == "cuda":
            if batch > 65535:  # more than a launch of Triton's kernels has room for
                prefer = "cuda" if backends.why_not_auto("cuda", a.device) is None else "reference"
            elif a.dtype == torch.float32 and a.numel() >= 1 << 27 and width >= 32:
                prefer = "triton"  # 10% faster on an H100 where there is so much to do, slower where there is less
        backend = backends.choose("linear_scan", a, _BACKENDS, prefer=prefer)
        if backend == "reference":
            h = reference.linear_scan(a, b, h_0, reverse)
        elif torch.compiler.is_compiling():  # autograd records the operator itself
            h = _operator("linear_scan_forward", backend)(a, b, h_0, reverse)
        elif _common.needs_grad(a, b, h_0):
            h = _LinearScan.apply(a, b, h_0, reverse, backend)
        else:
            h = call(_operator("linear_scan_forward", backend), a, b, h_0, reverse)
    return h.reshape(shape).to(dtype)


# ---- SRU ----


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
                lambda *inputs: reference.sru(*inputs, mask_c, mask_pad, scale_x, ctx.directions, ctx.use_tanh),
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
        u = call(_mm, input.reshape(steps * batch, features), weight, backend).view(steps, batch, weight.shape[1])
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
                return reference.sru(input @ weight, x, *rest, mask_c, mask_pad, scale_x, ctx.directions, ctx.use_tanh)

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
            grad_weight = call(_mm, grad_u.t(), input.reshape(rows, features), ctx.backend).t()
        if ctx.needs_input_grad[0]:
            if ctx.same:
                grad_input = call(_add_mm_, grad_x.view(rows, features), grad_u, weight.t(), ctx.backend)
                grad_input = grad_input.view(input.shape)
            else:
                grad_input = call(_mm, grad_u, weight.t(), ctx.backend).view(input.shape)
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
    _check_alike("sru", "u", u, others)
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
    u, x, weight_c, bias, c_0, mask_c = _in_float32_under_autocast(u, x, weight_c, bias, c_0, mask_c)
    if isinstance(scale_x, Tensor):
        (scale_x,) = _in_float32_under_autocast(scale_x)
    operands = _sru_operands(tuple(u.shape), u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions)
    dtype, compute = u.dtype, _common.compute_dtype(u.dtype)
    computed = [t.to(compute) if t is not None and t.is_floating_point() else t for t in (u, *operands)]
    inputs: tuple[Any, ...] = (*computed, directions, use_tanh)
    if _common.transforms_active():
        h, c_n = reference.sru(*inputs)
    elif _onnx.exporting():
        h, c_n = _onnx.sru(*inputs)
    else:
        if weight_c.dim() == 3:
            backend = backends.choose("sru with weights of each step", u, ("reference",))
        else:
            backend = backends.choose("sru", u, _BACKENDS)
        if backend == "reference":
            h, c_n = reference.sru(*inputs)
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
    _check_alike("sru_layer", "input", input, {} if _common.autocast_on(input.device.type) else {"weight": weight})
    plain = (
        input.dtype in (torch.float32, torch.float64)
        and weight_c.dim() == 1
        and not _common.autocast_on(input.device.type)
        and not _common.transforms_active()
        and not _onnx.exporting()
    )
    backend = backends.choose("sru", input, _BACKENDS) if plain else "reference"
    shape = (input.shape[0], input.shape[1], weight.shape[1])
    recorded = _common.needs_grad(input, weight, x, weight_c, bias, c_0)
    compiling = torch.compiler.is_compiling()
    if backend == "reference" or compiling or not recorded:
        flat = input.flatten(0, 1)
        if backend == "reference" or compiling:  # autograd records the product itself
            product = _mm(flat, weight, backend)
        else:
            product = call(_mm, flat, weight, backend)
        u = product.view(shape)
        return _sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh)
    operands = _sru_operands(shape, input, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions)
    same = x is input
    if same:
        operands[0] = None
    return _SRULayer.apply(input, weight, *operands, same, directions, use_tanh, backend)


# ---- shapes of the operators' results ----


def _linear_scan_forward_fake(a, b, h_0, reverse):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _linear_scan_backward_fake(grad_h, a, h, h_0, reverse):
    def like_a():
        return torch.empty_like(a, memory_format=torch.contiguous_format)

    return like_a(), like_a(), a.new_empty(a.shape[0], a.shape[2])


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


def _fastest_mm_fake(input, mat2):
    return input.new_empty(input.shape[0], mat2.shape[1])


def _add_fastest_mm_fake(out, input, mat2):
    return None


# ---- the operators' facts ----


class _Product(torch.autograd.Function):
    """``fastest_mm``, whose gradients are such products. The one of the right factor is made transposed (as in
    ``_SRULayer``)."""

    @staticmethod
    def forward(ctx, input, mat2):
        ctx.save_for_backward(input, mat2)
        return call(_mm, input, mat2, "cpp")

    @staticmethod
    def backward(ctx, grad):
        input, mat2 = ctx.saved_tensors
        grad_input = _mm(grad, mat2.t(), "cpp") if ctx.needs_input_grad[0] else None
        return grad_input, _mm(grad.t(), input, "cpp").t() if ctx.needs_input_grad[1] else None


def _mm_flops(input, mat2) -> int:
    return 2 * input[0] * input[1] * mat2[1]


def _add_mm_definition(out, input, mat2) -> None:
    out.add_(torch.mm(input, mat2))


def _linear_scan_recorded(backend, a, b, h_0, reverse):
    return _LinearScan.apply(a, b, h_0, reverse, backend)


def _sru_definition(*arguments):
    return reference.sru(*arguments[:10])


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
    named: dict[str | int, int] = {"a": 0, "b": 0, "h_0": 0, 0: 0}
    register(
        Operator(
            "linear_scan_forward" + suffix,
            _linear_scan_forward_fake,
            lambda a, *_: 2 * math.prod(a),
            definition=reference.linear_scan,
            recorded=functools.partial(_linear_scan_recorded, backend),
            batch=named,
        )
    )
    register(
        Operator(
            "linear_scan_backward" + suffix,
            _linear_scan_backward_fake,
            lambda grad_h, *_: 3 * math.prod(grad_h),
            batch={"grad_h": 0, "a": 0, "h": 0, "h_0": 0, 0: 0, 1: 0, 2: 0},
        )
    )
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
for _name in ("fastest_mm", "mm"):
    register(
        Operator(
            _name, _fastest_mm_fake, _mm_flops, definition=torch.mm, recorded=_Product.apply, batch={"input": 0, 0: 0}
        )
    )
register(
    Operator(
        "add_fastest_mm_",
        _add_fastest_mm_fake,
        lambda out, *factors: _mm_flops(*factors),
        definition=_add_mm_definition,
        batch={"out": 0, "input": 0},
        mutates=True,
    )
)


register(
    Operator(
        "elementwise",
        lambda input, function: torch.empty_like(input, memory_format=torch.contiguous_format),
        lambda input, function: math.prod(input),
        definition=lambda input, function: getattr(torch, function)(input),
        batch={"input": 0, 0: 0},
    )
)
