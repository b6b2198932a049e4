// Statistics of rows for layer norm: y = (x - mean) / sigma, sigma^2 = variance + epsilon, the variance biased.
#pragma once

#include <math.h>

#include "rnn_blocks.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr double kEpsilon = 1e-5;

template <typename T>
struct RowMoments {
  T mean, scale;  // scale: 1 / sigma
};

// Of `count` values, in two passes.
template <typename T>
RowMoments<T> row_moments(const T* x, ptrdiff_t count) {
  constexpr int L = Lanes<T>;
  const ptrdiff_t whole = count / L * L;
  Vec<T> sum{};
  for (ptrdiff_t k = 0; k < whole; k += L) sum += load(x + k);
  T total = horizontal_sum<T>(sum);
  for (ptrdiff_t k = whole; k < count; ++k) total += x[k];
  const T mean = total / T(count);
  Vec<T> squares{};
  for (ptrdiff_t k = 0; k < whole; k += L) {
    const Vec<T> d = load(x + k) - mean;
    squares += d * d;
  }
  T variance = horizontal_sum<T>(squares);
  for (ptrdiff_t k = whole; k < count; ++k) variance += (x[k] - mean) * (x[k] - mean);
  return {mean, T(1) / T(sqrt(variance / T(count) + T(kEpsilon)))};
}

// The means of g and of g y over `count` values: what a norm's gradient takes off,
//   dL/dx = (g - mean(g) - y mean(g y)) / sigma, g = dL/dy.
template <typename T>
struct NormGrad {
  T mean, slope, scale;
  SEQACCEL_INLINE Vec<T> operator()(Vec<T> g, Vec<T> y) const { return (g - mean - y * slope) * scale; }
};

// g [count] as grad[k] * weight[k], or grad alone.
template <typename T>
NormGrad<T> norm_grad_of(const T* grad, const T* weight, const T* y, ptrdiff_t count, T scale) {
  constexpr int L = Lanes<T>;
  Vec<T> sum{}, products{};
  for (ptrdiff_t k = 0; k < count; k += L) {
    const int n = int(min_of(L, count - k));
    Vec<T> g = load_some(grad + k, n);
    if (weight) g *= load_some(weight + k, n);
    sum += g;
    products += g * load_some(y + k, n);
  }
  return {horizontal_sum<T>(sum) / T(count), horizontal_sum<T>(products) / T(count), scale};
}

template <typename T>
void normalize_rows(const NormRows<T>& p) {
  constexpr int L = Lanes<T>;
  const bool small = double(p.rows) * double(p.width) < 16384.0;
#pragma omp parallel for schedule(static) if (!small)
  for (ptrdiff_t row = 0; row < p.rows; ++row) {
    T* const x = p.x + row * p.row;
    const RowMoments<T> moments = row_moments(x, p.width);
    for (ptrdiff_t k = 0; k < p.width; k += L) {
      const int n = int(min_of(L, p.width - k));
      store_some(x + k, (load_some(x + k, n) - moments.mean) * moments.scale, n);
    }
    if (p.stats) p.stats[row * kNormStats + kScaleX] = moments.scale;
  }
}

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
