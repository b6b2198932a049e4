"""The pooling of quasi-recurrent networks."""

from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.scan._columns import Caller, check_types, recurrence

_FO_POOL = Caller("fo_pool", {})


def fo_pool(
    u: Tensor,
    bias: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: Tensor | float | None = None,
    mask_pad: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    directions: int = 1,
    output_gate: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""The pooling of a quasi-recurrent network (QRNN), after its convolution u over all steps.

    .. math::
        z_t &= \tanh(u^z_t + b_z), \qquad f_t = \sigma(u^f_t + b_f), \qquad o_t = \sigma(u^o_t + b_o) \\
        c_t &= c_{t-1} + s\, m_t \odot (1 - f_t) \odot (z_t - c_{t-1}) \\
        h_t &= o_t \odot c_t

    m is a mask of zoneout and s a number (without both, :math:`c_t = f_t \odot c_{t-1} + (1 - f_t) \odot z_t`); without
    the output gate h is c. At padding c is carried over and h is 0. The state is carried in float32 (float64 for
    float64 inputs); autocast runs it in float32.

    Args:
        u: (T, B, directions * 3 * H), for each direction the rows of z, f and o one after the other; of z and f without
            the output gate.
        bias: (3 * directions * H,), :math:`b_z` of all directions, then :math:`b_f`, then :math:`b_o`. Default: zero.
        c_0: (B, directions * H), the state before the first step. Default: zero.
        mask: (T, B, directions * H), not differentiated. Default: one.
        scale: number, or tensor of one element, not differentiated. Default: 1.
        mask_pad: (T, B) bool, true at padding. Default: no padding.
        reset: (T, B) bool, true where an episode begins: the state before its first step (against time: after its last)
            is zero, and so ``c_0`` is not read where one begins at the first step. Default: none.
        cu_seqlens: (N + 1,) int64, ascending from 0 to T: N sequences lie one after the other in a batch of 1, and
            ``c_0`` has N rows. Default: every row of the batch is one sequence.
        directions: 1, or 2: the second half of the channels runs against time. Default: 1.
        output_gate: with the gate o. Default: ``True``.

    Returns:
        h (T, B, directions * H) and the last state c_n, of the shape of ``c_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, or offsets out of order.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Bradbury, Merity, Xiong and Socher, *Quasi-recurrent neural networks*, 2017; zoneout: Krueger et al., 2017.

    Example:
        >>> import torch, seqaccel
        >>> h, c_n = seqaccel.functional.fo_pool(torch.randn(5, 2, 3 * 4))
        >>> h.shape, c_n.shape
        (torch.Size([5, 2, 4]), torch.Size([2, 4]))
    """
    _arguments.tensor("fo_pool", "u", u)
    _arguments.flag("fo_pool", "output_gate", output_gate)
    check_types(_FO_POOL, directions, scale, bias=bias, c_0=c_0, mask=mask, mask_pad=mask_pad, reset=reset,
                cu_seqlens=cu_seqlens)  # fmt: skip
    cell = "fo_pool" if output_gate else "f_pool"
    return recurrence(_FO_POOL, cell, u, None, None, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens, directions)
