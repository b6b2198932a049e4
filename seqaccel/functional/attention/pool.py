"""The pyramid of hierarchical attention: the public function, its checks, autograd and choice of backend."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, register
from seqaccel.functional.attention.hierarchical import empty_heads, node_count
from seqaccel.reference import attention as reference

__all__ = ["attention_pool"]

BACKENDS = ("reference", "cpp")


def _rows(length: int, options: tuple[Any, ...]) -> int:
    """Rows of the operator's results: those of all levels, and at least two, as hierarchical attention has it."""
    block_size, fanout, levels, _ = options
    empty = isinstance(length, int) and length == 0
    return 0 if empty else torch.sym_max(node_count(length, block_size, fanout, levels), 2)


def _forward_fake(key, value, pool_query, *options):
    B, G, T, _ = key.shape
    rows = _rows(T, options)
    return tuple(t.new_empty(B, G, rows, t.shape[3]) for t in (key, value))


def _backward_fake(grad_pooled_key, grad_pooled_value, key, value, pool_query, *_):
    pool = key.new_empty(0, key.shape[1], key.shape[3]) if pool_query is None else torch.empty_like(pool_query)
    return *(empty_heads(t, t.shape[3]) for t in (key, value)), pool.contiguous()


def _levels(key: Tensor, value: Tensor, pool_query: Tensor | None, *options: Any) -> list[tuple[Tensor, Tensor]]:
    block_size, fanout, levels, scale = options
    return reference.attention_pool(
        key,
        value,
        pool_query,
        block_size=block_size,
        fanout=fanout,
        levels=None if levels < 0 else levels,
        scale=scale,
    )


def _definition(key: Tensor, value: Tensor, pool_query: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    pairs = _levels(key, value, pool_query, *options)
    rows = _rows(key.shape[2], options) - sum(k.shape[2] for k, _ in pairs)
    ends = (t.new_zeros(*t.shape[:2], rows, t.shape[3]) for t in (key, value))
    keys, values = (torch.cat(parts, 2) for parts in zip(*pairs, tuple(ends), strict=True))
    return keys, values


class _AttentionPool(torch.autograd.Function):
    """Saves the inputs and the pooled keys and values."""

    @staticmethod
    def forward(ctx, options, key, value, pool_query):
        pooled = call(torch.ops.seqaccel.attention_pool_forward, key, value, pool_query, *options)
        ctx.save_for_backward(key, value, pool_query, *pooled)
        ctx.options = options
        return pooled

    @staticmethod
    def backward(ctx, grad_pooled_key, grad_pooled_value):
        key, value, pool_query, *pooled = ctx.saved_tensors
        needs, grads_out = ctx.needs_input_grad[1:], (grad_pooled_key, grad_pooled_value)
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, *ctx.options), (key, value, pool_query), grads_out, needs
            )
        else:
            operator = torch.ops.seqaccel.attention_pool_backward
            grads = call(operator, *grads_out, key, value, pool_query, *pooled, *ctx.options)
        return None, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


# ---- the operators' facts ----


def _forward_flops(key, value, pool_query, *options) -> int:
    """A product of each child with a weight, and with the pool query."""
    B, G, T, D = key
    return 2 * B * G * (T + _rows(T, options)) * ((1 if pool_query is None else 2) * D + value[3])


def _backward_flops(grad_pooled_key, grad_pooled_value, key, value, pool_query, pooled_key, pooled_value, *options):
    return (1 if pool_query is None else 3) * _forward_flops(key, value, pool_query, *options)


register(
    Operator(
        "attention_pool_forward",
        _forward_fake,
        _forward_flops,
        definition=_definition,
        recorded=lambda key, value, pool_query, *options: _AttentionPool.apply(options, key, value, pool_query),
        batch=dict.fromkeys(("key", "value", 0, 1), 0),
    )
)
register(
    Operator(
        "attention_pool_backward",
        _backward_fake,
        _backward_flops,
        batch=dict.fromkeys(
            ("grad_pooled_key", "grad_pooled_value", "key", "value", "pooled_key", "pooled_value", 0, 1), 0
        ),
        summed=(2,),
    )
)


@_common.unrecorded
def _check_tensors(key: Tensor, value: Tensor, pool_query: Tensor | None) -> None:
    where = "attention_pool"
    _arguments.tensor(where, "key", key)
    _arguments.tensor(where, "value", value)
    _arguments.optional_tensors(where, pool_query=pool_query)
    for name, tensor in {"key": key, "value": value, "pool_query": pool_query}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{where}: expected {name} to be floating point, but got {tensor.dtype}")
        if tensor.dtype != key.dtype:
            raise TypeError(f"{where}: expected {name} to have key's dtype, {key.dtype}, but got {tensor.dtype}")
        if tensor.device != key.device:
            raise ValueError(
                f"{where}: expected {name} to be on key's device, {key.device}, but it is on {tensor.device}"
            )
        if tensor.dim() != (3 if name == "pool_query" else 4):
            layout = "(P, heads, D)" if name == "pool_query" else "(B, heads, T, D)"
            raise ValueError(f"{where}: expected {name} to have shape {layout}, but got {tuple(tensor.shape)}")
    _, G, _, D = key.shape
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{where}: expected value to have key's batch, heads and length, {tuple(key.shape[:3])}, "
            f"but got {tuple(value.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[1] < 1 or tensor.shape[3] < 1:
            raise ValueError(f"{where}: expected {name} to have at least one head, and one element a head")
    if pool_query is not None and (pool_query.shape[0] < 1 or pool_query.shape[1:] != (G, D)):
        raise ValueError(
            f"{where}: expected pool_query to have shape (P, {G}, {D}) with P >= 1, but got {tuple(pool_query.shape)}"
        )


def attention_pool(
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None = None,
    *,
    block_size: int = 64,
    fanout: int | None = None,
    levels: int | None = None,
    scale: float | None = None,
) -> list[tuple[Tensor, Tensor]]:
    r"""The pyramid of :func:`hierarchical_attention`: keys and values of nodes that pool ever more tokens.

    Node j of level 1 pools the tokens :math:`[j b, (j + 1) b)`, b = ``block_size``; a node of level
    :math:`\ell + 1` pools ``fanout`` nodes of level :math:`\ell`, with one set of weights for both:

    .. math::
        \bar k = \sum_c w_c k_c, \quad \bar v = \sum_c w_c v_c, \quad w = \mathrm{softmax}_c(s\, p_\ell \cdot k_c)

    or :math:`w_c` = 1 / children without ``pool_query``. Tokens of an incomplete node belong to none.

    Args:
        key: (B, G, T, D).
        value: (B, G, T, Dv).
        pool_query: p, (P, G, D); level l pools with row min(l, P) - 1. Default: None, the mean.
        block_size: children of a node of level 1, at least 2. Default: 64
        fanout: children of a node of a higher level, at least 2. Default: ``block_size``
        levels: at most so many levels. Default: as many as hold a complete node
        scale: s. Default: :math:`1/\sqrt{D}`

    Returns:
        A pair (keys, values) for each level that holds a complete node, level 1 first: of level l,
        (B, G, N, D) and (B, G, N, Dv) with N = T // (b fanout\ :sup:`l - 1`). They are views of two tensors.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size does not fit.
        RuntimeError: the backend asked for is not available.

    Example:
        >>> import torch, seqaccel
        >>> k, v = torch.randn(2, 1, 4, 300, 16)
        >>> [tuple(keys.shape) for keys, _ in seqaccel.functional.attention_pool(k, v, block_size=16, fanout=4)]
        [(1, 4, 18, 16), (1, 4, 4, 16), (1, 4, 1, 16)]
        >>> seqaccel.functional.attention_pool(k, v, block_size=256)[0][1].allclose(v[:, :, :256].mean(2, True))
        True
    """
    where = "attention_pool"
    _check_tensors(key, value, pool_query)
    _arguments.integer(where, "block_size", block_size, 2)
    _arguments.integer(where, "fanout", block_size if fanout is None else fanout, 2)
    _arguments.integer(where, "levels", 0 if levels is None else levels, 0)
    if scale is not None:
        _arguments.number(where, "scale", scale)
    tensors: tuple[Any, ...] = _common.autocast(key, value, pool_query)
    options = (
        block_size,
        block_size if fanout is None else fanout,
        -1 if levels is None else levels,
        key.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    plain = _onnx.exporting() or _common.transforms_active()
    if plain or backends.choose(where, tensors[0], BACKENDS) == "reference":
        return _levels(*tensors, *options)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        pooled = torch.ops.seqaccel.attention_pool_forward(*tensors, *options)
    elif _common.needs_grad(*tensors):
        pooled = _AttentionPool.apply(options, *tensors)
    else:
        pooled = call(torch.ops.seqaccel.attention_pool_forward, *tensors, *options)
    counts = [key.shape[2] // span for span in reference.level_spans(key.shape[2], *options[:2], levels)[1:]]
    parts = [torch.split(t[:, :, : sum(counts)], counts, 2) if counts else () for t in pooled]
    return list(zip(*parts, strict=True))
