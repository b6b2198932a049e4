"""Reservoir computing: fixed sparse recurrent layers, and a linear read-out fitted in closed form."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqaccel import _arguments, functional
from seqaccel.nn._leaf import Leaf
from seqaccel.nn.streaming import State, Streaming

__all__ = ["EchoStateNetwork"]

_CHUNK = 2**22  # reservoir values at a time: a long sequence needs no more memory than these and its outputs
_DIRECT = 256  # units up to which all eigenvalues take less time
_POWERS, _KRYLOV = 200, 60


def _spectral_radius(columns: Tensor, weight: Tensor, generator: torch.Generator | None) -> float:
    """The largest magnitude of an eigenvalue of W, whose row i has ``weight[i]`` at ``columns[i]``, (H, K) both.

    Power iteration, and then the Ritz values of a Krylov space from its last vector (Arnoldi): power iteration alone
    turns forever in the plane of a complex pair.
    """
    H = weight.shape[0]
    if H <= _DIRECT:
        dense = torch.zeros(H, H, dtype=torch.float64, device="cpu").scatter_(1, columns, weight)
        return float(torch.linalg.eigvals(dense).abs().max())
    v = torch.randn(H, dtype=torch.float64, device="cpu", generator=generator)
    for _ in range(_POWERS):
        v = (weight * v[columns]).sum(1)
        v /= v.norm()
    basis = [v]
    hessenberg = torch.zeros(_KRYLOV, _KRYLOV, dtype=torch.float64, device="cpu")
    for j in range(_KRYLOV):
        v = (weight * basis[j][columns]).sum(1)
        span = torch.stack(basis)
        for _ in range(2):  # once more removes what rounding left
            part = span @ v
            hessenberg[: j + 1, j] += part
            v = v - part @ span
        length = v.norm()
        if j + 1 == _KRYLOV or length < 1e-12:
            return float(torch.linalg.eigvals(hessenberg[: j + 1, : j + 1]).abs().max())
        hessenberg[j + 1, j] = length
        basis.append(v / length)
    raise AssertionError("the last pass returns")


class EchoStateNetwork(Leaf, Streaming, torch.nn.Module):
    r"""An echo state network: fixed reservoirs, each fed by the one before, and a linear read-out of all of them.

    .. math::
        h_t = (1 - a)\, h_{t-1} + a \tanh(W_\mathrm{in} x_t + b + W h_{t-1}), \quad
        y_t = W_\mathrm{out} [h^{(1)}_t, \ldots, h^{(L)}_t] + b_\mathrm{out}

    The reservoirs are drawn at random and stay as they are: they are buffers. W is sparse, each unit is fed by as many
    units, and is scaled to ``spectral_radius``. Only ``readout``, a ``torch.nn.Linear``, is learned: by ridge
    regression (:meth:`fit`), also over data larger than memory (:meth:`partial_fit`, :meth:`solve`), or like any layer
    by gradients. An ``x`` that requires a gradient gets it, but then the reservoirs run step by step
    (:func:`seqaccel.functional.echo_state`). Streams by :meth:`init_state`, :meth:`extend` and :meth:`step`.

    Args:
        input_size: number of features I of x.
        hidden_size: number of units H of each reservoir.
        output_size: number of outputs O.
        num_layers: number of reservoirs. Default: 1
        batch_first: (B, T, I) rather than (T, B, I). Default: ``False``
        device, dtype: of the parameters and buffers.
        spectral_radius: largest magnitude of an eigenvalue of W. Default: 0.9
        leak_rate: a, greater than 0 and at most 1. Default: 1.0
        connectivity: share of the units that feed a unit, greater than 0 and at most 1. Default: 0.1
        input_scaling: :math:`W_\mathrm{in}` is drawn from U(-input_scaling, input_scaling); from the second reservoir
            on divided by √H. Default: 1.0
        bias_scaling: b is drawn from U(-bias_scaling, bias_scaling). Default: 0.1
        generator: a generator on the CPU, from which everything is drawn. Default: torch's

    Raises:
        TypeError, ValueError: an argument is not what is expected.

    Source: Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks", 2001; several
    reservoirs: Gallicchio et al., "Deep reservoir computing", 2017.

    Example:
        >>> import torch, seqaccel
        >>> x = torch.sin(torch.arange(600) * 0.2).view(-1, 1, 1)
        >>> model = seqaccel.nn.EchoStateNetwork(1, 100, 1, generator=torch.Generator().manual_seed(0))
        >>> state = model.fit(x[:-1], x[1:], ridge=1e-6, washout=50)  # to predict the next value
        >>> y, _ = model.step(x[-1], state)
        >>> torch.allclose(y, torch.tensor([[120.0]]).sin(), atol=0.01)
        True
    """

    weight_ih_l0: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_layers: int = 1,
        batch_first: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        spectral_radius: float = 0.9,
        leak_rate: float = 1.0,
        connectivity: float = 0.1,
        input_scaling: float = 1.0,
        bias_scaling: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        title = type(self).__name__
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "output_size": output_size}
        for name, value in (sizes | {"num_layers": num_layers}).items():
            _arguments.integer(title, name, value, 1)
        _arguments.flag(title, "batch_first", batch_first)
        scales = {"spectral_radius": spectral_radius, "input_scaling": input_scaling, "bias_scaling": bias_scaling}
        for name, scale in scales.items():
            _arguments.number(title, name, scale)
            if scale < 0:
                raise ValueError(f"{title}: expected {name} to be at least 0, but got {scale}")
        for name, share in {"leak_rate": leak_rate, "connectivity": connectivity}.items():
            _arguments.probability(title, name, share)
            if share == 0:
                raise ValueError(f"{title}: expected {name} to be greater than 0")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{title}: expected generator to be a torch.Generator, but got {type(generator).__name__}")
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, output_size
        self.num_layers, self.batch_first = num_layers, bool(batch_first)
        self.spectral_radius, self.leak_rate, self.connectivity = spectral_radius, leak_rate, connectivity
        self.input_scaling, self.bias_scaling = input_scaling, bias_scaling
        self.readout = torch.nn.Linear(num_layers * hidden_size, output_size, device=device, dtype=dtype)
        self._degree = max(1, round(connectivity * hidden_size))
        whole: dict[str, Any] = {"device": device, "dtype": torch.int32}
        real: dict[str, Any] = {"device": device, "dtype": dtype}
        for layer in range(num_layers):
            fed = hidden_size if layer else input_size
            self.register_buffer(f"weight_ih_l{layer}", torch.empty(hidden_size, fed, **real))
            self.register_buffer(f"bias_l{layer}", torch.empty(hidden_size, **real))
            self.register_buffer(f"rows_l{layer}", torch.empty(hidden_size + 1, **whole))
            self.register_buffer(f"columns_l{layer}", torch.empty(hidden_size * self._degree, **whole))
            self.register_buffer(f"weight_hh_l{layer}", torch.empty(hidden_size * self._degree, **real))
        self._equations: tuple[Tensor, Tensor] | None = None
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the reservoirs and the read-out anew."""
        H, K = self.hidden_size, self._degree

        def uniform(like: Tensor, bound: float) -> None:
            drawn = torch.rand(like.shape, dtype=torch.float64, device="cpu", generator=generator)
            like.copy_((2 * drawn - 1) * bound)

        for layer in range(self.num_layers):
            weight_ih, bias, rows, columns, weight_hh = self._reservoir(layer)
            uniform(weight_ih, self.input_scaling / (H**0.5 if layer else 1))
            uniform(bias, self.bias_scaling)
            part = max(1, 2**22 // H)  # units whose columns are drawn at once
            drawn = [
                torch.rand(min(part, H - first), H, device="cpu", generator=generator).topk(K, sorted=False).indices
                for first in range(0, H, part)
            ]
            places = torch.cat(drawn).sort(1).values
            values = 2 * torch.rand(H, K, dtype=torch.float64, device="cpu", generator=generator) - 1
            values *= self.spectral_radius / _spectral_radius(places, values, generator)
            rows.copy_(torch.arange(H + 1, device="cpu") * K)
            columns.copy_(places.flatten())
            weight_hh.copy_(values.flatten())
        for parameter in self.readout.parameters():
            uniform(parameter, self.readout.in_features**-0.5)

    def _reservoir(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """W_in, b, and rows, columns and values of W."""
        names = ("weight_ih", "bias", "rows", "columns", "weight_hh")
        a, b, c, d, e = (getattr(self, f"{name}_l{layer}") for name in names)
        return a, b, c, d, e

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}, {self.output_size}"]
        parts += [f"num_layers={self.num_layers}"] * (self.num_layers > 1) + ["batch_first=True"] * self.batch_first
        parts += [f"spectral_radius={self.spectral_radius}, leak_rate={self.leak_rate}"]
        return ", ".join([*parts, f"connectivity={self.connectivity}"])

    # ---- running ----

    def forward(self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Outputs of a sequence.

        Args:
            x: (T, B, I), or (B, T, I) where ``batch_first``.
            state: what an earlier call returned. Default: :meth:`init_state`
            reset: (T, B) bool, or (B, T): an episode begins at each True, from a state of zero. Default: none.

        Returns:
            The outputs (T, B, O), or (B, T, O), and the state: h of each reservoir, (B, H).
        """
        if not isinstance(x, Tensor):
            return self._instead("x", x, state, reset=reset)
        state = self._state(x, state)
        if reset is not None:
            _arguments.reset(type(self).__name__, reset, tuple(x.shape[:2]), x.device)
        outputs = []
        for part, begins in self._parts(x, reset):
            hidden, state = self._advance(part, state, begins)
            outputs.append(self.readout(hidden))
        return self._joined(outputs), state

    def reservoir(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the read-out reads: h of all reservoirs, (T, B, L * H) or (B, T, L * H), and the state."""
        _arguments.tensor(type(self).__name__, "x", x)
        hidden, state = self._advance(x.transpose(0, 1) if self.batch_first else x, self._state(x, state))
        return self._joined([hidden]), state

    def _state(self, x: Tensor, state: State | None) -> State:
        """The state that a sequence starts from; checks both."""
        title, time = type(self).__name__, 1 if self.batch_first else 0
        if x.dim() != 3 or x.shape[2] != self.input_size:
            layout = f"(B, T, {self.input_size})" if self.batch_first else f"(T, B, {self.input_size})"
            raise ValueError(f"{title}: expected x to have shape {layout}, but got {tuple(x.shape)}")
        if x.dtype != self.weight_ih_l0.dtype and not x.is_floating_point():
            raise TypeError(f"{title}: expected x to be {self.weight_ih_l0.dtype}, but got {x.dtype}")
        B = x.shape[1 - time]
        if state is None:
            shape, dtype = (B, self.hidden_size), self.weight_ih_l0.dtype
            return tuple(x.new_zeros(shape, dtype=dtype) for _ in range(self.num_layers))
        _arguments.states(title, "state", state, tuple(f"h_{layer}" for layer in range(self.num_layers)))
        for h in state:
            if h.shape != (B, self.hidden_size):
                raise ValueError(
                    f"{title}: expected state to have tensors of shape ({B}, {self.hidden_size}), "
                    f"but got {tuple(h.shape)}"
                )
        return tuple(state)

    def _parts(self, x: Tensor, reset: Tensor | None = None) -> Iterable[tuple[Tensor, Tensor | None]]:
        """Chunks (T, B, I) of a sequence, and of ``reset`` (T, B)."""
        if self.batch_first:
            x, reset = x.transpose(0, 1), None if reset is None else reset.transpose(0, 1)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return ((x, reset),)
        steps = max(1, _CHUNK // max(1, x.shape[1] * self.readout.in_features))
        parts = x.split(steps)
        return zip(parts, [None] * len(parts) if reset is None else reset.split(steps), strict=True)

    def _joined(self, outputs: list[Tensor]) -> Tensor:
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y.transpose(0, 1) if self.batch_first else y

    def _advance(self, x: Tensor, state: State, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """h of all reservoirs (T, B, L * H) for x (T, B, I), and the state after it."""
        hidden, last = [], []
        for layer, h in enumerate(state):
            weight_ih, bias, rows, columns, weight_hh = self._reservoir(layer)
            drive = F.linear(x, weight_ih, bias).to(weight_hh.dtype)  # in autocast's dtype, where that is on
            x = functional.echo_state(drive, rows, columns, weight_hh, h, leak_rate=self.leak_rate, reset=reset)
            hidden.append(x)
            some = torch.compiler.is_compiling() or torch.jit.is_tracing() or x.shape[0] > 0
            last.append(x[-1].clone() if some else h)
        return hidden[0] if len(hidden) == 1 else torch.cat(hidden, 2), tuple(last)

    # ---- streaming ----

    def init_state(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> State:
        _arguments.integer(type(self).__name__, "batch_size", batch_size, 0)
        device = self.weight_ih_l0.device if device is None else device
        dtype = self.weight_ih_l0.dtype if dtype is None else dtype
        shape = (batch_size, self.hidden_size)
        return tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(self.num_layers))

    def extend(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Output for a chunk ``x`` (laid out as in ``forward``), and the state after it."""
        _arguments.tensor(type(self).__name__, "x", x)
        if state is None:
            raise TypeError(f"{type(self).__name__}: expected state to be what init_state or extend returned, got None")
        return self.forward(x, state)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        title = type(self).__name__
        _arguments.tensor(title, "x_t", x_t)
        if x_t.dim() != 2 or x_t.shape[1] != self.input_size:
            raise ValueError(f"{title}: expected x_t to have shape (B, {self.input_size}), but got {tuple(x_t.shape)}")
        time = 1 if self.batch_first else 0
        y, state = self.extend(x_t.unsqueeze(time), state)
        return y.squeeze(time), state

    # ---- the read-out in closed form ----

    def fit(self, x: Tensor, y: Tensor, *, ridge: float = 1e-6, washout: int = 0, state: State | None = None) -> State:
        r"""Fits the read-out to ``y`` by ridge regression: minimises
        :math:`\sum_t |y_t - \hat y_t|^2 + \mathrm{ridge}\, |W_\mathrm{out}|^2`, the bias not penalised.

        Args:
            x: as in ``forward``.
            y: (T, B, O), or (B, T, O) where ``batch_first``: the outputs wanted.
            ridge: greater than 0. Default: 1e-6
            washout: steps at the beginning that are not fitted, while the reservoirs forget their first state.
                Default: 0
            state: as in ``forward``.

        Returns:
            The state after the last step.

        Raises:
            RuntimeError: ``ridge`` is so small that the normal equations are singular.
        """
        self._check_ridge(ridge)
        equations, self._equations = self._equations, None
        try:
            state = self.partial_fit(x, y, state, washout=washout)
            self.solve(ridge)
        finally:
            self._equations = equations
        return state

    @torch.no_grad()
    def partial_fit(self, x: Tensor, y: Tensor, state: State | None = None, *, washout: int = 0) -> State:
        """Adds a chunk to the normal equations, which are summed in float64 until :meth:`clear_fit`.

        Args:
            x, y: as in :meth:`fit`.
            state: what the call for the chunk before returned. Default: :meth:`init_state`
            washout: steps at the beginning of this chunk that are not fitted. Default: 0

        Returns:
            The state after the last step.
        """
        title = type(self).__name__
        _arguments.tensors(title, x=x, y=y)
        _arguments.integer(title, "washout", washout, 0)
        state = self._state(x, state)
        if y.shape != (*x.shape[:2], self.output_size):
            raise ValueError(
                f"{title}: expected y to have shape {(*x.shape[:2], self.output_size)}, but got {tuple(y.shape)}"
            )
        targets, first = y.transpose(0, 1) if self.batch_first else y, 0
        for part, _ in self._parts(x):
            hidden, state = self._advance(part, state)
            skip = min(max(0, washout - first), part.shape[0])
            rows = F.pad(hidden[skip:].flatten(0, 1).double(), (0, 1), value=1.0)
            wanted = targets[first + skip : first + part.shape[0]].flatten(0, 1).to(rows)
            if self._equations is None:
                size = rows.shape[1]
                self._equations = rows.new_zeros(size, size), rows.new_zeros(size, self.output_size)
            gram, moment = self._equations
            gram.addmm_(rows.t(), rows)
            moment.addmm_(rows.t(), wanted)
            first += part.shape[0]
        return state

    @torch.no_grad()
    def solve(self, ridge: float = 1e-6) -> None:
        """Sets the read-out to what minimises the error over all chunks of :meth:`partial_fit`. May be called again,
        with another ``ridge`` or after more chunks.

        Raises:
            RuntimeError: there was no chunk, or ``ridge`` is so small that the normal equations are singular.
        """
        title = type(self).__name__
        self._check_ridge(ridge)
        if self._equations is None:
            raise RuntimeError(f"{title}: solve needs partial_fit before it")
        gram, moment = self._equations
        penalty = torch.full_like(gram[0], ridge)
        penalty[-1] = 0
        factor, info = torch.linalg.cholesky_ex(gram + penalty.diag())
        if int(info) != 0:
            raise RuntimeError(f"{title}: the normal equations are singular; fit more steps or a larger ridge")
        solution = torch.cholesky_solve(moment, factor)
        self.readout.weight.copy_(solution[:-1].t())
        self.readout.bias.copy_(solution[-1])

    def clear_fit(self) -> None:
        """Forgets the chunks of :meth:`partial_fit`."""
        self._equations = None

    def _check_ridge(self, ridge: float) -> None:
        _arguments.number(type(self).__name__, "ridge", ridge)
        if ridge <= 0:
            raise ValueError(f"{type(self).__name__}: expected ridge to be greater than 0, but got {ridge}")
