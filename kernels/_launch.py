"""What the Triton launchers share: how a kernel is launched, and how a shipped configuration is described."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    multiples_of_16: tuple[str, ...] = ()


def interpreted(kernel: Any) -> bool:
    """True if ``kernel`` runs in Triton's interpreter (``TRITON_INTERPRET=1`` when it was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def wrap(kernel: Any) -> Any:
    """What a ``torch.library.triton_op`` launches: a compiled kernel in traceable form, an interpreted one as it is."""
    return kernel if interpreted(kernel) else torch.library.wrap_triton(kernel)
