"""Block-sparse attention: the public function, its checks, autograd and choice of backend."""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.functional.attention import layouts
from seqaccel.reference import attention as reference

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["block_sparse_attention"]

BACKENDS = ("reference", "cpp", "triton")


class _Options(NamedTuple):
    """The operators' arguments after the tensors."""

    block_size: int
    causal: bool
    scale: float


def _empty_heads(t: Tensor, width: int) -> Tensor:
    """An uninitialised tensor (B, heads, T, width), whose time steps lie outside its heads where ``t``'s do."""
    B, H, T, _ = t.shape
    if t.stride(1) < t.stride(2):
        return t.new_empty(B, T, H, width).transpose(1, 2)
    return t.new_empty(B, H, T, width)


def _forward_fake(query, key, value, layout, *_):
    lse = query.new_empty(query.shape[:3], dtype=_common.compute_dtype(query.dtype))
    return _empty_heads(query, value.shape[3]), lse


def _backward_fake(grad_out, query, key, value, *_):
    return tuple(_empty_heads(t, t.shape[3]) for t in (query, key, value))


def _operators(backend: str):
    """The forward and the backward operator of a backend."""
    if backend == "triton":
        from seqaccel.kernels.attention import block_sparse as kernels

        once(_register, "triton")
        return kernels.block_sparse_attention_forward, kernels.block_sparse_attention_backward
    return torch.ops.seqaccel.block_sparse_attention_forward, torch.ops.seqaccel.block_sparse_attention_backward


class _BlockSparseAttention(torch.autograd.Function):
    """Saves the inputs, the layout, the output and one logsumexp a query. A list ``kept`` takes the last."""

    @staticmethod
    def forward(ctx, backend, options, query, key, value, layout, kept=None):
        out, lse = call(_operators(backend)[0], query, key, value, layout, *options)
        if kept is not None:
            kept.append(lse)
        ctx.save_for_backward(query, key, value, layout, out, lse)
        ctx.backend, ctx.options = backend, options
        return out

    @staticmethod
    def backward(ctx, grad_out):
        query, key, value, layout, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:5]
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, layout, *ctx.options), (query, key, value), (grad_out,), needs
            )
        else:
            grads = call(_operators(ctx.backend)[1], grad_out, query, key, value, layout, out, lse, *ctx.options)
        return None, None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None


# ---- the operators' facts ----


def _definition(query, key, value, layout, *options) -> Tensor:
    return reference.block_sparse_attention(query, key, value, layout, **_Options(*options)._asdict())


def _recorded(backend, query, key, value, layout, *options):
    kept: list[Tensor] = []
    return _BlockSparseAttention.apply(backend, _Options(*options), query, key, value, layout, kept), *kept


def _pairs(query, key, layout, block_size: int, causal: bool) -> int:
    """How many queries see how many keys, over all batches and heads; all of them where the layout has no values."""
    Tq, Tk = query.shape[2], key.shape[2]
    if not _common.has_values(layout):
        return query[..., 0].numel() * Tk
    q, k = (
        (T - torch.arange(0, T, block_size, device=layout.device)).clamp(max=block_size) for T in (Tq, Tk)
    )  # lengths of blocks
    size = q.unsqueeze(1) * k
    if causal:
        n = min(len(q), len(k))
        near = torch.minimum(q[:n], k[:n])
        size = size.tril(-1)
        size.diagonal().copy_(near * (near + 1) // 2 + (q[:n] - near) * k[:n])
    return int((layout[..., : len(q), : len(k)] * size).sum())


def _forward_flops(query, key, value, layout, block_size, causal, scale, out_val=None) -> int:
    return 2 * _pairs(query, key, layout, block_size, causal) * (query.shape[3] + value.shape[3])


def _backward_flops(grad_out, query, key, value, layout, out, lse, block_size, causal, scale, out_val=None) -> int:
    return 2 * _pairs(query, key, layout, block_size, causal) * (3 * query.shape[3] + 2 * value.shape[3])


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    register(
        Operator(
            "block_sparse_attention_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_recorded, backend),
            batch=dict.fromkeys(("query", "key", "value", "layout", 0, 1), 0),
            values_decide=True,
            autocast=autocast,
        )
    )
    register(
        Operator(
            "block_sparse_attention_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch=dict.fromkeys(("grad_out", "query", "key", "value", "layout", "out", "lse", 0, 1, 2), 0),
            values_decide=True,
            autocast=autocast,
        )
    )


_register("cpp")


@_common.unrecorded
def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    where = "block_sparse_attention"
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        _arguments.tensor(where, name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{where}: expected {name} to be floating point, but got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{where}: expected {name} to have query's dtype, {query.dtype}, but got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(
                f"{where}: expected {name} to be on query's device, {query.device}, but it is on {tensor.device}"
            )
        if tensor.dim() != 4:
            raise ValueError(f"{where}: expected {name} to have shape (B, heads, T, D), but got {tuple(tensor.shape)}")
    B, H, _, D = query.shape
    if key.shape[0] != B or key.shape[3] != D:
        raise ValueError(
            f"{where}: expected key to have shape ({B}, heads, T, {D}), as query, but got {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"{where}: expected value to have key's batch, heads and length, {tuple(key.shape[:3])}, "
            f"but got {tuple(value.shape)}"
        )
    G = key.shape[1]
    if H < 1 or G < 1 or H % G:
        raise ValueError(f"{where}: expected query's heads, {H}, to be a multiple of key's heads, {G}, and at least 1")
    if D < 1:
        raise ValueError(f"{where}: expected query to have at least one element a head, but got D = 0")


@_common.unrecorded
def _check_layout(query: Tensor, key: Tensor, layout: Tensor, block_size: int) -> None:
    where = "block_sparse_attention"
    if layout.dtype != torch.bool:
        raise TypeError(f"{where}: expected layout to be bool, but got {layout.dtype}")
    if layout.device != query.device:
        raise ValueError(
            f"{where}: expected layout to be on query's device, {query.device}, but it is on {layout.device}"
        )
    blocks = tuple((t.shape[2] + block_size - 1) // block_size for t in (query, key))
    lead = tuple(layout.shape[:-2])
    allowed = ((), (query.shape[1],), tuple(query.shape[:2]), (1, query.shape[1]), (query.shape[0], 1), (1, 1), (1,))
    fits = layout.dim() >= 2 and lead in allowed
    if fits and not torch.compiler.is_compiling():  # there the operator checks the numbers of blocks
        fits = all(has >= needs for has, needs in zip(layout.shape[-2:], blocks, strict=True))
    if not fits:
        raise ValueError(
            f"{where}: expected layout to have shape {blocks}, ({query.shape[1]}, {blocks[0]}, {blocks[1]}) or "
            f"({query.shape[0]}, {query.shape[1]}, {blocks[0]}, {blocks[1]}), but got {tuple(layout.shape)}"
        )


def _triton_takes(query: Tensor, value: Tensor) -> bool:
    if backends.why_missing("triton", "cuda"):
        return False
    from seqaccel.kernels.attention.block_sparse.launchers import refusal

    return refusal(query, value) is None


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: "Tensor | BlockMask",
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    r"""Attention where each block of queries sees only the blocks of keys that a layout names.

    .. math::
        o_i = \sum_{j \in S_i} \mathrm{softmax}_{j \in S_i}(s\, q_i \cdot k_j)\, v_j, \quad
        S_i = \{j : \mathrm{layout}[\lfloor i / b \rfloor, \lfloor j / b \rfloor]\}

    with b = ``block_size``; the last block may be shorter. Where ``causal``, :math:`S_i` also ends at j = i, counted
    from the start of both sequences as in ``torch.nn.functional.scaled_dot_product_attention``. A query that sees no
    key gives 0, and gradients of 0. Time and memory grow with the blocks that are seen.

    Args:
        query: (B, H, Tq, D).
        key: (B, G, Tk, D); H is a multiple of G (grouped queries: H / G query heads share a key head).
        value: (B, G, Tk, Dv).
        layout: bool, true where a query block sees a key block: (query blocks, key blocks), (H, query blocks, key
            blocks) or (B, H, query blocks, key blocks). What it says of blocks beyond the sequences is not looked at.
            :mod:`seqaccel.functional.attention.layouts` has ready ones.
            Or a FlexAttention ``BlockMask``, which is converted at each call:
            :func:`~seqaccel.functional.attention.layouts.from_block_mask` does it once.
        block_size: positions a block has.
        causal: a query sees no later position. Default: ``False``
        scale: s. Default: :math:`1/\sqrt{D}`

    Returns:
        (B, H, Tq, Dv), in query's dtype.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size does not fit, or a ``BlockMask`` masks single positions other than by causality.
        RuntimeError: the backend asked for is not available.

    Source: Child et al., "Generating long sequences with sparse transformers", 2019; Zaheer et al., "Big Bird", 2020.

    Example:
        >>> import torch, seqaccel
        >>> from seqaccel.functional.attention import layouts
        >>> q, k, v = torch.randn(3, 1, 4, 300, 16)
        >>> layout = layouts.sliding_window(300, 2, block_size=32, causal=True)
        >>> out = seqaccel.functional.block_sparse_attention(q, k, v, layout, block_size=32, causal=True)
        >>> out.shape
        torch.Size([1, 4, 300, 16])
        >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(out[:, :, :64], dense[:, :, :64], atol=1e-6)  # the first two blocks see all before them
        True
    """
    _check_tensors(query, key, value)
    _arguments.integer("block_sparse_attention", "block_size", block_size, 1)
    _arguments.flags("block_sparse_attention", causal=causal)
    if scale is not None:
        _arguments.number("block_sparse_attention", "scale", scale)
    mask, only_past = layouts.resolved(layout, block_size)
    _check_layout(query, key, mask, block_size)
    if _common.is_distributed(query):
        from seqaccel.functional._sharding import replicated

        mask = replicated(mask, query)
    mask = mask.expand(*query.shape[:2], *mask.shape[-2:])
    options = _Options(
        block_size, bool(causal) or only_past, query.shape[-1] ** -0.5 if scale is None else float(scale)
    )
    tensors: tuple[Any, ...] = _common.autocast(query, key, value)
    query, key, value = tensors
    if _common.transforms_active():
        return _definition(query, key, value, mask, *options)
    prefer = "reference" if query.device.type == "cuda" and not _triton_takes(query, value) else None
    backend = backends.choose("block_sparse_attention", query, BACKENDS, prefer=prefer)
    if backend == "reference":
        return _definition(query, key, value, mask, *options)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        return _operators(backend)[0](query, key, value, mask, *options)[0]
    if _common.needs_grad(query, key, value):
        return _BlockSparseAttention.apply(backend, options, query, key, value, mask)
    return call(_operators(backend)[0], query, key, value, mask, *options)[0]
