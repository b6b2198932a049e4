"""torch.fx, torch.jit and the older ONNX exporter over every module, and parameters made by ``to_empty``."""

import copy
import io
import warnings

import pytest
import torch

import seqaccel
from seqaccel import nn

#: Every module with an input, and whether torch has an operator that takes any number of steps.
T, B, I = 5, 3, 8
MODULES = {
    "RNN": (lambda: nn.RNN(I, 6, nonlinearity="relu"), (T, B, I), True),
    "GRU": (lambda: nn.GRU(I, 6, 2, bias=False), (T, B, I), True),
    "LSTM": (lambda: nn.LSTM(I, 6, 2, bidirectional=True), (T, B, I), True),
    "LSTM-projected": (lambda: nn.LSTM(I, 6, proj_size=4), (T, B, I), True),
    "GRU-reset_before": (lambda: nn.GRU(I, 6, reset_after=False), (T, B, I), False),
    "PeepholeLSTM": (lambda: nn.PeepholeLSTM(I, 6), (T, B, I), False),
    "LayerNormLSTM": (lambda: nn.LayerNormLSTM(I, 6), (T, B, I), False),
    "LayerNormGRU": (lambda: nn.LayerNormGRU(I, 6), (T, B, I), False),
    "MultiplicativeLSTM": (lambda: nn.MultiplicativeLSTM(I, 6), (T, B, I), False),
    "CfC": (lambda: nn.CfC(I, 6, backbone_units=5), (T, B, I), False),
    "CfCCell": (lambda: nn.CfCCell(I, 6, backbone_units=5), (B, I), False),
    "LiGRU": (lambda: nn.LiGRU(I, 6, 2, bidirectional=True), (T, B, I), False),
    "EchoStateNetwork": (lambda: nn.EchoStateNetwork(I, 6, 4, 2, connectivity=0.5), (T, B, I), False),
    "RNNCell": (lambda: nn.RNNCell(I, 6), (B, I), True),
    "GRUCell": (lambda: nn.GRUCell(I, 6), (B, I), True),
    "LSTMCell": (lambda: nn.LSTMCell(I, 6), (B, I), True),
    "SRU": (lambda: nn.SRU(I, I, rescale=True, highway_bias=-1.0), (T, B, I), False),
    "SRUCell": (lambda: nn.SRUCell(I, 6, layer_norm=True, n_proj=3), (T, B, I), False),
    "SRUpp": (lambda: nn.SRUpp(I, 6, 3, layer_norm=True, attention_every_n_layers=2), (T, B, I), False),
    "QRNN": (lambda: nn.QRNN(I, 6, 2, window=2, zoneout=0.1), (T, B, I), False),
    "MinGRU": (lambda: nn.MinGRU(I, 6, 2), (T, B, I), False),
    "MinLSTM": (lambda: nn.MinLSTM(I, 6, candidate="g"), (T, B, I), False),
    "IndRNN": (lambda: nn.IndRNN(I, 6, nonlinearity="tanh"), (T, B, I), False),
    "CausalConv1d": (lambda: nn.CausalConv1d(I, 6, 3, activation="silu"), (B, I, T), True),
    "CausalConv2d": (lambda: nn.CausalConv2d(I, 6, 3, activation="silu"), (B, I, T, 9), True),
    "CausalConvTranspose1d": (lambda: nn.CausalConvTranspose1d(I, 6, 5, stride=2), (B, I, T), True),
    "TemporalBlock": (lambda: nn.TemporalBlock(I, 6, 3, 2), (B, I, T), True),
    "TCN": (lambda: nn.TCN(I, [6, 4]), (B, I, T), True),
    "PervasiveAttention": (lambda: nn.PervasiveAttention(9, 9, 6, 2, 4, 3), (B, I), True),
    "ConvolutionalGRU": (lambda: nn.ConvolutionalGRU(I), (B, I, T, 9), True),
    "NeuralGPU": (lambda: nn.NeuralGPU(9, 6), (B, I), False),
    "GatedConv1d": (lambda: nn.GatedConv1d(I, 6, 3), (B, I, T), True),
    "WaveNetLayer": (lambda: nn.WaveNetLayer(I, 6, dilation=2), (B, I, T), True),
    "WaveNet": (lambda: nn.WaveNet(I, 3, 6, 8, layers=2, stacks=2), (B, I, T), True),
    "GatedConvLM": (lambda: nn.GatedConvLM(40, 6, 8, 2, 3, bottleneck_channels=4), (B, T), True),
    "AdditiveAttention": (lambda: nn.AdditiveAttention(I, I, 6, normalize=True), (B, T, I), False),
    "AttentionLSTMDecoder": (lambda: nn.AttentionLSTMDecoder(I, 6, I, 2), (B, T, I), False),
    "GNMT": (lambda: nn.GNMT(40, 40, 6, 3), (B, I), False),
    "MultiplicativeAttention": (lambda: nn.MultiplicativeAttention(I), (B, T, I), False),
    "BlockSparseAttention": (lambda: nn.BlockSparseAttention(I, 2, block_size=2), (T, B, I), False),
    "NoveltyMemory": (lambda: nn.NoveltyMemory(I, 2, threshold=0.5), (T, B, I), False),
    "HierarchicalAttention": (lambda: nn.HierarchicalAttention(I, 2, block_size=2, pool_query=2), (T, B, I), False),
    "HierarchicalAttentionEncoder": (
        lambda: nn.HierarchicalAttentionEncoder(I, 2, 2, 6, norm_first=True, block_size=2),
        (T, B, I),
        False,
    ),
}
ATTENTION = (torch.nn.MultiheadAttention, nn.AdditiveAttention, nn.MultiplicativeAttention)
ONE_OUTPUT = tuple(getattr(nn.conv, name) for name in nn.conv.__all__ if name != "WaveNetLayer")
each_module = pytest.mark.parametrize("name", MODULES)


def test_every_module_is_here():
    made = {type(make()).__name__ for make, *_ in MODULES.values()}
    assert made == set(nn.__all__) - {"Streaming"}


class Model(torch.nn.Module):
    """A module between two others."""

    def __init__(self, module):
        super().__init__()
        self.inner = module
        self.attends = isinstance(module, ATTENTION)
        self.decodes = isinstance(module, nn.AttentionLSTMDecoder)
        self.translates = isinstance(module, (nn.PervasiveAttention, nn.GNMT))

    def forward(self, x):
        if self.translates:
            x = (x * 2).abs().long()
            return self.inner(x, x)
        if self.decodes:
            return self.inner(x, x)[0].relu()
        x = (x.abs() * 2).long() if isinstance(self.inner, (nn.GatedConvLM, nn.NeuralGPU)) else x * 2
        found = self.inner(x, x, x) if self.attends else self.inner(x)
        return found.relu() if isinstance(self.inner, ONE_OUTPUT) else found[0].relu()


def model(name):
    torch.manual_seed(1)
    make, shape, dynamic = MODULES[name]
    return Model(make()).eval(), torch.randn(shape), torch.randn([n + 2 for n in shape[:-1]] + [shape[-1]]), dynamic


def other_input(name, x):
    shape = [n + 4 if n != I else n for n in x.shape]
    return torch.randn(shape)


@each_module
def test_fx_leaves(name):
    whole, x, *_ = model(name)
    graph = torch.fx.symbolic_trace(whole)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["inner"]
    torch.testing.assert_close(graph(x), whole(x))


@each_module
def test_jit_trace(name):
    whole, x, _, dynamic = model(name)
    with warnings.catch_warnings():
        if dynamic:
            warnings.simplefilter("error", torch.jit.TracerWarning)
        else:
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(whole, (x,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "seqaccel::" not in str(loaded.inlined_graph)
    for other in (x, other_input(name, x)) if dynamic else (x,):
        torch.testing.assert_close(loaded(other), whole(other), atol=2e-6, rtol=1e-5)


@each_module
def test_older_onnx_exporter(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    if name == "LSTM-projected":
        pytest.skip("torch's exporter has no LSTM with a projection")
    whole, x, _, dynamic = model(name)
    file = io.BytesIO()
    axes = {"x": {i: f"n{i}" for i, n in enumerate(x.shape) if n != I}} if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            whole, (x,), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes, verbose=False
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for other in (x, other_input(name, x)) if dynamic else (x,):
        (found,) = session.run(None, {"x": other.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), whole(other).detach(), atol=5e-6, rtol=1e-5)


@each_module
def test_jit_script_says_what_to_use(name):
    with pytest.raises(RuntimeError, match=r"cannot be scripted; use torch.jit.trace or torch.export"):
        torch.jit.script(model(name)[0])


def test_a_backend_asked_for_holds_while_tracing():
    x = torch.randn(T, B, I)
    with seqaccel.backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.LSTM(I, 6), (x,))
    assert "aten::lstm" not in str(traced.inlined_graph)


def test_packed_sequences_are_traced():
    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(I, 6)

        def forward(self, x, lengths):
            return self.lstm(torch.nn.utils.rnn.pack_padded_sequence(x, lengths))[0].data

    module = Packed()
    traced = torch.jit.trace(module, (torch.randn(5, 3, I), torch.tensor([5, 3, 2])))
    x, lengths = torch.randn(9, 2, I), torch.tensor([9, 4])
    torch.testing.assert_close(traced(x, lengths), module(x, lengths))


@each_module
def test_to_empty_and_reset(name):
    """Every parameter and buffer is set by the modules' own reset, as the constructor sets it."""
    make = MODULES[name][0]
    torch.manual_seed(1)
    made = make()
    emptied = copy.deepcopy(made).to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*emptied.parameters(), *emptied.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
    for module in reversed(list(emptied.modules())):
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
    before = dict(made.named_parameters()) | dict(made.named_buffers())
    for key, tensor in (dict(emptied.named_parameters()) | dict(emptied.named_buffers())).items():
        assert not tensor.isnan().any(), key
        if not tensor.is_floating_point():  # indices
            assert (tensor >= 0).all(), key
            continue
        if before[key].numel() > 1 and before[key].std() == 0:  # not drawn
            assert torch.equal(tensor, before[key]), key
        elif before[key].numel() > 20:
            torch.testing.assert_close(tensor.std(), before[key].std(), rtol=0.5, atol=0)
