"""Causal transposed convolution: one causal convolution with an output channel for every phase of the stride."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from seqaccel import _arguments, _common
from seqaccel.functional.conv._causal_conv1d import causal_conv1d
from seqaccel.functional.conv._checks import ACTIVATIONS, GATED

__all__ = ["causal_conv_transpose1d", "conv_of_phases"]

NAME = "causal_conv_transpose1d"


@_common.unrecorded
def _check(
    x: Any, weight: Any, bias: Tensor | None, initial_state: Tensor | None, stride: int, dilation: int,
    groups: int, activation: str | None, return_final_state: bool,
) -> None:  # fmt: skip
    _arguments.flag(NAME, "return_final_state", return_final_state)
    if not x.is_floating_point():
        raise TypeError(f"{NAME}: expected x to have a floating point dtype, but got {x.dtype}")
    for key, value in {"stride": stride, "dilation": dilation, "groups": groups}.items():
        _arguments.integer(NAME, key, value, 1)
    if x.dim() != 3:
        raise ValueError(f"{NAME}: expected x to be 3D (B, C, T), but got a tensor of size {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[2] < 1:
        raise ValueError(
            f"{NAME}: expected weight to be 3D (C, O / groups, K) with K >= 1, but got a tensor of size "
            f"{list(weight.shape)}"
        )
    if x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"{NAME}: given weight of size {list(weight.shape)}, expected x to have {weight.shape[0]} channels, but "
            f"got {x.shape[1]} channels instead"
        )
    if weight.shape[0] % groups:
        raise ValueError(
            f"{NAME}: expected the input channels of weight to be divisible by groups={groups}, but got "
            f"{weight.shape[0]}"
        )
    outputs = weight.shape[1] * groups
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: expected activation to be one of {ACTIVATIONS}, but got {activation!r}")
    if activation in GATED and outputs % 2:
        raise ValueError(f"{NAME}: expected weight to have an even number of output channels for "
                         f"activation={activation!r}, but got {outputs}")  # fmt: skip
    shapes = {
        "bias": (bias, (outputs,)),
        "initial_state": (initial_state, (*x.shape[:2], (weight.shape[2] - 1) * dilation // stride)),
    }
    for key, (t, shape) in shapes.items():
        if t is not None and t.shape != shape:
            raise ValueError(f"{NAME}: expected {key} to have shape {tuple(shape)}, but got {tuple(t.shape)}")
    for key, t in {"weight": weight, "bias": bias, "initial_state": initial_state}.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise RuntimeError(f"{NAME}: expected {key} to have the dtype and device of x, {x.dtype} and {x.device}, "
                               f"but got {t.dtype} and {t.device}")  # fmt: skip


def conv_of_phases(
    weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> tuple[Tensor, Tensor | None, int]:
    """Weight, bias and dilation of the causal convolution whose output channel o s + p is phase p of channel o."""
    channels, outputs, taps = weight.shape
    context = (taps - 1) * dilation // stride
    dense = F.pad(weight.unsqueeze(3), (0, dilation - 1)).flatten(2) if dilation > 1 else weight  # tap n of y at n
    dense = F.pad(dense, (0, (context + 1) * stride - dense.shape[2]))
    step = max(dilation // stride, 1) if dilation % stride == 0 else 1  # taps m of x are multiples of it
    phases = dense.view(groups, channels // groups, outputs, context + 1, stride)[:, :, :, ::step].flip(3)
    phases = phases.permute(0, 2, 4, 1, 3).reshape(groups * outputs * stride, channels // groups, -1)
    return phases, bias.repeat_interleave(stride) if bias is not None and stride > 1 else bias, step


def causal_conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
) -> Any:
    r"""Causal transposed convolution, which makes a sequence ``stride`` times as long, as decoders of codecs do.

    .. math::
        y_{b,o,n} = \varphi\Bigl(b_o + \sum_{c,t,k:\ ts+kd=n} W_{c,o,k}\, x_{b,c,t}\Bigr), \quad 0 \le n < Ts

    That is ``torch.nn.functional.conv_transpose1d`` cut on the right to T s steps (or lengthened where (K-1)d + 1 is
    below s). Outputs from n = ts on depend on x up to t only if they are before (t+1)s.

    Args:
        x: input (B, C, T).
        weight: (C, O / groups, K), as :class:`torch.nn.ConvTranspose1d` has it.
        bias: (O,). Default: none.
        stride: s, the outputs per step of x. Default: 1
        dilation: distance d between taps, in outputs. Default: 1
        groups: blocks of channels convolved apart. Default: 1
        activation: :math:`\varphi`: one of :func:`~seqaccel.functional.causal_conv1d`'s, or None. Default: None
        initial_state: the P = (K-1)d // s inputs before x (B, C, P). Default: zeros.
        return_final_state: whether to return the last P inputs too. Default: False
        reset: (B, T) bool: an episode begins at the steps of x where it is true: its outputs see no step before.
            Default: none.

    Returns:
        y (B, O, T s); with ``"glu"`` or ``"gated"`` (B, O / 2, T s). With ``return_final_state`` a tuple
        (y, final_state): the ``initial_state`` of the inputs that follow, (B, C, P).

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit; the message says
            which one.

    The outputs n = us + p of a phase p are a causal convolution of x: the tap kd = p + ms meets step u - m. All phases
    are channels of one :func:`~seqaccel.functional.causal_conv1d`, whose outputs are then interleaved. With a dilation
    above 1 there are zeros between the taps, which cost as much as taps.

    Source: Défossez et al., High Fidelity Neural Audio Compression, 2022.

    Example:
        >>> import torch, seqaccel.functional as SF
        >>> x, weight = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[1.0, 10.0, 100.0]]])
        >>> SF.causal_conv_transpose1d(x, weight, stride=2)
        tensor([[[  1.,  10., 102.,  20.]]])
    """
    _arguments.tensors(NAME, x=x, weight=weight)
    _arguments.optional_tensors(NAME, bias=bias, initial_state=initial_state, reset=reset)
    a, w, b, state = _common.autocast(x, weight, bias, initial_state)  # as causal_conv1d does it
    _check(a, w, b, state, stride, dilation, groups, activation, return_final_state)
    if reset is not None:
        _arguments.reset(NAME, reset, (x.shape[0], x.shape[2]), x.device)
    phases, bias, step = conv_of_phases(weight, bias, stride, dilation, groups)
    found = causal_conv1d(
        x,
        phases,
        bias,
        dilation=step,
        groups=groups,
        activation=activation,
        initial_state=initial_state,
        return_final_state=return_final_state,
        reset=reset,
    )
    y = found[0] if return_final_state else found
    if stride > 1:
        y = y.unflatten(1, (-1, stride)).transpose(2, 3).flatten(2)
    return (y, found[1]) if return_final_state else y
