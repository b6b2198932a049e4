"""Swap the layers of an existing model, and take over the weights of other packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seqaccel import nn
from seqaccel.functional import _arguments

__all__ = ["convert", "from_haste", "from_mlstm"]

#: What each torch layer becomes. It has the same attributes and parameters, so that changing the class is enough.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}


def convert(model: torch.nn.Module) -> torch.nn.Module:
    """Makes every torch.nn layer of a model that has a drop-in here that drop-in, in place.

    Parameters, buffers, hooks, names and the training mode stay what they are, so that optimisers and checkpoints made
    before go on working. Subclasses of a torch layer are left alone. The layers: ``RNN``, ``LSTM``, ``GRU``,
    ``RNNCell``, ``LSTMCell`` and ``GRUCell``.

    A converted layer is a ``torch.nn.RNNBase`` (or ``RNNCellBase``), but no ``torch.nn.LSTM``: code that asks
    ``isinstance(layer, torch.nn.LSTM)`` to know whether a state is (h, c) or h must ask for ``layer.mode == "LSTM"``
    or for ``isinstance(layer, (torch.nn.LSTM, seqaccel.nn.LSTM))`` too.

    Args:
        model: any module.

    Returns:
        ``model``, or, if it is such a layer itself, the same object with its new class.

    Example:
        >>> import torch, seqaccel
        >>> model = torch.nn.Sequential(torch.nn.LSTM(4, 8))
        >>> type(seqaccel.convert(model)[0])
        <class 'seqaccel.nn.rnn.LSTM'>
    """
    if not isinstance(model, torch.nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"convert: expected model to be a torch.nn.Module, but got {kind}")
    for module in model.modules():
        replacement = REPLACEMENTS.get(type(module))
        if replacement is not None:
            module.__class__ = replacement
    return model


def _rows(weight: Tensor, order: Sequence[int]) -> Tensor:
    """The gates, blocks of the first dimension, in another order."""
    blocks = weight.chunk(len(order))
    return torch.cat([blocks[i] for i in order])


def _tensors(title: str, weights: Mapping[str, Any], required: set[str], optional: set[str]) -> dict[str, Tensor]:
    if not isinstance(weights, Mapping):
        raise TypeError(f"{title}: expected weights by name, a mapping, but got {type(weights).__name__}")
    missing, unknown = required - set(weights), set(weights) - required - optional
    if missing or unknown:
        what = [f"without {sorted(missing)}"] if missing else []
        what += [f"with {sorted(unknown)}"] if unknown else []
        raise ValueError(f"{title}: weights {' and '.join(what)}; expected {sorted(required)}")
    return {name: torch.as_tensor(weight).detach() for name, weight in weights.items()}


def _check_shapes(title: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(f"{title}: expected {name} to have shape {shapes[name]}, but got {tuple(tensor.shape)}")


def _load(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Into the first layer; a parameter that ``weights`` does not have becomes zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = weights.get(name.removesuffix("_l0"))
            parameter.zero_() if value is None else parameter.copy_(value)


def from_haste(
    source: torch.nn.Module | Mapping[str, Any],
    *,
    zoneout: float | None = None,
    dropout: float | None = None,
    batch_first: bool | None = None,
) -> nn.LSTM | nn.GRU | nn.LayerNormLSTM | nn.LayerNormGRU:
    r"""A layer that computes what a layer of the package `haste` computes, with its weights.

    Which one the weights tell: ``LSTM``, ``GRU``, ``LayerNormLSTM`` or ``LayerNormGRU``. haste's kernels are (I, G·H)
    and (H, G·H) with the gates in the order i, g, f, o or z, r, h; ours are transposed, in torch's order. An LSTM's one
    bias becomes ``bias_ih``, and ``bias_hh`` is zero.

    Args:
        source: a layer of ``haste_pytorch``, or its state_dict: tensors or arrays ``kernel``, ``recurrent_kernel``,
            ``bias``, for a GRU ``recurrent_bias``, with layer norm ``gamma`` (2, G·H), and for an LSTM with layer norm
            ``gamma_h``, ``beta_h``.
        zoneout: haste's, which zones h only. Default: the layer's own, or 0.
        dropout: haste's, of the recurrent kernel. Default: the layer's own, or 0.
        batch_first: input and output are (B, T, ·). Default: the layer's own, or ``False``.

    Returns:
        A new module of one layer, with the weights' dtype and device, in the layer's own training mode.

    Raises:
        ValueError: the weights are not those of one of the four layers.

    Source: https://github.com/lmnt-com/haste, version 0.5.

    Example:
        >>> import torch, seqaccel
        >>> weights = {"kernel": torch.randn(3, 16), "recurrent_kernel": torch.randn(4, 16), "bias": torch.zeros(16)}
        >>> seqaccel.from_haste(weights, zoneout=0.1)
        LSTM(3, 4, zoneout=(0.1, 0.0))
    """
    for name, given in (("zoneout", zoneout), ("dropout", dropout)):
        if given is not None:
            _arguments.probability("from_haste", name, given)
    if batch_first is not None:
        _arguments.flag("from_haste", "batch_first", batch_first)
    training = True
    if isinstance(source, torch.nn.Module):
        zoneout = getattr(source, "zoneout", 0.0) if zoneout is None else zoneout
        dropout = getattr(source, "dropout", 0.0) if dropout is None else dropout
        batch_first = getattr(source, "batch_first", False) if batch_first is None else batch_first
        training = source.training
        source = source.state_dict()
    required, optional = {"kernel", "recurrent_kernel", "bias"}, {"recurrent_bias", "gamma", "gamma_h", "beta_h"}
    tensors = _tensors("from_haste", source, required, optional)
    kernel, recurrent_kernel = tensors["kernel"], tensors["recurrent_kernel"]
    if kernel.dim() != 2 or recurrent_kernel.dim() != 2:
        raise ValueError("from_haste: expected kernel and recurrent_kernel to have two dimensions")
    inputs, hidden = kernel.shape[0], recurrent_kernel.shape[0]
    is_gru, norms = "recurrent_bias" in tensors, "gamma" in tensors
    order = (1, 0, 2) if is_gru else (0, 2, 1, 3)
    rows = len(order) * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (inputs, rows), "recurrent_kernel": (hidden, rows), "bias": (rows,), "recurrent_bias": (rows,),
        "gamma": (2, rows), "gamma_h": (hidden,), "beta_h": (hidden,),
    }  # fmt: skip
    _check_shapes("from_haste", tensors, shapes)
    if norms and not is_gru and not {"gamma_h", "beta_h"} <= set(tensors):
        raise ValueError("from_haste: a layer-norm LSTM has gamma_h and beta_h")
    if (is_gru or not norms) and {"gamma_h", "beta_h"} & set(tensors):
        raise ValueError("from_haste: gamma_h and beta_h belong to a layer-norm LSTM")

    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): nn.LSTM,
        (False, True): nn.LayerNormLSTM,
        (True, False): nn.GRU,
        (True, True): nn.LayerNormGRU,
    }
    rate = zoneout or 0.0
    module = kinds[is_gru, norms](
        inputs,
        hidden,
        batch_first=bool(batch_first),
        device=kernel.device,
        dtype=kernel.dtype,
        zoneout=(rate, 0.0) if rate and not is_gru else rate,
        recurrent_dropout=dropout or 0.0,
    )
    weights = {
        "weight_ih": _rows(kernel.T, order),
        "weight_hh": _rows(recurrent_kernel.T, order),
        "bias_ih": _rows(tensors["bias"], order),
    }
    if is_gru:
        weights["bias_hh"] = _rows(tensors["recurrent_bias"], order)
    if norms:
        weights["ln_ih_weight"], weights["ln_hh_weight"] = (_rows(gain, order) for gain in tensors["gamma"])
        if not is_gru:
            weights["ln_c_weight"], weights["ln_c_bias"] = tensors["gamma_h"], tensors["beta_h"]
    _load(module, weights)
    return module.train(training)


def from_mlstm(weights: Mapping[str, Any], *, batch_first: bool = False) -> nn.MultiplicativeLSTM:
    r"""A multiplicative LSTM with weights in the published layout.

    .. math::
        m_t &= (x_t\, w_{mx}) \odot (h_{t-1}\, w_{mh}) \\
        i, f, o, u &= x_t\, w_x + m_t\, w_h + b

    With weight norm each column of a matrix is brought to length 1 and multiplied by its gain.

    Args:
        weights: tensors or arrays ``wx`` (I, 4H), ``wh`` (H, 4H), ``wmx`` (I, H), ``wmh`` (H, H) and ``b`` (4H), gates
            in the order i, f, o, u; with weight norm also the gains ``gx``, ``gh`` (4H), ``gmx`` and ``gmh`` (H). The
            files of the published model of 4,096 units hold, in their order and the four parts of ``wh`` joined, the
            embedding, then wx, wh, wmx, wmh, b, gx, gh, gmx, gmh, then the output layer.
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
    tensors = _tensors("from_mlstm", weights, {*gains, "b"}, set(gains.values()))
    if tensors["wx"].dim() != 2 or tensors["wh"].dim() != 2:
        raise ValueError("from_mlstm: expected wx and wh to have two dimensions")
    inputs, hidden = tensors["wx"].shape[0], tensors["wh"].shape[0]
    rows = 4 * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "wx": (inputs, rows), "wh": (hidden, rows), "wmx": (inputs, hidden), "wmh": (hidden, hidden), "b": (rows,),
        "gx": (rows,), "gh": (rows,), "gmx": (hidden,), "gmh": (hidden,),
    }  # fmt: skip
    _check_shapes("from_mlstm", tensors, shapes)
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
    _load(
        module,
        {
            "weight_ih": _rows(matrix("wx"), order),
            "weight_hh": _rows(matrix("wh"), order),
            "bias_ih": _rows(tensors["b"], order),
            "weight_mx": matrix("wmx"),
            "weight_mh": matrix("wmh"),
        },
    )
    return module
