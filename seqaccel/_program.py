"""The layers that a Session runs, as its kernels know them, from a module."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqaccel.convert import REPLACEMENTS
from seqaccel.functional.conv import GATED, conv_of_phases
from seqaccel.functional.rnn import CELLS
from seqaccel.nn.attention import HierarchicalAttention, HierarchicalAttentionEncoder
from seqaccel.nn.conv import TCN, CausalConv1d, CausalConvTranspose1d, GatedConvLM, TemporalBlock, WaveNet, WaveNetLayer
from seqaccel.nn.rnn import LiGRU
from seqaccel.nn.rnn._base import Recurrent
from seqaccel.nn.rnn._cells import GRUCell, LSTMCell, RNNCell
from seqaccel.nn.scan import SRU, SRUCell, SRUpp
from seqaccel.nn.scan._base import Columns
from seqaccel.nn.scan._sru_pp import Attention, Projection

__all__ = ["Layer", "Program", "State", "described", "pyramid_levels"]

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
_MOST_TOKENS = 2**24  # of a stream of hierarchical attention, where nothing else is said


@dataclasses.dataclass
class Layer:
    """A layer, as ``csrc/common/session_table.h`` describes it."""

    kind: str
    inputs: int
    outputs: int
    weights: list[Tensor | None] = dataclasses.field(default_factory=list)
    hidden: int = 0
    matrices: int = 0
    source: int = 1
    skip: int = 0
    taps: int = 1
    dilation: int = 1
    heads: int = 0
    block_size: int = 0
    fanout: int = 0
    levels: int = 0
    local_blocks: int = 0
    top_slots: int = 0
    limited: bool = False
    mass_bias: bool = False
    pool_rows: int = 0
    activation: str = "none"
    relu: bool = False
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    parameter: float = 0.0


@dataclasses.dataclass
class State:
    """A part of the state: of which tensor, of which layer, its letter (``csrc/common/session_table.h``), and its shape
    without the batch. The states of one name are stacked by layers, but for inputs kept."""

    name: str
    layer: int
    part: str
    shape: tuple[int, ...]

    @property
    def stacked(self) -> bool:
        return self.part not in "rx"

    @property
    def channels_first(self) -> bool:
        """It lies in C++ as (B, T, C)."""
        return self.part == "r"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.part == "a" else torch.float32


class Program:
    """Layers in the order in which they run, and the parts of their states."""

    def __init__(
        self, memory_length: int | None, max_length: int | None, pyramid: tuple[int, int] | None = None
    ) -> None:
        self.memory_length = memory_length  # earlier steps that a step of an SRUpp attends to
        self.max_length = max_length  # steps of a stream of hierarchical attention
        self.pyramid = pyramid  # its levels and the slots of the highest one, instead of what max_length says
        self.layers: list[Layer] = []
        self.states: list[State] = []
        self.batch_first = False  # of recurrent layers
        self.channels_first = False  # begins with a convolution: (B, C, T), or (B, T) indices
        self.phases = 1  # outputs per step, which lie in each channel of the last layer

    def add(self, kind: str, inputs: int, outputs: int, *weights: Tensor | None, **options: Any) -> int:
        """Returns the layer's number."""
        if self.phases > 1:
            raise TypeError("module: a CausalConvTranspose1d gives several outputs per step and must come last")
        self.layers.append(Layer(kind, inputs, outputs, list(weights), **options))
        return len(self.layers) - 1

    def back(self, layer: int) -> int:
        """How far the next layer to be added is behind this one."""
        return len(self.layers) - layer

    @property
    def last(self) -> int:
        """Number of the last layer; -1 is the session's input."""
        return len(self.layers) - 1

    def keep(self, name: str, part: str, *shape: int) -> None:
        """The next layer has this part of a state."""
        self.states.append(State(name, len(self.layers), part, shape))


def described(
    module: nn.Module,
    memory_length: int | None = None,
    max_length: int | None = None,
    pyramid: tuple[int, int] | None = None,
) -> Program:
    """The layers of a module, where each step of an SRUpp attends to ``memory_length`` steps before it, and streams of
    hierarchical attention have ``max_length`` steps.

    Raises:
        TypeError, ValueError: a session does not run it.
    """
    program = Program(memory_length, max_length, pyramid)
    _describe(module, program, "")
    for argument, value, kind, of in (
        ("memory_length", memory_length, "attention", ""),
        ("max_length", max_length, "hierarchical", " by hierarchical attention"),
    ):
        if value is not None and all(layer.kind != kind for layer in program.layers):
            raise ValueError(f"{argument}: nothing attends{of} in {type(module).__name__}: expected None")
    return program


@functools.singledispatch
def _describe(module: nn.Module, program: Program, name: str) -> None:
    """Appends the layers of a module; ``name`` begins the names of its states."""
    if type(module) in REPLACEMENTS:  # torch's own: seen as ours, which has the same attributes
        seen = copy.copy(module)
        seen.__class__ = REPLACEMENTS[type(module)]
        return _describe(seen, program, name)
    kind, parameter = _activation(module)
    if not program.layers:
        raise TypeError(f"module: a Sequential must not begin with {type(module).__name__}")
    width = program.layers[-1].outputs
    program.add(kind, width, width, parameter=parameter)


def _activation(module: nn.Module) -> tuple[str, float]:
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
    raise TypeError(
        "module: expected a recurrent layer or cell of seqaccel.nn or torch.nn, a causal convolution, hierarchical "
        "attention or an encoder with it, or a Sequential "
        "of them and of Linear, Embedding, LayerNorm, RMSNorm, BatchNorm1d, Softmax and activations, "
        f"but got {type(module).__name__}"
    )


@_describe.register
def _sequential(module: nn.Sequential, program: Program, name: str) -> None:
    for child, part in module.named_children():
        _describe(part, program, f"{name}{child}.")


@_describe.register(nn.Identity)
@_describe.register(nn.Dropout)
def _nothing(module: nn.Module, program: Program, name: str) -> None:
    pass


@_describe.register
def _linear(module: nn.Linear, program: Program, name: str) -> None:
    program.add("linear", module.in_features, module.out_features, module.weight, module.bias)


@_describe.register
def _embedding(module: nn.Embedding, program: Program, name: str) -> None:
    if module.max_norm is not None:
        raise ValueError("module: a Session does not run an Embedding with max_norm")
    program.add("embedding", module.num_embeddings, module.embedding_dim, module.weight)


@_describe.register(nn.LayerNorm)
@_describe.register(nn.RMSNorm)
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


@_describe.register
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


# ---- recurrent layers and cells ----


@_describe.register(RNNCell)
@_describe.register(LSTMCell)
@_describe.register(GRUCell)
def _recurrent_cell(module: Any, program: Program, name: str) -> None:
    if isinstance(module, RNNCell):
        kind = f"rnn_{module.nonlinearity}"
    else:
        kind = "lstm" if isinstance(module, LSTMCell) else "gru"
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]
    hidden = module.hidden_size
    for part in "hc" if kind == "lstm" else "h":
        program.keep(name + part, part, hidden)
    program.add(kind, module.input_size, hidden, *weights, *[None] * (kind == "lstm"), hidden=hidden)


@_describe.register
def _ligru(module: LiGRU, program: Program, name: str) -> None:
    """The products of the input are a Linear with its norm; the layer's own multiply them by 1."""
    if module.bidirectional:
        raise ValueError("module: a bidirectional LiGRU cannot run step by step")
    program.batch_first = program.batch_first or module.batch_first
    hidden = module.hidden_size
    for k in range(module.num_layers):
        weight_ih, weight_hh = getattr(module, f"weight_ih_l{k}"), getattr(module, f"weight_hh_l{k}")
        linear = nn.Linear(weight_ih.shape[1], 2 * hidden, bias=False, device="meta")
        linear.weight = weight_ih
        _describe(linear, program, name)
        _describe(module.get_submodule(f"norm_l{k}"), program, name)
        kind, width, bias = f"ligru_{module.nonlinearity}", 2 * hidden, None
        if module.normalization == "batch_norm":  # in eval mode part of the Linear, which the layer has itself
            before = program.layers.pop()
            width, (weight, bias) = before.inputs, before.weights
        else:
            weight = torch.eye(width, dtype=weight_hh.dtype, device=weight_hh.device)
        program.keep(name + "h", "h", hidden)
        program.add(kind, width, hidden, weight, weight_hh, bias, None, hidden=hidden)


@_describe.register
def _recurrent(module: Recurrent, program: Program, name: str) -> None:
    if "cpp" not in CELLS[module.cell].backends:
        raise TypeError(f"module: a Session runs C++ kernels, which {type(module).__name__} has not")
    if module.bidirectional:
        raise ValueError(f"module: a bidirectional {type(module).__name__} cannot run step by step")
    program.batch_first = program.batch_first or module.batch_first
    hidden, outputs = module.hidden_size, module.proj_size or module.hidden_size
    zoneout_h, zoneout_c = module.zoneout if isinstance(module.zoneout, tuple) else (module.zoneout, module.zoneout)
    for layer in range(module.num_layers):
        program.keep(name + "h", "h", outputs)
        if CELLS[module.cell].has_cell_state:
            program.keep(name + "c", "c", hidden)
        program.add(
            module.cell,
            module.input_size if layer == 0 else outputs,
            outputs,
            *module._layer_weights(layer),
            hidden=hidden,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
        )


# ---- column cells ----


@_describe.register(SRU)
@_describe.register(SRUpp)
def _sru(module: Any, program: Program, name: str) -> None:
    if module.input_to_hidden is not None:
        _describe(module.input_to_hidden, program, name)
    for cell in module.rnn_lst:
        _describe(cell, program, name)


@_describe.register
def _sru_cell(module: SRUCell, program: Program, name: str) -> None:
    custom = getattr(module, module._custom)
    if not isinstance(custom, Attention | Projection | None):
        raise TypeError("module: a Session does not run an SRU with custom_m")
    if module.bidirectional:
        raise ValueError("module: a bidirectional SRU cannot run step by step")
    inputs, hidden, matrices, norm = module.input_size, module.hidden_size, module.num_matrices, module.layer_norm
    source = program.last
    if norm is not None and not module.normalize_after:
        _describe(norm, program, name)
    if custom is not None:
        weight = _attention(custom, program, name)
    else:
        weight = module.weight.detach()
        if module.weight_proj is not None:
            program.add("linear", inputs, module.weight_proj.shape[1], module.weight_proj.t(), None)
    skips = module.has_skip_term and matrices == 3
    program.keep(name + "c", "c", hidden)
    program.add(
        "sru_tanh" if module.use_tanh else "sru",
        weight.shape[0],
        hidden,
        weight.view(-1, hidden, matrices).permute(2, 1, 0).flatten(0, 1),
        None,
        module.bias,
        module.weight_c,
        hidden=hidden,
        matrices=matrices,
        skip=program.back(source) if skips else 0,
        parameter=module.scale_x.item() if module.rescale and skips else 1.0,
    )
    if norm is not None and module.normalize_after:
        _describe(norm, program, name)


def _attention(module: Attention | Projection, program: Program, name: str) -> Tensor:
    """Adds the transform of an SRU++ layer but for its last product, whose weight (inner, 3H or 4H) it returns."""
    _describe(module.linear1, program, name)
    last = module.linear2
    if isinstance(module, Attention):
        length, query, last = program.memory_length, program.last, module.linear3
        if length is None:
            raise ValueError(
                "memory_length: a Session of SRUpp needs to know to how many steps before it a step attends"
            )
        weight, inner = module.linear2.weight.detach().clone(), last.in_features
        weight[inner:] *= module.alpha.detach()
        program.add("linear", inner, 2 * inner, weight, None)
        program.keep(name + "age", "n")
        program.keep(name + "memory", "m", length, 2 * inner)
        program.add(
            "attention",
            2 * inner,
            inner,
            skip=program.back(query),
            taps=length + 1,
            heads=module.num_heads,
            parameter=1.0,
        )
    if module.layer_norm is not None:
        _describe(module.layer_norm, program, name)
    return last.weight.detach().t()


@_describe.register
def _columns(module: Columns, program: Program, name: str) -> None:
    if module.bidirectional:
        raise ValueError(f"module: a bidirectional {type(module).__name__} cannot run step by step")
    program.batch_first = program.batch_first or module.batch_first
    hidden = module.hidden_size
    for k in range(module.num_layers):
        weight, weight_hh, bias = module._weights(k)
        inputs = module.input_size if k == 0 else hidden
        now, before = weight.detach().split(inputs, 1) if module._window == 2 else (weight, None)
        program.keep(name + module._state_name, "c", hidden)
        if before is not None:
            program.keep(f"{name}x_{k}", "x", inputs)
        program.add(
            module.cell,
            inputs,
            hidden,
            now,
            before,
            bias,
            weight_hh,
            hidden=hidden,
            matrices=module._spec.inputs,
            parameter=1.0 - getattr(module, "zoneout", 0.0),
        )


# ---- hierarchical attention ----


def pyramid_levels(module: HierarchicalAttention, max_length: int | None) -> tuple[int, int]:
    """The levels that streams of so many steps need, level 0 among them, and the slots of the highest one."""
    if max_length is None:
        if module.levels is not None:
            raise ValueError(
                "max_length: a Session of HierarchicalAttention with a number of levels needs to know how many steps "
                "a stream has"
            )
        max_length = _MOST_TOKENS
    top = 0
    while not module._is_top(top) and module.local_blocks * module._span(top + 1) < max_length:
        top += 1
    span = module._span(top)
    return top + 1, (
        max_length // span + 1 if module._is_top(top) else module._span(top + 1) // span * module.local_blocks
    )


def pyramid_parts(module: HierarchicalAttention, levels: int, top_slots: int) -> list[tuple[int, int, int, int]]:
    """Slots of each level, and where its keys, sums and moments begin in the memory of a head; the last row has the end
    of all of them."""
    d, place, rows = module.head_dim, 0, []
    for level in range(levels):
        slots = (
            top_slots if level + 1 == levels else module.local_blocks * (module._span(level + 1) // module._span(level))
        )
        rows.append((slots, place, place + 2 * slots * d))
        place += 2 * slots * d + 2 * d * (level > 0)
    parts = [(*row, place + 2 * max(level - 1, 0)) for level, row in enumerate(rows)]
    end = place + 2 * (levels - 1)
    return [*parts, (0, end, end, end)]


@_describe.register
def _hierarchical(module: HierarchicalAttention, program: Program, name: str) -> None:
    program.batch_first = program.batch_first or module.batch_first
    _attends(module, program, name)


def _attends(module: HierarchicalAttention, program: Program, name: str, **options: Any) -> int:
    if not module.causal:
        raise ValueError("module: HierarchicalAttention(causal=False) cannot run step by step")
    if module.in_proj_weight is None:
        raise ValueError(
            "module: HierarchicalAttention with kdim or vdim cannot run step by step: a stream has one input"
        )
    E = module.embed_dim
    width = module.in_proj_weight.shape[0]
    count, top_slots = program.pyramid or pyramid_levels(module, program.max_length)
    size = -(-pyramid_parts(module, count, top_slots)[-1][1] // 16) * 16
    program.add("linear", E, width, module.in_proj_weight, module.in_proj_bias)
    program.keep(name + "age", "a")
    program.keep(name + "memory", "p", module.num_kv_heads, size)
    program.add(
        "hierarchical",
        width,
        E,
        module.pool_query,
        hidden=size,
        heads=module.num_heads,
        block_size=module.block_size,
        fanout=module.fanout,
        levels=count,
        local_blocks=module.local_blocks,
        top_slots=top_slots,
        limited=not module._is_top(count - 1),
        mass_bias=module.mass_bias,
        pool_rows=0 if module.pool_query is None else module.pool_query.shape[0],
        parameter=module.rotary_base or 0.0,
    )
    return program.add("linear", E, E, module.out_proj.weight, module.out_proj.bias, **options)


@_describe.register
def _transformer_layer(module: nn.TransformerEncoderLayer, program: Program, name: str) -> None:
    program.batch_first = program.batch_first or module.self_attn.batch_first
    _encoder_layer(module, program, name)


def _encoder_layer(module: Any, program: Program, name: str) -> None:
    """A layer with the names of ``torch.nn.TransformerEncoderLayer``."""
    if not isinstance(module.self_attn, HierarchicalAttention):
        raise TypeError(
            "module: a Session runs Transformer layers whose self_attn is HierarchicalAttention, "
            f"but got {type(module.self_attn).__name__}"
        )
    function = module.activation
    kind, parameter = _activation(function) if isinstance(function, nn.Module) else (FUNCTIONS.get(function), 0.0)
    if kind is None or kind == "softmax":
        raise TypeError(f"module: a Session does not run a feed-forward with the activation {function}")
    source = program.last
    if module.norm_first:
        _describe(module.norm1, program, name)
    x = _attends(module.self_attn, program, name, skip=len(program.layers) + 2 - source)
    if not module.norm_first:
        _describe(module.norm1, program, name)
        x = program.last
    else:
        _describe(module.norm2, program, name)
    first, second = module.linear1, module.linear2
    program.add(
        "linear", first.in_features, first.out_features, first.weight, first.bias, activation=kind, parameter=parameter
    )
    program.add("linear", second.in_features, second.out_features, second.weight, second.bias, skip=program.back(x))
    if not module.norm_first:
        _describe(module.norm2, program, name)


@_describe.register(nn.TransformerEncoder)
@_describe.register(HierarchicalAttentionEncoder)
def _encoder(module: Any, program: Program, name: str) -> None:
    layers = list(module.layers)
    if not layers:
        raise TypeError(f"module: there is nothing to run in a {type(module).__name__} without layers")
    batch_first = (
        module.batch_first if isinstance(module, HierarchicalAttentionEncoder) else layers[0].self_attn.batch_first
    )
    program.batch_first = program.batch_first or batch_first
    positions = getattr(module, "positions", None)
    length = program.max_length
    if positions is not None:
        rows, width = positions.weight.shape
        if length is not None and length > rows:
            raise ValueError(f"max_length: expected at most max_positions={rows}, but got {length}")
        program.keep(name + "position", "a")
        program.add("positions", width, width, positions.weight, hidden=rows)
        program.max_length = rows if length is None else length
    for layer in layers:
        _encoder_layer(layer, program, name)
    program.max_length = length
    if module.norm is not None:
        _describe(module.norm, program, name)


# ---- convolutions ----


def _slope(activation: str | None) -> float:
    return 0.01 if activation == "leaky_relu" else 0.0


def _convolution(module: Any, program: Program, name: str, **options: Any) -> int:
    for argument, plain in (("stride", 1), ("padding_mode", "zeros")):
        value = getattr(module, argument)
        if value != plain:
            raise ValueError(f"module: a Session runs a CausalConv1d of {argument}={plain!r}, but got {value!r}")
    weight = module.weight.detach()
    outputs, _, taps = weight.shape
    inputs, groups = module.in_channels, module.groups
    shape: dict[str, Any] = {"taps": taps, "dilation": module.dilation, "activation": module.activation or "none"}
    shape["parameter"] = _slope(module.activation)
    if not program.layers:
        program.channels_first, program.batch_first = not module.channels_last, module.channels_last
    if taps > 1:
        program.keep(name + "history", "r", module.context, inputs)
    gated = module.activation in GATED
    if groups == inputs == outputs and groups > 1 and not gated:
        return program.add("depthwise", inputs, outputs, weight[:, 0].t(), module.bias, **shape, **options)
    if groups > 1:  # the blocks of a matrix
        blocks = [block.permute(0, 2, 1) for block in weight.chunk(groups)]
        whole = weight.new_zeros(outputs, taps, inputs)
        for i, block in enumerate(blocks):
            rows, columns = block.shape[0], block.shape[2]
            whole[i * rows : (i + 1) * rows, :, i * columns : (i + 1) * columns] = block
    else:
        whole = weight.permute(0, 2, 1)
    return _convolved(program, whole.flatten(1), module.bias, inputs, **shape, **options)


def _convolved(program: Program, weight: Tensor, bias: Tensor | None, inputs: int, **options: Any) -> int:
    """A convolution of all channels: weight (O, K · C), with the channels of a tap together."""
    outputs = weight.shape[0] // (2 if options["activation"] in GATED else 1)
    return program.add("conv", inputs, outputs, weight, bias, **options)


@_describe.register
def _causal_conv(module: CausalConv1d, program: Program, name: str) -> None:
    _convolution(module, program, name)


@_describe.register
def _transposed_conv(module: CausalConvTranspose1d, program: Program, name: str) -> None:
    stride, groups = module.stride, module.groups
    weight, bias, dilation = conv_of_phases(module.weight, module.bias, stride, module.dilation, groups)
    conv = types.SimpleNamespace(
        stride=1, padding_mode="zeros", channels_last=False, weight=weight, bias=bias, in_channels=module.in_channels,
        groups=groups, dilation=dilation, activation=module.activation, context=module.context,
    )  # fmt: skip
    _convolution(conv, program, name)
    program.phases = stride


@_describe.register
def _temporal_block(module: TemporalBlock, program: Program, name: str) -> None:
    _block(module, program, name, program.last, False)


def _block(module: TemporalBlock, program: Program, name: str, source: int, skip: bool) -> tuple[int, int]:
    """Reads the layer ``source``. Returns the numbers of the block's output and, with ``skip``, of what is added to the
    residual."""
    first = _convolution(module.conv1, program, f"{name}conv1.", source=program.back(source))
    residual = source
    if module.downsample is not None:
        residual = _convolution(module.downsample, program, f"{name}downsample.", source=program.back(source))
    if skip or module.activation != "relu":
        added = _convolution(module.conv2, program, f"{name}conv2.", source=program.back(first))
        return _activated_sum(program, added, residual, module.activation), added
    y = _convolution(
        module.conv2, program, f"{name}conv2.", source=program.back(first), skip=program.back(residual), relu=True
    )
    return y, y


def _activated_sum(program: Program, a: int, b: int, activation: str | None) -> int:
    """The sum of two layers' outputs: a depthwise convolution whose one tap is 1, with a skip; then the activation."""
    width, relu = program.layers[a].outputs, activation == "relu"
    ones, where = torch.ones(1, width), {"source": program.back(a), "skip": program.back(b)}
    y = program.add("depthwise", width, width, ones, None, taps=1, relu=relu, **where)
    return y if relu or activation is None else _activated(program, activation)


def _activated(program: Program, activation: str) -> int:
    """The activation of the last layer."""
    width = program.layers[-1].outputs
    return program.add(activation, width, width, parameter=_slope(activation))


@_describe.register
def _tcn(module: TCN, program: Program, name: str) -> None:
    begins, x, total = not program.layers, program.last, -1
    for i, block in enumerate(module._blocks):
        skip = module.use_skip_connections and i + 1 < len(module.network)
        x, added = _block(block, program, f"{name}network.{i}.", x, skip)
        if not skip:
            continue
        down: Any = module.downsample_skip_connection[i]
        if down is not None:
            added = _convolution(down, program, f"{name}skip.{i}.", source=program.back(added))
        total = added if total < 0 else _activated_sum(program, total, added, None)
    if total >= 0:
        _activated_sum(program, total, x, module.activation)
    elif module.use_skip_connections:  # of one level
        _activated(program, module.activation)
    if module.output_projection is not None:
        _convolution(module.projection_out, program, f"{name}projection_out.")
    if module.output_activation is not None:
        _activated(program, module.output_activation)
    if begins:
        program.channels_first, program.batch_first = module.input_shape == "NCL", module.input_shape == "NLC"


@_describe.register
def _wavenet_layer(module: WaveNetLayer, program: Program, name: str) -> None:
    raise TypeError("module: a WaveNetLayer has two outputs: a Session runs the whole WaveNet")


@_describe.register
def _wavenet(module: WaveNet, program: Program, name: str) -> None:
    """The conditions are more channels of the input. The residual stream carries them along unchanged."""
    channels = module.residual_channels
    conditions = (module.condition_channels or 0) + (module.global_channels or 0)
    if not program.layers:
        program.channels_first = True
    if isinstance(module.input, nn.Embedding):
        if conditions:
            raise ValueError("module: a Session does not run a WaveNet that has an embedding and conditions")
        _describe(module.input, program, f"{name}input.")
    else:
        weight = _widened(module.input.weight.detach(), conditions, conditions)
        weight[channels:, module.in_channels :, -1] = torch.eye(conditions)
        _widened_conv(module.input, weight, program, f"{name}input.")
    x, skip = program.last, -1
    for i, layer in enumerate(module._layers):
        weight = _widened(layer.conv.weight.detach(), 0, conditions)
        added = [m.weight.detach().flatten(1) for m in (layer.condition, layer.global_condition) if m is not None]
        if added:
            weight[:, channels:, -1] = torch.cat(added, 1)
        source = program.back(x)
        z = _widened_conv(layer.conv, weight, program, f"{name}layers.{i}.", source=source)
        weight, bias, last = layer.output.weight.detach()[..., 0], layer.output.bias, i + 1 == len(module.layers)
        gates = weight.shape[1]
        if not last:
            rows = torch.cat([weight[:channels], weight.new_zeros(conditions, gates)])
            shift = None if bias is None else torch.cat([bias.detach()[:channels], bias.new_zeros(conditions)])
            x = program.add("linear", gates, channels + conditions, rows, shift, skip=program.back(x))
        skip = program.add(
            "linear",
            gates,
            module.skip_channels,
            weight[channels:],
            None if bias is None else bias.detach()[channels:],
            source=program.back(z),
            skip=0 if skip < 0 else program.back(skip),
            relu=last,
        )
    _describe(module.head, program, f"{name}head.")


def _widened(weight: Tensor, outputs: int, inputs: int) -> Tensor:
    """A copy of weight (O, C, K) with more outputs and inputs, whose weights are 0."""
    return torch.nn.functional.pad(weight, (0, 0, 0, inputs, 0, outputs)).clone()


def _widened_conv(module: CausalConv1d, weight: Tensor, program: Program, name: str, **options: Any) -> int:
    """The layer of a module with ``weight`` in place of its own."""
    outputs, inputs, taps = weight.shape
    bias: Tensor | None = module.bias
    if bias is not None:
        bias = torch.nn.functional.pad(bias.detach(), (0, outputs - bias.shape[0]))
    if taps > 1:
        program.keep(name + "history", "r", module.context, inputs)
    shape = {"taps": taps, "dilation": module.dilation, "activation": module.activation or "none"}
    return _convolved(program, weight.permute(0, 2, 1).flatten(1), bias, inputs, **shape, **options)


@_describe.register
def _gated_language_model(module: GatedConvLM, program: Program, name: str) -> None:
    if not isinstance(module.projection, nn.Linear):
        raise TypeError("module: a Session does not run a GatedConvLM with cutoffs")
    program.batch_first = program.batch_first or not program.layers
    _describe(module.embedding, program, f"{name}embedding.")
    _convolution(module.input, program, f"{name}input.")
    for i, block in enumerate(module.blocks):
        source = program.last
        *first, last = enumerate(cast(Any, block))
        for j, conv in first:
            _convolution(conv, program, f"{name}blocks.{i}.{j}.")
        j, conv = last
        _convolution(conv, program, f"{name}blocks.{i}.{j}.", skip=program.back(source))
    _describe(module.projection, program, f"{name}projection.")
