"""The autograd node in C++ (csrc/autograd) does what the one in Python does."""

import pytest
import torch
import torch.fx.experimental.proxy_tensor
from rnn_cases import each_kind, problem, random_grads, weights_of

import seqaccel
from seqaccel import _extension
from seqaccel.functional.rnn import CELLS
from seqaccel.functional.rnn._layers import Direction, layer

pytestmark = pytest.mark.skipif(
    _extension.autograd is None and _extension.cpp_error is not None, reason="the package was built without extensions"
)
BOTH = [True, False]


def test_it_was_built():
    """With this torch the module must be there: without it the tests below would compare Python with itself."""
    assert _extension.autograd is not None


def call(tensors, cell, compiled, monkeypatch, reverse=False, states=True):
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
    state = (tensors["h_0"], tensors.get("c_0")) if states else (None, None)
    found = layer(cell, cell, tensors["input"], Direction(*state, weights_of(cell, tensors), reverse))
    monkeypatch.undo()
    outputs = [t for t in found if t is not None]
    if torch.is_grad_enabled() and outputs[0].requires_grad:
        assert ("Layer>" in outputs[0].grad_fn.name()) == compiled, outputs[0].grad_fn.name()
    return outputs


def differentiate(outputs, tensors, grads, **options):
    wanted = [t for t in tensors.values() if t is not None and t.requires_grad]
    return torch.autograd.grad(outputs, wanted, grads, allow_unused=True, **options)


@each_kind("cpp")
@pytest.mark.parametrize("reverse", BOTH)
@pytest.mark.parametrize("states", BOTH)
def test_same_bits(cell, projected, reverse, states, monkeypatch):
    tensors = problem(cell, 5, 3, 4, 6, projected=projected, dtype=torch.float32)
    found = []
    for compiled in BOTH:
        outputs = call(tensors, cell, compiled, monkeypatch, reverse, states)
        grads = [torch.linspace(-1, 1, t.numel()).view_as(t) for t in outputs]
        with torch.no_grad():
            plain = call(tensors, cell, compiled, monkeypatch, reverse, states)
        found.append([*outputs, *plain, *differentiate(outputs, tensors, grads)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.shape == theirs.shape and torch.equal(ours, theirs)


@each_kind("cpp")
def test_each_gradient_alone(cell, projected, monkeypatch):
    """Only what needs a gradient gets one, and outputs without a gradient count as none."""
    tensors = problem(cell, 4, 2, 3, 5, projected=projected, dtype=torch.float32, requires_grad=False)
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        tensor.requires_grad_()
        for chosen in range(3 if CELLS[cell].has_cell_state else 2):
            both = []
            for compiled in BOTH:
                output = call(tensors, cell, compiled, monkeypatch)[chosen]
                both.append(torch.autograd.grad(output.sum(), tensor, allow_unused=True)[0])
            assert torch.equal(*both), (name, chosen)
        tensor.requires_grad_(False)


@each_kind("cpp")
def test_gradients_of_gradients(cell, projected, monkeypatch):
    tensors = problem(cell, 3, 2, 3, 4, projected=projected)
    names = [name for name, t in tensors.items() if t is not None]

    def function(*values):
        return tuple(call(dict(zip(names, values, strict=True)), cell, True, monkeypatch))

    assert torch.autograd.gradcheck(function, [tensors[name] for name in names], fast_mode=True)
    assert torch.autograd.gradgradcheck(function, [tensors[name] for name in names], fast_mode=True)


def lstm(**options):
    tensors = problem("lstm", 4, 2, 3, 5, dtype=torch.float32, **options)
    return tensors, [g.float() for g in random_grads("lstm", tensors)]


@each_kind("cpp")
@pytest.mark.parametrize("compiled", BOTH)
def test_batched_gradients(cell, projected, compiled, monkeypatch):
    """vmap over a backward pass, autograd's own and torch.func's, gives what a loop does."""
    tensors = problem(cell, 4, 2, 3, 5, projected=projected)
    outputs = call(tensors, cell, compiled, monkeypatch)
    upstream = [torch.randn(3, *t.shape, dtype=t.dtype) for t in outputs]
    loop = [differentiate(outputs, tensors, grads, retain_graph=True) for grads in zip(*upstream, strict=True)]
    batched = differentiate(outputs, tensors, upstream, retain_graph=True, is_grads_batched=True)
    mapped = torch.func.vmap(lambda *grads: differentiate(outputs, tensors, grads, retain_graph=True))(*upstream)
    for expected, *found in zip(zip(*loop, strict=True), batched, mapped, strict=True):
        for each in found:
            assert not each.requires_grad
            torch.testing.assert_close(each, torch.stack(expected))


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_batched_gradients_of_packed_sequences(name):
    module, x = getattr(seqaccel.nn, name)(3, 4, 2, bidirectional=True).double(), torch.randn(5, 3, 3).double()

    def run(x):
        return module(torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False))[0].data

    expected = torch.autograd.functional.jacobian(run, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(run, x, vectorize=True), expected)


def test_twice_through_the_same_graph(monkeypatch):
    tensors, _ = lstm()
    output = call(tensors, "lstm", True, monkeypatch)[0]
    first = differentiate([output.sum()], tensors, None, retain_graph=True)
    for a, b in zip(first, differentiate([output.sum()], tensors, None), strict=True):
        assert a is None or torch.equal(a, b)
    with pytest.raises(RuntimeError, match="a second time"):
        differentiate([output.sum()], tensors, None)


def test_refuses_what_was_changed_in_place(monkeypatch):
    tensors, _ = lstm()
    output = call(tensors, "lstm", True, monkeypatch)[0]
    with torch.no_grad():
        tensors["weight_hh"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        differentiate([output.sum()], tensors, None)


def test_hooks_of_saved_tensors(monkeypatch):
    """As of ``torch.autograd.graph.save_on_cpu``."""
    tensors, _ = lstm()
    expected = differentiate([call(tensors, "lstm", True, monkeypatch)[0].sum()], tensors, None)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        output = call(tensors, "lstm", True, monkeypatch)[0]
    for a, b in zip(expected, differentiate([output.sum()], tensors, None), strict=True):
        assert a is None or torch.equal(a, b)
    assert len(packed) > len(tensors)


@pytest.mark.parametrize("compiled", BOTH)
@pytest.mark.parametrize("recorded", BOTH)
def test_forward_mode(recorded, compiled, monkeypatch):
    """The reference serves: an operator would lose the tangents."""
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
    stock = torch.nn.GRU(3, 5).double().requires_grad_(recorded)
    ours = seqaccel.nn.GRU(3, 5).double().requires_grad_(recorded)
    ours.load_state_dict(stock.state_dict())
    x, direction = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        output = ours(torch.autograd.forward_ad.make_dual(x, direction))[0]
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
    step = 1e-6 * direction
    torch.testing.assert_close(tangent, (stock(x + step)[0] - stock(x - step)[0]) / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compiled", BOTH)
@pytest.mark.parametrize("recorded", BOTH)
@pytest.mark.parametrize("layers", [1, 2])
def test_states_may_be_detached_in_place(layers, recorded, compiled, monkeypatch):
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
    module, x = seqaccel.nn.LSTM(3, 5, layers), torch.randn(4, 2, 3)
    with torch.set_grad_enabled(recorded):
        packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
        for state in (*module(x)[1], *module(packed)[1]):
            assert not state.detach_().requires_grad


@pytest.mark.parametrize("compiled", BOTH)
def test_subclasses_and_modes_see_the_call(compiled, monkeypatch):
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)

    class Own(torch.Tensor):
        pass

    module, seen = seqaccel.nn.LSTM(3, 5), []
    assert type(module(torch.randn(4, 2, 3).as_subclass(Own))[0]) is Own

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        module(torch.randn(4, 2, 3))
    assert any("rnn_forward" in name for name in seen)


@pytest.mark.parametrize("compiled", BOTH)
def test_shapes_stay_symbolic(compiled, monkeypatch):
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
    module = seqaccel.nn.LSTM(3, 5)
    trace = torch.fx.experimental.proxy_tensor.make_fx(
        lambda x: module(x)[0], tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(torch.randn(4, 2, 3))
    x = torch.randn(6, 7, 3)
    torch.testing.assert_close(trace(x), module(x)[0])


@pytest.mark.parametrize("compiled", BOTH)
def test_other_devices_are_refused(compiled, monkeypatch):
    """One meta tensor would have the operator's shape function called, and memory returned as it is."""
    monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
    x = torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match="same device"):
        seqaccel.nn.GRU(3, 5).to("meta")(x)
    with pytest.raises(RuntimeError, match="same device"):
        seqaccel.nn.GRU(3, 5)(x, torch.zeros(1, 2, 5, device="meta"))


def test_what_does_not_fit_is_none():
    tensors, _ = lstm()
    weights, node = weights_of("lstm", tensors), _extension.autograd.layers
    for bad in ([w and w[:-1] if w is None else w[:-1] for w in weights], weights[:1], [None] * 5, ["weight"] * 5):
        assert node("lstm", tensors["input"], None, None, [bad], 1, False, True, 0.0, 0.0, None) is None
    assert node("lstm", tensors["input"][0], None, None, [weights], 1, False, True, 0.0, 0.0, None) is None


def test_another_torch_takes_python(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cpu")
    found, reason = _extension._import_autograd()
    assert found is None and "another torch" in reason


def test_tangents_of_gradients(monkeypatch):
    """Forward-mode AD over a backward pass, the layer itself having no tangent: C++ leaves it to Python."""
    tensors = problem("gru", 5, 3, 4, 6)
    module = seqaccel.nn.GRU(4, 6, dtype=torch.float64)
    tangents = []
    for compiled in BOTH:
        monkeypatch.setattr(_extension, "autograd", _extension.autograd if compiled else None)
        with torch.autograd.forward_ad.dual_level():
            output = module(tensors["input"])[0]
            grad = torch.autograd.forward_ad.make_dual(torch.ones_like(output), torch.full_like(output, 0.5))
            (found,) = torch.autograd.grad(output, tensors["input"], grad)
            tangents.append(torch.autograd.forward_ad.unpack_dual(found).tangent)
    assert tangents[0] is not None
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_parametrized_weights_are_calculated_once(given):
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight

    module, counted = seqaccel.nn.LSTM(4, 6, dtype=given), Counted()
    torch.nn.utils.parametrize.register_parametrization(module, "weight_hh_l0", counted)
    counted.calls = 0
    module(torch.randn(5, 3, 4, dtype=given))
    assert counted.calls == 1


def test_replaced_weights():
    """Of another dtype they run, of another width they are refused, as torch has it."""
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    for kind in (torch.nn.GRU, seqaccel.nn.GRU):
        module = kind(4, 6)
        doubled = {name: parameter.double() for name, parameter in module.named_parameters()}
        assert torch.func.functional_call(module, doubled, x)[0].dtype == torch.float64
        with pytest.raises(RuntimeError, match="input.size"):
            torch.func.functional_call(module, {"weight_ih_l0": torch.randn(18, 5)}, torch.randn(5, 3, 5))
