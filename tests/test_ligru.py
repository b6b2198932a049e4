"""The light GRU: the module against speechbrain's loop, given products of the input, and speechbrain's layer in a
model."""

import pytest
import torch
from instruction_sets import ISAS, isa_fixture
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import seqaccel
from seqaccel.functional import ligru

isa = isa_fixture(ISAS)


class Layer(nn.Module):
    """speechbrain's LiGRU_Layer: (B, T, I) to (B, T, directions * H)."""

    def __init__(self, inputs, hidden, act, norm, bidirectional=False, dropout=0.0):
        super().__init__()
        self.w, self.u = nn.Linear(inputs, 2 * hidden, bias=False), nn.Linear(hidden, 2 * hidden, bias=False)
        self.norm = nn.BatchNorm1d(2 * hidden, momentum=0.05) if norm == "batch_norm" else nn.LayerNorm(2 * hidden)
        self.act, self.bidirectional, self.dropout, self.hidden = act(), bidirectional, dropout, hidden
        for parameter in self.norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def _sample_drop_mask(self, w):
        mask = torch.arange(w.shape[0] * self.hidden).view(-1, self.hidden) % 3 > 0
        return mask * 1.5 if self.training and self.dropout else torch.ones(1)

    def _ligru_cell(self, w, ht):
        hiddens, mask = [], self._sample_drop_mask(w)
        for w_t in w.unbind(1):
            at, zt = (w_t + self.u(ht)).chunk(2, 1)
            zt = zt.sigmoid()
            ht = zt * ht + (1 - zt) * self.act(at) * mask
            hiddens.append(ht)
        return torch.stack(hiddens, 1)

    def forward(self, x, hx=None):
        x = torch.cat([x, x.flip(1)]) if self.bidirectional else x
        w = self.w(x)
        w = self.norm(w.flatten(0, 1)).view(w.shape)
        h = self._ligru_cell(w, w.new_zeros(w.shape[0], self.hidden) if hx is None else hx)
        if not self.bidirectional:
            return h
        forwards, backwards = h.chunk(2)
        return torch.cat([forwards, backwards.flip(1)], 2)


ACTS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def both(act, norm, bidirectional, layers=2):
    """speechbrain's layers, and our module with their weights."""
    widths = [4] + [6 * (1 + bidirectional)] * (layers - 1)
    theirs = nn.Sequential(*(Layer(width, 6, ACTS[act], norm, bidirectional) for width in widths))
    ours = seqaccel.nn.LiGRU(
        4, 6, layers, batch_first=True, bidirectional=bidirectional, nonlinearity=act, normalization=norm
    )
    names = {"w.weight": "weight_ih_l{}", "u.weight": "weight_hh_l{}"}
    state = {}
    for key, value in theirs.state_dict().items():
        k, _, name = key.partition(".")
        state[names[name].format(k) if name in names else f"norm_l{k}.{name.removeprefix('norm.')}"] = value
    ours.load_state_dict(state)
    return theirs.double(), ours.double()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("act", ACTS)
def test_module(act, norm, bidirectional):
    """Training and eval mode, gradients, running statistics; one sequence without a batch."""
    theirs, ours = both(act, norm, bidirectional)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    for _ in range(2):
        found = []
        for model in (theirs, ours):
            output = model(x) if model is theirs else model(x)[0]
            found.append([output, *torch.autograd.grad((output * output).sum(), [*model.parameters()])])
        ours_grads = dict(zip(dict(ours.named_parameters()), found[1][1:], strict=True))
        theirs_grads = dict(zip((n for n, _ in theirs.named_parameters()), found[0][1:], strict=True))
        torch.testing.assert_close(found[1][0], found[0][0])
        assert len(ours_grads) == len(theirs_grads)
        for k in range(2):
            for mine, other in (("weight_ih_l{}", "{}.w.weight"), ("weight_hh_l{}", "{}.u.weight")):
                torch.testing.assert_close(ours_grads[mine.format(k)], theirs_grads[other.format(k)])
            for name in ("weight", "bias"):
                torch.testing.assert_close(ours_grads[f"norm_l{k}.{name}"], theirs_grads[f"{k}.norm.{name}"])
        theirs.eval(), ours.eval()
        for k, layer in enumerate(theirs):
            if norm == "batch_norm":
                torch.testing.assert_close(ours.get_submodule(f"norm_l{k}").running_mean, layer.norm.running_mean)
                # speechbrain's two directions count every step twice, of which the unbiased variance depends.
                ours.get_submodule(f"norm_l{k}").running_var.copy_(layer.norm.running_var)
    output, h_n = ours(x)
    torch.testing.assert_close(ours(x[1]), (output[1], h_n[:, 1]))
    h_0 = torch.randn(2 * (1 + bidirectional), 3, 6, dtype=torch.float64)
    if not bidirectional:
        torch.testing.assert_close(ours(x, h_0)[0], theirs[1](theirs[0](x, h_0[0]), h_0[1]))


def test_dropout_is_a_mask_of_the_sequence():
    """A unit that is dropped keeps its state but for the gate; the others are scaled; eval mode does nothing."""
    module = seqaccel.nn.LiGRU(4, 50, dropout=0.4)
    x = torch.randn(9, 3, 4)
    torch.manual_seed(0)
    output, _ = module(x)
    dropped = (output == 0).all(0)
    assert 0.2 < dropped.float().mean() < 0.6
    module.zero_grad()
    output.sum().backward()
    torch.manual_seed(0)
    mask = nn.functional.dropout(torch.ones(1, 3, 50), 0.4)[0]
    w = nn.functional.linear(x, module.weight_ih_l0)
    w = nn.functional.batch_norm(w.flatten(0, 1), None, None, training=True).view(w.shape)
    torch.testing.assert_close(ligru(w, None, None, module.weight_hh_l0, mask=mask)[0], output)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed(bidirectional):
    """Of padded sequences, each as it runs alone: in eval mode, where the norm is fixed."""
    module = seqaccel.nn.LiGRU(4, 6, 2, bidirectional=bidirectional).eval()
    sequences = [torch.randn(n, 4) for n in (3, 7, 5)]
    packed = pack_padded_sequence(pad_sequence(sequences), torch.tensor([3, 7, 5]), enforce_sorted=False)
    output, h_n = module(packed)
    output, _ = pad_packed_sequence(output)
    for b, x in enumerate(sequences):
        alone, last = module(x)
        torch.testing.assert_close(output[: len(x), b], alone)
        torch.testing.assert_close(h_n[:, b], last)
    module.train()(packed)[0].data.sum().backward()
    torch.testing.assert_close(
        module.norm_l0.running_mean / (1 - 0.95), nn.functional.linear(packed.data, module.weight_ih_l0).mean(0)
    )


def test_stream():
    module = seqaccel.nn.LiGRU(4, 6, 2).eval()
    x = torch.randn(7, 3, 4)
    output, h_n = module(x)
    state, parts = module.init_state(3), []
    for part in x.split([2, 4, 1]):
        y, state = module.extend(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), output)
    torch.testing.assert_close(state[0].transpose(0, 1), h_n)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_of_the_input_may_be_given(isa, poison, act, masked, dtype):
    """Without weight_ih: the same as with the identity, forward and every gradient; ragged, both ways."""
    T, B, H = 6, 5, 19
    x, h_0 = torch.randn(T, B, 2 * H).to(dtype), torch.randn(B, H).to(dtype)
    weight, bias, mask = torch.randn(2 * H, H).to(dtype) / 5, torch.randn(2 * H).to(dtype), torch.rand(B, H).to(dtype)
    options = {"nonlinearity": act, "lengths": torch.tensor([6, 1, 4, 6, 2])}
    for reverse in (False, True):
        found = []
        for weight_ih in (None, torch.eye(2 * H, dtype=dtype)):
            leaves = [t.clone().requires_grad_() for t in (x, h_0, weight, bias, *[mask] * masked)]
            first, state, w, b, *m = leaves
            output, h_n = ligru(first, state, weight_ih, w, b, None, *m, reverse=reverse, **options)
            loss = (output.float() ** 2).sum() + (h_n.float() ** 3).sum()
            found.append([output, h_n, *torch.autograd.grad(loss, leaves)])
        tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, **tolerance)
    with pytest.raises(ValueError, match=f"expected input to have {2 * H} features without weight_ih"):
        ligru(x[..., 1:], h_0, None, weight)


@pytest.mark.parametrize("act", ACTS)
def test_speechbrain_s_layer_in_a_model(act):
    kind = type("LiGRU_Layer", (Layer,), {"__module__": "speechbrain.nnet.RNN"})
    x = torch.randn(3, 7, 4)
    for bidirectional in (False, True):
        for mode in (True, False):
            layer = kind(4, 6, ACTS[act], "batch_norm", bidirectional, dropout=0.3).train(mode)
            found = []
            for convert in (False, True):
                if convert:
                    _, report = seqaccel.convert(layer, report=True)
                    assert report.rows[0].target == "seqaccel.functional.ligru" and isinstance(layer, kind)
                output = layer(x)
                found.append([output, *torch.autograd.grad((output * output).sum(), [*layer.parameters()])])
            for ours, theirs in zip(*found[::-1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    sine = kind(4, 6, nn.LeakyReLU, "batch_norm")
    _, report = seqaccel.convert(sine, report=True)
    assert "LeakyReLU" in report.rows[0].reason
