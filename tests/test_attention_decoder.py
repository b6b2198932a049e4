"""Attention decoders: the recurrence on every backend, modules against a loop of torch.nn.LSTMCell, streams, beams."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from instruction_sets import ISAS, isa_fixture
from tolerances import assert_close
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import seqaccel
from seqaccel import nn
from seqaccel.functional import attention_lstm

NAMES = ("output", "h_n", "c_n", "context", "weights")

# B, T, S, I, H, A, M; additive, projected queries, mask, lengths
CASES = [
    ((1, 1, 1, 1, 1, 1, 1), True, True, False, False),
    ((3, 5, 7, 3, 5, 6, 4), True, True, True, True),
    ((2, 3, 70, 4, 33, 40, 17), False, True, True, False),
    ((2, 3, 70, 4, 33, 33, 130), False, False, False, True),
    ((50, 4, 9, 8, 20, 16, 5), True, True, False, False),
    ((6, 12, 5, 3, 18, 18, 40), True, False, True, True),
]


@functools.cache
def problem(case):
    (B, T, S, I, H, A, M), additive, projected, masked, ragged = case
    torch.manual_seed(7)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, dtype=torch.float64) * scale

    tensors = {
        "input": draw(B, T, I),
        "key": draw(B, S, A),
        "value": draw(B, S, M),
        "weight_ih": draw(4 * H, I + M, scale=(I + M) ** -0.5),
        "weight_hh": draw(4 * H, H, scale=H**-0.5),
        "bias_ih": draw(4 * H),
        "h_0": draw(B, H),
        "c_0": draw(B, H),
    }
    if projected:
        tensors |= {"query_weight": draw(A, H, scale=H**-0.5), "query_bias": draw(A)}
    if additive:
        tensors["score_weight"] = draw(A, scale=A**-0.5)
    mask = torch.rand(B, S) < 0.6 if masked else None
    if mask is not None:
        mask[0] = False  # a source without keys
    lengths = torch.randint(1, T + 1, (B,)) if ragged else None
    return tensors, {"mask": mask, "lengths": lengths}


def called(tensors, options):
    h_0, c_0, *_ = (tensors[name] for name in ("h_0", "c_0"))
    given = {name: t for name, t in tensors.items() if name not in ("h_0", "c_0")}
    output, (h_n, c_n), context, weights = attention_lstm(state=(h_0, c_0), **given, **options)
    return output, h_n, c_n, context, weights


def with_grads(tensors, options, dtype):
    leaves = {name: t.to(dtype).clone().requires_grad_() for name, t in tensors.items()}
    results = called(leaves, options)
    torch.manual_seed(1)
    grads = [torch.randn(t.shape, dtype=torch.float64).to(dtype) for t in results]
    return results, torch.autograd.grad(results, list(leaves.values()), grads)


@functools.cache
def solved(case):
    with seqaccel.backend("reference"):
        return with_grads(*problem(case), torch.float64)


isa = isa_fixture(ISAS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_forward_and_gradients(isa, poison, case, dtype):
    tensors, options = problem(case)
    expected, expected_grads = solved(case)
    with seqaccel.backend("cpp"):
        found, grads = with_grads(tensors, options, dtype)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert_close(a, b, "attention", dtype, what=name)
    for name, a, b in zip(tensors, grads, expected_grads, strict=True):
        if b.abs().max() > 1e-12:  # a gradient that is 0 in exact arithmetic has no scale
            assert_close(a, b, "attention_decoder", dtype, backward=True, what=f"gradient of {name}")


@pytest.mark.parametrize("size", [15.0, 200.0])
@pytest.mark.parametrize("name", ["key", "query_bias"])
def test_queries_and_keys_of_any_size(isa, poison, name, size):
    """Up to a size tanh comes from exponentials; those of larger arguments would overflow."""
    tensors, options = problem(CASES[4])
    large = tensors[name].clone()
    large[1], large[2] = size, -size
    tensors = tensors | {name: large}
    with seqaccel.backend("reference"):
        expected, expected_grads = with_grads(tensors, options, torch.float64)
    with seqaccel.backend("cpp"):
        found, grads = with_grads(tensors, options, torch.float32)
    for what, a, b in zip((*NAMES, *tensors), (*found, *grads), (*expected, *expected_grads), strict=True):
        assert_close(a, b, "attention", torch.float32, backward=what not in NAMES, what=what)


@pytest.mark.parametrize("fill", [1e4, math.inf, math.nan])
def test_a_masked_key_has_no_say(fill):
    tensors, _ = problem(CASES[4])
    mask = torch.ones(tensors["key"].shape[:2], dtype=torch.bool)
    mask[:, 3], mask[:, 7:] = False, False
    options = {"mask": mask, "lengths": None}
    filled = tensors | {"key": tensors["key"].masked_fill(~mask.unsqueeze(2), fill)}
    with seqaccel.backend("cpp"):
        for found, expected in zip(*(with_grads(t, options, torch.float32) for t in (filled, tensors)), strict=True):
            for a, b in zip(found, expected, strict=True):
                assert_close(a, b, "attention", torch.float32, backward=True)


@pytest.mark.parametrize("additive", [True, False])
def test_gradcheck(additive):
    tensors, options = problem(((2, 2, 3, 2, 3, 3, 2), additive, additive, True, True))
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}

    def function(*x):
        return called(dict(zip(leaves, x, strict=True)), options)

    with seqaccel.backend("cpp"):
        assert torch.autograd.gradcheck(function, list(leaves.values()), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, list(leaves.values()), fast_mode=True)


def test_the_same_bits_for_any_number_of_threads_and_split():
    """Rows are independent of their batch; a step of a decoder is its part of the training pass."""
    case = ((20, 6, 33, 8, 40, 24, 24), True, True, True, False)
    tensors, options = problem(case)
    results = []
    with seqaccel.backend("cpp"):
        for threads in (2, 1):
            torch.set_num_threads(threads)
            try:
                results.append([t for part in with_grads(tensors, options, torch.float32) for t in part])
            finally:
                torch.set_num_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("B", "T", "S"), [(2, 0, 5), (2, 3, 0), (0, 3, 5)])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_empty(backend, B, T, S):
    tensors, _ = problem(CASES[1])
    tensors = dict(tensors)
    for name in ("key", "value", "input", "h_0", "c_0"):
        t = tensors[name][:B]
        tensors[name] = t if name in ("h_0", "c_0") else t[:, : T if name == "input" else S]
    with seqaccel.backend(backend):
        output, h_n, _, context, weights = called(tensors, {})
        assert output.shape == (B, T, 5) and context.shape == (B, T, 4) and weights.shape == (B, T, S)
        assert (context == 0).all()
        if T == 0:
            torch.testing.assert_close(h_n, tensors["h_0"])
        else:
            assert all(g.isfinite().all() for g in with_grads(tensors, {}, torch.float64)[1])


@pytest.mark.parametrize("additive", [True, False])
def test_scale(additive):
    tensors, options = problem(((2, 3, 4, 2, 3, 3, 2), additive, True, True, False))
    scale = torch.tensor([1.7], dtype=torch.float64)
    other = dict(tensors)
    if additive:
        other["score_weight"] = 1.7 * other["score_weight"] / other["score_weight"].norm()
    else:
        other["key"] = 1.7 * other["key"]
    torch.testing.assert_close(called(tensors, options | {"scale": scale}), called(other, options))


# ---- the module ----

I, H, M, A = 4, 6, 5, 7


def decoder(**options):
    torch.manual_seed(3)
    options = {"num_layers": 3, "residual_from": 1} | options
    size = H if options.get("attention") == "dot" else M
    made = nn.AttentionLSTMDecoder(I, H, size, **options).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.4)
    return made


def sequences(m, batch=3, steps=5, keys=8):
    torch.manual_seed(1)
    x, memory = torch.randn(batch, steps, I).double(), torch.randn(batch, keys, m.memory_size).double()
    mask = torch.arange(keys) >= torch.tensor([keys, 4, 6])[:batch, None]
    hx = [torch.randn(m.num_layers, batch, H).double() for _ in range(2)]
    return x, memory, mask, tuple(hx)


def loop_of_cells(m, x, memory, mask, hx):
    """torch.nn.LSTMCell step by step, with every pair's features in memory."""
    cells = []
    for layer in m.layers:
        cell = torch.nn.LSTMCell(layer.input_size, H, layer.bias, dtype=torch.float64)
        cells.append(functools.partial(torch.func.functional_call, cell, dict(layer.named_parameters())))

    def attend(query):
        a = m.attention
        if isinstance(a, nn.AdditiveAttention):
            pairs = torch.tanh(a.query_proj(query)[:, None] + memory @ a.key_proj.weight.T)
            w = a.weight if a.scale is None else a.scale * a.weight / a.weight.norm()
            logits = pairs @ w
        else:
            logits = torch.einsum("bh,bsh->bs", query if a.weight is None else query @ a.weight, memory)
        weights = torch.softmax(logits.masked_fill(mask, -torch.inf), 1)
        return torch.einsum("bs,bsm->bm", weights, memory), weights

    h, c = ([part[index] for index in range(m.num_layers)] for part in hx)
    outputs, attention = [], []
    for t in range(x.shape[1]):
        if m.input_feeding:
            context, weights = attend(h[0])
            h[0], c[0] = cells[0]((torch.cat([x[:, t], context], 1), (h[0], c[0])))
        else:
            h[0], c[0] = cells[0]((x[:, t], (h[0], c[0])))
            context, weights = attend(h[0])
        top = h[0]
        for index in range(1, m.num_layers):
            h[index], c[index] = cells[index]((torch.cat([top, context], 1), (h[index], c[index])))
            top = top + h[index] if index >= m.residual_from else h[index]
        outputs.append(torch.cat([top, context], 1))
        attention.append(weights)
    return torch.stack(outputs, 1), torch.stack(h), torch.stack(c), torch.stack(attention, 1)


@pytest.mark.parametrize("options", [{}, {"normalize": True, "attention_size": A}, {"attention": "multiplicative"},
                                     {"attention": "dot", "bias": False}], ids=str)  # fmt: skip
@pytest.mark.parametrize("input_feeding", [True, False])
def test_outputs_and_gradients_of_a_loop_of_cells(options, input_feeding):
    m = decoder(input_feeding=input_feeding, residual_from=2, **options)
    x, memory, mask, hx = sequences(m)
    leaves = [x.requires_grad_(), memory.requires_grad_(), *(part.requires_grad_() for part in hx), *m.parameters()]
    output, (h_n, c_n), weights = m(x, memory, hx, memory_padding_mask=mask, need_weights=True)
    found = output, h_n, c_n, weights
    wanted = loop_of_cells(m, x, memory, mask, hx)
    grads = [torch.randn_like(t) for t in wanted]
    torch.testing.assert_close(found, wanted)
    given, right = (torch.autograd.grad(t, leaves, grads) for t in (found, wanted))
    torch.testing.assert_close(given, right)


@pytest.mark.parametrize("input_feeding", [True, False])
def test_packed_targets(input_feeding):
    m = decoder(input_feeding=input_feeding)
    x, memory, mask, hx = sequences(m)
    lengths = torch.tensor([2, 5, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, (h_n, c_n) = m(packed, memory, hx, memory_padding_mask=mask)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, found = pad_packed_sequence(output, batch_first=True)
    assert torch.equal(found, lengths)
    for b, length in enumerate(lengths.tolist()):
        one, (h, c) = m(
            x[b : b + 1, :length], memory[b : b + 1], tuple(part[:, b : b + 1] for part in hx),
            memory_padding_mask=mask[b : b + 1],
        )  # fmt: skip
        torch.testing.assert_close((padded[b, :length], h_n[:, b], c_n[:, b]), (one[0], h[:, 0], c[:, 0]))


@pytest.mark.parametrize("attention", ["additive", "multiplicative"])
@pytest.mark.parametrize("input_feeding", [True, False])
def test_any_split_gives_what_one_call_gives(input_feeding, attention):
    m = decoder(input_feeding=input_feeding, attention=attention).eval()
    x, memory, mask, hx = sequences(m)
    wanted, (h_n, _), weights = m(x, memory, hx, memory_padding_mask=mask, need_weights=True)
    for cut in range(x.shape[1] + 1):
        state = m.init_state(memory, mask, hx)
        first, state = m.extend(x[:, :cut], state)
        parts = [first]
        for t in range(cut, x.shape[1]):
            y, state = m.step(x[:, t], state)
            parts.append(y[:, None])
        torch.testing.assert_close(torch.cat(parts, 1), wanted)
        torch.testing.assert_close(state[3].transpose(0, 1), h_n)
        attended, valid = m.coverage(state)
        torch.testing.assert_close(attended, weights.sum(1))
        assert torch.equal(valid, ~mask)


@pytest.mark.parametrize("with_hx", [True, False])
def test_streams_of_different_age(with_hx):
    m = decoder().eval()
    x, memory, mask, hx = sequences(m)
    hx = hx if with_hx else None
    wanted, _ = m(x, memory, hx, memory_padding_mask=mask)
    _, state = m.extend(x[:, :2], m.init_state(memory, mask, hx))
    state = m.reset(state, torch.tensor([False, True, False]))
    state = m.select(state, torch.tensor([2, 1]))
    y, _ = m.extend(torch.stack([x[2, 2:5], x[1, :3]]), state)
    torch.testing.assert_close(y, torch.stack([wanted[2, 2:5], wanted[1, :3]]))


def test_an_output_sees_no_later_target():
    m = decoder()
    x, memory, mask, _ = sequences(m)
    y, _ = m(x, memory, memory_padding_mask=mask)
    for t in range(x.shape[1]):
        changed = x.clone()
        changed[:, t] += 1
        moved = (m(changed, memory, memory_padding_mask=mask)[0] != y).any(2)
        assert not moved[:, :t].any() and moved[:, t].all()


def test_source_padding_changes_nothing():
    m = decoder()
    x, memory, _, _ = sequences(m)
    longer = torch.cat([memory, torch.randn(3, 4, M).double()], 1)
    mask = (torch.arange(12) >= 8).expand(3, -1)
    torch.testing.assert_close(m(x, longer, memory_padding_mask=mask)[0], m(x, memory)[0])
    nothing, _ = m(x, memory, memory_padding_mask=torch.ones(3, 8, dtype=torch.bool))
    assert (nothing[..., H:] == 0).all()


def test_weights_of_torchs_cell():
    m = decoder(num_layers=1)
    cell = torch.nn.LSTMCell(I + M, H).double()
    m.layers[0].load_state_dict(cell.state_dict())
    assert torch.equal(m.layers[0].weight_ih, cell.weight_ih)


@pytest.mark.parametrize("input_feeding", [True, False])
def test_narrow_dtypes_and_autocast(input_feeding):
    m = decoder(input_feeding=input_feeding).float()
    x, memory, mask, _ = sequences(m)
    wanted, _ = m(x.float(), memory.float(), memory_padding_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = m(x.float(), memory.float(), memory_padding_mask=mask)
        found.sum().backward()
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
    half = m.bfloat16()
    found, _ = half(x.bfloat16(), memory.bfloat16(), memory_padding_mask=mask)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)


def test_compiled():
    m = decoder()
    x, memory, mask, _ = sequences(m)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    wanted, _ = m(x, memory, memory_padding_mask=mask)
    found, _ = compiled(x, memory, memory_padding_mask=mask)
    torch.testing.assert_close(found, wanted)
    right, given = (torch.autograd.grad(y.square().sum(), list(m.parameters())) for y in (wanted, found))
    torch.testing.assert_close(given, right)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention": "loud"}, "attention"),
        ({"attention": "dot", "normalize": True}, "normalize"),
        ({"num_layers": 0}, "num_layers"),
        ({"residual_from": 0}, "residual_from"),
        ({"dropout": 2.0}, "dropout"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        decoder(**options)


def test_bad_arguments_are_named():
    m = decoder()
    x, memory, mask, hx = sequences(m)
    with pytest.raises(ValueError, match="memory to have shape"):
        m(x, memory[..., :2])
    with pytest.raises(ValueError, match="input to have shape"):
        m(x[:2], memory)
    with pytest.raises(ValueError, match="memory_padding_mask"):
        m(x, memory, memory_padding_mask=mask[:, :2])
    with pytest.raises(ValueError, match="c_0 to have shape"):
        m(x, memory, (hx[0], hx[1][:1]))
    with pytest.raises(TypeError, match="state"):
        m.extend(x, (memory,))
    with pytest.raises(ValueError, match="x_t"):
        m.step(x, m.init_state(memory))


# ---- GNMT ----

SOURCE, TARGET = 11, 9


def gnmt(**options):
    torch.manual_seed(3)
    options = {"num_layers": 3, "embedding_dim": 5, "dropout": 0.0} | options
    made = nn.GNMT(SOURCE, TARGET, H, **options).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return made


def tokens(batch=3, source=7, target=6):
    torch.manual_seed(1)
    return torch.randint(SOURCE, (batch, source)), torch.randint(TARGET, (batch, target))


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_gnmt_is_the_published_network(num_layers):
    m, (source, target) = gnmt(num_layers=num_layers), tokens()
    lengths = torch.tensor([7, 2, 5])
    logits = m(source, target, torch.arange(7) >= lengths[:, None])
    for b, length in enumerate(lengths.tolist()):
        x, states = m.source_embedding(source[b : b + 1, :length]), []
        for index, ours in enumerate(m.encoder):
            layer = torch.nn.LSTM(ours.input_size, H, batch_first=True, bidirectional=index == 0, dtype=torch.float64)
            layer.load_state_dict(ours.state_dict())
            y, last = layer(x)
            x = x + y if index >= 2 else y
            states.append([part[-1] for part in last])
        hx = [torch.stack(parts) for parts in zip(*states, strict=True)]
        no_mask = torch.zeros(1, length, dtype=torch.bool)
        y, *_ = loop_of_cells(m.decoder, m.target_embedding(target[b : b + 1]), x, no_mask, hx)
        torch.testing.assert_close(logits[b : b + 1], m.output(y[..., :H]))
    logits.sum().backward()
    assert all(p.grad is not None for p in m.parameters())


def test_gnmt_streams():
    m, (source, target) = gnmt().eval(), tokens()
    mask = torch.arange(7) >= torch.tensor([7, 4, 6])[:, None]
    wanted = m(source, target, mask)
    _, state = m.extend(target[:, :2], m.init_state(source, mask))
    state = m.select(m.reset(state, torch.tensor([False, True, False])), torch.tensor([2, 1]))
    first, state = m.step(torch.stack([target[2, 2], target[1, 0]]), state)
    rest, _ = m.extend(torch.stack([target[2, 3:5], target[1, 1:3]]), state)
    found = torch.cat([first[:, None], rest], 1)
    torch.testing.assert_close(found, torch.stack([wanted[2, 2:5], wanted[1, :3]]))


@pytest.mark.parametrize("penalties", [(0.0, 0.0, 0.0), (0.7, 5.0, 0.0), (0.7, 5.0, 0.6), (1.0, 0.0, 2.0)])
def test_generate_finds_the_best_of_all(penalties):
    """A beam that drops nothing finds the best of all sequences, scored here from a whole pass."""
    alpha, offset, beta = penalties
    m, (source, _) = gnmt().eval(), tokens(2)
    mask = torch.arange(7) >= torch.tensor([7, 5])[:, None]
    end, longest = 4, 3
    found, scores = m.generate(
        source, 0, end, longest, source_padding_mask=mask, beam_size=TARGET**2, length_penalty=alpha,
        length_offset=offset, coverage_penalty=beta,
    )  # fmt: skip
    pairs = torch.cartesian_prod(torch.arange(TARGET), torch.arange(TARGET))
    prefix = torch.cat([torch.zeros(len(pairs), 1, dtype=torch.int64), pairs], 1)
    for b in range(2):
        rows, some = source[b].expand(len(pairs), -1), mask[b].expand(len(pairs), -1)
        with torch.no_grad():
            memory, *_, initial = m.init_state(rows, some)
            hx = [part.transpose(0, 1) for part in initial]
            decoded, _, weights = m.decoder(
                m.target_embedding(prefix), memory, hx, memory_padding_mask=some, need_weights=True
            )
            table = m.output(decoded[..., :H]).log_softmax(-1)
        best = (-math.inf, ())
        for n in range(1, longest + 1):
            for sequence in itertools.product(range(TARGET), repeat=n):
                if end in sequence[:-1] or (n < longest and sequence[-1] != end):
                    continue
                row = ((*sequence, 0, 0)[0] * TARGET) + (*sequence, 0, 0)[1]
                score = sum(table[row, t, token].item() for t, token in enumerate(sequence))
                attended = weights[row, :n].sum(0)[~mask[b]]
                score = score / ((offset + n) / (offset + 1)) ** alpha + beta * attended.clamp(max=1).log().sum().item()
                best = max(best, (score, sequence))
        assert scores[b].item() == pytest.approx(best[0], abs=1e-5)
        assert tuple(found[b, : len(best[1])].tolist()) == best[1]


def test_greedy_is_the_likeliest_token_at_each_step():
    m, (source, _) = gnmt().eval(), tokens()
    found, _ = m.generate(source, 0, TARGET - 1, 5, beam_size=1, length_penalty=0.0, coverage_penalty=0.0)
    state, token = m.init_state(source), torch.zeros(3, dtype=torch.int64)
    running = torch.ones(3, dtype=torch.bool)
    for t in range(found.shape[1]):
        logits, state = m.step(token, state)
        token = logits.argmax(-1)
        assert torch.equal(found[running, t], token[running])
        running &= token != TARGET - 1


class Translator(nn.Streaming, torch.nn.Module):
    """A decoder between an embedding and a projection, as users build one."""

    def __init__(self):
        super().__init__()
        self.embedding, self.decoder, self.output = torch.nn.Embedding(TARGET, I), decoder(), torch.nn.Linear(H + M, 9)
        self.double()

    def step(self, tokens, state):
        y, state = self.decoder.step(self.embedding(tokens), state)
        return self.output(y), state


def test_beam_search_runs_a_decoder():
    model = Translator().eval()
    _, memory, mask, _ = sequences(model.decoder)
    start = torch.zeros(3, dtype=torch.int64)
    state = model.decoder.init_state(memory, mask)
    found, scores = nn.decoding.beam_search(model, state, start, end=1, max_length=4, beam_size=3)
    for b in range(3):
        alone = model.decoder.init_state(memory[b : b + 1], mask[b : b + 1])
        one, score = nn.decoding.beam_search(model, alone, start[:1], end=1, max_length=4, beam_size=3)
        assert torch.equal(found[b, : one.shape[1]], one[0]) and scores[b].item() == pytest.approx(score.item())
    with pytest.raises(TypeError, match="coverage"):
        nn.decoding.beam_search(model, state, start, end=1, max_length=4, coverage_penalty=0.1)
    with pytest.raises(ValueError, match="length_offset"):
        nn.decoding.beam_search(model, state, start, end=1, max_length=4, length_offset=-1)


def test_gnmt_names_bad_arguments():
    m, (source, target) = gnmt(), tokens()
    with pytest.raises(TypeError, match="target"):
        m(source, target.float())
    with pytest.raises(ValueError, match="target to have shape"):
        m(source, target[:2])
    with pytest.raises(ValueError, match="source_padding_mask"):
        m(source, target, torch.arange(7).expand(3, -1) < 2)
    with pytest.raises(ValueError, match="source_padding_mask"):
        m(source, target, torch.zeros(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one token"):
        m(source[:, :0], target)
    with pytest.raises(ValueError, match="target_t"):
        m.step(target, m.init_state(source))
    for name, value in (("start", -1), ("end", 99), ("max_length", 0), ("beam_size", 0)):
        arguments = {"start": 0, "end": 1, "max_length": 3, "beam_size": 1} | {name: value}
        with pytest.raises(ValueError, match=name):
            m.generate(source, **arguments)


def test_gnmt_compiled():
    m, (source, target) = gnmt(), tokens()
    mask = torch.arange(7) >= torch.tensor([7, 4, 6])[:, None]
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target, mask), m(source, target, mask))


def test_step_bits(poison):
    """Step by step has the results of all at once, also where weights are packed for many steps and not for few."""
    m = nn.AttentionLSTMDecoder(I, 40, M, num_layers=1).eval()
    torch.manual_seed(0)
    x, memory = torch.randn(20, 6, I), torch.randn(20, 9, M)
    with torch.no_grad():
        wanted, _ = m(x, memory)
        state = m.init_state(memory)
        for t in range(6):
            y, state = m.step(x[:, t], state)
            torch.testing.assert_close(y, wanted[:, t], rtol=1e-5, atol=1e-6)
    assert F.mse_loss(y, wanted[:, -1]) < 1e-10
