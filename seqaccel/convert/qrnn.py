"""Quasi-recurrent networks of Salesforce's package."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqaccel import _arguments, nn


def _sizes(weights: list[Tensor], window: int | None, output_gate: bool | None) -> tuple[int, bool]:
    """The window and whether there is an output gate: of several layers, by the shape of the second."""
    if len(weights) > 1:
        rows, features = weights[1].shape
        found = [
            (w, gates == 3) for w in (1, 2) for gates in (2, 3) if rows * w == features * gates and rows % gates == 0
        ]
        if not found or window not in (None, found[0][0]) or output_gate not in (None, found[0][1]):
            raise ValueError(f"from_qrnn: no QRNN has a second layer of {rows} rows and {features} features")
        return found[0]
    return (1 if window is None else window), (True if output_gate is None else output_gate)


def from_qrnn(
    source: torch.nn.Module | Mapping[str, Any],
    *,
    window: int | None = None,
    zoneout: float | None = None,
    output_gate: bool | None = None,
    dropout: float | None = None,
) -> nn.QRNN:
    r"""A QRNN that computes what one of Salesforce's package `torchqrnn` computes, with its weights.

    There the gate f weighs the *new* value, :math:`c_t = f \odot z + (1 - f) \odot c_{t-1}`, so the rows of f change
    their sign. With a window of 2 our layer starts from the input 0, as theirs without ``save_prev_x``; a stream
    (``extend``) goes on from the last one.

    Args:
        source: a ``torchqrnn.QRNN``, or its state_dict: ``layers.{i}.linear.weight``, (3 * H, window * I), and
            ``layers.{i}.linear.bias``.
        window: 1 or 2. Default: the module's own, or what the shape of the second layer says, or 1.
        zoneout: Default: the module's own, or 0.
        output_gate: Default: the module's own, or what the shape of the second layer says, or ``True``.
        dropout: between layers. Default: the module's own, or 0.

    Returns:
        A new module, with the weights' dtype and device, in the module's own training mode.

    Raises:
        ValueError: the weights are not those of a QRNN.

    Source: https://github.com/salesforce/pytorch-qrnn.

    Example:
        >>> import torch, seqaccel
        >>> weights = {"layers.0.linear.weight": torch.randn(12, 6), "layers.0.linear.bias": torch.zeros(12)}
        >>> seqaccel.from_qrnn(weights, window=2)
        QRNN(3, 4, window=2)
    """
    for name, given in (("zoneout", zoneout), ("dropout", dropout)):
        if given is not None:
            _arguments.probability("from_qrnn", name, given)
    if window not in (None, 1, 2):
        raise ValueError(f"from_qrnn: expected window to be 1 or 2, but got {window!r}")
    if output_gate is not None:
        _arguments.flag("from_qrnn", "output_gate", output_gate)
    training = True
    if isinstance(source, torch.nn.Module):
        layer: Any = source.get_submodule("layers.0")
        window = layer.window if window is None else window
        zoneout = layer.zoneout if zoneout is None else zoneout
        output_gate = layer.output_gate if output_gate is None else output_gate
        dropout = getattr(source, "dropout", 0.0) if dropout is None else dropout
        training, source = source.training, source.state_dict()
    if not isinstance(source, Mapping):
        raise TypeError(
            f"from_qrnn: expected source to be a module or weights by name, but got {type(source).__name__}"
        )
    layers = len(source) // 2
    names = [f"layers.{i}.linear.{kind}" for i in range(layers) for kind in ("weight", "bias")]
    if not layers or set(names) != set(source):
        raise ValueError(
            f"from_qrnn: expected weights layers.0.linear.weight, layers.0.linear.bias, ..., but got {list(source)}"
        )
    tensors = {name: torch.as_tensor(source[name]).detach() for name in names}
    weights = [tensors[name] for name in names[::2]]
    if any(weight.dim() != 2 for weight in weights):
        raise ValueError("from_qrnn: expected the weights to have two dimensions")
    window, output_gate = _sizes(weights, window, output_gate)
    gates, first = 3 if output_gate else 2, weights[0]
    hidden = first.shape[0] // gates
    if first.shape[0] % gates or first.shape[1] % window or not hidden:
        raise ValueError(f"from_qrnn: no QRNN of window {window} has a weight {tuple(first.shape)}")
    module = nn.QRNN(
        first.shape[1] // window, hidden, layers, dropout=float(dropout or 0.0), window=window,
        zoneout=float(zoneout or 0.0), output_gate=bool(output_gate), device=first.device, dtype=first.dtype,
    )  # fmt: skip
    state = {}
    for name, tensor in tensors.items():
        _, i, _, kind = name.split(".")
        tensor = tensor.clone()
        tensor[hidden : 2 * hidden] *= -1
        state[f"{kind}_ih_l{i}"] = tensor
    for name, parameter in module.named_parameters():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"from_qrnn: expected {name} to have shape {tuple(parameter.shape)}, but got {tuple(state[name].shape)}"
            )
    module.load_state_dict(state)
    return module.train(training)
