// Recurrent layers on the CPU: what the operators (rnn.cpp) hand to the loops (rnn_kernels.h).
// G gates, B batch, H hidden units; tensors are contiguous and time comes first.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace seqaccel {

// A stretch of a layer's recurrence in one direction.
template <typename T>
struct RnnForward {
  int64_t steps, batch, hidden;
  int64_t first;           // time of gates[0] and output[0]
  bool reverse;            // runs from the last step to the first
  const int64_t* lengths;  // [B], each in 0 ... T; null: every sequence is whole
  const T* h_0;            // [B, H]; may be h_n
  const T* c_0;            // [B, H]; may be c_n
  const T* weight;         // [G*H, H]
  const T* bias;           // [G*H], or null
  T* gates;                // [steps, B, G*H]: W_ih x, if input is null; takes the activated gates, if cells is not null
  T* output;               // [steps, B, H]
  T* cells;                // [steps, B, H], or null: nothing is kept for a backward pass
  T* h_n;                  // [B, H]
  T* c_n;                  // [B, H]
  // Not null: W_ih x is calculated step by step, beside W_hh h.
  const T* input = nullptr;      // [steps, B, I]
  const T* weight_ih = nullptr;  // [G*H, I]
  int64_t inputs = 0;            // I
};

template <typename T>
struct RnnBackward {
  int64_t steps, batch, hidden;
  bool reverse;
  const int64_t* lengths;
  const T* grad_output;  // [steps, B, H], or null: zero
  const T* grad_h_n;     // [B, H], or null: zero
  const T* grad_c_n;     // [B, H], or null: zero
  const T* c_0;          // [B, H]
  const T* weight;       // [G*H, H]
  const T* gates;        // [steps, B, G*H]
  const T* cells;        // [steps, B, H]
  T* grad_gates;         // [steps, B, G*H]: dL/dpre
  T* grad_h_0;           // [B, H]
  T* grad_c_0;           // [B, H]
  T* grad_bias;          // [G*H]
};

// y [M, N] = x [M, K] weight^T, for the few rows where packing weight [N, K] would cost more than the product.
template <typename T>
struct RowProduct {
  int64_t M, N, K;
  const T* x;
  const T* weight;
  T* y;
};

struct RnnKernels {
  // False: the workspace could not be allocated.
  bool (*lstm_forward_float)(const RnnForward<float>&);
  bool (*lstm_forward_double)(const RnnForward<double>&);
  bool (*lstm_backward_float)(const RnnBackward<float>&);
  bool (*lstm_backward_double)(const RnnBackward<double>&);
  void (*row_product_float)(const RowProduct<float>&);
  void (*row_product_double)(const RowProduct<double>&);
};

SEQACCEL_DECLARE_KERNELS(RnnKernels, rnn_kernels)

}  // namespace seqaccel
