#pragma once

#include <cstddef>

#include "cpu/base/dispatch.h"

namespace seqaccel::conv {

// Gates of a convolutional GRU, elementwise on `size` values for each of `batch` grids: the update gates u are the
// first `size` values of a grid's gates, the reset gates r the others.
template <typename T>
struct GruGates {
  ptrdiff_t batch, size;
  bool hard;           // max(0, min(1, 1.2 sigmoid - 0.1)) instead of sigmoid
  const T* x;          // [batch, size]
  T* gates;            // [batch, 2 size]; `reset` takes their arguments and leaves their values
  const T* candidate;  // [batch, size], tanh of the second convolution
  T* reset;            // [batch, size] r x, what the second convolution takes
  T* y;                // [batch, size]
  // Of the backward passes.
  const T* grad_y;
  T* grad_gates;      // [batch, 2 size], of the gates' arguments
  T* grad_candidate;  // [batch, size], of tanh's argument
  const T* grad_reset;
  T* grad_x;  // [batch, size], without what comes through the first convolution; null: not wanted
  int threads;
};

template <typename T>
using GruPass = void (*)(const GruGates<T>& p);

// Each for one type: reset makes gates and `reset`; update makes y; update_backward makes grad_candidate, grad_x, the
// first half of grad_gates and `reset` again; reset_backward makes the second half and adds to grad_x.
template <typename T>
struct GruPasses {
  GruPass<T> reset, update, update_backward, reset_backward;
};

struct GruKernels {
  GruPasses<float> of_float;
  GruPasses<double> of_double;
};

}  // namespace seqaccel::conv

SEQACCEL_DECLARE_KERNELS(conv, GruKernels, gru_kernels)
