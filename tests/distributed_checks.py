"""What test_distributed.py checks, run in two processes.

``python distributed_checks.py RANK STORE`` prints a JSON object: what went wrong, by the name of the check.
"""

import datetime
import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from test_export import CASES, Case
from test_operators import ARGUMENTS, rnn_backward_arguments
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map_only

import seqaccel.functional as SF
from seqaccel import nn
from seqaccel.functional import _registration

PROCESSES = 2
#: Modules whose parameters are stacked, or arranged anew, by torch's operators.
REARRANGED = (
    *("TCN", "TemporalBlock", "CausalConvTranspose1d", "WaveNet", "WaveNetLayer", "MinGRU", "AttentionLSTMDecoder"),
    "GNMT",
    *("CfC", "CfCCell"),
)
#: Torch's linear layers, in these modules' projections, take no batch that the processes cannot share evenly.
FLAT = (*nn.attention.__all__, "SRUpp", "PervasiveAttention", "NeuralGPU", "GatedConvLM", "EchoStateNetwork")
BATCHES = {name: (4,) if name in FLAT else (4, 5) for name in CASES}
Results = list[torch.Tensor]


def trained(module: torch.nn.Module, *inputs: Any) -> Results:
    """The results of a module, and the gradients of its parameters by a loss of them all."""
    results = [t for t in tree_leaves(module(*inputs)) if isinstance(t, torch.Tensor)]
    if any(p.requires_grad for p in module.parameters()):
        sum(t.square().mean() for t in results).backward()
    return results + [p.grad for p in module.parameters() if p.grad is not None]


def whole(tensors: Results) -> Results:
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def pair(make: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A module, and a copy of it."""
    torch.manual_seed(0)
    module, copy = make(), make()
    copy.load_state_dict(module.state_dict())
    return module, copy


def sharded(t: torch.Tensor, mesh: DeviceMesh, d: int) -> DTensor:
    return distribute_tensor(t, mesh, [Shard(d)])


def batch_dims(case: Case) -> list[int]:
    """Of the inputs."""
    return [text.rpartition(":")[2].index("B") for text in case.inputs]


def on_shards(name: str, mesh: DeviceMesh) -> None:
    """A module gives the same results and gradients on a batch in shards."""
    for batch in BATCHES[name]:
        module, copy = pair(lambda: CASES[name].make().eval())
        inputs, dims = CASES[name].arguments(batch, 7), batch_dims(CASES[name])
        expected = trained(module, *inputs)
        distribute_module(copy, mesh)
        found = trained(copy, *(sharded(t, mesh, d) for t, d in zip(inputs, dims, strict=True)))
        assert found[0].placements == (Shard(dims[0]),), found[0].placements
        for gradient in found[len(found) - len(list(copy.parameters())) :] if list(copy.parameters()) else ():
            # By torch, behind weight norm and where parameters are stacked or arranged anew.
            replicated = name in REARRANGED and gradient.placements == (Replicate(),)
            assert replicated or gradient.placements == (Partial(),), gradient.placements
        assert_close(whole(found), expected)


def operator(name: str, mesh: DeviceMesh) -> None:
    """A raw call gives the same results on shards as on whole tensors."""
    # The kept steps of episodes lie in an order of the whole batch: a shard has those of its own forward pass.
    make = functools.partial(rnn_backward_arguments, reset=False) if name == "rnn_backward" else ARGUMENTS[name]
    facts, arguments = _registration.OPERATORS[name], make()
    size = facts.batch_size(facts.named(arguments))

    def distributed(key: str, t: torch.Tensor) -> DTensor:
        d = facts.batch.get(key)
        return distribute_tensor(t, mesh, [Shard(d) if d is not None and t.shape[d] == size else Replicate()])

    given = [
        tree_map_only(torch.Tensor, functools.partial(distributed, key), value)
        for key, value in facts.named(arguments).items()
    ]
    expected, found = facts.overload(*arguments), facts.overload(*given)
    if facts.mutates:
        expected, found = arguments[0], given[0]
    for i, (ours, plain) in enumerate(zip(_registration._tuple(found), _registration._tuple(expected), strict=True)):
        for t, other in zip(tree_leaves(ours), tree_leaves(plain), strict=True):
            assert t.shape == other.shape and t.stride() == other.stride(), (i, t.shape, t.stride(), other.stride())
            split = i in facts.summed or (other.numel() > 0 and i in facts.batch) or facts.mutates
            assert t.placements[0].is_replicate() != split, (i, t.placements)
            assert_close(t.full_tensor(), other)


def data_parallel(name: str, mesh: DeviceMesh) -> None:
    """DistributedDataParallel and FSDP2 average the gradients of the processes' parts of a batch."""
    for wrap in (DistributedDataParallel, fully_shard):
        module, copy = pair(lambda: CASES[name].make().eval())
        inputs, dims = CASES[name].arguments(4, 7), batch_dims(CASES[name])
        expected = trained(module, *inputs)
        mine = [t.chunk(PROCESSES, d)[dist.get_rank()] for t, d in zip(inputs, dims, strict=True)]
        found = whole(trained(wrap(copy), *mine))
        count = len([p for p in module.parameters() if p.grad is not None])
        assert len(found) - count == len(expected) - count > 0
        assert_close(found[len(found) - count :], expected[len(expected) - count :])


def dropout(mesh: DeviceMesh) -> None:
    """The masks are those of one process."""
    module, copy = pair(lambda: nn.TCN(4, [6, 6], 3, dropout=0.5))
    x = torch.randn(5, 4, 20)
    distribute_module(copy, mesh)
    torch.manual_seed(1)
    expected = trained(module, x)
    torch.manual_seed(1)
    assert_close(whole(trained(copy, sharded(x, mesh, 0))), expected)
    rows, found = torch.randn(5, 2, 20, 4), []
    for given in (rows, sharded(rows, mesh, 0)):
        torch.manual_seed(1)
        leaf = given.detach().requires_grad_()
        out = SF.hierarchical_attention(leaf, leaf, leaf, block_size=4, dropout_p=0.5)
        out.square().sum().backward()
        found.append([out, leaf.grad])
    assert_close(whole(found[1]), found[0])


def given_states(mesh: DeviceMesh) -> None:
    """In shards or replicated, with a projection and two directions."""
    module, copy = pair(lambda: nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3))
    x, h_0, c_0 = torch.randn(7, 4, 5), torch.randn(4, 4, 3), torch.randn(4, 4, 6)
    expected = trained(module, x, (h_0, c_0))
    distribute_module(copy, mesh)
    for placement in (Shard(1), Replicate()):
        copy.zero_grad()
        state = tuple(distribute_tensor(t, mesh, [placement]) for t in (h_0, c_0))
        assert_close(whole(trained(copy, sharded(x, mesh, 1), state)), expected)


def lengths_and_zoneout(mesh: DeviceMesh) -> None:
    x, lengths, weights = torch.randn(7, 4, 5), torch.tensor([3, 7, 1, 5]), [torch.randn(18, 5), torch.randn(18, 6)]
    reset = torch.rand(7, 4) < 0.3
    replicated = [distribute_tensor(w, mesh, [Replicate()]) for w in weights]
    expected = SF.gru(x, None, *weights, lengths=lengths, zoneout=0.2, reset=reset)
    options = {"lengths": sharded(lengths, mesh, 0), "reset": sharded(reset, mesh, 1)}
    found = SF.gru(sharded(x, mesh, 1), None, *replicated, zoneout=0.2, **options)
    assert_close(whole(list(found)), list(expected))


def one_step(mesh: DeviceMesh) -> None:
    """Of which torch's operator would run a plain one."""
    module, copy = pair(lambda: nn.LSTMCell(5, 6))
    x = torch.randn(4, 5)
    distribute_module(copy, mesh)
    with torch.no_grad():
        assert_close(whole(list(copy(sharded(x, mesh, 0)))), list(module(x)))


def packed_rows(mesh: DeviceMesh) -> None:
    """Packed sequences, whose rows are not a batch, are replicated."""
    x, sizes = torch.randn(6, 3), torch.tensor([3, 2, 1])
    arguments = ("gru", x, torch.zeros(3, 4), None, [torch.randn(12, 3), torch.randn(12, 4), None, None], sizes)
    given = tree_map_only(torch.Tensor, lambda t: distribute_tensor(t, mesh, [Shard(0)]), list(arguments))
    rest = (None, None, False, False)
    expected, found = (torch.ops.seqaccel.rnn_forward(*a, *rest) for a in (arguments, given))
    assert found[0].placements == (Replicate(),)
    assert_close(whole(tree_leaves(found)), tree_leaves(expected))


def padded_and_packed_attention(mesh: DeviceMesh) -> None:
    module, copy = pair(lambda: nn.HierarchicalAttention(8, 2, batch_first=True, block_size=2, causal=False))
    x, padding = torch.randn(4, 9, 8), torch.arange(9) >= torch.tensor([9, 3, 1, 6])[:, None]
    distribute_module(copy, mesh)
    expected = module(x, x, x, key_padding_mask=padding)[0]
    row = sharded(x, mesh, 0)
    assert_close(whole([copy(row, row, row, key_padding_mask=sharded(padding, mesh, 0))[0]]), [expected])
    q, offsets = torch.randn(1, 2, 9, 4), torch.tensor([0, 4, 9])
    given = distribute_tensor(q, mesh, [Replicate()])
    expected = SF.hierarchical_attention(q, q, q, block_size=2, cu_seqlens=offsets)
    assert_close(whole([SF.hierarchical_attention(*[given] * 3, block_size=2, cu_seqlens=offsets)]), [expected])


def two_dimensions(mesh: DeviceMesh) -> None:
    """Of a mesh; what is sharded otherwise is replicated."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, PROCESSES))
    module, copy = pair(lambda: nn.GRU(5, 6))
    x = torch.randn(7, 4, 5)
    distribute_module(copy, mesh)
    for placements in ([Replicate(), Shard(1)], [Shard(1), Shard(1)], [Shard(1), Shard(2)], [Replicate(), Replicate()]):
        output = copy(distribute_tensor(x, mesh, placements))[0]
        assert output.placements == tuple(p if p == Shard(1) else Replicate() for p in placements)
        assert_close(output.full_tensor(), module(x)[0])


def compiled(mesh: DeviceMesh) -> None:
    module, copy = pair(lambda: nn.LSTM(5, 6))
    x = torch.randn(7, 4, 5)
    distribute_module(copy, mesh)
    found = trained(torch.compile(copy, backend="aot_eager", fullgraph=True), sharded(x, mesh, 1))
    assert_close(whole(found), trained(module, x))


def plain_tensors_are_refused(mesh: DeviceMesh) -> None:
    for call, words in (
        (lambda: nn.LSTM(5, 6)(sharded(torch.randn(7, 4, 5), mesh, 1)), "mixed torch.Tensor and DTensor"),
        (
            lambda: torch.ops.seqaccel.add_fastest_mm_(*(sharded(torch.randn(4, 4), mesh, 1) for _ in range(3))),
            "expected out to be replicated or sharded by rows",
        ),
    ):
        try:
            call()
        except RuntimeError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no error with {words!r}")


CHECKS: dict[str, Callable[[DeviceMesh], None]] = {
    **{f"operator {name}": functools.partial(operator, name) for name in ARGUMENTS},
    **{f"module {name}": functools.partial(on_shards, name) for name in CASES if name != "NoveltyMemory"},
    **{f"data parallel {name}": functools.partial(data_parallel, name) for name in CASES if name != "linear_scan"},
    **{
        function.__name__: function
        for function in (
            dropout,
            given_states,
            lengths_and_zoneout,
            one_step,
            packed_rows,
            padded_and_packed_attention,
            two_dimensions,
            compiled,
            plain_tensors_are_refused,
        )
    },
}


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)  # a process waits in vain for one that failed alone
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=timeout)
    mesh = dist.device_mesh.init_device_mesh("cpu", (PROCESSES,))
    failed = {}
    for name, check in CHECKS.items():
        torch.manual_seed(0)
        try:
            check(mesh)
        except Exception:
            failed[name] = traceback.format_exc()
    dist.destroy_process_group()
    print(json.dumps({"passed": len(CHECKS) - len(failed), "failed": failed}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
