"""Gated convolutions and WaveNet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from seqaccel import _arguments
from seqaccel.functional.conv import GATED, activate, causal_conv1d, last_steps, wavenet_layer
from seqaccel.nn.conv._base import ConvStream, check_chunk, check_step
from seqaccel.nn.conv._causal import CausalConv1d, is_plain
from seqaccel.nn.streaming import State

__all__ = ["GatedConv1d", "WaveNet", "WaveNetLayer"]


class GatedConv1d(CausalConv1d):
    r"""Causal convolution with a gate: one convolution computes the value and the gate, one pass multiplies them.

    .. math::
        y &= (W * x + b) \odot \sigma(V * x + c) && \text{activation="glu"} \\
        y &= \tanh(W * x + b) \odot \sigma(V * x + c) && \text{activation="gated"}

    It is :class:`CausalConv1d` with twice the output channels and a gated activation; the methods are the same.

    Args:
        in_channels: C.
        out_channels: O, after the gate.
        kernel_size: taps K; an int or a tuple of one.
        dilation: distance between taps. Default: 1
        groups: blocks of channels convolved apart. Default: 1
        bias: whether there is a bias. Default: True
        activation: ``"glu"`` (Dauphin et al.) or ``"gated"`` (WaveNet). Default: ``"glu"``
        device, dtype: of the parameters.

    Attributes:
        weight: (2 · O, C / groups, K): the rows of W, then those of V.
        bias: (2 · O,): b, then c.

    Shape: x (B, C, T) or (C, T); output (B, O, T) or (O, T).
    State of B streams: ``(history,)``, history (B, C, (K-1)·dilation).

    Raises:
        TypeError, ValueError: an argument's type or value does not fit; the message says which one.

    Source: van den Oord et al., WaveNet, 2016; Dauphin et al., Language Modeling with Gated Convolutional Networks,
    2017.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> conv = snn.GatedConv1d(4, 8, 3, dilation=2)
        >>> conv(torch.randn(2, 4, 10)).shape
        torch.Size([2, 8, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int],
        *,
        dilation: int | tuple[int] = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str = "glu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _arguments.integer(type(self).__name__, "out_channels", out_channels, 0)
        if activation not in GATED:
            raise ValueError(f"activation must be one of {GATED}, but got {activation!r}")
        super().__init__(
            in_channels,
            2 * out_channels,
            kernel_size,
            dilation=dilation,
            groups=groups,
            bias=bias,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.out_channels = out_channels


def _optional_channels(title: str, name: str, value: int | None) -> None:
    if value is not None:
        _arguments.integer(title, name, value, 1)


class WaveNetLayer(ConvStream):
    r"""One layer of a :class:`WaveNet`.

    .. math::
        z_t &= \tanh((W_f * x)_t + V_f c_t + U_f g) \odot \sigma((W_g * x)_t + V_g c_t + U_g g) \\
        x'_t &= x_t + R z_t, \qquad s_t = S z_t

    with causal dilated convolutions \*, a local condition c (of each step) and a global condition g (of a sequence);
    both are optional. The biases are left out above. The operator is :func:`seqaccel.functional.wavenet_layer`. Where
    ``conv`` or ``output`` has a hook or was replaced, both run as modules of their own. A condition is added inside of
    ``conv``, whose hooks are then not called.

    Args:
        residual_channels: channels of x and x'.
        skip_channels: channels of s.
        kernel_size: taps K of the dilated convolution. Default: 2
        dilation: distance between its taps. Default: 1
        gate_channels: channels of z. Default: residual_channels
        condition_channels: channels of c. Default: no local condition
        global_channels: features of g. Default: no global condition
        bias: whether the convolutions of x and of z have biases. Default: True
        device, dtype: of the parameters.

    Attributes:
        conv: :class:`CausalConv1d` of 2 · gate_channels outputs: W_f, then W_g.
        condition: :class:`CausalConv1d` of one tap, V_f then V_g, without bias; or None.
        global_condition: :class:`torch.nn.Linear`, U_f then U_g, without bias; or None.
        output: :class:`CausalConv1d` of one tap: R, then S.

    Shape: x (B, residual_channels, T), condition (B, condition_channels, T), global_condition (B, global_channels);
    output (x', s): (B, residual_channels, T) and (B, skip_channels, T).
    State of B streams: ``(history,)``, history (B, residual_channels, (K-1)·dilation).

    Raises:
        TypeError, ValueError: an argument's type or value does not fit; the message says which one.

    Source: van den Oord et al., WaveNet: A Generative Model for Raw Audio, 2016.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> layer = snn.WaveNetLayer(8, 16, dilation=4, condition_channels=3)
        >>> x, skip = layer(torch.randn(2, 8, 10), condition=torch.randn(2, 3, 10))
        >>> x.shape, skip.shape
        (torch.Size([2, 8, 10]), torch.Size([2, 16, 10]))
    """

    def __init__(
        self,
        residual_channels: int,
        skip_channels: int,
        kernel_size: int = 2,
        dilation: int = 1,
        *,
        gate_channels: int | None = None,
        condition_channels: int | None = None,
        global_channels: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        for name, value in {
            "residual_channels": residual_channels,
            "skip_channels": skip_channels,
            "kernel_size": kernel_size,
            "dilation": dilation,
        }.items():
            _arguments.integer(title, name, value, 1)
        for name, optional in {
            "gate_channels": gate_channels,
            "condition_channels": condition_channels,
            "global_channels": global_channels,
        }.items():
            _optional_channels(title, name, optional)
        _arguments.flag(title, "bias", bias)
        self.residual_channels, self.skip_channels = residual_channels, skip_channels
        self.kernel_size, self.dilation = kernel_size, dilation
        self.gate_channels = gates = gate_channels or residual_channels
        self.condition_channels, self.global_channels = condition_channels, global_channels
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = CausalConv1d(
            residual_channels, 2 * gates, kernel_size, dilation=dilation, bias=bias, activation="gated", **where
        )
        self.condition = (
            CausalConv1d(condition_channels, 2 * gates, 1, bias=False, **where) if condition_channels else None
        )
        self.global_condition = nn.Linear(global_channels, 2 * gates, bias=False, **where) if global_channels else None
        self.output = CausalConv1d(gates, residual_channels + skip_channels, 1, bias=bias, **where)

    def reset_parameters(self) -> None:
        """Draws the parameters as torch.nn.Conv1d and torch.nn.Linear do."""
        for module in (self.conv, self.condition, self.global_condition, self.output):
            if module is not None:
                module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        global_condition: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, residual_channels, T): x' and s.

        ``reset`` (B, T) bool: an episode begins where it is true, and sees no step before.
        """
        if not isinstance(x, Tensor):
            return self._instead("x", x, condition=condition, global_condition=global_condition, reset=reset)
        if x.dim() != 3:
            raise ValueError(f"WaveNetLayer: expected x to be 3D (B, C, T), but got a tensor of size {list(x.shape)}")
        check_conditions(self, x, condition, global_condition)
        y, skip = self._run(x, None, None, condition, global_condition, reset)
        assert y is not None
        return y, skip

    def _run(
        self,
        x: Tensor,
        skip: Tensor | None,
        history: Tensor | None,
        condition: Tensor | None,
        global_condition: Tensor | None,
        reset: Tensor | None,
        residual: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """x' (None without ``residual``), and ``skip`` + s."""
        conv, output = self.conv, self.output
        local = None if self.condition is None else self.condition(condition)
        constant = None if self.global_condition is None else self.global_condition(global_condition)
        if not is_plain(conv, "gated") or not is_plain(output, None):
            return self._separately(x, skip, history, local, constant, reset, residual)
        return wavenet_layer(
            x,
            conv.weight,
            conv.bias,
            output.weight,
            output.bias,
            dilation=conv.dilation,
            skip=skip,
            condition=local,
            global_condition=constant,
            residual=residual,
            initial_state=history,
            reset=reset,
        )

    def _separately(
        self,
        x: Tensor,
        skip: Tensor | None,
        history: Tensor | None,
        local: Tensor | None,
        constant: Tensor | None,
        reset: Tensor | None,
        residual: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """The same by calls of the convolutions. Conditions are added before the gate, which is inside of ``conv``."""
        conv = self.conv
        options: dict[str, Any] = {"initial_state": history} | ({} if reset is None else {"reset": reset})
        if local is None and constant is None:
            z = conv(x, **options)
        else:
            v = causal_conv1d(x, conv.weight, conv.bias, dilation=conv.dilation, **options)
            v = v if local is None else v + local
            v = v if constant is None else v + constant.unsqueeze(-1)
            z = activate(v, conv.activation)
        y, s = self.output(z).split([self.residual_channels, self.skip_channels], 1)
        return x + y if residual else None, s if skip is None else skip + s

    def _with_history(self) -> Sequence[CausalConv1d]:
        return (self.conv,)

    def extend(  # type: ignore[override]
        self,
        x: Tensor,
        state: State,
        *,
        condition: Tensor | None = None,
        global_condition: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor], State]:
        """x (B, residual_channels, T): (x', s) and the state after it; ``reset`` as in ``forward``."""
        check_chunk(self, x, state, "history", reset=reset)
        check_conditions(self, x, condition, global_condition)
        (history,) = state
        y, skip = self._run(x, None, history, condition, global_condition, reset)
        assert y is not None
        return (y, skip), (last_steps(history, x, reset),)

    def step(  # type: ignore[override]
        self, x_t: Tensor, state: State, *, condition: Tensor | None = None, global_condition: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor], State]:
        """x_t (B, residual_channels), condition (B, condition_channels): (x', s) of the step and the state after it."""
        check_step(self, x_t)
        (y, skip), state = self.extend(
            x_t.unsqueeze(-1), state, condition=_one_step(self, condition), global_condition=global_condition
        )
        return (y.squeeze(-1), skip.squeeze(-1)), state

    def extra_repr(self) -> str:
        return (
            f"{self.residual_channels}, {self.skip_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        )


def _one_step(module: nn.Module, condition: Tensor | None) -> Tensor | None:
    """The condition of a step as that of a chunk."""
    _arguments.tensor(type(module).__name__, "condition", condition, optional=True)
    return None if condition is None else condition.unsqueeze(-1)


def check_conditions(
    module: WaveNetLayer | WaveNet, x: Tensor, condition: Tensor | None, global_condition: Tensor | None
) -> None:
    """The conditions have the shapes that the module and x (B, ., T) or (B, T) ask for."""
    title = type(module).__name__
    for name, value, channels, shape in (
        ("condition", condition, module.condition_channels, (x.shape[0], module.condition_channels, x.shape[-1])),
        ("global_condition", global_condition, module.global_channels, (x.shape[0], module.global_channels)),
    ):
        _arguments.tensor(title, name, value, optional=channels is None)
        if value is None:
            continue
        if channels is None:
            raise ValueError(f"{title}: expected {name} to be None in a module made without its channels")
        if tuple(value.shape) != shape:
            raise ValueError(f"{title}: expected {name} to have shape {shape}, but got {tuple(value.shape)}")


class WaveNet(ConvStream):
    r"""WaveNet: gated dilated convolutions with residual and skip connections.

    .. math::
        x^{(0)} &= W_0 * u, \qquad (x^{(l+1)}, s^{(l)}) = \text{WaveNetLayer}_l(x^{(l)}, c, g) \\
        y &= W_2\, \mathrm{relu}\Bigl(W_1\, \mathrm{relu}\bigl(\sum_l s^{(l)}\bigr)\Bigr)

    Each of ``stacks`` stacks has ``layers`` layers with dilations 1, 2, 4, … 2^(layers-1). The biases of the 1×1
    convolutions are left out above.

    Args:
        in_channels: channels of the input u; with ``embedding`` the number of classes.
        out_channels: channels of y (the logits of classes, or parameters of a distribution). Default: in_channels
        residual_channels, skip_channels: of every :class:`WaveNetLayer`. Default: 64
        layers: per stack. Default: 10
        stacks: how often the dilations repeat. Default: 1
        kernel_size: taps of the dilated convolutions. Default: 2
        input_kernel_size: taps of W_0. Default: 1
        gate_channels: channels of a layer's gate. Default: residual_channels
        head_channels: rows of W_1. Default: skip_channels
        condition_channels: channels of the local condition c, one vector per time step (a spectrogram that is already
            upsampled). Default: none
        global_channels: features of the global condition g, one vector per sequence (an embedded speaker). Default:
            none
        embedding: whether u is (B, T) int64 class indices, which an embedding takes the place of W_0 for. Default:
            False
        bias: whether the convolutions have biases. Default: True
        device, dtype: of the parameters.

    Attributes:
        input: W_0, a :class:`CausalConv1d`, or a :class:`torch.nn.Embedding`.
        layers: ``torch.nn.ModuleList`` of :class:`WaveNetLayer`.
        head: W_1 and W_2: ``torch.nn.Sequential`` of two 1×1 :class:`CausalConv1d`.
        receptive_field: time steps that an output sees, itself included.

    Shape: x (B, in_channels, T), or (B, T) int64 with ``embedding``; condition (B, condition_channels, T);
    global_condition (B, global_channels); output (B, out_channels, T).
    State of B streams: a tuple of histories (B, channels, context): of ``input`` where it has several taps, then of
    every layer.

    Raises:
        TypeError, ValueError: an argument's type or value does not fit; the message says which one.

    A :class:`~seqaccel.Session` runs it one sample at a time; conditions are more channels of its input.

    Source: van den Oord et al., WaveNet: A Generative Model for Raw Audio, 2016.

    Example:
        >>> import torch, seqaccel.nn as snn
        >>> net = snn.WaveNet(256, residual_channels=8, skip_channels=8, layers=4, stacks=2, embedding=True)
        >>> logits = net(torch.randint(256, (2, 100)))
        >>> logits.shape, net.receptive_field
        (torch.Size([2, 256, 100]), 31)
        >>> net.generate(5, temperature=0).shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        residual_channels: int = 64,
        skip_channels: int = 64,
        *,
        layers: int = 10,
        stacks: int = 1,
        kernel_size: int = 2,
        input_kernel_size: int = 1,
        gate_channels: int | None = None,
        head_channels: int | None = None,
        condition_channels: int | None = None,
        global_channels: int | None = None,
        embedding: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        for name, value in {
            "in_channels": in_channels,
            "residual_channels": residual_channels,
            "skip_channels": skip_channels,
            "layers": layers,
            "stacks": stacks,
            "kernel_size": kernel_size,
            "input_kernel_size": input_kernel_size,
        }.items():
            _arguments.integer(title, name, value, 1)
        _optional_channels(title, "out_channels", out_channels)
        _optional_channels(title, "head_channels", head_channels)
        _arguments.flags(title, embedding=embedding, bias=bias)
        if embedding and input_kernel_size != 1:
            raise ValueError(f"{title}: expected input_kernel_size to be 1 with embedding, but got {input_kernel_size}")
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.residual_channels, self.skip_channels = residual_channels, skip_channels
        self.condition_channels, self.global_channels = condition_channels, global_channels
        self.embedding = bool(embedding)
        head = head_channels or skip_channels
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input = (
            nn.Embedding(in_channels, residual_channels, **where)
            if embedding
            else CausalConv1d(in_channels, residual_channels, input_kernel_size, bias=bias, **where)
        )
        self.layers = nn.ModuleList(
            WaveNetLayer(
                residual_channels,
                skip_channels,
                kernel_size,
                2**i,
                gate_channels=gate_channels,
                condition_channels=condition_channels,
                global_channels=global_channels,
                bias=bias,
                **where,
            )
            for _ in range(stacks)
            for i in range(layers)
        )
        self.head = nn.Sequential(
            CausalConv1d(skip_channels, head, 1, bias=bias, activation="relu", **where),
            CausalConv1d(head, self.out_channels, 1, bias=bias, **where),
        )

    def reset_parameters(self) -> None:
        """Draws the parameters as torch.nn.Conv1d, torch.nn.Linear and torch.nn.Embedding do."""
        for module in (self.input, *self.layers, *self.head):
            cast(Any, module).reset_parameters()

    @property
    def _layers(self) -> list[WaveNetLayer]:
        return cast(list[WaveNetLayer], list(self.layers))

    def forward(
        self,
        x: Tensor,
        *,
        condition: Tensor | None = None,
        global_condition: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Tensor:
        """x (B, in_channels, T), or (B, T) int64 with ``embedding``: y (B, out_channels, T).

        ``reset`` (B, T) bool: an episode begins where it is true, and sees no step before.
        """
        if not isinstance(x, Tensor):
            return self._instead("x", x, condition=condition, global_condition=global_condition, reset=reset)
        self._check(x, condition, global_condition, reset)
        return self._run(x, None, condition, global_condition, reset)[0]

    def _check(
        self, x: Tensor, condition: Tensor | None, global_condition: Tensor | None, reset: Tensor | None
    ) -> None:
        dims, shape = (2, "2D (B, T)") if self.embedding else (3, "3D (B, C, T)")
        _arguments.tensor("WaveNet", "x", x)
        if x.dim() != dims:
            raise ValueError(f"WaveNet: expected x to be {shape}, but got a tensor of size {list(x.shape)}")
        check_conditions(self, x, condition, global_condition)
        if reset is not None:
            _arguments.reset("WaveNet", reset, (x.shape[0], x.shape[-1]), x.device)

    def _run(
        self,
        x: Tensor,
        state: State | None,
        condition: Tensor | None,
        global_condition: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, State]:
        """The output, and where a state is given the one after it."""
        histories: list[Any] = [None] * (len(self.layers) + 1)
        if state is not None:
            histories = [*[None] * (len(histories) - len(state)), *state]
        after = []
        if isinstance(self.input, CausalConv1d):
            if histories[0] is not None:
                after.append(last_steps(histories[0], x, reset))
            context_options = {} if reset is None or not self.input.context else {"reset": reset}
            x = self.input(x, initial_state=histories[0], **context_options)
        else:
            x = self.input(x).transpose(1, 2)
        skip = None
        for layer, history in zip(self._layers, histories[1:], strict=True):
            if state is not None:
                after.append(last_steps(history, x, reset))
            more = layer is not self.layers[-1]
            y, skip = layer._run(x, skip, history, condition, global_condition, reset, residual=more)
            x = x if y is None else y
        assert skip is not None
        return self.head(torch.relu(skip)), tuple(after)

    def _with_history(self) -> Sequence[CausalConv1d]:
        first = [self.input] if isinstance(self.input, CausalConv1d) and self.input.context else []
        return [*first, *(layer.conv for layer in self._layers)]

    def extend(
        self,
        x: Tensor,
        state: State,
        *,
        condition: Tensor | None = None,
        global_condition: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """x (B, in_channels, T), or (B, T) int64 with ``embedding``: y (B, out_channels, T) and the state after it;
        ``reset`` as in ``forward``."""
        self._check(x, condition, global_condition, reset)
        _arguments.states("WaveNet", "state", state, ("history",) * len(self._with_history()))
        return self._run(x, state, condition, global_condition, reset)

    def step(
        self, x_t: Tensor, state: State, *, condition: Tensor | None = None, global_condition: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x_t (B, in_channels), or (B,) int64 with ``embedding``: y_t (B, out_channels) and the state after it."""
        conditions = {"condition": _one_step(self, condition), "global_condition": global_condition}
        return self._step(x_t, state, -1, "1D (B,)" if self.embedding else "2D (B, C)", **conditions)

    @torch.no_grad()
    def generate(
        self,
        steps: int,
        prompt: Tensor | None = None,
        *,
        condition: Tensor | None = None,
        global_condition: Tensor | None = None,
        temperature: float = 1.0,
        sample: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    ) -> Tensor:
        """Continues ``prompt`` by ``steps`` steps: each output is turned into the next input.

        Args:
            steps: how many, at least 1.
            prompt: the inputs before the first generated one, laid out as in ``forward``, at least one step. Default:
                one step of one stream: zeros, or with ``embedding`` the middle class.
            condition: of all steps of the prompt and the generated ones but the last:
                (B, condition_channels, T_prompt + steps - 1).
            global_condition: (B, global_channels).
            temperature: with ``embedding``, classes are drawn from softmax(y / temperature); 0 takes the largest.
            sample: a function of the output y_t (B, out_channels) that returns the next input. Default: with
                ``embedding`` as above; else y_t itself, where it has as many channels as the input.
            generator: random generator of the draws.
            progress: wraps the iterable of steps, such as ``tqdm.tqdm``.

        Returns:
            the generated steps: (B, steps) int64 with ``embedding``, else (B, in_channels, steps).
        """
        _arguments.integer("generate", "steps", steps, 1)
        _arguments.number("generate", "temperature", temperature)
        if temperature < 0:
            raise ValueError(f"generate: expected temperature to be at least 0, but got {temperature}")
        if sample is None and not self.embedding and self.in_channels != self.out_channels:
            raise ValueError("generate: expected sample, as the output has other channels than the input")
        _arguments.tensor("generate", "prompt", prompt, optional=True)
        if prompt is None:
            where = next(self.head.parameters())
            prompt = (
                torch.full((1, 1), self.in_channels // 2, device=where.device)
                if self.embedding
                else torch.zeros(1, self.in_channels, 1, device=where.device, dtype=where.dtype)
            )
        given = prompt.shape[-1]
        if given < 1:
            raise ValueError("generate: expected prompt to have at least one step")
        if condition is not None and condition.shape[-1] != given + steps - 1:
            raise ValueError(
                f"generate: expected condition of {given + steps - 1} steps, but got {condition.shape[-1]}"
            )

        def drawn(y_t: Tensor) -> Tensor:
            if sample is not None:
                return sample(y_t)
            if not self.embedding:
                return y_t
            if temperature == 0:
                return y_t.argmax(-1)
            return torch.multinomial(torch.softmax(y_t / temperature, -1), 1, generator=generator).squeeze(-1)

        first = None if condition is None else condition[..., :given]
        y, state = self.extend(
            prompt, self.init_state(prompt.shape[0]), condition=first, global_condition=global_condition
        )
        generated = [drawn(y[..., -1])]
        counted: Iterable[int] = range(steps - 1)
        for i in counted if progress is None else progress(counted):
            now = None if condition is None else condition[..., given + i]
            y_t, state = self.step(generated[-1], state, condition=now, global_condition=global_condition)
            generated.append(drawn(y_t))
        return torch.stack(generated, -1)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, receptive_field={self.receptive_field}"
