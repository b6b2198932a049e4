// Operators that only tests call.
#pragma once

#include <cstdint>

#include "cpu/base/dispatch.h"

namespace seqaccel::testing {

// The elementary functions of vec.h on their own, so that their accuracy can be tested for each instruction set.
enum class Elementary : int64_t { exp, sigmoid, tanh };

struct ElementwiseKernels {
  void (*apply_float)(Elementary function, const float* x, float* y, int64_t n);
  void (*apply_double)(Elementary function, const double* x, double* y, int64_t n);
};

}  // namespace seqaccel::testing

SEQACCEL_DECLARE_KERNELS(testing, ElementwiseKernels, elementwise_kernels)
