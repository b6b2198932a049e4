#include "cpu/conv/wavenet.h"

#include "common/tensor.h"
#include "cpu/base/pool.h"
#include "cpu/conv/checks.h"
#include "cpu/conv/segments.h"

namespace seqaccel::conv {
namespace {

enum Wants : int64_t {
  kX = 1,
  kWeight = 2,
  kBias = 4,
  kOutputWeight = 8,
  kOutputBias = 16,
  kCondition = 32,
  kGlobal = 64,
  kHistory = 128
};

// The shape of the dilated convolution, whose output channels are the gates' two halves.
ConvShape layer_shape(const Tensor& x, const Tensor& weight, const Tensor& output_weight, const OptionalTensor& history,
                      int64_t dilation) {
  const ConvShape shape = sequence_shape(x, weight, dilation, 1);
  STD_TORCH_CHECK(weight.size(0) >= 2 && weight.size(0) % 2 == 0 && x.size(1) >= 1,
                  "seqaccel: weight must have an even number of output channels, but has shape ", shape_string(weight));
  check_tensor(output_weight, "output_weight", {-1, weight.size(0) / 2, 1}, x.scalar_type());
  STD_TORCH_CHECK(output_weight.size(0) >= x.size(1), "seqaccel: output_weight must have at least ", x.size(1),
                  " output channels, but has shape ", shape_string(output_weight));
  check_history(shape, history, x.scalar_type());
  return shape;
}

double multiply_adds(const ConvShape& s, int64_t skips) {
  const double each = double(s.out_channels) * double(s.in_channels * s.kernel_size + 8) +
                      double(s.in_channels + skips) * double(s.out_channels / 2);
  return double(s.batch) * double(s.length) * each;
}

bool run(const WaveNetForward<float>& p) { return active_wavenet_kernels().forward_float(p); }
bool run(const WaveNetForward<double>& p) { return active_wavenet_kernels().forward_double(p); }
bool run(const WaveNetBackward<float>& p) { return active_wavenet_kernels().backward_float(p); }
bool run(const WaveNetBackward<double>& p) { return active_wavenet_kernels().backward_double(p); }

template <typename F>
void with_type(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Float) {
    f(float());
  } else {
    f(double());
  }
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, Tensor output_weight,
                                           OptionalTensor output_bias, OptionalTensor skip, OptionalTensor condition,
                                           OptionalTensor global_condition, OptionalTensor history,
                                           OptionalTensor reset, int64_t dilation, bool residual, bool save) {
  ConvShape shape = layer_shape(x, weight, output_weight, history, dilation);
  const Sequences sequences(shape, reset, OptionalTensor());
  const ScalarType dtype = x.scalar_type();
  const int64_t B = x.size(0), C = x.size(1), T = x.size(2), rows = weight.size(0), S = output_weight.size(0) - C;
  if (bias) check_tensor(*bias, "bias", {rows}, dtype);
  if (output_bias) check_tensor(*output_bias, "output_bias", {C + S}, dtype);
  if (skip) check_tensor(*skip, "skip", {B, S, T}, dtype);
  if (condition) check_tensor(*condition, "condition", {B, rows, T}, dtype);
  if (global_condition) check_tensor(*global_condition, "global_condition", {B, rows}, dtype);
  for (Tensor* t : {&x, &weight, &output_weight}) *t = to_contiguous(*t);
  for (OptionalTensor* t : {&bias, &output_bias, &skip, &condition, &global_condition, &history})
    *t = to_contiguous(*t);
  const Extents none = {0};
  Tensor y = residual ? new_pooled(x, {B, C, T}) : new_tensor(x, none), next_skip = new_pooled(x, {B, S, T});
  Tensor saved = save ? new_pooled(x, {B, rows, T}) : new_tensor(x, none);
  if (B == 0 || T == 0) return {y, next_skip, saved};
  with_type(x, [&](auto zero) {
    using Value = decltype(zero);
    WaveNetForward<Value> p = {};
    p.conv = shape;
    p.skips = S;
    p.residual = residual;
    p.x = x.const_data_ptr<Value>();
    p.weight = weight.const_data_ptr<Value>();
    p.bias = data_or_null<Value>(bias);
    p.output_weight = output_weight.const_data_ptr<Value>();
    p.output_bias = data_or_null<Value>(output_bias);
    p.skip = data_or_null<Value>(skip);
    p.condition = data_or_null<Value>(condition);
    p.global_condition = data_or_null<Value>(global_condition);
    p.history = data_or_null<Value>(history);
    p.y = y.mutable_data_ptr<Value>();
    p.next_skip = next_skip.mutable_data_ptr<Value>();
    p.threads = thread_count(multiply_adds(shape, S));
    if (save) {
      p.saved = saved.mutable_data_ptr<Value>();
      p.non_temporal = beyond_l2(saved.numel() * ptrdiff_t(sizeof(Value)) / p.threads);
    }
    check_workspace(run(p));
  });
  return {y, next_skip, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    OptionalTensor grad_y, OptionalTensor grad_skip, Tensor saved, Tensor x, Tensor weight, Tensor output_weight,
    OptionalTensor history, OptionalTensor reset, int64_t dilation, int64_t wants) {
  ConvShape shape = layer_shape(x, weight, output_weight, history, dilation);
  const Sequences sequences(shape, reset, OptionalTensor());
  const ScalarType dtype = x.scalar_type();
  const int64_t B = x.size(0), C = x.size(1), T = x.size(2), rows = weight.size(0), S = output_weight.size(0) - C;
  if (grad_y) check_tensor(*grad_y, "grad_y", {B, C, T}, dtype);
  if (grad_skip) check_tensor(*grad_skip, "grad_skip", {B, S, T}, dtype);
  check_tensor(saved, "saved", {B, rows, T}, dtype);
  for (Tensor* t : {&saved, &x, &weight, &output_weight}) *t = to_contiguous(*t);
  for (OptionalTensor* t : {&grad_y, &grad_skip, &history}) *t = to_contiguous(*t);
  const auto make = [&](int64_t flag, const Extents& sizes) {
    return new_tensor(x, wants & flag ? sizes : Extents{0});
  };
  Tensor grad_x = wants & kX ? new_pooled(x, {B, C, T}) : make(kX, {});
  Tensor grad_weight = make(kWeight, {rows, C, shape.kernel_size}), grad_bias = make(kBias, {rows});
  Tensor grad_output_weight = make(kOutputWeight, {C + S, rows / 2, 1}), grad_output_bias = make(kOutputBias, {C + S});
  Tensor grad_condition = make(kCondition, {B, rows, T}), grad_global = make(kGlobal, {B, rows});
  Tensor grad_history = make(kHistory, {B, C, shape.context()});
  if (B == 0 || T == 0) {
    for (Tensor* grad :
         {&grad_weight, &grad_bias, &grad_output_weight, &grad_output_bias, &grad_global, &grad_history}) {
      if (grad->numel() > 0) torch::stable::zero_(*grad);
    }
  } else {
    // Rows an odd number of cache lines apart fall into different sets.
    const int64_t stride = wants & kCondition ? T : ((T + 15) / 16 | 1) * 16;
    Tensor gate = wants & kCondition ? grad_condition : new_pooled(x, {B, rows, stride});
    with_type(x, [&](auto zero) {
      using Value = decltype(zero);
      const auto wanted = [&](int64_t flag, Tensor& t) { return wants & flag ? t.mutable_data_ptr<Value>() : nullptr; };
      WaveNetBackward<Value> p = {};
      p.conv = shape;
      p.skips = S;
      p.grad_y = data_or_null<Value>(grad_y);
      p.grad_skip = data_or_null<Value>(grad_skip);
      p.saved = saved.const_data_ptr<Value>();
      p.x = x.const_data_ptr<Value>();
      p.weight = weight.const_data_ptr<Value>();
      p.output_weight = output_weight.const_data_ptr<Value>();
      p.history = data_or_null<Value>(history);
      p.gate = gate.mutable_data_ptr<Value>();
      p.gate_stride = stride;
      p.grad_x = wanted(kX, grad_x);
      p.grad_weight = wanted(kWeight, grad_weight);
      p.grad_bias = wanted(kBias, grad_bias);
      p.grad_output_weight = wanted(kOutputWeight, grad_output_weight);
      p.grad_output_bias = wanted(kOutputBias, grad_output_bias);
      p.grad_global = wanted(kGlobal, grad_global);
      p.grad_history = wanted(kHistory, grad_history);
      p.wants_gate = wants & kCondition;
      p.threads = thread_count(2 * multiply_adds(shape, S));
      check_workspace(run(p));
    });
  }
  return {grad_x,           grad_weight,    grad_bias,   grad_output_weight,
          grad_output_bias, grad_condition, grad_global, grad_history};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "wavenet_layer_forward(Tensor x, Tensor weight, Tensor? bias, Tensor output_weight, Tensor? output_bias, "
      "Tensor? skip, Tensor? condition, Tensor? global_condition, Tensor? history, Tensor? reset, int dilation, "
      "bool residual, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "wavenet_layer_backward(Tensor? grad_y, Tensor? grad_skip, Tensor saved, Tensor x, Tensor weight, "
      "Tensor output_weight, Tensor? history, Tensor? reset, int dilation, int wants) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("wavenet_layer_forward", TORCH_BOX(&forward));
  m.impl("wavenet_layer_backward", TORCH_BOX(&backward));
}

}  // namespace seqaccel::conv
