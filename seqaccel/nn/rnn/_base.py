"""What every recurrent layer shares: layers, directions, packed sequences, dropout, streams."""

import numbers
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqaccel import _arguments, _common
from seqaccel.functional.rnn import CELLS, CellSpec, layers
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import Streaming

Hidden = Any  # h, or (h, c) where the cell has a state of its own


def _probability(name: str, value: Any) -> float:
    if not isinstance(value, numbers.Number) or isinstance(value, bool) or not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(f"{name} should be a number in range [0, 1], got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _check_constructor(
    title: str,
    input_size: Any,
    hidden_size: Any,
    num_layers: Any = 1,
    bias: Any = True,
    batch_first: Any = False,
    dropout: Any = 0.0,
    bidirectional: Any = False,
    proj_size: Any = 0,
    *_: Any,
    **__: Any,
) -> None:
    """What torch.nn.RNNBase does not look at, or not by name."""
    _arguments.integer(title, "num_layers", num_layers)
    _arguments.integer(title, "proj_size", proj_size)
    _arguments.flag(title, "bidirectional", bidirectional)
    if not isinstance(dropout, numbers.Number):
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout!r}")


def given(**options: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


class Recurrent(Leaf, Streaming, torch.nn.RNNBase):
    """A stack of layers of one cell. A module names the cell, and torch's mode with as many gates.

    The parameters are looked up by name at each call, so that parametrizations, weight tying and
    ``torch.func.functional_call`` reach them.
    """

    # Of the class, for modules that ``seqaccel.convert`` made out of torch's.
    zoneout: Any = 0.0
    recurrent_dropout: float = 0.0
    forget_bias: float | None = None

    def __init__(
        self,
        mode: str,
        *args: Any,
        zoneout: Any = 0.0,
        recurrent_dropout: float = 0.0,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(zoneout, (tuple, list)) and self._spec.has_cell_state and len(zoneout) == 2:
            self.zoneout = tuple(_probability("zoneout", value) for value in zoneout)
        else:
            self.zoneout = _probability("zoneout", zoneout)
        self.recurrent_dropout = _probability("recurrent_dropout", recurrent_dropout)
        if forget_bias is not None:
            _arguments.number(self._title, "forget_bias", forget_bias)
        self.forget_bias = None if forget_bias is None else float(forget_bias)
        _check_constructor(self._title, *args, **kwargs)
        super().__init__(mode, *args, **kwargs)
        if self.proj_size and not self._spec.projects:
            raise ValueError(f"{self._title}: proj_size is not supported")
        if forget_bias is not None and not self.bias:
            raise ValueError(f"{self._title}: forget_bias needs bias=True")
        self._add_weights()

    @property
    def cell(self) -> str:
        """The name of the cell (see ``seqaccel.functional.rnn``)."""
        raise NotImplementedError

    @property
    def _spec(self) -> CellSpec:
        return CELLS[self.cell]

    @property
    def _title(self) -> str:
        return type(self).__name__

    # ---- parameters ----

    def _own_weights(self) -> list[str]:
        """Names of the weights that torch's layers do not have."""
        return [name for name in self._spec.extra if name != "weight_hr"]

    def _add_weights(self) -> None:
        names = self._own_weights()
        if not names:
            return
        directions = 2 if self.bidirectional else 1
        for index, layer_names in enumerate(self._all_weights):
            first = getattr(self, layer_names[0])
            sizes = {"G": first.shape[0], "I": first.shape[1], "H": self.hidden_size, "3": 3}
            for name in names:
                shape = [sizes[letter] for letter in self._spec.extra[name]]
                full = f"{name}_l{index // directions}{'_reverse' if index % directions else ''}"
                setattr(self, full, torch.nn.Parameter(torch.empty(shape, device=first.device, dtype=first.dtype)))
                layer_names.append(full)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters from U(-1/√H, 1/√H); gains of layer norms are 1 and their biases 0."""
        super().reset_parameters()
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("ln_"):
                    parameter.fill_(0 if "bias" in name else 1)
                elif self.forget_bias is not None and name.startswith("bias"):
                    forget = slice(self.hidden_size, 2 * self.hidden_size)
                    parameter[forget] = self.forget_bias if name.startswith("bias_ih") else 0

    def _layer_weights(self, index: int) -> list[Tensor | None]:
        """The weights of one layer and direction, in the cell's order."""
        own, listed = self._parameters, self._flat_weights
        count = len(listed) // len(self._all_weights)
        first = i = index * count
        written = False
        weights: list[Tensor | None] = []
        for name in self._all_weights[index]:  # a comprehension would be a frame of its own, 3 us behind a kernel
            weight = own[name] if name in own else getattr(self, name)
            if i < first + count and listed[i] is not weight:
                written = True
            weights.append(weight)
            i += 1
        if written:
            self._put_listed(weights, first, count)
        if not self.bias:
            weights[2:2] = [None, None]
        if self._spec.projects and not self.proj_size:
            weights.insert(4, None)
        return weights

    def _put_listed(self, weights: list[Tensor | None], first: int, count: int) -> None:
        """As torch.nn.RNNBase has it: what ``_flat_weights`` was given holds, unless the weight of that name has been
        exchanged since."""
        listed, known = self._flat_weights, self._flat_weight_refs
        for i in range(min(count, len(known) - first)):
            given, weight = listed[first + i], known[first + i]
            if given is not None and weight is not None and weight() is weights[i]:
                weights[i] = given

    # ---- forward ----

    def _run(
        self,
        input: Tensor,
        state: tuple[Tensor, ...] | None,
        batch_sizes: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers on input (T, B, I), or (N, I) packed with ``batch_sizes``; a state is (h,) or (h, c), each
        (layers * directions, B, ·); ``reset`` is (T, B)."""
        return layers(
            self.cell,
            input,
            state,
            [self._layer_weights(index) for index in range(len(self._all_weights))],
            batch_sizes=batch_sizes,
            reset=reset,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            recurrent_dropout=self.recurrent_dropout,
            zoneout=self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout, self.zoneout),
            training=self.training,
        )

    def _hidden(self, state: tuple[Tensor, ...]) -> Hidden:
        return state if len(state) > 1 else state[0]

    def _state(self, hx: Hidden | None) -> tuple[Tensor, ...] | None:
        return hx if hx is None or self._spec.has_cell_state else (hx,)

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        layers, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return layers, batch, self.hidden_size

    @_common.unrecorded
    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        if input.dtype != self._flat_weights[0].dtype:  # type: ignore[union-attr]
            self._update_flat_weights()
        super().check_input(input, batch_sizes)

    @_common.unrecorded
    def check_forward_args(self, input: Tensor, hidden: Hidden, batch_sizes: Tensor | None) -> None:
        if not self._spec.has_cell_state:
            super().check_forward_args(input, hidden, batch_sizes)
            return
        self.check_input(input, batch_sizes)
        self.check_hidden_size(
            hidden[0], self.get_expected_hidden_size(input, batch_sizes), "Expected hidden[0] size {}, got {}"
        )
        self.check_hidden_size(
            hidden[1], self.get_expected_cell_size(input, batch_sizes), "Expected hidden[1] size {}, got {}"
        )

    def permute_hidden(self, hx: Hidden, permutation: Tensor | None) -> Hidden:
        if permutation is None:
            return hx
        if not self._spec.has_cell_state:
            return hx.index_select(1, permutation)
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def _check_ranks(self, hx: Hidden, batched: bool) -> None:
        expected, kind = (3, "batched") if batched else (2, "unbatched")
        if self._spec.has_cell_state:
            if hx[0].dim() != expected or hx[1].dim() != expected:
                raise RuntimeError(
                    f"For {kind} {expected}-D input, hx and cx should also be {expected}-D "
                    f"but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
        elif hx.dim() != expected:
            raise RuntimeError(
                f"For {kind} {expected}-D input, hx should also be {expected}-D but got {hx.dim()}-D tensor"
            )

    def _check_hidden(self, hx: Hidden) -> None:
        """The tensors of a state, as torch.nn has them."""
        if not self._spec.has_cell_state:
            _arguments.tensor(self._title, "hx", hx)
        elif not isinstance(hx, (tuple, list)):
            _arguments.states(self._title, "hx", hx, ("h_0", "c_0"))
        elif len(hx) != 2:
            raise RuntimeError(f"lstm expects two hidden states, but hx has {len(hx)}")
        else:
            for i, part in enumerate(hx):
                _arguments.tensor(self._title, f"hx[{i}]", part)

    @_common.unrecorded
    def _check_call(self, input: Tensor, hx: Hidden | None) -> None:
        """Of a padded input, in torch.nn's words."""
        if input.dim() not in (2, 3):
            tensor = "tensor " if self._title == "RNN" else ""
            raise ValueError(f"{self._title}: Expected input to be 2D or 3D, got {input.dim()}D {tensor}instead")
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        if hx is None:
            self.check_input(input, None)
        else:
            self._check_hidden(hx)
            self._check_ranks(hx, batched)
            if not batched:
                hx = self._hidden(tuple(part.unsqueeze(1) for part in self._state(hx)))  # type: ignore[union-attr]
            self.check_forward_args(input, hx, None)
        if input.shape[1 - batch_dim] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def forward(
        self, input: Tensor | PackedSequence, hx: Hidden | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Hidden]:
        """Runs all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with ``batch_first``, (T, input_size) for one sequence, or a
                ``PackedSequence``.
            hx: the state before the first step, (layers * directions, B, ·) without regard to ``batch_first``, and
                without B for one sequence: h_0, or the pair (h_0, c_0) for a cell with a cell state. Default: zero.
            reset: bool, laid out as ``input`` without its features: True where an episode begins. Outputs and gradients
                are those of the episodes run apart: the first step of each sees nothing of the steps before, nor of
                ``hx``, and a second direction begins anew at the last step of each. Not with a ``PackedSequence``.
                Default: none.

        Returns:
            The last layer's output at every step, laid out as the input with directions * H features (H is
            ``proj_size`` where there is a projection, else ``hidden_size``), packed if the input was; and the state
            after the last step, laid out as ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.
        """
        if type(input) is not Tensor:
            if isinstance(input, PackedSequence):
                if reset is not None:
                    raise ValueError(
                        f"{self._title}: expected reset to be None for a PackedSequence: make each episode a sequence "
                        "of its own, or give the padded input"
                    )
                return self._forward_packed(input, hx)
            if not isinstance(input, Tensor):
                return self._instead("input", input, hx=hx, reset=reset)
        if (
            hx is not None
            or torch.jit.is_tracing()
            or input.dim() != 3
            or input.size(2) != self.input_size
            or input.size(1 if self.batch_first else 0) == 0
            or input.dtype is not self._flat_weights[0].dtype  # type: ignore[union-attr]
        ):
            self._check_call(input, hx)
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        state = self._state(hx)
        if reset is not None:
            _arguments.reset(self._title, reset, tuple(input.shape[:-1]), input.device)
            if not batched:
                reset = reset.unsqueeze(1)
            elif self.batch_first:
                reset = reset.transpose(0, 1)
        if not batched:
            input = input.unsqueeze(batch_dim)
            state = None if state is None else tuple(part.unsqueeze(1) for part in state)
        output, last = self._run(input.transpose(0, 1) if self.batch_first else input, state, None, reset)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            return output.squeeze(batch_dim), self._hidden(tuple(part.squeeze(1) for part in last))
        return output, self._hidden(last)

    def _forward_packed(self, input: PackedSequence, hx: Hidden | None) -> tuple[PackedSequence, Hidden]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is None:
            self.check_input(data, batch_sizes)
        else:
            self._check_hidden(hx)
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_forward_args(data, hx, batch_sizes)
        output, last = self._run(data, self._state(hx), batch_sizes)
        return (
            PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices),
            self.permute_hidden(self._hidden(last), unsorted_indices),
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.zoneout:
            text += f", zoneout={self.zoneout}"
        if self.recurrent_dropout:
            text += f", recurrent_dropout={self.recurrent_dropout}"
        if self.forget_bias is not None:
            text += f", forget_bias={self.forget_bias}"
        return text

    # ---- streams ----

    def _check_streams(self) -> None:
        if self.bidirectional:
            raise RuntimeError(
                f"{self._title}: a bidirectional module cannot run on a stream: it needs the end of the sequence"
            )

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """``(h,)`` or, for a cell with a state of its own, ``(h, c)``, each (batch_size, num_layers, ·), zero."""
        self._check_streams()
        _arguments.integer(self._title, "batch_size", batch_size, 0)
        weight = getattr(self, self._all_weights[0][0])
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self._spec.has_cell_state else 1]
        return tuple(
            torch.zeros(batch_size, self.num_layers, width, device=device or weight.device, dtype=dtype or weight.dtype)
            for width in widths
        )

    def extend(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output for a chunk, laid out as in ``forward``, and the state after it; a chunk may have no step."""
        self._check_streams()
        _arguments.tensor(self._title, "x", x)
        _arguments.states(self._title, "state", state, ("h", "c") if self._spec.has_cell_state else ("h",))
        if x.dim() != 3:
            raise ValueError(f"{self._title}: expected x to be a chunk of 3 dimensions, but got {x.dim()}")
        first = tuple(part.transpose(0, 1) for part in state)
        self.check_forward_args(x, self._hidden(first), None)
        output, last = self._run(x.transpose(0, 1) if self.batch_first else x, first)
        # Copies: as views, dimensions of size 1 would have other strides than ``init_state`` gives them.
        state = tuple(part.transpose(0, 1).clone(memory_format=torch.contiguous_format) for part in last)
        return output.transpose(0, 1) if self.batch_first else output, state

    def step(self, x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output (B, ·) for one step (B, input_size), and the state after it."""
        _arguments.tensor(self._title, "x_t", x_t)
        if x_t.dim() != 2:
            raise ValueError(f"{self._title}: expected x_t to be one step (B, input_size), but got {x_t.dim()}-D")
        time_dim = 1 if self.batch_first else 0
        output, state = self.extend(x_t.unsqueeze(time_dim), state)
        return output.squeeze(time_dim), state
