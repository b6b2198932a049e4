"""What the launchers launch: the table that the tests compile offline.

Rows have lengths and what training saves, which take the most registers. The kernels of one step do not depend on the
dtype but for their loads; those of all steps are listed at the sizes that take the most registers and shared memory.
"""

import dataclasses
from typing import Any

from seqaccel.kernels._launch import Configuration
from seqaccel.kernels.rnn import around, forward, persistent, step, tiles
from seqaccel.kernels.rnn.cells import CELLS

_FLOAT32 = ("p_h", "p_c", "p_cells", "p_carried", "p_dh", "p_dc", "p_grad_norm", "p_dgamma")
_INTEGERS = (
    "t",
    "earlier",
    "later",
    "following",
    "T",
    "B",
    "H",
    "P",
    "N",
    "W",
    "ROWS",
    "b_first",
    "zoneout_h_stride",
    "zoneout_c_stride",
)


def _configuration(
    kernel: Any,
    kind: str,
    constants: dict[str, Any],
    absent: tuple[str, ...],
    num_warps: int,
    num_stages: int = 3,
    aligned: bool = True,
) -> Configuration:
    """Names in ``constants`` and ``absent`` that the kernel does not have are ignored."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants |= {name: None for name in absent if name in kernel.arg_names}
    types = {
        **dict.fromkeys(_FLOAT32, "*fp32"),
        **dict.fromkeys(_INTEGERS, "i32"),
        "p_lengths": "*i64",
        "p_begins": "*i8",
        "p_arrived": "*i32",
    }
    signature = {name: types.get(name, f"*{kind}") for name in kernel.arg_names if name not in constants}
    return Configuration(kernel, signature, constants, num_warps, num_stages, ("H", "P", "W") if aligned else ())


def _cell(name: str, zoneout: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Constexprs of a cell's kernels, and the pointers that it does not have."""
    spec = CELLS[name]
    constants = {
        "FORWARD": spec.forward, "BACKWARD": spec.backward, "GATES": spec.gates, "FIRST": spec.first,
        "SAVED": spec.saved, "VECTORS": spec.vectors, "HAS_C": spec.has_c, "CONSTANT_C": spec.constant_c,
        "USES_OUTPUT": spec.uses_output, "USES_H": spec.uses_h, "PROJECTED": False,
    }  # fmt: skip
    has = {
        "p_zoneout_h": zoneout,
        "p_zoneout_c": zoneout and spec.has_c,
        "p_carried": spec.has_c and (zoneout or spec.carries),
        "p_bias": spec.separate,
        "p_grad_r": spec.separate,
        "p_vectors": spec.vectors > 0,
        "p_gates": spec.saved > 0,
        **dict.fromkeys(("p_gamma", "p_products", "p_grad_products"), spec.norm),
        **dict.fromkeys(("p_c", "p_cells", "p_c_0", "p_dc"), spec.has_c),
        "p_grad_norm": spec.norm and spec.has_c,
    }
    return constants, tuple(name for name, there in has.items() if not there)


_SPREAD = ("p_exchange", "p_arrived")


def _one_step() -> list[Configuration]:
    rows = []
    for name, spec in CELLS.items():
        if name == "multiplicative_lstm":
            continue  # it runs the kernels of lstm
        constants, absent = _cell(name, zoneout=spec.saved > 0)
        options = forward.point_options(spec, 2048)
        for kernel in (step.forward_kernel, step.backward_kernel):
            constants["BLOCK"] = options["BLOCK"]
            rows.append(_configuration(kernel, "bf16", constants, absent, options["num_warps"]))
    constants = {"BLOCK": forward.POINTS}
    for kernel in (
        step.project_forward_kernel,
        step.project_backward_kernel,
        around.reset_forward_kernel,
        around.reset_backward_kernel,
        around.multiply_forward_kernel,
        around.multiply_backward_kernel,
    ):
        rows.append(_configuration(kernel, "bf16", constants, (), 4))
    for kernel in (around.rows_forward_kernel, around.rows_backward_kernel):
        rows.append(_configuration(kernel, "bf16", {"BLOCK": 8192}, (), forward.norm_warps(8192)))
    return rows


def _one_program() -> list[Configuration]:
    rows = []
    for name, kind, block in (
        ("rnn_tanh", "bf16", 64),
        ("rnn_tanh", "bf16", 128),
        ("rnn_tanh", "fp32", 64),
        ("gru", "bf16", 64),
        ("gru", "bf16", 128),
        ("gru", "fp32", 64),
        ("lstm", "bf16", 64),
        ("lstm", "bf16", 128),
        ("lstm", "fp32", 32),
        ("peephole_lstm", "bf16", 128),
        ("peephole_lstm", "fp32", 32),
    ):
        constants, absent = _cell(name, zoneout=False)
        constants |= {"REVERSE": False, "PRECISION": "tf32" if kind == "fp32" else "ieee"}
        kernels = (persistent.persistent_forward_kernel, persistent.persistent_backward_kernel)
        item = 4 if kind == "fp32" else 2
        warps = tiles.PERSISTENT_WARPS[item, block, CELLS[name].gates]
        memory = next(size << 10 for size in (99, 163) if tiles.one_program(CELLS[name].gates, block, item, size << 10))
        tried = set()
        for arch in (80, 90):
            stages = tiles.stages(CELLS[name].gates, block, arch)
            for kernel, num_warps, steps in zip(kernels, warps, stages, strict=True):
                if (kernel, steps) not in tried:
                    tried.add((kernel, steps))
                    constants |= tiles.Tiles(tiles.BLOCK_B, block, block, num_warps, steps).constants()
                    # Above 64 the number of units is a multiple of 16. Others take more registers.
                    row = _configuration(kernel, kind, constants, (*absent, *_SPREAD), num_warps, 1, aligned=block > 64)
                    rows.append(dataclasses.replace(row, least_arch=arch, least_shared=memory, spills=64))
    return rows


def _cooperative() -> list[Configuration]:
    rows = []
    for name, kind, item, hidden, batch in (
        ("lstm", "bf16", 2, 512, 16),
        ("lstm", "bf16", 2, 512, 128),
        ("peephole_lstm", "bf16", 2, 512, 256),
        ("lstm", "bf16", 2, 1024, 16),
        ("lstm", "bf16", 2, 1024, 128),
        ("lstm", "fp32", 4, 512, 16),
        ("lstm", "fp32", 4, 512, 256),
        ("gru", "bf16", 2, 1024, 128),
        ("rnn_tanh", "bf16", 2, 1024, 128),
    ):
        constants, absent = _cell(name, zoneout=False)
        constants |= {"REVERSE": False, "PRECISION": "tf32" if kind == "fp32" else "ieee"}
        both = tiles.cooperative(CELLS[name].gates, hidden, batch, item, 227 << 10, 132)
        for kernel, one in zip(
            (persistent.persistent_forward_kernel, persistent.persistent_backward_kernel), both, strict=True
        ):
            row = _configuration(kernel, kind, constants | one.constants(), absent, one.warps, 1)
            row = dataclasses.replace(row, least_arch=90, least_shared=227 << 10, spills=832)  # Triton 3.9: 424
            rows.append(row)
    return rows


CONFIGURATIONS = [*_one_step(), *_one_program(), *_cooperative()]
