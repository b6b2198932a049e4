// What the operators of convolutions check before they run, what they save, and how they call the kernels.
#pragma once

#include <omp.h>

#include <algorithm>

#include "common/dtypes.h"
#include "cpu/conv/conv.h"

namespace seqaccel::conv {

inline Activation parse_activation(const std::string& name) {
  const int found = activation_of(name.c_str());
  STD_TORCH_CHECK(found >= 0 && Activation(found) != Activation::elu && Activation(found) != Activation::hardswish,
                  "seqaccel: convolutions have no activation '", name, "'");
  return Activation(found);
}

inline void check_groups(const Tensor& x, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(groups >= 1, "seqaccel: groups must be positive, but got ", groups);
  STD_TORCH_CHECK(x.size(1) % groups == 0, "seqaccel: the channels of x, ", x.size(1),
                  ", must be divisible by groups, ", groups);
  STD_TORCH_CHECK(weight.dim() == x.dim() && weight.size(0) % groups == 0 && weight.size(2) >= 1,
                  "seqaccel: weight must have a multiple of ", groups,
                  " output channels and at least one tap, but has shape ", shape_string(weight));
}

inline void check_dilation(int64_t dilation, int64_t taps, int64_t width = 1) {
  STD_TORCH_CHECK(dilation >= 1, "seqaccel: dilation must be positive, but got ", dilation);
  STD_TORCH_CHECK(dilation <= (int64_t(1) << 40) / taps / std::max<int64_t>(width, 1), "seqaccel: dilation ", dilation,
                  " is too large");
}

// `narrow`: bfloat16 and float16 too.
inline ConvShape sequence_shape(const Tensor& x, const Tensor& weight, int64_t dilation, int64_t groups,
                                bool narrow = false) {
  if (!narrow || !is_narrow(x.scalar_type())) check_float_or_double(x, "x");
  check_tensor(x, "x", {-1, -1, -1}, x.scalar_type());
  check_groups(x, weight, groups);
  check_tensor(weight, "weight", {-1, x.size(1) / groups, -1}, x.scalar_type());
  check_dilation(dilation, weight.size(2));
  return {x.size(0), x.size(1), weight.size(0), x.size(2), weight.size(2), dilation, groups};
}

inline void check_history(const ConvShape& shape, const OptionalTensor& history, ScalarType dtype) {
  const ptrdiff_t rows = shape.segments ? shape.history_rows : shape.batch;
  if (history) check_tensor(*history, "history", {rows, shape.in_channels, shape.context()}, dtype);
}

// What the forward keeps for the backward beside its output: nothing, a byte an element, or conv + bias.
enum class Saved { nothing, active, pre };

inline Saved saved_kind(const ConvEpilogue& e, bool has_residual) {
  switch (e.activation) {
    case Activation::none:
      return Saved::nothing;
    case Activation::relu:
      return has_residual ? Saved::active : Saved::nothing;
    case Activation::leaky_relu:
    case Activation::tanh:
    case Activation::sigmoid:
      return has_residual || e.relu || e.dropout > 0 ? Saved::pre : Saved::nothing;
    default:
      return Saved::pre;
  }
}

inline double multiply_adds(const ConvShape& s) {
  return double(s.batch) * double(s.out_channels) * double(s.length) * double(s.group_in() * s.kernel_size + 4);
}

// How many threads are worth waking.
inline int thread_count(double multiply_adds) {
  constexpr double kEach = 100e3;  // what a thread must have to do to be worth waking: 3 us
  const int most = omp_in_parallel() ? 1 : omp_get_max_threads();
  return multiply_adds >= kEach * most ? most : multiply_adds < kEach ? 1 : int(multiply_adds / kEach);
}

inline void check_workspace(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: not enough memory for the workspace of a convolution");
}

// By the kernels of the active instruction set; false where the workspace could not be allocated.
inline bool run(const ConvForward<float>& p) { return active_conv_kernels().forward_float(p); }
inline bool run(const ConvForward<double>& p) { return active_conv_kernels().forward_double(p); }
inline bool run(const ConvBackward<float>& p) { return active_conv_kernels().backward_float(p); }
inline bool run(const ConvBackward<double>& p) { return active_conv_kernels().backward_double(p); }
inline bool run(const ConvForward<Float16>& p) { return active_conv_narrow_kernels().forward_float16(p); }
inline bool run(const ConvBackward<Float16>& p) { return active_conv_narrow_kernels().backward_float16(p); }
// Only AMD's cores do twice the multiply-adds on pairs of bfloat16 that they do on float.
inline bool run(const ConvForward<BFloat16>& p) {
  const ConvNarrowKernels& kernels = active_conv_narrow_kernels();
  return kernels.forward_pairs && is_amd() ? kernels.forward_pairs(p) : kernels.forward_bfloat16(p);
}
inline bool run(const ConvBackward<BFloat16>& p) {
  const ConvNarrowKernels& kernels = active_conv_narrow_kernels();
  return kernels.backward_pairs && is_amd() ? kernels.backward_pairs(p) : kernels.backward_bfloat16(p);
}

}  // namespace seqaccel::conv
