// The register tile of matrix products: acc [MR, NV vectors] += A [MR, K] * B [K, NV vectors].
//
// Rows of A are broadcast, rows of B are vectors, and acc stays in registers while K runs. MR * NV accumulators and the
// NV vectors of B must fit the register file: 6 x 4 with 32 registers, 4 x 2 or 6 x 2 with 16.
//
// Who uses it:
//
// - matmul/kernels.h: B lies in panels, A in strips or rows; or both stay in place, with a prefetch at each k.
// - conv/product.h: B lies in panels of shifted rows.
// - attention/: neither operand is packed.
//
// Three kinds of products have a loop of their own:
//
// - rnn_tile (rnn/products.h) prefetches in three ways as K runs, and holds the vectors of B in registers for two rows.
//   With the shared tile a step took up to 2% longer (LSTM, (T, B, H) = (128, 1, 128) forward and training,
//   (128, 16, 256) forward; Zen 4).
// - word_tile (packed/products.h) multiplies words of 1, 2 or 4 values. With few rows it runs up to 8 sums along K, to
//   hide the latency of a multiply-add.
// - dot_tile (rnn/products.h, conv/product.h) sums along the rows of both operands, where packing B would cost more
//   than the product.
#pragma once

#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

struct Nothing {
  SEQACCEL_INLINE void operator()() const {}
};

// Element (m, k) of A is a[m * a_row + k * a_k]; row k of B begins at b + k * b_k. each() is called between the loads
// of a row of B and its products, for a prefetch.
template <typename T, int MR, int NV, class Each = Nothing>
SEQACCEL_INLINE void add_products(Vec<T> (&acc)[MR][NV], const T* a, ptrdiff_t a_row, ptrdiff_t a_k, const T* b,
                                  ptrdiff_t b_k, ptrdiff_t K, const Each& each = {}) {
  for (ptrdiff_t k = 0; k < K; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) row[v] = load(b + v * Lanes<T>);
    each();
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = broadcast(a[m * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
    }
    a += a_k;
    b += b_k;
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::inline base
