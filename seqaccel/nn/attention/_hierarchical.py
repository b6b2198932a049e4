"""Hierarchical attention in ``torch.nn.MultiheadAttention``'s place: trains in parallel, runs step by step."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel import _arguments, _common, functional
from seqaccel.nn.attention._base import MultiheadAttention
from seqaccel.nn.streaming import State, Streaming, step_at_once

__all__ = ["HierarchicalAttention"]


class HierarchicalAttention(Streaming, MultiheadAttention):
    r"""Multi-head attention over a pyramid of the sequence, in O(T log T).

    Stands where ``torch.nn.MultiheadAttention`` stands in self-attention, in ``torch.nn.TransformerEncoderLayer`` and
    as ``self_attn`` of ``torch.nn.TransformerDecoderLayer`` too, with its constructor, its ``forward`` and its
    state_dict:

    .. math::
        \mathrm{out} = W_o\,[\mathrm{head}_1, \ldots] + b_o, \quad
        \mathrm{head}_i = \mathrm{Attention}(W_q^i\, query + b_q^i, W_k^i\, key + b_k^i, W_v^i\, value + b_v^i)

    with :func:`seqaccel.functional.hierarchical_attention`. A causal module streams (:meth:`init_state`,
    :meth:`extend`, :meth:`step`): a state holds O(log T) keys and values a head.

    ``TransformerEncoderLayer`` has a fast path for evaluation that takes the module's weights and runs dense attention.
    This module reports ``_qkv_same_embed_dim = False``, which turns that path off: training and evaluation agree.

    Args:
        embed_dim: width E of the model.
        num_heads: number of heads; E is a multiple of it.
        dropout: probability, in training, with which a weight of attention is dropped; that of a node is dropped as
            one. Default: 0
        bias: biases of the projections. Default: ``True``
        add_bias_kv, add_zero_attn: ``False``; not supported.
        kdim, vdim: width of key and value. Default: E
        batch_first: (B, T, E) rather than (T, B, E). Default: ``False``
        device, dtype: of the parameters.
        pool_query: rows P of a learned ``pool_query`` (P, num_kv_heads, E / num_heads), zero at first: level l pools
            with row min(l, P) - 1. Default: 0, nodes are means, and the state_dict is ``torch.nn.MultiheadAttention``'s
        block_size, fanout, levels, local_blocks, causal, mass_bias: see
            :func:`seqaccel.functional.hierarchical_attention`.
        num_kv_heads: heads of keys and values; num_heads is a multiple of it. Fewer than num_heads (grouped queries)
            make the projections of key and value, and the state of a stream, as much smaller. Default: num_heads
        rotary_base: queries and keys are turned by their position t before anything else: elements i and D/2 + i of a
            head by the angle t·rotary_base^(-2i/D) (Su et al., "RoFormer", 2021). Default: None, they are not

    Raises:
        ValueError: a size does not fit, or an argument asks for what hierarchical attention cannot do.

    Source: Culurciello, "The fall of RNN / LSTM", 2018.

    Example:
        >>> import torch, seqaccel
        >>> layer = torch.nn.TransformerEncoderLayer(64, 4, batch_first=True)
        >>> layer.self_attn = seqaccel.nn.HierarchicalAttention(64, 4, batch_first=True, block_size=16)
        >>> layer(torch.randn(2, 100, 64)).shape
        torch.Size([2, 100, 64])
        >>> attention, x = layer.self_attn, torch.randn(2, 100, 64)
        >>> out, _ = attention(x, x, x)
        >>> state = attention.init_state(2)
        >>> y, state = attention.extend(x[:, :70], state)
        >>> y_t, state = attention.step(x[:, 70], state)
        >>> torch.allclose(torch.cat([y, y_t[:, None]], 1), out[:, :71], atol=1e-5)
        True
    """

    _OTHER_MASKS = "; for other masks use seqaccel.nn.BlockSparseAttention"
    _PADS_BOTH_WAYS = True
    _DROPS = True
    pool_query: Tensor | None

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
        pool_query: int = 0,
        block_size: int = 64,
        fanout: int | None = None,
        levels: int | None = None,
        local_blocks: int = 2,
        causal: bool = True,
        mass_bias: bool = True,
        rotary_base: float | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        title = type(self).__name__
        _arguments.flags(title, mass_bias=mass_bias)
        least = {
            "pool_query": (pool_query, 0),
            "block_size": (block_size, 2),
            "fanout": (block_size if fanout is None else fanout, 2),
            "levels": (0 if levels is None else levels, 0),
            "local_blocks": (local_blocks, 1),
            "num_kv_heads": (1 if num_kv_heads is None else num_kv_heads, 1),
        }
        for name, (value, smallest) in least.items():
            _arguments.integer(title, name, value, smallest)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, causal, **where
        )
        if num_kv_heads is not None and num_heads % num_kv_heads:
            raise ValueError(
                f"{title}: expected num_heads to be a multiple of num_kv_heads, but got {num_heads=}, {num_kv_heads=}"
            )
        if num_kv_heads is not None and num_kv_heads != num_heads:
            self._set_kv_heads(num_kv_heads, where)
        self.block_size = block_size
        self.fanout = block_size if fanout is None else fanout
        self.levels = levels
        self.local_blocks = local_blocks
        self.mass_bias = mass_bias
        if rotary_base is not None:
            _arguments.number(title, "rotary_base", rotary_base)
            if rotary_base <= 0 or self.head_dim % 2:
                raise ValueError(
                    f"{title}: expected rotary_base to be positive, and heads of an even width, "
                    f"but got {rotary_base=}, {embed_dim=}, {num_heads=}"
                )
        self.rotary_base = rotary_base
        if pool_query:
            shape = (pool_query, self.num_kv_heads, self.head_dim)
            self.pool_query = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
        else:
            self.register_parameter("pool_query", None)

    def _set_kv_heads(self, num_kv_heads: int, where: dict[str, Any]) -> None:
        """Gives the projections of key and value so many heads."""
        self.num_kv_heads, width = num_kv_heads, num_kv_heads * self.head_dim
        rows = {"in_proj_weight": self.embed_dim + 2 * width, "in_proj_bias": self.embed_dim + 2 * width}
        rows |= {"k_proj_weight": width, "v_proj_weight": width}
        for name, n in rows.items():
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, nn.Parameter(torch.empty(n, *old.shape[1:], **where)))
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        super()._reset_parameters()
        pool_query = getattr(self, "pool_query", None)  # torch's constructor calls this before there is one
        if pool_query is not None:
            nn.init.zeros_(pool_query)

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, {self.num_heads}, block_size={self.block_size}, local_blocks={self.local_blocks}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout}")
        if self.fanout != self.block_size:
            parts.append(f"fanout={self.fanout}")
        if self.levels is not None:
            parts.append(f"levels={self.levels}")
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        if self.pool_query is not None:
            parts.append(f"pool_query={self.pool_query.shape[0]}")
        parts += [
            f"{name}={value}" for name, value in (("causal", self.causal), ("mass_bias", self.mass_bias)) if not value
        ]
        if self.rotary_base is not None:
            parts.append(f"rotary_base={self.rotary_base}")
        if self.batch_first:
            parts.append("batch_first=True")
        return ", ".join(parts)

    def _turned(self, x: Tensor, t: Tensor) -> Tensor:
        """Queries or keys (B, heads, T, D) turned by the angles of their positions ``t``, (T,) or (B, 1, T)."""
        assert self.rotary_base is not None
        wide = torch.promote_types(x.dtype, torch.float32)
        pair = t.new_ones(self.head_dim // 2, dtype=wide).cumsum(0) - 1
        angle = t.unsqueeze(-1) * torch.exp(pair * (-2 / self.head_dim * math.log(self.rotary_base)))
        cos, sin = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

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
        *,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Attention of ``query`` over ``key`` and ``value``, three sequences of one length.

        Args:
            query: (T, B, E), (B, T, E) where ``batch_first``, or (T, E).
            key, value: of the same length; widths ``kdim`` and ``vdim``.
            key_padding_mask: (B, T), true (or -inf) at padding, which must follow the sequence. The outputs of a padded
                sequence are those of the sequence alone; at the padding, heads are 0 and outputs the bias of out_proj.
            need_weights: must be ``False``: there is no (T, T) matrix of weights.
            attn_mask: ``None`` or, in a causal module, the causal mask.
            average_attn_weights: no meaning here.
            is_causal: says that ``attn_mask`` is the causal mask, which is then not looked at.
            lengths: (B,) int64, the tokens of each sequence before its padding, in place of ``key_padding_mask``.
            cu_seqlens: (N + 1,) int64 offsets of N sequences in the one row of the batch: see
                :func:`seqaccel.functional.hierarchical_attention`. Rotary positions begin with each sequence.

        For any other mask use :class:`BlockSparseAttention`. A mask's values are checked with one synchronisation; in a
        compiled or exported graph by an assertion.

        Returns:
            The output, laid out as ``query``, and ``None``.
        """
        if not isinstance(query, Tensor):
            masks = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            sequences = {"lengths": lengths, "cu_seqlens": cu_seqlens}
            return self._instead("query", query, key, value, **masks, is_causal=is_causal, **sequences)
        batched = query.dim() == 3
        query, key, value = self._batches(query, key, value, need_weights)
        _arguments.optional_tensors(type(self).__name__, lengths=lengths, cu_seqlens=cu_seqlens)
        self._check_inputs(query, key, value)
        self._check_masks(query, key, key_padding_mask, attn_mask, is_causal)
        if key_padding_mask is not None:
            if lengths is not None:
                raise ValueError("key_padding_mask, lengths: expected one of them, but got both")
            lengths = self._lengths(key_padding_mask)
        q, k, v = self._project(query, key, value)
        if self.rotary_base is not None:
            t = self._positions(q, q.shape[2], cu_seqlens)
            q, k = self._turned(q, t), self._turned(k, t)
        out = functional.hierarchical_attention(
            q,
            k,
            v,
            self.pool_query,
            block_size=self.block_size,
            fanout=self.fanout,
            levels=self.levels,
            local_blocks=self.local_blocks,
            causal=self.causal,
            mass_bias=self.mass_bias,
            cu_seqlens=cu_seqlens,
            lengths=lengths,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self._joined(out, batched), None  # type: ignore[arg-type]

    @staticmethod
    def _positions(like: Tensor, T: int, cu_seqlens: Tensor | None) -> Tensor:
        """(T,): positions, replicated where ``like`` is a DTensor; they begin anew with each sequence."""
        t = like.new_ones(T, dtype=torch.int64).cumsum(0) - 1
        if cu_seqlens is None:
            return t
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int64:
            found = f"{cu_seqlens.dtype} of {tuple(cu_seqlens.shape)}"
            raise ValueError(f"cu_seqlens: expected torch.int64 of shape (N + 1,), but got {found}")
        return t - cu_seqlens[torch.searchsorted(cu_seqlens, t, right=True) - 1]

    @staticmethod
    def _lengths(key_padding_mask: Tensor) -> Tensor:
        """(B,): tokens before the padding of a checked mask."""
        mask = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask.unsqueeze(0)
        return (~mask if mask.dtype == torch.bool else mask == 0).sum(1)

    @_common.unrecorded
    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self._check_widths(query, key, value)
        for name, tensor in (("key", key), ("value", value)):
            if tensor.shape[:2] != query.shape[:2]:
                raise ValueError(
                    f"{name}: expected batch and length of query, {tuple(query.shape[:2])}, "
                    f"but got {tuple(tensor.shape[:2])}; hierarchical attention is over one sequence; attention to "
                    "another one (cross attention) is torch.nn.MultiheadAttention's or BlockSparseAttention's"
                )

    # Streaming. A state is (age (B,), level 0, level 1, ...): level 0 is (keys, values), a higher level (keys, values,
    # and the open node's sums of weighted keys and values (B, heads, D), largest score and sum of weights (B, heads)).
    # Keys and values are rings (B, heads, slots, D): node j lies in slot j mod slots. Levels are added as streams grow;
    # a state made for a stated max_length ends in an empty tuple, has all its levels, and never grows.

    def _span(self, level: int) -> int:
        return self.block_size * self.fanout ** (level - 1) if level else 1

    def _is_top(self, level: int) -> bool:
        return self.levels is not None and level >= self.levels

    def _new_level(self, level: int, batch_size: int, device: Any, dtype: Any) -> tuple[Tensor, ...]:
        slots = 0 if self._is_top(level) else self.local_blocks * (self._span(level + 1) // self._span(level))
        ring = torch.zeros(batch_size, self.num_kv_heads, slots, self.head_dim, device=device, dtype=dtype)
        if level == 0:
            return ring, ring.clone()
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros(batch_size, self.num_kv_heads, self.head_dim, device=device, dtype=wide)
        most = torch.full((batch_size, self.num_kv_heads), -math.inf, device=device, dtype=wide)
        return ring, ring.clone(), total, total.clone(), most, torch.zeros_like(most)

    def _check_streams(self) -> None:
        if not self.causal:
            raise RuntimeError(
                "HierarchicalAttention(causal=False) cannot run on a stream: its outputs depend on later inputs"
            )
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            raise RuntimeError("HierarchicalAttention with kdim or vdim cannot run on a stream: a stream has one input")

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The initial state of ``batch_size`` streams.

        Args:
            batch_size: number of streams.
            max_length: tokens that a stream will have. The state then has its full size, O(log max_length), from the
                start, and no call looks at a stream's age: :meth:`step` and :meth:`extend` compile as one graph,
                export, and on a GPU do not synchronise. A longer stream forgets its oldest tokens. Default: the state
                grows with its streams.
            device, dtype: of the state; the parameters' by default.
        """
        self._check_streams()
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        if max_length is not None:
            _arguments.integer(type(self).__name__, "max_length", max_length, 1)
        device = self.out_proj.weight.device if device is None else device
        dtype = self.out_proj.weight.dtype if dtype is None else dtype
        levels = range(1 if self._is_top(0) else 2)
        age = torch.zeros(batch_size, dtype=torch.int64, device=device)
        state = (age, *(self._new_level(level, batch_size, device, dtype) for level in levels))
        # A chunk of block_size tokens must find different slots for all of them.
        return state if max_length is None else (*self._grown(state, max(max_length, self.block_size)), ())

    def _matching_state(self, state: State, first: Tensor) -> State:
        B, device, dtype = first.shape[0], first.device, state[1][0].dtype
        fresh: list[Any] = [torch.zeros_like(first)]
        for level, part in enumerate(state[1:]):
            new = self._new_level(level, B, device, dtype) if part else ()
            fresh.append(
                tuple(torch.zeros_like(p) if i < 2 else n for i, (p, n) in enumerate(zip(part, new, strict=True)))
            )
        return tuple(fresh)

    def _check_stream(self, name: str, x: Tensor, state: State) -> None:
        self._check_streams()
        _arguments.tensor(type(self).__name__, name, x)
        levels = state[1:] if isinstance(state, (tuple, list)) else ()
        if not levels or not isinstance(state[0], Tensor) or not all(isinstance(level, tuple) for level in levels):
            raise TypeError(f"{type(self).__name__}: expected state to be what init_state or extend returned")

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for a chunk ``x`` (laid out as in ``forward``), and the state after it.

        Compiled or exported, a chunk of C tokens is one product of C queries and more than C keys: split long ones.
        """
        self._check_stream("x", x, state)
        if x.dim() != 3 or x.shape[2] != self.embed_dim or x.shape[0 if self.batch_first else 1] != state[0].shape[0]:
            B, E = state[0].shape[0], self.embed_dim
            layout = f"({B}, T, {E})" if self.batch_first else f"(T, {B}, {E})"
            raise ValueError(f"x: expected shape {layout}, but got {tuple(x.shape)}")
        if not self.batch_first:
            x = x.transpose(0, 1)
        q, k, v = self._project(x, x, x)
        if self.rotary_base is not None:
            age = state[0]
            t = (age.unsqueeze(1) + torch.arange(x.shape[1], device=age.device)).unsqueeze(1)  # [B, 1, T]
            q, k = self._turned(q, t), self._turned(k, t)
        q, k, v = (part.to(state[1][0].dtype) for part in (q, k, v))
        out, state = self._extend(q, k, v, state)
        y = self.out_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
        return (y if self.batch_first else y.transpose(0, 1)), state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        done = step_at_once(self, x_t, state)
        if done is not None:
            return done
        self._check_stream("x_t", x_t, state)
        if x_t.dim() != 2:
            raise ValueError(f"x_t: expected shape (B, {self.embed_dim}), but got {tuple(x_t.shape)}")
        time = 1 if self.batch_first else 0
        y, state = self.extend(x_t.unsqueeze(time), state)
        return y.squeeze(time), state

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """Any number of tokens (B, heads, T, D)."""
        compiling, ages = torch.compiler.is_compiling(), None
        grows = len(state[-1]) > 0
        if grows and compiling:
            raise RuntimeError(
                "HierarchicalAttention: to compile or export a stream, give it a state of fixed size: "
                "init_state(batch_size, max_length=...)"
            )
        if grows or (state[0].is_cpu and not compiling):
            ages = state[0].tolist()
        if grows:
            state = self._grown(state, max(ages, default=0) + q.shape[2])  # type: ignore[arg-type]
        if compiling:
            return self._extend_chunk(q, k, v, state)
        outputs = []
        for begin in range(0, q.shape[2], self.block_size):
            end = begin + self.block_size
            out, state = self._extend_chunk(
                q[:, :, begin:end],
                k[:, :, begin:end],
                v[:, :, begin:end],
                state,
                None if ages is None else [age + begin for age in ages],
            )
            outputs.append(out)
        return (torch.cat(outputs, dim=2) if outputs else q), state

    def _grown(self, state: State, length: int) -> State:
        """The state with room for streams of ``length`` tokens: more levels, or more slots at the top one."""
        age, *levels = state
        dtype = levels[0][0].dtype
        while not self._is_top(len(levels) - 1) and self._span(len(levels) - 1) <= length:
            levels.append(self._new_level(len(levels), age.shape[0], age.device, dtype))
        top = len(levels) - 1
        if self._is_top(top):
            needed, slots = length // self._span(top), levels[top][0].shape[2]
            if needed > slots:
                more = max(needed, 2 * slots) - slots
                levels[top] = (*(F.pad(ring, (0, 0, 0, more)) for ring in levels[top][:2]), *levels[top][2:])
        return (age, *levels)

    def _extend_chunk(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, ages: list[int] | None = None
    ) -> tuple[Tensor, State]:
        """Tokens (B, heads, C, D), with the streams' ``ages``, which save work, at most ``block_size`` of them."""
        age, *levels = state
        C = q.shape[2]
        t = age.unsqueeze(1) + torch.arange(C, device=age.device)  # [B, C]
        keys, values, biases, seen = [], [], [], []
        new_levels: list[tuple[Tensor, ...]] = []
        # The level's new nodes [B, heads, m, D], their indices [B, m], and which of them are complete (None: all).
        new: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = (k, v, t, None)
        for level, parts in enumerate(levels):
            if not parts:  # the mark of a fixed size
                new_levels.append(parts)
                continue
            ring_key, ring_value, *sums = parts
            span, slots = self._span(level), ring_key.shape[2]
            count = age // span  # [B]: complete nodes
            new_count = (age + C) // span
            if level > 0 and new is not None:
                new, sums = self._complete(level, new, sums, count, new_count, C, ages)
            # Slot s holds the latest node j = s (mod slots) that was complete before this chunk, or none: j < 0.
            slot = torch.arange(slots, device=age.device)
            index = self._latest(count, slot)
            level_keys, level_values = [ring_key], [ring_value]
            if new is not None:
                new_key, new_value, node, exists = new
                index = torch.cat([index, node if exists is None else torch.where(exists, node, -1)], dim=1)
                level_keys.append(new_key)
                level_values.append(new_value)
                if ages is None:
                    after = self._latest(new_count, slot)
                    row = (after - count.unsqueeze(1)).clamp(0, new_key.shape[2] - 1)
                    ring_key, ring_value = (
                        self._take(ring, new_rows, row, after >= count.unsqueeze(1))
                        for ring, new_rows in ((ring_key, new_key), (ring_value, new_value))
                    )
                elif slots:
                    place = torch.remainder(node, slots)
                    ring_key, ring_value = (
                        self._put(ring, place, exists, new_rows)
                        for ring, new_rows in ((ring_key, new_key), (ring_value, new_value))
                    )
            new_levels.append((ring_key, ring_value, *sums))
            index = index.unsqueeze(1)  # [B, 1, nodes]
            cell = (t // span).unsqueeze(2)  # [B, C, 1]
            visible = (index >= 0) & ((index <= cell) if level == 0 else (cell - index >= self.local_blocks))
            if not self._is_top(level):
                above = self._span(level + 1)
                visible &= t.unsqueeze(2) // above - index // (above // span) < self.local_blocks
            keys += level_keys
            values += level_values
            seen.append(visible)
            biases.append(torch.full_like(index, math.log(span) if self.mass_bias else 0.0, dtype=q.dtype))
        key, value = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        bias, hidden = torch.cat(biases, dim=2).unsqueeze(1), ~torch.cat(seen, dim=2).unsqueeze(1)
        grouped = self.num_kv_heads != self.num_heads
        if grouped:  # [B, kv heads, heads of a kv head, ...]
            q = q.unflatten(1, (self.num_kv_heads, -1))
            key, value, bias, hidden = key.unsqueeze(2), value.unsqueeze(2), bias.unsqueeze(1), hidden.unsqueeze(1)
        logits = self.head_dim**-0.5 * (q @ key.transpose(-2, -1)) + bias
        weight = torch.softmax(logits.masked_fill(hidden, -math.inf), dim=-1)
        if self.training and self.dropout > 0:
            weight = F.dropout(weight, self.dropout)
        out = weight @ value
        return (out.flatten(1, 2) if grouped else out), (age + C, *new_levels)

    def _complete(
        self,
        level: int,
        new: tuple[Tensor, Tensor, Tensor, Tensor | None],
        sums: list[Tensor],
        count: Tensor,
        new_count: Tensor,
        C: int,
        ages: list[int] | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None] | None, list[Tensor]]:
        """The level's nodes that C tokens complete, from the new nodes below, and the sums of the node then open."""
        key, value, child, exists = new
        span = self._span(level)
        # Nodes that get children: those completed, and the one then open. Without ages a bound, which is never 1, for
        # which a graph would be specialised.
        n = C // span + 2 if ages is None else 1 + max((a + C) // span - a // span for a in ages)
        node = count.unsqueeze(1) + torch.arange(n, device=count.device)  # [B, n]
        parent = child // (span // self._span(level - 1))
        mask = parent.unsqueeze(1) == node.unsqueeze(2)  # [B, n, m]
        if exists is not None:
            mask = mask & exists.unsqueeze(1)
        pooled = self._pool(level, key, value, mask, sums)
        if ages is not None and n == 1:
            return None, [part.squeeze(2) for part in pooled]
        opened = (new_count - count).view(-1, 1, 1).expand(-1, self.num_kv_heads, 1)  # [B, heads, 1]
        sums = [
            part.gather(2, opened if part.dim() == 3 else opened.unsqueeze(3).expand(-1, -1, 1, self.head_dim)).squeeze(
                2
            )
            for part in pooled
        ]
        if ages is not None:
            pooled, node = [part[:, :, : n - 1] for part in pooled], node[:, : n - 1]
        total = torch.where(pooled[3] > 0, pooled[3], 1.0).unsqueeze(-1)
        return (
            (pooled[0] / total).to(key.dtype),
            (pooled[1] / total).to(key.dtype),
            node,
            node < new_count.unsqueeze(1),
        ), sums

    @staticmethod
    def _latest(count: Tensor, slot: Tensor) -> Tensor:
        """[B, slots]: the latest of ``count`` (B,) nodes j = slot (mod slots), or a negative number."""
        last = count.unsqueeze(1) - 1
        slots = slot.shape[0]
        return last - torch.remainder(last - slot, slots) if slots else last[:, :0]

    @staticmethod
    def _take(ring: Tensor, rows: Tensor, row: Tensor, fresh: Tensor) -> Tensor:
        """``ring`` (B, heads, slots, D) where slots that are ``fresh`` (B, slots) are those ``row`` of ``rows``."""
        index = row.unsqueeze(1).unsqueeze(3).expand(ring.shape)
        return torch.where(fresh.unsqueeze(1).unsqueeze(3), rows.gather(2, index), ring)

    @staticmethod
    def _put(ring: Tensor, place: Tensor, exists: Tensor | None, rows: Tensor) -> Tensor:
        """``ring`` (B, heads, slots, D) with ``rows`` (B, heads, n, D) at ``place`` where ``exists``, both (B, n)."""
        index = place.unsqueeze(1).unsqueeze(3).expand_as(rows)
        if exists is not None:
            rows = torch.where(exists.unsqueeze(1).unsqueeze(3), rows, ring.gather(2, index))
        return ring.scatter(2, index, rows)

    def _pool(self, level: int, key: Tensor, value: Tensor, mask: Tensor, sums: list[Tensor]) -> list[Tensor]:
        """Sums of n nodes: ``sums``, of the first one, and the children (B, heads, m, D) where ``mask`` (B, n, m)."""
        n = mask.shape[1]
        total_key, total_value, most, total = (part.unsqueeze(2) for part in sums)
        if n != 1:
            total_key, total_value = (F.pad(part, (0, 0, 0, n - 1)) for part in (total_key, total_value))
            most, total = F.pad(most, (0, n - 1), value=-math.inf), F.pad(total, (0, n - 1))
        key, value = key.to(total_key.dtype), value.to(total_key.dtype)
        # A child that is not there may hold anything: it must not meet a weight of 0.
        there = mask.any(1)[:, None, :, None]
        key, value = (t.masked_fill(~there, 0.0) for t in (key, value))
        mask = mask.unsqueeze(1)
        if self.pool_query is None:
            weight = mask.to(key.dtype).expand(-1, self.num_kv_heads, -1, -1)
        else:
            row = self.pool_query[min(level, self.pool_query.shape[0]) - 1].to(key.dtype)
            score = self.head_dim**-0.5 * torch.einsum("bhmd,hd->bhm", key, row)
            score = score.unsqueeze(2).masked_fill(~mask, -math.inf)
            before, most = most, torch.maximum(most, score.amax(dim=3))
            shift = torch.where(most == -math.inf, 0.0, most)
            weight, decay = torch.exp(score - shift.unsqueeze(3)), torch.exp(before - shift)
            total_key, total_value = total_key * decay.unsqueeze(3), total_value * decay.unsqueeze(3)
            total = total * decay
        return [total_key + weight @ key, total_value + weight @ value, most, total + weight.sum(3)]
