"""Scans with resets: the episodes of a row give what they give apart."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_cases import COMPLEX, CPP, DOUBLE, EVERY_BACKEND, TRITON, instruction_sets, linear_inputs, needs_cpp, to
from tolerances import assert_close
from torch.nn.utils.rnn import pack_padded_sequence

import seqaccel
from seqaccel import nn
from seqaccel.functional import linear_scan


def episodes(reset):
    """The steps of each episode of a row of reset (T,)."""
    starts = sorted({0, *reset.nonzero().flatten().tolist(), len(reset)})
    return [slice(*ends) for ends in itertools.pairwise(starts)]


def masks(batch, steps):
    """Some, none and all; some begin with the first step."""
    yield torch.rand(batch, steps) < 0.2
    yield torch.zeros(batch, steps, dtype=torch.bool)
    yield torch.ones(batch, steps, dtype=torch.bool)
    yield torch.arange(steps).expand(batch, steps) == torch.arange(batch).unsqueeze(1)


def apart(a, b, h_0, reset, reverse):
    """h and h_last of each episode by a call of its own."""
    rows, last = [], []
    for i in range(a.shape[0]):
        parts = episodes(reset[i])
        found = []
        for part in parts:
            first = part is parts[-1] if reverse else part is parts[0] and not reset[i, 0]
            state = h_0[i : i + 1] if first and h_0 is not None else None
            found.append(linear_scan(a[i : i + 1, part], b[i : i + 1, part], state, reverse=reverse, return_last=True))
        rows.append(torch.cat([h for h, _ in found], 1))
        last.append(found[0 if reverse else -1][1])
    return torch.cat(rows), torch.cat(last)


def outputs_and_gradients(function, tensors, grads):
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}
    results = function(**(tensors | leaves))
    found = torch.autograd.grad(results, leaves.values(), grads, allow_unused=True, materialize_grads=True)
    return dict(zip(("h", "h_last", *leaves), (*results, *found), strict=True))


def check(sizes, dtype, reverse, with_h_0=True, reset=None):
    tensors = linear_inputs(*sizes, with_h_0, is_complex=dtype.is_complex)
    wide = torch.complex128 if dtype.is_complex else DOUBLE
    grads = torch.randn(sizes).to(dtype), torch.randn(sizes[0], sizes[2]).to(dtype)
    for mask in masks(*sizes[:2]) if reset is None else [reset]:
        with seqaccel.backend("reference"):
            expected = outputs_and_gradients(
                lambda mask=mask, **t: apart(t["a"], t["b"], t["h_0"], mask, reverse),
                to(tensors, wide, grad=False),
                [g.to(wide) for g in grads],
            )
        found = outputs_and_gradients(
            lambda mask=mask, **t: linear_scan(**t, reverse=reverse, reset=mask, return_last=True),
            to(tensors, dtype, grad=False),
            grads,
        )
        for name, wanted in expected.items():
            bound = "scan_of_saved_states" if name == "a" else "scan"
            assert_close(found[name].detach(), wanted.detach(), bound, dtype, backward=name[0] != "h", what=name)


@pytest.mark.parametrize("backend", ["reference", CPP])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16, COMPLEX[0]], ids=str)
def test_linear_scan_is_its_episodes_apart(dtype, reverse, backend, poison):
    with seqaccel.backend(backend):
        for sizes, with_h_0 in [((2, 7, 5), True), ((3, 37, 1), True), ((2, 23, 3), False), ((1, 9, 40), True)]:
            check(sizes, dtype, reverse, with_h_0)


@needs_cpp
@pytest.mark.parametrize("isa", instruction_sets())
def test_every_instruction_set(isa, poison):
    with seqaccel.backend("cpp"), seqaccel.backends.isa(isa):
        for width, reverse in itertools.product([1, 2, 7, 16, 37], [False, True]):
            check((2, 50, width), torch.float32, reverse, reset=torch.rand(2, 50) < 0.1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backend", [TRITON])
def test_triton(backend, reverse, poison):
    with seqaccel.backend(backend):
        check((2, 7, 5), torch.float32, reverse)
        check((1, 1100, 1), torch.float32, reverse, reset=torch.rand(1, 1100) < 0.01)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 40), st.integers(0, 20), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
@needs_cpp
def test_any_size(batch, steps, width, density, reverse, seed):
    torch.manual_seed(seed)
    if batch * steps == 0:  # nothing to run apart
        a, h_0 = torch.rand(batch, steps, width), torch.randn(batch, width)
        reset = torch.ones(batch, steps, dtype=torch.bool)
        h, h_last = linear_scan(a, a, h_0, reset=reset, return_last=True)
        assert h.shape == a.shape and torch.equal(h_last, h_0)
        return
    with seqaccel.backend("cpp"):
        check((batch, steps, width), torch.float32, reverse, reset=torch.rand(batch, steps) < density)


@pytest.mark.parametrize("backend", [CPP, TRITON])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 2])
def test_cut_in_time(width, reverse, backend):
    """Long rows, which threads share, and programs on a GPU: as sequences packed by offsets."""
    steps = 120_000 if backend == "cpp" else 5_000
    reset = torch.rand(1, steps) < 5 / steps
    reset[0, steps // 2] = True
    ends = torch.tensor([part.start for part in episodes(reset[0])] + [steps])
    a, b = torch.rand(1, steps, width), torch.randn(1, steps, width)
    h_0 = torch.randn(1, width)
    states = torch.zeros(len(ends) - 1, width)
    states[-1 if reverse else 0] = h_0
    with seqaccel.backend(backend):
        results = []
        for options in ({"h_0": h_0, "reset": reset}, {"h_0": states, "cu_seqlens": ends}):
            leaves = [t.clone().requires_grad_() for t in (a, b)]
            h = linear_scan(*leaves, **options, reverse=reverse)
            results.append((h, *torch.autograd.grad(h, leaves, b)))
    for ours, wanted in zip(*results, strict=True):
        assert_close(ours.detach(), wanted.detach(), "scan_of_saved_states", torch.float32, backward=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("backend", [CPP, TRITON])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3, 40])
def test_what_is_not_finite_stays_in_its_episode(width, reverse, backend):
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, [20, 35]] = True
    tensors = {"a": torch.rand(1, 60, width), "b": torch.randn(1, 60, width), "h_0": torch.randn(1, width)}
    grads = torch.randn(1, 60, width), torch.randn(1, width)

    def run(tensors, grads):
        return outputs_and_gradients(
            lambda **t: linear_scan(**t, reset=reset, reverse=reverse, return_last=True), tensors, grads
        )

    with seqaccel.backend(backend):
        expected = run(tensors, grads)
        for bad in (float("nan"), float("inf")):
            spoilt = {name: t.clone() for name, t in tensors.items()}
            spoilt["a"][:, 20:35] = spoilt["b"][:, 20:35] = bad
            grad = grads[0].clone()
            grad[:, 20:35] = bad
            found = run(spoilt, (grad, grads[1]))
            for name, value in found.items():
                for part in (slice(0, 20), slice(35, 60)) if value.dim() == 3 else (slice(None),):
                    assert torch.equal(value[:, part], expected[name][:, part]), name


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_every_layout(backend):
    """Masks with the dimensions before time, and with those behind it."""
    a, b, h_0 = torch.rand(2, 9, 3), torch.randn(2, 9, 3), torch.randn(2, 3)
    reset = torch.rand(2, 9) < 0.3
    with seqaccel.backend(backend):
        h, last = linear_scan(a, b, h_0, reset=reset, return_last=True)
        found, found_last = linear_scan(
            a.transpose(0, 1), b.transpose(0, 1), h_0, dim=0, reset=reset.t(), return_last=True
        )
        torch.testing.assert_close(found.transpose(0, 1), h)
        torch.testing.assert_close(found_last, last)
        one = linear_scan(a[0], b[0], h_0[0], reset=reset[0])
        torch.testing.assert_close(one, h[0])
        channels = reset.unsqueeze(1).expand(2, 3, 9)
        rows = linear_scan(a.mT, b.mT, h_0, dim=-1, reset=channels)
        torch.testing.assert_close(rows.mT, h)


def test_compiled_mapped_and_differentiated_twice():
    a, b, h_0 = (t.requires_grad_() for t in to(linear_inputs(2, 6, 3), DOUBLE).values())
    reset = torch.tensor([[True, False, False, True, True, False], [False, False, True, False, False, False]])

    def run(a, b, h_0, reset=reset, reverse=False):
        return linear_scan(a, b, h_0, reset=reset, reverse=reverse, return_last=True)

    for reverse in (False, True):
        for backend in ("reference", "auto"):
            with seqaccel.backend(backend):
                inputs = (a, b, h_0, reset, reverse)
                assert torch.autograd.gradcheck(run, inputs) and torch.autograd.gradgradcheck(run, inputs)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, b, h_0), run(a, b, h_0))
    mapped = torch.vmap(run)(*(torch.stack([t, 2 * t]) for t in (a, b, h_0)), torch.stack([reset, ~reset]))
    torch.testing.assert_close(mapped[0][1], run(2 * a, 2 * b, 2 * h_0, ~reset)[0])


def test_errors_name_the_argument():
    a, reset = torch.ones(2, 5, 3), torch.zeros(2, 5, dtype=torch.bool)
    for mask, message in [
        (reset.float(), r"reset to be bool of shape \(2, 5\)"),
        (reset[:, :4], r"reset to be bool of shape \(2, 5\)"),
        (reset[0], r"reset to be bool of shape \(2, 5\)"),
        (reset.to("meta"), "reset is on meta"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            linear_scan(a, a, reset=mask)
    with pytest.raises(TypeError, match="reset to be a Tensor"):
        linear_scan(a, a, reset=[True])
    with pytest.raises(ValueError, match="no reset with cu_seqlens"):
        linear_scan(a[:1], a[:1], reset=reset[:1], cu_seqlens=torch.tensor([0, 5]))


# ---- modules ----

MODULES = {
    "SRU": lambda **o: nn.SRU(3, 4, **o),
    "SRU same size": lambda **o: nn.SRU(4, 4, layer_norm=True, use_tanh=True, **o),
    "SRUpp": lambda **o: nn.SRUpp(3, 4, 4, attn_layer_norm=False, **o),
    "QRNN": lambda **o: nn.QRNN(3, 4, 2, **o),
    "QRNN window": lambda **o: nn.QRNN(3, 4, 2, window=2, output_gate=False, **o),
    "MinGRU": lambda **o: nn.MinGRU(3, 4, 2, **o),
    "MinLSTM": lambda **o: nn.MinLSTM(3, 4, 2, candidate="g", **o),
    "IndRNN": lambda **o: nn.IndRNN(3, 4, 2, **o),
}


def modules_apart(model, x, state, reset):
    """The output and the last state, each stream and episode by a call of its own."""
    by_features = isinstance(model, (nn.SRU, nn.SRUpp))  # where a state has its directions
    columns, states = [], []
    for i in range(x.shape[1]):
        parts = episodes(reset[:, i])
        outputs, ends = [], []
        for part in parts:
            given = torch.zeros_like(state[:, i : i + 1])
            forwards, against = given, given
            if part is parts[0] and not reset[0, i]:
                forwards = state[:, i : i + 1]
            if part is parts[-1]:
                against = state[:, i : i + 1]
            if not model.bidirectional:
                given = forwards
            elif by_features:
                given = torch.cat([forwards[..., :4], against[..., 4:]], -1)
            else:
                given = torch.stack([forwards[::2], against[1::2]], 1).flatten(0, 1)
            y, last, *_ = model(x[part, i : i + 1], given)
            outputs.append(y)
            ends.append(last)
        columns.append(torch.cat(outputs))
        last = ends[-1]
        if model.bidirectional and by_features:
            last = torch.cat([ends[-1][..., :4], ends[0][..., 4:]], -1)
        elif model.bidirectional:
            last = torch.stack([ends[-1][::2], ends[0][1::2]], 1).flatten(0, 1)
        states.append(last)
    return torch.cat(columns, 1), torch.cat(states, 1)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules_are_their_episodes_apart(name, bidirectional):
    for dtype in (torch.float32, DOUBLE):
        model = MODULES[name](bidirectional=bidirectional, dtype=dtype)
        if name == "SRUpp":
            torch.nn.init.ones_(model.rnn_lst[1].transform_module.alpha)
        x = torch.randn(9, 4, model.input_size, dtype=dtype, requires_grad=True)
        layers, width = (2, 8) if "SRU" in name and bidirectional else (4 if bidirectional else 2, 4)
        state = torch.randn(layers, 4, width, dtype=dtype, requires_grad=True)
        leaves = [x, state, *model.parameters()]
        for mask in masks(4, 9):
            reset = mask.t()
            y, last, *_ = model(x, state, reset=reset)
            wanted = modules_apart(model, x, state, reset)
            grads = torch.randn_like(y), torch.randn_like(last)
            found = torch.autograd.grad((y, last), leaves, grads, allow_unused=True, materialize_grads=True)
            expected = torch.autograd.grad(wanted, leaves, grads, allow_unused=True, materialize_grads=True)
            close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
            torch.testing.assert_close((y, last, *found), (*wanted, *expected), **close)
            assert (found[1][:: 2 if bidirectional and "SRU" not in name else 1, reset[0], :4] == 0).all()


@pytest.mark.parametrize("name", [name for name in MODULES if "SRU" not in name])
def test_module_layouts(name):
    model, first = (MODULES[name](batch_first=batch_first) for batch_first in (False, True))
    first.load_state_dict(model.state_dict())
    x, hx, reset = torch.randn(7, 3, 3), torch.randn(2, 3, 4), torch.rand(7, 3) < 0.3
    y, h_n = model(x, hx, reset=reset)
    torch.testing.assert_close(first(x.transpose(0, 1), hx, reset=reset.t()), (y.transpose(0, 1), h_n))
    torch.testing.assert_close(model(x[:, 1], hx[:, 1], reset=reset[:, 1]), (y[:, 1], h_n[:, 1]))


@pytest.mark.parametrize("name", MODULES)
def test_module_errors_name_the_argument(name):
    model, reset = MODULES[name](), torch.zeros(5, 2, dtype=torch.bool)
    x = torch.randn(5, 2, model.input_size)
    for mask in (reset.int(), reset.t(), reset[:4], reset.to("meta"), [True]):
        with pytest.raises((TypeError, ValueError, RuntimeError), match="reset"):
            model(x, reset=mask)
    with pytest.raises(ValueError, match="no reset with a PackedSequence; give a padded batch"):
        model(pack_padded_sequence(x, [5, 3]), reset=reset)


@pytest.mark.parametrize("kept", [0, 2])
def test_memory_of_attention_belongs_to_the_episode_that_goes_on(kept):
    model = nn.SRUpp(3, 4, 2, num_layers=1).eval()
    torch.nn.init.ones_(model.rnn_lst[0].transform_module.alpha)
    x, memory = torch.randn(6, 2, 3), [torch.randn(kept, 2, 3)]
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[0, 0] = reset[4, 1] = True
    y, _, _ = model(x, memory=memory, reset=reset)
    torch.testing.assert_close(y[:, :1], model(x[:, :1])[0])
    torch.testing.assert_close(y[:4, 1:], model(x[:4, 1:], memory=[memory[0][:, 1:]])[0])
    torch.testing.assert_close(y[4:, 1:], model(x[4:, 1:])[0])
    pad = torch.zeros(6, 2, dtype=torch.bool)
    pad[5, 1] = True
    y, _, _ = model(x, mask_pad=pad, memory=memory, reset=reset)
    torch.testing.assert_close(y[4:5, 1:], model(x[4:5, 1:])[0])
