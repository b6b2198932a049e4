"""Steps of hierarchical attention in eval mode without gradients: a session's kernels, states that are values."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tolerances import assert_close

import seqaccel
from seqaccel import _steps, nn
from seqaccel.nn import HierarchicalAttention, HierarchicalAttentionEncoder


def encoder(**keywords):
    return HierarchicalAttentionEncoder(8, 2, 2, 12, **{"batch_first": True, "block_size": 4, **keywords})


MODULES = {
    "mean": lambda: HierarchicalAttention(8, 2, batch_first=True, block_size=4),
    "pooled": lambda: HierarchicalAttention(8, 2, block_size=3, fanout=2, local_blocks=1, pool_query=2),
    "one_level": lambda: HierarchicalAttention(
        8, 2, block_size=4, levels=1, rotary_base=10.0, bias=False, num_kv_heads=1
    ),
    "dense": lambda: HierarchicalAttention(8, 2, levels=0, batch_first=True),
    "encoder": lambda: encoder(norm_first=True, activation="gelu"),
    "learned": lambda: encoder(positions="learned", max_positions=75, pool_query=1),
    "last": lambda: encoder(batch_first=False, positions=None, levels=2),
}
each = pytest.mark.parametrize("name", MODULES)
LENGTH = 70


def case(name, steps=LENGTH, batch=3):
    torch.manual_seed(len(name))
    module = MODULES[name]().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, torch.randn(steps, batch, 8)


def run(module, x, state):
    """x (T, B, E), by steps."""
    parts = []
    for x_t in x:
        y, state = module.step(x_t, state)
        parts.append(y)
    return torch.stack(parts), state


def chunk(module, x, state):
    if not module.batch_first:
        return module.extend(x, state)
    y, state = module.extend(x.transpose(0, 1), state)
    return y.transpose(0, 1), state


def exact(module, x):
    with torch.no_grad(), seqaccel.backend("reference"):
        module = copy.deepcopy(module).double()
        x = x.double().transpose(0, 1) if module.batch_first else x.double()
        y = module(x, x, x)[0] if isinstance(module, HierarchicalAttention) else module(x)
        return y.transpose(0, 1) if module.batch_first else y


def runs_at_once(module):
    stepper = _steps._steppers.get(module)
    return stepper is not None and stepper.last is not None


def assert_equal_states(ours, theirs):
    ours, theirs = map(torch.utils._pytree.tree_flatten, (ours, theirs))
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("max_length", [None, LENGTH])
def test_steps_are_the_module(name, mode, max_length):
    """And the states are what extend would have returned."""
    module, x = case(name)
    wanted, every = exact(module, x), 1 if name in ("one_level", "dense") else 6  # whose rings grow with the calls
    with mode():
        state = theirs = module.init_state(3, max_length=max_length)
        for t in range(LENGTH):
            y, state = module.step(x[t], state)
            assert_close(y, wanted[t], "session_float32", torch.float32)
            if t % every == every - 1:
                _, theirs = chunk(module, x[t - every + 1 : t + 1], theirs)
                assert_equal_states(state, theirs)
        assert runs_at_once(module)
    again = run(copy.deepcopy(module), x, module.init_state(3))[0]  # with gradients: by extend
    assert again.requires_grad
    assert_close(again.detach(), wanted, "session_float32", torch.float32)


@each
@torch.no_grad()
def test_states_are_values(name):
    module, x = case(name)
    _, state = chunk(module, x[:30], module.init_state(3))
    _, state = run(module, x[30:40], state)
    kept = copy.deepcopy(state)
    run(module, x[40:60], state)  # another branch
    assert_equal_states(state, kept)
    wanted = exact(module, torch.cat([x[:40], x[60:]]))[40:]
    for start in (state, kept, pickle.loads(pickle.dumps(state))):
        y, _ = run(module, x[60:], start)
        assert_close(y, wanted, "session_float32", torch.float32)
    assert runs_at_once(module)
    _, state = run(module, x[30:40], chunk(module, x[:30], module.init_state(3))[1])
    layer = state if isinstance(module, HierarchicalAttention) else state[0]
    layer[1][0].zero_()  # the caller's own change counts
    changed, _ = run(module, x[60:], state)
    expected, _ = chunk(module, x[60:], state)
    torch.testing.assert_close(changed, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, y)


@each
@pytest.mark.parametrize("max_length", [None, LENGTH])
@torch.no_grad()
def test_streams_of_different_ages(name, max_length):
    module, x = case(name)
    _, state = run(module, x[:37], module.init_state(3, max_length=max_length))
    state = module.reset(module.select(state, torch.tensor([2, 0, 1, 1])), torch.tensor([False, True, False, False]))
    y, state = run(module, x[37:60, [2, 0, 1, 1]], state)
    assert runs_at_once(module)
    assert_close(y[:, [0, 2]], exact(module, x[:60, [2, 1]])[37:], "session_float32", torch.float32)
    assert_close(y[:, 1:2], exact(module, x[37:60, :1]), "session_float32", torch.float32)
    assert torch.equal(y[:, 2], y[:, 3])


@pytest.mark.parametrize("name", ["mean", "one_level", "dense", "encoder"])
@torch.no_grad()
def test_beyond_its_stated_length_a_stream_forgets_as_before(name):
    """With a number of levels the highest ring, which a session overwrites one step earlier, serves by extend."""
    module, x = case(name, steps=80)
    state = module.init_state(3, max_length=10)
    y, after = run(module, x, state)
    assert runs_at_once(module) == (name in ("mean", "encoder"))
    with torch.enable_grad():
        wanted, theirs = run(module, x, state)
    torch.testing.assert_close(y, wanted.detach(), rtol=1e-4, atol=1e-5)
    assert_equal_states(after, theirs)


def in_place(module):
    next(module.parameters()).mul_(-1)


def through_data(module):
    next(module.parameters()).data.mul_(-1)


def loaded(module):
    module.load_state_dict({key: -value for key, value in module.state_dict().items()}, assign=True)


def fewer_blocks(module):
    for part in module.modules():
        if isinstance(part, HierarchicalAttention):
            part.mass_bias = False


def hooked(module):
    module.get_submodule(
        "out_proj" if isinstance(module, HierarchicalAttention) else "layers.1.linear2"
    ).register_forward_hook(lambda module, x, y: 2 * y)


@pytest.mark.parametrize("name", ["pooled", "encoder"])
@pytest.mark.parametrize("change", [in_place, through_data, loaded, fewer_blocks, hooked], ids=lambda c: c.__name__)
@torch.no_grad()
def test_never_stale(name, change):
    module, x = case(name)
    before, state = run(module, x[:40], module.init_state(3))
    assert runs_at_once(module)
    change(module)
    if change is not through_data:  # in the middle of a stream, too
        y, _ = run(module, x[40:], state)
        torch.testing.assert_close(y, chunk(module, x[40:], state)[0], rtol=1e-4, atol=1e-5)
    y, _ = run(module, x[:40], module.init_state(3))
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, chunk(module, x[:40], module.init_state(3))[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_where_extend_serves():
    module, x = case("learned", steps=80)
    _, state = run(module, x[:73], module.init_state(3))
    stepper = _steps._steppers[module]
    assert stepper.last is state
    with seqaccel.backend("reference"):
        module.step(x[0], state)
    with torch.enable_grad():
        assert module.step(x[0], state)[0].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        module.step(x[0], state)
    module.layers[1].dropout1.train()
    module.step(x[0], state)
    module.eval()
    assert stepper.last is state
    for bad in (x[0, :2], x[0, :, :7], x[0, 0]):
        with pytest.raises(ValueError, match="expected shape"):
            module.step(bad, state)
    _, state = run(module, x[73:75], state)
    with pytest.raises(ValueError, match="at most max_positions=75 positions, but got 76"):
        module.step(x[75], state)
    for wrong in (state[:1], ((), ()), ((state[0][0],), state[1]), 3):
        with pytest.raises((TypeError, ValueError)):
            module.step(x[0], wrong)
    y, _ = module.double().step(x[0].double(), module.init_state(3))
    assert y.dtype == torch.float64
    both_ways = nn.HierarchicalAttention(8, 2, causal=False).eval()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot run on a stream"):
            both_ways.step(x[0], state)


@torch.no_grad()
def test_a_module_is_freed_and_copied():
    module, x = case("encoder")
    y, _ = run(module, x[:9], module.init_state(3))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(run(twin, x[:9], twin.init_state(3))[0][2:], y[2:])
    seen = weakref.ref(module)
    del module, twin
    gc.collect()
    assert seen() is None
