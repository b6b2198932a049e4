"""The closed-form continuous-time network."""

from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common
from seqaccel.functional import cfc
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import Streaming

_MODES = ("default", "no_gate", "pure")


class _LeCunTanh(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(0.666 * x)


_ACTIVATIONS: dict[str, Any] = {"lecun_tanh": _LeCunTanh, "tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}


def run_cell(
    cell: Any, activation: str, x: Tensor, h_0: Tensor | None, timespans: Tensor | None, reset: Tensor | None = None
) -> Tensor:
    """Outputs (T, B, H) of x (T, B, I), by the parts of a cell that are named as those of :class:`CfCCell`."""
    pure = cell.mode == "pure"
    heads = [cell.ff1] if pure else [cell.ff1, cell.ff2, cell.time_a, cell.time_b]
    layers = [layer for layer in cell.backbone or () if isinstance(layer, torch.nn.Linear)]
    matrices: list[tuple[Tensor, Tensor]] = [(layer.weight, layer.bias) for layer in layers]
    matrices.append((torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads])))
    (first, bias), *rest = matrices
    inputs = x.shape[-1]
    drive = torch.nn.functional.linear(x, first[:, :inputs], bias)
    return cfc(
        drive, h_0, [first[:, inputs:], *(weight for weight, _ in rest)], [bias for _, bias in rest], timespans,
        mode=cell.mode, activation=activation, reset=reset,
        w_tau=cell.w_tau.view(-1) if pure else None, A=cell.A.view(-1) if pure else None,
    )  # fmt: skip


class CfCCell(Leaf, torch.nn.Module):
    r"""One step of a closed-form continuous-time network.

    .. math::
        v &= \text{backbone}([x; h]) \\
        f, g, \tau &= \tanh(W_f v + b_f),\ \tanh(W_g v + b_g),\ \sigma(s\,(W_a v + b_a) + W_b v + b_b) \\
        h' &= (1 - \tau) \odot f + \tau \odot g

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        mode: ``"default"``; ``"no_gate"``: :math:`h' = f + \tau \odot g`; ``"pure"``:
            :math:`h' = A - A \exp(-s (|w_\tau| + |f|))\, f` with :math:`f = W_f v + b_f`. Default: ``"default"``.
        activation: of the backbone, ``"lecun_tanh"``, ``"tanh"`` or ``"relu"``. Default: ``"lecun_tanh"``.
        backbone_units: features of each of its layers. Default: 128.
        backbone_layers: their number, at most 7; 0: v is [x; h]. Default: 1.
        device, dtype: of the parameters.

    Parameters have the names of the package ncps: ``backbone.0`` …, ``ff1``, ``ff2``, ``time_a`` and ``time_b``, and
    ``w_tau`` and ``A`` (1, H) of the pure solution.

    Shapes: ``forward(input, hx=None, timespans=None)`` takes (B, I), (B, H) and s (B,), or (I,), (H,) and a scalar, and
    returns h' like hx. Without hx it starts at zero; without timespans s is 1.

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.

    Source: Hasani et al., *Closed-form continuous-time neural networks*, 2022, and their package ncps.

    Example:
        >>> import torch, seqaccel.nn
        >>> cell = seqaccel.nn.CfCCell(10, 20)
        >>> h = cell(torch.randn(3, 10))
        >>> cell(torch.randn(3, 10), h, timespans=torch.tensor([0.5, 1.0, 2.0])).shape
        torch.Size([3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mode: str = "default",
        activation: str = "lecun_tanh",
        backbone_units: int = 128,
        backbone_layers: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            _arguments.integer(title, name, size, 1)
        _arguments.integer(title, "backbone_layers", backbone_layers, 0)
        if backbone_layers > 7:
            raise ValueError(f"{title}: expected backbone_layers to be at most 7, but got {backbone_layers}")
        _arguments.integer(title, "backbone_units", backbone_units, 1)
        for name, value, known in (("mode", mode, _MODES), ("activation", activation, tuple(_ACTIVATIONS))):
            if value not in known:
                raise ValueError(f"{title}: expected {name} to be one of {', '.join(known)}, but got {value!r:.60}")
        self.input_size, self.hidden_size, self.mode, self.activation = input_size, hidden_size, mode, activation
        options = {"device": device, "dtype": dtype}
        layers: list[torch.nn.Module] = []
        width = input_size + hidden_size
        for _ in range(backbone_layers):
            layers += [torch.nn.Linear(width, backbone_units, **options), _ACTIVATIONS[activation]()]
            width = backbone_units
        self.backbone = torch.nn.Sequential(*layers) if layers else None
        self.ff1 = torch.nn.Linear(width, hidden_size, **options)
        if mode == "pure":
            self.w_tau = torch.nn.Parameter(torch.empty(1, hidden_size, **options))
            self.A = torch.nn.Parameter(torch.empty(1, hidden_size, **options))
        else:
            self.ff2, self.time_a, self.time_b = (torch.nn.Linear(width, hidden_size, **options) for _ in range(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights as Glorot's uniform initialisation does, and biases as torch.nn.Linear; A as the weights, and
        w_tau too."""
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                module.reset_parameters()
        for parameter in self.parameters():
            if parameter.dim() == 2:
                torch.nn.init.xavier_uniform_(parameter)

    def forward(self, input: Tensor, hx: Tensor | None = None, timespans: Tensor | None = None) -> Tensor:
        """input (B, input_size), the state hx (B, hidden_size), by default zero, and timespans (B,), by default 1: the
        next state. B may be missing."""
        if not isinstance(input, Tensor):
            return self._instead("input", input, hx=hx, timespans=timespans)
        _arguments.optional_tensors("CfCCell", hx=hx, timespans=timespans)
        if input.dim() not in (1, 2) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"CfCCell: expected input to have shape (B, {self.input_size}), but got {tuple(input.shape)}"
            )
        for name, tensor, shape in (
            ("hx", hx, (*input.shape[:-1], self.hidden_size)),
            ("timespans", timespans, tuple(input.shape[:-1])),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"CfCCell: expected {name} to have shape {shape}, but got {tuple(tensor.shape)}")
        x = input.view(1, -1, self.input_size) if input.dim() == 1 else input.unsqueeze(0)
        h_0 = hx if hx is None else hx.reshape(-1, self.hidden_size)
        spans = timespans if timespans is None else timespans.reshape(1, -1)
        return run_cell(self, self.activation, x, h_0, spans)[0].view(*input.shape[:-1], self.hidden_size)

    #: All steps of a sequence, by the parts of this cell or of one with the same names.
    run = staticmethod(run_cell)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        text += f", mode={self.mode!r}" if self.mode != "default" else ""
        return text + (f", activation={self.activation!r}" if self.activation != "lecun_tanh" else "")


class CfC(Leaf, Streaming, torch.nn.Module):
    r"""A closed-form continuous-time network: :class:`CfCCell` over a sequence whose steps may take any time.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        mode, activation, backbone_units, backbone_layers: see :class:`CfCCell`.
        batch_first: input and output are (B, T, ·), not (T, B, ·). Default: ``False``. (ncps's default is ``True``.)
        device, dtype: of the parameters.

    Parameters: those of :class:`CfCCell` as ``rnn_cell``, so that a state_dict of ``ncps.torch.CfC`` fits.

    Shapes:
        - ``forward(input, hx=None, timespans=None, *, reset=None)``: input (T, B, I), or (B, T, I) with
          ``batch_first``, or (T, I) for one sequence; hx (B, H), or (H,), by default zero; timespans (T, B), laid out
          as the input without its features, by default 1; reset (T, B) bool, laid out as timespans: an episode begins
          at each True, from a state of zero, by default none. Returns output, laid out as the input with H features,
          and the last state like hx.
        - streaming: the state is (h,), (B, H). ``extend`` and ``step`` take timespans too.

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.

    Source: Hasani et al., *Closed-form continuous-time neural networks*, 2022, and their package ncps.

    Example:
        >>> import torch, seqaccel.nn
        >>> cfc = seqaccel.nn.CfC(10, 20, backbone_units=32)
        >>> output, h_n = cfc(torch.randn(5, 3, 10), timespans=torch.rand(5, 3))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        mode: str = "default",
        activation: str = "lecun_tanh",
        backbone_units: int = 128,
        backbone_layers: int = 1,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        _arguments.flag("CfC", "batch_first", batch_first)
        self.batch_first = bool(batch_first)
        self.rnn_cell = CfCCell(
            input_size, hidden_size, mode, activation, backbone_units, backbone_layers, device, dtype
        )

    @_common.unrecorded
    def _check(self, input: Tensor, hx: Tensor | None, timespans: Tensor | None) -> None:
        cell = self.rnn_cell
        _arguments.optional_tensors("CfC", hx=hx, timespans=timespans)
        if input.dim() not in (2, 3):
            raise ValueError(f"CfC: expected input to be 2D or 3D, but got {input.dim()}D")
        if input.shape[-1] != cell.input_size:
            raise ValueError(f"CfC: expected input to have {cell.input_size} features, but got {input.shape[-1]}")
        batch = (input.shape[0 if self.batch_first else 1],) if input.dim() == 3 else ()
        for name, tensor, shape in (
            ("hx", hx, (*batch, cell.hidden_size)),
            ("timespans", timespans, tuple(input.shape[:-1])),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"CfC: expected {name} to have shape {shape}, but got {tuple(tensor.shape)}")

    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        timespans: Tensor | None = None,
        *,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """All steps: the output, and the state after the last one. See the class."""
        if not isinstance(input, Tensor):
            return self._instead("input", input, hx=hx, timespans=timespans, reset=reset)
        self._check(input, hx, timespans)
        if reset is not None:
            _arguments.reset("CfC", reset, tuple(input.shape[:-1]), input.device)
        if input.dim() == 2:
            output, h_n = self._run(
                input.unsqueeze(1), hx if hx is None else hx.unsqueeze(0),
                timespans if timespans is None else timespans.unsqueeze(1),
                reset if reset is None else reset.unsqueeze(1),
            )  # fmt: skip
            return output.squeeze(1), h_n.squeeze(0)
        if not self.batch_first:
            return self._run(input, hx, timespans, reset)
        of_steps = (t if t is None else t.t() for t in (timespans, reset))
        output, h_n = self._run(input.transpose(0, 1), hx, *of_steps)
        return output.transpose(0, 1), h_n

    def _run(
        self, x: Tensor, hx: Tensor | None, timespans: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        output = run_cell(self.rnn_cell, self.rnn_cell.activation, x, hx, timespans, reset)
        if output.shape[0] == 0:
            return output, x.new_zeros(x.shape[1], self.rnn_cell.hidden_size) if hx is None else hx
        return output, output[-1]

    def extra_repr(self) -> str:
        return "batch_first=True" if self.batch_first else ""

    # ---- streams ----

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        """``(h,)``, h (batch_size, hidden_size), zero."""
        _arguments.integer("CfC", "batch_size", batch_size, 0)
        weight = self.rnn_cell.ff1.weight.detach()
        return (weight.new_zeros((batch_size, self.rnn_cell.hidden_size), device=device, dtype=dtype),)

    def extend(
        self, x: Tensor, state: tuple[Tensor, ...], timespans: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output for a chunk, laid out as in ``forward``, and the state after it; a chunk may have no step."""
        _arguments.tensor("CfC", "x", x)
        _arguments.states("CfC", "state", state, ("h",))
        if x.dim() != 3:
            raise ValueError(f"CfC: expected x to be a chunk of 3 dimensions, but got {x.dim()}")
        output, h_n = self.forward(x, state[0], timespans)
        return output, (h_n.clone(),)

    def step(
        self, x_t: Tensor, state: tuple[Tensor, ...], timespans: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output (B, hidden_size) for one step (B, input_size), and the state after it."""
        _arguments.tensor("CfC", "x_t", x_t)
        _arguments.states("CfC", "state", state, ("h",))
        h = self.rnn_cell(x_t, state[0], timespans)
        return h, (h.clone(),)
