"""The Triton kernels of the recurrent cells: beside the tests of every backend, what only they have."""

import interleaved
import offline
import pytest
import torch
from rnn_cases import call, each_kind, problem, random_grads, results, variant, weights_of, zoneout_masks
from tolerances import assert_as_good_on_average, mean_error

import seqaccel
from seqaccel.functional.rnn import CELLS

kernels = pytest.importorskip("seqaccel.kernels.rnn")
from seqaccel.kernels.rnn import persistent, step, tiles  # noqa: E402
from seqaccel.kernels.rnn.cells import CELLS as TRAITS  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
PERSISTENT = [cell for cell, spec in TRAITS.items() if spec.persistent]


@pytest.fixture(autouse=True)
def ieee(allow_tf32):
    """Torch's TF32 switches are off: that of recurrent layers is on by default, that of matrix products is not."""
    allow_tf32(False)


@pytest.fixture
def tf32(ieee, allow_tf32):
    """The switches are on, so that the kernels of all steps serve float32; the interpreter knows no TF32."""
    allow_tf32(True)


def pairs(found, expected):
    return [(name, (t, expected[name])) for name, t in found.items()]


def test_tables_agree():
    specs = {cell: spec for cell, spec in CELLS.items() if "triton" in spec.backends}
    assert TRAITS.keys() == specs.keys()
    for cell, spec in specs.items():
        traits = TRAITS[cell]
        assert (spec.gates, spec.has_cell_state, spec.projects) == (traits.gates, traits.has_c, traits.projects)
        assert tuple(spec.weights.values()) == traits.weights
        assert "triton" not in spec.without_projection


def assert_as_good_as_plain_float32(cell, shape, projected):
    """The error against the float64 reference is at most twice that of the float32 reference, or one rounding.

    The largest error of the few values of a small layer is a lottery, and more so behind a layer norm; its mean square
    over some problems is not.
    """
    squares: dict = {}
    for number in range(4):
        tensors = problem(cell, *shape, projected=projected, dtype=torch.float32, requires_grad=False)
        doubles = {name: t.double() for name, t in tensors.items()}
        options = variant(number, cell, doubles, ["triton"])
        grads = [g.float() for g in random_grads(cell, doubles, **options)]
        expected = results(cell, doubles, "reference", grads, **options)
        for backend in ("triton", "reference"):
            for name, found in results(cell, tensors, backend, grads, **options).items():
                exact = expected[name].detach()
                error = (found.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
                assert error < 1e-4, f"{backend}, variant {number}, {name}: error {error:.3g}"
                squares.setdefault((backend, name), []).append(float(error) ** 2)
    for (backend, name), found in squares.items():
        ours, theirs = ((sum(s) / len(s)) ** 0.5 for s in (found, squares["reference", name]))
        assert ours <= max(2 * theirs, torch.finfo(torch.float32).eps), f"{backend}, {name}: {ours:.3g}, {theirs:.3g}"


@interpreted
@each_kind("triton")
def test_one_step_a_launch(cell, projected, poison):
    assert_as_good_as_plain_float32(cell, (3, 2, 5, 20), projected)


@interpreted
@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("cell", ["rnn_relu", "ligru_relu", "ligru_relu_masked"])
def test_the_gradient_of_relu_at_nan_is_torchs(cell, backend):
    tensors = problem(cell, 3, 4, 3, 8, dtype=torch.float32, requires_grad=False)
    tensors["input"][1, 1, 0] = float("nan")
    grads = random_grads(cell, tensors)
    expected = results(cell, tensors, "reference", grads)
    for name, found in results(cell, tensors, backend, grads).items():
        torch.testing.assert_close(found, expected[name], equal_nan=True, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("shape", [(3, 18, 5, 20), (2, 2, 4, 40)], ids=str)
@pytest.mark.parametrize("cell", PERSISTENT)
def test_all_steps_in_one_launch(cell, shape, tf32, poison, monkeypatch):
    if (4, tiles.block_h(shape[3]), CELLS[cell].gates) not in tiles.PERSISTENT_WARPS:
        pytest.skip("this many gates of this many units run step by step")
    monkeypatch.setattr(step, "forward_kernel", None)
    monkeypatch.setattr(step, "backward_kernel", None)
    assert_as_good_as_plain_float32(cell, shape, False)


@interpreted
@pytest.mark.parametrize("cell", PERSISTENT)
def test_all_steps_of_the_largest_block(cell, tf32, monkeypatch):
    """The block that serves 65 to 128 units, which only 16 bits take on a GPU; the interpreter runs it in float32."""
    monkeypatch.setitem(tiles.PERSISTENT_WARPS, (4, 128, CELLS[cell].gates), (8, 8))
    monkeypatch.setattr(step, "forward_kernel", None)
    monkeypatch.setattr(step, "backward_kernel", None)
    tensors = problem(cell, 2, 17, 3, 112, dtype=torch.float32)
    grads = random_grads(cell, tensors)
    expected = results(cell, tensors, "reference", grads)
    for name, found in results(cell, tensors, "triton", grads).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cell", PERSISTENT)
def test_units_spread_over_programs(cell, parts, tf32, poison, monkeypatch):
    """But for the waiting: the interpreter runs one program after the other, so that one must have all units."""
    gates = CELLS[cell].gates
    forward = tiles.Tiles(16, 64, 64, 4, groups=1, rows=32)
    if gates == 1:
        forward = tiles.Tiles(16, 64, 16, 4, groups=1, quarters=4, rows=32)
    backward = tiles.Tiles(16, 64, 64 // parts, 4, groups=1, quarters=4, parts=parts, rows=32)
    monkeypatch.setattr(tiles, "persistent", lambda *_: (forward, backward))
    monkeypatch.setattr(step, "forward_kernel", None)
    monkeypatch.setattr(step, "backward_kernel", None)
    assert_as_good_as_plain_float32(cell, (3, 37, 5, 40), False)


def spread_over_three(cell, monkeypatch):
    """Tiles of 48 units, 16 a program."""
    gates = CELLS[cell].gates
    quarters, block_k = (1, 64) if gates > 1 else (4, 16)
    forward = tiles.Tiles(16, 16, block_k, 4, groups=3, quarters=quarters, rows=32)
    backward = tiles.Tiles(16, 16, 64 if gates > 1 else 16, 4, groups=3, quarters=4, rows=32)
    monkeypatch.setattr(tiles, "one_program", lambda *_: None)
    monkeypatch.setattr(tiles, "cooperative", lambda *_: (forward, backward))


def interleaved_results(cell, seed, monkeypatch, resident=None, waits=True):
    """Of programs that run by turns, and of the reference."""
    tensors = problem(cell, 3, 18, 2, 48, dtype=torch.float32)
    options = {"lengths": torch.arange(18) % 3 + 1} if seed % 2 else {}
    grads = random_grads(cell, tensors, **options)
    expected = results(cell, tensors, "reference", grads, **options)
    spread_over_three(cell, monkeypatch)
    with monkeypatch.context() as by_turns:
        interleaved.interleave(by_turns, interleaved.Scheduler(seed, resident), waits)
        return results(cell, tensors, "triton", grads, **options), expected


@interpreted
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cell", PERSISTENT)
def test_programs_that_wait_for_each_other(cell, seed, tf32, poison, monkeypatch):
    """In any order, each reads what the others stored in the step before, and nothing later."""
    for name, (found, wanted) in pairs(*interleaved_results(cell, seed, monkeypatch)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
def test_programs_must_wait_and_be_resident(tf32, monkeypatch):
    """What the waiting and the cooperative launch are for: without them the test above would fail."""
    found, expected = interleaved_results("gru", 0, monkeypatch, waits=False)
    assert not torch.allclose(found["output"], expected["output"], atol=1e-2)
    with pytest.raises(interleaved.Deadlock):
        interleaved_results("gru", 0, monkeypatch, resident=2)


class Refusing:
    """A kernel whose launch the driver refuses."""

    def __init__(self, message):
        self.message, self.launches = message, 0

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        self.launches += 1
        raise RuntimeError(f"Triton Error [CUDA]: {self.message}")


@interpreted
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru"])
@pytest.mark.parametrize("name", ["persistent_forward_kernel", "persistent_backward_kernel"])
def test_refused_cooperative_launches(name, cell, tf32, monkeypatch):
    """A share of a GPU may not hold all programs: then, and from there on, the cell runs step by step."""
    tensors = problem(cell, 3, 2, 2, 48, dtype=torch.float32)
    grads = random_grads(cell, tensors)
    expected = results(cell, tensors, "reference", grads)
    spread_over_three(cell, monkeypatch)
    monkeypatch.setattr(tiles, "refused", set())
    interleaved.interleave(monkeypatch, interleaved.Scheduler(0))
    refusing = Refusing("too many blocks in cooperative launch")
    monkeypatch.setattr(persistent, name, refusing)
    with pytest.warns(UserWarning, match="cooperative"):
        found = results(cell, tensors, "triton", grads)
    found_again = results(cell, tensors, "triton", grads)
    assert refusing.launches == 1
    for of_one, (ours, wanted) in pairs(found, expected) + pairs(found_again, expected):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, name=of_one: f"{name}: {m}")


@interpreted
def test_other_errors_of_launches(tf32, monkeypatch):
    tensors = problem("gru", 3, 2, 2, 48, dtype=torch.float32)
    spread_over_three("gru", monkeypatch)
    for message in ("an illegal memory access was encountered", "operation not permitted when stream is capturing"):
        monkeypatch.setattr(persistent, "persistent_forward_kernel", Refusing(message))
        with pytest.raises(RuntimeError, match=message):
            call("gru", tensors, "triton")
    assert not tiles.refused


@interpreted
@each_kind("triton")
def test_blocks_of_units(cell, projected):
    """More hidden units than a block has."""
    tensors = problem(cell, 2, 2, 3, 300, projected=projected, dtype=torch.float32)
    grads = random_grads(cell, tensors)
    expected = results(cell, tensors, "reference", grads)
    for name, found in results(cell, tensors, "triton", grads).items():
        torch.testing.assert_close(found, expected[name], rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@interpreted
@pytest.mark.parametrize("whole_launch", [False, True], ids=["one_step", "all_steps"])
@pytest.mark.parametrize("reverse", [False, True])
@each_kind("triton")
def test_padding_has_no_say(cell, projected, reverse, whole_launch, request):
    """Outputs and gradients of states do not see what lies past a sequence's end, not even NaN."""
    if whole_launch:
        if projected or not TRAITS[cell].persistent:
            pytest.skip("runs step by step")
        request.getfixturevalue("tf32")
    lengths = torch.tensor([3, 1])
    tensors = problem(cell, 3, 2, 4, 6, projected=projected, dtype=torch.float32)
    options = {"reverse": reverse, "lengths": lengths}
    grads = [torch.randn_like(t) for t in call(cell, tensors, "triton", **options)]
    expected = results(cell, tensors, "triton", grads, **options)
    padded = tensors["input"].detach().clone()
    padded[1:, 1] = float("nan")
    found = results(cell, tensors | {"input": padded}, "triton", grads, **options)
    for name in ("output", "h_n", "c_n", "grad of h_0", "grad of c_0"):
        if name in expected:
            assert torch.equal(found[name], expected[name]), name
    assert torch.equal(found["grad of input"][:, 0], expected["grad of input"][:, 0])


@interpreted
@each_kind("triton")
def test_inputs_without_features(cell, projected):
    tensors = problem(cell, 2, 2, 0, 5, projected=projected, dtype=torch.float32)
    grads = random_grads(cell, tensors)
    expected = results(cell, tensors, "reference", grads)
    for name, found in results(cell, tensors, "triton", grads).items():
        torch.testing.assert_close(found, expected[name], msg=lambda m, name=name: f"{name}: {m}")


@interpreted
@each_kind("triton")
@pytest.mark.parametrize(("T", "B"), [(0, 3), (3, 0)])
def test_nothing_to_do(cell, projected, T, B):
    tensors = problem(cell, T, B, 4, 5, projected=projected, dtype=torch.float32)
    output, *state = call(cell, tensors, "triton")
    assert output.shape == (T, B, tensors["h_0"].shape[1])
    for found, before in zip(state, ("h_0", "c_0"), strict=False):
        assert torch.equal(found, tensors[before])
    sum((t * t).sum() for t in (output, *state)).backward()
    for name, t in tensors.items():
        wanted = 2 * t if name in ("h_0", "c_0") else torch.zeros_like(t)
        assert torch.equal(t.grad, wanted), name


def arguments(cell, projected, device="cpu"):
    tensors = problem(cell, 3, 2, 4, 6, projected=projected, dtype=torch.float32, requires_grad=False)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    weights = weights_of(cell, tensors)
    masks = {name: m.float().to(device) for name, m in zoneout_masks(cell, tensors).items()}
    zoneout = (masks["zoneout_h"], masks.get("zoneout_c")) if CELLS[cell].zoneout else (None, None)
    lengths = torch.tensor([3, 1], device=device)
    return cell, tensors["input"], tensors["h_0"], tensors.get("c_0"), weights, lengths, *zoneout


@interpreted
@each_kind("triton")
def test_operators_refuse_what_does_not_fit(cell, projected):
    given = [*arguments(cell, projected), False, True]
    for position, value in enumerate(given):
        if not isinstance(value, torch.Tensor):
            continue
        wrong = [value.unsqueeze(0), value.double()] + [value[..., :-1]] * (position != 1)
        for bad in wrong:
            with pytest.raises(RuntimeError, match=r"^rnn: "):
                kernels.rnn_forward(*given[:position], bad, *given[position + 1 :])
    weights = given[4]
    for i, weight in enumerate(weights):
        if weight is not None:
            for bad in (weight[..., :-1], weight.half(), weight[None]):
                with pytest.raises(RuntimeError, match=r"^rnn: "):
                    kernels.rnn_forward(*given[:4], [*weights[:i], bad, *weights[i + 1 :]], *given[5:])
    with pytest.raises(RuntimeError, match="no cell 'gated'"):
        kernels.rnn_forward("gated", *given[1:])
    with pytest.raises(RuntimeError, match="weights of"):
        kernels.rnn_forward(*given[:4], weights[:-1], *given[5:])
    output, h_n, _, saved = kernels.rnn_forward(*given)
    needs = [True] * (1 + len(weights))
    with pytest.raises(RuntimeError, match="a gradient or output"):
        kernels.rnn_backward(cell, output[1:], h_n, None, *given[1:8], output, saved, False, needs)
    with pytest.raises(RuntimeError, match="saved"):
        kernels.rnn_backward(cell, output, h_n, None, *given[1:8], output, [*saved, output], False, needs)
    with pytest.raises(RuntimeError, match="needs"):
        kernels.rnn_backward(cell, output, h_n, None, *given[1:8], output, saved, False, needs[1:])


def test_configurations():
    offline.check_configurations("seqaccel.kernels.rnn")


# ---- on a GPU ----


def assert_as_good_as_stock(cell, tensors):
    """By torch's operator, or where torch has none by the reference in the same dtype, plain PyTorch; of 4 problems."""
    doubles = {name: t.double() for name, t in tensors.items()}
    squares: dict = {}
    for number in range(4):
        options = variant(number, cell, tensors, ["triton"])
        options = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
        grads = random_grads(cell, doubles, **options)
        expected = results(cell, doubles, "reference", grads, **options)
        has_stock = "torch" in CELLS[cell].backends and options.get("zoneout_h") is None
        theirs = results(cell, tensors, "torch" if has_stock else "reference", grads, **options)
        for name, ours in results(cell, tensors, "triton", grads, **options).items():
            both = squares.setdefault(name, ([], []))
            for errors, found in zip(both, (ours, theirs[name]), strict=True):
                errors.append(mean_error(found, expected[name]) ** 2)
    errors = {name: tuple((sum(s) / len(s)) ** 0.5 for s in both) for name, both in squares.items()}
    tf32 = torch.backends.cudnn.allow_tf32
    assert_as_good_on_average(errors, tensors["input"].dtype, tf32, kinked=cell == "rnn_relu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 5, 24, 64), (20, 33, 40, 130), (9, 17, 16, 32), (5, 3, 8, 1000)], ids=str)
@each_kind("triton")
def test_every_cell_on_a_gpu(cell, projected, shape, dtype):
    tensors = problem(cell, *shape, projected=projected, dtype=torch.float32, requires_grad=False)
    assert_as_good_as_stock(cell, {name: t.cuda().to(dtype) for name, t in tensors.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 5, 40, 80), (7, 40, 24, 128), (1, 1, 3, 1), (6, 3, 5, 100)], ids=str)
@pytest.mark.parametrize("cell", PERSISTENT)
def test_all_steps_on_a_gpu(cell, shape, dtype, tf32):
    tensors = problem(cell, *shape, dtype=torch.float32, requires_grad=False)
    assert_as_good_as_stock(cell, {name: t.cuda().to(dtype) for name, t in tensors.items()})


# Several gates of 1,024 units in float32 are more than the multiprocessors hold: those run step by step.
COOPERATIVE = [
    (cell, shape, dtype)
    for cell in PERSISTENT
    for shape in ((20, 5, 24, 256), (30, 150, 16, 512), (9, 33, 8, 1024), (5, 17, 8, 144))
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if TRAITS[cell].gates == 1 or dtype.itemsize * shape[3] <= 2048
]


@pytest.mark.gpu
@pytest.mark.parametrize(("cell", "shape", "dtype"), COOPERATIVE, ids=str)
def test_units_spread_over_programs_on_a_gpu(cell, shape, dtype, tf32):
    tensors = problem(cell, *shape, dtype=torch.float32, requires_grad=False)
    assert_as_good_as_stock(cell, {name: t.cuda().to(dtype) for name, t in tensors.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("cell", PERSISTENT)
def test_waiting_of_many_steps_on_a_gpu(cell):
    """The same bits each time: no program reads what another has not stored yet."""
    tensors = problem(cell, 700, 40, 16, 256, dtype=torch.float32)
    tensors = {name: t.detach().cuda().to(torch.bfloat16) for name, t in tensors.items()}
    grads = random_grads(cell, tensors)
    first = results(cell, tensors, "triton", grads)
    for _ in range(3):
        for name, found in results(cell, tensors, "triton", grads).items():
            assert torch.equal(found, first[name]), name


@pytest.mark.gpu
@each_kind("triton")
def test_cuda_graph(cell, projected):
    """Neither pass waits for the GPU, so that both can be captured."""
    assert_captured(cell, arguments(cell, projected, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 256])
@pytest.mark.parametrize("cell", PERSISTENT)
def test_cuda_graph_of_all_steps(cell, hidden):
    tensors = problem(cell, 20, 40, 8, hidden, dtype=torch.float32, requires_grad=False)
    tensors = {name: t.cuda().bfloat16() for name, t in tensors.items()}
    state = tensors["h_0"], tensors.get("c_0")
    assert_captured(cell, (cell, tensors["input"], *state, weights_of(cell, tensors), None, None, None))


def assert_captured(cell, given):
    needs = [True] * (1 + len(given[4]))

    def both():
        output, h_n, c_n, saved = kernels.rnn_forward(*given, False, True)
        upstream = (output, h_n, c_n if TRAITS[cell].has_c else None)
        grads = kernels.rnn_backward(cell, *upstream, *given[1:], output, saved, False, needs)
        return output, h_n, c_n, *grads[:3], *grads[3]

    expected = [t.clone() for t in both()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        for found in captured:
            found.zero_()
        graph.replay()
        for found, wanted in zip(captured, expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(9, 20, 16, 64), (9, 20, 16, 256), (3, 300, 16, 512), (1, 1, 8, 256)], ids=str)
@pytest.mark.parametrize("cell", PERSISTENT)
def test_one_launch_or_many_on_a_gpu(cell, shape, monkeypatch):
    tensors = problem(cell, *shape, dtype=torch.float32)
    tensors = {name: t.detach().cuda().to(torch.bfloat16) for name, t in tensors.items()}
    grads = random_grads(cell, tensors)
    at_once = results(cell, tensors, "triton", grads)
    monkeypatch.setattr(tiles, "persistent", lambda *_: None)
    for name, found in results(cell, tensors, "triton", grads).items():
        difference = (found - at_once[name]).float().norm() / at_once[name].float().norm()
        limit = 0.25 if cell == "rnn_relu" else 0.03  # as in assert_as_good_on_average; roundings of products to 2^-9
        assert difference < limit, f"{name}: {difference:.3g}"


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_modules_of_torch_on_a_gpu(kind, dtype, packed):
    """What auto takes, whichever it is, trains a stack of layers as torch's does."""
    stock = getattr(torch.nn, kind)(12, 40, 2, bidirectional=True).to("cuda", dtype)
    ours = getattr(seqaccel.nn, kind)(12, 40, 2, bidirectional=True).to("cuda", dtype)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(9, 5, 12, device="cuda", dtype=dtype)
    if packed:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 9, 1, 7, 7]), enforce_sorted=False)
    found = []
    for module in (stock, ours.eval()):  # eval: torch's own backward pass refuses that on cuDNN, without need
        output, state = module(x)
        output = output.data if packed else output
        output.float().square().sum().backward()
        states = state if isinstance(state, tuple) else (state,)
        found.append([output, *states, *(p.grad for p in module.parameters())])
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float64: 1e-12}[dtype]
    for theirs, mine in zip(*found, strict=True):
        assert (theirs - mine).float().norm() <= limit * theirs.float().norm()
