"""Independently recurrent networks."""

from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.scan._columns import Caller, check_types, recurrence

_INDRNN = Caller("indrnn", {"c_0": "h_0"})


def indrnn(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    mask_pad: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    directions: int = 1,
    nonlinearity: str = "relu",
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of an independently recurrent network (IndRNN), after its matrix product u over all steps.

    .. math::
        h_t = \varphi(u_t + w \odot h_{t-1} + b)

    At padding the state is carried over and h is 0. The state is carried in float32 (float64 for float64 inputs);
    autocast runs it in float32.

    Args:
        u: (T, B, directions * H).
        weight: w, (directions * H,).
        bias: b, (directions * H,). Default: zero.
        h_0: (B, directions * H), the state before the first step. Default: zero.
        mask_pad, reset, cu_seqlens, directions: see :func:`fo_pool`.
        nonlinearity: :math:`\varphi`, ``"relu"`` or ``"tanh"``. Default: ``"relu"``.

    Returns:
        h (T, B, directions * H) and the last state, of the shape of ``h_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, offsets out of order, or an unknown nonlinearity.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Li, Li, Cook, Zhu and Gao, *Independently recurrent neural network (IndRNN)*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> h, h_n = seqaccel.functional.indrnn(torch.ones(3, 1, 1), torch.tensor([0.5]))
        >>> h.flatten()
        tensor([1.0000, 1.5000, 1.7500])
    """
    _arguments.tensors("indrnn", u=u, weight=weight)
    if nonlinearity not in ("relu", "tanh"):
        raise ValueError(f"indrnn: expected nonlinearity to be 'relu' or 'tanh', but got {nonlinearity!r}")
    check_types(_INDRNN, directions, bias=bias, c_0=h_0, mask_pad=mask_pad, reset=reset,
                cu_seqlens=cu_seqlens)  # fmt: skip
    cell = f"indrnn_{nonlinearity}"
    return recurrence(_INDRNN, cell, u, None, weight, bias, h_0, None, None, mask_pad, reset, cu_seqlens, directions)
