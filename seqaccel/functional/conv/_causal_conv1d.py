"""Dilated causal convolution: the public call, its checks, shape functions, autograd and choice of backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._offsets import check_offsets
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.reference import conv as reference

__all__ = ["ACTIVATIONS", "GATED", "PADDING_MODES", "activate", "causal_conv1d", "last_steps"]

ACTIVATIONS = (None, *reference.ACTIVATIONS)
GATED = reference.GATED
PADDING_MODES = ("zeros", "replicate")
BACKENDS = ("reference", "cpp", "triton", "torch")

#: Activations whose slope is seen from their value.
_FROM_OUTPUT = ("leaky_relu", "tanh", "sigmoid")

#: ``wants`` bits of the backward operators, in the order of their results.
_X, _WEIGHT, _BIAS, _RESIDUAL, _HISTORY = 1, 2, 4, 8, 16


def _saved_kind(activation: str, relu: bool, dropout: float, has_residual: bool) -> str:
    """What the forward operators keep for the backward beside y: ``"nothing"``, ``"active"`` (bytes) or ``"pre"``."""
    if activation == "none":
        return "nothing"
    if activation == "relu":
        return "active" if has_residual else "nothing"
    if activation not in _FROM_OUTPUT or has_residual or relu or dropout > 0:
        return "pre"
    return "nothing"


def _outputs(weight: Tensor, activation: str | None) -> int:
    """Channels of y."""
    return weight.shape[0] // (2 if activation in GATED else 1)


def _forward_fake(
    x,
    weight,
    bias,
    residual,
    history,
    seed,
    reset,
    cu_seqlens,
    dilation,
    groups,
    activation,
    relu,
    dropout,
    save,
):
    shape = (x.shape[0], _outputs(weight, activation), x.shape[2])
    kind = _saved_kind(activation, relu, dropout, residual is not None) if save else "nothing"
    saved = x.new_empty(
        (0,) if kind == "nothing" else (x.shape[0], weight.shape[0], x.shape[2]),
        dtype=torch.uint8 if kind == "active" else x.dtype,
    )
    return x.new_empty(shape), saved


def _backward_fake(
    grad_y,
    y,
    saved,
    x,
    weight,
    history,
    seed,
    reset,
    cu_seqlens,
    addend,
    dilation,
    groups,
    activation,
    relu,
    dropout,
    has_residual,
    wants,
):
    context = (weight.shape[2] - 1) * dilation
    shapes = (
        x.shape,
        weight.shape,
        weight.shape[:1],
        grad_y.shape,
        (x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, x.shape[1], context),
    )
    return tuple(x.new_empty(shape if wants >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _operators(backend: str):
    if backend == "cpp":
        return (
            torch.ops.seqaccel.causal_conv1d_forward,
            torch.ops.seqaccel.causal_conv1d_backward,
        )
    from seqaccel.kernels import conv as triton_kernels

    once(_register, "triton")

    return triton_kernels.causal_conv1d_forward, triton_kernels.causal_conv1d_backward


class _CausalConv1d(torch.autograd.Function):
    """Saves x, the weight, y where an activation's derivative is taken from it, and what ``_saved_kind`` says, which a
    list ``kept`` takes."""

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias,
        residual,
        history,
        seed,
        reset,
        cu_seqlens,
        backend,
        dilation,
        groups,
        activation,
        relu,
        dropout,
        kept=None,
    ):
        y, saved = call(
            _operators(backend)[0],
            x,
            weight,
            bias,
            residual,
            history,
            seed,
            reset,
            cu_seqlens,
            dilation,
            groups,
            activation,
            relu,
            dropout,
            True,
        )
        if kept is not None:
            kept.append(saved)
        kind = _saved_kind(activation, relu, dropout, residual is not None)
        needs_y = relu or (activation != "none" and kind == "nothing")
        ctx.save_for_backward(
            x, weight, bias, residual, history, seed, reset, cu_seqlens, y if needs_y else None, saved
        )
        ctx.options = (dilation, groups, activation, relu, dropout)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, bias, residual, history, seed, reset, cu_seqlens, y, saved = ctx.saved_tensors
        dilation, groups, activation, relu, dropout = ctx.options
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            others = (seed, reset, cu_seqlens, *ctx.options)
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, *others), (x, weight, bias, residual, history), (grad_y,), needs
            )
            return (*grads, *[None] * 10)
        # Without a relu around it the residual's gradient is that of y.
        own_residual = needs[3] and relu
        wants = sum(1 << i for i, need in enumerate(needs) if need and (i != 3 or own_residual))
        grads = call(
            _operators(ctx.backend)[1],
            grad_y,
            y,
            saved,
            x,
            weight,
            history,
            seed,
            reset,
            cu_seqlens,
            None,
            dilation,
            groups,
            activation,
            relu,
            dropout,
            residual is not None,
            wants,
        )
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if needs[3] and not relu:
            grads[3] = grad_y
        return (*grads, *[None] * 10)


# ---- the operators' facts ----


def _definition(
    x, weight, bias, residual, history, seed, reset, cu_seqlens, dilation, groups, activation, relu, dropout, save=False
) -> Tensor:
    return reference.causal_conv1d(
        x,
        weight,
        bias,
        residual,
        history,
        seed,
        reset,
        cu_seqlens,
        dilation=dilation,
        groups=groups,
        activation=None if activation == "none" else activation,
        relu=relu,
        dropout=dropout,
    )


def _recorded(backend, *arguments):
    *operands, save = arguments
    kept: list[Tensor] = []
    y = _CausalConv1d.apply(*operands[:8], backend, *operands[8:], kept)
    return y, kept[0] if save else y.new_empty(0)


def _forward_flops(x, weight, *_) -> int:
    return 2 * x[0] * x[2] * math.prod(weight)


def _backward_flops(grad_y, y, saved, x, weight, *rest) -> int:
    return _forward_flops(x, weight) * (bool(rest[-1] & _X) + bool(rest[-1] & _WEIGHT))


def _from_row(named: dict[str, Any], first: int) -> dict[str, Any]:
    """The arguments for a part of the batch: its dropout masks are those that it has in the whole."""
    if named["seed"] is None:
        return named
    rows = first * _outputs(named["weight"], named["activation"])
    return named | {"seed": reference.skip_rows(named["seed"], rows)}


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    by_batch: dict[str | int, int] = {"x": 0, "residual": 0, "history": 0, "reset": 0, 0: 0, 1: 0}
    register(
        Operator(
            "causal_conv1d_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=by_batch,
            packs=("cu_seqlens", 1),
            from_row=_from_row,
            autocast=autocast,
        )
    )
    by_batch = {"grad_y": 0, "y": 0, "saved": 0, "x": 0, "history": 0, "reset": 0, "addend": 0}
    by_batch |= {0: 0, 3: 0, 4: 0}
    register(
        Operator(
            "causal_conv1d_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch=by_batch,
            packs=("cu_seqlens", 1),
            summed=(1, 2),
            from_row=_from_row,
            autocast=autocast,
        )
    )


_register("cpp")


def _check_types(**tensors) -> None:
    for argument, t in tensors.items():
        if not isinstance(t, Tensor) and (t is not None or argument in ("x", "weight")):
            raise TypeError(f"causal_conv1d(): argument '{argument}' must be Tensor, not {type(t).__name__}")


@_common.unrecorded
def _check(
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
        if reset.dtype != torch.bool or reset.shape != (batch, length):
            raise ValueError(
                f"{name}: expected reset to be torch.bool of shape {(batch, length)}, "
                f"but got {reset.dtype} of {tuple(reset.shape)}"
            )
        if cu_seqlens is not None:
            raise ValueError(f"{name}: expected no reset with cu_seqlens, which says where sequences begin")
        if padding_mode != "zeros" and initial_state is None:
            raise ValueError(f"{name}: expected padding_mode='zeros' with reset; cu_seqlens takes {padding_mode!r}")
    sequences = batch
    if cu_seqlens is not None:
        check_offsets(name, cu_seqlens, length, batch)
        sequences = cu_seqlens.shape[0] - 1
    for argument, t in (("reset", reset), ("cu_seqlens", cu_seqlens)):
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but {argument} is on {t.device} "
                f"and x on {x.device}"
            )
    steps, width = -(-length // stride), _outputs(weight, activation)
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


def _torch_conv(x, weight, bias, residual, history, *, stride, dilation, groups, activation, relu, dropout) -> Tensor:
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


def _torch_is_faster(x: Tensor, weight: Tensor, dilation: int, groups: int) -> bool:
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


def _fft_is_faster(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> bool:
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


def _by_fft(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None) -> Tensor:
    """The depthwise convolution as a product of spectra. What wraps around falls on outputs that are not kept."""
    before = weight.shape[2] - 1
    x = F.pad(x, (before, 0)) if history is None else torch.cat([history, x], -1)
    size = _fft_size(x.shape[2])
    spectrum = torch.fft.rfft(x, size) * torch.fft.rfft(weight.squeeze(1).flip(1), size)
    y = torch.fft.irfft(spectrum, size)[..., before : x.shape[2]]
    return y if bias is None else y + bias.unsqueeze(-1)


def activate(v: Tensor, activation: str | None) -> Tensor:
    """One of ``ACTIVATIONS``, of (B, C, T)."""
    return v if activation is None else reference.ACTIVATIONS[activation](v)


def last_steps(history: Tensor, x: Tensor) -> Tensor:
    """The last time steps of ``history`` followed by ``x``, as many as ``history`` has; shares no memory with them."""
    context, length = history.shape[-1], x.shape[-1]
    if torch.compiler.is_compiling():  # for any length, and with strides that do not depend on it
        last = torch.cat([history, x], -1).narrow(-1, length, context)
    elif length >= context:
        last = x[..., length - context :]
    else:
        return torch.cat([history[..., length:], x], -1)
    return last.clone(memory_format=torch.contiguous_format)


def _strided(x, weight, history, stride: int, dilation: int):
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


def _convolution(
    x, weight, bias, residual, history, reset, cu_seqlens, stride, dilation, groups, activation, relu, dropout
) -> Tensor:
    """y of checked arguments, by the backend that is chosen."""
    options: dict[str, Any] = {
        "dilation": dilation,
        "groups": groups,
        "activation": activation,
        "relu": relu,
        "dropout": dropout,
    }
    prefer = "torch" if x.device.type == "cuda" and _torch_is_faster(x, weight, dilation, groups) else None
    tried = activation in (None, "relu", "tanh", "sigmoid", "silu")  # on a GPU
    operator = "causal_conv1d" if tried else f"causal_conv1d with {activation}"
    backend = backends.choose(operator, x, BACKENDS, prefer=prefer)
    by_taps = stride > 1 or _onnx.exporting() or backend in ("triton", "torch")
    if by_taps and (reset is not None or cu_seqlens is not None) and x.numel() > 0:
        # What each tap meets becomes a channel, and the convolution one of a single tap.
        origin = reference.origins(x, reset, cu_seqlens)
        x = torch.stack(reference.taps(x, history, weight.shape[2], dilation, origin), 2).flatten(1, 2)[..., ::stride]
        weight, history, reset, cu_seqlens = weight.flatten(1).unsqueeze(-1), None, None, None
        stride = dilation = 1
        options["dilation"] = 1
    if backend == "torch" or _onnx.exporting():
        return _torch_conv(x, weight, bias, residual, history, stride=stride, **options)
    seed = torch.randint(-(1 << 62), 1 << 62, (1,), device=x.device) if dropout > 0 else None
    if backend == "reference" or _common.transforms_active():
        sequences = (reset, cu_seqlens)
        return reference.causal_conv1d(x, weight, bias, residual, history, seed, *sequences, stride=stride, **options)
    dtype = x.dtype
    if backend == "cpp":
        to = _common.compute_dtype(dtype)
        x, weight, bias, residual, history = (
            None if t is None else t.to(to) for t in (x, weight, bias, residual, history)
        )
    whole = reset is None and cu_seqlens is None
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _common.is_distributed(x)
    if backend == "cpp" and whole and not traced and _fft_is_faster(x, weight, stride, dilation, groups):
        v = _by_fft(x, weight, bias, history)
        return reference.epilogue(v, residual, seed, activation, relu, dropout).contiguous().to(dtype)
    if stride > 1:
        x, weight, history, dilation = _strided(x, weight, history, stride, dilation)
    if activation in GATED and (backend == "triton" or groups > 1):  # no kernel sees both halves at once
        with backends.backend(backend):
            v = _convolution(x, weight, bias, None, history, reset, cu_seqlens, 1, dilation, groups, None, False, 0.0)
        return reference.epilogue(v, residual, seed, activation, relu, dropout).to(dtype)
    operands = (x, weight, bias, residual, history, seed, reset, cu_seqlens)
    arguments = (dilation, groups, activation or "none", relu, float(dropout))
    if torch.compiler.is_compiling():  # autograd records the operator itself
        y, _ = _operators(backend)[0](*operands, *arguments, False)
    elif _common.needs_grad(x, weight, bias, residual, history):
        y = _CausalConv1d.apply(*operands, backend, *arguments)
    else:
        y, _ = call(_operators(backend)[0], *operands, *arguments, False)
    return y.to(dtype)


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
        reset: (B, T) bool: a sequence begins at the steps where it is true. What a tap would meet before that step is
            ``initial_state`` again, or zero. Default: none.
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
    ``F.dropout``'s). float16 and bfloat16 are computed in float32 on a CPU. A backward that is itself differentiated
    runs on the reference.

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
    _check_types(x=x, weight=weight, bias=bias, residual=residual, initial_state=initial_state)
    _check_types(reset=reset, cu_seqlens=cu_seqlens)
    given, given_state = x, initial_state
    x, weight, bias, residual, initial_state = _common.autocast(x, weight, bias, residual, initial_state)  # type: ignore[assignment]
    _check(
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
