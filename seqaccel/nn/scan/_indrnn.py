"""Independently recurrent networks."""

from typing import Any

from seqaccel.nn.scan._base import Columns


class IndRNN(Columns):
    r"""A stack of independently recurrent layers, whose units see only their own state.

    .. math::
        h_t = \varphi(W x_t + u \odot h_{t-1} + b)

    Called as :class:`torch.nn.RNN`.

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        num_layers: number of layers. Default: 1.
        nonlinearity: :math:`\varphi`, ``"relu"`` or ``"tanh"``. Default: ``"relu"``.
        bias: with b. Default: ``True``.
        batch_first: input and output are (B, T, ·). Default: ``False``.
        dropout: probability that a value of a layer's output is dropped, on every layer but the last. Default: 0.
        bidirectional: also run against time. Default: ``False``.
        device, dtype: of the parameters.

    Parameters of layer k, and with the suffix ``_reverse`` of the other direction: ``weight_ih_l{k}`` W (hidden_size,
    ·), ``weight_hh_l{k}`` u (hidden_size,), which starts uniform in [-1, 1], and ``bias_ih_l{k}`` b (hidden_size,).
    The streaming state is ``(h,)``, h (B, num_layers, hidden_size). With relu and \|u\| above 1 states grow without
    bound: clip ``weight_hh_l{k}`` as the paper does.

    Source: Li, Li, Cook, Zhu and Gao, *Independently recurrent neural network (IndRNN)*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.nn.IndRNN(8, 16, num_layers=2)
        >>> output, h_n = model(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"IndRNN: expected nonlinearity to be 'relu' or 'tanh', but got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype
        )  # fmt: skip

    @property
    def cell(self) -> str:
        return f"indrnn_{self.nonlinearity}"

    def _options(self) -> dict[str, Any]:
        return {"nonlinearity": "relu"}
