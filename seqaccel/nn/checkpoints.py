"""Loading checkpoints of other packages: ``seqaccel.convert`` has a function per source."""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

Rename = TypeVar("Rename", bound=Callable[[Any, dict[str, Any], str], None])


class Checkpoints:
    """Mixin of modules whose ``load_state_dict`` takes other packages' checkpoints too."""

    _renames: ClassVar[tuple[Callable[[Any, dict[str, Any], str], None], ...]] = ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for rename in self._renames:
            rename(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def loads(module: type[Checkpoints]) -> Callable[[Rename], Rename]:
    """Decorates a function that renames, in place, the keys of a state_dict at a prefix to those of ``module``.

    Its first argument is the module that loads."""

    def add(rename: Rename) -> Rename:
        module._renames = (*module._renames, rename)
        return rename

    return add
