"""What every family builds on: vector functions, the matrix product, instruction sets, the choice of backend, and what
holds for every operator: no leak, no shape that overflows, messages."""

import asyncio
import ctypes
import functools
import gc
import subprocess
import sys
import threading

import pytest
import torch
from instruction_sets import ISAS, isa_fixture

from seqaccel import backends

FUNCTIONS = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


isa = isa_fixture(ISAS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_stay_within_two_ulp(isa, name, dtype):
    x = torch.cat(
        [
            torch.linspace(-20, 20, 40_003, dtype=torch.float64),
            torch.linspace(-85, 85, 10_007, dtype=torch.float64),
            torch.logspace(-30, 0, 1_001, dtype=torch.float64),
        ]
    ).to(dtype)
    expected = FUNCTIONS[name](x.double())
    error = (torch.ops.seqaccel.elementwise(x, name).double() - expected).abs() / expected.abs().clamp_min(1e-300)
    assert error.max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_at_the_special_values(isa, name, dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e30, -1e30], dtype=dtype)
    y, expected = torch.ops.seqaccel.elementwise(x, name), FUNCTIONS[name](x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit(), expected.signbit())


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Of every magnitude and sign, and closely where the functions overflow, underflow, or pass through zero."""
    if dtype == torch.float32:
        bits = [torch.arange(-(2**31), 2**31, 4099)]
        for low, high in ((87.0, 90.0), (0.0, 1e-40)):
            first, last = torch.tensor([low, high]).view(torch.int32).tolist()
            bits += [torch.arange(first, last), torch.arange(first, last) - 2**31]
        return torch.cat(bits).to(torch.int32).view(dtype)
    bits = torch.randint(-(2**63), 2**63 - 1, (300_000,))
    near = [
        torch.linspace(low, low + width, 30_001, dtype=dtype)
        for low, width in ((-746, 39), (707, 4), (-1e-300, 2e-300))
    ]
    return torch.cat([bits.view(dtype), *near, *(-x for x in near)])


@functools.cache
def values(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers, and the function of them."""
    x = numbers(dtype)
    return x, FUNCTIONS[name](x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_of_every_magnitude(isa, name, dtype):
    x, expected = values(name, dtype)
    found = torch.ops.seqaccel.elementwise(x, name)
    assert torch.equal(found.isnan(), x.isnan())
    # exp overflows up to 0.4 early, and what is less than a normal number may be 0.
    early = {torch.float32: 88.37, torch.float64: 709.43}[dtype]
    overflows = (found == float("inf")) & (x > early) if name == "exp" else torch.zeros_like(x, dtype=torch.bool)
    least = torch.finfo(dtype).tiny
    close = (found.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs() + least
    wrong = ~(close | overflows | x.isnan() | (found.double() == expected))
    assert not wrong.any(), (x[wrong][:5], found[wrong][:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "M, K, N",
    [
        *[(1, 1, 1), (5, 7, 3), (6, 512, 64), (7, 513, 65), (13, 1100, 150), (100, 3, 200)],
        *[(0, 4, 4), (4, 0, 4), (4, 4, 0)],
        *[(1, 64, 16), (13, 200, 240), (131, 129, 80), (50, 1000, 512)],  # a transposed and b are read where they lie
    ],
)
def test_matrix_product(isa, poison, M, K, N, dtype):
    for transposed in range(4):
        a = torch.randn(K, M, dtype=dtype).t() if transposed & 1 else torch.randn(M, K, dtype=dtype)
        b = torch.randn(N, K, dtype=dtype).t() if transposed & 2 else torch.randn(K, N, dtype=dtype)
        expected = a.double() @ b.double()
        # The standard bound on a sum of K products: K eps |a| |b|.
        bound = (K + 1) * torch.finfo(dtype).eps * (a.double().abs() @ b.double().abs())
        added = torch.ones(M, N, dtype=dtype)
        torch.ops.seqaccel.add_fastest_mm_(added, a, b)
        assert ((torch.ops.seqaccel.mm(a, b).double() - expected).abs() <= bound).all()
        assert ((torch.ops.seqaccel.fastest_mm(a, b).double() - expected).abs() <= bound).all()
        assert ((added.double() - 1 - expected).abs() <= bound + 2 * torch.finfo(dtype).eps * added.abs()).all()


def test_matrix_product_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match=r"expected mat2 to have shape \[3, \*\], but got \[4, 2\]"):
        torch.ops.seqaccel.mm(torch.randn(2, 3), torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.seqaccel.mm(torch.randn(2, 3), torch.randn(3, 2).double())
    with pytest.raises(RuntimeError, match="float32 or float64"):
        torch.ops.seqaccel.mm(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"expected mat2 to have shape \[3, \*\], but got \[4, 2\]"):
        torch.ops.seqaccel.fastest_mm(torch.randn(2, 3), torch.randn(4, 2))
    with pytest.raises(RuntimeError, match=r"expected out to have shape \[2, 5\], but got \[2, 4\]"):
        torch.ops.seqaccel.add_fastest_mm_(torch.randn(2, 4), torch.randn(2, 3), torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="expected out to be contiguous"):
        torch.ops.seqaccel.add_fastest_mm_(torch.randn(5, 2).t(), torch.randn(2, 3), torch.randn(3, 5))


@pytest.mark.parametrize("rows", [1, 5, 2048])
def test_matrix_products_of_parameters(isa, rows):
    """An exported graph may have no no_grad around an operator."""
    a, b = torch.randn(rows, 128, requires_grad=True), torch.randn(128, 96, requires_grad=True)
    out = torch.zeros(rows, 96)
    torch.ops.seqaccel.add_fastest_mm_(out, a, b)
    for found in (torch.ops.seqaccel.fastest_mm(a, b), out):
        torch.testing.assert_close(found.detach(), (a @ b).detach(), rtol=1e-4, atol=1e-4)


def test_matrix_products_pass_opcheck():
    a, b = torch.randn(5, 7), torch.randn(3, 7).t()
    torch.library.opcheck(torch.ops.seqaccel.fastest_mm.default, (a, b))
    torch.library.opcheck(torch.ops.seqaccel.add_fastest_mm_.default, (torch.randn(5, 3), a, b))


def test_unknown_instruction_set():
    with pytest.raises(RuntimeError, match="unknown instruction set 'sse9'"), backends.isa("sse9"):
        pass


def test_unknown_backend():
    with pytest.raises(ValueError, match="must be one of"), backends.backend("tpu"):
        pass
    assert backends.current() in backends.NAMES


def test_a_backend_asked_for_by_name_runs_or_raises():
    x = torch.zeros(1)
    with backends.backend("torch"), pytest.raises(RuntimeError, match="no backend 'torch'; it has reference, cpp"):
        backends.choose("some_operator", x, ("reference", "cpp"))
    with backends.backend("cuda"), pytest.raises(RuntimeError, match="is not available"):
        backends.choose("some_operator", x, ("reference", "cuda"))
    with backends.backend("auto"):
        assert backends.choose("some_operator", x, ("reference", "cpp", "torch")) == "cpp"
        assert backends.choose("some_operator", x, ("reference", "cpp", "torch"), prefer="torch") == "torch"
        assert backends.choose("some_operator", x, ("reference", "torch")) == "torch"


def _overlap(enter):
    """Two threads in blocks of which neither holds the other; what the second sees in its own."""
    inside, opened, seen = threading.Event(), threading.Event(), []

    def first():
        with enter(0):
            inside.set()
            opened.wait(10)

    def second():
        inside.wait(10)
        with enter(1):
            opened.set()
            threads[0].join(10)
            seen.append((backends.current(), torch.ops.seqaccel.isa()))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    threads[1].join(10)
    return seen[0]


def test_blocks_of_two_threads_that_overlap():
    before = backends.current(), torch.ops.seqaccel.isa()
    names = ("reference", "cpp")
    assert _overlap(lambda i: backends.backend(names[i]))[0] == "cpp"
    isas = ("portable", torch.ops.seqaccel.best_isa())
    assert _overlap(lambda i: backends.isa(isas[i]))[1] == isas[1]
    assert (backends.current(), torch.ops.seqaccel.isa()) == before


def test_blocks_of_two_tasks_that_overlap():
    async def task(name, other, mine):
        with backends.backend(name):
            mine.set()
            await other.wait()
            return backends.current()

    async def both():
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("reference", a, b), task("torch", b, a))

    before = backends.current()
    assert asyncio.run(both()) == ["reference", "torch"] and backends.current() == before


def test_a_thread_of_autograd_sees_the_block_around_backward():
    """Deeply nested backward passes run in threads of autograd's own, as those of a GPU do."""
    seen = []

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, depth):
            ctx.depth = depth
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((threading.get_ident(), backends.current()))
            if ctx.depth:
                with torch.enable_grad():
                    Nested.apply(torch.zeros(1, requires_grad=True), ctx.depth - 1).sum().backward()
            return grad, None

    with backends.backend("reference"):
        Nested.apply(torch.zeros(1, requires_grad=True), 70).sum().backward()
    assert len({thread for thread, _ in seen}) > 1 and {name for _, name in seen} == {"reference"}


def test_compiled_code_follows_the_block_of_its_thread():
    def call(x):
        return x + 1 if backends.current() == "reference" else x - 1

    def call_inside(x):
        with backends.backend("reference"):
            return call(x)

    compiled, inside = (torch.compile(f, fullgraph=True, backend="eager") for f in (call, call_inside))
    x, found = torch.zeros(1), []
    assert compiled(x) == -1 and inside(x) == 1 and compiled(x) == -1
    with backends.backend("reference"):
        assert compiled(x) == 1
        thread = threading.Thread(target=lambda: found.append(compiled(x)))
        thread.start()
        thread.join()
    assert found == [-1] and compiled(x) == -1


# ---- every operator ----


class MallInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]


def bytes_in_use() -> int:
    gc.collect()
    function = ctypes.CDLL(None).mallinfo2
    function.restype = MallInfo
    return function().uordblks


def calls_with_text():
    """A call of each operator that takes or returns a string."""
    ops, x, h = torch.ops.seqaccel, torch.randn(2, 1, 3), torch.zeros(1, 3)
    lstm = ("layer_norm_lstm_normalized_cell", x, h, h, [torch.randn(12, 3), torch.randn(12, 3), None, None])
    lstm = (*lstm[:4], [*lstm[4], torch.ones(12), torch.ones(12), torch.ones(3), torch.zeros(3)], None, None, None)
    y, _, _, saved = ops.rnn_forward(*lstm, False, True)
    narrow = [t.bfloat16() for t in (torch.randn(2, 1, 3), h, torch.randn(9, 3), torch.randn(9, 3))]
    conv = (torch.randn(1, 2, 4), torch.randn(2, 2, 1))
    yield "isa", lambda: ops.isa()
    yield "best_isa", lambda: ops.best_isa()
    yield "set_isa", lambda: ops.set_isa("portable")
    yield "elementwise", lambda: ops.elementwise(torch.ones(3), "sigmoid")
    yield "rnn_forward", lambda: ops.rnn_forward(*lstm, False, True)
    backward = (lstm[0], y, None, None, *lstm[1:], y, saved, False, [True] * 9)
    yield "rnn_backward", lambda: ops.rnn_backward(*backward)
    forward = ("gru_reset_before", narrow[0], narrow[1], None, [narrow[2], narrow[3], None, None], None, False)
    yield "rnn_forward_bfloat16", lambda: ops.rnn_forward_bfloat16(*forward)
    yield "causal_conv1d_forward", lambda: ops.causal_conv1d_forward(*conv, *[None] * 6, 1, 1, "tanh", False, 0.0, True)
    out, kept = ops.causal_conv1d_forward(*conv, *[None] * 6, 1, 1, "tanh", False, 0.0, True)
    arguments = (out, out, kept, *conv, *[None] * 5, 1, 1, "tanh", False, 0.0, False, 7)
    yield "causal_conv1d_backward", lambda: ops.causal_conv1d_backward(*arguments)
    grid = torch.ones(1, 2, 3, 3), torch.ones(4, 2, 2, 3)
    rest = (1, 1, 1, "tanh", False, 0.0)
    yield "causal_conv2d_forward", lambda: ops.causal_conv2d_forward(*grid, *[None] * 5, *rest, True)
    y, pre = ops.causal_conv2d_forward(*grid, *[None] * 5, *rest, True)
    conv2d = (y, y, pre, *grid, *[None] * 3, *rest, False, 7)
    yield "causal_conv2d_backward", lambda: ops.causal_conv2d_backward(*conv2d)
    block = torch.ones(1, 2, 5), torch.ones(2, 2, 3), None, torch.ones(2, 2, 3), None
    how = (*[None] * 3, 1, "tanh", "tanh", False, 0.0)
    in_block = (*block[:3], None, *block[3:], None, None, *how, True)
    yield "temporal_block_forward", lambda: ops.temporal_block_forward(*in_block)
    of_block, *kept_of_block = ops.temporal_block_forward(*in_block)
    out_of_block = (of_block, None, *kept_of_block, *block, *how, 27)
    yield "temporal_block_backward", lambda: ops.temporal_block_backward(*out_of_block)
    operands = torch.ones(3, 2, 6), *[None] * 3, torch.zeros(2, 2), *[None] * 5
    yield "column_forward", lambda: ops.column_forward("fo_pool", *operands, 1, True)
    h = torch.ones(3, 2, 2)
    yield "column_backward", lambda: ops.column_backward("fo_pool", h, None, *operands, h, 1)
    weights, of_cfc = [torch.ones(8, 2)], (None, None, None, "default", "tanh")
    cfc = (torch.ones(3, 1, 8), torch.ones(1, 2), weights, [], *of_cfc, True)
    yield "cfc_forward", lambda: ops.cfc_forward(*cfc)
    y_of_cfc, kept_of_cfc = ops.cfc_forward(*cfc)
    yield "cfc_backward", lambda: ops.cfc_backward(y_of_cfc, weights, kept_of_cfc, *of_cfc, True)


def test_strings_do_not_leak():
    before = torch.ops.seqaccel.isa()
    found = dict(calls_with_text())
    schemas = {name: str(getattr(torch.ops.seqaccel, name).default._schema) for name in all_operators()}
    assert set(found) == {name for name, schema in schemas.items() if "str" in schema}
    try:
        for name, call in found.items():
            for _ in range(200):
                call()
            start = bytes_in_use()
            for _ in range(1000):
                call()
            assert (bytes_in_use() - start) / 1000 <= 8, name
    finally:
        torch.ops.seqaccel.set_isa(before)


def all_operators() -> list[str]:
    """Names of the C++ operators."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqaccel::")]
    native = [name for name in names if "csrc/cpu" in torch._C._dispatch_dump(name)]
    return sorted(name.removeprefix("seqaccel::") for name in native)


def nonsense(argument) -> object:
    """A value of the argument's type that no operator takes."""
    kind = str(argument.type)
    for part, value in {"Optional": None, "List": [], "Tensor": torch.zeros(1, 2, 3, 4, 5), "str": "nonsense"}.items():
        if kind.startswith(part):
            return value
    return {"int": -1, "bool": False, "float": -1.0}[kind]


def test_messages_name_no_file_of_the_build_machine():
    for name in all_operators():
        operator = getattr(torch.ops.seqaccel, name).default
        if not any(str(argument.type).startswith(("Tensor", "str")) for argument in operator._schema.arguments):
            continue
        with pytest.raises(RuntimeError) as raised:
            operator(*(nonsense(argument) for argument in operator._schema.arguments))
        message = str(raised.value)
        assert message and not any(part in message for part in ("/", "csrc", ".cpp", ".h:", "API call")), message


def test_out_of_memory_says_so():
    a, b = torch.empty(2**40, 0), torch.empty(0, 2**9)
    with pytest.raises(RuntimeError, match=f"not enough memory: you tried to allocate {2**51} bytes"):
        torch.ops.seqaccel.mm(a, b)


@pytest.mark.parametrize("size", [2**41, 2**62 + 2**20])
def test_sizes_whose_product_overflows(size):
    ops, x = torch.ops.seqaccel, torch.empty(size, 1, 0)
    weights, indices = [torch.empty(512, 0), torch.zeros(512, 512), None, None], torch.zeros(2**12 + 1).int()
    conv = (torch.empty(size, 0, 1), torch.empty(2**20, 0, 1), *[None] * 6, 1, 1, "none", False, 0.0, False)
    for call in (
        lambda: ops.mm(torch.empty(size, 0), torch.empty(0, size)),
        lambda: ops.linear_scan_forward(*[torch.empty(size, 0, 2**21)] * 2, *[None] * 3, False, False),
        lambda: ops.rnn_forward("rnn_tanh", x, torch.zeros(1, 512), None, weights, *[None] * 3, False, True),
        lambda: ops.causal_conv1d_forward(*conv),
        lambda: ops.convolutional_gru_forward(
            torch.empty(size, 0, 2**12, 1), torch.empty(0, 0, 1, 1), None, torch.empty(0, 0, 1, 1), None, True, False
        ),
        lambda: ops.hierarchical_attention_forward(
            *[torch.empty(size, 1, 0, 2**12)] * 3, *[None] * 3, 2, 2, 1, 1, True, True, 1.0
        ),
        lambda: ops.attention_pool_forward(*[torch.empty(size, 1, 0, 2**12)] * 2, None, 2, 2, 1, 1.0),
        lambda: ops.block_sparse_attention_forward(
            *[torch.empty(size, 1, 0, 2**12)] * 3, torch.empty(size, 1, 0, 0, dtype=torch.bool), 2, True, 1.0
        ),
        lambda: ops.additive_attention_forward(
            torch.empty(size, 0, 2**12), torch.empty(size, 0, 2**12), torch.empty(2**12), None
        ),
        lambda: ops.novelty_gate(
            torch.empty(1, size, 0), torch.empty(1, 0, 0), torch.zeros(1, dtype=torch.int64), 0.9, 1, 1
        ),
        lambda: ops.echo_state(
            torch.empty(size, 0, 2**12), torch.empty(0, 2**12), indices, indices[:0], torch.empty(0), 1.0
        ),
        lambda: ops.column_forward(
            "fo_pool", torch.empty(size, 0, 3 * 2**12), *[None] * 3, torch.empty(0, 2**12), *[None] * 5, 1, True
        ),
    ):
        with pytest.raises(RuntimeError, match=r"not enough memory|too large"):
            call()


def test_nothing_to_do_takes_no_time():
    """Shapes without elements, of which one dimension is 2**40."""
    ops, many = torch.ops.seqaccel, 2**40
    assert ops.linear_scan_forward(*[torch.empty(many, 0, 1)] * 2, None, None, None, False, False)[0].shape == (
        many,
        0,
        1,
    )
    assert ops.linear_scan_forward(*[torch.empty(many, 0, 7)] * 2, None, None, None, True, False)[0].shape == (
        many,
        0,
        7,
    )
    heads = torch.empty(1, many, 0, 4)
    out, lse, *pooled = ops.hierarchical_attention_forward(*[heads] * 3, *[None] * 3, 2, 2, 1, 1, True, True, 1.0)
    grads = ops.hierarchical_attention_backward(
        heads, *[heads] * 3, *[None] * 3, out, lse, *pooled, 2, 2, 1, 1, True, True, 1.0
    )
    assert all(grad.shape == heads.shape for grad in grads[:3])
    pooled = ops.attention_pool_forward(heads, heads, None, 2, 2, 1, 1.0)
    grads = ops.attention_pool_backward(*pooled, heads, heads, None, *pooled, 2, 2, 1, 1.0)
    assert all(grad.shape == heads.shape for grad in grads[:2])
    taps = torch.ones(2, 1, 3, 3), None, torch.ones(1, 1, 3, 3)
    grid = torch.empty(many, 1, 0, 1)
    assert ops.convolutional_gru_forward(grid, *taps, None, True, False)[0].shape == grid.shape
    layout = torch.empty(1, many, 0, 0, dtype=torch.bool)
    out, lse = ops.block_sparse_attention_forward(*[heads] * 3, layout, 2, True, 1.0)
    grads = ops.block_sparse_attention_backward(heads, *[heads] * 3, layout, out, lse, 2, True, 1.0)
    assert all(grad.shape == heads.shape for grad in grads)
    rows = torch.empty(many, 0, 3)
    weights = ops.additive_attention_forward(rows, rows, torch.ones(3), None)
    assert weights.shape == (many, 0, 0)
    assert ops.additive_attention_backward(weights, rows, rows, torch.ones(3), weights)[0].shape == rows.shape
    weights, state = [torch.ones(4, 1)] * 2, [torch.empty(0, 1)] * 2
    keys = [torch.empty(0, 0, 1)] * 2
    found = ops.attention_lstm_forward(torch.empty(0, many, 4), *keys, None, None, *state, *[None] * 3, *weights)
    assert found[0].shape == (0, many, 1)
    none = torch.empty(many, 0, 1)
    indices = torch.zeros(1, dtype=torch.int32)
    assert ops.echo_state(none[:, :, :0], none[0, :, :0], indices, indices[1:], none[0, :, 0], 1.0).numel() == 0
    assert ops.novelty_gate(none, none, torch.zeros(1, dtype=torch.int64).expand(many), 0.9, 1, 1).shape == (many, 0)
    assert ops.causal_conv1d_forward(
        torch.empty(many, 1, 0), torch.ones(1, 1, 1), *[None] * 6, 1, 1, "none", False, 0.0, False
    )[0].shape == (many, 1, 0)
    none = torch.empty(many, 0, 3)
    weights = [torch.ones(4, 3), torch.ones(4, 4), None, None]
    output, _, _, saved = ops.rnn_forward("rnn_tanh", none, torch.empty(0, 4), None, weights, *[None] * 3, False, True)
    assert output.shape == (many, 0, 4)
    ops.rnn_backward(
        "rnn_tanh",
        output,
        None,
        None,
        none,
        torch.empty(0, 4),
        None,
        weights,
        *[None] * 3,
        output,
        saved,
        False,
        [True] * 5,
    )
    steps, c_0 = torch.empty(many, 0, 6), torch.empty(0, 2)
    h, _, c = ops.column_forward("fo_pool", steps, *[None] * 3, c_0, *[None] * 5, 1, True)
    assert h.shape == c.shape == (many, 0, 2)
    ops.column_backward("fo_pool", h, None, steps, *[None] * 3, c_0, *[None] * 5, c, 1)


def test_tensors_without_memory_are_refused():
    x = torch.randn(3, 4)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="input has no memory"):
        torch.ops.seqaccel.mm(x, torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="a has no memory"):
        torch.ops.seqaccel.linear_scan_forward(x.view(1, 3, 4), torch.randn(1, 3, 4), *[None] * 3, False, False)


def test_no_more_threads_than_cores():
    """A step's threads wait for each other, which takes long where they share cores."""
    code = (
        "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])\n"
        "import torch, seqaccel; torch.set_num_threads(4); print(torch.ops.seqaccel.threads())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"
