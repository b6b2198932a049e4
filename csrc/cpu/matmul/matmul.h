// A whole matrix product, C [M, N] (+)= A [M, K] B [K, N], over the register tiles of base/tile.h: the products over
// all time steps (input projections, weight gradients), beside the step-by-step ones that pack their own panels.
#pragma once

#include <cstddef>

#include "cpu/base/dispatch.h"

namespace seqaccel::matmul {

// Limits up to which A and B of A^T B are read in place while C stays in the caches (is_narrow): bytes of a row of B,
// and bytes of C per thread.
constexpr ptrdiff_t kDirectRow = 2048, kDirectShare = ptrdiff_t(512) << 10;
constexpr double kSmallProduct = 262144.0;  // M N K up to which one thread runs a product

inline bool is_narrow(ptrdiff_t M, ptrdiff_t N, ptrdiff_t value_bytes, ptrdiff_t threads) {
  return N * value_bytes <= kDirectRow && M * N * value_bytes <= kDirectShare * threads;
}

// Element (i, j) of A is a[i * a_row + j * a_column], and likewise for B. Rows of C are contiguous, c_row apart.
template <typename T>
struct Matmul {
  ptrdiff_t M, N, K;
  const T* a;
  ptrdiff_t a_row, a_column;
  const T* b;
  ptrdiff_t b_row, b_column;
  T* c;
  ptrdiff_t c_row;
  bool accumulate;  // C += A B; else C = A B
};

struct MatmulKernels {
  // Returns false, with C unchanged, if there is no memory for the packed operands.
  bool (*matmul_float)(const Matmul<float>&);
  bool (*matmul_double)(const Matmul<double>&);
};

}  // namespace seqaccel::matmul

SEQACCEL_DECLARE_KERNELS(matmul, MatmulKernels, matmul_kernels)
