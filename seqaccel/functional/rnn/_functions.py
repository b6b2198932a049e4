"""The public calls: one layer and direction of each cell."""

import torch
from torch import Tensor

from seqaccel import _arguments
from seqaccel.functional.rnn._layers import Direction, layer

__all__ = [
    "gru",
    "layer_norm_gru",
    "layer_norm_lstm",
    "ligru",
    "lstm",
    "multiplicative_lstm",
    "peephole_lstm",
    "rnn",
]

Pair = tuple[Tensor, Tensor]
Factor = float | Tensor | None


def rnn(
    input: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> Pair:
    r"""One layer and direction of an Elman network.

    .. math::
        h_t = \phi(W x_t + b + U h_{t-1} + b'), \qquad \phi = \tanh \text{ or } \mathrm{relu}

    The backend ``cpp`` computes float16 and bfloat16 in float32. Without gradients it multiplies bfloat16 values
    directly and sums in float32. Training keeps the input and the output for the backward pass. Double backward runs on
    the reference.

    Args:
        input: (T, B, I).
        h_0: :math:`h_0` (B, H). Default: zero.
        weight_ih: W, (H, I).
        weight_hh: U, (H, H).
        bias_ih: b, (H,). Default: none.
        bias_hh: b', (H,). Default: none.
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, H), and the last state :math:`h_n` (B, H).

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, a reset that is not bool, lengths out of range, an unknown nonlinearity.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Elman, *Finding structure in time*, 1990; torch.nn.RNN.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(H, I), torch.randn(H, H)
        >>> output, h_n = seqaccel.functional.rnn(x, None, weight_ih, weight_hh, nonlinearity="relu")
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: expected nonlinearity to be 'tanh' or 'relu', but got {nonlinearity!r}")
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    output, h_n, _ = layer("rnn", f"rnn_{nonlinearity}", input, Direction(h_0, None, weights, reverse), lengths, reset)
    return output, h_n


def gru(
    input: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
    zoneout: Factor = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> Pair:
    r"""One layer and direction of a gated recurrent unit.

    .. math::
        r_t, z_t &= \sigma(W_{r,z} x_t + b_{r,z} + U_{r,z} h_{t-1} + b'_{r,z}) \\
        n_t &= \tanh(W_n x_t + b_n + r_t \odot (U_n h_{t-1} + b'_n)) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    With ``reset_after=False`` the reset gate comes before the product:
    :math:`n_t = \tanh(W_n x_t + b_n + U_n (r_t \odot h_{t-1}) + b'_n)`.

    The backend ``cpp`` computes float16 and bfloat16 in float32. Without gradients it multiplies bfloat16 values
    directly and sums in float32. Training keeps the input and 5 H values per step and row for the backward pass, the
    output among them (4 H without ``reset_after``). Double backward runs on the reference.

    Args:
        input: (T, B, I).
        h_0: :math:`h_0` (B, H). Default: zero.
        weight_ih: W, (3 * H, I), the rows of r, z and n one after the other.
        weight_hh: U, (3 * H, H).
        bias_ih: b, (3 * H,). Default: none.
        bias_hh: b', (3 * H,). Default: none.
        reset_after: the reset gate comes after the product, as in torch.nn.GRU. Default: ``True``.
        zoneout: Z: the new state is :math:`Z \odot h_{t-1} + (1 - Z) \odot h_t`. A number between 0 and 1, or factors
            (T, B, H), to which no gradient flows. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, H), and the last state :math:`h_n` (B, H).

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, a reset that is not bool, lengths or zoneout out of range.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Cho et al., *Learning phrase representations using RNN encoder-decoder*, 2014; torch.nn.GRU; zoneout:
    Krueger et al., 2017.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(3 * H, I), torch.randn(3 * H, H)
        >>> output, h_n = seqaccel.functional.gru(x, None, weight_ih, weight_hh, reset_after=False)
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    _arguments.flag("gru", "reset_after", reset_after)
    cell = "gru" if reset_after else "gru_reset_before"
    direction = Direction(h_0, None, [weight_ih, weight_hh, bias_ih, bias_hh], reverse, zoneout)
    output, h_n, _ = layer("gru", cell, input, direction, lengths, reset)
    return output, h_n


def _with_cell_state(name, cell, input, state, weights, lengths, reverse, zoneout, reset) -> tuple[Tensor, Pair]:
    h_0 = c_0 = zoneout_h = zoneout_c = None
    if state is not None:
        _arguments.states(name, "state", state, ("h_0", "c_0"))
        h_0, c_0 = state
    if zoneout is not None:
        if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2:
            raise TypeError(f"{name}: expected zoneout to be a pair, of h and of c, but got {zoneout!r:.60}")
        zoneout_h, zoneout_c = zoneout
    direction = Direction(h_0, c_0, weights, reverse, zoneout_h, zoneout_c)
    output, h_n, c_n = layer(name, cell, input, direction, lengths, reset)
    assert c_n is not None
    return output, (h_n, c_n)


def lstm(
    input: Tensor,
    state: Pair | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    zoneout: tuple[Factor, Factor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> tuple[Tensor, Pair]:
    r"""One layer and direction of a long short-term memory.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i,f,o} x_t + b_{i,f,o} + U_{i,f,o} h_{t-1} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t) \qquad \text{or} \quad W_{hr} (o_t \odot \tanh(c_t))

    The backend ``cpp`` computes float16 and bfloat16 in float32. Without gradients it multiplies bfloat16 values
    directly and sums in float32. Training keeps the input and 6 H values per step and row for the backward pass, the
    output among them: 24 H bytes in float32. Double backward runs on the reference.

    Args:
        input: (T, B, I).
        state: :math:`h_0` (B, P) and :math:`c_0` (B, H), where P is H without a projection. Default: zero.
        weight_ih: W, (4 * H, I), the rows of i, f, g and o one after the other.
        weight_hh: U, (4 * H, P).
        bias_ih: b, (4 * H,). Default: none.
        bias_hh: b', (4 * H,). Default: none.
        weight_hr: projection, (P, H). Default: none.
        zoneout: Z for h and for c: a new state s becomes :math:`Z \odot s_{t-1} + (1 - Z) \odot s_t`, h being
            calculated from the c before zoneout. Each None, a number between 0 and 1, or factors (T, B, P) or
            (T, B, H), to which no gradient flows. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, P), and the last state :math:`h_n` (B, P), :math:`c_n` (B, H).

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, a reset that is not bool, lengths or zoneout out of range.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Hochreiter and Schmidhuber, *Long short-term memory*, 1997; Gers et al., *Learning to forget*, 2000; the
    projection: Sak et al., 2014; zoneout: Krueger et al., 2017.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(4 * H, I), torch.randn(4 * H, H)
        >>> output, (h_n, c_n) = seqaccel.functional.lstm(x, None, weight_ih, weight_hh)
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, weight_hr]
    return _with_cell_state("lstm", "lstm", input, state, weights, lengths, reverse, zoneout, reset)


def peephole_lstm(
    input: Tensor,
    state: Pair | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_peephole: Tensor,
    weight_hr: Tensor | None = None,
    *,
    zoneout: tuple[Factor, Factor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> tuple[Tensor, Pair]:
    r"""One layer and direction of a long short-term memory whose gates see the cell state.

    .. math::
        i_t, f_t &= \sigma(W_{i,f} x_t + b_{i,f} + U_{i,f} h_{t-1} + b'_{i,f} + p_{i,f} \odot c_{t-1}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        o_t &= \sigma(W_o x_t + b_o + U_o h_{t-1} + b'_o + p_o \odot c_t) \\
        h_t &= o_t \odot \tanh(c_t) \qquad \text{or} \quad W_{hr} (o_t \odot \tanh(c_t))

    Dtypes and double backward: as in :func:`lstm`.

    Args:
        input: (T, B, I).
        state: :math:`h_0` (B, P) and :math:`c_0` (B, H), where P is H without a projection. Default: zero.
        weight_ih: W, (4 * H, I), the rows of i, f, g and o one after the other.
        weight_hh: U, (4 * H, P).
        bias_ih: b, (4 * H,), or None.
        bias_hh: b', (4 * H,), or None.
        weight_peephole: p, (3, H), the rows of i, f and o.
        weight_hr: projection, (P, H). Default: none.
        zoneout: for h and for c, as in :func:`lstm`. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, P), and the last state :math:`h_n` (B, P), :math:`c_n` (B, H).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lstm`.

    Source: Gers and Schmidhuber, *Recurrent nets that time and count*, 2000; the LSTM operator of ONNX.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(4 * H, I), torch.randn(4 * H, H)
        >>> output, (h_n, c_n) = seqaccel.functional.peephole_lstm(
        ...     x, None, weight_ih, weight_hh, None, None, torch.randn(3, H)
        ... )
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole]
    return _with_cell_state("peephole_lstm", "peephole_lstm", input, state, weights, lengths, reverse, zoneout, reset)


def layer_norm_lstm(
    input: Tensor,
    state: Pair | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    ln_ih_weight: Tensor,
    ln_hh_weight: Tensor,
    ln_c_weight: Tensor,
    ln_c_bias: Tensor,
    *,
    normalize_cell: bool = False,
    zoneout: tuple[Factor, Factor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> tuple[Tensor, Pair]:
    r"""One layer and direction of a long short-term memory with layer norm.

    .. math::
        a_t &= \mathrm{LN}(W x_t; \gamma_1) + \mathrm{LN}(U h_{t-1}; \gamma_2) + b + b' \\
        i_t, f_t, o_t &= \sigma(a_{t; i,f,o}), \qquad g_t = \tanh(a_{t; g}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(\mathrm{LN}(c_t; \gamma_3, \beta_3))

    The first two layer norms are each over all 4 H values together and have no bias; :math:`\epsilon` is 1e-5. The c
    that is carried on is not normalised; with ``normalize_cell`` it is:
    :math:`c_t = \mathrm{LN}(\ldots; \gamma_3, \beta_3)`.
    Dtypes and double backward: as in :func:`lstm`.

    Args:
        input: (T, B, I).
        state: :math:`h_0` and :math:`c_0`, (B, H). Default: zero.
        weight_ih: W, (4 * H, I), the rows of i, f, g and o one after the other.
        weight_hh: U, (4 * H, H).
        bias_ih: b, (4 * H,), or None.
        bias_hh: b', (4 * H,), or None.
        ln_ih_weight: :math:`\gamma_1`, (4 * H,).
        ln_hh_weight: :math:`\gamma_2`, (4 * H,).
        ln_c_weight: :math:`\gamma_3`, (H,).
        ln_c_bias: :math:`\beta_3`, (H,).
        normalize_cell: carry the normalised c to the next step. Default: ``False``.
        zoneout: for h and for c, as in :func:`lstm`. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, H), and the last state :math:`h_n`, :math:`c_n`, (B, H).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lstm`.

    Source: Ba et al., *Layer normalization*, 2016, as in the package haste; ``normalize_cell``: torch's example of
    custom LSTMs.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(4 * H, I), torch.randn(4 * H, H)
        >>> gamma, one, zero = torch.ones(4 * H), torch.ones(H), torch.zeros(H)
        >>> output, (h_n, c_n) = seqaccel.functional.layer_norm_lstm(
        ...     x, None, weight_ih, weight_hh, None, None, gamma, gamma, one, zero
        ... )
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    _arguments.flag("layer_norm_lstm", "normalize_cell", normalize_cell)
    cell = "layer_norm_lstm_normalized_cell" if normalize_cell else "layer_norm_lstm"
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias]
    return _with_cell_state("layer_norm_lstm", cell, input, state, weights, lengths, reverse, zoneout, reset)


def layer_norm_gru(
    input: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    ln_ih_weight: Tensor,
    ln_hh_weight: Tensor,
    *,
    zoneout: Factor = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> Pair:
    r"""One layer and direction of a gated recurrent unit with layer norm.

    .. math::
        a_t &= \mathrm{LN}(W x_t; \gamma_1) + b, \qquad d_t = \mathrm{LN}(U h_{t-1}; \gamma_2) + b' \\
        r_t, z_t &= \sigma(a_{t; r,z} + d_{t; r,z}) \\
        n_t &= \tanh(a_{t; n} + r_t \odot d_{t; n}) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Each layer norm is over all 3 H values together and has no bias; :math:`\epsilon` is 1e-5. Dtypes and gradients of
    gradients: as :func:`gru`.

    Args:
        input: (T, B, I).
        h_0: :math:`h_0` (B, H). Default: zero.
        weight_ih: W, (3 * H, I), the rows of r, z and n one after the other.
        weight_hh: U, (3 * H, H).
        bias_ih: b, (3 * H,), or None.
        bias_hh: b', (3 * H,), or None.
        ln_ih_weight: :math:`\gamma_1`, (3 * H,).
        ln_hh_weight: :math:`\gamma_2`, (3 * H,).
        zoneout: as in :func:`gru`. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, H), and the last state :math:`h_n` (B, H).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gru`.

    Source: Ba et al., *Layer normalization*, 2016, as in the package haste.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(3 * H, I), torch.randn(3 * H, H)
        >>> gamma = torch.ones(3 * H)
        >>> output, h_n = seqaccel.functional.layer_norm_gru(x, None, weight_ih, weight_hh, None, None, gamma, gamma)
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, ln_ih_weight, ln_hh_weight]
    direction = Direction(h_0, None, weights, reverse, zoneout)
    output, h_n, _ = layer("layer_norm_gru", "layer_norm_gru", input, direction, lengths, reset)
    return output, h_n


def ligru(
    input: Tensor,
    h_0: Tensor | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    nonlinearity: str = "relu",
    zoneout: Factor = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> Pair:
    r"""One layer and direction of a light gated recurrent unit.

    .. math::
        z_t &= \sigma(W_z x_t + b_z + U_z h_{t-1} + b'_z) \\
        n_t &= m \odot \phi(W_a x_t + b_a + U_a h_{t-1} + b'_a) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Dtypes and gradients of gradients: as :func:`gru`; without ``weight_ih`` bfloat16 is computed in float32.

    Args:
        input: (T, B, I), or without ``weight_ih`` the products of the input themselves (T, B, 2 * H), normalised or
            shared by several layers.
        h_0: :math:`h_0` (B, H). Default: zero.
        weight_ih: W, (2 * H, I), the rows of a and z one after the other, or None.
        weight_hh: U, (2 * H, H).
        bias_ih: b, (2 * H,). Default: none.
        bias_hh: b', (2 * H,). Default: none.
        mask: m, (B, H), factors of the candidate at every step: dropout. Default: 1.
        nonlinearity: :math:`\phi`, ``"relu"`` or ``"tanh"``. Default: ``"relu"``.
        zoneout: as in :func:`gru`. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. The mask is that of all
            episodes. Default: none.

    Returns:
        output (T, B, H), and the last state :math:`h_n` (B, H).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gru`.

    Source: Ravanelli, Brakel, Omologo and Bengio, *Light gated recurrent units for speech recognition*, 2018.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(2 * H, I), torch.randn(2 * H, H)
        >>> output, h_n = seqaccel.functional.ligru(x, None, weight_ih, weight_hh)
        >>> again, _ = seqaccel.functional.ligru(x @ weight_ih.t(), None, None, weight_hh)
        >>> torch.allclose(output, again, atol=1e-4), torch.equal(output[-1], h_n)
        (True, True)
    """
    if nonlinearity not in ("relu", "tanh"):
        raise ValueError(f"ligru: expected nonlinearity to be 'relu' or 'tanh', but got {nonlinearity!r:.60}")
    _arguments.tensor("ligru", "mask", mask, optional=True)
    shaped = isinstance(input, Tensor) and input.dim() == 3 and isinstance(weight_hh, Tensor) and weight_hh.dim() == 2
    if mask is not None and shaped:
        expected = (*input.shape[1:-1], weight_hh.shape[1])
        if tuple(mask.shape) != expected:
            raise ValueError(f"ligru: expected mask to have shape {expected}, but got {tuple(mask.shape)}")
        if mask.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"ligru: expected mask to have the dtype of input, {input.dtype}, but got {mask.dtype}")
    cell = f"ligru_{nonlinearity}" + ("" if mask is None else "_masked")
    weights = [weight_ih, weight_hh, bias_ih, bias_hh]
    if mask is not None and h_0 is None:
        h_0 = torch.zeros_like(mask)
    output, h_n, _ = layer("ligru", cell, input, Direction(h_0, mask, weights, reverse, zoneout), lengths, reset)
    return output, h_n


def multiplicative_lstm(
    input: Tensor,
    state: Pair | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_mx: Tensor,
    weight_mh: Tensor,
    *,
    zoneout: tuple[Factor, Factor] | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    reset: Tensor | None = None,
) -> tuple[Tensor, Pair]:
    r"""One layer and direction of a multiplicative long short-term memory.

    .. math::
        m_t &= (W_{mx} x_t) \odot (W_{mh} h_{t-1}) \\
        i_t, f_t, o_t &= \sigma(W_{i,f,o} x_t + U_{i,f,o} m_t + b_{i,f,o} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g x_t + U_g m_t + b_g + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Dtypes and double backward: as in :func:`lstm`.

    Args:
        input: (T, B, I).
        state: :math:`h_0` and :math:`c_0`, (B, H). Default: zero.
        weight_ih: W, (4 * H, I), the rows of i, f, g and o one after the other.
        weight_hh: U, (4 * H, H); it multiplies m.
        bias_ih: b, (4 * H,), or None.
        bias_hh: b', (4 * H,), or None.
        weight_mx: (H, I).
        weight_mh: (H, H).
        zoneout: for h and for c, as in :func:`lstm`. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.
        reset: (T, B) bool: an episode begins at each True. Its first step sees nothing of the steps before, nor of the
            given state; with ``reverse`` so does the last step before it of those after. Default: none.

    Returns:
        output (T, B, H), and the last state :math:`h_n`, :math:`c_n`, (B, H).

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`lstm`.

    Source: Krause et al., *Multiplicative LSTM for sequence modelling*, 2017, and their code.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(4 * H, I), torch.randn(4 * H, H)
        >>> output, (h_n, c_n) = seqaccel.functional.multiplicative_lstm(
        ...     x, None, weight_ih, weight_hh, None, None, torch.randn(H, I), torch.randn(H, H)
        ... )
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    cell = "multiplicative_lstm"
    weights = [weight_ih, weight_hh, bias_ih, bias_hh, weight_mx, weight_mh]
    return _with_cell_state(cell, cell, input, state, weights, lengths, reverse, zoneout, reset)
