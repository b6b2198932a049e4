"""The temporal convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _WeightNorm, weight_norm

from seqaccel import _arguments
from seqaccel.functional.conv import ACTIVATIONS, GATED, activate, last_steps, temporal_block
from seqaccel.nn.checkpoints import Checkpoints
from seqaccel.nn.conv._base import ConvStream, check_chunk
from seqaccel.nn.conv._causal import CausalConv1d, is_only_forward, is_plain
from seqaccel.nn.streaming import State, step_at_once

__all__ = ["TCN", "TemporalBlock"]

NORMS = ("weight_norm", None)


def _one_of(title: str, name: str, value: Any, known: tuple[Any, ...]) -> None:
    if not any(value is one or (type(value) is type(one) and value == one) for one in known):
        raise ValueError(f"{title}: expected {name} to be one of {known}, but got {value!r}")


def _check_block(title: str, activation: Any, use_norm: Any, use_gate: Any) -> None:
    _one_of(title, "activation", activation, tuple(a for a in ACTIVATIONS if a is not None and a not in GATED))
    _one_of(title, "use_norm", use_norm, NORMS)
    _arguments.flag(title, "use_gate", use_gate)


def _weight(conv: CausalConv1d) -> tuple[Tensor, Tensor | None]:
    """v and g of the weight where only weight norm by output channels makes it from them; else the weight and None."""
    applied: Any = conv._modules.get("parametrizations")
    if applied is None or "weight" not in applied or parametrize._cache_enabled:
        return conv.weight, None
    parts = applied["weight"]
    norm = parts[0]
    if len(parts) > 1 or type(norm) is not _WeightNorm or norm.dim != 0 or not is_only_forward(norm):
        return conv.weight, None
    return parts.original1, parts.original0


class TemporalBlock(ConvStream):
    r"""One level of a :class:`TCN`.

    .. math::
        z &= \mathrm{dropout}(\varphi(W_1 * x + b_1)) \\
        y &= \varphi(x' + \mathrm{dropout}(\varphi(W_2 * z + b_2)))

    with causal dilated convolutions, weights W = g·v/‖v‖ (the norm over each output channel), φ relu, and x' = x, or
    its 1×1 convolution ``downsample`` where the numbers of channels differ. The operator is
    :func:`seqaccel.functional.temporal_block`. A convolution of the block that has a hook, was replaced or has other
    options than the constructor's runs as a module of its own.

    Args:
        in_channels, out_channels: numbers of channels.
        kernel_size: taps of both convolutions.
        dilation: of both.
        dropout: probability, in training. Default: 0.2
        activation: φ, one of :func:`~seqaccel.functional.causal_conv1d`'s that keep the channels. Default: "relu"
        use_norm: ``"weight_norm"``, or None: W is a parameter. Default: "weight_norm"
        use_gate: W_1 has twice the outputs, and a gated linear unit takes the place of its φ. Default: False

    State: ``(history of conv1, history of conv2)``.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> block = snn.TemporalBlock(4, 8, kernel_size=3, dilation=2)
        >>> block(torch.randn(2, 4, 10)).shape
        torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int,
        dropout: float = 0.2,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "relu",
        use_norm: str | None = "weight_norm",
        use_gate: bool = False,
    ) -> None:
        super().__init__()
        _check_block("TemporalBlock", activation, use_norm, use_gate)
        self.activation, self.use_norm, self.use_gate = activation, use_norm, use_gate
        options: dict[str, Any] = {"dilation": dilation, "device": device, "dtype": dtype}
        first, first_outputs = ("glu", 2 * out_channels) if use_gate else (activation, out_channels)
        self.conv1 = CausalConv1d(in_channels, first_outputs, kernel_size, activation=first, **options)
        self.conv2 = CausalConv1d(out_channels, out_channels, kernel_size, activation=activation, **options)
        if use_norm == "weight_norm":
            weight_norm(self.conv1)
            weight_norm(self.conv2)
        self.downsample = (
            CausalConv1d(in_channels, out_channels, 1, device=device, dtype=dtype)
            if in_channels != out_channels
            else None
        )
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter as torch.nn.Conv1d does, but the weight of ``downsample`` from N(0, 0.01²).

        That is what locuslab's code does in effect: it overwrites ``conv1.weight`` and ``conv2.weight`` too, but those
        are recomputed from g and v, which it leaves alone.
        """
        self.conv1.reset_parameters()
        self.conv2.reset_parameters()
        if self.downsample is not None:
            self.downsample.reset_parameters()
            nn.init.normal_(self.downsample.weight, 0.0, 0.01)

    def forward(self, x: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """x (B, C, T): y (B, O, T).

        ``reset`` (B, T) bool: an episode begins where it is true, and sees no step before.
        """
        if not isinstance(x, Tensor):
            return self._instead("x", x, reset=reset)
        y = self._at_once(x, reset)
        return self._run(x, None, None, reset)[1] if y is None else y

    def _at_once(self, x: Tensor, reset: Tensor | None) -> Tensor | None:
        """y by one operator, or None where a convolution does anything beside what the constructor gave it."""
        conv1, conv2, down = self.conv1, self.conv2, self.downsample
        if (
            x.dim() != 3
            or not is_plain(conv1, "glu" if self.use_gate else self.activation)
            or not is_plain(conv2, self.activation)
            or conv1.dilation != conv2.dilation
            or not (down is None or (is_plain(down, None) and down.kernel_size == 1))
        ):
            return None
        weight_1, g_1 = _weight(conv1)
        weight_2, g_2 = _weight(conv2)
        return temporal_block(
            x,
            weight_1,
            conv1.bias,
            weight_2,
            conv2.bias,
            None if down is None else down.weight,
            None if down is None else down.bias,
            g_1=g_1,
            g_2=g_2,
            dilation=conv1.dilation,
            activation=self.activation,
            use_gate=self.use_gate,
            dropout=self.dropout if self.training else 0.0,
            reset=reset,
        )

    def _run(
        self,
        x: Tensor,
        history1: Tensor | None,
        history2: Tensor | None,
        reset: Tensor | None,
        skip: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """z, y and, with ``skip``, what is added to x'."""
        options: dict[str, Any] = {"dropout": self.dropout if self.training else 0.0}
        if reset is not None:  # what stands for a convolution may not know it
            options["reset"] = reset
        z = self.conv1(x, initial_state=history1, **options)
        residual = x if self.downsample is None else self.downsample(x)
        if skip or self.activation != "relu":
            added = self.conv2(z, initial_state=history2, **options)
            return z, activate(residual + added, self.activation), added
        y = self.conv2(
            z,
            residual=residual,
            output_activation="relu",
            initial_state=history2,
            **options,
        )
        return z, y, None

    def _with_history(self) -> Sequence[CausalConv1d]:
        return self.conv1, self.conv2

    def extend(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """x (B, C, T): y (B, O, T) and the state after it; ``reset`` as in ``forward``."""
        check_chunk(self, x, state, "history of conv1", "history of conv2", reset=reset)
        y, _, state = self._extend(x, state, reset, False)
        return y, state

    def _extend(self, x: Tensor, state: State, reset: Tensor | None, skip: bool) -> tuple[Tensor, Tensor | None, State]:
        z, y, added = self._run(x, state[0], state[1], reset, skip)
        return y, added, (last_steps(state[0], x, reset), last_steps(state[1], z, reset))

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, C): y_t (B, O) and the state after it."""
        return step_at_once(self, x_t, state) or self._step(x_t, state, 2)


class TCN(Checkpoints, ConvStream):
    r"""Temporal convolutional network: a stack of :class:`TemporalBlock`, level i with dilation 2^i by default.

    Constructor, forward and checkpoints of locuslab's ``TemporalConvNet``: its state_dict loads, with old-style weight
    norm (``weight_g``, ``weight_v``) or torch's parametrizations, with or without its duplicates
    ``network.{i}.net.0.*`` (conv1) and ``network.{i}.net.4.*`` (conv2). The keyword-only options are those of the
    package ``pytorch-tcn`` (whose defaults of ``kernel_size`` and ``dropout`` are 4 and 0.1). Its state_dict loads
    too.

    Args:
        num_inputs: input channels.
        num_channels: output channels of each level.
        kernel_size: taps of every convolution. Default: 2
        dropout: probability, in training. Default: 0.2
        device, dtype: of the parameters.
        dilations: one per level. Default: 2^i
        dilation_reset: the dilations start at 1 again after this one, a power of two. Default: None, never
        causal: True; a network that is not causal is refused.
        use_norm, activation, use_gate: those of :class:`TemporalBlock`. Default: "weight_norm", "relu", False
        use_skip_connections: the output is the activation of the last level's y plus what every other level adds to its
            residual, by a 1×1 convolution where the numbers of channels differ. Default: False
        input_shape: ``"NCL"``, or ``"NLC"``: x and y are (B, T, channels). Default: "NCL"
        output_projection: channels of a last 1×1 convolution. Default: None, there is none
        output_activation: after it; one of :func:`~seqaccel.functional.causal_conv1d`'s. Default: None

    Attributes:
        network: ``torch.nn.Sequential`` of the blocks. Parameters of level i: ``network.{i}.conv{1,2}.bias``,
            ``network.{i}.conv{1,2}.parametrizations.weight.original{0,1}`` (g and v) and
            ``network.{i}.downsample.{weight,bias}``.
        receptive_field: time steps that an output sees, itself included.

    Shape: x (B, num_inputs, T); output (B, num_channels[-1], T), or with ``output_projection`` so many channels.
    State of B streams: a tuple of the blocks' states.

    Source: Bai, Kolter, Koltun, An Empirical Evaluation of Generic Convolutional and Recurrent Networks, 2018.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> tcn = snn.TCN(4, [8, 8], kernel_size=3).eval()
        >>> x = torch.randn(2, 4, 10)
        >>> state = tcn.init_state(2)
        >>> first, state = tcn.extend(x[..., :7], state)
        >>> rest, state = tcn.extend(x[..., 7:], state)
        >>> torch.allclose(torch.cat([first, rest], -1), tcn(x), atol=1e-6)
        True
    """

    def __init__(
        self,
        num_inputs: int,
        num_channels: Sequence[int],
        kernel_size: int = 2,
        dropout: float = 0.2,
        device: Any = None,
        dtype: Any = None,
        *,
        dilations: Sequence[int] | None = None,
        dilation_reset: int | None = None,
        causal: bool = True,
        use_norm: str | None = "weight_norm",
        activation: str = "relu",
        use_skip_connections: bool = False,
        input_shape: str = "NCL",
        use_gate: bool = False,
        output_projection: int | None = None,
        output_activation: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_channels, Sequence) or isinstance(num_channels, str):
            raise TypeError(f"TCN: expected num_channels to be a list of ints, but got {type(num_channels).__name__}")
        num_channels = list(num_channels)
        if not num_channels:
            raise ValueError("num_channels must not be empty")
        for width in num_channels:
            _arguments.integer("TCN", "num_channels", width, 1)
        _arguments.integer("TCN", "num_inputs", num_inputs, 1)
        _arguments.integer("TCN", "kernel_size", kernel_size, 1)
        _arguments.number("TCN", "dropout", dropout)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {dropout}")
        self.num_inputs, self.num_channels, self.kernel_size, self.dropout = (
            num_inputs,
            num_channels,
            kernel_size,
            dropout,
        )
        _check_block("TCN", activation, use_norm, use_gate)
        _arguments.flags("TCN", causal=causal, use_skip_connections=use_skip_connections)
        if not causal:
            raise ValueError("TCN: expected causal to be True, but got False; torch.nn.Conv1d runs what is not causal")
        _one_of("TCN", "input_shape", input_shape, ("NCL", "NLC"))
        if output_projection is not None:
            _arguments.integer("TCN", "output_projection", output_projection, 1)
        _one_of("TCN", "output_activation", output_activation, tuple(a for a in ACTIVATIONS if a not in GATED))
        if dilation_reset is not None:
            _arguments.integer("TCN", "dilation_reset", dilation_reset, 1)
        if dilations is None:
            period = dilation_reset.bit_length() if dilation_reset is not None else len(num_channels)
            dilations = [2 ** (i % period) for i in range(len(num_channels))]
        if not isinstance(dilations, Sequence) or isinstance(dilations, str):
            raise TypeError(f"TCN: expected dilations to be a list of ints, but got {type(dilations).__name__}")
        if len(dilations) != len(num_channels):
            raise ValueError(f"TCN: expected dilations to have {len(num_channels)} ints, but got {len(dilations)}")
        for dilation in dilations:
            _arguments.integer("TCN", "dilations", dilation, 1)
        self.dilations, self.use_norm, self.activation, self.use_gate = list(dilations), use_norm, activation, use_gate
        self.use_skip_connections, self.input_shape = use_skip_connections, input_shape
        self.output_projection, self.output_activation = output_projection, output_activation
        widths = [num_inputs, *num_channels]
        block_options: dict[str, Any] = {"activation": activation, "use_norm": use_norm, "use_gate": use_gate}
        self.network = nn.Sequential(
            *(
                TemporalBlock(
                    widths[i], widths[i + 1], kernel_size, self.dilations[i], dropout, device, dtype, **block_options
                )
                for i in range(len(num_channels))
            )
        )
        last, where = num_channels[-1], {"device": device, "dtype": dtype}
        if use_skip_connections:
            downs: list[Any] = [
                CausalConv1d(width, last, 1, **where) if width != last else None for width in num_channels
            ]
            self.downsample_skip_connection = nn.ModuleList(downs)
        if output_projection is not None:
            self.projection_out = CausalConv1d(last, output_projection, 1, **where)

    @property
    def _blocks(self) -> list[TemporalBlock]:
        return cast(list[TemporalBlock], list(self.network))

    def _with_history(self) -> Sequence[CausalConv1d]:
        return [conv for block in self._blocks for conv in block._with_history()]

    def forward(self, x: Tensor, *, reset: Tensor | None = None) -> Tensor:
        """x (B, num_inputs, T): y (B, num_channels[-1], T).

        ``reset`` (B, T) bool: an episode begins where it is true, and sees no step before.
        """
        if not isinstance(x, Tensor):
            return self._instead("x", x, reset=reset)
        return self._run(x, None, reset)[0]

    def _run(self, x: Tensor, state: State | None, reset: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
        """y, and the state after it where there is one."""
        last_axes = self.input_shape == "NLC"
        x = x.transpose(-1, -2) if last_axes else x
        total: Any = None
        states = []
        for i, block in enumerate(self._blocks):
            skip = self.use_skip_connections and i + 1 < len(self.num_channels)
            if state is not None:
                x, added, block_state = block._extend(x, state[i], reset, skip)
                states.append(block_state)
            elif skip:
                _, x, added = block._run(x, None, None, reset, True)
            else:
                x, added = (block(x) if reset is None else block(x, reset=reset)), None
            if skip:
                down: Any = self.downsample_skip_connection[i]
                added = added if down is None else down(added)
                total = added if total is None else total + added
        if self.use_skip_connections:
            x = activate(x if total is None else total + x, self.activation)
        if self.output_projection is not None:
            x = self.projection_out(x)
        x = activate(x, self.output_activation)
        return x.transpose(-1, -2) if last_axes else x, tuple(states)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """A tuple of the blocks' states, all zeros."""
        return tuple(block.init_state(batch_size, device=device, dtype=dtype) for block in self._blocks)

    def extend(self, x: Tensor, state: State, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """x (B, num_inputs, T): y (B, num_channels[-1], T) and the state after it; ``reset`` as in ``forward``."""
        _arguments.tensor("TCN", "x", x)
        if not isinstance(state, (tuple, list)) or len(state) != len(self.num_channels):
            raise TypeError(f"TCN: expected state to be a tuple of {len(self.num_channels)} levels' states")
        layout = "(B, T, C)" if self.input_shape == "NLC" else "(B, C, T)"
        for block, block_state in zip(self._blocks, state, strict=True):
            check_chunk(block, x, block_state, "history of conv1", "history of conv2", layout=layout)
        if reset is not None:
            _arguments.reset("TCN", reset, (x.shape[0], x.shape[1 if layout == "(B, T, C)" else 2]), x.device)
        return self._run(x, state, reset)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """x_t (B, num_inputs): y_t (B, num_channels[-1]) and the state after it."""
        return step_at_once(self, x_t, state) or self._step(x_t, state, 1 if self.input_shape == "NLC" else 2)

    def extra_repr(self) -> str:
        text = f"{self.num_inputs}, {self.num_channels}, kernel_size={self.kernel_size}, dropout={self.dropout}"
        plain = {"use_norm": "weight_norm", "activation": "relu", "use_skip_connections": False, "input_shape": "NCL"}
        plain |= {"use_gate": False, "output_projection": None, "output_activation": None}
        plain["dilations"] = [2**i for i in range(len(self.num_channels))]
        for name, default in plain.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        return text
