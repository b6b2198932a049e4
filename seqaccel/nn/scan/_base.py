"""What the layers of column cells share: layers, directions, packed sequences, dropout, streams."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from seqaccel import _arguments, _common, functional
from seqaccel.functional.scan import CELLS, ColumnSpec
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.scan._packed import padded, repacked
from seqaccel.nn.streaming import State, Streaming

_MASKS: dict[str, Tensor | None] = {"mask_pad": None, "reset": None, "cu_seqlens": None}


class Columns(Leaf, Streaming, nn.Module):
    """A stack of layers of one column cell, with the constructor and the call of torch.nn.GRU. A module names the cell.

    Parameters of layer k: ``weight_ih_l{k}`` (K * H, I), ``bias_ih_l{k}`` and, where the cell has recurrent weights,
    ``weight_hh_l{k}`` (H,); with the suffix ``_reverse`` those of the other direction.
    """

    _state_name = "h"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = self._title
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            _arguments.integer(title, name, size)
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, but got {size}")
        _arguments.flags(title, bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        _arguments.probability(title, "dropout", dropout)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bool(bias)
        self.batch_first = bool(batch_first)
        self.dropout = float(dropout)
        self.bidirectional = bool(bidirectional)
        self._directions = 2 if bidirectional else 1
        spec, H = self._spec, hidden_size
        for k in range(num_layers):
            features = self._window * (input_size if k == 0 else H * self._directions)
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (spec.inputs * H, features)}
            if spec.weights:
                shapes["weight_hh"] = (spec.weights * H,)
            if bias:
                shapes["bias_ih"] = (spec.biases * H,)
            for suffix in self._suffixes:
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{k}{suffix}", parameter)
        self.reset_parameters()

    @property
    def cell(self) -> str:
        """The name of the cell (see ``seqaccel.functional.column_layer``)."""
        raise NotImplementedError

    @property
    def _spec(self) -> ColumnSpec:
        return CELLS[self.cell]

    @property
    def _title(self) -> str:
        return type(self).__name__

    @property
    def _window(self) -> int:
        """Steps of the input that a product sees."""
        return 1

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return ("", "_reverse")[: self._directions]

    def reset_parameters(self) -> None:
        """Draws weights and biases of the product as torch.nn.Linear does, from U(-1/√I, 1/√I) of its I features, and
        recurrent weights from U(-1, 1)."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                if name.startswith("weight_hh"):
                    bound = 1.0
                else:
                    bound = 1 / math.sqrt(self.get_parameter(name.replace("bias", "weight")).shape[1])
                parameter.uniform_(-bound, bound)

    # ---- forward ----

    def _weights(self, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """weight_ih, weight_hh and bias_ih of a layer, as ``column_layer`` takes them: of both directions together."""
        if not self.bidirectional:
            weight_hh = getattr(self, f"weight_hh_l{k}") if self._spec.weights else None
            return getattr(self, f"weight_ih_l{k}"), weight_hh, getattr(self, f"bias_ih_l{k}") if self.bias else None

        def both(name: str, rows: int) -> Tensor:
            pair = [getattr(self, f"{name}_l{k}{suffix}").view(rows, self.hidden_size) for suffix in self._suffixes]
            return torch.stack(pair, 1).flatten()

        weight = torch.cat([getattr(self, f"weight_ih_l{k}{suffix}") for suffix in self._suffixes])
        weight_hh = both("weight_hh", self._spec.weights) if self._spec.weights else None
        return weight, weight_hh, both("bias_ih", self._spec.biases) if self.bias else None

    def _layer(self, k: int, x: Tensor, previous: Tensor | None, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Layer k on (T, B, I); ``previous`` (B, I): the input before the first step, of a window of 2."""
        weight, weight_hh, bias = self._weights(k)
        return functional.column_layer(self.cell, x, weight, weight_hh, bias, directions=self._directions, **options)

    def _run(
        self, x: Tensor, hx: Tensor | None, masks: dict[str, Tensor | None], previous: tuple[Tensor, ...] | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """All layers on (T, B, I) from the state (layers * directions, B, H): the output, the last state, and the
        layers' inputs."""
        D = self._directions
        states: list[Tensor] = []
        inputs: list[Tensor] = []
        for k in range(self.num_layers):
            c_0 = None
            if hx is not None:
                c_0 = hx[k] if D == 1 else torch.cat([hx[2 * k], hx[2 * k + 1]], -1)
            inputs.append(x)
            x, c_n = self._layer(k, x, None if previous is None else previous[k], masks | {"c_0": c_0})
            states += c_n.split(self.hidden_size, -1) if D > 1 else [c_n]
            if self.dropout and self.training and k + 1 < self.num_layers:
                x = nn.functional.dropout(x, self.dropout)
        return x, torch.stack(states), inputs

    @_common.unrecorded
    def _check_call(self, input: Tensor, hx: Tensor | None, mask_pad: Any, reset: Any, cu_seqlens: Any) -> None:
        title, layers = self._title, self.num_layers * self._directions
        _arguments.optional_tensors(title, hx=hx, mask_pad=mask_pad, reset=reset, cu_seqlens=cu_seqlens)
        if input.dim() not in (2, 3):
            raise ValueError(f"{title}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        if mask_pad is not None:
            _arguments.mask(title, "mask_pad", mask_pad, tuple(input.shape[:-1]))
        if reset is not None:
            _arguments.reset(title, reset, tuple(input.shape[:-1]), input.device)
        if hx is None:
            return
        expected: tuple[int, ...] = (layers, self.hidden_size)
        if cu_seqlens is not None:
            expected = (layers, cu_seqlens.numel() - 1, self.hidden_size)
        elif input.dim() == 3:
            expected = (layers, input.shape[0 if self.batch_first else 1], self.hidden_size)
        if tuple(hx.shape) != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        mask_pad: Tensor | None = None,
        reset: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with ``batch_first``, (T, input_size) for one sequence, or a
                ``PackedSequence``.
            hx: the state before the first step, (layers * directions, B, hidden_size) without regard to
                ``batch_first``, and without B for one sequence. Default: zero.
            mask_pad: bool, laid out as the input without its features, true at padding, where the state is carried over
                and the output is 0. Default: no padding.
            reset: bool, laid out as ``mask_pad``, true where an episode begins: the state before its first step
                (against time: after its last) is zero, and so ``hx`` is not read where one begins at the first step.
                Default: none.
            cu_seqlens: (N + 1,) int64, ascending from 0 to T: the one sequence of the input is N sequences, one after
                the other, and ``hx`` has N in the place of B. Default: none.

        Returns:
            The last layer's output at every step, laid out as the input with directions * hidden_size features, packed
            if the input was; and the state after the last step, laid out as ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, mask_pad, reset, cu_seqlens)
        if not isinstance(input, Tensor):
            given = {"hx": hx, "mask_pad": mask_pad, "reset": reset, "cu_seqlens": cu_seqlens}
            return self._instead("input", input, **given)
        self._check_call(input, hx, mask_pad, reset, cu_seqlens)
        batched = input.dim() == 3
        masks: dict[str, Tensor | None] = {"mask_pad": mask_pad, "reset": reset}
        if not batched:
            input = input.unsqueeze(1)
            masks = {name: None if mask is None else mask.unsqueeze(1) for name, mask in masks.items()}
            hx = hx.unsqueeze(1) if hx is not None and cu_seqlens is None else hx
        elif self.batch_first:
            input = input.transpose(0, 1)
            masks = {name: None if mask is None else mask.t() for name, mask in masks.items()}
        output, h_n, _ = self._run(input, hx, masks | {"cu_seqlens": cu_seqlens})
        if not batched:
            return output.squeeze(1), h_n if cu_seqlens is not None else h_n.squeeze(1)
        return output.transpose(0, 1) if self.batch_first else output, h_n

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | None, *others: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        x, mask_pad = padded(self._title, input, *others)
        if hx is not None:
            self._check_call(x.transpose(0, 1) if self.batch_first else x, hx, None, None, None)
            hx = hx if input.sorted_indices is None else hx.index_select(1, input.sorted_indices)
        output, h_n, _ = self._run(x, hx, _MASKS | {"mask_pad": mask_pad})
        h_n = h_n if input.unsorted_indices is None else h_n.index_select(1, input.unsorted_indices)
        return repacked(output, input), h_n

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False}
        for name, default in (defaults | self._options()).items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value!r}"
        return text

    def _options(self) -> dict[str, Any]:
        """The module's own options and their defaults."""
        return {}

    # ---- streams ----

    def _check_streams(self) -> None:
        if self.bidirectional:
            raise RuntimeError(
                f"{self._title}: a bidirectional module cannot run on a stream: it needs the end of the sequence"
            )

    def _previous_sizes(self) -> list[int]:
        """Features of the inputs that a state holds beside the cells' states."""
        return []

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """``(h,)``, h (batch_size, num_layers, hidden_size), zero."""
        self._check_streams()
        _arguments.integer(self._title, "batch_size", batch_size, 0)
        weight = self.get_parameter("weight_ih_l0").detach()
        h = weight.new_zeros((batch_size, self.num_layers, self.hidden_size), device=device, dtype=dtype)
        previous = tuple(h.new_zeros(batch_size, size) for size in self._previous_sizes())
        return (h, previous) if previous else (h,)

    def _parts(self, state: State) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        sizes, name = self._previous_sizes(), self._state_name
        if not sizes:
            _arguments.states(self._title, "state", state, (name,))
            h, previous = state[0], None
        else:
            if not isinstance(state, (tuple, list)) or len(state) != 2:
                raise TypeError(f"{self._title}: expected state to be a tuple ({name}, previous inputs of the layers)")
            h, previous = state
            _arguments.tensor(self._title, f"state's {name}", h)
            _arguments.states(self._title, "state's inputs", previous, tuple(f"x_{k}" for k in range(len(sizes))))
        return h, previous

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for a chunk, laid out as in ``forward``, and the state after it; a chunk may have no step."""
        self._check_streams()
        _arguments.tensor(self._title, "x", x)
        h, previous = self._parts(state)
        if x.dim() != 3:
            raise ValueError(f"{self._title}: expected x to be a chunk of 3 dimensions, but got {x.dim()}")
        self._check_call(x, h.transpose(0, 1), None, None, None)
        x = x.transpose(0, 1) if self.batch_first else x
        output, h_n, inputs = self._run(x, h.transpose(0, 1), _MASKS, previous)
        # A copy: as a view, dimensions of size 1 would have other strides than ``init_state`` gives them.
        h_n = h_n.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        output = output.transpose(0, 1) if self.batch_first else output
        if previous is None:
            return output, (h_n,)
        last = (torch.cat([old.unsqueeze(0), given])[-1] for old, given in zip(previous, inputs, strict=True))
        return output, (h_n, tuple(last))

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Output (B, hidden_size) for one step (B, input_size), and the state after it."""
        _arguments.tensor(self._title, "x_t", x_t)
        if x_t.dim() != 2:
            raise ValueError(f"{self._title}: expected x_t to be one step (B, input_size), but got {x_t.dim()}-D")
        time_dim = 1 if self.batch_first else 0
        output, state = self.extend(x_t.unsqueeze(time_dim), state)
        return output.squeeze(time_dim), state

    def reset(self, state: State, mask: Tensor) -> State:
        self._check_streams()
        return super().reset(state, mask)
