"""What torch asks of an operator beside its kernels, registered in one place.

A family states the facts of each of its operators (:class:`Operator`). From them :func:`register` gives torch the
shapes of the results, gradients of any order, forward-mode AD, autocast, vmap, sharding of DTensors by the batch,
counts for ``FlopCounterMode`` and the tag ``pt2_compliant_tag``: a call of ``torch.ops.seqaccel.*``, as an exported
graph holds it, does what the public function does. Public functions run their operators by :func:`call`, below all of
this: 0.5 us a call, where the kernels registered here take 10.
"""

import dataclasses
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from seqaccel import _common

__all__ = ["OPERATORS", "Operator", "call", "once", "register"]


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator's facts.

    Attributes:
        name: without the namespace.
        fake: its results without their values. A Triton operator keeps the one that torch has of it, its own code.
        flops: operations, from its arguments with shapes for tensors.
        values_decide: ``flops`` takes the tensors themselves and, as ``out_val``, the results.
        definition: its differentiable results, which come first, from its arguments, by torch's operators; for one that
            writes to its first argument, the same in place. Default: it is not differentiable, as an operator that
            calculates gradients: gradients of those come from the forward operator.
        recorded: its results as its kernel returns them, recorded by autograd. Default: the gradient is the
            definition's.
        batch: the dimension of the batch, of arguments by name and of results by index; what is not listed has none. A
            negative one counts from the last. The first argument gives the batch's size.
        summed: results that are sums over the batch, as gradients of weights are.
        packs: an argument and how many dimensions it has in calls with packed sequences: these have no batch dimension.
        from_row: the arguments for a part of the batch, from the arguments and the part's first row: of an operator
            that draws random numbers by the position in the batch. Default: as they are.
        autocast: the dtype that autocast casts to; None: autocast's own. Default: float32, in which the CPU's kernels
            calculate.
        mutates: writes to its first argument and returns nothing.
    """

    name: str
    fake: Callable[..., Any]
    flops: Callable[..., int]
    definition: Callable[..., Any] | None = None
    recorded: Callable[..., Any] | None = None
    batch: dict[str | int, int] = dataclasses.field(default_factory=dict)
    summed: tuple[int, ...] = ()
    values_decide: bool = False
    packs: tuple[str, int] | None = None
    from_row: Callable[[dict[str, Any], int], dict[str, Any]] | None = None
    autocast: torch.dtype | None = torch.float32
    mutates: bool = False

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.seqaccel, self.name).default

    def named(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        return {a.name: value for a, value in zip(self.overload._schema.arguments, arguments, strict=False)}

    def batch_dim(self, key: str | int, dims: int) -> int | None:
        """The dimension of the batch of an argument or a result of ``dims`` dimensions; None where there is none."""
        d = self.batch.get(key)
        d = d + dims if d is not None and d < 0 else d
        return d if d is not None and 0 <= d < dims else None

    def is_packed(self, name: str, value: Any, mapped: bool = False) -> bool:
        """Whether an argument, which may have a dimension of vmap, makes the call one of packed sequences."""
        return (
            self.packs is not None
            and name == self.packs[0]
            and value is not None
            and value.dim() == self.packs[1] + mapped
        )

    def batch_size(self, named: dict[str, Any]) -> int | None:
        """The size of the batch; None where there is no batch dimension."""
        if not self.batch or any(self.is_packed(name, value) for name, value in named.items()):
            return None
        name, d = next((key, d) for key, d in self.batch.items() if isinstance(key, str))
        return named[name].shape[d]


#: The operators registered, by name.
OPERATORS: dict[str, Operator] = {}

_LIBRARY = torch.library.Library("seqaccel", "FRAGMENT")
_AUTOCAST = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}
_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_autocast_enabled = torch._C._is_any_autocast_enabled


def call(operator: Callable[..., Any], *arguments: Any) -> Any:
    """Calls an operator below autograd and autocast: for code that does their work itself."""
    if _autocast_enabled():
        with _BelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return operator(*arguments)
    with _BelowAutograd():
        return operator(*arguments)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _tuple(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


# ---- autograd ----


class _ByDefinition(torch.autograd.Function):
    """Saves the arguments; the gradient is the definition's. ``specs`` takes the results' structure."""

    @staticmethod
    def forward(ctx, operator, spec, specs, *flat):
        results, results_spec = tree_flatten(call(operator.overload, *tree_unflatten(list(flat), spec)))
        specs.append(results_spec)
        ctx.operator, ctx.spec = operator, spec
        ctx.others = [None if isinstance(t, Tensor) else t for t in flat]
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in flat))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        others = ctx.others

        def definition(*tensors):
            flat = [other if t is None else t for t, other in zip(tensors, others, strict=True)]
            return tuple(tree_leaves(ctx.operator.definition(*tree_unflatten(flat, ctx.spec))))

        needs = ctx.needs_input_grad[3:]
        return None, None, None, *_common.differentiable_backward(definition, ctx.saved_tensors, grads, needs)


def _by_definition(operator: Operator, arguments: tuple[Any, ...]) -> Any:
    flat, spec = tree_flatten(arguments)
    specs: list[Any] = []
    results = _ByDefinition.apply(operator, spec, specs, *flat)
    return tree_unflatten(list(results), specs[0])


def _has_tangent(t: Tensor) -> bool:
    return torch._VF._unpack_dual(t, level=0)[1] is not None


def _autograd_kernel(operator: Operator) -> Callable[..., Any]:
    def kernel(*arguments: Any) -> Any:
        tensors = _tensors(arguments)
        forward_mode = any(_has_tangent(t) for t in tensors)
        if not forward_mode and not _common.needs_grad(*tensors):
            return call(operator.overload, *arguments)
        if operator.definition is None:
            raise RuntimeError(
                f"seqaccel::{operator.name} is not differentiable: gradients of gradients come from the forward "
                "operator, with create_graph=True"
            )
        if operator.mutates:
            return operator.definition(*arguments)
        if not forward_mode:
            return _by_definition(operator, arguments) if operator.recorded is None else operator.recorded(*arguments)
        results = call(operator.overload, *arguments)
        first = _tuple(operator.definition(*arguments))
        return first[0] if isinstance(results, Tensor) else (*first, *results[len(first) :])

    return kernel


# ---- autocast ----


def _autocast_kernel(operator: Operator, device_type: str) -> Callable[..., Any]:
    def cast(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.dtype == torch.float64 or t.device.type != device_type:
            return t
        return t.to(operator.autocast or torch.get_autocast_dtype(device_type))

    def kernel(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return operator.overload(*(arguments if operator.mutates else tree_map_only(Tensor, cast, arguments)))

    return kernel


# ---- vmap ----


def _fold(operator: Operator, n: int, arguments: tuple[Any, ...], dims: tuple[Any, ...]) -> list[Any] | None:
    """The arguments with the mapped dimension a part of the batch; None where a mapped argument has no batch, or a
    result is a sum over it."""
    if not operator.batch or operator.summed:
        return None
    folded = []
    for (name, value), dim in zip(operator.named(arguments).items(), dims, strict=True):
        if operator.is_packed(name, value, dim is not None):
            return None
        if name == "seed" and value is not None:  # dropout draws by the position in the batch
            return None
        d = None
        if isinstance(value, Tensor) and name in operator.batch:
            d = operator.batch_dim(name, value.dim() - (dim is not None))
            if d is None and (dim is not None or value.numel() != 1):  # of one value: one for all
                return None
        if d is None:
            if dim is not None and any(entry is not None for entry in tree_leaves(dim)):
                return None
            folded.append(value)
        else:
            moved = torch.stack([value] * n, d) if dim is None else value.movedim(dim, d)
            folded.append(moved.flatten(d, d + 1))
    return folded


def _at(value: Any, dim: Any, i: int) -> Any:
    if isinstance(value, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
        return [_at(v, d, i) for v, d in zip(value, dims, strict=True)]
    return value if dim is None else value.select(dim, i)


def _vmap_rule(operator: Operator) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        n = info.batch_size
        folded = _fold(operator, n, arguments, in_dims)
        if folded is None:
            each = [
                operator.overload(*(_at(value, dim, i) for value, dim in zip(arguments, in_dims, strict=True)))
                for i in range(n)
            ]
            specs = tree_flatten(each[0])[1]
            flat = zip(*(tree_leaves(results) for results in each), strict=True)
            stacked = tree_unflatten([torch.stack(parts) for parts in flat], specs)
            return stacked, tree_map_only(Tensor, lambda _: 0, stacked)
        results = operator.overload(*folded)
        found, dims = [], []
        for i, result in enumerate(_tuple(results)):
            parts = result if isinstance(result, (list, tuple)) else [result]
            out = [operator.batch_dim(i, p.dim()) for p in parts]
            split = [p if d is None else p.unflatten(d, (n, p.shape[d] // n)) for p, d in zip(parts, out, strict=True)]
            found.append(split if isinstance(result, (list, tuple)) else split[0])
            dims.append(out if isinstance(result, (list, tuple)) else out[0])
        return (found[0], dims[0]) if isinstance(results, Tensor) else (tuple(found), tuple(dims))

    return rule


# ---- what other modules of torch ask, registered when they are imported ----


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function once a module is imported; at once where it is already."""

    def __init__(self, module: str, function: Callable[[], None]) -> None:
        self.module, self.function = module, function
        if module in sys.modules:
            function()
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then(module: Any) -> None:
                execute(module)
                self.function()

            spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec


def _register_flops(operator: Operator) -> None:
    from torch.utils.flop_counter import register_flop_formula

    def flops(*arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
        return operator.flops(*arguments, **keywords)

    formula = operator.flops if operator.values_decide else flops
    register_flop_formula(getattr(torch.ops.seqaccel, operator.name), get_raw=operator.values_decide)(formula)


def register(operator: Operator) -> None:
    """Registers all that torch asks of an operator. Does nothing where the operator was not built."""
    if not hasattr(torch.ops.seqaccel, operator.name):
        return
    OPERATORS[operator.name] = operator
    name, overload = f"seqaccel::{operator.name}", operator.overload
    if not name.endswith("_triton"):
        torch.library.register_fake(name, operator.fake, lib=_LIBRARY, allow_override=True)
    _LIBRARY.impl(operator.name, _autograd_kernel(operator), "Autograd", allow_override=True)
    for key, device_type in _AUTOCAST.items():
        _LIBRARY.impl(operator.name, _autocast_kernel(operator, device_type), key)
    if operator.mutates:
        _LIBRARY.impl(operator.name, operator.definition, "FuncTorchBatched")
    else:
        torch.library.register_vmap(name, _vmap_rule(operator), lib=_LIBRARY)
    if torch.Tag.pt2_compliant_tag not in overload.tags:
        overload.tags.append(torch.Tag.pt2_compliant_tag)
    _WhenImported("torch.utils.flop_counter", lambda: _register_flops(operator))
    if _common.DTENSOR:
        from seqaccel.functional import _sharding

        _sharding.register(operator)


_done: set[tuple[Callable[[str], None], str]] = set()


@_common.constant_while_compiling
def once(function: Callable[[str], None], backend: str) -> None:
    """Calls a family's registration of the operators of a backend that is imported late."""
    if (function, backend) not in _done:
        _done.add((function, backend))
        function(backend)


def _import_sharding() -> None:
    """Registers rules for DTensors, of the operators that are there and of those to come."""
    importlib.import_module("seqaccel.functional._sharding")


_WhenImported("torch.distributed.tensor", _import_sharding)
