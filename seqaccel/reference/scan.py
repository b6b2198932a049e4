"""Linear scan and SRU in plain PyTorch."""

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, h_0: Tensor | None = None, reverse: bool = False) -> Tensor:
    """``h_t = a_t * h_{t-1} + b_t`` (``reverse``: ``a_t * h_{t+1} + b_t``) over dimension 1.

    Args:
        a, b: [B, T, D].
        h_0: [B, D]; zero by default.
        reverse: run from the last step to the first.

    Returns:
        h [B, T, D].
    """
    steps = list(zip(a.unbind(1), b.unbind(1), strict=True))
    h = h_0
    rows: list[Tensor] = []
    for a_t, b_t in reversed(steps) if reverse else steps:
        h = b_t if h is None else a_t * h + b_t
        rows.append(h)
    if not rows:
        return a * b
    return torch.stack(rows[::-1] if reverse else rows, dim=1)


def linear_scan_gradients(
    grad_h: Tensor, a: Tensor, h: Tensor, h_0: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and h_0 [B, D] from that of ``h = linear_scan(a, b, h_0, reverse)``: a scan against time."""
    steps, zeros = a.shape[1], torch.zeros_like(a[:, :1])
    edge = a.new_zeros(a.shape[0], a.shape[2]) if h_0 is None else h_0
    if reverse:
        a_next, h_prev = torch.cat((zeros, a[:, :-1]), 1), torch.cat((h[:, 1:], edge.unsqueeze(1)), 1)
    else:
        a_next, h_prev = torch.cat((a[:, 1:], zeros), 1), torch.cat((edge.unsqueeze(1), h[:, :-1]), 1)
    grad_b = linear_scan(a_next, grad_h, None, not reverse)
    through = a * grad_b
    return grad_b * h_prev[:, :steps], grad_b, (through[:, -1:] if reverse else through[:, :1]).sum(1)


def sru(
    u: Tensor,
    x: Tensor | None,
    weight_c: Tensor,
    bias: Tensor,
    c_0: Tensor,
    mask_c: Tensor | None = None,
    mask_pad: Tensor | None = None,
    scale_x: Tensor | None = None,
    directions: int = 1,
    use_tanh: bool = False,
) -> tuple[Tensor, Tensor]:
    """The recurrence of an SRU layer (Lei et al. 2018), after its matrix product ``u = x W``.

    ::

        f = sigmoid(u_1 + w_f * c' + b_f)      r = sigmoid(u_2 + w_r * c' + b_r)
        c = f * c' + (1 - f) * u_0             h = s + m * r * (g(c) - s)

    with s = ``scale_x * x``, u_3 or 0, m the dropout mask and g the identity or tanh. At padding c is carried over and
    h is 0.

    Args:
        u: [T, B, directions * H * k], the k matrices innermost; k = 4 if it holds the projected input u_3, else 3.
        x: [T, B, directions * H], or None: no skip term (k = 3) or u_3 (k = 4).
        weight_c: [2 * directions * H], w_f then w_r; or [T, B, 2 * directions * H], one pair (w_f, w_r) after the
            other.
        bias: [2 * directions * H], b_f then b_r.
        c_0: [B, directions * H].
        mask_c: [B, directions * H], multiplied into r.
        mask_pad: [T, B] bool, true at padding.
        scale_x: [1]; one by default.
        directions: 2 runs the second half of the channels against time.
        use_tanh: g is tanh.

    Returns:
        h [T, B, directions * H] and the last state c_n [B, directions * H].
    """
    steps, batch = u.shape[:2]
    channels = c_0.shape[-1]
    hidden = channels // directions
    parts = u.reshape(steps, batch, directions, hidden, u.shape[-1] // channels).unbind(-1)
    skip = None
    if len(parts) == 4:
        skip = parts[3]
    elif x is not None:
        skip = x.reshape(steps, batch, directions, hidden)
        skip = skip if scale_x is None else skip * scale_x
    forget_bias, reset_bias = bias.reshape(2, directions, hidden)
    if weight_c.dim() == 3:
        weights = weight_c.reshape(steps, batch, directions, hidden, 2).unbind(-1)
    else:
        weights = weight_c.reshape(2, directions, hidden).unbind(0)
    outputs, states = [], []
    for d in range(directions):
        c = c_0.reshape(batch, directions, hidden)[:, d]
        dropout = None if mask_c is None else mask_c.reshape(batch, directions, hidden)[:, d]
        u_0, u_1, u_2 = (part[:, :, d].unbind(0) for part in parts[:3])
        skips = None if skip is None else skip[:, :, d].unbind(0)
        w_f, w_r = (w[:, :, d].unbind(0) if w.dim() == 4 else [w[d]] * steps for w in weights)
        rows = []
        for t in range(steps) if d == 0 else reversed(range(steps)):
            forget = torch.sigmoid(u_1[t] + w_f[t] * c + forget_bias[d])
            reset = torch.sigmoid(u_2[t] + w_r[t] * c + reset_bias[d])
            state = u_0[t] + forget * (c - u_0[t])
            c = state if mask_pad is None else torch.where(mask_pad[t, :, None], c, state)
            activated = torch.tanh(c) if use_tanh else c
            if dropout is not None:
                reset = reset * dropout
            h = reset * activated if skips is None else skips[t] + reset * (activated - skips[t])
            if mask_pad is not None:
                h = torch.where(mask_pad[t, :, None], torch.zeros_like(h), h)
            rows.append(h)
        states.append(c)
        if rows:
            outputs.append(torch.stack(rows if d == 0 else rows[::-1], dim=0))
    h = torch.cat(outputs, dim=-1) if outputs else u[..., :channels]
    return h, torch.cat(states, dim=-1)
