"""DTensors: the operators refuse them, and modules take them through local_map, on shards along the batch."""

import pytest
import torch
import torch.distributed as dist
from test_export import CASES
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.experimental import local_map
from torch.utils._pytree import tree_leaves

each_module = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def problem(name, mesh):
    """A module, its inputs, what it returns first, and the same module and inputs as DTensors."""
    case = CASES[name]
    module, shared = case.make().eval(), case.make().eval()
    shared.load_state_dict(module.state_dict())
    inputs = case.arguments(4, 7)
    shards = [Shard(text.index("B")) for text in case.inputs]
    distributed = [distribute_tensor(x, mesh, [shard]) for x, shard in zip(inputs, shards, strict=True)]
    return module, inputs, distribute_module(shared, mesh), distributed, shards


@each_module
def test_modules_run_on_local_shards(name, mesh):
    module, inputs, shared, distributed, shards = problem(name, mesh)
    names = [key for key, _ in module.named_parameters()]

    def run(*tensors):
        weights = dict(zip(names, tensors[len(shards) :], strict=True))
        return tree_leaves(torch.func.functional_call(shared, weights, tensors[: len(shards)]))[0]

    mapped = local_map(
        run,
        out_placements=[shards[0]],
        in_placements=(*([shard] for shard in shards), *([Replicate()] for _ in names)),
        in_grad_placements=(*([shard] for shard in shards), *([Partial()] for _ in names)),
        device_mesh=mesh,
    )
    found, expected = mapped(*distributed, *shared.parameters()), tree_leaves(module(*inputs))[0]
    torch.testing.assert_close(found.full_tensor(), expected)
    if names:
        found.sum().backward()
        expected.sum().backward()
    for ours, plain in zip(shared.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor() if plain.grad is not None else ours.grad, plain.grad)


@each_module
def test_operators_refuse_dtensors(name, mesh):
    _, _, shared, distributed, _ = problem(name, mesh)
    with pytest.raises(NotImplementedError, match="sharding strategy"):
        shared(*distributed)
