"""The layers whose only state is their output: Elman networks and GRUs."""

from typing import Any

from seqaccel.nn.rnn._base import Recurrent, given

_NO_FORGET_GATE = "a GRU has no forget gate"


def _refuse(title: str, kwargs: dict[str, Any], **reasons: str) -> None:
    for name, reason in reasons.items():
        if name in kwargs:
            raise TypeError(f"{title}: {name} is not supported: {reason}")


def _no_projection(kwargs: dict[str, Any]) -> None:
    if "proj_size" in kwargs:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class RNN(Recurrent):
    r"""Multi-layer Elman network: torch.nn.RNN on our kernels.

    .. math::
        h_t = \phi(W x_t + b + U h_{t-1} + b'), \qquad \phi = \tanh \text{ or } \mathrm{relu}

    Parameters, their names, initialisation and state_dict are torch.nn.RNN's, and so are the layouts of inputs and
    outputs.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each fed with the output of the one below. Default: 1.
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``.
        bias: has ``bias_ih`` and ``bias_hh``. Default: ``True``.
        batch_first: input and output are (B, T, ·), not (T, B, ·). Default: ``False``.
        dropout: probability of zeroing an output of any layer but the last, in training. Default: 0.
        bidirectional: a second set of weights runs from the last step to the first; outputs are concatenated. Default:
            ``False``.
        device, dtype: of the parameters.
        recurrent_dropout: probability of zeroing an element of ``weight_hh``, in training, for the whole sequence; the
            others are scaled by 1 / (1 - p). One mask per call, layer and direction. Default: 0. Keyword only.

    Shapes, with D directions and L layers:
        - ``forward(input, hx=None, *, reset=None)``: input (T, B, I), or (B, T, I) with ``batch_first``, or (T, I)
          unbatched, or a PackedSequence; hx = h_0 (D * L, B, H), by default zero; reset (T, B), or as the input is
          laid out, True where an episode begins. Returns output (T, B, D * H) and h_n.
        - streaming: the state is (h,), (B, L, H). A bidirectional module does not stream.

    Raises:
        ValueError, TypeError, RuntimeError: what torch.nn.RNN raises.

    Source: Elman, *Finding structure in time*, 1990; torch.nn.RNN; dropout of recurrent weights: Merity et al., 2018.

    Example:
        >>> import torch, seqaccel.nn
        >>> rnn = seqaccel.nn.RNN(10, 20, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    nonlinearity: str

    def __init__(
        self, *args: Any, recurrent_dropout: float = 0.0, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        kwargs |= given(device=device, dtype=dtype)
        _no_projection(kwargs)
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        _refuse("RNN", kwargs, zoneout="a plain RNN has no gates", forget_bias="a plain RNN has no gates")
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, recurrent_dropout=recurrent_dropout, **kwargs)

    @property
    def cell(self) -> str:
        return f"rnn_{self.nonlinearity}"


class GRU(Recurrent):
    r"""Multi-layer gated recurrent unit: torch.nn.GRU on our kernels.

    .. math::
        r_t, z_t &= \sigma(W_{r,z} x_t + b_{r,z} + U_{r,z} h_{t-1} + b'_{r,z}) \\
        n_t &= \tanh(W_n x_t + b_n + r_t \odot (U_n h_{t-1} + b'_n)) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    With ``reset_after=False`` the reset gate comes before the product:
    :math:`n_t = \tanh(W_n x_t + b_n + U_n (r_t \odot h_{t-1}) + b'_n)`.
    Parameters, their names, initialisation and state_dict are torch.nn.GRU's, and so are the layouts of inputs and
    outputs.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each fed with the output of the one below. Default: 1.
        bias: has ``bias_ih`` and ``bias_hh``. Default: ``True``.
        batch_first: input and output are (B, T, ·), not (T, B, ·). Default: ``False``.
        dropout: probability of zeroing an output of any layer but the last, in training. Default: 0.
        bidirectional: a second set of weights runs from the last step to the first; outputs are concatenated. Default:
            ``False``.
        device, dtype: of the parameters.
        reset_after: the reset gate comes after the product, as in torch.nn.GRU. Default: ``True``. Keyword only,
            like the arguments that follow.
        zoneout: probability, in training, that a unit of h keeps its old value at a step; in eval the expectation is
            taken. Default: 0.
        recurrent_dropout: probability of zeroing an element of ``weight_hh``, in training, for the whole sequence; the
            others are scaled by 1 / (1 - p). One mask per call, layer and direction. Default: 0.

    Shapes, with D directions and L layers:
        - ``forward(input, hx=None, *, reset=None)``: input (T, B, I), or (B, T, I) with ``batch_first``, or (T, I)
          unbatched, or a PackedSequence; hx = h_0 (D * L, B, H), by default zero; reset (T, B), or as the input is
          laid out, True where an episode begins. Returns output (T, B, D * H) and h_n.
        - streaming: the state is (h,), (B, L, H). A bidirectional module does not stream.

    Raises:
        ValueError, TypeError, RuntimeError: what torch.nn.GRU raises.

    Source: Cho et al., *Learning phrase representations using RNN encoder-decoder*, 2014; torch.nn.GRU; zoneout:
    Krueger et al., 2017; dropout of recurrent weights: Merity et al., 2018.

    Example:
        >>> import torch, seqaccel.nn
        >>> gru = seqaccel.nn.GRU(10, 20, num_layers=2, reset_after=False)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    reset_after: bool = True

    def __init__(
        self,
        *args: Any,
        reset_after: bool = True,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= given(device=device, dtype=dtype)
        _no_projection(kwargs)
        _refuse("GRU", kwargs, forget_bias=_NO_FORGET_GATE)
        self.reset_after = reset_after
        super().__init__("GRU", *args, zoneout=zoneout, recurrent_dropout=recurrent_dropout, **kwargs)

    @property
    def cell(self) -> str:
        return "gru" if self.reset_after else "gru_reset_before"

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.reset_after else ", reset_after=False")


class LayerNormGRU(Recurrent):
    r"""Multi-layer gated recurrent unit with layer norm inside the recurrence.

    .. math::
        a_t &= \mathrm{LN}(W x_t; \gamma_1) + b, \qquad d_t = \mathrm{LN}(U h_{t-1}; \gamma_2) + b' \\
        r_t, z_t &= \sigma(a_{t; r,z} + d_{t; r,z}) \\
        n_t &= \tanh(a_{t; n} + r_t \odot d_{t; n}) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Each layer norm is over all 3 H values together and has no bias; :math:`\epsilon` is 1e-5. Constructor, parameters,
    shapes, streams and errors are those of :class:`GRU`, without ``reset_after``, and there are ``ln_ih_weight_l{k}``
    and ``ln_hh_weight_l{k}`` (3 H): :math:`\gamma_1` and :math:`\gamma_2`, at first 1.

    Source: Ba et al., *Layer normalization*, 2016, as in the package haste.

    Example:
        >>> import torch, seqaccel.nn
        >>> gru = seqaccel.nn.LayerNormGRU(10, 20, zoneout=0.1)
        >>> output, h_n = gru(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        *args: Any,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        device: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        kwargs |= given(device=device, dtype=dtype)
        _refuse(
            "LayerNormGRU", kwargs, reset_after="its reset gate comes after the product", forget_bias=_NO_FORGET_GATE
        )
        super().__init__("GRU", *args, zoneout=zoneout, recurrent_dropout=recurrent_dropout, **kwargs)

    @property
    def cell(self) -> str:
        return "layer_norm_gru"
