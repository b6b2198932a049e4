#include "cpu/conv/conv.h"

#include <omp.h>

#include "common/tensor.h"

namespace seqaccel::conv {
namespace {

constexpr int64_t kWantsX = 1, kWantsWeight = 2, kWantsBias = 4, kWantsResidual = 8, kWantsHistory = 16;

Activation parse_activation(const std::string& name) {
  const int found = activation_of(name.c_str());
  STD_TORCH_CHECK(found >= 0 && Activation(found) != Activation::elu && Activation(found) != Activation::hardswish,
                  "seqaccel: convolutions have no activation '", name, "'");
  return Activation(found);
}

ConvShape check_inputs(const Tensor& x, const Tensor& weight, const OptionalTensor& history, int64_t dilation,
                       int64_t groups) {
  check_float_or_double(x, "x");
  const ScalarType dtype = x.scalar_type();
  check_tensor(x, "x", {-1, -1, -1}, dtype);
  STD_TORCH_CHECK(dilation >= 1 && groups >= 1, "seqaccel: dilation and groups must be positive, but got ", dilation,
                  " and ", groups);
  STD_TORCH_CHECK(x.size(1) % groups == 0, "seqaccel: the channels of x, ", x.size(1),
                  ", must be divisible by groups, ", groups);
  check_tensor(weight, "weight", {-1, x.size(1) / groups, -1}, dtype);
  STD_TORCH_CHECK(weight.size(0) % groups == 0 && weight.size(2) >= 1, "seqaccel: weight must have a multiple of ",
                  groups, " output channels and at least one tap, but has shape ", shape_string(weight));
  const ConvShape shape = {ptrdiff_t(x.size(0)), ptrdiff_t(x.size(1)),      ptrdiff_t(weight.size(0)),
                           ptrdiff_t(x.size(2)), ptrdiff_t(weight.size(2)), ptrdiff_t(dilation),
                           ptrdiff_t(groups)};
  STD_TORCH_CHECK(dilation <= (int64_t(1) << 40) / weight.size(2), "seqaccel: dilation ", dilation, " is too large");
  if (history) check_tensor(*history, "history", {x.size(0), x.size(1), shape.context()}, dtype);
  return shape;
}

ConvEpilogue make_epilogue(const std::string& activation, bool relu, double dropout, const OptionalTensor& seed) {
  STD_TORCH_CHECK(dropout >= 0 && dropout <= 1, "seqaccel: dropout must be between 0 and 1, but got ", dropout);
  uint64_t seed_value = 0;
  if (dropout > 0) {
    STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1 && seed->is_cpu(),
                    "seqaccel: dropout needs a seed, an int64 tensor of one element on the CPU");
    check_memory(*seed, "seed");
    seed_value = uint64_t(seed->const_data_ptr<int64_t>()[0]);
  }
  return {parse_activation(activation), relu, dropout, seed_value};
}

void check_gates(const ConvShape& shape, const ConvEpilogue& epilogue) {
  STD_TORCH_CHECK(!is_gated(epilogue.activation) || (shape.out_channels % 2 == 0 && shape.groups == 1),
                  "seqaccel: a gated activation takes an even number of output channels and one group");
}

// What the forward keeps for the backward beside its output: nothing, a byte an element, or conv + bias.
enum class Saved { nothing, active, pre };

Saved saved_kind(const ConvEpilogue& e, bool has_residual) {
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

int thread_count(double multiply_adds) {
  constexpr double kEach = 100e3;  // what a thread must have to do to be worth waking: 3 us
  const int most = omp_in_parallel() ? 1 : omp_get_max_threads();
  return multiply_adds >= kEach * most ? most : multiply_adds < kEach ? 1 : int(multiply_adds / kEach);
}

double multiply_adds(const ConvShape& s) {
  return double(s.batch) * double(s.out_channels) * double(s.length) * double(s.group_in() * s.kernel_size + 4);
}

bool run(const ConvForward<float>& p) { return active_conv_kernels().forward_float(p); }
bool run(const ConvForward<double>& p) { return active_conv_kernels().forward_double(p); }
bool run(const ConvBackward<float>& p) { return active_conv_kernels().backward_float(p); }
bool run(const ConvBackward<double>& p) { return active_conv_kernels().backward_double(p); }

void check_workspace(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: not enough memory for the workspace of a convolution");
}

template <typename T>
void run_forward(const ConvShape& shape, const ConvEpilogue& epilogue, const Tensor& x, const Tensor& weight,
                 const OptionalTensor& bias, const OptionalTensor& residual, const OptionalTensor& history, Tensor& y,
                 Tensor& saved, Saved kind) {
  ConvForward<T> p = {};
  p.shape = shape;
  p.epilogue = epilogue;
  p.x = x.const_data_ptr<T>();
  p.weight = weight.const_data_ptr<T>();
  p.bias = data_or_null<T>(bias);
  p.residual = data_or_null<T>(residual);
  p.history = data_or_null<T>(history);
  p.y = y.mutable_data_ptr<T>();
  if (kind == Saved::pre) p.pre = saved.mutable_data_ptr<T>();
  if (kind == Saved::active) p.active = saved.mutable_data_ptr<uint8_t>();
  p.threads = thread_count(multiply_adds(shape));
  check_workspace(run(p));
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor residual,
                                   OptionalTensor history, OptionalTensor seed, int64_t dilation, int64_t groups,
                                   Text activation, bool relu, double dropout, bool save) {
  const ConvShape shape = check_inputs(x, weight, history, dilation, groups);
  const ConvEpilogue epilogue = make_epilogue(activation.value, relu, dropout, seed);
  const ScalarType dtype = x.scalar_type();
  if (bias) check_tensor(*bias, "bias", {shape.out_channels}, dtype);
  check_gates(shape, epilogue);
  const int64_t outputs = epilogue.y_channels(shape);
  if (residual) check_tensor(*residual, "residual", {shape.batch, outputs, shape.length}, dtype);
  x = to_contiguous(x);
  weight = to_contiguous(weight);
  bias = to_contiguous(bias);
  residual = to_contiguous(residual);
  history = to_contiguous(history);
  const Saved kind = save ? saved_kind(epilogue, residual.has_value()) : Saved::nothing;
  Tensor y = new_tensor(x, {shape.batch, outputs, shape.length});
  const int64_t none[] = {0}, full[] = {shape.batch, shape.out_channels, shape.length};
  Tensor saved = torch::stable::new_empty(x,
                                          kind == Saved::nothing ? torch::headeronly::IntHeaderOnlyArrayRef(none, 1)
                                                                 : torch::headeronly::IntHeaderOnlyArrayRef(full, 3),
                                          kind == Saved::active ? ScalarType::Byte : dtype);
  if (y.numel() == 0) return {y, saved};
  if (dtype == ScalarType::Float) {
    run_forward<float>(shape, epilogue, x, weight, bias, residual, history, y, saved, kind);
  } else {
    run_forward<double>(shape, epilogue, x, weight, bias, residual, history, y, saved, kind);
  }
  return {y, saved};
}

struct Gradients {
  Tensor x, weight, bias, residual, history;
};

template <typename T>
T* pointer_if(bool wanted, Tensor& t) {
  return wanted ? t.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void run_backward(const ConvShape& shape, const ConvEpilogue& epilogue, const Tensor& grad_y, const OptionalTensor& y,
                  const Tensor& saved, Saved kind, const Tensor& x, const Tensor& weight, const OptionalTensor& history,
                  const OptionalTensor& addend, int64_t wants, Gradients& grads) {
  ConvBackward<T> p = {};
  p.shape = shape;
  p.epilogue = epilogue;
  p.grad_y = grad_y.const_data_ptr<T>();
  p.y = data_or_null<T>(y);
  if (kind == Saved::pre) p.pre = saved.const_data_ptr<T>();
  if (kind == Saved::active) p.active = saved.const_data_ptr<uint8_t>();
  p.x = x.const_data_ptr<T>();
  p.weight = weight.const_data_ptr<T>();
  p.history = data_or_null<T>(history);
  p.addend = data_or_null<T>(addend);
  p.grad_x = pointer_if<T>(wants & kWantsX, grads.x);
  p.grad_weight = pointer_if<T>(wants & kWantsWeight, grads.weight);
  p.grad_bias = pointer_if<T>(wants & kWantsBias, grads.bias);
  p.grad_residual = pointer_if<T>(wants & kWantsResidual, grads.residual);
  p.grad_history = pointer_if<T>(wants & kWantsHistory, grads.history);
  p.threads = thread_count(2 * multiply_adds(shape));
  check_workspace(run(p));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_y, OptionalTensor y, Tensor saved, Tensor x,
                                                            Tensor weight, OptionalTensor history, OptionalTensor seed,
                                                            OptionalTensor addend, int64_t dilation, int64_t groups,
                                                            Text activation, bool relu, double dropout,
                                                            bool has_residual, int64_t wants) {
  const ConvShape shape = check_inputs(x, weight, history, dilation, groups);
  const ConvEpilogue epilogue = make_epilogue(activation.value, relu, dropout, seed);
  const ScalarType dtype = x.scalar_type();
  const int64_t B = shape.batch, C = shape.in_channels, O = shape.out_channels, T = shape.length, P = shape.context();
  check_gates(shape, epilogue);
  const int64_t Y = epilogue.y_channels(shape);
  check_tensor(grad_y, "grad_y", {B, Y, T}, dtype);
  const Saved kind = saved_kind(epilogue, has_residual);
  if (kind != Saved::nothing) check_tensor(saved, "saved", {B, O, T}, kind == Saved::active ? ScalarType::Byte : dtype);
  const bool needs_y = epilogue.relu || (epilogue.activation != Activation::none && kind == Saved::nothing);
  STD_TORCH_CHECK(y || !needs_y, "seqaccel: the backward of this activation needs y");
  if (y) check_tensor(*y, "y", {B, Y, T}, dtype);
  if (addend) check_tensor(*addend, "addend", {B, C, T}, dtype);
  grad_y = to_contiguous(grad_y);
  y = to_contiguous(y);
  saved = to_contiguous(saved);
  x = to_contiguous(x);
  weight = to_contiguous(weight);
  history = to_contiguous(history);
  addend = to_contiguous(addend);
  const auto make = [&](int64_t flag, std::initializer_list<int64_t> sizes) {
    return wants & flag ? new_tensor(x, sizes) : new_tensor(x, {0});
  };
  Gradients grads = {make(kWantsX, {B, C, T}), make(kWantsWeight, {O, C / shape.groups, shape.kernel_size}),
                     make(kWantsBias, {O}), make(kWantsResidual, {B, Y, T}), make(kWantsHistory, {B, C, P})};
  if (B == 0 || O == 0 || T == 0) {
    for (Tensor* grad : {&grads.x, &grads.weight, &grads.bias, &grads.history}) {
      if (grad->numel() > 0) torch::stable::zero_(*grad);
    }
  } else if (dtype == ScalarType::Float) {
    run_backward<float>(shape, epilogue, grad_y, y, saved, kind, x, weight, history, addend, wants, grads);
  } else {
    run_backward<double>(shape, epilogue, grad_y, y, saved, kind, x, weight, history, addend, wants, grads);
  }
  return {grads.x, grads.weight, grads.bias, grads.residual, grads.history};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? history, Tensor? seed, "
      "int dilation, int groups, str activation, bool relu, float dropout, bool save) -> (Tensor, Tensor)");
  m.def(
      "causal_conv1d_backward(Tensor grad_y, Tensor? y, Tensor saved, Tensor x, Tensor weight, Tensor? history, "
      "Tensor? seed, Tensor? addend, int dilation, int groups, str activation, bool relu, float dropout, "
      "bool has_residual, int wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&backward));
}

}  // namespace seqaccel::conv
