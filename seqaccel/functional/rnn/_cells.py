"""The recurrent cells: what every part above the kernels needs to know of each. A new cell is a row of ``CELLS``."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from seqaccel import _extension, backends

__all__ = ["CELLS", "CellSpec", "saved_shapes"]


class Problem(NamedTuple):
    """One call, as far as speed depends on it."""

    device: torch.device
    steps: int
    batch: int
    inputs: int
    hidden: int
    dtype: torch.dtype
    ragged: bool  # has lengths
    training: bool  # autograd records
    projected: bool  # has weight_hr


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """A cell.

    Attributes:
        gates: G; weight_ih, weight_hh and the biases have G * H rows.
        has_cell_state: has c beside h.
        extra: names and shapes of its weights after weight_ih, weight_hh, bias_ih and bias_hh; one letter per
            dimension: G for G * H, H, P, I, or a number.
        optional: the weights that may be missing. Without weight_ih the input is the projection itself (T, B, G * H).
        zoneout: takes zoneout.
        backends: the backends that have it.
        without_projection: those of them that do not take weight_hr.
        without_zoneout: those of them that take no zoneout.
        torch_is_faster: whether torch's operator, where it has this cell, was measured faster: then ``auto`` takes it.
            Default: it never is.
        torch_steps: largest batch * hidden_size at which torch's operator of one step, which costs less Python, was
            measured faster on a CPU without autograd: then ``auto`` takes it for the modules of one step.
        weights: names and shapes of all weights, in the operators' order.
        projects: takes weight_hr.
        norm: normalises both products.
        saved: values of a unit that the C++ backend keeps for the backward pass, besides c. Default: the G gates.
    """

    gates: int
    has_cell_state: bool = False
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ("bias_ih", "bias_hh")
    zoneout: bool = True
    backends: tuple[str, ...] = ("reference", "cpp", "triton")
    without_projection: tuple[str, ...] = ()
    without_zoneout: tuple[str, ...] = ("torch",)
    torch_is_faster: Callable[[Problem], bool] | None = None
    torch_steps: int = 0
    saved: int | None = None
    weights: dict[str, str] = dataclasses.field(init=False)
    projects: bool = dataclasses.field(init=False)
    norm: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        weights = {"weight_ih": "GI", "weight_hh": "GP", "bias_ih": "G", "bias_hh": "G"} | self.extra
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "projects", "weight_hr" in self.extra)
        object.__setattr__(self, "norm", "ln_hh_weight" in self.extra)
        if self.saved is None:
            object.__setattr__(self, "saved", self.gates)


def _cudnn_persists(gates: int, problem: Problem) -> bool:
    """Whether cuDNN has a persistent kernel for it, too. torch 2.11 does not use it in bfloat16."""
    if problem.dtype == torch.bfloat16 or gates == 3:
        return False
    return (gates == 1 and problem.hidden <= 256) or (problem.dtype == torch.float16 and problem.batch <= 32)


def _on_a_gpu(gates: int) -> Callable[[Problem], bool]:
    """As measured on an H100: torch's operator is faster than one launch per step or several launches of ours, and
    often where its kernel is persistent."""

    def torch_is_faster(problem: Problem) -> bool:
        if problem.device.type != "cuda" or _extension.triton_error:
            return problem.device.type == "cuda"
        from seqaccel.kernels.rnn.tiles import persistent

        tiles = persistent(gates, problem.hidden, problem.batch, problem.dtype, problem.device)
        if tiles is None or problem.projected:
            return True
        if problem.hidden <= 128:
            return problem.dtype != torch.bfloat16
        launches = 2 if problem.dtype.itemsize == 2 else 1
        if problem.batch > launches * tiles[1].rows or problem.steps < 32:  # of 16 steps torch's is faster still
            return True
        return _cudnn_persists(gates, problem)

    return torch_is_faster


def _measured(gates: int) -> Callable[[Problem], bool]:
    """Where torch's operator of so many gates was measured faster, on a GPU or a CPU."""
    on_a_gpu = _on_a_gpu(gates)

    def torch_is_faster(problem: Problem) -> bool:
        if problem.device.type != "cpu":
            return on_a_gpu(problem)
        if problem.dtype != torch.bfloat16 or problem.ragged or problem.projected:  # oneDNN takes neither
            return False
        if gates == 4 and problem.training:  # in bfloat16 (oneDNN), ours in float32
            return True
        return backends.torch_has_amx() and _amx_is_faster(gates, problem)

    return torch_is_faster


def _amx_is_faster(gates: int, problem: Problem) -> bool:
    """As measured on two cores of an Intel Xeon with AMX, of 16 to 512 steps.

    There torch's LSTM took 0.33 to 1.06 of our time in inference, its GRU 0.55 to 0.95 (training: 0.65 to 0.95), its
    RNN 0.58 to 0.95 (0.6 to 0.84). Where ours stay, it took 0.7 to 14 times our time.
    """
    batch, hidden = problem.batch, problem.hidden
    if gates == 4:
        if batch < 4:
            return 320 <= hidden <= (512 if batch == 1 else 384)
        return batch * hidden**2 >= 3 << 15
    if gates == 3 and not problem.training:
        return batch * hidden**3 >= 3 << 30
    return batch >= 64 and hidden >= 256 and batch * hidden**2 >= 1 << 24


_EVERY = ("reference", "cpp", "triton", "torch")
_PROJECTION = ("bias_ih", "bias_hh", "weight_hr")
_GIVEN = ("weight_ih", "bias_ih", "bias_hh")  # without weight_ih the input is W_ih x itself
_LAYER_NORM_LSTM = {"ln_ih_weight": "G", "ln_hh_weight": "G", "ln_c_weight": "H", "ln_c_bias": "H"}

_RNN: dict[str, Any] = {
    "zoneout": False, "saved": 0, "backends": _EVERY, "torch_is_faster": _measured(1), "torch_steps": 4096
}  # fmt: skip

CELLS: dict[str, CellSpec] = {
    "rnn_tanh": CellSpec(1, **_RNN),
    "rnn_relu": CellSpec(1, **_RNN),
    "lstm": CellSpec(
        4,
        True,
        {"weight_hr": "PH"},
        _PROJECTION,
        backends=_EVERY,
        torch_is_faster=_measured(4),
        torch_steps=128,
    ),
    "gru": CellSpec(3, backends=_EVERY, torch_is_faster=_measured(3), torch_steps=128, saved=4),
    "gru_reset_before": CellSpec(3),
    "peephole_lstm": CellSpec(4, True, {"weight_hr": "PH", "weight_peephole": "3H"}, _PROJECTION),
    "layer_norm_lstm": CellSpec(4, True, _LAYER_NORM_LSTM),
    "layer_norm_lstm_normalized_cell": CellSpec(4, True, _LAYER_NORM_LSTM),
    "layer_norm_gru": CellSpec(3, False, {"ln_ih_weight": "G", "ln_hh_weight": "G"}, saved=4),
    "multiplicative_lstm": CellSpec(4, True, {"weight_mx": "HI", "weight_mh": "HH"}, saved=6),
    **{
        f"ligru_{nonlinearity}{suffix}": CellSpec(2, bool(suffix), optional=_GIVEN)
        for nonlinearity in ("relu", "tanh")
        for suffix in ("", "_masked")
    },
}


def saved_shapes(cell: str, lead: Sequence[int], H: int) -> list[tuple[int, ...]]:
    """What ``rnn_forward`` of the C++ backend keeps for the backward pass, where it is told to save.

    ``lead`` is (T, B), or (N,) of packed rows.
    """
    spec = CELLS[cell]
    shapes: list[tuple[int, ...]] = [(*lead, spec.saved * H)] if spec.saved else []
    if spec.has_cell_state:
        shapes.append((*lead, H))
    if spec.norm:
        shapes += [(*lead, 2 * spec.gates * H), (*lead, 4)]  # both products normalised; statistics of the norms
    return shapes
