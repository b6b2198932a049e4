"""The reservoir of an echo state network: the public function, its checks and choice of backend."""

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional._registration import Operator, call, register
from seqaccel.reference import rnn as reference

__all__ = ["echo_state"]

BACKENDS = ("reference", "cpp")

register(
    Operator(
        "echo_state",
        lambda drive, *_: drive.new_empty(drive.shape),
        lambda drive, h_0, rows, columns, weight, *_: 2 * drive[0] * drive[1] * weight[0],
        definition=reference.echo_state,
        batch={"drive": 1, "h_0": 0, "reset": 1, 0: 1},
    )
)


@_common.unrecorded
def _check(drive: Tensor, rows: Tensor, columns: Tensor, weight: Tensor, h_0: Tensor | None) -> None:
    where = "echo_state"
    _arguments.tensors(where, drive=drive, rows=rows, columns=columns, weight=weight)
    _arguments.optional_tensors(where, h_0=h_0)
    if not drive.is_floating_point():
        raise TypeError(f"{where}: expected drive to be floating point, but got {drive.dtype}")
    if drive.dim() != 3:
        raise ValueError(f"{where}: expected drive to have shape (T, B, H), but got {tuple(drive.shape)}")
    _, B, H = drive.shape
    count = columns.shape[:1]
    expected = {
        "rows": (rows, torch.int32, (H + 1,)),
        "columns": (columns, torch.int32, count or (0,)),
        "weight": (weight, drive.dtype, count),
        "h_0": (h_0, drive.dtype, (B, H)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != drive.device:
            raise ValueError(
                f"{where}: expected {name} to be on drive's device, {drive.device}, but it is on {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise TypeError(f"{where}: expected {name} to be {dtype}, but got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{where}: expected {name} to have shape {tuple(shape)}, but got {tuple(tensor.shape)}")


def echo_state(
    drive: Tensor,
    rows: Tensor,
    columns: Tensor,
    weight: Tensor,
    h_0: Tensor | None = None,
    *,
    leak_rate: float = 1.0,
    reset: Tensor | None = None,
) -> Tensor:
    r"""The states of a reservoir, whose recurrent matrix W is sparse:

    .. math::
        h_t = (1 - a)\, h_{t-1} + a \tanh(\mathrm{drive}_t + W h_{t-1})

    On a CPU the whole sequence is one call of a kernel. Gradients, of any order, are those of the definition in
    PyTorch's operators, which has a dense W and runs step by step; a reservoir is usually not trained.

    Args:
        drive: (T, B, H), :math:`W_\mathrm{in} x + b` of all steps.
        rows: (H + 1,), torch.int32: row i of W has the values ``rows[i]`` to ``rows[i + 1] - 1`` of ``weight``
            (compressed sparse rows).
        columns: (N,), torch.int32: the column of each value.
        weight: (N,), the values, in ``drive``'s dtype.
        h_0: (B, H). Default: zeros
        leak_rate: a, between 0 and 1. Default: 1.0
        reset: (T, B) bool: an episode begins at each True, from a state of zero. Default: none.

    Returns:
        (T, B, H).

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size or a value does not fit.
        RuntimeError: ``rows`` or ``columns`` are not those of a matrix (H, H), or the backend asked for is not
            available.

    Source: Jaeger, "The 'echo state' approach to analysing and training recurrent neural networks", 2001.

    Example:
        >>> import torch, seqaccel
        >>> rows, columns = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
        >>> drive = torch.zeros(2, 1, 2)
        >>> drive[0, 0, 0] = 1.0  # reaches unit 1 at the next step
        >>> seqaccel.functional.echo_state(drive, rows, columns, torch.tensor([0.5, 0.5]))[:, 0]
        tensor([[0.7616, 0.0000],
                [0.0000, 0.3634]])
    """
    _check(drive, rows, columns, weight, h_0)
    if reset is not None:
        _arguments.reset("echo_state", reset, tuple(drive.shape[:2]), drive.device)
    _arguments.probability("echo_state", "leak_rate", leak_rate)
    if h_0 is None:
        h_0 = drive.new_zeros(drive.shape[1:])
    wide = _common.compute_dtype(drive.dtype)
    arguments = drive.to(wide), h_0.to(wide), rows, columns, weight.to(wide), float(leak_rate), reset
    if _common.transforms_active() or backends.choose("echo_state", drive, BACKENDS) == "reference":
        return reference.echo_state(*arguments).to(drive.dtype)
    operator = torch.ops.seqaccel.echo_state
    if torch.compiler.is_compiling() or _common.needs_grad(drive, h_0, weight):
        return operator(*arguments).to(drive.dtype)
    return call(operator, *arguments).to(drive.dtype)
