"""What the modules in ``torch.nn.MultiheadAttention``'s place share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel import _arguments, _common
from seqaccel.nn._leaf import Leaf


class MultiheadAttention(Leaf, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``'s parameters, projections and checks; a subclass has ``forward``."""

    #: What errors of masks add.
    _OTHER_MASKS = ""
    #: Whether padding is masked in a module that is not causal.
    _PADS_BOTH_WAYS = False
    #: Whether weights of attention can be dropped.
    _DROPS = False
    #: Heads of keys and values.
    num_kv_heads: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        bias: bool,
        add_bias_kv: bool,
        add_zero_attn: bool,
        kdim: int | None,
        vdim: int | None,
        batch_first: bool,
        causal: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        title = type(self).__name__
        _arguments.flags(
            title, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first,
            causal=causal,
        )  # fmt: skip
        _arguments.integer(title, "embed_dim", embed_dim)
        _arguments.integer(title, "num_heads", num_heads)
        for name, width in (("kdim", kdim), ("vdim", vdim)):
            if width is not None:
                _arguments.integer(title, name, width, 1)
        if self._DROPS:
            _arguments.probability(title, "dropout", dropout)
        elif dropout != 0:
            raise ValueError(f"dropout: attention weights cannot be dropped here, expected 0, but got {dropout}")
        if add_bias_kv or add_zero_attn:
            raise ValueError(f"add_bias_kv, add_zero_attn: a key of no position has no place in {title}")
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(
                "embed_dim must be a positive multiple of num_heads, "
                f"but got embed_dim={embed_dim}, num_heads={num_heads}"
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            kdim=kdim,
            vdim=vdim,
            batch_first=batch_first,
            device=device,
            dtype=dtype,
        )
        # What torch.nn.TransformerEncoderLayer's fast path asks for: dense attention on our weights must not run.
        self._qkv_same_embed_dim = False
        self.causal = causal
        self.num_kv_heads = num_heads

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        self._qkv_same_embed_dim = False

    def _batches(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs as (B, T, E), after checks."""
        _arguments.tensors(type(self).__name__, key=key, value=value)
        if need_weights:
            raise ValueError("need_weights: there are no (T, T) weights to return; pass need_weights=False")
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("query, key, value: nested tensors are not supported")
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            raise ValueError(
                "query, key, value: expected all of them 2-D or 3-D, but got "
                f"{query.dim()}-D, {key.dim()}-D, {value.dim()}-D"
            )
        if query.dim() == 2:
            return query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
        return (query, key, value) if self.batch_first else self._swap(query, key, value)

    def _joined(self, out: Tensor, batched: bool) -> Tensor:
        """The module's output, laid out as its input, of (B, heads, T, D)."""
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1)

    def _check_widths(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, tensor, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if tensor.shape[2] != width:
                raise ValueError(f"{name}: expected last dimension {width}, but got {tensor.shape[2]}")

    @staticmethod
    def _swap(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first two axes exchanged; self-attention stays recognisable."""
        q = query.transpose(0, 1)
        k = q if key is query else key.transpose(0, 1)
        return q, k, k if value is key else value.transpose(0, 1)

    @_common.unrecorded
    def _check_masks(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        names: tuple[str, str] = ("key_padding_mask", "attn_mask"),
    ) -> None:
        """``names`` are the caller's for the two masks."""
        B, T = key.shape[:2]
        title = type(self).__name__
        padding_name, mask_name = names
        _arguments.optional_tensors(title, **{padding_name: key_padding_mask, mask_name: attn_mask})
        _arguments.flag(title, "is_causal", is_causal)
        if (is_causal or attn_mask is not None) and not self.causal:
            raise ValueError(
                f"{mask_name}, is_causal: this module is not causal (causal=False) and takes no mask{self._OTHER_MASKS}"
            )
        checks: list[tuple[Tensor, str]] = []
        if attn_mask is not None and not is_causal:
            message = f"{mask_name}: {title} takes the causal mask only{self._OTHER_MASKS}"
            if attn_mask.shape[-2:] != (query.shape[1], T) or not (
                attn_mask.dtype == torch.bool or attn_mask.is_floating_point()
            ):
                raise ValueError(message)
            if attn_mask.dtype == torch.bool:
                causal = torch.ones(attn_mask.shape[-2:], dtype=torch.bool, device=attn_mask.device).triu(1)
            else:
                causal = torch.full(
                    attn_mask.shape[-2:], -math.inf, dtype=attn_mask.dtype, device=attn_mask.device
                ).triu(1)
            checks.append(((attn_mask == causal).all(), message))
        if key_padding_mask is not None:
            if not (self.causal or self._PADS_BOTH_WAYS):
                raise ValueError(f"{padding_name}: supported in causal modules only (causal=True)")
            mask = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask.unsqueeze(0)
            if mask.shape != (B, T):
                raise ValueError(f"{padding_name}: expected shape ({B}, {T}), but got {tuple(key_padding_mask.shape)}")
            padding = mask if mask.dtype == torch.bool else mask == -math.inf
            first = mask.new_ones(T, dtype=torch.int64).cumsum(0) == 1  # replicated where the mask is a DTensor
            right = (first | (padding >= padding.roll(1, 1))).all()
            if mask.dtype != torch.bool:
                right = right & (padding | (mask == 0)).all()
            checks.append(
                (
                    right,
                    f"{padding_name}: expected padding after each sequence only (true, or -inf, at its end)"
                    f"{self._OTHER_MASKS}",
                )
            )
        if torch.compiler.is_compiling():  # in the graph, without a look at the values
            for right, message in checks:
                torch._assert_async(right, message)
        elif checks:  # one synchronisation
            results: Tensor = torch.stack([right for right, _ in checks])
            if _common.is_distributed(results):
                results = results.full_tensor()  # type: ignore[attr-defined]
            for passed, (_, message) in zip(results.tolist(), checks, strict=True):
                if not passed:
                    raise ValueError(message)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """(B, T, ·) to three of (B, heads, T, D)."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        widths = [n * self.head_dim for n in heads]

        def parts(t: Tensor, dim: int) -> tuple[Tensor, ...]:
            return t.chunk(3, dim) if self.num_kv_heads == self.num_heads else t.split(widths, dim)

        if self.in_proj_weight is not None and key is query and value is query:
            projected = parts(F.linear(query, self.in_proj_weight, self.in_proj_bias), -1)
        else:
            if self.in_proj_weight is not None:
                weights = parts(self.in_proj_weight, 0)
            else:
                weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if self.in_proj_bias is None else parts(self.in_proj_bias, 0)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        return tuple(t.unflatten(-1, (n, self.head_dim)).transpose(1, 2) for t, n in zip(projected, heads, strict=True))
