// A whole matrix product, C [M, N] (+)= A [M, K] B [K, N], over the register tiles of base/tile.h: the products over
// all time steps (input projections, weight gradients), beside the step-by-step ones that pack their own panels.
#pragma once

#include <cstddef>

#include "cpu/base/dispatch.h"

namespace seqaccel::matmul {

// A^T B is read where it lies, C^T staying in the caches, if neither is larger (is_narrow): bytes of a row of B, and of
// C for each thread.
constexpr ptrdiff_t kDirectRow = 2048, kDirectShare = ptrdiff_t(512) << 10;
constexpr double kSmallProduct = 262144.0;  // M N K, for one thread

inline bool is_narrow(ptrdiff_t M, ptrdiff_t N, ptrdiff_t value_bytes, ptrdiff_t threads) {
  return N * value_bytes <= kDirectRow && M * N * value_bytes <= kDirectShare * threads;
}

// Element (i, j) of A lies at a[i * a_row + j * a_column], of B likewise; rows of C are contiguous, c_row apart.
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
  // False: the workspace for the packed operands could not be allocated, and C is unchanged.
  bool (*matmul_float)(const Matmul<float>&);
  bool (*matmul_double)(const Matmul<double>&);
};

}  // namespace seqaccel::matmul

SEQACCEL_DECLARE_KERNELS(matmul, MatmulKernels, matmul_kernels)
