"""The recurrence of an attention decoder: the public function, its checks, autograd and choice of backend."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._matmul import mm
from seqaccel.functional._registration import Operator, call, register
from seqaccel.reference import attention as reference

__all__ = ["attention_lstm"]

BACKENDS = ("reference", "cpp")


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


class _AttentionLSTM(torch.autograd.Function):
    """Saves the inputs, the results, and of each step the gates and c. The kernel goes back step by step. The gradients
    of keys, values and weights are products over all steps, calculated after it."""

    @staticmethod
    def forward(ctx, *operands):
        results = call(torch.ops.seqaccel.attention_lstm_forward, *operands)
        output, _, _, *kept = results
        ctx.save_for_backward(*operands, output, *kept)
        ctx.mark_non_differentiable(*results[5:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx, *grads):
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _common.differentiable_backward(reference.attention_lstm, saved[:12], grads[:5], needs)
        device_type = saved[0].device.type
        if not _common.autocast_on(device_type):
            return _gradients(saved, grads, needs)
        with torch.autocast(device_type, enabled=False):
            return _gradients(saved, grads, needs)


def _gradients(
    saved: tuple[Any, ...], grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those of ``attention_lstm_forward``'s arguments that are needed."""
    _, key, value, _, lengths, h_0, c_0, query_weight, query_bias, score_weight, *weights = saved[:12]
    output, context, attention, gates, cells = saved[12:]
    h = torch.cat([h_0.unsqueeze(1), output[:, :-1]], 1)[:, : output.shape[1]]  # before each step
    query = h if query_weight is None else torch.nn.functional.linear(h, query_weight, query_bias)
    pre, of_weights, queries, contexts, grad_h_0, grad_c_0 = call(
        torch.ops.seqaccel.attention_lstm_backward, query, *grads[:5], key, value, lengths, c_0, query_weight,
        score_weight, *weights, attention, gates, cells,
    )  # fmt: skip
    found: list[Tensor | None] = [None] * 12
    found[0], found[5], found[6] = pre, grad_h_0, grad_c_0
    if score_weight is not None and (needs[1] or needs[9]):
        _, found[1], found[9] = call(
            torch.ops.seqaccel.additive_attention_backward, of_weights, query, key, score_weight, attention
        )
    elif needs[1]:
        logits = attention * (of_weights - (attention * of_weights).sum(-1, keepdim=True))
        found[1] = logits.transpose(1, 2) @ query
    if needs[2]:
        found[2] = attention.transpose(1, 2) @ contexts
    of_gates, of_query = _rows(pre).t(), _rows(queries).t()
    if needs[7]:
        found[7] = mm(of_query, _rows(h), "cpp")
    if needs[8]:
        found[8] = of_query.sum(1)
    if needs[10]:
        found[10] = mm(of_gates, _rows(context), "cpp")
    if needs[11]:
        found[11] = mm(of_gates, _rows(h), "cpp")
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


# ---- the operators' facts ----


def _forward_fake(
    pre, key, value, mask, lengths, h_0, c_0, query_weight, query_bias, score_weight, context_weight, weight_hh
):
    (B, T, G), S = pre.shape, key.shape[1]
    H, M = h_0.shape[1], value.shape[2]
    shapes = (B, T, H), (B, H), (B, H), (B, T, M), (B, T, S), (B, T, G), (B, T, H)
    return tuple(pre.new_empty(shape) for shape in shapes)


def _backward_fake(
    query, grad_output, grad_h_n, grad_c_n, grad_context, grad_attention, key, value, lengths, c_0, query_weight,
    score_weight, context_weight, weight_hh, attention, gates, cells,
):  # fmt: skip
    contexts = query.new_empty(*query.shape[:2], value.shape[2])
    like = (gates, attention, query, contexts, c_0, c_0)
    return tuple(t.new_empty(t.shape) for t in like)


def _step_flops(H: int, A: int, S: int, M: int, query_weight: Any, score_weight: Any) -> int:
    products = 8 * H * (H + M) + (0 if query_weight is None else 2 * A * H)
    return products + (2 if score_weight is None else 4) * S * A + 2 * S * M


def _forward_flops(
    pre, key, value, mask, lengths, h_0, c_0, query_weight, query_bias, score_weight, context_weight, weight_hh
) -> int:
    return pre[0] * pre[1] * _step_flops(h_0[1], key[2], key[1], value[2], query_weight, score_weight)


def _backward_flops(
    query, grad_output, grad_h_n, grad_c_n, grad_context, grad_attention, key, value, lengths, c_0, query_weight,
    score_weight, *_
) -> int:  # fmt: skip
    return query[0] * query[1] * _step_flops(c_0[1], key[2], key[1], value[2], query_weight, score_weight)


register(
    Operator(
        "attention_lstm_forward",
        _forward_fake,
        _forward_flops,
        definition=reference.attention_lstm,
        recorded=_AttentionLSTM.apply,
        batch=dict.fromkeys(("pre", "key", "value", "mask", "lengths", "h_0", "c_0", *range(7)), 0),
    )
)
register(
    Operator(
        "attention_lstm_backward",
        _backward_fake,
        _backward_flops,
        batch=dict.fromkeys(
            (
                *("query", "grad_output", "grad_h_n", "grad_c_n", "grad_context", "grad_attention", "key", "value"),
                *("lengths", "c_0", "attention", "gates", "cells", *range(6)),
            ),
            0,
        ),
    )
)


# ---- checks ----


@_common.unrecorded
def _check(where: str, lengths: Tensor | None, mask: Tensor | None, **tensors: Tensor | None) -> None:
    """Each of ``tensors`` has a shape that the first ones, and the first that has a size, give."""
    for name, tensor in tensors.items():
        _arguments.tensor(where, name, tensor, optional=name not in ("input", "key", "value", "weight_ih", "weight_hh"))
    input, key, value, weight_hh = (tensors[name] for name in ("input", "key", "value", "weight_hh"))
    assert input is not None and key is not None and value is not None and weight_hh is not None
    for name, tensor in {"input": input, "key": key, "value": value}.items():
        if tensor.dim() != 3:
            raise ValueError(f"{where}: expected {name} to have shape (B, T, size), but got {tuple(tensor.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"{where}: expected input to be floating point, but got {input.dtype}")
    if weight_hh.dim() != 2 or weight_hh.shape[1] == 0 or weight_hh.shape[0] != 4 * weight_hh.shape[1]:
        raise ValueError(f"{where}: expected weight_hh to have shape (4 * H, H), but got {tuple(weight_hh.shape)}")
    (B, _, inputs), (_, S, A), M, H = input.shape, key.shape, value.shape[2], weight_hh.shape[1]
    if tensors["query_weight"] is None and A != H:
        raise ValueError(f"{where}: expected key to have the {H} features of h without query_weight, but got {A}")
    if A == 0:
        raise ValueError(f"{where}: expected key to have at least one feature, but got {tuple(key.shape)}")
    if tensors["query_weight"] is None and tensors["query_bias"] is not None:
        raise ValueError(f"{where}: query_bias needs query_weight")
    shapes = {
        "key": (B, S, A),
        "value": (B, S, M),
        "h_0": (B, H),
        "c_0": (B, H),
        "weight_ih": (4 * H, inputs + M),
        "bias_ih": (4 * H,),
        "bias_hh": (4 * H,),
        "query_weight": (A, H),
        "query_bias": (A,),
        "score_weight": (A,),
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{where}: expected {name} to have shape {shapes[name]}, but got {tuple(tensor.shape)}")
        if tensor.dtype != input.dtype and not _common.autocast_on(input.device.type):
            raise TypeError(f"{where}: expected {name} to have input's dtype, {input.dtype}, but got {tensor.dtype}")
    if mask is not None:
        _arguments.mask(where, "mask", mask, (B, S))
    _arguments.tensor(where, "lengths", lengths, optional=True)
    if lengths is not None and (lengths.dtype != torch.int64 or tuple(lengths.shape) != (B,)):
        raise ValueError(
            f"{where}: expected lengths to be torch.int64 of shape ({B},), "
            f"but got {lengths.dtype} of {tuple(lengths.shape)}"
        )
    for name, tensor in (tensors | {"mask": mask, "lengths": lengths}).items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{where}: expected {name} to be on input's device, {input.device}, but it is on {tensor.device}"
            )


def attention_lstm(
    input: Tensor,
    state: tuple[Tensor, Tensor] | None,
    key: Tensor,
    value: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    score_weight: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    r"""An LSTM that attends at each step, with its state before the step, and takes what it finds as input.

    .. math::
        q_t &= W_q h_{t-1} + b_q \\
        e_{tj} &= w^\top \tanh(q_t + k_j) \qquad \text{or} \quad q_t^\top k_j \\
        c_t &= \sum_j \mathrm{softmax}_j(e_{tj})\, v_j \\
        h_t &= \mathrm{LSTM}([x_t, c_t], h_{t-1})

    Keys come projected. The values of tanh, A per pair of step and key, are never in memory together; backward
    calculates them again.

    Args:
        input: x, (B, T, I).
        state: :math:`h_0` and the LSTM's cell :math:`c_0`, (B, H). Default: zero
        key: k, (B, S, A).
        value: v, (B, S, M).
        weight_ih: (4 * H, I + M), as torch.nn.LSTMCell(I + M, H) has it: the columns of x, then those of the context.
        weight_hh: (4 * H, H).
        bias_ih, bias_hh: (4 * H,). Default: none
        query_weight: :math:`W_q`, (A, H). Default: None, the identity (A = H)
        query_bias: :math:`b_q`, (A,). Default: none
        score_weight: w of additive attention, (A,). Default: None, dot products
        scale: of the normalised form, as :func:`additive_attention` has it; of dot products a factor. Default: None
        mask: bool, (B, S), true where a step attends to a key. Without keys the context is 0. Default: None, everywhere
        lengths: (B,) int64, between 1 and T, in any order: past a sequence's length the results are 0 and the state
            stays. Default: every sequence has T steps

    Returns:
        h of each step (B, T, H), the state after the last step, the contexts (B, T, M) and the weights (B, T, S). All
        are differentiable.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size does not fit.
        RuntimeError: the backend asked for is not available.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", 2015, with the
    LSTM of GNMT (Wu et al., 2016).

    Example:
        >>> import torch, seqaccel
        >>> x, key, value = torch.randn(2, 5, 3), torch.randn(2, 7, 6), torch.randn(2, 7, 4)
        >>> weights = torch.randn(32, 3 + 4), torch.randn(32, 8)
        >>> output, (h_n, c_n), context, attention = seqaccel.functional.attention_lstm(
        ...     x, None, key, value, *weights, query_weight=torch.randn(6, 8), score_weight=torch.randn(6)
        ... )
        >>> output.shape, context.shape, attention.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 4]), torch.Size([2, 5, 7]))
    """
    where = "attention_lstm"
    if state is not None:
        _arguments.states(where, "state", state, ("h_0", "c_0"))
    h_0, c_0 = (None, None) if state is None else state
    _check(
        where, lengths, mask, input=input, key=key, value=value, h_0=h_0, c_0=c_0, weight_ih=weight_ih,
        weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh, query_weight=query_weight, query_bias=query_bias,
        score_weight=score_weight,
    )  # fmt: skip
    if scale is not None:
        if isinstance(scale, Tensor):
            if scale.numel() != 1 or scale.dim() > 1:
                raise ValueError(f"{where}: expected scale to have one element, but got {tuple(scale.shape)}")
        else:
            _arguments.number(where, "scale", scale)
        if score_weight is None:
            key = (key * scale).to(key.dtype)
        else:
            factor = scale / torch.linalg.vector_norm(score_weight)
            score_weight = (score_weight * factor).to(score_weight.dtype)
    cast: tuple[Any, ...] = _common.autocast(input, key, value, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh)
    input, key, value, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh = cast
    scores = _common.autocast(key, query_weight, query_bias, score_weight)[1:]
    if h_0 is None:
        h_0 = c_0 = input.new_zeros(input.shape[0], weight_hh.shape[1])
    input_weight, context_weight = weight_ih.split([input.shape[2], value.shape[2]], 1)
    bias = bias_ih if bias_hh is None else bias_hh if bias_ih is None else bias_ih + bias_hh
    pre = torch.nn.functional.linear(input, input_weight, bias)
    output, h_n, c_n, context, attention = _run(
        (pre, key, value, mask, lengths, h_0, c_0, *scores, context_weight, weight_hh)
    )
    return output, (h_n, c_n), context, attention


def _scanned(pre: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None, *rest: Any) -> Any:
    """``reference.attention_lstm`` for any number of steps."""
    pre, key, value, *operands = _onnx.detached(pre, key, value, *rest)
    h_0, c_0, *weights = operands
    inputs = [pre.transpose(0, 1)]
    if lengths is not None:
        inputs.append((torch.arange(pre.shape[1], device=pre.device).unsqueeze(1) < lengths).unsqueeze(2))

    def step(state: list[Tensor], values: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        running = values[1] if len(values) > 1 else None
        h, c, *of_step = reference.attention_lstm_step(
            values[0], state[0], state[1], running, key, value, mask, *weights
        )
        return [h, c], [t.clone() for t in of_step]

    (h_n, c_n), found = _onnx.loop(step, [h_0, c_0], inputs)
    output, context, attention = (t.transpose(0, 1) for t in found)
    return output, h_n, c_n, context, attention


def _run(operands: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The differentiable results, in the operands' dtype."""
    pre = operands[0]
    if _onnx.exporting():
        return _scanned(*operands)
    if _common.transforms_active():
        return reference.attention_lstm(*operands)
    if backends.choose("attention_lstm", pre, BACKENDS) == "reference":
        return reference.attention_lstm(*operands)
    dtype, compute = pre.dtype, _common.compute_dtype(pre.dtype)
    if dtype != compute:
        operands = tuple(t.to(compute) if t is not None and t.is_floating_point() else t for t in operands)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        results = torch.ops.seqaccel.attention_lstm_forward(*operands)
    elif _common.needs_grad(*operands):
        results = _AttentionLSTM.apply(*operands)
    else:
        results = call(torch.ops.seqaccel.attention_lstm_forward, *operands)
    return tuple(t.to(dtype) for t in results[:5])
