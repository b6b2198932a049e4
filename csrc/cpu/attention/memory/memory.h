// The novelty gate: what the operator hands to the kernels of an instruction set.
#pragma once

#include <cstdint>

#include "cpu/base/dispatch.h"

namespace seqaccel::attention::memory {

template <typename T>
struct Gate {
  int64_t batch, length, width;  // of `vectors`
  int64_t rows;                  // of `kept`
  int64_t window, capacity;
  T threshold;
  const T* vectors;     // [batch, length, width]
  const T* kept;        // [batch, rows, width]
  const int64_t* size;  // [batch]: how many rows of `kept` exist
  int64_t* slot;        // [batch, length]
  T* workspace;         // gate_workspace elements per stream at a time: for each thread, or one where batch < threads
  int threads;
};

struct GateKernels {
  int64_t (*workspace_float)(int64_t length, int64_t rows, int64_t width);
  int64_t (*workspace_double)(int64_t length, int64_t rows, int64_t width);
  void (*gate_float)(const Gate<float>&);
  void (*gate_double)(const Gate<double>&);
};

}  // namespace seqaccel::attention::memory

SEQACCEL_DECLARE_KERNELS(attention::memory, GateKernels, gate_kernels)
