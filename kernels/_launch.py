"""What the Triton launchers share: operators, launches, and how a shipped configuration is described."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One specialisation of a kernel that the package launches: a row of a family's ``CONFIGURATIONS`` table.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: Triton type of each argument that is not a constexpr, by name, e.g.
            ``{"p_x": "*fp32", "T": "i32", "scale": "fp32"}``. A pointer is taken to be 16-byte aligned.
        constexprs: value of each ``tl.constexpr`` argument, by name (``None`` for a pointer that is absent).
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        multiples_of_16: names of integer arguments that are multiples of 16 at every launch with this configuration.
        least_arch: compute capability (times ten) of the GPUs it is for.
        spills: bytes a thread that may be spilled, where a GPU was measured to be faster so than with a smaller tile.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    multiples_of_16: tuple[str, ...] = ()
    spills: int = 0
    least_arch: int = 80


def interpreted(kernel: Any) -> bool:
    """True if ``kernel`` runs in Triton's interpreter (``TRITON_INTERPRET=1`` when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


_here = threading.local()


def wrap(kernel: Any) -> Any:
    """What an operator launches: the kernel in traceable form, or as it is where nothing traces."""
    plain = interpreted(kernel) or getattr(_here, "plain", False)
    return kernel if plain else torch.library.wrap_triton(kernel)


def _plain(t: torch.Tensor) -> bool:
    return type(t) in (torch.Tensor, torch.nn.Parameter)


def _traced(arguments: tuple[Any, ...]) -> bool:
    """Whether anything must see the operator: a compiler, a tracer, a transform or mode, a subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(isinstance(a, torch.Tensor) and not _plain(a) for a in arguments)
    )


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; a tensor may be on another."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        first = next(a for a in arguments if isinstance(a, torch.Tensor))
        if not _plain(first) or not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device(first.device):
            return function(*arguments)

    return run


def operator(register: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function with ``torch.library.triton_op`` or ``custom_op``, and calls it itself where nothing traces.

    The dispatcher's Python takes longer than the rest of a small call. Autograd is the caller's matter.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        guarded = _on_its_device(function)
        # What a triton_op launches is traced, and its annotations are read where it stands.
        registered = register(*args, **kwargs)(function if register is torch.library.triton_op else guarded)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            if _traced(arguments):
                return registered(*arguments)
            before = getattr(_here, "plain", False)
            _here.plain = True
            try:
                return guarded(*arguments)
            finally:
                _here.plain = before

        call.register_fake = registered.register_fake  # type: ignore[attr-defined]
        return call

    return decorate
