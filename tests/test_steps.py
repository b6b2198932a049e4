"""Steps of causal convolutions in eval mode without gradients: a session's kernels, states that are values."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tolerances import assert_close

import seqaccel
import seqaccel.nn as snn
from seqaccel import _steps

MODULES = {
    "tcn": lambda: snn.TCN(5, [7, 7, 4], 3),
    "block": lambda: snn.TemporalBlock(5, 6, 3, 2),
    "conv": lambda: snn.CausalConv1d(5, 6, 3, dilation=4, activation="gelu"),
    "gated": lambda: snn.CausalConv1d(5, 6, 3, activation="gated"),
    "grouped": lambda: snn.CausalConv1d(5, 10, 2, groups=5, bias=False),
}
each = pytest.mark.parametrize("name", MODULES)


def case(name, steps=30, batch=3):
    torch.manual_seed(len(name))
    module = MODULES[name]().eval()
    return module, torch.randn(batch, 5, steps)


def run(module, x, state=None):
    state, parts = module.init_state(x.shape[0]) if state is None else state, []
    for x_t in x.unbind(-1):
        y, state = module.step(x_t, state)
        parts.append(y)
    return torch.stack(parts, -1), state


def exact(module, x):
    with torch.no_grad(), seqaccel.backend("reference"):
        return copy.deepcopy(module).double()(x.double())


def runs_at_once(module):
    stepper = _steps._steppers.get(module)
    return stepper is not None and stepper.last is not None


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_are_the_module(name, mode):
    module, x = case(name)
    wanted = exact(module, x)
    with mode():
        y, state = run(module, x)
        assert runs_at_once(module)
        assert_close(y, wanted, "session_float32", torch.float32)
        _, other = module.extend(x, module.init_state(3))
        flat = [state] if not isinstance(module, snn.TCN) else state
        theirs = [other] if not isinstance(module, snn.TCN) else other
        for ours, expected in zip(flat, theirs, strict=True):
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        tail, _ = module.extend(x, state)
        assert torch.allclose(tail, module(torch.cat([x, x], -1))[..., 30:], atol=1e-5)
    assert torch.equal(run(copy.deepcopy(module), x)[0], run(module, x)[0])  # with gradients: by extend


@each
@torch.no_grad()
def test_states_are_values(name):
    module, x = case(name)
    wanted = exact(module, torch.cat([x[..., :10], x[..., 20:]], -1))[..., 10:]
    _, state = run(module, x[..., :10])
    kept = copy.deepcopy(state)
    run(module, x[..., 10:20], state)  # another branch
    for _ in range(2):
        y, _ = run(module, x[..., 20:], state)
        assert_close(y, wanted, "session_float32", torch.float32)
    again = pickle.loads(pickle.dumps(state))
    assert torch.equal(run(module, x[..., 20:], again)[0], y) and torch.equal(run(module, x[..., 20:], kept)[0], y)
    _, state = run(module, x[..., :10])
    part = state[0][0] if isinstance(module, snn.TCN) else state[0]
    part.zero_()  # the caller's own change counts
    changed, _ = run(module, x[..., 20:], state)
    fresh, _ = run(module, x[..., 20:], copy.deepcopy(state))
    assert torch.equal(changed, fresh) and not torch.equal(changed, y)
    state = module.reset(module.select(kept, torch.tensor([2, 0])), torch.tensor([False, True]))
    y, _ = run(module, x[:2, :, 20:], state)
    assert_close(y[1:], exact(module, x[1:2, :, 20:]), "session_float32", torch.float32)


def weight(module):
    conv = next(m for m in module.modules() if isinstance(m, snn.CausalConv1d))
    return conv, (conv.parametrizations.weight.original1 if hasattr(conv, "parametrizations") else conv.weight)


def in_place(module):
    weight(module)[1].mul_(-1)


def through_data(module):
    weight(module)[1].data.mul_(-1)


def new_data(module):
    weight(module)[1].data = -weight(module)[1].data


def assigned(module):
    module.load_state_dict({k: -v for k, v in module.state_dict().items()}, assign=True)


def loaded(module):
    module.load_state_dict({k: -v for k, v in module.state_dict().items()})


def replaced(module):
    conv, v = weight(module)
    owner = conv.parametrizations.weight if hasattr(conv, "parametrizations") else conv
    name = "original1" if hasattr(conv, "parametrizations") else "weight"
    setattr(owner, name, torch.nn.Parameter(-v))


def optimised(module):
    with torch.enable_grad():
        module(torch.randn(2, 5, 9)).sum().backward()
    torch.optim.SGD(module.parameters(), 1.0).step()


def unparametrized(module):
    conv, _ = weight(module)
    if hasattr(conv, "parametrizations"):
        torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    conv.weight.mul_(-1)


def moved(module):
    in_place(module.to("meta").to_empty(device="cpu"))
    [torch.nn.init.normal_(p) for p in module.parameters()]


def hooked(module):
    weight(module)[0].register_forward_hook(lambda module, x, y: (2 * y[0], y[1]) if isinstance(y, tuple) else 2 * y)


def another_activation(module):
    weight(module)[0].activation = "tanh"


CHANGES = [in_place, through_data, new_data, assigned, loaded, replaced, optimised, unparametrized, moved]


@each
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_never_stale(name, change):
    module, x = case(name)
    before, _ = run(module, x)
    assert runs_at_once(module)
    change(module)
    for _ in range(2):
        y, state = run(module, x)
        assert_close(y, exact(module, x), "session_float32", torch.float32)
        assert not torch.allclose(y, before)
    if change is not through_data:  # in the middle of a stream, too
        change(module)
        y, _ = run(module, x, state)
        expected = module.extend(x, state)[0]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [hooked, another_activation], ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_changes_the_module_is_seen(change):
    module, x = case("tcn")
    _, state = run(module, x)
    change(module)
    y, _ = run(module, x, state)
    torch.testing.assert_close(y, module.extend(x, state)[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_where_extend_serves():
    module, x = case("tcn")
    run(module, x)
    _, state = run(module, x)
    stepper = _steps._steppers[module]
    assert stepper.last is state
    with seqaccel.backend("reference"):
        module.step(x[..., 0], state)
    with torch.enable_grad():
        assert module.step(x[..., 0], state)[0].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert module.step(x[..., 0], state)[0].dtype == torch.bfloat16
    module.network[1].train()
    module.step(x[..., 0], state)
    module.eval()
    assert stepper.last is state
    for bad in (x[:2, :, 0], x[:, :4, 0]):
        with pytest.raises((ValueError, RuntimeError)):
            module.step(bad, state)
    y, _ = module.double().step(x[..., 0].double(), module.init_state(3))
    assert y.dtype == torch.float64
    one_tap = snn.CausalConv1d(5, 6, 1).eval()
    assert torch.allclose(run(one_tap, x)[0], one_tap(x), atol=1e-6)


def test_a_module_is_freed_and_copied():
    module, x = case("tcn")
    with torch.no_grad():
        run(module, x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            in_place(twin)
            assert not torch.allclose(run(twin, x)[0], run(module, x)[0])
    seen = weakref.ref(module)
    del module, twin
    gc.collect()
    assert seen() is None


def test_threads_share_a_module():
    module, x = case("tcn", steps=200)
    wanted, failed = exact(module, x), []

    def work(seed):
        with torch.no_grad():
            for _ in range(3):
                if not torch.allclose(run(module, x)[0].double(), wanted, rtol=1e-4, atol=1e-4):
                    failed.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed


@pytest.mark.parametrize("change", ["activation", "output_activation"])
def test_another_activation_is_seen(change):
    tcn = snn.TCN(4, [6, 6], 3).eval()
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        state = tcn.init_state(2)
        for t in range(5):
            _, state = tcn.step(x[..., t], state)
        if change == "activation":
            for block in tcn.network:
                block.activation = None
        else:
            tcn.output_activation = "tanh"
        found, _ = tcn.step(x[..., 5], state)
        wanted, _ = tcn.extend(x[..., 5:6], state)
    torch.testing.assert_close(found, wanted[..., 0])
