"""seqaccel.data: truncated back-propagation, contiguous batches, sequenced-replacement sampling."""

import collections
import copy

import numpy as np
import pytest
import torch

import seqaccel
from seqaccel.data import ContiguousBatches, SequencedReplacementSampler, tbptt


@pytest.mark.parametrize("batch_first", [False, True])
def test_chunks_carry_the_state_and_cut_the_gradient(batch_first):
    torch.manual_seed(0)
    net = seqaccel.nn.LSTM(3, 4, 2, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(2, 10, 3, dtype=torch.float64) if batch_first else torch.randn(10, 2, 3, dtype=torch.float64)
    x.requires_grad_()
    dim = 1 if batch_first else 0
    chunks, parts = tbptt(x, 4, dim=dim), []
    for i, chunk in enumerate(chunks):
        y, chunks.state = net(chunk, chunks.state)
        assert not any(part.requires_grad for part in chunks.state)
        parts.append(y)
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        seen = gradient.abs().sum([d for d in range(3) if d != dim]).nonzero().flatten()
        assert seen.tolist() == list(range(4 * i, min(4 * i + 4, 10)))  # none before the chunk
    assert [part.shape[dim] for part in parts] == [4, 4, 2] and len(chunks) == 3
    torch.testing.assert_close(torch.cat(parts, dim), net(x)[0])


def test_chunks_of_inputs_and_targets_and_of_a_stack():
    x, target = torch.randn(7, 2, 3), torch.arange(14).view(7, 2)
    first, second = seqaccel.nn.GRU(3, 4), seqaccel.nn.SRU(4, 5)
    chunks = tbptt((x, target), 3, state={"first": None, "second": None})
    parts = []
    for part, wanted in chunks:
        assert part.shape[:2] == wanted.shape
        y, a = first(part, chunks.state["first"])
        y, b = second(y, chunks.state["second"])
        chunks.state = {"first": a, "second": b}
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), second(first(x)[0])[0])
    packed = torch.nn.utils.rnn.PackedSequence(torch.ones(2, 1, requires_grad=True), torch.tensor([2]))
    chunks.state = [packed, "a name"]
    assert isinstance(chunks.state[0], type(packed)) and not chunks.state[0].data.requires_grad
    assert chunks.state[1] == "a name"


@pytest.mark.parametrize("of", [torch.tensor, np.array])
def test_rows_go_on_where_they_ended(of):
    tokens = of(range(23))
    batches = ContiguousBatches(tokens, 3, 4)
    pairs = list(batches)
    assert len(pairs) == len(batches) == 2
    for b in range(3):
        row = torch.cat([x[b] for x, _ in pairs])
        assert row.tolist() == list(range(b * 7, b * 7 + 7))
        assert torch.cat([target[b] for _, target in pairs]).tolist() == (row + 1).tolist()
    for (x, target), (transposed, its_target) in zip(
        pairs, ContiguousBatches(tokens, 3, 4, time_first=True), strict=True
    ):
        assert torch.equal(transposed, x.t()) and torch.equal(its_target, target.t())
    assert len(list(batches)) == 2  # again from the start
    for _ in batches:
        break
    resumed = ContiguousBatches(tokens, 3, 4)
    resumed.load_state_dict(batches.state_dict())
    assert [x.tolist() for x, _ in resumed] == [pairs[1][0].tolist()]
    assert len(list(resumed)) == len(list(batches)) == 2


def test_a_text_larger_than_memory(tmp_path):
    np.arange(1000, dtype=np.uint8).tofile(tmp_path / "text")
    text = np.memmap(tmp_path / "text", np.uint8, "r+")
    x, target = next(iter(ContiguousBatches(text, 2, 5)))
    assert x.dtype == torch.uint8 and x.tolist() == [[0, 1, 2, 3, 4], [243, 244, 245, 246, 247]]
    assert target[0].tolist() == [1, 2, 3, 4, 5]


def by_definition(num_samples, batch_size, drawn):
    """Checks batches against a pool that is kept as a multiset."""
    pool, following = collections.Counter(range(num_samples)), 0
    for batch in drawn:
        assert not collections.Counter(batch) - pool  # drawn from the pool, without replacement
        pool -= collections.Counter(batch)
        for _ in batch:
            pool[following] += 1
            following = (following + 1) % num_samples
        assert sum(pool.values()) == num_samples


@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 3), (7, 7), (5, 1), (1, 1), (64, 5)])
def test_sequenced_replacement(num_samples, batch_size):
    sampler = SequencedReplacementSampler(num_samples, batch_size, generator=torch.Generator().manual_seed(1))
    drawn = [batch for _ in range(40) for batch in sampler]
    assert len(drawn) == 40 * len(sampler) and len(sampler) == -(-num_samples // batch_size)
    assert all(len(batch) == batch_size for batch in drawn)
    by_definition(num_samples, batch_size, drawn)


def test_draws_are_even():
    sampler = SequencedReplacementSampler(50, 5, generator=torch.Generator().manual_seed(2))
    counts = collections.Counter(i for _ in range(400) for batch in sampler for i in batch)
    # A sample's draws are its entries, 401 of them, less what of it the pool still holds.
    assert min(counts.values()) > 380 and max(counts.values()) <= 401
    first = collections.Counter(next(iter(SequencedReplacementSampler(4, 1)))[0] for _ in range(400))
    assert min(first[i] for i in range(4)) > 60  # without a generator, each has a seed of its own


def test_sampler_resumes_and_shares():
    def new(**options):
        return SequencedReplacementSampler(20, 2, generator=torch.Generator().manual_seed(3), **options)

    sampler = new()
    iterator = iter(sampler)
    for _ in range(13 - len(sampler)):
        next(iterator)
    state = copy.deepcopy(sampler.state_dict())
    rest, later = list(iterator), list(sampler)
    resumed = SequencedReplacementSampler(20, 2)
    resumed.load_state_dict(state)
    assert list(resumed) == rest and list(resumed) == later and len(rest) == 7
    ranks = [list(new(num_replicas=3, rank=rank)) for rank in range(3)]
    assert len(ranks[0]) == 4
    by_definition(20, 6, [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)])
    unseeded = [list(SequencedReplacementSampler(20, 2, num_replicas=3, rank=rank)) for rank in range(3)]
    by_definition(20, 6, [[*a, *b, *c] for a, b, c in zip(*unseeded, strict=True)])  # all ranks draw alike


def test_sampler_in_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.arange(10))
    loader = torch.utils.data.DataLoader(data, batch_sampler=SequencedReplacementSampler(10, 4))
    assert [len(batch) for (batch,) in loader] == [4, 4, 4] and len(loader) == 3


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tbptt(3, 1), TypeError, "tbptt: expected x to be a Tensor, but got int"),
        (lambda: tbptt((), 1), ValueError, "tbptt: expected x .* empty"),
        (lambda: tbptt(torch.ones(3), 0), ValueError, "tbptt: expected k to be at least 1"),
        (lambda: tbptt(torch.ones(3), 1, dim=1), ValueError, "tbptt: expected dim to be one of x"),
        (lambda: tbptt((torch.ones(3), torch.ones(4)), 1), ValueError, "as many steps each"),
        (lambda: ContiguousBatches(torch.ones(3, 2), 1, 1), ValueError, "tokens to be of one dimension"),
        (lambda: ContiguousBatches(torch.ones(3), 3, 1), ValueError, "more than 3 tokens"),
        (lambda: ContiguousBatches(torch.ones(3), 1, 1.5), TypeError, "steps to be an int"),
        (lambda: ContiguousBatches(torch.ones(9), 1, 2).load_state_dict({"next": 9}), ValueError, "batch 9"),
        (lambda: SequencedReplacementSampler(3, 4), ValueError, "at most num_samples"),
        (lambda: SequencedReplacementSampler(3, 0), ValueError, "batch_size to be at least 1"),
        (lambda: SequencedReplacementSampler(9, 1, num_replicas=2, rank=2), ValueError, "rank to be below"),
        (lambda: SequencedReplacementSampler(9, 1, generator=0), TypeError, "generator to be a torch.Generator"),
        (
            lambda: SequencedReplacementSampler(9, 1).load_state_dict(SequencedReplacementSampler(8, 1).state_dict()),
            ValueError,
            "a pool of 8 samples",
        ),
    ],
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
