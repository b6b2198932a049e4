"""What ``torch.onnx.export`` records in place of our kernels: torch's operators, and ONNX's Scan for loops over time.

Recurrent layers that ONNX has operators for are in ``seqaccel.functional.rnn._onnx``.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqaccel.reference import scan as reference


def exporting() -> bool:
    """Whether ``torch.onnx.export`` is recording; the second question alone would take 2 us a call."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def refuse_any_length(operator: str, steps: int) -> None:
    """Raises where ``steps`` is to vary: ONNX has no guards, and would compute wrong values at other lengths."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    if not has_static_value(steps):
        message = (
            f"{operator}: torch.onnx.export needs a fixed length here, as the levels depend on it; export "
            "HierarchicalAttention.extend with a state of init_state(..., max_length=...) for any length"
        )
        warnings.warn(message, stacklevel=2)  # torch.onnx.export shows the error of its last attempt only
        raise ValueError(message)


def detached(*tensors: Tensor | None) -> list[Any]:
    """The tensors without autograd, which an ONNX model has not and torch's scan takes amiss."""
    return [None if t is None else t.detach() for t in tensors]


def loop(
    step: Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], Tensor]],
    state: Sequence[Tensor],
    inputs: Sequence[Tensor],
    reverse: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """The last state, and the outputs (T, ...) of ``step(state, inputs of one step)``, as one Scan for any T.

    A step returns new tensors: no output may be an input or another output.
    """
    from torch._higher_order_ops.scan import scan

    # Copies: scan takes no views at an offset that depends on B, as a layer's part of a module's state is.
    return scan(step, [part.clone() for part in state], list(inputs), reverse=reverse)


def linear_scan(a: Tensor, b: Tensor, h_0: Tensor | None, reverse: bool) -> Tensor:
    """``seqaccel.reference.scan.linear_scan``."""
    a, b, h_0 = detached(a, b, h_0)

    def step(state: list[Tensor], inputs: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        h = inputs[0] * state[0] + inputs[1]
        return [h], h.clone()

    start = b.new_zeros(b.shape[0], b.shape[2]) if h_0 is None else h_0
    return loop(step, [start], [a.transpose(0, 1), b.transpose(0, 1)], reverse)[1].transpose(0, 1)


def sru(
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor,
    mask_c: Tensor | None,
    mask_pad: Tensor | None,
    scale_x: Tensor | None,
    directions: int,
    use_tanh: bool,
) -> tuple[Tensor, Tensor]:
    """``seqaccel.reference.scan.sru``: each direction is a loop over calls of it with one step."""
    u, x, weight_c, bias, c_0, mask_c, scale_x = detached(u, x, weight_c, bias, c_0, mask_c, scale_x)
    x = x if x is None or scale_x is None else x * scale_x
    channels = c_0.shape[-1]
    hidden = channels // directions
    outputs, states = [], []
    for d in range(directions):
        half = slice(d * hidden, (d + 1) * hidden)
        k = u.shape[-1] // channels
        inputs = [u[..., d * hidden * k : (d + 1) * hidden * k]]
        for optional, width in ((x, 1), (weight_c if weight_c.dim() == 3 else None, 2)):
            if optional is not None:
                inputs.append(optional[..., d * hidden * width : (d + 1) * hidden * width])
        if mask_pad is not None:
            inputs.append(mask_pad)
        own_weight = None if weight_c.dim() == 3 else weight_c.view(2, directions, hidden)[:, d].reshape(-1)
        own_bias = bias.view(2, directions, hidden)[:, d].reshape(-1)
        own_mask = None if mask_c is None else mask_c[:, half]

        def step(
            state: list[Tensor], inputs: list[Tensor], own_weight=own_weight, own_bias=own_bias, own_mask=own_mask
        ) -> tuple[list[Tensor], Tensor]:
            rest = [t.unsqueeze(0) for t in inputs]
            u_t = rest.pop(0)
            x_t = None if x is None else rest.pop(0)
            weight_t = rest.pop(0) if own_weight is None else own_weight
            pad_t = rest.pop(0) if rest else None
            h, c = reference.sru(u_t, x_t, weight_t, own_bias, state[0], own_mask, pad_t, None, 1, use_tanh)
            return [c], h.squeeze(0)

        (c_n,), h = loop(step, [c_0[:, half]], inputs, d == 1)
        outputs.append(h)
        states.append(c_n)
    return torch.cat(outputs, -1), torch.cat(states, -1)
