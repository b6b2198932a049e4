"""The instruction sets that the C++ kernels are built for, and those that this processor has."""

import pytest
import torch

from seqaccel import backends

ISAS = ["portable", "avx2", "avx512"]
NARROW_ISAS = [*ISAS, "avx512_bf16"]  # with products of bfloat16


def usable(isa: str) -> bool:
    return NARROW_ISAS.index(isa) <= NARROW_ISAS.index(torch.ops.seqaccel.best_isa())


USABLE_ISAS = list(filter(usable, ISAS))
USABLE_NARROW_ISAS = list(filter(usable, NARROW_ISAS))


def isa_fixture(names: list[str]):
    """A fixture that runs a test under each of the instruction sets; skips those this processor does not have."""

    @pytest.fixture(params=names)
    def isa(request):
        if not usable(request.param):
            pytest.skip(f"this processor has no {request.param}")
        with backends.isa(request.param):
            yield request.param

    return isa
