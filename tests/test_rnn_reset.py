"""Episodes that begin inside a sequence (``reset``): recurrent layers give what the episodes give when run apart."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS, isa_fixture
from rnn_cases import SHAPES, call, each_kind, kinds, modules, names, problem, some_lengths, weights_of, zoneout_masks
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import seqaccel
from seqaccel import nn
from seqaccel.functional.rnn import CELLS
from seqaccel.functional.rnn._operator import operators
from seqaccel.reference import rnn as reference

isa = isa_fixture(ISAS)


def drawn(kind: str, T: int, B: int) -> Tensor:
    if kind == "some":
        return torch.rand(T, B) < 0.3
    mask = torch.full((T, B), kind == "all")
    if kind == "first":
        mask[0, ::2] = True
    return mask


def episodes(reset: Tensor, end: int) -> list[tuple[int, int]]:
    """Begins and ends of the episodes of a stream, which has ``end`` steps, from its part (T,) of ``reset``."""
    begins = [t for t in range(1, end) if reset[t]]
    return list(zip([0, *begins], [*begins, end], strict=True))


# ---- the definition ----


def apart(cell, tensors, reset, lengths, masks, reverse) -> list[Tensor]:
    """output, h_n and c_n by calls of the reference without resets, one an episode."""
    T, B = reset.shape
    weights, states = weights_of(cell, tensors), [tensors["h_0"], tensors.get("c_0")]
    outputs, last = [], []
    for b in range(B):
        end = T if lengths is None else int(lengths[b])
        spans = episodes(reset[:, b], end)
        parts, given = [], [None if s is None else s[b : b + 1] for s in states]
        for first, until in reversed(spans) if reverse else spans:
            fresh = until < end if reverse else first > 0 or bool(reset[0, b])
            start = [None if s is None else torch.zeros_like(s) if fresh else s for s in given]
            start[1] = given[1] if cell in reference.CONSTANT_C else start[1]
            z = [None if m is None else m[first:until, b : b + 1] for m in masks]
            output, *found = reference.layer(
                cell, tensors["input"][first:until, b : b + 1], *start, weights, None, *z, reverse
            )
            parts.append(output)
        padding = torch.zeros_like(output[:1]).expand(T - end, -1, -1)
        outputs.append(torch.cat([*(parts[::-1] if reverse else parts), padding]))
        last.append(found)
    return [torch.cat(outputs, 1), *(torch.cat(s) for s in zip(*last, strict=True) if s[0] is not None)]


@each_kind("reference")
def test_the_reference_runs_episodes_apart(cell, projected):
    T, B = 6, 3
    tensors = problem(cell, T, B, 2, 3, projected=projected)
    zoned = zoneout_masks(cell, tensors) if CELLS[cell].zoneout else {}
    masks = [zoned[name].double() if name in zoned else None for name in ("zoneout_h", "zoneout_c")]
    for kind, reverse, lengths in (("some", False, None), ("some", True, some_lengths(T, B)), ("all", True, None)):
        reset = drawn(kind, T, B)
        weights = weights_of(cell, tensors)
        states = tensors["h_0"], tensors.get("c_0")
        found = reference.layer(cell, tensors["input"], *states, weights, lengths, *masks, reverse, reset)
        expected = apart(cell, tensors, reset, lengths, masks, reverse)
        torch.testing.assert_close([t for t in found if t is not None], expected)
        inputs = list(tensors.values())
        ours, theirs = (
            torch.autograd.grad(sum((t * t).sum() for t in ts if t is not None), inputs) for ts in (found, expected)
        )
        torch.testing.assert_close(ours, theirs)


# ---- the operators ----


def compare(backend, cell, projected, shape, kind, dtype, number, tolerances):
    """Outputs and all gradients of the operators against the reference in float64."""
    T, B, I, H = shape
    tensors = problem(cell, T, B, I, H, projected=projected)
    reverse, lengths = number % 2 == 1, some_lengths(T, B) if number == 2 else None
    zoned = zoneout_masks(cell, tensors) if CELLS[cell].zoneout and number == 3 else {}
    masks = [zoned[name].double() if name in zoned else None for name in ("zoneout_h", "zoneout_c")]
    reset = drawn(kind, T, B)
    weights, states = weights_of(cell, tensors), (tensors["h_0"], tensors.get("c_0"))
    outputs = reference.layer(cell, tensors["input"], *states, weights, lengths, *masks, reverse, reset)
    grads = [torch.randn_like(t) for t in outputs if t is not None]
    expected = [*grads[:0], *(t for t in outputs if t is not None)]
    expected += torch.autograd.grad(expected, list(tensors.values()), grads)

    def cast(value):
        if isinstance(value, (list, tuple)):
            return [cast(v) for v in value]
        return None if value is None else value.detach().to(dtype)

    forward, backward = operators(backend)
    given = [cast(tensors["input"]), *cast(states), cast(weights), lengths, *cast(masks)]
    output, h_n, c_n, saved = forward(cell, *given, reverse, True, reset)
    plain = forward(cell, *given, reverse, False, reset)
    torch.testing.assert_close([output, h_n, c_n], list(plain[:3]), rtol=tolerances[0], atol=tolerances[1])
    of_outputs = [*cast(grads), None][:3]
    needs = [True] * (1 + len(weights))
    found = backward(cell, *of_outputs, *given, output, saved, reverse, needs, reset)
    flat = [output, h_n, c_n, *found[:3], *(g for g, w in zip(found[3], weights, strict=True) if w is not None)]
    flat = [t for t in flat if t.shape != (0,)]
    torch.testing.assert_close(flat, cast(expected), rtol=tolerances[0], atol=tolerances[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each_kind("cpp")
def test_cpp(cell, projected, dtype):
    tolerances = (1e-9, 1e-9) if dtype == torch.float64 else (2e-3, 2e-3)
    shapes = [SHAPES[2], SHAPES[4], (9, 3, 7, 18), (6, 2, 5, 70), (5, 2, 3, 4)]
    kinds = ["some", "some", "some", "first", "all"]
    for number, (shape, kind) in enumerate(zip(shapes, kinds, strict=True)):
        compare("cpp", cell, projected, shape, kind, dtype, number, tolerances)


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "layer_norm_lstm"])
def test_every_instruction_set(cell, isa):
    for number, shape in enumerate([(4, 30, 3, 17), (8, 2, 5, 33)]):
        compare("cpp", cell, False, shape, "some", torch.float64, number + 2, (1e-9, 1e-9))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels in Triton's interpreter")
@each_kind("triton")
def test_triton(cell, projected, allow_tf32):
    for persistent in (True, False):
        allow_tf32(persistent)
        for number, kind in ((0, "some"), (3, "some"), (2, "some"), (1, "all")):
            compare("triton", cell, projected, (4, 3, 5, 6), kind, torch.float32, number, (1e-3, 1e-3))


@pytest.mark.parametrize("cell", ["lstm", "gru", "layer_norm_lstm"])
def test_large_layers_share_the_work(cell):
    """Enough work for several threads, copies by several threads, and passes in several parts."""
    for shape, kind in (((20, 6, 64, 96), "some"), ((12, 40, 96, 64), "some"), ((40, 1, 8, 128), "first")):
        compare("cpp", cell, False, shape, kind, torch.float64, 0, (1e-8, 1e-8))


@each_kind("cpp")
def test_gradients_of_gradients(cell, projected):
    tensors = problem(cell, 3, 2, 1, 2, projected=projected)
    reset = torch.tensor([[True, False], [False, False], [False, True]])

    def function(*values):
        return tuple(call(cell, dict(zip(names(cell, projected), values, strict=True)), "cpp", reset=reset))

    torch.autograd.gradcheck(function, list(tensors.values()))
    torch.autograd.gradgradcheck(function, list(tensors.values()))


@pytest.mark.parametrize("cell, projected", [("lstm", True), ("gru", False)])
def test_opcheck(cell, projected):
    tensors = problem(cell, 4, 3, 2, 5, projected=projected, dtype=torch.float32, requires_grad=False)
    given = [tensors["input"], tensors["h_0"], tensors.get("c_0"), weights_of(cell, tensors), None, None, None]
    forward, backward = operators("cpp")
    reset = drawn("some", 4, 3)
    torch.library.opcheck(forward, (cell, *given, False, True, reset))
    output, h_n, c_n, saved = forward(cell, *given, False, True, reset)
    grads = output, h_n, c_n if CELLS[cell].has_cell_state else None
    tests = ("test_schema", "test_faketensor")
    needs = [True] * (1 + len(given[3]))
    torch.library.opcheck(backward, (cell, *grads, *given, output, saved, False, needs, reset), test_utils=tests)
    with pytest.raises(RuntimeError, match="reset"):
        forward(cell, *given, False, True, reset[1:])
    with pytest.raises(RuntimeError, match="reset"):
        forward(cell, *given, False, True, reset.int())


def test_bfloat16_without_gradients():
    for cell, projected in kinds("cpp"):
        for B, reverse, kind in ((2, False, "some"), (3, True, "some"), (1, False, "all")):
            tensors = problem(cell, 7, B, 5, 16, projected=projected, requires_grad=False)
            tensors = {name: t.bfloat16() for name, t in tensors.items()}
            reset, lengths = drawn(kind, 7, B), some_lengths(7, B)
            options = {"reverse": reverse, "lengths": lengths, "reset": reset}
            found = call(cell, tensors, "cpp", **options)
            expected = call(cell, {name: t.double() for name, t in tensors.items()}, "reference", **options)
            torch.testing.assert_close([t.double() for t in found], expected, rtol=0.05, atol=0.05)


def test_echo_state():
    for B, T, dtype in ((1, 3, torch.float64), (1, 12, torch.float32), (5, 7, torch.float64), (17, 4, torch.float32)):
        module = nn.EchoStateNetwork(3, 40, 2, 2, connectivity=0.2, leak_rate=0.7, dtype=dtype)
        x, reset = torch.randn(T, B, 3, dtype=dtype), drawn("some", T, B)
        state = tuple(torch.randn(B, 40, dtype=dtype) for _ in range(2))
        found, last = module(x, state, reset=reset)
        for b in range(B):
            for first, until in episodes(reset[:, b], T):
                start = tuple(h[b : b + 1] * (first == 0 and not reset[0, b]) for h in state)
                expected, end = module(x[first:until, b : b + 1], start)
                torch.testing.assert_close(found[first:until, b : b + 1], expected)
            torch.testing.assert_close(tuple(h[b : b + 1] for h in last), end)
        with seqaccel.backend("reference"):
            torch.testing.assert_close(module(x, state, reset=reset)[0], found)


# ---- the modules ----


def module_of(cell, **options):
    module = modules("cpp")[cell](5, 6, dtype=torch.float64, **options)
    if cell == "gru_reset_before":
        module.reset_after = False
    return module


def run_apart(module, x, hx, reset):
    """The module's results for x (T, B, I), one call an episode."""
    hidden = getattr(module, "_hidden", lambda state: state[0])
    state = getattr(module, "_state", lambda h: (h,))
    T, B = reset.shape
    D = 2 if module.bidirectional else 1
    outputs = []
    last = [torch.zeros_like(s) for s in hx]
    for b in range(B):
        spans = episodes(reset[:, b], T)
        for first, until in spans:
            takes = torch.zeros(D, dtype=torch.bool)
            takes[0] = first == 0 and not reset[0, b]
            if D == 2:
                takes[1] = until == T
            takes = takes.repeat(module.num_layers)[:, None, None]
            start = [s[:, b : b + 1] * takes for s in hx]
            output, end = module(x[first:until, b : b + 1], hidden(tuple(start)))
            outputs.append(output[:, 0])
            gives = torch.tensor([until == T, first == 0][:D]).repeat(module.num_layers)
            for whole, part in zip(last, state(end), strict=True):
                whole[gives, b] = part[gives, 0]
    return torch.cat(outputs).view(B, T, -1).transpose(0, 1), last


@pytest.mark.parametrize("cell", modules("cpp"))
def test_modules_run_episodes_apart(cell):
    T, B, projects = 7, 3, CELLS[cell].projects
    for number, kind in enumerate(("some", "all", "none", "some")):
        options = {"num_layers": 2, "bidirectional": number % 2 == 0} | (
            {"proj_size": 4} if projects and number else {}
        )
        if CELLS[cell].zoneout and number == 3:
            options["zoneout"] = 0.3
        module = module_of(cell, **options).eval()
        D = 2 if module.bidirectional else 1
        x, reset = torch.randn(T, B, 5, dtype=torch.float64, requires_grad=True), drawn(kind, T, B)
        widths = (module.proj_size or 6, 6)[: 2 if CELLS[cell].has_cell_state else 1]
        hx = [torch.randn(2 * D, B, width, dtype=torch.float64, requires_grad=True) for width in widths]
        expected, last = run_apart(module, x, hx, reset)
        found, end = module(x, module._hidden(tuple(hx)), reset=reset)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(list(module._state(end)), last)
        inputs, weight = [x, *hx, *module.parameters()], torch.randn_like(found)
        ours, theirs = (
            torch.autograd.grad(
                [y, *s], inputs, [weight, *map(torch.ones_like, s)], allow_unused=True, materialize_grads=True
            )
            for y, s in ((found, module._state(end)), (expected, last))
        )
        torch.testing.assert_close(ours, theirs)


def test_a_reset_at_the_first_step_drops_the_state():
    module, x = nn.LSTM(5, 6), torch.randn(4, 2, 5)
    h, c = (torch.randn(1, 2, 6, requires_grad=True) for _ in range(2))
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[0, 1] = True
    output, _ = module(x, (h, c), reset=reset)
    torch.testing.assert_close(output[:, 1:], module(x[:, 1:])[0])
    torch.testing.assert_close(output[:, :1], module(x[:, :1], (h[:, :1], c[:, :1]))[0])
    for grad in torch.autograd.grad(output.sum(), (h, c)):
        assert not grad[:, 1].any() and grad[:, 0].all()
    assert torch.equal(module(x, (h, c), reset=torch.zeros_like(reset))[0], module(x, (h, c))[0])


def test_layouts():
    reset, x = drawn("some", 6, 3), torch.randn(6, 3, 5)
    module = nn.GRU(5, 6, 2, bidirectional=True)
    expected, h_n = module(x, reset=reset)
    module.batch_first = True
    found, last = module(x.transpose(0, 1), reset=reset.t())
    torch.testing.assert_close((found.transpose(0, 1), last), (expected, h_n))
    found, last = module(x[:, 1], reset=reset[:, 1])
    torch.testing.assert_close((found, last), (expected[:, 1], h_n[:, 1]))


def same_gradients(found, expected, inputs):
    """Of the sums of squares of two lists of tensors."""
    ours, theirs = (
        torch.autograd.grad(
            sum((t * t).sum() for t in ts), inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for ts in (found, expected)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("normalization", ["batch_norm", "layer_norm"])
def test_ligru(normalization):
    T, B = 7, 3
    for bidirectional, act, kind in ((True, "relu", "some"), (False, "tanh", "some"), (True, "tanh", "all")):
        module = nn.LiGRU(
            5, 6, 2, bidirectional=bidirectional, nonlinearity=act, normalization=normalization, dtype=torch.float64
        ).eval()
        x, reset = torch.randn(T, B, 5, dtype=torch.float64, requires_grad=True), drawn(kind, T, B)
        h_0 = torch.randn(4 if bidirectional else 2, B, 6, dtype=torch.float64, requires_grad=True)
        expected, (last,) = run_apart(module, x, [h_0], reset)
        found, h_n = module(x, h_0, reset=reset)
        torch.testing.assert_close((found, h_n), (expected, last))
        same_gradients((found, h_n), (expected, last), [x, h_0, *module.parameters()])


def test_dropout_of_a_ligru_outlasts_resets():
    """All episodes of a row have its mask, forward, backward and both ways through time."""
    T, B, H = 9, 3, 40
    module = nn.LiGRU(5, H, bidirectional=True, dropout=0.4, normalization="layer_norm", dtype=torch.float64)
    x, reset = torch.randn(T, B, 5, dtype=torch.float64), drawn("some", T, B)
    torch.manual_seed(0)
    found, _ = module(x, reset=reset)
    torch.manual_seed(0)
    masks = torch.nn.functional.dropout(torch.ones(2, B, H, dtype=torch.float64), 0.4)
    products, weight = module.norm_l0(torch.nn.functional.linear(x, module.weight_ih_l0)), module.weight_hh_l0
    expected = torch.zeros_like(found)
    for b in range(B):
        for first, until in episodes(reset[:, b], T):
            for d in range(2):
                part, _ = seqaccel.functional.ligru(
                    products[first:until, b : b + 1], None, None, weight, mask=masks[d, b : b + 1], reverse=d == 1
                )
                expected[first:until, b, d * H : (d + 1) * H] = part[:, 0]
    torch.testing.assert_close(found, expected)
    same_gradients([found], [expected], [module.weight_ih_l0, weight])


@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
def test_cfc(mode):
    """Products that are packed and not, two threads; timespans."""
    for T, B, units, layers, kind in ((7, 3, 5, 1, "some"), (9, 20, 1, 0, "some"), (12, 40, 64, 2, "first"),
                                      (6, 2, 4, 1, "all")):  # fmt: skip
        module = nn.CfC(5, 6, mode, "tanh", units, layers, dtype=torch.float64)
        x, spans = torch.randn(T, B, 5, dtype=torch.float64), torch.rand(T, B, dtype=torch.float64) + 0.3
        h_0, reset = torch.randn(B, 6, dtype=torch.float64), drawn(kind, T, B)
        inputs = [*(t.requires_grad_() for t in (x, h_0, spans)), *module.parameters()]
        outputs, last = [], []
        for b in range(B):
            parts = []
            for first, until in episodes(reset[:, b], T):
                start = h_0[b : b + 1] * (first == 0 and not reset[0, b])
                output, h_n = module(x[first:until, b : b + 1], start, spans[first:until, b : b + 1])
                parts.append(output)
            outputs.append(torch.cat(parts))
            last.append(h_n)
        expected = [torch.cat(outputs, 1), torch.cat(last)]
        found = module(x, h_0, spans, reset=reset)
        torch.testing.assert_close(list(found), expected)
        same_gradients(found, expected, inputs)
        with torch.no_grad():
            torch.testing.assert_close(list(module(x, h_0, spans, reset=reset)), expected)
        with seqaccel.backend("reference"):
            again = module(x, h_0, spans, reset=reset)
        torch.testing.assert_close(list(again), expected)
        same_gradients(again, expected, inputs)


def test_gradients_of_gradients_of_cfc():
    reset = torch.tensor([[True, False], [False, False], [False, True]])
    weights = [torch.randn(n, k, dtype=torch.float64, requires_grad=True) for n, k in ((3, 2), (8, 3))]
    tensors = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2, 3), (2, 2), (8,))]

    def function(x, h_0, bias, *weights):
        return seqaccel.functional.cfc(x, h_0, weights, [bias], reset=reset)

    torch.autograd.gradcheck(function, (*tensors, *weights))
    torch.autograd.gradgradcheck(function, (*tensors, *weights))


@pytest.mark.parametrize("name", ["LSTM", "LayerNormGRU", "LiGRU", "CfC"])
def test_tools_of_torch(name):
    """torch.compile, torch.export for any batch and number of steps, torch.func."""
    module, x, reset = getattr(nn, name)(5, 6).eval(), torch.randn(6, 3, 5), drawn("some", 6, 3)
    expected = module(x, reset=reset)[0]
    compiled = torch.compile(lambda x, r: module(x, reset=r)[0], fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x, reset), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x, reset).sum(), list(module.parameters())),
        torch.autograd.grad(expected.sum(), list(module.parameters())),
    )
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(module, (x,), {"reset": reset}, dynamic_shapes={"input": dims, "reset": dims})
    for T, B in ((6, 3), (9, 2)):
        y, mask = torch.randn(T, B, 5), drawn("some", T, B)
        torch.testing.assert_close(exported.module()(y, reset=mask)[0], module(y, reset=mask)[0])
    each = torch.stack([module(x, reset=r)[0] for r in (reset, ~reset)])
    found = torch.func.vmap(lambda r: module(x, reset=r)[0])(torch.stack([reset, ~reset]))
    torch.testing.assert_close(found, each)
    meta = module.to("meta")(x.to("meta"), reset=reset.to("meta"))[0]
    assert meta.shape == expected.shape


def test_errors():
    module, x = nn.LSTM(5, 6, batch_first=True), torch.randn(3, 4, 5)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for bad in (mask.int(), mask.t(), mask[:, :3], mask[0]):
        with pytest.raises(ValueError, match="LSTM: expected reset to be bool of shape \\(3, 4\\)"):
            module(x, reset=bad)
    with pytest.raises(TypeError, match="LSTM: expected reset to be a Tensor"):
        module(x, reset=[False] * 4)
    with pytest.raises(RuntimeError, match="input is on cpu and reset is on meta"):
        module(x, reset=mask.to("meta"))
    with pytest.raises(ValueError, match="reset to be None for a PackedSequence"):
        module(pack_sequence([x[0]]), reset=mask)
    weights = [module.weight_ih_l0, module.weight_hh_l0]
    with pytest.raises(ValueError, match="lstm: expected reset to be bool of shape \\(3, 4\\)"):
        seqaccel.functional.lstm(x, None, *weights, reset=mask.t())
    with seqaccel.backend("torch"), pytest.raises((RuntimeError, ValueError), match="torch"):
        module(x, reset=mask)
