"""Other problems that a causal convolution equals: of torch's operators, of spectra, of a stride of 1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel import _extension, backends
from seqaccel.reference import conv as reference

__all__ = ["by_fft", "by_torch", "fft_is_faster", "onednn_is_faster", "torch_is_faster", "without_stride"]


def by_torch(x, weight, bias, residual, history, *, stride, dilation, groups, activation, relu, dropout) -> Tensor:
    """The same from torch's own operators (``F.conv1d``); dropout draws its mask as torch does."""
    context = (weight.shape[2] - 1) * dilation
    if not torch.jit.is_tracing() and (x.numel() == 0 or weight.numel() == 0):  # F.conv1d refuses these
        y = reference.causal_conv1d(x, weight, bias, stride=stride, dilation=dilation, groups=groups)
    else:
        padded = F.pad(x, (context, 0)) if history is None else torch.cat([history, x], -1)
        y = F.conv1d(padded, weight, bias, stride, dilation=dilation, groups=groups)
    if activation is not None:
        y = reference.ACTIVATIONS[activation](y)
    y = F.dropout(y, dropout, training=dropout > 0)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def torch_is_faster(x: Tensor, weight: Tensor, dilation: int, groups: int) -> bool:
    """Whether cuDNN was measured faster on a GPU, or our kernels do not take this dtype or size.

    An H100 trained faster with our kernels from 33 million values on, dense and depthwise; below, launching them takes
    longer than cuDNN.
    """
    if x.dtype == torch.float64 or x.numel() < 1 << 25 or groups not in (1, x.shape[1]):
        return True
    if backends.why_missing("triton", "cuda"):
        return True
    from seqaccel.kernels.conv import fits

    return not fits(x.shape, weight.shape, dilation, groups)


def onednn_is_faster(x: Tensor, weight: Tensor, groups: int, training: bool) -> bool:
    """Whether torch's operator of bfloat16 was measured faster on a CPU: dense, with a large weight.

    Two Zen 4 cores. From 2**18 weights and 768 steps on it took 0.86 to 1.07 of our time in inference and 0.89 to 1.05
    in training, with 196,608 weights and 2,048 steps 0.88 to 1.0 in inference. In training with 2**20 weights it took
    0.72 where steps are half as many as outputs or fewer. Elsewhere it took 0.9 to 2.5 times ours. A processor with AMX
    runs all wide layers there: our kernels, which have none, took 1.8 times its time (4 x 256 channels, 4096 steps, 3
    taps).
    """
    if _extension.cpp_error is not None or groups > 1 or torch.ops.seqaccel.isa() != "avx512_bf16":
        return False
    steps = x.shape[0] * x.shape[2]
    if backends.torch_has_amx():
        return min(weight.shape[:2]) >= 64 and steps >= 64
    weights = weight.numel()
    if weights >= 1 << 18 and steps >= 768:
        return True
    if training:
        return weights >= 1 << 20 and 2 * steps <= weight.shape[0]
    return weights >= 3 << 16 and steps >= 2048


def fft_is_faster(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> bool:
    """Whether a product of spectra was measured faster on a CPU than our kernel: depthwise, 512 taps and steps or more.

    float32, two Zen 4 cores, 64 and 2048 rows, 1024 to 16384 steps: 1.7 to 4.4 times at 512 taps and 3 to 7.5 at 1024
    (training: 1.5 to 3.5, and 1.1 to 5.5). At 128 and 256 taps it was slower from 4096 steps on.
    """
    depthwise = weight.shape[0] == groups == x.shape[1] and stride == dilation == 1
    return depthwise and weight.shape[2] >= 512 and x.shape[2] >= 512 and backends.asked() == "auto"


def _fft_size(least: int) -> int:
    """The smallest product of 2, 3 and 5 from ``least`` on."""
    size = least
    while True:
        rest = size
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1


def by_fft(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
    """The depthwise convolution as a product of spectra. What wraps around falls on outputs that are not kept."""
    before = weight.shape[2] - 1
    x = F.pad(x, (before, 0)) if history is None else torch.cat([history, x], -1)
    size = _fft_size(x.shape[2])
    spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(weight.squeeze(1).flip(1), size)
    y = torch.fft.irfft(spectrum, size)[..., before : x.shape[2]]
    return y if bias is None else y + bias.unsqueeze(-1)


def without_stride(x, weight, history, stride: int, dilation: int):
    """x, weight, history and dilation of the convolution without a stride that gives the outputs of the one with it.

    With s = stride, d = dilation and s' = s / gcd(s, d), tap j before the present, j = i + s' m, sees x at
    s t - j d = s (t - m d / gcd) - i d. Channel (c, i) of the new x is x at s t - i d, for i below s'; its taps are m,
    at the dilation d / gcd. A channel is repeated at most min(s', K) times, and no output is computed that is not kept.
    """
    outputs, channels, taps = weight.shape
    phases, new_dilation = stride // math.gcd(stride, dilation), dilation // math.gcd(stride, dilation)
    new_taps, copies = -(-taps // phases), min(phases, taps)
    before = (new_taps - 1) * new_dilation if history is not None else 0  # of the new history
    left = (copies - 1) * dilation + before * stride
    if history is not None:
        x = F.pad(torch.cat([history, x], -1), (left - history.shape[2], 0))
    elif left:
        x = F.pad(x, (left, 0))
    steps = -(-(x.shape[2] - left) // stride) + before
    parts = [x[..., i * dilation :: stride][..., :steps] for i in range(copies)]  # the earliest tap first
    x = parts[0] if copies == 1 else torch.stack(parts, 2).flatten(1, 2)
    weight = F.pad(weight, (new_taps * phases - taps, 0)).view(outputs, channels, new_taps, phases)
    weight = weight[..., phases - copies :].transpose(2, 3).reshape(outputs, channels * copies, new_taps)
    if history is not None:
        history, x = x[..., :before], x[..., before:]
    return x, weight, history, new_dilation
