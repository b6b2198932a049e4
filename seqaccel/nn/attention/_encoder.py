"""A Transformer encoder of hierarchical attention: ``torch.nn.TransformerEncoder`` for long sequences and streams."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel import _arguments, _common
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.attention._hierarchical import HierarchicalAttention
from seqaccel.nn.streaming import State, Streaming, step_at_once

__all__ = ["HierarchicalAttentionEncoder"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
POSITIONS = ("rotary", "learned", None)


class EncoderLayer(nn.Module):
    """``torch.nn.TransformerEncoderLayer``'s parameters and equations, with hierarchical attention."""

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor],
        layer_norm_eps: float,
        norm_first: bool,
        bias: bool,
        where: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.self_attn = HierarchicalAttention(d_model, nhead, dropout, bias=bias, batch_first=True, **where, **options)
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias=bias, **where)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias=bias, **where)
        self.norm_first = norm_first
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = activation

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """x (B, T, E): whole sequences, or what follows ``state``; the output, and the state after it if any."""
        inner = self.norm1(x) if self.norm_first else x
        attended: Tensor
        if state is None:
            attended, _ = self.self_attn(inner, inner, inner, lengths=lengths, cu_seqlens=cu_seqlens)
        else:
            attended, state = self.self_attn.extend(inner, state)
        x = x + self.dropout1(attended)
        if self.norm_first:
            return x + self._feed_forward(self.norm2(x)), state
        x = self.norm1(x)
        return self.norm2(x + self._feed_forward(x)), state

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class HierarchicalAttentionEncoder(Streaming, Leaf, nn.Module):
    r"""A stack of Transformer encoder layers with hierarchical attention, in O(T log T).

    Stands where ``torch.nn.TransformerEncoder`` stands: names of arguments, parameters and masks are its own, and
    ``torch.nn.TransformerEncoderLayer``'s. Without positions the state_dict is ``torch.nn.TransformerEncoder``'s. Each
    layer computes

    .. math::
        z &= \mathrm{norm}_1(x + \mathrm{attention}(x)), &\quad y &= \mathrm{norm}_2(z + \mathrm{feedforward}(z)) \\
        z &= x + \mathrm{attention}(\mathrm{norm}_1(x)), &\quad y &= z + \mathrm{feedforward}(\mathrm{norm}_2(z))

    (the second line where ``norm_first``), with :class:`HierarchicalAttention` and
    feedforward(z) = linear2(dropout(activation(linear1(z)))). A causal encoder streams: a state holds O(log T) keys and
    values per layer and head.

    Args:
        d_model: width E of the model.
        nhead: number of heads; E is a multiple of it.
        num_layers: number of layers.
        dim_feedforward: width between ``linear1`` and ``linear2``. Default: 2048
        dropout: probability, in training: of what attention and feed-forward add, inside the feed-forward, and of the
            weights of attention. Default: 0.1
        activation: ``"relu"``, ``"gelu"`` or a function. Default: relu
        layer_norm_eps: of the layer norms. Default: 1e-5
        batch_first: (B, T, E) rather than (T, B, E). Default: ``False``
        norm_first: layer norm before attention and feed-forward rather than after. Default: ``False``
        bias: biases of the projections, linear layers and norms. Default: ``True``
        device, dtype: of the parameters.
        positions: ``"rotary"`` turns queries and keys by their position (Su et al. 2021); ``"learned"`` adds a row of
            the embedding ``positions`` to the input; None: only causality and the pyramid tell positions apart.
            Default: ``"rotary"``
        max_positions: rows of the embedding, the longest sequence or stream. Default: 1024
        final_norm: a layer norm ``norm`` after the last layer. Default: where ``norm_first``
        pool_query, block_size, fanout, levels, local_blocks, causal, mass_bias, rotary_base, num_kv_heads: see
            :class:`HierarchicalAttention`; ``rotary_base`` is for ``positions="rotary"``. Default of it: 10000

    Attributes:
        layers: ``torch.nn.ModuleList``; each has ``self_attn``, ``linear1``, ``linear2``, ``norm1``, ``norm2``.
        norm: the last layer norm, or None.

    State of B streams: a tuple of the layers' states.

    Source: Vaswani et al., "Attention is all you need", 2017; Culurciello, "The fall of RNN / LSTM", 2018.

    Example:
        >>> import torch, seqaccel
        >>> encoder = seqaccel.nn.HierarchicalAttentionEncoder(
        ...     64, 4, 2, 128, norm_first=True, batch_first=True, block_size=16
        ... ).eval()
        >>> x = torch.randn(2, 100, 64)
        >>> out = encoder(x)
        >>> state = encoder.init_state(2)
        >>> y, state = encoder.extend(x[:, :70], state)
        >>> y_t, state = encoder.step(x[:, 70], state)
        >>> torch.allclose(torch.cat([y, y_t[:, None]], 1), out[:, :71], atol=1e-5)
        True
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_layers: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        positions: str | None = "rotary",
        max_positions: int = 1024,
        final_norm: bool | None = None,
        pool_query: int = 0,
        block_size: int = 64,
        fanout: int | None = None,
        levels: int | None = None,
        local_blocks: int = 2,
        causal: bool = True,
        mass_bias: bool = True,
        rotary_base: float = 10000.0,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        for name, size in (
            ("d_model", d_model),
            ("nhead", nhead),
            ("num_layers", num_layers),
            ("dim_feedforward", dim_feedforward),
            ("max_positions", max_positions),
        ):
            _arguments.integer(title, name, size, 1)
        if d_model % nhead:
            raise ValueError(f"{title}: expected d_model to be a multiple of nhead, but got {d_model=}, {nhead=}")
        _arguments.probability(title, "dropout", dropout)
        _arguments.number(title, "layer_norm_eps", layer_norm_eps)
        _arguments.flags(title, batch_first=batch_first, norm_first=norm_first, bias=bias)
        if final_norm is not None:
            _arguments.flag(title, "final_norm", final_norm)
        if isinstance(activation, str) and activation in ACTIVATIONS:
            activation = ACTIVATIONS[activation]
        if isinstance(activation, str) or not callable(activation):
            raise ValueError(f"{title}: expected activation to be 'relu', 'gelu' or a function, but got {activation!r}")
        if not (positions is None or isinstance(positions, str)) or positions not in POSITIONS:
            raise ValueError(f"{title}: expected positions to be one of {POSITIONS}, but got {positions!r}")
        self.d_model, self.batch_first, self.max_positions = d_model, batch_first, max_positions
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {
            "pool_query": pool_query,
            "block_size": block_size,
            "fanout": fanout,
            "levels": levels,
            "local_blocks": local_blocks,
            "causal": causal,
            "mass_bias": mass_bias,
            "rotary_base": rotary_base if positions == "rotary" else None,
            "num_kv_heads": num_kv_heads,
        }
        layer = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, norm_first, bias, where, options)
        self.positions = nn.Embedding(max_positions, d_model, **where) if positions == "learned" else None
        self.layers = nn.ModuleList(EncoderLayer(*layer) for _ in range(num_layers))
        has_norm = norm_first if final_norm is None else final_norm
        self.norm = nn.LayerNorm(d_model, eps=layer_norm_eps, bias=bias, **where) if has_norm else None

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The encoding of a sequence.

        Args:
            src: (T, B, E), (B, T, E) where ``batch_first``, or (T, E).
            mask: ``None`` or, in a causal encoder, the causal mask.
            src_key_padding_mask: (B, T), true (or -inf) at padding, which must follow the sequence. It changes no
                output before it; outputs at the padding are of no meaning.
            is_causal: says that ``mask`` is the causal mask, which is then not looked at.
            cu_seqlens: (N + 1,) int64 offsets of N sequences in the one row of the batch: none sees another one, and
                positions begin with each.

        A mask's values are checked with one synchronisation; in a compiled or exported graph by an assertion.

        Returns:
            The output, laid out as ``src``.
        """
        if not isinstance(src, Tensor):
            masks = {"mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
            return self._instead("src", src, **masks, cu_seqlens=cu_seqlens)
        title = type(self).__name__
        _arguments.optional_tensors(title, cu_seqlens=cu_seqlens)
        if src.is_nested or src.dim() not in (2, 3) or src.shape[-1] != self.d_model:
            layout = f"(B, T, {self.d_model})" if self.batch_first else f"(T, B, {self.d_model})"
            found = "a nested tensor" if src.is_nested else tuple(src.shape)
            raise ValueError(f"{title}: expected src of shape {layout} or (T, {self.d_model}), but got {found}")
        batched = src.dim() == 3
        x = src.unsqueeze(0) if not batched else src if self.batch_first else src.transpose(0, 1)
        self._layer(0).self_attn._check_masks(
            x,
            x,
            src_key_padding_mask,
            mask,
            False if is_causal is None else is_causal,
            names=("src_key_padding_mask", "mask"),
        )
        lengths = None if src_key_padding_mask is None else HierarchicalAttention._lengths(src_key_padding_mask)
        out, _ = self._run(x, None, lengths, cu_seqlens)
        return out.squeeze(0) if not batched else out if self.batch_first else out.transpose(0, 1)

    def _layer(self, i: int) -> EncoderLayer:
        layer = self.layers[i]
        assert isinstance(layer, EncoderLayer)
        return layer

    def _run(
        self, x: Tensor, state: State | None, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """x (B, T, E)."""
        if self.positions is not None:
            age = None if state is None else state[0][0]
            self._check_positions(x.shape[1], age)
            at = HierarchicalAttention._positions(x, x.shape[1], cu_seqlens)
            x = x + self.positions(at if age is None else age.unsqueeze(1) + at).to(x.dtype)
        states = []
        for i, layer in enumerate(self.layers):
            x, after = layer(x, None if state is None else state[i], lengths, cu_seqlens)
            states.append(after)
        return x if self.norm is None else self.norm(x), None if state is None else tuple(states)

    @_common.unrecorded
    def _check_positions(self, length: int, age: Tensor | None) -> None:
        """On a GPU nothing waits for the streams' ages, and the embedding has its own assertion."""
        if torch.compiler.is_compiling() or length == 0:
            return
        most = length + (int(age.max()) if age is not None and age.is_cpu and age.numel() > 0 else 0)
        if most > self.max_positions:
            raise ValueError(
                f"{type(self).__name__}: expected at most max_positions={self.max_positions} positions, but got {most}"
            )

    def extra_repr(self) -> str:
        return "batch_first=True" if self.batch_first else ""

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
            max_length: tokens that a stream will have: see :meth:`HierarchicalAttention.init_state`. Default: the state
                grows with its streams.
            device, dtype: of the state; the parameters' by default.
        """
        if self.positions is not None and isinstance(max_length, int) and max_length > self.max_positions:
            raise ValueError(
                f"{type(self).__name__}: expected max_length to be at most max_positions={self.max_positions}, "
                f"but got {max_length}"
            )
        where: dict[str, Any] = {"max_length": max_length, "device": device, "dtype": dtype}
        return tuple(self._layer(i).self_attn.init_state(batch_size, **where) for i in range(len(self.layers)))

    def _matching_state(self, state: State, first: Tensor) -> State:
        return tuple(self._layer(i).self_attn._matching_state(part, part[0]) for i, part in enumerate(state))

    def _check_state(self, state: State) -> None:
        title = type(self).__name__
        if not isinstance(state, (tuple, list)) or len(state) != len(self.layers):
            raise TypeError(f"{title}: expected state to be what init_state or extend returned")

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for a chunk ``x`` (laid out as in ``forward``), and the state after it.

        Compiled or exported, a chunk of C tokens is one product of C queries and more than C keys: split long ones.
        """
        self._check_state(state)
        for i in range(len(self.layers)):
            self._layer(i).self_attn._check_stream("x", x, state[i])
        B, E = state[0][0].shape[0], self.d_model
        if x.dim() != 3 or x.shape[2] != E or x.shape[0 if self.batch_first else 1] != B:
            layout = f"({B}, T, {E})" if self.batch_first else f"(T, {B}, {E})"
            raise ValueError(f"x: expected shape {layout}, but got {tuple(x.shape)}")
        y, after = self._run(x if self.batch_first else x.transpose(0, 1), state)
        assert after is not None
        return (y if self.batch_first else y.transpose(0, 1)), after

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        done = step_at_once(self, x_t, state)
        if done is not None:
            return done
        self._check_state(state)
        self._layer(0).self_attn._check_stream("x_t", x_t, state[0])
        if x_t.dim() != 2:
            raise ValueError(f"x_t: expected shape (B, {self.d_model}), but got {tuple(x_t.shape)}")
        time = 1 if self.batch_first else 0
        y, state = self.extend(x_t.unsqueeze(time), state)
        return y.squeeze(time), state
