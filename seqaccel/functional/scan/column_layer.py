"""A layer of any column cell."""

from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.scan import _columns
from seqaccel.functional.scan._cells import CELLS

_COLUMN_LAYER = _columns.Caller("column_layer", {"weight": "weight_hh"})


def column_layer(
    cell: str,
    input: Tensor,
    weight: Tensor,
    weight_hh: Tensor | None = None,
    bias: Tensor | None = None,
    c_0: Tensor | None = None,
    *,
    x: Tensor | None = None,
    mask: Tensor | None = None,
    scale: Tensor | float | None = None,
    mask_pad: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    directions: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""One layer, all directions, of a cell that is elementwise in its state: a matrix product over all steps, then the
    recurrence, with one backward for both.

    Args:
        cell: ``"sru"``, ``"sru_tanh"`` (:func:`sru_layer`), ``"fo_pool"``, ``"f_pool"`` (without the output gate;
            :func:`fo_pool`), ``"indrnn_relu"``, ``"indrnn_tanh"`` (:func:`indrnn`), ``"mingru"``, ``"mingru_g"``
            (:func:`min_gru`), ``"minlstm"`` or ``"minlstm_g"`` (:func:`min_lstm`).
        input: (T, B, I).
        weight: (directions * K * H, I), for each direction the rows of the cell's K inputs one after the other, as
            torch.nn's gates lie; SRU: (I, directions * H * k), see :func:`sru_layer`.
        weight_hh: what multiplies the state, of IndRNN and SRU; see there.
        bias: see the cell's function. Default: zero.
        c_0: (B, directions * H), the state before the first step. Default: zero.
        x: the skip term's input, of SRU.
        mask, scale: of SRU and the pools; see there.
        mask_pad, reset, cu_seqlens, directions: see :func:`fo_pool`.

    Returns:
        h (T, B, directions * H) and the last state, of the shape of ``c_0``.

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: an unknown cell, or shapes that do not fit.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Example:
        >>> import torch, seqaccel
        >>> x, weight = torch.randn(5, 2, 3), torch.randn(2 * 4, 3)
        >>> h, h_n = seqaccel.functional.column_layer("mingru", x, weight)
        >>> torch.allclose(h, seqaccel.functional.min_gru(x @ weight.T)[0], atol=1e-6), h_n.shape
        (True, torch.Size([2, 4]))
    """
    if cell not in CELLS:
        raise ValueError(f"column_layer: expected cell to be one of {', '.join(CELLS)}, but got {cell!r:.60}")
    _arguments.tensors("column_layer", input=input, weight=weight)
    tensors = {"x": x, "weight": weight_hh, "bias": bias, "c_0": c_0, "mask": mask, "mask_pad": mask_pad}
    _columns.check_types(_COLUMN_LAYER, directions, scale, **tensors, reset=reset, cu_seqlens=cu_seqlens)
    return _columns.layer(
        _COLUMN_LAYER, cell, input, weight, x, weight_hh, bias, c_0, mask, scale, mask_pad, reset, cu_seqlens,
        directions,
    )  # fmt: skip
