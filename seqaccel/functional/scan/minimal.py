"""The recurrences of minGRU and minLSTM."""

from typing import Any

from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.scan._columns import Caller, check_types, recurrence

_MIN_GRU, _MIN_LSTM = Caller("min_gru", {"c_0": "h_0"}), Caller("min_lstm", {"c_0": "h_0"})


def _minimal(
    caller: Caller, cell: str, u: Tensor, bias: Any, h_0: Any, mask_pad: Any, reset: Any, cu_seqlens: Any,
    directions: Any, candidate: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _arguments.tensor(caller.name, "u", u)
    if candidate not in ("linear", "g"):
        raise ValueError(f"{caller.name}: expected candidate to be 'linear' or 'g', but got {candidate!r}")
    check_types(caller, directions, bias=bias, c_0=h_0, mask_pad=mask_pad, reset=reset, cu_seqlens=cu_seqlens)
    cell = cell if candidate == "linear" else f"{cell}_g"
    return recurrence(caller, cell, u, None, None, bias, h_0, None, None, mask_pad, reset, cu_seqlens, directions)


def min_gru(
    u: Tensor,
    bias: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    mask_pad: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    directions: int = 1,
    candidate: str = "linear",
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of a minimal GRU (minGRU), after its matrix product u over all steps.

    .. math::
        z_t &= \sigma(u^z_t + b_z), \qquad \tilde{h}_t = g(u^h_t + b_h) \\
        h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \tilde{h}_t

    g is the identity, or for ``candidate="g"`` :math:`g(v) = v + 1/2` for :math:`v \ge 0` and :math:`\sigma(v)` below.
    At padding the state is carried over and h is 0. The state is carried in float32 (float64 for float64 inputs);
    autocast runs it in float32.

    Args:
        u: (T, B, directions * 2 * H), for each direction the rows of z and of the candidate.
        bias: (2 * directions * H,), :math:`b_z` of all directions, then :math:`b_h`. Default: zero.
        h_0: (B, directions * H), the state before the first step. Default: zero.
        mask_pad, reset, cu_seqlens, directions: see :func:`fo_pool`.
        candidate: ``"linear"`` or ``"g"``. Default: ``"linear"``.

    Returns:
        h (T, B, directions * H) and the last state, of the shape of ``h_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, offsets out of order, or an unknown candidate.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, *Were RNNs all we needed?*, 2024.

    Example:
        >>> import torch, seqaccel
        >>> h, h_n = seqaccel.functional.min_gru(torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]]]))
        >>> h.flatten()
        tensor([0.5000, 0.7500])
    """
    return _minimal(_MIN_GRU, "mingru", u, bias, h_0, mask_pad, reset, cu_seqlens, directions, candidate)


def min_lstm(
    u: Tensor,
    bias: Tensor | None = None,
    h_0: Tensor | None = None,
    *,
    mask_pad: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    directions: int = 1,
    candidate: str = "linear",
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of a minimal LSTM (minLSTM), after its matrix product u over all steps.

    .. math::
        f_t &= \sigma(u^f_t + b_f), \qquad i_t = \sigma(u^i_t + b_i), \qquad \tilde{h}_t = g(u^h_t + b_h) \\
        h_t &= \frac{f_t}{f_t + i_t} \odot h_{t-1} + \frac{i_t}{f_t + i_t} \odot \tilde{h}_t

    g is the identity, or for ``candidate="g"`` :math:`g(v) = v + 1/2` for :math:`v \ge 0` and :math:`\sigma(v)` below.
    At padding the state is carried over and h is 0. The state is carried in float32 (float64 for float64 inputs);
    autocast runs it in float32.

    Args:
        u: (T, B, directions * 3 * H), for each direction the rows of f, of i and of the candidate.
        bias: (3 * directions * H,), :math:`b_f` of all directions, then :math:`b_i`, then :math:`b_h`. Default: zero.
        h_0: (B, directions * H), the state before the first step. Default: zero.
        mask_pad, reset, cu_seqlens, directions: see :func:`fo_pool`.
        candidate: ``"linear"`` or ``"g"``. Default: ``"linear"``.

    Returns:
        h (T, B, directions * H) and the last state, of the shape of ``h_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, offsets out of order, or an unknown candidate.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, *Were RNNs all we needed?*, 2024.

    Example:
        >>> import torch, seqaccel
        >>> h, h_n = seqaccel.functional.min_lstm(torch.tensor([[[0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0]]]))
        >>> h.flatten()
        tensor([0.5000, 0.7500])
    """
    return _minimal(_MIN_LSTM, "minlstm", u, bias, h_0, mask_pad, reset, cu_seqlens, directions, candidate)
