"""Additive and multiplicative attention: the public functions, their checks, autograd and choice of backend."""

import functools
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._registration import Operator, call, once, register
from seqaccel.reference import attention as reference

__all__ = ["additive_attention", "multiplicative_attention"]

BACKENDS = ("reference", "cpp", "triton")


def _operators(backend: str):
    """The forward and the backward operator of a backend."""
    if backend == "triton":
        from seqaccel.kernels.attention import additive as kernels

        once(_register, "triton")
        return kernels.additive_attention_forward, kernels.additive_attention_backward
    return torch.ops.seqaccel.additive_attention_forward, torch.ops.seqaccel.additive_attention_backward


def _definition(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    tensors: tuple[Any, ...] = _common.widened(query, key, weight)
    query, key, weight = tensors
    return reference.additive_weights(query, key, weight, mask)


class _AdditiveWeights(torch.autograd.Function):
    """Saves the inputs and the weights: backward calculates tanh again."""

    @staticmethod
    def forward(ctx, backend, query, key, weight, mask):
        attention = call(_operators(backend)[0], query, key, weight, mask)
        ctx.save_for_backward(query, key, weight, mask, attention)
        ctx.backend = backend
        return attention

    @staticmethod
    def backward(ctx, grad):
        query, key, weight, mask, attention = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        if torch.is_grad_enabled():
            grads = _common.differentiable_backward(
                lambda *tensors: _definition(*tensors, mask), (query, key, weight), (grad,), needs
            )
        else:
            grads = call(_operators(ctx.backend)[1], grad, query, key, weight, attention)
        return None, *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


# ---- the operators' facts ----


def _forward_fake(query, key, weight, mask):
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1])


def _backward_fake(grad_attention, query, key, weight, attention):
    return tuple(t.new_empty(t.shape) for t in (query, key, weight))


def _forward_flops(query, key, weight, mask) -> int:
    B, T, H = query
    return 4 * B * T * key[1] * H  # sum, tanh, product, sum over h


def _backward_flops(grad_attention, query, key, weight, attention) -> int:
    B, T, H = query
    return 8 * B * T * key[1] * H  # sum, tanh, its slope, three gradients


def _register(backend: str) -> None:
    suffix, autocast = ("", torch.float32) if backend == "cpp" else ("_triton", None)
    register(
        Operator(
            "additive_attention_forward" + suffix,
            _forward_fake,
            _forward_flops,
            definition=_definition,
            recorded=functools.partial(_AdditiveWeights.apply, backend),
            batch=dict.fromkeys(("query", "key", "mask", 0), 0),
            autocast=autocast,
        )
    )
    register(
        Operator(
            "additive_attention_backward" + suffix,
            _backward_fake,
            _backward_flops,
            batch=dict.fromkeys(("grad_attention", "query", "key", "attention", 0, 1), 0),
            summed=(2,),
            autocast=autocast,
        )
    )


_register("cpp")


# ---- checks ----


@_common.unrecorded
def _check(where: str, query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, mask: Tensor | None) -> None:
    """All but the last sizes of query, key and weight."""
    named = {"query": query, "key": key, "value": value}
    if weight is not None:
        named["weight"] = weight
    for name, tensor in named.items():
        _arguments.tensor(where, name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{where}: expected {name} to be floating point, but got {tensor.dtype}")
        if tensor.dtype != query.dtype and not _common.autocast_on(query.device.type):
            raise TypeError(f"{where}: expected {name} to have query's dtype, {query.dtype}, but got {tensor.dtype}")
        if name != "weight" and tensor.dim() != 3:
            raise ValueError(f"{where}: expected {name} to have shape (B, T, size), but got {tuple(tensor.shape)}")
    _arguments.tensor(where, "mask", mask, optional=True)
    if mask is not None:
        named["mask"] = mask
    for name, tensor in named.items():
        if tensor.device != query.device:
            raise ValueError(
                f"{where}: expected {name} to be on query's device, {query.device}, but it is on {tensor.device}"
            )
    (B, Tq, _), Tk = query.shape, key.shape[1]
    if key.shape[0] != B:
        raise ValueError(f"{where}: expected key to have query's batch size, {B}, but got {tuple(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{where}: expected value to have key's batch size and length, {tuple(key.shape[:2])}, "
            f"but got {tuple(value.shape)}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{where}: expected mask to be bool, but got {mask.dtype}")
        if tuple(mask.shape) not in ((B, Tk), (B, Tq, Tk)):
            raise ValueError(
                f"{where}: expected mask to have shape ({B}, {Tk}) or ({B}, {Tq}, {Tk}), but got {tuple(mask.shape)}"
            )


@_common.unrecorded
def _check_scale(where: str, scale: Any, query: Tensor) -> None:
    if not isinstance(scale, Tensor):
        _arguments.number(where, "scale", scale)
    elif scale.numel() != 1 or scale.dim() > 1 or not scale.is_floating_point() or scale.device != query.device:
        raise ValueError(
            f"{where}: expected scale to be a number or a floating-point tensor of one element on query's device, "
            f"but got {tuple(scale.shape)} of {scale.dtype} on {scale.device}"
        )


def _context(weights: Tensor, value: Tensor) -> Tensor:
    """The weighted mean in the weights' dtype, under autocast too."""
    value = value.to(weights.dtype)
    device_type = value.device.type
    if not _common.autocast_on(device_type):
        return weights @ value
    with torch.autocast(device_type, enabled=False):
        return weights @ value


def _row_mask(mask: Tensor | None) -> Tensor | None:
    """(B, 1, Tk) or (B, Tq, Tk)."""
    return mask.unsqueeze(1) if mask is not None and mask.dim() == 2 else mask


# ---- additive ----


def _additive_weights(query: Tensor, key: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """The weights: of the kernels in float32 or float64."""
    if _onnx.exporting() or _common.transforms_active():
        return reference.additive_weights(query, key, weight, mask)
    prefer = "reference" if query.device.type == "cuda" and query.dtype == torch.float64 else None  # not in Triton
    backend = backends.choose("additive_attention", query, BACKENDS, prefer=prefer)
    if backend == "reference":
        return reference.additive_weights(query, key, weight, mask)
    dtype = _common.compute_dtype(query.dtype)
    if backend == "cpp" and query.dtype != dtype:
        query, key, weight = query.to(dtype), key.to(dtype), weight.to(dtype)
    if torch.compiler.is_compiling():  # autograd records the operator itself
        return _operators(backend)[0](query, key, weight, mask)
    if _common.needs_grad(query, key, weight):
        return _AdditiveWeights.apply(backend, query, key, weight, mask)
    return call(_operators(backend)[0], query, key, weight, mask)


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention whose logits are a small network of query and key, as in the first neural machine translation.

    .. math::
        o_i = \sum_j a_{ij} v_j, \quad a_{ij} = \mathrm{softmax}_j(e_{ij}), \quad
        e_{ij} = \sum_h w_h \tanh(q_{ih} + k_{jh})

    With ``scale`` the vector w is normalised (weight normalisation): :math:`e_{ij} = g \sum_h \frac{w_h}{\|w\|}
    \tanh(q_{ih} + k_{jh})` with g = ``scale``. Queries and keys come projected; a bias belongs to one of the
    projections. The values of tanh, H per pair, are never in memory together, and backward calculates them again.

    Args:
        query: (B, Tq, H).
        key: (B, Tk, H).
        value: (B, Tk, V).
        weight: w, (H,).
        scale: g of the normalised form, a number or a tensor of one element, which may be learned. Default: None, w is
            taken as it is
        mask: bool, (B, Tk) or (B, Tq, Tk), true where a query attends to a key. A query without keys gives 0.
            Default: None, everywhere
        need_weights: returns a as well. Default: ``False``

    Returns:
        o, (B, Tq, V), or o and a, (B, Tq, Tk), in query's dtype. Both are differentiable.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size does not fit.
        RuntimeError: the backend asked for is not available.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", 2015; normalised:
    Salimans and Kingma, "Weight normalization", 2016, as GNMT uses it.

    Example:
        >>> import torch, seqaccel
        >>> query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 8)
        >>> mask = torch.arange(7) < torch.tensor([[7], [4]])  # the second source has 4 positions
        >>> out, weights = seqaccel.functional.additive_attention(
        ...     query, key, value, torch.randn(16), mask=mask, need_weights=True
        ... )
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 8]), torch.Size([2, 5, 7]))
        >>> weights[1, :, 4:].any()
        tensor(False)
    """
    where = "additive_attention"
    _arguments.tensor(where, "weight", weight)
    _check(where, query, key, value, weight, mask)
    H = query.shape[2]
    if H < 1:
        raise ValueError(f"{where}: expected query to have at least one feature, but got H = 0")
    if key.shape[2] != H:
        raise ValueError(f"{where}: expected key to have query's {H} features, but got {tuple(key.shape)}")
    if weight.shape != (H,):
        raise ValueError(f"{where}: expected weight to have shape ({H},), but got {tuple(weight.shape)}")
    _arguments.flags(where, need_weights=need_weights)
    if scale is not None:
        _check_scale(where, scale, query)
        weight = (weight * (scale / torch.linalg.vector_norm(weight))).to(weight.dtype)
    tensors: tuple[Any, ...] = _common.autocast(query, key, value, weight)
    query, key, value, weight = tensors
    weights = _additive_weights(query, key, weight, _row_mask(mask))
    out = _context(weights, value).to(query.dtype)
    return (out, weights.to(query.dtype)) if need_weights else out


# ---- multiplicative ----


def multiplicative_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    need_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention with products for logits, unscaled by default: Luong's "dot" and "general".

    .. math::
        o_i = \sum_j \mathrm{softmax}_j(s\, q_i^\top W k_j)\, v_j

    It is made of torch's matrix products on every backend: for one head and a handful of queries they are what a kernel
    of its own would be.

    Args:
        query: (B, Tq, H).
        key: (B, Tk, K).
        value: (B, Tk, V).
        weight: W, (H, K). Default: None, the identity (K = H)
        scale: s, a number or a tensor of one element. Default: None, 1
        mask: bool, (B, Tk) or (B, Tq, Tk), true where a query attends to a key. A query without keys gives 0.
            Default: None, everywhere
        need_weights: returns the weights as well. Default: ``False``

    Returns:
        (B, Tq, V), or that and the weights, (B, Tq, Tk), in query's dtype.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size does not fit.

    Source: Luong et al., "Effective approaches to attention-based neural machine translation", 2015.

    Example:
        >>> import torch, seqaccel
        >>> query, key, value = torch.randn(2, 5, 16), torch.randn(2, 7, 12), torch.randn(2, 7, 8)
        >>> seqaccel.functional.multiplicative_attention(query, key, value, torch.randn(16, 12)).shape
        torch.Size([2, 5, 8])
    """
    where = "multiplicative_attention"
    _arguments.tensor(where, "weight", weight, optional=True)
    _check(where, query, key, value, weight, mask)
    H, K = query.shape[2], key.shape[2]
    if weight is None and K != H:
        raise ValueError(f"{where}: expected key to have query's {H} features, but got {tuple(key.shape)}")
    if weight is not None and weight.shape != (H, K):
        raise ValueError(f"{where}: expected weight to have shape ({H}, {K}), but got {tuple(weight.shape)}")
    _arguments.flags(where, need_weights=need_weights)
    tensors: tuple[Any, ...] = _common.autocast(query, key, value, weight)
    query, key, value, weight = tensors
    if weight is not None:
        query = query @ weight
    if scale is not None:
        _check_scale(where, scale, query)
        query = (query * scale).to(query.dtype)
    weights = reference.masked_softmax(query @ key.transpose(1, 2), _row_mask(mask))
    out = _context(weights, value).to(query.dtype)
    return (out, weights.to(query.dtype)) if need_weights else out
