"""torch's own recurrent operators as the backend ``torch``: one layer, one direction."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqaccel import _common
from seqaccel.functional.rnn._cells import CELLS

# ---- while compiling for a GPU: opaque operators, where Inductor would unroll the steps of torch's ----

_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}  # cuDNN's


def is_opaque(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether what compiles is to call cuDNN as one operator of a graph."""
    return (
        device.type == "cuda"
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and torch.version.hip is None
        and torch.backends.cudnn.enabled
        and dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    )


def _cudnn_options(
    cell: str, weights: Sequence[Tensor], num_layers: int, train: bool, bidirectional: bool
) -> tuple[int, tuple[Any, ...]]:
    """Weights of a layer and direction, and what cuDNN's operators take from ``mode`` to ``dropout_state``."""
    count = len(weights) // (num_layers * (2 if bidirectional else 1))
    hidden, projected = weights[0].shape[0] // CELLS[cell].gates, weights[count - 1].shape[0] if count % 2 else 0
    return count, (_MODES[cell], hidden, projected, num_layers, False, 0.0, train, bidirectional, [], None)


@torch.library.custom_op(
    "seqaccel::rnn_cudnn",
    mutates_args=(),
    schema="(str cell, Tensor input, Tensor h_0, Tensor? c_0, Tensor[] weights, int num_layers, bool bidirectional, "
    "bool train) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _cudnn(cell, input, h_0, c_0, weights, num_layers, bidirectional, train):
    """output, h_n, c_n (empty for a cell without c), and for the backward pass cuDNN's reserve and packed weights."""
    count, options = _cudnn_options(cell, weights, num_layers, train, bidirectional)
    c_0 = None if c_0 is None else c_0.contiguous()
    output, h_n, c_n, reserve, packed = torch.ops.aten._cudnn_rnn.default(
        input.contiguous(), [w.contiguous() for w in weights], count, None, h_0.contiguous(), c_0, *options
    )
    return output, h_n, input.new_empty(0) if c_0 is None else c_n, reserve, packed


@_cudnn.register_fake
def _(cell, input, h_0, c_0, weights, num_layers, bidirectional, train):
    steps, batch = input.shape[:2]
    sizes = [torch.library.get_ctx().new_dynamic_size() for _ in range(2)]
    return (
        input.new_empty(steps, batch, h_0.shape[2] * (2 if bidirectional else 1)),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        input.new_empty(0 if c_0 is None else c_0.shape),
        input.new_empty(sizes[0], dtype=torch.uint8),
        input.new_empty(sizes[1]),
    )


@torch.library.custom_op(
    "seqaccel::rnn_cudnn_backward",
    mutates_args=(),
    schema="(str cell, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, Tensor? c_0, "
    "Tensor[] weights, Tensor output, Tensor reserve, Tensor packed, int num_layers, bool bidirectional) "
    "-> (Tensor, Tensor, Tensor, Tensor[])",
)
def _cudnn_backward(
    cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, output, reserve, packed, num_layers, bidirectional
):
    """Gradients of input, h_0, c_0 (empty for a cell without c) and weights."""
    count, options = _cudnn_options(cell, weights, num_layers, True, bidirectional)
    state = h_0.contiguous(), None if c_0 is None else c_0.contiguous()
    grads = (None if g is None else g.contiguous() for g in (grad_output, grad_h_n, grad_c_n))
    grad_input, grad_h_0, grad_c_0, grad_weights = torch.ops.aten._cudnn_rnn_backward.default(
        input.contiguous(), [w.contiguous() for w in weights], count, packed, *state, output, *grads, *options,
        reserve.clone(),  # which cuDNN writes to
        [True, True, c_0 is not None, True],
    )  # fmt: skip
    # Views of one buffer: an operator's results may not share memory.
    return grad_input, grad_h_0, input.new_empty(0) if c_0 is None else grad_c_0, [g.clone() for g in grad_weights]


@_cudnn_backward.register_fake
def _(
    cell, grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weights, output, reserve, packed, num_layers, bidirectional
):
    shapes = (input.shape, h_0.shape, (0,) if c_0 is None else c_0.shape)
    return *(input.new_empty(shape) for shape in shapes), [w.new_empty(w.shape) for w in weights]


def _save(ctx, inputs, output):
    ctx.cell, input, h_0, c_0, weights, ctx.num_layers, ctx.bidirectional, _ = inputs
    out, _, _, reserve, packed = output
    ctx.save_for_backward(input, h_0, c_0, out, reserve, packed, *weights)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_h_n, grad_c_n, *_):
    input, h_0, c_0, output, reserve, packed, *weights = ctx.saved_tensors
    grad_input, grad_h_0, grad_c_0, grad_weights = _cudnn_backward(
        ctx.cell, grad_output, grad_h_n, None if c_0 is None else grad_c_n, input, h_0, c_0, weights, output, reserve,
        packed, ctx.num_layers, ctx.bidirectional,
    )  # fmt: skip
    return None, grad_input, grad_h_0, None if c_0 is None else grad_c_0, grad_weights, None, None, None


_cudnn.register_autograd(_differentiate, setup_context=_save)


def _opaque_layers(
    cell: str, input: Tensor, state: Sequence[Tensor], weights: list[Tensor], num_layers: int, bidirectional: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Layers of states (layers * directions, B, ·) without dropout between them."""
    h_0, c_0 = (*state, None)[:2]
    train = _common.needs_grad(input, *state, *weights)
    output, h_n, c_n, _, _ = _cudnn(cell, input, h_0, c_0, weights, num_layers, bidirectional, train)
    return output, (h_n,) if c_0 is None else (h_n, c_n)


def _opaque(
    cell: str,
    input: Tensor,
    state: tuple[Tensor, ...],
    weights: list[Tensor],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The layers at once, or where there is dropout one after the other."""
    if not dropout or num_layers == 1:
        return _opaque_layers(cell, input, state, weights, num_layers, bidirectional)
    directions, count, found = state[0].shape[0] // num_layers, len(weights) // num_layers, []
    for layer in range(num_layers):
        if layer:
            input = torch.nn.functional.dropout(input, dropout)
        first = [part[layer * directions : (layer + 1) * directions] for part in state]
        own = weights[layer * count : (layer + 1) * count]
        input, last = _opaque_layers(cell, input, first, own, 1, bidirectional)
        found.append(last)
    return input, tuple(torch.cat(parts) for parts in zip(*found, strict=True))


# ---- torch's operators ----


def _reverse_in_time(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, ...) with each sequence's valid steps in reverse order; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    last = lengths.to(x.device) - 1
    index = torch.where(t <= last, last - t, t)
    return x.gather(0, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def layer(
    cell: str,
    input: Tensor,
    h_0: Tensor,
    c_0: Tensor | None,
    weights: list[Tensor | None],
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments and results as those of ``seqaccel.reference.rnn.layer``."""
    steps, batch = input.shape[:2]
    if steps == 0 or (batch == 0 and lengths is not None):
        return h_0.new_zeros(steps, *h_0.shape), h_0.clone(), None if c_0 is None else c_0.clone()
    weight_ih, weight_hh, *biases = weights[:4]
    has_biases = any(bias is not None for bias in biases)
    given = [weight_ih, weight_hh]
    if has_biases:
        given += [torch.zeros_like(weight_ih[:, 0]) if bias is None else bias for bias in biases]  # type: ignore[index]
    given += [weight for weight in weights[4:] if weight is not None]
    operator = getattr(torch._VF, cell)
    train = input.is_cuda and torch.is_grad_enabled()  # cuDNN's backward pass asks for it
    state = [part.contiguous() for part in (h_0, c_0) if part is not None]
    if reverse:
        input = _reverse_in_time(input, lengths)
    if lengths is None and is_opaque(input.device, input.dtype):
        state = [part.unsqueeze(0) for part in state]
        output, (*last,) = _opaque_layers(cell, input, state, given, 1, False)  # type: ignore[arg-type]
    elif lengths is None:
        state = [part.unsqueeze(0) for part in state]
        output, *last = operator(
            input, state if c_0 is not None else state[0], given, has_biases, 1, 0.0, train, False, False
        )
    else:
        packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
        state = [part[packed.sorted_indices].unsqueeze(0) for part in state]
        data, *last = operator(
            packed.data, packed.batch_sizes, state if c_0 is not None else state[0], given, has_biases, 1, 0.0, train,
            False,
        )  # fmt: skip
        output, _ = pad_packed_sequence(packed._replace(data=data), total_length=steps)
        last = [part[:, packed.unsorted_indices] for part in last]
    if reverse:
        output = _reverse_in_time(output, lengths)
    return output, last[0][0], None if c_0 is None else last[1][0]


def all_layers(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    state: tuple[Tensor, ...] | None,
    weights: Sequence[Sequence[Tensor | None]],
    directions: int,
    dropout: float,
    training: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All layers on input (T, B, I), or (N, I) packed with ``batch_sizes``; states (layers * directions, B, ·), by
    default zero. ``weights``: of each layer and direction."""
    traced, num_layers = torch.jit.is_tracing(), len(weights) // directions
    has_biases = weights[0][2] is not None
    flat = [weight for own in weights for weight in own if weight is not None]
    if state is None:
        batch: Any = batch_sizes[0] if batch_sizes is not None else input.shape[1]
        gates_H, P = weights[0][1].shape  # type: ignore[union-attr]
        widths = (P, gates_H // CELLS[cell].gates)[: 2 if CELLS[cell].has_cell_state else 1]
        state = tuple(input.new_zeros(len(weights), batch, width) for width in widths)
    if batch_sizes is None and not traced and input.shape[0] == 0:
        width = state[0].shape[-1] * directions
        return input.new_zeros(0, input.shape[1], width), tuple(part.clone() for part in state)
    if batch_sizes is None and is_opaque(input.device, input.dtype):
        return _opaque(cell, input, state, flat, num_layers, dropout, directions == 2)
    state = tuple(part.contiguous() for part in state)
    first = state if len(state) > 1 else state[0]
    # cuDNN's backward pass asks for a forward pass in training, which without dropout changes nothing else.
    train = training or (torch.is_grad_enabled() and not traced)
    options = (flat, has_biases, num_layers, dropout, train, directions == 2)
    operator = getattr(torch._VF, cell)
    if batch_sizes is None:
        output, *last = operator(input, first, *options, False)
    else:
        output, *last = operator(input, batch_sizes, first, *options)
    return output, tuple(last)


def step(
    cell: str, input: Tensor, state: tuple[Tensor, ...] | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """torch's operator of a single step: the new state from input (B, I) and (h,) or (h, c), by default zero."""
    if cell == "lstm":
        if state is None:
            state = (input.new_zeros(input.shape[0], weights[1].shape[1]),) * 2  # type: ignore[union-attr]
        return torch._VF.lstm_cell(input, state, *weights)  # type: ignore[arg-type]
    h = input.new_zeros(input.shape[0], weights[1].shape[1]) if state is None else state[0]  # type: ignore[union-attr]
    return (getattr(torch._VF, f"{cell}_cell")(input, h, *weights),)
