"""Recurrent decoders that attend to an encoder's states, and the translation model GNMT."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqaccel import _arguments, _common
from seqaccel.functional import attention_lstm, lstm
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.attention._additive import AdditiveAttention, MultiplicativeAttention
from seqaccel.nn.decoding import beam_search
from seqaccel.nn.rnn import LSTM, LSTMCell
from seqaccel.nn.streaming import State, Streaming

__all__ = ["GNMT", "AttentionLSTMDecoder"]

ATTENTION = ("additive", "multiplicative", "dot")
Hidden = tuple[Tensor, Tensor]


@_common.unrecorded
def _check_shape(title: str, name: str, tensor: Tensor, *sizes: int | str) -> None:
    """A size that is a word may be any."""
    _arguments.tensor(title, name, tensor)
    shape = tuple(tensor.shape)
    if len(shape) != len(sizes) or any(
        not isinstance(size, str) and found != size for found, size in zip(shape, sizes, strict=True)
    ):
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{title}: expected {name} to have shape ({expected}), but got {shape}")


def _cell_weights(layer: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return layer.weight_ih, layer.weight_hh, layer.bias_ih, layer.bias_hh


def _copy(t: Tensor) -> Tensor:
    """Contiguous, with the strides of a fresh tensor in dimensions of size 1 too."""
    return t.clone(memory_format=torch.contiguous_format)


class AttentionLSTMDecoder(Leaf, Streaming, nn.Module):
    r"""Layers of LSTMs that read a target and attend to the states of an encoder, the memory.

    .. math::
        h^1_t &= \mathrm{LSTM}_1([x_t, c_t], h^1_{t-1}), \qquad c_t = \mathrm{attention}(h^1_{t-1}, \mathrm{memory}) \\
        h^l_t &= \mathrm{LSTM}_l([h^{l-1}_t, c_t], h^l_{t-1}) \\
        y_t &= [h^L_t, c_t]

    Every layer sees the context :math:`c_t` that the first one found. With ``input_feeding=False`` the first layer's
    input is x alone and :math:`c_t = \mathrm{attention}(h^1_t, \mathrm{memory})`, in Luong's order; then no step waits
    for a context, and ``forward`` runs each layer over all steps at once, and the attention of all steps in one call.
    The keys of additive attention are projected once for all steps.

    Args:
        input_size: I, features of the target.
        hidden_size: H, of every layer.
        memory_size: M, features of the memory.
        num_layers: L. Default: 1
        attention: ``"additive"``, ``"multiplicative"`` (with a weight), or ``"dot"`` (without; M = H).
            Default: ``"additive"``
        attention_size: A, to which additive attention projects queries and keys. Default: ``hidden_size``
        normalize: weight normalisation of additive attention's vector, as GNMT has it. Default: ``False``
        input_feeding: whether the first layer's input contains the context. Default: ``True``
        residual_from: the first layer, counted from 0 and not 0 itself, to whose output its input without the context
            is added; so it is in all above. GNMT: 2. Default: None, in no layer
        dropout: probability, in training, of each input of the layers above the first. Default: 0
        bias: whether layers and the projection of queries have one. Default: ``True``
        device, dtype: of the parameters.

    Attributes:
        layers: ``torch.nn.ModuleList`` of :class:`LSTMCell`; the columns of ``weight_ih`` that multiply the context
            come last.
        attention: :class:`AdditiveAttention` or :class:`MultiplicativeAttention`.

    Shape: input (B, T, I) or a ``PackedSequence``; memory (B, S, M); output (B, T, H + M).
    State of B streams: ``(memory, key, valid, h, c, coverage, initial)``: the memory, its projected keys (B, S, A) or
    an empty tuple, which positions count (B, S), h and c (B, L, H), the weights of each position added up over the
    steps so far (B, S), and the h and c to which ``reset`` returns, or an empty tuple for zero.

    Source: Bahdanau et al., "Neural machine translation by jointly learning to align and translate", 2015; Luong et
    al., "Effective approaches to attention-based neural machine translation", 2015; Wu et al., GNMT, 2016.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> decoder = snn.AttentionLSTMDecoder(8, 16, memory_size=12, num_layers=2)
        >>> target, memory = torch.randn(3, 5, 8), torch.randn(3, 7, 12)
        >>> mask = torch.arange(7) >= torch.tensor([[7], [4], [6]])  # true at padding
        >>> output, (h_n, c_n) = decoder(target, memory, memory_padding_mask=mask)
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 28]), torch.Size([2, 3, 16]))
        >>> state = decoder.init_state(memory, mask)
        >>> y_t, state = decoder.step(target[:, 0], state)
        >>> torch.allclose(y_t, output[:, 0], atol=1e-6)
        True
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        num_layers: int = 1,
        attention: str = "additive",
        attention_size: int | None = None,
        normalize: bool = False,
        input_feeding: bool = True,
        residual_from: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        sizes = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "memory_size": memory_size,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            _arguments.integer(title, name, size, 1)
        if attention not in ATTENTION:
            raise ValueError(f"{title}: expected attention to be one of {ATTENTION}, but got {attention!r}")
        _arguments.flags(title, normalize=normalize, input_feeding=input_feeding, bias=bias)
        if attention != "additive" and (normalize or attention_size is not None):
            raise ValueError(f"{title}: attention_size and normalize are of additive attention, but got {attention!r}")
        if attention_size is not None:
            _arguments.integer(title, "attention_size", attention_size, 1)
        if residual_from is not None:
            _arguments.integer(title, "residual_from", residual_from, 1)
        _arguments.probability(title, "dropout", dropout)
        self.input_size, self.hidden_size, self.memory_size = input_size, hidden_size, memory_size
        self.num_layers, self.input_feeding, self.residual_from = num_layers, bool(input_feeding), residual_from
        self.dropout = dropout
        where = {"device": device, "dtype": dtype}
        first = input_size + memory_size if input_feeding else input_size
        self.layers = nn.ModuleList(
            LSTMCell(hidden_size + memory_size if i else first, hidden_size, bool(bias), **where)
            for i in range(num_layers)
        )
        self.attention: AdditiveAttention | MultiplicativeAttention
        if attention == "additive":
            size = hidden_size if attention_size is None else attention_size
            self.attention = AdditiveAttention(hidden_size, memory_size, size, bool(normalize), bool(bias), **where)
        else:
            general = attention == "multiplicative"
            self.attention = MultiplicativeAttention(hidden_size, memory_size, general, **where)

    # ---- attention ----

    def _key(self, memory: Tensor) -> Tensor:
        return self.attention.key_proj(memory) if isinstance(self.attention, AdditiveAttention) else memory

    def _attend(self, query: Tensor, key: Tensor, memory: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        attention = self.attention
        if isinstance(attention, AdditiveAttention):
            return attention.attend(query, key, memory, mask=valid, need_weights=True)  # type: ignore[return-value]
        return attention(query, key, memory, mask=valid, need_weights=True)

    def _scores(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """query_weight, query_bias and score_weight of ``attention_lstm``."""
        attention: Any = self.attention
        if isinstance(attention, AdditiveAttention):
            return attention.query_proj.weight, attention.query_proj.bias, attention.weight
        return (None if attention.weight is None else attention.weight.t()), None, None

    # ---- forward ----

    def _run(
        self,
        x: Tensor,
        memory: Tensor,
        key: Tensor,
        valid: Tensor | None,
        hidden: Hidden | None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Hidden, Tensor]:
        """Output (B, T, H + M), the last h and c, (B, L, H) as ``hidden``, and the weights (B, T, S)."""

        def before(index: int) -> Hidden | None:
            return None if hidden is None else (hidden[0][:, index], hidden[1][:, index])

        def whole(index: int, x: Tensor) -> tuple[Tensor, Hidden]:
            weights = _cell_weights(self.layers[index])
            output, last = lstm(x.transpose(0, 1), before(index), *weights, lengths=lengths)
            return output.transpose(0, 1), last

        if self.input_feeding:
            output, last, context, attention = attention_lstm(
                x, before(0), key, memory, *_cell_weights(self.layers[0]), *self._scores(), mask=valid,
                scale=self.attention.scale, lengths=lengths,
            )  # fmt: skip
        else:
            output, last = whole(0, x)
            context, attention = self._attend(output, key, memory, valid)
        states = [last]
        for index in range(1, self.num_layers):
            found, last = whole(index, F.dropout(torch.cat([output, context], -1), self.dropout, self.training))
            residual = self.residual_from is not None and index >= self.residual_from
            output = output + found if residual else found
            states.append(last)
        h_n, c_n = (torch.stack(parts, 1) for parts in zip(*states, strict=True))
        return torch.cat([output, context], -1), (h_n, c_n), attention

    def _check_memory(self, memory: Tensor, padding: Tensor | None, hx: Hidden | None) -> None:
        title = type(self).__name__
        _check_shape(title, "memory", memory, "B", "S", self.memory_size)
        if padding is not None:
            _arguments.mask(title, "memory_padding_mask", padding, tuple(memory.shape[:2]))
        if hx is not None:
            _arguments.states(title, "hx", hx, ("h_0", "c_0"))
            for name, part in zip(("h_0", "c_0"), hx, strict=True):
                _check_shape(title, name, part, self.num_layers, memory.shape[0], self.hidden_size)

    def forward(
        self,
        input: Tensor | PackedSequence,
        memory: Tensor,
        hx: Hidden | None = None,
        *,
        memory_padding_mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Any, ...]:
        """Runs all steps of a target.

        Args:
            input: (B, T, I), or a ``PackedSequence`` of B sequences.
            memory: (B, S, M).
            hx: the state before the first step, h_0 and c_0, (L, B, H) each. Default: zero
            memory_padding_mask: bool, (B, S), true where the memory is padding. Where all of it is, contexts are 0.
                Default: none
            need_weights: returns the weights of the attention as well. Default: ``False``

        Returns:
            Output (B, T, H + M), packed if the input was; the state after the last step (of each sequence), laid out as
            ``hx``; and with ``need_weights`` the weights, (B, T, S).

        Raises:
            TypeError, ValueError: an argument's type or shape does not fit.
        """
        title = type(self).__name__
        if not isinstance(input, (Tensor, PackedSequence)):
            keywords = {"memory_padding_mask": memory_padding_mask, "need_weights": need_weights or None}
            return self._instead("input", input, memory, hx, **keywords)
        self._check_memory(memory, memory_padding_mask, hx)
        _arguments.flags(title, need_weights=need_weights)
        lengths = None
        x: Tensor
        if isinstance(input, PackedSequence):
            x, lengths = pad_packed_sequence(input, batch_first=True)
            lengths = lengths.to(x.device)
        else:
            x = input
        _check_shape(title, "input", x, memory.shape[0], "T", self.input_size)
        valid = None if memory_padding_mask is None else ~memory_padding_mask
        hidden = None if hx is None else (hx[0].transpose(0, 1), hx[1].transpose(0, 1))
        output, (h_n, c_n), weights = self._run(x, memory, self._key(memory), valid, hidden, lengths)
        found: Any = output
        if isinstance(input, PackedSequence):
            order = input.sorted_indices
            rows = output if order is None else output.index_select(0, order)
            assert lengths is not None
            sizes = (lengths if order is None else lengths[order]).cpu()
            data = pack_padded_sequence(rows, sizes, batch_first=True).data
            found = PackedSequence(data, input.batch_sizes, order, input.unsorted_indices)
        state = h_n.transpose(0, 1), c_n.transpose(0, 1)
        return (found, state, weights) if need_weights else (found, state)

    # ---- streams ----

    def init_state(  # type: ignore[override]
        self, memory: Tensor, memory_padding_mask: Tensor | None = None, hx: Hidden | None = None
    ) -> State:
        """The state of B streams before their first step; arguments are those of ``forward``."""
        self._check_memory(memory, memory_padding_mask, hx)
        valid = torch.ones(memory.shape[:2], dtype=torch.bool, device=memory.device)
        valid = valid if memory_padding_mask is None else ~memory_padding_mask
        initial = () if hx is None else tuple(_copy(part.transpose(0, 1)) for part in hx)
        key = self._key(memory) if isinstance(self.attention, AdditiveAttention) else ()
        return self._fresh(memory, key, valid, initial)

    def _fresh(self, memory: Tensor, key: Any, valid: Tensor, initial: Any) -> State:
        zero = memory.new_zeros(memory.shape[0], self.num_layers, self.hidden_size)
        # Tensors of their own: a program that torch.export makes of a step takes one that is there twice for one input.
        h, c = (_copy(part) for part in initial or (zero, zero))
        coverage = memory.new_zeros(memory.shape[:2], dtype=_common.compute_dtype(memory.dtype))
        return memory, key, valid, h, c, coverage, initial

    def _matching_state(self, state: State, first: Tensor) -> State:
        memory, key, valid, *_, initial = state
        return self._fresh(memory, key, valid, initial)

    @_common.unrecorded
    def _check_state(self, state: State) -> None:
        if not isinstance(state, (tuple, list)) or len(state) != 7:
            raise TypeError(f"{type(self).__name__}: expected state to be what init_state returns")

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (B, T, H + M) for a chunk x (B, T, I), and the state after it; a chunk may have no step."""
        self._check_state(state)
        memory, key, valid, h, c, coverage, initial = state
        _check_shape(type(self).__name__, "x", x, memory.shape[0], "T", self.input_size)
        if x.shape[1] == 0:
            return x.new_zeros(x.shape[0], 0, self.hidden_size + self.memory_size), state
        keys = key if isinstance(key, Tensor) else memory
        output, (h, c), weights = self._run(x, memory, keys, valid, (h, c))
        return output, (memory, key, valid, h, c, coverage + weights.sum(1), initial)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (B, H + M) for one step x_t (B, I), and the state after it."""
        _check_shape(type(self).__name__, "x_t", x_t, "B", self.input_size)
        output, state = self.extend(x_t.unsqueeze(1), state)
        return output.squeeze(1), state

    def coverage(self, state: State) -> tuple[Tensor, Tensor]:
        """How much attention each position of the memory has had, (B, S), and which positions count, (B, S)."""
        self._check_state(state)
        return state[5], state[2]

    def extra_repr(self) -> str:
        return f"input_feeding={self.input_feeding}, residual_from={self.residual_from}, dropout={self.dropout}"


class GNMT(Leaf, Streaming, nn.Module):
    r"""The translation model GNMT: recurrent encoder, attention, recurrent decoder.

    The encoder's first layer is bidirectional. All others, and the decoder's, run forward. From the third layer on a
    layer's input is added to its output. The decoder is an :class:`AttentionLSTMDecoder` with normalised additive
    attention. Its first layer's state gives the queries, and all of its layers see the context. As in the authors'
    TensorFlow code each layer of the decoder begins with the last state of the encoder's layer; of the bidirectional
    one, that of the direction that runs backwards.

    Args:
        source_vocabulary, target_vocabulary: numbers of tokens.
        hidden_size: H, of every layer and direction. Default: 1024
        num_layers: of the encoder, and of the decoder. Default: 8
        embedding_dim: width of both embeddings. Default: ``hidden_size``
        attention_size: to which the attention projects queries and keys. Default: ``hidden_size``
        input_feeding: whether the decoder's first layer sees the context, as in the paper. Without it training runs
            each layer over all steps at once, see :class:`AttentionLSTMDecoder`. Default: ``True``
        dropout: probability, in training, of each layer's inputs. Default: 0.2
        device, dtype: of the parameters.

    Shape: source (B, S) and target (B, T), int64; ``source_padding_mask`` (B, S) bool, true where a token is padding,
    which comes last; output, the logits of the tokens that follow: (B, T, target_vocabulary).
    State of B streams: that of the decoder.

    Source: Wu et al., "Google's neural machine translation system", 2016.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> model = snn.GNMT(12, 10, hidden_size=16, num_layers=3).eval()
        >>> source, target = torch.randint(12, (2, 7)), torch.randint(10, (2, 5))
        >>> logits = model(source, target)
        >>> logits.shape
        torch.Size([2, 5, 10])
        >>> first, state = model.extend(target[:, :3], model.init_state(source))
        >>> torch.allclose(first, logits[:, :3], atol=1e-5)
        True
        >>> tokens, scores = model.generate(source, start=0, end=1, max_length=6, beam_size=3)
        >>> scores.shape
        torch.Size([2])
    """

    def __init__(
        self,
        source_vocabulary: int,
        target_vocabulary: int,
        hidden_size: int = 1024,
        num_layers: int = 8,
        embedding_dim: int | None = None,
        attention_size: int | None = None,
        input_feeding: bool = True,
        dropout: float = 0.2,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        width = hidden_size if embedding_dim is None else embedding_dim
        sizes = {
            "source_vocabulary": source_vocabulary,
            "target_vocabulary": target_vocabulary,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "embedding_dim": width,
        }
        for name, size in sizes.items():
            _arguments.integer(title, name, size, 1)
        if attention_size is not None:
            _arguments.integer(title, "attention_size", attention_size, 1)
        _arguments.probability(title, "dropout", dropout)
        self.hidden_size, self.dropout = hidden_size, dropout
        where = {"device": device, "dtype": dtype}
        self.source_embedding = nn.Embedding(source_vocabulary, width, **where)
        self.target_embedding = nn.Embedding(target_vocabulary, width, **where)
        inputs = [width, 2 * hidden_size, *[hidden_size] * num_layers][:num_layers]
        self.encoder = nn.ModuleList(
            LSTM(size, hidden_size, batch_first=True, bidirectional=i == 0, **where) for i, size in enumerate(inputs)
        )
        self.decoder = AttentionLSTMDecoder(
            width,
            hidden_size,
            2 * hidden_size if num_layers == 1 else hidden_size,
            num_layers,
            attention_size=attention_size,
            normalize=True,
            input_feeding=input_feeding,
            residual_from=2,
            dropout=dropout,
            **where,
        )
        self.output = nn.Linear(hidden_size, target_vocabulary, **where)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    @_common.unrecorded
    def _check_tokens(self, name: str, tokens: Tensor, batch: int | None = None) -> None:
        title = type(self).__name__
        _check_shape(title, name, tokens, "B" if batch is None else batch, "T")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{title}: expected {name} to be torch.int64, but got {tokens.dtype}")

    @_common.unrecorded
    def _check_padding(self, source: Tensor, mask: Tensor) -> None:
        title = type(self).__name__
        _arguments.mask(title, "source_padding_mask", mask, tuple(source.shape))
        if (
            not torch.compiler.is_compiling()
            and not _common.transforms_active()
            and (mask[:, :-1] & ~mask[:, 1:]).any()
        ):
            raise ValueError(f"{title}: expected source_padding_mask to be true behind all tokens of a source only")

    def _layer(self, layer: Any, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Hidden]:
        """Output (B, S, ·), and the last state (B, H) of the last direction."""
        if lengths is None:
            output, (h_n, c_n) = layer(x)
            return output, (h_n[-1], c_n[-1])
        outputs = []
        for end in ("", "_reverse") if layer.bidirectional else ("",):
            names = (f"{name}_l0{end}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            weights: list[Any] = [getattr(layer, name) for name in names]
            output, last = lstm(x.transpose(0, 1), None, *weights, lengths=lengths, reverse=bool(end))
            outputs.append(output.transpose(0, 1))
        return torch.cat(outputs, -1), last

    def _encoded(self, source: Tensor, source_padding_mask: Tensor | None) -> tuple[Tensor, Hidden]:
        """The memory, and the last h and c of each layer, (L, B, H)."""
        self._check_tokens("source", source)
        lengths = None
        if source_padding_mask is not None:
            self._check_padding(source, source_padding_mask)
            lengths = (~source_padding_mask).sum(1).clamp(min=1)
        if not torch.jit.is_tracing() and source.shape[1] == 0:
            raise ValueError(f"{type(self).__name__}: expected source to have at least one token, but got none")
        x, states = self.source_embedding(source), []
        for index, layer in enumerate(self.encoder):
            y, last = self._layer(layer, self._dropped(x), lengths)
            x = x + y if index >= 2 else y
            states.append(last)
        h, c = (torch.stack(parts) for parts in zip(*states, strict=True))
        return x, (h, c)

    def encode(self, source: Tensor, source_padding_mask: Tensor | None = None) -> Tensor:
        """The memory that the decoder attends to, (B, S, H), or (B, S, 2 H) of a single layer."""
        return self._encoded(source, source_padding_mask)[0]

    def _logits(self, decoded: Tensor) -> Tensor:
        return self.output(decoded[..., : self.hidden_size])

    def _embedded(self, target: Tensor) -> Tensor:
        return self._dropped(self.target_embedding(target))

    def forward(self, source: Tensor, target: Tensor, source_padding_mask: Tensor | None = None) -> Tensor:
        """source (B, S), target (B, T): logits (B, T, target_vocabulary)."""
        if not isinstance(source, Tensor):
            return self._instead("source", source, target, source_padding_mask)
        memory, hx = self._encoded(source, source_padding_mask)
        self._check_tokens("target", target, source.shape[0])
        decoded, _ = self.decoder(self._embedded(target), memory, hx, memory_padding_mask=source_padding_mask)
        return self._logits(decoded)

    # ---- streams ----

    def init_state(self, source: Tensor, source_padding_mask: Tensor | None = None) -> State:  # type: ignore[override]
        """The state of the streams that will be decoded from ``source`` (B, S)."""
        memory, hx = self._encoded(source, source_padding_mask)
        return self.decoder.init_state(memory, source_padding_mask, hx)

    def _matching_state(self, state: State, first: Tensor) -> State:
        return self.decoder._matching_state(state, first)

    def extend(self, target: Tensor, state: State) -> tuple[Tensor, State]:
        """target (B, T): logits (B, T, target_vocabulary) of the tokens that follow, and the state after it."""
        self._check_tokens("target", target)
        decoded, state = self.decoder.extend(self._embedded(target), state)
        return self._logits(decoded), state

    def step(self, target_t: Tensor, state: State) -> tuple[Tensor, State]:
        """target_t (B,): logits (B, target_vocabulary) and the state after it."""
        _check_shape(type(self).__name__, "target_t", target_t, "B")
        logits, state = self.extend(target_t.unsqueeze(1), state)
        return logits.squeeze(1), state

    def coverage(self, state: State) -> tuple[Tensor, Tensor]:
        """How much attention each position of the source has had, (B, S), and which positions count, (B, S)."""
        return self.decoder.coverage(state)

    def generate(
        self,
        source: Tensor,
        start: int,
        end: int,
        max_length: int,
        *,
        source_padding_mask: Tensor | None = None,
        beam_size: int = 4,
        length_penalty: float = 0.2,
        length_offset: float = 5.0,
        coverage_penalty: float = 0.2,
    ) -> tuple[Tensor, Tensor]:
        """Translations by :func:`seqaccel.nn.decoding.beam_search`, whose arguments these are.

        Args:
            source: (B, S).
            start: the token that begins a target; it is no part of the result.
            end: the token that ends one.
            max_length: most tokens of a translation, ``end`` included.
            source_padding_mask: as in ``forward``.
            beam_size: 1 is greedy search. Default: 4
            length_penalty, length_offset, coverage_penalty: the paper's alpha, 5 and beta.

        Returns:
            tokens (B, L) with L ≤ ``max_length``, filled up with ``end``, and scores (B,).
        """
        _arguments.integer(type(self).__name__, "start", start, 0)
        with torch.no_grad():
            state = self.init_state(source, source_padding_mask)
        return beam_search(
            self,
            state,
            torch.full((source.shape[0],), start, device=source.device),
            end=end,
            max_length=max_length,
            beam_size=beam_size,
            length_penalty=length_penalty,
            length_offset=length_offset,
            coverage_penalty=coverage_penalty,
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}"
