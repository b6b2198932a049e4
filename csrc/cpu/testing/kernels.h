#include "cpu/base/vec.h"
#include "cpu/testing/elementwise.h"

namespace seqaccel::SEQACCEL_ISA::testing {

template <typename T>
SEQACCEL_INLINE Vec<T> evaluate(Elementary function, Vec<T> x) {
  switch (function) {
    case Elementary::exp:
      return exp_vec<T>(x);
    case Elementary::sigmoid:
      return sigmoid_vec<T>(x);
    default:
      return tanh_vec<T>(x);
  }
}

template <typename T>
void apply_elementwise(Elementary function, const T* x, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) store(y + i, evaluate<T>(function, load(x + i)));
  if (i < n) store(y + i, evaluate<T>(function, load(x + i, int(n - i))), int(n - i));
}

extern const ElementwiseKernels elementwise_kernels;
const ElementwiseKernels elementwise_kernels = {apply_elementwise<float>, apply_elementwise<double>};

}  // namespace seqaccel::SEQACCEL_ISA::testing
