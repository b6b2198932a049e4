#pragma once

#include <cstddef>

#include "cpu/base/dispatch.h"

namespace seqaccel::conv {

// weight = g v / |v|, the norm over each row. All contiguous.
template <typename T>
struct WeightNorm {
  ptrdiff_t rows, columns;
  const T* v;  // [rows, columns]
  const T* g;  // [rows]
  T* weight;   // [rows, columns]; the backward's gradient of it, which becomes that of v
  T* grad_g;   // [rows], of the backward
  int threads;
};

struct WeightNormKernels {
  void (*forward_float)(const WeightNorm<float>& p);
  void (*forward_double)(const WeightNorm<double>& p);
  void (*backward_float)(const WeightNorm<float>& p);
  void (*backward_double)(const WeightNorm<double>& p);
};

}  // namespace seqaccel::conv

SEQACCEL_DECLARE_KERNELS(conv, WeightNormKernels, weight_norm_kernels)
