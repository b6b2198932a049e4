"""Stable recurrent nets: projections, and the bounds that hold of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from seqaccel import _arguments
from seqaccel.functional.rnn.stability import cell_of, contraction_factor, truncation_error

__all__ = ["contraction_factor", "stabilize_", "stabilize_after", "stable", "truncation_error"]

MARGIN = 1e-3  # bounds are kept with so much to spare: else only non-expansion follows

Module = TypeVar("Module", bound=torch.nn.Module)


class _SpectralNorm(torch.nn.Module):
    """W, divided by what its largest singular value exceeds the bound by."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        norm = torch.linalg.matrix_norm(weight, 2)
        return weight * (self.bound / norm.clamp(min=self.bound))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def project(self, weight: Tensor) -> Tensor:
        """W with singular values at most the bound: the nearest such matrix."""
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return weight if s.numel() == 0 or s[0] <= self.bound else (u * s.clamp(max=self.bound)) @ v


class _RowNorms(torch.nn.Module):
    """Each row (or value of a bias), divided by what its l1 norm exceeds its gate's bound by; infinite: not at all."""

    def __init__(self, bounds: list[float]) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self, weight: Tensor) -> Tensor:
        gates = weight.view(len(self.bounds), -1, *weight.shape[1:])
        norms = gates.abs() if weight.dim() == 1 else gates.abs().sum(-1, keepdim=True)
        bounds = torch.tensor(self.bounds, dtype=weight.dtype, device=weight.device)
        bounds = bounds.view(-1, *[1] * (norms.dim() - 1)).expand_as(norms)
        return torch.where(norms > bounds, gates * (bounds / norms), gates).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    project = forward


def _constraints(where: str, module: Any, forget: float, input_bound: float) -> Iterator[tuple[str, Any]]:
    """The names of the parameters of a layer that are bounded, and how."""
    cell = cell_of(where, module)
    if cell.startswith("gru"):
        raise TypeError(f"{where}: expected module to be an RNN or LSTM, but got {type(module).__name__}")
    free = math.inf
    for i, (weight_ih, weight_hh, *biases) in enumerate(module._all_weights):
        if cell != "lstm":
            yield weight_hh, _SpectralNorm(1 - MARGIN)
            continue
        rest, spare = 1 - forget, 1 - MARGIN
        bound = input_bound if i < (2 if module.bidirectional else 1) else 1.0  # above, |h| < 1
        # What is left of the forget gate's argument, in equal parts for the input and for both biases.
        left = math.log(forget / rest) * spare - rest**2
        if left <= 0:
            raise ValueError(f"{where}: expected forget to be at least 0.56, but got {forget}")
        yield weight_hh, _RowNorms([rest * spare, rest**2 * spare, rest / 4 * spare, rest * spare])
        if bound > 0:
            yield weight_ih, _RowNorms([free, left / 2 / bound, free, free])
        for bias in biases:
            yield bias, _RowNorms([free, left / 4, free, free])


def _layers(where: str, module: Any, forget: float, input_bound: float) -> list[tuple[torch.nn.Module, str, Any]]:
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"{where}: expected module to be a torch.nn.Module, but got {type(module).__name__}")
    _arguments.number(where, "forget", forget)
    _arguments.number(where, "input_bound", input_bound)
    if not 0 < forget < 1:
        raise ValueError(f"{where}: expected forget to be between 0 and 1, but got {forget}")
    if input_bound < 0:
        raise ValueError(f"{where}: expected input_bound to be at least 0, but got {input_bound}")
    layers = [each for each in module.modules() if isinstance(each, torch.nn.RNNBase)]
    if not layers:
        raise ValueError(f"{where}: module has no RNN or LSTM")
    return [(each, *pair) for each in layers for pair in _constraints(where, each, forget, input_bound)]


@torch.no_grad()
def stabilize_(module: Module, *, forget: float = 0.64, input_bound: float = 1.0) -> Module:
    r"""Projects the weights of every RNN and LSTM in ``module`` onto those that are proven stable, in place.

    RNN: singular values of :math:`W_{hh}` are clipped at 1. LSTM: rows are scaled until, in l1 norms of rows,

    .. math::
        \|W_{hi}\|, \|W_{ho}\| < 1 - \bar f, \quad \|W_{hg}\| \le \frac14 (1 - \bar f), \quad
        \|W_{hf}\| < (1 - \bar f)^2, \quad
        \sigma(\|W_{hf}\| + X \|W_{if}\| + |b_{if}| + |b_{hf}|) \le \bar f.

    All bounds are kept with a margin of 1e-3. Then :func:`contraction_factor` is below 1. Call it after each step of
    the optimiser, or see :func:`stabilize_after` and :func:`stable`.

    Args:
        module: an RNN or LSTM, or a module that has some.
        forget: :math:`\bar f`, the largest value of a forget gate, at least 0.56. Default: 0.64, as in the paper
        input_bound: X, the largest absolute value of the first layer's input. Default: 1

    Returns:
        ``module``.

    Raises:
        TypeError, ValueError: there is no such layer in ``module``, or one for which no projection is known.

    Source: Miller and Hardt, Stable Recurrent Models, 2019.

    Example:
        >>> import torch, seqaccel
        >>> lstm = seqaccel.nn.utils.stabilize_(seqaccel.nn.LSTM(3, 4))
        >>> seqaccel.nn.utils.contraction_factor(lstm) < 1
        True
    """
    for layer, name, constraint in _layers("stabilize_", module, forget, input_bound):
        parameter = getattr(layer, name)
        if parametrize.is_parametrized(layer, name):
            raise ValueError(f"stabilize_: {name} is parametrized; use seqaccel.nn.utils.stable")
        wide = parameter.float() if parameter.dtype in (torch.bfloat16, torch.float16) else parameter
        parameter.copy_(constraint.project(wide))
    return module


def stabilize_after(
    optimizer: torch.optim.Optimizer, module: torch.nn.Module, *, forget: float = 0.64, input_bound: float = 1.0
) -> Any:
    """Calls :func:`stabilize_` now, and after each step of ``optimizer``.

    Returns:
        A handle; its ``remove()`` ends this.

    Example:
        >>> import torch, seqaccel
        >>> rnn = seqaccel.nn.RNN(3, 4)
        >>> optimizer = torch.optim.SGD(rnn.parameters(), lr=10)
        >>> handle = seqaccel.nn.utils.stabilize_after(optimizer, rnn)
        >>> rnn(torch.rand(5, 1, 3))[0].sum().backward()
        >>> optimizer.step()
        >>> seqaccel.nn.utils.contraction_factor(rnn) < 1
        True
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"stabilize_after: expected optimizer to be an Optimizer, but got {type(optimizer).__name__}")

    def project(*_: Any) -> None:
        stabilize_(module, forget=forget, input_bound=input_bound)

    project()
    return optimizer.register_step_post_hook(project)


def stable(module: Module, *, forget: float = 0.64, input_bound: float = 1.0) -> Module:
    """Keeps the weights of every RNN and LSTM in ``module`` stable by :mod:`torch.nn.utils.parametrize`.

    The layers run on weights within the bounds of :func:`stabilize_`, whatever the parameters are, and gradients go
    through the scaling. An RNN's weight is divided as a whole by what its largest singular value exceeds the bound by.
    ``torch.nn.utils.parametrize.remove_parametrizations`` ends this.

    Example:
        >>> import seqaccel
        >>> rnn = seqaccel.nn.utils.stable(seqaccel.nn.RNN(3, 4))
        >>> _ = rnn.parametrizations.weight_hh_l0.original.data.mul_(100)
        >>> seqaccel.nn.utils.contraction_factor(rnn) < 1
        True
    """
    for layer, name, constraint in _layers("stable", module, forget, input_bound):
        parametrize.register_parametrization(layer, name, constraint)
    return module
