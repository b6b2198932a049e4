"""A closed-form continuous-time recurrence: the public function, its checks, autograd and choice of backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, _common, backends
from seqaccel.functional import _onnx
from seqaccel.functional._matmul import mm
from seqaccel.functional._registration import Operator, call, register
from seqaccel.reference import rnn as reference

__all__ = ["cfc"]

BACKENDS = ("reference", "cpp")
MODES = ("default", "no_gate", "pure")
MOST_MATRICES = 8  # of the C++ operators


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1)


class _CfC(torch.autograd.Function):
    """Saves the inputs, the output, and the activations of each step, which a list ``kept`` takes too. The kernel goes
    back step by step; the gradients of weights are products over all steps, calculated after it."""

    @staticmethod
    def forward(ctx, kept, count, mode, activation, reset, x, h_0, timespans, w, a, *matrices):
        weights, biases = list(matrices[:count]), list(matrices[count:])
        output, saved = call(
            torch.ops.seqaccel.cfc_forward, x, h_0, weights, biases, timespans, w, a, mode, activation, True, reset
        )
        if kept is not None:
            kept.extend(saved)
        ctx.save_for_backward(x, h_0, timespans, w, a, *matrices, reset, output, *saved)
        ctx.count, ctx.mode, ctx.activation = count, mode, activation
        return output

    @staticmethod
    def backward(ctx, grad_output):
        count, mode, activation = ctx.count, ctx.mode, ctx.activation
        needs, inputs = ctx.needs_input_grad[5:], ctx.saved_tensors[: 5 + 2 * count - 1]
        reset, output, *saved = ctx.saved_tensors[len(inputs) :]
        if torch.is_grad_enabled() or _common.is_batched(grad_output):

            def again(x, h_0, timespans, w, a, *matrices):
                weights, biases = matrices[:count], matrices[count:]
                return reference.cfc(x, h_0, weights, biases, timespans, w, a, mode, activation, reset)

            return *[None] * 5, *_common.differentiable_backward(again, inputs, (grad_output,), needs)
        device_type = grad_output.device.type
        if not _common.autocast_on(device_type):
            return *[None] * 5, *_gradients(ctx, grad_output, inputs, reset, output, saved, needs)
        with torch.autocast(device_type, enabled=False):
            return *[None] * 5, *_gradients(ctx, grad_output, inputs, reset, output, saved, needs)


def _gradients(
    ctx: Any,
    grad_output: Tensor,
    inputs: tuple[Any, ...],
    reset: Tensor | None,
    output: Tensor,
    saved: list[Tensor],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Those that are needed of x, h_0, timespans, w, a, the weights and the biases."""
    count, pure = ctx.count, ctx.mode == "pure"
    _, h_0, timespans, w, a, *matrices = inputs
    grad_h_0, grads, grad_h = call(
        torch.ops.seqaccel.cfc_backward, grad_output, matrices[:count], saved, timespans, w, a, ctx.mode,
        ctx.activation, pure and any(needs[2:5]), reset,
    )  # fmt: skip
    found: list[Tensor | None] = [grads[0], grad_h_0, *[None] * (len(inputs) - 2)]
    if pure and any(needs[2:5]):
        f, rate = saved[-1], w.abs() + saved[-1].abs()
        span: Any = 1.0 if timespans is None else timespans.unsqueeze(-1)
        decay = torch.exp(-span * rate)
        through = grad_h * a * f * decay
        if needs[2]:
            found[2] = (through * rate).sum(-1)
        found[3] = (through * span).sum((0, 1)) * w.sign()
        found[4] = (grad_h * (1 - decay * f)).sum((0, 1))
    elif needs[2]:
        H = h_0.shape[1]
        found[2] = (grads[-1][..., 3 * H :] * saved[-1][..., 3 * H :]).sum(-1)
    before = torch.cat([h_0.unsqueeze(0), output[:-1]])[: output.shape[0]]
    if reset is not None:
        before = before.masked_fill_(reset.unsqueeze(-1), 0)
    for i, grad in enumerate(grads):
        if needs[5 + i]:
            found[5 + i] = mm(_rows(grad).t(), _rows(before if i == 0 else saved[i - 1]), "cpp")
        if i and needs[4 + count + i]:
            found[4 + count + i] = _rows(grad).sum(0)
    return tuple(grad if need else None for grad, need in zip(found, needs, strict=True))


# ---- the operators' facts ----


def _forward_fake(x, h_0, weights, biases, timespans, w, a, mode, activation, save, reset=None):
    T, B, _ = x.shape
    kept = [x.new_empty((T, B, weight.shape[0])) for weight in weights] if save else []
    return x.new_empty((T, B, h_0.shape[1])), kept


def _backward_fake(grad_output, weights, saved, timespans, w, a, mode, activation, keep, reset=None):
    T, B, H = grad_output.shape
    grads = [grad_output.new_empty((T, B, weight.shape[0])) for weight in weights]
    return grad_output.new_empty((B, H)), grads, grad_output.new_empty(grad_output.shape if keep else (0,))


def _flops(rows, weights: Sequence[Any]) -> int:
    return 2 * rows[0] * rows[1] * sum(weight[0] * weight[1] for weight in weights)


def _definition(x, h_0, weights, biases, timespans, w, a, mode, activation, save, reset=None):
    return (reference.cfc(x, h_0, weights, biases, timespans, w, a, mode, activation, reset),)


def _recorded(x, h_0, weights, biases, timespans, w, a, mode, activation, save, reset=None):
    kept: list[Tensor] = []
    output = _CfC.apply(kept, len(weights), mode, activation, reset, x, h_0, timespans, w, a, *weights, *biases)
    return output, kept if save else []


register(
    Operator(
        "cfc_forward",
        _forward_fake,
        lambda x, h_0, weights, *_: _flops(x, weights),
        definition=_definition,
        recorded=_recorded,
        batch={"x": 1, "h_0": 0, "timespans": 1, "reset": 1, 0: 1, 1: 1},
    )
)
register(
    Operator(
        "cfc_backward",
        _backward_fake,
        lambda grad_output, weights, *_: _flops(grad_output, weights),
        batch={"grad_output": 1, "saved": 1, "timespans": 1, "reset": 1, 0: 0, 1: 1, 2: 1},
    )
)


# ---- the public function ----


@_common.unrecorded
def _check(x: Any, h_0: Any, weights: Any, biases: Any, timespans: Any, w_tau: Any, A: Any, mode: str) -> None:
    where = "cfc"
    _arguments.tensors(where, x=x)
    _arguments.optional_tensors(where, h_0=h_0, timespans=timespans, w_tau=w_tau, A=A)
    for name, values in (("weights", weights), ("biases", biases)):
        if not isinstance(values, (list, tuple)) or not all(isinstance(t, Tensor) for t in values):
            raise TypeError(f"{where}: expected {name} to be a list of tensors, but got {type(values).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{where}: expected x to be floating point, but got {x.dtype}")
    if not weights or len(biases) != len(weights) - 1:
        raise ValueError(
            f"{where}: expected weights, and biases of all but the first, but got {len(weights)} and {len(biases)}"
        )
    if len(weights) > MOST_MATRICES:
        raise ValueError(f"{where}: expected at most {MOST_MATRICES} weights, but got {len(weights)}")
    if weights[0].dim() != 2:
        raise ValueError(f"{where}: expected weights[0] to have shape (U, H), but got {tuple(weights[0].shape)}")
    if (mode == "pure") != (w_tau is not None) or (w_tau is None) != (A is None):
        raise ValueError(f"{where}: expected w_tau and A to be given for the mode 'pure', and for no other")
    H = weights[0].shape[1]
    if x.dim() != 3:
        raise ValueError(f"{where}: expected x to have shape (T, B, U), but got {tuple(x.shape)}")
    T, B, _ = x.shape
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "h_0": (h_0, (B, H)),
        "timespans": (timespans, (T, B)),
        "w_tau": (w_tau, (H,)),
        "A": (A, (H,)),
    }
    heads, width = H * (1 if mode == "pure" else 4), H
    for i, weight in enumerate(weights):
        rows = heads if i + 1 == len(weights) else weight.shape[0]
        expected[f"weights[{i}]"] = (weight, (rows, width))
        if i:
            expected[f"biases[{i - 1}]"] = (biases[i - 1], (rows,))
        width = rows
    expected["x"] = (x, (T, B, weights[0].shape[0]))
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise RuntimeError(f"{where}: expected {name} to be on x's device {x.device}, but it is on {tensor.device}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{where}: expected {name} to have x's dtype {x.dtype}, but got {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{where}: expected {name} to have shape {shape}, but got {tuple(tensor.shape)}")


def cfc(
    x: Tensor,
    h_0: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    timespans: Tensor | None = None,
    *,
    mode: str = "default",
    activation: str = "lecun_tanh",
    w_tau: Tensor | None = None,
    A: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    r"""The states of a closed-form continuous-time network, whose step is a network of n products:

    .. math::
        v_0 &= x_t + M_0 h_{t-1}, \qquad v_i = M_i\, \phi(v_{i-1}) + b_i \\
        f, g, a, b &= \text{the four parts of } v_{n-1}, \qquad \tau = \sigma(s_t a + b) \\
        h_t &= (1 - \tau) \odot \tanh f + \tau \odot \tanh g

    Without the gate (``mode="no_gate"``) :math:`h_t = \tanh f + \tau \odot \tanh g`. The ``"pure"`` solution has one
    part f, and :math:`h_t = A - A \exp(-s_t (|w_\tau| + |f|))\, f`.

    On a CPU the whole sequence is one call of a kernel, in float32 or float64; narrower types are computed in float32.
    On a GPU the steps are PyTorch's operators.

    Args:
        x: (T, B, U), what the first product gets from the input, with its bias.
        h_0: :math:`h_0` (B, H). Default: zero.
        weights: M, at most 8: (U, H), then (U', U) …, the last with 4 * H rows, or H for ``"pure"``.
        biases: b, of all products but the first.
        timespans: s, (T, B), the time that each step takes. Default: 1.
        mode: ``"default"``, ``"no_gate"`` or ``"pure"``. Default: ``"default"``.
        activation: :math:`\phi`, ``"lecun_tanh"`` (1.7159 tanh(0.666 v)), ``"tanh"`` or ``"relu"``. Default:
            ``"lecun_tanh"``.
        w_tau: :math:`w_\tau`, (H,), for ``"pure"``. Default: none.
        A: (H,), for ``"pure"``. Default: none.
        reset: (T, B) bool: an episode begins at each True, from a state of zero. Default: none.

    Returns:
        (T, B, H).

    Raises:
        TypeError, ValueError, RuntimeError: an argument's type, shape, dtype or device does not fit.

    Source: Hasani et al., *Closed-form continuous-time neural networks*, 2022, and their package ncps.

    Example:
        >>> import torch, seqaccel
        >>> T, B, U, H = 7, 2, 6, 5
        >>> weights = [torch.randn(U, H), torch.randn(4 * H, U)]
        >>> output = seqaccel.functional.cfc(torch.randn(T, B, U), None, weights, [torch.zeros(4 * H)])
        >>> output.shape
        torch.Size([7, 2, 5])
    """
    if mode not in MODES:
        raise ValueError(f"cfc: expected mode to be one of {', '.join(MODES)}, but got {mode!r:.60}")
    if activation not in reference.CFC_ACTIVATIONS:
        names = ", ".join(reference.CFC_ACTIVATIONS)
        raise ValueError(f"cfc: expected activation to be one of {names}, but got {activation!r:.60}")
    _check(x, h_0, weights, biases, timespans, w_tau, A, mode)
    if reset is not None:
        _arguments.reset("cfc", reset, tuple(x.shape[:2]), x.device)
    count = len(weights)
    given: list[Any] = list(_common.autocast(x, h_0, timespans, w_tau, A, *weights, *biases))
    dtype, wide = given[0].dtype, _common.compute_dtype(given[0].dtype)
    cast: list[Any] = [None if t is None else t.to(wide) for t in given]
    first, state, spans, w, a, *matrices = cast
    if state is None:
        state = first.new_zeros(first.shape[1], matrices[0].shape[1])
    operands = first, state, matrices[:count], matrices[count:], spans, w, a, mode, activation
    if _onnx.exporting():
        return _scanned(*operands, reset).to(dtype)
    if _common.transforms_active() or backends.choose("cfc", x, BACKENDS) == "reference":
        return reference.cfc(*operands, reset).to(dtype)
    recorded = _common.needs_grad(first, state, spans, w, a, *matrices)
    if torch.compiler.is_compiling():
        return torch.ops.seqaccel.cfc_forward(*operands, recorded, reset)[0].to(dtype)
    if recorded:
        return _CfC.apply(None, count, mode, activation, reset, first, state, spans, w, a, *matrices).to(dtype)
    return call(torch.ops.seqaccel.cfc_forward, *operands, False, reset)[0].to(dtype)


def _scanned(x, h_0, weights, biases, timespans, w, a, mode, activation, reset) -> Tensor:
    """``reference.cfc`` for any number of steps, in a graph of ONNX."""
    x, h_0, timespans, w, a, *matrices = _onnx.detached(x, h_0, timespans, w, a, *weights, *biases)
    weights, biases = matrices[: len(weights)], matrices[len(weights) :]

    given = {name: t for name, t in (("span", timespans), ("begins", reset)) if t is not None}

    def step(state: list[Tensor], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        x_t, *rest = values
        at: dict[str, Any] = {"span": None, **dict(zip(given, rest, strict=True))}
        h = reference.cfc_step(x_t, state[0], weights, biases, w=w, a=a, mode=mode, activation=activation, **at)
        return [h], h.clone()

    return _onnx.loop(step, [h_0], [x, *given.values()], False)[1]
