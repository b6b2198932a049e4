"""torch's own samples for its recurrent modules, ordinary and of errors, run on ours; and the quirks they leave out."""

import pytest
import torch
from rnn_cases import one_thread
from torch.nn.utils.rnn import PackedSequence

import seqaccel

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

INFOS = {info.module_cls.__name__: info for info in module_db if info.module_cls.__module__ == "torch.nn.modules.rnn"}
NAMES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]


def test_torch_has_samples_for_all():
    assert set(NAMES) == set(INFOS)


def flat(result):
    if isinstance(result, PackedSequence):
        return [result.data, result.batch_sizes]
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def samples(name, dtype, training, requires_grad=True):
    info = INFOS[name]
    options = {"with_packed_sequence": True} if name in ("RNN", "GRU") else {}
    return info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training, **options
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name, dtype, training):
    """Same parameters from the same seed, same results, same gradients; and each sample's own reference function."""
    count = 0
    for sample in samples(name, dtype, training):
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        inputs, keywords = sample.forward_input.args, sample.forward_input.kwargs
        torch.manual_seed(3)
        stock = getattr(torch.nn, name)(*arguments, **options, dtype=dtype).train(training)
        torch.manual_seed(3)
        ours = getattr(seqaccel.nn, name)(*arguments, **options, dtype=dtype).train(training)
        assert repr(ours) == repr(stock)
        assert all(
            a == b and torch.equal(p, q)
            for (a, p), (b, q) in zip(ours.named_parameters(), stock.named_parameters(), strict=True)
        )
        leaves = [t for t in flat(inputs) if t.requires_grad]
        found = []
        for module in (ours, stock):
            with one_thread():
                outputs = flat(module(*inputs, **keywords))
                loss = sum((t * t).sum() for t in outputs if t.is_floating_point())
                found.append([*outputs, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
        for a, b in zip(*found, strict=True):
            # The samples' values reach 9: in saturated gates the derivative, 1 - a^2, cancels.
            tolerance = 1e-5 if dtype == torch.float32 else 1e-13
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))
        if sample.reference_fn is not None and not isinstance(inputs[0], PackedSequence):
            expected = sample.reference_fn(ours, *inputs, **keywords)
            for a, b in zip(flat(ours(*inputs, **keywords)), flat(expected), strict=True):
                torch.testing.assert_close(a, b)
        count += 1
    assert count


@pytest.mark.parametrize("name", NAMES)
def test_error_samples(name):
    info = INFOS[name]
    errors = info.module_error_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=False)
    assert errors
    for error in errors:
        constructor, forward = error.module_error_input.constructor_input, error.module_error_input.forward_input
        kind = getattr(seqaccel.nn, name)
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                kind(*constructor.args, **constructor.kwargs)
        else:
            module = kind(*constructor.args, **constructor.kwargs)
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*forward.args, **forward.kwargs)


# ---- what the samples leave out ----


def outcome(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


LAYERS = ["RNN", "GRU", "LSTM"]
USES = [
    lambda m: m(torch.zeros(5)),
    lambda m: m(torch.zeros(1, 2, 3, 5)),
    lambda m: m(torch.zeros(3, 2, 6)),
    lambda m: m(torch.zeros(3, 6)),
    lambda m: m(torch.zeros(3, 2, 5).double()),
    lambda m: m(torch.zeros(0, 2, 5)),
    lambda m: m(torch.zeros(0, 5)),
    lambda m: type(m)(5, 0),
    lambda m: type(m)(0, 5),
    lambda m: type(m)(5.0, 5),
    lambda m: type(m)(5, "8"),
    lambda m: type(m)(5, 8, bias=1),
    lambda m: type(m)(5, 8, batch_first=1),
    lambda m: type(m)(5, 8, dropout=2),
    lambda m: type(m)(5, 8, dropout=True),
    lambda m: type(m)("RNN_TANH", 5, 8),
    lambda m: type(m)(5, 8, num_layers=0),
    lambda m: type(m)(5, 8, proj_size=8),
    lambda m: type(m)(5, 8, proj_size=-1),
]


@pytest.mark.parametrize("use", range(len(USES)))
@pytest.mark.parametrize("name", LAYERS)
def test_errors_of_layers(name, use):
    stock, ours = getattr(torch.nn, name)(5, 8), getattr(seqaccel.nn, name)(5, 8)
    expected = outcome(lambda: USES[use](stock))
    assert expected is not None and outcome(lambda: USES[use](ours)) == expected


STATES = [(2, (1, 3, 8)), (2, (1, 8)), (2, (2, 2, 8)), (None, (1, 1, 8)), (None, (2, 8)), (2, (1, 2, 7))]


@pytest.mark.parametrize("batch, shape", STATES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_errors_of_states(name, batch, shape):
    x = torch.zeros(3, 5) if batch is None else torch.zeros(3, batch, 5)
    state = torch.zeros(shape)
    hx = (state, state) if name == "LSTM" else state
    expected = outcome(lambda: getattr(torch.nn, name)(5, 8)(x, hx))
    assert expected is not None and outcome(lambda: getattr(seqaccel.nn, name)(5, 8)(x, hx)) == expected


CELL_USES = [
    lambda m, hx: m(torch.zeros(5, 5, 5)),
    lambda m, hx: m(torch.zeros(6)),
    lambda m, hx: m(torch.zeros(2, 6)),
    lambda m, hx: m(torch.zeros(2, 5), hx(3, 8)),
    lambda m, hx: m(torch.zeros(2, 5), hx(2, 7)),
    lambda m, hx: m(torch.zeros(5), hx(7)),
    lambda m, hx: m(torch.zeros(2, 5), hx(1, 2, 8)),
    lambda m, hx: m(torch.zeros(2, 5).double()),
    lambda m, hx: m(torch.zeros(2, 5).long()),
]


@pytest.mark.parametrize("use", range(len(CELL_USES)))
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_errors_of_cells(name, use):
    def hx(*shape):
        return (torch.zeros(shape), torch.zeros(shape)) if name == "LSTMCell" else torch.zeros(shape)

    for grad_mode in (True, False):  # without autograd torch's operator may serve small cells
        with torch.set_grad_enabled(grad_mode):
            expected = outcome(lambda: CELL_USES[use](getattr(torch.nn, name)(5, 8), hx))
            found = outcome(lambda: CELL_USES[use](getattr(seqaccel.nn, name)(5, 8), hx))
        assert expected is not None and found == expected


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference", "torch"])
@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_without_autograd(name, backend):
    stock, ours = getattr(torch.nn, name)(5, 8), getattr(seqaccel.nn, name)(5, 8)
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad(), seqaccel.backend(backend):
        for shape in ((3, 5), (5,), (900, 5)):
            x = torch.randn(shape)
            state, expected = ours(x), stock(x)
            torch.testing.assert_close(state, expected)
            torch.testing.assert_close(ours(x, state), stock(x, expected))
        assert flat(ours(torch.zeros(0, 5)))[0].shape == (0, 8)


def test_nonlinearity():
    for arguments in ((5, 8, 1, "relu"), (5, 8, 2, "tanh", False, True)):
        stock, ours = torch.nn.RNN(*arguments), seqaccel.nn.RNN(*arguments)
        assert (ours.mode, ours.nonlinearity, repr(ours)) == (stock.mode, stock.nonlinearity, repr(stock))
    for kind in (torch.nn.RNN, seqaccel.nn.RNN):
        with pytest.raises(ValueError, match="Unknown nonlinearity 'sine'. Select from 'tanh' or 'relu'."):
            kind(5, 8, nonlinearity="sine")
        with pytest.raises(ValueError, match="Unknown nonlinearity 'True'"):
            kind(5, 8, 1, True)
    for kind in (torch.nn.RNNCell, seqaccel.nn.RNNCell):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sine"):
            kind(5, 8, nonlinearity="sine")(torch.zeros(2, 5))


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    """The dtypes of torch's results, and near its values."""
    torch.manual_seed(0)
    stock, ours = getattr(torch.nn, name)(5, 8), getattr(seqaccel.nn, name)(5, 8)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(4, 3, 5) if name in LAYERS else torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(flat(ours(x)), flat(stock(x)), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    torch.manual_seed(0)
    stock, ours = getattr(torch.nn, name)(5, 8), getattr(seqaccel.nn, name)(5, 8)
    ours.load_state_dict(stock.state_dict())
    stock, ours = stock.bfloat16(), ours.bfloat16()
    x = (torch.randn(4, 3, 5) if name in LAYERS else torch.randn(3, 5)).bfloat16()
    for a, b in zip(flat(ours(x)), flat(stock(x)), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_under_autocast(given, state, weights):
    """What torch.nn's modules return on a CPU for each dtype of input, state and weights."""
    modules = [("RNN", {}), ("GRU", {"num_layers": 2}), ("LSTM", {}), ("LSTM", {"proj_size": 3, "num_layers": 2})]
    for name, options in [*modules, ("RNNCell", {}), ("GRUCell", {}), ("LSTMCell", {})]:
        cell, layers = name.endswith("Cell"), options.get("num_layers", 1)
        x = torch.randn(*(() if cell else (5,)), 3, 4).to(given)
        hx = None
        if state is not None:
            h_0, c_0 = (torch.randn(*(() if cell else (layers,)), 3, w) for w in (options.get("proj_size", 8), 8))
            hx = (h_0.to(state), c_0.to(state)) if "LSTM" in name else h_0.to(state)
        for recorded in (False, True):
            found = []
            for package in (torch.nn, seqaccel.nn):
                torch.manual_seed(0)
                module = getattr(package, name)(4, 8, dtype=weights, **options)
                with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(recorded):
                    found.append(torch.utils._pytree.tree_leaves(module(x, hx)))
            theirs, ours = found
            assert [t.dtype for t in ours] == [t.dtype for t in theirs], (name, options, recorded)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.float(), b.float(), atol=0.03, rtol=0.03)
