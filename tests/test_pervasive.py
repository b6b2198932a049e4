"""Pervasive attention against the network of the paper built from torch.nn; its streaming; beam search."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import seqaccel
from seqaccel import nn

SOURCE, TARGET, WIDTH = 11, 9, 6


def model(**options):
    torch.manual_seed(3)
    options = {"num_layers": 3, "growth_rate": 5, "kernel_size": 5, "dropout": 0.0} | options
    made = nn.PervasiveAttention(SOURCE, TARGET, WIDTH, **options).double()
    for parameter in made.parameters():  # gains and biases too
        torch.nn.init.normal_(parameter, 0.1, 0.4)
    return made


def tokens(batch=3, source=7, target=6):
    torch.manual_seed(1)
    return torch.randint(SOURCE, (batch, source)), torch.randint(TARGET, (batch, target))


def published(m, source, target, pooling, lengths):
    """The paper's equations on (B, C, T, S) with torch.nn's operators; the kernel is square and masked."""

    def norm(x, layer):
        if isinstance(layer, torch.nn.BatchNorm1d):
            return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training)
        centred = x - x.mean(1, keepdim=True)
        gain, bias = layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1)
        return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * gain + bias

    counts = (torch.arange(source.shape[1]) < lengths[:, None]).double()[:, None, None]
    grid = torch.cat(
        [
            m.source_embedding(source).mT[:, :, None].expand(-1, -1, target.shape[1], -1),
            m.target_embedding(target).mT[:, :, :, None].expand(-1, -1, -1, source.shape[1]),
        ],
        1,
    )
    x = F.conv2d(grid, torch.cat([m.source_projection.weight, m.target_projection.weight], 1)[:, :, None, None])
    for layer in m.layers:
        h = torch.relu(norm(x, layer.norm1))
        h = torch.relu(norm(F.conv2d(h, layer.reduce.weight[:, :, None, None]), layer.norm2)) * counts
        size = layer.conv.weight.shape[3]
        square = F.pad(layer.conv.weight, (0, 0, 0, size // 2))  # the rows after the present are zero
        x = torch.cat([x, F.conv2d(h, square, layer.conv.bias, padding=size // 2)], 1)
    x = torch.relu(norm(x, m.norm))
    if pooling == "max":
        pooled = x.masked_fill(counts == 0, -torch.inf).amax(3)
    else:
        n = lengths.double().view(-1, 1, 1)
        pooled = (x * counts).sum(3) / (n if pooling == "mean" else n.sqrt())
    return pooled.mT @ m.output.weight.T + m.output.bias


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
def test_outputs_and_gradients_of_the_paper(pooling, norm):
    m, (source, target) = model(pooling=pooling, norm=norm), tokens()
    lengths = torch.tensor([7, 2, 5])
    mask = torch.arange(7) >= lengths[:, None]
    m.train(norm == "layer")
    y, wanted = m(source, target, mask), published(m, source, target, pooling, lengths)
    torch.testing.assert_close(y, wanted)
    weights = torch.randn_like(y)
    parameters = list(m.parameters())
    given = torch.autograd.grad((y * weights).sum(), parameters)
    for gradient, right in zip(given, torch.autograd.grad((wanted * weights).sum(), parameters), strict=True):
        torch.testing.assert_close(gradient, right)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_output_sees_no_later_target(backend):
    m, (source, target) = model(max_positions=8), tokens()
    with seqaccel.backend(backend):
        y = m(source, target)
        for t in range(target.shape[1]):
            changed = target.clone()
            changed[:, t] = (changed[:, t] + 1) % TARGET
            moved = (m(source, changed) != y).flatten(2).any(2)
            assert not moved[:, :t].any() and moved[:, t].all()


def test_padding_changes_nothing():
    m, (source, target) = model(max_positions=12), tokens()
    mask = torch.arange(10)[None] >= torch.tensor([7, 7, 7])[:, None]
    longer = torch.cat([source, torch.randint(SOURCE, (3, 3))], 1)
    torch.testing.assert_close(m(longer, target, mask), m(source, target))
    assert m(source, target, torch.ones(3, 7, dtype=torch.bool)).isfinite().all()  # no source at all


def test_any_split_gives_what_one_call_gives():
    m, (source, target) = model(max_positions=8).eval(), tokens()
    mask = torch.arange(7) >= torch.tensor([7, 4, 6])[:, None]
    wanted = m(source, target, mask)
    for cut in range(target.shape[1] + 1):
        state = m.init_state(source, mask)
        first, state = m.extend(target[:, :cut], state)
        parts = [first]
        for t in range(cut, target.shape[1]):
            y, state = m.step(target[:, t], state)
            parts.append(y[:, None])
        torch.testing.assert_close(torch.cat(parts, 1), wanted)


def test_streams_of_different_age():
    m, (source, target) = model(max_positions=8).eval(), tokens()
    wanted = m(source, target)
    _, state = m.extend(target[:, :2], m.init_state(source))
    state = m.reset(state, torch.tensor([False, True, False]))
    state = m.select(state, torch.tensor([2, 1]))
    mixed = torch.stack([target[2, 2:5], target[1, :3]])
    y, _ = m.extend(mixed, state)
    torch.testing.assert_close(y[0], wanted[2, 2:5])
    torch.testing.assert_close(y[1], wanted[1, :3])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_beam_search_finds_the_likeliest(penalty):
    m, (source, _) = model().eval(), tokens(2)
    end, longest, vocabulary = 4, 3, range(TARGET)
    start = torch.tensor([0, 1])
    # A beam that drops nothing finds the best of all sequences.
    found, scores = nn.decoding.beam_search(
        m, m.init_state(source), start, end=end, max_length=longest, beam_size=TARGET**2, length_penalty=penalty
    )
    for b in range(2):
        best = (-math.inf, ())
        for n in range(1, longest + 1):
            for sequence in itertools.product(vocabulary, repeat=n):
                if end in sequence[:-1] or (n < longest and sequence[-1] != end):
                    continue
                best = max(best, (float(log_probability(m, source[b], start[b], sequence)) / n**penalty, sequence))
        assert scores[b].item() == pytest.approx(best[0], abs=1e-5)
        assert tuple(found[b, : len(best[1])].tolist()) == best[1]
        assert (found[b, len(best[1]) :] == end).all()


CACHE: dict = {}


def log_probability(m, source, start, sequence):
    key = (tuple(source.tolist()), int(start))
    if key not in CACHE:  # of every prefix of two tokens
        pairs = torch.cartesian_prod(torch.arange(TARGET), torch.arange(TARGET))
        prefix = torch.cat([start.expand(len(pairs), 1), pairs], 1)
        with torch.no_grad():
            CACHE[key] = m(source.expand(len(pairs), -1), prefix).log_softmax(-1).view(TARGET, TARGET, 3, TARGET)
    table, (a, b) = CACHE[key], (*sequence, 0, 0)[:2]
    return sum(table[a, b, t, token] for t, token in enumerate(sequence))


def test_greedy_search_takes_the_likeliest_token():
    m, (source, _) = model().eval(), tokens()
    state, token, wanted = m.init_state(source), torch.zeros(3).long(), []
    found, _ = nn.decoding.beam_search(m, state, token, end=SOURCE - 3, max_length=5)
    for _ in range(5):
        logits, state = m.step(token, state)
        token = logits.argmax(-1)
        wanted.append(token)
    wanted = torch.stack(wanted, 1)
    done = (wanted == SOURCE - 3).cumsum(1) - (wanted == SOURCE - 3).long() > 0
    wanted = wanted.masked_fill(done, SOURCE - 3)[:, : found.shape[1]]
    assert torch.equal(found, wanted)


def test_compiled():
    m, (source, target) = model(max_positions=8).eval(), tokens()
    torch.testing.assert_close(torch.compile(m, fullgraph=True, backend="aot_eager")(source, target), m(source, target))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kernel_size": 4}, "kernel_size"),
        ({"pooling": "median"}, "pooling"),
        ({"norm": "group"}, "norm"),
        ({"num_layers": 0}, "num_layers"),
        ({"dropout": 2.0}, "dropout"),
        ({"max_positions": 0}, "max_positions"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        model(**options)


def test_bad_arguments_are_named():
    m, (source, target) = model(max_positions=7), tokens()
    with pytest.raises(ValueError, match="target"):
        m(source, target.float())
    with pytest.raises(ValueError, match="target to have a batch of 3"):
        m(source, target[:2])
    with pytest.raises(ValueError, match="source_padding_mask"):
        m(source, target, torch.zeros(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="max_positions=7"):
        m(source.repeat(1, 2), target)
    with pytest.raises(TypeError, match="state"):
        m.extend(target, (source,))
    with pytest.raises(ValueError, match="target_t"):
        m.step(target, m.init_state(source))
    for name, value in (("end", 99), ("max_length", 0), ("beam_size", 0), ("start", target)):
        arguments = {"start": target[:, 0], "end": 1, "max_length": 3, "beam_size": 1} | {name: value}
        start = arguments.pop("start")
        with pytest.raises(ValueError, match=name):
            nn.decoding.beam_search(m, m.init_state(source), start, **arguments)
