"""Recurrent layers in bfloat16 where nothing is kept for a backward pass: the operator rnn_forward_bfloat16."""

import functools

import pytest
import torch
from instruction_sets import NARROW_ISAS, isa_fixture
from rnn_cases import each_cell
from tolerances import assert_as_good_as, error

import seqaccel
from seqaccel.functional.rnn import CELLS

STOCK = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}


isa = isa_fixture(NARROW_ISAS)


def problem(cell, T, B, I, H, P=None, bias=True):
    """input, h_0, c_0 and the weights, all bfloat16."""
    spec, P = CELLS[cell], P or H
    sizes = {"G": spec.gates * H, "I": I, "H": H, "P": P, "3": 3}
    weights = []
    for name, shape in spec.weights.items():
        if (name == "weight_hr" and P == H) or (name.startswith("bias") and not bias):
            weights.append(None)
        else:
            scale = 0.3 if name.startswith("ln_") else H**-0.5
            weights.append((scale * torch.randn([sizes[letter] for letter in shape])).bfloat16())
    c_0 = torch.randn(B, H).bfloat16() if spec.has_cell_state else None
    return torch.randn(T, B, I).bfloat16(), 0.5 * torch.randn(B, P).bfloat16(), c_0, weights


def run(cell, input, h_0, c_0, weights, lengths=None, reverse=False):
    return torch.ops.seqaccel.rnn_forward_bfloat16(cell, input, h_0, c_0, weights, lengths, reverse)


def reference(dtype, cell, input, h_0, c_0, weights, lengths=None, reverse=False):
    h_0, c_0, *weights = (None if t is None else t.to(dtype) for t in (h_0, c_0, *weights))
    return seqaccel.reference.rnn.layer(cell, input.to(dtype), h_0, c_0, weights, lengths, None, None, reverse=reverse)


SHAPES = [(7, 3, 5, 20), (9, 1, 40, 70), (150, 2, 8, 16), (4, 29, 33, 33), (3, 2, 1, 1)]


@functools.cache
def case(cell, i):
    """The i-th problem of a cell, what the references in float64 and in bfloat16 give."""
    T, B, I, H = SHAPES[i]
    tensors = problem(cell, T, B, I, H, bias=i != 1)
    options = {"lengths": torch.randint(1, T + 1, (B,)) if i % 2 else None, "reverse": i % 3 == 2}
    results = [reference(dtype, cell, *tensors, **options) for dtype in (torch.float64, torch.bfloat16)]
    return tensors, options, *results


@each_cell("cpp")
def test_error_is_that_of_the_reference_in_bfloat16(cell, isa, poison):
    for i, shape in enumerate(SHAPES):
        tensors, options, expected, narrow = case(cell, i)
        for name, ours, theirs, wanted in zip(
            ("output", "h_n", "c_n"), run(cell, *tensors, **options), narrow, expected, strict=True
        ):
            if wanted is not None:
                assert_as_good_as(ours, theirs, wanted, what=f"{name} {shape}")


@pytest.mark.parametrize("cell", ["lstm", "peephole_lstm"])
def test_projection(cell, isa):
    tensors = problem(cell, 6, 3, 5, 20, P=7)
    expected, narrow = reference(torch.float64, cell, *tensors), reference(torch.bfloat16, cell, *tensors)
    for ours, theirs, wanted in zip(run(cell, *tensors), narrow, expected, strict=True):
        assert_as_good_as(ours, theirs, wanted)


@pytest.mark.parametrize("name", STOCK)
def test_modules_are_as_good_as_torchs(name):
    stock = STOCK[name](24, 40, num_layers=2, bidirectional=True).bfloat16()
    ours = getattr(seqaccel.nn, type(stock).__name__)(24, 40, num_layers=2, bidirectional=True).bfloat16()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(11, 3, 24).bfloat16()
    with torch.no_grad(), seqaccel.backend("cpp"):
        output = ours(x)[0]
        expected = ours.double()(x.double())[0]
        assert output.dtype == torch.bfloat16
        assert_as_good_as(output, stock(x)[0], expected)


def test_no_steps_and_no_rows():
    input, h_0, c_0, weights = problem("lstm", 0, 3, 5, 20)
    output, h_n, c_n = run("lstm", input, h_0, c_0, weights)
    assert output.shape == (0, 3, 20) and torch.equal(h_n, h_0) and torch.equal(c_n, c_0)
    input, h_0, c_0, weights = problem("lstm", 4, 0, 5, 20)
    assert [t.shape for t in run("lstm", input, h_0, c_0, weights)] == [(4, 0, 20), (0, 20), (0, 20)]


def test_lengths_are_clamped():
    tensors = problem("gru", 4, 3, 5, 20)
    wild = run("gru", *tensors, lengths=torch.tensor([-7, 2, 1 << 40]))
    tame = run("gru", *tensors, lengths=torch.tensor([0, 2, 4]))
    assert all(torch.equal(a, b) for a, b in zip(wild, tame, strict=True))
    assert error(wild[1][0], tensors[1][0]) == 0


def test_the_operator_checks_what_it_is_given():
    input, h_0, c_0, weights = problem("lstm", 4, 3, 5, 20)
    for bad, message in [
        (("lstm", input.float(), h_0, c_0, weights), "expected input to be bfloat16"),
        (("lstm", input, h_0, None, weights), "c_0 must be given"),
        (("lstm", input, h_0[:2], c_0, weights), "expected h_0 to have shape"),
        (("lstm", input, h_0, c_0, [weights[0][:, :4], *weights[1:]]), "expected weight_ih to have shape"),
        (("lstm", input, h_0, c_0, weights[:4]), "expected 5 weights"),
        (("lstm", input, h_0, c_0, [None, *weights[1:]]), "expected weight_ih of the cell 'lstm' to be given"),
        (
            ("lstm", input, h_0[:, :7], c_0, [weights[0], weights[1][:, :7], *weights[2:]]),
            "weight_hh to have shape .80, 20.",
        ),
        (("sltm", input, h_0, c_0, weights), "there is no recurrent cell 'sltm'"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run(*bad)


def test_opcheck():
    for cell in ("lstm", "gru"):
        arguments = (cell, *problem(cell, 4, 3, 5, 20), torch.tensor([1, 4, 2]), True)
        torch.library.opcheck(torch.ops.seqaccel.rnn_forward_bfloat16.default, arguments)
