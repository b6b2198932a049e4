"""How far a kernel may be from the float64 reference, and the two comparisons the tests use.

Where torch has an operator for the same job the rule needs no number: at most twice torch's own error on the same
input (``assert_as_good_as``). Elsewhere the bound is the family's entry in ``BOUNDS`` with the reason for it
(``assert_close``).
"""

from __future__ import annotations

import dataclasses
import math

import torch


@dataclasses.dataclass(frozen=True)
class Bound:
    """The largest relative error (see ``error``) of an operator's outputs and gradients, by dtype."""

    reason: str
    forward: dict[torch.dtype, float]
    backward: dict[torch.dtype, float]


BOUNDS: dict[str, Bound] = {
    "rnn": Bound(
        reason="float64 against the float64 reference (float32 has torch's error to go by): the same sums of at most "
        "some hundred products in another order, a few hundred roundings of 1.1e-16 each",
        forward={torch.float64: 1e-14},
        backward={torch.float64: 1e-13},
    ),
}

BOUNDS["conv"] = Bound(
    reason="For tensors of fewer than 4096 elements, whose largest error is a draw or two and no measure of torch's "
    "(larger ones keep to twice torch's): eight roundings; in the gradients sixteen, since the derivatives of tanh and "
    "sigmoid, 1 - a^2 and a (1 - a), cancel near saturation. Half precision: sums in float32 from the same inputs, "
    "rounded once: half an ulp; in the gradients, which see rounded activations, four times that.",
    forward={torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11},
    backward={torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9},
)

BOUNDS["wavenet_layer"] = Bound(
    reason="Two convolutions in a row, with tanh and sigmoid between: twice the convolution's bound.",
    forward={torch.float32: 2e-6},
    backward={torch.float32: 4e-6},
)

BOUNDS["attention"] = Bound(
    reason="A weight's relative error is its logit's absolute one: a sum of D products, some roundings of |logit| <= 6."
    " The output is a mean with such weights; a gradient sums over up to all queries that see a node. "
    "Half precision: softmax and sums in float32, rounded once, half an ulp; a mean of rounded weights and nodes is "
    "off by less. Gradients, which see the rounded output, weights and score gradients: four times that.",
    forward={torch.float32: 2e-6, torch.float64: 4e-15, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11},
    backward={torch.float32: 4e-6, torch.float64: 8e-15, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9},
)

BOUNDS["attention_decoder"] = dataclasses.replace(
    BOUNDS["attention"],
    reason="As attention; in float64 its gradients chain through an LSTM's steps, and the reference's own products "
    "round otherwise on another processor (8.6e-15 on a Xeon): twice the bound.",
    backward=BOUNDS["attention"].backward | {torch.float64: 1.6e-14},
)

BOUNDS["attention_pool"] = dataclasses.replace(
    BOUNDS["attention"],
    reason="As attention; in half precision a node pools nodes that are rounded: another half ulp at most.",
    forward=BOUNDS["attention"].forward | {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10},
)

BOUNDS["scan"] = Bound(
    reason=(
        "A step adds a few roundings to a state it contracts (|a|, f <= 1), so the error stays at some units of the "
        "largest state: 16 eps. Gradients chain two such scans and sum up to T * B terms: 160 eps. Narrow types are "
        "calculated in float32 and rounded once."
    ),
    forward={torch.float64: 4e-15, torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3},
    backward={torch.float64: 4e-14, torch.float32: 2e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3},
)
for _bounds in (BOUNDS["scan"].forward, BOUNDS["scan"].backward):  # complex numbers as their parts
    _bounds |= {torch.complex64: _bounds[torch.float32], torch.complex128: _bounds[torch.float64]}

BOUNDS["scan_of_saved_states"] = dataclasses.replace(
    BOUNDS["scan"],
    reason="The gradient of a linear scan's coefficients is a product with the states, which are saved rounded in "
    "narrow types: two roundings instead of one.",
    backward=BOUNDS["scan"].backward | {torch.float16: 1e-3, torch.bfloat16: 8e-3},
)

BOUNDS["columns"] = dataclasses.replace(
    BOUNDS["scan"],
    reason=BOUNDS["scan"].reason + " Backward calculates the gates again from states that memory holds in the dtype: "
    "off by half an ulp each, which a gradient chains over some steps.",
    backward=BOUNDS["scan"].backward | {torch.float16: 1e-3, torch.bfloat16: 8e-3},
)

BOUNDS["conv_block"] = dataclasses.replace(
    BOUNDS["conv"],
    reason="Two convolutions with their activations, one after the other: the errors of both add up.",
    forward={dtype: 2 * bound for dtype, bound in BOUNDS["conv"].forward.items()},
    backward={dtype: 2 * bound for dtype, bound in BOUNDS["conv"].backward.items()},
)

BOUNDS["conv_gru"] = dataclasses.replace(
    BOUNDS["conv_block"],
    reason="Two convolutions, one after the other, with gates between: as a block of two.",
)

_SESSION = (
    "A state stays within 1 and each step contracts what the step before was wrong by, so an error is about that of "
)
BOUNDS["session_float32"] = Bound(
    reason=_SESSION + "a step: sums of some hundred products in chains of 128, times up to three layers: 32 eps.",
    forward={torch.float32: 4e-6},
    backward={},
)
BOUNDS["session_bfloat16"] = Bound(
    reason=_SESSION + "a step: weights and what they multiply are off by up to 2^-9 each, independently, so a sum of K "
    "products of size 1/sqrt(K) by about 2^-9, its extremes over thousands of values by 4 times that; three layers.",
    forward={torch.float32: 3 * 4 * 2.0**-9},
    backward={},
)
BOUNDS["session_int8"] = Bound(
    reason=_SESSION + "a step: a value is off by up to 1/254 of the largest of its row or vector, which is about 2 to "
    "3 times a typical one, so a sum is off by 1/100, its extremes by 4 times that; three layers.",
    forward={torch.float32: 3 * 4 * 0.01},
    backward={},
)

for _name in ("float32", "bfloat16", "int8"):
    _bound = BOUNDS[f"session_{_name}"]
    BOUNDS[f"session_layer_norm_{_name}"] = dataclasses.replace(
        _bound,
        reason=_bound.reason + " With a norm of c, what c is wrong by is divided by its deviation, about 1/4 where the "
        "gates' gains are 0.3.",
        forward={torch.float32: 4 * _bound.forward[torch.float32]},
    )


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest absolute difference over the reference's largest magnitude; infinite if a NaN or Inf differs."""
    if actual.is_complex():
        actual, reference = torch.view_as_real(actual.resolve_conj()), torch.view_as_real(reference.resolve_conj())
    actual, reference = actual.detach().double().cpu(), reference.detach().double().cpu()
    assert actual.shape == reference.shape, f"shape {tuple(actual.shape)}, expected {tuple(reference.shape)}"
    if actual.numel() == 0:
        return 0.0
    finite = reference.isfinite()
    if not torch.equal(actual.isfinite(), finite) or not torch.equal(
        actual[~finite].isnan(), reference[~finite].isnan()
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = reference[finite].abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual[finite] - reference[finite]).abs().max() / scale)


def assert_close(
    actual: torch.Tensor,
    reference: torch.Tensor,
    family: str,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    what: str = "",
) -> None:
    """``actual``, computed from inputs of ``dtype``, is within the family's bound of the float64 ``reference``."""
    bound = (BOUNDS[family].backward if backward else BOUNDS[family].forward)[dtype]
    found = error(actual, reference)
    assert found <= bound, f"{what or 'result'}: error {found:.3g}, bound {bound:.3g} ({family}, {dtype})"


def assert_as_good_as(
    actual: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor, *, factor: float = 2.0, what: str = ""
) -> None:
    """``actual`` is at most ``factor`` times as far from the float64 ``reference`` as ``stock`` is, or one rounding."""
    found, theirs = error(actual, reference), error(stock, reference)
    rounding = torch.finfo(stock.dtype).eps
    assert found <= max(factor * theirs, rounding), (
        f"{what or 'result'}: error {found:.3g}, the stock operator's {theirs:.3g}"
    )


def mean_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """The root mean square difference over the reference's root mean square."""
    actual, reference = actual.detach().double(), reference.detach().double()
    found = float((actual - reference).norm() / reference.norm().clamp(min=1e-30))
    return found if math.isfinite(found) else math.inf


def assert_as_good_on_average(
    errors: dict[str, tuple[float, float]], dtype: torch.dtype, tf32: bool = False, kinked: bool = False
) -> None:
    """Each ``mean_error`` of ours is at most twice torch's, or some roundings: of the operators on a GPU.

    Four roundings; in float32 sixteen, since torch may add up a thousand products in more parts than we do. TF32 keeps
    10 bits as float16 does, and cuDNN takes it for some shapes only. ``kinked``: relu; of its inputs a share of about
    one rounding is so near 0 that it falls on the other side, where the gradient is another, which makes a mean square
    of one rounding, and a multiple of that where a gradient runs through several.
    """
    narrow = tf32 or dtype != torch.float32
    rounding = torch.finfo(torch.float16 if tf32 and dtype == torch.float32 else dtype).eps / 2
    floor = 4 * rounding**0.5 if narrow and kinked else (4 if narrow else 16) * rounding
    wrong = {name: both for name, both in errors.items() if not both[0] <= max(2 * both[1], floor)}
    assert not wrong, ", ".join(f"{name}: {ours:.3g}, torch's {stock:.3g}" for name, (ours, stock) in wrong.items())
