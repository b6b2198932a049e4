"""Quasi-recurrent networks."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, functional
from seqaccel.nn.scan._base import Columns
from seqaccel.nn.streaming import State


class QRNN(Columns):
    r"""A stack of quasi-recurrent layers: a causal convolution of width 1 or 2, then :func:`fo_pool`.

    .. math::
        z_t &= \tanh(W_z x_t + V_z x_{t-1} + b_z) \\
        f_t, o_t &= \sigma(W_{f,o} x_t + V_{f,o} x_{t-1} + b_{f,o}) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot z_t \\
        h_t &= o_t \odot c_t

    With ``window=1`` there is no V; without the output gate h is c. x before a sequence's first step, and at padding,
    is 0; the direction against time sees :math:`x_{t+1}`. Zoneout is unscaled: in training f becomes
    :math:`1 - m \odot (1 - f)` with a fresh mask m at each step, in evaluation :math:`p + (1 - p) f`. Called as
    :class:`torch.nn.GRU`; the state is c.

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        num_layers: number of layers. Default: 1.
        bias: with :math:`b`. Default: ``True``.
        batch_first: input and output are (B, T, ·). Default: ``False``.
        dropout: probability that a value of a layer's output is dropped, on every layer but the last. Default: 0.
        bidirectional: also run against time. Default: ``False``.
        window: steps that the convolution sees, 1 or 2. Default: 1.
        zoneout: probability p that a value of the state stays as it is. Default: 0.
        output_gate: with the gate o. Default: ``True``.
        device, dtype: of the parameters.

    Parameters of layer k, and with the suffix ``_reverse`` of the other direction: ``weight_ih_l{k}`` (3 * hidden_size,
    window * ·), [W, V] with the rows of z, f and o, and ``bias_ih_l{k}`` (3 * hidden_size,); 2 * hidden_size without
    the output gate. The streaming state is ``(c,)``, c (B, num_layers, hidden_size), or with ``window=2`` ``(c, x)``
    with a tuple x of each layer's last input (B, ·).

    Source: Bradbury, Merity, Xiong and Socher, *Quasi-recurrent neural networks*, 2017; zoneout: Krueger et al., 2017.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.nn.QRNN(8, 16, num_layers=2, window=2, zoneout=0.1)
        >>> output, c_n = model(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """

    _state_name = "c"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        window: int = 1,
        zoneout: float = 0.0,
        output_gate: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _arguments.integer("QRNN", "window", window)
        if window not in (1, 2):
            raise ValueError(f"QRNN: expected window to be 1 or 2, but got {window}")
        _arguments.probability("QRNN", "zoneout", zoneout)
        _arguments.flag("QRNN", "output_gate", output_gate)
        self.window, self.zoneout, self.output_gate = window, float(zoneout), bool(output_gate)
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )  # fmt: skip

    @property
    def cell(self) -> str:
        return "fo_pool" if self.output_gate else "f_pool"

    @property
    def _window(self) -> int:
        return self.window

    def _options(self) -> dict[str, Any]:
        return {"window": 1, "zoneout": 0.0, "output_gate": True}

    def _previous_sizes(self) -> list[int]:
        return [self.input_size] + [self.hidden_size] * (self.num_layers - 1) if self.window == 2 else []

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """``(c,)``, c (batch_size, num_layers, hidden_size), or with ``window=2`` ``(c, x)`` with a tuple x of each
        layer's last input (batch_size, ·); all zero."""
        return super().init_state(batch_size, device=device, dtype=dtype)

    def _layer(self, k: int, x: Tensor, previous: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if self.zoneout and self.training:
            shape = (*x.shape[:2], self.hidden_size * self._directions)
            options["mask"] = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.zoneout)
        elif self.zoneout:
            options["scale"] = 1 - self.zoneout
        if self.window == 1:
            return super()._layer(k, x, previous, options)
        before = _shifted(x, previous, False, options)
        if not self.bidirectional:
            return super()._layer(k, torch.cat([x, before], -1), None, options)
        after = _shifted(x, None, True, options)
        pairs = zip((before, after), self._suffixes, strict=True)
        u = [
            torch.nn.functional.linear(torch.cat([x, other], -1), getattr(self, f"weight_ih_l{k}{suffix}"))
            for other, suffix in pairs
        ]
        bias = self._weights(k)[2]
        return functional.fo_pool(
            torch.cat(u, -1), bias, directions=2, output_gate=self.output_gate, **options
        )  # fmt: skip


def _shifted(x: Tensor, previous: Tensor | None, against_time: bool, masks: dict[str, Any]) -> Tensor:
    """The input one step earlier, or against time later: 0 beyond a sequence and at padding."""
    edge = x.new_zeros(1, *x.shape[1:]) if previous is None else previous.unsqueeze(0)

    def moved(t: Tensor, edge: Tensor) -> Tensor:
        return torch.cat([t, edge])[1:] if against_time else torch.cat([edge, t])[:-1]

    shifted = moved(x, edge)
    mask_pad, reset, cu_seqlens = masks["mask_pad"], masks["reset"], masks["cu_seqlens"]
    if cu_seqlens is not None:
        begins = torch.zeros(x.shape[0] + 1, dtype=torch.bool, device=x.device).index_fill(0, cu_seqlens[:-1], True)
        reset = begins[:-1].unsqueeze(1)
    missing = []
    if reset is not None:  # against time a sequence begins before the step that it meets
        missing.append(moved(reset, reset.new_zeros(1, reset.shape[1])) if against_time else reset)
    if mask_pad is not None:
        missing.append(moved(mask_pad, mask_pad.new_zeros(1, mask_pad.shape[1])))
    for where in missing:
        shifted = shifted.masked_fill(where.unsqueeze(2), 0)
    return shifted
