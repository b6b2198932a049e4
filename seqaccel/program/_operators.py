"""What a traced step may call: operators of ATen, and what a session makes of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqaccel.program._places import ZERO, Places, Unsupported

#: Operators that only say where values lie, by the names that they have without their overload.
# fmt: off
MOVEMENT = frozenset([
    "_unsafe_view", "alias", "cat", "chunk", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "flip",
    "index_select", "lift_fresh_copy", "movedim", "narrow", "permute", "pixel_shuffle", "repeat", "reshape", "roll",
    "select", "select_scatter", "slice", "slice_scatter", "split", "split_with_sizes", "squeeze", "stack", "swapaxes",
    "t", "tile", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
])
# fmt: on
_KEYWORDS_OF_MEMORY = {"dtype", "layout", "device", "pin_memory", "memory_format"}

#: By the name of an operator without its overload: called with the places, a function that says whether only this node
#: reads its input, and the node's arguments.
OPERATORS: dict[str, Callable[..., Any]] = {}


def _operator(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return register


class Place:
    """A tensor of the step, by the addresses of its values."""

    def __init__(self, index: Tensor) -> None:
        self.index = index


def moved(places: Places, target: Any, args: Any, kwargs: Any) -> Any:
    """Calls an operator of MOVEMENT on addresses."""

    def address(value: Any) -> Any:
        return value.index.contiguous() if isinstance(value, Place) else places.constant(value)

    def walk(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [walk(part) for part in value]
        return address(value) if isinstance(value, (Place, Tensor)) else value

    if target.__name__.startswith("index_select"):  # its indices are indices
        args = [address(args[0]), *args[1:]]
    else:
        args = [walk(value) for value in args]
    made = target(*args, **{k: walk(v) for k, v in kwargs.items() if k not in _KEYWORDS_OF_MEMORY})
    return [Place(part) for part in made] if isinstance(made, (list, tuple)) else Place(made)


# ---- functions of one value ----

for _name in ("tanh", "sigmoid", "relu", "silu", "hardswish"):

    @_operator(_name)
    def _activation(places: Places, alone: bool, x: Place, kind: str = _name) -> Place:
        return Place(places.activated(kind, x.index, 0.0, alone))


for _name in ("exp", "log", "sqrt", "abs", "reciprocal"):

    @_operator(_name)
    def _unary(places: Places, alone: bool, x: Place, kind: str = _name) -> Place:
        return Place(places.unary(kind, x.index))


@_operator("gelu")
def _gelu(places: Places, alone: bool, x: Place, approximate: str = "none") -> Place:
    return Place(places.activated("gelu" if approximate == "none" else "gelu_tanh", x.index, 0.0, alone))


@_operator("leaky_relu")
def _leaky_relu(places: Places, alone: bool, x: Place, slope: float = 0.01) -> Place:
    return Place(places.activated("leaky_relu", x.index, slope, alone))


@_operator("elu")
def _elu(places: Places, alone: bool, x: Place, alpha: float = 1.0, scale: float = 1, input_scale: float = 1) -> Place:
    if (scale, input_scale) != (1, 1):
        raise Unsupported("it has scales (SELU, CELU)")
    return Place(places.activated("elu", x.index, alpha, alone))


@_operator("softplus")
def _softplus(places: Places, alone: bool, x: Place, beta: float = 1, threshold: float = 20) -> Place:
    if beta != 1:
        raise Unsupported("its beta is not 1")
    return Place(places.unary("softplus", x.index))


@_operator("neg")
def _neg(places: Places, alone: bool, x: Place) -> Place:
    return Place(places.affine(x.index, -1.0))


@_operator("rsqrt")
def _rsqrt(places: Places, alone: bool, x: Place) -> Place:
    return Place(places.unary("reciprocal", places.unary("sqrt", x.index)))


@_operator("square")
def _square(places: Places, alone: bool, x: Place) -> Place:
    return Place(places.binary("multiply", x.index, x.index))


@_operator("pow")
def _pow(places: Places, alone: bool, x: Any, exponent: Any) -> Place:
    if exponent == 0.5:
        return Place(places.unary("sqrt", x.index))
    if not isinstance(x, Place) or exponent not in (1, 2, 3, 4):
        raise Unsupported("the exponent is not 0.5, 1, 2, 3 or 4")
    made = x.index
    for _ in range(int(exponent) - 1):
        made = places.binary("multiply", made, x.index)
    return Place(made)


@_operator("clamp", "hardtanh", "clamp_min", "clamp_max")
def _clamp(places: Places, alone: bool, x: Place, least: Any = None, most: Any = None) -> Place:
    made = x.index
    for kind, limit in (("at_least", least), ("at_most", most)):
        if isinstance(limit, (Place, Tensor)):
            raise Unsupported("its limits are tensors")
        if limit is not None:
            made = places.unary(kind, made, float(limit))
    return Place(made)


OPERATORS["clamp_max"] = lambda places, alone, x, most: _clamp(places, alone, x, None, most)
OPERATORS["relu6"] = lambda places, alone, x: _clamp(places, alone, x, 0.0, 6.0)
OPERATORS["hardtanh"] = lambda places, alone, x, least=-1.0, most=1.0: _clamp(places, alone, x, least, most)


@_operator("hardsigmoid")
def _hardsigmoid(places: Places, alone: bool, x: Place) -> Place:
    return _clamp(places, alone, Place(places.affine(x.index, 1.0 / 6.0, 0.5)), 0.0, 1.0)


@_operator("dropout", "feature_dropout", "alpha_dropout")
def _dropout(places: Places, alone: bool, x: Place, *_: Any) -> Place:
    return x


@_operator("copy")
def _copy(places: Places, alone: bool, to: Any, value: Any, *_: Any) -> Place:
    shape = to.index.shape if isinstance(to, Place) else to.shape
    index = value.index if isinstance(value, Place) else places.constant(value.expand(shape))
    return Place(index.expand(shape))


@_operator("to", "_to_copy")
def _to(places: Places, alone: bool, x: Place, *args: Any, **kwargs: Any) -> Place:
    asked = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if any(dtype != torch.float32 for dtype in asked):
        raise Unsupported(f"it converts to {asked[0]}")
    return x


# ---- functions of two values ----


def _scaled(places: Places, value: Any, alpha: float) -> Any:
    if alpha == 1:
        return value
    return Place(places.affine(value.index, float(alpha))) if isinstance(value, Place) else value * alpha


@_operator("add")
def _add(places: Places, alone: bool, a: Any, b: Any, alpha: float = 1) -> Place:
    b = _scaled(places, b, alpha)
    if not isinstance(a, Place):
        a, b = b, a
    return Place(places.binary("add", a.index, b.index) if isinstance(b, Place) else places.affine(a.index, None, b))


@_operator("sub", "rsub")
def _sub(places: Places, alone: bool, a: Any, b: Any, alpha: float = 1) -> Place:
    b = _scaled(places, b, alpha)
    if not isinstance(a, Place):
        return Place(places.affine(b.index, -1.0, a))
    return Place(
        places.binary("subtract", a.index, b.index) if isinstance(b, Place) else places.affine(a.index, None, -b)
    )


OPERATORS["rsub"] = lambda places, alone, a, b, alpha=1: _sub(places, alone, b, a, alpha)


@_operator("mul")
def _mul(places: Places, alone: bool, a: Any, b: Any) -> Place:
    if not isinstance(a, Place):
        a, b = b, a
    return Place(places.binary("multiply", a.index, b.index) if isinstance(b, Place) else places.affine(a.index, b))


@_operator("div")
def _div(places: Places, alone: bool, a: Any, b: Any, rounding_mode: str | None = None) -> Place:
    if rounding_mode is not None:
        raise Unsupported("it rounds")
    if not isinstance(b, Place):
        return Place(places.affine(a.index, 1.0 / b))
    if not isinstance(a, Place):
        return Place(places.affine(places.unary("reciprocal", b.index), a))
    return Place(places.binary("divide", a.index, b.index))


@_operator("maximum", "minimum")
def _extreme(places: Places, alone: bool, a: Any, b: Any, kind: str = "maximum") -> Place:
    if not (isinstance(a, Place) and isinstance(b, Place)):
        raise Unsupported("one of its arguments is a constant: use clamp")
    return Place(places.binary(kind, a.index, b.index))


OPERATORS["minimum"] = lambda places, alone, a, b: _extreme(places, alone, a, b, "minimum")


@_operator("glu")
def _glu(places: Places, alone: bool, x: Place, dim: int = -1) -> Place:
    a, b = x.index.chunk(2, dim)
    return Place(places.binary("multiply", a, places.unary("sigmoid", b)))


@_operator("prelu")
def _prelu(places: Places, alone: bool, x: Place, weight: Tensor) -> Place:
    slope = weight.view(-1, *[1] * (x.index.dim() - 2)) if x.index.dim() > 1 else weight
    below = places.affine(places.unary("at_most", x.index, 0.0), slope)
    return Place(places.binary("add", places.unary("relu", x.index), below))


# ---- rows ----


def _dims(x: Place, dim: Any) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim) if dim else list(range(x.index.dim()))


def _total(places: Places, x: Place, dim: Any, keepdim: bool, mean: bool) -> Place:
    dims = [d % x.index.dim() for d in _dims(x, dim)]
    count = math.prod(x.index.shape[d] for d in dims)
    made = places.rows("sum", x.index, dims, 1, parameter=1.0 / count if mean else 1.0)[..., 0]
    for d in sorted(dims) if keepdim else []:
        made = made.unsqueeze(d)
    return Place(made)


@_operator("sum")
def _sum(places: Places, alone: bool, x: Place, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Place:
    return _total(places, x, dim, keepdim, False)


@_operator("mean")
def _mean(places: Places, alone: bool, x: Place, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Place:
    return _total(places, x, dim, keepdim, True)


@_operator("softmax", "_softmax")
def _softmax(places: Places, alone: bool, x: Place, dim: int, *_: Any) -> Place:
    return Place(places.rows("softmax", x.index, [dim]))


@_operator("layer_norm", "native_layer_norm")
def _layer_norm(
    places: Places, alone: bool, x: Place, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Place:
    weights = [None if w is None else w.flatten() for w in (weight, bias)]
    return Place(places.rows("layer_norm", x.index, list(range(-len(shape), 0)), weights=weights, parameter=eps))


@_operator("rms_norm")
def _rms_norm(places: Places, alone: bool, x: Place, shape: Any, weight: Any = None, eps: float | None = None) -> Place:
    weights = [None if weight is None else weight.flatten(), None]
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return Place(places.rows("rms_norm", x.index, list(range(-len(shape), 0)), weights=weights, parameter=eps))


@_operator("_native_batch_norm_legit_no_training", "batch_norm")
def _batch_norm(places: Places, alone: bool, x: Place, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> Any:
    if mean is None or var is None or (len(rest) > 2 and rest[0]):
        raise Unsupported("it has no running statistics")
    eps = rest[-1] if len(rest) == 2 else rest[2]
    gain = torch.rsqrt(var + eps) * (1.0 if weight is None else weight)
    shift = -mean * gain + (0.0 if bias is None else bias)
    channels = [-1, *[1] * (x.index.dim() - 2)]
    made = Place(places.affine(x.index, gain.view(channels), shift.view(channels)))
    return made if len(rest) > 2 else [made, None, None]


# ---- products ----


@_operator("linear")
def _linear(places: Places, alone: bool, x: Place, weight: Any, bias: Any = None) -> Place:
    if isinstance(weight, Place) or isinstance(bias, Place) or not isinstance(x, Place):
        raise Unsupported("its weight depends on the input")
    return Place(places.linear(x.index, weight, bias))


@_operator("matmul", "mm")
def _matmul(places: Places, alone: bool, a: Any, b: Any) -> Place:
    if isinstance(a, Place) and isinstance(b, Tensor) and b.dim() == 2:
        return Place(places.linear(a.index, b.t()))
    if isinstance(a, Place) and isinstance(b, Tensor) and b.dim() == 1:
        return Place(places.linear(a.index, b[None])[..., 0])
    raise Unsupported("a product of two tensors that depend on the input, or of a constant on the left")


@_operator("addmm")
def _addmm(places: Places, alone: bool, bias: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Place:
    product = _scaled(places, _matmul(places, alone, a, b), alpha)
    return _add(places, alone, _scaled(places, bias, beta), product)


@_operator("embedding")
def _embedding(places: Places, alone: bool, weight: Any, index: Any, *_: Any) -> Place:
    program = places.program
    if program.layers or index.index.dim() != 1:
        raise Unsupported("indices are the input of a session, (B,), and one embedding reads them before all else")
    layer = program.add("embedding", *weight.shape, weight)
    return Place(places.output(layer, weight.shape[1]))


def _padding(weight: Tensor, padding: Any, dilation: list[int]) -> list[tuple[int, int]]:
    if padding == "same":
        total = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
        return [(n // 2, n - n // 2) for n in total]
    return [(0, 0)] * (weight.dim() - 2) if padding == "valid" else [(n, n) for n in _each(padding, weight)]


def _each(value: Any, weight: Tensor) -> list[int]:
    """A number for each of the dimensions that a convolution goes over."""
    count = weight.dim() - 2
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


@_operator("conv1d", "conv2d")
def _convolution(
    places: Places, alone: bool, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Place:  # fmt: skip
    if isinstance(weight, Place) or isinstance(bias, Place):
        raise Unsupported("its weight depends on the input")
    dilation = _each(dilation, weight)
    pads = [n for pair in reversed(_padding(weight, padding, dilation)) for n in pair]
    padded = torch.nn.functional.pad(x.index, pads, value=ZERO)
    return Place(places.convolution(padded, weight, bias, _each(stride, weight), dilation, groups))


@_operator("pad", "constant_pad_nd")
def _pad(places: Places, alone: bool, x: Place, pads: Any, mode: Any = "constant", value: Any = None) -> Place:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    if mode == "constant":
        if value:
            raise Unsupported("it pads with another value than 0")
        return Place(torch.nn.functional.pad(x.index, pads, value=ZERO))
    return Place(torch.nn.functional.pad(x.index.double(), pads, mode=mode).long())  # addresses are below 2^53
