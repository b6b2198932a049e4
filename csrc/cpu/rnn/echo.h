// The reservoir of an echo state network: what the operator hands to the kernels of an instruction set.
#pragma once

#include <cstdint>

#include "cpu/base/dispatch.h"

namespace seqaccel::rnn {

template <typename T>
struct EchoState {
  int64_t steps, batch, units;
  T leak_rate;
  const T* drive;          // [steps, batch, units]
  const T* h_0;            // [batch, units]
  const int32_t* rows;     // [units + 1]: where each row of W begins in `columns` and `weight`
  const int32_t* columns;  // [rows[units]]
  const T* weight;         // [rows[units]]
  T* output;               // [steps, batch, units]
  const bool* reset;       // [steps, batch]: h' is zero; or null
  const T* zeros;          // [units], with `reset`
  int threads;
};

// The runs return false if there is no memory for the workspace.
struct EchoKernels {
  bool (*valid)(const int32_t* rows, const int32_t* columns, int64_t units, int64_t count);
  bool (*run_float)(const EchoState<float>&);
  bool (*run_double)(const EchoState<double>&);
};

}  // namespace seqaccel::rnn

SEQACCEL_DECLARE_KERNELS(rnn, EchoKernels, echo_kernels)
