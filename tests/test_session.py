"""Sessions against the module they run."""

import pytest
import torch

import seqaccel


def make(num_layers=2, batch_size=3, bias=True, batch_first=False, input_size=5, hidden_size=19):
    module = seqaccel.nn.LSTM(input_size, hidden_size, num_layers, bias=bias, batch_first=batch_first)
    return module, seqaccel.Session(module, batch_size)


def expected(module, x):
    with torch.no_grad(), seqaccel.backend("reference"):
        return module(x)[0]


def assert_same(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers, batch_size, hidden_size", [(1, 1, 64), (2, 3, 19), (3, 21, 33), (1, 1, 7)])
def test_steps_and_chunks_give_what_the_module_gives(num_layers, batch_size, hidden_size, bias):
    module, session = make(num_layers, batch_size, bias, hidden_size=hidden_size)
    x = torch.randn(23, batch_size, 5)
    parts = [session.step(x[0])[None], session.extend(x[1:1]), session.extend(x[1:17]), session.extend(x[17:19])]
    parts += [session.step(x_t)[None] for x_t in x[19:]]
    assert_same(torch.cat(parts), expected(module, x))


def test_batch_first_follows_the_module():
    module, session = make(batch_first=True)
    x = torch.randn(3, 11, 5)
    assert_same(session.extend(x), expected(module, x))


def test_the_session_keeps_its_own_weights():
    module, session = make()
    x = torch.randn(4, 3, 5)
    wanted = expected(module, x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    del module
    assert_same(session.extend(x), wanted)


def test_reset_starts_the_chosen_streams_anew():
    module, session = make()
    x, mask = torch.randn(9, 3, 5), torch.tensor([True, False, True])
    session.extend(x[:4])
    session.reset(mask)
    after = session.extend(x[4:])
    assert_same(after[:, mask], expected(module, x[4:])[:, mask])
    assert_same(after[:, ~mask], expected(module, x)[4:, ~mask])
    session.reset()
    assert_same(session.extend(x), expected(module, x))


def test_select_moves_streams():
    module, session = make()
    x, indices = torch.randn(9, 3, 5), torch.tensor([2, 2, 0])
    session.extend(x[:4])
    session.select(indices)
    joined = torch.cat([x[:4, indices], x[4:]])
    assert_same(session.extend(x[4:]), expected(module, joined)[4:])


def test_state_dict_goes_on_where_it_was():
    module, session = make()
    x = torch.randn(9, 3, 5)
    session.extend(x[:4])
    saved = session.state_dict()
    first = session.extend(x[4:])
    other = seqaccel.Session(module, 3)
    other.load_state_dict(saved)
    assert torch.equal(other.extend(x[4:]), first)
    assert saved["h"].shape == saved["c"].shape == (2, 3, 19)


def test_bad_arguments_are_named():
    module, session = make()
    with pytest.raises(TypeError, match="module: expected a seqaccel.nn.LSTM, but got Linear"):
        seqaccel.Session(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="bidirectional"):
        seqaccel.Session(seqaccel.nn.LSTM(2, 3, bidirectional=True))
    with pytest.raises(ValueError, match="proj_size"):
        seqaccel.Session(seqaccel.nn.LSTM(2, 3, proj_size=2))
    with pytest.raises(ValueError, match="float32 parameters on the CPU, but weight_ih_l0 is torch.float64"):
        seqaccel.Session(seqaccel.nn.LSTM(2, 3).double())
    with pytest.raises(ValueError, match="weights: expected 'float32', but got 'int3'"):
        seqaccel.Session(module, weights="int3")
    with pytest.raises(ValueError, match="batch_size"):
        seqaccel.Session(module, 0)
    with pytest.raises(ValueError, match=r"x: expected shape \(3, 5\), but got \(3, 4\)"):
        session.step(torch.randn(3, 4))
    with pytest.raises(TypeError, match="x: expected float32"):
        session.step(torch.randn(3, 5).double())
    with pytest.raises(ValueError, match=r"x: expected shape \(T, 3, 5\)"):
        session.extend(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(3,\)"):
        session.reset(torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="indices: expected 3 integers from 0 to 2"):
        session.select(torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="state_dict"):
        session.load_state_dict({"h": torch.zeros(2, 3, 19)})
