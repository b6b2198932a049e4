"""Linear scan: a recurrence that is linear in its state."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, overload

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
    def forward(ctx, a, b, h_0, cu_seqlens, reset, reverse, return_last, backend):
        h, h_last = call(_operator("linear_scan_forward", backend), a, b, h_0, cu_seqlens, reset, reverse, return_last)
        ctx.save_for_backward(a, h_0, cu_seqlens, reset, h)
        ctx.reverse, ctx.backend, ctx.return_last = reverse, backend, return_last
        ctx.set_materialize_grads(False)
        return h, h_last

    @staticmethod
    def backward(ctx, grad_h, grad_h_last):
        a, h_0, cu_seqlens, reset, h = ctx.saved_tensors
        if grad_h is None and grad_h_last is None:
            return (None,) * 8
        grad_h = torch.zeros_like(h) if grad_h is None else grad_h
        arguments = grad_h, grad_h_last if ctx.return_last else None, a, h, h_0, cu_seqlens, reset, ctx.reverse
        if torch.is_grad_enabled():
            grad_a, grad_b, grad_h_0 = reference.linear_scan_gradients(*arguments)
        else:
            grad_a, grad_b, grad_h_0 = call(_operator("linear_scan_backward", ctx.backend), *arguments)
        return grad_a, grad_b, None if h_0 is None else grad_h_0, None, None, None, None, None


def _run(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None,
    cu_seqlens: Tensor | None,
    reset: Tensor | None,
    reverse: bool,
    return_last: bool,
) -> tuple[Tensor, Tensor]:
    """h and the last states of a, b (B, T, D) by the backend for them."""
    arguments = a, b, h_0, cu_seqlens, reset, reverse, return_last
    if _common.transforms_active():
        return reference.linear_scan(*arguments)
    if _onnx.exporting():
        return _onnx.linear_scan(*arguments)
    prefer = None
    if a.device.type == "cuda":
        sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if sequences > 65535 or a.is_complex():  # more than Triton's launches have room for; what it has no type for
            prefer = "cuda" if backends.why_not_auto("cuda", a.device) is None else "reference"
        elif a.dtype == torch.float32 and a.numel() >= 1 << 27 and a.shape[2] >= 32:
            prefer = "triton"  # 10% faster on an H100 where there is so much to do, slower where there is less
    backend = backends.choose("linear_scan", a, BACKENDS, prefer=prefer)
    if backend == "reference":
        return reference.linear_scan(*arguments)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        return _operator("linear_scan_forward", backend)(*arguments)
    if _common.needs_grad(a, b, h_0):
        return _LinearScan.apply(*arguments, backend)
    return call(_operator("linear_scan_forward", backend), *arguments)


def _broadcast(where: str, dim: int, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """a and b of one shape, and ``dim`` from 0 on."""
    if a.shape != b.shape:
        try:
            a, b = torch.broadcast_tensors(a, b)
        except RuntimeError:
            raise ValueError(
                f"{where}: expected a and b to have shapes that broadcast, but got {tuple(a.shape)} and "
                f"{tuple(b.shape)}"
            ) from None
    if not -a.dim() <= dim < a.dim():
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-a.dim()}, {a.dim() - 1}], but got {dim})"
        )
    return a, b, dim % a.dim()


@_common.unrecorded
def _check_offsets(cu_seqlens: Tensor, a: Tensor, dim: int) -> None:
    where = "linear_scan"
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: expected cu_seqlens to be int32 or int64, but got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{where}: expected cu_seqlens to have shape (sequences + 1,), but got {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != a.device:
        raise RuntimeError(
            f"{where}: expected all tensors to be on the same device, "
            f"but a is on {a.device} and cu_seqlens is on {cu_seqlens.device}"
        )
    if math.prod(a.shape[:dim]) != 1:
        raise ValueError(
            f"{where}: expected a batch of 1 with cu_seqlens, but got shape {tuple(a.shape)} with time at {dim}"
        )
    if cu_seqlens.shape[0] == 1 and a.shape[dim] != 0:
        raise ValueError(f"{where}: expected cu_seqlens to hold the offsets of a sequence, but got one offset")
    if a.device.type != "cpu" or torch.compiler.is_compiling() or _common.transforms_active():
        return  # values on a GPU stay there: kernels keep offsets in range
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != a.shape[dim] or offsets != sorted(offsets):
        raise ValueError(
            f"{where}: expected cu_seqlens to ascend from 0 to the number of steps, {a.shape[dim]}, "
            f"but got {offsets[:20]}"
        )


@_common.unrecorded
def _check_reset(reset: Tensor, a: Tensor, dim: int, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("linear_scan: expected no reset with cu_seqlens, which says where sequences begin")
    dims = min(max(reset.dim(), dim + 1), a.dim())
    _arguments.reset("linear_scan", reset, tuple(a.shape[:dims]), a.device)


@overload
def linear_scan(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None = None,
    *,
    reverse: bool = False,
    dim: int = -2,
    cu_seqlens: Tensor | None = None,
    return_last: Literal[False] = False,
    reset: Tensor | None = None,
) -> Tensor: ...


@overload
def linear_scan(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None = None,
    *,
    reverse: bool = False,
    dim: int = -2,
    cu_seqlens: Tensor | None = None,
    return_last: Literal[True],
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def linear_scan(
    a: Tensor,
    b: Tensor,
    h_0: Tensor | None = None,
    *,
    reverse: bool = False,
    dim: int = -2,
    cu_seqlens: Tensor | None = None,
    return_last: bool = False,
    reset: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Every state of an elementwise linear recurrence.

    .. math::
        h_t = a_t \odot h_{t-1} + b_t \qquad \text{or, reversed,} \qquad h_t = a_t \odot h_{t+1} + b_t

    The state is carried in float32 (float64 and complex types: in their own precision); autocast runs it in float32.
    Where elements of one sequence are adjacent in memory (``dim=-1``), and on a GPU, kernels form products of
    neighbouring coefficients (up to 16; on a GPU 2048, or where there are few sequences and channels a part of the
    sequence): coefficients that are infinite, or so large that these products overflow, can give NaN where the loop
    would not.

    Args:
        a: coefficients, real or complex, with the steps along ``dim``, e.g. (B, T, D). ``a`` and ``b`` may be
            broadcast against each other.
        b: inputs, of the same dtype and device.
        h_0: the state before the first step (reversed: after the last), the shape of ``a`` and ``b`` without ``dim``,
            e.g. (B, D), or one that expands to it. With ``cu_seqlens`` (N, ...), one state for each sequence, where
            ... are the dimensions after ``dim``. Default: zero.
        reverse: run from the last step to the first. Default: ``False``.
        dim: the dimension of time. Default: -2.
        reset: bool, true where an episode begins, with the leading dimensions of ``a`` and ``b``, through ``dim`` at
            least: (B, T) for (B, T, D), (T, B) for (T, B, D) with ``dim=0`` (whose tensors are copied batch first). The
            state before an episode's first step (reversed: after its last) is zero, and so ``h_0`` is not read where
            one begins at the first step. A coefficient that is zero ends an episode too on a GPU: of a state before it
            that is not finite nothing remains. Default: none.
        cu_seqlens: (N + 1,) int32 or int64: N sequences lie one after the other along ``dim``, sequence n in the steps
            [``cu_seqlens[n]``, ``cu_seqlens[n + 1]``); the dimensions before ``dim`` have size 1. Default: every row
            is one sequence.
        return_last: return the states after the last steps too. Default: ``False``.

    Returns:
        h, the broadcast shape of ``a`` and ``b``. With ``return_last`` (h, h_last): h_last has the shape of ``h_0``,
        and is what ``h_0`` of the next chunk must be. A sequence without steps ends as it began.

    Raises:
        TypeError: a dtype that is neither floating point nor complex, or differs between the arguments; offsets that
            are no integers.
        ValueError: shapes that do not fit; on a CPU, offsets that do not ascend from 0 to the number of steps.
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
        >>> two = torch.tensor([0, 1, 3])  # sequences of one step and of two
        >>> h, h_last = seqaccel.functional.linear_scan(a, b, cu_seqlens=two, return_last=True)
        >>> h.flatten(), h_last.flatten()
        (tensor([1.0000, 1.0000, 1.5000]), tensor([1.0000, 1.5000]))
        >>> seqaccel.functional.linear_scan(a, b, reset=torch.tensor([[False, True, False]])).flatten()
        tensor([1.0000, 1.0000, 1.5000])
    """
    _arguments.tensors("linear_scan", a=a, b=b)
    _arguments.optional_tensors("linear_scan", h_0=h_0, cu_seqlens=cu_seqlens, reset=reset)
    _arguments.flags("linear_scan", reverse=reverse, return_last=return_last)
    _arguments.integer("linear_scan", "dim", dim)
    a, b, h_0 = in_float32_under_autocast(a, b, h_0)
    check_alike("linear_scan", "a", a, {"b": b, "h_0": h_0}, may_be_complex=True)
    a, b, dim = _broadcast("linear_scan", dim, a, b)
    if reset is not None:
        _check_reset(reset, a, dim, cu_seqlens)
        last = reset.dim() - 1
        if last > dim:  # steps behind all dimensions that tell episodes apart
            a, b, reset = (t.movedim(dim, last) for t in (a, b, reset))
            found = linear_scan(a, b, h_0, reverse=reverse, dim=last, reset=reset, return_last=return_last)  # type: ignore[call-overload]
            return (found[0].movedim(last, dim), found[1]) if return_last else found.movedim(last, dim)
        reset = reset.reshape(math.prod(a.shape[:dim]), a.shape[dim])
    before, steps, after = a.shape[:dim], a.shape[dim], a.shape[dim + 1 :]
    batch, width, ends = math.prod(before), math.prod(after), before + after
    sequences = batch
    if cu_seqlens is not None:
        _check_offsets(cu_seqlens, a, dim)
        cu_seqlens = cu_seqlens.to(torch.int64)
        sequences = cu_seqlens.shape[0] - 1
        ends = torch.Size((sequences, *after))
    if h_0 is not None and h_0.shape != ends:
        try:
            h_0 = h_0.expand(ends)
        except RuntimeError:
            raise ValueError(
                f"linear_scan: expected h_0 to have shape {tuple(ends)}, but got {tuple(h_0.shape)}"
            ) from None
    shape, flat = a.shape, dim == 1 and a.dim() == 3  # calls that change nothing would take 3 us
    if not flat:
        a, b = a.reshape(batch, steps, width), b.reshape(batch, steps, width)
        h_0 = None if h_0 is None else h_0.reshape(sequences, width)
    h, h_last = _run(a, b, h_0, cu_seqlens, reset, bool(reverse), bool(return_last))
    if not flat:
        h, h_last = h.reshape(shape), h_last.reshape(ends) if return_last else h_last
    return (h, h_last) if return_last else h


def scan_summary(a: Tensor, b: Tensor, dim: int = -2) -> tuple[Tensor, Tensor]:
    r"""What a chunk of a linear recurrence does to the state before it.

    .. math::
        A = \prod_t a_t \qquad h = \text{the last state from a zero state}

    The state after the chunk is :math:`A \odot h_0 + h`. Workers that hold parts of a sequence exchange these two
    tensors instead of running one after the other: :func:`join_summaries` joins those of the workers before, which
    gives a worker the state that its :func:`linear_scan` begins with.

    Args:
        a: coefficients, as of :func:`linear_scan`.
        b: inputs.
        dim: the dimension of time. Default: -2.

    Returns:
        (A, h), both of the broadcast shape of ``a`` and ``b`` without ``dim``. Of a chunk without steps: (1, 0).

    Raises:
        As :func:`linear_scan`.

    Source: Blelloch, *Prefix sums and their applications*, 1990, section 1.4.

    Example: a sequence split over two workers.
        >>> import torch
        >>> from seqaccel.functional import join_summaries, linear_scan, scan_summary
        >>> a, b, h_0 = torch.rand(2, 100, 3), torch.randn(2, 100, 3), torch.randn(2, 3)
        >>> first = scan_summary(a[:, :60], b[:, :60])  # the first worker sends its summary (all_gather)
        >>> second = scan_summary(a[:, 60:], b[:, 60:])
        >>> product, offset = first
        >>> state = product * h_0 + offset  # what the second worker begins with
        >>> parts = linear_scan(a[:, :60], b[:, :60], h_0), linear_scan(a[:, 60:], b[:, 60:], state)
        >>> torch.testing.assert_close(torch.cat(parts, 1), linear_scan(a, b, h_0))
        >>> product, offset = join_summaries(first, second)  # a third worker's would join both
        >>> torch.testing.assert_close(product * h_0 + offset, parts[1][:, -1])
    """
    _arguments.tensors("scan_summary", a=a, b=b)
    _arguments.integer("scan_summary", "dim", dim)
    a, b = in_float32_under_autocast(a, b)
    check_alike("scan_summary", "a", a, {"b": b}, may_be_complex=True)
    a, b, dim = _broadcast("scan_summary", dim, a, b)
    # The product in the scan's precision. Its kernel is torch's: it handles zeros in gradients of any order.
    wide = torch.float32 if a.dtype in (torch.float16, torch.bfloat16) else a.dtype
    return a.prod(dim, dtype=wide).to(a.dtype), linear_scan(a, b, dim=dim, return_last=True)[1]


def join_summaries(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    r"""The summary of a chunk followed by another one.

    .. math::
        (A_1, h_1), (A_2, h_2) \mapsto (A_2 \odot A_1, \; A_2 \odot h_1 + h_2)

    It is associative: summaries of many chunks may be joined in any grouping, in the order of the chunks.

    Args:
        first: (A, h) of the earlier chunk, from :func:`scan_summary` or joined.
        second: (A, h) of the later chunk.

    Returns:
        (A, h) of both.

    Raises:
        TypeError: not tuples of tensors.
        ValueError: not two tensors each.

    Example:
        >>> import torch
        >>> from seqaccel.functional import join_summaries, scan_summary
        >>> a, b = torch.rand(1, 8, 3), torch.randn(1, 8, 3)
        >>> joined = join_summaries(scan_summary(a[:, :5], b[:, :5]), scan_summary(a[:, 5:], b[:, 5:]))
        >>> torch.testing.assert_close(joined, scan_summary(a, b))
    """
    _arguments.states("join_summaries", "first", first, ("product", "last state"))
    _arguments.states("join_summaries", "second", second, ("product", "last state"))
    return second[0] * first[0], second[0] * first[1] + second[1]


# ---- the operators' facts ----


def _linear_scan_forward_fake(a, b, h_0, cu_seqlens, reset, reverse, return_last):
    sequences = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h = torch.empty_like(a, memory_format=torch.contiguous_format)
    return h, a.new_empty(sequences if return_last else 0, a.shape[2])


def _linear_scan_backward_fake(grad_h, grad_h_last, a, h, h_0, cu_seqlens, reset, reverse):
    def like_a():
        return torch.empty_like(a, memory_format=torch.contiguous_format)

    return like_a(), like_a(), a.new_empty(a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, a.shape[2])


def _linear_scan_recorded(backend, *arguments):
    return _LinearScan.apply(*arguments, backend)


def _register(backend: str) -> None:
    suffix = "" if backend == "cpp" else "_triton"
    register(
        Operator(
            "linear_scan_forward" + suffix,
            _linear_scan_forward_fake,
            lambda a, *_: 2 * math.prod(a),
            definition=reference.linear_scan,
            recorded=functools.partial(_linear_scan_recorded, backend),
            batch={"a": 0, "b": 0, "h_0": 0, "reset": 0, 0: 0, 1: 0},
            packs=("cu_seqlens", 1),
        )
    )
    register(
        Operator(
            "linear_scan_backward" + suffix,
            _linear_scan_backward_fake,
            lambda grad_h, *_: 3 * math.prod(grad_h),
            batch={"grad_h": 0, "grad_h_last": 0, "a": 0, "h": 0, "h_0": 0, "reset": 0, 0: 0, 1: 0, 2: 0},
            packs=("cu_seqlens", 1),
        )
    )


_register("cpp")
