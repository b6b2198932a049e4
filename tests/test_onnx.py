"""torch.onnx.export of recurrent layers gives ONNX's operators, and ONNX Runtime computes with them what we do."""

import io

import onnx
import onnxruntime
import pytest
import torch
from rnn_cases import modules

import seqaccel
from seqaccel import functional as SF
from seqaccel import nn
from seqaccel.functional import _onnx
from seqaccel.functional.attention import hierarchical
from seqaccel.functional.rnn import _onnx as rnn_onnx

pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")

LAYERS = {
    "lstm": lambda *a, **k: nn.LSTM(*a, **k),
    "peephole": lambda *a, **k: nn.PeepholeLSTM(*a, **k),
    "gru": lambda *a, **k: nn.GRU(*a, **k),
    "gru_reset_before": lambda *a, **k: nn.GRU(*a, reset_after=False, **k),
    "rnn_tanh": lambda *a, **k: nn.RNN(*a, **k),
    "rnn_relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
OPTIONS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "dropout": 0.5},
    "no bias, batch first": {"bias": False, "batch_first": True},
}
PROJECTED = {"proj_size": 3, "num_layers": 2, "bidirectional": True}


def flat(values):
    return [values] if isinstance(values, torch.Tensor) else [t for value in values for t in flat(value)]


def exported(model, arguments, dynamic):
    """The ONNX model, and a function that runs it on other arguments."""
    file = io.BytesIO()
    torch.onnx.export(model, arguments, file, dynamic_shapes=dynamic, verbose=False)
    onnx_model = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(onnx_model)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*others):
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), flat(others), strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return onnx_model, run


def operators(onnx_model):
    return [node.op_type for node in onnx_model.graph.node if node.op_type in ("LSTM", "GRU", "RNN")]


def assert_same(run, model, *arguments):
    with torch.no_grad():
        expected = flat(model(*arguments))
    for found, exact in zip(run(*arguments), expected, strict=True):
        # torch writes constants to ONNX in float32.
        atol, rtol = (1e-7, 1e-6) if exact.dtype == torch.float64 else (2e-6, 1e-5)
        torch.testing.assert_close(found, exact, atol=atol, rtol=rtol)


def state_for(model, batch):
    directions = 2 if model.bidirectional else 1
    widths = (model.proj_size or model.hidden_size, model.hidden_size)
    state = tuple(torch.randn(model.num_layers * directions, batch, width) * 0.5 for width in widths)
    return state if "LSTM" in type(model).__name__ else state[0]


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_onnxs_operator(layer, options, with_state):
    check(LAYERS[layer](4, 6, **OPTIONS[options]).eval(), with_state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("layer", ["lstm", "peephole"])
def test_projection(layer, with_state):
    check(LAYERS[layer](4, 6, **PROJECTED).eval(), with_state)


def check(model, with_state):
    steps, batch = ("B", "T") if model.batch_first else ("T", "B")
    state = state_for(model, 3)
    arguments = (torch.randn(5, 3, 4).transpose(0, int(model.batch_first)), *([state] if with_state else []))
    state_dims = ({1: "B"}, {1: "B"}) if isinstance(state, tuple) else {1: "B"}
    onnx_model, run = exported(model, arguments, ({0: steps, 1: batch}, *([state_dims] if with_state else [])))
    assert len(operators(onnx_model)) == model.num_layers
    assert_same(run, model, *arguments)
    others = (torch.randn(9, 2, 4).transpose(0, int(model.batch_first)), *([state_for(model, 2)] if with_state else []))
    assert_same(run, model, *others)


class Ragged(torch.nn.Module):
    """A layer of the functions, with lengths."""

    def __init__(self, reverse, projected=False):
        super().__init__()
        self.reverse, width = reverse, 2 if projected else 6
        shapes = [(24, 4), (24, width), (24,), (24,), *([(2, 6)] if projected else [])]
        self.weights = torch.nn.ParameterList(torch.randn(shape) * 0.3 for shape in shapes)

    def forward(self, x, h_0, c_0, lengths):
        return SF.lstm(x, (h_0, c_0), *self.weights, lengths=lengths, reverse=self.reverse)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths(reverse, projected):
    model = Ragged(reverse, projected)
    x, h_0, c_0 = torch.randn(7, 3, 4), torch.randn(3, 2 if projected else 6), torch.randn(3, 6)
    dynamic = ({0: "T", 1: "B"}, {0: "B"}, {0: "B"}, {0: "B"})
    _, run = exported(model, (x, h_0, c_0, torch.tensor([7, 2, 5])), dynamic)
    assert_same(run, model, x, h_0, c_0, torch.tensor([3, 7, 1]))


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4)
        self.encoder = torch.nn.GRU(4, 6, batch_first=True, bidirectional=True)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens))[0])


def test_a_model_with_a_converted_layer():
    model = seqaccel.convert(Tagger()).eval()
    tokens = torch.randint(11, (2, 7))
    onnx_model, run = exported(model, (tokens,), ({0: "B", 1: "T"},))
    assert operators(onnx_model) == ["GRU"]
    assert_same(run, model, tokens)


#: What no operator of ONNX has.
SCANNED = [
    nn.LayerNormLSTM(4, 6, num_layers=2),
    nn.LayerNormLSTM(4, 6, normalize_cell=True),
    nn.MultiplicativeLSTM(4, 6, bidirectional=True),
    nn.LayerNormGRU(4, 6, bidirectional=True),
    nn.LiGRU(4, 6, bidirectional=True, nonlinearity="tanh").eval(),
    nn.LSTM(4, 6, zoneout=0.1, proj_size=3),
    nn.GRU(4, 6, zoneout=0.1),
]
SCANNED += [
    module(4, 6)
    for cell, module in modules().items()
    if not rnn_onnx.is_operator(cell) and module not in [type(model) for model in SCANNED]
]


@pytest.mark.parametrize(
    "model",
    SCANNED,
    ids=lambda model: type(model).__name__,
)
def test_what_onnx_has_not_is_a_scan(model):
    """In float64: layer normalisation of units that are nearly alike multiplies rounding errors."""
    model = model.double().eval()
    x, *others = (torch.randn(*size, 4, dtype=torch.float64) for size in ((5, 3), (9, 2), (1, 1), (2, 4)))
    onnx_model, run = exported(model, (x,), ({0: "T", 1: "B"},))
    assert operators(onnx_model) == []
    loops = [node for node in onnx_model.graph.node if node.op_type == "Scan"]
    assert len(loops) == model.num_layers * (1 + model.bidirectional)
    assert len(onnx_model.graph.node) < 30 * len(loops)
    for given in (x, *others):
        assert_same(run, model, given)


class MaskedLiGRU(torch.nn.Module):
    """Its mask is a state that no step changes."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.randn(shape) * 0.3 for shape in ((12, 4), (12, 6)))

    def forward(self, x, mask):
        return SF.ligru(x, None, *self.weights, mask=mask)


def test_a_mask_of_a_scan():
    model = MaskedLiGRU().double()

    def arguments(steps, batch):
        return torch.randn(steps, batch, 4, dtype=torch.float64), torch.rand(batch, 6, dtype=torch.float64)

    _, run = exported(model, arguments(5, 3), ({0: "T", 1: "B"}, {0: "B"}))
    for sizes in ((5, 3), (9, 2)):
        assert_same(run, model, *arguments(*sizes))


class RaggedScan(torch.nn.Module):
    """A cell that ONNX has not, with lengths and with zoneout of each step."""

    def __init__(self, reverse):
        super().__init__()
        self.reverse = reverse
        shapes = [(18, 4), (18, 6), (18,), (18,), (18,), (18,)]
        self.weights = torch.nn.ParameterList(torch.randn(shape) * 0.3 for shape in shapes)

    def forward(self, x, h_0, lengths, zoneout):
        return SF.layer_norm_gru(x, h_0, *self.weights, lengths=lengths, zoneout=zoneout, reverse=self.reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_and_zoneout_of_a_scan(reverse):
    model = RaggedScan(reverse).double()

    def arguments(steps, lengths):
        batch = len(lengths)
        floats = [torch.rand(size, dtype=torch.float64) for size in ((steps, batch, 4), (batch, 6), (steps, batch, 6))]
        return floats[0], floats[1], torch.tensor(lengths), floats[2]

    _, run = exported(model, arguments(7, [7, 2, 5]), ({0: "T", 1: "B"}, {0: "B"}, {0: "B"}, {0: "T", 1: "B"}))
    assert_same(run, model, *arguments(7, [7, 2, 5]))
    assert_same(run, model, *arguments(4, [1, 4]))


class Scan(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, a, b, h_0=None):
        return SF.linear_scan(a, b, h_0, **self.options)


class PackedScan(torch.nn.Module):
    def forward(self, a, b, h_0, cu_seqlens):
        return SF.linear_scan(a, b, h_0, cu_seqlens=cu_seqlens, reverse=True, return_last=True)


def test_linear_scan_of_sequences_in_one_row():
    def arguments(offsets):
        rows = torch.rand(1, offsets[-1], 4), torch.randn(1, offsets[-1], 4)
        return *rows, torch.randn(len(offsets) - 1, 4), torch.tensor(offsets)

    dims = ({1: "T"}, {1: "T"}, {0: "N"}, {0: "offsets"})
    _, run = exported(PackedScan(), arguments([0, 3, 3, 9]), dims)
    for offsets in ([0, 3, 3, 9], [0, 1, 5, 7, 7, 20]):
        assert_same(run, PackedScan(), *arguments(offsets))


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"dim": -1}], ids=str)
def test_linear_scan(options):
    def arguments(batch, steps):
        sizes = (batch, 4, steps) if "dim" in options else (batch, steps, 4)
        return torch.rand(sizes), torch.randn(sizes), torch.randn(batch, 4)

    dims = {0: "B", 2 if "dim" in options else 1: "T"}
    _, run = exported(Scan(**options), arguments(3, 7), (dims, dims, {0: "B"}))
    for sizes in ((3, 7), (1, 1), (2, 30)):
        assert_same(run, Scan(**options), *arguments(*sizes))


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2, "bidirectional": True},
        {"layer_norm": True, "rescale": True, "use_tanh": True},
        {"has_skip_term": False, "projection_size": 2},
    ],
    ids=str,
)
def test_sru(options):
    model = nn.SRU(4, 6, **options).double().eval()
    padded = options.get("layer_norm", False)

    def arguments(steps, batch):
        pad = torch.arange(steps).unsqueeze(1) >= torch.randint(1, steps + 1, (batch,))
        c_0 = torch.randn(model.num_layers, batch, model.output_size, dtype=torch.float64)
        return (torch.randn(steps, batch, 4, dtype=torch.float64), c_0, *([pad] if padded else []))

    _, run = exported(model, arguments(5, 3), ({0: "T", 1: "B"}, {1: "B"}, *([{0: "T", 1: "B"}] if padded else [])))
    for sizes in ((5, 3), (1, 1), (9, 2)):
        assert_same(run, model, *arguments(*sizes))


class PackedSRU(torch.nn.Module):
    """The function, which takes what the module does not."""

    def __init__(self, directions):
        super().__init__()
        self.directions = directions
        shapes = (4, 3 * 6 * directions), (4, 6 * directions), (2 * 6 * directions,), (2 * 6 * directions,)
        self.parameters_ = torch.nn.ParameterList(torch.randn(shape) * 0.3 for shape in shapes)

    def forward(self, x, **options):
        weight, skip, weight_c, bias = self.parameters_
        return SF.sru_layer(x, weight, x @ skip, weight_c, bias, directions=self.directions, **options)


class WithKeyword(torch.nn.Module):
    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, x, value):
        return self.module(x, **{self.name: value})


COLUMNS = {
    "SRU": lambda: PackedSRU(2),
    "QRNN": lambda: nn.QRNN(4, 6, window=2, bidirectional=True),
    "MinGRU": lambda: nn.MinGRU(4, 6, num_layers=2),
    "MinLSTM": lambda: nn.MinLSTM(4, 6, bidirectional=True),
    "IndRNN": lambda: nn.IndRNN(4, 6, bidirectional=True),
}


RESTARTED = {
    "SRU": COLUMNS["SRU"],
    "QRNN": COLUMNS["QRNN"],
    "LiGRU": lambda: nn.LiGRU(4, 6, bidirectional=True),
    "CfC": lambda: nn.CfC(4, 6, backbone_units=5),
}


@pytest.mark.parametrize("name", RESTARTED)
def test_resets(name):
    model = WithKeyword(RESTARTED[name]().eval(), "reset")

    def arguments(steps, batch):
        return torch.randn(steps, batch, 4), torch.rand(steps, batch) < 0.3

    _, run = exported(model, arguments(9, 3), ({0: "T", 1: "B"},) * 2)
    for sizes in ((9, 3), (5, 1), (1, 1), (2, 4)):
        assert_same(run, model, *arguments(*sizes))


@pytest.mark.parametrize("name", ["MinGRU", "IndRNN"])
def test_columns_of_a_batch_that_stays_1(name):
    model = COLUMNS[name]().eval()
    _, run = exported(model, (torch.randn(5, 1, 4),), ({0: "T"},))
    for steps in (5, 1, 9):
        assert_same(run, model, torch.randn(steps, 1, 4))


@pytest.mark.parametrize("name", COLUMNS)
def test_packed_sequences_of_columns(name):
    model = WithKeyword(COLUMNS[name]().eval(), "cu_seqlens")

    def arguments(offsets):
        return torch.randn(offsets[-1], 1, 4), torch.tensor(offsets)

    _, run = exported(model, arguments([0, 4, 4, 11]), ({0: "T"}, {0: "offsets"}))
    for offsets in ([0, 4, 4, 11], [0, 1], [0, 3, 5, 5, 6, 20]):
        assert_same(run, model, *arguments(offsets))


class Convolution(nn.CausalConv1d):
    def __init__(self, name, **options):
        super().__init__(4, 6, 3, dilation=2, **options)
        self.name = name

    def forward(self, x, value, history):
        return super().forward(x, initial_state=history, return_final_state=True, **{self.name: value})


@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2, "activation": "glu"}], ids=["", "options"])
def test_resets_of_a_convolution(options):
    model = Convolution("reset", **options).eval()

    def arguments(steps, batch):
        return torch.randn(batch, 4, steps), torch.rand(batch, steps) < 0.3, torch.randn(batch, 4, 4)

    _, run = exported(model, arguments(9, 3), ({0: "B", 2: "T"}, {0: "B", 1: "T"}, {0: "B"}))
    for sizes in ((9, 3), (5, 1), (1, 1), (12, 4)):
        assert_same(run, model, *arguments(*sizes))


def test_packed_sequences_of_a_convolution():
    model = Convolution("cu_seqlens", activation="relu").eval()

    def arguments(offsets):
        return torch.randn(1, 4, offsets[-1]), torch.tensor(offsets), torch.randn(len(offsets) - 1, 4, 4)

    _, run = exported(model, arguments([0, 4, 4, 11]), ({2: "T"}, {0: "offsets"}, {0: "sequences"}))
    for offsets in ([0, 4, 4, 11], [0, 1], [0, 3, 5, 5, 6, 20]):
        assert_same(run, model, *arguments(offsets))


class StreamOf(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, state):
        return self.module.extend(x, state)


def test_attention_is_exported_as_a_stream():
    model = nn.HierarchicalAttention(8, 2, batch_first=True, block_size=4, pool_query=1).eval().requires_grad_(False)
    torch.nn.init.normal_(model.pool_query)
    state = model.init_state(3, max_length=60)
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    shapes = ({0: B, 1: T}, torch.utils._pytree.tree_map(lambda _: {0: B}, state))
    # In two steps: torch.onnx.export itself takes no dynamic shapes of an empty tuple, in which the state ends.
    program = torch.export.export(StreamOf(model), (torch.randn(3, 11, 8), state), dynamic_shapes=shapes)
    _, run = exported(program, (), None)
    state = model.init_state(2, max_length=60)
    for steps in (1, 5, 30, 2):
        x = torch.randn(2, steps, 8)
        assert_same(run, StreamOf(model), x, state)
        _, state = model.extend(x, state)


class Attended(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.HierarchicalAttention(8, 2, batch_first=True, block_size=4, fanout=16, causal=False)

    def forward(self, x, padding=None):
        return self.attention(x, x, x, key_padding_mask=padding)[0]


@pytest.mark.parametrize("causal", [True, False])
def test_padded_attention_of_any_length(causal):
    model = Attended().eval()
    model.attention.causal = causal
    example = torch.randn(3, 21, 8), torch.arange(21) >= torch.tensor([21, 9, 2])[:, None]
    _, run = exported(model, example, ({0: "B", 1: "T"}, {0: "B", 1: "T"}))
    for steps in (2, 7, 16, 100):
        padding = torch.arange(steps) >= torch.tensor([steps, steps // 2])[:, None]
        assert_same(run, model, torch.randn(2, steps, 8), padding)


def test_attention_of_any_length():
    """Whatever levels the example's length needs."""
    model = Attended().eval()
    _, run = exported(model, (torch.randn(3, 21, 8),), ({0: "B", 1: "T"},))
    for steps in (1, 7, 16, 100, 1000):
        assert_same(run, model, torch.randn(2, steps, 8))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ((4, 4, -1, 2, True, True, 0.4), 1),
        ((4, 2, -1, 1, True, True, 0.4), 0),
        ((4, 3, 2, 2, False, True, 0.4), 2),
        ((16, 4, -1, 3, False, False, 0.4), 0),
        ((64, 64, -1, 2, True, True, 0.4), 1),
        ((3, 2, 0, 2, True, True, 0.4), 0),
        ((3, 2, 1, 1, False, True, 0.4), 1),
    ],
    ids=str,
)
def test_what_attention_exports_is_its_definition(options, rows):
    for steps in (1, 2, 3, 7, 16, 17, 64, 100, 257):
        query = torch.randn(2, 4, steps, 5, dtype=torch.float64)
        key, value = torch.randn(2, 2, 2, steps, 5, dtype=torch.float64)
        pool_query = torch.randn(rows, 2, 5, dtype=torch.float64) if rows else None
        lengths = torch.tensor([steps, steps * 2 // 3])
        for inputs in (
            (query, key, value, pool_query, None, None),
            (query, key, value[..., :3], pool_query, None, lengths),
            (query[:, :, steps // 2 :], key, value, pool_query, None, None),
        ):
            torch.testing.assert_close(
                _onnx.hierarchical_attention(*inputs, *options), hierarchical._definition(*inputs, *options)[0]
            )
