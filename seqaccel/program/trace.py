"""The layers of a module that a user wrote, by ``torch.export`` of its step."""

from __future__ import annotations

import contextlib
import operator
import pathlib
import re
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from seqaccel.functional.rnn import CELLS
from seqaccel.nn.streaming import Streaming
from seqaccel.program._describe import describe
from seqaccel.program._layers import Program
from seqaccel.program._operators import MOVEMENT, OPERATORS, Place, moved
from seqaccel.program._places import STREAMS, Places, Unsupported

#: Recurrent layers and cells of ATen: the cell's name.
_LAYERS = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "rnn_tanh", "rnn_relu": "rnn_relu"}
_CELLS = {f"{name}_cell": cell for name, cell in _LAYERS.items()}
_IGNORED = {"_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size"}

_LIBRARY = torch.library.Library("seqaccel_session", "DEF")
_LIBRARY.define("layer(Tensor x, Tensor state, int number, int features) -> (Tensor, Tensor)")


@torch.library.register_fake("seqaccel_session::layer", lib=_LIBRARY)
def _(x: Tensor, state: Tensor, number: int, features: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], features, dtype=torch.float32), torch.empty_like(state)


class _Kept(NamedTuple):
    """Values of the state that a layer keeps by itself, and what the step must return in their place."""

    state: int
    start: int
    after: Tensor  # (B, n)
    layer: str


def traced(module: nn.Module, program: Program, name: str) -> None:
    """Appends the layers of a module's step; ``name`` begins the names of its states."""
    _Trace(module, program, name).run()


def _known(module: nn.Module) -> bool:
    """Whether it is a layer of seqaccel that streams."""
    return isinstance(module, Streaming) and describe.dispatch(type(module)) is not describe.dispatch(object)


def _seen(method: Any) -> Any:
    """The same method under the name ``forward``: torch.export records lines of functions of that name only."""
    if not isinstance(method, types.MethodType) or not isinstance(method.__func__, types.FunctionType):
        return method
    function = method.__func__
    code = function.__code__.replace(co_name="forward")
    made = types.FunctionType(code, function.__globals__, "forward", function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(made, method.__self__)


class _Step(nn.Module):
    """What is exported: a step's output, and the state after it."""

    def __init__(self, module: nn.Module, stateful: bool) -> None:
        super().__init__()
        self.module = module
        self.stateful = stateful

    def forward(self, x: Tensor, state: Any) -> Any:
        module: Any = self.module
        call = _seen(module.step) if hasattr(module, "step") else module
        made = call(x, state) if self.stateful else call(x)
        title = type(module).__name__
        if self.stateful and not (isinstance(made, (tuple, list)) and len(made) == 2):
            raise TypeError(f"module: the step of {title} has to return the output and the state")
        y, state = made if self.stateful else (made, ())
        if not isinstance(y, Tensor):
            raise TypeError(f"module: a Session runs a step with one tensor as output, but {title} gives {type(y)}")
        return y, state


class _Trace:
    def __init__(self, module: nn.Module, program: Program, name: str) -> None:
        self.module, self.program, self.name = module, program, name
        self.places = Places(program, name)
        self.kept: list[_Kept] = []
        self.axes: list[int] = []  # of the batch, in each state
        self.indices = False  # the input is an index
        self.leaves = [(path, part) for path, part in module.named_modules() if part is not module and _known(part)]

    # ---- export ----

    def run(self) -> None:
        module, program = self.module, self.program
        begins = not program.layers
        title = type(module).__name__
        if begins:
            example, init_state = program.example, program.init_state
        else:
            example, init_state = torch.zeros(STREAMS, *(program.output_shape or (program.width(program.last),))), None
        if example is None:
            raise TypeError(
                "module: expected a recurrent layer or cell of seqaccel.nn or torch.nn, a causal convolution, "
                "hierarchical attention or an encoder with it, or a Sequential of them and of Linear, Embedding, "
                f"LayerNorm, RMSNorm, BatchNorm1d, Softmax and activations, but got {title}. "
                "A module of another class needs an example of its input: Session(module, example=x_t)"
            )
        if not (isinstance(example, Tensor) and example.dim() > 0 and len(example)):
            raise ValueError("example: expected the input of a step, a tensor (B, ...) of at least one stream")
        if example.dtype not in (torch.float32, torch.int64) or example.device.type != "cpu":
            raise ValueError(
                f"example: expected float32 or int64 on the CPU, but got {example.dtype} on {example.device}"
            )
        init_state = init_state or getattr(module, "init_state", None)
        self.indices = example.dtype == torch.int64
        if init_state is None and hasattr(module, "step"):
            raise TypeError(f"module: {title} has a step, and no init_state(batch_size): Session(..., init_state=...)")
        x = example[:1].detach().expand(STREAMS, *example.shape[1:]).clone()
        if begins:
            program.input_shape = tuple(example.shape[1:])
        flags = program.batch_first, program.channels_first
        with self._prepared():
            states = self._states(init_state) if init_state else []
            exported = self._exported(x, init_state(STREAMS) if init_state else (), init_state is not None)
        source = program.last
        self._walk(exported, self.places.output(source, *x.shape[1:]), states)
        program.batch_first, program.channels_first = flags if not begins else (False, False)

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """Layers of seqaccel are one operator in the graph, with one tensor as their state; all are in eval mode."""
        training = [part for part in self.module.modules() if part.training]
        saved = [(part, part.__dict__.copy()) for _, part in self.leaves]
        try:
            for part in training:
                part.training = False
            for number, (_, part) in enumerate(self.leaves):
                part.__dict__["init_state"] = lambda batch_size, **_: torch.zeros(batch_size, 1)
                part.__dict__["step"] = self._stand_in(number)
            yield
        finally:
            for part, attributes in saved:
                for key in ("init_state", "step"):
                    part.__dict__.pop(key, None)
                    if key in attributes:
                        part.__dict__[key] = attributes[key]
            for part in training:
                part.training = True

    def _stand_in(self, number: int) -> Callable[..., Any]:
        def step(x_t: Tensor, state: Any) -> tuple[Tensor, Tensor]:
            path, part = self.leaves[number]
            if not isinstance(state, Tensor):
                raise TypeError(f"module: the state of {path!r} has to come from its init_state")
            scratch = Program(self.program.memory_length, self.program.max_length)
            describe(part, scratch, "")
            if scratch.phases > 1:
                raise TypeError(f"module: {path!r} gives several outputs per step")
            features = scratch.layers[-1].outputs
            return torch.ops.seqaccel_session.layer(x_t, state, number, features)

        return step

    def _states(self, init_state: Callable[[int], Any]) -> list[Tensor | None]:
        """The state of the step before, as addresses; None stands for what is no tensor."""
        two, more = (pytree.tree_flatten_with_path(init_state(batch))[0] for batch in (STREAMS, STREAMS + 1))
        found: list[Tensor | None] = []
        for (path, small), (_, large) in zip(two, more, strict=True):
            name = "state" + "".join(f".{getattr(key, 'idx', getattr(key, 'key', key))}" for key in path)
            if not isinstance(small, Tensor):
                found.append(None)
                continue
            differ = [i for i, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
            if len(differ) != 1 or small.shape[differ[0]] != STREAMS or small.dtype != torch.float32:
                raise ValueError(f"module: expected init_state to give float32 with one dimension of the batch: {name}")
            if small.any():
                raise ValueError(f"module: a Session runs modules whose state begins with zeros, but {name} does not")
            axis = differ[0]
            shape = (*small.shape[:axis], *small.shape[axis + 1 :])
            found.append(self.places.state(name, tuple(shape)).movedim(0, axis))
            self.axes.append(axis)
        return found

    def _exported(self, x: Tensor, state: Any, stateful: bool) -> Any:
        step = _Step(self.module, stateful)
        title = type(self.module).__name__
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*were assigned during export.*")
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*", category=FutureWarning)
            try:
                exported = torch.export.export(step, (x, state), strict=False).run_decompositions({})
            except Exception as error:
                raise TypeError(f"module: torch.export cannot trace the step of {title}: {error}") from error
        before, after = pytree.tree_flatten(state)[1], exported.call_spec.out_spec.child(1)
        if stateful and after != before:
            raise TypeError(f"module: the step of {title} returns a state of another structure: {after}, {before}")
        return exported

    # ---- the graph ----

    def _walk(self, exported: Any, x: Tensor, states: list[Tensor | None]) -> None:
        exported.graph.eliminate_dead_code()
        self._embedding_first(exported.graph)
        signature = exported.graph_signature
        values: dict[str, Any] = {}
        given = iter([Place(x), *[None if state is None else Place(state) for state in states]])
        kinds = {spec.arg.name: spec for spec in signature.input_specs}
        constants = {**dict(exported.state_dict), **exported.constants}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                kind = kinds[node.name]
                values[node.name] = (
                    next(given) if kind.kind == InputKind.USER_INPUT else constants[kind.target].detach()
                )
            elif node.op == "call_function":
                values[node.name] = self._called(node, values)
            elif node.op == "output":
                self._finish(node, signature, values, states)
            else:
                raise TypeError(f"module: a Session does not run {node.op} {node.target}{_where(node)}")

    @staticmethod
    def _embedding_first(graph: Any) -> None:
        last = [node for node in graph.nodes if node.op == "placeholder"][-1]
        for node in list(graph.nodes):
            embeds = getattr(node.target, "__name__", "").startswith("embedding.")
            if embeds and all(given.op == "placeholder" for given in node.all_input_nodes):
                last.append(node)

    def _called(self, node: Any, values: dict[str, Any]) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
        if node.target is operator.getitem:
            return args[0][args[1]]
        flat = pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, Place))
        namespace, name = node.target.namespace, node.target._schema.name.partition("::")[2]
        if name in _IGNORED:
            return None
        try:
            if not any(isinstance(value, Place) for value in flat):
                return node.target(*args, **kwargs)
            if namespace == "seqaccel_session":
                return self._layer(*args)
            if namespace == "seqaccel" and name == "rnn_forward":
                return self._operator_of_layer(node, args, kwargs)
            if namespace == "aten" and name in MOVEMENT:
                return moved(self.places, node.target, args, kwargs)
            if namespace == "aten" and name in _LAYERS:
                return self._recurrent(_LAYERS[name], node, *args)
            if namespace == "aten" and name in _CELLS:
                return self._cell(_CELLS[name], node, *args)
            if namespace == "aten" and name.endswith("_like"):
                zeros = torch.zeros(args[0].index.shape)
                return node.target(zeros, *args[1:], **kwargs)
            if namespace == "aten" and name.startswith("new_"):
                return node.target(torch.zeros(()), *args[1:], **kwargs)
            if namespace == "aten" and name in OPERATORS:
                return OPERATORS[name](self.places, _alone(node), *args, **_options(kwargs))
        except Unsupported as error:
            raise TypeError(f"module: a Session does not run this {namespace}.{name}{_where(node)}: {error}") from error
        raise TypeError(
            f"module: a Session does not run {namespace}.{name}{_where(node)}. "
            "It runs layers of seqaccel by their step, and of ATen "
            f"{', '.join(sorted([*_LAYERS, *_CELLS, *OPERATORS, *MOVEMENT]))}"
        )

    @staticmethod
    def _path(node: Any) -> str:
        """The path, with a dot behind it, of the module that calls an operator."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = re.sub(r"^module\.?", "", stack[-1][0]) if stack else ""
        return path + "." * bool(path)

    # ---- layers with a state ----

    def _own(self, state: Tensor, after: Tensor, layer: str) -> None:
        """``state`` (B, n) is what a layer keeps by itself; ``after`` is what it is after the step."""
        found = self.places.state_at(state)
        if found is None:
            raise Unsupported("the state has to be what the step before has returned, as it is")
        if any(kept.state == found[0] and kept.start == found[1] for kept in self.kept):
            raise Unsupported("two layers have the same state")
        self.kept.append(_Kept(*found, after, layer))

    def _layer(self, x: Place, state: Place, number: int, features: int) -> list[Place]:
        """A layer of seqaccel."""
        path, part = self.leaves[number]
        program = self.program
        if program.layers or not self.indices:
            source = self.places.in_order(x.index)
            if source != program.last:
                width = program.width(source)
                move = (program.back(source), 0, 0, width)
                program.add("gather", program.width(-1), width, source=program.back(-1), moves=[move])
        describe(part, program, f"{self.name}{path}.")
        after = self.places.hidden(program.last, 1)
        self._own(state.index, after, path)
        return [Place(self.places.output(program.last, features)), Place(after)]

    def _one(
        self, cell: str, path: str, x: Tensor, h: Tensor, c: Tensor | None, weights: list[Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer of a product cell for x (B, I), h (B, P) and c (B, H): the output, h and c."""
        program = self.program
        hidden = weights[0].shape[0] // CELLS[cell].gates
        outputs = h.shape[-1]
        source = self.places.in_order(x)
        program.keep(f"{self.name}{path}h", "h", outputs)
        if c is not None:
            program.keep(f"{self.name}{path}c", "c", hidden)
        layer = program.add(cell, x.shape[-1], outputs, *weights, source=program.back(source), hidden=hidden)
        y = self.places.output(layer, outputs)
        self._own(h, y, path or cell)
        if c is None:
            return y, y, None
        after = self.places.hidden(layer, hidden)
        self._own(c, after, path or cell)
        return y, y, after

    def _cell(
        self, cell: str, node: Any, x: Place, state: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None
    ) -> Any:
        h, c = state if cell == "lstm" else (state, None)
        weights = [w_ih, w_hh, b_ih, b_hh, *[None] * (cell == "lstm")]
        _, h_n, c_n = self._one(cell, self._path(node), x.index, _index(h), None if c is None else _index(c), weights)
        return [Place(h_n), Place(c_n)] if c_n is not None else Place(h_n)

    def _recurrent(
        self, cell: str, node: Any, x: Place, state: Any, weights: Any, biased: bool, layers: int, dropout: float,
        training: bool, bidirectional: bool, batch_first: bool = False,
    ) -> Any:  # fmt: skip
        if bidirectional:
            raise Unsupported("it is bidirectional")
        time = int(batch_first)
        if x.index.dim() != 3 or x.index.shape[time] != 1:
            raise Unsupported("expected an input of one step: (1, B, I), or (B, 1, I) with batch_first")
        h, c = state if cell == "lstm" else (state, None)
        y, path = x.index.select(time, 0), self._path(node)
        each = len(weights) // layers
        states: list[list[Tensor]] = [[], []]
        for i in range(layers):
            own = list(weights[i * each : (i + 1) * each])
            projection = [own.pop()] if cell == "lstm" and each in (3, 5) else [None] * (cell == "lstm")
            own = [*own, *[None] * (4 - len(own)), *projection]
            y, h_n, c_n = self._one(cell, path, y, _index(h)[i], None if c is None else _index(c)[i], own)
            states[0].append(h_n)
            if c_n is not None:
                states[1].append(c_n)
        return [Place(y.unsqueeze(time)), *[Place(torch.stack(part)) for part in states if part]]

    def _operator_of_layer(self, node: Any, args: Any, kwargs: Any) -> Any:
        """``rnn_forward``, which a layer of seqaccel calls where its ``forward`` runs."""
        names = [argument.name for argument in node.target._schema.arguments]
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        cell, x, h_0, c_0, weights = (given.pop(key) for key in names[:5])
        if any(value is not None and value is not False for value in given.values()) or x.index.shape[0] != 1:
            raise Unsupported("expected one step, forwards, with neither lengths nor masks: use the layer's step")
        c = None if c_0 is None else _index(c_0)
        y, h_n, c_n = self._one(cell, self._path(node), x.index[0], _index(h_0), c, list(weights))
        return [Place(y.unsqueeze(0)), Place(h_n), None if c_n is None else Place(c_n), None]

    # ---- the end ----

    def _finish(self, node: Any, signature: Any, values: dict[str, Any], states: list[Tensor | None]) -> None:
        program, places = self.program, self.places
        results = node.args[0]
        for spec in signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise TypeError(f"module: a step changes {spec.target}: what changes has to be part of the state")
        found: list[Any] = [values[result.name] if hasattr(result, "name") else result for result in results]
        y, *after = found
        try:
            y = _index(y) if isinstance(y, Place) else places.constant(y)
            result = places.in_order(y)
            self._keep([a for s, a in zip(states, after, strict=True) if s is not None])
        except Unsupported as error:
            raise TypeError(f"module: a Session does not run {type(self.module).__name__}: {error}") from error
        if result != program.last or not program.layers:
            width = program.width(result)
            move = (program.back(result), 0, 0, width)
            program.add("gather", program.width(-1), width, source=program.back(-1), moves=[move])
        program.output_shape = tuple(y.shape[1:])

    def _keep(self, after: list[Any]) -> None:
        """Adds what writes the states that are read as tensors, and checks those that layers keep by themselves."""
        places, program = self.places, self.program
        rows = []
        for number, value in enumerate(after):
            if not isinstance(value, (Place, Tensor)):
                raise Unsupported(f"{places.states[number][0]} is no tensor after the step")
            index = value.index if isinstance(value, Place) else places.constant(value)
            rows.append(index.movedim(self.axes[number], 0))
        for kept in self.kept:
            own = rows[kept.state].flatten(1)[:, kept.start : kept.start + kept.after.shape[-1]]
            if not torch.equal(own, kept.after):
                raise Unsupported(f"the step has to return the state of {kept.layer} as it is")
        written: dict[int, int] = {}
        while set(places.pasts) - set(written):  # what is written may read another state
            for number in set(places.pasts) - set(written):
                written[number] = places.in_order(rows[number])
        for number, layer in written.items():
            width = program.width(layer)
            past = program.back(places.pasts[number])
            program.add("keep", width, width, source=program.back(layer), skip=past)


def _index(value: Any) -> Tensor:
    if not isinstance(value, Place):
        raise Unsupported("the state of a recurrent layer has to come from the step before")
    return value.index


def _options(kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if key not in ("layout", "device", "memory_format")}


def _alone(node: Any) -> bool:
    """Whether nothing but this node reads what its input's layer computes."""
    before = node.args[0]
    while len(before.users) == 1 and before.op == "call_function" and getattr(before.target, "_schema", None):
        if before.target._schema.name.partition("::")[2] not in MOVEMENT:
            return True
        before = before.args[0]
        if not isinstance(before, torch.fx.Node):
            return False
    return False


def _where(node: Any) -> str:
    """The line of the user's code that called an operator."""
    found = re.findall(r'File "([^"]+)", line (\d+), in .+\n\s*(.*)', node.meta.get("stack_trace") or "")
    torch_folder = str(pathlib.Path(torch.__file__).parent)
    own = [line for line in found if not line[0].startswith((torch_folder, str(pathlib.Path(__file__).parent)))]
    if not own:
        return ""
    file, line, text = own[-1]
    return f" (node {node.name}, {file}:{line}: {text.strip()})"
