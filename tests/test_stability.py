"""Stable recurrent nets: projections, proven bounds, evaluation from the latest inputs."""

import pytest
import torch
from torch.nn.utils import parametrize

import seqaccel
from seqaccel.functional import truncated
from seqaccel.functional.rnn import stability
from seqaccel.nn.utils import contraction_factor, stabilize_, stabilize_after, stable, truncation_error

FLOAT64 = torch.float64
NETS = {
    "rnn": lambda **o: seqaccel.nn.RNN(5, 7, dtype=FLOAT64, **o),
    "rnn_relu": lambda **o: seqaccel.nn.RNN(5, 7, nonlinearity="relu", dtype=FLOAT64, **o),
    "lstm": lambda **o: seqaccel.nn.LSTM(5, 7, dtype=FLOAT64, **o),
    "gru": lambda **o: seqaccel.nn.GRU(5, 7, dtype=FLOAT64, **o),
    "gru_reset_before": lambda **o: seqaccel.nn.GRU(5, 7, reset_after=False, dtype=FLOAT64, **o),
    "torch_lstm": lambda **o: torch.nn.LSTM(5, 7, dtype=FLOAT64, **o),
}


def stabilized(name, input_bound, **options):
    net = NETS[name](**options)
    if name.startswith(("lstm", "torch")):
        return stabilize_(net, input_bound=input_bound)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 0.15 if name.startswith("gru") else 0.5
    return net


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_bounds_hold(name, layers):
    """Against states as far off as they can be, and inputs of the largest size, found by following the gradient."""
    torch.manual_seed(1)
    net = stabilized(name, 1.5, num_layers=layers)
    factor = contraction_factor(net, input_bound=1.5)
    assert 0 < factor < 1
    k, x = 6, (torch.rand(30, 8, 5, dtype=FLOAT64) * 3 - 1.5)
    warm = x[:-k].clone().requires_grad_()
    for _ in range(15):  # inputs before the window that move its last output the most
        y = net(torch.cat([warm, x[-k:]]))[0][-1]
        distance = (y - net(x[-k:])[0][-1]).abs().max()
        (gradient,) = torch.autograd.grad(distance, warm)
        warm = (warm + gradient / gradient.abs().max().clamp(min=1e-30)).clamp(-1.5, 1.5).detach().requires_grad_()
    errors = stability._Errors("test", net, 1.5)
    bounds = [errors.step() for _ in range(1000)]
    assert 0 < distance.item() <= bounds[k - 1] == truncation_error(net, k, input_bound=1.5)
    # In the long run the bound falls by the factor at every step; layers multiply it by powers of the step's number.
    last = next((i for i, bound in enumerate(bounds) if bound < 1e-12), 999)
    assert bounds[last] / bounds[last - 1] == pytest.approx(factor, rel=0.05)


def test_factor_of_each_cell_by_hand():
    rnn = seqaccel.nn.RNN(1, 1, dtype=FLOAT64)
    lstm, gru = seqaccel.nn.LSTM(1, 1, bias=False, dtype=FLOAT64), seqaccel.nn.GRU(1, 1, bias=False, dtype=FLOAT64)
    with torch.no_grad():
        rnn.weight_hh_l0.fill_(-0.3)
        for net in (lstm, gru):
            net.weight_ih_l0.zero_()
        lstm.weight_hh_l0.copy_(torch.tensor([[0.2], [0.0], [0.1], [0.4]]))
        gru.weight_hh_l0.copy_(torch.tensor([[0.4], [0.0], [0.2]]))
    assert contraction_factor(rnn) == pytest.approx(0.3)
    # f = 1/2, c at most 2: e_c = e_c/2 + (0.1 + 0.2/4) e_h; e_h = e_c + 0.4/4 e_h of before
    matrix = torch.tensor([[0.5, 0.15], [0.5, 0.25]], dtype=FLOAT64)
    assert contraction_factor(lstm) == pytest.approx(float(torch.linalg.eigvals(matrix).abs().max()))
    # z = 1/2: e_h = e_h/2 + (0.2 + 0.2/4 * 0.4) e_h/2
    assert contraction_factor(gru) == pytest.approx(0.5 + 0.5 * (0.2 + 0.02))


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["rnn", "rnn_relu", "lstm", "torch_lstm"])
def test_projection(name, bidirectional):
    torch.manual_seed(2)
    net = NETS[name](num_layers=2, bidirectional=bidirectional)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 4
    assert contraction_factor(net, input_bound=2.0) > 1
    before = [p.clone() for p in net.parameters()]
    assert stabilize_(net, input_bound=2.0) is net
    assert contraction_factor(net, input_bound=2.0) < 1
    once = [p.clone() for p in net.parameters()]
    stabilize_(net, input_bound=2.0)
    for first, second, old in zip(once, net.parameters(), before, strict=True):
        torch.testing.assert_close(first, second)  # what is stable stays as it is
        assert (torch.isfinite(first).all() and (first.abs() <= old.abs() + 1e-12).all()) or "rnn" in name
    half = stabilize_(torch.nn.Sequential(NETS[name]().to(torch.bfloat16)), forget=0.7)
    assert contraction_factor(half[0]) < 1


def test_hook_and_parametrization():
    torch.manual_seed(3)
    x = torch.randn(6, 2, 5, dtype=FLOAT64)
    for name in ("rnn", "lstm"):
        net = NETS[name]()
        optimizer = torch.optim.SGD(net.parameters(), lr=50)
        handle = stabilize_after(optimizer, net)
        assert contraction_factor(net) < 1
        net(x)[0].sum().backward()
        optimizer.step()
        assert contraction_factor(net) < 1
        handle.remove()
        optimizer.step()
        assert contraction_factor(net) > 1

        stable(net)
        y = net(x)[0]
        assert contraction_factor(net) < 1
        y.sum().backward()
        assert net.parametrizations.weight_hh_l0.original.grad.abs().sum() > 0
        weight = net.weight_hh_l0.detach()
        parametrize.remove_parametrizations(net, "weight_hh_l0")
        torch.testing.assert_close(net.weight_hh_l0.detach(), weight)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "layer_norm_lstm", "torch_lstm"])
def test_truncated_by_definition(name, batch_first):
    torch.manual_seed(4)
    other = {"layer_norm_lstm": lambda **o: seqaccel.nn.LayerNormLSTM(5, 7, dtype=FLOAT64, **o)}
    net = (NETS | other)[name](num_layers=2, batch_first=batch_first)
    dim = 1 if batch_first else 0
    x = torch.randn(*((2, 11, 5) if batch_first else (11, 2, 5)), dtype=FLOAT64)

    def last(begin, end):
        return net(x.narrow(dim, begin, end - begin))[0].select(dim, end - begin - 1)

    for k in (1, 2, 4, 11, 20):
        wanted = torch.stack([last(max(0, t - k + 1), t + 1) for t in range(11)], dim)
        torch.testing.assert_close(truncated(net, x, k), wanted)
        for chunk in (1, 3, 4, 30):
            starts = [max(0, t - k) // chunk * chunk for t in range(11)]  # the first chunk is k + chunk long
            wanted = torch.stack([last(start, t + 1) for t, start in enumerate(starts)], dim)
            torch.testing.assert_close(truncated(net, x, k, chunk), wanted)


def test_windows_in_parts_and_gradients(monkeypatch):
    torch.manual_seed(5)
    net, x = NETS["lstm"](), torch.randn(9, 2, 5, dtype=FLOAT64)
    whole = truncated(net, x, 3)
    monkeypatch.setattr(stability, "GROUP", 3 * 7 * 4)  # four windows at a time
    torch.testing.assert_close(truncated(net, x, 3), whole)
    x = torch.randn(5, 1, 5, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: truncated(net, x, 2), x)
    assert torch.autograd.gradcheck(lambda x: truncated(net, x, 1, 2), x)


@pytest.mark.parametrize("name", ["rnn", "rnn_relu", "lstm", "gru"])
def test_tolerance_chooses_k(name):
    torch.manual_seed(6)
    x = torch.randn(500, 1, 5, dtype=FLOAT64)
    net = stabilized(name, float(x.abs().max()), num_layers=2)
    with torch.no_grad():
        exact = net(x)[0]
        for tolerance in (1e-2, 1e-5):
            for chunk in (None, 50):
                assert (truncated(net, x, chunk=chunk, tolerance=tolerance) - exact).abs().max() <= tolerance
        k = stability._steps_for(net, x, 1e-5)
    bound = float(x.abs().max())
    assert truncation_error(net, k, input_bound=bound) <= 1e-5 < truncation_error(net, k - 1, input_bound=bound)
    assert torch.equal(truncated(net, x, tolerance=0.0), exact)  # no fewer than all


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: contraction_factor(torch.nn.Linear(1, 1)), TypeError, "RNN, LSTM or GRU, but got Linear"),
        (lambda: contraction_factor(seqaccel.nn.PeepholeLSTM(1, 1)), TypeError, "but got PeepholeLSTM"),
        (lambda: contraction_factor(torch.nn.LSTM(2, 2, proj_size=1)), ValueError, "proj_size"),
        (lambda: contraction_factor(seqaccel.nn.LSTM(2, 2, zoneout=0.1)), ValueError, "zoneout"),
        (lambda: contraction_factor(torch.nn.RNN(1, 1), input_bound=-1), ValueError, "input_bound to be at least 0"),
        (lambda: truncation_error(torch.nn.RNN(1, 1), 0), ValueError, "k to be at least 1"),
        (lambda: stabilize_(torch.nn.GRU(1, 1)), TypeError, "an RNN or LSTM, but got GRU"),
        (lambda: stabilize_(torch.nn.Linear(1, 1)), ValueError, "has no RNN or LSTM"),
        (lambda: stabilize_(3), TypeError, "torch.nn.Module, but got int"),
        (lambda: stabilize_(torch.nn.LSTM(1, 1), forget=0.5), ValueError, "forget to be at least 0.56"),
        (lambda: stabilize_(torch.nn.LSTM(1, 1), forget=1), ValueError, "forget to be between 0 and 1"),
        (lambda: stabilize_(stable(torch.nn.RNN(1, 1))), ValueError, "weight_hh_l0 is parametrized"),
        (lambda: stabilize_after(3, torch.nn.RNN(1, 1)), TypeError, "optimizer to be an Optimizer"),
        (lambda: truncated(torch.nn.RNN(1, 1), torch.ones(3, 1), 1), ValueError, "x to be 3-D"),
        (lambda: truncated(torch.nn.RNN(1, 1), torch.ones(3, 1, 1)), ValueError, "one of k and tolerance"),
        (lambda: truncated(torch.nn.RNN(1, 1), torch.ones(3, 1, 1), 0), ValueError, "k to be at least 1"),
        (lambda: truncated(torch.nn.RNN(1, 1), torch.ones(3, 1, 1), 1, 0), ValueError, "chunk to be at least 1"),
        (
            lambda: truncated(torch.nn.RNN(1, 1, bidirectional=True), torch.ones(3, 1, 1), 1),
            ValueError,
            "needs the whole sequence",
        ),
        (
            lambda: truncated(torch.nn.LSTM(9, 9), torch.ones(3, 1, 9), tolerance=1e-3),
            ValueError,
            "not proven stable; give k",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
