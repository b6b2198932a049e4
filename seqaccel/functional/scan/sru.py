"""The recurrence of SRU, alone and with its matrix product."""

from typing import Any

from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.scan._columns import Caller, check_types, layer, recurrence

_NAMES = {"weight": "weight_c", "mask": "mask_c", "scale": "scale_x"}
_SRU, _SRU_LAYER = Caller("sru", _NAMES), Caller("sru_layer", _NAMES)


def _check(
    caller: Caller, x: Any, weight_c: Any, bias: Any, c_0: Any, mask_c: Any, scale_x: Any, mask_pad: Any, reset: Any,
    cu_seqlens: Any, directions: Any, use_tanh: Any,
) -> str:  # fmt: skip
    """The types of operands; returns the cell."""
    _arguments.tensors(caller.name, weight_c=weight_c, bias=bias)
    check_types(caller, directions, scale_x, x=x, c_0=c_0, mask=mask_c, mask_pad=mask_pad, reset=reset,
                cu_seqlens=cu_seqlens)  # fmt: skip
    if use_tanh is not False:
        _arguments.flag(caller.name, "use_tanh", use_tanh)
    return "sru_tanh" if use_tanh else "sru"


def sru(
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor | None = None,
    *,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    scale_x: Tensor | float | None = None,
    directions: int = 1,
    use_tanh: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The recurrence of a simple recurrent unit, after its matrix product :math:`u = x W` over all steps.

    .. math::
        f_t &= \sigma(u^1_t + w_f \odot c_{t-1} + b_f) \\
        r_t &= \sigma(u^2_t + w_r \odot c_{t-1} + b_r) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot u^0_t \\
        h_t &= s_t + m \odot r_t \odot (g(c_t) - s_t)

    with the skip term s = ``scale_x * x``, :math:`u^3` or 0, the dropout mask m, and g the identity or tanh. At padding
    c is carried over and h is 0. The state is carried in float32 (float64 for float64 inputs); autocast runs it in
    float32.

    Args:
        u: (T, B, directions * H * k), its k matrices innermost: k = 4 where u holds the projected input :math:`u^3`,
            else 3.
        x: (T, B, directions * H), the skip term's input; ``None`` for k = 4, and for k = 3 without a skip term.
        weight_c: (2 * directions * H,), :math:`w_f` then :math:`w_r`; or weights of each step,
            (T, B, 2 * directions * H), one pair :math:`(w_f, w_r)` after the other, on the reference only.
        bias: (2 * directions * H,), :math:`b_f` then :math:`b_r`.
        c_0: (B, directions * H), the state before the first step. Default: zero.
        mask_c: (B, directions * H), the dropout mask, not differentiated. Default: one.
        mask_pad: (T, B) bool, true at padding. Default: no padding.
        reset: (T, B) bool, true where an episode begins: the state before its first step (against time: after its last)
            is zero, and so ``c_0`` is not read where one begins at the first step. Default: none.
        cu_seqlens: (N + 1,) int64, ascending from 0 to T: N sequences lie one after the other in a batch of 1, and
            ``c_0`` and ``mask_c`` have N rows. Default: every row of the batch is one sequence.
        scale_x: number, or tensor of one element, not differentiated. Default: 1.
        directions: 1, or 2: the second half of the channels runs against time. Default: 1.
        use_tanh: g is tanh. Default: ``False``.

    Returns:
        h (T, B, directions * H) and the last state c_n, of the shape of ``c_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, or offsets out of order.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Lei, Zhang, Wang, Dai and Artzi, *Simple Recurrent Units for Highly Parallelizable Recurrence*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> T, B, H = 5, 2, 4
        >>> x, weight = torch.randn(T, B, H), torch.randn(H, 3 * H)
        >>> h, c_n = seqaccel.functional.sru(x @ weight, x, torch.zeros(2 * H), torch.zeros(2 * H))
        >>> h.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    _arguments.tensor("sru", "u", u)
    operands = (x, weight_c, bias, c_0, mask_c, scale_x, mask_pad, reset, cu_seqlens, directions)
    return recurrence(_SRU, _check(_SRU, *operands, use_tanh), u, *operands)


def sru_layer(
    input: Tensor,
    weight: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor | None = None,
    *,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    scale_x: Tensor | float | None = None,
    directions: int = 1,
    use_tanh: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``sru(input @ weight, x, ...)`` with one backward for both, which saves a pass over the gradient of the input.

    Args:
        input: (T, B, I), what is multiplied; often ``x`` itself.
        weight: (I, directions * H * k).
        x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh, reset, cu_seqlens: see :func:`sru`.

    Returns:
        h (T, B, directions * H) and the last state c_n, of the shape of ``c_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, or offsets out of order.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Lei, Zhang, Wang, Dai and Artzi, *Simple Recurrent Units for Highly Parallelizable Recurrence*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> T, B, H = 5, 2, 4
        >>> x, weight = torch.randn(T, B, H), torch.randn(H, 3 * H)
        >>> h, c_n = seqaccel.functional.sru_layer(x, weight, x, torch.zeros(2 * H), torch.zeros(2 * H))
        >>> h.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    _arguments.tensors("sru_layer", input=input, weight=weight)
    operands = (x, weight_c, bias, c_0, mask_c, scale_x, mask_pad, reset, cu_seqlens, directions)
    return layer(_SRU_LAYER, _check(_SRU_LAYER, *operands, use_tanh), input, weight, *operands)
