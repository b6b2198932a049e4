"""The operators of a causal convolution: shapes of their results, definition, autograd and other facts."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from seqaccel import _common
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.reference import conv as reference
from seqaccel.reference.dropout import skip_rows

__all__ = ["CausalConv1d", "from_row", "operators", "output_channels", "saved_kind"]

#: Activations whose slope is seen from their value.
_FROM_OUTPUT = ("leaky_relu", "tanh", "sigmoid")

#: ``wants`` bits of the backward operators, in the order of their results.
_X, _WEIGHT, _BIAS, _RESIDUAL, _HISTORY = 1, 2, 4, 8, 16


def saved_kind(activation: str, relu: bool, dropout: float, has_residual: bool) -> str:
    """What the forward operators keep for the backward beside y: ``"nothing"``, ``"active"`` (bytes) or ``"pre"``."""
    if activation == "none":
        return "nothing"
    if activation == "relu":
        return "active" if has_residual else "nothing"
    if activation not in _FROM_OUTPUT or has_residual or relu or dropout > 0:
        return "pre"
    return "nothing"


def output_channels(weight: Tensor, activation: str | None) -> int:
    """Channels of y."""
    return weight.shape[0] // (2 if activation in reference.GATED else 1)


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
    shape = (x.shape[0], output_channels(weight, activation), x.shape[2])
    kind = saved_kind(activation, relu, dropout, residual is not None) if save else "nothing"
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


def operators(backend: str):
    if backend == "cpp":
        return (
            torch.ops.seqaccel.causal_conv1d_forward,
            torch.ops.seqaccel.causal_conv1d_backward,
        )
    from seqaccel.kernels import conv as triton_kernels

    once(_register, "triton")

    return triton_kernels.causal_conv1d_forward, triton_kernels.causal_conv1d_backward


class CausalConv1d(torch.autograd.Function):
    """Saves x, the weight, y where an activation's derivative is taken from it, and what ``saved_kind`` says, which a
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
            operators(backend)[0],
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
        kind = saved_kind(activation, relu, dropout, residual is not None)
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
            grads = differentiate_again((x, weight, bias, residual, history), grad_y, needs, *others)
            return (*grads, *[None] * 10)
        # Without a relu around it the residual's gradient is that of y.
        own_residual = needs[3] and relu
        wants = sum(1 << i for i, need in enumerate(needs) if need and (i != 3 or own_residual))
        grads = call(
            operators(ctx.backend)[1],
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


def differentiate_again(operands, grad_y, needs, *others):
    """Gradients of x, weight, bias, residual and history by the reference: differentiable, and of a batched ``grad_y``;
    csrc/autograd calls it too."""
    return _common.differentiable_backward(lambda *tensors: _definition(*tensors, *others), operands, (grad_y,), needs)


# ---- the operators' facts ----


def _definition(
    x, weight, bias, residual, history, seed, reset, cu_seqlens, dilation, groups, activation, relu, dropout, save=False
) -> Tensor:
    dtype = x.dtype
    x, weight, bias, residual, history = _common.widened(x, weight, bias, residual, history)
    y = reference.causal_conv1d(
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
    return y.to(dtype)


def _recorded(backend, *arguments):
    *operands, save = arguments
    kept: list[Tensor] = []
    y = CausalConv1d.apply(*operands[:8], backend, *operands[8:], kept)
    return y, kept[0] if save else y.new_empty(0)


def _forward_flops(x, weight, *_) -> int:
    return 2 * x[0] * x[2] * math.prod(weight)


def _backward_flops(grad_y, y, saved, x, weight, *rest) -> int:
    return _forward_flops(x, weight) * (bool(rest[-1] & _X) + bool(rest[-1] & _WEIGHT))


def from_row(named: dict[str, Any], first: int) -> dict[str, Any]:
    """The arguments for a part of the batch: its dropout masks are those that it has in the whole."""
    if named["seed"] is None:
        return named
    rows = first * output_channels(named["weight"], named["activation"])
    return named | {"seed": skip_rows(named["seed"], rows)}


def _register(backend: str) -> None:
    suffix = "" if backend == "cpp" else "_triton"
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
            from_row=from_row,
            autocast=None,
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
            from_row=from_row,
            autocast=None,
        )
    )


_register("cpp")
