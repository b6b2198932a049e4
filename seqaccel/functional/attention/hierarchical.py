"""Hierarchical attention: the public function, its checks, autograd and choice of backend."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.reference import attention as reference

__all__ = ["hierarchical_attention"]

BACKENDS = ("reference", "cpp", "triton")


class _Options(NamedTuple):
    """The operators' arguments after the tensors."""

    block_size: int
    fanout: int
    levels: int  # -1: as many as the sequence needs
    local_blocks: int
    causal: bool
    mass_bias: bool
    scale: float


def node_count(length: int, block_size: int, fanout: int, levels: int) -> int:
    """Nodes of all summary levels; free of branches on ``length``, which may be symbolic."""
    span, level, nodes = block_size, 1, 0
    while span < 1 << 40 and (levels < 0 or level <= levels):
        nodes = nodes + length // span
        span, level = span * fanout, level + 1
    return nodes


def _empty_heads(t: Tensor) -> Tensor:
    """An uninitialised tensor of ``t``'s shape, whose time steps lie outside its heads where ``t``'s do."""
    B, H, T, D = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(B, T, H, D).transpose(1, 2)
    return t.new_empty(B, H, T, D)


def _forward_fake(query, key, value, pool_query, block_size, fanout, levels, *_):
    B, H, T, D = query.shape
    # At least two, as the operator has it: sizes that may be 0 or 1 would tie an exported graph to its example's T.
    empty = isinstance(T, int) and T == 0
    nodes = 0 if empty else torch.sym_max(node_count(T, block_size, fanout, levels), 2)
    pooled = [query.new_empty(B, key.shape[1], nodes, D) for _ in range(2)]
    return _empty_heads(query), query.new_empty(B, H, T), *pooled


def _backward_fake(grad_out, query, key, value, pool_query, *_):
    pool = query.new_empty(0, key.shape[1], key.shape[3]) if pool_query is None else torch.empty_like(pool_query)
    return _empty_heads(query), _empty_heads(key), _empty_heads(value), pool.contiguous()


def _operators(backend: str):
    """The forward and the backward operator of a backend."""
    if backend == "triton":
        from seqaccel.kernels.attention import hierarchical as kernels

        once(_register, "triton")
        return kernels.hierarchical_attention_forward, kernels.hierarchical_attention_backward
    return torch.ops.seqaccel.hierarchical_attention_forward, torch.ops.seqaccel.hierarchical_attention_backward


def _reference(query: Tensor, key: Tensor, value: Tensor, pool_query: Tensor | None, options: _Options) -> Tensor:
    keywords = options._asdict()
    keywords["levels"] = None if options.levels < 0 else options.levels
    return reference.hierarchical_attention(query, key, value, pool_query, **keywords)


class _HierarchicalAttention(torch.autograd.Function):
    """Saves the inputs, the output, one logsumexp a query, and the pooled keys and values (1 / (block_size - 1)).
    A list ``kept`` takes what is not an argument or the output."""

    @staticmethod
    def forward(ctx, backend, options, query, key, value, pool_query, kept=None):
        out, *rest = call(_operators(backend)[0], query, key, value, pool_query, *options)
        if kept is not None:
            kept.extend(rest)
        ctx.save_for_backward(query, key, value, pool_query, out, *rest)
        ctx.backend, ctx.options = backend, options
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, pool_query, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:6]
        if torch.is_grad_enabled():
            inputs = (query, key, value, pool_query)
            grads = _common.differentiable_backward(
                lambda *tensors: _reference(*tensors, ctx.options), inputs, (grad_out,), needs
            )
            return None, None, *grads, None
        grads = call(_operators(ctx.backend)[1], grad_out, query, key, value, pool_query, *saved, *ctx.options)
        return None, None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


# ---- the operators' facts ----


def _definition(query, key, value, pool_query, *options) -> Tensor:
    return _reference(query, key, value, pool_query, _Options(*options))


def _recorded(backend, query, key, value, pool_query, *options):
    kept: list[Tensor] = []
    return _HierarchicalAttention.apply(backend, _Options(*options), query, key, value, pool_query, kept), *kept


def _pairs(length: int, options: _Options) -> int:
    """How many tokens and nodes all queries see together."""
    spans = reference.level_spans(
        length, options.block_size, options.fanout, None if options.levels < 0 else options.levels
    )
    near, pairs = options.local_blocks, 0
    block = min(options.block_size, max(length, 1))
    for first in range(0, length, block):  # the queries of a block see the same nodes, but for the last tokens
        rows = min(block, length - first)
        for level, span in enumerate(spans):
            start, end = 0, (first if options.causal else length) // span
            if level + 1 < len(spans):
                parent = first // spans[level + 1]
                children = spans[level + 1] // span
                start = max(parent - (near - 1), 0) * children
                if not options.causal:
                    end = min(end, (parent + near) * children)
            own = 0 if level == 0 else max(min(end, first // span + near) - max(start, first // span - near + 1), 0)
            pairs += rows * max(end - start - own, 0)
        pairs += rows * (rows + 1) // 2 if options.causal else 0
    return pairs


def _forward_flops(query, key, value, pool_query, *options) -> int:
    B, H, T, D = query
    return 4 * B * H * D * _pairs(T, _Options(*options))


def _backward_flops(grad_out, query, key, value, pool_query, out, lse, pooled_key, pooled_value, *options) -> int:
    return 5 * _forward_flops(query, key, value, pool_query, *options) // 2


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    by_batch: dict[str | int, int] = {"query": 0, "key": 0, "value": 0, 0: 0, 1: 0, 2: 0, 3: 0}
    register(
        Operator(
            "hierarchical_attention_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=by_batch,
            autocast=autocast,
        )
    )
    names = ("grad_out", "query", "key", "value", "out", "lse", "pooled_key", "pooled_value", 0, 1, 2)
    register(
        Operator(
            "hierarchical_attention_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch=dict.fromkeys(names, 0),
            summed=(3,),
            autocast=autocast,
        )
    )


_register("cpp")


@_common.unrecorded
def _check_tensors(query: Tensor, key: Tensor, value: Tensor, pool_query: Tensor | None) -> None:
    named = {"query": query, "key": key, "value": value, "pool_query": pool_query}
    for name, tensor in named.items():
        if tensor is None and name == "pool_query":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"hierarchical_attention: expected {name} to be a Tensor, but got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"hierarchical_attention: expected {name} to be floating point, but got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"hierarchical_attention: expected {name} to have query's dtype, {query.dtype}, but got {tensor.dtype}"
            )
        if tensor.device != query.device:
            raise ValueError(
                f"hierarchical_attention: expected {name} to be on query's device, {query.device}, "
                f"but it is on {tensor.device}"
            )
        if tensor.dim() != (3 if name == "pool_query" else 4):
            layout = "(P, key heads, D)" if name == "pool_query" else "(B, heads, T, D)"
            raise ValueError(
                f"hierarchical_attention: expected {name} to have shape {layout}, but got {tuple(tensor.shape)}"
            )
    B, H, T, D = query.shape
    if key.shape[0] != B or key.shape[2] != T or key.shape[3] != D:
        raise ValueError(
            f"hierarchical_attention: expected key to have shape ({B}, heads, {T}, {D}), as query, "
            f"but got {tuple(key.shape)}"
        )
    if value.shape != key.shape:
        raise ValueError(
            f"hierarchical_attention: expected value to have key's shape, {tuple(key.shape)}, "
            f"but got {tuple(value.shape)}"
        )
    G = key.shape[1]
    if H < 1 or G < 1 or H % G:
        raise ValueError(
            f"hierarchical_attention: expected query's heads, {H}, to be a multiple of key's heads, {G}, and at least 1"
        )
    if D < 1:
        raise ValueError("hierarchical_attention: expected query to have at least one element a head, but got D = 0")
    if pool_query is not None and (pool_query.shape[0] < 1 or pool_query.shape[1:] != (G, D)):
        raise ValueError(
            f"hierarchical_attention: expected pool_query to have shape (P, {G}, {D}) with P >= 1, "
            f"but got {tuple(pool_query.shape)}"
        )


def _triton_takes(query: Tensor) -> bool:
    if backends.why_missing("triton", "cuda"):
        return False
    from seqaccel.kernels.attention.hierarchical.launchers import refusal

    return refusal(query) is None


def hierarchical_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pool_query: Tensor | None = None,
    *,
    block_size: int = 64,
    fanout: int | None = None,
    levels: int | None = None,
    local_blocks: int = 2,
    causal: bool = True,
    mass_bias: bool = True,
    scale: float | None = None,
) -> Tensor:
    r"""Attention over a pyramid: near tokens one by one, farther ones through nodes that pool ever more of them.

    A node of level :math:`\ell` stands for :math:`S_\ell` tokens, :math:`S_0 = 1`, :math:`S_1` = ``block_size``,
    :math:`S_{\ell+1}` = ``fanout`` :math:`S_\ell`; its key and value pool its children's with the weights
    :math:`\mathrm{softmax}_c(s\, p_\ell \cdot k_c)`, or their mean. In one softmax, with logits
    :math:`s\, q_t \cdot \bar k + \log S_\ell`, the query at t attends to the tokens of its own block (up to itself
    where causal) and of ``local_blocks - 1`` blocks before, to the level-1 nodes back to the start of its level-2 block
    and of ``local_blocks - 1`` of those before, and so on: every position counts exactly once, through O(log T) nodes.
    Not causal: the same to the right. Tokens of an incomplete node stay at finer levels.

    Args:
        query: (B, H, T, D).
        key: (B, G, T, D); H is a multiple of G (grouped queries: H / G query heads share a key head).
        value: (B, G, T, D).
        pool_query: (P, G, D); level l pools with row min(l, P) - 1. Default: None, the mean.
        block_size: tokens a level-1 node stands for, at least 2. Default: 64
        fanout: children of a node of a higher level, at least 2. Default: ``block_size``
        levels: number of summary levels; 0 is dense attention. Default: as many as T needs
        local_blocks: how many blocks of each level are seen node by node, the own one counted. Default: 2
        causal: nothing after t counts. Default: ``True``
        mass_bias: adds :math:`\log S_\ell`: a node counts for as many tokens as it stands for. Default: ``True``
        scale: s of the logits and of the pooling. Default: :math:`1/\sqrt{D}`

    Returns:
        (B, H, T, D), in query's dtype.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size does not fit.
        RuntimeError: the backend asked for is not available.

    Source: Culurciello, "The fall of RNN / LSTM", 2018 (the idea); exact covers and mass are this package's.

    Example:
        >>> import torch, seqaccel
        >>> q, k, v = torch.randn(3, 1, 4, 300, 16)
        >>> out = seqaccel.functional.hierarchical_attention(q, k, v, block_size=16)
        >>> out.shape
        torch.Size([1, 4, 300, 16])
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(out[:, :, :32], dense[:, :, :32], atol=1e-6)  # two blocks are still seen token by token
        True
    """
    _check_tensors(query, key, value, pool_query)
    _arguments.integer("hierarchical_attention", "block_size", block_size, 2)
    _arguments.integer("hierarchical_attention", "fanout", block_size if fanout is None else fanout, 2)
    _arguments.integer("hierarchical_attention", "levels", 0 if levels is None else levels, 0)
    _arguments.integer("hierarchical_attention", "local_blocks", local_blocks, 1)
    _arguments.flags("hierarchical_attention", causal=causal, mass_bias=mass_bias)
    if scale is not None:
        _arguments.number("hierarchical_attention", "scale", scale)
    options = _Options(
        block_size,
        block_size if fanout is None else fanout,
        -1 if levels is None else levels,
        local_blocks,
        bool(causal),
        bool(mass_bias),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
    )
    tensors: tuple[Any, ...] = _common.autocast(query, key, value, pool_query)
    query, key, value, pool_query = tensors
    if _onnx.exporting():
        return _onnx.hierarchical_attention(query, key, value, pool_query, *options)
    if _common.transforms_active():
        return _reference(query, key, value, pool_query, options)
    prefer = "reference" if query.device.type == "cuda" and not _triton_takes(query) else None
    backend = backends.choose("hierarchical_attention", query, BACKENDS, prefer=prefer)
    if backend == "reference":
        return _reference(query, key, value, pool_query, options)
    dtype = query.dtype
    if backend == "cpp" and dtype != _common.compute_dtype(dtype):
        wide = _common.compute_dtype(dtype)
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
        pool_query = None if pool_query is None else pool_query.to(wide)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        out = _operators(backend)[0](query, key, value, pool_query, *options)[0]
    elif _common.needs_grad(query, key, value, pool_query):
        out = _HierarchicalAttention.apply(backend, options, query, key, value, pool_query)
    else:
        out = call(_operators(backend)[0], query, key, value, pool_query, *options)[0]
    return out.to(dtype)
