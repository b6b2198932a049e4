// The operators of a closed-form continuous-time recurrence: checks, sizes, allocation.
#include "cpu/rnn/cfc.h"

#include "common/tensor.h"
#include "cpu/base/pool.h"

namespace seqaccel::rnn {
namespace {

// The operands that both operators share, contiguous once they are checked.
struct Operands {
  std::vector<Tensor> weights;
  OptionalTensor timespans, w, a, reset;
  CfcMode mode;
  CfcActivation activation;
  int64_t T, B, H;

  int heads() const { return mode == CfcMode::pure ? 1 : 4; }
  int matrices() const { return int(weights.size()); }
  int64_t width(int i) const { return weights[size_t(i)].size(0); }

  // With rows [T, B, H], or what has as many steps and sequences.
  void check(const std::string& mode_name, const std::string& activation_name, const Tensor& rows, int64_t units) {
    const ScalarType dtype = rows.scalar_type();
    T = rows.size(0);
    B = rows.size(1);
    H = units;
    STD_TORCH_CHECK(mode_name == "default" || mode_name == "no_gate" || mode_name == "pure",
                    "seqaccel: expected mode to be default, no_gate or pure, but got ", mode_name);
    mode = mode_name == "pure" ? CfcMode::pure : mode_name == "default" ? CfcMode::gated : CfcMode::ungated;
    STD_TORCH_CHECK(activation_name == "lecun_tanh" || activation_name == "tanh" || activation_name == "relu",
                    "seqaccel: expected activation to be lecun_tanh, tanh or relu, but got ", activation_name);
    activation = activation_name == "relu"   ? CfcActivation::relu
                 : activation_name == "tanh" ? CfcActivation::tanh
                                             : CfcActivation::lecun_tanh;
    STD_TORCH_CHECK(H > 0, "seqaccel: expected at least one unit");
    STD_TORCH_CHECK(!weights.empty() && matrices() <= kCfcMatrices, "seqaccel: expected 1 to ", int64_t(kCfcMatrices),
                    " weights, but got ", int64_t(weights.size()));
    int64_t width = H;
    for (Tensor& weight : weights) {
      check_tensor(weight, "a weight", {-1, width}, dtype);
      width = weight.size(0);
      STD_TORCH_CHECK(width > 0, "seqaccel: expected a weight to have at least one row");
      weight = to_contiguous(weight);
    }
    STD_TORCH_CHECK(width == heads() * H, "seqaccel: expected the last weight to have ", heads() * H, " rows, but got ",
                    width);
    STD_TORCH_CHECK(bool(w) == (mode == CfcMode::pure) && bool(a) == bool(w),
                    "seqaccel: expected w and a to be given just for the mode pure");
    if (timespans) check_tensor(*timespans, "timespans", {T, B}, dtype);
    if (reset) check_tensor(*reset, "reset", {T, B}, ScalarType::Bool);
    if (w) check_tensor(*w, "w", {H}, dtype);
    if (a) check_tensor(*a, "a", {H}, dtype);
    for (OptionalTensor* t : {&timespans, &w, &a, &reset}) *t = to_contiguous(*t);
  }

  template <typename V>
  void put(Cfc<V>& to) const {
    to.steps = T;
    to.batch = B;
    to.hidden = H;
    to.matrices = matrices();
    to.mode = mode;
    to.activation = activation;
    to.widths[0] = H;
    for (int i = 0; i < matrices(); ++i) {
      to.widths[i + 1] = width(i);
      to.weights[i] = weights[size_t(i)].const_data_ptr<V>();
    }
    to.timespans = data_or_null<V>(timespans);
    to.reset = data_or_null<bool>(reset);
    to.w = data_or_null<V>(w);
    to.a = data_or_null<V>(a);
  }
};

void check_memory_for_weights(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: not enough memory for the packed weights of a recurrent layer");
}

std::tuple<Tensor, std::vector<Tensor>> cfc_forward(Tensor x, Tensor h_0, std::vector<Tensor> weights,
                                                    std::vector<Tensor> biases, OptionalTensor timespans,
                                                    OptionalTensor w, OptionalTensor a, Text mode, Text activation,
                                                    bool save, OptionalTensor reset) {
  check_float_or_double(x, "x");
  const ScalarType dtype = x.scalar_type();
  check_tensor(x, "x", {-1, -1, -1}, dtype);
  check_tensor(h_0, "h_0", {x.size(1), -1}, dtype);
  Operands o{weights, timespans, w, a, reset};
  o.check(mode.value, activation.value, x, h_0.size(1));
  check_tensor(x, "x", {o.T, o.B, o.width(0)}, dtype);
  STD_TORCH_CHECK(biases.size() + 1 == weights.size(), "seqaccel: expected ", int64_t(weights.size()) - 1,
                  " biases, but got ", int64_t(biases.size()));
  for (size_t i = 0; i < biases.size(); ++i) {
    check_tensor(biases[i], "a bias", {o.width(int(i) + 1)}, dtype);
    biases[i] = to_contiguous(biases[i]);
  }
  x = to_contiguous(x);
  h_0 = to_contiguous(h_0);
  Tensor output = new_pooled(x, {o.T, o.B, o.H});
  std::vector<Tensor> kept;
  for (int i = 0; i < o.matrices(); ++i) kept.push_back(new_pooled(x, {save ? o.T : 1, o.B, o.width(i)}));
  const auto run = [&](auto zero, auto kernel) {
    using V = decltype(zero);
    CfcForward<V> pass{};
    o.put<V>(pass);
    pass.x = x.const_data_ptr<V>();
    pass.h_0 = h_0.const_data_ptr<V>();
    pass.keeps = save;
    for (int i = 0; i < o.matrices(); ++i) {
      if (i > 0) pass.biases[i] = biases[size_t(i) - 1].const_data_ptr<V>();
      pass.activations[i] = kept[size_t(i)].mutable_data_ptr<V>();
    }
    pass.output = output.mutable_data_ptr<V>();
    check_memory_for_weights(kernel(pass));
  };
  if (output.numel() > 0) {
    const CfcKernels& kernels = active_cfc_kernels();
    dtype == ScalarType::Float ? run(0.0f, kernels.forward_float) : run(0.0, kernels.forward_double);
  }
  if (!save) kept.clear();
  return {output, kept};
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> cfc_backward(Tensor grad_output, std::vector<Tensor> weights,
                                                             std::vector<Tensor> saved, OptionalTensor timespans,
                                                             OptionalTensor w, OptionalTensor a, Text mode,
                                                             Text activation, bool keep, OptionalTensor reset) {
  check_float_or_double(grad_output, "grad_output");
  const ScalarType dtype = grad_output.scalar_type();
  check_tensor(grad_output, "grad_output", {-1, -1, -1}, dtype);
  Operands o{weights, timespans, w, a, reset};
  o.check(mode.value, activation.value, grad_output, grad_output.size(2));
  STD_TORCH_CHECK(saved.size() == weights.size(), "seqaccel: expected ", int64_t(weights.size()),
                  " saved tensors, but got ", int64_t(saved.size()));
  std::vector<Tensor> grads;
  for (int i = 0; i < o.matrices(); ++i) {
    check_tensor(saved[size_t(i)], "a saved tensor", {o.T, o.B, o.width(i)}, dtype);
    saved[size_t(i)] = to_contiguous(saved[size_t(i)]);
    grads.push_back(new_pooled(grad_output, {o.T, o.B, o.width(i)}));
  }
  grad_output = to_contiguous(grad_output);
  Tensor grad_h_0 = new_tensor(grad_output, {o.B, o.H});
  Tensor grad_h = keep ? new_pooled(grad_output, {o.T, o.B, o.H}) : new_tensor(grad_output, {0});
  const auto run = [&](auto zero, auto kernel) {
    using V = decltype(zero);
    CfcBackward<V> pass{};
    o.put<V>(pass);
    pass.grad_output = grad_output.const_data_ptr<V>();
    for (int i = 0; i < o.matrices(); ++i) {
      pass.activations[i] = saved[size_t(i)].const_data_ptr<V>();
      pass.grads[i] = grads[size_t(i)].mutable_data_ptr<V>();
    }
    pass.grad_h = keep ? grad_h.mutable_data_ptr<V>() : nullptr;
    pass.grad_h_0 = grad_h_0.mutable_data_ptr<V>();
    check_memory_for_weights(kernel(pass));
  };
  if (grad_output.numel() > 0) {
    const CfcKernels& kernels = active_cfc_kernels();
    dtype == ScalarType::Float ? run(0.0f, kernels.backward_float) : run(0.0, kernels.backward_double);
  } else {
    torch::stable::zero_(grad_h_0);
  }
  return {grad_h_0, grads, grad_h};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "cfc_forward(Tensor x, Tensor h_0, Tensor[] weights, Tensor[] biases, Tensor? timespans, Tensor? w, Tensor? a, "
      "str mode, str activation, bool save, Tensor? reset=None) -> (Tensor, Tensor[])");
  m.def(
      "cfc_backward(Tensor grad_output, Tensor[] weights, Tensor[] saved, Tensor? timespans, Tensor? w, Tensor? a, "
      "str mode, str activation, bool keep, Tensor? reset=None) -> (Tensor, Tensor[], Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("cfc_forward", TORCH_BOX(&cfc_forward));
  m.impl("cfc_backward", TORCH_BOX(&cfc_backward));
}

}  // namespace seqaccel::rnn
