"""The operators of causal convolutions: ``torch.ops.seqaccel.causal_conv1d_forward_triton`` and its kin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import operator
from seqaccel.kernels.conv.depthwise import STRIP, depthwise, depthwise_gradients
from seqaccel.kernels.conv.epilogue import ACTIVATIONS, GATED, PLAIN, Epilogue, saved_kind
from seqaccel.kernels.conv.product import (
    padded,
    product,
    stage,
    stage_gradient,
    stage_weight,
    sum_parts,
    weight_parts,
)
from seqaccel.kernels.conv.taps import WHOLE, Taps, fold, sequences_of


def fits(x: Sequence[int], weight: Sequence[int], dilation: int, groups: int) -> bool:
    """Whether offsets within a sequence fit 32 bits, and the grids of forward and backward fit CUDA's limits."""
    return _fits(x, weight, (weight[2] - 1) * dilation, groups)


def _fits(x: Sequence[int], weight: Sequence[int], context: int, groups: int) -> bool:
    length = x[2] + context
    programs = max(x[0] * groups, weight[2] * groups, triton.cdiv(length, STRIP))
    widest = max(x[1], weight[0])
    if not _is_depthwise(weight, groups):
        widest = groups * max(padded(x[1] // groups), padded(weight[0] // groups))
    return max(widest * length, 2 * weight[2] * weight[0] * padded(weight[1])) < 1 << 31 and programs <= 65535


def _is_depthwise(weight: Sequence[int], groups: int) -> bool:
    return weight[1] == 1 and groups > 1


class _Call:
    """What the forward and the backward pass of a call share."""

    def __init__(
        self, name: str, x: Tensor, weight: Tensor, taps: Taps, groups: int, epilogue: Epilogue, has_residual: bool,
        reset: Tensor | None = None, cu_seqlens: Tensor | None = None, **tensors: Tensor | None,
    ) -> None:  # fmt: skip
        """``tensors`` are checked by their names."""
        self.taps, self.groups, self.epilogue = taps, groups, epilogue
        self.rows, self.outputs = weight.shape[0], weight.shape[0] // epilogue.halves
        self.histories = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.kind = saved_kind(epilogue.activation, epilogue.relu, epilogue.dropout, has_residual)
        self._check(name, x, weight, tensors)
        if reset is not None and (
            reset.dtype != torch.bool or reset.shape != (x.shape[0], x.shape[2] // max(1, taps.width))
        ):
            raise ValueError(f"{name}: expected reset to be torch.bool with a value for each step of x")
        self.sequences = sequences_of(x, reset, cu_seqlens, taps.width)
        self.depthwise = _is_depthwise(weight.shape, groups)

    def _check(self, name: str, x: Tensor, weight: Tensor, tensors: dict[str, Tensor | None]) -> None:
        activation, batch, channels, length = self.epilogue.activation, *x.shape
        if activation not in ACTIVATIONS:
            raise ValueError(f"{name}: the Triton kernels have no activation {activation!r}")
        if activation in GATED and self.groups > 1:
            raise ValueError(f"{name}: the Triton kernels take activation {activation!r} in one group only")
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise RuntimeError(f"{name}: backend 'triton' takes float32, float16 and bfloat16, but got {x.dtype}")
        of_y = (batch, self.outputs, length)
        shapes: dict[str, tuple[int, ...]] = {"bias": (self.rows,), "residual": of_y, "grad_y": of_y, "y": of_y}
        shapes |= {"history": (self.histories, channels, self.taps.context), "addend": (batch, channels, length)}
        shapes |= {"saved": (0,) if self.kind == "nothing" else (batch, self.rows, length)}
        for argument, t in tensors.items():
            if t is not None and t.shape != shapes[argument]:
                raise ValueError(
                    f"{name}: expected {argument} to have shape {shapes[argument]}, but got {tuple(t.shape)}"
                )
        if self.histories * self.groups > 65535 or not _fits(x.shape, weight.shape, self.taps.context, self.groups):
            raise RuntimeError(
                f"{name}: backend 'triton' takes fewer than 2^31 values a sequence, 65535 * {STRIP} steps, and at most "
                "65535 batch * groups, sequences * groups and taps * groups, "
                f"but got x {tuple(x.shape)} in {self.groups} groups"
            )

    def views(self, saved: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is saved as v and as bytes."""
        return saved if self.kind == "pre" else None, saved if self.kind == "active" else None


def _contiguous(*tensors: Any) -> Any:
    return [None if t is None else t.contiguous() for t in tensors]


def _forward(
    call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, history: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, Y, T] of x [B, C, T], and what is saved."""
    batch, _, length = x.shape
    weight, bias, residual = _contiguous(weight, bias, residual)
    y = x.new_empty((batch, call.outputs, length))
    kind = call.kind if save else "nothing"
    shape = (0,) if kind == "nothing" else (batch, call.rows, length)
    saved = x.new_empty(shape, dtype=torch.uint8 if kind == "active" else x.dtype)
    pre, active = call.views(saved) if save else (None, None)
    sequences, taps, groups, epilogue = call.sequences, call.taps, call.groups, call.epilogue
    if call.depthwise:
        x, history = _contiguous(x, history)
        depthwise(x, weight, bias, residual, history, y, pre, active, taps, sequences, epilogue)
        return y, saved
    first, before = 0, None
    if history is not None and sequences is WHOLE:
        first, before, history = taps.context, history, None
    product(
        stage(x, groups, before), stage_weight(weight, groups), y, first, -1, taps, sequences,
        None if history is None else stage(history, groups), bias, residual, pre, active, epilogue,
    )  # fmt: skip
    return y, saved


def _backward(
    call: _Call, grad_y: Tensor, y: Tensor | None, saved: Tensor, x: Tensor, weight: Tensor, history: Tensor | None,
    addend: Tensor | None, wants: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight, bias, residual and history; empty if unwanted."""
    grad_y, y, saved, weight, addend = _contiguous(grad_y, y, saved, weight, addend)
    sequences, taps, groups, rows = call.sequences, call.taps, call.groups, call.rows
    wants_x, wants_weight, wants_bias, wants_history = (bool(wants & bit) for bit in (1, 2, 4, 16))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_x else x.new_empty(0)
    grad_residual = torch.empty_like(grad_y) if wants & 8 else None
    grad_weight, grad_bias = x.new_empty(0), x.new_empty(0)
    grad_history = x.new_zeros((call.histories, x.shape[1], taps.context) if wants_history else (0,))
    given = (grad_y, y, *call.views(saved))
    # With a history, the gradients near the beginnings of sequences are folded to one sequence that follows it.
    folds = history is not None and (wants_weight or wants_history) and (call.depthwise or sequences is not WHOLE)
    folded = fold(*given, rows, taps.context, sequences, call.histories, call.epilogue) if folds else None
    if call.depthwise:
        x, history = _contiguous(x, history)
        parts, sums = depthwise_gradients(
            *given, x, weight, addend, grad_x if wants_x else None, grad_residual, wants_weight, wants_bias, 0, taps,
            sequences.end, call.epilogue,
        )  # fmt: skip
        if folded is not None:
            more, _ = depthwise_gradients(
                folded, None, None, None, history, weight, None, grad_history if wants_history else None, None,
                wants_weight, False, -taps.context, taps, None, PLAIN,
            )  # fmt: skip
            parts = torch.cat([parts, more])
        parts = parts.flatten(1)
    else:
        g, sums = stage_gradient(*given, grad_residual, rows, groups, call.epilogue, wants_bias)
        near = g if folded is None else stage(folded, groups)
        if wants_x or wants_history:
            transposed = stage_weight(weight, groups, transposed=True)
        if wants_x:
            product(g, transposed, grad_x, 0, 1, taps, sequences, residual=addend)
        if wants_history:
            product(near, transposed, grad_history, -taps.context, 1, taps, WHOLE)
        if wants_weight:
            channels = weight.shape[1]
            before = history if folded is None else None
            parts = weight_parts(g, stage(x, groups, before), rows, channels, before is not None, taps, sequences.begin)
            if folded is not None:
                more = weight_parts(near, stage(history, groups), rows, channels, True, taps, None)
                parts = torch.cat([parts, more])
    if wants_weight:
        grad_weight = sum_parts(parts, weight)
    if wants_bias:
        grad_bias = sum_parts(sums, weight.new_empty(rows))
    return grad_x, grad_weight, grad_bias, x.new_empty(0) if grad_residual is None else grad_residual, grad_history


@operator(torch.library.triton_op, "seqaccel::causal_conv1d_forward_triton", mutates_args={})
def causal_conv1d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    history: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    relu: bool,
    dropout: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Like ``seqaccel::causal_conv1d_forward``: y, and what the backward pass needs beside it."""
    call = _Call(
        "causal_conv1d", x, weight, Taps(weight.shape[2], dilation), groups, Epilogue(activation, relu, dropout, seed),
        residual is not None, reset, cu_seqlens, bias=bias, residual=residual, history=history,
    )  # fmt: skip
    return _forward(call, x, weight, bias, residual, history, save)


@operator(torch.library.triton_op, "seqaccel::causal_conv1d_backward_triton", mutates_args={})
def causal_conv1d_backward(
    grad_y: Tensor,
    y: Tensor | None,
    saved: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
    addend: Tensor | None,
    dilation: int,
    groups: int,
    activation: str,
    relu: bool,
    dropout: float,
    has_residual: bool,
    wants: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like ``seqaccel::causal_conv1d_backward``: gradients of x, weight, bias, residual, history; empty if unwanted."""
    call = _Call(
        "causal_conv1d", x, weight, Taps(weight.shape[2], dilation), groups, Epilogue(activation, relu, dropout, seed),
        has_residual, reset, cu_seqlens, grad_y=grad_y, y=y, saved=saved, history=history, addend=addend,
    )  # fmt: skip
    return _backward(call, grad_y, y, saved, x, weight, history, addend, wants)


def _grid_taps(x: Tensor, weight: Tensor, row_dilation: int, column_dilation: int) -> Taps:
    rows, across = weight.shape[2:]
    return Taps(rows * across, row_dilation * x.shape[3], across, column_dilation, x.shape[3])


def _flat(t: Any) -> Any:
    """A grid (B, C, T, S) as T * S steps."""
    return None if t is None else t.flatten(2)


@operator(torch.library.triton_op, "seqaccel::causal_conv2d_forward_triton", mutates_args={})
def causal_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    history: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None,
    row_dilation: int,
    column_dilation: int,
    groups: int,
    activation: str,
    relu: bool,
    dropout: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Like ``seqaccel::causal_conv2d_forward``: y, and what the backward pass needs beside it."""
    taps, grid = _grid_taps(x, weight, row_dilation, column_dilation), x.shape[2:]
    x, weight, residual, history = (_flat(t) for t in (x, weight, residual, history))
    call = _Call(
        "causal_conv2d", x, weight, taps, groups, Epilogue(activation, relu, dropout, seed), residual is not None,
        reset, bias=bias, residual=residual, history=history,
    )  # fmt: skip
    y, saved = _forward(call, x, weight, bias, residual, history, save)
    return y.unflatten(2, grid), saved


@operator(torch.library.triton_op, "seqaccel::causal_conv2d_backward_triton", mutates_args={})
def causal_conv2d_backward(
    grad_y: Tensor,
    y: Tensor | None,
    saved: Tensor,
    x: Tensor,
    weight: Tensor,
    history: Tensor | None,
    seed: Tensor | None,
    reset: Tensor | None,
    row_dilation: int,
    column_dilation: int,
    groups: int,
    activation: str,
    relu: bool,
    dropout: float,
    has_residual: bool,
    wants: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Like ``seqaccel::causal_conv2d_backward``: gradients of x, weight, bias, residual, history; empty if unwanted."""
    taps, shapes = _grid_taps(x, weight, row_dilation, column_dilation), (x.shape, weight.shape)
    grad_y, y, x, weight, history = (_flat(t) for t in (grad_y, y, x, weight, history))
    call = _Call(
        "causal_conv2d", x, weight, taps, groups, Epilogue(activation, relu, dropout, seed), has_residual,
        reset, grad_y=grad_y, y=y, saved=saved, history=history,
    )  # fmt: skip
    grad_x, grad_weight, grad_bias, residual, history = _backward(
        call, grad_y, y, saved, x, weight, history, None, wants
    )
    width = shapes[0][3]
    grad_x = grad_x.view(shapes[0]) if wants & 1 else grad_x
    grad_weight = grad_weight.view(shapes[1]) if wants & 2 else grad_weight
    residual = residual.unflatten(2, shapes[0][2:]) if wants & 8 else residual
    history = history.view(*history.shape[:2], taps.context // max(1, width), width) if wants & 16 else history
    return grad_x, grad_weight, grad_bias, residual, history
