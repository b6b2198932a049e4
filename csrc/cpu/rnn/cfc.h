// A closed-form continuous-time recurrence: what the operators (cfc.cpp) hand to the loops (cfc_kernels.h).
//
// T time, B batch, H units. A step of a row is
//   v_0 = x + M_0 h',  v_i = M_i phi(v_(i-1)) + b_i,  h = mix of the last v: the heads
// where the last matrix has rows for G heads of H units: 4 (f, g, a, b), or 1 (f) of the pure solution. With s the
// row's time span,
//   f = tanh(v_f), g = tanh(v_g), t = sigmoid(s v_a + v_b):  h = (1 - t) f + t g, or without the gate f + t g
//   pure, f = v_f:  h = A - A exp(-s (|w| + |f|)) f
// where h' is zero at the steps of `reset`. All tensors are contiguous.
#pragma once

#include <cstdint>

#include "cpu/base/dispatch.h"

namespace seqaccel::rnn {

constexpr int kCfcMatrices = 8;  // the heads, and what is below them

enum class CfcMode { gated, ungated, pure };
enum class CfcActivation { lecun_tanh, tanh, relu };

template <typename T>
struct Cfc {
  int64_t steps, batch, hidden;
  int matrices;
  CfcMode mode;
  CfcActivation activation;
  int64_t widths[kCfcMatrices + 1];  // values that a matrix multiplies; the last one: its rows
  const T* weights[kCfcMatrices];    // [widths[i + 1], widths[i]]
  const T* timespans;                // [T, B], or null: 1
  const bool* reset;                 // [T, B], or null: at which steps episodes begin
  const T* w;                        // [H], of the pure solution
  const T* a;                        // [H]

  int heads() const { return mode == CfcMode::pure ? 1 : 4; }
  bool begins(int64_t t, int64_t b) const { return reset && reset[t * batch + b]; }
};

template <typename T>
struct CfcForward : Cfc<T> {
  const T* x;                     // [T, B, widths[1]]
  const T* h_0;                   // [B, H]
  const T* biases[kCfcMatrices];  // of all matrices but the first
  bool keeps;                     // the activations of all steps, not those of one
  T* activations[kCfcMatrices];   // [T or 1, B, widths[i + 1]], of all matrices; of the heads: f, g, t, v_a
  T* output;                      // [T, B, H]
};

template <typename T>
struct CfcBackward : Cfc<T> {
  const T* grad_output;                // [T, B, H]
  const T* activations[kCfcMatrices];  // [T, B, widths[i + 1]]
  T* grads[kCfcMatrices];              // [T, B, widths[i + 1]], dL/dv
  T* grad_h;                           // [T, B, H]: dL/dh, or null
  T* grad_h_0;                         // [B, H]
};

// The loops return false if there is no memory for their workspace.
struct CfcKernels {
  bool (*forward_float)(const CfcForward<float>&);
  bool (*forward_double)(const CfcForward<double>&);
  bool (*backward_float)(const CfcBackward<float>&);
  bool (*backward_double)(const CfcBackward<double>&);
};

}  // namespace seqaccel::rnn

SEQACCEL_DECLARE_KERNELS(rnn, CfcKernels, cfc_kernels)
