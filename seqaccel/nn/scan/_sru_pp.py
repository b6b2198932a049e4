"""SRU++: SRU with attention in the place of its matrix product."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

from seqaccel import _arguments, _common, functional
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.scan._packed import padded, repacked
from seqaccel.nn.scan._sru import SRUCell, by_direction, check_masks
from seqaccel.nn.streaming import State, Streaming


class Projection(nn.Module):
    """u = W₂ LN(W₁ x), of a layer without attention."""

    layer_norm: nn.LayerNorm | None

    def __init__(self, inputs: int, outputs: int, inner: int, dropout: float, layer_norm: bool, **where: Any) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(inputs, inner, bias=False, **where)
        self.linear2 = nn.Linear(inner, outputs, bias=False, **where)
        self.layer_norm = nn.LayerNorm(inner, **where) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)
        with torch.no_grad():
            self.linear2.weight.mul_((1 - self.dropout.p) ** 0.5)
        if self.layer_norm is not None:
            self.layer_norm.reset_parameters()

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = self.linear1(x)
        return self.linear2(self.dropout(x if self.layer_norm is None else self.layer_norm(x)))


class Attention(nn.Module):
    """u = W₃ LN(α Attn(Q, K, V) + Q), Q = W₁ x and [K; V] = W₂ Q; K and V also of the memory."""

    layer_norm: nn.LayerNorm | None

    def __init__(
        self, inputs: int, outputs: int, inner: int, heads: int, dropout: float, attn_dropout: float, layer_norm: bool,
        **where: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads = heads
        self.attn_dropout = attn_dropout
        self.dropout = nn.Dropout(dropout)
        self.linear1 = nn.Linear(inputs, inner, bias=False, **where)
        self.linear2 = nn.Linear(inner, 2 * inner, bias=False, **where)
        self.linear3 = nn.Linear(inner, outputs, bias=False, **where)
        self.alpha = nn.Parameter(torch.empty(1, **where))
        self.layer_norm = nn.LayerNorm(inner, **where) if layer_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.linear1, self.linear2, self.linear3):
            nn.init.xavier_uniform_(linear.weight)
        with torch.no_grad():
            self.alpha.zero_()
            self.linear3.weight.mul_((1 - self.dropout.p) ** 0.5)
        if self.layer_norm is not None:
            self.layer_norm.reset_parameters()

    def forward(
        self, x: Tensor, *, mask_pad: Tensor | None, attn_mask: Tensor | None, memory: Tensor | None,
        memory_mask_pad: Tensor | None, episodes: Tensor | None,
    ) -> Tensor:  # fmt: skip
        z = self.linear1(x if memory is None else torch.cat([memory, x]))
        kept = z.shape[0] - x.shape[0]
        query = z[kept:]

        def heads(t: Tensor) -> Tensor:  # (B, heads, ·, head size)
            return t.unflatten(2, (self.num_heads, -1)).permute(1, 2, 0, 3)

        mask = attn_mask
        if mask_pad is not None or memory_mask_pad is not None:
            pads = [
                torch.zeros(length, x.shape[1], dtype=torch.bool, device=x.device) if pad is None else pad
                for pad, length in ((memory_mask_pad, kept), (mask_pad, x.shape[0]))
            ]
            seen = ~torch.cat(pads).t()[:, None, None]  # (B, 1, 1, S)
            episodes = seen if episodes is None else episodes & seen
        if episodes is not None:
            mask = episodes if mask is None else torch.where(episodes, mask, torch.full_like(mask, -torch.inf))
        key, value = self.linear2(z).chunk(2, -1)
        operands = (heads(query), heads(key), heads(value), mask, self.attn_dropout if self.training else 0.0)
        if _common.is_distributed(x):  # torch has no rule for the gradient of a CPU's fused attention
            with sdpa_kernel(SDPBackend.MATH):
                attended = F.scaled_dot_product_attention(*operands)
        else:
            attended = F.scaled_dot_product_attention(*operands)
        found = attended.permute(2, 0, 1, 3).flatten(2) * self.alpha + query
        return self.linear3(self.dropout(found if self.layer_norm is None else self.layer_norm(found)))


class _Cell(SRUCell):
    """A layer: an SRU whose product is ``transform_module``."""

    _custom = "transform_module"

    def _layer(
        self, x: Tensor, skip: Tensor | None, c0: Tensor | None, options: dict[str, Any], **attention: Any
    ) -> tuple[Tensor, Tensor]:
        transform: Any = self.transform_module
        u = transform(x, mask_pad=options["mask_pad"], **attention)
        return functional.sru(u, skip, self.weight_c, self.bias, c0, **options)

    def forward(  # type: ignore[override]
        self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None, reset: Tensor | None, **attention: Any
    ) -> tuple[Tensor, Tensor]:
        return self._run(input, c0, mask_pad, reset, **attention)


def _same_episode(reset: Tensor, kept: int) -> Tensor:
    """What each step of reset (T, B) may attend to: (B, 1, T, kept + T), of ``kept`` steps of the memory first."""
    of_query = reset.t().long().cumsum(1)  # 0: the episode of the memory
    of_key = torch.nn.functional.pad(of_query, (kept, 0))
    return (of_query[:, :, None] == of_key[:, None, :]).unsqueeze(1)


class SRUpp(Leaf, Streaming, nn.Module):
    r"""A stack of SRU++ layers with the constructor, state_dict and results of ``sru.SRUpp`` (``sru`` 3.0.0-dev).

    .. math::
        Q &= W_1 X, \qquad [K; V] = W_2 Q \\
        U &= W_3\, \mathrm{LN}(\alpha\, \mathrm{Attn}(Q, K, V) + Q)

    and then the recurrence of :class:`SRU`. The attention is ``torch.nn.functional.scaled_dot_product_attention``;
    :math:`\alpha` is learned and starts at 0. Attention is causal only where ``attn_mask`` makes it so, as in the
    package. ``extend`` and ``step`` attend to all that the stream has seen and nothing later: they give what one call
    of ``forward`` gives with the causal mask (0 on and below the diagonal, minus infinity above).

    Args:
        input_size: number of features of the input.
        hidden_size: number of features of the state, for each direction.
        proj_size: number of features of the attention, of all heads together.
        num_layers: number of layers. Default: 2.
        dropout: of channels of ``r`` on every layer but the last, and of the attention's result. Default: 0.
        attn_dropout: probability that an attention weight is dropped. Default: 0.
        num_heads: number of heads. Default: 1.
        bidirectional: also run the recurrence against time. Default: ``False``.
        layer_norm: normalise each layer's input. Default: ``False``.
        normalize_after: with ``layer_norm``, normalise each layer's output and not its input. Default: ``False``.
        attn_layer_norm: with LN in the equations above. Default: ``True``.
        highway_bias: initial bias of the gate r. Default: -2.
        attention_every_n_layers: layers n, 2n, ... attend; the others have :math:`W_2\, \mathrm{LN}(W_1 X)`.
            Default: 1.
        attention_last_n_layers: the last n layers attend; not together with the former. Default: -1, do not.
        rescale: scale the skip term, as in :class:`SRU`. Default: ``False``.
        nn_rnn_compatible_return: return the state as (num_layers * directions, B, hidden_size). Default: ``False``.
        proj_input_to_hidden_first: first project the input to the size of the output. Default: ``False``.
        weight_c_init: recurrent weights start uniform in [-weight_c_init, weight_c_init]. Default: 1.
        device, dtype: of the parameters.

    Refused: ``cu_seqlens`` (give every sequence a row of its own), and streams of a bidirectional module. The streaming
    state is ``(c, mask_pad, memory)``: c (B, num_layers, hidden_size), mask_pad (B, M) true where a stream has no step,
    and a tuple of each layer's inputs (B, M, ·). It grows with the M steps seen, unless ``init_state`` is given a
    ``memory_length``.

    Source: Lei, *When attention meets fast recurrence*, 2021.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.nn.SRUpp(8, 16, proj_size=4)
        >>> output, c_n, memory = model(torch.randn(5, 3, 8))
        >>> output.shape, c_n.shape, [t.shape[2] for t in memory["saved_inputs"]]
        (torch.Size([5, 3, 16]), torch.Size([2, 3, 16]), [8, 16])
    """

    rnn_lst: nn.ModuleList
    input_to_hidden: nn.Linear | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        proj_size: int,
        num_layers: int = 2,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        num_heads: int = 1,
        bidirectional: bool = False,
        layer_norm: bool = False,
        normalize_after: bool = False,
        attn_layer_norm: bool = True,
        highway_bias: float = -2.0,
        attention_every_n_layers: int = 1,
        attention_last_n_layers: int = -1,
        rescale: bool = False,
        nn_rnn_compatible_return: bool = False,
        proj_input_to_hidden_first: bool = False,
        weight_c_init: float = 1.0,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _arguments.flags(
            "SRUpp", bidirectional=bidirectional, attn_layer_norm=attn_layer_norm,
            nn_rnn_compatible_return=nn_rnn_compatible_return, proj_input_to_hidden_first=proj_input_to_hidden_first,
        )  # fmt: skip
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "proj_size": proj_size, "num_layers": num_layers}
        for name, size in (sizes | {"num_heads": num_heads}).items():
            _arguments.integer("SRUpp", name, size)
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, but got {size}")
        _arguments.integer("SRUpp", "attention_every_n_layers", attention_every_n_layers, 1)
        _arguments.integer("SRUpp", "attention_last_n_layers", attention_last_n_layers, -1)
        for name, p in (("dropout", dropout), ("attn_dropout", attn_dropout)):
            _arguments.probability("SRUpp", name, p)
        if proj_size % num_heads:
            raise ValueError(
                f"SRUpp: expected proj_size to be a multiple of num_heads, {num_heads}, but got {proj_size}"
            )
        if attention_every_n_layers != 1 and attention_last_n_layers != -1:
            raise ValueError("SRUpp: expected attention_every_n_layers or attention_last_n_layers, but got both")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.proj_size = proj_size
        self.output_size = hidden_size * 2 if bidirectional else hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.num_directions = 2 if bidirectional else 1
        self.use_layer_norm = layer_norm
        self.nn_rnn_compatible_return = nn_rnn_compatible_return
        where = {"device": device, "dtype": dtype}
        self.input_to_hidden = None
        if proj_input_to_hidden_first and input_size != self.output_size:
            self.input_to_hidden = nn.Linear(input_size, self.output_size, bias=False, **where)
            nn.init.xavier_uniform_(self.input_to_hidden.weight)
        cells = []
        for i, inputs in enumerate(self._layer_inputs()):
            outputs = self.output_size * (3 if inputs == self.output_size else 4)
            attends = (i + 1) % attention_every_n_layers == 0
            if attention_last_n_layers != -1:
                attends = num_layers - i <= attention_last_n_layers
            transform: nn.Module
            if attends:
                transform = Attention(
                    inputs, outputs, proj_size, num_heads, dropout, float(attn_dropout), attn_layer_norm, **where
                )
            else:
                transform = Projection(inputs, outputs, proj_size, dropout, attn_layer_norm, **where)
            cells.append(
                _Cell(
                    inputs,
                    hidden_size,
                    dropout=dropout if i + 1 < num_layers else 0.0,
                    bidirectional=bidirectional,
                    highway_bias=highway_bias,
                    layer_norm=layer_norm,
                    normalize_after=normalize_after,
                    rescale=rescale,
                    weight_c_init=weight_c_init,
                    custom_m=transform,
                    **where,
                )
            )
        self.rnn_lst = nn.ModuleList(cells)

    def _layer_inputs(self) -> list[int]:
        """Features of each layer's input."""
        first = self.input_size if self.input_to_hidden is None else self.output_size
        return [first] + [self.output_size] * (self.num_layers - 1)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for layer in self.rnn_lst:
            if isinstance(layer, SRUCell):
                layer.reset_parameters()
        if self.input_to_hidden is not None:
            nn.init.xavier_uniform_(self.input_to_hidden.weight)

    def forward(
        self,
        input: Tensor | PackedSequence,
        c0: Tensor | None = None,
        mask_pad: Tensor | None = None,
        attn_mask: Tensor | None = None,
        memory: list[Tensor | None] | None = None,
        memory_mask_pad: Tensor | None = None,
        *,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor, dict[str, list[Tensor]]]:
        """Runs all layers.

        Args:
            input: (T, B, input_size), or a ``PackedSequence``.
            c0: (num_layers, B, output_size), output_size = directions * hidden_size. Default: zero.
            mask_pad: (T, B), nonzero at padding, which nothing attends to and where the state is carried over and the
                output is 0. Default: no padding.
            attn_mask: (T, M + T), added to the logits of attention. Default: zero.
            memory: for each layer further inputs (M, B, ·) that it attends to, or None. Default: none.
            memory_mask_pad: (M, B), nonzero where nothing attends. Default: all of the memory is attended to.
            reset: (T, B) bool, true where an episode begins: its steps attend to its own only, and the state before its
                first step (against time: after its last) is zero. The memory and ``c0`` belong to an episode that does
                not begin. Default: none.

        Returns:
            The output (T, B, output_size), packed if the input was; the last state (num_layers, B, output_size), or
            (num_layers * directions, B, hidden_size) with ``nn_rnn_compatible_return``; and
            ``{"saved_inputs": inputs of the layers}``, which may be the memory of the next call.

        Raises:
            TypeError, ValueError: an argument's type or shape does not fit.
        """
        if isinstance(input, PackedSequence):
            x, mask_pad = padded("SRUpp", input, mask_pad, reset)
            if memory is not None or attn_mask is not None or c0 is not None:
                raise ValueError("SRUpp: expected no c0, attn_mask and memory with a PackedSequence")
            output, c_n, inputs = self._run(x, None, mask_pad, None, None, None, None)
            c_n = c_n if input.unsorted_indices is None else c_n[:, input.unsorted_indices]
            return repacked(output, input), self._laid_out(c_n), {"saved_inputs": inputs}
        if not isinstance(input, Tensor):
            return self._instead(
                "input", input, c0=c0, mask_pad=mask_pad, attn_mask=attn_mask, memory=memory,
                memory_mask_pad=memory_mask_pad, reset=reset,
            )  # fmt: skip
        output, c_n, inputs = self._run(input, c0, mask_pad, attn_mask, memory, memory_mask_pad, reset)
        return output, self._laid_out(c_n), {"saved_inputs": inputs}

    def _laid_out(self, c_n: Tensor) -> Tensor:
        return by_direction(c_n, self.num_directions) if self.nn_rnn_compatible_return else c_n

    def _run(
        self, input: Tensor, c0: Tensor | None, mask_pad: Tensor | None, attn_mask: Tensor | None, memory: Any,
        memory_mask_pad: Tensor | None, reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """The output, the last state (num_layers, B, output_size) and the layers' inputs."""
        _arguments.optional_tensors(
            "SRUpp", c0=c0, mask_pad=mask_pad, attn_mask=attn_mask, memory_mask_pad=memory_mask_pad, reset=reset
        )
        if input.dim() != 3:
            raise ValueError(f"SRUpp: expected input to be 3-D (T, B, input_size), but got {input.dim()}-D")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        steps, batch, _ = input.shape
        if c0 is not None and tuple(c0.shape) != (self.num_layers, batch, self.output_size):
            raise ValueError(f"Expected hidden size {(self.num_layers, batch, self.output_size)}, got {list(c0.shape)}")
        check_masks("SRUpp", input, mask_pad, reset)
        kept = 0
        if memory is not None:
            kept = self._check_memory(memory, batch)
        elif memory_mask_pad is not None:
            raise ValueError("SRUpp: expected memory with memory_mask_pad")
        for name, mask, shape in (
            ("attn_mask", attn_mask, (steps, kept + steps)),
            ("memory_mask_pad", memory_mask_pad, (kept, batch)),
        ):
            if mask is not None and tuple(mask.shape) != shape:
                raise ValueError(f"SRUpp: expected {name} to have shape {shape}, but got {tuple(mask.shape)}")
        if attn_mask is not None and not attn_mask.is_floating_point():
            raise TypeError(f"SRUpp: expected attn_mask to be floating point, but got {attn_mask.dtype}")
        if memory_mask_pad is not None:
            memory_mask_pad = memory_mask_pad.to(torch.bool)
        x = input if self.input_to_hidden is None else self.input_to_hidden(input)
        episodes = None if reset is None else _same_episode(reset, kept)
        states, inputs = [], []
        for i, layer in enumerate(self.rnn_lst):
            inputs.append(x)
            x, c = layer(
                x,
                None if c0 is None else c0[i],
                mask_pad,
                reset,
                attn_mask=attn_mask,
                memory=None if memory is None else memory[i],
                memory_mask_pad=memory_mask_pad,
                episodes=episodes,
            )
            states.append(c)
        return x, torch.stack(states), inputs

    def _check_memory(self, memory: Any, batch: int) -> int:
        """How many steps it has."""
        if not isinstance(memory, (list, tuple)) or len(memory) != self.num_layers:
            raise ValueError(f"SRUpp: expected memory to be a list of {self.num_layers} tensors, one a layer")
        lengths = set()
        for i, (part, features) in enumerate(zip(memory, self._layer_inputs(), strict=True)):
            _arguments.tensor("SRUpp", f"memory[{i}]", part, optional=True)
            if part is None:
                continue
            if part.dim() != 3 or tuple(part.shape[1:]) != (batch, features):
                raise ValueError(
                    f"SRUpp: expected memory[{i}] to have shape (M, {batch}, {features}), but got {tuple(part.shape)}"
                )
            lengths.add(part.shape[0])
        if len(lengths) > 1 or (lengths and any(part is None for part in memory)):
            raise ValueError("SRUpp: expected the memories of all layers to have the same number of steps")
        return lengths.pop() if lengths else 0

    # ---- streams ----

    def _require_causal(self) -> None:
        if self.bidirectional:
            raise RuntimeError("a bidirectional SRUpp sees the future: it cannot run on a stream")

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        memory_length: int | None = None,
    ) -> State:
        """``(c, mask_pad, memory)``: c (batch_size, num_layers, hidden_size), zero, and no memory yet.

        With ``memory_length`` every step attends to itself and as many steps before it, and the state, to which ``()``
        is added, has one size from the start.
        """
        self._require_causal()
        _arguments.integer("SRUpp", "batch_size", batch_size, 0)
        if memory_length is not None:
            _arguments.integer("SRUpp", "memory_length", memory_length, 1)
        bias, length = self.rnn_lst[0].get_parameter("bias").detach(), memory_length or 0
        c = bias.new_zeros((batch_size, self.num_layers, self.hidden_size), device=device, dtype=dtype)
        memory = tuple(c.new_zeros(batch_size, length, features) for features in self._layer_inputs())
        pad = torch.ones(batch_size, length, dtype=torch.bool, device=c.device)
        return (c, pad, memory) if memory_length is None else (c, pad, memory, ())

    def _matching_state(self, state: State, first: Tensor) -> State:
        c, *_ = self.init_state(first.shape[0], device=first.device, dtype=first.dtype)
        return c, torch.ones_like(state[1]), tuple(torch.zeros_like(part) for part in state[2]), *state[3:]

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (T, B, hidden_size) for a chunk (T, B, input_size), and the state after it."""
        self._require_causal()
        _arguments.tensor("SRUpp", "x", x)
        if not isinstance(state, (tuple, list)) or len(state) not in (3, 4) or (len(state) == 4 and state[3] != ()):
            raise TypeError("SRUpp: expected state to be a tuple (c, mask_pad, memory)")
        c, pad, memory, *bounded = state
        _arguments.tensor("SRUpp", "state's c", c)
        _arguments.tensor("SRUpp", "state's mask_pad", pad)
        _arguments.states("SRUpp", "state's memory", memory, tuple(f"x_{i}" for i in range(self.num_layers)))
        if x.dim() != 3:
            raise ValueError(f"SRUpp: expected x to be 3-D (T, B, input_size), but got {x.dim()}-D")
        if c.dim() != 3 or pad.dim() != 2:
            raise ValueError(
                f"SRUpp: expected state's c and mask_pad to be 3-D and 2-D, but got {c.dim()}-D and {pad.dim()}-D"
            )
        steps, kept = x.shape[0], pad.shape[1]
        ahead = torch.arange(kept + steps, device=x.device) - torch.arange(steps, device=x.device).unsqueeze(1)
        hidden = (ahead > kept) | (ahead < 0) if bounded else ahead > kept
        mask = torch.zeros(steps, kept + steps, dtype=x.dtype, device=x.device).masked_fill(hidden, -torch.inf)
        memories = [part.transpose(0, 1) for part in memory]
        output, c_n, inputs = self._run(x, c.transpose(0, 1), None, mask, memories, pad.t(), None)
        pads = torch.cat([pad, pad.new_zeros(pad.shape[0], steps)], 1)
        grown = [torch.cat([old, new.transpose(0, 1)], 1) for old, new in zip(memory, inputs, strict=True)]
        if bounded:
            pads, *grown = (t[:, steps:].clone(memory_format=torch.contiguous_format) for t in (pads, *grown))
        c_n = c_n.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return output, (c_n, pads, tuple(grown), *bounded)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (B, hidden_size) for one step (B, input_size), and the state after it."""
        _arguments.tensor("SRUpp", "x_t", x_t)
        if x_t.dim() != 2:
            raise ValueError(f"SRUpp: expected x_t to be 2-D (B, input_size), but got {x_t.dim()}-D")
        output, state = self.extend(x_t.unsqueeze(0), state)
        return output[0], state

    def reset(self, state: State, mask: Tensor) -> State:
        self._require_causal()
        return super().reset(state, mask)
