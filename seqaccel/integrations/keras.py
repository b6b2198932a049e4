"""Keras 3's LSTM and GRU on our kernels, for Keras' backend torch."""

from __future__ import annotations

from typing import Any

import keras
import torch
from torch import Tensor

from seqaccel import functional

__all__ = ["GRU", "LSTM"]

if keras.backend.backend() != "torch":
    raise ImportError(
        f"seqaccel.integrations.keras needs Keras' backend torch, but it is {keras.backend.backend()}: set "
        "KERAS_BACKEND=torch before keras is imported"
    )


def _tensor(value: Any) -> Tensor:
    return keras.ops.convert_to_tensor(value)


class _Recurrent:
    """Mixin before Keras' layer."""

    def __init__(self, units: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(units, *args, **kwargs)  # type: ignore[call-arg]
        layer: Any = self
        for name, expected in (("activation", "tanh"), ("recurrent_activation", "sigmoid")):
            found = getattr(getattr(layer.cell, name), "__name__", None)
            if found != expected:
                kind = type(self).__name__
                raise ValueError(
                    f"{kind}: expected {name} to be {expected!r}, but got {found!r}: use keras.layers.{kind}"
                )

    def inner_loop(self: Any, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:
        flat_mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        x = _tensor(sequences)
        if flat_mask is not None or (training and self.recurrent_dropout) or x.device.type == "meta":
            return super().inner_loop(sequences, initial_state, mask=mask, training=training)  # type: ignore[misc]
        kernel = _tensor(self.cell.kernel)
        x = x.to(kernel.dtype)
        if training and self.dropout:
            x = x * keras.ops.expand_dims(self.cell.get_dropout_mask(x[:, 0, :]), 1)
        x = x.transpose(0, 1)
        x = x.flip(0) if self.go_backwards else x
        state = initial_state if isinstance(initial_state, (list, tuple)) else [initial_state]
        bias = None if self.cell.bias is None else _tensor(self.cell.bias)
        output, states = self._run(
            x, [_tensor(part).to(x.dtype) for part in state], kernel.t(), _tensor(self.cell.recurrent_kernel).t(), bias
        )
        output = output.transpose(0, 1)
        return output[:, -1], output, states


@keras.saving.register_keras_serializable(package="seqaccel")
class LSTM(_Recurrent, keras.layers.LSTM):
    """``keras.layers.LSTM`` on our kernels.

    Constructor, call, weights and their layout are Keras': ``layer.set_weights(other.get_weights())`` takes over those
    of a ``keras.layers.LSTM``, and its saved weights load. It computes a tanh and a sigmoid activation only. With a
    mask, and in training with ``recurrent_dropout``, Keras' own loop over the steps runs.

    Raises:
        ValueError: another activation.

    Example::

        from seqaccel.integrations.keras import LSTM
        model = keras.Sequential([keras.Input((None, 16)), LSTM(64), keras.layers.Dense(1)])
    """

    def _run(
        self, x: Tensor, state: list[Tensor], weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        output, last = functional.lstm(x, (state[0], state[1]), weight_ih, weight_hh, bias)
        return output, list(last)


def _from_zrh(rows: Tensor) -> Tensor:
    """Keras' gates z, r, h in the order r, z, n."""
    z, r, n = rows.chunk(3)
    return torch.cat((r, z, n))


@keras.saving.register_keras_serializable(package="seqaccel")
class GRU(_Recurrent, keras.layers.GRU):
    """``keras.layers.GRU`` on our kernels: as :class:`LSTM`, with ``reset_after`` and without.

    Raises:
        ValueError: another activation than tanh and sigmoid.

    Example::

        from seqaccel.integrations.keras import GRU
        model = keras.Sequential([keras.Input((None, 16)), GRU(64), keras.layers.Dense(1)])
    """

    def _run(
        self: Any, x: Tensor, state: list[Tensor], weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        biases = [] if bias is None else [_from_zrh(part) for part in bias.view(-1, weight_ih.shape[0])]
        output, last = functional.gru(
            x, state[0], _from_zrh(weight_ih), _from_zrh(weight_hh), *biases, reset_after=self.cell.reset_after
        )
        return output, [last]
