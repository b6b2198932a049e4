// Weight normalisation by rows (Salimans and Kingma, 2016). With n = |v|, s = g / n and D the gradient of the weight:
//
//   weight = s v,   dg = D . v / n,   dv = s (D - v (D . v) / n^2)
#pragma once

#include "cpu/base/vec.h"
#include "cpu/conv/weight_norm.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// a . b over one row. A register sums kFlush terms a lane at most before they go to `sum`: the error of a long row
// grows with the root of both counts.
template <typename T>
inline T dot(const T* a, const T* b, ptrdiff_t n) {
  constexpr ptrdiff_t L = Lanes<T>, kBlock = 64 * L;
  Vec<T> sum = {};
  for (ptrdiff_t begin = 0; begin < n; begin += kBlock) {
    const ptrdiff_t end = begin + kBlock < n ? begin + kBlock : n;
    Vec<T> part[2] = {};
    ptrdiff_t i = begin;
    for (; i + 2 * L <= end; i += 2 * L) {
      part[0] += load(a + i) * load(b + i);
      part[1] += load(a + i + L) * load(b + i + L);
    }
    for (; i < end; i += L) {
      const int m = int(end - i < L ? end - i : L);
      part[0] += load_some(a + i, m) * load_some(b + i, m);
    }
    sum += part[0] + part[1];
  }
  return horizontal_sum<T>(sum);
}

template <typename T>
void normalize(const WeightNorm<T>& p) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (ptrdiff_t row = 0; row < p.rows; ++row) {
    const T* const v = p.v + row * p.columns;
    T* const weight = p.weight + row * p.columns;
    const T s = p.g[row] / __builtin_sqrt(dot(v, v, p.columns));
    for (ptrdiff_t i = 0; i < p.columns; ++i) weight[i] = s * v[i];
  }
}

template <typename T>
void differentiate_norm(const WeightNorm<T>& p) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (ptrdiff_t row = 0; row < p.rows; ++row) {
    const T* const v = p.v + row * p.columns;
    T* const grad = p.weight + row * p.columns;
    const T inverse = 1 / T(__builtin_sqrt(dot(v, v, p.columns))), along = dot<T>(grad, v, p.columns) * inverse;
    const T s = p.g[row] * inverse, shrink = along * inverse;
    p.grad_g[row] = along;
    for (ptrdiff_t i = 0; i < p.columns; ++i) grad[i] = s * (grad[i] - shrink * v[i]);
  }
}

extern const WeightNormKernels weight_norm_kernels;
const WeightNormKernels weight_norm_kernels = {normalize<float>, normalize<double>, differentiate_norm<float>,
                                               differentiate_norm<double>};

}  // namespace seqaccel::SEQACCEL_ISA::conv
