"""Recurrent layers: the public calls, their checks, shape functions, autograd and choice of backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqaccel import _extension, backends
from seqaccel.functional import _common
from seqaccel.reference import rnn as reference

__all__ = ["lstm"]

_BACKENDS = ("reference", "cpp", "triton", "torch")
_PROJECTED_BACKENDS = ("reference", "torch")


def _operators(backend: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if backend == "cpp":
        return torch.ops.seqaccel.lstm_forward.default, torch.ops.seqaccel.lstm_backward.default
    from seqaccel.kernels import rnn as kernels

    return kernels.lstm_forward, kernels.lstm_backward


def _forward_fake(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, save):
    steps, batch, hidden = input.shape[0], input.shape[1], weight_hh.shape[1]
    sequence = (steps, batch, hidden)
    return (
        input.new_empty(sequence),
        input.new_empty((batch, hidden)),
        input.new_empty((batch, hidden)),
        input.new_empty((steps, batch, 4 * hidden) if save else (0,)),
        input.new_empty(sequence if save else (0,)),
    )


def _backward_fake(
    grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weight_ih, weight_hh, output, gates, cells, lengths, reverse,
    needs_input, needs_weight_ih, needs_weight_hh,
):  # fmt: skip
    return (
        input.new_empty(input.shape if needs_input else (0,)),
        input.new_empty(h_0.shape),
        input.new_empty(c_0.shape),
        input.new_empty(weight_ih.shape if needs_weight_ih else (0,)),
        input.new_empty(weight_hh.shape if needs_weight_hh else (0,)),
        input.new_empty(weight_hh.shape[:1]),
    )


if _extension.cpp_error is None:
    torch.library.register_fake("seqaccel::lstm_forward")(_forward_fake)
    torch.library.register_fake("seqaccel::lstm_backward")(_backward_fake)


class _LSTM(torch.autograd.Function):
    """Saves the input, the output, c and the activated gates: I + 6 H values a step and row."""

    @staticmethod
    def forward(ctx, input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, backend):
        output, h_n, c_n, gates, cells = _operators(backend)[0](
            input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, True
        )
        ctx.save_for_backward(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, gates, cells)
        ctx.reverse, ctx.backend = reverse, backend
        ctx.set_materialize_grads(False)
        return output, h_n, c_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, grad_c_n):
        input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, output, gates, cells = ctx.saved_tensors
        needs, reverse = ctx.needs_input_grad[:7], ctx.reverse
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *inputs: reference.lstm(*inputs, lengths=lengths, reverse=reverse),
                (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh),
                (grad_output, grad_h_n, grad_c_n),
                needs,
            )
            return *grads, None, None, None
        grad_input, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias = _operators(ctx.backend)[1](
            grad_output, grad_h_n, grad_c_n, input, h_0, c_0, weight_ih, weight_hh, output, gates, cells, lengths,
            reverse, needs[0], needs[3], needs[4],
        )  # fmt: skip
        grads = (grad_input, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias, grad_bias)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def _reverse_in_time(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, ...) with each sequence's valid steps in reverse order; padding stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    last = lengths.to(x.device) - 1
    index = torch.where(t <= last, last - t, t)
    return x.gather(0, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _torch_lstm(
    input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own operator: the backend ``torch``."""
    steps, batch = input.shape[:2]
    if steps == 0 or batch == 0:
        return h_0.new_zeros(steps, *h_0.shape), h_0.clone(), c_0.clone()
    weights = [weight_ih, weight_hh]
    if bias_ih is not None or bias_hh is not None:
        zero = torch.zeros_like(weight_ih[:, 0])
        weights += [zero if bias is None else bias for bias in (bias_ih, bias_hh)]
    if weight_hr is not None:
        weights.append(weight_hr)
    has_biases = len(weights) > 3 or (len(weights) == 3 and weight_hr is None)
    state = (h_0.unsqueeze(0), c_0.unsqueeze(0))
    if reverse:
        input = _reverse_in_time(input, lengths)
    if lengths is None:
        output, h_n, c_n = torch._VF.lstm(input, state, weights, has_biases, 1, 0.0, False, False, False)
    else:
        packed = pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
        state = (h_0[packed.sorted_indices].unsqueeze(0), c_0[packed.sorted_indices].unsqueeze(0))
        data, h_n, c_n = torch._VF.lstm(
            packed.data, packed.batch_sizes, state, weights, has_biases, 1, 0.0, False, False
        )
        output, _ = pad_packed_sequence(packed._replace(data=data), total_length=steps)
        h_n, c_n = h_n[:, packed.unsorted_indices], c_n[:, packed.unsorted_indices]
    if reverse:
        output = _reverse_in_time(output, lengths)
    return output, h_n[0], c_n[0]


def _check_lstm(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths) -> None:
    if input.dim() != 3:
        raise ValueError(f"lstm: expected input to have 3 dimensions (T, B, I), but got shape {tuple(input.shape)}")
    if weight_hh.dim() != 2 or weight_hh.shape[0] % 4 or weight_hh.shape[0] == 0:
        raise ValueError(f"lstm: expected weight_hh to have shape (4 * H, H), but got {tuple(weight_hh.shape)}")
    steps, batch, size = input.shape
    hidden = weight_hh.shape[0] // 4
    outputs = hidden if weight_hr is None else weight_hr.shape[0]
    expected = {
        "weight_ih": (weight_ih, (4 * hidden, size)),
        "weight_hh": (weight_hh, (4 * hidden, outputs)),
        "bias_ih": (bias_ih, (4 * hidden,)),
        "bias_hh": (bias_hh, (4 * hidden,)),
        "weight_hr": (weight_hr, (outputs, hidden)),
        "h_0": (h_0, (batch, outputs)),
        "c_0": (c_0, (batch, hidden)),
    }
    if not input.is_floating_point():
        raise TypeError(f"lstm: expected input to be floating point, but got {input.dtype}")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"lstm: expected {name} to have shape {shape}, but got {tuple(tensor.shape)}")
        if tensor.dtype != input.dtype:
            raise TypeError(f"lstm: expected {name} to have the dtype of input, {input.dtype}, but got {tensor.dtype}")
        if tensor.device != input.device:
            raise RuntimeError(
                "lstm: expected all tensors to be on the same device, "
                f"but input is on {input.device} and {name} is on {tensor.device}"
            )
    if lengths is not None:
        if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
            raise ValueError(
                f"lstm: expected lengths to be torch.int64 of shape ({batch},), "
                f"but got {lengths.dtype} of {tuple(lengths.shape)}"
            )
        if not torch.compiler.is_compiling() and not _common.transforms_active() and batch:
            shortest, longest = (int(bound) for bound in lengths.aminmax())
            if shortest < 1 or longest > steps:
                raise ValueError(
                    f"lstm: expected lengths to be between 1 and {steps}, but they range from {shortest} to {longest}"
                )


def lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    r"""One layer and direction of a long short-term memory.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i,f,o} x_t + b_{i,f,o} + U_{i,f,o} h_{t-1} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g x_t + b_g + U_g h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t) \qquad \text{or} \quad W_{hr} (o_t \odot \tanh(c_t))

    float16 and bfloat16 are computed in float32 by the backend ``cpp``. Training keeps the input and, with H hidden
    units, 6 H values a step and row for the backward pass, the output among them: 24 H bytes in float32. Gradients of
    gradients go through the reference.

    Args:
        input: (T, B, I).
        state: :math:`h_0` (B, P) and :math:`c_0` (B, H), where P is H without a projection. Default: zero.
        weight_ih: W, (4 * H, I), the rows of i, f, g and o one after the other.
        weight_hh: U, (4 * H, P).
        bias_ih: b, (4 * H,). Default: none.
        bias_hh: b', (4 * H,). Default: none.
        weight_hr: projection, (P, H); only the backends ``reference`` and ``torch`` have it. Default: none.
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the output is 0 and the state
            stays. Default: every sequence has T steps.
        reverse: run from the last step (of each sequence) to the first. Default: ``False``.

    Returns:
        output (T, B, P), and the last state :math:`h_n` (B, P), :math:`c_n` (B, H).

    Raises:
        TypeError: a dtype that is not floating point, or differs between the arguments.
        ValueError: shapes that do not fit, lengths out of range.
        RuntimeError: different devices, or a backend that was asked for is missing.

    Source: Hochreiter and Schmidhuber, *Long short-term memory*, 1997; Gers et al., *Learning to forget*, 2000; the
    projection: Sak et al., 2014.

    Example:
        >>> import torch, seqaccel
        >>> T, B, I, H = 7, 2, 3, 5
        >>> x, weight_ih, weight_hh = torch.randn(T, B, I), torch.randn(4 * H, I), torch.randn(4 * H, H)
        >>> output, (h_n, c_n) = seqaccel.functional.lstm(x, None, weight_ih, weight_hh)
        >>> output.shape, torch.equal(output[-1], h_n)
        (torch.Size([7, 2, 5]), True)
    """
    if state is None:
        batch, hidden = input.shape[1] if input.dim() == 3 else 0, weight_hh.shape[0] // 4
        c_0 = weight_hh.new_zeros(batch, hidden)
        h_0 = weight_hh.new_zeros(batch, hidden if weight_hr is None else weight_hr.shape[0])
    else:
        h_0, c_0 = state
        if c_0 is h_0:
            c_0 = h_0.clone()  # Dynamo takes no autograd.Function that is given one tensor twice
    input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = _common.autocast(  # type: ignore[assignment]
        input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr
    )
    _check_lstm(input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths)
    backend = backends.choose("lstm", input, _BACKENDS if weight_hr is None else _PROJECTED_BACKENDS)
    if backend == "reference" or _common.transforms_active():
        if lengths is not None:
            lengths = lengths.to(input.device)
        output, h_n, c_n = reference.lstm(
            input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse
        )
        return output, (h_n, c_n)
    if backend == "torch":
        output, h_n, c_n = _torch_lstm(
            input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, lengths, reverse
        )
        return output, (h_n, c_n)
    dtype = input.dtype
    tensors: tuple[Tensor | None, ...] = (input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    if backend == "cpp":
        compute = _common.compute_dtype(dtype)
        if dtype != compute:
            tensors = tuple(None if t is None else t.to(compute) for t in tensors)
    if lengths is not None:
        lengths = lengths.to(input.device)
    if _common.needs_grad(*tensors):
        output, h_n, c_n = _LSTM.apply(*tensors, lengths, reverse, backend)
    else:
        output, h_n, c_n, _, _ = _operators(backend)[0](*tensors, lengths, reverse, False)
    if output.dtype != dtype:
        output, h_n, c_n = output.to(dtype), h_n.to(dtype), c_n.to(dtype)
    return output, (h_n, c_n)
