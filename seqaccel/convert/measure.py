"""Is it faster here? Each layer of a model with torch's code and with ours, on an example."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from seqaccel import _arguments
from seqaccel.convert._model import Filter, asked, check_filter, check_model, found, title
from seqaccel.convert._report import Report
from seqaccel.convert._swap import Swap, modules, plain_class, remembered, restore, swap

#: Rounds in which both are timed, and the seconds of a round.
ROUNDS, SECONDS = 7, 0.01


class Timing(NamedTuple):
    """Milliseconds of a call with torch's code and with ours; NaN where there is no such call."""

    path: str  #: of the layer, or ``"(model)"``
    source: str  #: its class
    forward: float
    our_forward: float
    training: float  #: forward and backward
    our_training: float
    speed: float  #: torch's time over ours: of training where the layer trains, else of forward
    faster: bool  #: whether ours was


HEADER = ("path", "layer", "forward: torch", "ours", "training: torch", "ours", "speed", "faster")
_NAN = float("nan")


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A nested value with a function applied to its tensors."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested value; pytree does not look into dataclasses."""
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])
    return found


class _Call(NamedTuple):
    """What is timed: the first call of a layer when the model runs, or what runs the model."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def _arguments_of(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)), {}


def _calls(model: torch.nn.Module, layers: Iterable[torch.nn.Module], whole: _Call) -> dict[Any, _Call]:
    """What each layer is called with, without a change to the model: in eval mode."""
    seen: dict[Any, _Call] = {model: whole}

    def record(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        if module not in seen:
            seen[module] = _Call(module, *_mapped((args, kwargs), lambda t: t.detach().clone()))

    modes = [(module, module.training) for module in modules(model)]
    hooks = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    try:
        model.eval()
        with torch.no_grad():
            whole()
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    return seen


def _forward(call: _Call) -> None:
    with torch.no_grad():
        call()


def _training(module: torch.nn.Module, call: _Call) -> None:
    wanted: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    args, kwargs = _mapped(
        (call.args, call.kwargs), lambda t: t.detach().requires_grad_() if t.is_floating_point() else t
    )
    wanted += [t for t in _tensors((args, kwargs)) if t.requires_grad]
    outputs = [t for t in _tensors(call.function(*args, **kwargs)) if t.requires_grad]
    if outputs:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _devices(module: torch.nn.Module, call: _Call) -> set[torch.device]:
    """The accelerators that a call runs on."""
    tensors = [*module.parameters(), *_tensors((call.args, call.kwargs))]
    return {t.device for t in tensors if t.device.type != "cpu"}


def _wait(devices: set[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


def _seconds(run: Callable[[], None], count: int, devices: set[torch.device]) -> float:
    _wait(devices)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _wait(devices)
    return (time.perf_counter() - start) / count


def _compared(
    run: Callable[[], None], devices: set[torch.device], use_ours: Callable[[bool], None]
) -> tuple[float, float]:
    """Milliseconds with torch's code and with ours, each the best of interleaved rounds. Torch's is in place then."""
    best = [_NAN, _NAN]
    count = 1
    for number in range(-1, ROUNDS):
        for ours in (False, True):
            use_ours(ours)
            taken = _seconds(run, count, devices)
            if number >= 0:
                best[ours] = taken * 1e3 if number == 0 else min(best[ours], taken * 1e3)
        if number < 0:  # the first calls make what later ones reuse
            count = max(1, int(SECONDS / max(_seconds(run, 1, devices), 1e-7)))
    use_ours(False)
    return best[0], best[1]


def _timing(path: str, module: torch.nn.Module, call: _Call | None, use_ours: Callable[[bool], None]) -> Timing:
    forward = training = (_NAN, _NAN)
    trains = module.training and any(p.requires_grad for p in module.parameters())
    if call is not None:
        devices = _devices(module, call)
        forward = _compared(functools.partial(_forward, call), devices, use_ours)
        if trains:
            training = _compared(functools.partial(_training, module, call), devices, use_ours)
    theirs, ours = training if trains else forward
    return Timing(path, title(plain_class(module)), *forward, *training, theirs / ours, theirs > ours)


@contextlib.contextmanager
def _as_it_is(model: torch.nn.Module) -> Iterator[None]:
    """Gives the model's buffers and layers, and torch's generators, their present state back at the end."""
    layers = [remembered(module) for module in modules(model)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for put_back in layers:
            put_back()


def _progress(values: list[Any], shown: bool) -> Iterable[Any]:
    if not shown or importlib.util.find_spec("tqdm") is None:
        return values
    from tqdm.auto import tqdm

    return tqdm(values, desc="measuring", unit="layer", disable=None)


def _use(swaps: Mapping[torch.nn.Module, Swap], ours: bool) -> None:
    for module, answer in swaps.items():
        if ours:
            swap(module, answer)
        else:
            restore(module)


def _measured(
    where: str,
    model: torch.nn.Module,
    example_inputs: Any,
    config: Mapping[str, Any] | None,
    filter_fn: Filter | None,
    call: Callable[..., Any] | None,
    progress: bool,
    only_faster: bool,
) -> tuple[Report, dict[torch.nn.Module, Swap]]:
    """The report, whose last row is the whole model with what was replaced, and the replacements."""
    check_model(where, model)
    check_filter(where, filter_fn)
    if call is not None and not callable(call):
        raise TypeError(f"{where}: expected call to be callable, but got {type(call).__name__}")
    _arguments.flag(where, "progress", progress)
    rules = asked(config, False)
    with _as_it_is(model):
        for module in modules(model):
            restore(module)
        answers = [(path, m, answer) for path, m, answer in found(model, rules, filter_fn) if isinstance(answer, Swap)]
        whole = _Call(model if call is None else call, *_arguments_of(example_inputs))
        calls = _calls(model, [module for _, module, _ in answers], whole)
        rows: list[Timing] = []
        swaps: dict[torch.nn.Module, Swap] = {}
        for path, module, answer in _progress(answers, progress):
            together = {m: a for _, m, a in answers if m is module or m in answer.needs}
            decided = only_faster and module in swaps  # with one that needs it
            row = _timing(path, module, None if decided else calls.get(module), functools.partial(_use, together))
            rows.append(row._replace(faster=decided or row.faster))
            if rows[-1].faster or not only_faster:
                swaps.update(together)
        if swaps:
            rows.append(_timing("(model)", model, whole, functools.partial(_use, swaps)))
            if only_faster and not rows[-1].faster:
                swaps = {}
    return Report(f"{title(plain_class(model))}: milliseconds of a call, and torch's over ours", HEADER, rows), swaps


def benchmark(
    model: torch.nn.Module,
    example_inputs: Any,
    config: Mapping[str, Any] | None = None,
    filter_fn: Filter | None = None,
    *,
    call: Callable[..., Any] | None = None,
    progress: bool = True,
) -> Report:
    """Times each layer that :func:`convert` replaces, with torch's code and with ours. The model stays as it is.

    Each layer is called with what it gets when the model, in eval mode, runs on the example. Where the layer is in
    training mode and has parameters that train, forward with backward is timed too. Both sides take turns; the
    reported times are the best of 7 rounds. sb3-contrib's policies are timed with their LSTMs replaced too. The last
    row is the whole model.

    Args:
        model: any module; layers that were converted are measured too.
        example_inputs: the model's arguments: a tensor, a tuple, or a mapping of keyword arguments.
        config, filter_fn: as :func:`convert` takes them.
        call: what runs the model on the example, where that is not its ``forward``: a method of the model, such as
            ``policy.evaluate_actions``, or a function that returns a loss. Default: the model.
        progress: show a progress bar, where tqdm is installed and there is a terminal. Default: ``True``.

    Returns:
        A :class:`~seqaccel.convert.Report`. Its rows have ``path``, ``source``, ``forward``, ``our_forward``,
        ``training``, ``our_training`` (milliseconds), ``speed`` (torch's time over ours) and ``faster``.

    Example:
        >>> import torch, seqaccel
        >>> model = torch.nn.Sequential(torch.nn.LSTM(4, 8))
        >>> report = seqaccel.benchmark(model, torch.randn(5, 2, 4))
        >>> [row.path for row in report]
        ['0', '(model)']
    """
    return _measured("benchmark", model, example_inputs, config, filter_fn, call, progress, False)[0]


def optimize(
    model: torch.nn.Module,
    example_inputs: Any,
    config: Mapping[str, Any] | None = None,
    filter_fn: Filter | None = None,
    *,
    call: Callable[..., Any] | None = None,
    progress: bool = True,
) -> Report:
    """:func:`convert` of those layers that are faster with our code, in place.

    The layers are measured as :func:`benchmark` does. Where a layer trains, the time of forward and backward decides,
    else that of forward. The LSTMs of sb3-contrib's policies are replaced together with a policy that is faster; their
    rows have no times then. At last the whole model is measured with the faster layers; if it is not faster than
    before, all layers stay torch's. :func:`revert` undoes the conversion.

    Args:
        model, example_inputs, config, filter_fn, call, progress: see :func:`benchmark`.

    Returns:
        The report of :func:`benchmark`; its last row is the model with the layers that were replaced.

    Example:
        >>> import torch, seqaccel
        >>> model = torch.nn.Sequential(torch.nn.LSTM(4, 8))
        >>> report = seqaccel.optimize(model, torch.randn(5, 2, 4))
        >>> isinstance(model[0], seqaccel.nn.LSTM) == all(row.faster for row in report)
        True

    A policy of sb3-contrib, measured on the sequences of a rollout::

        seqaccel.optimize(policy, (obs, actions, lstm_states, episode_starts), call=policy.evaluate_actions)
    """
    report, swaps = _measured("optimize", model, example_inputs, config, filter_fn, call, progress, True)
    for module in modules(model):
        restore(module)
    _use(swaps, True)
    return report
