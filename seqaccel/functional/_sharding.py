"""DTensors: operators run on shards of the batch. Imported with ``torch.distributed.tensor``, never before it."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.utils._pytree import tree_leaves, tree_map_only

from seqaccel import _common
from seqaccel.functional._registration import OPERATORS, Operator

__all__ = ["register", "replicated"]


def replicated(t: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has, as a DTensor where ``like`` is one."""
    if not isinstance(like, DTensor) or isinstance(t, DTensor):
        return t
    return DTensor.from_local(t, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def _own_rows(size: int, mesh: DeviceMesh, split: list[bool]) -> tuple[int, int]:
    """The first row of this process and how many it has, of ``size`` rows sharded along the dimensions in ``split``."""
    first, rows = 0, size
    for i, coordinate in enumerate(mesh.get_coordinate() or ()):
        if split[i]:
            chunk = -(-rows // mesh.size(i))
            start = min(coordinate * chunk, rows)
            first, rows = first + start, min(chunk, rows - start)
    return first, rows


def _global_stride(t: Tensor, d: int, size: int) -> tuple[int, ...]:
    """The strides of a tensor like ``t`` with this size of dimension ``d``."""
    if t.is_contiguous():
        return make_contiguous_strides_for((*t.shape[:d], size, *t.shape[d + 1 :]))
    return tuple(s // t.shape[d] * size if s > t.stride(d) else s for s in t.stride())


def _run(operator: Operator, overload: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Runs an operator on local tensors.

    Where one argument is sharded by the batch along a dimension of the mesh, all arguments and results that have a
    batch are, and results summed over the batch are partial sums. All else is replicated.
    """
    named = operator.named(arguments) | keywords
    tensors = [t for t in tree_leaves(list(named.values())) if isinstance(t, Tensor)]
    if any(t.numel() != 1 and not isinstance(t, DTensor) for t in tensors):
        raise RuntimeError(
            f"{overload}: got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor"
        )
    mesh: DeviceMesh = next(t.device_mesh for t in tensors if isinstance(t, DTensor))
    size = operator.batch_size(named)

    def batch_dim(key: str | int, t: Tensor, size: int | None) -> int | None:
        d = operator.batch_dim(key, t.dim())
        return d if d is not None and t.shape[d] == size else None

    deciding = list(named.items())[: 1 if operator.mutates else None]
    dims = [
        (t, batch_dim(key, t, size)) for key, value in deciding for t in tree_leaves(value) if isinstance(t, DTensor)
    ]
    split = [any(d is not None and t.placements[i] == Shard(d) for t, d in dims) for i in range(mesh.ndim)]

    def placements(where_split: Placement) -> list[Placement]:
        return [where_split if is_split else Replicate() for is_split in split]

    def to_local(key: str, t: Tensor) -> Tensor:
        if not isinstance(t, DTensor):
            return t
        d = batch_dim(key, t, size)
        wanted = placements(Replicate() if d is None else Shard(d))
        if operator.mutates and key == deciding[0][0] and list(t.placements) != wanted:
            raise RuntimeError(
                f"{overload}: expected {key} to be replicated or sharded by rows, but got {t.placements}"
            )
        return t.redistribute(mesh, wanted).to_local()

    given = {key: tree_map_only(Tensor, functools.partial(to_local, key), value) for key, value in named.items()}
    first, rows = (0, None) if size is None else _own_rows(size, mesh, split)
    if operator.from_row is not None:
        given = operator.from_row(given, first)
    results = overload(**given)

    def from_local(i: int, t: Tensor) -> Tensor:
        if i in operator.summed:
            return DTensor.from_local(t, mesh, placements(Partial()), run_check=False)
        d = batch_dim(i, t, rows)
        if d is None or size is None:
            return DTensor.from_local(t, mesh, placements(Replicate()), run_check=False)
        shape, stride = (*t.shape[:d], size, *t.shape[d + 1 :]), _global_stride(t, d, size)
        return DTensor.from_local(
            t, mesh, placements(Shard(d)), run_check=False, shape=torch.Size(shape), stride=stride
        )

    if not isinstance(results, tuple):
        return tree_map_only(Tensor, functools.partial(from_local, 0), results)
    return tuple(tree_map_only(Tensor, functools.partial(from_local, i), t) for i, t in enumerate(results))


#: What torch calls for an operator instead of its strategies, which cannot place results in a list. Private (torch
#: 2.13): where it is missing, torch refuses DTensors.
_HANDLERS: dict[Any, Any] = getattr(DTensor._op_dispatcher, "_custom_op_handlers", {})


def register(operator: Operator) -> None:
    """Gives an operator its rule."""
    _HANDLERS[operator.overload] = functools.partial(_run, operator)


@register_sharding(torch.ops.aten._weight_norm_interface_backward.default)
def _weight_norm_backward(*_: Any) -> list[Any]:
    """Torch (2.13) has no rule for the gradient of weight norm, which ``TCN`` needs: on replicated tensors."""
    return [([Replicate()] * 2, [Replicate()] * 4 + [None])]


_common.DTENSOR = (DTensor,)
for _operator in OPERATORS.values():
    register(_operator)
