"""What every family builds on: vector functions, the matrix product, instruction sets, the choice of backend."""

import asyncio
import threading

import pytest
import torch

from seqaccel import backends

ISAS = ["portable", "avx2", "avx512"]
FUNCTIONS = {"exp": torch.exp, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


@pytest.fixture(params=ISAS)
def isa(request):
    order = ISAS.index(torch.ops.seqaccel.best_isa().removesuffix("_bf16"))
    if ISAS.index(request.param) > order:
        pytest.skip(f"this processor has no {request.param}")
    with backends.isa(request.param):
        yield request.param


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
