"""Echo state networks: the reservoir on every backend, its spectral radius, the read-out, the literature's errors."""

import copy
import importlib.util
import pathlib

import pytest
import torch
from instruction_sets import USABLE_NARROW_ISAS

import seqaccel
from seqaccel import functional as SF
from seqaccel.nn import EchoStateNetwork
from seqaccel.nn.rnn import _echo_state

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "chaotic_series.py"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(T, B, H, most, dtype=torch.float64):
    """Arguments of ``echo_state``; rows have up to ``most`` values."""
    torch.manual_seed(0)
    rows = torch.cat([torch.zeros(1), torch.randint(0, most + 1, (H,))]).cumsum(0).int()
    N = int(rows[-1])
    columns, weight = torch.randint(H, (N,), dtype=torch.int32), torch.randn(N, dtype=dtype) / most**0.5
    return torch.randn(T, B, H, dtype=dtype), rows, columns, weight, torch.randn(B, H, dtype=dtype)


def by_hand(drive, rows, columns, weight, h, a):
    W = torch.zeros(drive.shape[2], drive.shape[2], dtype=drive.dtype)
    for i in range(len(W)):
        for k in range(rows[i], rows[i + 1]):
            W[i, columns[k]] += weight[k]
    found = []
    for x in drive:
        h = (1 - a) * h + a * torch.tanh(x + h @ W.t())
        found.append(h)
    return torch.stack(found)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_by_hand(backend):
    arguments = problem(4, 3, 6, 5)
    with seqaccel.backend(backend):
        found = SF.echo_state(*arguments, leak_rate=0.3)
    torch.testing.assert_close(found, by_hand(*arguments, 0.3), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("isa", USABLE_NARROW_ISAS)
@pytest.mark.parametrize("B", [1, 2, 7, 16, 17, 33, 70])
def test_cpp_is_the_reference(isa, B, poison):
    """Few steps and many, which pack W."""
    for T, H, most in ((2, 1, 1), (9, 1, 1), (3, 37, 9), (10, 37, 9), (3, 300, 90), (9, 300, 90)):
        arguments = problem(T, B, H, most)
        narrow = [t.float() if t.is_floating_point() else t for t in arguments]
        with seqaccel.backend("reference"):
            expected = SF.echo_state(*arguments, leak_rate=0.6)
        with seqaccel.backends.isa(isa):
            torch.testing.assert_close(SF.echo_state(*arguments, leak_rate=0.6), expected, rtol=0, atol=1e-14)
            found = SF.echo_state(*narrow, leak_rate=0.6)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


def test_many_units():
    """Columns of more than 16 bits: many steps at once are each step of its own."""
    drive, rows, columns, weight, h = problem(9, 1, 70_001, 3)
    whole = SF.echo_state(drive, rows, columns, weight, h)
    for t in range(9):
        h = SF.echo_state(drive[t : t + 1], rows, columns, weight, h)[0]
        torch.testing.assert_close(whole[t], h, rtol=0, atol=1e-14)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("B", [1, 3])
def test_what_is_not_finite_reaches_only_what_it_feeds(T, B):
    """Unit 0, which is NaN, feeds unit 4 alone, beside rows of other lengths."""
    rows, columns = torch.tensor([0, 0, 3, 4, 4, 6, 7, 7]), torch.tensor([1, 2, 3, 3, 0, 4, 1])
    h_0 = torch.zeros(B, 7)
    h_0[0, 0] = float("nan")
    found = SF.echo_state(torch.zeros(T, B, 7), rows.int(), columns.int(), torch.ones(7), h_0)
    assert found.isnan().any(1).any(0).tolist() == [True, False, False, False, True, False, False]
    assert not found[:, 1:].isnan().any()


def test_threads_change_no_bit():
    arguments = problem(20, 1, 500, 120, torch.float32)
    many = [problem(3, 40, 500, 120, torch.float32)[0], *arguments[1:4]]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((SF.echo_state(*arguments), SF.echo_state(*many)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(dtype):
    arguments = [t.to(dtype) if t.is_floating_point() else t for t in problem(6, 3, 20, 5)]
    wide = [t.float() if t.is_floating_point() else t for t in arguments]
    assert torch.equal(SF.echo_state(*arguments), SF.echo_state(*wide).to(dtype))


@pytest.mark.parametrize(
    ("rows", "columns"), [([0, 1, 1], [2]), ([0, 1, 1], [-1]), ([0, 2, 1], [0]), ([0, 0, 0], [0]), ([1, 1, 1], [0])]
)
def test_what_is_no_matrix_is_refused(rows, columns):
    rows, columns = torch.tensor(rows, dtype=torch.int32), torch.tensor(columns, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="expected rows to rise from 0"):
        SF.echo_state(torch.zeros(1, 1, 2), rows, columns, torch.ones(1))


def test_gradients_are_the_definitions():
    drive, rows, columns, weight, h_0 = problem(3, 2, 5, 3)
    leaves = [t.requires_grad_() for t in (drive, weight, h_0)]

    def run(drive, weight, h_0):
        return SF.echo_state(drive, rows, columns, weight, h_0, leak_rate=0.7)

    torch.autograd.gradcheck(run, leaves)
    torch.autograd.gradgradcheck(run, leaves)


# ---- the reservoir ----


def dense(module, layer=0):
    H = module.hidden_size
    columns = getattr(module, f"columns_l{layer}").long().view(H, -1)
    values = getattr(module, f"weight_hh_l{layer}").view(H, -1)
    return torch.zeros(H, H, dtype=values.dtype).scatter_(1, columns, values)


@pytest.mark.parametrize(("units", "connectivity"), [(3, 0.1), (50, 0.2), (300, 0.02), (400, 0.1)])
def test_spectral_radius(units, connectivity):
    module = EchoStateNetwork(
        2, units, 1, 2, dtype=torch.float64, spectral_radius=0.8, connectivity=connectivity, generator=seeded(1)
    )
    for layer in range(2):
        W = dense(module, layer)
        assert float(torch.linalg.eigvals(W).abs().max()) == pytest.approx(0.8, rel=1e-5)
        assert ((W != 0).sum(1) == max(1, round(connectivity * units))).all()


def test_spectral_radius_of_a_dominant_complex_pair():
    """Power iteration turns forever in the plane of 1.5 e^{±i}; here Arnoldi's space ends early, too."""
    H = 400
    c, s = torch.cos(torch.tensor(1.0)), torch.sin(torch.tensor(1.0))
    weight = torch.zeros(H, 2, dtype=torch.float64)
    weight[:, 0] = 0.5
    weight[:2] = 1.5 * torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    columns = torch.stack([torch.arange(H), torch.arange(H).roll(-1)], 1)
    columns[1] = torch.tensor([0, 1])
    assert _echo_state._spectral_radius(columns, weight, seeded()) == pytest.approx(1.5, rel=1e-6)


def test_the_equations():
    module = EchoStateNetwork(3, 20, 2, 2, dtype=torch.float64, leak_rate=0.4, generator=seeded())
    x, fed, outputs = torch.randn(6, 2, 3, dtype=torch.float64), None, []
    for layer in range(2):
        fed = x if fed is None else fed
        drive = fed @ getattr(module, f"weight_ih_l{layer}").t() + getattr(module, f"bias_l{layer}")
        h, states = torch.zeros(2, 20, dtype=torch.float64), []
        for t in range(6):
            h = 0.6 * h + 0.4 * torch.tanh(drive[t] + h @ dense(module, layer).t())
            states.append(h)
        fed = torch.stack(states)
        outputs.append(fed)
    y, state = module(x)
    both = torch.cat(outputs, 2)
    torch.testing.assert_close(module.reservoir(x)[0], both)
    torch.testing.assert_close(y, both @ module.readout.weight.t() + module.readout.bias)
    torch.testing.assert_close(state, tuple(part[-1] for part in outputs))


def test_a_generator_decides_everything():
    one, same, other = (EchoStateNetwork(2, 30, 1, generator=seeded(seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["weight_hh_l0"], other["weight_hh_l0"])


def test_buffers_travel():
    module = EchoStateNetwork(2, 30, 1, 2, generator=seeded())
    assert [name for name, _ in module.named_parameters()] == ["readout.weight", "readout.bias"]
    loaded = EchoStateNetwork(2, 30, 1, 2, generator=seeded(1))
    loaded.load_state_dict(module.state_dict())
    x = torch.randn(5, 3, 2)
    assert torch.equal(loaded(x)[0], module(x)[0])
    wide = copy.deepcopy(module).double()
    assert wide.rows_l1.dtype == torch.int32
    torch.testing.assert_close(wide(x.double())[0].float(), module(x)[0])
    assert module.to("meta").columns_l0.device.type == "meta"


@pytest.mark.parametrize("batch_first", [False, True])
def test_any_chunking_gives_what_one_call_gives(batch_first, monkeypatch):
    module = EchoStateNetwork(2, 25, 3, 2, batch_first, dtype=torch.float64, generator=seeded())
    x, time = torch.randn(4, 4, 2, dtype=torch.float64).repeat(1, 3, 1), 1 if batch_first else 0
    if not batch_first:
        x = x.transpose(0, 1)
    expected, last = module(x)
    state, pieces = module.init_state(4), []
    for part in x.split([3, 0, 5, 1, 3], time):
        y, state = module.extend(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, time), expected)
    torch.testing.assert_close(state, last)
    state, pieces = module.init_state(4), []
    for x_t in x.unbind(time):
        y, state = module.step(x_t, state)
        pieces.append(y)
    torch.testing.assert_close(torch.stack(pieces, time), expected)
    monkeypatch.setattr(_echo_state, "_CHUNK", 2 * 4 * 50)
    torch.testing.assert_close(module(x), (expected, last))


def test_streams_are_reset_and_selected():
    module = EchoStateNetwork(2, 25, 3, 2, generator=seeded())
    _, state = module(torch.randn(3, 4, 2))
    fresh = module.reset(state, torch.tensor([True, False, False, True]))
    assert all(
        (part[[0, 3]] == 0).all() and torch.equal(part[1:3], old[1:3]) for part, old in zip(fresh, state, strict=True)
    )
    assert torch.equal(module.select(state, torch.tensor([2, 2]))[1], state[1][[2, 2]])


# ---- the read-out ----


def regression(module, x, y, ridge, washout):
    """By the normal equations' definition: least squares with rows for the penalty."""
    hidden = module.reservoir(x)[0][washout:].flatten(0, 1)
    N, F = hidden.shape
    rows = torch.cat([torch.cat([hidden, torch.ones(N, 1)], 1), torch.eye(F, F + 1) * ridge**0.5])
    solution = torch.linalg.lstsq(rows, torch.cat([y[washout:].flatten(0, 1), torch.zeros(F, y.shape[2])])).solution
    return solution[:-1].t(), solution[-1]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_fit_is_ridge_regression(double, monkeypatch):
    module = EchoStateNetwork(2, 30, 3, 2, generator=seeded())
    x, y = torch.randn(80, 2, 2), torch.randn(80, 2, 3)
    weight, bias = regression(module, x, y, 0.01, 7)
    state = module.fit(x, y, ridge=0.01, washout=7)
    torch.testing.assert_close((module.readout.weight, module.readout.bias), (weight, bias), check_dtype=False)
    torch.testing.assert_close(state, module(x)[1])
    whole = copy.deepcopy(module)
    whole.partial_fit(x, y, washout=7)
    whole.solve(3.0)
    monkeypatch.setattr(_echo_state, "_CHUNK", 5 * 2 * 60)
    part = module.partial_fit(x[:30], y[:30], washout=7)
    part = module.partial_fit(x[30:], y[30:], part)
    module.solve(3.0)
    torch.testing.assert_close(module.readout.weight, whole.readout.weight)
    module.solve(0.01)
    torch.testing.assert_close(module.readout.weight, weight, check_dtype=False)
    module.clear_fit()
    with pytest.raises(RuntimeError, match="needs partial_fit"):
        module.solve()


def test_fit_of_batch_first_and_float32():
    module = EchoStateNetwork(1, 40, 1, batch_first=True, generator=seeded())
    x = torch.sin(torch.arange(300) * 0.3 + torch.arange(2)[:, None]).unsqueeze(2)
    module.fit(x[:, :-1], x[:, 1:], ridge=1e-4, washout=30)
    torch.testing.assert_close(module(x[:, :-1])[0][:, 30:], x[:, 31:], rtol=0, atol=5e-3)


def test_the_readout_learns_by_gradients_too():
    module = EchoStateNetwork(2, 25, 1, generator=seeded())
    x = torch.randn(5, 3, 2, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None and module.readout.weight.grad is not None
    whole = EchoStateNetwork(2, 25, 1, dtype=torch.float64, generator=seeded())
    torch.autograd.gradcheck(lambda x: whole(x)[0], torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True))


def test_refusals():
    module = EchoStateNetwork(2, 25, 3, generator=seeded())
    x, y = torch.zeros(30, 1, 2), torch.zeros(30, 1, 3)
    with pytest.raises(ValueError, match="expected y to have shape"):
        module.fit(x, y[..., :2])
    with pytest.raises(ValueError, match="ridge to be greater than 0"):
        module.fit(x, y, ridge=0.0)
    with pytest.raises(TypeError, match="washout"):
        module.fit(x, y, washout=2.5)
    with pytest.raises(RuntimeError, match="singular"):
        module.fit(x, y, washout=30)


# ---- the literature's series ----


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("chaotic_series", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mackey_glass(example):
    """84 steps ahead, on its own output."""
    assert example.mackey_glass_error(1000, 6000, seed=0) <= 1e-3


def test_narma(example):
    """A mean square error of 0.04 of the variance."""
    assert example.narma_error(200, 6000, seed=0) <= 0.2
