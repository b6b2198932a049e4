"""The published multiplicative LSTM."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from seqaccel import _arguments, nn
from seqaccel.convert._weights import check_shapes, load_first_layer, reorder, tensors_of


def from_mlstm(weights: Mapping[str, Any], *, batch_first: bool = False) -> nn.MultiplicativeLSTM:
    r"""A multiplicative LSTM with weights in the published layout.

    .. math::
        m_t &= (x_t\, w_{mx}) \odot (h_{t-1}\, w_{mh}) \\
        i, f, o, u &= x_t\, w_x + m_t\, w_h + b

    With weight norm each column of a matrix is scaled to length 1 and multiplied by its gain.

    Args:
        weights: tensors or arrays ``wx`` (I, 4H), ``wh`` (H, 4H), ``wmx`` (I, H), ``wmh`` (H, H) and ``b`` (4H), gates
            in the order i, f, o, u; with weight norm also the gains ``gx``, ``gh`` (4H), ``gmx`` and ``gmh`` (H). The
            files of the published model of 4,096 units hold, in this order, the embedding, wx, wh (in four parts, to be
            concatenated), wmx, wmh, b, gx, gh, gmx, gmh and the output layer.
        batch_first: input and output are (B, T, ·). Default: ``False``.

    Returns:
        A new module of one layer, with the dtype and device of ``wx``.

    Raises:
        ValueError: a weight is missing, unknown or has another shape.

    Source: Krause et al., *Multiplicative LSTM for sequence modelling*, 2017; Radford et al., *Learning to generate
    reviews and discovering sentiment*, 2017, https://github.com/openai/generating-reviews-discovering-sentiment.

    Example:
        >>> import torch, seqaccel
        >>> shapes = {"wx": (3, 16), "wh": (4, 16), "wmx": (3, 4), "wmh": (4, 4), "b": (16,)}
        >>> seqaccel.from_mlstm({name: torch.randn(shape) for name, shape in shapes.items()})
        MultiplicativeLSTM(3, 4)
    """
    _arguments.flag("from_mlstm", "batch_first", batch_first)
    gains = {"wx": "gx", "wh": "gh", "wmx": "gmx", "wmh": "gmh"}
    tensors = tensors_of("from_mlstm", weights, {*gains, "b"}, set(gains.values()))
    if tensors["wx"].dim() != 2 or tensors["wh"].dim() != 2:
        raise ValueError("from_mlstm: expected wx and wh to have two dimensions")
    inputs, hidden = tensors["wx"].shape[0], tensors["wh"].shape[0]
    rows = 4 * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "wx": (inputs, rows), "wh": (hidden, rows), "wmx": (inputs, hidden), "wmh": (hidden, hidden), "b": (rows,),
        "gx": (rows,), "gh": (rows,), "gmx": (hidden,), "gmh": (hidden,),
    }  # fmt: skip
    check_shapes("from_mlstm", tensors, shapes)
    normed = set(gains.values()) & set(tensors)
    if normed and len(normed) < len(gains):
        raise ValueError(f"from_mlstm: expected all gains or none, but got {sorted(normed)}")

    def matrix(name: str) -> Tensor:
        weight = tensors[name]
        if normed:  # as tf.nn.l2_normalize has it
            weight = weight * weight.square().sum(0).clamp(min=1e-12).rsqrt() * tensors[gains[name]]
        return weight.T

    wx, order = tensors["wx"], (0, 1, 3, 2)
    module = nn.MultiplicativeLSTM(inputs, hidden, batch_first=batch_first, device=wx.device, dtype=wx.dtype)
    load_first_layer(
        module,
        {
            "weight_ih": reorder(matrix("wx"), order),
            "weight_hh": reorder(matrix("wh"), order),
            "bias_ih": reorder(tensors["b"], order),
            "weight_mx": matrix("wmx"),
            "weight_mh": matrix("wmh"),
        },
    )
    return module
