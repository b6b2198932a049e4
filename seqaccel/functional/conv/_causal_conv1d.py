"""Dilated causal convolution: the public call and the choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqaccel import _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import call
from seqaccel.functional.conv._checks import GATED, check, check_types
from seqaccel.functional.conv._equivalents import (
    by_fft,
    by_torch,
    fft_is_faster,
    onednn_is_faster,
    torch_is_faster,
    without_stride,
)
from seqaccel.functional.conv._operators import CausalConv1d, operators
from seqaccel.reference import conv as reference

__all__ = ["activate", "causal_conv1d", "last_steps"]

BACKENDS = ("reference", "cpp", "triton", "torch")


def activate(v: Tensor, activation: str | None) -> Tensor:
    """One of ``ACTIVATIONS``, of (B, C, T)."""
    return v if activation is None else reference.ACTIVATIONS[activation](v)


def last_steps(history: Tensor, x: Tensor, reset: Tensor | None = None) -> Tensor:
    """The last time steps of ``history`` followed by ``x``, as many as ``history`` has; shares no memory with them.
    Those before an episode that ``reset`` (B, T) begins are zero."""
    context, length = history.shape[-1], x.shape[-1]
    if reset is not None:
        return reference.final_state(x, history, context, reset, None)
    if torch.compiler.is_compiling():  # for any length, and with strides that do not depend on it
        last = torch.cat([history, x], -1).narrow(-1, length, context)
    elif length >= context:
        last = x[..., length - context :]
    else:
        return torch.cat([history[..., length:], x], -1)
    return last.clone(memory_format=torch.contiguous_format)


def _convolution(
    x, weight, bias, residual, history, reset, cu_seqlens, stride, dilation, groups, activation, relu, dropout
) -> Tensor:
    """y of checked arguments, by the backend that is chosen."""
    traced = _common.is_traced(x)
    options: dict[str, Any] = {
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "relu": relu,
        "dropout": dropout,
    }
    prefer = None
    if x.device.type == "cuda":
        prefer = "torch" if torch_is_faster(x, weight, dilation, groups) else None
    elif x.dtype == torch.bfloat16 and dropout == 0 and reset is None and cu_seqlens is None and not traced:
        training = _common.needs_grad(x, weight, bias, residual, history)
        prefer = "torch" if onednn_is_faster(x, weight, groups, training) else None
    backend = backends.choose("causal_conv1d", x, BACKENDS, prefer=prefer)
    by_taps = stride > 1 or _onnx.exporting() or backend == "torch"
    if by_taps and (reset is not None or cu_seqlens is not None) and x.numel() > 0:
        # What each tap meets becomes a channel, and the convolution one of a single tap.
        origin = reference.origins(x, reset, cu_seqlens)
        x = torch.stack(reference.taps(x, history, weight.shape[2], dilation, origin), 2).flatten(1, 2)[..., ::stride]
        weight, history, reset, cu_seqlens = weight.flatten(1).unsqueeze(-1), None, None, None
        stride = dilation = 1
        options["dilation"] = 1
    if backend == "torch" or _onnx.exporting():
        return by_torch(x, weight, bias, residual, history, stride=stride, **options)
    seed = torch.randint(-(1 << 62), 1 << 62, (1,), device=x.device) if dropout > 0 else None
    if backend == "reference" or _common.transforms_active():
        sequences = (reset, cu_seqlens)
        return reference.causal_conv1d(x, weight, bias, residual, history, seed, *sequences, stride=stride, **options)
    dtype = x.dtype
    whole = reset is None and cu_seqlens is None
    fft = backend == "cpp" and whole and not traced and fft_is_faster(x, weight, stride, dilation, groups)
    apart = activation in GATED and groups > 1  # no kernel sees both halves at once
    if fft or (apart and backend == "cpp"):
        x, weight, bias, residual, history = _common.widened(x, weight, bias, residual, history)
    if fft:
        v = by_fft(x, weight, bias, history)
        return reference.epilogue(v, residual, seed, activation, relu, dropout).contiguous().to(dtype)
    if stride > 1:
        x, weight, history, dilation = without_stride(x, weight, history, stride, dilation)
    if apart:
        with backends.backend(backend):
            v = _convolution(x, weight, bias, None, history, reset, cu_seqlens, 1, dilation, groups, None, False, 0.0)
        return reference.epilogue(v, residual, seed, activation, relu, dropout).to(dtype)
    operands = (x, weight, bias, residual, history, seed, reset, cu_seqlens)
    arguments = (dilation, groups, activation or "none", relu, float(dropout))
    if torch.compiler.is_compiling():  # autograd records the operator itself
        y, _ = operators(backend)[0](*operands, *arguments, False)
    elif _common.needs_grad(x, weight, bias, residual, history):
        y = CausalConv1d.apply(*operands, backend, *arguments)
    else:
        y, _ = call(operators(backend)[0], *operands, *arguments, False)
    return y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    dropout: float = 0.0,
    residual: Tensor | None = None,
    output_activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    channels_last: bool = False,
) -> Any:
    r"""Dilated causal convolution with its epilogue fused: an output sees the present and the past only.

    .. math::
        v_{b,o,t} &= b_o + \sum_{c,k} W_{o,c,k}\, x_{b,c,\,ts-(K-1-k)d} \\
        y &= \psi(r + \mathrm{dropout}(\varphi(v)))

    with x before its start zero, its first value (``padding_mode="replicate"``) or ``initial_state``. Without a stride
    the output is as long as the input.

    Args:
        x: input (B, C, T).
        weight: (O, C / groups, K), as :class:`torch.nn.Conv1d` has it; the last tap meets the present.
        bias: (O,). Default: none.
        stride: s: outputs are at the steps 0, s, 2s, ... of x only. Default: 1
        dilation: distance d between taps, in time steps. Default: 1
        groups: blocks of channels convolved apart; ``groups=C`` is depthwise. Default: 1
        padding_mode: what x is before its start: ``"zeros"``, or ``"replicate"``: its first value. Default: "zeros"
        activation: :math:`\varphi`: ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"gelu"``, ``"gelu_tanh"``
            (its approximation by tanh), ``"tanh"``, ``"sigmoid"``, or one that halves the channels: ``"glu"`` (first
            half times sigmoid of the second) and ``"gated"`` (tanh of the first half times sigmoid of the second, as
            in WaveNet). None: the identity. Default: None
        dropout: probability that an activation is zeroed, the others being scaled by 1/(1-p). Default: 0
        residual: r, of the shape of y, added after the dropout. Default: none.
        output_activation: :math:`\psi`: ``"relu"`` or None. Default: None
        initial_state: the (K-1)d inputs before x (B, C, (K-1)d), as a stream carries them. Default: none, and
            ``padding_mode`` says what there is.
        return_final_state: whether to return the last (K-1)d inputs too. Default: False
        reset: (B, T) bool: an episode begins at the steps where it is true. What a tap would meet before that step is
            zero. Default: none.
        cu_seqlens: offsets (N + 1,), int64, ascending from 0 to T: an x of one row holds N sequences one after
            another. The states are (N, C, (K-1)d) then. Default: none.
        channels_last: x and residual are (B, T, channels), and so is y. The states stay (B, C, (K-1)d). Default: False

    Returns:
        y (B, O, U), U being T / s rounded up; with ``"glu"`` or ``"gated"`` (B, O / 2, U). With ``return_final_state``
        a tuple (y, final_state): the ``initial_state`` of the inputs that follow, (B, C, (K-1)d).

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit; the message says
            which one.

    Saved for the backward, beside x and the weight: y for relu, leaky_relu, tanh and sigmoid; a byte an element for
    relu with a residual; v for the others, and for leaky_relu, tanh and sigmoid where y is not the activation. The
    dropout mask is recomputed from a seed that torch's generator gives (on the ``torch`` backend it is
    ``F.dropout``'s). Products of float16 and bfloat16 are summed in float32, and y is rounded once. A backward that is
    itself differentiated runs on the reference.

    Depthwise convolutions of 512 taps and steps or more are products of spectra on a CPU (FFT).

    A stride computes the outputs that it keeps only. Its kernels are those of stride 1, given every s-th step of x, or
    where s does not divide d up to min(s, K) such sequences as channels of one.

    Source: van den Oord et al., WaveNet, 2016; Bai, Kolter, Koltun, 2018.

    Example:
        >>> import torch, seqaccel.functional as SF
        >>> x, weight = torch.ones(1, 1, 5), torch.ones(1, 1, 3)
        >>> SF.causal_conv1d(x, weight, dilation=2, activation="relu")
        tensor([[[1., 1., 2., 2., 3.]]])
        >>> y, state = SF.causal_conv1d(x, weight, stride=2, padding_mode="replicate", return_final_state=True)
        >>> y, state
        (tensor([[[3., 3., 3.]]]), tensor([[[1., 1.]]]))
    """
    plain = cu_seqlens is None and return_final_state is channels_last is False and padding_mode == "zeros"
    node = backends.node(x) if plain else None
    if node is not None:  # Python takes longer than the kernels of a small problem
        options = (stride, dilation, groups, activation, dropout, output_activation)
        y = node.causal_conv1d(x, weight, bias, residual, initial_state, reset, *options)
        if y is not None:
            return y
    check_types(x=x, weight=weight, bias=bias, residual=residual, initial_state=initial_state)
    check_types(reset=reset, cu_seqlens=cu_seqlens)
    given, given_state = x, initial_state
    x, weight, bias, residual, initial_state = _common.autocast(x, weight, bias, residual, initial_state)  # type: ignore[assignment]
    check(
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
    )
    if channels_last:
        x, given = x.transpose(1, 2), given.transpose(1, 2)
        residual = None if residual is None else residual.transpose(1, 2)
    context = (weight.shape[2] - 1) * dilation
    if padding_mode == "replicate" and initial_state is None and x.shape[2] > 0:
        if cu_seqlens is None:
            initial_state, given_state = (t[..., :1].expand(-1, -1, context) for t in (x, given))
        else:
            first = cu_seqlens[:-1].clamp(0, x.shape[2] - 1)  # of each sequence
            initial_state, given_state = (
                t[0].index_select(1, first).t().unsqueeze(-1).expand(-1, -1, context) for t in (x, given)
            )
    y = _convolution(
        x,
        weight,
        bias,
        residual,
        initial_state,
        reset,
        cu_seqlens,
        stride,
        dilation,
        groups,
        activation,
        output_activation == "relu",
        dropout,
    )
    if channels_last:
        y = y.transpose(1, 2)
    if not return_final_state:
        return y
    if reset is not None or cu_seqlens is not None:
        return y, reference.final_state(given, given_state, context, reset, cu_seqlens)
    if given_state is None:
        given_state = given.new_zeros(given.shape[0], given.shape[1], context)
    return y, last_steps(given_state, given)
