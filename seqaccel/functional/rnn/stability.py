"""How fast a recurrent net forgets: bounds that hold for every input, and the evaluation from few steps they allow.

A layer's state is bounded by a few numbers: an RNN's by the 2-norm of h, a GRU's by the largest |h|, an LSTM's by the
largest |c| and the largest |h|. The distance e of two runs on the same input obeys e_t <= M e_{t-1} with a matrix M of
as many rows, and a distance d of their inputs adds N d.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments

__all__ = ["contraction_factor", "truncated", "truncation_error"]

_MODES = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}
GROUP = 1 << 24  # values of the hidden states that windows hold at a time


class _Bounds(NamedTuple):
    matrix: Tensor  # M [n, n]; the last row is h's
    of_input: Tensor  # N [n]
    start: Tensor  # [n]: the largest distance of a state from zero, where the recurrence began at zero
    output: float  # of h, in the norm that the layer above asks for


def cell_of(where: str, module: Any) -> str:
    """The cell of a layer for which bounds are known."""
    cell = getattr(module, "cell", None) or _MODES.get(getattr(module, "mode", ""))
    known = (*_MODES.values(), "gru_reset_before")
    if not isinstance(module, torch.nn.RNNBase) or cell not in known:
        raise TypeError(f"{where}: expected module to be an RNN, LSTM or GRU, but got {type(module).__name__}")
    if module.proj_size:
        raise ValueError(f"{where}: no bound is known of a module with proj_size")
    if getattr(module, "zoneout", 0) or getattr(module, "recurrent_dropout", 0):
        raise ValueError(f"{where}: no bound is known of a module with zoneout or recurrent_dropout")
    return cell


def _layer_weights(module: torch.nn.RNNBase) -> list[list[Tensor]]:
    """weight_ih, weight_hh and the sum of both biases of each layer and direction, in float64."""
    layers = []
    for names in module._all_weights:
        weight_ih, weight_hh, *biases = (getattr(module, name).detach().double() for name in names)
        zero = weight_hh.new_zeros(weight_hh.shape[0])
        layers.append([weight_ih, weight_hh, *(biases or (zero, zero))])
    return layers


def _rnn(cell: str, weights: list[Tensor], bound: float) -> _Bounds:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    across, along = (torch.linalg.matrix_norm(w, 2) for w in (weight_ih, weight_hh))
    reach = math.sqrt(weight_hh.shape[1])
    if cell == "rnn_relu":
        reach = math.inf
        if along < 1:
            reach = float((across * bound + (bias_ih + bias_hh).norm()) / (1 - along))
    return _Bounds(along.view(1, 1), across.view(1), along.new_tensor([reach]), reach)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().sum(1).max()


def _lstm(weights: list[Tensor], bound: float) -> _Bounds:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    w_i, w_f, w_g, w_o = map(_largest, weight_hh.chunk(4))
    x_i, x_f, x_g, x_o = map(_largest, weight_ih.chunk(4))
    sums = weight_hh.abs().sum(1) + bound * weight_ih.abs().sum(1) + bias_ih + bias_hh
    forget = torch.sigmoid(sums.chunk(4)[1].max())
    cell = 1 / (1 - forget)  # the largest |c|: |c_t| <= forget |c_{t-1}| + 1

    def both(i: Tensor, f: Tensor, g: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:  # of c and of h
        of_cell = cell * f / 4 + g + i / 4
        return of_cell, of_cell + o / 4

    from_h, from_x = both(w_i, w_f, w_g, w_o), both(x_i, x_f, x_g, x_o)
    matrix = torch.stack([torch.stack([forget, from_h[0]]), torch.stack([forget, from_h[1]])])
    matrix = matrix.nan_to_num(nan=math.inf)  # of a forget gate that can be 1
    return _Bounds(matrix, torch.stack(from_x), torch.stack([cell, torch.ones_like(cell)]), 1.0)


def _gru(cell: str, weights: list[Tensor], bound: float) -> _Bounds:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    w_r, w_z, w_n = map(_largest, weight_hh.chunk(3))
    x_r, x_z, x_n = map(_largest, weight_ih.chunk(3))
    spread = weight_hh.abs().sum(1) + bound * weight_ih.abs().sum(1)
    most, least = (torch.sigmoid(sums.chunk(3)[1]) for sums in (spread + bias_ih + bias_hh, bias_ih + bias_hh - spread))
    if cell == "gru":  # n = tanh(... + r * (W h + b))
        reset = (weight_hh.abs().sum(1) + bias_hh.abs()).chunk(3)[2].max() / 4
        candidate, of_input = w_n + reset * w_r, x_n + reset * x_r
    else:  # n = tanh(... + W (r * h) + b)
        candidate, of_input = w_n * (1 + w_r / 4), x_n + w_n * x_r / 4
    keep = most.max() if candidate < 1 else least.min()
    factor = keep + (1 - keep) * candidate + w_z / 2
    spread_of_input = (1 - least.min()) * of_input + x_z / 2
    return _Bounds(factor.view(1, 1), spread_of_input.view(1), torch.ones_like(factor).view(1), 1.0)


def _bounds(where: str, module: Any, input_bound: float) -> list[list[_Bounds]]:
    """Of every layer, of every direction."""
    cell = cell_of(where, module)
    weights, directions, layers = _layer_weights(module), 2 if module.bidirectional else 1, []
    bound = input_bound * math.sqrt(module.input_size) if cell.startswith("rnn") else input_bound
    for i in range(0, len(weights), directions):
        one = [
            _rnn(cell, each, bound)
            if cell.startswith("rnn")
            else _lstm(each, bound)
            if cell == "lstm"
            else _gru(cell, each, bound)
            for each in weights[i : i + directions]
        ]
        layers.append(one)
        outputs = [each.output for each in one]
        bound = math.hypot(*outputs) if cell.startswith("rnn") else max(outputs)
    return layers


def _check_bound(where: str, input_bound: Any) -> None:
    _arguments.number(where, "input_bound", input_bound)
    if input_bound < 0:
        raise ValueError(f"{where}: expected input_bound to be at least 0, but got {input_bound}")


def contraction_factor(module: Any, *, input_bound: float = 1.0) -> float:
    r"""A number :math:`\lambda` that is proven: runs of ``module`` on one input from two states approach each other by
    it at every step, in the long run.

    RNN: :math:`\|W_{hh}\|_2`. LSTM: the largest eigenvalue of the matrix by which :math:`(\max|\Delta c|, \max|\Delta
    h|)` is bounded,

    .. math::
        M = \begin{pmatrix} \bar f & a \\ \bar f & a + \frac14 \|W_{ho}\| \end{pmatrix}, \qquad
        a = \frac14 \frac{\|W_{hf}\|}{1 - \bar f} + \|W_{hg}\| + \frac14 \|W_{hi}\|,

    with :math:`\|W\|` the largest l1 norm of a row and :math:`\bar f` the largest value that the forget gate can take.
    GRU: a bound of the same kind on :math:`\max|\Delta h|`. The largest factor of all layers and directions counts.

    Args:
        module: RNN, LSTM or GRU, of ``seqaccel.nn`` or ``torch.nn``. States begin at zero.
        input_bound: the largest absolute value of an input. Default: 1

    Returns:
        The factor. From 1 on it proves nothing; below 1 the module is stable.

    Raises:
        TypeError, ValueError: no bound is known of such a module (projections, zoneout, other cells).

    Source: Miller and Hardt, Stable Recurrent Models, 2019; here with the norms of the weights at hand.

    Example:
        >>> import torch, seqaccel
        >>> rnn = seqaccel.nn.RNN(3, 2)
        >>> _ = torch.nn.init.eye_(rnn.weight_hh_l0).data.mul_(0.5)
        >>> seqaccel.nn.utils.contraction_factor(rnn)
        0.5
    """
    _check_bound("contraction_factor", input_bound)
    layers = _bounds("contraction_factor", module, input_bound)
    matrices = [each.matrix for layer in layers for each in layer]
    if not all(matrix.isfinite().all() for matrix in matrices):
        return math.inf
    return max(float(torch.linalg.eigvals(matrix).abs().max()) for matrix in matrices)


class _Errors:
    """The bound of an output's error after so many steps from zero states instead of the true ones."""

    def __init__(self, where: str, module: Any, input_bound: float) -> None:
        layers = _bounds(where, module, input_bound)
        if module.bidirectional:
            raise ValueError(f"{where}: a bidirectional module needs the whole sequence")
        self._layers = [layer[0] for layer in layers]
        self._errors = [layer.start for layer in self._layers]

    def step(self) -> float:
        below = 0.0
        for i, layer in enumerate(self._layers):
            error = torch.minimum(layer.matrix @ self._errors[i] + layer.of_input * below, 2 * layer.start)
            self._errors[i], below = error, float(error[-1])
        return below


def truncation_error(module: Any, k: int, *, input_bound: float = 1.0) -> float:
    r"""A proven bound of the absolute error of :func:`seqaccel.functional.truncated`: the largest of an output that was
    computed from the ``k`` latest inputs.

    Args:
        module: RNN, LSTM or GRU in one direction, of any number of layers; states begin at zero.
        k: steps.
        input_bound: the largest absolute value of an input. Default: 1

    Raises:
        TypeError, ValueError: no bound is known of such a module.

    Example:
        >>> import torch, seqaccel
        >>> rnn = seqaccel.nn.RNN(3, 4)
        >>> _ = torch.nn.init.eye_(rnn.weight_hh_l0).data.mul_(0.5)
        >>> seqaccel.nn.utils.truncation_error(rnn, 3)
        0.25
    """
    _check_bound("truncation_error", input_bound)
    _arguments.integer("truncation_error", "k", k, least=1)
    errors = _Errors("truncation_error", module, input_bound)
    return [errors.step() for _ in range(k)][-1]


def _steps_for(module: Any, x: Tensor, tolerance: float) -> int:
    where = "truncated"
    _arguments.number(where, "tolerance", tolerance)
    bound = float(x.abs().max()) if x.numel() > 0 else 0.0
    errors, length = _Errors(where, module, bound), x.shape[1 if module.batch_first else 0]
    for k in range(1, length + 1):
        if errors.step() <= tolerance:
            return k
    if contraction_factor(module, input_bound=bound) >= 1:
        raise ValueError(
            f"{where}: no k is proven to keep tolerance {tolerance}, for the module is not proven stable; give k, or "
            "see seqaccel.nn.utils.stabilize_"
        )
    return max(1, length)


def truncated(
    module: Any, x: Tensor, k: int | None = None, chunk: int | None = None, *, tolerance: float | None = None
) -> Tensor:
    r"""A recurrent net's outputs, each from few of the latest inputs, so that steps of a sequence run side by side.

    Windows (``chunk=None``): :math:`y_t` from the inputs :math:`x_{t-k+1} \ldots x_t` and a state of zero before them,
    T runs of k steps. Chunks: the sequence in chunks of ``chunk`` steps, each from the state that the k steps before it
    leave, T / chunk runs of k + chunk steps; an output there has seen k inputs or more. Outputs near the start
    that reach back to it are exact.

    Args:
        module: a recurrent layer of ``seqaccel.nn`` or ``torch.nn`` in one direction: its call gives (output, state).
        x: (T, B, I), or (B, T, I) if the module has ``batch_first=True``.
        k: steps. Default: as few as keep the error of all outputs below ``tolerance``
        chunk: steps of a chunk. Default: windows
        tolerance: for an RNN, LSTM or GRU, the largest absolute error, with respect to exact arithmetic. It chooses k
            by a bound that is proven (:func:`seqaccel.nn.utils.truncation_error`), so what is seen is often far less.

    Returns:
        The outputs, laid out as the module's. They have gradients.

    Raises:
        TypeError, ValueError: an argument does not fit, or no k is proven for ``tolerance``.

    Source: Miller and Hardt, Stable Recurrent Models, 2019.

    Example:
        >>> import torch, seqaccel
        >>> lstm, x = seqaccel.nn.utils.stabilize_(seqaccel.nn.LSTM(3, 4)), torch.rand(400, 1, 3)
        >>> y = seqaccel.functional.truncated(lstm, x, chunk=100, tolerance=1e-5)
        >>> bool((y - lstm(x)[0]).abs().max() < 1e-5)
        True
    """
    where = "truncated"
    _arguments.tensor(where, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{where}: expected x to be 3-D, but got {x.dim()}-D")
    if getattr(module, "bidirectional", False):
        raise ValueError(f"{where}: a bidirectional module needs the whole sequence")
    if (k is None) == (tolerance is None):
        raise ValueError(f"{where}: expected one of k and tolerance")
    if k is None:
        k = _steps_for(module, x, tolerance)  # type: ignore[arg-type]
    _arguments.integer(where, "k", k, least=1)
    if chunk is not None:
        _arguments.integer(where, "chunk", chunk, least=1)
    batch_first = bool(getattr(module, "batch_first", False))
    dim = 1 if batch_first else 0
    length, batch = x.shape[dim], x.shape[1 - dim]
    warm, kept = (k - 1, 1) if chunk is None else (k, chunk)
    if length <= warm + kept:
        return module(x)[0]
    runs = -(-(length - warm) // kept)
    if chunk is not None and warm + runs * kept > length:  # the last chunk goes on past the end
        x = torch.nn.functional.pad(x, (0, 0) * (2 - dim) + (0, warm + runs * kept - length))
    windows = x.unfold(dim, warm + kept, kept)  # (runs, B, I, steps), or (B, runs, I, steps)
    windows = windows.permute(0, 1, 3, 2).flatten(0, 1) if batch_first else windows.permute(3, 0, 1, 2).flatten(1, 2)
    # A window yields one output and holds k, so there are as many at a time as keep this within bounds.
    at_once = windows.shape[1 - dim]
    if chunk is None:
        at_once = max(1, GROUP // (k * getattr(module, "hidden_size", x.shape[2])))
    parts = [module(part)[0].narrow(dim, warm, kept) for part in windows.split(at_once, 1 - dim)]
    outputs = parts[0] if len(parts) == 1 else torch.cat(parts, 1 - dim)
    features = outputs.shape[2]
    if batch_first:
        outputs = outputs.reshape(batch, runs * kept, features)
    else:
        outputs = outputs.reshape(kept, runs, batch, features).transpose(0, 1).flatten(0, 1)
    start = module(x.narrow(dim, 0, warm))[0] if warm else outputs.narrow(dim, 0, 0)
    return torch.cat([start, outputs], dim).narrow(dim, 0, length)
