"""Layers of torch.nn: recurrent ones, their cells, and attention where it is asked for."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from seqaccel import nn
from seqaccel.convert._swap import Asked, Swap, combined, plain_class

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")

#: What computes a layer of torch's here. It has the same attributes and parameters.
REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): getattr(nn, name) for name in NAMES
}


class _Constructor:
    """Skips the constructor of torch's layer: ours has passed it the arguments of the base's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        base: Any = torch.nn.RNNBase if isinstance(self, torch.nn.RNNBase) else torch.nn.RNNCellBase
        base.__init__(self, *args, **kwargs)


# What ``convert`` puts in place: ours, which is an instance of torch's class too.


class RNN(nn.RNN, _Constructor, torch.nn.RNN):  # type: ignore[misc]
    __doc__ = nn.RNN.__doc__


class LSTM(nn.LSTM, _Constructor, torch.nn.LSTM):  # type: ignore[misc]
    __doc__ = nn.LSTM.__doc__


class GRU(nn.GRU, _Constructor, torch.nn.GRU):  # type: ignore[misc]
    __doc__ = nn.GRU.__doc__


class RNNCell(nn.RNNCell, _Constructor, torch.nn.RNNCell):
    __doc__ = nn.RNNCell.__doc__


class LSTMCell(nn.LSTMCell, _Constructor, torch.nn.LSTMCell):
    __doc__ = nn.LSTMCell.__doc__


class GRUCell(nn.GRUCell, _Constructor, torch.nn.GRUCell):
    __doc__ = nn.GRUCell.__doc__


_DROP_INS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    getattr(torch.nn, name): globals()[name] for name in NAMES
}


def recurrent(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of a recurrent layer or cell, or of a class derived from one that computes by calling it."""
    kind: Any = plain_class(module)
    base = next(base for base in REPLACEMENTS if base.__name__ == asked.name)
    if not issubclass(kind, base):
        return None
    ours: Any = _DROP_INS[base]
    name = f"seqaccel.nn.{base.__name__}"
    if kind is base or (kind is ours and asked.fullgraph):
        return Swap(name, REPLACEMENTS[base] if asked.fullgraph else ours)
    if issubclass(kind, ours) and not asked.fullgraph:  # built or derived after ``patch_torch``
        return None
    if asked.fullgraph:
        return f"a subclass of torch.nn.{base.__name__}, which torch.compile(fullgraph=True) refuses"
    own = [part for part in kind.__mro__[: kind.__mro__.index(base)] if issubclass(part, torch.nn.Module)]
    forward = next((vars(part)["forward"] for part in own if "forward" in vars(part)), None)
    if forward is not None and "super" not in getattr(inspect.unwrap(forward), "__code__", forward).co_names:
        return "its own forward does not call super().forward"
    used = {*vars(module), *vars(module)["_modules"], *vars(module)["_parameters"], *vars(module)["_buffers"]}
    used = used.union(*map(vars, own)) - {*dir(base), *dir(nn.Streaming), "nonlinearity"}
    clashes = sorted(used & set(dir(ours)))
    if clashes:
        return f"its {', '.join(clashes)} would take the place of ours"
    return Swap(name, combined(kind, ours))


def attention(module: torch.nn.Module, asked: Asked) -> Swap | str | None:
    """Of torch.nn.MultiheadAttention, by hierarchical attention: another function of the same parameters."""
    if plain_class(module) is not torch.nn.MultiheadAttention:
        return None
    m: Any = module
    try:
        made = nn.HierarchicalAttention(
            m.embed_dim, m.num_heads, m.dropout, m.in_proj_bias is not None, m.bias_k is not None, m.add_zero_attn,
            m.kdim, m.vdim, m.batch_first, torch.device("meta"), **asked.options,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    if made.pool_query is not None:
        raise ValueError("convert: pool_query adds a parameter; build seqaccel.nn.HierarchicalAttention with it")
    own = ("_parameters", "_buffers", "_modules", "training")
    changed = {
        name: value for name, value in vars(made).items() if name not in own and vars(module).get(name, made) != value
    }
    return Swap("seqaccel.nn.HierarchicalAttention", nn.HierarchicalAttention, {**changed, "pool_query": None})


def patch_torch() -> None:
    """Puts seqaccel's recurrent layers and cells in torch.nn, so that a library imported afterwards builds and
    subclasses them.

    ``torch.nn.LSTM`` and the other five names are then classes that are subclasses of both torch's and
    ``seqaccel.nn``'s. A layer built before the call is no instance of the new ``torch.nn.LSTM``, so call it first.
    ``torch.nn.modules.rnn`` keeps torch's classes. :func:`unpatch_torch` undoes it.

    Example:
        >>> import torch, seqaccel
        >>> seqaccel.patch_torch()
        >>> isinstance(torch.nn.LSTM(4, 8), seqaccel.nn.LSTM)
        True
        >>> seqaccel.unpatch_torch()
    """
    for base, ours in _DROP_INS.items():
        setattr(torch.nn, base.__name__, ours)
        setattr(torch.nn.modules, base.__name__, ours)


def unpatch_torch() -> None:
    """Puts torch's own classes back in torch.nn, which :func:`patch_torch` replaced. Layers that exist stay.

    Example:
        >>> import torch, seqaccel
        >>> seqaccel.patch_torch()
        >>> seqaccel.unpatch_torch()
        >>> isinstance(torch.nn.LSTM(4, 8), seqaccel.nn.LSTM)
        False
    """
    for base in _DROP_INS:
        setattr(torch.nn, base.__name__, base)
        setattr(torch.nn.modules, base.__name__, base)
