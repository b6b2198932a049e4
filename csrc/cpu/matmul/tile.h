// Register tiles of a matrix product against packed panels: the inner loop of matmul.h and of convolutions.
//
// B [K, N] is packed once into panels of NV vectors: panel j holds B[0..K, j*W .. (j+1)*W), W = NV * Lanes<T>, row
// after row, zero past N. A tile of MR rows by NV vectors of the product stays in registers while K runs:
//   acc[m][v] += A[m, k] * panel[k, v]
// MR * NV accumulators plus NV panel vectors must fit the register file: 6 x 4 with 32 registers, 4 x 2 or 6 x 2
// with 16.
#pragma once

#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::matmul {

// acc += A[MR, K] * panel. A's element (m, k) is a[m * row_stride + k].
template <typename T, int MR, int NV>
SEQACCEL_INLINE void tile_multiply(Vec<T> (&acc)[MR][NV], const T* a, ptrdiff_t row_stride, const T* panel,
                                   ptrdiff_t K) {
  for (ptrdiff_t k = 0; k < K; ++k) {
    Vec<T> b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(panel + v * Lanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = broadcast(a[m * row_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += x * b[v];
    }
    panel += NV * Lanes<T>;
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::matmul
