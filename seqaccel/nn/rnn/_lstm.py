"""The layers with a cell state: LSTM and its relatives."""

from typing import Any

from seqaccel.nn.rnn._base import Recurrent, given


class _WithCellState(Recurrent):
    """What the layers of this file share: torch.nn.LSTM's constructor."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
            forget_bias=forget_bias,
        )


class LSTM(_WithCellState):
    r"""Multi-layer long short-term memory: torch.nn.LSTM on our kernels.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i,f,o} x_t + b_{i,f,o} + U_{i,f,o} h_{t-1} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Parameters, their names, initialisation and state_dict are torch.nn.LSTM's, and so are the layouts of inputs and
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
        proj_size: P > 0: h is projected to P features by ``weight_hr``. Default: 0, no projection.
        device, dtype: of the parameters.
        zoneout: probability, in training, that a unit of h and of c keeps its old value at a step; in eval the
            expectation is taken. A pair gives h and c their own probabilities. h is calculated from c before zoneout.
            Default: 0.
        recurrent_dropout: probability of zeroing an element of ``weight_hh``, in training, for the whole sequence; the
            others are scaled by 1 / (1 - p). One mask per call, layer and direction. Default: 0.
        forget_bias: initial value of the forget gate's slice of ``bias_ih``; that slice of ``bias_hh`` starts at 0.
            Default: ``None``, torch's initialisation.

    Shapes, with D directions and L layers:
        - ``forward(input, hx=None, *, reset=None)``: input (T, B, I), or (B, T, I) with ``batch_first``, or (T, I)
          unbatched, or a PackedSequence; hx = (h_0, c_0), (D * L, B, P or H) and (D * L, B, H), by default zero;
          reset (T, B), or as the input is laid out, True where an episode begins. Returns output
          (T, B, D * (P or H)) and (h_n, c_n).
        - streaming: the state is (h, c), (B, L, P or H) and (B, L, H). A bidirectional module does not stream.

    Raises:
        ValueError, RuntimeError: what torch.nn.LSTM raises for inputs that do not fit.

    Source: Hochreiter and Schmidhuber, *Long short-term memory*, 1997; torch.nn.LSTM; zoneout: Krueger et al., 2017;
    dropout of recurrent weights: Merity et al., 2018; ``forget_bias``: Jozefowicz et al., 2015.

    Example:
        >>> import torch, seqaccel.nn
        >>> lstm = seqaccel.nn.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> state = lstm.init_state(3)
        >>> y_t, state = lstm.step(torch.randn(3, 10), state)
        >>> y_t.shape
        torch.Size([3, 20])
    """

    cell = "lstm"


class PeepholeLSTM(_WithCellState):
    r"""Multi-layer long short-term memory whose gates see the cell state.

    .. math::
        i_t, f_t &= \sigma(W_{i,f} x_t + b_{i,f} + U_{i,f} h_{t-1} + b'_{i,f} + p_{i,f} \odot c_{t-1}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        o_t &= \sigma(W_o x_t + b_o + U_o h_{t-1} + b'_o + p_o \odot c_t) \\
        h_t &= o_t \odot \tanh(c_t)

    Constructor, parameters, shapes, streams and errors are those of :class:`LSTM`, and ``weight_peephole_l{k}`` (3, H)
    holds p in the order i, f, o. It can be used with ``proj_size``.

    Source: Gers and Schmidhuber, *Recurrent nets that time and count*, 2000; the LSTM operator of ONNX.

    Example:
        >>> import torch, seqaccel.nn
        >>> lstm = seqaccel.nn.PeepholeLSTM(10, 20, bidirectional=True)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape, lstm.weight_peephole_l0_reverse.shape
        (torch.Size([5, 3, 40]), torch.Size([3, 20]))
    """

    cell = "peephole_lstm"


class LayerNormLSTM(_WithCellState):
    r"""Multi-layer long short-term memory with layer norm inside the recurrence.

    .. math::
        a_t &= \mathrm{LN}(W x_t; \gamma_1) + \mathrm{LN}(U h_{t-1}; \gamma_2) + b + b' \\
        i_t, f_t, o_t &= \sigma(a_{t; i,f,o}), \qquad g_t = \tanh(a_{t; g}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(\mathrm{LN}(c_t; \gamma_3, \beta_3))

    The first two layer norms are each over all 4 H values together and have no bias; :math:`\epsilon` is 1e-5.
    Constructor, parameters, shapes, streams and errors are those of :class:`LSTM`, and there are ``ln_ih_weight_l{k}``
    (4 H), ``ln_hh_weight_l{k}`` (4 H), ``ln_c_weight_l{k}`` and ``ln_c_bias_l{k}`` (H): :math:`\gamma_1`,
    :math:`\gamma_2`, :math:`\gamma_3`, :math:`\beta_3`, at first 1, 1, 1 and 0.

    Args:
        normalize_cell: carry the normalised c to the next step, instead of c before the norm. Default: ``False``.

    Raises:
        ValueError: ``proj_size`` is given.

    Source: Ba et al., *Layer normalization*, 2016, as in the package haste; ``normalize_cell``: torch's example of
    custom LSTMs.

    Example:
        >>> import torch, seqaccel.nn
        >>> lstm = seqaccel.nn.LayerNormLSTM(10, 20, num_layers=2, zoneout=(0.05, 0.5), recurrent_dropout=0.2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    normalize_cell: bool = False

    def __init__(
        self, *args: Any, normalize_cell: bool = False, device: Any = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        kwargs |= given(device=device, dtype=dtype)
        self.normalize_cell = normalize_cell
        super().__init__(*args, **kwargs)

    @property
    def cell(self) -> str:
        return "layer_norm_lstm_normalized_cell" if self.normalize_cell else "layer_norm_lstm"

    def extra_repr(self) -> str:
        return super().extra_repr() + (", normalize_cell=True" if self.normalize_cell else "")


class MultiplicativeLSTM(_WithCellState):
    r"""Multi-layer multiplicative long short-term memory.

    .. math::
        m_t &= (W_{mx} x_t) \odot (W_{mh} h_{t-1}) \\
        i_t, f_t, o_t &= \sigma(W_{i,f,o} x_t + U_{i,f,o} m_t + b_{i,f,o} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g x_t + U_g m_t + b_g + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Constructor, parameters, shapes, streams and errors are those of :class:`LSTM`, but ``weight_hh`` multiplies m, and
    there are ``weight_mx_l{k}`` (H, I) and ``weight_mh_l{k}`` (H, H).

    Raises:
        ValueError: ``proj_size`` is given.

    Source: Krause et al., *Multiplicative LSTM for sequence modelling*, 2017, and their code; Radford et al., 2017.

    Example:
        >>> import torch, seqaccel.nn
        >>> lstm = seqaccel.nn.MultiplicativeLSTM(10, 20)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    cell = "multiplicative_lstm"
