"""What the public functions of every family share."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Check = TypeVar("Check", bound=Callable[..., Any])


def unrecorded(check: Check) -> Check:
    """A function that only checks: ``torch.jit.trace`` records and warns of nothing that it does."""

    @functools.wraps(check)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or not torch._C._is_tracing():
            return check(*args, **kwargs)
        jit: Any = torch._C
        state = jit._get_tracing_state()
        jit._set_tracing_state(None)
        try:
            return check(*args, **kwargs)
        finally:
            jit._set_tracing_state(state)

    return checked  # type: ignore[return-value]


def constant_while_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result`` without importing Dynamo: called, not traced, while Dynamo traces."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_while_compiling
def transforms_active() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is on: the reference serves there.

    Dynamo compiles anew where the answer would be another one.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def is_batched(*tensors: Tensor | None) -> bool:
    """Whether one is of a vmap over a backward pass (``is_grads_batched``, ``vectorize=True``, ``torch.func.vmap``),
    which has no rule for operators that write or take lists."""
    functorch = torch._C._functorch
    return not torch.compiler.is_compiling() and any(
        t is not None and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t)) for t in tensors
    )


#: The class DTensor, once ``torch.distributed.tensor`` is imported.
DTENSOR: tuple[type, ...] = ()


def is_distributed(t: Tensor) -> bool:
    """Whether it is a DTensor: torch's recurrent operators take none, and ours are given shards of the batch."""
    return isinstance(t, DTENSOR)


def is_traced(t: Tensor) -> bool:
    """Whether a choice by the tensor's size is not to be made: a trace would keep it for all sizes, and a DTensor's
    size is not that of its shards."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or is_distributed(t)


def has_values(t: Tensor) -> bool:
    """Whether the tensor's elements can be looked at: it is neither fake nor on the meta device."""
    return not isinstance(t, torch._subclasses.FakeTensor) and t.device.type != "meta"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must record this call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


#: Asked once: Dynamo of torch 2.11 cannot trace the question.
_AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def autocast_on(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; never for one that does not know it, such as ``meta``."""
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on for their device, else as they are."""
    device_type = next(t.device.type for t in tensors if t is not None)
    if not autocast_on(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype the C++ kernels calculate in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of their sums (see :func:`compute_dtype`)."""
    return tuple(None if t is None else t.to(compute_dtype(t.dtype)) for t in tensors)


def differentiable_backward(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients through the reference, which where grad mode is on can be differentiated again.

    Args:
        reference: takes ``inputs``, returns the output or outputs that ``grad_outputs`` belong to.
        inputs: the forward's tensor inputs (None for an absent optional one).
        grad_outputs: one for each output; None counts as zero.
        needs: which inputs need a gradient.

    Returns:
        One gradient, or None, for each input.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views cut the paths between inputs, so that each gradient is a partial derivative.
        views = [t.view_as(t) if t is not None and t.is_floating_point() else t for t in inputs]
        views = [
            t if t is None or t.requires_grad or not need else t.detach().requires_grad_()
            for t, need in zip(views, needs, strict=True)
        ]
        outputs = reference(*views)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        pairs = [
            (out, grad)
            for out, grad in zip(outputs, grad_outputs, strict=True)
            if grad is not None and out.requires_grad
        ]
        wanted = [t for t, need in zip(views, needs, strict=True) if need and t is not None]
        if not pairs or not wanted:
            return tuple(None for _ in inputs)
        grads = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=recorded,
                allow_unused=True,
            )
        )
    return tuple(next(grads) if need and t is not None else None for t, need in zip(views, needs, strict=True))
