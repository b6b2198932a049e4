"""Recurrent layers in plain PyTorch: one layer, one direction.

T time, B batch, I input, H hidden, P the width of h: H, or the projection's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lstm_cell(pre: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """New h and c (B, H) from the pre-activations (B, 4H) and the old c: torch.nn.LSTM's cell, gates i, f, g, o."""
    i, f, g, o = pre.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm(
    input: Tensor,  # (T, B, I)
    h_0: Tensor,  # (B, P)
    c_0: Tensor,  # (B, H)
    weight_ih: Tensor,  # (4H, I)
    weight_hh: Tensor,  # (4H, P)
    bias_ih: Tensor | None = None,  # (4H,)
    bias_hh: Tensor | None = None,  # (4H,)
    weight_hr: Tensor | None = None,  # (P, H)
    lengths: Tensor | None = None,  # (B,)
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, P) and the last h (B, P) and c (B, H).

    Past a sequence's length the output is 0 and the state stays.
    """
    steps = input.shape[0]
    projection = F.linear(input, weight_ih, bias_ih)
    h, c, outputs = h_0, c_0, []
    for t in reversed(range(steps)) if reverse else range(steps):
        h_new, c_new = lstm_cell(projection[t] + F.linear(h, weight_hh, bias_hh), c)
        if weight_hr is not None:
            h_new = F.linear(h_new, weight_hr)
        if lengths is None:
            h, c, output = h_new, c_new, h_new
        else:
            running = (t < lengths).unsqueeze(-1)
            h, c = torch.where(running, h_new, h), torch.where(running, c_new, c)
            output = torch.where(running, h_new, torch.zeros_like(h_new))
        outputs.append(output)
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if outputs else h_0.new_zeros(0, *h_0.shape)), h, c
