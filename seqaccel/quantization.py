"""Recurrent layers of any model with packed int8 or bfloat16 weights, for inference on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from seqaccel import _arguments
from seqaccel.convert import Report
from seqaccel.convert import torch as torch_layers
from seqaccel.convert._model import Filter, check_filter, check_model, title
from seqaccel.convert._swap import Asked, Swap, combined, plain_class, remembered, restore, swap
from seqaccel.nn.rnn._base import Recurrent
from seqaccel.session import Session

WEIGHTS = ("int8", "bfloat16")


class Quantized(NamedTuple):
    """One recurrent layer of a model."""

    path: str  #: its name in the model, or ``"(model)"``
    source: str  #: its class
    target: str  #: the precision of its weights, or ``""``
    error: float  #: ‖quantized - float32‖ / ‖float32‖ of its outputs over the loader; NaN without one
    reason: str  #: why it was left as it is, or ``""``


class _Packed:
    """The packed weights of one layer: a session for all layers, or where it is bidirectional one for each of them and
    each direction."""

    def __init__(self, module: Any, weights: str) -> None:
        self.weights = weights
        self.pack(module)

    def pack(self, module: Any) -> None:
        self.seen = self._look(module)
        if module.bidirectional:
            views = [self._view(module, [names]) for names in module._all_weights]
        else:
            views = [self._view(module, module._all_weights)]
        self.sessions = [Session(view, weights=self.weights) for view in views]

    @staticmethod
    def _view(module: Any, names: list[list[str]]) -> Any:
        """A module of one direction that has these weights of a module."""
        view = object.__new__(type(module))
        weights = [getattr(module, name) for layer in names for name in layer]
        vars(view).update(vars(module))
        vars(view).update(num_layers=len(names), input_size=weights[0].shape[1], bidirectional=False, batch_first=False)
        vars(view).update(_all_weights=names, _flat_weights=weights, _flat_weight_refs=[])
        return view

    @staticmethod
    def _look(module: Any) -> list[tuple[int, int]]:
        parameters = [*module.parameters(), *module.buffers()]
        return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in parameters]

    def run(
        self, module: Any, x: Tensor, state: Any, batch_sizes: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (T, B, I), of which ``batch_sizes`` rows run at each step, or with ``reset`` (T, B): output and last state,
        as torch.nn has them."""
        if self._look(module) != self.seen:
            self.pack(module)
        directions = 2 if module.bidirectional else 1
        lasts: list[dict[str, Tensor]] = []
        backward = _reversal(x, batch_sizes) if directions == 2 else None
        ends = None if reset is None else torch.cat([reset[1:], torch.zeros_like(reset[:1])]).flip(0)
        rows = 1 if directions == 2 else module.num_layers  # of a state, for each session
        for first in range(0, len(self.sessions), directions):
            outputs = []
            for i, master in enumerate(self.sessions[first : first + directions], first):
                session = master.fork(x.shape[1])
                if state is not None:
                    parts = (part[i * rows : (i + 1) * rows] for part in state)
                    session.load_state_dict(dict(zip(session.state_dict(), parts, strict=True)))
                if i == first or backward is None:
                    outputs.append(_extended(session, x, batch_sizes, reset))
                else:
                    y = _extended(session, x.gather(0, backward.expand_as(x)), batch_sizes, ends)
                    outputs.append(y.gather(0, backward.expand_as(y)))
                lasts.append(session.state_dict())
            x = torch.cat(outputs, 2) if directions == 2 else outputs[0]
        return x, tuple(torch.cat([last[name] for last in lasts]) for name in lasts[0])


def _reversal(x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """(T, B, 1): at each step the step that lies as far from the sequence's end as that one from its beginning."""
    steps = torch.arange(x.shape[0]).unsqueeze(1)
    if batch_sizes is None:
        return steps.flip(0).unsqueeze(2).expand(-1, x.shape[1], 1)
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(x.shape[1])).sum(0)
    return torch.where(steps < lengths, lengths - 1 - steps, steps).unsqueeze(2)


def _extended(session: Session, x: Tensor, batch_sizes: Tensor | None, reset: Tensor | None) -> Tensor:
    """The output of a chunk; as long as equally many rows run, or no episode begins, one call does them."""
    if reset is not None and len(reset):
        steps = sorted({0, *reset.any(1).nonzero().flatten().tolist()})
        outputs = []
        for start, chunk in zip(steps, x.tensor_split(steps[1:]), strict=True):
            session.reset(reset[start])
            outputs.append(session.extend(chunk))
        return torch.cat(outputs)
    if batch_sizes is None:
        return session.extend(x)
    sizes, counts = torch.unique_consecutive(batch_sizes, return_counts=True)
    running = torch.arange(x.shape[1])
    chunks = zip(sizes.tolist(), x.split(counts.tolist()), strict=True)
    return torch.cat([session.extend(chunk, advance=running < size) for size, chunk in chunks])


class _Quantized:
    """In front of a recurrent layer's class: outside of training its weights are packed."""

    @torch.compiler.disable
    def _run(
        self: Any, input: Tensor, state: Any, batch_sizes: Tensor | None = None, reset: Tensor | None = None
    ) -> Any:
        if self.training:
            return super()._run(input, state, batch_sizes, reset)  # type: ignore[misc]
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError("a quantized layer runs a session, which torch.jit.trace and exporters cannot record")
        with torch.no_grad():
            if batch_sizes is None:
                return self._packed.run(self, input, state, None, reset)
            x, lengths = pad_packed_sequence(PackedSequence(input, batch_sizes))
            output, last = self._packed.run(self, x, state, batch_sizes, None)
            return pack_padded_sequence(output, lengths).data, last

    def extra_repr(self: Any) -> str:
        return f"{super().extra_repr()}, weights={self._packed.weights}"  # type: ignore[misc]


def _answer(module: torch.nn.Module, weights: str) -> Swap | str | None:
    """Of a recurrent layer of torch.nn or of ours."""
    kind: Any = plain_class(module)
    if issubclass(kind, Recurrent):
        ours: Any = kind
    else:
        found = [torch_layers.recurrent(module, Asked(name)) for name in torch_layers.NAMES]
        answer = next((one for one in found if one is not None), None)
        if not isinstance(answer, Swap):
            return answer
        ours = answer.kind
    if not issubclass(ours, Recurrent):
        return "a cell: its steps are too short to pack a state for each; use seqaccel.Session"
    put_back = remembered(module)
    swap(module, Swap("", ours))
    try:
        packed = _Packed(module, weights)
    except (TypeError, ValueError) as error:
        return str(error)
    finally:
        put_back()
    return Swap(weights, combined(_Quantized, ours), {"_packed": packed})


def _outputs(
    model: torch.nn.Module, layers: Iterable[tuple[str, torch.nn.Module]], batch: Any
) -> dict[str, list[Tensor]]:
    """Floating-point outputs of the layers' first calls and of the model."""
    seen: dict[str, list[Tensor]] = {}

    def record(path: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
            seen.setdefault(path, [t.detach().double() for t in tensors])

        return hook

    hooks = [layer.register_forward_hook(record(path)) for path, layer in [*layers, ("(model)", model)]]
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _errors(
    model: torch.nn.Module, swaps: list[tuple[str, torch.nn.Module, Swap]], loader: Iterable[Any]
) -> dict[str, float]:
    """Relative errors by path, over all batches."""
    layers = [(path, module) for path, module, _ in swaps]
    sums: dict[str, list[float]] = {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                exact = _outputs(model, layers, batch)
                for _, module, answer in swaps:
                    swap(module, answer)
                rounded = _outputs(model, layers, batch)
                for path, tensors in exact.items():
                    total = sums.setdefault(path, [0.0, 0.0])
                    for a, b in zip(tensors, rounded[path], strict=True):
                        total[0] += float((b - a).square().sum())
                        total[1] += float(a.square().sum())
                for _, module, _ in swaps:
                    restore(module)
    finally:
        for module, mode in modes:
            module.training = mode
    return {path: (error / size) ** 0.5 if size else 0.0 for path, (error, size) in sums.items()}


def quantize(
    model: torch.nn.Module,
    weights: str = "int8",
    filter_fn: Filter | None = None,
    *,
    loader: Iterable[Any] | None = None,
    report: bool = False,
) -> Any:
    """Packs the weights of a model's recurrent layers in int8 or bfloat16 for inference on a CPU, in place.

    The layers are those of torch.nn that :func:`convert` replaces, and those of :mod:`seqaccel.nn` that a
    :class:`Session` runs, in one direction or two, with padded and packed sequences. In eval mode they run a session's
    kernels: see ``weights`` of :class:`Session` for what is rounded. Results have no gradient. In training mode they
    run in float32. A layer packs its weights anew when a parameter has changed. The float32 parameters stay, so that
    state_dicts are what they were; :func:`revert` undoes it.

    Args:
        model: any module in float32 on the CPU.
        weights: ``"int8"`` or ``"bfloat16"``. Default: ``"int8"``
        filter_fn: called with a module and its path in the model; ``False`` leaves that module alone. Default: all.
        loader: batches for the model, each a tensor, a tuple of arguments, or a mapping of keyword arguments. The
            report then has errors.
        report: also return a :class:`~seqaccel.convert.Report`, as with a ``loader``. Its rows have ``path``,
            ``source``, ``target``, ``error`` (the norm of the outputs' difference from float32, over the norm) and
            ``reason``.

    Returns:
        ``model``, or a pair of it and the report.

    Example:
        >>> import torch, seqaccel
        >>> model = torch.nn.Sequential(torch.nn.LSTM(16, 32)).eval()
        >>> model, report = seqaccel.quantize(model, "int8", loader=[torch.randn(20, 4, 16) for _ in range(3)])
        >>> [(row.path, row.error < 0.02) for row in report]
        [('0', True), ('(model)', True)]
    """
    check_model("quantize", model)
    check_filter("quantize", filter_fn)
    _arguments.flag("quantize", "report", report)
    if weights not in WEIGHTS:
        raise ValueError(f"quantize: expected weights to be one of {WEIGHTS}, but got {weights!r}")
    swaps: list[tuple[str, torch.nn.Module, Swap]] = []
    rows: list[Quantized] = []
    for path, module in list(model.named_modules()):
        answer = None if isinstance(module, torch.jit.ScriptModule) else _answer(module, weights)
        if isinstance(answer, Swap) and filter_fn is not None and not filter_fn(module, path):
            answer = "left out by filter_fn"
        if isinstance(answer, Swap):
            swaps.append((path, module, answer))
        if answer is not None:
            target, reason = (answer.title, "") if isinstance(answer, Swap) else ("", answer)
            rows.append(Quantized(path, title(plain_class(module)), target, float("nan"), reason))
    errors = {} if loader is None else _errors(model, swaps, loader)
    for _, module, answer in swaps:
        swap(module, answer)
    if loader is None and not report:
        return model
    name = title(plain_class(model))
    rows = [row._replace(error=errors.get(row.path, row.error)) for row in rows]
    if "(model)" in errors:
        rows.append(Quantized("(model)", name, "", errors["(model)"], ""))
    return model, Report(
        f"{name}: recurrent layers in {weights}", ("path", "layer", "weights", "error", "why not"), rows
    )
