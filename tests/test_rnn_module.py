"""The LSTM module: torch.nn.LSTM's twin, and streams."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqaccel
from seqaccel.functional import lstm

# ---- the module ----

MODULES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
]


def twins(dtype=torch.float64, sizes=(5, 8), **options):
    """torch.nn.LSTM and ours, each initialised from the same seed."""
    torch.manual_seed(1)
    stock = torch.nn.LSTM(*sizes, dtype=dtype, **options)
    torch.manual_seed(1)
    return stock, seqaccel.nn.LSTM(*sizes, dtype=dtype, **options)


def flat(result):
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_module_is_torch_nn_lstm(options):
    stock, ours = twins(**options)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    stock.load_state_dict(ours.state_dict())
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    state = (torch.randn(layers, 4, options.get("proj_size") or 8).double(), torch.randn(layers, 4, 8).double())
    x = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 4, 1, 4])
    batch_first = options.get("batch_first", False)
    calls = [(x,), (x, state), (x[0],), (x[0], (state[0][:, 0], state[1][:, 0]))]
    calls += [
        (pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=batch_first), hx) for hx in (None, state)
    ]
    calls += [(pack_padded_sequence(x, lengths.sort(descending=True)[0], batch_first=batch_first),)]
    for arguments in calls:
        found = []
        for module in (ours, stock):
            module.zero_grad()
            outputs = flat(module(*arguments))
            grads = torch.autograd.grad(
                sum((t * t).sum() for t in outputs), [x, *module.parameters()], retain_graph=True
            )
            found.append([*outputs, *grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    packed = calls[-2][0]
    result = ours(packed)[0]
    assert torch.equal(result.batch_sizes, packed.batch_sizes) and torch.equal(
        result.unsorted_indices, packed.unsorted_indices
    )
    padded, lengths_back = pad_packed_sequence(result)
    assert torch.equal(lengths_back, lengths) and padded.shape[1] == 4


def outcome(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(torch.zeros(5)),
        lambda m: m(torch.zeros(1, 2, 3, 5)),
        lambda m: m(torch.zeros(3, 2, 6)),
        lambda m: m(torch.zeros(3, 6)),
        lambda m: m(torch.zeros(3, 2, 5).double()),
        lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 8), torch.zeros(1, 8))),
        lambda m: m(torch.zeros(3, 5), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))),
        lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8))),
        lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(2, 2, 8))),
        lambda m: type(m)(5, 8, proj_size=8),
        lambda m: type(m)(5, 0),
        lambda m: type(m)(5, 8, bias=1),
        lambda m: type(m)(5, 8, dropout=2),
    ],
)  # fmt: skip
def test_messages_of_the_module(use):
    stock, ours = twins(torch.float32)
    expected = outcome(lambda: use(stock))
    assert expected is not None and outcome(lambda: use(ours)) == expected


def test_messages_for_packed_sequences():
    """torch checks nothing here and fails inside a matrix product; the wording is that of padded input."""
    _, module = twins(torch.float32)
    packed = pack_padded_sequence(torch.zeros(3, 2, 6), [3, 1])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"):
        module(packed)
    packed = pack_padded_sequence(torch.zeros(3, 2, 5), [3, 1])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 8\), got \[1, 3, 8\]"):
        module(packed, (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)))


def test_dropout_stands_between_layers():
    _, module = twins(num_layers=2, dropout=0.5)
    x = torch.randn(20, 3, 5, dtype=torch.float64)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])
    torch.testing.assert_close(module(x)[1][0][0], module.eval()(x)[1][0][0])  # the first layer sees none of it
    module.dropout = 1.0
    module.train()
    zeros = torch.zeros(3, 8, dtype=torch.float64)
    weights = [getattr(module, name) for name in module._all_weights[1]]
    torch.testing.assert_close(module(x)[0], lstm(zeros.expand(20, 3, 8), (zeros, zeros), *weights)[0])


def test_empty_sequence_and_empty_batch():
    _, module = twins(torch.float32)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        module(torch.zeros(0, 3, 5))
    output, (h_n, _) = module(torch.zeros(4, 0, 5))
    assert output.shape == (4, 0, 8) and h_n.shape == (1, 0, 8)
    output.sum().backward()
    assert torch.equal(module.weight_hh_l0.grad, torch.zeros(32, 8))


@pytest.mark.parametrize("options", [*MODULES[:2], {"batch_first": True}], ids=str)
def test_compile_and_export(options):
    _, module = twins(torch.float32, **options)
    x = torch.randn(4, 3, 5)
    expected = flat(module(x))
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(flat(compiled(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(expected[0].sum(), list(module.parameters()))
    for a, b in zip(torch.autograd.grad(compiled(x)[0].sum(), list(module.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(module, (x,)).module()
    for a, b in zip(flat(exported(x)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_copies():
    _, module = twins(torch.float32, num_layers=2)
    x = torch.randn(4, 3, 5)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(x)[0], module(x)[0])
    assert module.to(torch.float64)(x.double())[0].dtype == torch.float64


def test_function_transforms():
    _, module = twins()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    for a, b in zip(torch.func.grad(loss)(parameters, x).values(), expected, strict=True):
        torch.testing.assert_close(a, b)
    rows = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)  # a gradient for each row
    for a, b in zip(rows.values(), expected, strict=True):
        torch.testing.assert_close(a.sum(0), b)


def test_autocast():
    stock, ours = twins(torch.float32)
    x = torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x)[0], stock(x)[0]
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


# ---- streams ----


@settings(deadline=None, max_examples=30)
@given(
    chunks=st.lists(st.integers(0, 6), min_size=1, max_size=6), batch=st.integers(1, 6), layers=st.integers(1, 3),
    batch_first=st.booleans(), proj_size=st.sampled_from([0, 3]),
)  # fmt: skip
def test_any_chunking_gives_what_one_call_gives(chunks, batch, layers, batch_first, proj_size):
    module = seqaccel.nn.LSTM(5, 17, layers, batch_first=batch_first, proj_size=proj_size, dtype=torch.float64)
    time = 1 if batch_first else 0
    x = torch.randn(*((batch, sum(chunks)) if batch_first else (sum(chunks), batch)), 5, dtype=torch.float64)
    with torch.no_grad():
        state, pieces = module.init_state(batch), []
        for chunk in x.split(chunks, time):
            y, state = module.extend(chunk, state)
            pieces.append(y)
        if sum(chunks):
            output, (h_n, c_n) = module(x)
            torch.testing.assert_close(torch.cat(pieces, time), output)
            torch.testing.assert_close(state, (h_n.transpose(0, 1), c_n.transpose(0, 1)))
        state, pieces = module.init_state(batch), []
        for x_t in x.unbind(time):
            y, state = module.step(x_t, state)
            pieces.append(y)
        if pieces:
            torch.testing.assert_close(torch.stack(pieces, time), output)


def test_streams_are_independent():
    module = seqaccel.nn.LSTM(5, 8, 2, dtype=torch.float64)
    x, fresh = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    _, state = module.extend(x, module.init_state(3))
    reset = module.reset(state, torch.tensor([False, True, False]))
    y, _ = module.extend(fresh, reset)
    torch.testing.assert_close(y[:, 1], module(fresh[:, 1])[0])
    torch.testing.assert_close(y[:, 0], module(torch.cat((x, fresh))[:, 0])[0][6:])
    order = torch.tensor([2, 2, 0, 1])
    y, _ = module.extend(fresh[:, order], module.select(state, order))
    torch.testing.assert_close(y, module(torch.cat((x, fresh))[:, order])[0][6:])
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    assert all(torch.equal(a, b) for a, b in zip(torch.load(saved), state, strict=True))


def test_what_does_not_stream():
    module = seqaccel.nn.LSTM(5, 8, bidirectional=True)
    with pytest.raises(RuntimeError, match="a bidirectional module cannot run on a stream"):
        module.init_state(2)
    module = seqaccel.nn.LSTM(5, 8)
    with pytest.raises(ValueError, match="expected a chunk to have 3 dimensions, but got 2"):
        module.extend(torch.zeros(3, 5), module.init_state(3))
    with pytest.raises(ValueError, match="expected one step"):
        module.step(torch.zeros(1, 3, 5), module.init_state(3))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        module.step(torch.zeros(3, 5), module.init_state(2))
