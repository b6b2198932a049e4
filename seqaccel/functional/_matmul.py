"""Matrix products by torch's library or by our C++ kernels, whichever is faster on a CPU's cores.

Ours are of float32 and float64; torch multiplies narrower types.
"""

import torch
from torch import Tensor

from seqaccel import _common
from seqaccel.functional._registration import Operator, call, register

_OURS = (torch.float32, torch.float64)


def mm(a: Tensor, b: Tensor, backend: str) -> Tensor:
    """a @ b."""
    if backend == "cpp" and a.dtype in _OURS:
        return torch.ops.seqaccel.fastest_mm.default(a, b)
    return torch.mm(a, b)


def add_mm_(out: Tensor, a: Tensor, b: Tensor, backend: str) -> Tensor:
    """out += a @ b."""
    if backend != "cpp" or a.dtype not in _OURS or _common.is_batched(a):
        return out.addmm_(a, b)
    torch.ops.seqaccel.add_fastest_mm_.default(out, a, b)
    return out


def _fastest_mm_fake(input, mat2):
    return input.new_empty(input.shape[0], mat2.shape[1])


def _add_fastest_mm_fake(out, input, mat2):
    return None


class _Product(torch.autograd.Function):
    """``fastest_mm``, whose gradients are such products. The one of the right factor is made transposed (as in
    ``_SRULayer``)."""

    @staticmethod
    def forward(ctx, input, mat2):
        ctx.save_for_backward(input, mat2)
        return call(mm, input, mat2, "cpp")

    @staticmethod
    def backward(ctx, grad):
        input, mat2 = ctx.saved_tensors
        grad_input = mm(grad, mat2.t(), "cpp") if ctx.needs_input_grad[0] else None
        return grad_input, mm(grad.t(), input, "cpp").t() if ctx.needs_input_grad[1] else None


def _mm_flops(input, mat2) -> int:
    return 2 * input[0] * input[1] * mat2[1]


def _add_mm_definition(out, input, mat2) -> None:
    out.add_(torch.mm(input, mat2))


for _name in ("fastest_mm", "mm"):
    register(
        Operator(
            _name, _fastest_mm_fake, _mm_flops, definition=torch.mm, recorded=_Product.apply, batch={"input": 0, 0: 0}
        )
    )
register(
    Operator(
        "add_fastest_mm_",
        _add_fastest_mm_fake,
        lambda out, *factors: _mm_flops(*factors),
        definition=_add_mm_definition,
        batch={"out": 0, "input": 0},
        mutates=True,
    )
)
