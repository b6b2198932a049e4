#pragma once

#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::conv {

struct ConvShape {
  ptrdiff_t batch, in_channels, out_channels, length, kernel_size, dilation, groups;

  ptrdiff_t context() const { return (kernel_size - 1) * dilation; }  // time steps before the first that an output sees
  ptrdiff_t group_in() const { return in_channels / groups; }
  ptrdiff_t group_out() const { return out_channels / groups; }
  bool depthwise() const { return group_in() == 1 && groups > 1; }
};

// y = relu?(residual + dropout(activation(conv(x) + bias))). A gated activation takes output channel o and, as the
// gate, o + O / 2: y and the residual have half of the O channels (Y).
struct ConvEpilogue {
  Activation activation;
  bool relu;
  double dropout;
  uint64_t seed;

  ptrdiff_t y_channels(const ConvShape& s) const { return is_gated(activation) ? s.out_channels / 2 : s.out_channels; }
};

// B batch, C and O input and output channels, Y those of y, T length, K taps, P = (K - 1) * dilation. All contiguous;
// null: absent.
template <typename T>
struct ConvForward {
  ConvShape shape;
  ConvEpilogue epilogue;
  const T* x;         // [B, C, T]
  const T* weight;    // [O, C / groups, K]
  const T* bias;      // [O]
  const T* residual;  // [B, Y, T]
  const T* history;   // [B, C, P], the time steps before x; null: zeros
  T* y;               // [B, Y, T]
  T* pre;             // [B, O, T] conv + bias, for the backward; may be null
  uint8_t* active;    // [B, O, T] where relu and dropout let the gradient through; may be null
  int threads;
};

template <typename T>
struct ConvBackward {
  ConvShape shape;
  ConvEpilogue epilogue;
  const T* grad_y;        // [B, Y, T]
  const T* y;             // the forward's, where the derivative is taken from it
  const T* pre;           // the forward's, or null
  const uint8_t* active;  // the forward's, or null
  const T* x;
  const T* weight;
  const T* history;
  const T* addend;   // [B, C, T], added to grad_x; null: zeros
  T* grad_x;         // null: not wanted, as for the others
  T* grad_weight;    // [O, C / groups, K]
  T* grad_bias;      // [O]
  T* grad_residual;  // [B, Y, T]
  T* grad_history;   // [B, C, P]
  int threads;
};

// A kernel returns false where the workspace could not be allocated.
struct ConvKernels {
  bool (*forward_float)(const ConvForward<float>& p);
  bool (*forward_double)(const ConvForward<double>& p);
  bool (*backward_float)(const ConvBackward<float>& p);
  bool (*backward_double)(const ConvBackward<double>& p);
};

}  // namespace seqaccel::conv

SEQACCEL_DECLARE_KERNELS(conv, ConvKernels, conv_kernels)
