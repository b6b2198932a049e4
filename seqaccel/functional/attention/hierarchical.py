"""Hierarchical attention: the public function, its checks, autograd and choice of backend."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._offsets import check_offsets
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.reference import attention as reference
from seqaccel.reference.dropout import skip_rows

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


# After these come dropout and its seed, where weights are dropped.
_COUNT = len(_Options._fields)


def node_count(length: int, block_size: int, fanout: int, levels: int) -> int:
    """Nodes of all summary levels; free of branches on ``length``, which may be symbolic."""
    torch._check(min(block_size, fanout) >= 2, lambda: "seqaccel: expected block_size and fanout to be at least 2")
    span, level, nodes = block_size, 1, 0
    while span < 1 << 40 and (levels < 0 or level <= levels):
        nodes = nodes + length // span
        span, level = span * fanout, level + 1
    return nodes


def empty_heads(t: Tensor, width: int) -> Tensor:
    """An uninitialised tensor (B, heads, T, width), whose time steps lie outside its heads where ``t``'s do."""
    B, H, T, _ = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(B, T, H, width).transpose(1, 2)
    return t.new_empty(B, H, T, width)


def _forward_fake(query, key, value, pool_query, cu_seqlens, lengths, block_size, fanout, levels, *_):
    B, G, T, Dv = value.shape
    # At least two, as the operator has it: sizes that may be 0 or 1 would tie an exported graph to its example's T.
    empty = isinstance(T, int) and T == 0
    nodes = 0 if empty else torch.sym_max(node_count(T, block_size, fanout, levels), 2)
    pooled = [query.new_empty(B, G, nodes, width) for width in (key.shape[3], Dv)]
    lse = query.new_empty(query.shape[:3], dtype=_common.compute_dtype(query.dtype))
    return empty_heads(query, Dv), lse, *pooled


def _backward_fake(grad_out, query, key, value, pool_query, *_):
    pool = query.new_empty(0, key.shape[1], key.shape[3]) if pool_query is None else torch.empty_like(pool_query)
    return *(empty_heads(t, t.shape[3]) for t in (query, key, value)), pool.contiguous()


def _operators(backend: str):
    """The forward and the backward operator of a backend."""
    if backend == "triton":
        from seqaccel.kernels.attention import hierarchical as kernels

        once(_register, "triton")
        return kernels.hierarchical_attention_forward, kernels.hierarchical_attention_backward
    return torch.ops.seqaccel.hierarchical_attention_forward, torch.ops.seqaccel.hierarchical_attention_backward


def _definition(query, key, value, pool_query, cu_seqlens, lengths, *options) -> Any:
    keywords = _Options(*options[:_COUNT])._asdict()
    keywords["levels"] = None if keywords["levels"] < 0 else keywords["levels"]
    keywords |= dict(zip(("dropout", "seed"), options[_COUNT:], strict=False))
    return reference.hierarchical_attention(
        query, key, value, pool_query, **keywords, cu_seqlens=cu_seqlens, lengths=lengths, return_logsumexp=True
    )


class _HierarchicalAttention(torch.autograd.Function):
    """Saves the inputs, the output, one logsumexp a query, and the pooled keys and values (1 / (block_size - 1)); of
    dropout the seed. ``drops`` is nothing, or dropout and its seed.
    Returns the output, and with a list ``kept`` the logsumexp; the list takes the pooled keys and values."""

    @staticmethod
    def forward(ctx, backend, options, query, key, value, pool_query, cu_seqlens, lengths, kept=None, *drops):
        inputs = (query, key, value, pool_query, cu_seqlens, lengths)
        out, lse, *pooled = call(_operators(backend)[0], *inputs, *options, *drops)
        ctx.save_for_backward(*inputs, out, lse, *pooled, *drops[1:])
        ctx.backend, ctx.options, ctx.dropout = backend, options, drops[:1]
        if kept is None:
            return out
        kept.extend(pooled)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse=None):
        inputs, saved, seed = ctx.saved_tensors[:6], ctx.saved_tensors[6:10], ctx.saved_tensors[10:]
        drops = (*ctx.dropout, *seed)
        needs = ctx.needs_input_grad[2:6]
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, *inputs[4:], *ctx.options, *drops),
                inputs[:4],
                (grad_out, grad_lse),
                needs,
            )
        else:
            grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
            rest = () if grad_lse is None else (_logsumexp_gradient(ctx.backend, grad_lse),)
            rest = (*(rest or (None,)), *drops) if drops else rest
            grads = call(_operators(ctx.backend)[1], grad_out, *inputs, *saved, *ctx.options, *rest)
        grads = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        return None, None, *grads, None, None, None, *(None for _ in drops)


def _logsumexp_gradient(backend: str, grad: Tensor) -> Tensor:
    if backend == "triton":
        raise RuntimeError(
            "hierarchical_attention: the backend triton has no gradient of the logsumexp; use "
            'seqaccel.backend("reference")'
        )
    return grad


# ---- the operators' facts ----


def _recorded(backend, query, key, value, pool_query, cu_seqlens, lengths, *options):
    kept: list[Tensor] = []
    inputs = (query, key, value, pool_query, cu_seqlens, lengths)
    drops = options[_COUNT:]
    return *_HierarchicalAttention.apply(backend, _Options(*options[:_COUNT]), *inputs, kept, *drops), *kept


def _pairs(queries: int, length: int, options: _Options) -> int:
    """How many tokens and nodes all queries see together."""
    spans = reference.level_spans(
        length, options.block_size, options.fanout, None if options.levels < 0 else options.levels
    )
    near, pairs = options.local_blocks, 0
    block = min(options.block_size, max(length, 1))
    for first in range((length - queries) // block * block, length, block):
        # The queries of a block see the same nodes, but for the last tokens.
        before = max(length - queries - first, 0)  # tokens of the block before its queries
        rows = min(block, length - first) - before
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
        pairs += rows * before + rows * (rows + 1) // 2 if options.causal else 0
    return pairs


def _forward_flops(query, key, value, pool_query, cu_seqlens, lengths, *options) -> int:
    """Of whole rows: shapes do not say where sequences end."""
    B, H, Tq, D = query
    return 2 * B * H * (D + value[3]) * _pairs(Tq, key[2], _Options(*options[:_COUNT]))


def _backward_flops(grad_out, query, key, value, pool_query, cu_seqlens, lengths, *rest) -> int:
    B, H, Tq, D = query
    return 2 * B * H * (3 * D + 2 * value[3]) * _pairs(Tq, key[2], _Options(*rest[4 : 4 + _COUNT]))


def _from_row(named: dict[str, Any], first: int) -> dict[str, Any]:
    """The arguments for a part of the batch: its dropout masks are those that it has in the whole."""
    if named.get("seed") is None:
        return named
    _, H, Tq, _ = named["query"].shape
    return named | {"seed": skip_rows(named["seed"], first * H * Tq)}


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    inputs = ("query", "key", "value", "lengths")
    register(
        Operator(
            "hierarchical_attention_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=dict.fromkeys((*inputs, 0, 1, 2, 3), 0),
            packs=("cu_seqlens", 1),
            from_row=_from_row,
            autocast=autocast,
        )
    )
    names = ("grad_out", "grad_lse", *inputs, "out", "lse", "pooled_key", "pooled_value", 0, 1, 2)
    register(
        Operator(
            "hierarchical_attention_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch=dict.fromkeys(names, 0),
            summed=(3,),
            packs=("cu_seqlens", 1),
            from_row=_from_row,
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
    B, H, Tq, D = query.shape
    key_shape, value_shape = key.shape, value.shape
    batch, G, T, width = key_shape
    if batch != B or width != D:
        raise ValueError(
            f"hierarchical_attention: expected key to have shape ({B}, heads, T, {D}), as query, "
            f"but got {tuple(key_shape)}"
        )
    if Tq > T:
        raise ValueError(
            "hierarchical_attention: expected at most as many queries as keys, since queries are the last positions, "
            f"but got {Tq} queries and {T} keys; for attention to another sequence use "
            "torch.nn.functional.scaled_dot_product_attention or block_sparse_attention"
        )
    if value_shape != key_shape and value_shape[:3] != key_shape[:3]:
        raise ValueError(
            "hierarchical_attention: expected value to have key's batch, heads and length, "
            f"{tuple(key_shape[:3])}, but got {tuple(value_shape)}"
        )
    if H < 1 or G < 1 or H % G:
        raise ValueError(
            f"hierarchical_attention: expected query's heads, {H}, to be a multiple of key's heads, {G}, and at least 1"
        )
    if D < 1 or value_shape[3] < 1:
        name = "query" if D < 1 else "value"
        raise ValueError(f"hierarchical_attention: expected {name} to have at least one element a head")
    if pool_query is not None and (pool_query.shape[0] < 1 or pool_query.shape[1:] != (G, D)):
        raise ValueError(
            f"hierarchical_attention: expected pool_query to have shape (P, {G}, {D}) with P >= 1, "
            f"but got {tuple(pool_query.shape)}"
        )


@_common.unrecorded
def _check_sequences(query: Tensor, key: Tensor, cu_seqlens: Tensor | None, lengths: Tensor | None) -> None:
    where, B, T = "hierarchical_attention", key.shape[0], key.shape[2]
    if cu_seqlens is not None and lengths is not None:
        raise ValueError(f"{where}: expected cu_seqlens or lengths, but got both")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("lengths", lengths)):
        if tensor is None:
            continue
        _arguments.tensor(where, name, tensor)
        if tensor.device != query.device:
            raise ValueError(
                f"{where}: expected {name} to be on query's device, {query.device}, but it is on {tensor.device}"
            )
        if query.shape[2] != T:
            raise ValueError(
                f"{where}: expected as many queries as keys with {name}, but got {query.shape[2]} and {T}; "
                "give the last queries of each sequence in a call of its own"
            )
    if cu_seqlens is not None:
        check_offsets(where, cu_seqlens, T, B)
    elif lengths is not None:
        if lengths.dtype != torch.int64 or tuple(lengths.shape) != (B,):
            raise ValueError(
                f"{where}: expected lengths to be torch.int64 of shape ({B},), but got {lengths.dtype} of "
                f"{tuple(lengths.shape)}; for other masks than padding at the end use block_sparse_attention"
            )
        if _common.transforms_active() or _onnx.exporting() or _common.is_distributed(lengths):
            return
        if torch.compiler.is_compiling() or lengths.device.type != "cpu":  # which nothing waits for
            message = f"{where}: expected lengths to be between 0 and the number of keys"
            torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), message)
        elif any(not 0 <= n <= T for n in lengths.tolist()):
            raise ValueError(f"{where}: expected lengths between 0 and {T}, but got {lengths.tolist()!r:.60}")


def _first(results: tuple[Tensor, ...], pair: bool) -> Tensor | tuple[Tensor, Tensor]:
    return (results[0], results[1]) if pair else results[0]


def _triton_takes(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None = None, dropout: float = 0.0
) -> bool:
    if backends.why_missing("triton", "cuda"):
        return False
    from seqaccel.kernels.attention.hierarchical.launchers import refusal

    return refusal(query, key, value, cu_seqlens, dropout) is None


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
    cu_seqlens: Tensor | None = None,
    lengths: Tensor | None = None,
    return_logsumexp: bool = False,
    dropout_p: float = 0,  # of 0.0, dynamic=True makes a symbol, and compiles once more to specialise it
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over a pyramid: near tokens one by one, farther ones through nodes that pool ever more of them.

    A node of level :math:`\ell` stands for :math:`S_\ell` tokens, :math:`S_0 = 1`, :math:`S_1` = ``block_size``,
    :math:`S_{\ell+1}` = ``fanout`` :math:`S_\ell`; its key and value pool its children's with the weights
    :math:`\mathrm{softmax}_c(s\, p_\ell \cdot k_c)`, or their mean. In one softmax, with logits
    :math:`s\, q_t \cdot \bar k + \log S_\ell`, the query at t attends to the tokens of its own block (up to itself
    where causal) and of ``local_blocks - 1`` blocks before, to the level-1 nodes back to the start of its level-2 block
    and of ``local_blocks - 1`` of those before, and so on: every position counts exactly once, through O(log T) nodes.
    Not causal: the same to the right. Tokens of an incomplete node stay at finer levels.

    Args:
        query: (B, H, Tq, D), of the last Tq positions of the keys: query i is at t = T - Tq + i.
        key: (B, G, T, D), T at least Tq; H is a multiple of G (grouped queries: H / G query heads share a key head).
        value: (B, G, T, Dv).
        pool_query: (P, G, D); level l pools with row min(l, P) - 1. Default: None, the mean.
        block_size: tokens a level-1 node stands for, at least 2. Default: 64
        fanout: children of a node of a higher level, at least 2. Default: ``block_size``
        levels: number of summary levels; 0 is dense attention. Default: as many as T needs
        local_blocks: how many blocks of each level are seen node by node, the own one counted. Default: 2
        causal: nothing after t counts. Default: ``True``
        mass_bias: adds :math:`\log S_\ell`: a node counts for as many tokens as it stands for. Default: ``True``
        scale: s of the logits and of the pooling. Default: :math:`1/\sqrt{D}`
        cu_seqlens: offsets (N + 1,), int64, ascending from 0 to T: the one row of the batch holds N sequences one after
            another. Each has a pyramid of its own, and no query sees another sequence. Tq = T.
        lengths: (B,), int64, between 0 and T: what follows the first ``lengths[b]`` tokens of row b is padding. It may
            hold anything; its outputs and gradients are 0, and all else is as if it were not there. Tq = T.
        return_logsumexp: returns the logarithm of each query's sum of e\ :sup:`logit` too, by which attention to other
            keys can be joined to this one. Default: ``False``
        dropout_p: the probability with which a weight of the softmax is set to 0; the others are divided by
            1 - dropout_p, also outside of training. The weight of a node is dropped as one: all tokens that it stands
            for, at once. The masks are not stored but recomputed from a seed that torch's generator gives. The
            logsumexp is that of all weights. Default: 0

    There are no other masks: use :func:`block_sparse_attention`.

    Returns:
        (B, H, Tq, Dv), in query's dtype; with ``return_logsumexp`` a pair of this and (B, H, Tq) in float32, or
        float64 for float64; -infinity for padding. Both are differentiable.

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
    if cu_seqlens is not None or lengths is not None:
        _check_sequences(query, key, cu_seqlens, lengths)
        if _common.is_distributed(query):
            from seqaccel.functional._sharding import replicated

            cu_seqlens, lengths = (None if t is None else replicated(t, query) for t in (cu_seqlens, lengths))
    _arguments.integer("hierarchical_attention", "block_size", block_size, 2)
    _arguments.integer("hierarchical_attention", "fanout", block_size if fanout is None else fanout, 2)
    _arguments.integer("hierarchical_attention", "levels", 0 if levels is None else levels, 0)
    _arguments.integer("hierarchical_attention", "local_blocks", local_blocks, 1)
    _arguments.flags("hierarchical_attention", causal=causal, mass_bias=mass_bias, return_logsumexp=return_logsumexp)
    if scale is not None:
        _arguments.number("hierarchical_attention", "scale", scale)
    _arguments.probability("hierarchical_attention", "dropout_p", dropout_p)
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
        if return_logsumexp:
            raise RuntimeError("hierarchical_attention: return_logsumexp is not exported to ONNX")
        if dropout_p > 0:
            raise RuntimeError("hierarchical_attention: dropout is not exported to ONNX; export in eval mode")
        return _onnx.hierarchical_attention(query, key, value, pool_query, cu_seqlens, lengths, *options)
    inputs = (query, key, value, pool_query, cu_seqlens, lengths)
    drops: tuple[Any, ...] = ()
    if dropout_p > 0:
        drops = (float(dropout_p), torch.randint(-(1 << 62), 1 << 62, (1,), device=query.device))
    if _common.transforms_active():
        return _first(_definition(*inputs, *options, *drops), return_logsumexp)
    on_gpu = query.device.type == "cuda"
    prefer = "reference" if on_gpu and not _triton_takes(query, key, value, cu_seqlens, dropout_p) else None
    backend = backends.choose("hierarchical_attention", query, BACKENDS, prefer=prefer)
    if backend == "reference":
        return _first(_definition(*inputs, *options, *drops), return_logsumexp)
    if drops and backend == "triton":
        from seqaccel.kernels.attention.hierarchical.launchers import refusal

        reason = refusal(query, key, value, cu_seqlens, dropout_p)
        raise RuntimeError(f"hierarchical_attention (triton): {reason}")
    if torch.compiler.is_compiling():  # autograd records the operator itself
        return _first(_operators(backend)[0](*inputs, *options, *drops), return_logsumexp)
    if _common.needs_grad(query, key, value, pool_query):
        kept: list[Tensor] | None = [] if return_logsumexp else None
        return _HierarchicalAttention.apply(backend, options, *inputs, kept, *drops)
    return _first(call(_operators(backend)[0], *inputs, *options, *drops), return_logsumexp)
