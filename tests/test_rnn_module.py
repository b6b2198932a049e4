"""Recurrent modules: torch.nn's twins, the cells that torch has not, and all that a module must bear."""

import copy
import io
import pickle

import pytest
import torch
from rnn_cases import modules, one_thread
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqaccel
from seqaccel.functional import lstm
from seqaccel.functional.rnn import CELLS, CellSpec, _layers
from seqaccel.nn.rnn._base import Recurrent
from seqaccel.reference import rnn as reference

STOCK = {"RNN": {}, "GRU": {}, "LSTM": {}}
#: Every module, and the options that make it another cell. Torch's come first.
MODULES = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
    ("GRU", {}),
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {"reset_after": False}),
    ("PeepholeLSTM", {"proj_size": 3}),
    ("LayerNormLSTM", {"normalize_cell": True}),
]
MODULES += [(module.__name__, {}) for module in modules().values() if module.__name__ not in STOCK]
IDS = ["-".join([name, *(f"{key}={value}" for key, value in options.items())]) for name, options in MODULES]
each_module = pytest.mark.parametrize("name, options", MODULES, ids=IDS)
TORCH_MODULES = [row for row in MODULES if row[0] in STOCK and "reset_after" not in row[1]]
each_torch_module = pytest.mark.parametrize("name, options", TORCH_MODULES, ids=IDS[: len(TORCH_MODULES)])
LAYOUTS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
]


def make(name, options, dtype=torch.float64, **more):
    torch.manual_seed(1)
    return getattr(seqaccel.nn, name)(5, 8, dtype=dtype, **options, **more)


def twins(name, options, dtype=torch.float64, **more):
    """torch.nn's and ours, each initialised from the same seed."""
    torch.manual_seed(1)
    return getattr(torch.nn, name)(5, 8, dtype=dtype, **options, **more), make(name, options, dtype, **more)


def flat(result):
    output, last = result
    last = last if isinstance(last, tuple) else (last,)
    return [output.data if isinstance(output, PackedSequence) else output, *last]


def some_state(module, batch):
    """h_0, or (h_0, c_0)."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    dtype = module.weight_ih_l0.dtype
    h_0 = torch.randn(layers, batch, module.proj_size or module.hidden_size, dtype=dtype)
    if isinstance(module, torch.nn.LSTM) or "LSTM" in type(module).__name__:
        return h_0, torch.randn(layers, batch, module.hidden_size, dtype=dtype)
    return h_0


def at(state, index):
    return tuple(part[:, index] for part in state) if isinstance(state, tuple) else state[:, index]


# ---- torch.nn ----


def torch_runs_all_layers(monkeypatch):
    monkeypatch.setattr(_layers.backends, "node", lambda *_: None)
    monkeypatch.setattr(_layers, "torch_runs_all_layers", lambda *_: True)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_torch_module
def test_is_torch_nn(name, options, layout, by_torch, monkeypatch):
    """With our kernels, and ``by_torch`` as on a GPU where torch's operator is faster."""
    if by_torch:
        torch_runs_all_layers(monkeypatch)
    stock, ours = twins(name, options, **layout)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    stock.load_state_dict(ours.state_dict())
    state = some_state(ours, 4)
    x = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 4, 1, 4])
    batch_first = layout.get("batch_first", False)
    calls = [(x,), (x, state), (x[0],), (x[0], at(state, 0))]
    calls += [
        (pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=batch_first), hx) for hx in (None, state)
    ]
    calls += [(pack_padded_sequence(x, lengths.sort(descending=True)[0], batch_first=batch_first), state)]
    for arguments in calls:
        found = []
        for module in (ours, stock):
            with one_thread():
                outputs = flat(module(*arguments))
                loss = sum((t * t).sum() for t in outputs)
                found.append([*outputs, *torch.autograd.grad(loss, [x, *module.parameters()], retain_graph=True)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    packed = calls[-2][0]
    result = ours(packed)[0]
    assert torch.equal(result.batch_sizes, packed.batch_sizes)
    assert torch.equal(result.unsorted_indices, packed.unsorted_indices)
    padded, lengths_back = pad_packed_sequence(result)
    assert torch.equal(lengths_back, lengths) and padded.shape[1] == 4


@each_torch_module
def test_streams_of_torch_s_operator(name, options, monkeypatch):
    """A state comes transposed, a chunk may have no step, and eval takes gradients, with dropout between layers too."""
    torch_runs_all_layers(monkeypatch)
    stock, ours = (module.eval() for module in twins(name, options, num_layers=2, dropout=0.3))
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    state, chunks = ours.init_state(4), []
    for chunk in x.split([0, 3, 1, 2]):
        y, state = ours.extend(chunk, state)
        chunks.append(y)
    found, expected = torch.cat(chunks), stock(x)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_messages_for_packed_sequences():
    """torch checks nothing here and fails inside a matrix product; the wording is that of padded input."""
    for name, part in (("LSTM", r"hidden\[0\]"), ("GRU", "hidden")):
        module = make(name, {}, torch.float32)
        packed = pack_padded_sequence(torch.zeros(3, 2, 6), [3, 1])
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"):
            module(packed)
        packed = pack_padded_sequence(torch.zeros(3, 2, 5), [3, 1])
        with pytest.raises(RuntimeError, match=rf"Expected {part} size \(1, 2, 8\), got \[1, 3, 8\]"):
            module(packed, some_state(module, 3))
    for sizes in ([2, 1, 2], [2, 2, 0]):
        packed = PackedSequence(torch.zeros(sum(sizes), 5), torch.tensor(sizes))
        with pytest.raises(ValueError, match="expected batch_sizes not to increase"):
            make("LSTM", {}, torch.float32)(packed)


# ---- every module against its layers, one by one ----


def by_hand(module, x, state, lengths=None):
    """What a module computes in eval, from the reference of one layer and direction; x (T, B, I)."""
    spec, directions = module._spec, 2 if module.bidirectional else 1
    state = state if isinstance(state, tuple) else (state,)
    last = [[], []]
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}" + "_reverse" * direction
            weights = [getattr(module, f"{name}_{suffix}", None) for name in spec.weights]
            start = [part[layer * directions + direction] for part in state]
            output, *end = reference.layer(
                module.cell, x, start[0], start[1] if len(start) > 1 else None, weights, lengths, reverse=direction == 1
            )
            outputs.append(output)
            for part, parts in zip(end, last, strict=True):
                parts.append(part)
        x = torch.cat(outputs, -1)
    return [x, *(torch.stack(parts) for parts in last if parts[0] is not None)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_module
def test_layers_and_directions(name, options, layout):
    module = make(name, options, **layout)
    state, x = some_state(module, 4), torch.randn(6, 4, 5, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 1, 6])
    given = x.transpose(0, 1) if module.batch_first else x
    expected = by_hand(module, x, state)
    found = flat(module(given, state))
    if module.batch_first:
        found[0] = found[0].transpose(0, 1)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    packed = pack_padded_sequence(given, lengths, enforce_sorted=False, batch_first=module.batch_first)
    output, last = module(packed, state)
    padded, _ = pad_packed_sequence(output)
    for a, b in zip(flat((padded, last)), by_hand(module, x, state, lengths), strict=True):
        torch.testing.assert_close(a, b)
    unbatched = flat(module(x[:, 1], at(state, 1)))
    for a, b in zip(unbatched, expected, strict=True):
        torch.testing.assert_close(a, b[:, 1])


@each_module
def test_parameters(name, options):
    module = make(name, options, num_layers=2, bidirectional=True)
    assert set(module.state_dict()) == {
        f"{weight}_l{layer}{suffix}"
        for weight in module._spec.weights
        for layer in range(2)
        for suffix in ("", "_reverse")
        if weight != "weight_hr" or module.proj_size
    }
    for weight, parameter in module.named_parameters():
        if weight.startswith("ln_"):
            assert torch.equal(parameter, torch.full_like(parameter, "bias" not in weight))
        else:
            assert parameter.abs().max() <= 8**-0.5 and parameter.std() > 0.1
    bare = make(name, options, bias=False)
    assert not [weight for weight in bare.state_dict() if weight.startswith("bias")]
    other = make(name, options, num_layers=2, bidirectional=True)
    torch.nn.init.zeros_(other.weight_hh_l0)
    other.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    assert torch.equal(flat(other(x))[0], flat(module(x))[0])


# ---- regularisation and initialisation ----

ZONED = [row for row in MODULES if row[0] != "RNN"]
each_zoned_module = pytest.mark.parametrize("name, options", ZONED, ids=IDS[2:])


@each_zoned_module
def test_zoneout(name, options):
    rates = (0.3, 0.6) if "LSTM" in name else 0.3
    module = make(name, options, zoneout=rates)
    plain = make(name, options)
    x, state = torch.randn(7, 4, 5, dtype=torch.float64), some_state(module, 4)
    state = state if isinstance(state, tuple) else (state,)
    weights = module._layer_weights(0)
    expected = reference.layer(
        module.cell, x, state[0][0], state[1][0] if len(state) > 1 else None, weights,
        zoneout_h=torch.tensor(0.3, dtype=x.dtype), zoneout_c=torch.tensor(0.6, dtype=x.dtype),
    )  # fmt: skip
    hx = state if len(state) > 1 else state[0]
    module.eval()
    for a, b in zip(flat(module(x, hx)), expected, strict=False):
        torch.testing.assert_close(a.reshape(b.shape), b)
    module.train()
    torch.manual_seed(2)
    output = module(x, hx)[0]
    torch.manual_seed(2)
    mask_h = torch.empty(7, 4, output.shape[2], dtype=torch.float64).bernoulli_(0.3)
    mask_c = torch.empty(7, 4, 8, dtype=torch.float64).bernoulli_(0.6)
    masks = {"zoneout_h": mask_h} | ({"zoneout_c": mask_c} if len(state) > 1 else {})
    expected = reference.layer(module.cell, x, state[0][0], state[1][0] if len(state) > 1 else None, weights, **masks)
    torch.testing.assert_close(output, expected[0])
    kept = torch.cat((state[0], output[:-1])) == output
    assert torch.equal(kept, mask_h == 1), "a unit whose mask is 1 keeps its value, and no other"
    assert not torch.equal(module(x, hx)[0], output), "a fresh mask each time"
    assert "zoneout=" in repr(module) and "zoneout" not in repr(plain)
    module = make(name, options, zoneout=1.0, num_layers=2, bidirectional=True)
    assert not module(x)[0].any()  # nothing ever changes


@each_module
def test_recurrent_dropout(name, options):
    module = make(name, options, recurrent_dropout=0.4, num_layers=2)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    module.eval()
    expected = flat(make(name, options, num_layers=2)(x))
    assert all(torch.equal(a, b) for a, b in zip(flat(module(x)), expected, strict=True))
    module.train()
    torch.manual_seed(2)
    found = flat(module(x))
    torch.manual_seed(2)
    masked = make(name, options, num_layers=2)
    torch.manual_seed(2)
    for layer in range(2):
        weight = getattr(masked, f"weight_hh_l{layer}")
        weight.data = torch.nn.functional.dropout(weight.data, 0.4)
        share = (weight == 0).double().mean().item()
        assert 0.2 < share < 0.6
    for a, b in zip(found, flat(masked(x)), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(flat(module(x))[0], found[0])
    grad = torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0)[0]
    assert 0.2 < (grad == 0).double().mean() < 0.6, "no gradient where the weight was dropped"


@pytest.mark.parametrize("name", ["LSTM", "PeepholeLSTM", "LayerNormLSTM", "MultiplicativeLSTM"])
def test_forget_bias(name):
    module = make(name, {}, forget_bias=1.5, num_layers=2, bidirectional=True)
    for _ in range(2):
        for weight, parameter in module.named_parameters():
            if weight.startswith("bias"):
                value = 1.5 if weight.startswith("bias_ih") else 0
                assert (parameter[8:16] == value).all() and (parameter[:8] != value).all()
        module.reset_parameters()
    assert repr(module).endswith("forget_bias=1.5)")


def test_dropout_stands_between_layers():
    module = make("LSTM", {}, num_layers=2, dropout=0.5)
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


@pytest.mark.parametrize(
    "use, error, message",
    [
        (lambda nn: nn.LSTM(5, 8, zoneout=1.5), ValueError, r"zoneout should be a number in range \[0, 1\], got 1.5"),
        (lambda nn: nn.LSTM(5, 8, zoneout=(0.1, -1)), ValueError, "zoneout should be a number"),
        (lambda nn: nn.GRU(5, 8, zoneout=(0.1, 0.2)), ValueError, "zoneout should be a number"),
        (lambda nn: nn.GRU(5, 8, recurrent_dropout=True), ValueError, "recurrent_dropout should be a number"),
        (lambda nn: nn.RNN(5, 8, zoneout=0.1), TypeError, "RNN: zoneout is not supported"),
        (lambda nn: nn.GRU(5, 8, forget_bias=1.0), TypeError, "GRU: forget_bias is not supported"),
        (lambda nn: nn.LSTM(5, 8, bias=False, forget_bias=1.0), ValueError, "forget_bias needs bias=True"),
        (lambda nn: nn.LayerNormLSTM(5, 8, proj_size=3), ValueError, "LayerNormLSTM: proj_size is not supported"),
        (lambda nn: nn.MultiplicativeLSTM(5, 8, proj_size=3), ValueError, "MultiplicativeLSTM: proj_size is not"),
        (lambda nn: nn.LayerNormGRU(5, 8, proj_size=3), ValueError, "proj_size"),
        (lambda nn: nn.LayerNormGRU(5, 8, reset_after=False), TypeError, "LayerNormGRU: reset_after is not supported"),
        (lambda nn: nn.LayerNormLSTM(5, 8)(torch.zeros(2)), ValueError, "LayerNormLSTM: Expected input to be 2D or 3D"),
    ],
)  # fmt: skip
def test_messages_of_what_is_new(use, error, message):
    with pytest.raises(error, match=message):
        use(seqaccel.nn)


# ---- what a module must bear ----


def test_empty_sequence_and_empty_batch():
    for name, options in MODULES:
        module = make(name, options, torch.float32)
        for x in (torch.zeros(0, 3, 5), torch.zeros(0, 5), torch.zeros(0, 0, 5)):
            with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
                module(x)
        output, *last = flat(module(torch.zeros(4, 0, 5)))
        assert output.shape[:2] == (4, 0) and last[0].shape[:2] == (1, 0)
        output.sum().backward()
        assert not module.weight_hh_l0.grad.any()


@each_module
def test_copies_and_types(name, options):
    module = make(name, options, torch.float32, num_layers=2, recurrent_dropout=0.1).eval()
    x = torch.randn(4, 3, 5)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(x)[0], module(x)[0]) and repr(copied) == repr(module)
    module.flatten_parameters()
    assert module.to(torch.float64)(x.double())[0].dtype == torch.float64
    half = module.bfloat16()(x.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module.float()(x)[0], rtol=0.05, atol=0.06)
    with pytest.raises(ValueError, match="RNN input dtype .* does not match weight dtype"):
        module(x.double())
    on_meta = module.to("meta")
    assert on_meta(x.to("meta"))[0].shape[:2] == (4, 3)


@each_module
def test_tied_weights(name, options):
    """Two layers, one set of parameters: the gradient is the sum of both."""
    module = make(name, options | {"num_layers": 2}) if "proj_size" not in options else None
    if module is None:
        pytest.skip("a projected layer's input has another width")
    module = getattr(seqaccel.nn, name)(8, 8, 2, dtype=torch.float64, **options)
    apart = copy.deepcopy(module)
    for weight in module._spec.weights:
        if hasattr(module, f"{weight}_l0"):
            apart.__getattr__(f"{weight}_l1").data = getattr(apart, f"{weight}_l0").data.clone()
            setattr(module, f"{weight}_l1", getattr(module, f"{weight}_l0"))
    x = torch.randn(4, 3, 8, dtype=torch.float64)
    module(x)[0].square().sum().backward()
    apart(x)[0].square().sum().backward()
    torch.testing.assert_close(module(x)[0], apart(x)[0])
    torch.testing.assert_close(module.weight_hh_l0.grad, apart.weight_hh_l0.grad + apart.weight_hh_l1.grad)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@each_torch_module
def test_weights_written_to_flat_weights(name, options, layout):
    """Subclasses and wrappers of torch.nn's layers that drop weights write them there."""

    def dropped(base):
        class Dropped(base):
            def forward(self, x):
                kept = self._flat_weights
                named = zip(kept, self._flat_weights_names, strict=True)
                self._flat_weights = [w * 0.5 if "weight_hh" in name else w for w, name in named]
                try:
                    return super().forward(x)
                finally:
                    self._flat_weights = kept

        return Dropped

    x, found = torch.randn(4, 3, 5, dtype=torch.float64), []
    for package in (torch.nn, seqaccel.nn):
        torch.manual_seed(1)
        module = copy.deepcopy(dropped(getattr(package, name))(5, 8, dtype=torch.float64, **options, **layout))
        plainly = getattr(package, name).forward(module, x)[0]
        found.append((module(x)[0], plainly))
        assert not torch.equal(*found[-1])
        other = {key: 2 * value for key, value in module.named_parameters()}
        found[-1] += (torch.func.functional_call(module, other, (x,))[0],)
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_module
def test_weight_norm(name, options):
    """Parameters are looked up at each call: a parametrization is seen, and trained through."""
    module = make(name, options)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = module(x)[0]
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(module(x)[0], expected)
    gain, direction = module.parametrizations.weight_hh_l0.parameters()
    with torch.no_grad():
        gain.mul_(2)
    assert not torch.allclose(module(x)[0], expected)
    module(x)[0].sum().backward()
    assert gain.grad.abs().sum() > 0 and direction.grad.abs().sum() > 0
    restored = copy.deepcopy(module)
    torch.testing.assert_close(restored(x)[0], module(x)[0])


@pytest.mark.parametrize(
    "layout", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=["plain", "deep"]
)
@each_module
def test_compile_and_export(name, options, layout):
    module = make(name, options, torch.float32, **layout)
    x = torch.randn(4, 3, 5)
    expected = flat(module(x))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    parameters = list(module.parameters())
    found = flat(compiled(x))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(expected[0].sum(), parameters)
    for a, b in zip(torch.autograd.grad(found[0].sum(), parameters), grads, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(module, (x,)).module()
    for a, b in zip(flat(exported(x)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_by_inductor():
    for name, options in (("LSTM", {"zoneout": 0.2, "recurrent_dropout": 0.2}), ("GRU", {"num_layers": 2})):
        module, x = make(name, options, torch.float32).eval(), torch.randn(4, 3, 5)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], module(x)[0])
        module.train()
        assert compiled(x)[0].shape == (4, 3, 8)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_compiled_cells(name):
    torch._dynamo.reset()
    module, x = getattr(seqaccel.nn, name)(5, 8), torch.randn(3, 5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    state, expected = compiled(x), module(x)
    for _ in range(2):
        state, expected = compiled(x, state), module(x, expected)
    torch.testing.assert_close(state, expected)


@each_module
def test_function_transforms(name, options):
    module = make(name, options)
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


@each_module
def test_double_backward(name, options):
    """A penalty on the gradient can be trained on."""
    module = make(name, options, num_layers=2)
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    with seqaccel.backend("reference"):
        (again,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        expected = torch.autograd.grad(again.square().sum(), list(module.parameters()))
    for parameter, exact in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, exact)


@each_module
def test_inference_mode(name, options):
    module, x = make(name, options), torch.randn(4, 3, 5, dtype=torch.float64)
    with torch.inference_mode():
        found = flat(module(x))
    torch.testing.assert_close(found, flat(module(x)))


def test_a_cell_of_the_reference_alone(monkeypatch):
    """The least of docs/adding-a-cell.md: a definition, a row, a module."""

    class Twin(Recurrent):
        cell = "gru_twin"

    monkeypatch.setitem(reference.CELLS, "gru_twin", reference.gru_cell)
    monkeypatch.setitem(CELLS, "gru_twin", CellSpec(3, backends=("reference",)))
    twin, gru = Twin("GRU", 4, 6, 2, bidirectional=True, zoneout=0.1), seqaccel.nn.GRU(4, 6, 2, bidirectional=True)
    gru.load_state_dict(twin.state_dict())
    gru.zoneout, x = 0.1, torch.randn(5, 3, 4, requires_grad=True)
    with seqaccel.backend("reference"):
        expected = flat(gru.eval()(x))
    for found, wanted in zip(flat(twin.eval()(x)), expected, strict=True):
        assert torch.equal(found, wanted)
    twin.zoneout = 0.0
    assert flat(twin(x))[0].requires_grad
    with pytest.raises(RuntimeError, match="no backend 'cpp'; it has reference"), seqaccel.backend("cpp"):
        twin(x)
    with pytest.raises(TypeError, match="a Session runs C\\+\\+ kernels, which Twin has not"):
        seqaccel.Session(twin)
