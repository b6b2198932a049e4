"""Layers of the package haste."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, nn
from seqaccel.convert._swap import Asked, Swap, Unscriptable, combined, plain_class
from seqaccel.convert._weights import check_shapes, load_first_layer, reorder, tensors_of
from seqaccel.functional import indrnn
from seqaccel.functional.rnn import layers

#: The places of torch's gates among haste's: i, f, g, o of i, g, f, o, and r, z, n of z, r, h.
_LSTM_GATES, _GRU_GATES = (0, 2, 1, 3), (1, 0, 2)


def from_haste(
    source: torch.nn.Module | Mapping[str, Any],
    *,
    zoneout: float | None = None,
    dropout: float | None = None,
    batch_first: bool | None = None,
) -> nn.LSTM | nn.GRU | nn.LayerNormLSTM | nn.LayerNormGRU | nn.IndRNN:
    r"""A layer that computes what a layer of the package `haste` computes, with its weights.

    The weights tell which one: ``LSTM``, ``GRU``, ``LayerNormLSTM``, ``LayerNormGRU`` or ``IndRNN``. haste's kernels
    are (I, G·H) and (H, G·H) with the gates in the order i, g, f, o or z, r, h; ours are transposed, in torch's order.
    An LSTM's one bias becomes ``bias_ih``, and ``bias_hh`` is zero. haste's IndRNN has tanh.

    Args:
        source: a layer of ``haste_pytorch``, or its state_dict: tensors or arrays ``kernel``, ``recurrent_kernel``,
            ``bias``, for a GRU ``recurrent_bias``, with layer norm ``gamma`` (2, G·H), and for an LSTM with layer norm
            ``gamma_h``, ``beta_h``; of an IndRNN ``kernel``, ``recurrent_scale`` and ``bias``.
        zoneout: haste's, which zones h only. Default: the layer's own, or 0.
        dropout: haste's, of the recurrent kernel. Default: the layer's own, or 0.
        batch_first: input and output are (B, T, ·). Default: the layer's own, or ``False``.

    Returns:
        A new module of one layer, with the weights' dtype and device, in the layer's own training mode.

    Raises:
        ValueError: the weights are not those of one of the five layers, or an IndRNN is given zoneout or dropout.

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
    if isinstance(source, Mapping) and "recurrent_scale" in source:
        if zoneout or dropout:
            raise ValueError("from_haste: an IndRNN has no zoneout and no dropout")
        return _indrnn(source, bool(batch_first)).train(training)
    required, optional = {"kernel", "recurrent_kernel", "bias"}, {"recurrent_bias", "gamma", "gamma_h", "beta_h"}
    tensors = tensors_of("from_haste", source, required, optional)
    kernel, recurrent_kernel = tensors["kernel"], tensors["recurrent_kernel"]
    if kernel.dim() != 2 or recurrent_kernel.dim() != 2:
        raise ValueError("from_haste: expected kernel and recurrent_kernel to have two dimensions")
    inputs, hidden = kernel.shape[0], recurrent_kernel.shape[0]
    is_gru, norms = "recurrent_bias" in tensors, "gamma" in tensors
    order = _GRU_GATES if is_gru else _LSTM_GATES
    rows = len(order) * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "kernel": (inputs, rows), "recurrent_kernel": (hidden, rows), "bias": (rows,), "recurrent_bias": (rows,),
        "gamma": (2, rows), "gamma_h": (hidden,), "beta_h": (hidden,),
    }  # fmt: skip
    check_shapes("from_haste", tensors, shapes)
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
        "weight_ih": reorder(kernel.T, order),
        "weight_hh": reorder(recurrent_kernel.T, order),
        "bias_ih": reorder(tensors["bias"], order),
    }
    if is_gru:
        weights["bias_hh"] = reorder(tensors["recurrent_bias"], order)
    if norms:
        weights["ln_ih_weight"], weights["ln_hh_weight"] = (reorder(gain, order) for gain in tensors["gamma"])
        if not is_gru:
            weights["ln_c_weight"], weights["ln_c_bias"] = tensors["gamma_h"], tensors["beta_h"]
    load_first_layer(module, weights)
    return module.train(training)


def _indrnn(source: Mapping[str, Any], batch_first: bool) -> nn.IndRNN:
    tensors = tensors_of("from_haste", source, {"kernel", "recurrent_scale", "bias"}, set())
    kernel = tensors["kernel"]
    if kernel.dim() != 2:
        raise ValueError("from_haste: expected kernel to have two dimensions")
    inputs, hidden = kernel.shape
    shapes = {"kernel": (inputs, hidden), "recurrent_scale": (hidden,), "bias": (hidden,)}
    check_shapes("from_haste", tensors, shapes)
    module = nn.IndRNN(
        inputs, hidden, nonlinearity="tanh", batch_first=batch_first, device=kernel.device, dtype=kernel.dtype
    )
    weights = {"weight_ih": kernel.T, "weight_hh": tensors["recurrent_scale"], "bias_ih": tensors["bias"]}
    load_first_layer(module, weights)
    return module


class _Layer(Unscriptable):
    """A layer of the package, in front of its class: its parameters in our layout, by our kernels."""

    def forward(self: Any, input: Tensor, state: Any = None, lengths: Tensor | None = None) -> Any:
        if lengths is not None or getattr(self, "return_state_sequence", False):
            return super().forward(input, state, lengths)  # type: ignore[misc]
        x = input.transpose(0, 1) if self.batch_first else input
        output, last = self._run(x, state)
        return output.transpose(0, 1) if self.batch_first else output, last


class _Gated(_Layer):
    def _run(self: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        is_gru, norms = hasattr(self, "recurrent_bias"), hasattr(self, "gamma")
        order = _GRU_GATES if is_gru else _LSTM_GATES
        bias_hh = reorder(self.recurrent_bias, order) if is_gru else torch.zeros_like(self.bias)
        matrices = [reorder(kernel.T, order) for kernel in (self.kernel, self.recurrent_kernel)]
        weights: list[Tensor | None] = [*matrices, reorder(self.bias, order), bias_hh]
        if norms:
            weights += [reorder(gain, order) for gain in self.gamma]
            weights += [] if is_gru else [self.gamma_h, self.beta_h]
        elif not is_gru:
            weights.append(None)
        output, last = layers(
            ("layer_norm_" if norms else "") + ("gru" if is_gru else "lstm"),
            x,
            None if state is None else (state,) if is_gru else tuple(state),
            [weights],
            recurrent_dropout=self.dropout,
            zoneout=(self.zoneout, 0.0),
            training=self.training,
        )
        return output, last[0] if is_gru else last


class _IndRNN(_Layer):
    def _run(self: Any, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        h_0 = None if state is None else state[0]
        output, last = indrnn(x @ self.kernel, self.recurrent_scale, self.bias, h_0, nonlinearity="tanh")
        return output, last.unsqueeze(0)


def layer(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of ``haste_pytorch``'s ``LSTM``, ``GRU``, ``LayerNormLSTM``, ``LayerNormGRU`` and ``IndRNN``."""
    kind: Any = plain_class(module)
    if kind.__module__.partition(".")[0] != "haste_pytorch" or not hasattr(module, "kernel"):
        return None
    if not hasattr(module, "recurrent_scale"):
        return Swap(f"seqaccel.nn.{kind.__name__}", combined(_Gated, kind))
    if getattr(module, "zoneout", 0):
        return "an IndRNN with zoneout"
    return Swap("seqaccel.nn.IndRNN", combined(_IndRNN, kind))
