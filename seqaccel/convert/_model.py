"""``convert`` and ``revert``: the table of what is replaced by what, and the walk over a model."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch

from seqaccel import _arguments
from seqaccel.convert import causal_conv, darts, haste, ncps, pytorch_tcn, sb3_contrib, speechbrain, sru, torchrl
from seqaccel.convert import torch as torch_layers
from seqaccel.convert._report import Report, Row
from seqaccel.convert._swap import Asked, Swap, modules, named_modules, plain_class, restore, swap

#: A name of ``config`` and what answers for a module: what it becomes, why it stays, or None, it is something else.
RULES: dict[str, Callable[[torch.nn.Module, Asked], Swap | str | None]] = {
    **dict.fromkeys(torch_layers.NAMES, torch_layers.recurrent),
    "Conv1d": causal_conv.sequential,
    "TemporalConv1d": pytorch_tcn.temporal_conv,
    "darts": darts.residual_block,
    "SRUCell": sru.cell,
    "haste": haste.layer,
    "ncps": ncps.layer,
    "speechbrain": speechbrain.layer,
    "RecurrentActorCriticPolicy": sb3_contrib.policy,
    "torchrl": torchrl.module,
    "MultiheadAttention": torch_layers.attention,
}
#: What is replaced only where ``config`` names it: it computes another function.
BY_NAME = frozenset({"MultiheadAttention"})

Filter = Callable[[torch.nn.Module, str], bool]


def asked(config: Mapping[str, Any] | None, fullgraph: bool) -> dict[str, Asked]:
    """The rules that ``config`` leaves on."""
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(f"convert: expected config to be a mapping, but got {type(config).__name__}")
    given = dict(config or {})
    unknown = set(given) - set(RULES)
    if unknown:
        raise ValueError(f"convert: config has {sorted(unknown)}; expected names of {sorted(RULES)}")
    found = {}
    for name in RULES:
        options = given.get(name, name not in BY_NAME)
        if not isinstance(options, Mapping):
            _arguments.flag("convert", f"config[{name!r}]", options)
        if options or isinstance(options, Mapping):
            found[name] = Asked(name, dict(options) if isinstance(options, Mapping) else {}, fullgraph)
    return found


def check_model(where: str, model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"{where}: expected model to be a torch.nn.Module, but got {kind}")


def check_filter(where: str, filter_fn: Any) -> None:
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"{where}: expected filter_fn to be callable, but got {type(filter_fn).__name__}")


def title(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    return f"{'torch.nn' if package == 'torch' else package}.{kind.__name__}"


def _code_of(kind: type, name: str) -> Any:
    return getattr(inspect.unwrap(getattr(kind, name, None) or (lambda: None)), "__code__", None)


def _loops(module: torch.nn.Module) -> str | None:
    """What a module of the user's own computes step by step in Python."""
    kind = plain_class(module)
    code = _code_of(kind, "forward")
    own = kind.__module__.partition(".")[0] not in ("torch", "seqaccel")
    if not own or code is None or not any(line.opname == "FOR_ITER" for line in dis.get_instructions(code)):
        return None
    if any(isinstance(child, torch.nn.RNNCellBase) for child in module.children()):
        return "its forward calls a cell in a Python loop: a layer runs all steps at once where their inputs are known"
    names = {name for part in vars(kind).values() if (c := getattr(part, "__code__", None)) for name in c.co_names}
    if {"sigmoid", "tanh"} <= names:
        return "its forward computes gates in a Python loop: use a layer of seqaccel.nn, or see docs/adding-a-cell.md"
    return None


def _left(module: torch.nn.Module) -> str | None:
    """Why a module that no rule knows, but a reader might expect to be replaced, stays."""
    if isinstance(module, torch.jit.ScriptModule):
        name = getattr(module, "original_name", "")
        return "a TorchScript module: convert the model before torch.jit.script" if name in RULES else None
    kind = plain_class(module)
    if any(base.__module__.partition(".")[0] == "seqaccel" for base in kind.__mro__):
        return None
    if kind is torch.nn.Conv1d and module.kernel_size != (1,):
        return "no causal padding or Chomp1d beside it in a Sequential"
    torch_s = (torch.nn.RNNBase, torch.nn.RNNCellBase)
    named = kind.__name__ in RULES.keys() - BY_NAME - {"Conv1d"}
    # A class of that name that holds torch's layer (speechbrain's LSTM) is none: the layer has its own row.
    if isinstance(module, torch_s) or (named and not any(isinstance(child, torch_s) for child in module.children())):
        return "not derived from a class of torch.nn that computes it"
    return _loops(module)


def found(
    model: torch.nn.Module, rules: dict[str, Asked], filter_fn: Filter | None
) -> list[tuple[str, torch.nn.Module, Swap | str]]:
    """Path, module and answer, for each module of which there is something to say."""
    answers: list[tuple[str, torch.nn.Module, Swap | str]] = []
    inside: set[torch.nn.Module] = set()
    for path, module in list(named_modules(model)):
        scripted = isinstance(module, torch.jit.ScriptModule)
        known = [] if scripted else [(name, find(module, rules.get(name, Asked(name)))) for name, find in RULES.items()]
        name, answer = next(((name, answer) for name, answer in known if answer is not None), ("", _left(module)))
        if name and name not in rules:
            if name in BY_NAME:
                continue
            answer = "left out by config"
        elif isinstance(answer, Swap) and filter_fn is not None and not filter_fn(module, path):
            answer = "left out by filter_fn"
        if isinstance(answer, Swap):
            inside.update(answer.runs)
        if answer is not None:
            answers.append((path, module, answer))
    return [answer for answer in answers if answer[1] not in inside]


@overload
def convert(
    model: torch.nn.Module,
    config: Mapping[str, Any] | None = None,
    filter_fn: Filter | None = None,
    *,
    report: Literal[False] = False,
    fullgraph: bool = False,
) -> torch.nn.Module: ...


@overload
def convert(
    model: torch.nn.Module,
    config: Mapping[str, Any] | None = None,
    filter_fn: Filter | None = None,
    *,
    report: Literal[True],
    fullgraph: bool = False,
) -> tuple[torch.nn.Module, Report]: ...


def convert(
    model: torch.nn.Module,
    config: Mapping[str, Any] | None = None,
    filter_fn: Filter | None = None,
    *,
    report: bool = False,
    fullgraph: bool = False,
) -> Any:
    """Replaces the layers of a model that have a counterpart here, in place.

    A module keeps its identity, parameters, buffers, hooks, name and training mode, so optimisers and checkpoints made
    before stay valid; only its class changes. :func:`revert` undoes it.

    What is replaced, by its name in ``config``:

    - ``RNN``, ``LSTM``, ``GRU``, ``RNNCell``, ``LSTMCell``, ``GRUCell`` of torch.nn, also with parametrized weights
      (weight norm), and classes derived from them that call ``super().forward``.
    - ``Conv1d`` of torch.nn in a Sequential, behind padding of (K-1)·dilation steps on the left (``ConstantPad1d``,
      ``ZeroPad1d``, ``ReplicationPad1d``) or padded and before a ``Chomp1d`` (locuslab's TCN) or ``_Chop1d``
      (asteroid's ConvTasNet), with the ReLU, SiLU, Sigmoid or Tanh and the Dropout that follow, by
      :func:`seqaccel.functional.causal_conv1d`.
    - ``TemporalConv1d`` of pytorch-tcn (its TCN) where it is causal, and ``SRUCell`` of the package sru (its SRU).
    - ``darts``: the residual blocks of its TCNModel.
    - ``RecurrentActorCriticPolicy`` of sb3-contrib (RecurrentPPO's policies): a sequence in which episodes begin is one
      call of each LSTM, not a call a step.
    - ``torchrl``: its LSTMModule and GRUModule with the backend "pad": the episodes of a batch of trajectories are one
      packed sequence, where TorchRL pads them and all that the tensordict has of them.
    - ``haste``: the layers of haste_pytorch, where no ``lengths`` and no ``return_state_sequence`` are given.
    - ``speechbrain``: the layers of its LiGRU with ReLU or tanh, by :func:`seqaccel.functional.ligru`.
    - ``ncps``: its CfC, where it has neither a wiring nor mixed memory and its backbone has LeCun's tanh, tanh or ReLU
      and no dropout, by :func:`seqaccel.functional.cfc`.
    - ``MultiheadAttention`` of torch.nn, only where ``config`` names it, by
      :class:`seqaccel.nn.HierarchicalAttention`: another function of the same parameters.

    Layers of Keras's models (torch backend) are found in its ``layers``, as a ``TorchModuleWrapper`` holds them.

    A replaced LSTM is an instance of :class:`seqaccel.nn.LSTM` and of torch.nn.LSTM; the others likewise. torch.compile
    cannot trace instances of torch.nn.LSTM, GRU and RNN: it breaks the graph at such a layer. With ``fullgraph=True`` a
    replaced layer is a :class:`seqaccel.nn.LSTM`, which compiles in one graph, and no instance of torch.nn.LSTM.

    Args:
        model: any module.
        config: changes to what is replaced, by name: ``False`` leaves a kind of layer alone, ``True`` or a mapping of
            options asks for it. ``MultiheadAttention`` takes the keyword arguments of
            :class:`seqaccel.nn.HierarchicalAttention`. Default: all but ``MultiheadAttention``.
        filter_fn: called with a module and its path in the model; ``False`` leaves that module alone. Default: all.
        report: also return a :class:`~seqaccel.convert.Report`: path, class, what it became, or why it stays.
        fullgraph: torch.compile must be able to trace the whole model. Default: ``False``.

    Returns:
        ``model``, or, if it is such a layer itself, the same object with its new class; with ``report`` a pair.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> import torch, seqaccel
        >>> model = torch.nn.Sequential(torch.nn.LSTM(4, 8))
        >>> model, report = seqaccel.convert(model, report=True)
        >>> isinstance(model[0], seqaccel.nn.LSTM), isinstance(model[0], torch.nn.LSTM)
        (True, True)
        >>> print(report)
        layers of Sequential
        path  from           to                why not
        ----  -------------  ----------------  -------
        0     torch.nn.LSTM  seqaccel.nn.LSTM
    """
    check_model("convert", model)
    _arguments.flags("convert", report=report, fullgraph=fullgraph)
    check_filter("convert", filter_fn)
    name = plain_class(model).__name__
    rows = []
    for path, module, answer in found(model, asked(config, bool(fullgraph)), filter_fn):
        source = title(plain_class(module))
        if isinstance(answer, Swap):
            rows.append(Row(path, source, answer.title, ""))
            swap(module, answer)
        else:
            rows.append(Row(path, source, "", answer))
    return (model, Report(f"layers of {name}", ("path", "from", "to", "why not"), rows)) if report else model


def revert(model: torch.nn.Module) -> torch.nn.Module:
    """Undoes :func:`convert`, in place: every module has the class and the options that it had before.

    Parameters have the values that they have now.

    Example:
        >>> import torch, seqaccel
        >>> model = seqaccel.convert(torch.nn.Sequential(torch.nn.LSTM(4, 8)))
        >>> type(seqaccel.revert(model)[0])
        <class 'torch.nn.modules.rnn.LSTM'>
    """
    check_model("revert", model)
    for module in modules(model):
        restore(module)
    return model
