"""Block-sparse attention in ``torch.nn.MultiheadAttention``'s place."""

from collections.abc import Callable

import torch
from torch import Tensor

from seqaccel import _arguments, functional
from seqaccel.nn.attention._base import MultiheadAttention

__all__ = ["BlockSparseAttention"]


class BlockSparseAttention(MultiheadAttention):
    r"""Multi-head attention where each block of queries sees the blocks of keys that a layout names.

    Stands where ``torch.nn.MultiheadAttention`` stands, ``torch.nn.TransformerEncoderLayer`` and
    ``torch.nn.TransformerDecoderLayer`` included, with its constructor, its ``forward`` and its state_dict:

    .. math::
        \mathrm{out} = W_o\,[\mathrm{head}_1, \ldots] + b_o, \quad
        \mathrm{head}_i = \mathrm{Attention}(W_q^i\, query + b_q^i, W_k^i\, key + b_k^i, W_v^i\, value + b_v^i)

    with :func:`seqaccel.functional.block_sparse_attention`.

    Args:
        embed_dim: width E of the model.
        num_heads: number of heads; E is a multiple of it.
        dropout: 0; dropout of attention weights is not supported.
        bias: biases of the projections. Default: ``True``
        add_bias_kv, add_zero_attn: ``False``; not supported.
        kdim, vdim: width of key and value. Default: E
        batch_first: (B, T, E) rather than (T, B, E). Default: ``False``
        device, dtype: of the parameters.
        layout: bool (query blocks, key blocks) or (num_heads, query blocks, key blocks), for sequences of up to
            so many blocks; or a function of the length that returns one for any length, such as those of
            :mod:`seqaccel.functional.attention.layouts`. Default: every block sees all blocks
        block_size: positions a block has. Default: 64
        causal: a query sees no later position, whatever the layout. Default: ``True``

    Raises:
        ValueError: a size does not fit, or an argument asks for what block-sparse attention cannot do.

    Source: Child et al., "Generating long sequences with sparse transformers", 2019.

    Example:
        >>> import functools, torch, seqaccel
        >>> from seqaccel.functional.attention import layouts
        >>> window = functools.partial(layouts.sliding_window, window=4, block_size=16, causal=True)
        >>> attention = seqaccel.nn.BlockSparseAttention(64, 4, batch_first=True, layout=window, block_size=16)
        >>> x = torch.randn(2, 100, 64)
        >>> out, _ = attention(x, x, x)
        >>> out.shape
        torch.Size([2, 100, 64])
    """

    layout: Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        layout: Tensor | Callable[[int], Tensor] | None = None,
        block_size: int = 64,
        causal: bool = True,
    ) -> None:
        _arguments.integer(type(self).__name__, "block_size", block_size, 1)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, causal,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.block_size = block_size
        self.layout_of_length = None if isinstance(layout, Tensor) else layout
        if not (layout is None or isinstance(layout, Tensor) or callable(layout)):
            raise TypeError(
                f"{type(self).__name__}: expected layout to be a Tensor or a function of the length, "
                f"but got {type(layout).__name__}"
            )
        if isinstance(layout, Tensor):
            if layout.dtype != torch.bool or layout.dim() not in (2, 3):
                raise ValueError(
                    "layout: expected bool of shape (query blocks, key blocks) or (num_heads, query blocks, key "
                    f"blocks), but got {layout.dtype} of {tuple(layout.shape)}"
                )
            if layout.dim() == 3 and layout.shape[0] not in (1, num_heads):
                raise ValueError(
                    f"layout: expected the layout of 1 or num_heads={num_heads} heads, but got {tuple(layout.shape)}"
                )
            layout = layout.to(device)
        self.register_buffer("layout", layout if isinstance(layout, Tensor) else None, persistent=False)

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, {self.num_heads}, block_size={self.block_size}"]
        if self.layout is not None:
            parts.append(f"layout={tuple(self.layout.shape)}")
        elif self.layout_of_length is not None:
            name = getattr(self.layout_of_length, "func", self.layout_of_length)  # of a functools.partial
            parts.append(f"layout={getattr(name, '__name__', type(name).__name__)}")
        parts += ["causal=False"] * (not self.causal) + ["batch_first=True"] * self.batch_first
        return ", ".join(parts)

    def _layout(self, query: Tensor, key: Tensor) -> Tensor:
        """The layout for queries and keys (B, T, E)."""
        if self.layout is not None:
            return self.layout
        lengths = query.shape[1], key.shape[1]
        if self.layout_of_length is None:
            blocks = [(T + self.block_size - 1) // self.block_size for T in lengths]
            return torch.ones((), dtype=torch.bool, device=query.device).expand(blocks)
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"key: expected query's length, {lengths[0]}, since layout is a function of one length, "
                f"but got {lengths[1]}; pass a tensor as layout"
            )
        layout = self.layout_of_length(lengths[0])
        return layout.to(query.device) if hasattr(layout, "to") else layout  # which the operator's check names

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention of ``query`` over ``key`` and ``value``.

        Args:
            query: (Tq, B, E), (B, Tq, E) where ``batch_first``, or (Tq, E).
            key, value: (Tk, B, ·), (B, Tk, ·) or (Tk, ·); widths ``kdim`` and ``vdim``.
            key_padding_mask: (B, Tk), true (or -inf) at padding, which must follow the sequence. Causal modules only:
                there padding changes no output before it, and outputs at the padding are of no meaning.
            need_weights: must be ``False``: there is no (Tq, Tk) matrix of weights.
            attn_mask: ``None`` or, in a causal module, the causal mask; the layout says what else is masked.
            average_attn_weights: no meaning here.
            is_causal: says that ``attn_mask`` is the causal mask, which is then not looked at.

        A mask's values are checked with one synchronisation; in a compiled or exported graph by an assertion.

        Returns:
            The output, laid out as ``query``, and ``None``.
        """
        if not isinstance(query, Tensor):
            masks = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            return self._instead("query", query, key, value, **masks, is_causal=is_causal)
        batched = query.dim() == 3
        query, key, value = self._batches(query, key, value, need_weights)
        self._check_widths(query, key, value)
        self._check_masks(query, key, key_padding_mask, attn_mask, is_causal)
        layout = self._layout(query, key)
        q, k, v = self._project(query, key, value)
        out = functional.block_sparse_attention(q, k, v, layout, block_size=self.block_size, causal=self.causal)
        return self._joined(out, batched), None
