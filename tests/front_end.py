"""What Triton's front end says of the kernels, without a GPU, as JSON: problems by rule (``RULES``).

A process of its own, as in ``offline.py``: under ``TRITON_INTERPRET=1`` nothing is compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import re
import sys
from typing import Any

import torch
import triton
from kernel_calls import TABLE
from torch._library.triton import triton_ops_to_kernels
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from seqaccel.kernels import _launch

FAMILIES = ("attention.additive", "attention.block_sparse", "attention.hierarchical", "conv", "rnn", "scan")


def configurations(family: str) -> list[_launch.Configuration]:
    return importlib.import_module(f"seqaccel.kernels.{family}").CONFIGURATIONS


def module_of(configuration: _launch.Configuration, target: GPUTarget) -> str:
    """The kernel in Triton's language of tiles."""
    kernel, names = configuration.kernel, configuration.kernel.arg_names
    signature = {n: "constexpr" if n in configuration.constexprs else configuration.signature[n] for n in names}
    constexprs = {(names.index(n),): value for n, value in configuration.constexprs.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": configuration.num_warps, "num_stages": configuration.num_stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    arguments = (backend.get_codegen_implementation(options), backend.get_module_map(), context)
    return str(source.make_ir(target, options, *arguments))


def inductor() -> list[str]:
    """Inductor passes Python's numbers as float64 and, where it knows no bound, int64: nothing else is of float64."""
    problems, seen = [], set()
    for family in (f for f in FAMILIES if f != "rnn"):
        for row in configurations(family):
            name, shape = row.kernel.__name__, tuple(map(str, row.constexprs.items()))
            if (name, shape) in seen or "*fp64" in row.signature.values():
                continue
            seen.add((name, shape))
            wide = {"i32": "i64", "fp32": "fp64"}
            signature = {argument: wide.get(kind, kind) for argument, kind in row.signature.items()}
            try:
                text = module_of(dataclasses.replace(row, signature=signature), GPUTarget("cuda", 80, 32))
            except triton.CompilationError as error:
                problems.append(f"{name}: {error}")
                continue
            lines = re.findall(r".*\b(?:arith|math)\..*f64.*", text)
            strange = [line for line in lines if "arith.truncf" not in line]
            problems += [f"{name}: {line.strip()}" for line in strange[:1]]
    return problems


def amd() -> list[str]:
    """The kernels of what an AMD GPU may get: no TF32, no program that waits for another."""
    problems, seen = [], set()
    for family in FAMILIES:
        for row in configurations(family):
            if row.constexprs.get("PRECISION") == "tf32" or row.constexprs.get("COOPERATIVE") or row.kernel in seen:
                continue
            seen.add(row.kernel)
            try:
                module_of(row, GPUTarget("hip", "gfx90a", 64))
            except triton.CompilationError as error:
                problems.append(f"{row.kernel.__name__}: {error}")
    return problems


def found() -> list[str]:
    """torch finds the kernels of each ``triton_op``, whose sources are part of its caches' keys."""
    opaque = ("seqaccel::rnn_forward_triton", "seqaccel::rnn_backward_triton")
    return [
        f"{name}: torch finds no kernel in it"
        for name in _launch.OPERATORS
        if name not in opaque and not triton_ops_to_kernels.get(name)
    ]


def specialised() -> list[str]:
    """Over all lengths and batches, a kernel is compiled at most four times for one set of constexprs.

    Triton compiles anew where an integer becomes 1, or divisible by 16.
    """
    keys: dict[Any, set] = collections.defaultdict(set)

    def record(kernel, *arguments, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        constants, key = {}, []
        for parameter in kernel.params:
            value = given.pop(parameter.name)
            if parameter.is_constexpr or value is None:
                constants[parameter.name] = str(value)
            elif isinstance(value, int) and not parameter.do_not_specialize:
                key.append((parameter.name, 1 if value == 1 else 16 if value % 16 == 0 else 0))
        keys[kernel.__name__, str(sorted(constants.items())), str(given)].add(tuple(key))

    triton.runtime.jit.JITFunction.run = record
    for calls in TABLE.values():
        for steps in (1, 2, 16, 17):
            for batch in (1, 2, 16):
                for _, operator, arguments in calls(T=steps, B=batch):
                    operator(*arguments)
    worst = {}
    for (name, *_), found_keys in keys.items():
        if len(found_keys) > len(worst.get(name, ())):
            worst[name] = found_keys
    problems = []
    for name, found_keys in worst.items():
        if len(found_keys) > 4:
            varying = sorted({pair for key in found_keys for pair in key} - set.intersection(*map(set, found_keys)))
            problems.append(f"{name}: {len(found_keys)} times, by {varying}")
    return problems


RULES = (inductor, amd, found, specialised)


if __name__ == "__main__":
    torch.manual_seed(0)
    json.dump({rule.__name__: rule() for rule in RULES}, sys.stdout)
