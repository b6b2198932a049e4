"""Recurrences solved for all steps at once, against the step by step run."""

import pytest
import torch

import seqaccel
from seqaccel.functional import parallel_in_time

FLOAT64 = torch.float64
NETS = {
    "lstm": lambda **o: seqaccel.nn.LSTM(4, 6, dtype=FLOAT64, **o),
    "gru": lambda **o: seqaccel.nn.GRU(4, 6, dtype=FLOAT64, **o),
    "gru_reset_before": lambda **o: seqaccel.nn.GRU(4, 6, reset_after=False, dtype=FLOAT64, **o),
    "rnn": lambda **o: seqaccel.nn.RNN(4, 6, dtype=FLOAT64, **o),
    "rnn_relu": lambda **o: seqaccel.nn.RNN(4, 6, nonlinearity="relu", dtype=FLOAT64, **o),
    "torch_lstm": lambda **o: torch.nn.LSTM(4, 6, dtype=FLOAT64, **o),
}


def state_of(net, batch):
    h = torch.randn(net.num_layers, batch, 6, dtype=FLOAT64).tanh()
    return (h, torch.randn_like(h)) if isinstance(net, torch.nn.LSTM) or getattr(net, "cell", "") == "lstm" else h


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


@pytest.mark.parametrize(("layers", "bias", "batch_first", "chunk"), [(1, True, False, 8), (2, False, True, 64)])
@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients(name, layers, bias, batch_first, chunk):
    torch.manual_seed(1)
    net = NETS[name](num_layers=layers, bias=bias, batch_first=batch_first)
    x = torch.randn(*((3, 21, 4) if batch_first else (21, 3, 4)), dtype=FLOAT64, requires_grad=True)
    hx = state_of(net, 3)
    for part in flat(hx):
        part.requires_grad_()
    y, state, counts = parallel_in_time(net, x, 1e-13, hx, chunk=chunk)
    wanted, its_state = net(x, hx)
    torch.testing.assert_close([y, *flat(state)], [wanted, *flat(its_state)], rtol=1e-9, atol=1e-11)
    assert len(counts) == layers and all(1 < each.sweeps <= 21 for each in counts)
    operands = [x, *flat(hx), *net.parameters()]
    factors = [torch.randn_like(t) for t in (y, *flat(state))]
    grads = [
        torch.autograd.grad(sum((t * f).sum() for t, f in zip(ts, factors, strict=True)), operands)
        for ts in ((y, *flat(state)), (wanted, *flat(its_state)))
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


def test_sweeps_do_not_grow_with_the_length():
    torch.manual_seed(2)
    net = seqaccel.nn.LSTM(4, 16)
    counts = []
    with torch.no_grad():
        for length in (256, 1024):
            x = torch.randn(length, 1, 4)
            y, _, (count,) = parallel_in_time(net, x, 1e-6)
            torch.testing.assert_close(y, net(x)[0], rtol=0, atol=1e-5)
            counts.append(count.sweeps)
        loose = parallel_in_time(net, x, 1e-2)[2][0].sweeps
    assert counts[1] < counts[0] + 5 < 60 and loose < counts[1]


def test_chunks_that_do_not_certify_run_again(monkeypatch):
    """A net that remembers for ever and amplifies, stopped after too few sweeps."""
    torch.manual_seed(3)
    net = seqaccel.nn.RNN(4, 6, dtype=FLOAT64)
    with torch.no_grad():
        torch.nn.init.orthogonal_(net.weight_hh_l0).mul_(1.5)
    x = torch.randn(40, 2, 4, dtype=FLOAT64)
    module = __import__("sys").modules["seqaccel.functional.rnn.parallel_in_time"]
    gaps = module._gap
    asked = []

    def three_sweeps(a, b):  # what the sweeps ask first; the third is told that it converged
        asked.append(1)
        return 0.0 if len(asked) == 3 else gaps(a, b)

    monkeypatch.setattr(module, "_gap", three_sweeps)
    with torch.no_grad():
        y, h_n, (count,) = parallel_in_time(net, x, 1e-9, chunk=7)
        wanted = net(x)
    assert count == (3, 5)  # all chunks but the first
    torch.testing.assert_close((y, h_n), wanted)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda net, x: parallel_in_time(torch.nn.Linear(4, 6), x, 1e-6), TypeError, "RNN, LSTM or GRU"),
        (lambda net, x: parallel_in_time(net, x, -1.0), ValueError, "tolerance to be at least 0"),
        (lambda net, x: parallel_in_time(net, x[0], 1e-6), ValueError, r"x to be \(T, B, 4\)"),
        (lambda net, x: parallel_in_time(net, x[..., :3], 1e-6), ValueError, r"x to be \(T, B, 4\)"),
        (lambda net, x: parallel_in_time(net, x, 1e-6, chunk=0), ValueError, "chunk to be at least 1"),
        (lambda net, x: parallel_in_time(net, x, 1e-6, torch.ones(1, 1, 6)), TypeError, "hx"),
        (lambda net, x: parallel_in_time(net, x, 1e-6, (torch.ones(1, 1, 6),) * 2), ValueError, "expected hx of"),
        (lambda net, x: parallel_in_time(torch.nn.GRU(4, 6, bidirectional=True), x, 1e-6), ValueError, "one direction"),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call(NETS["lstm"](), torch.ones(5, 2, 4, dtype=FLOAT64))
