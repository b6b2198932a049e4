"""HierarchicalAttention, the module: torch.nn.MultiheadAttention's place, streaming, errors."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import seqaccel
from seqaccel.nn import HierarchicalAttention


def module(E=8, heads=2, **keywords):
    keywords = {**dict(batch_first=True, block_size=4), **keywords}
    made = HierarchicalAttention(E, heads, **keywords).double()
    if made.pool_query is not None:
        nn.init.normal_(made.pool_query)
    return made


# In MultiheadAttention's place


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [dict(), dict(kdim=5, vdim=7)], ids=["self", "kdim"])
def test_dense_levels_are_multihead_attention(bias, widths):
    stock = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **widths).double()
    ours = HierarchicalAttention(8, 2, bias=bias, batch_first=True, levels=0, **widths).double()
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    q, k, v = (torch.randn(3, 20, w, dtype=torch.float64) for w in (8, widths.get("kdim", 8), widths.get("vdim", 8)))
    mask = nn.Transformer.generate_square_subsequent_mask(20, dtype=torch.float64)
    expected = stock(q, k, v, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(ours(q, k, v)[0], expected)
    torch.testing.assert_close(ours(q, k, v, attn_mask=mask)[0], expected)
    both_ways = HierarchicalAttention(8, 2, bias=bias, batch_first=True, levels=0, causal=False, **widths).double()
    both_ways.load_state_dict(stock.state_dict())
    torch.testing.assert_close(both_ways(q, k, v)[0], stock(q, k, v)[0])


def test_signatures_are_multihead_attentions():
    for name in ("__init__", "forward"):
        stock = list(inspect.signature(getattr(nn.MultiheadAttention, name)).parameters)
        assert list(inspect.signature(getattr(HierarchicalAttention, name)).parameters)[: len(stock)] == stock
    assert isinstance(HierarchicalAttention(8, 2), nn.MultiheadAttention)


def test_layouts():
    attention, x = module(batch_first=False), torch.randn(30, 2, 8, dtype=torch.float64)
    first = copy.deepcopy(attention)
    first.batch_first = True
    out = attention(x, x, x)[0]
    torch.testing.assert_close(out, first(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))[0].transpose(0, 1))
    torch.testing.assert_close(attention(x[:, 1], x[:, 1], x[:, 1])[0], out[:, 1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer_trains_and_evaluates_alike(causal, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    keys = list(layer.state_dict())
    layer.self_attn = module(causal=causal)
    assert list(layer.state_dict()) == keys
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    trained = layer.train()(x)
    layer.eval()
    with torch.no_grad():
        evaluated = layer(x)
    with torch.inference_mode():
        inferred = layer(x)
    assert torch.equal(trained, evaluated)
    assert torch.equal(trained, inferred)
    dense = copy.deepcopy(layer)
    dense.self_attn = nn.MultiheadAttention(8, 2, batch_first=True).double()
    dense.self_attn.load_state_dict(layer.self_attn.state_dict())
    assert not torch.allclose(dense(x), evaluated)  # so the dense fast path would have shown


def test_transformer_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    layer.self_attn = module()
    encoder = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(50, dtype=torch.float64)
    padding = torch.zeros(2, 50, dtype=torch.bool)
    padding[1, 30:] = True
    trained = encoder.train()(x)
    encoder.eval()
    with torch.no_grad():
        assert torch.equal(encoder(x), trained)
        assert torch.equal(encoder(x, mask=mask), trained)
        assert torch.equal(encoder(x, mask=mask, is_causal=True), trained)
        padded = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(padded[1, :30], encoder(x[1:, :30])[0])
    torch.testing.assert_close(padded[0], trained[0])


def right_padding(lengths, T):
    return torch.arange(T) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keywords", [dict(), dict(pool_query=1, rotary_base=100.0), dict(num_kv_heads=1)], ids=str)
def test_padded_sequences_are_sequences_alone(causal, keywords):
    attention, x = module(causal=causal, **keywords), torch.randn(3, 50, 8, dtype=torch.float64)
    lengths = [50, 21, 1]
    padding = right_padding(lengths, 50)
    x[padding] = torch.nan
    out = attention(x, x, x, key_padding_mask=padding)[0]
    infinite = torch.zeros(3, 50, dtype=torch.float64).masked_fill(padding, -torch.inf)
    assert torch.equal(attention(x, x, x, key_padding_mask=infinite)[0], out)
    assert torch.equal(attention(x, x, x, lengths=torch.tensor(lengths))[0], out)
    packed = torch.cat([x[b, :n] for b, n in enumerate(lengths)]).unsqueeze(0)
    offsets = torch.tensor([0, 50, 71, 72])
    packed = attention(packed, packed, packed, cu_seqlens=offsets)[0][0].split(lengths)
    for b, n in enumerate(lengths):
        alone = attention(*[x[b : b + 1, :n]] * 3)[0][0]
        torch.testing.assert_close(out[b, :n], alone)
        torch.testing.assert_close(packed[b], alone)
    assert torch.equal(out[padding], attention.out_proj.bias.expand_as(out[padding]))
    torch.testing.assert_close(
        attention(x[1], x[1], x[1], key_padding_mask=padding[1])[0][:21], out[1, :21]
    )  # without a batch


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_padding_in_transformer_layers(causal, mode):
    """In torch's encoder and decoder layers; cross attention stays torch's."""
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double(),
        nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double(),
    ]
    x, memory, padding = *torch.randn(2, 3, 50, 8, dtype=torch.float64).unbind(), right_padding([50, 21, 1], 50)
    for layer in layers:
        stock = copy.deepcopy(layer.self_attn.state_dict())
        layer.self_attn = module(causal=causal)
        layer.self_attn.load_state_dict(stock, strict=True)
        layer.train(mode == "train")
        decodes = isinstance(layer, nn.TransformerDecoderLayer)
        given = (memory, None, None, padding) if decodes else (None, padding)
        with torch.inference_mode(mode == "inference"):
            out = layer(x, *given)
            for b, n in enumerate((50, 21, 1)):
                alone = layer(x[b : b + 1, :n], *([memory[b : b + 1]] if decodes else []))[0]
                torch.testing.assert_close(out[b, :n], alone)
            with pytest.raises(ValueError, match="padding after each sequence only"):
                layer(x, *given[:-1], padding.flip(1))
    crossed = layers[1]
    crossed.multihead_attn = module(causal=causal)
    with pytest.raises(ValueError, match="cross attention"):
        crossed(x, memory[:, :40])


def test_grouped_queries():
    grouped, x = module(num_kv_heads=1, pool_query=1), torch.randn(2, 50, 8, dtype=torch.float64)
    assert grouped.in_proj_weight.shape == (8 + 2 * 4, 8) and grouped.pool_query.shape == (1, 1, 4)
    whole = module(pool_query=1)
    rows = torch.cat([torch.arange(8), *[torch.arange(begin, begin + 4).repeat(2) for begin in (8, 12)]])
    state = {name: t[rows] if name.startswith("in_proj") else t for name, t in grouped.state_dict().items()}
    whole.load_state_dict(state | {"pool_query": grouped.pool_query.expand(1, 2, 4)})
    out = grouped(x, x, x)[0]
    torch.testing.assert_close(out, whole(x, x, x)[0])
    stream = grouped.init_state(2)
    assert stream[1][0].shape[1] == 1
    first, stream = grouped.extend(x[:, :33], stream)
    steps = [first]
    for x_t in x[:, 33:].unbind(1):
        y, stream = grouped.step(x_t, stream)
        steps.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(steps, 1), out)
    fixed = grouped.init_state(2, max_length=50)
    torch.testing.assert_close(grouped.extend(x, fixed)[0], out)
    apart = HierarchicalAttention(8, 4, kdim=5, vdim=6, num_kv_heads=2, batch_first=True)
    assert apart.k_proj_weight.shape == (4, 5) and apart.v_proj_weight.shape == (4, 6)
    assert apart(torch.randn(2, 9, 8), torch.randn(2, 9, 5), torch.randn(2, 9, 6))[0].shape == (2, 9, 8)
    assert "num_kv_heads=2" in repr(apart)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        HierarchicalAttention(8, 2, num_kv_heads=3)


def test_transformer_decoder_layer():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    layer.self_attn = module()
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(30, dtype=torch.float64)
    trained = layer(x, x, tgt_mask=mask, tgt_is_causal=True)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x, x, tgt_mask=mask), trained)


def test_pool_query_is_learned():
    attention = module(pool_query=2)
    assert attention.state_dict()["pool_query"].shape == (2, 2, 4)
    x = torch.randn(2, 50, 8, dtype=torch.float64)
    attention(x, x, x)[0].square().sum().backward()
    assert attention.pool_query.grad.abs().min() > 0
    fresh = HierarchicalAttention(8, 2, batch_first=True, block_size=4, pool_query=1).double()
    mean = HierarchicalAttention(8, 2, batch_first=True, block_size=4).double()
    mean.load_state_dict({k: v for k, v in fresh.state_dict().items() if k != "pool_query"})
    attention._reset_parameters()
    assert (attention.pool_query == 0).all()
    torch.testing.assert_close(fresh(x, x, x)[0], mean(x, x, x)[0])


def test_copies_and_dtypes():
    attention, x = module(pool_query=1, fanout=3, levels=2), torch.randn(2, 40, 8, dtype=torch.float64)
    out = attention(x, x, x)[0]
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(x, x, x)[0], out)
        assert other._qkv_same_embed_dim is False
    assert "fanout=3" in repr(attention) and "levels=2" in repr(attention) and "pool_query=1" in repr(attention)
    half = attention.to(torch.bfloat16)(*[x.bfloat16()] * 3)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), out, rtol=0, atol=0.05)
    attention._reset_parameters()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module().float()(*[x.float()] * 3)[0].dtype == torch.bfloat16


def test_compile_and_export():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = HierarchicalAttention(8, 2, batch_first=True, block_size=4)
    x = torch.randn(2, 50, 8)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert layer.self_attn.in_proj_weight.grad is not None
    layer.eval()
    program = torch.export.export(layer, (x,))
    assert any("hierarchical_attention_forward" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), expected)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = module().float()

    def forward(self, x, mask, padding):
        return self.attention(x, x, x, attn_mask=mask, key_padding_mask=padding)[0]


def masks(T, dtype):
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    padding = torch.arange(T).expand(2, T) >= torch.tensor([[T], [T // 2]])
    if dtype == torch.bool:
        return future, padding
    return torch.zeros(T, T).masked_fill(future, -torch.inf), torch.zeros(2, T).masked_fill(padding, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_under_compile_and_export(dtype):
    torch._dynamo.reset()
    model, x = Masked(), torch.randn(2, 30, 8)
    mask, padding = masks(30, dtype)
    expected = model(x, mask, padding)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask, padding), expected)
    for wrong in ((mask.flip(0), padding), (mask, padding.flip(1))):
        with pytest.raises(RuntimeError, match="mask: "):
            compiled(x, *wrong)
    T = torch.export.Dim("T")
    shapes = ({1: T}, {0: T, 1: T}, {1: T})
    for strict in (False, True):
        program = torch.export.export(model, (x, mask, padding), dynamic_shapes=shapes, strict=strict).module()
        for steps in (2, 3, 9):
            arguments = (torch.randn(2, steps, 8), *masks(steps, dtype))
            torch.testing.assert_close(program(*arguments), model(*arguments))


def test_masks_are_looked_at_once():
    class Reads(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
            return function(*args, **kwargs or {})

    with Reads() as reads:
        Masked()(torch.randn(2, 30, 8), *masks(30, torch.float32))
    assert reads.count <= 1


# Streaming


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(0, 90),
    block_size=st.integers(2, 8),
    fanout=st.one_of(st.none(), st.integers(2, 4)),
    levels=st.one_of(st.none(), st.integers(0, 3)),
    w=st.integers(1, 3),
    P=st.integers(0, 2),
    mass_bias=st.booleans(),
    chunks=st.lists(st.integers(0, 25), max_size=6),
    fixed=st.booleans(),
)
def test_any_split_into_chunks_is_forward(T, block_size, fanout, levels, w, P, mass_bias, chunks, fixed):
    attention = module(
        pool_query=P, block_size=block_size, fanout=fanout, levels=levels, local_blocks=w, mass_bias=mass_bias
    )
    x = torch.randn(2, T, 8, dtype=torch.float64)
    state, outputs, begin = attention.init_state(2, max_length=max(T, 1) if fixed else None), [], 0
    sizes = [part.shape for level in state[1:] for part in level]
    for size in [*chunks, T]:
        y, state = attention.extend(x[:, begin : begin + size], state)
        outputs.append(y)
        begin = min(T, begin + size)
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x, x, x)[0], rtol=0, atol=1e-12)
    assert (state[0] == T).all()
    assert not fixed or [part.shape for level in state[1:] for part in level] == sizes


@settings(max_examples=25, deadline=None)
@given(
    T=st.integers(1, 60),
    block_size=st.integers(2, 8),
    fanout=st.one_of(st.none(), st.integers(2, 4)),
    levels=st.one_of(st.none(), st.integers(0, 3)),
    w=st.integers(1, 3),
    P=st.integers(0, 2),
    chunks=st.lists(st.integers(1, 25), max_size=4),
)
def test_chunks_as_graphs_compute_them(T, block_size, fanout, levels, w, P, chunks):
    """Any number of tokens at once, without a look at the ages."""
    attention = module(pool_query=P, block_size=block_size, fanout=fanout, levels=levels, local_blocks=w)
    x = torch.randn(2, T, 8, dtype=torch.float64)
    state, outputs, begin = attention.init_state(2, max_length=T), [], 0
    for size in [*chunks, T]:
        if begin < T:
            chunk = x[:, begin : begin + size]
            out, state = attention._extend_chunk(*attention._project(chunk, chunk, chunk), state)
            outputs.append(attention.out_proj(out.transpose(1, 2).flatten(2)))
            begin += chunk.shape[1]
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x, x, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("keywords", [dict(), dict(pool_query=1), dict(levels=1), dict(levels=0)], ids=str)
def test_a_state_of_fixed_size_is_of_logarithmic_size_and_not_looked_at(keywords):
    attention = module(**keywords).to("meta")
    state = attention.init_state(3, max_length=100)
    y, after = attention.step(torch.empty(3, 8, dtype=torch.float64, device="meta"), state)
    assert y.shape == (3, 8)
    assert torch.utils._pytree.tree_map(torch.Tensor.size, after) == torch.utils._pytree.tree_map(
        torch.Tensor.size, state
    )
    elements = [
        sum(p.numel() for level in attention.init_state(1, max_length=n)[1:] for p in level) for n in (4**3, 4**6)
    ]
    assert keywords.get("levels") is not None or elements[1] <= 2 * elements[0]


def test_a_stream_beyond_its_stated_length_forgets_the_oldest():
    attention, x = module(levels=0), torch.randn(1, 40, 8, dtype=torch.float64)
    state, kept = attention.init_state(1, max_length=10), []
    for x_t in x.unbind(1):
        y, state = attention.step(x_t, state)
        kept.append(y)
    torch.testing.assert_close(kept[-1], attention(*[x[:, -11:]] * 3)[0][:, -1], rtol=0, atol=1e-12)
    reset = attention.reset(state, torch.tensor([True]))
    torch.testing.assert_close(attention.step(x[:, 0], reset)[0], kept[0])


def test_a_growing_stream_is_not_compiled():
    torch._dynamo.reset()
    attention, x = module(), torch.randn(2, 8, dtype=torch.float64)
    state = attention.init_state(2)
    with pytest.raises(Exception, match="max_length"):
        torch.compile(attention.step, fullgraph=True, backend="eager")(x, state)
    torch._dynamo.reset()
    y, _ = torch.compile(attention.step, backend="eager")(x, state)  # not compiled, but run
    torch.testing.assert_close(y, attention.step(x, state)[0])
    with pytest.raises(ValueError, match="expected max_length to be at least 1, but got 0"):
        attention.init_state(2, max_length=0)


@pytest.mark.parametrize("keywords", [dict(), dict(pool_query=1, fanout=2), dict(levels=1), dict(levels=0)], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_steps_are_forward(keywords, batch_first):
    attention = module(batch_first=batch_first, local_blocks=1, **keywords)
    x = torch.randn(2, 45, 8, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    state, time = attention.init_state(2), 1 if batch_first else 0
    steps = []
    for x_t in x.unbind(time):
        y_t, state = attention.step(x_t, state)
        assert y_t.shape == (2, 8)
        steps.append(y_t)
    torch.testing.assert_close(torch.stack(steps, time), attention(x, x, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("keywords", [dict(), dict(pool_query=1, fanout=2), dict(levels=1), dict(levels=0)], ids=str)
def test_streams_have_ages_of_their_own(keywords):
    attention, x = module(**keywords), torch.randn(3, 100, 8, dtype=torch.float64)
    _, state = attention.extend(x[:, :37], attention.init_state(3))
    state = attention.reset(state, torch.tensor([False, True, False]))
    assert state[0].tolist() == [37, 0, 37]
    y, state = attention.extend(x[:, 37:59], state)
    torch.testing.assert_close(y[0], attention(*[x[:1, :59]] * 3)[0][0, 37:], rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1], attention(*[x[1:2, 37:59]] * 3)[0][0], rtol=0, atol=1e-12)
    before = [p.clone() for part in state[1:] for p in part]
    picked = attention.select(state, torch.tensor([2, 1, 1, 0]))
    y, _ = attention.extend(x[[2, 1, 1, 0], 59:], picked)
    torch.testing.assert_close(y[0], attention(*[x[2:]] * 3)[0][0, 59:], rtol=0, atol=1e-12)
    torch.testing.assert_close(y[1], attention(*[x[1:2, 37:]] * 3)[0][0, 22:], rtol=0, atol=1e-12)
    assert torch.equal(y[1], y[2])
    # States are values: nothing above changed this one.
    assert all(torch.equal(a, b) for a, b in zip(before, [p for part in state[1:] for p in part], strict=True))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer)
    assert torch.equal(attention.extend(x[:, 59:], loaded)[0], attention.extend(x[:, 59:], state)[0])


def test_the_state_grows_with_the_logarithm_of_the_age():
    attention = module(E=2, heads=1, block_size=2, local_blocks=1)
    state, sizes = attention.init_state(1), []
    for _ in range(4):
        _, state = attention.extend(torch.randn(1, 200, 2, dtype=torch.float64), state)
        sizes.append(sum(p.numel() for part in state[1:] for p in part))
    levels = len(state) - 1
    assert levels <= 11  # 2^10 > 800
    assert sizes[-1] <= 20 * levels
    assert sizes[-1] < 1.35 * sizes[0]


def test_gradients_flow_through_a_chunk():
    attention, x = module(pool_query=1), torch.randn(1, 40, 8, dtype=torch.float64)
    y, _ = attention.extend(x, attention.init_state(1))
    y.square().sum().backward()
    streamed = {name: p.grad.clone() for name, p in attention.named_parameters()}
    attention.zero_grad()
    attention(x, x, x)[0].square().sum().backward()
    for name, p in attention.named_parameters():
        torch.testing.assert_close(streamed[name], p.grad)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dropout=1.1), "dropout to be between 0 and 1, but got 1.1"),
        (dict(add_bias_kv=True), "add_bias_kv"),
        (dict(add_zero_attn=True), "add_zero_attn"),
        (dict(num_heads=3), "embed_dim must be a positive multiple of num_heads, but got embed_dim=8, num_heads=3"),
        (dict(block_size=1), "expected block_size to be at least 2, but got 1"),
        (dict(fanout=0), "expected fanout"),
        (dict(levels=-2), "expected levels"),
        (dict(local_blocks=0), "expected local_blocks"),
        (dict(pool_query=-1), "expected pool_query"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalAttention(**{**dict(embed_dim=8, num_heads=2), **arguments})


def test_forward_errors():
    attention, x = module(), torch.randn(2, 10, 8, dtype=torch.float64)
    causal = torch.ones(10, 10, dtype=torch.bool).triu(1)
    assert attention(x, x, x, attn_mask=causal)[1] is None
    bad = [
        (dict(need_weights=True), "need_weights"),
        (dict(key=x[:, :9]), r"key: expected batch and length of query, \(2, 10\), but got \(2, 9\).*cross attention"),
        (dict(value=x[..., :7]), "value: expected last dimension 8, but got 7"),
        (dict(query=x[0]), "expected all of them 2-D or 3-D"),
        (dict(attn_mask=causal.flip(0)), "takes the causal mask only; for other masks use seqaccel.nn.BlockSparse"),
        (dict(attn_mask=torch.randn(10, 10)), "takes the causal mask only"),
        (dict(attn_mask=causal[:5, :5]), "takes the causal mask only"),
        (dict(key_padding_mask=torch.zeros(2, 9, dtype=torch.bool)), r"key_padding_mask: expected shape \(2, 10\)"),
        (dict(key_padding_mask=torch.arange(10).expand(2, 10) < 3), "padding after each sequence only"),
        (dict(key_padding_mask=torch.randn(2, 10)), "padding after each sequence only.*BlockSparseAttention"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            attention(**{**dict(query=x, key=x, value=x), **change})
    both_ways = module(causal=False)
    for change in (dict(is_causal=True), dict(attn_mask=causal)):
        with pytest.raises(ValueError, match="not causal"):
            both_ways(x, x, x, **change)
    with pytest.raises(ValueError, match="both"):
        padding = torch.zeros(2, 10, dtype=torch.bool)
        both_ways(x, x, x, key_padding_mask=padding, lengths=torch.tensor([10, 10]))
    with pytest.raises(TypeError, match="cu_seqlens to be a Tensor"):
        both_ways(x, x, x, cu_seqlens=[0, 10])


def test_streaming_errors():
    with pytest.raises(RuntimeError, match="cannot run on a stream"):
        module(causal=False).init_state(1)
    with pytest.raises(RuntimeError, match="cannot run on a stream"):
        module(kdim=5).init_state(1)
    attention = module()
    state = attention.init_state(2)
    with pytest.raises(ValueError, match=r"x: expected shape \(2, T, 8\), but got \(3, 5, 8\)"):
        attention.extend(torch.randn(3, 5, 8), state)
    with pytest.raises(ValueError, match="x_t: expected shape"):
        attention.step(torch.randn(2, 1, 8), state)
    with pytest.raises(ValueError, match="mask to be bool"):
        attention.reset(state, torch.zeros(3))


def test_backend_is_forced_through_the_module():
    attention, x = module().float(), torch.randn(1, 30, 8)
    with seqaccel.backend("reference"):
        expected = attention(x, x, x)[0]
    with seqaccel.backend("cpp"):
        torch.testing.assert_close(attention(x, x, x)[0], expected)
