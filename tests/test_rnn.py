"""lstm: every backend against the float64 reference and torch's, gradients, the operators."""

import offline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_as_good_as, assert_close

import seqaccel
from seqaccel import backends
from seqaccel.functional import lstm

ISAS = ["portable", "avx2", "avx512"]
NAMES = ("output", "h_n", "c_n", "input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
# T, B, I, H: one row and one step, ragged units, whole vectors, rows beyond a tile and beyond a chunk.
SHAPES = [
    (1, 1, 4, 3),
    (2, 1, 19, 70),
    (5, 3, 7, 10),
    (4, 2, 16, 64),
    (3, 9, 33, 37),
    (2, 50, 3, 130),
    (7, 101, 3, 17),
    (3, 20, 8, 257),
]


@pytest.fixture(params=ISAS)
def isa(request):
    if ISAS.index(request.param) > ISAS.index(torch.ops.seqaccel.best_isa().removesuffix("_bf16")):
        pytest.skip(f"this processor has no {request.param}")
    with backends.isa(request.param):
        yield request.param


def problem(T, B, I, H, dtype=torch.float64, requires_grad=True):
    """input, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, in the range a trained layer has."""
    k = H**-0.5
    tensors = [torch.randn(T, B, I), torch.randn(B, H).tanh(), torch.randn(B, H)]
    tensors += [torch.empty(4 * H, n).uniform_(-k, k) for n in (I, H)] + [
        torch.empty(4 * H).uniform_(-k, k) for _ in range(2)
    ]
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
            NAMES,
            results(tensors, "reference", grads, **options),
            results(tensors, "torch", grads, **options),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def rms_errors(shape, backend, dtypes, count, **options):
    """Root mean square error of ``backend`` and of torch against the float64 reference, by name, over some problems.

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
        for name, (ours, theirs) in rms_errors(
            shape, "triton", torch.float32, 4, reverse=reverse, lengths=with_lengths
        ):
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
    for name, a, b, c in zip(
        NAMES, results(tensors, "cpp", grads), results(tensors, "torch", grads), expected, strict=True
    ):
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


@pytest.mark.parametrize(
    "options", [{}, {"reverse": True}, {"reverse": True, "lengths": torch.tensor([2, 4, 1])}], ids=str
)
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


CELLS = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}


def operator_arguments(cell, T=4, B=3, I=2, H=5, dtype=torch.float32):
    """input, h_0, c_0, weights of the operators."""
    k, rows = H**-0.5, CELLS[cell] * H
    weights = [torch.empty(rows, n, dtype=dtype).uniform_(-k, k) for n in (I, H)]
    weights += [torch.empty(rows, dtype=dtype).uniform_(-k, k) for _ in range(2)]
    c_0 = torch.randn(B, H, dtype=dtype) if cell == "lstm" else None
    weights += [None] if cell == "lstm" else []
    return torch.randn(T, B, I, dtype=dtype), torch.randn(B, H, dtype=dtype).tanh(), c_0, weights


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_opcheck(cell, save, with_lengths):
    tensors = operator_arguments(cell)
    lengths = torch.tensor([4, 1, 2]) if with_lengths else None
    options = (lengths, None, None)
    torch.library.opcheck(torch.ops.seqaccel.rnn_forward.default, (cell, *tensors, *options, False, save))
    output, h_n, c_n, saved = torch.ops.seqaccel.rnn_forward(cell, *tensors, *options, False, True)
    c_n = c_n if cell == "lstm" else None
    for needs in (True, False):
        for grads in ((output, h_n, c_n), (None, None, c_n)):
            arguments = (cell, *grads, *tensors, *options, output, saved, False, [needs] * (1 + len(tensors[3])))
            torch.library.opcheck(torch.ops.seqaccel.rnn_backward.default, arguments)


def test_opcheck_triton():
    if torch.cuda.is_available():
        pytest.skip("runs the kernels in Triton's interpreter")
    from seqaccel.kernels import rnn as kernels

    tensors = problem(2, 3, 2, 5, torch.float32, requires_grad=False)
    torch.library.opcheck(kernels.lstm_forward._opoverload, (*tensors, None, False, True))
    output, h_n, _c_n, gates, cells = kernels.lstm_forward(*tensors, None, False, True)
    arguments = (output, h_n, None, *tensors[:5], output, gates, cells, None, False, True, True, False)
    torch.library.opcheck(kernels.lstm_backward._opoverload, arguments)


@pytest.mark.parametrize("cell", CELLS)
def test_operators_refuse_what_does_not_fit(cell):
    input, h_0, c_0, weights = operator_arguments(cell)
    forward = torch.ops.seqaccel.rnn_forward
    rest = (None, None, None, False, True)

    def wrong(t):
        return (t[..., :-1], t.unsqueeze(0), t.double())

    for bad in wrong(input) + wrong(h_0):
        states = (bad, h_0) if bad.shape[-1] != h_0.shape[-1] or bad.dim() > 2 else (input, bad)
        with pytest.raises(RuntimeError, match=r"expected \w+ to have|the dtype"):
            forward(cell, *states, c_0, weights, *rest)
    for i in range(4):
        for bad in wrong(weights[i]):
            with pytest.raises(RuntimeError, match=r"expected \w+ to have|the dtype"):
                forward(cell, input, h_0, c_0, [*weights[:i], bad, *weights[i + 1 :]], *rest)
    with pytest.raises(RuntimeError, match="expected c_0 to be"):
        forward(cell, input, h_0, h_0 if c_0 is None else None, weights, *rest)
    with pytest.raises(RuntimeError, match=f"expected {len(weights)} weights of the cell '{cell}', but got 3"):
        forward(cell, input, h_0, c_0, weights[:3], *rest)
    with pytest.raises(RuntimeError, match="there is no recurrent cell 'elman'"):
        forward("elman", input, h_0, c_0, weights, *rest)
    for bad in (torch.tensor([1, 2]), torch.tensor([1, 2, 3], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="expected lengths to have"):
            forward(cell, input, h_0, c_0, weights, bad, *rest[1:])
    output, _, _, saved = forward(cell, input, h_0, c_0, weights, *rest)
    needs = [True] * (1 + len(weights))
    backward, tail = torch.ops.seqaccel.rnn_backward, (None, None, None)
    head = (cell, output, None, None, input, h_0, c_0, weights, *tail)
    with pytest.raises(RuntimeError, match=r"expected \w+ to have shape"):
        backward(*head, output[1:], saved, False, needs)
    with pytest.raises(RuntimeError, match=r"expected \w+ to have shape"):
        backward(cell, output[1:], *head[2:], output, saved, False, needs)
    with pytest.raises(RuntimeError, match="saved tensors of the cell"):
        backward(*head, output, [*saved, output], False, needs)
    with pytest.raises(RuntimeError, match=r"expected needs to have \d entries, but got \d"):
        backward(*head, output, saved, False, needs[1:])
    for i in range(len(saved)):
        with pytest.raises(RuntimeError, match=r"expected saved \w+ to have shape"):
            backward(*head, output, [*saved[:i], saved[i][1:], *saved[i + 1 :]], False, needs)


@pytest.mark.parametrize("cell", CELLS)
def test_operators_clamp_lengths(cell, poison):
    tensors = operator_arguments(cell)
    wild, tame = torch.tensor([-(1 << 62), 1 << 62, 2]), torch.tensor([0, 4, 2])
    for reverse in (False, True):
        found = []
        for lengths in (wild, tame):
            options = (lengths, None, None)
            output, h_n, c_n, saved = torch.ops.seqaccel.rnn_forward(cell, *tensors, *options, reverse, True)
            grads = torch.ops.seqaccel.rnn_backward(
                cell, output, h_n, c_n if cell == "lstm" else None, *tensors, *options, output, saved, reverse,
                [True] * (1 + len(tensors[3])),
            )  # fmt: skip
            found.append([output, h_n, c_n, *grads[:3], *grads[3]])
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
            for ours, expected in zip(
                results(tensors, "cpp", grads), results(tensors, "reference", grads), strict=True
            ):
                torch.testing.assert_close(ours, expected)
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)


def test_profile_shows_no_torch_lstm():
    tensors = problem(4, 3, 5, 20, torch.float32)
    with torch.profiler.profile() as profile:
        sum(t.sum() for t in call(tensors, "cpp")).backward()
    names = {event.name for event in profile.events()}
    assert {"seqaccel::rnn_forward", "seqaccel::rnn_backward"} <= names
    assert not [
        name for name in names if ("rnn" in name and not name.startswith("seqaccel::")) or "lstm" in name.lower()
    ]


SHAPE_MESSAGES = {
    "h_0": (torch.zeros(3, 4), r"h_0 to have shape \(3, 5\), but got \(3, 4\)"),
    "c_0": (torch.zeros(2, 5), r"c_0 to have shape \(3, 5\), but got \(2, 5\)"),
    "weight_ih": (torch.zeros(20, 3), r"weight_ih to have shape \(20, 2\), but got \(20, 3\)"),
    "weight_hh": (torch.zeros(21, 5), r"weight_hh to have shape \(4 \* H, H\), but got \(21, 5\)"),
    "bias_hh": (torch.zeros(19), r"bias_hh to have shape \(20,\), but got \(19,\)"),
}
OTHER_MESSAGES = [
    ("input", torch.zeros(4, 2), ValueError, r"input to have 3 dimensions \(T, B, I\), but got shape \(4, 2\)"),
    ("input", torch.zeros(4, 3, 2, dtype=torch.int64), TypeError, "input to be floating point, but got torch.int64"),
    ("bias_ih", torch.zeros(20).double(), TypeError, "the dtype of input, torch.float32, but got torch.float64"),
    ("c_0", torch.zeros(3, 5, device="meta"), RuntimeError, "but input is on cpu and c_0 is on meta"),
    ("lengths", torch.tensor([1, 2]), ValueError, r"of shape \(3,\), but got torch.int64 of \(2,\)"),
    ("lengths", torch.tensor([1, 5, 2]), ValueError, "between 1 and 4, but they range from 1 to 5"),
    ("lengths", torch.tensor([0, 4, 2]), ValueError, "between 1 and 4, but they range from 0 to 4"),
]


@pytest.mark.parametrize(
    "name, value, error, message",
    [(name, value, ValueError, message) for name, (value, message) in SHAPE_MESSAGES.items()] + OTHER_MESSAGES,
)
def test_messages_of_the_function(name, value, error, message):
    names = ("input", "h_0", "c_0", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    given = dict(zip(names, problem(4, 3, 2, 5, torch.float32, requires_grad=False), strict=True)) | {name: value}
    lengths = given.pop("lengths", None)
    with pytest.raises(error, match=message):
        call(list(given.values()), "cpp", lengths=lengths)
