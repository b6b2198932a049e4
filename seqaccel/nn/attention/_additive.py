"""Additive and multiplicative attention as modules."""

from typing import Any

import torch
from torch import Tensor, nn

from seqaccel import _arguments, _common
from seqaccel.functional import additive_attention, multiplicative_attention
from seqaccel.nn._leaf import Leaf

__all__ = ["AdditiveAttention", "MultiplicativeAttention"]


@_common.unrecorded
def _check_features(title: str, name: str, tensor: Tensor, size: int) -> None:
    _arguments.tensor(title, name, tensor)
    if tensor.dim() != 3 or tensor.shape[2] != size:
        raise ValueError(f"{title}: expected {name} to have shape (B, T, {size}), but got {tuple(tensor.shape)}")


class AdditiveAttention(Leaf, nn.Module):
    r"""Additive attention with its projections.

    .. math::
        e_{ij} = w^\top \tanh(W_q q_i + b + W_k k_j), \quad o_i = \sum_j \mathrm{softmax}_j(e_{ij})\, v_j

    and with ``normalize`` g w / ‖w‖ in the place of w, where g is a parameter.

    Args:
        query_size: features of a query.
        key_size: features of a key.
        hidden_size: H, to which both are projected.
        normalize: weight normalisation of w; g begins as :math:`1/\sqrt{H}`. Default: ``False``
        bias: whether there is b. Default: ``True``
        device, dtype: of the parameters.

    Shape: query (B, Tq, query_size), key (B, Tk, key_size), value (B, Tk, V); output (B, Tq, V), and with
    ``need_weights`` the weights (B, Tq, Tk).

    A decoder that attends to one source at every step projects its keys once, with ``key_proj``, and calls
    :meth:`attend`.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", 2015.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> attention = snn.AdditiveAttention(16, 12, 32, normalize=True)
        >>> encoded = torch.randn(2, 7, 12)
        >>> out, weights = attention(torch.randn(2, 5, 16), encoded, need_weights=True)
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 12]), torch.Size([2, 5, 7]))
        >>> keys = attention.key_proj(encoded)
        >>> attention.attend(torch.randn(2, 1, 16), keys, encoded).shape  # a step
        torch.Size([2, 1, 12])
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        hidden_size: int,
        normalize: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        for name, size in {"query_size": query_size, "key_size": key_size, "hidden_size": hidden_size}.items():
            _arguments.integer(title, name, size, 1)
        _arguments.flags(title, normalize=normalize, bias=bias)
        self.query_size, self.key_size, self.hidden_size = query_size, key_size, hidden_size
        where = {"device": device, "dtype": dtype}
        self.query_proj = nn.Linear(query_size, hidden_size, bias=bool(bias), **where)
        self.key_proj = nn.Linear(key_size, hidden_size, bias=False, **where)
        self.weight = nn.Parameter(torch.empty(hidden_size, **where))
        self.scale = nn.Parameter(torch.empty(1, **where)) if normalize else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew."""
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        bound = self.hidden_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.scale is not None:
            nn.init.constant_(self.scale, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends from every query to the keys of its sequence.

        Args:
            query: (B, Tq, query_size).
            key: (B, Tk, key_size).
            value: (B, Tk, V). Default: ``key``
            mask: bool, (B, Tk) or (B, Tq, Tk), true where a query attends to a key. A query without keys gives 0.
            need_weights: returns the weights as well. Default: ``False``

        Returns:
            (B, Tq, V), or that and the weights, (B, Tq, Tk).
        """
        title = type(self).__name__
        if not isinstance(query, Tensor):
            return self._instead("query", query, key, value, mask=mask, need_weights=need_weights)
        _check_features(title, "query", query, self.query_size)
        _check_features(title, "key", key, self.key_size)
        value = key if value is None else value
        return self.attend(query, self.key_proj(key), value, mask=mask, need_weights=need_weights)

    def attend(
        self,
        query: Tensor,
        projected_key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``forward`` with the keys as ``key_proj`` returns them, (B, Tk, hidden_size)."""
        _check_features(type(self).__name__, "query", query, self.query_size)
        return additive_attention(
            self.query_proj(query), projected_key, value, self.weight, scale=self.scale, mask=mask,
            need_weights=need_weights,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"normalize={self.scale is not None}"


class MultiplicativeAttention(Leaf, nn.Module):
    r"""Multiplicative attention: Luong's "general", or "dot" without a weight.

    .. math::
        e_{ij} = s\, q_i^\top W k_j, \quad o_i = \sum_j \mathrm{softmax}_j(e_{ij})\, v_j

    Args:
        query_size: features of a query.
        key_size: features of a key. Default: ``query_size``
        general: whether there is W; without it ``key_size`` must be ``query_size``. Default: ``True``
        scale: s. Default: None, 1
        device, dtype: of the parameter.

    Shape: query (B, Tq, query_size), key (B, Tk, key_size), value (B, Tk, V); output (B, Tq, V), and with
    ``need_weights`` the weights (B, Tq, Tk).

    Source: Luong et al., "Effective approaches to attention-based neural machine translation", 2015.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> attention = snn.MultiplicativeAttention(16, 12)
        >>> attention(torch.randn(2, 5, 16), torch.randn(2, 7, 12)).shape
        torch.Size([2, 5, 12])
    """

    def __init__(
        self,
        query_size: int,
        key_size: int | None = None,
        general: bool = True,
        scale: float | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        key_size = query_size if key_size is None else key_size
        for name, size in {"query_size": query_size, "key_size": key_size}.items():
            _arguments.integer(title, name, size, 1)
        _arguments.flags(title, general=general)
        if scale is not None:
            _arguments.number(title, "scale", scale)
        if not general and key_size != query_size:
            raise ValueError(
                f"{title}: expected key_size to be query_size, {query_size}, without a weight (general=False), "
                f"but got {key_size}"
            )
        self.query_size, self.key_size, self.scale = query_size, key_size, scale
        self.weight = nn.Parameter(torch.empty(query_size, key_size, device=device, dtype=dtype)) if general else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew."""
        if self.weight is not None:
            bound = self.query_size**-0.5
            nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends from every query to the keys of its sequence.

        Args:
            query: (B, Tq, query_size).
            key: (B, Tk, key_size).
            value: (B, Tk, V). Default: ``key``
            mask: bool, (B, Tk) or (B, Tq, Tk), true where a query attends to a key. A query without keys gives 0.
            need_weights: returns the weights as well. Default: ``False``

        Returns:
            (B, Tq, V), or that and the weights, (B, Tq, Tk).
        """
        title = type(self).__name__
        if not isinstance(query, Tensor):
            return self._instead("query", query, key, value, mask=mask, need_weights=need_weights)
        _check_features(title, "query", query, self.query_size)
        _check_features(title, "key", key, self.key_size)
        value = key if value is None else value
        return multiplicative_attention(
            query, key, value, self.weight, scale=self.scale, mask=mask, need_weights=need_weights
        )

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}, general={self.weight is not None}, scale={self.scale}"
