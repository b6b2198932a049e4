"""The novelty gate of a memory: the public function, its checks and choice of backend."""

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional._registration import Operator, call, register
from seqaccel.reference import attention as reference

__all__ = ["novelty_gate"]

BACKENDS = ("reference", "cpp")
_NO_LIMIT = 2**62


def _flops(vectors, kept, size, threshold, window, capacity, out_val=None) -> int:
    """Of the comparisons with what was kept before each vector; with all before it where rows have no values."""
    B, T, E = vectors.shape
    if out_val is None or not _common.has_values(out_val):
        return 2 * B * T * E * kept.shape[1] + B * T * T * E
    newest = torch.cat([size.clamp(0, kept.shape[1]).unsqueeze(1) - 1, out_val], 1).cummax(1).values[:, :-1]
    return 2 * E * int((newest + 1).clamp(max=window).sum())


register(
    Operator(
        "novelty_gate",
        lambda vectors, *_: vectors.new_empty(vectors.shape[:2], dtype=torch.int64),
        _flops,
        batch=dict.fromkeys(("vectors", "kept", "size", 0), 0),
        values_decide=True,
    )
)


@_common.unrecorded
def _check(vectors: Tensor, kept: Tensor | None, size: Tensor | None) -> None:
    where = "novelty_gate"
    _arguments.tensor(where, "vectors", vectors)
    _arguments.optional_tensors(where, kept=kept, size=size)
    if not vectors.is_floating_point():
        raise TypeError(f"{where}: expected vectors to be floating point, but got {vectors.dtype}")
    if vectors.dim() != 3:
        raise ValueError(f"{where}: expected vectors to have shape (B, T, E), but got {tuple(vectors.shape)}")
    B, _, E = vectors.shape
    if (kept is None) != (size is None):
        raise ValueError(f"{where}: expected kept and size together, but got only one of them")
    if kept is None or size is None:
        return
    for name, tensor in {"kept": kept, "size": size}.items():
        if tensor.device != vectors.device:
            raise ValueError(
                f"{where}: expected {name} to be on vectors' device, {vectors.device}, but it is on {tensor.device}"
            )
    if kept.dtype != vectors.dtype:
        raise TypeError(f"{where}: expected kept to have vectors' dtype, {vectors.dtype}, but got {kept.dtype}")
    if kept.dim() != 3 or kept.shape[0] != B or kept.shape[2] != E:
        raise ValueError(f"{where}: expected kept to have shape ({B}, N, {E}), but got {tuple(kept.shape)}")
    if size.dtype != torch.int64:
        raise TypeError(f"{where}: expected size to be torch.int64, but got {size.dtype}")
    if size.shape != (B,):
        raise ValueError(f"{where}: expected size to have shape ({B},), but got {tuple(size.shape)}")


def novelty_gate(
    vectors: Tensor,
    kept: Tensor | None = None,
    size: Tensor | None = None,
    *,
    threshold: float,
    window: int | None = None,
    capacity: int | None = None,
) -> Tensor:
    r"""The row of a memory to which each vector belongs: a vector joins only when it is unlike those kept.

    .. math::
        s_t = \max_{n \in W_t} \frac{x_t \cdot m_n}{|x_t|\,|m_n|}, \quad
        \mathrm{row}_t = \begin{cases} N_t & s_t < \mathrm{threshold} \\ \arg\max_{n \in W_t} & \text{else} \end{cases}

    where :math:`m_0 \ldots m_{N_t - 1}` are the vectors kept before step t and :math:`W_t` the last ``window`` of
    them. A vector that joins becomes row :math:`N_t`; another one belongs to the most similar row, the first of equals.
    The first vector always joins. A zero vector has similarity 0 to all, and NaN is like nothing.

    Args:
        vectors: (B, T, E). No gradient passes the gate: rows are indices.
        kept: (B, N, E), vectors kept before. Default: none
        size: (B,), torch.int64: how many rows of ``kept`` exist. Default: none
        threshold: similarity from which on a vector does not join, greater than -1 and at most 1.
        window: how many of those kept last a vector is compared with. Default: all
        capacity: rows that the memory has room for; in a full one each vector belongs to the most similar row.
            Default: no limit

    Returns:
        (B, T), torch.int64.

    Raises:
        TypeError: an argument's type or dtype is not what is expected.
        ValueError: a size or a value does not fit.
        RuntimeError: the backend asked for is not available.

    Source: Culurciello, "The fall of RNN / LSTM", 2018.

    Example:
        >>> import torch, seqaccel
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [-1.0, 0.0]]])
        >>> seqaccel.functional.novelty_gate(x, threshold=0.9)
        tensor([[0, 1, 0, 2]])
    """
    where = "novelty_gate"
    _check(vectors, kept, size)
    _arguments.number(where, "threshold", threshold)
    if not -1 < threshold <= 1:
        raise ValueError(f"{where}: expected threshold to be greater than -1 and at most 1, but got {threshold}")
    for name, value in (("window", window), ("capacity", capacity)):
        if value is not None:
            _arguments.integer(where, name, value, 1)
    vectors = vectors.detach()
    if kept is None or size is None:
        kept, size = vectors[:, :0], torch.zeros_like(vectors[:, :0, 0].sum(1), dtype=torch.int64)
    dtype = _common.compute_dtype(vectors.dtype)
    tensors = vectors.to(dtype), kept.detach().to(dtype), size
    options = float(threshold), window or _NO_LIMIT, capacity or _NO_LIMIT
    if not _common.transforms_active() and backends.choose(where, vectors, BACKENDS) == "cpp":
        if torch.compiler.is_compiling():
            return torch.ops.seqaccel.novelty_gate(*tensors, *options)
        return call(torch.ops.seqaccel.novelty_gate, *tensors, *options)
    return reference.novelty_gate(*tensors, threshold=options[0], window=options[1], capacity=options[2])
