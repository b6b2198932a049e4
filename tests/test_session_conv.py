"""Sessions of convolutional networks: rings, residuals, streams of different ages."""

import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from instruction_sets import NARROW_ISAS, isa_fixture
from tolerances import assert_close

import seqaccel
from seqaccel import nn
from seqaccel.nn.conv import TemporalBlock

isa = isa_fixture(NARROW_ISAS)

NETWORKS = {
    "dense": lambda: nn.CausalConv1d(5, 70, 3, dilation=4, activation="relu"),
    "depthwise": lambda: nn.CausalConv1d(19, 19, 4, dilation=2, groups=19, activation="silu"),
    "grouped": lambda: nn.CausalConv1d(6, 9, 4, dilation=2, groups=3, bias=False, activation="tanh"),
    "one_tap": lambda: nn.CausalConv1d(4, 4, 1, groups=4, activation="sigmoid"),
    "block": lambda: TemporalBlock(7, 19, 3, dilation=2),
    "tcn": lambda: nn.TCN(5, [8, 8, 33], 3),
    "deep": lambda: nn.TCN(8, [8] * 7, 2),
    "leaky_relu": lambda: nn.CausalConv1d(5, 38, 3, activation="leaky_relu"),
    "gated": lambda: nn.CausalConv1d(5, 38, 3, dilation=2, activation="gated"),
    "glu_grouped": lambda: nn.CausalConv1d(6, 12, 3, groups=2, activation="glu"),
    "stack": lambda: torch.nn.Sequential(
        nn.CausalConv1d(5, 40, 3), torch.nn.GELU(), nn.CausalConv1d(40, 40, 3, dilation=9), torch.nn.LeakyReLU()
    ),
}


def case(network, batch_size, steps=160):
    torch.manual_seed(len(network) + batch_size)
    module = NETWORKS[network]().eval()
    first = module[0] if isinstance(module, torch.nn.Sequential) else module
    channels = {nn.TCN: "num_inputs", nn.CausalConv1d: "in_channels"}.get(type(first))
    x = torch.randn(batch_size, getattr(first, channels) if channels else 7, steps)
    with torch.no_grad(), seqaccel.backend("reference"):
        wanted = module.double()(x.double())
    return module.float(), x, wanted


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("network", NETWORKS)
def test_steps_and_chunks_give_what_the_network_gives(network, weights, isa, poison):
    for batch_size in (1, 3, 40):
        module, x, wanted = case(network, batch_size)
        session = seqaccel.Session(module, batch_size, weights)
        parts = [
            session.step(x[..., 0].contiguous())[..., None],
            session.extend(x[..., 1:1]),
            session.extend(x[..., 1:9]),
        ]
        parts += [session.step(x[..., t].contiguous())[..., None] for t in range(9, 30)]
        saved = session.state_dict()
        parts.append(session.extend(x[..., 30:]))
        assert_close(torch.cat(parts, -1), wanted, f"session_{weights}", torch.float32)
        session.load_state_dict(saved)
        assert torch.equal(session.extend(x[..., 30:]), parts[-1])


TRANSPOSED = {
    "alone": (lambda: nn.CausalConvTranspose1d(6, 9, 7, stride=3, activation="silu"), (0, 1, 2)),
    "grouped": (lambda: nn.CausalConvTranspose1d(6, 8, 5, stride=2, dilation=4, groups=2, bias=False), (0, 1, 2)),
    "gated": (lambda: nn.CausalConvTranspose1d(6, 8, 3, stride=4, activation="gated"), (0, 1, 2)),
    "without a stride": (lambda: nn.CausalConvTranspose1d(6, 8, 3), (0, 1, 2)),
    "decoder": (
        lambda: torch.nn.Sequential(
            nn.CausalConv1d(6, 9, 3, activation="relu"), nn.CausalConvTranspose1d(9, 2, 4, stride=2)
        ),
        (0, 1, 2),
    ),
    "behind a linear layer": (
        lambda: torch.nn.Sequential(torch.nn.Linear(6, 9), nn.CausalConvTranspose1d(9, 2, 4, stride=2)),
        (2, 0, 1),
    ),
}


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_give_their_outputs_of_a_step_at_once(name, weights, isa, poison):
    """``dims`` puts (B, C, T) into the order of the session's chunks."""
    make, dims = TRANSPOSED[name]
    back = tuple(dims.index(i) for i in range(3))
    torch.manual_seed(len(name))
    module, x = make(), torch.randn(3, 6, 24)
    *first, last = module if isinstance(module, torch.nn.Sequential) else [module]
    wanted = x.double()
    for layer in [m.double() for m in first]:
        wanted = layer(wanted.transpose(1, 2)).transpose(1, 2) if isinstance(layer, torch.nn.Linear) else layer(wanted)
    with torch.no_grad(), seqaccel.backend("reference"):
        wanted = last.double()(wanted)
    session = seqaccel.Session(module.float(), 3, weights)
    parts = [session.step(x[..., 0].contiguous()), session.extend(x[..., 1:9].permute(dims)).permute(back)]
    parts[0] = parts[0] if parts[0].dim() == 3 else parts[0].unsqueeze(-1)
    saved = session.state_dict()
    parts.append(session.extend(x[..., 9:].permute(dims)).permute(back))
    assert_close(torch.cat(parts, -1), wanted, f"session_{weights}", torch.float32)
    session.load_state_dict(saved)
    assert torch.equal(session.extend(x[..., 9:].permute(dims)).permute(back), parts[-1])
    again = pickle.loads(pickle.dumps(session))
    assert torch.equal(again.step(x[..., 0].contiguous()), session.step(x[..., 0].contiguous()))


def test_nothing_follows_a_transposed_convolution():
    with pytest.raises(TypeError, match="must come last"):
        seqaccel.Session(torch.nn.Sequential(nn.CausalConvTranspose1d(6, 9, 4, stride=2), torch.nn.ReLU()))


def test_the_state_is_the_modules_own():
    module, x, _ = case("dense", 3)
    session, state = seqaccel.Session(module, 3), module.init_state(3)
    for chunk in x.split(7, -1):
        session.extend(chunk)
        _, state = module.extend(chunk, state)
        assert torch.equal(session.state_dict()["history"], state[0])


def test_streams_of_different_ages():
    module, x, _ = case("tcn", 3)
    session = seqaccel.Session(module, 3)
    session.extend(x[..., :50])
    session.reset(torch.tensor([False, True, False]))
    session.select(torch.tensor([0, 1, 0]))
    y = session.extend(x[..., 50:])
    with torch.no_grad():
        whole = module(x)[..., 50:]
        fresh = module(x[..., 50:])
        joined = module(torch.cat([x[:1, :, :50], x[2:, :, 50:]], -1))[..., 50:]
    torch.testing.assert_close(y, torch.cat([whole[:1], fresh[1:2], joined]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TCN(6, [9, 9], 3),
        lambda: torch.nn.Sequential(nn.LSTM(6, 9), torch.nn.Linear(9, 4)),
        lambda: nn.GRU(6, 9, num_layers=2),
        lambda: nn.SRU(6, 9),
        lambda: nn.LayerNormLSTM(6, 9),
    ],
    ids=["tcn", "lstm", "gru", "sru", "layer_norm_lstm"],
)
def test_a_stream_without_an_input_keeps_its_state(make, steps):
    """Where every stream gets its own inputs in the end, it gets its own outputs, whenever they come."""
    module = make().eval()
    session, alone = seqaccel.Session(module, 3), seqaccel.Session(module, 3)
    first = isinstance(module, nn.TCN)
    x = torch.randn(3, 6, 8 * steps) if first else torch.randn(8 * steps, 3, 6)
    dim = -1 if first else 0
    wanted = alone.extend(x).split(steps, dim)
    chunks, done = x.split(steps, dim), [0, 0, 0]
    generator = torch.Generator().manual_seed(0)
    while min(done) < 8:
        advance = (torch.rand(3, generator=generator) < 0.5) & torch.tensor([d < 8 for d in done])
        rows = [chunks[min(d, 7)].select(0 if first else 1, b) for b, d in enumerate(done)]
        given = torch.stack(rows, 0 if first else 1)
        if steps == 1:
            y = session.step(given.squeeze(dim).contiguous(), advance=advance).unsqueeze(dim)
        else:
            y = session.extend(given, advance=advance)
        for b in range(3):
            row = y.select(0 if first else 1, b)
            if advance[b]:
                torch.testing.assert_close(row, wanted[done[b]].select(0 if first else 1, b), rtol=1e-5, atol=1e-6)
                done[b] += 1
            else:
                assert not row.any()


def test_advance_must_fit():
    session = seqaccel.Session(nn.TCN(6, [9], 3).eval(), 3)
    with pytest.raises((TypeError, ValueError), match="advance"):
        session.step(torch.randn(3, 6), advance=torch.tensor([True]))
    with pytest.raises(ValueError, match="x: expected shape"):
        session.extend(torch.randn(3, 5, 4))


def test_two_threads_go_on_where_other_processes_hold_the_cores():
    session, threads = seqaccel.Session(nn.TCN(96, [96] * 4, 3).eval()), torch.get_num_threads()
    x = torch.randn(1, 96)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        torch.set_num_threads(2)
        begin = time.perf_counter()
        for _ in range(500):
            session.step(x)
        assert time.perf_counter() - begin < 30
    finally:
        torch.set_num_threads(threads)
        for other in others:
            other.kill()
            other.wait()
