"""Every operator stands on its own: a raw call, as an exported graph holds it, does what the public function does.

The tests run over all operators of ``torch.ops.seqaccel``: a new one needs a row in ``ARGUMENTS`` and its facts in
``seqaccel/functional``.
"""

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map_only

import seqaccel.functional as SF
import seqaccel.nn as snn
from seqaccel import _extension
from seqaccel.functional import _registration

pytestmark = pytest.mark.skipif(_extension.cpp_error is not None, reason="needs the C++ operators")

OPTIONS = (4, 2, -1, 2, True, True, 0.4)  # of attention


EPISODES = torch.arange(14).view(2, 7) % 4 == 1


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rnn_arguments(save=False, reset=True):
    begins = torch.arange(6).view(3, 2) % 4 == 0 if reset else None
    return ("lstm", double(3, 2, 4), double(2, 5), double(2, 5), [double(20, 4), double(20, 5), double(20), None, None],
            None, None, None, False, save, begins)  # fmt: skip


def rnn_backward_arguments(reset=True):
    cell, input, h_0, c_0, weights, *_, begins = arguments = rnn_arguments(True, reset)
    output, h_n, c_n, saved = torch.ops.seqaccel.rnn_forward(*arguments)
    grads = [torch.randn_like(t) for t in (output, h_n, c_n)]
    return (cell, *grads, input, h_0, c_0, weights, None, None, None, output, saved, False, [True] * 6, begins)


def bfloat16_arguments():
    *tensors, reset = rnn_arguments()
    cell, input, h_0, c_0, weights, *_ = tree_map_only(torch.Tensor, lambda t: t.bfloat16(), tensors)
    return cell, input, h_0, c_0, weights, None, False, reset


def conv_arguments(save=False):
    return double(2, 4, 6), double(6, 2, 3), double(6), double(2, 6, 6), *[None] * 4, 1, 2, "tanh", True, 0.0, save


def conv_backward_arguments():
    x, weight, *_ = arguments = conv_arguments(True)
    y, saved = torch.ops.seqaccel.causal_conv1d_forward(*arguments)
    return torch.randn_like(y), y, saved, x, weight, *[None] * 5, 1, 2, "tanh", True, 0.0, True, 31


def grid_arguments(save=False):
    residual = double(2, 6, 3, 5)
    return (
        double(2, 4, 3, 5),
        double(6, 2, 2, 3),
        double(6),
        residual,
        None,
        None,
        EPISODES[:, :3],
        1,
        1,
        2,
        "tanh",
        True,
        0.0,
        save,
    )


def grid_backward_arguments():
    x, weight, *_ = arguments = grid_arguments(True)
    y, saved = torch.ops.seqaccel.causal_conv2d_forward(*arguments)
    return torch.randn_like(y), y, saved, x, weight, None, None, EPISODES[:, :3], 1, 1, 2, "tanh", True, 0.0, True, 31


def wavenet_arguments(save=False):
    weights = double(6, 4, 2), double(6), double(9, 3, 1), double(9)
    return (
        double(2, 4, 6),
        *weights,
        double(2, 5, 6),
        double(2, 6, 6),
        double(2, 6),
        double(2, 4, 2),
        EPISODES[:, :6],
        2,
        True,
        save,
    )


def wavenet_backward_arguments():
    x, weight, _, output_weight, *_ = arguments = wavenet_arguments(True)
    y, skip, saved = torch.ops.seqaccel.wavenet_layer_forward(*arguments)
    return (
        torch.randn_like(y),
        torch.randn_like(skip),
        saved,
        x,
        weight,
        output_weight,
        double(2, 4, 2),
        EPISODES[:, :6],
        2,
        255,
    )


def block_arguments(save=False):
    weights = double(6, 4, 3), double(6, 1, 1), double(6), double(6, 6, 2), double(6, 1, 1), double(6)
    return double(2, 4, 7), *weights, double(6, 4, 1), double(6), None, EPISODES, 2, "tanh", "tanh", True, 0.0, save


def block_backward_arguments():
    *operands, _ = arguments = block_arguments(True)
    y, *saved = torch.ops.seqaccel.temporal_block_forward(*arguments)
    x, weight_1, g_1, _, weight_2, g_2, _, downsample_weight, _, *rest = operands
    return torch.randn_like(y), y, *saved, x, weight_1, g_1, weight_2, g_2, downsample_weight, *rest, 511


def gru_arguments(save=False):
    return double(2, 3, 4, 5), double(6, 3, 3, 3), double(6), double(3, 3, 1, 5), double(3), True, save


def gru_backward_arguments():
    x, weight_gates, _, weight_candidate, *_ = arguments = gru_arguments(True)
    y, *saved = torch.ops.seqaccel.convolutional_gru_forward(*arguments)
    return torch.randn_like(y), *saved, x, weight_gates, weight_candidate, True, 31


def column_arguments(save=False):
    return "fo_pool", double(3, 2, 15), None, None, double(15), double(2, 5), *[None] * 5, 1, save


def column_backward_arguments():
    *operands, _ = column_arguments()
    h, c_n, c = torch.ops.seqaccel.column_forward(*operands, True)
    return "fo_pool", torch.randn_like(h), torch.randn_like(c_n), *operands[1:-1], c, 1


def attention_arguments():
    return double(2, 4, 9, 3), double(2, 2, 9, 3), double(2, 2, 9, 3), double(1, 2, 3), None, None, *OPTIONS


def attention_backward_arguments():
    arguments = attention_arguments()
    saved = torch.ops.seqaccel.hierarchical_attention_forward(*arguments)
    return torch.randn_like(saved[0]), *arguments[:6], *saved, *OPTIONS


def pool_arguments():
    return double(2, 2, 9, 3), double(2, 2, 9, 5), double(1, 2, 3), 2, 2, -1, 0.5


def pool_backward_arguments():
    arguments = pool_arguments()
    pooled = torch.ops.seqaccel.attention_pool_forward(*arguments)
    return *map(torch.randn_like, pooled), *arguments[:3], *pooled, *arguments[3:]


def block_sparse_arguments():
    layout = (torch.arange(3)[:, None] + torch.arange(4)) % 2 == torch.arange(4)[:, None, None] % 2
    tensors = double(2, 4, 9, 3), double(2, 2, 13, 3), double(2, 2, 13, 5)
    return *tensors, layout.expand(2, 4, 3, 4).contiguous(), 4, False, 0.5


def block_sparse_backward_arguments():
    arguments = block_sparse_arguments()
    out, lse = torch.ops.seqaccel.block_sparse_attention_forward(*arguments)
    return torch.randn_like(out), *arguments[:4], out, lse, *arguments[4:]


def additive_arguments():
    return double(2, 5, 3), double(2, 7, 3), double(3), torch.arange(70).view(2, 5, 7) % 3 > 0


def additive_backward_arguments():
    query, key, weight, mask = additive_arguments()
    attention = torch.ops.seqaccel.additive_attention_forward(query, key, weight, mask)
    return torch.randn_like(attention), query, key, weight, attention


def decoder_arguments():
    mask, lengths = torch.arange(8).view(2, 4) % 3 > 0, torch.tensor([3, 2])
    tensors = double(2, 3, 20), double(2, 4, 6), double(2, 4, 7), mask, lengths, double(2, 5), double(2, 5)
    return *tensors, double(6, 5), double(6), double(6), double(20, 7), double(20, 5)


def decoder_backward_arguments():
    _, key, value, _, lengths, _, c_0, weight, _, *weights = arguments = decoder_arguments()
    *results, attention, gates, cells = torch.ops.seqaccel.attention_lstm_forward(*arguments)
    grads = [torch.randn_like(t) for t in (*results, attention)]
    return double(2, 3, 6), *grads, key, value, lengths, c_0, weight, *weights, attention, gates, cells


def gate_arguments():
    vectors = double(2, 9, 3) + double(2, 1, 3)
    return vectors, vectors[:, :4] + 0.1, torch.tensor([2, 4]), 0.8, 3, 6


def echo_arguments():
    rows, columns = torch.tensor([0, 2, 2, 3, 5]), torch.tensor([0, 2, 3, 1, 2])
    return (
        double(5, 2, 4),
        double(2, 4),
        rows.int(),
        columns.int(),
        double(5),
        0.7,
        torch.arange(10).view(5, 2) % 4 == 0,
    )


def cfc_arguments(save=False):
    weights, biases = [double(3, 4), double(16, 3)], [double(16)]
    begins = torch.arange(10).view(5, 2) % 4 == 0
    return double(5, 2, 3), double(2, 4), weights, biases, double(5, 2), None, None, "default", "tanh", save, begins


def cfc_backward_arguments():
    _, _, weights, _, *others, _, begins = arguments = cfc_arguments(True)
    output, saved = torch.ops.seqaccel.cfc_forward(*arguments)
    return torch.randn_like(output), weights, saved, *others, True, begins


ARGUMENTS = {
    "rnn_forward": rnn_arguments,
    "rnn_backward": rnn_backward_arguments,
    "rnn_forward_bfloat16": bfloat16_arguments,
    "causal_conv1d_forward": conv_arguments,
    "causal_conv1d_backward": conv_backward_arguments,
    "causal_conv2d_forward": grid_arguments,
    "causal_conv2d_backward": grid_backward_arguments,
    "wavenet_layer_forward": wavenet_arguments,
    "wavenet_layer_backward": wavenet_backward_arguments,
    "temporal_block_forward": block_arguments,
    "temporal_block_backward": block_backward_arguments,
    "convolutional_gru_forward": gru_arguments,
    "convolutional_gru_backward": gru_backward_arguments,
    "linear_scan_forward": lambda: (double(2, 4, 3), double(2, 4, 3), double(2, 3), None, EPISODES[:, :4], False, True),
    "linear_scan_backward": lambda: (
        *(double(2, 4, 3), double(2, 3), double(2, 4, 3), double(2, 4, 3), double(2, 3)),
        *(None, EPISODES[:, :4], False),
    ),
    "column_forward": column_arguments,
    "column_backward": column_backward_arguments,
    "hierarchical_attention_forward": attention_arguments,
    "hierarchical_attention_backward": attention_backward_arguments,
    "attention_pool_forward": pool_arguments,
    "attention_pool_backward": pool_backward_arguments,
    "block_sparse_attention_forward": block_sparse_arguments,
    "block_sparse_attention_backward": block_sparse_backward_arguments,
    "additive_attention_forward": additive_arguments,
    "additive_attention_backward": additive_backward_arguments,
    "attention_lstm_forward": decoder_arguments,
    "attention_lstm_backward": decoder_backward_arguments,
    "novelty_gate": gate_arguments,
    "echo_state": echo_arguments,
    "cfc_forward": cfc_arguments,
    "cfc_backward": cfc_backward_arguments,
    "fastest_mm": lambda: (double(3, 4), double(4, 5)),
    "mm": lambda: (double(3, 4), double(4, 5)),
    "add_fastest_mm_": lambda: (double(3, 5), double(3, 4), double(4, 5)),
    "elementwise": lambda: (double(7), "tanh"),
}
NOT_DIFFERENTIABLE = ("add_fastest_mm_", "novelty_gate")
DIFFERENTIABLE = [name for name in ARGUMENTS if "backward" not in name and name not in NOT_DIFFERENTIABLE]
WITHOUT_TENSORS = {"isa", "isa_number", "best_isa", "set_isa", "threads"}
CUDNN = {"rnn_cudnn", "rnn_cudnn_backward"}  # torch's operator, with facts of its own

each = pytest.mark.parametrize("name", ARGUMENTS)
each_differentiable = pytest.mark.parametrize("name", DIFFERENTIABLE)


def overload(name):
    return getattr(torch.ops.seqaccel, name).default


def test_no_operator_is_forgotten():
    names = {name.removeprefix("seqaccel::") for name in torch._C._dispatch_get_all_op_names() if "seqaccel::" in name}
    names = {name for name in names if not name.endswith("_triton")} - WITHOUT_TENSORS - CUDNN
    assert names == set(ARGUMENTS) == {name for name in _registration.OPERATORS if not name.endswith("_triton")}
    for name in names:
        keys = ("Autograd", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched")
        for key in keys:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"seqaccel::{name}", key), (name, key)
        assert torch.Tag.pt2_compliant_tag in overload(name).tags
        assert overload(name) in DTensor._op_dispatcher._custom_op_handlers, name


@each
def test_fake(name):
    torch.library.opcheck(overload(name), ARGUMENTS[name](), test_utils=("test_schema", "test_faketensor"))


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def map_floating(function, arguments):
    return tree_map_only(torch.Tensor, lambda t: function(t) if t.is_floating_point() else t, arguments)


def leaves_of(arguments):
    """The arguments with leaves that require gradients, and these."""
    copies = map_floating(lambda t: t.detach().clone().requires_grad_(), arguments)
    return copies, [t for t in tree_leaves(copies) if is_floating(t)]


@each_differentiable
def test_gradients_of_any_order(name):
    operator = _registration.OPERATORS[name]
    for options in [(), (True,)] if "save" in str(overload(name)._schema).split("->")[0] else [()]:
        found = []
        arguments = ARGUMENTS[name](*options)
        torch.manual_seed(0)
        for function in (overload(name), operator.definition):
            copies, leaves = leaves_of(arguments)
            count = len(_registration._tuple(operator.definition(*copies)))
            results = _registration._tuple(function(*copies))[:count]
            loss = sum(result.double().square().sum() for result in results)
            first = torch.autograd.grad(loss, leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.double().square().sum() for g in first), leaves, allow_unused=True)
            plain = torch.autograd.grad(
                sum(r.double().square().sum() for r in _registration._tuple(function(*copies))[:count]), leaves
            )
            found.append((results, plain, first, second))
        if "bfloat16" in name:  # the definition's gradients of gradients are no better
            torch.testing.assert_close(found[0][:3], found[1][:3], atol=0.2, rtol=0.2)
        else:
            torch.testing.assert_close(*found)


@each_differentiable
def test_forward_mode(name):
    operator = _registration.OPERATORS[name]
    arguments = ARGUMENTS[name]()
    tangents = map_floating(torch.randn_like, arguments)
    outputs = []
    with torch.autograd.forward_ad.dual_level():
        duals = [
            [torch.autograd.forward_ad.make_dual(t, v) if t is not None else None for t, v in zip(p, q, strict=True)]
            if isinstance(p, list)
            else torch.autograd.forward_ad.make_dual(p, q)
            if is_floating(p)
            else p
            for p, q in zip(arguments, tangents, strict=True)
        ]
        for function in (overload(name), operator.definition):
            first = _registration._tuple(function(*duals))[0]
            outputs.append(torch.autograd.forward_ad.unpack_dual(first).tangent)
    assert outputs[0] is not None
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if "backward" in name])
def test_backward_operators_refuse_to_be_differentiated(name):
    copies, _ = leaves_of(ARGUMENTS[name]())
    with pytest.raises(RuntimeError, match="not differentiable"):
        overload(name)(*copies)


def test_in_place_product_is_differentiated():
    a, b = double(3, 4).requires_grad_(), double(4, 5).requires_grad_()
    out, expected = double(3, 5), None
    expected = torch.autograd.grad(out.addmm(a, b).square().sum(), (a, b))
    torch.ops.seqaccel.add_fastest_mm_(out, a, b)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (a, b)), expected)


@each
def test_autocast(name):
    """Tensors of several dtypes are calculated in the operator's dtype: float32, or autocast's own."""
    if name == "add_fastest_mm_":
        pytest.skip("writes to its argument, whose dtype counts")
    wide = map_floating(lambda t: t.bfloat16().float(), ARGUMENTS[name]())
    mixed = list(wide)
    first = next(i for i, value in enumerate(wide) if isinstance(value, torch.Tensor))
    mixed[first] = wide[first].bfloat16()
    dtype = _registration.OPERATORS[name].autocast or torch.bfloat16
    expected = overload(name)(*map_floating(lambda t: t.to(dtype), wide))
    with torch.autocast("cpu", torch.bfloat16):
        found = overload(name)(*mixed)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("everything", [False, True], ids=["batch", "everything"])
@each
def test_vmap(name, everything):
    """Of the arguments that have a batch, which the rule folds where it can, and of all of them."""
    operator, arguments = _registration.OPERATORS[name], ARGUMENTS[name]()
    named = operator.named(arguments)
    flat, mapped = [], []
    for key, value in named.items():
        takes = everything or key in operator.batch
        for t in value if isinstance(value, list) else [value]:
            if isinstance(t, torch.Tensor) and takes:
                mapped.append(
                    torch.stack([t, t * 2 - 1, -t] if is_floating(t) else [t, t if t.dtype == torch.int32 else ~t, t])
                )
            flat.append(t)
    structure = [value if isinstance(value, list) else None for value in arguments]

    def call(*tensors):
        given = iter(tensors)
        filled = [
            next(given) if isinstance(t, torch.Tensor) and (everything or key in operator.batch) else t
            for key, value in named.items()
            for t in (value if isinstance(value, list) else [value])
        ]
        rebuilt, at = [], 0
        for value in structure:
            size = 1 if value is None else len(value)
            rebuilt.append(filled[at] if value is None else filled[at : at + size])
            at += size
        if operator.mutates:
            rebuilt[0] = rebuilt[0].clone()
            overload(name)(*rebuilt)
            return [rebuilt[0]]
        return [t for t in tree_leaves(overload(name)(*rebuilt)) if isinstance(t, torch.Tensor)]

    found = torch.vmap(call)(*mapped)
    expected = [torch.stack(parts) for parts in zip(*(call(*(t[i] for t in mapped)) for i in range(3)), strict=True)]
    torch.testing.assert_close(list(found), expected)


@each
def test_operations_are_counted(name):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        overload(name)(*ARGUMENTS[name]())
    assert counter.get_total_flops() > 0
    assert any("seqaccel" in str(operator) for operator in counter.get_flop_counts()["Global"])


def test_vmap_of_packed_rows():
    """(N, ·), which have no batch to fold: one call each."""
    h_0, weights, sizes = double(3, 4), [double(12, 3), double(12, 4), None, None], torch.tensor([3, 2, 1])

    def call(x):
        return overload("rnn_forward")("gru", x, h_0, None, weights, sizes, None, None, False, False)[0]

    x = double(2, 6, 3)
    torch.testing.assert_close(torch.vmap(call)(x), torch.stack([call(part) for part in x]))


def test_operations_of_a_module():
    from torch.utils.flop_counter import FlopCounterMode

    lstm, x = snn.LSTM(4, 6), torch.randn(5, 2, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        lstm(x)[0].sum().backward()
    forward = 2 * 5 * 2 * 24 * (4 + 6)
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(9, 13), (13, 9)])
def test_operations_of_the_blocks_that_are_seen(causal, lengths):
    from torch.utils.flop_counter import FlopCounterMode

    Tq, Tk = lengths
    q, k, v = double(2, 4, Tq, 3), double(2, 2, Tk, 3), double(2, 2, Tk, 5)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    layout = torch.rand(4, 4, 4) < 0.5
    seen = layout.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :Tq, :Tk]
    pairs = 2 * int((seen.tril() if causal else seen).sum())
    with FlopCounterMode(display=False) as counter:
        out = SF.block_sparse_attention(*leaves, layout, block_size=4, causal=causal)
        assert counter.get_total_flops() == 2 * pairs * (3 + 5)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 + 5 + 3 * 3 + 2 * 5)
    without_values = [t.detach().to("meta") for t in (*leaves, layout.expand(2, 4, 4, 4))]
    with FlopCounterMode(display=False) as counter:
        overload("block_sparse_attention_forward")(*without_values, 4, causal, 1.0)
    assert counter.get_total_flops() == 2 * 2 * 4 * Tq * Tk * (3 + 5)


@pytest.mark.parametrize("window", [None, 2])
def test_operations_of_what_is_kept(window):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.eye(5)[[0, 0, 1, 2, 1, 3, 4, 4]].unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        SF.novelty_gate(x, threshold=0.5, window=window)
    before = [0, 1, 1, 2, 3, 3, 4, 5]
    assert counter.get_total_flops() == 2 * 5 * sum(min(n, window or 9) for n in before)


# ---- exported, compiled, transformed ----

MODULES = {
    "GRU": (lambda: snn.GRU(8, 6), (5, 2, 8)),
    "LSTM": (lambda: snn.LSTM(8, 6, proj_size=3), (5, 2, 8)),
    "LayerNormLSTM": (lambda: snn.LayerNormLSTM(8, 6), (5, 2, 8)),
    "SRU": (lambda: snn.SRU(8, 8, num_layers=1), (5, 2, 8)),
    "QRNN": (lambda: snn.QRNN(8, 6, window=2), (5, 2, 8)),
    "MinLSTM": (lambda: snn.MinLSTM(8, 6), (5, 2, 8)),
    "CausalConv1d": (lambda: snn.CausalConv1d(8, 6, 3), (2, 8, 9)),
    "HierarchicalAttention": (lambda: snn.HierarchicalAttention(8, 2, block_size=4), (2, 9, 8)),
    "HierarchicalAttentionEncoder": (
        lambda: snn.HierarchicalAttentionEncoder(8, 2, 2, 6, dropout=0.0, block_size=4),
        (2, 9, 8),
    ),
}


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("recorded", [True, False], ids=["exported with gradients", "exported without"])
@pytest.mark.parametrize("name", MODULES)
def test_exported_modules_train(name, recorded):
    make, shape = MODULES[name]
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(shape))
            self.inner = make()

        def forward(self, x):
            x = x * self.gain
            return first(self.inner(x, x, x) if name == "HierarchicalAttention" else self.inner(x))

    net, x = Net(), torch.randn(shape)
    with torch.set_grad_enabled(recorded):
        exported = torch.export.export(net, (x,)).module()
    expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
    parameters = dict(exported.named_parameters())
    found = torch.autograd.grad(exported(x).square().sum(), [parameters[key] for key, _ in net.named_parameters()])
    for p, q in zip(found, expected, strict=True):  # SRU's layer adds one gradient in place when it is not traced
        torch.testing.assert_close(p, q) if name == "SRU" else torch.testing.assert_close(p, q, atol=0, rtol=0)


def functions():
    """Loss functions of one tensor, a point of it and whether it is small enough for a Hessian."""
    w = [torch.randn(18, 4), torch.randn(18, 6)]
    yield "gru", lambda x: SF.gru(x, None, *w)[0].square().sum(), torch.randn(3, 2, 4)
    c = torch.randn(6, 4, 3)
    yield "conv", lambda x: SF.causal_conv1d(x, c, activation="tanh").square().sum(), torch.randn(2, 4, 5)
    yield "scan", lambda x: SF.linear_scan(x, x * 2).square().sum(), torch.randn(1, 4, 3)
    s, b = torch.randn(4, 12), torch.randn(8)
    yield "sru", lambda x: SF.sru_layer(x, s, x, b, b)[0].square().sum(), torch.randn(3, 2, 4)
    yield "columns", lambda x: SF.column_layer("mingru_g", x, s[:, :6].t())[0].square().sum(), torch.randn(3, 2, 4)
    yield (
        "attention",
        lambda x: SF.hierarchical_attention(x, x * 2, x, block_size=2).square().sum(),
        torch.randn(1, 2, 5, 3),
    )
    yield (
        "additive",
        lambda x: SF.additive_attention(x, x * 2, x, x[0, 0], scale=2.0).square().sum(),
        torch.randn(2, 5, 3),
    )
    layout = torch.eye(3, dtype=torch.bool)
    yield (
        "block_sparse",
        lambda x: SF.block_sparse_attention(x, x * 2, x, layout, block_size=2, causal=True).square().sum(),
        torch.randn(1, 2, 5, 3),
    )


TRANSFORMS = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones(()))[0],
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f: lambda x: torch.func.vmap(f)(torch.stack([x, -x])),
    "vmap_grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, -x])),
    "hessian": torch.func.hessian,
}


@pytest.mark.parametrize(
    "name, transform",
    [("gru", transform) for transform in TRANSFORMS]
    + [
        (name, transform)
        for name in ("conv", "scan", "sru", "columns", "attention")
        for transform in ("jvp", "vmap_grad")
    ],
)
def test_compiled_transforms(name, transform):
    torch.manual_seed(0)
    torch._dynamo.reset()
    loss, x = next((f, x) for key, f, x in functions() if key == name)
    transformed = TRANSFORMS[transform](loss)
    found = torch.compile(transformed, backend="aot_eager", fullgraph=transform != "hessian")(x)
    expected = transformed(x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "LayerNormLSTM"])
def test_compiled_training_in_bfloat16(cell, autocast):
    torch._dynamo.reset()
    module, x = getattr(snn, cell)(4, 6), torch.randn(5, 2, 4)
    if not autocast:
        module, x = module.bfloat16(), x.bfloat16()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (compiled, module):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(x)[0].float().square().sum()
        grads.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(grads[0], grads[1], atol=0.05, rtol=0.05)


def test_compiled_autograd_traces_recurrent_layers():
    torch._dynamo.reset()
    gru, x = snn.GRU(4, 6), torch.randn(5, 2, 4)
    expected = torch.autograd.grad(gru(x)[0].square().sum(), list(gru.parameters()))
    compiler = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    loss = gru(x)[0].square().sum()
    with torch._dynamo.compiled_autograd._enable(compiler):
        loss.backward()
    torch.testing.assert_close([p.grad for p in gru.parameters()], list(expected))


@pytest.mark.parametrize("bad", [0, 6])
def test_compiled_lengths_out_of_range(bad):
    torch._dynamo.reset()
    w = [torch.randn(18, 4), torch.randn(18, 6)]
    compiled = torch.compile(lambda x, n: SF.gru(x, None, *w, lengths=n)[0], backend="aot_eager", fullgraph=True)
    x, lengths = torch.randn(5, 2, 4), torch.tensor([5, 3])
    torch.testing.assert_close(compiled(x, lengths), SF.gru(x, None, *w, lengths=lengths)[0])
    with pytest.raises(RuntimeError, match="lengths"):
        compiled(x, torch.tensor([5, bad]))


# ---- in eager mode ----


@pytest.mark.parametrize("road", ["module", "function"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm", "layer_norm_gru"])
def test_output_may_be_modified_in_place(cell, road):
    make = {"rnn_tanh": snn.RNN, "gru": snn.GRU, "lstm": snn.LSTM, "layer_norm_gru": snn.LayerNormGRU}[cell]
    module, x = make(4, 6, bidirectional=road == "function", batch_first=True), torch.randn(2, 5, 4)

    def output():
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return module(packed)[0].data if road == "function" else module(x)[0]

    expected = torch.autograd.grad((output() * 3).relu().square().sum(), list(module.parameters()))
    changed = output()
    changed.mul_(3).relu_()
    torch.testing.assert_close(torch.autograd.grad(changed.square().sum(), list(module.parameters())), expected)


def test_profiles_name_the_cells():
    lstm, x = snn.LayerNormLSTM(4, 6), torch.randn(5, 2, 4)
    with torch.profiler.profile() as profile:
        lstm(x)[0].sum().backward()
        SF.gru(x, None, torch.randn(18, 4), torch.randn(18, 6, requires_grad=True))[0].sum().backward()
    names = {event.name for event in profile.events()}
    for cell in ("layer_norm_lstm", "gru"):
        assert {f"seqaccel::{cell}_forward", f"seqaccel::{cell}_backward"} <= names
    assert not any("anonymous" in name for name in names)


def test_vmap_of_a_cell_without_gradients():
    cell, x = snn.LSTMCell(4, 6), torch.randn(3, 2, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(cell)(x)[0], torch.stack([cell(part)[0] for part in x]))
