"""minGRU and minLSTM."""

from typing import Any

from seqaccel.nn.scan._base import Columns


class _Minimal(Columns):
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
        candidate: str = "linear",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if candidate not in ("linear", "g"):
            raise ValueError(f"{self._title}: expected candidate to be 'linear' or 'g', but got {candidate!r}")
        self.candidate = candidate
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )  # fmt: skip

    def _options(self) -> dict[str, Any]:
        return {"candidate": "linear"}


class MinGRU(_Minimal):
    r"""A stack of minimal GRUs, whose gates do not see the state: a product over all steps, then a scan.

    .. math::
        z_t &= \sigma(W_z x_t + b_z) \\
        \tilde{h}_t &= g(W_h x_t + b_h) \\
        h_t &= (1 - z_t) \odot h_{t-1} + z_t \odot \tilde{h}_t

    g is the identity, or for ``candidate="g"`` :math:`g(v) = v + 1/2` for :math:`v \ge 0` and :math:`\sigma(v)` below,
    which keeps the state positive. Called as :class:`torch.nn.GRU`.

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        num_layers: number of layers. Default: 1.
        bias: with :math:`b`. Default: ``True``.
        batch_first: input and output are (B, T, ·). Default: ``False``.
        dropout: probability that a value of a layer's output is dropped, on every layer but the last. Default: 0.
        bidirectional: also run against time. Default: ``False``.
        candidate: ``"linear"`` or ``"g"``. Default: ``"linear"``.
        device, dtype: of the parameters.

    Parameters of layer k, and with the suffix ``_reverse`` of the other direction: ``weight_ih_l{k}`` (2 * hidden_size,
    ·) and ``bias_ih_l{k}`` (2 * hidden_size,), the rows of z and then those of the candidate. The streaming state is
    ``(h,)``, h (B, num_layers, hidden_size).

    Source: Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, *Were RNNs all we needed?*, 2024.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.nn.MinGRU(8, 16, num_layers=2)
        >>> output, h_n = model(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
        >>> y, state = model.step(torch.randn(3, 8), model.init_state(batch_size=3))
        >>> y.shape
        torch.Size([3, 16])
    """

    @property
    def cell(self) -> str:
        return "mingru" if self.candidate == "linear" else "mingru_g"


class MinLSTM(_Minimal):
    r"""A stack of minimal LSTMs, whose gates do not see the state: a product over all steps, then a scan.

    .. math::
        f_t &= \sigma(W_f x_t + b_f), \qquad i_t = \sigma(W_i x_t + b_i) \\
        \tilde{h}_t &= g(W_h x_t + b_h) \\
        h_t &= \frac{f_t}{f_t + i_t} \odot h_{t-1} + \frac{i_t}{f_t + i_t} \odot \tilde{h}_t

    g is the identity, or for ``candidate="g"`` :math:`g(v) = v + 1/2` for :math:`v \ge 0` and :math:`\sigma(v)` below,
    which keeps the state positive. Called as :class:`torch.nn.GRU`: there is one state, h.

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        num_layers: number of layers. Default: 1.
        bias: with :math:`b`. Default: ``True``.
        batch_first: input and output are (B, T, ·). Default: ``False``.
        dropout: probability that a value of a layer's output is dropped, on every layer but the last. Default: 0.
        bidirectional: also run against time. Default: ``False``.
        candidate: ``"linear"`` or ``"g"``. Default: ``"linear"``.
        device, dtype: of the parameters.

    Parameters of layer k, and with the suffix ``_reverse`` of the other direction: ``weight_ih_l{k}`` (3 * hidden_size,
    ·) and ``bias_ih_l{k}`` (3 * hidden_size,), the rows of f, i and the candidate. The streaming state is ``(h,)``, h
    (B, num_layers, hidden_size).

    Source: Feng, Tung, Ahmed, Bengio and Hajimirsadeghi, *Were RNNs all we needed?*, 2024.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.nn.MinLSTM(8, 16, bidirectional=True)
        >>> output, h_n = model(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))
    """

    @property
    def cell(self) -> str:
        return "minlstm" if self.candidate == "linear" else "minlstm_g"
