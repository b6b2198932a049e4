"""What the Triton launchers share: operators, launches, and how a shipped configuration is described."""

from __future__ import annotations

import dataclasses
import functools
import inspect
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
        most_arch: that of the last GPUs that ``tests/offline.py`` compiles it for, where one compilation says enough.
        least_shared: bytes of shared memory that a block may use on the GPUs it is for: all have 99 KiB.
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
    most_arch: int = 100
    least_shared: int = 99 << 10


def interpreted(kernel: Any) -> bool:
    """True if ``kernel`` runs in Triton's interpreter (``TRITON_INTERPRET=1`` when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


#: The registered operators by name.
OPERATORS: dict[str, Callable[..., Any]] = {}

_here = threading.local()


def wrap_triton(kernel: Any) -> Any:
    """The kernel for an operator to launch: wrapped so that torch can trace it, or itself where nothing traces.

    torch looks for calls of a function of this name to find an operator's kernels. Their sources are part of the keys
    of its caches.
    """
    plain = interpreted(kernel) or getattr(_here, "plain", False)
    return kernel if plain else torch.library.wrap_triton(kernel)


def precision(dtype: torch.dtype, switch: Any) -> str:
    """The precision of a product: ``"tf32"`` in float32 if torch's switch (an ``fp32_precision``) allows it.

    Else it is ``"ieee"``, and so it is on AMD GPUs: Triton supports TF32 on few of them.
    """
    tf32 = dtype == torch.float32 and switch.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 else "ieee"


def _plain(argument: Any) -> bool:
    """Whether a kernel may read the argument: it is no subclass of Tensor and no list that holds one."""
    if isinstance(argument, (list, tuple)):
        return all(map(_plain, argument))
    return not isinstance(argument, torch.Tensor) or type(argument) in (torch.Tensor, torch.nn.Parameter)


def _traced(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher must see the call: for a compiler, tracer, transform, mode or subclass of Tensor."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or not all(map(_plain, arguments))
    )


def _is_elsewhere(t: torch.Tensor) -> bool:
    return _plain(t) and t.is_cuda and t.device.index != torch.cuda.current_device()


def _resolved(argument: Any) -> Any:
    """The argument with torch's negative bits applied: a kernel reads memory without them."""
    if isinstance(argument, (list, tuple)):
        return [_resolved(a) for a in argument]
    return argument.resolve_neg() if isinstance(argument, torch.Tensor) and argument.is_neg() else argument


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the device of the tensors the current one, on which Triton launches."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        arguments, options = tuple(map(_resolved, arguments)), {k: _resolved(a) for k, a in options.items()}
        first = next(a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor))
        if not _is_elsewhere(first):
            return function(*arguments, **options)
        with torch.cuda.device(first.device):
            return function(*arguments, **options)

    return run


def operator(register: Callable[..., Any], name: str, **kwargs: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function with ``torch.library.triton_op`` or ``custom_op``, and calls it itself where nothing traces.

    The dispatcher's Python takes longer than the rest of a small call. Autograd is the caller's matter.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__annotations__ = inspect.get_annotations(function, eval_str=True)  # torch needs types, not text
        guarded = _on_its_device(function)
        registered = register(name, **kwargs)(guarded)

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
        OPERATORS[name] = call
        return call

    return decorate
