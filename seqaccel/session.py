"""Streaming runners: weights packed once, state in C++, one cheap call a step."""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from seqaccel import __version__, _arguments, _extension, backends
from seqaccel.convert import REPLACEMENTS
from seqaccel.functional.rnn import CELLS
from seqaccel.nn.rnn._base import Recurrent
from seqaccel.nn.rnn._cells import GRUCell, LSTMCell, RNNCell
from seqaccel.nn.scan import SRU, SRUCell

__all__ = ["Session"]

_PRECISIONS = ("float32", "bfloat16", "int8")
_NO_NUMBERS = (0.0, 0.0, 0.0)
_MOST_STREAMS = 2**31 - 1
_MOST_INT8 = 65536  # features: sums of more products of 255 * 127 do not fit 32 bits

_CELLS = (RNNCell, LSTMCell, GRUCell)
_ACTIVATIONS = {
    torch.nn.ReLU: "relu",
    torch.nn.Tanh: "tanh",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.SiLU: "silu",
    torch.nn.Hardswish: "hardswish",
}

# Kind; inputs, hidden, outputs, and of a column cell matrices and skip; weights; zoneout of h and c, parameter.
_Layer = tuple[str, tuple[int, ...], list[Tensor | None], tuple[float, float, float]]
# Name, layer, part, width.
_State = tuple[str, int, str, int]


class Session:
    r"""Runs recurrent layers on a batch of streams, step by step, with their weights packed once.

    The weights are copied when the session is made: later changes of the module do not reach it. The module runs as in
    eval mode: no dropout, zoneout's expectation. Threads that share a session take turns.

    :meth:`fork` makes a session with streams at their initial state; ``copy.copy`` and ``copy.deepcopy`` make one that
    continues from the same state. All of them share the packed weights, and threads may run them at the same time.
    ``pickle`` and ``torch.save`` keep the packed weights and the state. Loading needs the same version of seqaccel and
    a processor with the instruction set that the weights were packed for.

    Args:
        module: a recurrent layer or cell of :mod:`seqaccel.nn` (:class:`~seqaccel.nn.LSTM`, :class:`~seqaccel.nn.GRU`,
            :class:`~seqaccel.nn.LSTMCell`, :class:`~seqaccel.nn.SRU`, …) or of :mod:`torch.nn`, in float32 on the CPU,
            any number of layers, one direction (the output of a cell is h); or a :class:`torch.nn.Sequential` of those
            with ``Linear``, ``Embedding`` (first), ``LayerNorm`` and ``RMSNorm`` (of the last dimension),
            ``BatchNorm1d`` (of the features of a step, by its running statistics), and, not first, ``Softmax``
            (``dim=-1``), ``ReLU``, ``Tanh``, ``Sigmoid``, ``SiLU``, ``Hardswish``, ``GELU``, ``LeakyReLU`` and
            ``ELU``; ``Identity`` and ``Dropout`` do nothing.
        batch_size: number of independent streams B. Default: 1
        weights: precision of the packed matrices. ``"float32"``; ``"bfloat16"``: half the memory, weights and the
            values they multiply are rounded to 8 bits; ``"int8"``: a quarter of the memory, each row of a weight, and
            at each step each vector it multiplies, is rounded to 255 values with a scale. Sums, biases, embeddings, the
            cell's functions and the state stay float32 (int8: sums are exact). Default: ``"float32"``

    Raises:
        TypeError: a session cannot run ``module``, or a module in it.
        ValueError: ``batch_size`` or ``weights`` is out of range, or the module is bidirectional, or not float32 on the
            CPU.
        RuntimeError: the C++ kernels are missing.

    Example:
        >>> import torch, seqaccel
        >>> lstm = seqaccel.nn.LSTM(8, 16)
        >>> session = seqaccel.Session(lstm, batch_size=2)
        >>> x = torch.randn(5, 2, 8)
        >>> steps = torch.stack([session.step(x_t) for x_t in x])
        >>> torch.allclose(steps, lstm(x)[0], atol=1e-6)
        True
        >>> tagger = torch.nn.Sequential(torch.nn.Embedding(100, 8), lstm, torch.nn.Linear(16, 3))
        >>> seqaccel.Session(tagger, weights="int8").step(torch.tensor([42])).shape
        torch.Size([1, 3])
    """

    def __init__(self, module: torch.nn.Module, batch_size: int = 1, weights: str = "float32") -> None:
        _check_kernels()
        if weights not in _PRECISIONS:
            raise ValueError(f"weights: expected 'float32', 'bfloat16' or 'int8', but got {weights!r}")
        _check_batch_size(batch_size)
        layers: list[_Layer] = []
        self._states: list[_State] = []
        self.batch_first = False
        _describe(module, layers, self._states, self)
        if not layers:
            raise TypeError("module: there is nothing to run in an empty Sequential")
        for before, after in itertools.pairwise(layers):
            if before[1][2] != after[1][0]:
                raise ValueError(
                    f"module: {before[0]} gives {before[1][2]} features, but {after[0]} takes {after[1][0]}"
                )
            if after[0] == "embedding":
                raise TypeError("module: an Embedding must come first")
        for kind, sizes, tensors, _ in layers:
            for tensor in tensors:
                if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
                    raise ValueError(
                        "module: expected float32 parameters on the CPU, "
                        f"but {kind} has {tensor.dtype} on {tensor.device}"
                    )
            if weights == "int8" and kind != "embedding" and max(sizes) > _MOST_INT8:
                raise ValueError(f"weights: int8 takes up to {_MOST_INT8} features, but {kind} has {max(sizes)}")
        self._indices = layers[0][0] == "embedding"
        self.input_size = 1 if self._indices else layers[0][1][0]
        self.output_size = layers[-1][1][2]
        self._dtype = torch.int64 if self._indices else torch.float32
        layers = [
            (kind, sizes, [None if t is None else _plain(t.detach()) for t in tensors], numbers)
            for kind, sizes, tensors, numbers in layers
        ]
        for kind, _, tensors, _ in layers:
            if any(t is not None and t.numel() > 0 and t.data_ptr() == 0 for t in tensors):
                raise ValueError(f"module: expected parameters with memory, but {kind} has a fake or a freed one")
        self._weights = weights
        self._shapes = [
            (kind, sizes, [None if t is None else tuple(t.shape) for t in tensors], numbers)
            for kind, sizes, tensors, numbers in layers
        ]
        self._hold(_made(batch_size, weights, layers), batch_size)

    def _hold(self, session: Any, batch_size: int) -> None:
        """A session of C++ of so many streams."""
        self.batch_size = batch_size
        self._step_shape = torch.Size((batch_size,) if self._indices else (batch_size, self.input_size))
        self._output_shape = (batch_size, self.output_size)
        self._session = session
        self._extend = session.extend

    def fork(self, batch_size: int = 1) -> Session:
        """A session that shares the packed weights, with ``batch_size`` streams at their initial state."""
        _check_batch_size(batch_size)
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made._hold(self._session.fork(batch_size), batch_size)
        return made

    def __copy__(self) -> Session:
        made = self.fork(self.batch_size)
        made.load_state_dict(self.state_dict())
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        return self.__copy__()

    def __getstate__(self) -> dict[str, Any]:
        packed = torch.empty(self._session.weights_size(), dtype=torch.uint8, device="cpu")
        self._session.read_weights(packed.data_ptr())
        kept = {key: value for key, value in self.__dict__.items() if key not in ("_session", "_extend")}
        about = {"version": __version__, "isa": self._session.isa(), "packed": packed, "state": self.state_dict()}
        return kept | about

    def __setstate__(self, kept: dict[str, Any]) -> None:
        _check_kernels()
        version, isa, packed, state = (kept.pop(name) for name in ("version", "isa", "packed", "state"))
        if version != __version__:
            raise RuntimeError(f"this Session was pickled by seqaccel {version}, not {__version__}: make it anew")
        self.__dict__.update(kept)
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device="cpu")
        layers: list[_Layer] = [
            (kind, sizes, [None if shape is None else zeros(shape) for shape in shapes], numbers)
            for kind, sizes, shapes, numbers in self._shapes
        ]
        with backends.isa(isa):
            self._hold(_made(self.batch_size, self._weights, layers), self.batch_size)
        if self._session.isa() != isa or self._session.weights_size() != packed.numel():
            raise RuntimeError(
                f"this Session was pickled for {isa}, but another thread has changed the instruction set"
            )
        self._session.write_weights(packed.data_ptr())
        self.load_state_dict(state)

    def _checked(self, x: Tensor, shape: tuple[int | None, ...]) -> Tensor:
        _arguments.tensor("Session", "x", x)
        fits = x.dim() == len(shape) and all(n is None or n == size for n, size in zip(shape, x.shape, strict=True))
        if not fits:
            expected = ", ".join("T" if n is None else str(n) for n in shape)
            raise ValueError(f"x: expected shape ({expected}{',' * (len(shape) == 1)}), but got {tuple(x.shape)}")
        if x.dtype != self._dtype or x.device.type != "cpu":
            name = str(self._dtype).removeprefix("torch.")
            raise TypeError(f"x: expected {name} on the CPU, but got {x.dtype} on {x.device}")
        return _plain(x)

    def step(self, x_t: Tensor) -> Tensor:
        """Output (B, features) for one time step ``x_t``: (B, input features), or (B,) int64 for an Embedding."""
        try:
            fits = (
                x_t.shape == self._step_shape
                and x_t.dtype == self._dtype
                and x_t.is_cpu
                and x_t.is_contiguous()
                and not x_t.is_neg()
                and (address := x_t.data_ptr())
            )
        except AttributeError:
            _arguments.tensor("Session", "x_t", x_t)
            raise
        if not fits:
            x_t = self._checked(x_t, tuple(self._step_shape))
            address = x_t.data_ptr()
        y = torch.empty(self._output_shape, dtype=torch.float32, device="cpu")
        self._extend(address, 1, y.data_ptr())
        return y

    def extend(self, x: Tensor) -> Tensor:
        """Output for a chunk: (T, B, …) gives (T, B, features); batch first where the recurrent layers are."""
        shape: tuple[int | None, ...] = (None, *self._step_shape)
        if self.batch_first:
            x = self._checked(x, (shape[1], None, *shape[2:])).transpose(0, 1).contiguous()
        else:
            x = self._checked(x, shape)
        y = torch.empty((x.shape[0], *self._output_shape), dtype=torch.float32, device="cpu")
        self._extend(x.data_ptr(), x.shape[0], y.data_ptr())
        return y.transpose(0, 1) if self.batch_first else y

    def reset(self, mask: Tensor | None = None) -> None:
        """Resets the streams where ``mask`` (B,) is true; by default all."""
        if mask is None:
            mask = torch.ones(self.batch_size, dtype=torch.bool, device="cpu")
        _arguments.mask("Session.reset", "mask", mask, (self.batch_size,))
        self._session.select([-1 if new else b for b, new in enumerate(mask.tolist())])

    def select(self, indices: Tensor) -> None:
        """Stream b continues from the state of stream ``indices[b]``; an index may repeat (beam search)."""
        _arguments.tensor("Session.select", "indices", indices)
        integral = indices.dim() == 1 and not indices.is_floating_point() and indices.dtype != torch.bool
        chosen = indices.tolist() if integral else []
        if len(chosen) != self.batch_size or not all(0 <= i < self.batch_size for i in chosen):
            raise ValueError(
                f"indices: expected {self.batch_size} integers from 0 to {self.batch_size - 1}, but got {indices}"
            )
        self._session.select(chosen)

    def _grouped(self) -> Iterator[tuple[str, str, list[tuple[int, int]]]]:
        """Name, part, and (layer, width) of its layers, of each tensor of the state."""
        groups: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for name, layer, part, width in self._states:
            groups.setdefault((name, part), []).append((layer, width))
        for (name, part), layers in groups.items():
            yield name, part, layers

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors ``h`` and ``c``, each (num_layers, B, features); of a Sequential, ``<index>.h`` …"""
        state, parts = {}, []
        for name, part, layers in self._grouped():
            tensor = torch.empty(len(layers), self.batch_size, layers[0][1], dtype=torch.float32, device="cpu")
            parts += [(layer, part, tensor[i].data_ptr()) for i, (layer, _) in enumerate(layers)]
            state[name + part] = tensor
        self._session.read_state(parts)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continues from a state that :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: names, values or shapes do not fit this session; then nothing is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of tensors, but got {type(state_dict).__name__}")
        groups = list(self._grouped())
        names = [name + part for name, part, _ in groups]
        if set(state_dict) != set(names):
            raise ValueError(f"state_dict: expected the keys {names}, but got {sorted(state_dict)}")
        for name, part, layers in groups:
            shape = (len(layers), self.batch_size, layers[0][1])
            value = state_dict[name + part]
            _arguments.tensor("state_dict", repr(name + part), value)
            if value.is_complex() or value.is_meta:
                raise ValueError(
                    f"state_dict: expected {name + part!r} to hold real values, but got {value.dtype} on {value.device}"
                )
            if tuple(state_dict[name + part].shape) != shape:
                raise ValueError(
                    f"state_dict: expected {name + part!r} of shape {shape}, but got "
                    f"{tuple(state_dict[name + part].shape)}"
                )
        tensors = [_plain(state_dict[name + part].detach().to("cpu", torch.float32)) for name, part, _ in groups]
        parts = [
            (layer, part, tensor[i].data_ptr())
            for tensor, (_, part, layers) in zip(tensors, groups, strict=True)
            for i, (layer, _) in enumerate(layers)
        ]
        self._session.write_state(parts)


def _check_kernels() -> None:
    if _extension.cpp_error is not None:
        raise RuntimeError(f"a Session needs the C++ kernels: {_extension.cpp_error}")


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or not 1 <= batch_size <= _MOST_STREAMS:
        raise ValueError(f"batch_size: expected an integer from 1 to {_MOST_STREAMS}, but got {batch_size!r}")


def _made(batch_size: int, weights: str, layers: list[_Layer]) -> Any:
    """The session of C++."""
    from seqaccel import _session  # type: ignore[attr-defined]

    described = [
        (kind, (*sizes, 0, 0)[:5], [0 if t is None else t.data_ptr() for t in tensors], numbers)
        for kind, sizes, tensors, numbers in layers
    ]
    return _session.Session(_table(), batch_size, weights, described)


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and its values those in its memory: neither with the negative bit, nor a zero tensor without any."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.contiguous().resolve_neg()


def _describe(
    module: torch.nn.Module,
    layers: list[_Layer],
    states: list[_State],
    session: Session,
    name: str = "",
) -> None:
    """Appends the layers of a module, and the parts of their states."""
    if isinstance(module, torch.nn.Sequential):
        for child, part in module.named_children():
            _describe(part, layers, states, session, f"{name}{child}.")
    elif isinstance(module, Recurrent):
        _describe_recurrent(module, layers, states, session, name)
    elif isinstance(module, SRU):
        if module.input_to_hidden is not None:
            _describe(module.input_to_hidden, layers, states, session)
        for cell in module.rnn_lst:
            _describe(cell, layers, states, session, name)
    elif isinstance(module, SRUCell):
        _describe_sru(module, layers, states, name)
    elif isinstance(module, torch.nn.Linear):
        sizes = (module.in_features, 0, module.out_features)
        layers.append(("linear", sizes, [module.weight, module.bias], _NO_NUMBERS))
    elif isinstance(module, torch.nn.Embedding):
        sizes = (module.num_embeddings, 0, module.embedding_dim)
        if module.max_norm is not None:
            raise ValueError("module: a Session does not run an Embedding with max_norm")
        layers.append(("embedding", sizes, [module.weight], _NO_NUMBERS))
    elif isinstance(module, (torch.nn.LayerNorm, torch.nn.RMSNorm)):
        if len(module.normalized_shape) != 1:
            title, shape = type(module).__name__, tuple(module.normalized_shape)
            raise ValueError(f"module: a Session runs a {title} of the last dimension, but got {shape}")
        width = module.normalized_shape[0]
        if isinstance(module, torch.nn.LayerNorm):
            layers.append(("layer_norm", (width, 0, width), [module.weight, module.bias], (0.0, 0.0, module.eps)))
        else:
            eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
            layers.append(("rms_norm", (width, 0, width), [module.weight, None], (0.0, 0.0, eps)))
    elif isinstance(module, torch.nn.BatchNorm1d):
        _describe_batch_norm(module, layers)
    elif isinstance(module, _CELLS) or type(module) in REPLACEMENTS:
        _describe_recurrent(module, layers, states, session, name)
    elif not isinstance(module, (torch.nn.Identity, torch.nn.Dropout)):
        kind, parameter = _activation(module)
        if not layers:
            raise TypeError(f"module: a Sequential must not begin with {type(module).__name__}")
        width = layers[-1][1][2]
        layers.append((kind, (width, 0, width), [], (0.0, 0.0, parameter)))


def _describe_sru(module: SRUCell, layers: list[_Layer], states: list[_State], name: str) -> None:
    """A layer norm or a projection that stands before the product is a layer of its own; of both, the projection is
    multiplied into the weight, since the skip term reaches back over one layer."""
    if module.custom_m is not None:
        raise TypeError("module: a Session does not run an SRU with custom_m")
    if module.bidirectional:
        raise ValueError("module: a bidirectional SRU cannot run step by step")
    inputs, hidden, matrices = module.input_size, module.hidden_size, module.num_matrices
    weight, projection, norm = module.weight.detach(), module.weight_proj, module.layer_norm
    norm_first = norm is not None and not module.normalize_after
    skips = module.has_skip_term and matrices == 3
    before = len(layers)
    if norm is not None and norm_first:
        layers.append(("layer_norm", (inputs, 0, inputs), [norm.weight, norm.bias], (0.0, 0.0, norm.eps)))
    if projection is not None and norm_first and skips:
        weight = projection.detach() @ weight
    elif projection is not None:
        layers.append(("linear", (inputs, 0, projection.shape[1]), [projection.t(), None], _NO_NUMBERS))
    weight = weight.view(weight.shape[0], hidden, matrices).permute(2, 1, 0).flatten(0, 1)
    scale = module.scale_x.item() if module.rescale and skips else 1.0
    skip = 1 + len(layers) - before if skips else 0
    states.append((name, len(layers), "c", hidden))
    layers.append(
        (
            "sru_tanh" if module.use_tanh else "sru",
            (weight.shape[1], hidden, hidden, matrices, skip),
            [weight, None, module.bias, module.weight_c],
            (0.0, 0.0, scale),
        )
    )
    if norm is not None and not norm_first:
        layers.append(("layer_norm", (hidden, 0, hidden), [norm.weight, norm.bias], (0.0, 0.0, norm.eps)))


def _describe_batch_norm(module: torch.nn.BatchNorm1d, layers: list[_Layer]) -> None:
    """In eval mode it is a gain and a bias a feature: those of the Linear before it, or a layer."""
    if module.running_mean is None or module.running_var is None:
        raise ValueError("module: a Session runs a BatchNorm1d with running statistics only")
    gain = (module.running_var.detach() + module.eps).rsqrt()
    if module.weight is not None:
        gain = gain * module.weight.detach()
    shift = -module.running_mean.detach() * gain
    if module.bias is not None:
        shift = shift + module.bias.detach()
    width = module.num_features
    if not layers or layers[-1][0] != "linear" or layers[-1][1][2] != width:
        layers.append(("batch_norm", (width, 0, width), [gain, shift], _NO_NUMBERS))
        return
    kind, sizes, (weight, bias), numbers = layers[-1]
    assert weight is not None
    shift = shift if bias is None else shift + bias.detach() * gain
    layers[-1] = (kind, sizes, [weight.detach() * gain.unsqueeze(1), shift], numbers)


def _activation(module: torch.nn.Module) -> tuple[str, float]:
    if type(module) in _ACTIVATIONS:
        return _ACTIVATIONS[type(module)], 0.0
    if isinstance(module, torch.nn.Softmax):
        if module.dim != -1:
            raise ValueError(f"module: a Session runs a Softmax of dim=-1, but got dim={module.dim}")
        return "softmax", 0.0
    if isinstance(module, torch.nn.GELU):
        return ("gelu" if module.approximate == "none" else "gelu_tanh"), 0.0
    if isinstance(module, torch.nn.LeakyReLU):
        return "leaky_relu", module.negative_slope
    if isinstance(module, torch.nn.ELU):
        return "elu", module.alpha
    raise TypeError(
        "module: expected a recurrent layer or cell of seqaccel.nn or torch.nn, or a Sequential of them and of Linear, "
        f"Embedding, LayerNorm, RMSNorm, BatchNorm1d, Softmax and activations, but got {type(module).__name__}"
    )


def _describe_recurrent(module: Any, layers: list[_Layer], states: list[_State], session: Session, name: str) -> None:
    if type(module) in REPLACEMENTS:  # torch's own: seen as ours, which has the same attributes
        torch_s, module = module, copy.copy(module)
        module.__class__ = REPLACEMENTS[type(torch_s)]
    if isinstance(module, _CELLS):
        kind = {RNNCell: "", LSTMCell: "lstm", GRUCell: "gru"}[type(module)] or f"rnn_{module.nonlinearity}"
        weights: list[Tensor | None] = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]
        sizes = (module.input_size, module.hidden_size, module.hidden_size)
        states += [(name, len(layers), part, module.hidden_size) for part in ("hc" if kind == "lstm" else "h")]
        layers.append((kind, sizes, [*weights, None] if kind == "lstm" else weights, _NO_NUMBERS))
        return
    if "cpp" not in CELLS[module.cell].backends:
        raise TypeError(f"module: a Session runs C++ kernels, which {type(module).__name__} has not")
    if module.bidirectional:
        raise ValueError(f"module: a bidirectional {type(module).__name__} cannot run step by step")
    session.batch_first = session.batch_first or module.batch_first
    hidden, outputs = module.hidden_size, module.proj_size or module.hidden_size
    rates = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout, module.zoneout)
    for layer in range(module.num_layers):
        inputs = module.input_size if layer == 0 else outputs
        states.append((name, len(layers), "h", outputs))
        if CELLS[module.cell].has_cell_state:
            states.append((name, len(layers), "c", hidden))
        weights = module._layer_weights(layer)
        layers.append((module.cell, (inputs, hidden, outputs), weights, (*rates, 0.0)))


def _table() -> int:
    """Address of the table of C functions in the ``_C`` that is loaded."""
    function = ctypes.CDLL(str(_extension.cpp_path)).seqaccel_session_table
    function.restype = ctypes.c_void_p
    return function()
