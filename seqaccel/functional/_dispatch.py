"""Tensors whose values are not those in their memory: with torch's negative bit, or zero without any memory.

torch resolves them before an operator sees them, but not inside a list of optional tensors; here the operators that
take such a list do so themselves. A kernel of a dispatch key costs calls without that key nothing.
"""

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("seqaccel", "IMPL")


def _resolved(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.clone() if argument._is_zerotensor() else argument.resolve_neg()
    if isinstance(argument, (list, tuple)):
        return [_resolved(each) for each in argument]
    return argument


def _resolve_arguments(name: str) -> None:
    operator = getattr(torch.ops.seqaccel, name).default

    def kernel(*arguments: Any, **named: Any) -> Any:
        return operator(*_resolved(arguments), **{key: _resolved(value) for key, value in named.items()})

    for key in ("Negative", "ZeroTensor"):
        _LIBRARY.impl(name, kernel, key)


for _full_name in torch._C._dispatch_get_all_op_names():
    _namespace, _, _name = _full_name.partition("::")
    if _namespace == "seqaccel" and "Tensor?[]" in str(getattr(torch.ops.seqaccel, _name).default._schema):
        _resolve_arguments(_name)
