"""Causal convolutions and the networks of them."""

from __future__ import annotations

import types
from typing import Any, cast

import torch
from torch import Tensor, nn

from seqaccel.functional.conv import GATED, conv_of_phases
from seqaccel.nn.conv import TCN, CausalConv1d, CausalConvTranspose1d, GatedConvLM, TemporalBlock, WaveNet, WaveNetLayer
from seqaccel.program._describe import describe
from seqaccel.program._layers import Program
from seqaccel.program._places import block_matrix


def _slope(activation: str | None) -> float:
    return 0.01 if activation == "leaky_relu" else 0.0


def convolution(module: Any, program: Program, name: str, **options: Any) -> int:
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
    return _convolved(program, block_matrix(weight, groups).flatten(1), module.bias, inputs, **shape, **options)


def _convolved(program: Program, weight: Tensor, bias: Tensor | None, inputs: int, **options: Any) -> int:
    """A convolution of all channels: weight (O, K · C), with the channels of a tap together."""
    outputs = weight.shape[0] // (2 if options["activation"] in GATED else 1)
    return program.add("conv", inputs, outputs, weight, bias, **options)


@describe.register
def _causal_conv(module: CausalConv1d, program: Program, name: str) -> None:
    convolution(module, program, name)


@describe.register
def _transposed_conv(module: CausalConvTranspose1d, program: Program, name: str) -> None:
    stride, groups = module.stride, module.groups
    weight, bias, dilation = conv_of_phases(module.weight, module.bias, stride, module.dilation, groups)
    conv = types.SimpleNamespace(
        stride=1, padding_mode="zeros", channels_last=False, weight=weight, bias=bias, in_channels=module.in_channels,
        groups=groups, dilation=dilation, activation=module.activation, context=module.context,
    )  # fmt: skip
    convolution(conv, program, name)
    program.phases = stride


@describe.register
def _temporal_block(module: TemporalBlock, program: Program, name: str) -> None:
    _block(module, program, name, program.last, False)


def _block(module: TemporalBlock, program: Program, name: str, source: int, skip: bool) -> tuple[int, int]:
    """Reads the layer ``source``. Returns the numbers of the block's output and, with ``skip``, of what is added to the
    residual."""
    first = convolution(module.conv1, program, f"{name}conv1.", source=program.back(source))
    residual = source
    if module.downsample is not None:
        residual = convolution(module.downsample, program, f"{name}downsample.", source=program.back(source))
    if skip or module.activation != "relu":
        added = convolution(module.conv2, program, f"{name}conv2.", source=program.back(first))
        return _activated_sum(program, added, residual, module.activation), added
    y = convolution(
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


@describe.register
def _tcn(module: TCN, program: Program, name: str) -> None:
    begins, x, total = not program.layers, program.last, -1
    for i, block in enumerate(module._blocks):
        skip = module.use_skip_connections and i + 1 < len(module.network)
        x, added = _block(block, program, f"{name}network.{i}.", x, skip)
        if not skip:
            continue
        down: Any = module.downsample_skip_connection[i]
        if down is not None:
            added = convolution(down, program, f"{name}skip.{i}.", source=program.back(added))
        total = added if total < 0 else _activated_sum(program, total, added, None)
    if total >= 0:
        _activated_sum(program, total, x, module.activation)
    elif module.use_skip_connections:  # of one level
        _activated(program, module.activation)
    if module.output_projection is not None:
        convolution(module.projection_out, program, f"{name}projection_out.")
    if module.output_activation is not None:
        _activated(program, module.output_activation)
    if begins:
        program.channels_first, program.batch_first = module.input_shape == "NCL", module.input_shape == "NLC"


@describe.register
def _wavenet_layer(module: WaveNetLayer, program: Program, name: str) -> None:
    raise TypeError("module: a WaveNetLayer has two outputs: a Session runs the whole WaveNet")


@describe.register
def _wavenet(module: WaveNet, program: Program, name: str) -> None:
    """The conditions are more channels of the input. The residual stream carries them along unchanged."""
    channels = module.residual_channels
    conditions = (module.condition_channels or 0) + (module.global_channels or 0)
    if not program.layers:
        program.channels_first = True
    if isinstance(module.input, nn.Embedding):
        if conditions:
            raise ValueError("module: a Session does not run a WaveNet that has an embedding and conditions")
        describe(module.input, program, f"{name}input.")
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
    describe(module.head, program, f"{name}head.")


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


@describe.register
def _gated_language_model(module: GatedConvLM, program: Program, name: str) -> None:
    if not isinstance(module.projection, nn.Linear):
        raise TypeError("module: a Session does not run a GatedConvLM with cutoffs")
    program.batch_first = program.batch_first or not program.layers
    describe(module.embedding, program, f"{name}embedding.")
    convolution(module.input, program, f"{name}input.")
    for i, block in enumerate(module.blocks):
        source = program.last
        *first, last = enumerate(cast(Any, block))
        for j, conv in first:
            convolution(conv, program, f"{name}blocks.{i}.{j}.")
        j, conv = last
        convolution(conv, program, f"{name}blocks.{i}.{j}.", skip=program.back(source))
    describe(module.projection, program, f"{name}projection.")
