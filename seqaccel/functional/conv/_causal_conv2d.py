"""Convolution of a grid, causal along one dimension: the public call, checks, autograd and choice of backend."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel import _arguments, _common, _extension, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.functional.conv import _checks
from seqaccel.functional.conv._operators import from_row, output_channels, saved_kind
from seqaccel.reference import conv as reference

__all__ = ["causal_conv2d"]

NAME = "causal_conv2d"
BACKENDS = ("reference", "cpp", "triton", "torch")


def _definition(
    x,
    weight,
    bias,
    residual,
    history,
    seed,
    reset,
    row_dilation,
    column_dilation,
    groups,
    activation,
    relu,
    dropout,
    save=False,
) -> Tensor:
    return reference.causal_conv2d(
        x, weight, bias, residual, history, seed, reset, dilation=(row_dilation, column_dilation), groups=groups,
        activation=None if activation == "none" else activation, relu=relu, dropout=dropout,
    )  # fmt: skip


class _CausalConv2d(torch.autograd.Function):
    """Saves what the convolution of sequences does; a list ``kept`` takes what the operator saved."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, history, seed, reset, backend, options, kept=None):
        y, saved = call(_operators(backend)[0], x, weight, bias, residual, history, seed, reset, *options, True)
        if kept is not None:
            kept.append(saved)
        *_, activation, relu, dropout = options
        nothing = saved_kind(activation, relu, dropout, residual is not None) == "nothing"
        needs_y = relu or (activation != "none" and nothing)
        ctx.save_for_backward(x, weight, bias, residual, history, seed, reset, y if needs_y else None, saved)
        ctx.options, ctx.backend = options, backend
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, weight, bias, residual, history, seed, reset, y, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            inputs = (x, weight, bias, residual, history)
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, seed, reset, *ctx.options), inputs, (grad_y,), needs
            )
            return (*grads, *[None] * 5)
        # Without a relu around it the residual's gradient is that of y.
        relu = ctx.options[-2]
        wants = sum(1 << i for i, need in enumerate(needs) if need and (i != 3 or relu))
        grads = call(
            _operators(ctx.backend)[1],
            grad_y, y, saved, x, weight, history, seed, reset, *ctx.options, residual is not None, wants,
        )  # fmt: skip
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
        if needs[3] and not relu:
            grads[3] = grad_y
        return (*grads, *[None] * 5)


# ---- the operators' facts ----


def _forward_fake(
    x, weight, bias, residual, history, seed, reset, row_dilation, column_dilation, groups, activation, relu, dropout,
    save,
):  # fmt: skip
    batch, _, rows, width = x.shape
    kind = saved_kind(activation, relu, dropout, residual is not None) if save else "nothing"
    saved = x.new_empty(
        (0,) if kind == "nothing" else (batch, weight.shape[0], rows * width),
        dtype=torch.uint8 if kind == "active" else x.dtype,
    )
    return x.new_empty(batch, output_channels(weight, activation), rows, width), saved


def _backward_fake(
    grad_y, y, saved, x, weight, history, seed, reset, row_dilation, column_dilation, groups, activation, relu,
    dropout, has_residual, wants,
):  # fmt: skip
    state = (*x.shape[:2], (weight.shape[2] - 1) * row_dilation, x.shape[3])
    shapes = (x.shape, weight.shape, weight.shape[:1], grad_y.shape, state)
    return tuple(x.new_empty(shape if wants >> i & 1 else (0,)) for i, shape in enumerate(shapes))


def _recorded(backend, *arguments):
    *operands, save = arguments
    kept: list[Tensor] = []
    y = _CausalConv2d.apply(*operands[:7], backend, tuple(operands[7:]), kept)
    return y, kept[0] if save else y.new_empty(0)


def _forward_flops(x, weight, *_) -> int:
    return 2 * x[0] * x[2] * x[3] * math.prod(weight)


def _backward_flops(grad_y, y, saved, x, weight, *rest) -> int:
    return _forward_flops(x, weight) * (rest[-1] & 1) + _forward_flops(x, weight) * (rest[-1] >> 1 & 1)


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    register(
        Operator(
            "causal_conv2d_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch={"x": 0, "residual": 0, "history": 0, "reset": 0, 0: 0, 1: 0},
            from_row=from_row,
            autocast=autocast,
        )
    )
    register(
        Operator(
            "causal_conv2d_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch={"grad_y": 0, "y": 0, "saved": 0, "x": 0, "history": 0, "reset": 0, 0: 0, 3: 0, 4: 0},
            summed=(1, 2),
            from_row=from_row,
            autocast=autocast,
        )
    )


_register("cpp")


def _operators(backend: str) -> tuple[Any, Any]:
    """The forward and the backward operator."""
    if backend == "cpp":
        return torch.ops.seqaccel.causal_conv2d_forward, torch.ops.seqaccel.causal_conv2d_backward
    from seqaccel.kernels import conv as triton_kernels

    once(_register, "triton")
    return triton_kernels.causal_conv2d_forward, triton_kernels.causal_conv2d_backward


def _pair(value: Any) -> tuple[int, int]:
    """The dilation along T and along S."""
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{NAME}: expected dilation to be an int or a tuple of two, but got {value!r}")
    for d in pair:
        _arguments.integer(NAME, "dilation", d, 1)
    return pair


@_common.unrecorded
def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, initial_state: Tensor | None,
    dilation: tuple[int, int], groups: int, activation: str | None, output_activation: str | None, dropout: float,
) -> None:  # fmt: skip
    tensors = {"weight": weight, "bias": bias, "residual": residual, "initial_state": initial_state}
    _checks.alike(NAME, x, tensors)
    _arguments.integer(NAME, "groups", groups, 1)
    if x.dim() != 4:
        raise ValueError(f"{NAME}: expected x to be 4D (B, C, T, S), but got a tensor of size {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[2] < 1 or weight.shape[3] % 2 != 1:
        raise ValueError(
            f"{NAME}: expected weight to be 4D (O, C / groups, K_t, K_s) with K_t >= 1 and an odd K_s, but got a "
            f"tensor of size {list(weight.shape)}"
        )
    batch, channels, rows, width = x.shape
    outputs, group_channels, row_taps, _ = weight.shape
    if channels != group_channels * groups:
        raise ValueError(
            f"{NAME}: given groups={groups} and weight of size {list(weight.shape)}, expected x to have "
            f"{group_channels * groups} channels, but got {channels} channels instead"
        )
    if outputs % groups:
        raise ValueError(
            f"{NAME}: expected the output channels of weight to be divisible by groups={groups}, but got {outputs}"
        )
    known = (None, *reference.ACTIVATIONS)
    if activation not in known:
        raise ValueError(f"{NAME}: expected activation to be one of {known}, but got {activation!r}")
    gated = activation in reference.GATED
    if gated and outputs % 2:
        raise ValueError(
            f"{NAME}: expected weight to have an even number of output channels for activation={activation!r}, "
            f"but got {outputs}"
        )
    shapes = {
        "bias": (outputs,),
        "residual": (batch, outputs // 2 if gated else outputs, rows, width),
        "initial_state": (batch, channels, (row_taps - 1) * dilation[0], width),
    }
    for key, shape in shapes.items():
        t = tensors[key]
        if t is not None and t.shape != shape:
            raise ValueError(f"{NAME}: expected {key} to have shape {shape}, but got {tuple(t.shape)}")
    if output_activation not in (None, "relu"):
        raise ValueError(f"{NAME}: expected output_activation to be None or 'relu', but got {output_activation!r}")
    _arguments.probability(NAME, "dropout", dropout)


def _torch_conv(x, weight, bias, residual, history, reset, *, dilation, groups, activation, relu, dropout) -> Tensor:
    """The same from torch's own operators (``F.conv2d``); dropout draws its mask as torch does."""
    (row_taps, column_taps), (row_dilation, column_dilation) = weight.shape[2:], dilation
    side = column_taps // 2 * column_dilation
    if not torch.jit.is_tracing() and (x.numel() == 0 or weight.numel() == 0):  # F.conv2d refuses these
        y = reference.causal_conv2d(x, weight, bias, dilation=dilation, groups=groups)
    elif reset is not None:  # what each row of taps meets becomes a channel
        met = reference.row_taps_of(x, history, row_taps, row_dilation, reset)
        rows, flat = torch.stack(met, 2).flatten(1, 2), weight.flatten(1, 2).unsqueeze(2)
        y = F.conv2d(rows, flat, bias, padding=(0, side), dilation=dilation, groups=groups)
    else:
        above = (row_taps - 1) * row_dilation
        rows = F.pad(x, (0, 0, above, 0)) if history is None else torch.cat([history, x], 2)
        y = F.conv2d(rows, weight, bias, padding=(0, side), dilation=dilation, groups=groups)
    if activation is not None:
        y = reference.ACTIVATIONS[activation](y)
    y = F.dropout(y, dropout, training=dropout > 0)
    if residual is not None:
        y = y + residual
    return torch.relu(y) if relu else y


def _onednn_is_faster(x: Tensor, weight: Tensor, training: bool) -> bool:
    """Whether torch's operator was measured faster on a CPU: its blocks of channels are full, rows are short, or it has
    AMX.

    Two Xeon cores with AMX, 160 dense shapes; torch's time over ours. float32 with AVX-512: 0.62 to 1.0 (training 0.76
    to 1.0) from 9 taps on with channels in multiples of 32 (in training with 32 outputs from 15 taps on), 0.74 to 0.84
    (0.6 to 0.85) from 15 taps on with multiples of 16, 0.64 to 1.05 with fewer than 128 positions, and 0.59 to 0.91
    (0.66 to 1.08) in rows of fewer than 32 values, from 16 channels and 6 taps on; elsewhere 0.81 to 2.5. float32 with
    AVX2: 0.64 to 0.99 from 16 channels and 6 taps on. bfloat16 with AMX: 0.18 to 0.9 from 8 inputs and 2**22 products
    on, and 0.65 to 1.05 in training with fewer inputs and 2**18 outputs.
    """
    if _extension.cpp_error is not None:
        return False
    outputs, inputs, *taps = weight.shape
    count, width, positions = math.prod(taps), x.shape[3], x.numel() // inputs
    if x.dtype == torch.bfloat16:
        large = positions * max(outputs, 16) * inputs * count >= 1 << 22
        faster = large if inputs >= 8 else training and positions * outputs >= 1 << 18
        return faster and backends.torch_has_amx()
    narrow = min(inputs, outputs)
    if x.dtype != torch.float32 or narrow < 16 or count < 6:
        return False
    isa = torch.ops.seqaccel.isa()
    if isa == "avx2":
        return outputs >= 32 or not training
    if not isa.startswith("avx512"):
        return False
    if width < 32 and (count >= 9 or narrow < 64 or width < 20):
        return True
    if inputs % 32 or outputs % 32:
        return inputs % 16 == outputs % 16 == 0 and count >= 15
    return count >= (15 if training and outputs == 32 else 9) or positions < 128 or narrow >= 256


def causal_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str | None = None,
    dropout: float = 0.0,
    residual: Tensor | None = None,
    output_activation: str | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    r"""Convolution of a grid (T, S), causal along T and centred along S, with its epilogue fused.

    .. math::
        v_{b,o,t,s} &= b_o + \sum_{c,k,l} W_{o,c,k,l}\,
            x_{b,c,\,t-(K_t-1-k)d_t,\,s+(l-\lfloor K_s/2\rfloor)d_s} \\
        y &= \psi(r + \mathrm{dropout}(\varphi(v)))

    with x zero outside of the grid, or ``initial_state`` before its first row. The output has the grid of the input.
    The weight holds the taps that count only: K_t rows, the last of which meets the present row. A masked k x k
    kernel, as in pervasive attention, has K_t = (k + 1) // 2 rows that count: ``masked[:, :, :(k + 1) // 2]``.

    Args:
        x: input (B, C, T, S).
        weight: (O, C / groups, K_t, K_s), K_s odd.
        bias: (O,). Default: none.
        dilation: distance between taps along T and S, an int for both or a tuple (d_t, d_s). Default: 1
        groups: blocks of channels convolved apart. Default: 1
        activation: :math:`\varphi`, one of :func:`~seqaccel.functional.causal_conv1d`'s. Default: None
        dropout: probability that an activation is zeroed, the others being scaled by 1/(1-p). Default: 0
        residual: r, of the shape of y, added after the dropout. Default: none.
        output_activation: :math:`\psi`: ``"relu"`` or None. Default: None
        initial_state: the (K_t-1)d_t rows before x (B, C, (K_t-1)d_t, S), as a stream carries them. Default: zeros.
        reset: (B, T) bool: an episode begins at the rows where it is true. What a tap would meet above that row is
            zero. Default: none.

    Returns:
        y (B, O, T, S), with ``"glu"`` or ``"gated"`` O / 2 channels.

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit; the message says
            which one.

    Source: Elbayad, Besacier, Verbeek, Pervasive Attention, 2018.

    Example:
        >>> import torch, seqaccel.functional as SF
        >>> x, weight = torch.ones(1, 1, 3, 4), torch.ones(1, 1, 2, 3)
        >>> SF.causal_conv2d(x, weight)
        tensor([[[[2., 3., 3., 2.],
                  [4., 6., 6., 4.],
                  [4., 6., 6., 4.]]]])
    """
    _arguments.tensors(NAME, x=x, weight=weight)
    _arguments.optional_tensors(NAME, bias=bias, residual=residual, initial_state=initial_state, reset=reset)
    dilations = _pair(dilation)
    x, weight, bias, residual, history = _common.autocast(x, weight, bias, residual, initial_state)  # type: ignore[assignment]
    _check(x, weight, bias, residual, history, dilations, groups, activation, output_activation, dropout)
    if reset is not None:
        _arguments.reset(NAME, reset, (x.shape[0], x.shape[2]), x.device)
    options: dict[str, Any] = {
        "dilation": dilations,
        "groups": groups,
        "activation": activation,
        "relu": output_activation == "relu",
        "dropout": dropout,
    }
    prefer, plain = None, groups == 1 and dropout == 0 and reset is None
    if plain and x.device.type == "cpu" and not _common.is_traced(x) and x.numel() > 0:
        training = _common.needs_grad(x, weight, bias, residual, history)
        prefer = "torch" if _onednn_is_faster(x, weight, training) else None
    backend = backends.choose(NAME, x, BACKENDS, prefer=prefer)
    if backend == "torch" or _onnx.exporting():
        return _torch_conv(x, weight, bias, residual, history, reset, **options)
    seed = torch.randint(-(1 << 62), 1 << 62, (1,), device=x.device) if dropout > 0 else None
    if backend == "reference" or _common.transforms_active():
        return reference.causal_conv2d(x, weight, bias, residual, history, seed, reset, **options)
    dtype = x.dtype
    if backend == "cpp":
        to = _common.compute_dtype(dtype)
        x, weight, bias, residual, history = (  # type: ignore[assignment]
            None if t is None else t.to(to) for t in (x, weight, bias, residual, history)
        )
    if activation in reference.GATED and groups > 1:  # no kernel sees both halves at once
        with backends.backend(backend):
            v = causal_conv2d(x, weight, bias, dilation=dilations, groups=groups, initial_state=history, reset=reset)
        flat = None if residual is None else residual.flatten(2)
        y = reference.epilogue(v.flatten(2), flat, seed, activation, options["relu"], dropout)
        return y.unflatten(2, v.shape[2:]).to(dtype)
    operands = (x, weight, bias, residual, history, seed, reset)
    arguments = (*dilations, groups, activation or "none", options["relu"], float(dropout))
    if torch.compiler.is_compiling():  # autograd records the operator itself
        y, _ = _operators(backend)[0](*operands, *arguments, False)
    elif _common.needs_grad(*operands[:5]):
        y = _CausalConv2d.apply(*operands, backend, arguments)
    else:
        y, _ = call(_operators(backend)[0], *operands, *arguments, False)
    return y.to(dtype)
