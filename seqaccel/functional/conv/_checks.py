"""What the arguments of a causal convolution must be."""

from __future__ import annotations

import torch
from torch import Tensor

from seqaccel import _arguments, _common
from seqaccel.functional._offsets import check_offsets
from seqaccel.functional.conv._operators import output_channels
from seqaccel.reference import conv as reference

__all__ = ["ACTIVATIONS", "GATED", "PADDING_MODES", "alike", "check", "check_types"]

ACTIVATIONS = (None, *reference.ACTIVATIONS)
GATED = reference.GATED
PADDING_MODES = ("zeros", "replicate")


def check_types(**tensors) -> None:
    for argument, t in tensors.items():
        if not isinstance(t, Tensor) and (t is not None or argument in ("x", "weight")):
            raise TypeError(f"causal_conv1d(): argument '{argument}' must be Tensor, not {type(t).__name__}")


def alike(name: str, x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """x has a floating point dtype, and the others have its dtype and its device."""
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected x to have a floating point dtype, but got {x.dtype}")
    for argument, t in tensors.items():
        if t is None:
            continue
        if t.dtype != x.dtype:
            raise RuntimeError(f"{name}: expected {argument} to have the dtype of x, {x.dtype}, but got {t.dtype}")
        if t.device != x.device:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but {argument} is on {t.device} "
                f"and x on {x.device}"
            )


@_common.unrecorded
def check(
    x,
    weight,
    bias,
    stride,
    dilation,
    groups,
    padding_mode,
    activation,
    output_activation,
    dropout,
    residual,
    initial_state,
    return_final_state,
    reset,
    cu_seqlens,
    channels_last,
) -> None:
    name = "causal_conv1d"
    _arguments.flags(name, return_final_state=return_final_state, channels_last=channels_last)
    tensors = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "initial_state": initial_state,
    }
    alike(name, x, tensors)
    for argument, value in (("stride", stride), ("dilation", dilation), ("groups", groups)):
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            raise TypeError(f"{name}(): argument '{argument}' must be int, not {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected {argument} to be positive, but got {value}")
    layout = "(B, T, C)" if channels_last else "(B, C, T)"
    if x.dim() != 3:
        raise ValueError(f"{name}: expected x to be 3D {layout}, but got a tensor of size {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[2] < 1:
        raise ValueError(
            f"{name}: expected weight to be 3D (O, C / groups, K) with K >= 1, but got a tensor of size "
            f"{list(weight.shape)}"
        )
    batch, channels, length = (x.transpose(1, 2) if channels_last else x).shape
    outputs, group_channels, taps = weight.shape
    if channels != group_channels * groups:
        raise ValueError(
            f"{name}: given groups={groups} and weight of size {list(weight.shape)}, expected x to have "
            f"{group_channels * groups} channels, but got {channels} channels instead"
        )
    if outputs % groups:
        raise ValueError(
            f"{name}: expected the output channels of weight to be divisible by groups={groups}, but got {outputs}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: expected activation to be one of {ACTIVATIONS}, but got {activation!r}")
    if activation in GATED and outputs % 2:
        raise ValueError(
            f"{name}: expected weight to have an even number of output channels for activation={activation!r}, "
            f"but got {outputs}"
        )
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"{name}: expected padding_mode to be one of {PADDING_MODES}, but got {padding_mode!r}")
    if reset is not None:
        _arguments.reset(name, reset, (batch, length), x.device)
        if cu_seqlens is not None:
            raise ValueError(f"{name}: expected no reset with cu_seqlens, which says where sequences begin")
        if padding_mode != "zeros" and initial_state is None:
            raise ValueError(f"{name}: expected padding_mode='zeros' with reset; cu_seqlens takes {padding_mode!r}")
    sequences = batch
    if cu_seqlens is not None:
        check_offsets(name, cu_seqlens, length, batch)
        sequences = cu_seqlens.shape[0] - 1
        if cu_seqlens.device != x.device:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but cu_seqlens is on {cu_seqlens.device} "
                f"and x on {x.device}"
            )
    steps, width = -(-length // stride), output_channels(weight, activation)
    shapes = {
        "bias": (outputs,),
        "residual": (batch, steps, width) if channels_last else (batch, width, steps),
        "initial_state": (sequences, channels, (taps - 1) * dilation),
    }
    for argument, shape in shapes.items():
        t = tensors[argument]
        if t is not None and t.shape != shape:
            raise ValueError(f"{name}: expected {argument} to have shape {tuple(shape)}, but got {tuple(t.shape)}")
    if output_activation not in (None, "relu"):
        raise ValueError(f"{name}: expected output_activation to be None or 'relu', but got {output_activation!r}")
    _arguments.number(name, "dropout", dropout)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
