"""Changing what a module of an existing model runs: its class changes, the object and all that it holds stay."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch

#: Where an instance keeps what ``restore`` needs.
_MARK = "_converted_from"


class Asked(NamedTuple):
    """What ``convert`` was asked to do with a kind of layer."""

    name: str
    options: dict[str, Any] = {}  # noqa: RUF012  read only
    fullgraph: bool = False


class Swap(NamedTuple):
    """What a module becomes."""

    title: str  #: for the report
    kind: type[torch.nn.Module]
    attributes: dict[str, Any] = {}  # noqa: RUF012  read only
    runs: tuple[torch.nn.Module, ...] = ()  #: modules in it that it runs by itself from then on
    needs: tuple[torch.nn.Module, ...] = ()  #: modules in it without whose replacement it changes nothing


def _is_parametrized(kind: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class, for one module alone."""
    return kind.__module__ == "torch.nn.utils.parametrize"


def _on(kind: type, base: type) -> type:
    """A class that parametrize made, on another base: its properties hold the parametrized weights."""
    namespace = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), namespace)


def plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class that a person wrote: below that of parametrize, and before ``convert``."""
    kind = vars(module)[_MARK][0] if _MARK in vars(module) else type(module)
    return kind.__bases__[0] if _is_parametrized(kind) else kind


def named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Path and module, as ``model.named_modules()``; and the layers of Keras's models, which torch does not see."""
    seen = set()
    waiting = [("", model)]
    while waiting:
        prefix, root = waiting.pop(0)
        for path, module in root.named_modules(prefix=prefix):
            if module in seen:
                continue
            seen.add(module)
            yield path, module
            if any(base.__module__.partition(".")[0] == "keras" for base in type(module).__mro__):
                dot = f"{path}." if path else ""
                waiting += [(f"{dot}layers.{i}", layer) for i, layer in enumerate(getattr(module, "layers", ()))]


def modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for _, module in named_modules(model)]


def _set_class(module: torch.nn.Module, kind: type) -> None:
    current = type(module)
    module.__class__ = _on(current, kind) if _is_parametrized(current) else kind


def swap(module: torch.nn.Module, new: Swap) -> None:
    """Gives a module its new class and attributes; ``restore`` takes them back."""
    restore(module)
    old, attributes = plain_class(module), vars(module)
    before = {name: attributes[name] for name in new.attributes if name in attributes}
    _set_class(module, new.kind)
    attributes.update(new.attributes)
    attributes[_MARK] = (old, before, [name for name in new.attributes if name not in before])


def restore(module: torch.nn.Module) -> bool:
    """Undoes ``swap``; whether there was one."""
    attributes = vars(module)
    if _MARK not in attributes:
        return False
    old, before, added = attributes.pop(_MARK)
    _set_class(module, old)
    attributes.update(before)
    for name in added:
        attributes.pop(name, None)
    return True


def remembered(module: torch.nn.Module) -> Callable[[], None]:
    """What gives a module its present class and attributes back, as far as ``swap`` and ``restore`` change them."""
    kind, attributes = type(module), dict(vars(module))

    def put_back() -> None:
        restore(module)
        if _MARK in attributes:
            module.__class__ = kind
            vars(module).update(attributes)

    return put_back


class Unscriptable:
    """Mixin of the classes that run our operators in another package's module."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(f"{type(self).__name__}: converted modules cannot be scripted; call seqaccel.revert first")


def _made(first: type, second: type) -> torch.nn.Module:
    kind = combined(first, second)
    return kind.__new__(kind)


@functools.cache
def combined(first: Any, second: Any) -> Any:
    """A class of both, where ``first`` comes first; instances pickle by the names of the two."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _made, (first, second), *object.__reduce_ex__(self, 2)[2:]

    name = first.__name__ if issubclass(first, torch.nn.Module) else second.__name__
    return type(name, (first, second), {"__module__": __name__, "__reduce_ex__": reduce})
