"""A recurrent layer as an operator of ONNX: what ``torch.onnx.export`` records in place of our kernels.

Cells that ONNX does not have, zoneout and resets are recorded as the reference computes them, one Scan a direction.

ONNX orders the gates i, o, f, c (LSTM) and z, r, h (GRU), and the peepholes i, o, f.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel.functional._onnx import detached, exporting, loop
from seqaccel.functional.rnn._cells import CELLS
from seqaccel.reference import rnn as reference

__all__ = ["exporting", "is_operator", "layer", "scanned_layer"]

_OPERATORS = {
    "rnn_tanh": "RNN",
    "rnn_relu": "RNN",
    "lstm": "LSTM",
    "peephole_lstm": "LSTM",
    "gru": "GRU",
    "gru_reset_before": "GRU",
}
_ORDER = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}  # ONNX's gates among torch's
_OWN_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "rnn_tanh": {"activations": ["Tanh"]},
    "rnn_relu": {"activations": ["Relu"]},
    "gru": {"linear_before_reset": 1},
    "gru_reset_before": {"linear_before_reset": 0},
}

Weights = Sequence[Tensor | None]


def is_operator(cell: str, *zoneout: Any) -> bool:
    """Whether ONNX has the cell, with zoneout given as numbers, pairs of them or tensors."""
    flat = [part for z in zoneout for part in (z if isinstance(z, tuple) else (z,))]
    return cell in _OPERATORS and not any(isinstance(z, Tensor) or z for z in flat)


def _ordered(operator: str, weight: Tensor) -> Tensor:
    blocks = weight.chunk(len(_ORDER[operator]))
    return torch.cat([blocks[i] for i in _ORDER[operator]])


def _bias(operator: str, of_direction: Weights) -> Tensor:
    given = next(bias for bias in of_direction[2:4] if bias is not None)
    return torch.cat(
        [torch.zeros_like(given) if bias is None else _ordered(operator, bias) for bias in of_direction[2:4]]
    )


def _first_step(h_0: Tensor, input: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """h_0 (B, P) at the time step where a direction begins, zero elsewhere (T, B, P)."""
    steps = torch.arange(input.shape[0], device=input.device).unsqueeze(1)
    if not reverse:
        first = torch.zeros_like(steps[:1])
    else:
        first = steps[-1:] if lengths is None else lengths.unsqueeze(0).to(input.device) - 1
    return (steps == first).unsqueeze(-1).to(input.dtype) * h_0


def layer(
    cell: str,
    input: Tensor,  # (T, B, I)
    h_0: Tensor | None,  # (D, B, P); None: zero
    c_0: Tensor | None,  # (D, B, H)
    weights: Sequence[Any],  # of each direction
    lengths: Tensor | None = None,  # (B,)
    reverse: bool = False,  # the only direction
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both directions, or one, of a layer: output (T, B, D*P), h_n (D, B, P) and c_n (D, B, H).

    ONNX does not project h. With y = o * tanh(c) and h = W_hr y the recurrent product is (W_hh W_hr) y, so that y can
    be its state; h_0, which need not be W_hr times something, enters as an input of the first step, multiplied by W_hh.
    """
    operator, spec, directions = _OPERATORS[cell], CELLS[cell], len(weights)
    steps, batch, _ = input.shape
    hidden = weights[0][1].shape[0] // spec.gates
    input_weights, recurrent_weights = [w[0] for w in weights], [w[1] for w in weights]
    projections = [w[4] for w in weights] if spec.projects and weights[0][4] is not None else None
    initial_h = h_0
    if projections is not None:
        if h_0 is not None:
            parts = [_first_step(h_0[d], input, lengths, reverse or d == 1) for d in range(directions)]
            input = torch.cat([input, *parts], -1)
            input_weights = [
                torch.cat([w, *(u if d == e else torch.zeros_like(u) for e in range(directions))], 1)
                for d, (w, u) in enumerate(zip(input_weights, recurrent_weights, strict=True))
            ]
            initial_h = None if c_0 is None else torch.zeros_like(c_0)
        recurrent_weights = [u @ p for u, p in zip(recurrent_weights, projections, strict=True)]

    arguments: list[Tensor | None] = [
        input,
        torch.stack([_ordered(operator, w) for w in input_weights]),
        torch.stack([_ordered(operator, w) for w in recurrent_weights]),
        None if weights[0][2] is None and weights[0][3] is None else torch.stack([_bias(operator, w) for w in weights]),
        None if lengths is None else lengths.to(torch.int32),
        initial_h,
    ]
    if operator == "LSTM":
        arguments.append(c_0)
    if cell == "peephole_lstm":
        arguments.append(torch.stack([torch.cat([w[5][0], w[5][2], w[5][1]]) for w in weights]))
    attributes = {
        "hidden_size": hidden,
        "direction": "bidirectional" if directions == 2 else "reverse" if reverse else "forward",
        **{k: v * directions if isinstance(v, list) else v for k, v in _OWN_ATTRIBUTES.get(cell, {}).items()},
    }
    state = (directions, batch, hidden)
    shapes = [(steps, directions, batch, hidden), state, *([state] if operator == "LSTM" else [])]
    output, h, *rest = torch.onnx.ops.symbolic_multi_out(
        operator, arguments, attributes, dtypes=[input.dtype] * len(shapes), shapes=shapes
    )
    if projections is not None:
        outputs = [F.linear(output[:, d], w) for d, w in enumerate(projections)]
        h = torch.stack([F.linear(h[d], w) for d, w in enumerate(projections)])
        return torch.cat(outputs, -1), h, rest[0]
    return output.transpose(1, 2).flatten(2), h, rest[0] if rest else None


def scanned_layer(
    cell: str,
    input: Tensor,  # (T, B, I)
    h_0: Tensor,  # (B, P)
    c_0: Tensor | None,  # (B, H)
    weights: Weights,
    lengths: Tensor | None,  # (B,)
    zoneout_h: Tensor | None,  # (T, B, P) or one element
    zoneout_c: Tensor | None,  # (T, B, H) or one element
    reverse: bool,
    reset: Tensor | None = None,  # (T, B)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``seqaccel.reference.rnn.layer`` for any number of steps."""
    input, h_0, c_0, *weights = detached(input, h_0, c_0, *weights)
    inputs = {"x": reference.project(cell, input, weights)}
    constants: dict[str, Tensor] = {}
    for name, zoneout in (("zoneout_h", zoneout_h), ("zoneout_c", zoneout_c)):
        if zoneout is not None:
            (constants if zoneout.numel() == 1 else inputs)[name] = zoneout
    if lengths is not None:
        inputs["running"] = torch.arange(input.shape[0], device=input.device).unsqueeze(1) < lengths
    if reset is not None:
        inputs["begins"] = reference.begins(reset, lengths, reverse)

    def step(state: list[Tensor], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        of_step = dict(zip(inputs, values, strict=True))
        c_old = state[1] if len(state) == 2 else None
        h, c, output = reference.step(cell, state[0], c_old, weights, **of_step, **constants)
        if c is not None and c is c_old:  # a mask that no step changes
            c = c.clone()
        return [h] if c is None else [h, c], output.clone()

    state = [h_0] if c_0 is None else [h_0, c_0]
    last, output = loop(step, state, list(inputs.values()), reverse)
    return output, last[0], last[1] if len(last) == 2 else None
