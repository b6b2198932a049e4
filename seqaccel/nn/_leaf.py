"""What other tools of torch see of a module: torch.fx a leaf, torch.jit.script a refusal."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from seqaccel import _arguments


class Leaf:
    """Mixin of all modules."""

    def __prepare_scriptable__(self) -> NoReturn:
        raise RuntimeError(
            f"{type(self).__name__}: seqaccel's modules cannot be scripted; use torch.jit.trace or torch.export"
        )

    def _instead(self, name: str, value: Any, *arguments: Any, **keywords: Any) -> Any:
        """What ``forward`` returns where ``value``, its argument ``name``, is not a tensor: a node that calls this
        module, as torch.nn's are called, where it is torch.fx's symbol.

        Raises:
            TypeError: it is anything else.
        """
        if isinstance(value, torch.fx.Proxy):
            tracer: Any = value.tracer
            kwargs = {key: given for key, given in keywords.items() if given is not None}
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (value, *arguments), kwargs)
        assert not isinstance(value, Tensor)
        return _arguments.tensor(type(self).__name__, name, value)
