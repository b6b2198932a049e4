"""BlockSparseAttention, the module: torch.nn.MultiheadAttention's place, layouts, errors."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from seqaccel.functional.attention import layouts
from seqaccel.nn import BlockSparseAttention

WINDOW = functools.partial(layouts.sliding_window, window=2, block_size=4, causal=True)


def module(**keywords):
    return BlockSparseAttention(8, 2, **{**dict(batch_first=True, block_size=4, layout=WINDOW), **keywords}).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", [dict(), dict(kdim=5, vdim=7)], ids=["self", "kdim"])
@pytest.mark.parametrize("causal", [True, False])
def test_it_is_multihead_attention_with_the_layouts_mask(bias, widths, causal):
    stock = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True, **widths).double()
    layout = torch.rand(2, 5, 6) < 0.6
    layout[..., 0] = True
    ours = module(bias=bias, causal=causal, layout=layout, **widths)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    q = torch.randn(3, 18, 8, dtype=torch.float64)
    k, v = (torch.randn(3, 21, widths.get(name, 8), dtype=torch.float64) for name in ("kdim", "vdim"))
    seen = layout.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :18, :21]
    seen = seen.tril() if causal else seen
    expected = stock(q, k, v, attn_mask=(~seen).repeat(3, 1, 1), need_weights=False)[0]
    torch.testing.assert_close(ours(q, k, v)[0], expected)
    turned = copy.deepcopy(ours)
    turned.batch_first = False
    torch.testing.assert_close(turned(*(t.transpose(0, 1) for t in (q, k, v)))[0], expected.transpose(0, 1))
    torch.testing.assert_close(ours(q[1], k[1], v[1])[0], expected[1])


def test_the_default_layout_is_dense_attention():
    stock, ours = nn.MultiheadAttention(8, 2, batch_first=True).double(), module(layout=None)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    expected = stock(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(ours(x, x, x)[0], expected)
    torch.testing.assert_close(ours(x, x, x, attn_mask=mask)[0], expected)


def test_signatures_are_multihead_attentions():
    for name in ("__init__", "forward"):
        stock = list(inspect.signature(getattr(nn.MultiheadAttention, name)).parameters)
        assert list(inspect.signature(getattr(BlockSparseAttention, name)).parameters)[: len(stock)] == stock


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers_train_and_evaluate_alike(norm_first):
    options = dict(dropout=0.0, batch_first=True, norm_first=norm_first)
    x, memory = torch.randn(2, 2, 22, 8, dtype=torch.float64)
    layers = [(nn.TransformerEncoderLayer(8, 2, 16, **options), (x,))]
    layers += [(nn.TransformerDecoderLayer(8, 2, 16, **options), (x, memory))]
    for layer, inputs in layers:
        layer.double()
        keys = list(layer.state_dict())
        layer.self_attn = module()
        if len(inputs) == 2:
            layer.multihead_attn = module(causal=False, layout=torch.rand(6, 6) < 0.5)
        assert list(layer.state_dict()) == keys
        trained = layer.train()(*inputs)
        layer.eval()
        with torch.no_grad():
            assert torch.equal(layer(*inputs), trained)


def test_padding_after_the_sequence():
    attention, x = module(), torch.randn(2, 10, 8, dtype=torch.float64)
    padding = torch.arange(10) >= torch.tensor([[7], [10]])
    out = attention(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(out[0, :7], attention(x[:1, :7], x[:1, :7], x[:1, :7])[0][0])
    torch.testing.assert_close(out[1], attention(x[1], x[1], x[1])[0])
    with pytest.raises(ValueError, match="padding after each sequence only"):
        attention(x, x, x, key_padding_mask=padding.flip(1))
    with pytest.raises(ValueError, match="supported in causal modules only"):
        module(causal=False)(x, x, x, key_padding_mask=padding)


@pytest.mark.parametrize("layout", [WINDOW, torch.ones(3, 3, dtype=torch.bool).tril(), None], ids=["f", "t", "none"])
def test_compile_and_export(layout):
    attention, x = module(layout=layout).float(), torch.randn(2, 12, 8)
    expected = attention(x, x, x)[0]
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x)[0], expected)
    exported = torch.export.export(attention, (x, x, x)).module()
    torch.testing.assert_close(exported(x, x, x)[0], expected)


def test_copies_and_devices():
    attention = module(layout=torch.ones(3, 3, dtype=torch.bool))
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        torch.testing.assert_close(copied(x, x, x), attention(x, x, x))
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    assert "layout" not in attention.state_dict()
    assert attention.to("meta").layout.is_meta
    assert pickle.loads(pickle.dumps(module())).layout_of_length is not None


def test_repr():
    assert repr(module(layout=None)) == (
        "BlockSparseAttention(\n  8, 2, block_size=4, batch_first=True\n"
        "  (out_proj): NonDynamicallyQuantizableLinear(in_features=8, out_features=8, bias=True)\n)"
    )
    assert "layout=sliding_window" in repr(module())
    assert "layout=(3, 3), causal=False" in repr(module(layout=torch.ones(3, 3, dtype=torch.bool), causal=False))


def test_errors():
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"layout to have shape \(3, 3\), .*, but got \(2, 2\)"):
        module(layout=torch.ones(2, 2, dtype=torch.bool))(x, x, x)
    with pytest.raises(ValueError, match="key: expected query's length, 12, since layout is a function of one length"):
        module()(x, x[:, :8], x[:, :8])
    with pytest.raises(ValueError, match="layout: expected bool of shape"):
        module(layout=torch.ones(3, 3))
    with pytest.raises(TypeError, match="layout to be a Tensor or a function of the length, but got int"):
        module(layout=3)
    with pytest.raises(ValueError, match=r"layout of 1 or num_heads=2 heads, but got \(3, 3, 3\)"):
        module(layout=torch.ones(3, 3, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected layout to be a Tensor or a BlockMask, but got None"):
        module(layout=lambda length: None)(x, x, x)
    with pytest.raises(ValueError, match="need_weights"):
        module()(x, x, x, need_weights=True)
    with pytest.raises(ValueError, match="key: expected last dimension 8, but got 5"):
        module()(x, x[..., :5], x)
