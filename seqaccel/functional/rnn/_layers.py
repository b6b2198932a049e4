"""The road of every recurrent call: all layers of a module (``layers``), one layer and direction (``layer``), one step
(``step``).

Small problems are dominated by Python, so each first asks the C++ node (``csrc/autograd``), which does float32 and
float64 on a CPU without lengths and zoneout, autograd included (45 to 80 us less a training step). What the node
declines takes the general path: checks, autocast, the choice of backend, the operator.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqaccel import _arguments, _common, _extension, backends
from seqaccel.functional.rnn import _onnx, _packed, _torch
from seqaccel.functional.rnn._cells import CELLS, Problem
from seqaccel.functional.rnn._operator import Layer, called, on_padded, operators
from seqaccel.reference import rnn as reference

Zoneout = float | Tensor | None
States = tuple[Tensor, ...]

if _extension.autograd is not None:
    for _name, _spec in CELLS.items():
        if "cpp" in _spec.backends:
            _shapes = [shape + "?" * (weight in _spec.optional) for weight, shape in _spec.weights.items()]
            _extension.autograd.add_cell(_name, _spec.gates, _spec.has_cell_state, _shapes)


class Direction(NamedTuple):
    """What one direction of a layer has beside the layer's input."""

    h_0: Tensor | None  # (B, P); None: zero
    c_0: Tensor | None  # (B, H)
    weights: Sequence[Tensor | None]  # in the order of CellSpec.weights
    reverse: bool = False
    zoneout_h: Zoneout = None  # a number, or factors (T, B, P)
    zoneout_c: Zoneout = None  # a number, or factors (T, B, H)


class Rows(NamedTuple):
    """Which steps of an input are a sequence's."""

    lengths: Tensor | None = None  # (B,); None: all steps
    batch_sizes: Tensor | None = None  # (T,), of a packed input (N, I), whose lengths are longest first
    reset: Tensor | None = None  # (T, B): where episodes begin; not of a packed input


# ---- checks ----


_STATES = {"h_0": "BP", "c_0": "BH"}


@_common.unrecorded
def _check(name: str, cell: str, input: Tensor, batch: int | None, direction: Direction) -> None:
    """``batch``: sequences of a packed input, else None."""
    spec = CELLS[cell]
    gates, weight_hh = spec.gates, direction.weights[1]
    if batch is None and input.dim() != 3:
        raise ValueError(f"{name}: expected input to have 3 dimensions (T, B, I), but got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"{name}: expected input to be floating point, but got {input.dtype}")
    if weight_hh is None or weight_hh.dim() != 2 or weight_hh.shape[0] % gates or weight_hh.shape[0] == 0:
        rows = "H" if gates == 1 else f"{gates} * H"
        found = None if weight_hh is None else tuple(weight_hh.shape)
        raise ValueError(f"{name}: expected weight_hh to have shape ({rows}, H), but got {found}")
    G = weight_hh.shape[0]
    P = H = G // gates
    projection = direction.weights[4] if spec.projects else None
    if projection is not None:
        if projection.dim() != 2 or projection.shape[1] != H:
            raise ValueError(f"{name}: expected weight_hr to have shape (P, {H}), but got {tuple(projection.shape)}")
        P = projection.shape[0]
    B = input.shape[1] if batch is None else batch
    sizes = {"B": B, "I": input.shape[-1], "G": G, "P": P, "H": H, "3": 3}
    if direction.weights[0] is None and input.shape[-1] != G:
        raise ValueError(f"{name}: expected input to have {G} features without weight_ih, but got {input.shape[-1]}")
    dtype, device = input.dtype, input.device
    shapes = (*_STATES.items(), *spec.weights.items())
    for tensor, (key, letters) in zip((direction.h_0, direction.c_0, *direction.weights), shapes, strict=True):
        if tensor is None:
            continue
        wanted = tuple([sizes[letter] for letter in letters])
        if tensor.shape != wanted:
            raise ValueError(f"{name}: expected {key} to have shape {wanted}, but got {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {key} to have the dtype of input, {dtype}, but got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, "
                f"but input is on {device} and {key} is on {tensor.device}"
            )


@_common.unrecorded
def _check_lengths(name: str, lengths: Tensor, steps: int, batch: int) -> None:
    _arguments.tensor(name, "lengths", lengths)
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"{name}: expected lengths to be torch.int64 of shape ({batch},), "
            f"but got {lengths.dtype} of {tuple(lengths.shape)}"
        )
    if _common.transforms_active() or _onnx.exporting() or not batch:
        return
    if torch.compiler.is_compiling() or lengths.device.type != "cpu":  # which nothing waits for
        message = f"{name}: expected lengths to be between 1 and the number of steps"
        torch._assert_async(((lengths >= 1) & (lengths <= steps)).all(), message)
    else:
        shortest, longest = (int(bound) for bound in lengths.aminmax())
        if shortest < 1 or longest > steps:
            raise ValueError(
                f"{name}: expected lengths to be between 1 and {steps}, but they range from {shortest} to {longest}"
            )


@_common.unrecorded
def _check_reset(name: str, reset: Tensor, input: Tensor) -> None:
    _arguments.reset(name, reset, tuple(input.shape[:2]), input.device)


def _on_device(lengths: Tensor, device: torch.device) -> Tensor:
    """Copied to a GPU from pinned memory, so that nothing waits for it."""
    if device.type != "cuda" or not lengths.is_cpu or torch.compiler.is_compiling():
        return lengths.to(device)
    return lengths.pin_memory().to(device, non_blocking=True)


def _factors(name: str, key: str, zoneout: Zoneout, input: Tensor, width: int, dtype: torch.dtype) -> Tensor | None:
    """Blend factors as the operators take them: (T, B, width), or of packed rows (N, width), or one for all."""
    if zoneout is None:
        return None
    if not isinstance(zoneout, Tensor):
        _arguments.probability(name, key, zoneout)
        return torch.full((1,), float(zoneout), dtype=dtype, device=input.device)
    shape = (*input.shape[:-1], width)
    if zoneout.numel() == 1:
        zoneout = zoneout.reshape(1)
    elif tuple(zoneout.shape) != shape:
        raise ValueError(f"{name}: expected {key} to be a number or of shape {shape}, but got {tuple(zoneout.shape)}")
    return zoneout.detach().to(input.device, dtype)


# ---- the choice of backend ----


def _is_one_call_of_torch(problem: Problem) -> bool:
    """Whether torch's operator, if it is chosen, stays one call: what compiles may unroll its steps."""
    if not torch.compiler.is_compiling():
        return True
    if problem.device.type == "cpu":  # oneDNN's backward pass cannot be traced
        return False
    return not problem.ragged and _torch.is_opaque(problem.device, problem.dtype)


def choose(cell: str, input: Tensor, problem: Problem, zoned: bool, has_reset: bool = False) -> str:
    """The backend of a layer."""
    spec = CELLS[cell]
    left_out = (spec.without_projection if problem.projected else ()) + (spec.without_zoneout if zoned else ())
    left_out += ("torch",) if has_reset or _common.is_distributed(input) else ()
    supported = [backend for backend in spec.backends if backend not in left_out]
    prefer = None
    device_type = problem.device.type
    if device_type == "cuda" and problem.dtype == torch.float64:  # our kernels have none
        prefer = "torch" if "torch" in supported else "reference"
    elif spec.torch_is_faster is not None and _is_one_call_of_torch(problem):
        prefer = "torch" if spec.torch_is_faster(problem) else None
    return backends.choose(cell, input, supported, prefer=prefer)


def torch_runs_all_layers(
    cell: str, input: Tensor, batch_sizes: Tensor | None, hidden_size: int, projected: bool
) -> bool:
    """Whether torch's operator serves on a GPU, where it takes the layers of a module, and its weights, as a whole.

    A layer of them at a time it would copy the weights at each call. Where torch.jit traces, it is one node.
    """
    if "torch" not in CELLS[cell].backends:
        return False
    if torch.jit.is_tracing() and backends.current() in ("auto", "torch"):
        return True
    if input.device.type != "cuda":
        return False
    if _common.transforms_active() or _onnx.exporting():
        return False
    dtype = input.dtype
    if torch.compiler.is_compiling() and (
        batch_sizes is not None or _common.autocast_on("cuda") or not _torch.is_opaque(input.device, dtype)
    ):
        return False
    if _common.autocast_on("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        if dtype != torch.float16:  # torch's autocast of these operators knows float16 only
            return False
    steps, batch = input.shape[:2] if batch_sizes is None else (len(batch_sizes), int(batch_sizes[0]))
    problem = Problem(input.device, steps, batch, input.shape[-1], hidden_size, dtype, False, False, projected)
    return choose(cell, input, problem, False) == "torch"


def _torch_step_is_faster(cell: str, input: Tensor, weight_hh: Any) -> bool:
    """Whether ``auto`` takes torch's operator of a single step for input (B, I): see ``CellSpec.torch_steps``."""
    if torch.jit.is_tracing():
        return backends.current() in ("auto", "torch")
    return (
        not torch.compiler.is_compiling()  # first: a graph must not depend on the batch
        and 0 < input.shape[0] * weight_hh.shape[1] <= CELLS[cell].torch_steps
        and not torch.is_grad_enabled()
        and not _common.transforms_active()
        and not _common.is_distributed(input)
        and input.device.type == "cpu"
        and backends.current() == "auto"
    )


# ---- the general path ----


def _run(
    cell: str, input: Tensor, direction: Direction, rows: Rows, exporting: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One direction, of arguments that fit together."""
    h_0, c_0, weights, reverse, zoneout_h, zoneout_c = direction
    lengths, batch_sizes, reset = rows
    assert h_0 is not None
    spec = CELLS[cell]
    steps, batch = input.shape[0] if batch_sizes is None else batch_sizes.shape[0], h_0.shape[0]
    hidden = weights[1].shape[0] // spec.gates  # type: ignore[union-attr]
    recorded = _common.needs_grad(input, h_0, c_0, *weights)
    projected = spec.projects and weights[4] is not None
    problem = Problem(
        input.device, steps, batch, input.shape[-1], hidden, input.dtype, lengths is not None, recorded, projected
    )
    zoned = zoneout_h is not None or zoneout_c is not None
    backend = choose(cell, input, problem, zoned, reset is not None)
    if exporting or _common.transforms_active():
        backend = "reference"
    narrow = backend == "cpp" and input.dtype == torch.bfloat16 and not recorded and weights[0] is not None
    if batch_sizes is not None and (backend != "cpp" or narrow):

        def padded(input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse):
            padded_direction = Direction(h_0, c_0, weights, reverse, zoneout_h, zoneout_c)
            return _run(cell, input, padded_direction, Rows(lengths), exporting)

        return on_padded(padded, batch_sizes, input, h_0, c_0, weights, lengths, zoneout_h, zoneout_c, reverse)
    if backend == "torch":
        return _torch.layer(cell, input, h_0, c_0, list(weights), lengths, reverse)
    dtype = input.dtype
    compute = _common.compute_dtype(dtype) if backend == "cpp" else dtype
    factors_h = _factors(cell, "zoneout of h", zoneout_h, input, h_0.shape[1], compute)
    factors_c = _factors(cell, "zoneout of c", zoneout_c, input, hidden, compute) if spec.has_cell_state else None
    if lengths is not None:
        lengths = _on_device(lengths, input.device)
    if backend == "reference":
        definition = _onnx.scanned_layer if exporting else reference.layer
        return definition(cell, input, h_0, c_0, weights, lengths, factors_h, factors_c, reverse, reset)
    if narrow and factors_h is None and factors_c is None:
        narrow_forward = torch.ops.seqaccel.rnn_forward_bfloat16.default
        narrow_operands = (input, h_0, c_0, list(weights), lengths, reverse, reset)
        # While compiling autograd records the operator itself.
        if torch.compiler.is_compiling():
            output, h_n, c_n = narrow_forward(cell, *narrow_operands)
        else:
            output, h_n, c_n = called(cell, "forward", narrow_forward, *narrow_operands)
        return output, h_n, c_n if spec.has_cell_state else None
    tensors = [input, h_0, c_0, *weights]
    if dtype != compute:
        tensors = [None if t is None else t.to(compute) for t in tensors]
    input, h_0, c_0, *weights = tensors  # type: ignore[assignment]
    operands = (input, h_0, c_0, list(weights), lengths, factors_h, factors_c, reverse, False, reset)
    if torch.compiler.is_compiling():
        output, h_n, c_n, _ = operators(backend)[0](cell, *operands)
    elif recorded:
        output, h_n, c_n = Layer.apply(
            None, cell, backend, reverse, batch_sizes, lengths, reset, factors_h, factors_c, *tensors
        )  # fmt: skip
    else:
        output, h_n, c_n, _ = called(cell, "forward", operators(backend)[0], *operands)
    if dtype != compute:
        output, h_n, c_n = output.to(dtype), h_n.to(dtype), c_n.to(dtype)
    return output, h_n, c_n if spec.has_cell_state else None


def _prepared(name: str, cell: str, input: Tensor, direction: Direction, rows: Rows) -> tuple[Tensor, Direction]:
    """Checked, cast where autocast is on."""
    h_0, c_0, weights, reverse, zoneout_h, zoneout_c = direction
    spec = CELLS[cell]
    for key, value in zip(("input", *_STATES, *spec.weights), (input, h_0, c_0, *weights), strict=True):
        _arguments.tensor(name, key, value, optional=key in spec.optional or key in _STATES)
    if type(reverse) is not bool:
        _arguments.flag(name, "reverse", reverse)
    input, h_0, c_0, *weights = _common.autocast(input, h_0, c_0, *weights)  # type: ignore[assignment]
    zoneout_h, zoneout_c = (None if not isinstance(z, Tensor) and z == 0 else z for z in (zoneout_h, zoneout_c))
    direction = Direction(h_0, c_0, weights, bool(reverse), zoneout_h, zoneout_c)
    batch = None if rows.batch_sizes is None else rows.lengths.shape[0]  # type: ignore[union-attr]
    _check(name, cell, input, batch, direction)
    if rows.lengths is not None and batch is None:
        _check_lengths(name, rows.lengths, input.shape[0], input.shape[1])
    if rows.reset is not None:
        _check_reset(name, rows.reset, input)
    return input, direction


def _layer(
    name: str, cell: str, input: Tensor, directions: list[Direction], rows: Rows
) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """output (T, B, D * P) and, of each direction, h_n (B, P) and, where the cell has it, c_n (B, H)."""
    spec, exporting = CELLS[cell], _onnx.exporting()
    prepared = [_prepared(name, cell, input, direction, rows) for direction in directions]
    if exporting:
        given = [direction for _, direction in prepared]
        zoned = (z for direction in given for z in (direction.zoneout_h, direction.zoneout_c))
        if rows.reset is None and _onnx.is_operator(cell, *zoned):
            first: list[Any] = [
                None if parts[0] is None else torch.stack(parts) for parts in zip(*(d[:2] for d in given), strict=True)
            ]
            weights = [direction.weights for direction in given]
            output, h_n, c_n = _onnx.layer(
                cell, prepared[0][0], first[0], first[1], weights, rows.lengths, given[0].reverse
            )
            return output, [(h_n[d], None if c_n is None else c_n[d]) for d in range(len(given))]
    outputs, last = [], []
    for (cast, direction), (h_given, c_given, *_) in zip(prepared, directions, strict=True):
        weight_hh: Any = direction.weights[1]
        if direction.h_0 is None:
            batch = cast.shape[1] if rows.batch_sizes is None else rows.lengths.shape[0]  # type: ignore[union-attr]
            direction = direction._replace(h_0=cast.new_zeros(batch, weight_hh.shape[1]))
            if spec.has_cell_state:
                direction = direction._replace(c_0=cast.new_zeros(batch, weight_hh.shape[0] // spec.gates))
        output, h_n, c_n = _run(cell, cast, direction, rows, exporting)
        carried = next((t for t in (c_given, h_given) if t is not None), input).dtype
        if cast.device.type == "cpu" and carried != cast.dtype and _common.autocast_on("cpu"):
            # What autocast leaves of the state's dtype in torch.nn's layers on a CPU.
            carried = torch.promote_types(carried, output.dtype)
            if spec.gates == 3:
                output, h_n = output.to(carried), h_n.to(carried)
            elif spec.projects and direction.weights[4] is not None:
                c_n = None if c_n is None else c_n.to(carried)
        outputs.append(output)
        last.append((h_n, c_n))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), last


# ---- the road ----


def layer(
    name: str,
    cell: str,
    input: Tensor,
    direction: Direction,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer and direction: output (T, B, P), h_n (B, P) and, where the cell has it, c_n (B, H); ``name`` is the
    public function's, for messages."""
    h_0, c_0, weights, reverse, zoneout_h, zoneout_c = direction
    node = backends.node(input)
    if node is not None and lengths is None and zoneout_h is zoneout_c is None and type(reverse) is bool:
        found = node.layers(cell, input, h_0, c_0, [weights], 1, reverse, False, 0.0, 0.0, reset)
        if found is not None:
            output, (h_n, *rest) = found
            return output, h_n, rest[0] if rest else None
    output, ((h_n, c_n),) = _layer(name, cell, input, [direction], Rows(lengths, reset=reset))
    return output, h_n, c_n


def step(cell: str, input: Tensor, state: States | None, weights: Sequence[Tensor | None]) -> States:
    """The new state, (h,) or (h, c), each (B, H), from input (B, I) and a state, by default zero; by torch's operator
    where that costs less."""
    if _torch_step_is_faster(cell, input, weights[1]):
        return _torch.step(cell, input, state, weights[:4])
    h_0, c_0 = (*(state or ()), None, None)[:2]
    _, h, c = layer(cell, cell, input.unsqueeze(0), Direction(h_0, c_0, weights))
    return (h,) if c is None else (h, c)


def layers(
    cell: str,
    input: Tensor,
    state: States | None,
    weights: list[list[Tensor | None]],
    *,
    batch_sizes: Tensor | None = None,
    reset: Tensor | None = None,
    bidirectional: bool = False,
    dropout: float = 0.0,
    recurrent_dropout: float = 0.0,
    zoneout: tuple[float, float] = (0.0, 0.0),
    training: bool = False,
) -> tuple[Tensor, States]:
    """A stack of layers of one cell, as ``seqaccel.nn``'s modules run it.

    Args:
        cell: a name of :data:`CELLS`.
        input: (T, B, I), or packed rows (N, I) with ``batch_sizes``.
        state: (h_0,) or (h_0, c_0), (L * D, B, P) and (L * D, B, H). None: zero.
        weights: of each layer and direction, layers first, a list in the order of ``CellSpec.weights``.
        batch_sizes: of a packed input, as a PackedSequence has them. Default: none.
        reset: (T, B), bool: an episode begins at each True, from a state of zero; not with ``batch_sizes``. Default:
            none.
        bidirectional: D is 2; outputs are concatenated. Default: ``False``.
        dropout: probability of zeroing an output of any layer but the last, in training. Default: 0.
        recurrent_dropout: probability of zeroing an element of ``weight_hh``, in training. Default: 0.
        zoneout: of h and of c: in training the probability that a unit keeps its old value, else its expectation is
            taken. Default: none.
        training: apply dropout, and draw zoneout's masks. Default: ``False``.

    Returns:
        output (T, B, D * P), or (N, D * P), and the last state, laid out as ``state``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`seqaccel.functional.lstm`.
    """
    directions = 2 if bidirectional else 1
    if not training:
        dropout = recurrent_dropout = 0.0
    zoned = zoneout[0] > 0 or zoneout[1] > 0
    node = backends.node(input)
    if node is not None and batch_sizes is None and not zoned:
        h_0, c_0 = (None, None) if state is None else (*state, None)[:2]
        found = node.layers(cell, input, h_0, c_0, weights, directions, False, True, dropout, recurrent_dropout, reset)
        if found is not None:
            return found
    spec, weight_hh = CELLS[cell], weights[0][1]
    widths = (weight_hh.shape[1], weight_hh.shape[0] // spec.gates)  # type: ignore[union-attr]
    projected = spec.projects and weights[0][4] is not None
    plain = not zoned and not recurrent_dropout and reset is None
    if plain and torch_runs_all_layers(cell, input, batch_sizes, widths[1], projected):
        return _torch.all_layers(cell, input, batch_sizes, state, weights, directions, dropout, training)
    if reset is not None and batch_sizes is not None:
        raise ValueError(f"{cell}: expected reset to be None for a packed input")
    rows = Rows(reset=reset) if batch_sizes is None else Rows(_packed.lengths_of(batch_sizes), batch_sizes)
    padded = batch_sizes is not None and (input.device.type != "cpu" or _onnx.exporting())  # once for all layers
    if padded:
        input, rows = _packed.pad(input, batch_sizes, rows.lengths), Rows(rows.lengths)  # type: ignore[arg-type]
    last: list[tuple[Tensor, Tensor | None]] = []
    for first in range(0, len(weights), directions):
        if first and dropout > 0:
            input = torch.nn.functional.dropout(input, dropout)
        given = []
        for index in range(first, first + directions):
            own = list(weights[index])
            if recurrent_dropout > 0:
                own[1] = torch.nn.functional.dropout(own[1], recurrent_dropout)  # type: ignore[arg-type]
            h_0, c_0 = (None, None) if state is None else (*(part[index] for part in state), None)[:2]
            masks = [_zoneout(rate, input, width, training) for rate, width in zip(zoneout, widths, strict=True)]
            given.append(Direction(h_0, c_0, own, index > first, *masks))
        input, found = _layer(cell, cell, input, given, rows)
        last += found
    if padded:
        input = _packed.pack(input, batch_sizes, rows.lengths)  # type: ignore[arg-type]
    return input, tuple(torch.stack(parts) for parts in zip(*last, strict=True) if parts[0] is not None)


def _zoneout(rate: float, input: Tensor, width: int, training: bool) -> Zoneout:
    """A mask for a training step, the expectation in eval."""
    if not rate or not training:
        return rate
    return torch.empty(*input.shape[:-1], width, device=input.device, dtype=input.dtype).bernoulli_(rate)
