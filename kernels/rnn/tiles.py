"""Which cells run as one persistent kernel, and with what tiles."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from seqaccel.kernels._launch import precision
from seqaccel.kernels.rnn.cells import Cell

BLOCK_B = 16  # rows of a program that has all units; tl.dot takes no fewer
BLOCK_U = 16  # units of a cooperative program: with four rows of W_hh per unit they fill a tensor core's 64 rows

# Warps of a program that has all units: (bytes per element, block of units, gates) -> (forward, backward). float32 is
# for TF32 only: without tensor cores the dot products spill. Missing combinations spill too, as 64 units of four gates.
PERSISTENT_WARPS = {
    (2, 32, 1): (4, 4),
    (2, 32, 3): (4, 4),
    (2, 32, 4): (4, 4),
    (2, 64, 1): (8, 8),
    (2, 64, 3): (8, 4),
    (2, 64, 4): (4, 4),
    (2, 128, 1): (8, 8),
    (2, 128, 3): (8, 8),
    (2, 128, 4): (8, 8),
    (4, 32, 1): (4, 4),
    (4, 32, 3): (4, 4),
    (4, 32, 4): (4, 4),
    (4, 64, 1): (8, 8),
    (4, 64, 3): (8, 8),
}


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What a pass of a persistent kernel is launched with.

    Args:
        block_b: rows of a program.
        block_u: units of a program.
        block_k: terms of a product's sum that a tile has.
        warps: of a program.
        stages: steps whose operands are in flight.
        groups: programs of a cooperative grid, which share the units; 0: a program has all.
        quarters: 4 where the sum is cut into quarters, each with rows of its own.
        parts: tiles that the sum, or each quarter, is cut into, one after the other.
        rows: rows of a launch; 0: all.
    """

    block_b: int
    block_u: int
    block_k: int
    warps: int
    stages: int = 1
    groups: int = 0
    quarters: int = 1
    parts: int = 1
    rows: int = 0

    def constants(self) -> dict[str, int]:
        return {
            "COOPERATIVE": self.groups > 0, "QUARTERS": self.quarters, "BLOCK_B": self.block_b, "BLOCK_U": self.block_u,
            "BLOCK_K": self.block_k, "PARTS": self.parts, "STAGES": self.stages,
        }  # fmt: skip

    def options(self) -> dict[str, int]:
        options = {"num_warps": self.warps, "num_stages": 1}
        return options | {"launch_cooperative_grid": True} if self.groups > 1 else options

    def launches(self, batch: int, device: torch.device) -> Iterator[tuple[int, tuple[int, int], Tensor | None]]:
        """First row, grid and counters of each launch."""
        rows = self.rows or batch
        for first in range(0, batch, rows):
            blocks = triton.cdiv(min(rows, batch - first), self.block_b)
            arrived = torch.zeros(blocks, 32, dtype=torch.int32, device=device) if self.groups else None
            yield first, (blocks, self.groups or 1), arrived


#: Devices that refused a cooperative launch. A share of a GPU may do so (green contexts, MPS).
refused: set[torch.device] = set()

_REFUSALS = ("too many blocks in cooperative launch", "operation not supported", "operation not permitted")


def refuse(error: RuntimeError, tiles: Tiles, device: torch.device) -> None:
    """Remembers a device that refuses cooperative launches, where cells run step by step; raises any other error."""
    if tiles.groups < 2 or not str(error).endswith(_REFUSALS):
        raise error
    refused.add(device)
    warnings.warn(f"recurrent layers run step by step on {device}: a cooperative launch failed ({error})", stacklevel=2)


def precision_of(dtype: torch.dtype) -> str:
    """torch's own switch for recurrent layers decides; its default is TF32."""
    return precision(dtype, torch.backends.cudnn.rnn)


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may use: 99 KiB on GPUs for graphics, 163 on an A100, 227 on an H100."""
    if device.type != "cuda":
        return 1 << 30  # Triton's interpreter
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


_shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _multiprocessors(device: torch.device) -> int:
    """How many there are. Triton's interpreter counts as one: it runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_multiprocessors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def stages(gates: int, block: int, arch: int) -> tuple[int, int]:
    """Steps in flight, forward and backward: as many as shared memory holds beside the weights of a block of units."""
    if block <= 64 or gates < 4:
        return 3, 3 if block <= 64 or gates == 1 or arch >= 90 else 1
    return (3, 2) if arch >= 90 else (2, 1)


def block_h(hidden: int) -> int:
    return max(32, triton.next_power_of_2(hidden))


def one_program(gates: int, hidden: int, item: int, memory: int) -> tuple[Tiles, Tiles] | None:
    """Forward and backward tiles of a program that has all units; None where they do not fit.

    More than 64 units must be a multiple of 16: other rows are read element by element, which takes too many registers.
    """
    block = block_h(hidden)
    if (item, block, gates) not in PERSISTENT_WARPS or (hidden > 64 and hidden % 16):
        return None
    if block * item > 128 and memory <= 160 << 10:
        return None
    arch = 90 if memory > 224 << 10 else 80  # GPUs with as much shared memory as an H100 get its settings
    both = zip(PERSISTENT_WARPS[item, block, gates], stages(gates, block, arch), strict=True)
    forward, backward = (Tiles(BLOCK_B, block, block, warps, steps) for warps, steps in both)
    return forward, backward


def cooperative(
    gates: int, hidden: int, batch: int, item: int, memory: int, processors: int
) -> tuple[Tiles, Tiles] | None:
    """Forward and backward tiles of a cooperative grid, which shares the units; None where shared memory is short.

    Each multiprocessor has one program, so that all run at the same time; more rows take more launches. A program has
    as few rows as possible: more rows take longer, but less so than another launch. More than four launches are slower
    than one launch per step. Measured on an H100; GPUs without its tensor core instructions and shared memory spill.
    """
    groups = triton.cdiv(hidden, BLOCK_U)
    blocks = processors // groups
    if hidden % 16 or hidden > 1024 or gates > 4 or not blocks or memory <= 224 << 10:
        return None
    both = []
    for terms, quarters, most in ((hidden, 1 if gates > 1 else 4, 64), (gates * hidden, 4, 32)):
        block_k = max(16, triton.next_power_of_2(triton.cdiv(terms, quarters)))
        block_b = 16
        # Only comparisons with the batch: torch.compile then keeps bounds of it, and not its value.
        while block_b < most and block_b * blocks < batch:
            block_b *= 2
        tile = quarters * block_b * block_k * item
        parts = max(1, tile // (64 << 10))
        if block_k % (16 * parts) or 4 * BLOCK_U * block_k * item + tile // parts > memory:
            return None
        warps = 8 if most == 64 and tile >= 32 << 10 else 4
        both.append(
            Tiles(
                block_b, BLOCK_U, block_k // parts, warps, groups=groups, quarters=quarters, parts=parts,
                rows=blocks * block_b,
            )
        )  # fmt: skip
    return (both[0], both[1]) if batch <= 4 * both[1].rows else None


def persistent(
    gates: int, hidden: int, batch: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tiles, Tiles] | None:
    """Forward and backward tiles of a cell's persistent kernels; None where it runs step by step."""
    if dtype == torch.float64 or (dtype == torch.float32 and precision_of(dtype) != "tf32"):
        return None
    memory, processors = _shared_memory(device), _multiprocessors(device)
    found = one_program(gates, hidden, dtype.itemsize, memory)
    if found is None and device not in refused:
        found = cooperative(gates, hidden, batch, dtype.itemsize, memory, processors)
    return found


def tiles_of(spec: Cell, weight_hh: Tensor, batch: int, projected: bool) -> tuple[Tiles, Tiles] | None:
    """Like ``persistent``, for a cell with its weights."""
    if not spec.persistent or projected:
        return None
    return persistent(spec.gates, weight_hh.shape[1], batch, weight_hh.dtype, weight_hh.device)
