"""One step as a module: drop-ins for torch.nn's cells."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common
from seqaccel.functional.rnn import step
from seqaccel.nn._leaf import Leaf

#: torch's names of dtypes, as its messages have them.
_TITLES = {
    torch.float64: "Double",
    torch.float32: "Float",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
}


def _check_sizes(title: str, input_size: int, hidden_size: int) -> None:
    """torch's cells take anything for ``bias``, and so do these."""
    _arguments.integer(title, "input_size", input_size, 0)
    _arguments.integer(title, "hidden_size", hidden_size, 0)


class _Cell(Leaf, torch.nn.RNNCellBase):
    @property
    def _title(self) -> str:
        return type(self).__name__

    def _step(self, cell: str, input: Tensor, hx: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        """The new state from input (B, I) or (I,) and a state of as many dimensions."""
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            hx = None if hx is None else tuple(part.unsqueeze(0) for part in hx)
        self._check(input, hx or ())
        weights: list[Tensor | None] = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        if cell == "lstm":
            weights.append(None)
        state = step(cell, input, hx, weights)
        if cell == "lstm" and input.device.type == "cpu":  # as autocast has it for torch.nn.LSTMCell
            carried = torch.promote_types(input.dtype if hx is None else hx[1].dtype, state[1].dtype)
            state = tuple(part.to(carried) for part in state)
        return state if batched else tuple(part.squeeze(0) for part in state)

    @_common.unrecorded
    def _check(self, input: Tensor, state: tuple[Tensor, ...]) -> None:
        if input.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {self.input_size}")
        for label, part in enumerate(state):
            if input.shape[0] != part.shape[0]:
                raise RuntimeError(
                    f"Input batch size {input.shape[0]} doesn't match hidden{label} batch size {part.shape[0]}"
                )
            if part.size(1) != self.hidden_size:
                raise RuntimeError(
                    f"hidden{label} has inconsistent hidden_size: got {part.shape[1]}, expected {self.hidden_size}"
                )
        dtype = self.weight_ih.dtype
        for tensor in (input, *state):
            if tensor.dtype != dtype and not _common.autocast_on(tensor.device.type):
                found, expected = (_TITLES.get(t, str(t)) for t in (tensor.dtype, dtype))
                raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {found} and {expected}")

    @_common.unrecorded
    def _check_ranks(self, input: Tensor, hx: Tensor | None) -> None:
        for name, tensor in (("input", input), ("hidden", hx)):
            if tensor is not None and tensor.dim() not in (1, 2):
                raise ValueError(f"{self._title}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")


class RNNCell(_Cell):
    r"""One step of an Elman network: torch.nn.RNNCell on our kernels.

    .. math::
        h' = \phi(W x + b + U h + b'), \qquad \phi = \tanh \text{ or } \mathrm{relu}

    Parameters, their names, initialisation and state_dict are torch.nn.RNNCell's.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: has ``bias_ih`` and ``bias_hh``. Default: ``True``.
        nonlinearity: ``"tanh"`` or ``"relu"``. Default: ``"tanh"``.
        device, dtype: of the parameters.

    Shapes: ``forward(input, hx=None)`` takes (B, I) and (B, H), or (I,) and (H,), and returns h' like hx. Without hx it
    starts at zero.

    Raises:
        ValueError, RuntimeError: what torch.nn.RNNCell raises for inputs that do not fit.

    Source: Elman, *Finding structure in time*, 1990; torch.nn.RNNCell.

    Example:
        >>> import torch, seqaccel.nn
        >>> cell = seqaccel.nn.RNNCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
        >>> cell(torch.randn(3, 10), h).shape
        torch.Size([3, 20])
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _check_sizes(self._title, input_size, hidden_size)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, input_size) and the state hx (B, hidden_size), default zero: the next state. B may be missing."""
        if not isinstance(input, Tensor):
            return self._instead("input", input, hx=hx)
        _arguments.tensor(self._title, "hx", hx, optional=True)
        self._check_ranks(input, hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(f"rnn_{self.nonlinearity}", input, None if hx is None else (hx,))[0]


class LSTMCell(_Cell):
    r"""One step of a long short-term memory: torch.nn.LSTMCell on our kernels.

    .. math::
        i, f, o &= \sigma(W_{i,f,o} x + b_{i,f,o} + U_{i,f,o} h + b'_{i,f,o}) \\
        g &= \tanh(W_g x + b_g + U_g h + b'_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Parameters, their names, initialisation and state_dict are torch.nn.LSTMCell's.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: has ``bias_ih`` and ``bias_hh``. Default: ``True``.
        device, dtype: of the parameters.

    Shapes: ``forward(input, hx=None)`` takes (B, I) and a pair of (B, H), or (I,) and a pair of (H,), and returns
    (h', c') like hx. Without hx it starts at zero.

    Raises:
        ValueError, RuntimeError: what torch.nn.LSTMCell raises for inputs that do not fit.

    Source: Hochreiter and Schmidhuber, *Long short-term memory*, 1997; torch.nn.LSTMCell.

    Example:
        >>> import torch, seqaccel.nn
        >>> cell = seqaccel.nn.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
        >>> h.shape
        torch.Size([3, 20])
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        _check_sizes(self._title, input_size, hidden_size)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input (B, input_size) and the state hx, h and c (B, hidden_size), by default zero: the next h and c. B may be
        missing."""
        if not isinstance(input, Tensor):
            return self._instead("input", input, hx=hx)
        self._check_ranks(input, None)
        if isinstance(hx, (tuple, list)) and len(hx) != 2:
            raise RuntimeError(f"lstm_cell expects two hidden states, but hx has {len(hx)}")
        if hx is not None:
            _arguments.states(self._title, "hx", hx, ("h_0", "c_0"))
        for i, value in enumerate(hx or ()):
            if value.dim() not in (1, 2):
                raise ValueError(f"{self._title}: Expected hx[{i}] to be 1D or 2D, got {value.dim()}D instead")
        h, c = self._step("lstm", input, hx)
        return h, c


class GRUCell(_Cell):
    r"""One step of a gated recurrent unit: torch.nn.GRUCell on our kernels.

    .. math::
        r, z &= \sigma(W_{r,z} x + b_{r,z} + U_{r,z} h + b'_{r,z}) \\
        n &= \tanh(W_n x + b_n + r \odot (U_n h + b'_n)) \\
        h' &= (1 - z) \odot n + z \odot h

    Parameters, their names, initialisation and state_dict are torch.nn.GRUCell's.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: has ``bias_ih`` and ``bias_hh``. Default: ``True``.
        device, dtype: of the parameters.

    Shapes: ``forward(input, hx=None)`` takes (B, I) and (B, H), or (I,) and (H,), and returns h' like hx. Without hx it
    starts at zero.

    Raises:
        ValueError, RuntimeError: what torch.nn.GRUCell raises for inputs that do not fit.

    Source: Cho et al., *Learning phrase representations using RNN encoder-decoder*, 2014; torch.nn.GRUCell.

    Example:
        >>> import torch, seqaccel.nn
        >>> cell = seqaccel.nn.GRUCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
        >>> cell(torch.randn(3, 10), h).shape
        torch.Size([3, 20])
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        _check_sizes(self._title, input_size, hidden_size)
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, input_size) and the state hx (B, hidden_size), default zero: the next state. B may be missing."""
        if not isinstance(input, Tensor):
            return self._instead("input", input, hx=hx)
        _arguments.tensor(self._title, "hx", hx, optional=True)
        self._check_ranks(input, hx)
        return self._step("gru", input, None if hx is None else (hx,))[0]
