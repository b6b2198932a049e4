"""seqaccel.nn.SRUpp: the package's state_dict and results, streams, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seqaccel import nn

DOUBLE = torch.float64


def scalar_attention(layer, x, memory, allowed):
    """u of a layer's transform, query by query. ``allowed`` (T, S): the logits' addend."""
    z = x if memory is None else torch.cat([memory, x])
    z = z @ layer.linear1.weight.T
    query = z[z.shape[0] - x.shape[0] :]
    key, value = (z @ layer.linear2.weight.T).chunk(2, -1)
    size = query.shape[1] // layer.num_heads
    rows = []
    for t in range(len(query)):
        parts = []
        for head in range(layer.num_heads):
            at = slice(head * size, (head + 1) * size)
            logits = key[:, at] @ query[t, at] / math.sqrt(size) + allowed[t]
            parts.append(torch.softmax(logits, 0) @ value[:, at])
        rows.append(layer.alpha * torch.cat(parts) + query[t])
    found = torch.stack(rows)
    if layer.layer_norm is not None:
        found = torch.nn.functional.layer_norm(found, found.shape[1:], layer.layer_norm.weight, layer.layer_norm.bias)
    return found @ layer.linear3.weight.T


@pytest.mark.parametrize("heads, norm, with_memory", [(1, True, False), (2, False, True)])
def test_attention_is_the_equations(heads, norm, with_memory):
    model = nn.SRUpp(3, 4, 6, num_layers=1, num_heads=heads, attn_layer_norm=norm).double().eval()
    layer = model.rnn_lst[0]
    torch.nn.init.constant_(layer.transform_module.alpha, 0.7)
    x, memory = torch.randn(5, 2, 3, dtype=DOUBLE), torch.randn(2, 2, 3, dtype=DOUBLE) if with_memory else None
    mask, pad = torch.randn(5, 7 if with_memory else 5, dtype=DOUBLE), torch.zeros(5, 2, dtype=torch.bool)
    pad[3:, 1] = True
    output, _, saved = model(x, None, pad, mask, [memory] if with_memory else None)
    assert torch.equal(saved["saved_inputs"][0], x)
    us = []
    for b in range(2):
        allowed = mask.clone()
        allowed[:, mask.shape[1] - 5 :][:, pad[:, b]] = -math.inf
        us.append(scalar_attention(layer.transform_module, x[:, b], memory[:, b] if with_memory else None, allowed))
    plain = nn.SRU(3, 4, num_layers=1, custom_m=Given(torch.stack(us, 1).detach())).double()
    plain.rnn_lst[0].weight_c, plain.rnn_lst[0].bias = layer.weight_c, layer.bias
    torch.testing.assert_close(output, plain(x, None, pad)[0])


class Given(torch.nn.Module):
    def __init__(self, u):
        super().__init__()
        self.u = u

    def reset_parameters(self):
        pass

    def forward(self, x):
        return self.u


def test_state_dict_is_the_package_s():
    model = nn.SRUpp(3, 4, 2, attention_last_n_layers=1, layer_norm=True, proj_input_to_hidden_first=True)
    found = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    recurrent = {"weight_c": (8,), "bias": (8,), "scale_x": (1,), "layer_norm.weight": (4,), "layer_norm.bias": (4,)}
    linear = {"linear1.weight": (2, 4), "layer_norm.weight": (2,), "layer_norm.bias": (2,)}
    attention = {"alpha": (1,), "linear2.weight": (4, 2), "linear3.weight": (12, 2)}
    expected = {f"rnn_lst.{i}.{name}": shape for i in (0, 1) for name, shape in recurrent.items()}
    expected |= {f"rnn_lst.{i}.transform_module.{name}": shape for i in (0, 1) for name, shape in linear.items()}
    expected |= {"rnn_lst.0.transform_module.linear2.weight": (12, 2), "input_to_hidden.weight": (4, 3)}
    expected |= {f"rnn_lst.1.transform_module.{name}": shape for name, shape in attention.items()}
    assert found == expected
    assert model.rnn_lst[1].transform_module.alpha.item() == 0
    model.reset_parameters()


@pytest.mark.parametrize("chunks", [[6], [1] * 6, [2, 0, 3, 1]], ids=str)
def test_streams_give_what_a_causal_call_gives(chunks):
    model = nn.SRUpp(3, 4, 2, rescale=True).eval()
    for layer in model.rnn_lst:
        torch.nn.init.constant_(layer.transform_module.alpha, 0.5)
    x, mask = torch.randn(6, 2, 3), torch.full((6, 6), -math.inf).triu(1)
    whole, c_n, _ = model(x, attn_mask=mask)
    state, parts = model.init_state(2), []
    for chunk in x.split(chunks):
        y, state = model.extend(chunk, state) if len(chunk) != 1 else model.step(chunk[0], state)
        parts.append(y.view(-1, 2, 4))
    torch.testing.assert_close(torch.cat(parts), whole)
    torch.testing.assert_close(state[0].transpose(0, 1), c_n)
    fresh = model.reset(state, torch.tensor([True, False]))
    again, _ = model.extend(x, fresh)
    torch.testing.assert_close(again[:, 0], whole[:, 0])
    both = model(torch.cat([x, x]), attn_mask=torch.full((12, 12), -math.inf).triu(1))[0]
    torch.testing.assert_close(again[:, 1], both[6:, 1])


def test_streams_of_bounded_memory():
    """Any split gives what a call gives whose steps see so many before them."""
    model = nn.SRUpp(3, 4, 2, num_layers=1).eval()
    torch.nn.init.constant_(model.rnn_lst[0].transform_module.alpha, 0.5)
    x = torch.randn(9, 2, 3)
    distance = torch.arange(9).unsqueeze(1) - torch.arange(9)
    whole, *_ = model(x, attn_mask=torch.zeros(9, 9).masked_fill((distance < 0) | (distance > 2), -math.inf))
    for chunks in ([9], [1] * 9, [4, 0, 2, 3]):
        state, parts = model.init_state(2, memory_length=2), []
        for chunk in x.split(chunks):
            y, state = model.extend(chunk, state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts), whole)
        assert state[1].shape == (2, 2) and not state[1].any() and torch.equal(state[2][0], x[7:].transpose(0, 1))
    again, _ = model.extend(x, model.reset(state, torch.tensor([True, False])))
    torch.testing.assert_close(again[:, 0], whole[:, 0])


def test_packed_sequences():
    model, x = nn.SRUpp(3, 4, 2, bidirectional=True, nn_rnn_compatible_return=True).eval(), torch.randn(5, 3, 3)
    lengths = [3, 5, 1]
    output, c_n, _ = model(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)
    for b, length in enumerate(lengths):
        alone, c_alone, _ = model(x[:length, b : b + 1])
        torch.testing.assert_close(padded[:length, b : b + 1], alone)
        torch.testing.assert_close(c_n[:, b : b + 1], c_alone)


def test_trains_compiles_and_copies():
    model, x = nn.SRUpp(3, 4, 2, dropout=0.1, attn_dropout=0.1), torch.randn(5, 2, 3)
    model(x)[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)[0]
    torch.testing.assert_close(found, model(x)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: m(x[0]), ValueError, "SRUpp: expected input to be 3-D"),
        (lambda m, x: m(x[..., :2]), ValueError, "Expected 3, got 2"),
        (lambda m, x: m(x, torch.zeros(2, 2, 3)), ValueError, r"Expected hidden size \(2, 2, 4\)"),
        (lambda m, x: m(x, attn_mask=torch.zeros(5, 4)), ValueError, r"attn_mask to have shape \(5, 5\)"),
        (lambda m, x: m(x, attn_mask=torch.zeros(5, 5) > 0), TypeError, "attn_mask to be floating point"),
        (lambda m, x: m(x, memory=[x]), ValueError, "memory to be a list of 2 tensors"),
        (lambda m, x: m(x, memory=[x, x]), ValueError, r"memory\[1\] to have shape \(M, 2, 4\)"),
        (lambda m, x: m(x, memory_mask_pad=torch.zeros(5, 2)), ValueError, "expected memory with memory_mask_pad"),
        (lambda m, x: m(x, mask_pad=torch.zeros(2, 5)), ValueError, r"mask_pad to have shape \(5, 2\)"),
        (lambda m, x: m.extend(x, m.init_state(2)[:2]), TypeError, r"state to be a tuple \(c, mask_pad, memory\)"),
        (lambda m, x: nn.SRUpp(3, 4, 2, bidirectional=True).init_state(1), RuntimeError, "sees the future"),
        (lambda m, x: nn.SRUpp(3, 4, 3, num_heads=2), ValueError, "proj_size to be a multiple of num_heads, 2, but"),
        (lambda m, x: nn.SRUpp(3, 4, 2, dropout=2), ValueError, "SRUpp: expected dropout to be between 0 and 1"),
        (
            lambda m, x: nn.SRUpp(3, 4, 2, attention_every_n_layers=2, attention_last_n_layers=1),
            ValueError,
            "attention_every_n_layers or attention_last_n_layers",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.SRUpp(3, 4, 2), torch.zeros(5, 2, 3))
