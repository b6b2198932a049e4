"""Linear scan: a recurrence that is linear in its state."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, register
from seqaccel.functional.scan._operands import BACKENDS, check_alike, in_float32_under_autocast, operator
from seqaccel.reference import scan as reference


def _operator(name: str, backend: str) -> Callable[..., Any]:
    return operator(name, backend, _register)


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
    a, b, h_0 = in_float32_under_autocast(a, b, h_0)
    check_alike("linear_scan", "a", a, {"b": b, "h_0": h_0})
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
        backend = backends.choose("linear_scan", a, BACKENDS, prefer=prefer)
        if backend == "reference":
            h = reference.linear_scan(a, b, h_0, reverse)
        elif torch.compiler.is_compiling():  # autograd records the operator itself
            h = _operator("linear_scan_forward", backend)(a, b, h_0, reverse)
        elif _common.needs_grad(a, b, h_0):
            h = _LinearScan.apply(a, b, h_0, reverse, backend)
        else:
            h = call(_operator("linear_scan_forward", backend), a, b, h_0, reverse)
    return h.reshape(shape).to(dtype)


# ---- the operators' facts ----


def _linear_scan_forward_fake(a, b, h_0, reverse):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _linear_scan_backward_fake(grad_h, a, h, h_0, reverse):
    def like_a():
        return torch.empty_like(a, memory_format=torch.contiguous_format)

    return like_a(), like_a(), a.new_empty(a.shape[0], a.shape[2])


def _linear_scan_recorded(backend, a, b, h_0, reverse):
    return _LinearScan.apply(a, b, h_0, reverse, backend)


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


_register("cpp")
