"""``describe``: the layers of a module. Here are those without a state; each family of the others has a file."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel.convert import REPLACEMENTS
from seqaccel.program._layers import Program

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}


#: Functions that a Transformer's feed-forward has as its activation.
FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
}


def described(
    module: nn.Module,
    memory_length: int | None = None,
    max_length: int | None = None,
    pyramid: tuple[int, int] | None = None,
    example: Tensor | None = None,
    init_state: Callable[[int], Any] | None = None,
) -> Program:
    """The layers of a module, where each step of an SRUpp attends to ``memory_length`` steps before it, and streams of
    hierarchical attention have ``max_length`` steps. A module that is traced has ``example`` as its input.

    Raises:
        TypeError, ValueError: a session does not run it.
    """
    program = Program(memory_length, max_length, pyramid, example, init_state)
    describe(module, program, "")
    for argument, value, kind, of in (
        ("memory_length", memory_length, "attention", ""),
        ("max_length", max_length, "hierarchical", " by hierarchical attention"),
    ):
        if value is not None and all(layer.kind != kind for layer in program.layers):
            raise ValueError(f"{argument}: nothing attends{of} in {type(module).__name__}: expected None")
    return program


@functools.singledispatch
def describe(module: nn.Module, program: Program, name: str) -> None:
    """Appends the layers of a module; ``name`` begins the names of its states."""
    if type(module) in REPLACEMENTS:  # torch's own: seen as ours, which has the same attributes
        seen = copy.copy(module)
        seen.__class__ = REPLACEMENTS[type(module)]
        return describe(seen, program, name)
    found = activation_of(module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, but got {type(module).__name__}")
    if found is None:
        from seqaccel.program.trace import traced  # torch.export takes a second to import

        return traced(module, program, name)
    if not program.layers:
        raise TypeError(f"module: a Sequential must not begin with {type(module).__name__}")
    kind, parameter = found
    width = program.width(program.last)
    program.add(kind, width, width, parameter=parameter)


def activation_of(module: nn.Module) -> tuple[str, float] | None:
    if type(module) in _ACTIVATIONS:
        return _ACTIVATIONS[type(module)], 0.0
    if isinstance(module, nn.Softmax):
        if module.dim != -1:
            raise ValueError(f"module: a Session runs a Softmax of dim=-1, but got dim={module.dim}")
        return "softmax", 0.0
    if isinstance(module, nn.GELU):
        return ("gelu" if module.approximate == "none" else "gelu_tanh"), 0.0
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu", module.negative_slope
    if isinstance(module, nn.ELU):
        return "elu", module.alpha
    return None


@describe.register(nn.Identity)
@describe.register(nn.Dropout)
def _nothing(module: nn.Module, program: Program, name: str) -> None:
    pass


@describe.register
def _linear(module: nn.Linear, program: Program, name: str) -> None:
    program.add("linear", module.in_features, module.out_features, module.weight, module.bias)


@describe.register
def _embedding(module: nn.Embedding, program: Program, name: str) -> None:
    if module.max_norm is not None:
        raise ValueError("module: a Session does not run an Embedding with max_norm")
    program.add("embedding", module.num_embeddings, module.embedding_dim, module.weight)


@describe.register(nn.LayerNorm)
@describe.register(nn.RMSNorm)
def _norm(module: Any, program: Program, name: str) -> None:
    if len(module.normalized_shape) != 1:
        title, shape = type(module).__name__, tuple(module.normalized_shape)
        raise ValueError(f"module: a Session runs a {title} of the last dimension, but got {shape}")
    (width,) = module.normalized_shape
    if isinstance(module, nn.LayerNorm):
        program.add("layer_norm", width, width, module.weight, module.bias, parameter=module.eps)
    else:
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        program.add("rms_norm", width, width, module.weight, None, parameter=eps)


@describe.register
def _batch_norm(module: nn.BatchNorm1d, program: Program, name: str) -> None:
    """In eval mode it is a gain and a bias a feature: those of the Linear before it, or a layer."""
    if module.running_mean is None or module.running_var is None:
        raise ValueError("module: a Session runs a BatchNorm1d with running statistics only")
    gain = (module.running_var.detach() + module.eps).rsqrt()
    if module.weight is not None:
        gain = gain * module.weight.detach()
    shift = -module.running_mean.detach() * gain
    if module.bias is not None:
        shift = shift + module.bias.detach()
    before = program.layers[-1] if program.layers else None
    if before is None or before.kind != "linear" or before.outputs != module.num_features:
        program.add("batch_norm", module.num_features, module.num_features, gain, shift)
        return
    weight, bias = before.weights
    assert weight is not None
    before.weights = [
        weight.detach() * gain.unsqueeze(1),
        shift if bias is None else shift + bias.detach() * gain,
    ]
