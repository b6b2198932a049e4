#pragma once

#include "cpu/conv/conv.h"

namespace seqaccel::conv {

// A layer with C channels, G gates, S skip channels. `conv` is the shape of its dilated convolution: C to 2G channels.
// All contiguous; null: absent.
template <typename T>
struct WaveNetForward {
  ConvShape conv;
  ptrdiff_t skips;
  bool residual;              // whether y is wanted
  const T* x;                 // [B, C, T]
  const T* weight;            // [2G, C, K]
  const T* bias;              // [2G]
  const T* output_weight;     // [C + S, G]
  const T* output_bias;       // [C + S]
  const T* skip;              // [B, S, T]
  const T* condition;         // [B, 2G, T]
  const T* global_condition;  // [B, 2G]
  const T* history;           // [B, C, (K - 1) * dilation]
  T* y;                       // [B, C, T]
  T* next_skip;               // [B, S, T]
  T* saved;                   // B * 2G * T values: tanh, then sigmoid (wavenet_kernels.h has the order)
  bool non_temporal;          // whether what is saved bypasses the caches
  int threads;

  ptrdiff_t gates() const { return conv.out_channels / 2; }
};

template <typename T>
struct WaveNetBackward {
  ConvShape conv;
  ptrdiff_t skips;
  const T* grad_y;     // [B, C, T], or null
  const T* grad_skip;  // [B, S, T], or null
  const T* saved;
  const T* x;
  const T* weight;
  const T* output_weight;
  const T* history;
  T* gate;  // [B, 2G, gate_stride]: the gradient before the gate
  ptrdiff_t gate_stride;
  T* grad_x;  // null: not wanted, as for the others
  T* grad_weight;
  T* grad_bias;
  T* grad_output_weight;
  T* grad_output_bias;
  T* grad_global;  // [B, 2G]
  T* grad_history;
  bool wants_gate;  // whether `gate` itself is wanted
  int threads;

  ptrdiff_t gates() const { return conv.out_channels / 2; }
};

struct WaveNetKernels {
  bool (*forward_float)(const WaveNetForward<float>& p);
  bool (*forward_double)(const WaveNetForward<double>& p);
  bool (*backward_float)(const WaveNetBackward<float>& p);
  bool (*backward_double)(const WaveNetBackward<double>& p);
};

}  // namespace seqaccel::conv

SEQACCEL_DECLARE_KERNELS(conv, WaveNetKernels, wavenet_kernels)
