"""The operators of the recurrent layers: autograd, schemas, bad input, determinism, threads, messages."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree
from rnn_cases import call, each_kind, kinds, one_thread, problem, random_grads, results, variant, weights_of

import seqaccel
from seqaccel import backends
from seqaccel.functional import gru, lstm, rnn
from seqaccel.functional.rnn._cells import CELLS, saved_shapes

EVERY = [(backend, cell, projected) for backend in ("reference", "cpp") for cell, projected in kinds(backend)]


every_kind = pytest.mark.parametrize("backend, cell, projected", EVERY)


# ---- autograd ----


def function(cell, tensors, backend, options):
    """``call`` as a function of the tensors, one after the other."""
    return lambda *values: tuple(call(cell, dict(zip(tensors, values, strict=True)), backend, **options))


@every_kind
def test_gradcheck(backend, cell, projected):
    tensors = problem(cell, 3, 2, 2, 3, projected=projected)
    for number in (0, 1, 2):
        options = variant(number, cell, tensors, [backend])
        with one_thread():
            torch.autograd.gradcheck(function(cell, tensors, backend, options), list(tensors.values()))


@every_kind
def test_gradgradcheck(backend, cell, projected):
    tensors = problem(cell, 2, 2, 1, 2, projected=projected)
    options = variant(3, cell, tensors, [backend])
    with one_thread():
        torch.autograd.gradgradcheck(function(cell, tensors, backend, options), list(tensors.values()))


@each_kind("cpp")
def test_gradients_only_where_they_are_needed(cell, projected):
    tensors = problem(cell, 4, 3, 2, 5, projected=projected)
    expected = torch.autograd.grad(call(cell, tensors, "reference")[1].sum(), list(tensors.values()))
    for wanted, gradient in zip(tensors, expected, strict=True):
        alone = {name: t.detach().requires_grad_(name == wanted) for name, t in tensors.items()}
        found = torch.autograd.grad(call(cell, alone, "cpp")[1].sum(), alone[wanted])[0]
        torch.testing.assert_close(found, gradient)


# ---- the operators ----


def operator_arguments(cell, projected=False, **options):
    """What rnn_forward takes, but for ``save``."""
    tensors = problem(cell, 4, 3, 2, 5, projected=projected, dtype=torch.float32, requires_grad=False)
    lengths = options.get("lengths")
    factors = (options.get("zoneout_h"), options.get("zoneout_c"))
    states = (tensors["h_0"], tensors.get("c_0"))
    weights, reverse = weights_of(cell, tensors), options.get("reverse", False)
    return [cell, tensors["input"], *states, weights, lengths, *factors, reverse]


def forward_and_backward(forward, backward, arguments, grads=None, needs=True):
    """All tensors that the two operators give; ``grads`` of the outputs are the outputs by default."""
    cell, *inputs, reverse = arguments
    output, h_n, c_n, saved = forward(*arguments, True)
    if grads is None:
        grads = (output, h_n, c_n if CELLS[cell].has_cell_state else None)
    found = backward(cell, *grads, *inputs, output, saved, reverse, [needs] * (1 + len(inputs[3])))
    return [output, h_n, c_n, *saved, *found[:3], *found[3]]


def check_operators(forward, backward, cell, projected, numbers=range(3)):
    tensors = problem(cell, 4, 3, 2, 5, projected=projected, dtype=torch.float32, requires_grad=False)
    once = ("test_autograd_registration", "test_aot_dispatch_dynamic")  # of the operator, whatever the cell
    tests = ("test_schema", "test_faketensor", *(once if cell == "lstm" else ()))
    for number in numbers:
        arguments = operator_arguments(cell, projected, **variant(number, cell, tensors, ["cpp"]))
        for save in (False, True):
            torch.library.opcheck(forward, (*arguments, save), test_utils=tests)
        output, h_n, c_n, saved = forward(*arguments, True)
        c_n = c_n if CELLS[cell].has_cell_state else None
        for needs, grads in ((True, (output, h_n, c_n)), (False, (None, None, c_n))):
            cell_, *inputs, reverse = arguments
            tail = (output, saved, reverse, [needs] * (1 + len(inputs[3])))
            torch.library.opcheck(backward, (cell_, *grads, *inputs, *tail), test_utils=tests)


@each_kind("cpp")
def test_opcheck(cell, projected):
    operators = torch.ops.seqaccel.rnn_forward.default, torch.ops.seqaccel.rnn_backward.default
    check_operators(*operators, cell, projected)


@each_kind("cpp")
def test_saved_shapes(cell, projected):
    arguments = operator_arguments(cell, projected)
    saved = torch.ops.seqaccel.rnn_forward(*arguments, True)[3]
    assert [tuple(t.shape) for t in saved] == saved_shapes(cell, (4, 3), 5)


@each_kind("triton")
def test_opcheck_triton(cell, projected):
    if torch.cuda.is_available():
        pytest.skip("runs the kernels in Triton's interpreter")
    import seqaccel.kernels.rnn  # noqa: F401  registers the operators

    operators = torch.ops.seqaccel
    check_operators(operators.rnn_forward_triton.default, operators.rnn_backward_triton.default, cell, projected, [2])


@each_kind("cpp")
def test_operators_refuse_what_does_not_fit(cell, projected):
    """Whatever the shape, dtype or number of an argument: an error, and no access out of bounds."""
    forward, backward = torch.ops.seqaccel.rnn_forward, torch.ops.seqaccel.rnn_backward
    good = operator_arguments(cell, projected)

    def wrong(t):
        return (t[..., :-1], t[:0], t.unsqueeze(0), t.double())

    expected = r"seqaccel: expected|the dtype"
    for i in (2, 3):
        for bad in wrong(good[i]) if good[i] is not None else (good[2],):
            with pytest.raises(RuntimeError, match=expected):
                forward(*good[:i], bad, *good[i + 1 :], True)
    for bad in (good[1][:, :-1], good[1][..., :-1], good[1].unsqueeze(0), good[1].double()):
        with pytest.raises(RuntimeError, match=expected):
            forward(cell, bad, *good[2:], True)
    weights = good[4]
    for i, weight in enumerate(weights):
        for bad in wrong(weight) if weight is not None else ():
            if i == 4 and CELLS[cell].projects and bad.dim() == 2 and bad.dtype == torch.float32:
                continue
            with pytest.raises(RuntimeError, match=expected):
                forward(*good[:4], [*weights[:i], bad, *weights[i + 1 :]], *good[5:], True)
    for bad in (weights[:3], [*weights, weights[0]], [None, *weights[1:]]):
        with pytest.raises(RuntimeError, match=expected):
            forward(*good[:4], bad, *good[5:], True)
    with pytest.raises(RuntimeError, match="there is no recurrent cell 'elman'"):
        forward("elman", *good[1:], True)
    for bad in (torch.tensor([1, 2]), torch.tensor([1, 2, 3], dtype=torch.int32)):
        with pytest.raises(RuntimeError, match="expected lengths to have"):
            forward(*good[:5], bad, *good[6:], True)
    for i in (6, 7):
        for bad in (torch.zeros(4, 3, 4), torch.zeros(3, 5), torch.zeros(4, 3, 5).double()):
            with pytest.raises(RuntimeError, match=r"seqaccel: (expected|the cell)"):
                forward(*good[:i], bad, *good[i + 1 :], True)
    output, h_n, _, saved = forward(*good, True)
    head, needs = (cell, output, h_n, None, *good[1:8]), [True] * (1 + len(weights))
    with pytest.raises(RuntimeError, match=expected):
        backward(*head, output[1:], saved, False, needs)
    with pytest.raises(RuntimeError, match=expected):
        backward(cell, output[1:], *head[2:], output, saved, False, needs)
    with pytest.raises(RuntimeError, match=expected):
        backward(cell, output, h_n[1:], *head[3:], output, saved, False, needs)
    with pytest.raises(RuntimeError, match=expected):
        backward(*head, output, [*saved, output], False, needs)
    with pytest.raises(RuntimeError, match=expected):
        backward(*head, output, saved, False, needs[1:])
    for i in range(len(saved)):
        with pytest.raises(RuntimeError, match=expected):
            backward(*head, output, [*saved[:i], saved[i][1:], *saved[i + 1 :]], False, needs)


@each_kind("cpp")
def test_operators_clamp_lengths(poison, cell, projected):
    arguments = operator_arguments(cell, projected)
    for reverse in (False, True):
        found = []
        for lengths in (torch.tensor([-(1 << 62), 1 << 62, 2]), torch.tensor([0, 4, 2])):
            arguments[5], arguments[8] = lengths, reverse
            tensors = forward_and_backward(torch.ops.seqaccel.rnn_forward, torch.ops.seqaccel.rnn_backward, arguments)
            kept = len(saved_shapes(cell, (4, 3), 5))  # of which only the rows that run are written
            found.append([*tensors[:3], *tensors[3 + kept :]])
        assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("lengths", [[4, 2, 1], [4, 4, 4], [3, 3, 0]])
@each_kind("cpp")
def test_packed_rows_give_what_padded_ones_do(poison, cell, projected, lengths):
    forward, backward = torch.ops.seqaccel.rnn_forward, torch.ops.seqaccel.rnn_backward
    lengths, kept = torch.tensor(lengths), len(saved_shapes(cell, (4, 3), 5))
    rows = (torch.arange(4)[:, None] < lengths).nonzero(as_tuple=True)
    for number in range(4):
        arguments = operator_arguments(cell, projected, lengths=lengths, reverse=number % 2 == 1)
        if CELLS[cell].zoneout and number > 1:
            arguments[6] = torch.rand(4, 3, arguments[2].shape[1])
        expected = forward_and_backward(forward, backward, arguments)
        packed = [a[rows] if i in (1, 6) and isinstance(a, torch.Tensor) else a for i, a in enumerate(arguments)]
        torch.library.opcheck(forward.default, (*packed, True), test_utils=("test_schema", "test_faketensor"))
        found = forward_and_backward(forward, backward, packed)
        for i, (ours, padded) in enumerate(zip(found, expected, strict=True)):
            if not 3 <= i < 3 + kept:
                padded = padded[rows] if i in (0, 3 + kept) else padded
                assert torch.equal(ours, padded), i


def test_lengths_of_packed_rows_are_checked():
    arguments = operator_arguments("lstm")
    arguments[1] = torch.zeros(6, 2)
    for lengths, message in (
        (None, "lengths of a packed input to be given"),
        ([1, 2, 3], "longest first"),
        ([5, 1, -1], "longest first"),
        ([3, 2, 0], "add up to 6, but they add up to 5"),
        ([1 << 62, 1 << 62, 1 << 62], "add up to 6"),
        ([4, 2], "h_0"),
    ):
        arguments[5] = None if lengths is None else torch.tensor(lengths)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.seqaccel.rnn_forward(*arguments, False)


@each_kind("cpp")
def test_backward_in_parts(poison, cell, projected):
    """34 MB of dL/dpre or more, of which 32 are held at a time: a pass takes the steps in parts."""
    T, B, H = 36, 6000 // CELLS[cell].gates, 20
    tensors = problem(cell, T, B, 2, H, projected=projected)
    grads = random_grads(cell, tensors)
    options = {"reverse": projected or CELLS[cell].gates == 3}
    if CELLS[cell].zoneout and options["reverse"]:
        options["zoneout_h"] = torch.rand(T, B, tensors["h_0"].shape[1], dtype=torch.float64)
    expected = results(cell, tensors, "reference", grads, **options)
    for name, found in results(cell, tensors, "cpp", grads, **options).items():
        torch.testing.assert_close(found, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@each_kind("cpp")
def test_layouts_of_the_inputs(cell, projected):
    tensors = problem(cell, 6, 4, 3, 20, projected=projected)
    grads = [torch.ones_like(g) for g in random_grads(cell, tensors)]
    expected = results(cell, tensors, "reference", grads)
    strided = {
        name: t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach().repeat_interleave(2)[::2]
        for name, t in tensors.items()
    }
    strided["input"] = tensors["input"].detach().transpose(0, 1).contiguous().transpose(0, 1)
    grads[1] = torch.ones(1, 1, dtype=torch.float64).expand_as(grads[1])
    for name, found in results(cell, strided, "cpp", grads).items():
        torch.testing.assert_close(found, expected[name])


@each_kind("cpp")
def test_same_bits_every_time(cell, projected):
    for B in (1, 3, 40):
        tensors = problem(cell, 9, B, 11, 130, projected=projected, dtype=torch.float32)
        grads = random_grads(cell, tensors)
        first = results(cell, tensors, "cpp", grads)
        for _ in range(2):
            again = results(cell, tensors, "cpp", grads)
            assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("threads", [1, 3, 5])
@each_kind("cpp")
def test_any_number_of_threads(cell, projected, threads):
    """More threads than cores too: a step's barrier must let others run."""
    before = torch.get_num_threads()
    try:
        for number, B in enumerate((1, 6, 40)):
            tensors = problem(cell, 8, B, 8, 200, projected=projected)
            options = variant(number, cell, tensors, ["cpp"])
            grads = random_grads(cell, tensors, **options)
            expected = results(cell, tensors, "reference", grads, **options)
            torch.set_num_threads(threads)
            for name, found in results(cell, tensors, "cpp", grads, **options).items():
                torch.testing.assert_close(found, expected[name])
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)


def assert_as_reference(number, cell, tensors):
    options = variant(number, cell, tensors, ["cpp"])
    grads = random_grads(cell, tensors, **options)
    expected = results(cell, tensors, "reference", grads, **options)
    for name, found in results(cell, tensors, "cpp", grads, **options).items():
        torch.testing.assert_close(found, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@each_kind("cpp")
def test_weights_beyond_the_cache_of_a_core(cell, projected):
    """There the input's product goes first, panels are fetched part by part, and many rows list what they read."""
    H = 400 if CELLS[cell].gates > 1 else 900  # 2.5 MB of W_hh for each of two threads
    for number, B in ((0, 20), (1, 50), (3, 20)):
        tensors = problem(cell, 4, B, 24, H, projected=projected)
        assert_as_reference(number, cell, tensors)


@each_kind("cpp")
def test_kept_values_beyond_the_caches(cell, projected):
    """There what is kept for the backward pass is stored past the caches."""
    for number, B in ((0, 40), (1, 45), (3, 40)):
        tensors = problem(cell, 100, B, 24, 128, projected=projected)  # 1 to 2.5 KB kept of each of 4,000 rows
        assert_as_reference(number, cell, tensors)


def test_outputs_and_gradients_from_the_pool_are_ordinary_tensors(tmp_path):
    T, B, H = 16, 8, 512  # 256 KB of output, 4 MB of each weight's gradient
    module, x = seqaccel.nn.LSTM(H, H), torch.randn(T, B, H, requires_grad=True)

    def step():
        with seqaccel.backend("cpp"):
            output = module(x)[0]
        return output.detach(), *torch.autograd.grad(output.sum(), [x, *module.parameters()])

    held = step()
    expected = [t.clone() for t in held]
    with torch.no_grad():
        x *= 2
    for _ in range(3):
        step()
    assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))  # no one else took what is alive
    for kept, value in zip(held, expected, strict=True):
        torch.save(kept, tmp_path / "tensor.pt")
        assert torch.equal(torch.load(tmp_path / "tensor.pt"), value)
        assert torch.equal(copy.deepcopy(kept), value)
        assert torch.equal(kept.share_memory_(), value)
        kept.resize_(2, 3).zero_()


def test_large_saved_tensors_take_the_memory_of_dead_ones():
    T, B, H = 40, 32, 256  # 5 MB of gates; c is small
    weights = [torch.randn(4 * H, H) / 16, torch.randn(4 * H, H) / 16, None, None, None]
    state = torch.zeros(B, H)

    def gates(x):
        return torch.ops.seqaccel.rnn_forward("lstm", x, state, state, weights, None, None, None, False, True)[3][0]

    inputs = [torch.randn(T, B, H) for _ in range(3)]
    alive = gates(inputs[0])
    expected, dead = alive.clone(), gates(inputs[1])
    place = dead.data_ptr()
    assert place != alive.data_ptr()
    del dead
    new = gates(inputs[2])
    if torch.__version__ >= torch.torch_version.TorchVersion("2.11"):
        assert new.data_ptr() == place
    assert new.data_ptr() != alive.data_ptr() and torch.equal(alive, expected)
    assert torch.equal(gates(inputs[0]), expected)
    assert new.is_contiguous() and new.shape == (T, B, 4 * H) and new.dtype == torch.float32


@each_kind("cpp")
def test_profile_shows_no_torch_operator_of_the_job(cell, projected):
    tensors = problem(cell, 4, 3, 5, 20, projected=projected, dtype=torch.float32)
    with torch.profiler.profile() as profile:
        sum(t.sum() for t in call(cell, tensors, "cpp")).backward()
    found = {event.name for event in profile.events()}
    assert {"seqaccel::rnn_forward", "seqaccel::rnn_backward"} <= found
    others = [name.lower() for name in found if not name.startswith("seqaccel::")]
    assert not [name for name in others if any(job in name for job in ("rnn", "lstm", "gru", "sigmoid", "tanh"))]


# ---- backends and messages ----


def test_zoneout_and_projection_choose_the_backend():
    tensors = problem("lstm", 4, 3, 2, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="lstm: no backend 'torch'; it has reference"):
        call("lstm", tensors, "torch", zoneout_h=0.1)
    assert call("lstm", tensors, "torch", zoneout_h=0.0)
    for cell, spec in CELLS.items():
        with seqaccel.backend("auto"):
            expected = "cpp" if "cpp" in spec.backends else "torch" if "torch" in spec.backends else "reference"
            assert backends.choose(cell, tensors["input"], spec.backends) == expected


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
    ("zoneout", (1.5, 0), ValueError, "zoneout of h to be between 0 and 1, but got 1.5"),
    ("zoneout", (0, torch.zeros(4, 5)), ValueError, r"zoneout of c to be a number or of shape \(4, 3, 5\)"),
]


@pytest.mark.parametrize(
    "name, value, error, message",
    [(name, value, ValueError, message) for name, (value, message) in SHAPE_MESSAGES.items()] + OTHER_MESSAGES,
)
def test_messages_of_the_function(name, value, error, message):
    given = problem("lstm", 4, 3, 2, 5, dtype=torch.float32, requires_grad=False) | {name: value}
    options = {key: given.pop(key) for key in ("lengths", "zoneout") if key in given}
    input, h_0, c_0, *weights = given.values()
    with pytest.raises(error, match=f"lstm: expected .*{message}"):
        lstm(input, (h_0, c_0), *weights, **options)


def test_messages_name_the_function():
    x = torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match=r"gru: expected weight_hh to have shape \(3 \* H, H\), but got \(5, 5\)"):
        gru(x, None, torch.zeros(15, 2), torch.zeros(5, 5))
    with pytest.raises(ValueError, match=r"rnn: expected weight_ih to have shape \(5, 2\), but got \(5, 3\)"):
        rnn(x, None, torch.zeros(5, 3), torch.zeros(5, 5))
    with pytest.raises(ValueError, match="rnn: expected nonlinearity to be 'tanh' or 'relu', but got 'sine'"):
        rnn(x, None, torch.zeros(5, 2), torch.zeros(5, 5), nonlinearity="sine")
    with pytest.raises(TypeError, match="peephole_lstm: expected weight_peephole to be a Tensor, but got None"):
        seqaccel.functional.peephole_lstm(x, None, torch.zeros(20, 2), torch.zeros(20, 5), None, None, None)


@pytest.mark.parametrize("cell", CELLS)
def test_empty_sequence_and_empty_batch(cell):
    for backend in [b for b in ("cpp", "reference", "torch") if b in CELLS[cell].backends]:
        for T, B in ((0, 3), (4, 0), (0, 0)):
            tensors = problem(cell, T, B, 2, 5)
            output, *last = call(cell, tensors, backend)
            assert output.shape == (T, B, 5)
            for state, start in zip(last, ("h_0", "c_0"), strict=False):
                assert torch.equal(state, tensors[start])
            sum(t.sum() for t in (output, *last)).backward()
            assert not tensors["h_0"].grad.isnan().any() and torch.equal(tensors["h_0"].grad, torch.ones(B, 5))


# ---- tensors out of the ordinary ----


@each_kind("cpp")
def test_saturated_gates(cell, projected):
    """Pre-activations about which e^-x overflows: numbers, and the definition's, forward and backward."""
    for dtype, edge in ((torch.float32, 88.55), (torch.float64, 709.9)):
        for isa in ("portable", "avx2", "avx512"):
            if isa not in torch.ops.seqaccel.best_isa() and isa != "portable":
                continue
            tensors = problem(cell, 2, 2, 1, 40, projected=projected, dtype=dtype, requires_grad=False)
            for name in tensors:
                if (name.startswith("weight") and name != "weight_hr") or name == "input":
                    tensors[name].zero_()
                elif name == "bias_ih":
                    tensors[name] = torch.linspace(-0.5, 0.5, tensors[name].numel(), dtype=dtype)
                    tensors[name] = (tensors[name] + edge * tensors[name].sign())[torch.randperm(len(tensors[name]))]
                elif name.startswith("bias"):
                    tensors[name].zero_()
            grads = random_grads(cell, tensors)
            with backends.isa(isa):
                found = results(cell, tensors, "cpp", grads)
            for name, value in results(cell, tensors, "reference", grads).items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=f"{isa} {dtype} {name}")


def all_tensors(found):
    return [t for part in found for t in (part if isinstance(part, (list, tuple)) else [part])]


@each_kind("cpp")
def test_values_that_are_not_those_in_memory(cell, projected):
    """The negative bit, and zero tensors, which have no memory, inside and outside of lists."""
    forward, backward = torch.ops.seqaccel.rnn_forward, torch.ops.seqaccel.rnn_backward
    arguments = operator_arguments(cell, projected)
    for hide in (lambda t: torch._neg_view(-t), lambda t: torch._efficientzerotensor(t.shape)):
        hidden = pytree.tree_map_only(torch.Tensor, hide, arguments)
        shown = pytree.tree_map_only(torch.Tensor, lambda t: t.clone(), hidden)
        expected = forward_and_backward(forward, backward, shown)
        for a, b in zip(forward_and_backward(forward, backward, hidden), expected, strict=True):
            assert torch.equal(a, b)


def test_operators_with_lists_resolve_the_values_in_them():
    """torch's own fallback does not look into lists of optional tensors."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqaccel::rnn")]
    names = [name for name in names if has_kernel(name, "CPU")]
    assert len(names) >= 3
    for name in names:
        assert has_kernel(name, "Negative") and has_kernel(name, "ZeroTensor"), name


@pytest.mark.parametrize("H", [16, 256])
def test_gradients_of_weights_can_be_freed(H):
    """As a sharded optimizer does: their storage is torch's own, whatever their size."""
    module = seqaccel.nn.LSTM(32, H)
    module(torch.randn(4, 8, 32))[0].sum().backward()
    for parameter in module.parameters():
        parameter.grad.untyped_storage().resize_(0)
