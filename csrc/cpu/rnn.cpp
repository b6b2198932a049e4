// Operators lstm_forward and lstm_backward: one layer, one direction. The products over all time steps (input
// projection, weight gradients) go to aten::mm or matmul.h; the recurrence is rnn_kernels.h.
#include "rnn.h"

#include <algorithm>

#include "matmul.h"
#include "tensor.h"

namespace seqaccel {
namespace {

constexpr int64_t kGates = 4;
constexpr int64_t kFewRows = 32;               // up to here a product reads the rows of the weight as they are
constexpr int64_t kFusedRows = 12;             // of a thread
constexpr int64_t kNarrow = 16, kSlice = 128;  // columns, and terms of a partial sum, of a sliced product
constexpr int64_t kProjectionBytes = int64_t(32) << 20;  // held at a time where nothing is kept for a backward pass

bool run(const RnnForward<float>& pass) { return active_rnn_kernels().lstm_forward_float(pass); }
bool run(const RnnForward<double>& pass) { return active_rnn_kernels().lstm_forward_double(pass); }
bool run(const RnnBackward<float>& pass) { return active_rnn_kernels().lstm_backward_float(pass); }
bool run(const RnnBackward<double>& pass) { return active_rnn_kernels().lstm_backward_double(pass); }
void run(const RowProduct<float>& product) { active_rnn_kernels().row_product_float(product); }
void run(const RowProduct<double>& product) { active_rnn_kernels().row_product_double(product); }

void check_workspace(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: out of memory for the packed weights of a recurrent layer");
}

// out = a b. Autograd lies above these operators: what they are given takes no part in it.
void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor detach(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Steps [begin, begin + count) of t [T, B, N] as a matrix [count * B, N].
Tensor steps_of(const Tensor& t, int64_t begin, int64_t count) {
  Tensor whole = t;
  return torch::stable::flatten(torch::stable::narrow(whole, 0, begin, count), 0, 1);
}

std::vector<int64_t> clamped_lengths(const OptionalTensor& lengths, int64_t batch, int64_t steps) {
  std::vector<int64_t> values;
  if (!lengths) return values;
  check_tensor(*lengths, "lengths", {batch}, ScalarType::Long);
  const Tensor dense = to_contiguous(*lengths);
  const int64_t* data = dense.const_data_ptr<int64_t>();
  values.reserve(size_t(batch));
  for (int64_t b = 0; b < batch; ++b) values.push_back(std::min(std::max(data[b], int64_t(0)), steps));
  return values;
}

struct Sizes {
  int64_t steps, batch, input, hidden;
};

Sizes check_layer(const Tensor& input, const Tensor& h_0, const Tensor& c_0, const Tensor& weight_ih,
                  const Tensor& weight_hh) {
  check_float_or_double(input, "input");
  const ScalarType dtype = input.scalar_type();
  check_tensor(input, "input", {-1, -1, -1}, dtype);
  check_tensor(weight_hh, "weight_hh", {-1, -1}, dtype);
  const Sizes sizes{input.size(0), input.size(1), input.size(2), weight_hh.size(1)};
  STD_TORCH_CHECK(sizes.hidden > 0, "seqaccel: expected weight_hh to have at least one column");
  check_tensor(weight_hh, "weight_hh", {kGates * sizes.hidden, sizes.hidden}, dtype);
  check_tensor(weight_ih, "weight_ih", {kGates * sizes.hidden, sizes.input}, dtype);
  check_tensor(h_0, "h_0", {sizes.batch, sizes.hidden}, dtype);
  check_tensor(c_0, "c_0", {sizes.batch, sizes.hidden}, dtype);
  return sizes;
}

// b_ih + b_hh, or what there is of them.
template <typename T>
std::vector<T> sum_of(const OptionalTensor& a, const OptionalTensor& b) {
  std::vector<T> sum;
  for (const OptionalTensor* part : {&a, &b}) {
    if (!*part) continue;
    const Tensor dense = to_contiguous(**part);
    const T* data = dense.const_data_ptr<T>();
    sum.resize(size_t(dense.numel()), T(0));
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += data[i];
  }
  return sum;
}

template <typename T>
void forward_steps(const Sizes& sizes, const Tensor& input, const Tensor& h_0, const Tensor& c_0,
                   const Tensor& weight_ih, const Tensor& weight_hh, const std::vector<T>& bias,
                   const std::vector<int64_t>& lengths, bool reverse, Tensor& output, Tensor& h_n, Tensor& c_n,
                   Tensor& gates, Tensor* cells, bool fused) {
  const int64_t chunk = fused ? sizes.steps : gates.size(0), rows = sizes.batch * sizes.hidden;
  const Tensor weight_t = torch::stable::transpose(weight_ih, 0, 1);
  for (int64_t done = 0; done < sizes.steps; done += chunk) {
    const int64_t steps = std::min(chunk, sizes.steps - done);
    const int64_t first = reverse ? sizes.steps - done - steps : done;
    const T* const x = input.const_data_ptr<T>() + first * sizes.batch * sizes.input;
    if (!fused && steps * sizes.batch <= kFewRows) {
      run(RowProduct<T>{steps * sizes.batch, kGates * sizes.hidden, sizes.input, x, weight_ih.const_data_ptr<T>(),
                        gates.mutable_data_ptr<T>()});
    } else if (!fused) {
      Tensor projection = steps_of(gates, 0, steps);
      mm_out(projection, steps_of(input, first, steps), weight_t);
    }
    RnnForward<T> pass{steps,
                       sizes.batch,
                       sizes.hidden,
                       first,
                       reverse,
                       lengths.empty() ? nullptr : lengths.data(),
                       done ? h_n.const_data_ptr<T>() : h_0.const_data_ptr<T>(),
                       done ? c_n.const_data_ptr<T>() : c_0.const_data_ptr<T>(),
                       weight_hh.const_data_ptr<T>(),
                       bias.empty() ? nullptr : bias.data(),
                       gates.numel() ? gates.mutable_data_ptr<T>() : nullptr,
                       output.mutable_data_ptr<T>() + first * rows,
                       cells ? cells->mutable_data_ptr<T>() : nullptr,
                       h_n.mutable_data_ptr<T>(),
                       c_n.mutable_data_ptr<T>()};
    if (fused) {
      pass.input = x;
      pass.weight_ih = weight_ih.const_data_ptr<T>();
      pass.inputs = sizes.input;
    }
    check_workspace(run(pass));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_forward(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih,
                                                                Tensor weight_hh, OptionalTensor bias_ih,
                                                                OptionalTensor bias_hh, OptionalTensor lengths,
                                                                bool reverse, bool save) {
  const Sizes sizes = check_layer(input, h_0, c_0, weight_ih, weight_hh);
  const ScalarType dtype = input.scalar_type();
  if (bias_ih) check_tensor(*bias_ih, "bias_ih", {kGates * sizes.hidden}, dtype);
  if (bias_hh) check_tensor(*bias_hh, "bias_hh", {kGates * sizes.hidden}, dtype);
  const std::vector<int64_t> valid = clamped_lengths(lengths, sizes.batch, sizes.steps);
  input = to_contiguous(detach(input));
  weight_ih = to_contiguous(detach(weight_ih));
  weight_hh = to_contiguous(weight_hh);
  h_0 = to_contiguous(h_0);
  c_0 = to_contiguous(c_0);

  const int64_t step_bytes =
      std::max<int64_t>(1, sizes.batch * kGates * sizes.hidden * (dtype == ScalarType::Double ? 8 : 4));
  const int64_t chunk = save ? sizes.steps : std::min(sizes.steps, std::max<int64_t>(1, kProjectionBytes / step_bytes));
  Tensor output = new_empty(input, {sizes.steps, sizes.batch, sizes.hidden});
  // Rows enough for each thread to run at the machine's peak: a product over all steps would only write and read its
  // result once more.
  const bool fused =
      sizes.steps >= 4 && sizes.input > 0 && sizes.batch >= kFusedRows * torch::stable::get_num_threads();
  Tensor gates = fused && !save ? new_empty(input, {0}) : new_empty(input, {chunk, sizes.batch, kGates * sizes.hidden});
  Tensor cells = save ? new_empty(input, {sizes.steps, sizes.batch, sizes.hidden}) : new_empty(input, {0});
  if (sizes.steps == 0 || sizes.batch == 0) {
    if (!save) gates = new_empty(input, {0});
    return {output, torch::stable::clone(h_0), torch::stable::clone(c_0), gates, cells};
  }
  Tensor h_n = new_empty(input, {sizes.batch, sizes.hidden});
  Tensor c_n = new_empty(input, {sizes.batch, sizes.hidden});
  Tensor* const kept = save ? &cells : nullptr;
  if (dtype == ScalarType::Float) {
    forward_steps<float>(sizes, input, h_0, c_0, weight_ih, weight_hh, sum_of<float>(bias_ih, bias_hh), valid, reverse,
                         output, h_n, c_n, gates, kept, fused);
  } else {
    forward_steps<double>(sizes, input, h_0, c_0, weight_ih, weight_hh, sum_of<double>(bias_ih, bias_hh), valid,
                          reverse, output, h_n, c_n, gates, kept, fused);
  }
  if (!save) gates = new_empty(input, {0});
  return {output, h_n, c_n, gates, cells};
}

// out = a b, a [M, K], b [K, N]. MKL sums a product of few columns in one chain over K, whose rounding error grows with
// the square root of K: such a product is taken in slices.
template <typename T>
void product(Tensor& out, const Tensor& a, const Tensor& b) {
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (N >= kNarrow || K <= kSlice) return mm_out(out, a, b);
  for (int64_t k = 0; k < K; k += kSlice) {
    matmul(Matmul<T>{M, N, std::min(kSlice, K - k), a.const_data_ptr<T>() + k * a.stride(1), a.stride(0), a.stride(1),
                     b.const_data_ptr<T>() + k * b.stride(0), b.stride(0), b.stride(1), out.mutable_data_ptr<T>(), N,
                     k > 0});
  }
}

template <typename T>
bool all_zero(const Tensor& t) {
  const T* data = t.const_data_ptr<T>();
  return std::all_of(data, data + t.numel(), [](T x) { return x == T(0); });
}

// grad_weight_hh (+)= D^T h_0, D [B, 4H] the gradients of each row's first step.
template <typename T>
void add_first_step(const Sizes& sizes, const Tensor& grad_gates, const Tensor& h_0,
                    const std::vector<int64_t>& lengths, bool reverse, Tensor& grad_weight, bool accumulate) {
  if (all_zero<T>(h_0)) {
    if (!accumulate) torch::stable::zero_(grad_weight);
    return;
  }
  const int64_t width = kGates * sizes.hidden;
  const T* const data = grad_gates.const_data_ptr<T>();
  const T* first = data + (reverse ? (sizes.steps - 1) * sizes.batch * width : 0);
  std::vector<T> gathered;
  if (reverse && !lengths.empty()) {
    gathered.resize(size_t(sizes.batch * width), T(0));
    for (int64_t b = 0; b < sizes.batch; ++b) {
      if (lengths[size_t(b)] == 0) continue;
      const T* const row = data + ((lengths[size_t(b)] - 1) * sizes.batch + b) * width;
      std::copy(row, row + width, gathered.data() + b * width);
    }
    first = gathered.data();
  }
  matmul(Matmul<T>{width, sizes.hidden, sizes.batch, first, 1, width, h_0.const_data_ptr<T>(), sizes.hidden, 1,
                   grad_weight.mutable_data_ptr<T>(), sizes.hidden, accumulate});
}

template <typename T>
void backward_steps(const Sizes& sizes, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                    const OptionalTensor& grad_c_n, const Tensor& c_0, const Tensor& weight_hh, const Tensor& gates,
                    const Tensor& cells, const std::vector<int64_t>& lengths, bool reverse, Tensor& grad_gates,
                    Tensor& grad_h_0, Tensor& grad_c_0, Tensor& grad_bias) {
  check_workspace(
      run(RnnBackward<T>{sizes.steps, sizes.batch, sizes.hidden, reverse, lengths.empty() ? nullptr : lengths.data(),
                         data_or_null<T>(grad_output), data_or_null<T>(grad_h_n), data_or_null<T>(grad_c_n),
                         c_0.const_data_ptr<T>(), weight_hh.const_data_ptr<T>(), gates.const_data_ptr<T>(),
                         cells.const_data_ptr<T>(), grad_gates.mutable_data_ptr<T>(), grad_h_0.mutable_data_ptr<T>(),
                         grad_c_0.mutable_data_ptr<T>(), grad_bias.mutable_data_ptr<T>()}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor input, Tensor h_0, Tensor c_0,
    Tensor weight_ih, Tensor weight_hh, Tensor output, Tensor gates, Tensor cells, OptionalTensor lengths, bool reverse,
    bool needs_input, bool needs_weight_ih, bool needs_weight_hh) {
  const Sizes sizes = check_layer(input, h_0, c_0, weight_ih, weight_hh);
  const ScalarType dtype = input.scalar_type();
  const int64_t T = sizes.steps, B = sizes.batch, H = sizes.hidden, width = kGates * H;
  check_tensor(output, "output", {T, B, H}, dtype);
  check_tensor(gates, "gates", {T, B, width}, dtype);
  check_tensor(cells, "cells", {T, B, H}, dtype);
  if (grad_output) check_tensor(*grad_output, "grad_output", {T, B, H}, dtype);
  if (grad_h_n) check_tensor(*grad_h_n, "grad_h_n", {B, H}, dtype);
  if (grad_c_n) check_tensor(*grad_c_n, "grad_c_n", {B, H}, dtype);
  const std::vector<int64_t> valid = clamped_lengths(lengths, B, T);
  input = to_contiguous(detach(input));
  weight_ih = to_contiguous(detach(weight_ih));
  output = to_contiguous(detach(output));
  weight_hh = to_contiguous(weight_hh);
  gates = to_contiguous(gates);
  cells = to_contiguous(cells);
  h_0 = to_contiguous(h_0);
  c_0 = to_contiguous(c_0);
  grad_output = to_contiguous(grad_output);
  grad_h_n = to_contiguous(grad_h_n);
  grad_c_n = to_contiguous(grad_c_n);

  const auto wanted = [&](bool needed, std::initializer_list<int64_t> shape) {
    return needed ? new_empty(input, shape) : new_empty(input, {0});
  };
  Tensor grad_input = wanted(needs_input, {T, B, sizes.input});
  Tensor grad_weight_ih = wanted(needs_weight_ih, {width, sizes.input});
  Tensor grad_weight_hh = wanted(needs_weight_hh, {width, H});
  Tensor grad_h_0 = new_empty(input, {B, H});
  Tensor grad_c_0 = new_empty(input, {B, H});
  Tensor grad_bias = new_empty(input, {width});
  if (T == 0 || B == 0) {
    for (Tensor* grad : {&grad_weight_ih, &grad_weight_hh, &grad_bias, &grad_h_0, &grad_c_0})
      torch::stable::zero_(*grad);
    if (grad_h_n) torch::stable::copy_(grad_h_0, *grad_h_n);
    if (grad_c_n) torch::stable::copy_(grad_c_0, *grad_c_n);
    return {grad_input, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias};
  }

  Tensor grad_gates = new_empty(input, {T, B, width});
  const bool single = dtype == ScalarType::Float;
  (single ? backward_steps<float> : backward_steps<double>)(sizes, grad_output, grad_h_n, grad_c_n, c_0, weight_hh,
                                                            gates, cells, valid, reverse, grad_gates, grad_h_0,
                                                            grad_c_0, grad_bias);
  const auto multiply = single ? product<float> : product<double>;
  const Tensor rows = steps_of(grad_gates, 0, T);
  if (needs_input) {
    Tensor flat = steps_of(grad_input, 0, T);
    multiply(flat, rows, weight_ih);
  }
  if (needs_weight_ih) multiply(grad_weight_ih, torch::stable::transpose(rows, 0, 1), steps_of(input, 0, T));
  if (needs_weight_hh) {
    if (T > 1) {
      multiply(grad_weight_hh, torch::stable::transpose(steps_of(grad_gates, reverse ? 0 : 1, T - 1), 0, 1),
               steps_of(output, reverse ? 1 : 0, T - 1));
    }
    (single ? add_first_step<float> : add_first_step<double>)(sizes, grad_gates, h_0, valid, reverse, grad_weight_hh,
                                                              T > 1);
  }
  return {grad_input, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "lstm_forward(Tensor input, Tensor h_0, Tensor c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
      "Tensor? bias_hh, Tensor? lengths, bool reverse, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor input, Tensor h_0, Tensor c_0, "
      "Tensor weight_ih, Tensor weight_hh, Tensor output, Tensor gates, Tensor cells, Tensor? lengths, bool reverse, "
      "bool needs_input, bool needs_weight_ih, bool needs_weight_hh) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("lstm_forward", TORCH_BOX(&lstm_forward));
  m.impl("lstm_backward", TORCH_BOX(&lstm_backward));
}

}  // namespace seqaccel
