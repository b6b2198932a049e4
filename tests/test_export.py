"""Every public module under torch.compile, torch.export, AOTInductor and ONNX, for any batch and any time.

``python tests/test_export.py [column ...]`` runs the matrix, or some columns of it, and writes the table of
docs/support.md; the test of a cell checks that the committed table says what it found. SEQACCEL_TEST_ALL=1 runs all
cells. Without it AOTInductor, ONNX and strict exports of ``extend`` run one module of each family, and cells that do
not work are not tried. The column ExecuTorch needs the package executorch.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import rnn_cases
import torch
from torch import Tensor
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

import seqaccel
from seqaccel import functional as SF
from seqaccel import nn
from seqaccel.functional.attention import layouts
from seqaccel.functional.rnn import CELLS
from seqaccel.functional.rnn._layers import Direction, layer

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "support.md"
EVERYTHING = bool(os.environ.get("SEQACCEL_TEST_ALL"))


class SelfAttention(nn.HierarchicalAttention):
    """Attention of one input over itself."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class SparseSelfAttention(nn.BlockSparseAttention):
    """The same within a window of blocks."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class SelfMemory(nn.NoveltyMemory):
    """A memory of the input, and attention of the input over it."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x)[0]


class OneByOne(nn.CausalConvTranspose1d):
    """Of stride 1: the output of a step has no time axis."""

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().step(x_t, state)
        return y.squeeze(-1), state


class OneOutput(torch.nn.Module):
    """A WaveNetLayer's two outputs as one."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layer = nn.WaveNetLayer(*sizes, dilation=3)
        self.init_state = self.layer.init_state

    def extend(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = self.layer.extend(x, state)
        return torch.cat(outputs, 1), state

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        outputs, state = self.layer.step(x_t, state)
        return torch.cat(outputs, 1), state


class Translation(nn.PervasiveAttention):
    """Of the target itself; as a stream, of 7 tokens."""

    def forward(self, target: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(target, target)

    def init_state(self, batch_size: int) -> Any:  # type: ignore[override]
        return super().init_state((torch.arange(7) % 5).expand(batch_size, -1))


class Decoder(nn.AttentionLSTMDecoder):
    """Of the target itself; as a stream, of 7 states."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, need_weights=True)

    def init_state(self, batch_size: int) -> Any:  # type: ignore[override]
        memory = (torch.arange(7 * self.memory_size) % 3 - 1.0).view(7, -1)
        mask = (torch.arange(7) > 4).expand(batch_size, -1)
        return super().init_state(memory.expand(batch_size, -1, -1).contiguous(), mask)


class Translator(nn.GNMT):
    """Of the target itself; as a stream, of 7 tokens."""

    def forward(self, target: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(target, target)

    def init_state(self, batch_size: int) -> Any:  # type: ignore[override]
        return super().init_state((torch.arange(7) % 5).expand(batch_size, -1))


class PaddedTranslator(nn.GNMT):
    def forward(self, source: Tensor, target: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(source, target, padding)


class LinearScan(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return SF.linear_scan(a, b)


def drawn(text: str, batch: int, steps: int) -> Tensor:
    """A tensor of ``text``'s dimensions, B and T varying and numbers fixed: normal, or what stands before a colon."""
    kind, _, dims = text.rpartition(":")
    sizes = {"B": batch, "T": steps}
    size = [sizes.get(d) or int(d) for d in dims]
    if kind == "lengths":
        return torch.randint(1, steps + 1, size)
    if kind == "tokens":
        return torch.randint(5, size)
    if kind == "padding":
        mask = torch.arange(steps) >= torch.randint(1, steps + 1, (batch, 1))
        return mask if dims == "BT" else mask.t()
    if kind == "words":
        return torch.randint(9, size)
    if kind == "causal":
        return torch.ones(size, dtype=torch.bool).triu(1)
    return torch.randn(size)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A module, and its inputs, each a text for ``drawn`` or a tuple of them."""

    family: str
    make: Callable[[], torch.nn.Module]
    inputs: tuple[Any, ...]
    state: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments of init_state

    def arguments(self, batch: int, steps: int) -> tuple[Any, ...]:
        return tree_map(lambda text: drawn(text, batch, steps), self.inputs)

    def dynamic(self) -> tuple[Any, ...]:
        dims = {"B": Dim("B"), "T": Dim("T")}
        return tree_map(
            lambda text: {i: dims[d] for i, d in enumerate(text.rpartition(":")[2]) if d in dims}, self.inputs
        )


CASES = {
    "RNN": Case("rnn", lambda: nn.RNN(5, 6, num_layers=2), ("TB5",)),
    "GRU": Case("rnn", lambda: nn.GRU(5, 6, batch_first=True, bidirectional=True), ("BT5",)),
    "LSTM": Case("rnn", lambda: nn.LSTM(5, 6, num_layers=2), ("TB5",)),
    "PeepholeLSTM": Case("rnn", lambda: nn.PeepholeLSTM(5, 6), ("TB5",)),
    "LayerNormLSTM": Case("rnn", lambda: nn.LayerNormLSTM(5, 6), ("TB5",)),
    "LayerNormGRU": Case("rnn", lambda: nn.LayerNormGRU(5, 6, bidirectional=True), ("TB5",)),
    "MultiplicativeLSTM": Case("rnn", lambda: nn.MultiplicativeLSTM(5, 6), ("TB5",)),
    "CfC": Case("rnn", lambda: nn.CfC(5, 6, backbone_units=4, backbone_layers=2), ("TB5",)),
    "CfCCell": Case("rnn", lambda: nn.CfCCell(5, 6, backbone_units=4), ("B5",)),
    "LiGRU": Case("rnn", lambda: nn.LiGRU(5, 6, num_layers=2, bidirectional=True), ("TB5",)),
    "EchoStateNetwork": Case("rnn", lambda: nn.EchoStateNetwork(5, 6, 3, 2, connectivity=0.5), ("TB5",)),
    "RNNCell": Case("rnn", lambda: nn.RNNCell(5, 6), ("B5",)),
    "GRUCell": Case("rnn", lambda: nn.GRUCell(5, 6), ("B5",)),
    "LSTMCell": Case("rnn", lambda: nn.LSTMCell(5, 6), ("B5",)),
    "SRU": Case("scan", lambda: nn.SRU(5, 6, num_layers=2), ("TB5",)),
    "SRUCell": Case("scan", lambda: nn.SRUCell(5, 6, bidirectional=True), ("TB5",)),
    "SRUpp": Case("scan", lambda: nn.SRUpp(5, 6, 4, num_heads=2), ("TB5",), {"memory_length": 48}),
    "QRNN": Case("scan", lambda: nn.QRNN(5, 6, num_layers=2, window=2), ("TB5",)),
    "MinGRU": Case("scan", lambda: nn.MinGRU(5, 6, batch_first=True, bidirectional=True), ("BT5",)),
    "MinLSTM": Case("scan", lambda: nn.MinLSTM(5, 6, num_layers=2), ("TB5",)),
    "IndRNN": Case("scan", lambda: nn.IndRNN(5, 6, num_layers=2), ("TB5",)),
    "linear_scan": Case("scan", LinearScan, ("BT5", "BT5")),
    "CausalConv1d": Case("conv", lambda: nn.CausalConv1d(4, 6, 3, dilation=4, activation="relu"), ("B4T",)),
    "CausalConv2d": Case("conv", lambda: nn.CausalConv2d(4, 6, 3, activation="relu"), ("B4T9",), {"width": 9}),
    "CausalConvTranspose1d": Case("conv", lambda: nn.CausalConvTranspose1d(4, 6, 5, stride=2), ("B4T",)),
    "TemporalBlock": Case("conv", lambda: nn.TemporalBlock(4, 6, 3, 2), ("B4T",)),
    "TCN": Case("conv", lambda: nn.TCN(4, [6, 6], 3), ("B4T",)),
    "PervasiveAttention": Case(
        "conv",
        lambda: Translation(5, 5, 6, 2, 4, 3, max_positions=100),
        ("tokens:BT",),
    ),
    "ConvolutionalGRU": Case("conv", lambda: nn.ConvolutionalGRU(4), ("B4T9",)),
    "NeuralGPU": Case("conv", lambda: nn.NeuralGPU(5, 6), ("tokens:B3",)),
    "GatedConv1d": Case("conv", lambda: nn.GatedConv1d(4, 6, 3, dilation=2), ("B4T",)),
    "WaveNetLayer": Case("conv", lambda: nn.WaveNetLayer(4, 6, dilation=3), ("B4T",)),
    "WaveNet": Case("conv", lambda: nn.WaveNet(4, 3, 6, 8, layers=2, stacks=2), ("B4T",)),
    "GatedConvLM": Case("conv", lambda: nn.GatedConvLM(9, 6, 8, 2, 3, bottleneck_channels=4), ("words:BT",)),
    "AdditiveAttention": Case("attention", lambda: nn.AdditiveAttention(5, 6, 4), ("BT5", "BT6")),
    "AttentionLSTMDecoder": Case("attention", lambda: Decoder(5, 6, 5, 3, residual_from=2), ("BT5",)),
    "GNMT": Case("attention", lambda: Translator(5, 5, 6, 3), ("tokens:BT",)),
    "MultiplicativeAttention": Case("attention", lambda: nn.MultiplicativeAttention(5, 6), ("BT5", "BT6")),
    "BlockSparseAttention": Case(
        "attention",
        lambda: SparseSelfAttention(
            8, 2, batch_first=True, block_size=4, layout=lambda T: layouts.sliding_window(T, 2, block_size=4)
        ),
        ("BT8",),
    ),
    "NoveltyMemory": Case(
        "attention",
        lambda: SelfMemory(8, 2, batch_first=True, threshold=0.3, window=4),
        ("BT8",),
        {"max_length": 48},
    ),
    "HierarchicalAttention": Case(
        "attention",
        lambda: SelfAttention(8, 2, batch_first=True, block_size=4, fanout=16, pool_query=1),
        ("BT8",),
        {"max_length": 48},
    ),
    "HierarchicalAttentionEncoder": Case(
        "attention",
        lambda: nn.HierarchicalAttentionEncoder(8, 2, 2, 6, batch_first=True, norm_first=True, block_size=4),
        ("BT8",),
        {"max_length": 48},
    ),
}
#: B and T of the example, and the sizes that the program is tried at: both sides of blocks, contexts, single steps.
EXAMPLE = (3, 11)
SIZES = [(1, 1), (1, 2), (2, 3), (5, 4), (300, 7), (2, 8), (3, 9), (2, 70)]

STREAMS = {
    "RNN": Case("rnn", lambda: nn.RNN(5, 6, num_layers=2), ("TB5",)),
    "GRU": Case("rnn", lambda: nn.GRU(5, 6, batch_first=True), ("BT5",)),
    **{name: CASES[name] for name in ("LSTM", "PeepholeLSTM", "LayerNormLSTM", "MultiplicativeLSTM", "SRU")},
    "LayerNormGRU": Case("rnn", lambda: nn.LayerNormGRU(5, 6), ("TB5",)),
    "LiGRU": Case("rnn", lambda: nn.LiGRU(5, 6, normalization="layer_norm"), ("TB5",)),
    "CfC": CASES["CfC"],
    "EchoStateNetwork": Case("rnn", lambda: nn.EchoStateNetwork(5, 6, 3, batch_first=True), ("BT5",)),
    **{name: CASES[name] for name in ("SRUpp", "QRNN", "MinLSTM", "IndRNN")},
    "MinGRU": Case("scan", lambda: nn.MinGRU(5, 6, batch_first=True), ("BT5",)),
    "CausalConvTranspose1d": Case("conv", lambda: OneByOne(4, 6, 5), ("B4T",)),
    **{name: CASES[name] for name in ("CausalConv1d", "CausalConv2d", "TemporalBlock", "TCN", "PervasiveAttention")},
    "WaveNetLayer": Case("conv", lambda: OneOutput(4, 6), ("B4T",)),
    **{name: CASES[name] for name in ("GatedConv1d", "WaveNet", "GatedConvLM")},
    **{name: CASES[name] for name in ("HierarchicalAttention", "HierarchicalAttentionEncoder", "NoveltyMemory")},
    **{name: CASES[name] for name in ("AttentionLSTMDecoder", "GNMT")},
}


def made(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    module = case.make().eval()
    return module.requires_grad_(False)


def close(found: Any, expected: Any) -> None:
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def agrees(run: Callable[..., Any], module: torch.nn.Module, case: Case) -> None:
    """``run`` computes at all sizes what the module does."""
    torch.manual_seed(1)
    for batch, steps in SIZES:
        arguments = case.arguments(batch, steps)
        close(run(*arguments), module(*arguments))


@functools.cache
def exported(case: Case, strict: bool) -> tuple[torch.nn.Module, torch.export.ExportedProgram]:
    torch._dynamo.reset()
    module = made(case)
    program = torch.export.export(
        module, case.arguments(*EXAMPLE), dynamic_shapes=named(module, case.dynamic()), strict=strict
    )
    return module, program


def named(module: torch.nn.Module, dynamic: tuple[Any, ...]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    return dict(zip(names, dynamic, strict=False))


# ---- the matrix ----


def by_export(case: Case) -> None:
    module, program = exported(case, False)
    agrees(program.module(), module, case)


def by_strict_export(case: Case) -> None:
    module, program = exported(case, True)
    agrees(program.module(), module, case)


def by_aot_inductor(case: Case) -> None:
    module, program = exported(case, False)
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs=quick
        )
        agrees(torch._inductor.aoti_load_package(path), module, case)


def by_onnx(case: Case) -> None:
    import onnxruntime

    module, file = made(case), io.BytesIO()
    torch.onnx.export(
        module, case.arguments(*EXAMPLE), file, dynamic_shapes=named(module, case.dynamic()), verbose=False, dynamo=True
    )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*arguments: Tensor) -> list[Tensor]:
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), arguments, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    agrees(run, module, case)


def by_executorch(case: Case) -> None:
    """For the example's sizes: ExecuTorch knows torch's core operators only, which the reference is made of."""
    from executorch.exir import to_edge  # type: ignore[import-not-found]
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    module, arguments = made(case), case.arguments(*EXAMPLE)
    with seqaccel.backend("reference"):
        program = torch.export.export(module, arguments)
    buffer = to_edge(program).to_executorch().buffer
    close(Runtime.get().load_program(buffer).load_method("forward").execute(list(arguments)), module(*arguments))


COLUMNS: dict[str, Callable[[Case], None]] = {
    "torch.export": by_export,
    "torch.export, strict": by_strict_export,
    "AOTInductor": by_aot_inductor,
    "ONNX": by_onnx,
    "ExecuTorch": by_executorch,
}
#: What does not work: the error, and the beginning of the line of docs/support.md that says why and what to use.
MISSING: dict[tuple[str, str], tuple[type[Exception], str]] = {
    ("NoveltyMemory", "ONNX"): (torch.onnx.OnnxExporterError, "ONNX has no operator for the gate of `NoveltyMemory`"),
    ("EchoStateNetwork", "ONNX"): (torch.onnx.OnnxExporterError, "ONNX has no operator for the reservoir of"),
}


def outcome(name: str, column: str) -> str:
    if (name, column) not in MISSING:
        COLUMNS[column](CASES[name])
        return "yes"
    error, limit = MISSING[name, column]
    assert f"\n- {limit}" in PAGE.read_text()
    if EVERYTHING:
        with pytest.raises(error):
            COLUMNS[column](CASES[name])
    return "no"


def table(cells: dict[tuple[str, str], str]) -> str:
    rows = [["", *COLUMNS], ["---"] * (len(COLUMNS) + 1)]
    rows += [[f"`{name}`", *(cells[name, column] for column in COLUMNS)] for name in CASES]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def committed() -> dict[tuple[str, str], str]:
    """The cells of the page's table."""
    text = PAGE.read_text()
    found = re.search(r"<!-- matrix -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found, f"{PAGE} has no table"
    header, _, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in found[1].splitlines())
    assert header == ["", *COLUMNS]
    return {(row[0].strip("`"), column): value for row in rows for column, value in zip(COLUMNS, row[1:], strict=True)}


#: Columns that take seconds a module run one of each family.
SLOW = {"AOTInductor", "ONNX"}
CHOSEN = {"LSTM", "SRU", "TCN", "HierarchicalAttention"}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", CASES)
def test_a_cell_of_the_matrix(name, column):
    if column in SLOW and name not in CHOSEN and not EVERYTHING:
        pytest.skip("takes seconds; SEQACCEL_TEST_ALL=1 runs it")
    needed = {"ONNX": "onnxscript", "ExecuTorch": "executorch"}.get(column)
    if needed:
        pytest.importorskip(needed)
    assert committed()[name, column] == outcome(name, column)


def test_every_public_module_is_in_the_matrix():
    assert {name for name in CASES if name != "linear_scan"} == set(nn.__all__) - {"Streaming"}
    streaming = {n for n in nn.__all__ if issubclass(getattr(nn, n), nn.Streaming) and n != "Streaming"}
    assert set(STREAMS) == streaming
    assert {name for name, _ in committed()} == set(CASES)
    assert {case.family for case in CASES.values()} == {CASES[name].family for name in CHOSEN}


# ---- optional arguments ----


class Layer(torch.nn.Module):
    """A recurrent layer of the functions, backwards in time, with all optional tensors that its cell takes."""

    def __init__(self, cell: str, projected: bool) -> None:
        super().__init__()
        tensors = rnn_cases.problem(cell, 1, 1, 5, 6, projected=projected, dtype=torch.float32, requires_grad=False)
        self.cell, self.spec = cell, CELLS[cell]
        self.weights = torch.nn.ParameterDict({n: t for n, t in tensors.items() if n in self.spec.weights})

    def forward(self, input: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor, zone_h: Tensor, zone_c: Tensor) -> Any:
        weights = [self.weights.get(n) for n in self.spec.weights]
        options: dict[str, Any] = {"reverse": True}
        if self.spec.zoneout:
            options["zoneout_h"] = zone_h.sigmoid()
        if self.spec.zoneout and self.spec.has_cell_state:
            options["zoneout_c"] = zone_c.sigmoid()
        c_0 = c_0 if self.spec.has_cell_state else None
        found = layer(self.cell, self.cell, input, Direction(h_0, c_0, weights, **options), lengths)
        return [t for t in found if t is not None]


class Attention(nn.HierarchicalAttention):
    def forward(self, x: Tensor, padding: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, key_padding_mask=padding, attn_mask=mask)[0]


class Convolution(nn.CausalConv1d):
    def forward(self, x: Tensor, residual: Tensor, history: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, residual=residual, output_activation="relu", initial_state=history)


class Masked(nn.QRNN):
    def forward(self, x: Tensor, hx: Tensor, padding: Tensor, reset: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, hx, mask_pad=padding, reset=reset)


class Restarted(nn.GRU):
    def forward(self, x: Tensor, hx: Tensor, reset: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, hx, reset=reset)


class StartedScan(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor, h_0: Tensor, reset: Tensor) -> Tensor:
        return SF.linear_scan(a, b, h_0, reverse=True, reset=reset)


class Episodes(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, reset: Tensor) -> Tensor:
        return self.module(x, reset=reset)


OPTIONAL = {
    **{
        f"{cell} {projected=}": Case(
            "rnn",
            functools.partial(Layer, cell, projected),
            ("TB5", f"B{4 if projected else 6}", "B6", "lengths:B", f"TB{4 if projected else 6}", "TB6"),
        )
        for cell, projected in rnn_cases.kinds("cpp")
    },
    "RNN": Case("rnn", lambda: nn.RNN(5, 6, num_layers=2), ("TB5", "2B6")),
    "GRU": Case("rnn", lambda: nn.GRU(5, 6, batch_first=True, bidirectional=True), ("BT5", "2B6")),
    "LSTM": Case("rnn", lambda: nn.LSTM(5, 6, num_layers=2), ("TB5", ("2B6", "2B6"))),
    "GRU with resets": Case("rnn", lambda: Restarted(5, 6, bidirectional=True), ("TB5", "2B6", "padding:TB")),
    "CfC with resets": Case("rnn", lambda: Episodes(nn.CfC(5, 6, backbone_units=4)), ("TB5", "padding:TB")),
    "LiGRU with resets": Case("rnn", lambda: Episodes(nn.LiGRU(5, 6, bidirectional=True)), ("TB5", "padding:TB")),
    "RNNCell": Case("rnn", lambda: nn.RNNCell(5, 6), ("B5", "B6")),
    "GRUCell": Case("rnn", lambda: nn.GRUCell(5, 6), ("B5", "B6")),
    "LSTMCell": Case("rnn", lambda: nn.LSTMCell(5, 6), ("B5", ("B6", "B6"))),
    "SRU": Case("scan", lambda: nn.SRU(5, 6, num_layers=2, layer_norm=True), ("TB5", "2B6", "padding:TB")),
    "SRUCell": Case("scan", lambda: nn.SRUCell(5, 4, bidirectional=True), ("TB5", "B8", "padding:TB")),
    "SRUpp": Case("scan", lambda: nn.SRUpp(5, 4, 4, bidirectional=True), ("TB5", "2B8", "padding:TB")),
    "MinGRU": Case("scan", lambda: nn.MinGRU(5, 6, num_layers=2), ("TB5", "2B6")),
    "QRNN": Case("scan", lambda: Masked(5, 6, 2, window=2), ("TB5", "2B6", "padding:TB", "padding:TB")),
    "linear_scan": Case("scan", StartedScan, ("BT5", "BT5", "B5", "padding:BT")),
    "SRU in episodes": Case("scan", lambda: Episodes(nn.SRU(5, 6)), ("TB5", "padding:TB")),
    "TCN in episodes": Case("conv", lambda: Episodes(nn.TCN(4, [6, 6], 3, 0.0)), ("B4T", "padding:BT")),
    "WaveNet in episodes": Case("conv", lambda: Episodes(nn.WaveNet(4, 5, 6, 6, layers=2)), ("B4T", "padding:BT")),
    "CausalConv1d": Case("conv", lambda: Convolution(4, 6, 3, dilation=4), ("B4T", "B6T", "B48")),
    "AttentionLSTMDecoder": Case(
        "attention",
        lambda: nn.AttentionLSTMDecoder(5, 6, 4, 2, attention="multiplicative", input_feeding=False),
        ("BT5", "BT4", ("2B6", "2B6")),
    ),
    "GNMT": Case("attention", lambda: PaddedTranslator(5, 5, 6, 3), ("tokens:BT", "tokens:BT", "padding:BT")),
    "HierarchicalAttention": Case(
        "attention",
        lambda: Attention(8, 2, batch_first=True, block_size=4, pool_query=1),
        ("BT8", "padding:BT", "causal:TT"),
    ),
    "HierarchicalAttentionEncoder": Case(
        "attention",
        lambda: nn.HierarchicalAttentionEncoder(
            8, 2, 2, 6, batch_first=True, positions="learned", max_positions=80, block_size=4
        ),
        ("BT8", "causal:TT", "padding:BT"),
    ),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_optional_arguments_are_exported(name):
    """With the cells of the matrix: nothing that a graph records reads the values of a tensor.

    torch.export runs a module on tensors without values, and raises where one is read.
    """
    module, program = exported(OPTIONAL[name], False)
    agrees(program.module(), module, OPTIONAL[name])


class Packed(torch.nn.Module):
    """A recurrent layer of a packed sequence, given as tensors: torch.export takes no ``pack_padded_sequence``."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Any]:
        output, last = self.layer(PackedSequence(data, batch_sizes))
        return output.data, last


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("name", [n for n in CASES if isinstance(CASES[n].make(), torch.nn.RNNBase)])
def test_packed_sequences_are_exported(name, strict):
    torch._dynamo.reset()
    module = Packed(made(CASES[name]))

    def arguments(*lengths: int) -> tuple[Tensor, Tensor]:
        padded = torch.randn(max(lengths), len(lengths), 5)
        return pack_padded_sequence(padded, torch.tensor(lengths), enforce_sorted=False)[:2]

    shapes = ({0: Dim("N")}, {0: Dim("T")})
    program = torch.export.export(module, arguments(6, 2, 4), dynamic_shapes=shapes, strict=strict).module()
    for lengths in ((6, 2, 4), (3, 3), (5,), (1, 9, 9, 2)):
        given = arguments(*lengths)
        close(program(*given), module(*given))


# ---- streams ----


class Stream(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor, state: Any) -> Any:
        return getattr(self.module, self.method)(x, state)


def time_of(case: Case) -> int:
    return case.inputs[0].rpartition(":")[2].index("T")


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("method", ["step", "extend"])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_exported_with_its_state(name, method, strict):
    if strict and (name not in CHOSEN or method == "step") and not EVERYTHING:
        pytest.skip("takes a second; SEQACCEL_TEST_ALL=1 runs it")
    torch._dynamo.reset()
    case = STREAMS[name]
    module, time = made(case), time_of(case)
    (x,) = case.arguments(*EXAMPLE)
    state = module.init_state(EXAMPLE[0], **case.state)
    (dynamic,) = case.dynamic()
    if method == "step":
        x = x.select(time, 0).contiguous()
        dynamic = {i - (i > time): dim for i, dim in dynamic.items() if i != time}
    batch = next(d for d in dynamic.values() if d.__name__ == "B")
    shapes = (dynamic, tree_map(lambda _: {0: batch}, state))
    program = torch.export.export(Stream(module, method), (x, state), dynamic_shapes=shapes, strict=strict).module()
    for batch in (1, 2, 7):
        (x,) = case.arguments(batch, 41)
        state = module.init_state(batch, **case.state)
        pieces = x.unbind(time)[:12] if method == "step" else x.split([1, 2, 3, 11, 1, 17, 6], time)
        outputs = []
        for piece in pieces:
            y, state = program(piece, state)
            outputs.append(y.unsqueeze(time) if method == "step" else y)
        found = torch.cat(outputs, time)
        expected, _ = module.extend(x, module.init_state(batch))
        close(found, expected.narrow(time, 0, found.shape[time]))


@pytest.fixture
def graphs():
    """Counts the graphs that were compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.parametrize("name", STREAMS)
def test_steps_compile_once(name, graphs):
    case = STREAMS[name]
    module, time = made(case), time_of(case)
    for batch in (1, 3):
        before = graphs()
        torch._dynamo.reset()
        step = torch.compile(module.step, fullgraph=True, backend="aot_eager")
        state, (x,) = module.init_state(batch, **case.state), case.arguments(batch, 4)
        expected, _ = module.extend(x, state)
        for t, x_t in enumerate(x.unbind(time)):
            y, state = step(x_t, state)
            close(y, expected.select(time, t))
        assert graphs() - before == 1


@pytest.mark.parametrize("name", STREAMS)
def test_a_state_has_the_strides_of_a_fresh_one(name):
    case = STREAMS[name]
    module, time = made(case), time_of(case)
    for batch in (1, 2):
        fresh, (x,) = module.init_state(batch, **case.state), case.arguments(batch, 2)
        _, extended = module.extend(x, fresh)
        _, stepped = module.step(x.select(time, 0), fresh)
        for state in (extended, stepped):
            assert tree_map(torch.Tensor.stride, state) == tree_map(torch.Tensor.stride, fresh)


# ---- batch and time that change ----


@pytest.mark.parametrize("name", CASES)
def test_batch_and_time_compile_at_most_twice(name, graphs):
    case = CASES[name]
    module = made(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch, steps in [(3, 11), (5, 33), (2, 3), (300, 70), (4, 4), (7, 2)]:
        arguments = case.arguments(batch, steps)
        close(compiled(*arguments), module(*arguments))
    assert graphs() <= 2


@pytest.mark.parametrize("name", CASES)
def test_dimensions_found_by_export_stay_general(name):
    """Dim.AUTO narrows a program without a word where code compares sizes."""
    torch._dynamo.reset()
    case = CASES[name]
    module = made(case)
    automatic = tuple(dict.fromkeys(dims, Dim.AUTO) for dims in case.dynamic())
    program = torch.export.export(module, case.arguments(*EXAMPLE), dynamic_shapes=named(module, automatic))
    run = program.module()
    for batch, steps in SIZES:
        arguments = case.arguments(batch, steps)
        if batch > 1 and steps > 1:  # AUTO sets apart sizes of 1
            close(run(*arguments), module(*arguments))


@pytest.mark.parametrize("name", [name for name in CASES if name != "linear_scan"])
def test_skip_init(name):
    kind = getattr(nn, name)
    sizes = {"CausalConv1d": (4, 6, 3), "TemporalBlock": (4, 6, 3, 2), "TCN": (4, [6]), "SRUpp": (5, 6, 4)}
    sizes |= {"BlockSparseAttention": (8, 2), "HierarchicalAttention": (8, 2)}
    sizes |= {"HierarchicalAttentionEncoder": (8, 2, 2), "NoveltyMemory": (8, 2)}
    sizes |= {"EchoStateNetwork": (5, 6, 3), "CausalConv2d": (4, 6, 3), "CausalConvTranspose1d": (4, 6, 3)}
    sizes |= {"ConvolutionalGRU": (6,), "PervasiveAttention": (5, 6, 4), "AdditiveAttention": (5, 6, 4)}
    sizes |= {"AttentionLSTMDecoder": (5, 6, 4), "GNMT": (5, 6, 4, 2)}
    sizes |= {"GatedConv1d": (4, 6, 3), "GatedConvLM": (9, 6, 8, 2, 3)}
    module = torch.nn.utils.skip_init(kind, *sizes.get(name, (5, 6)), dtype=torch.float64)
    assert all(p.dtype == torch.float64 and p.device.type == "cpu" for p in module.parameters())


if __name__ == "__main__":
    cells = committed()
    for column in sys.argv[1:] or COLUMNS:
        for name in CASES:
            try:
                cells[name, column] = outcome(name, column)
            except Exception as error:
                cells[name, column] = "no"
                print(error)
            print(name, column, cells[name, column], flush=True)
    new = f"<!-- matrix -->\n{table(cells)}<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- matrix -->\n.*?<!-- end -->", lambda _: new, PAGE.read_text(), flags=re.DOTALL))
