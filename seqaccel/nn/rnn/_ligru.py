"""The light GRU: one gate, and a norm of the input's products over the whole batch of sequences."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqaccel import _arguments, _common
from seqaccel.functional.rnn import layers
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import Streaming

_NORMS: dict[str, Any] = {"batch_norm": torch.nn.BatchNorm1d, "layer_norm": torch.nn.LayerNorm}


class LiGRU(Leaf, Streaming, torch.nn.Module):
    r"""Multi-layer light gated recurrent unit.

    .. math::
        a_t, z_t &= \mathrm{norm}(W x)_t + U h_{t-1}, \qquad z_t \leftarrow \sigma(z_t) \\
        h_t &= z_t \odot h_{t-1} + (1 - z_t) \odot m \odot \phi(a_t)

    There is no reset gate. The norm is of the products of all steps at once, before the recurrence; it has gain and
    bias. Both directions of a layer share all weights. m is 1 in eval mode.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each fed with the output of the one below. Default: 1.
        bias: train the biases of the norms. Otherwise they stay 0. Default: ``True``.
        batch_first: input and output are (B, T, ·), not (T, B, ·). Default: ``False``.
        dropout: probability, in training, that a unit has m = 0 for the whole sequence; the others have 1 / (1 - p).
            One mask per sequence, layer and direction. Default: 0.
        bidirectional: also run from the last step to the first; outputs are concatenated. Default: ``False``.
        device, dtype: of the parameters.
        nonlinearity: :math:`\phi`, ``"relu"`` or ``"tanh"``. Default: ``"relu"``. Keyword only, like the next.
        normalization: ``"batch_norm"`` (torch.nn.BatchNorm1d of the 2 H products over all steps and sequences, with
            momentum 0.05) or ``"layer_norm"`` (torch.nn.LayerNorm of the products of a step). Default:
            ``"batch_norm"``.

    Parameters of layer k: ``weight_ih_l{k}`` (2 H, ·) and ``weight_hh_l{k}`` (2 H, H), the rows of a and then those of
    z; the module ``norm_l{k}``.

    Shapes, with D directions and L layers:
        - ``forward(input, hx=None, *, reset=None)``: input (T, B, I), or (B, T, I) with ``batch_first``, or (T, I)
          unbatched, or a PackedSequence, of which only the steps that are there count in the norm; hx = h_0
          (D * L, B, H), by default zero; reset (T, B) bool, laid out as the input without its features, by default
          none. Returns output (T, B, D * H) and h_n.
        - streaming: the state is (h,), (B, L, H). A bidirectional module does not stream. With batch norm a stream
          gives what ``forward`` gives in eval mode.

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.

    Source: Ravanelli, Brakel, Omologo and Bengio, *Light gated recurrent units for speech recognition*, 2018; the
    package speechbrain.

    Example:
        >>> import torch, seqaccel.nn
        >>> ligru = seqaccel.nn.LiGRU(10, 20, num_layers=2, bidirectional=True, dropout=0.15)
        >>> output, h_n = ligru(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([4, 3, 20]))
    """

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
        *,
        nonlinearity: str = "relu",
        normalization: str = "batch_norm",
    ) -> None:
        super().__init__()
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            _arguments.integer("LiGRU", name, size, 1)
        _arguments.flags("LiGRU", bias=bias, batch_first=batch_first, bidirectional=bidirectional)
        _arguments.probability("LiGRU", "dropout", dropout)
        if nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"LiGRU: expected nonlinearity to be 'relu' or 'tanh', but got {nonlinearity!r:.60}")
        if normalization not in _NORMS:
            raise ValueError(
                f"LiGRU: expected normalization to be 'batch_norm' or 'layer_norm', but got {normalization!r:.60}"
            )
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bool(bias), bool(batch_first), bool(bidirectional)
        self.dropout, self.nonlinearity, self.normalization = float(dropout), nonlinearity, normalization
        options = {"device": device, "dtype": dtype}
        for k in range(num_layers):
            features = input_size if k == 0 else hidden_size * self._directions
            for name, width in (("weight_ih", features), ("weight_hh", hidden_size)):
                self.register_parameter(
                    f"{name}_l{k}", torch.nn.Parameter(torch.empty(2 * hidden_size, width, **options))
                )
            momentum = {"momentum": 0.05} if normalization == "batch_norm" else {}
            self.add_module(f"norm_l{k}", _NORMS[normalization](2 * hidden_size, **momentum, **options))
        self.reset_parameters()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def reset_parameters(self) -> None:
        """Draws weights of the input as Glorot's uniform initialisation does, those of the state orthogonal."""
        for k in range(self.num_layers):
            torch.nn.init.xavier_uniform_(self.get_parameter(f"weight_ih_l{k}"))
            torch.nn.init.orthogonal_(self.get_parameter(f"weight_hh_l{k}"))
            norm: Any = self.get_submodule(f"norm_l{k}")
            norm.reset_parameters()
            norm.bias.requires_grad_(self.bias)

    # ---- forward ----

    def _layer(
        self, k: int, x: Tensor, h_0: Tensor | None, batch_sizes: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Layer k on (T, B, I), or packed (N, I), from (D, B, H); ``reset`` is (T, B)."""
        weight_ih, weight_hh = getattr(self, f"weight_ih_l{k}"), getattr(self, f"weight_hh_l{k}")
        norm: Any = getattr(self, f"norm_l{k}")
        if self.normalization == "batch_norm" and not norm.training:  # a gain and a bias of each product
            gain = norm.weight * (norm.running_var + norm.eps).rsqrt()
            projection = torch.nn.functional.linear(
                x, weight_ih * gain.unsqueeze(1), norm.bias - norm.running_mean * gain
            )
        else:
            projection = torch.nn.functional.linear(x, weight_ih)
            rows = projection.flatten(0, -2) if self.normalization == "batch_norm" else projection
            projection = norm(rows).view(projection.shape)
        batch = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        state: tuple[Tensor, ...] | None = None if h_0 is None else (h_0,)
        cell = f"ligru_{self.nonlinearity}"
        if self.training and self.dropout:
            ones = projection.new_ones(self._directions, batch, self.hidden_size)
            mask = torch.nn.functional.dropout(ones, self.dropout)
            cell, state = f"{cell}_masked", (torch.zeros_like(ones) if h_0 is None else h_0, mask)
        weights = [None, weight_hh, None, None]
        return layers(
            cell,
            projection,
            state,
            [weights] * self._directions,
            batch_sizes=batch_sizes,
            reset=reset,
            bidirectional=self.bidirectional,
            training=self.training,
        )

    def _run(
        self, x: Tensor, hx: Tensor | None, batch_sizes: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        D, last = self._directions, []
        for k in range(self.num_layers):
            x, (h_n, *_) = self._layer(k, x, None if hx is None else hx[k * D : (k + 1) * D], batch_sizes, reset)
            last.append(h_n)
        return x, torch.cat(last)

    @_common.unrecorded
    def _check(self, x: Tensor, hx: Tensor | None, batch: int | None) -> None:
        """``batch``: of an input with two dimensions, None for one sequence."""
        packed = batch is not None
        if x.dim() not in ((2,) if packed else (2, 3)):
            raise ValueError(f"LiGRU: Expected input to be 2D or 3D, got {x.dim()}D instead")
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        weight = self.get_parameter("weight_ih_l0")
        if x.dtype != weight.dtype and not _common.autocast_on(x.device.type):
            raise ValueError(f"LiGRU: expected input to have the parameters' dtype {weight.dtype}, but got {x.dtype}")
        if hx is None:
            return
        expected: tuple[int, ...] = (self.num_layers * self._directions, self.hidden_size)
        if packed or x.dim() == 3:
            batch = batch if batch is not None else x.shape[0 if self.batch_first else 1]
            expected = (expected[0], batch, expected[1])
        if tuple(hx.shape) != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, reset: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs all layers.

        Args:
            input: (T, B, input_size), (B, T, input_size) with ``batch_first``, (T, input_size) for one sequence, or a
                ``PackedSequence``.
            hx: the state before the first step, (layers * directions, B, hidden_size) without regard to
                ``batch_first``, and without B for one sequence. Default: zero.
            reset: bool, laid out as ``input`` without its features: True where an episode begins. The first step of
                each sees nothing of the states before, nor of ``hx``, and a second direction begins anew at the last
                step of each. Batch norm in training is over the steps of all episodes, and dropout has one mask for
                those of a row. Not with a ``PackedSequence``. Default: none.

        Returns:
            The last layer's output at every step, laid out as the input with directions * hidden_size features, packed
            if the input was; and the state after the last step, laid out as ``hx``.

        Raises:
            TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.
        """
        if isinstance(input, PackedSequence):
            if reset is not None:
                raise ValueError(
                    "LiGRU: expected reset to be None for a PackedSequence: make each episode a sequence of its own, "
                    "or give the padded input"
                )
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            return self._instead("input", input, hx=hx, reset=reset)
        _arguments.tensor("LiGRU", "hx", hx, optional=True)
        self._check(input, hx, None)
        batch_dim = 0 if self.batch_first else 1
        batched = input.dim() == 3
        if reset is not None:
            _arguments.reset("LiGRU", reset, tuple(input.shape[:-1]), input.device)
            reset = reset.unsqueeze(1) if not batched else reset.t() if self.batch_first else reset
        if not batched:
            input, hx = input.unsqueeze(batch_dim), None if hx is None else hx.unsqueeze(1)
        if input.shape[1 - batch_dim] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        output, h_n = self._run(input.transpose(0, 1) if self.batch_first else input, hx, None, reset)
        output = output.transpose(0, 1) if self.batch_first else output
        return (output, h_n) if batched else (output.squeeze(batch_dim), h_n.squeeze(1))

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        _arguments.tensor("LiGRU", "hx", hx, optional=True)
        self._check(data, hx, int(batch_sizes[0]))
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        output, h_n = self._run(data, hx, batch_sizes)
        h_n = h_n if unsorted_indices is None else h_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
            "nonlinearity": "relu", "normalization": "batch_norm",
        }  # fmt: skip
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text

    # ---- streams ----

    def _check_streams(self) -> None:
        if self.bidirectional:
            raise RuntimeError("LiGRU: a bidirectional module cannot run on a stream: it needs the end of the sequence")

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """``(h,)``, h (batch_size, num_layers, hidden_size), zero."""
        self._check_streams()
        _arguments.integer("LiGRU", "batch_size", batch_size, 0)
        weight = self.get_parameter("weight_hh_l0").detach()
        return (weight.new_zeros((batch_size, self.num_layers, self.hidden_size), device=device, dtype=dtype),)

    def extend(self, x: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output for a chunk, laid out as in ``forward``, and the state after it; a chunk may have no step."""
        self._check_streams()
        _arguments.tensor("LiGRU", "x", x)
        _arguments.states("LiGRU", "state", state, ("h",))
        if x.dim() != 3:
            raise ValueError(f"LiGRU: expected x to be a chunk of 3 dimensions, but got {x.dim()}")
        first = state[0].transpose(0, 1)
        self._check(x, first, None)
        output, last = self._run(x.transpose(0, 1) if self.batch_first else x, first)
        # A copy: as a view, dimensions of size 1 would have other strides than ``init_state`` gives them.
        last = last.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        return output.transpose(0, 1) if self.batch_first else output, (last,)

    def step(self, x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output (B, hidden_size) for one step (B, input_size), and the state after it."""
        _arguments.tensor("LiGRU", "x_t", x_t)
        if x_t.dim() != 2:
            raise ValueError(f"LiGRU: expected x_t to be one step (B, input_size), but got {x_t.dim()}-D")
        time_dim = 1 if self.batch_first else 0
        output, state = self.extend(x_t.unsqueeze(time_dim), state)
        return output.squeeze(time_dim), state
