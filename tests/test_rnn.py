"""LSTM: every backend against the float64 reference and torch.nn.LSTM, the module, streams, and training on real text."""

import copy
import doctest
import io
import pathlib
import pickle
import sysconfig

import offline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_good_as, assert_close
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqaccel
import seqaccel.functional.rnn
import seqaccel.nn.rnn
from seqaccel import backends
from seqaccel.functional import lstm
from seqaccel.reference import rnn as reference

ISAS = ["portable", "avx2", "avx512"]
NAMES = ("output", "h_n", "c_n", "input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
# T, B, I, H: one row and one step, ragged units, whole vectors, rows beyond a tile and beyond a chunk, parts of the batch.
SHAPES = [(1, 1, 4, 3), (2, 1, 19, 70), (5, 3, 7, 10), (4, 2, 16, 64), (3, 9, 33, 37), (2, 50, 3, 130), (7, 101, 3, 17), (3, 20, 8, 257)]


@pytest.fixture(params=ISAS)
def isa(request):
    if ISAS.index(request.param) > ISAS.index(torch.ops.seqaccel.best_isa()):
        pytest.skip(f"this processor has no {request.param}")
    with backends.isa(request.param):
        yield request.param


def problem(T, B, I, H, dtype=torch.float64, requires_grad=True):
    """input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, in the range a trained layer has."""
    k = H**-0.5
    tensors = [torch.randn(T, B, I), torch.randn(B, H).tanh(), torch.randn(B, H)]
    tensors += [torch.empty(4 * H, n).uniform_(-k, k) for n in (I, H)] + [torch.empty(4 * H).uniform_(-k, k) for _ in range(2)]
    return [t.to(dtype).requires_grad_(requires_grad) for t in tensors]


def call(tensors, backend, **options):
    input, h_0, c_0, *weights = tensors
    with seqaccel.backend(backend):
        output, (h_n, c_n) = lstm(input, (h_0, c_0), *weights, **options)
    return output, h_n, c_n


def results(tensors, backend, grads, **options):
    """Outputs and the gradient of every input, in the order of NAMES."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = call(tensors, backend, **options)
    return [*outputs, *torch.autograd.grad(outputs, tensors, [g.to(outputs[0].dtype) for g in grads])]


def some_lengths(T, B):
    return torch.randint(1, T + 1, (B,)) if B > 1 else torch.tensor([max(1, T - 1)])


# ---- parity ----


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_reference_is_torch(reverse, with_lengths):
    for T, B, I, H in SHAPES[:5]:
        tensors = problem(T, B, I, H)
        options = {"reverse": reverse, "lengths": some_lengths(T, B) if with_lengths else None}
        grads = [torch.randn_like(t) for t in call(tensors, "reference", **options)]
        for name, ours, theirs in zip(
            NAMES, results(tensors, "reference", grads, **options), results(tensors, "torch", grads, **options), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def rms_errors(shape, backend, dtypes, count, **options):
    """Root mean square error of ``backend`` and of torch against the float64 reference over ``count`` problems, by name.

    The largest error of the few values of a small layer is a lottery; its mean square over some problems is not.
    """
    T, B = shape[:2]
    squares = torch.zeros(2, len(NAMES), dtype=torch.float64)
    for _ in range(count):
        tensors = problem(*shape, dtype=dtypes)
        lengths = some_lengths(T, B) if options.get("lengths") else None
        choice = {"reverse": options.get("reverse", False), "lengths": lengths}
        doubles = [t.double() for t in tensors]
        grads = [torch.randn_like(t).to(dtypes) for t in call(doubles, "reference", **choice)]
        expected = results(doubles, "reference", grads, **choice)
        for row, name in enumerate((backend, "torch")):
            for i, (found, exact) in enumerate(zip(results(tensors, name, grads, **choice), expected, strict=True)):
                squares[row, i] += (found.detach().double() - exact.detach()).square().mean() / count
    return zip(NAMES, squares.sqrt().unbind(1), strict=True)


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_is_as_good_as_torch(isa, shape, reverse, with_lengths):
    count = 8 if shape[1] * shape[3] < 100 else 3
    for name, (ours, theirs) in rms_errors(shape, "cpp", torch.float32, count, reverse=reverse, lengths=with_lengths):
        assert ours <= 2 * theirs, f"{name}: error {ours:.3g}, torch's {theirs:.3g}"


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpp_is_the_reference(isa, poison, shape, reverse, with_lengths):
    tensors = problem(*shape)
    options = {"reverse": reverse, "lengths": some_lengths(*shape[:2]) if with_lengths else None}
    grads = [torch.randn_like(t) for t in call(tensors, "reference", **options)]
    expected = results(tensors, "reference", grads, **options)
    for name, ours, exact in zip(NAMES, results(tensors, "cpp", grads, **options), expected, strict=True):
        assert_close(ours, exact, "rnn", torch.float64, backward=name not in NAMES[:3], what=name)
    with torch.no_grad():
        for name, ours, exact in zip(NAMES, call(tensors, "cpp", **options), expected, strict=False):
            assert_close(ours, exact, "rnn", torch.float64, what=f"{name} without grad")


@settings(deadline=None, max_examples=60)
@given(
    T=st.integers(0, 5), B=st.integers(0, 14), I=st.integers(1, 40), H=st.integers(1, 70), reverse=st.booleans(),
    with_lengths=st.booleans(), biases=st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_cpp_on_any_shape(T, B, I, H, reverse, with_lengths, biases, dtype):
    tensors = problem(T, B, I, H, dtype)
    options = {"reverse": reverse, "lengths": torch.randint(1, T + 1, (B,)) if with_lengths and T else None}
    tensors[5:] = [t if biases >> i & 1 else None for i, t in enumerate(tensors[5:])]
    wanted = [t for t in tensors if t is not None]
    found = []
    for backend in ("cpp", "reference"):
        outputs = call(tensors, backend, **options)
        loss = sum((t * t).sum() for t in outputs)
        found.append([*outputs, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)])
    for ours, expected in zip(*found, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 1e-11
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[False, True], ids=["step_by_step", "whole"])
def tf32(request):
    """torch's TF32 switch: on, the kernel of all steps serves float32 too (the interpreter multiplies in float32)."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_triton_in_the_interpreter(reverse, with_lengths, tf32):
    for shape in [(3, 2, 5, 7), (2, 18, 3, 20)]:
        for name, (ours, theirs) in rms_errors(shape, "triton", torch.float32, 4, reverse=reverse, lengths=with_lengths):
            assert ours <= 2 * theirs, f"{name}: error {ours:.3g}, torch's {theirs:.3g}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 5, 24, 64), (20, 33, 40, 130), (9, 17, 16, 32)], ids=str)
def test_triton_on_a_gpu(shape, dtype):
    tensors = [t.cuda().to(dtype) for t in problem(*shape, dtype=torch.float32)]
    for options in ({}, {"reverse": True, "lengths": some_lengths(*shape[:2]).cuda()}):
        doubles = [t.double() for t in tensors]
        grads = [torch.randn_like(t) for t in call(doubles, "reference", **options)]
        expected = results(doubles, "reference", grads, **options)
        ours, stock = results(tensors, "triton", grads, **options), results(tensors, "torch", grads, **options)
        for name, a, b, c in zip(NAMES, ours, stock, expected, strict=True):
            assert_as_good_as(a, b, c, what=name)


def test_triton_configurations():
    offline.check_configurations("seqaccel.kernels.rnn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
def test_triton_without_grad(tf32):
    tensors = problem(3, 2, 5, 7, torch.float32, requires_grad=False)
    for ours, expected in zip(call(tensors, "triton"), call(tensors, "reference"), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(dtype):
    tensors = [t.to(dtype) for t in problem(6, 3, 5, 20, torch.float32)]
    doubles = [t.double() for t in tensors]
    grads = [torch.randn_like(t).to(dtype) for t in call(doubles, "reference")]
    expected = results(doubles, "reference", grads)
    for name, a, b, c in zip(NAMES, results(tensors, "cpp", grads), results(tensors, "torch", grads), expected, strict=True):
        assert a.dtype == dtype
        assert_as_good_as(a, b, c, what=name)


def test_projection():
    tensors = problem(5, 3, 4, 6)
    tensors[1] = torch.randn(3, 2).double().requires_grad_()
    tensors[4] = torch.randn(24, 2).double().requires_grad_()
    weight_hr = torch.randn(2, 6).double().requires_grad_()
    for lengths in (None, torch.tensor([2, 5, 3])):
        ours = call([*tensors, weight_hr], "reference", lengths=lengths)
        for a, b in zip(ours, call([*tensors, weight_hr], "torch", lengths=lengths), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="lstm: no backend 'cpp'; it has reference, torch"):
        call([*tensors, weight_hr], "cpp")
    with seqaccel.backend("auto"):
        assert backends.choose("lstm", tensors[0], ("reference", "torch")) == "torch"


# ---- autograd and the operators ----


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"reverse": True, "lengths": torch.tensor([2, 4, 1])}], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradcheck(backend, options):
    tensors = problem(4, 3, 2, 5)
    torch.autograd.gradcheck(lambda *inputs: call(inputs, backend, **options), tensors)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradgradcheck(backend):
    tensors = problem(3, 2, 2, 3)
    options = {"lengths": torch.tensor([3, 2])}
    torch.autograd.gradgradcheck(lambda *inputs: call(inputs, backend, **options), tensors)


def test_gradients_only_where_they_are_needed():
    tensors = problem(4, 3, 2, 5)
    expected = torch.autograd.grad(call(tensors, "reference")[1].sum(), tensors)
    for i, gradient in enumerate(expected):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        torch.testing.assert_close(torch.autograd.grad(call(alone, "cpp")[1].sum(), alone[i])[0], gradient)


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_opcheck(save, with_lengths):
    tensors = problem(4, 3, 2, 5, torch.float32, requires_grad=False)
    lengths = torch.tensor([4, 1, 2]) if with_lengths else None
    arguments = (*tensors, lengths, False, save)
    torch.library.opcheck(torch.ops.seqaccel.lstm_forward.default, arguments)
    output, h_n, c_n, gates, cells = torch.ops.seqaccel.lstm_forward(*tensors, lengths, False, True)
    for needs in (True, False):
        for grads in ((output, h_n, c_n), (None, None, c_n)):
            arguments = (*grads, *tensors[:5], output, gates, cells, lengths, False, needs, needs, needs)
            torch.library.opcheck(torch.ops.seqaccel.lstm_backward.default, arguments)


def test_opcheck_triton():
    if torch.cuda.is_available():
        pytest.skip("runs the kernels in Triton's interpreter")
    from seqaccel.kernels import rnn as kernels

    tensors = problem(2, 3, 2, 5, torch.float32, requires_grad=False)
    torch.library.opcheck(kernels.lstm_forward._opoverload, (*tensors, None, False, True))
    output, h_n, c_n, gates, cells = kernels.lstm_forward(*tensors, None, False, True)
    arguments = (output, h_n, None, *tensors[:5], output, gates, cells, None, False, True, True, False)
    torch.library.opcheck(kernels.lstm_backward._opoverload, arguments)


def test_operators_refuse_what_does_not_fit():
    forward, tensors = torch.ops.seqaccel.lstm_forward, problem(4, 3, 2, 5, torch.float32, requires_grad=False)
    for i, name in enumerate(("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        for wrong in (tensors[i][..., :-1], tensors[i].unsqueeze(0), tensors[i].double()):
            with pytest.raises(RuntimeError, match=r"expected \w+ to have|the dtype"):
                forward(*tensors[:i], wrong, *tensors[i + 1 :], None, False, True)
        assert name
    for wrong in (torch.tensor([1, 2]), torch.tensor([1, 2, 3], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="expected lengths to have"):
            forward(*tensors, wrong, False, True)
    output, _, _, gates, cells = forward(*tensors, None, False, True)
    good = [output, None, None, *tensors[:5], output, gates, cells]
    for i in (0, 8, 9, 10):
        with pytest.raises(RuntimeError, match=r"expected \w+ to have shape"):
            torch.ops.seqaccel.lstm_backward(*good[:i], good[i][1:], *good[i + 1 :], None, False, True, True, True)


def test_operators_clamp_lengths(poison):
    tensors = problem(4, 3, 2, 5, torch.float32, requires_grad=False)
    wild, tame = torch.tensor([-(1 << 62), 1 << 62, 2]), torch.tensor([0, 4, 2])
    for reverse in (False, True):
        found = []
        for lengths in (wild, tame):
            output, h_n, c_n, gates, cells = torch.ops.seqaccel.lstm_forward(*tensors, lengths, reverse, True)
            found.append([output, h_n, c_n, *torch.ops.seqaccel.lstm_backward(
                output, h_n, c_n, *tensors[:5], output, gates, cells, lengths, reverse, True, True, True)])  # fmt: skip
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*found, strict=True))


def test_layouts_of_the_inputs():
    tensors = problem(6, 4, 3, 20)
    expected = results(tensors, "reference", [torch.ones(6, 4, 20), torch.ones(4, 20), torch.ones(4, 20)])
    strided = [t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach().repeat_interleave(2)[::2] for t in tensors]
    strided[0] = tensors[0].detach().transpose(0, 1).contiguous().transpose(0, 1)
    ones = [torch.ones(6, 4, 20), torch.ones(1, 1).expand(4, 20), torch.ones(4, 20)]
    for a, b in zip(results(strided, "cpp", ones), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_and_infinity_pass_through():
    tensors = problem(5, 6, 3, 20, torch.float32, requires_grad=False)
    tensors[0][2, 1, 0] = float("nan")
    tensors[0][1, 4, 2] = float("inf")
    for ours, expected in zip(call(tensors, "cpp"), call(tensors, "reference"), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True)
    # A row's NaN stays with the row, and padding is never read.
    output = call(tensors, "cpp", lengths=torch.tensor([5, 2, 5, 5, 1, 5]))[0]
    assert output.isfinite().all()


def test_same_bits_every_time():
    for B in (1, 3, 40):
        tensors = problem(9, B, 11, 130, torch.float32)
        grads = [torch.randn_like(t) for t in call(tensors, "cpp")]
        first = results(tensors, "cpp", grads)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, results(tensors, "cpp", grads), strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads):
    """More threads than cores too: a step's barrier must let others run."""
    before = torch.get_num_threads()
    try:
        for B in (1, 6, 40):
            tensors = problem(12, B, 8, 200)
            grads = [torch.randn_like(t) for t in call(tensors, "reference")]
            torch.set_num_threads(threads)
            for ours, expected in zip(results(tensors, "cpp", grads), results(tensors, "reference", grads), strict=True):
                torch.testing.assert_close(ours, expected)
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)


def test_profile_shows_no_torch_lstm():
    tensors = problem(4, 3, 5, 20, torch.float32)
    with torch.profiler.profile() as profile:
        sum(t.sum() for t in call(tensors, "cpp")).backward()
    names = {event.name for event in profile.events()}
    assert {"seqaccel::lstm_forward", "seqaccel::lstm_backward"} <= names
    assert not [name for name in names if "rnn" in name or ("lstm" in name.lower() and "seqaccel::lstm" not in name and "_LSTM" not in name)]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": torch.zeros(4, 2)}, ValueError, r"expected input to have 3 dimensions \(T, B, I\), but got shape \(4, 2\)"),
        ({"h_0": torch.zeros(3, 4)}, ValueError, r"expected h_0 to have shape \(3, 5\), but got \(3, 4\)"),
        ({"c_0": torch.zeros(2, 5)}, ValueError, r"expected c_0 to have shape \(3, 5\), but got \(2, 5\)"),
        ({"weight_ih": torch.zeros(20, 3)}, ValueError, r"expected weight_ih to have shape \(20, 2\), but got \(20, 3\)"),
        ({"weight_hh": torch.zeros(21, 5)}, ValueError, r"expected weight_hh to have shape \(4 \* H, H\), but got \(21, 5\)"),
        ({"bias_hh": torch.zeros(19)}, ValueError, r"expected bias_hh to have shape \(20,\), but got \(19,\)"),
        ({"bias_ih": torch.zeros(20).double()}, TypeError, "expected bias_ih to have the dtype of input, torch.float32, but got torch.float64"),
        ({"input": torch.zeros(4, 3, 2, dtype=torch.int64)}, TypeError, "expected input to be floating point, but got torch.int64"),
        ({"c_0": torch.zeros(3, 5, device="meta")}, RuntimeError, "expected all tensors to be on the same device, but input is on cpu and c_0 is on meta"),
        ({"lengths": torch.tensor([1, 2])}, ValueError, r"expected lengths to be torch.int64 of shape \(3,\), but got torch.int64 of \(2,\)"),
        ({"lengths": torch.tensor([1, 5, 2])}, ValueError, "expected lengths to be between 1 and 4, but they range from 1 to 5"),
        ({"lengths": torch.tensor([0, 4, 2])}, ValueError, "expected lengths to be between 1 and 4, but they range from 0 to 4"),
    ],
)  # fmt: skip
def test_messages_of_the_function(change, error, message):
    names = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    given = dict(zip(names, problem(4, 3, 2, 5, torch.float32, requires_grad=False), strict=True)) | change
    lengths = given.pop("lengths", None)
    with pytest.raises(error, match=message):
        call(list(given.values()), "cpp", lengths=lengths)


# ---- the module ----

MODULES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
    {"proj_size": 3, "num_layers": 2, "bidirectional": True},
]


def twins(dtype=torch.float64, sizes=(5, 8), **options):
    """torch.nn.LSTM and ours, each initialised from the same seed."""
    torch.manual_seed(1)
    stock = torch.nn.LSTM(*sizes, dtype=dtype, **options)
    torch.manual_seed(1)
    return stock, seqaccel.nn.LSTM(*sizes, dtype=dtype, **options)


def flat(result):
    output, (h_n, c_n) = result
    return [output.data if isinstance(output, PackedSequence) else output, h_n, c_n]


@pytest.mark.parametrize("options", MODULES, ids=str)
def test_module_is_torch_nn_lstm(options):
    stock, ours = twins(**options)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))
    stock.load_state_dict(ours.state_dict())
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    state = (torch.randn(layers, 4, options.get("proj_size") or 8).double(), torch.randn(layers, 4, 8).double())
    x = torch.randn(4, 4, 5, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 4, 1, 4])
    batch_first = options.get("batch_first", False)
    calls = [(x,), (x, state), (x[0],), (x[0], (state[0][:, 0], state[1][:, 0]))]
    calls += [(pack_padded_sequence(x, lengths, enforce_sorted=False, batch_first=batch_first), hx) for hx in (None, state)]
    calls += [(pack_padded_sequence(x, lengths.sort(descending=True)[0], batch_first=batch_first),)]
    for arguments in calls:
        found = []
        for module in (ours, stock):
            module.zero_grad()
            outputs = flat(module(*arguments))
            grads = torch.autograd.grad(sum((t * t).sum() for t in outputs), [x, *module.parameters()], retain_graph=True)
            found.append([*outputs, *grads])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    packed = calls[-2][0]
    result = ours(packed)[0]
    assert torch.equal(result.batch_sizes, packed.batch_sizes) and torch.equal(result.unsorted_indices, packed.unsorted_indices)
    padded, lengths_back = pad_packed_sequence(result)
    assert torch.equal(lengths_back, lengths) and padded.shape[1] == 4


def outcome(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m(torch.zeros(5)),
        lambda m: m(torch.zeros(1, 2, 3, 5)),
        lambda m: m(torch.zeros(3, 2, 6)),
        lambda m: m(torch.zeros(3, 6)),
        lambda m: m(torch.zeros(3, 2, 5).double()),
        lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 8), torch.zeros(1, 8))),
        lambda m: m(torch.zeros(3, 5), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))),
        lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8))),
        lambda m: m(torch.zeros(3, 2, 5), (torch.zeros(1, 2, 8), torch.zeros(2, 2, 8))),
        lambda m: type(m)(5, 8, proj_size=8),
        lambda m: type(m)(5, 0),
        lambda m: type(m)(5, 8, bias=1),
        lambda m: type(m)(5, 8, dropout=2),
    ],
)  # fmt: skip
def test_messages_of_the_module(use):
    stock, ours = twins(torch.float32)
    expected = outcome(lambda: use(stock))
    assert expected is not None and outcome(lambda: use(ours)) == expected


def test_messages_for_packed_sequences():
    """torch checks nothing here and fails inside a matrix product; the wording is that of padded input."""
    _, module = twins(torch.float32)
    packed = pack_padded_sequence(torch.zeros(3, 2, 6), [3, 1])
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"):
        module(packed)
    packed = pack_padded_sequence(torch.zeros(3, 2, 5), [3, 1])
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 8\), got \[1, 3, 8\]"):
        module(packed, (torch.zeros(1, 3, 8), torch.zeros(1, 2, 8)))


def test_dropout_stands_between_layers():
    _, module = twins(num_layers=2, dropout=0.5)
    x = torch.randn(20, 3, 5, dtype=torch.float64)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])
    torch.testing.assert_close(module(x)[1][0][0], module.eval()(x)[1][0][0])  # the first layer sees none of it
    module.dropout = 1.0
    module.train()
    zero_input = call([torch.zeros(20, 3, 8).double(), torch.zeros(3, 8).double(), torch.zeros(3, 8).double(),
                       *(getattr(module, n) for n in module._all_weights[1])], "reference")[0]  # fmt: skip
    torch.testing.assert_close(module(x)[0], zero_input)


def test_empty_sequence_and_empty_batch():
    _, module = twins(torch.float32)
    output, (h_n, _) = module(torch.zeros(0, 3, 5))
    assert output.shape == (0, 3, 8) and torch.equal(h_n, torch.zeros(1, 3, 8))
    output, (h_n, _) = module(torch.zeros(4, 0, 5))
    assert output.shape == (4, 0, 8) and h_n.shape == (1, 0, 8)
    output.sum().backward()
    assert torch.equal(module.weight_hh_l0.grad, torch.zeros(32, 8))


@pytest.mark.parametrize("options", MODULES[:2] + [{"batch_first": True}], ids=str)
def test_compile_and_export(options):
    _, module = twins(torch.float32, **options)
    x = torch.randn(4, 3, 5)
    expected = flat(module(x))
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(flat(compiled(x)), expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.autograd.grad(expected[0].sum(), list(module.parameters()))
    for a, b in zip(torch.autograd.grad(compiled(x)[0].sum(), list(module.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b)
    exported = torch.export.export(module, (x,)).module()
    for a, b in zip(flat(exported(x)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_copies():
    _, module = twins(torch.float32, num_layers=2)
    x = torch.randn(4, 3, 5)
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(saved, weights_only=False)):
        assert torch.equal(copied(x)[0], module(x)[0])
    assert module.to(torch.float64)(x.double())[0].dtype == torch.float64


def test_function_transforms():
    _, module = twins()
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
    for a, b in zip(torch.func.grad(loss)(parameters, x).values(), expected, strict=True):
        torch.testing.assert_close(a, b)
    rows = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, x)  # a gradient for each row
    for a, b in zip(rows.values(), expected, strict=True):
        torch.testing.assert_close(a.sum(0), b)


def test_autocast():
    stock, ours = twins(torch.float32)
    x = torch.randn(4, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = ours(x)[0], stock(x)[0]
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


# ---- streams ----


@settings(deadline=None, max_examples=30)
@given(
    chunks=st.lists(st.integers(0, 6), min_size=1, max_size=6), batch=st.integers(1, 6), layers=st.integers(1, 3),
    batch_first=st.booleans(), proj_size=st.sampled_from([0, 3]),
)  # fmt: skip
def test_any_chunking_gives_what_one_call_gives(chunks, batch, layers, batch_first, proj_size):
    module = seqaccel.nn.LSTM(5, 17, layers, batch_first=batch_first, proj_size=proj_size, dtype=torch.float64)
    time = 1 if batch_first else 0
    x = torch.randn(*((batch, sum(chunks)) if batch_first else (sum(chunks), batch)), 5, dtype=torch.float64)
    with torch.no_grad():
        state, pieces = module.init_state(batch), []
        for chunk in x.split(chunks, time):
            y, state = module.extend(chunk, state)
            pieces.append(y)
        if sum(chunks):
            output, (h_n, c_n) = module(x)
            torch.testing.assert_close(torch.cat(pieces, time), output)
            torch.testing.assert_close(state, (h_n.transpose(0, 1), c_n.transpose(0, 1)))
        state, pieces = module.init_state(batch), []
        for x_t in x.unbind(time):
            y, state = module.step(x_t, state)
            pieces.append(y)
        if pieces:
            torch.testing.assert_close(torch.stack(pieces, time), output)


def test_streams_are_independent():
    module = seqaccel.nn.LSTM(5, 8, 2, dtype=torch.float64)
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
    module = seqaccel.nn.LSTM(5, 8, bidirectional=True)
    with pytest.raises(RuntimeError, match="a bidirectional module cannot run on a stream"):
        module.init_state(2)
    module = seqaccel.nn.LSTM(5, 8)
    with pytest.raises(ValueError, match="expected a chunk to have 3 dimensions, but got 2"):
        module.extend(torch.zeros(3, 5), module.init_state(3))
    with pytest.raises(ValueError, match="expected one step"):
        module.step(torch.zeros(1, 3, 5), module.init_state(3))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        module.step(torch.zeros(3, 5), module.init_state(2))


# ---- training on real text ----


def library_text(size):
    """The first bytes of the source of Python's standard library."""
    text = b""
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.tensor(list(text[:size]))


def training_losses(kind, text, seed, onednn, steps=30, batch=16, length=64):
    """Loss of every step of a byte-level language model whose initial weights and batches depend on the seed alone."""
    torch.manual_seed(seed)
    embed, stock, head = torch.nn.Embedding(256, 32), torch.nn.LSTM(32, 96), torch.nn.Linear(96, 256)
    layer = kind(32, 96)
    layer.load_state_dict(stock.state_dict())
    parameters = [*embed.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    losses = []
    with torch.backends.mkldnn.flags(enabled=onednn):
        for _ in range(steps):
            starts = torch.randint(0, len(text) - length - 1, (batch,)).tolist()
            x = torch.stack([text[start : start + length + 1] for start in starts], 1)
            logits = head(layer(embed(x[:-1]))[0])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), x[1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_training_differs_no_more_than_torch_differs_from_itself():
    """The mean difference in training loss over 30 steps: ours from torch's, torch's with oneDNN from without.

    A run in which rounding tips something over differs a hundred times more than the next, so the median of 9 runs counts.
    """
    text = library_text(400_000)
    ours_from_torch, torch_from_itself = [], []
    for seed in range(9):
        torch_loss = training_losses(torch.nn.LSTM, text, seed, onednn=True)
        with seqaccel.backend("cpp"):
            our_loss = training_losses(seqaccel.nn.LSTM, text, seed, onednn=True)
        assert torch_loss[-5:].mean() < torch_loss[0] - 1.5, "the model did not learn: nothing was compared"
        ours_from_torch.append((our_loss - torch_loss).abs().mean())
        torch_from_itself.append((training_losses(torch.nn.LSTM, text, seed, onednn=False) - torch_loss).abs().mean())
    assert torch.stack(ours_from_torch).median() <= torch.stack(torch_from_itself).median()


@pytest.mark.parametrize("module", [seqaccel.functional.rnn, seqaccel.nn.rnn], ids=lambda m: m.__name__)
def test_examples(module):
    assert doctest.testmod(module).attempted and not doctest.testmod(module).failed
    assert reference.lstm.__doc__
