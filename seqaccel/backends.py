"""Which implementations of an operator exist, and which one runs.

Backends:
    ``reference``  plain PyTorch, the definition; every device and dtype
    ``cpp``        our C++ kernels (CPU)
    ``triton``     our Triton kernels (GPU; on a CPU only under Triton's interpreter, ``TRITON_INTERPRET=1``)
    ``cuda``       our CUDA C++ kernels (GPU)
    ``torch``      torch's own operator for the same job, where there is one
    ``auto``       the fastest verified one for the tensor at hand

``auto`` takes ``cpp`` on a CPU and, on a GPU, a backend that :data:`VERIFIED` lists; else ``torch`` where the operator
has it, else ``reference``. Under ``torch.jit.trace`` (and ``torch.onnx.export(dynamo=False)``) it takes one of the
latter two, because such graphs hold torch's own operators only. A backend asked for by name runs or raises; nothing
replaces it.
"""

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch

from seqaccel import _extension

__all__ = ["NAMES", "VERIFIED", "asked", "available", "backend", "choose", "current", "isa", "why_missing"]

NAMES = ("auto", "reference", "cpp", "triton", "cuda", "torch")

#: GPU backends whose tests have passed on a GPU, for each operator: ``auto`` chooses among these, first come first.
VERIFIED: dict[str, tuple[str, ...]] = {
    "linear_scan": (),  # its CUDA and Triton kernels have changed since a GPU ran them
    "causal_conv1d": (),  # its Triton kernels have changed since a GPU ran them
    "causal_conv2d": (),  # no GPU has run its kernels
    "wavenet_layer": (),  # nor these
    "hierarchical_attention": (),  # its Triton kernels have changed since a GPU ran them
    "block_sparse_attention": (),  # no GPU has run its kernels
    "additive_attention": (),  # nor these
    "rnn_tanh": ("triton",),
    "rnn_relu": ("triton",),
    "lstm": ("triton",),
    "gru": ("triton",),
    "gru_reset_before": ("triton",),
    "peephole_lstm": ("triton",),
    "layer_norm_lstm": ("triton",),
    "layer_norm_lstm_normalized_cell": ("triton",),
    "layer_norm_gru": ("triton",),
    "multiplicative_lstm": ("triton",),
    # No GPU has run these cells' kernels.
    "ligru_relu": (),
    "ligru_relu_masked": (),
    "ligru_tanh": (),
    "ligru_tanh_masked": (),
    # Column cells: no GPU has run their kernels, which replaced those of SRU.
    "sru": (),
    "sru_tanh": (),
    "fo_pool": (),
    "f_pool": (),
    "indrnn_relu": (),
    "indrnn_tanh": (),
    "mingru": (),
    "mingru_g": (),
    "minlstm": (),
    "minlstm_g": (),
}


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}, but got {name!r}")
    return name


_DEFAULT = _checked(os.environ.get("SEQACCEL_BACKEND") or "auto", "SEQACCEL_BACKEND")

#: What the innermost open block of this thread or task asks for; None outside of them.
_asked: ContextVar[str | None] = ContextVar("seqaccel_backend", default=None)

#: Whether a block was ever opened, which autograd's own threads, that inherit only torch's settings, must look for.
_ever_asked = False

#: The name of (thread, backend) among torch's settings of a thread.
_KEY = "seqaccel_backend"

#: A block inside of what Dynamo traces; None while anything runs.
_traced: str | None = None

_this = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    # Dynamo cannot read a ContextVar; an attribute of a module it reads, and guards, whatever gives it.
    if name == "asked_here":
        return asked()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def asked() -> str:
    """:func:`current` where Dynamo does not trace, in less time."""
    name = _asked.get()
    if name is not None:
        return name
    if _ever_asked and torch._C._is_key_in_tls(_KEY):
        thread, inherited = torch._C._get_obj_in_tls(_KEY)
        if thread != threading.get_ident() and inherited is not None:
            return inherited
    return _DEFAULT


def current() -> str:
    """The backend asked for: the innermost :func:`backend`, else ``SEQACCEL_BACKEND``, else ``"auto"``."""
    if torch.compiler.is_dynamo_compiling():
        return _this.asked_here if _traced is None else _traced
    return asked()


def _stash(name: str | None) -> None:
    stashed = (threading.get_ident(), name)
    count = sys.getrefcount(stashed)
    torch._C._stash_obj_in_tls(_KEY, stashed)
    if sys.getrefcount(stashed) == count:  # torch 2.11 takes a reference without counting it
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stashed))


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every seqaccel operator inside the block on one backend.

    Args:
        name: ``"reference"``, ``"cpp"``, ``"triton"``, ``"cuda"``, ``"torch"`` or ``"auto"``. The environment
            variable ``SEQACCEL_BACKEND`` sets it for a whole process; the block sets it for its thread (or asyncio
            task) and for the backward passes that it starts. A new thread starts with the setting of the process.

    Raises:
        ValueError: the name is unknown. An operator that does not have the backend raises ``RuntimeError`` when called.

    Example:
        >>> import torch, seqaccel
        >>> a = b = torch.ones(1, 3, 2)
        >>> with seqaccel.backend("reference"):
        ...     h = seqaccel.functional.linear_scan(a, b)
        >>> h[0, :, 0]
        tensor([1., 2., 3.])
    """
    global _ever_asked, _traced
    _checked(name, "backend")
    if torch.compiler.is_dynamo_compiling():
        outer, _traced = _traced, name
        try:
            yield
        finally:
            _traced = outer
        return
    previous = _asked.get()
    _asked.set(name)
    _ever_asked = True
    _stash(name)
    try:
        yield
    finally:
        _asked.set(previous)
        _stash(previous)


#: The instruction sets that open blocks ask for, and first the one before them all.
_open_isas: list[list[str]] = []
_isa_lock = threading.Lock()


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Runs the C++ kernels compiled for one instruction set inside the block.

    Args:
        name: ``"portable"``, ``"avx2"``, ``"avx512"``, ``"avx512_bf16"`` (AVX-512 with BF16 and VNNI; where a kernel
            has no use for them, AVX-512) or ``"auto"``. ``SEQACCEL_ISA`` sets it for a whole process. The setting
            holds for the process: if blocks overlap in time, the one that began last wins.

    Raises:
        RuntimeError: unknown, or this processor does not have it.
    """
    mine = [name]
    with _isa_lock:
        before = torch.ops.seqaccel.isa()
        torch.ops.seqaccel.set_isa(name)
        if not _open_isas:
            _open_isas.append([before])
        _open_isas.append(mine)
    try:
        yield
    finally:
        with _isa_lock:
            _open_isas[:] = [asked for asked in _open_isas if asked is not mine]
            torch.ops.seqaccel.set_isa(_open_isas[-1][0])
            if len(_open_isas) == 1:
                _open_isas.clear()


def why_missing(name: str, device_type: str) -> str | None:
    """Why a backend cannot run on this kind of device here, or None where it can."""
    if name in ("reference", "torch"):
        return None
    if name == "cpp":
        return _extension.cpp_error if device_type == "cpu" else f"it runs on a CPU; the tensors are on {device_type}"
    if name == "cuda":
        return _extension.cuda_error if device_type == "cuda" else f"it runs on a GPU; the tensors are on {device_type}"
    if _extension.triton_error or device_type == "cuda":
        return _extension.triton_error
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"it runs on a GPU; the tensors are on {device_type} (TRITON_INTERPRET=1 runs it on a CPU, for tests)"


def available(device_type: str = "cpu") -> dict[str, str | None]:
    """Every backend, with the reason it cannot run on this kind of device, or None where it can."""
    return {name: why_missing(name, device_type) for name in NAMES[1:]}


def why_not_auto(name: str, device: torch.device) -> str | None:
    """Why ``auto`` does not take a backend on a device, or None where it may; asked for by name, it is tried."""
    reason = why_missing(name, device.type)
    if reason or device.type != "cuda" or name not in ("triton", "cuda"):
        return reason
    if torch.version.hip is not None:
        return "its kernels have run on no AMD GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] < 8:
        return f"it is for compute capability 8.0 and later; this GPU has {capability[0]}.{capability[1]}"
    return _extension.triton_build_error() if name == "triton" else _extension.cuda_device_error(device.index or 0)


why_not_auto._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what assume_constant_result sets


def torch_has_amx() -> bool:
    """Whether torch's products of bfloat16 run on AMX here, for which our kernels have nothing."""
    return (
        _extension.cpp_error is None
        and torch.ops.seqaccel.isa() == "avx512_bf16"
        and torch.cpu._is_amx_tile_supported()
    )


def node(input: Any) -> Any:
    """The calls and autograd nodes in C++ (``csrc/autograd``), or None where they are not there, cannot serve, or
    another backend was asked for. A call that returns None declines: the general path does it."""
    if torch.compiler.is_dynamo_compiling() or type(input) is not torch.Tensor or not input.is_cpu:
        return None
    return _extension.autograd if asked() in ("auto", "cpp") else None


def choose(operator: str, tensor: torch.Tensor, supported: Sequence[str], *, prefer: str | None = None) -> str:
    """The backend that runs an operator.

    Args:
        operator: name of the operator, for messages and :data:`VERIFIED`.
        tensor: the tensor whose device and dtype decide.
        supported: the backends this operator has.
        prefer: what ``auto`` takes for this shape where it measured fastest.

    Returns:
        One of ``supported``.

    Raises:
        RuntimeError: a backend asked for by name is not there; the message says why.
    """
    device_type = tensor.device.type
    name = current()
    if name != "auto":
        if name not in supported:
            raise RuntimeError(f"{operator}: no backend {name!r}; it has {', '.join(supported)}")
        reason = why_missing(name, device_type)
        if reason:
            raise RuntimeError(f"{operator}: backend {name!r} is not available: {reason}")
        return name
    plain = device_type == "cpu" and prefer is None and "cpp" in supported and _extension.cpp_error is None
    if plain and not torch.jit.is_tracing():
        return "cpp"  # the loop's answer, sooner
    verified = ("cpp",) if device_type == "cpu" else VERIFIED.get(operator, ()) if device_type == "cuda" else ()
    if prefer is not None and (prefer in ("reference", "torch") or prefer in verified):
        verified = (prefer, *verified)
    for candidate in () if torch.jit.is_tracing() else verified:
        if candidate in supported and why_not_auto(candidate, tensor.device) is None:
            return candidate
    return "torch" if "torch" in supported else "reference"


if _extension.cpp_error is None and os.environ.get("SEQACCEL_ISA"):
    torch.ops.seqaccel.set_isa(os.environ["SEQACCEL_ISA"])
