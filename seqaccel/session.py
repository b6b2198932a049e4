"""Streaming runners: weights packed once, state in C++, one cheap call a step."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from seqaccel import _extension, nn

__all__ = ["Session"]


class Session:
    r"""Runs an LSTM on a batch of streams, step by step, with its weights packed once.

    The weights are copied when the session is made: later changes of the module do not reach it. A session is not
    thread-safe; make one for each thread.

    Args:
        module: a :class:`seqaccel.nn.LSTM` in float32 on the CPU: any number of layers, one direction, no projection.
        batch_size: number of independent streams B. Default: 1
        weights: precision the packed weights are kept in; ``"float32"``.

    Raises:
        TypeError: ``module`` is none that a session runs.
        ValueError: ``batch_size`` or ``weights`` is out of range, or the module is bidirectional, projected, or not
            float32 on the CPU.
        RuntimeError: the C++ kernels are missing.

    Example:
        >>> import torch, seqaccel
        >>> lstm = seqaccel.nn.LSTM(8, 16)
        >>> session = seqaccel.Session(lstm, batch_size=2)
        >>> x = torch.randn(5, 2, 8)
        >>> steps = torch.stack([session.step(x_t) for x_t in x])
        >>> torch.allclose(steps, lstm(x)[0], atol=1e-6)
        True
    """

    def __init__(self, module: nn.LSTM, batch_size: int = 1, weights: str = "float32") -> None:
        if _extension.cpp_error is not None:
            raise RuntimeError(f"a Session needs the C++ kernels: {_extension.cpp_error}")
        if not isinstance(module, nn.LSTM):
            raise TypeError(f"module: expected a seqaccel.nn.LSTM, but got {type(module).__name__}")
        if weights != "float32":
            raise ValueError(f"weights: expected 'float32', but got {weights!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer of at least 1, but got {batch_size!r}")
        if module.bidirectional:
            raise ValueError("module: a bidirectional LSTM cannot run step by step")
        if module.proj_size:
            raise ValueError("module: a Session does not run an LSTM with proj_size")
        for name, parameter in module.named_parameters():
            if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
                raise ValueError(
                    "module: expected float32 parameters on the CPU, "
                    f"but {name} is {parameter.dtype} on {parameter.device}"
                )
        from seqaccel import _session  # type: ignore[attr-defined]

        self.batch_size = batch_size
        self.input_size = module.input_size
        self.hidden_size = module.hidden_size
        self.num_layers = module.num_layers
        self.batch_first = module.batch_first
        layers, kept = [], []
        for layer in range(module.num_layers):
            names = [f"weight_ih_l{layer}", f"weight_hh_l{layer}", f"bias_ih_l{layer}", f"bias_hh_l{layer}"]
            tensors = [getattr(module, name, None) for name in names]
            tensors = [None if t is None else t.detach().contiguous() for t in tensors]
            kept.append(tensors)
            input_size = self.input_size if layer == 0 else self.hidden_size
            layers.append((*(0 if t is None else t.data_ptr() for t in tensors), input_size))
        self._session = _session.LstmSession(_table(), batch_size, self.hidden_size, layers)

    def _checked(self, x: Tensor, shape: tuple[int | None, ...]) -> Tensor:
        fits = x.dim() == len(shape) and all(n is None or n == size for n, size in zip(shape, x.shape, strict=True))
        if not fits:
            expected = ", ".join("T" if n is None else str(n) for n in shape)
            raise ValueError(f"x: expected shape ({expected}), but got {tuple(x.shape)}")
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"x: expected float32 on the CPU, but got {x.dtype} on {x.device}")
        return x.detach().contiguous()

    def step(self, x_t: Tensor) -> Tensor:
        """Output (B, hidden_size) of the last layer for one time step ``x_t`` (B, input_size)."""
        x_t = self._checked(x_t, (self.batch_size, self.input_size))
        y = torch.empty(self.batch_size, self.hidden_size)
        self._session.extend(x_t.data_ptr(), 1, y.data_ptr())
        return y

    def extend(self, x: Tensor) -> Tensor:
        """Output for a chunk: (T, B, input_size) gives (T, B, hidden_size), batch first where the module is."""
        shape = (None, self.batch_size, self.input_size)
        if self.batch_first:
            x = self._checked(x, (shape[1], None, shape[2])).transpose(0, 1).contiguous()
        else:
            x = self._checked(x, shape)
        y = torch.empty(x.shape[0], self.batch_size, self.hidden_size)
        self._session.extend(x.data_ptr(), x.shape[0], y.data_ptr())
        return y.transpose(0, 1) if self.batch_first else y

    def reset(self, mask: Tensor | None = None) -> None:
        """Starts the streams where ``mask`` (B,) is true anew; all of them by default."""
        if mask is None:
            mask = torch.ones(self.batch_size, dtype=torch.bool)
        if mask.dtype != torch.bool or tuple(mask.shape) != (self.batch_size,):
            raise ValueError(
                f"mask: expected bool of shape ({self.batch_size},), but got {mask.dtype} of {tuple(mask.shape)}"
            )
        self._session.select([-1 if new else b for b, new in enumerate(mask.tolist())])

    def select(self, indices: Tensor) -> None:
        """Stream b goes on from what stream ``indices[b]`` was; an index may come more than once (beam search)."""
        chosen = indices.tolist() if indices.dim() == 1 and not indices.is_floating_point() else []
        if len(chosen) != self.batch_size or not all(0 <= i < self.batch_size for i in chosen):
            raise ValueError(
                f"indices: expected {self.batch_size} integers from 0 to {self.batch_size - 1}, but got {indices}"
            )
        self._session.select(chosen)

    def state_dict(self) -> dict[str, Tensor]:
        """The state as tensors ``h`` and ``c``, each (num_layers, B, hidden_size)."""
        state = torch.empty(2, self.num_layers, self.batch_size, self.hidden_size)
        self._session.read_state(state.data_ptr())
        return {"h": state[0].clone(), "c": state[1].clone()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from a state that :meth:`state_dict` gave."""
        shape = (self.num_layers, self.batch_size, self.hidden_size)
        if set(state_dict) != {"h", "c"}:
            raise ValueError(f"state_dict: expected the keys 'h' and 'c', but got {sorted(state_dict)}")
        for name, part in state_dict.items():
            if tuple(part.shape) != shape:
                raise ValueError(f"state_dict: expected {name!r} of shape {shape}, but got {tuple(part.shape)}")
        state = torch.stack([state_dict["h"], state_dict["c"]]).to("cpu", torch.float32).contiguous()
        self._session.write_state(state.data_ptr())


def _table() -> int:
    """Address of the table of C functions in the ``_C`` that is loaded."""
    function = ctypes.CDLL(str(_extension.cpp_path)).seqaccel_session_table
    function.restype = ctypes.c_void_p
    return function()
