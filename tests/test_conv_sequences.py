"""causal_conv1d with several sequences in a row: reset and cu_seqlens."""

import pytest
import torch
from test_conv import EPILOGUES, SHAPES, USABLE_ISAS, case, identity, on, run
from tolerances import error

import seqaccel
import seqaccel.functional as SF
from seqaccel import nn

KINDS = ["reset", "cu_seqlens"]


def sequences(kind, B, T, seed=0, density=0.2):
    """Options: resets that are dense here and there, or offsets with sequences of no step."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "reset":
        return {"reset": torch.rand(B, T, generator=generator) < density}
    inner = torch.randint(0, T + 1, (max(2, int(T * density)),), generator=generator)
    ends = torch.cat([torch.tensor([0, T]), inner, inner[:1]]).sort().values
    return {"cu_seqlens": ends}


def problem(kind, shape, epilogue, dtype=torch.float64, **keywords):
    """The tensors and options of a call; one row for cu_seqlens."""
    B, C, _, T, K, dilation, _ = shape
    shape = (1 if kind == "cu_seqlens" else B, *shape[1:])
    tensors, options = case(shape, epilogue, dtype)
    given = sequences(kind, B, T, **keywords)
    if kind == "cu_seqlens" and "initial_state" in tensors:
        states = torch.randn(len(given["cu_seqlens"]) - 1, C, (K - 1) * dilation, dtype=torch.float64)
        tensors["initial_state"] = states.to(dtype)
    return tensors, options | given


def one_by_one(x, weight, reset=None, cu_seqlens=None, residual=None, initial_state=None, **options):
    """Each sequence by a call of its own."""
    rows = []
    for b in range(x.shape[0]):
        if reset is not None:
            ends = sorted({0, x.shape[2], *reset[b].nonzero().flatten().tolist()})
        else:
            ends = cu_seqlens.tolist()
        parts = []
        for n in range(len(ends) - 1):
            state, part = b if reset is not None else n, slice(ends[n], ends[n + 1])
            goes_on = reset is None or (n == 0 and not reset[b, 0])
            with seqaccel.backend("torch"):
                y = SF.causal_conv1d(
                    x[b : b + 1, :, part],
                    weight,
                    residual=None if residual is None else residual[b : b + 1, :, part],
                    initial_state=initial_state[state : state + 1] if initial_state is not None and goes_on else None,
                    **options,
                )
            parts.append(y)
        rows.append(torch.cat(parts, -1))
    return torch.cat(rows)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", [EPILOGUES[0], EPILOGUES[3], EPILOGUES[10]], ids=str)
def test_reference_is_a_loop_over_sequences(epilogue, kind, backend):
    for shape in SHAPES:
        tensors, options = problem(kind, shape, epilogue)
        expected = run(one_by_one, tensors, options)
        for name, value in run(on(backend), tensors, options).items():
            assert error(value, expected[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_cpp_matches_reference(epilogue, kind, isa, poison):
    for i, shape in enumerate(SHAPES):
        tensors, options = problem(kind, shape, epilogue, seed=i, density=(0.02, 0.2, 1.0)[i % 3])
        expected = run(on("reference"), tensors, options)
        with seqaccel.backends.isa(isa):
            for name, value in run(on("cpp"), tensors, options).items():
                assert error(value, expected[name]) < 1e-13, (shape, name)


@pytest.mark.parametrize("kind", KINDS)
def test_cpp_with_many_items_of_several_sequences(kind):
    """The backward pass cuts rows into items, whose ends are not those of sequences."""
    for shape in ((2, 40, 300, 1100, 3, 40, 1), (3, 30, 30, 900, 4, 7, 30)):
        tensors, options = problem(kind, shape, dict(activation="silu", initial_state=True), density=0.01)
        expected = run(on("reference"), tensors, options)
        for name, value in run(on("cpp"), tensors, options).items():
            assert error(value, expected[name]) < 1e-13, (shape, name)


# B, C, O, T, K, dilation, groups: dense, groups, depthwise with several outputs of a channel.
TRITON_SHAPES = [(2, 5, 7, 70, 3, 9, 1), (2, 6, 10, 33, 3, 5, 2), (2, 3, 6, 41, 4, 3, 3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epilogue", [EPILOGUES[i] for i in (0, 3, 5, 11)], ids=str)
def test_triton_matches_reference(epilogue, kind, poison):
    for shape in TRITON_SHAPES:
        tensors, options = problem(kind, shape, epilogue, torch.float32, density=0.1)
        exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
        for name, value in run(on("triton"), tensors, options).items():
            assert error(value, exact[name]) < 2e-6, (shape, name)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_order(kind, backend):
    for shape in ((2, 4, 6, 5, 3, 2, 2), (2, 3, 6, 7, 2, 1, 3)):
        tensors, options = problem(kind, shape, dict(activation="tanh", initial_state=True), density=0.4)
        names, values = list(tensors), [t.requires_grad_() for t in tensors.values()]

        def function(*arguments, names=names, options=options):
            torch.manual_seed(7)
            return on(backend)(**dict(zip(names, arguments, strict=True)), **options, dropout=0.25)

        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("isa", USABLE_ISAS)
@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] >= 33], ids=identity)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_do_not_leak(kind, shape, backend, isa):
    with seqaccel.backends.isa(isa):
        check_that_sequences_do_not_leak(kind, shape, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_triton_on_a_gpu(kind, dtype, bound, allow_tf32):
    allow_tf32(False)
    for shape in ((2, 96, 150, 640, 3, 16, 1), (2, 64, 64, 512, 4, 2, 4), (2, 128, 256, 512, 4, 2, 128)):
        tensors, options = problem(kind, shape, EPILOGUES[3], dtype, density=0.02)
        tensors = {name: t.cuda() for name, t in tensors.items()}
        options = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
        exact = run(on("reference"), {name: t.double() for name, t in tensors.items()}, options)
        for name, value in run(on("triton"), tensors, options).items():
            assert error(value, exact[name]) < bound, (shape, name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", TRITON_SHAPES, ids=identity)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_do_not_leak_on_triton(kind, shape):
    check_that_sequences_do_not_leak(kind, shape, "triton")


def check_that_sequences_do_not_leak(kind, shape, backend):
    """What is not finite in one sequence, or in the gradient of its outputs, reaches nothing of another one."""
    O, T = shape[2:4]
    start, end = T // 3, T // 3 + 5
    tensors, options = case((1, *shape[1:]), dict(initial_state=True))
    own = [0]  # states of the other sequences
    if kind == "cu_seqlens":
        tensors["initial_state"] = tensors["initial_state"].repeat(3, 1, 1)
        options["cu_seqlens"] = torch.tensor([0, start, end, T])
        own = [0, 2]
    else:
        options["reset"] = (torch.arange(T) == start) | (torch.arange(T) == end)
        options["reset"] = options["reset"].unsqueeze(0)
    grad = torch.randn(1, O, T)
    expected = run(on(backend), tensors, options, grad)
    for bad in (float("nan"), float("inf")):
        spoilt = {name: t.clone() for name, t in tensors.items()}
        spoilt["x"][..., start:end] = bad
        spoilt["initial_state"][1:2] = bad
        y = on(backend)(**spoilt, **options)
        for part in (slice(0, start), slice(end, T)):
            assert torch.equal(y[..., part], expected["y"][..., part])
        spoilt_grad = grad.clone()
        spoilt_grad[..., start:end] = bad
        found = run(on(backend), tensors, options, spoilt_grad)
        for part in (slice(0, start), slice(end, T)):
            assert torch.equal(found["grad of x"][..., part], expected["grad of x"][..., part])
        for n in own:
            assert torch.equal(found["grad of initial_state"][n], expected["grad of initial_state"][n])


@pytest.mark.parametrize("backend", ["reference", "cpp", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_final_states(kind, backend):
    tensors, options = problem(kind, (3, 4, 6, 23, 3, 2, 2), dict(activation="tanh", initial_state=True), density=0.15)
    y, state = on(backend)(**tensors, **options, return_final_state=True)
    assert torch.allclose(on(backend)(**tensors, **options, stride=3), y[..., ::3], atol=1e-12)
    x, first = tensors["x"], tensors["initial_state"]
    for n in range(len(state)):
        if kind == "reset":
            begin, row, end = max([0, *options["reset"][n].nonzero().flatten().tolist()]), n, 23
            first = torch.where(options["reset"].any(1)[:, None, None], 0.0, tensors["initial_state"])
        else:
            (begin, end), row = options["cu_seqlens"][n : n + 2].tolist(), 0
        whole = torch.cat([first[n], x[row, :, begin:end]], -1)
        assert torch.equal(state[n], whole[:, -4:])


def test_replicated_first_values():
    tensors, options = problem("cu_seqlens", (1, 4, 6, 23, 3, 2, 2), {})
    expected = one_by_one(**tensors, **options, padding_mode="replicate")
    assert torch.allclose(SF.causal_conv1d(**tensors, **options, padding_mode="replicate"), expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_transformed(kind):
    tensors, options = problem(kind, (2, 4, 6, 20, 3, 2, 1), dict(activation="relu", initial_state=True), density=0.1)
    expected = run(SF.causal_conv1d, tensors, options)
    torch._dynamo.reset()
    compiled = torch.compile(SF.causal_conv1d, fullgraph=True, backend="aot_eager")
    for name, value in run(compiled, tensors, options).items():
        assert error(value, expected[name]) < 1e-13, name
    y = torch.func.vmap(lambda x: SF.causal_conv1d(**{**tensors, "x": x}, **options))(
        tensors["x"][None].repeat(2, 1, 1, 1)
    )
    assert torch.allclose(y[1], expected["y"])


@pytest.mark.parametrize("kind", KINDS)
def test_operators_pass_opcheck(kind):
    tensors, options = problem(kind, (2, 4, 6, 20, 3, 2, 1), dict(activation="silu", initial_state=True))
    operands = [tensors["x"], tensors["weight"], tensors["bias"], None, tensors["initial_state"], None]
    segments = options.get("reset"), options.get("cu_seqlens")
    plain = (2, 1, "silu", False, 0.0)
    torch.library.opcheck(torch.ops.seqaccel.causal_conv1d_forward.default, (*operands, *segments, *plain, True))
    y, saved = torch.ops.seqaccel.causal_conv1d_forward(*operands, *segments, *plain, True)
    given = (torch.randn_like(y), y, saved, *operands[:2], operands[4], None, *segments, None, *plain, False, 31)
    torch.library.opcheck(torch.ops.seqaccel.causal_conv1d_backward.default, given)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_offsets_of_any_value_stay_within_x(backend):
    forward, backward = SF.conv._operators.operators(backend)
    x, weight, history = torch.randn(1, 3, 9), torch.randn(4, 3, 3), torch.randn(4, 3, 2)
    rest = (1, 1, "none", False, 0.0, True)
    for bad in ([5, 7, 3, -9, 1 << 60], [-1 << 62, 1 << 62, 4, 4, 4], [9, 9, 9, 9, 9]):
        given = (x, weight, None, None, history, None, None, torch.tensor(bad))
        y, saved = forward(*given, *rest)
        expected = SF.conv._causal_conv1d.reference.causal_conv1d(*given)
        torch.testing.assert_close(y, expected)
        grads = backward(y, y, saved, x, weight, history, None, None, torch.tensor(bad), None, *rest[:-1], False, 31)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_takes_them_with_and_without_a_batch(kind, channels_last):
    conv = nn.CausalConv1d(3, 4, 3, dilation=2, activation="silu", channels_last=channels_last)
    options, count = sequences(kind, 1, 20), 1
    if kind == "cu_seqlens":
        count = len(options[kind]) - 1
    x, residual, state = torch.randn(1, 3, 20), torch.randn(1, 4, 20), torch.randn(count, 3, 4)
    if channels_last:
        x, residual = x.transpose(1, 2), residual.transpose(1, 2)
    given = {"dilation": 2, "activation": "silu", "channels_last": channels_last, "residual": residual}
    expected = SF.causal_conv1d(
        x, conv.weight, conv.bias, initial_state=state, return_final_state=True, **given, **options
    )
    found = conv(x, residual=residual, initial_state=state, return_final_state=True, **options)
    assert all(map(torch.equal, found, expected))
    if kind == "reset":
        options, state, expected = {"reset": options["reset"][0]}, state[0], (expected[0], expected[1][0])
    found = conv(x[0], residual=residual[0], initial_state=state, return_final_state=True, **options)
    assert torch.equal(found[0], expected[0][0]) and torch.equal(found[1], expected[1])
    assert torch.equal(conv(x[0], **options).unsqueeze(0), conv(x, **sequences(kind, 1, 20)))


def test_errors_name_the_argument():
    x, w = torch.randn(2, 4, 9), torch.randn(6, 4, 3)
    reset, ends = torch.zeros(2, 9, dtype=torch.bool), torch.tensor([0, 9])
    for given, options, message in [
        (x, {"reset": reset.long()}, "expected reset to be bool"),
        (x, {"reset": reset[:, :8]}, "expected reset to be bool of shape"),
        (x, {"reset": reset, "padding_mode": "replicate"}, "padding_mode='zeros' with reset"),
        (x, {"cu_seqlens": ends}, "expected a batch of 1 with cu_seqlens"),
        (x[:1], {"cu_seqlens": ends, "reset": reset[:1]}, "no reset with cu_seqlens"),
        (x[:1], {"cu_seqlens": ends.int()}, "cu_seqlens to be torch.int64"),
        (x[:1], {"cu_seqlens": torch.tensor([0, 5, 3, 9])}, "cu_seqlens to ascend from 0 to 9"),
        (
            x[:1],
            {"cu_seqlens": ends, "initial_state": torch.zeros(2, 4, 2)},
            r"initial_state to have shape \(1, 4, 2\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            SF.causal_conv1d(given, w, **options)
    with pytest.raises(TypeError, match="reset"):
        SF.causal_conv1d(x, w, reset=[True])


@pytest.mark.parametrize("kind", KINDS)
def test_long_depthwise_filters_end_with_their_sequence(kind):
    tensors, options = problem(kind, (2, 4, 4, 600, 520, 1, 4), dict(initial_state=True), density=0.01)
    with seqaccel.backend("reference"):
        expected = SF.causal_conv1d(**tensors, **options)
    assert error(SF.causal_conv1d(**tensors, **options), expected) < 1e-13
