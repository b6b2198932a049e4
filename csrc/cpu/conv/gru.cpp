// A step of a convolutional GRU on a grid as one operator. With convolutions that are centred along both dimensions,
//
//   u, r = s(Wg * x + bg),   c = tanh(W * (r x) + b),   y = u x + (1 - u) c
//
// It runs the passes of conv.h and, between them, those of gru.h. Backward: what comes to x past the convolutions is in
// its gradient when the first convolution adds its own.
#include "cpu/conv/gru.h"

#include "cpu/base/pool.h"
#include "cpu/conv/checks.h"

namespace seqaccel::conv {
namespace {

// Bits of `wants`, in the order of the results.
constexpr int64_t kX = 1, kGateWeight = 2, kGateBias = 4, kWeight = 8, kBias = 16;

// A row of a kernel's taps lies in a row of the grid [B, C, rows, columns].
ConvShape centred_shape(const Tensor& x, const Tensor& weight) {
  const int64_t columns = x.size(3), row_taps = weight.size(2), column_taps = weight.size(3);
  ConvShape shape = {x.size(0), x.size(1), weight.size(0), x.size(2) * columns, row_taps * column_taps, 1, 1};
  if (column_taps == 1) {  // a sequence
    shape.dilation = columns;
  } else {
    shape.width = columns;
    shape.column_taps = column_taps;
  }
  shape.ahead = row_taps / 2 * columns;
  return shape;
}

void check_weight(const Tensor& weight, const char* name, const Tensor& x, int64_t outputs) {
  check_tensor(weight, name, {outputs, x.size(1), -1, -1}, x.scalar_type());
  STD_TORCH_CHECK(weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1, "seqaccel: ", name,
                  " must have an odd number of taps along both dimensions, but has shape ", shape_string(weight));
  check_dilation(1, weight.size(2) * weight.size(3), x.size(3));
}

// The arguments, contiguous.
struct Step {
  Tensor x, gate_weight, weight;
  ConvShape first, second;

  Step(const Tensor& given, const Tensor& gates, const Tensor& candidate) {
    check_float_or_double(given, "x");
    check_tensor(given, "x", {-1, -1, -1, -1}, given.scalar_type());
    check_weight(gates, "weight_gates", given, 2 * given.size(1));
    check_weight(candidate, "weight_candidate", given, given.size(1));
    x = to_contiguous(given);
    gate_weight = to_contiguous(gates);
    weight = to_contiguous(candidate);
    if (empty()) return;
    first = centred_shape(x, gate_weight);
    second = centred_shape(x, weight);
  }
  bool empty() const { return x.numel() == 0; }
  Extents grid(int64_t channels) const { return {x.size(0), channels, x.size(2), x.size(3)}; }
  int64_t channels() const { return x.size(1); }
};

template <typename T>
const GruPasses<T>& passes();
template <>
const GruPasses<float>& passes<float>() {
  return active_gru_kernels().of_float;
}
template <>
const GruPasses<double>& passes<double>() {
  return active_gru_kernels().of_double;
}

template <typename T>
GruGates<T> gates_of(const Step& step, bool hard) {
  constexpr double kEachValue = 20;  // of the time of a multiplication and addition in a product
  GruGates<T> p = {};
  p.batch = step.x.size(0);
  p.size = step.first.in_channels * step.first.length;
  p.hard = hard;
  p.x = step.x.const_data_ptr<T>();
  p.threads = thread_count(kEachValue * double(step.x.numel()));
  return p;
}

template <typename T>
void convolve(const ConvShape& shape, Activation activation, const T* x, const Tensor& weight,
              const OptionalTensor& bias, T* y) {
  ConvForward<T> p = {};
  p.shape = shape;
  p.epilogue = {activation, false, 0, 0};
  p.x = x;
  p.weight = weight.const_data_ptr<T>();
  p.bias = data_or_null<T>(bias);
  p.y = y;
  p.threads = thread_count(multiply_adds(shape));
  check_workspace(run(p));
}

template <typename T>
void run_forward(const Step& step, const OptionalTensor& gate_bias, const OptionalTensor& bias, bool hard, Tensor& y,
                 Tensor& gates, Tensor& candidate) {
  Tensor reset = new_pooled(step.x, step.grid(step.channels()));
  GruGates<T> p = gates_of<T>(step, hard);
  p.gates = gates.mutable_data_ptr<T>();
  p.reset = reset.mutable_data_ptr<T>();
  p.y = y.mutable_data_ptr<T>();
  T* const c = candidate.mutable_data_ptr<T>();
  p.candidate = c;
  convolve<T>(step.first, Activation::none, p.x, step.gate_weight, gate_bias, p.gates);
  passes<T>().reset(p);
  convolve<T>(step.second, Activation::tanh, p.reset, step.weight, bias, c);
  passes<T>().update(p);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight_gates, OptionalTensor bias_gates,
                                           Tensor weight_candidate, OptionalTensor bias_candidate, bool hard,
                                           bool save) {
  const Step step(x, weight_gates, weight_candidate);
  const int64_t C = step.channels();
  if (bias_gates) check_tensor(*bias_gates, "bias_gates", {2 * C}, x.scalar_type());
  if (bias_candidate) check_tensor(*bias_candidate, "bias_candidate", {C}, x.scalar_type());
  bias_gates = to_contiguous(bias_gates);
  bias_candidate = to_contiguous(bias_candidate);
  const auto make = [&](int64_t channels) {
    return save ? new_tensor(x, step.grid(channels)) : new_pooled(x, step.grid(channels));
  };
  Tensor y = new_tensor(x, step.grid(C)), gates = make(2 * C), candidate = make(C);
  if (!step.empty()) {
    (x.scalar_type() == ScalarType::Float ? run_forward<float> : run_forward<double>)(step, bias_gates, bias_candidate,
                                                                                      hard, y, gates, candidate);
  }
  if (!save) return {y, new_tensor(x, {0}), new_tensor(x, {0})};
  return {y, gates, candidate};
}

// Those not wanted are empty.
struct GruGradients {
  Tensor x, gate_weight, gate_bias, weight, bias;
};

template <typename T>
T* pointer_of(Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void differentiate(const ConvShape& shape, const T* grad_y, const T* x, const Tensor& weight, const T* addend,
                   T* grad_x, Tensor& grad_weight, Tensor& grad_bias) {
  ConvBackward<T> p = {};
  p.shape = shape;
  p.epilogue = {Activation::none, false, 0, 0};
  p.grad_y = grad_y;
  p.x = x;
  p.weight = weight.const_data_ptr<T>();
  p.addend = addend;
  p.grad_x = grad_x;
  p.grad_weight = pointer_of<T>(grad_weight);
  p.grad_bias = pointer_of<T>(grad_bias);
  p.threads = thread_count(2 * multiply_adds(shape));
  check_workspace(run(p));
}

template <typename T>
void run_backward(const Step& step, const Tensor& grad_y, const Tensor& gates, const Tensor& candidate, bool hard,
                  GruGradients& grads) {
  const int64_t C = step.channels();
  Tensor reset = new_pooled(step.x, step.grid(C)), grad_candidate = new_pooled(step.x, step.grid(C));
  Tensor grad_gates = new_pooled(step.x, step.grid(2 * C));
  GruGates<T> p = gates_of<T>(step, hard);
  p.gates = const_cast<T*>(gates.const_data_ptr<T>());  // read only here
  p.candidate = candidate.const_data_ptr<T>();
  p.reset = reset.mutable_data_ptr<T>();
  p.grad_y = grad_y.const_data_ptr<T>();
  p.grad_gates = grad_gates.mutable_data_ptr<T>();
  p.grad_candidate = grad_candidate.mutable_data_ptr<T>();
  p.grad_x = pointer_of<T>(grads.x);
  passes<T>().update_backward(p);
  const bool wants_first = p.grad_x || grads.gate_weight.numel() > 0 || grads.gate_bias.numel() > 0;
  Tensor grad_reset = new_pooled(step.x, step.grid(wants_first ? C : 0));
  if (wants_first || grads.weight.numel() > 0 || grads.bias.numel() > 0) {
    differentiate<T>(step.second, p.grad_candidate, p.reset, step.weight, nullptr, pointer_of<T>(grad_reset),
                     grads.weight, grads.bias);
  }
  if (!wants_first) return;
  p.grad_reset = grad_reset.const_data_ptr<T>();
  passes<T>().reset_backward(p);
  differentiate<T>(step.first, p.grad_gates, p.x, step.gate_weight, p.grad_x, p.grad_x, grads.gate_weight,
                   grads.gate_bias);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_y, Tensor gates, Tensor candidate, Tensor x,
                                                            Tensor weight_gates, Tensor weight_candidate, bool hard,
                                                            int64_t wants) {
  const Step step(x, weight_gates, weight_candidate);
  const int64_t B = x.size(0), C = x.size(1), rows = x.size(2), columns = x.size(3);
  const ScalarType dtype = x.scalar_type();
  check_tensor(grad_y, "grad_y", {B, C, rows, columns}, dtype);
  check_tensor(gates, "gates", {B, 2 * C, rows, columns}, dtype);
  check_tensor(candidate, "candidate", {B, C, rows, columns}, dtype);
  const auto make = [&](int64_t bit, const Extents& sizes) { return new_tensor(x, wants & bit ? sizes : Extents{0}); };
  GruGradients grads = {make(kX, step.grid(C)), make(kGateWeight, sizes_of(weight_gates)), make(kGateBias, {2 * C}),
                        make(kWeight, sizes_of(weight_candidate)), make(kBias, {C})};
  if (step.empty()) {
    for (Tensor* grad : {&grads.x, &grads.gate_weight, &grads.gate_bias, &grads.weight, &grads.bias}) {
      if (grad->numel() > 0) torch::stable::zero_(*grad);
    }
  } else {
    (dtype == ScalarType::Float ? run_backward<float> : run_backward<double>)(step, to_contiguous(grad_y),
                                                                              to_contiguous(gates),
                                                                              to_contiguous(candidate), hard, grads);
  }
  return {grads.x, grads.gate_weight, grads.gate_bias, grads.weight, grads.bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "convolutional_gru_forward(Tensor x, Tensor weight_gates, Tensor? bias_gates, Tensor weight_candidate, "
      "Tensor? bias_candidate, bool hard, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "convolutional_gru_backward(Tensor grad_y, Tensor gates, Tensor candidate, Tensor x, Tensor weight_gates, "
      "Tensor weight_candidate, bool hard, int wants) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("convolutional_gru_forward", TORCH_BOX(&forward));
  m.impl("convolutional_gru_backward", TORCH_BOX(&backward));
}

}  // namespace seqaccel::conv
