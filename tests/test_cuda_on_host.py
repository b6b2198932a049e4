"""CUDA kernels run on the CPU: one thread after another, or where they meet at barriers, a block's threads at once.

The source is compiled by the C++ compiler, with a header in the place of CUDA's and launches as loops. So the
arithmetic and the addresses are tested where there is no GPU; what is not tested is nvcc, and how fast it is.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import torch
import torch.utils.cpp_extension
from column_cases import each_cell, problem
from scan_cases import DOUBLE, linear_inputs, needs_cpp, rounded
from tolerances import assert_close

from seqaccel.functional.scan import CELLS
from seqaccel.reference import scan as reference

CSRC = pathlib.Path(__file__).parents[1] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [
    needs_cpp,
    pytest.mark.skipif(COMPILER is None or not CSRC.is_dir(), reason="no compiler, or no sources"),
]

LAUNCH = """
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include "common/tensor.h"
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
using std::max;
using std::min;
typedef void* cudaStream_t;
struct Index {
  unsigned x;
};
inline Index blockIdx, blockDim;
inline thread_local Index threadIdx;
inline std::barrier<>* meeting;
inline void __syncthreads() { meeting->arrive_and_wait(); }

template <class Kernel, class... Arguments>
void launch(unsigned blocks, unsigned threads, Kernel kernel, Arguments... arguments) {
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    if (!kMeet) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
      continue;
    }
    std::barrier all(threads);
    meeting = &all;
    std::vector<std::jthread> team;
    for (unsigned i = 0; i < threads; ++i) {
      team.emplace_back([=] {
        threadIdx.x = i;
        kernel(arguments...);
      });
    }
  }
}

template <typename To, typename From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t x) { return bits<float>(x); }
inline _Float16 __ushort_as_half(uint16_t x) { return bits<_Float16>(x); }
inline uint16_t __half_as_ushort(_Float16 x) { return bits<uint16_t>(x); }
inline float __half2float(_Float16 x) { return float(x); }
inline _Float16 __float2half_rn(float x) { return _Float16(x); }
inline uint16_t __bfloat16_as_ushort(uint16_t x) { return x; }
inline uint16_t __float2bfloat16_rn(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

namespace seqaccel::cuda {
constexpr int kThreads = 256;
inline unsigned grid_size(int64_t blocks) { return unsigned(blocks); }
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }
inline Tensor fresh(const Tensor& like, const Extents& sizes) { return new_tensor(like, sizes); }
inline Tensor fresh_like(const Tensor& t) { return new_like(t); }
}  // namespace seqaccel::cuda
"""


def compiled(name, folder):
    """The operators of csrc/cuda/scan/<name>.cu as those of a CPU."""
    text = (CSRC / f"cuda/scan/{name}.cu").read_text()
    launches = f"constexpr bool kMeet = {str('__syncthreads' in text).lower()};\n{LAUNCH}"
    schemas = re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", (CSRC / f"cpu/scan/{name}.cpp").read_text())
    text = re.sub(r"(\w+<[^<>;]*>)\s*<<<(.*?), (\w+), 0, stream>>>\(", r"launch(\2, \3, \1, ", text, flags=re.S)
    text = re.sub(r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);|const torch::stable::accelerator::DeviceGuard guard.*;", "", text)
    text = text.replace(
        "STABLE_TORCH_LIBRARY_IMPL(seqaccel, CUDA, m)",
        f"STABLE_TORCH_LIBRARY({name}_on_host, m) {{ {' '.join(f'm.def({schema});' for schema in schemas)} }}\n"
        f"STABLE_TORCH_LIBRARY_IMPL({name}_on_host, CPU, m)",
    )
    files = {"source.cpp": text, "cuda/launch.cuh": launches, "cuda_bf16.h": "", "cuda_fp16.h": ""}
    for path, content in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content)
    include = [f"-I{path}" for path in (folder, CSRC, *torch.utils.cpp_extension.include_paths())]
    libraries = [f"-L{path}" for path in torch.utils.cpp_extension.library_paths()] + [
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    abi = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", *abi, *include, "source.cpp", "-o", "library.so"]
    done = subprocess.run([*command, *libraries], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    torch.ops.load_library(folder / "library.so")
    return getattr(torch.ops, f"{name}_on_host")


@pytest.fixture(scope="module")
def columns(tmp_path_factory):
    operators = compiled("columns", tmp_path_factory.mktemp("columns"))
    return operators.column_forward, operators.column_backward


def cast(operands, dtype):
    return {
        k: t.detach().to(dtype) if hasattr(t, "dtype") and t.is_floating_point() else t for k, t in operands.items()
    }


def kinds(cell, sizes, directions):
    """Operands without masks, with all of them, and of packed sequences, one of them empty; of each form of u."""
    steps, batch, hidden = sizes
    for inputs in (3, 4) if CELLS[cell].skip else (None,):
        yield problem(cell, steps, batch, hidden, directions, inputs)
        yield problem(cell, steps, batch, hidden, directions, inputs, masks=True)
        offsets = [0, 0, steps // 3, steps]
        yield problem(cell, steps, 1, hidden, directions, inputs, masks=True, offsets=offsets)


def check(operators, cell, operands, dtypes):
    """Outputs and gradients of (forward, backward) are the definition's."""
    forward, backward = operators
    leaves = {name: operands[name] for name in ("u", "x", "weight", "bias", "c_0") if operands[name] is not None}
    for t in leaves.values():
        t.requires_grad_()
    expected = reference.columns(cell, **operands)
    grads = [rounded(*t.shape) for t in expected]
    wanted = torch.autograd.grad(expected, leaves.values(), grads, allow_unused=True, materialize_grads=True)
    for dtype in dtypes:
        *given, directions = cast(operands, dtype).values()
        h, c_n, c = forward(cell, *given, directions, True)
        saved = CELLS[cell].saves_states(operands["mask_pad"] is not None)
        assert c.shape == (h.shape if saved else (0,))
        for found, again in zip((h, c_n, c.new_empty(0)), forward(cell, *given, directions, False), strict=True):
            assert found.dtype == dtype and torch.equal(found, again)
        found = backward(cell, *(g.to(dtype) for g in grads), *given, c if saved else h, directions)
        for name, ours, value in zip(("h", "c_n"), (h, c_n), expected, strict=True):
            assert_close(ours, value.detach(), "scan", dtype, what=f"{cell} {name}")
        gradients = dict(zip(("u", "x", "weight", "bias", "c_0"), found, strict=True))
        for name, value in zip(leaves, wanted, strict=True):
            assert_close(gradients.pop(name), value, "scan", dtype, backward=True, what=f"{cell} gradient of {name}")
        assert all(t.numel() == 0 for t in gradients.values())


@each_cell
def test_column_cells(cell, columns, poison):
    for operands in kinds(cell, (6, 2, 3), 2):
        check(columns, cell, operands, (DOUBLE, torch.float32))


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 5])
def test_few_steps_of_column_cells(steps, columns):
    for cell in ("sru", "minlstm"):
        for operands in kinds(cell, (steps, 2, 3), 1):
            check(columns, cell, operands, (DOUBLE, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_cell
def test_column_cells_in_16_bits(cell, dtype, columns):
    """As the C++ kernels of the CPU, but for a rounding of the results."""
    pairs = list(zip(columns, (torch.ops.seqaccel.column_forward, torch.ops.seqaccel.column_backward), strict=True))
    for operands in kinds(cell, (6, 2, 3), 2):
        *given, directions = cast(operands, dtype).values()
        ours, expected = (forward(cell, *given, directions, True) for forward in pairs[0])
        h, c_n, c = expected
        grads = torch.randn_like(h), torch.randn_like(c_n)
        saved = c if c.numel() else h
        ours_too, expected_too = (backward(cell, *grads, *given, saved, directions) for backward in pairs[1])
        for found, wanted in zip((*ours, *ours_too), (*expected, *expected_too), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_offsets_out_of_range_or_order_of_column_cells(columns):
    """They reach nothing beyond the tensors."""
    forward, backward = columns
    for offsets in ([-5, 3, 99], [4, 2, 4], [9, -9, 9]):
        *given, directions = cast(problem("fo_pool", 4, 1, 3, 2, offsets=offsets), torch.float32).values()
        h, c_n, c = forward("fo_pool", *given, directions, True)
        assert h.shape == (4, 1, 6) and c_n.isfinite().all()
        grads = backward("fo_pool", torch.ones_like(h), None, *given, c, directions)
        assert grads[4].shape == (2, 6)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    operators = compiled("linear_scan", tmp_path_factory.mktemp("linear_scan"))
    return operators.linear_scan_forward, operators.linear_scan_backward


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_linear_scan(dtype, reverse, linear, poison):
    """As the C++ kernels of the CPU; the last two sizes are cut into chunks of time."""
    definition = torch.ops.seqaccel.linear_scan_forward, torch.ops.seqaccel.linear_scan_backward
    for sizes, offsets in [
        ((2, 5, 3), None),
        ((1, 70, 9), [0, 0, 3, 70]),
        ((1, 0, 2), [0, 0]),
        ((1, 1030, 2), [0, 1, 1030]),
        ((1, 300, 9), None),
        ((2, 5, 3), "reset"),
        ((1, 1030, 2), "reset"),
        ((1, 300, 9), "reset"),
    ]:
        reset = torch.rand(sizes[:2]) < 0.1 if offsets == "reset" else None
        if reset is not None:
            offsets = None
            reset[0, 0] = True
        sequences = sizes[0] if offsets is None else len(offsets) - 1
        inputs = linear_inputs(*sizes, sequences=sequences, is_complex=dtype.is_complex)
        a, b, h_0 = (t.to(dtype) for t in inputs.values())
        grad_h, grad_h_last = torch.randn(sizes).to(dtype), torch.randn(sequences, sizes[2]).to(dtype)
        cu_seqlens = None if offsets is None else torch.tensor(offsets)
        for start, grad_end in ((h_0, grad_h_last), (None, None)):
            results = []
            h = definition[0](a, b, start, cu_seqlens, reset, reverse, False)[0]
            for forward, backward in (linear, definition):
                results.append(
                    (
                        *forward(a, b, start, cu_seqlens, reset, reverse, True),
                        *backward(grad_h, grad_end, a, h, start, cu_seqlens, reset, reverse),
                    )
                )
            for found, wanted in zip(*results, strict=True):
                assert_close(found, wanted, "scan", dtype, backward=True, what=str(sizes))
