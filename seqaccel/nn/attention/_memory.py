"""Attention over a memory that stores only what is new: trains in parallel, runs step by step."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel import _arguments, _common, functional
from seqaccel.nn.attention._base import MultiheadAttention
from seqaccel.nn.streaming import State, Streaming

__all__ = ["NoveltyMemory"]

_CHUNK = 256  # queries at a time: the biases of all at once would be (T, T)


class NoveltyMemory(Streaming, MultiheadAttention):
    r"""Multi-head attention over a memory of vectors that joined it because they were unlike those kept.

    A vector, a position of ``key``, joins the memory only when its cosine similarity to those kept is below
    ``threshold``. Else the most similar kept vector, the first of equals, counts one more
    (:func:`seqaccel.functional.novelty_gate`). The query at position t sees the memory after positions 0 to t:

    .. math::
        \mathrm{head}_t = \sum_n \mathrm{softmax}_n\!\left(\frac{q_t \cdot k_n}{\sqrt{D}} + \log c_{t,n}\right) v_n

    with :math:`c_{t,n}` the count of kept vector n at position t. Keys and values are projections of the kept vectors,
    one gate serves all heads, and gradients flow through keys and values. Cost and memory per step grow with what is
    kept, not with the sequence.

    Stands where ``torch.nn.MultiheadAttention`` stands, ``torch.nn.TransformerEncoderLayer`` included, with its
    constructor, its ``forward`` and its state_dict. Where nothing is similar it is causal dense attention, as it is
    where the vectors that are similar are equal. Streams by :meth:`init_state`, :meth:`extend` and :meth:`step`.

    Args:
        embed_dim: width E of the model.
        num_heads: number of heads; E is a multiple of it.
        dropout: 0; dropout of attention weights is not supported.
        bias: biases of the projections. Default: ``True``
        add_bias_kv, add_zero_attn: ``False``; not supported.
        kdim, vdim: width of key and value. Default: E
        batch_first: (B, T, E) rather than (T, B, E). Default: ``False``
        device, dtype: of the parameters.
        threshold: cosine similarity from which on a vector does not join, greater than -1 and at most 1.
            Default: 0.9
        window: how many of those kept last a vector is compared with; queries see all. Default: all

    Raises:
        ValueError: a size does not fit, or an argument asks for what the memory cannot do.

    Source: Culurciello, "The fall of RNN / LSTM", 2018.

    Example:
        >>> import torch, seqaccel
        >>> memory = seqaccel.nn.NoveltyMemory(64, 4, batch_first=True, threshold=0.9)
        >>> x = torch.randn(2, 10, 64).repeat(1, 10, 1)  # ten vectors, each ten times
        >>> out, _ = memory(x, x, x)
        >>> state = memory.init_state(2)
        >>> y, state = memory.extend(x[:, :70], state)
        >>> y_t, state = memory.step(x[:, 70], state)
        >>> torch.allclose(torch.cat([y, y_t[:, None]], 1), out[:, :71], atol=1e-5)
        True
        >>> state[0].shape  # the vectors kept
        torch.Size([2, 10, 64])
    """

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
        threshold: float = 0.9,
        window: int | None = None,
    ) -> None:
        title = type(self).__name__
        _arguments.number(title, "threshold", threshold)
        if not -1 < threshold <= 1:
            raise ValueError(f"{title}: expected threshold to be greater than -1 and at most 1, but got {threshold}")
        if window is not None:
            _arguments.integer(title, "window", window, 1)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, True,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.threshold = threshold
        self.window = window

    def extra_repr(self) -> str:
        parts = [f"{self.embed_dim}, {self.num_heads}, threshold={self.threshold}"]
        parts += [f"window={self.window}"] * (self.window is not None) + ["batch_first=True"] * self.batch_first
        return ", ".join(parts)

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
        """Attention of ``query`` over the memory of ``key`` and ``value``, three sequences of one length.

        Args:
            query: (T, B, E), (B, T, E) where ``batch_first``, or (T, E).
            key, value: of the same length; widths ``kdim`` and ``vdim``.
            key_padding_mask: (B, T), true (or -inf) at padding, which must follow the sequence. Padding changes no
                output before it, and outputs at the padding are of no meaning.
            need_weights: must be ``False``: there is no (T, T) matrix of weights.
            attn_mask: ``None`` or the causal mask.
            average_attn_weights: no meaning here.
            is_causal: says that ``attn_mask`` is the causal mask, which is then not looked at.

        A mask's values are checked with one synchronisation; in a compiled or exported graph by an assertion.

        Returns:
            The output, laid out as ``query``, and ``None``.
        """
        if not isinstance(query, Tensor):
            masks = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            return self._instead("query", query, key, value, **masks, is_causal=is_causal)
        if _common.is_distributed(query):
            raise TypeError("NoveltyMemory: DTensors are not supported; use DistributedDataParallel or FSDP2")
        batched = query.dim() == 3
        query, key, value = self._batches(query, key, value, need_weights)
        self._check_inputs(query, key, value)
        self._check_masks(query, key, key_padding_mask, attn_mask, is_causal)
        q, k, v = self._project(query, key, value)
        counts = torch.zeros_like(key[:, :0, 0], dtype=torch.int64)
        out, _ = self._extend(key, q, k, v, (key[:, :0], k[:, :, :0], v[:, :, :0], counts))
        return self._joined(out, batched), None

    @_common.unrecorded
    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self._check_widths(query, key, value)
        for name, tensor in (("key", key), ("value", value)):
            if tensor.shape[:2] != query.shape[:2]:
                raise ValueError(
                    f"{name}: expected batch and length of query, {tuple(query.shape[:2])}, "
                    f"but got {tuple(tensor.shape[:2])}; a memory is of one sequence"
                )

    # Streaming. A state is what is kept: vectors (B, N, E), keys and values (B, heads, N, D), counts (B, N), of 0 where
    # a stream has kept fewer than N. A state made for a stated max_length ends in an empty tuple and never grows.

    def _check_streams(self) -> None:
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            raise RuntimeError("NoveltyMemory with kdim or vdim cannot run on a stream: a stream has one input")

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
            max_length: vectors that the memory has room for. The state then has its full size from the start:
                :meth:`step` and :meth:`extend` compile as one graph, export, and on a GPU do not synchronise. In a full
                memory every vector counts for the most similar one. Default: the state grows with what is kept.
            device, dtype: of the state; the parameters' by default.
        """
        self._check_streams()
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        if max_length is not None:
            _arguments.integer(type(self).__name__, "max_length", max_length, 1)
        device = self.out_proj.weight.device if device is None else device
        dtype = self.out_proj.weight.dtype if dtype is None else dtype
        room = max_length or 1
        vectors = torch.zeros(batch_size, room, self.embed_dim, device=device, dtype=dtype)
        rows = torch.zeros(batch_size, self.num_heads, room, self.head_dim, device=device, dtype=dtype)
        state = (vectors, rows, rows.clone(), torch.zeros(vectors.shape[:2], device=device, dtype=torch.int64))
        return state if max_length is None else (*state, ())

    def _matching_state(self, state: State, first: Tensor) -> State:
        return tuple(torch.zeros_like(part) if isinstance(part, Tensor) else part for part in state)

    def _check_stream(self, name: str, x: Tensor, state: State) -> None:
        self._check_streams()
        _arguments.tensor(type(self).__name__, name, x)
        parts = state[:4] if isinstance(state, (tuple, list)) else ()
        if len(parts) != 4 or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{type(self).__name__}: expected state to be what init_state or extend returned")

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for a chunk ``x`` (laid out as in ``forward``), and the state after it."""
        self._check_stream("x", x, state)
        B, E = state[0].shape[0], self.embed_dim
        if x.dim() != 3 or x.shape[2] != E or x.shape[0 if self.batch_first else 1] != B:
            layout = f"({B}, T, {E})" if self.batch_first else f"(T, {B}, {E})"
            raise ValueError(f"x: expected shape {layout}, but got {tuple(x.shape)}")
        if not self.batch_first:
            x = x.transpose(0, 1)
        vectors, q, k, v = (t.to(state[0].dtype) for t in (x, *self._project(x, x, x)))
        out, state = self._extend(vectors, q, k, v, state)
        y = self.out_proj(out.transpose(1, 2).flatten(2).to(x.dtype))
        return (y if self.batch_first else y.transpose(0, 1)), state

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        self._check_stream("x_t", x_t, state)
        if x_t.dim() != 2:
            raise ValueError(f"x_t: expected shape (B, {self.embed_dim}), but got {tuple(x_t.shape)}")
        time = 1 if self.batch_first else 0
        y, state = self.extend(x_t.unsqueeze(time), state)
        return y.squeeze(time), state

    def _extend(self, vectors: Tensor, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """The heads' outputs (B, heads, T, D) for vectors (B, T, E) and their projections, and the state after them."""
        kept, keys, values, counts = state[:4]
        mark: tuple[Any, ...] = state[4:]
        (B, T), N = vectors.shape[:2], counts.shape[1]
        graph = torch.compiler.is_compiling() or torch.jit.is_tracing()  # no look at values
        if not graph and (B == 0 or T == 0):
            return v, state
        size = (counts > 0).sum(1)
        options: dict[str, Any] = {"threshold": self.threshold, "window": self.window, "capacity": N if mark else None}
        rows = functional.novelty_gate(vectors, kept, size, **options)
        # `last` is the newest row before each vector.
        newest = size.unsqueeze(1) - 1
        if graph:  # by operators that ONNX has too
            later = torch.ones(T, T, dtype=torch.bool, device=rows.device).triu()  # or at the same time
            last = torch.maximum(newest, rows.unsqueeze(1).masked_fill(later, -1).amax(2))
            chunk, reaches = T, [N if mark else N + T]
        else:
            last = torch.cat([newest, rows[:, :-1]], 1).cummax(1).values
            chunk, ends = _CHUNK, [*range(_CHUNK - 1, T - 1, _CHUNK), T - 1]
            reached = [N - 1] * len(ends) if mark else torch.maximum(last, rows)[:, ends].amax(0).tolist()
            reaches = [n + 1 for n in reached]
        room = reaches[-1]
        row = torch.arange(room, device=vectors.device)
        # Where each row is found in [what was kept, the new ones, zeros].
        source = torch.where(row < size.unsqueeze(1), row, N + T)
        place = torch.where(rows > last, rows, room)
        time = torch.arange(N, N + T, device=vectors.device).expand(B, T)
        source = F.pad(source, (0, 1)).scatter(1, place, time)[:, :room]
        kept = self._rows(kept, vectors, source)
        keys, values = (self._rows(old, new, source) for old, new in ((keys, k), (values, v)))
        counts = F.pad(counts, (0, room - N))
        outputs, wide = [], _common.compute_dtype(q.dtype)
        for i, reach in enumerate(reaches):
            part = slice(i * chunk, (i + 1) * chunk)
            # Queries come last, along which memory is contiguous: sums along another dimension take six times as long.
            new = (rows[:, None, part] == row[:reach, None]).cumsum(2, dtype=wide)
            bias = (new + counts[:, :reach, None]).log_().to(q.dtype).transpose(1, 2).contiguous().unsqueeze(1)
            outputs.append(
                F.scaled_dot_product_attention(q[:, :, part], keys[:, :, :reach], values[:, :, :reach], bias)
            )
            counts = counts + F.pad(new[:, :, -1].to(counts.dtype), (0, room - reach))
        return torch.cat(outputs, 2), (kept, keys, values, counts, *mark)

    @staticmethod
    def _rows(old: Tensor, new: Tensor, source: Tensor) -> Tensor:
        """Rows ``source`` (B, n) of ``old``, ``new`` and zeros, which are (B, ·, E) or (B, heads, ·, D)."""
        every = torch.cat([old, new, torch.zeros_like(new[..., :1, :])], -2)
        index = source.unsqueeze(-1) if old.dim() == 3 else source[:, None, :, None]
        return every.gather(-2, index.expand(*every.shape[:-2], source.shape[1], every.shape[-1]))
