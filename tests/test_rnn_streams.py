"""Recurrent modules on a stream: chunk by chunk, step by step, a batch of independent ones."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_rnn_module import MODULES, each_module, flat, make

import seqaccel


def options_of(name):
    return {"zoneout": 0.2} if name != "RNN" else {}


@settings(deadline=None, max_examples=40)
@given(
    module=st.sampled_from(MODULES), chunks=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    batch=st.integers(1, 5), layers=st.integers(1, 3), batch_first=st.booleans(),
)  # fmt: skip
def test_any_chunking_gives_what_one_call_gives(module, chunks, batch, layers, batch_first):
    """In eval, with zoneout's expectation."""
    name, options = module
    module = make(name, options, num_layers=layers, batch_first=batch_first, **options_of(name)).eval()
    time = 1 if batch_first else 0
    x = torch.randn(*((batch, sum(chunks)) if batch_first else (sum(chunks), batch)), 5, dtype=torch.float64)
    with torch.no_grad():
        state, pieces = module.init_state(batch), []
        for chunk in x.split(chunks, time):
            y, state = module.extend(chunk, state)
            pieces.append(y)
        if sum(chunks):
            output, *last = flat(module(x))
            torch.testing.assert_close(torch.cat(pieces, time), output)
            for part, end in zip(state, last, strict=True):
                torch.testing.assert_close(part, end.transpose(0, 1))
        state, pieces = module.init_state(batch), []
        for x_t in x.unbind(time):
            y, state = module.step(x_t, state)
            pieces.append(y)
        if pieces:
            torch.testing.assert_close(torch.stack(pieces, time), output)


@each_module
def test_streams_are_independent(name, options):
    module = make(name, options, num_layers=2)
    x, fresh = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)
    _, state = module.extend(x, module.init_state(3))
    reset = module.reset(state, torch.tensor([False, True, False]))
    y, _ = module.extend(fresh, reset)
    torch.testing.assert_close(y[:, 1], module(fresh[:, 1])[0])
    torch.testing.assert_close(y[:, 0], module(torch.cat((x, fresh))[:, 0])[0][6:])
    order = torch.tensor([2, 2, 0, 1])
    y, _ = module.extend(fresh[:, order], module.select(state, order))
    torch.testing.assert_close(y, module(torch.cat((x, fresh))[:, order])[0][6:])
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    assert all(torch.equal(a, b) for a, b in zip(torch.load(saved), state, strict=True))


def test_what_does_not_stream():
    for name, part in (("LSTM", r"hidden\[0\]"), ("GRU", "hidden")):
        module = getattr(seqaccel.nn, name)(5, 8, bidirectional=True)
        with pytest.raises(RuntimeError, match=f"{name}: a bidirectional module cannot run on a stream"):
            module.init_state(2)
        module = getattr(seqaccel.nn, name)(5, 8)
        with pytest.raises(ValueError, match="expected x to be a chunk of 3 dimensions, but got 2"):
            module.extend(torch.zeros(3, 5), module.init_state(3))
        with pytest.raises(ValueError, match="expected x_t to be one step"):
            module.step(torch.zeros(1, 3, 5), module.init_state(3))
        with pytest.raises(RuntimeError, match=f"Expected {part} size"):
            module.step(torch.zeros(3, 5), module.init_state(2))
