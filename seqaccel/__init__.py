"""Custom kernels for sequence models in PyTorch: ``import seqaccel.nn`` in place of ``torch.nn``."""

import warnings

__version__ = "0.1.0"

from seqaccel import _extension, data, functional, nn
from seqaccel.backends import backend
from seqaccel.convert import (
    benchmark,
    convert,
    from_haste,
    from_mingru,
    from_mlstm,
    from_qrnn,
    optimize,
    patch_torch,
    revert,
    unpatch_torch,
)
from seqaccel.program import Concatenation, Residual
from seqaccel.quantization import quantize
from seqaccel.session import Session

from seqaccel import _steps as _steps  # isort: skip  gives the modules their steps

__all__ = ["Session", "backend", "convert", "from_haste", "from_mingru", "from_mlstm", "from_qrnn", "functional", "nn"]
__all__ += ["Concatenation", "Residual", "benchmark", "data", "optimize", "patch_torch", "quantize", "revert"]
__all__ += ["unpatch_torch"]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "backends"])


if _extension.cpp_error is not None:
    warnings.warn(
        f"seqaccel runs without its C++ kernels ({_extension.cpp_error}); the reference serves on the CPU. "
        f"{_extension.cpp_cure}",
        stacklevel=2,
    )
