"""Streaming runners: weights packed once, state in C++, one cheap call a step."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seqaccel import __version__, _arguments, _extension, backends
from seqaccel.program import Layer, Program, State, described

__all__ = ["Session"]

_FORMAT = "seqaccel.Session"
_PRECISIONS = ("float32", "bfloat16", "int8")
_MOST_STREAMS = 2**31 - 1
_MOST_STEPS = 2**24  # their number is kept in float32
_LONGEST = 2**62
_MOST_INT8 = 65536  # features: sums of more products of 255 * 127 do not fit 32 bits


class Session:
    r"""Runs recurrent, convolutional and attention layers, or a module of them, step by step with packed weights.

    The weights are copied when the session is made: later changes of the module do not reach it. The module runs as in
    eval mode: no dropout, zoneout's expectation. Threads that share a session take turns.

    :meth:`fork` makes a session with streams at their initial state; ``copy.copy`` and ``copy.deepcopy`` make one that
    continues from the same state. All of them share the packed weights, and threads may run them at the same time.
    ``pickle``, ``torch.save`` and :meth:`save` keep the packed weights and the state. Loading needs the same version of
    seqaccel and a processor with the instruction set that the weights were packed for.

    Args:
        module: a recurrent layer or cell of :mod:`seqaccel.nn` (:class:`~seqaccel.nn.LSTM`, :class:`~seqaccel.nn.GRU`,
            :class:`~seqaccel.nn.LSTMCell`, :class:`~seqaccel.nn.SRU`, :class:`~seqaccel.nn.SRUpp`, …) or of
            :mod:`torch.nn`, in float32 on the CPU, any number of layers, one direction (the output of a cell is h); a
            :class:`~seqaccel.nn.CausalConv1d`, :class:`~seqaccel.nn.CausalConvTranspose1d` (last),
            :class:`~seqaccel.nn.TCN`, :class:`~seqaccel.nn.WaveNet` (the local and then the global condition are more
            channels of its input) or :class:`~seqaccel.nn.GatedConvLM`, whose past
            inputs stay in rings; a causal :class:`~seqaccel.nn.HierarchicalAttention` or
            :class:`~seqaccel.nn.HierarchicalAttentionEncoder`, or torch's ``TransformerEncoder`` and
            ``TransformerEncoderLayer`` with the former as ``self_attn``, whose keys and values stay in rings, O(log T)
            of them; or a :class:`torch.nn.Sequential` of those with ``Linear``, ``Embedding`` (first),
            ``LayerNorm`` and ``RMSNorm`` (of the last dimension), ``BatchNorm1d`` (of the features of a step, by its
            running statistics), and, not first, ``Softmax`` (``dim=-1``), ``ReLU``, ``Tanh``, ``Sigmoid``, ``SiLU``,
            ``Hardswish``, ``GELU``, ``LeakyReLU`` and ``ELU``; ``Identity`` and ``Dropout`` do nothing. A
            :class:`torch.nn.Conv1d` behind causal padding in a Sequential is a causal convolution. A list is a
            Sequential; :class:`~seqaccel.Residual` and :class:`~seqaccel.Concatenation` in it add and concatenate.

            Any other module is traced by :func:`torch.export.export`. Its ``step(x_t, state)`` returns an output and
            the next state, and ``init_state(batch_size)`` gives the first one, zeros; a module without both is called
            with the input alone. In it run layers of seqaccel by their ``step``, torch's recurrent layers and cells,
            ``Linear``, convolutions over the samples of one step, norms, functions of each value, sums, and all that
            moves values. The streams of a batch stay apart.
        batch_size: number of independent streams B. Default: 1
        weights: precision of the packed matrices. ``"float32"``; ``"bfloat16"``: half the memory, weights and the
            values they multiply are rounded to 8 bits; ``"int8"``: a quarter of the memory, each row of a weight, and
            at each step each vector it multiplies, is rounded to 255 values with a scale. Sums, biases, embeddings, the
            cell's functions, attention and the state stay float32 (int8: sums are exact). Default: ``"float32"``
        example: an input of one step (B, …), of any number of streams, for a module that is traced and comes first. Its
            shape and dtype count, not its values.
        init_state: of that module, where it has none: a function of the batch size. The module's ``forward`` then takes
            the input and the state, if it has no ``step``.
        memory_length: for an :class:`~seqaccel.nn.SRUpp`, which needs it: each step attends to itself and to at most so
            many steps before it, whose keys and values stay in a ring of this size. Default: None, nothing attends.
        max_length: for hierarchical attention: steps that a stream will have. A longer stream forgets its oldest steps.
            With a number of ``levels`` it is needed, as memory grows with it. Default: 2^24, with learned positions
            their number

    Raises:
        TypeError: a session cannot run ``module``, or a module in it. The message names the operator and its line.
        ValueError: ``batch_size``, ``weights``, ``memory_length`` or ``max_length`` is out of range, or the module is
            bidirectional, or not float32 on the CPU.
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
        >>> class Gate(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lstm, self.gate = torch.nn.LSTMCell(8, 16), torch.nn.Linear(8, 16)
        ...
        ...     def init_state(self, batch_size):
        ...         return torch.zeros(batch_size, 16), torch.zeros(batch_size, 16)
        ...
        ...     def step(self, x_t, state):
        ...         h, c = self.lstm(x_t, state)
        ...         return torch.cat([h * self.gate(x_t).sigmoid(), x_t], -1), (h, c)
        >>> seqaccel.Session(Gate(), example=torch.zeros(1, 8)).step(torch.randn(1, 8)).shape
        torch.Size([1, 24])
    """

    def __init__(
        self,
        module: torch.nn.Module | Sequence[torch.nn.Module],
        batch_size: int = 1,
        weights: str = "float32",
        *,
        example: Tensor | None = None,
        init_state: Callable[[int], Any] | None = None,
        memory_length: int | None = None,
        max_length: int | None = None,
    ) -> None:
        _check_kernels()
        if weights not in _PRECISIONS:
            raise ValueError(f"weights: expected 'float32', 'bfloat16' or 'int8', but got {weights!r}")
        _check_batch_size(batch_size)
        if memory_length is not None and not (_integer(memory_length) and 1 <= memory_length <= _MOST_STEPS):
            raise ValueError(f"memory_length: expected an integer from 1 to {_MOST_STEPS}, but got {memory_length!r}")
        if max_length is not None and not (_integer(max_length) and 1 <= max_length <= _LONGEST):
            raise ValueError(f"max_length: expected an integer from 1 to {_LONGEST}, but got {max_length!r}")
        if init_state is not None and not callable(init_state):
            raise TypeError(f"init_state: expected a function of the batch size, but got {type(init_state).__name__}")
        whole: Any = torch.nn.Sequential(*module) if isinstance(module, (list, tuple)) else module
        program = described(whole, memory_length, max_length, example=example, init_state=init_state)
        self._pack(program, batch_size, weights)

    def _pack(self, program: Program, batch_size: int, weights: str) -> None:
        layers = program.layers
        if not layers:
            raise TypeError("module: there is nothing to run in an empty Sequential")
        for i, layer in enumerate(layers):
            before = layers[i - layer.source] if i >= layer.source else None
            if before is not None and layer.inputs and before.width != layer.inputs * layer.frames:
                raise ValueError(
                    f"module: {before.kind} gives {before.width} features, but {layer.kind} takes {layer.inputs}"
                )
            if i > 0 and layer.kind == "embedding":
                raise TypeError("module: an Embedding must come first")
            for tensor in layer.weights:
                if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
                    raise ValueError(
                        "module: expected float32 parameters on the CPU, "
                        f"but {layer.kind} has {tensor.dtype} on {tensor.device}"
                    )
            widest = max(layer.inputs * layer.taps, layer.outputs)
            if (
                weights == "int8"
                and layer.kind not in ("embedding", "attention", "hierarchical", "positions")
                and widest > _MOST_INT8
            ):
                raise ValueError(f"weights: int8 takes up to {_MOST_INT8} features, but {layer.kind} has {widest}")
            layer.weights = [None if t is None else _plain(t.detach()) for t in layer.weights]
            if any(t is not None and t.numel() > 0 and t.data_ptr() == 0 for t in layer.weights):
                raise ValueError(f"module: expected parameters with memory, but {layer.kind} has a fake or a freed one")
        self._states, self.batch_first, self._channels_first = (
            program.states,
            program.batch_first,
            program.channels_first,
        )
        self._indices = layers[0].kind == "embedding"
        self.input_size = program.width(-1) or 1
        self._phases = program.phases
        self.output_size = layers[-1].width // program.phases
        phases = (program.phases,) * (program.phases > 1)
        self._shape_of_output = program.output_shape or (self.output_size, *phases)
        self._shape_of_input = () if self._indices else program.input_shape or (self.input_size,)
        self._dtype = torch.int64 if self._indices else torch.float32
        self._weights = weights
        self._shapes = [
            (dataclasses.replace(layer, weights=[]), [None if t is None else tuple(t.shape) for t in layer.weights])
            for layer in layers
        ]
        self._hold(_made(batch_size, weights, layers), batch_size)

    def _hold(self, session: Any, batch_size: int) -> None:
        """A session of C++ of so many streams."""
        self.batch_size = batch_size
        self._step_shape = torch.Size((batch_size, *self._shape_of_input))
        self._output_shape = (batch_size, *self._shape_of_output)
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
        layers = [
            dataclasses.replace(layer, weights=[None if shape is None else zeros(shape) for shape in shapes])
            for layer, shapes in self._shapes
        ]
        with backends.isa(isa):
            self._hold(_made(self.batch_size, self._weights, layers), self.batch_size)
        if self._session.isa() != isa or self._session.weights_size() != packed.numel():
            raise RuntimeError(
                f"this Session was pickled for {isa}, but another thread has changed the instruction set"
            )
        self._session.write_weights(packed.data_ptr())
        self.load_state_dict(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the packed weights and the state to a file, for :meth:`load`.

        Example:
            >>> import tempfile, torch, seqaccel
            >>> session = seqaccel.Session(torch.nn.GRU(4, 8))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     session.save(f"{folder}/gru.session")
            ...     loaded = seqaccel.Session.load(f"{folder}/gru.session")
            >>> x_t = torch.randn(1, 4)
            >>> torch.equal(loaded.step(x_t), session.step(x_t))
            True
        """
        kept = self.__getstate__()
        kept["_states"] = [vars(state) for state in kept["_states"]]
        kept["_shapes"] = [(vars(layer), shapes) for layer, shapes in kept["_shapes"]]
        torch.save({"format": _FORMAT, **kept}, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Session:
        """A session from a file that :meth:`save` wrote. Unlike ``pickle``, it runs no code that a file names.

        The module's class is not needed. The file is for the same version of seqaccel, and for processors with the
        instruction set of the one that made the session; a session made under
        ``seqaccel.backends.isa("avx2")`` loads on every x86 processor of the last ten years.

        Raises:
            ValueError: the file holds no session.
            RuntimeError: it is of another version, or this processor has not the instruction set.
        """
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(kept, dict) or kept.pop("format", None) != _FORMAT:
            raise ValueError(f"path: {os.fspath(path)!r} holds no Session")
        kept["_states"] = [State(**state) for state in kept["_states"]]
        kept["_shapes"] = [(Layer(**layer), shapes) for layer, shapes in kept["_shapes"]]
        loaded = object.__new__(cls)
        loaded.__setstate__(kept)
        return loaded

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

    def step(self, x_t: Tensor, *, advance: Tensor | None = None) -> Tensor:
        """Output (B, features) for one time step ``x_t``: (B, input features), or (B,) int64 for an Embedding.

        ``advance`` (B,) bool: a stream where it is false has no input at this step. It keeps its state, and its output
        is 0. A session that ends with a transposed convolution of a stride s gives (B, features, s).
        """
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
        if advance is None:
            self._extend(address, 1, y.data_ptr())
        else:
            advance = self._advancing(advance)
            self._extend(address, 1, y.data_ptr(), advance.data_ptr())
        return y

    def extend(self, x: Tensor, *, advance: Tensor | None = None) -> Tensor:
        """Output for a chunk: (T, B, …) gives (T, B, features); (B, T, …) where the recurrent layers are batch first.
        Where the module begins with a convolution: (B, C, T) gives (B, features, T), and (B, T) where it is a WaveNet
        of classes.

        ``advance`` as in :meth:`step`, for all steps of the chunk.
        """
        shape: tuple[int | None, ...] = (None, *self._step_shape)
        if self._channels_first:
            x = self._checked(x, (*shape[1:], None)).movedim(-1, 0).contiguous()
        elif self.batch_first:
            x = self._checked(x, (shape[1], None, *shape[2:])).transpose(0, 1).contiguous()
        else:
            x = self._checked(x, shape)
        y = torch.empty((x.shape[0], *self._output_shape), dtype=torch.float32, device="cpu")
        flags = None if advance is None else self._advancing(advance)
        self._extend(x.data_ptr(), x.shape[0], y.data_ptr(), 0 if flags is None else flags.data_ptr())
        if self._phases > 1:
            y = y.permute(0, 3, 1, 2).flatten(0, 1)
        return y.permute(1, 2, 0) if self._channels_first else y.transpose(0, 1) if self.batch_first else y

    def _advancing(self, advance: Tensor) -> Tensor:
        _arguments.mask("Session", "advance", advance, (self.batch_size,))
        return advance.to("cpu", torch.bool).contiguous()

    def reset(self, mask: Tensor | None = None) -> None:
        """Resets the streams where ``mask`` (B,) is true; by default all."""
        if mask is None:
            mask = torch.ones(self.batch_size, dtype=torch.bool, device="cpu")
        _arguments.mask("Session.reset", "mask", mask, (self.batch_size,))
        self._session.select([-1 if new else b for b, new in enumerate(mask.tolist())])

    def select(self, indices: Tensor) -> None:
        """Stream b continues from the state of stream ``indices[b]``; an index may repeat (beam search)."""
        _arguments.tensor("Session.select", "indices", indices)
        fits = tuple(indices.shape) == (self.batch_size,)
        integral = not (indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool)
        chosen = indices.tolist() if fits and integral else []
        if not chosen or not all(0 <= i < self.batch_size for i in chosen):
            raise ValueError(
                f"indices: expected {self.batch_size} integers from 0 to {self.batch_size - 1}, but got {indices}"
            )
        self._session.select(chosen)

    def _grouped(self) -> dict[str, list[State]]:
        """The parts of each tensor of the state."""
        groups: dict[str, list[State]] = {}
        for part in self._states:
            groups.setdefault(part.name, []).append(part)
        return groups

    def _tensor_shape(self, parts: list[State]) -> tuple[int, ...]:
        """Shape in C++ of a tensor of the state."""
        stack = (len(parts),) if parts[0].stacked else ()
        return (*stack, self.batch_size, *parts[0].shape)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors ``h`` and ``c``, each (num_layers, B, features), of a convolution ``history``
        (B, C, (K-1)·dilation), of a QRNN with a window of 2 ``x_0`` …, (B, features), and of the layers of an SRUpp
        that attend ``memory`` (layers, B, memory_length, 2·proj_size), the steps' keys and values (times alpha), oldest
        first, and ``age`` (layers, B), how many of them there have been; of hierarchical attention ``memory``
        (layers, B, heads, n), its rings and sums, and ``age`` (layers, B), the steps of each stream, in int64, which
        learned positions have as ``position`` (1, B); in a Sequential ``<index>.h`` …"""
        state, found = {}, []
        for name, parts in self._grouped().items():
            tensor = torch.empty(self._tensor_shape(parts), dtype=parts[0].dtype, device="cpu")
            found += _addresses(tensor, parts)
            state[name] = tensor.transpose(1, 2) if parts[0].channels_first else tensor
        self._session.read_state(found)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continues from a state that :meth:`state_dict` returned.

        Raises:
            TypeError, ValueError: names, values or shapes do not fit this session; then nothing is changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of tensors, but got {type(state_dict).__name__}")
        groups = self._grouped()
        if set(state_dict) != set(groups):
            raise ValueError(f"state_dict: expected the keys {list(groups)}, but got {sorted(state_dict)}")
        tensors, found = [], []
        for name, parts in groups.items():
            shape, value = self._tensor_shape(parts), state_dict[name]
            history = parts[0].channels_first
            shape = (shape[0], shape[2], shape[1]) if history else shape
            _arguments.tensor("state_dict", repr(name), value)
            if value.is_complex() or value.is_meta:
                raise ValueError(
                    f"state_dict: expected {name!r} to hold real values, but got {value.dtype} on {value.device}"
                )
            if tuple(value.shape) != shape:
                raise ValueError(f"state_dict: expected {name!r} of shape {shape}, but got {tuple(value.shape)}")
            value = value.detach().to("cpu", parts[0].dtype)
            tensors.append(_plain(value.transpose(1, 2) if history else value))
            found += _addresses(tensors[-1], parts)
        self._session.write_state(found)


def _check_kernels() -> None:
    if _extension.cpp_error is not None:
        raise RuntimeError(f"a Session needs the C++ kernels: {_extension.cpp_error}")


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_batch_size(batch_size: int) -> None:
    if not (_integer(batch_size) and 1 <= batch_size <= _MOST_STREAMS):
        raise ValueError(f"batch_size: expected an integer from 1 to {_MOST_STREAMS}, but got {batch_size!r}")


def _made(batch_size: int, weights: str, layers: list[Layer]) -> Any:
    """The session of C++."""
    from seqaccel import _session  # type: ignore[attr-defined]

    described = [
        vars(layer) | {"weights": [0 if t is None else t.data_ptr() for t in layer.weights]} for layer in layers
    ]
    return _session.Session(_table(), batch_size, weights, described)


def _addresses(tensor: Tensor, parts: list[State]) -> list[tuple[int, str, int, int]]:
    """Layer, letter, level and address of each part of a tensor of the state."""
    rows = tensor if parts[0].stacked else [tensor]
    return [(part.layer, part.part, 0, row.data_ptr()) for part, row in zip(parts, rows, strict=True)]


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous, and its values those in its memory: neither with the negative bit, nor a zero tensor without any."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.contiguous().resolve_neg()


def _table() -> int:
    """Address of the table of C functions in the ``_C`` that is loaded."""
    function = ctypes.CDLL(str(_extension.cpp_path)).seqaccel_session_table
    function.restype = ctypes.c_void_p
    return function()
