// The residual block of a temporal convolutional network as one operator:
//
//   z = dropout(a1(W1 * x + b1)),   s = r + dropout(a2(W2 * z + b2)),   y = relu(s) or s
//
// with W = g v / |v| where a g is given, and r = x or its 1x1 convolution. It runs the passes of conv.h. The dropout
// masks come from the two values of the seed. Forward: r is written to y, where the second convolution finds it.
// Backward: the second convolution leaves the gradient of r in the place of x's, and the first adds its own.
#include "cpu/base/pool.h"
#include "cpu/conv/checks.h"
#include "cpu/conv/segments.h"
#include "cpu/conv/weight_norm.h"

namespace seqaccel::conv {
namespace {

// Bits of `wants`, in the order of the results.
constexpr int64_t kX = 1, kWeight1 = 2, kG1 = 4, kBias1 = 8, kWeight2 = 16, kG2 = 32, kBias2 = 64, kDownWeight = 128,
                  kDownBias = 256;

// The arguments, contiguous.
struct Block {
  Tensor x, weight_1;
  OptionalTensor g_1, bias_1;
  Tensor weight_2;
  OptionalTensor g_2, bias_2, down_weight, down_bias;
  ConvShape first, second, down;
  ConvEpilogue epilogue_1, epilogue_2;
  ScalarType dtype;

  int64_t batch() const { return first.batch; }
  int64_t channels() const { return second.out_channels; }
  int64_t length() const { return first.length; }
  bool empty() const { return batch() == 0 || channels() == 0 || length() == 0; }
};

OptionalTensor checked(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes,
                       ScalarType dtype) {
  if (t) check_tensor(*t, name, sizes, dtype);
  return to_contiguous(t);
}

Block make_block(const Tensor& x, const Tensor& weight_1, const OptionalTensor& g_1, const OptionalTensor& bias_1,
                 const Tensor& weight_2, const OptionalTensor& g_2, const OptionalTensor& bias_2,
                 const OptionalTensor& down_weight, const OptionalTensor& down_bias, const OptionalTensor& seed,
                 int64_t dilation, const std::string& activation_1, const std::string& activation_2, bool relu,
                 double dropout) {
  check_float_or_double(x, "x");
  const ScalarType dtype = x.scalar_type();
  check_tensor(x, "x", {-1, -1, -1}, dtype);
  const int64_t B = x.size(0), C = x.size(1), T = x.size(2);
  check_tensor(weight_1, "weight_1", {-1, C, -1}, dtype);
  const Activation a1 = parse_activation(activation_1), a2 = parse_activation(activation_2);
  STD_TORCH_CHECK(!is_gated(a2), "seqaccel: activation_2 must keep the channels, but is '", activation_2, "'");
  const int64_t rows = weight_1.size(0), halves = is_gated(a1) ? 2 : 1, O = rows / halves;
  STD_TORCH_CHECK(rows % halves == 0, "seqaccel: a gated activation takes an even number of output channels");
  check_tensor(weight_2, "weight_2", {O, O, -1}, dtype);
  STD_TORCH_CHECK(weight_1.size(2) >= 1 && weight_2.size(2) >= 1, "seqaccel: expected weights to have a tap at least");
  STD_TORCH_CHECK(down_weight || C == O, "seqaccel: expected downsample_weight where x has ", C, " channels and y ", O);
  STD_TORCH_CHECK(down_weight || !down_bias, "seqaccel: expected downsample_weight with downsample_bias");
  check_dilation(dilation, std::max(weight_1.size(2), weight_2.size(2)));
  STD_TORCH_CHECK(dropout >= 0 && dropout <= 1, "seqaccel: dropout must be between 0 and 1, but got ", dropout);
  uint64_t seeds[2] = {};
  if (dropout > 0) {
    STD_TORCH_CHECK(seed.has_value(), "seqaccel: dropout needs a seed, an int64 tensor of two elements");
    check_tensor(*seed, "seed", {2}, ScalarType::Long);
    for (int i = 0; i < 2; ++i) seeds[i] = uint64_t(seed->const_data_ptr<int64_t>()[i * seed->stride(0)]);
  }
  return {to_contiguous(x),
          to_contiguous(weight_1),
          checked(g_1, "g_1", {rows, 1, 1}, dtype),
          checked(bias_1, "bias_1", {rows}, dtype),
          to_contiguous(weight_2),
          checked(g_2, "g_2", {O, 1, 1}, dtype),
          checked(bias_2, "bias_2", {O}, dtype),
          checked(down_weight, "downsample_weight", {O, C, 1}, dtype),
          checked(down_bias, "downsample_bias", {O}, dtype),
          {B, C, rows, T, weight_1.size(2), dilation, 1},
          {B, O, O, T, weight_2.size(2), dilation, 1},
          {B, C, O, T, 1, 1, 1},
          {a1, false, dropout, seeds[0]},
          {a2, relu, dropout, seeds[1]},
          dtype};
}

void normalize(const WeightNorm<float>& p) { active_weight_norm_kernels().forward_float(p); }
void normalize(const WeightNorm<double>& p) { active_weight_norm_kernels().forward_double(p); }
void differentiate(const WeightNorm<float>& p) { active_weight_norm_kernels().backward_float(p); }
void differentiate(const WeightNorm<double>& p) { active_weight_norm_kernels().backward_double(p); }

template <typename T>
WeightNorm<T> norm_of(const Tensor& v, const Tensor& g, Tensor& weight) {
  const ptrdiff_t rows = v.size(0), columns = v.size(1) * v.size(2);
  constexpr double kEachElement = 2;  // of the time of a multiplication and addition in a product: it waits for memory
  return {rows,
          columns,
          v.const_data_ptr<T>(),
          g.const_data_ptr<T>(),
          weight.mutable_data_ptr<T>(),
          nullptr,
          thread_count(kEachElement * double(v.numel()))};
}

// W, in new memory where it is not v itself.
template <typename T>
Tensor weight_of(const Tensor& v, const OptionalTensor& g) {
  if (!g || v.numel() == 0) return v;
  Tensor weight = new_pooled(v, sizes_of(v));
  normalize(norm_of<T>(v, *g, weight));
  return weight;
}

template <typename T>
void run_forward(const Block& a, Tensor& y, Tensor& z, Tensor& saved_1, Tensor& saved_2) {
  const Tensor weight_1 = weight_of<T>(a.weight_1, a.g_1), weight_2 = weight_of<T>(a.weight_2, a.g_2);
  ConvForward<T> first = {}, second = {}, down = {};
  down.shape = a.down;
  down.x = first.x = a.x.const_data_ptr<T>();
  first.shape = a.first;
  first.epilogue = a.epilogue_1;
  first.weight = weight_1.const_data_ptr<T>();
  first.bias = data_or_null<T>(a.bias_1);
  first.y = z.mutable_data_ptr<T>();
  second.shape = a.second;
  second.epilogue = a.epilogue_2;
  second.x = first.y;
  second.weight = weight_2.const_data_ptr<T>();
  second.bias = data_or_null<T>(a.bias_2);
  second.residual = first.x;
  second.y = y.mutable_data_ptr<T>();
  if (saved_1.numel() > 0) first.pre = saved_1.mutable_data_ptr<T>();
  if (saved_2.numel() > 0) {
    if (saved_2.scalar_type() == ScalarType::Byte) {
      second.active = saved_2.mutable_data_ptr<uint8_t>();
    } else {
      second.pre = saved_2.mutable_data_ptr<T>();
    }
  }
  if (a.down_weight) {
    down.weight = a.down_weight->const_data_ptr<T>();
    down.bias = data_or_null<T>(a.down_bias);
    down.y = second.y;
    second.residual = second.y;
  }
  for (ConvForward<T>* p : {&down, &first, &second}) {
    if (p->y == nullptr || (p == &down && !a.down_weight)) continue;
    p->threads = thread_count(multiply_adds(p->shape));
    check_workspace(run(*p));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight_1, OptionalTensor g_1, OptionalTensor bias_1,
                                                   Tensor weight_2, OptionalTensor g_2, OptionalTensor bias_2,
                                                   OptionalTensor down_weight, OptionalTensor down_bias,
                                                   OptionalTensor seed, OptionalTensor reset, int64_t dilation,
                                                   Text activation_1, Text activation_2, bool relu, double dropout,
                                                   bool save) {
  Block a = make_block(x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, down_weight, down_bias, seed, dilation,
                       activation_1.value, activation_2.value, relu, dropout);
  const Sequences episodes(a.first, reset, OptionalTensor());  // (the one of one tap sees one step only)
  a.second.divide_as(a.first);
  const int64_t B = a.batch(), O = a.channels(), T = a.length();
  const auto make_saved = [&](Saved kind, int64_t channels) {
    const int64_t none[] = {0}, full[] = {B, channels, T};
    return torch::stable::new_empty(x,
                                    kind == Saved::nothing ? torch::headeronly::IntHeaderOnlyArrayRef(none, 1)
                                                           : torch::headeronly::IntHeaderOnlyArrayRef(full, 3),
                                    kind == Saved::active ? ScalarType::Byte : a.dtype);
  };
  Tensor y = new_tensor(x, {B, O, T}), z = save ? new_tensor(x, {B, O, T}) : new_pooled(x, {B, O, T});
  Tensor saved_1 = make_saved(save ? saved_kind(a.epilogue_1, false) : Saved::nothing, a.first.out_channels);
  Tensor saved_2 = make_saved(save ? saved_kind(a.epilogue_2, true) : Saved::nothing, O);
  const bool is_float = a.dtype == ScalarType::Float;
  if (!a.empty()) (is_float ? run_forward<float> : run_forward<double>)(a, y, z, saved_1, saved_2);
  return {y, save ? z : new_tensor(x, {0}), saved_1, saved_2};
}

// Gradients, in the order of the bits of `wants`; those not wanted are empty.
struct BlockGradients {
  Tensor x, weight_1, g_1, bias_1, weight_2, g_2, bias_2, down_weight, down_bias;
};

template <typename T>
T* pointer_of(Tensor& t) {
  return t.numel() > 0 ? t.mutable_data_ptr<T>() : nullptr;
}

template <typename T>
void run_backward(const Block& a, const Tensor& grad_y, const OptionalTensor& y, const Tensor& z, const Tensor& saved_1,
                  const Tensor& saved_2, BlockGradients& grads) {
  const bool relu = a.epilogue_2.relu, has_down = a.down_weight.has_value();
  T* const grad_x = pointer_of<T>(grads.x);
  // What the caller wants of the first convolution needs the gradient of z; what of r, the sum's.
  const bool wants_first = grad_x || grads.weight_1.numel() > 0 || grads.bias_1.numel() > 0;
  const bool wants_down = has_down && (grad_x || grads.down_weight.numel() > 0 || grads.down_bias.numel() > 0);
  const int64_t B = a.batch(), O = a.channels(), L = a.length();
  Tensor grad_z = new_pooled(a.x, {wants_first ? B : 0, O, L});
  Tensor grad_sum = new_pooled(a.x, {relu && wants_down ? B : 0, O, L});
  ConvBackward<T> second = {}, down = {}, first = {};

  second.shape = a.second;
  second.epilogue = a.epilogue_2;
  second.grad_y = grad_y.const_data_ptr<T>();
  second.y = data_or_null<T>(y);
  second.x = z.const_data_ptr<T>();
  if (saved_2.numel() > 0 && saved_2.scalar_type() == ScalarType::Byte) {
    second.active = saved_2.const_data_ptr<uint8_t>();
  } else if (saved_2.numel() > 0) {
    second.pre = saved_2.const_data_ptr<T>();
  }
  second.grad_x = pointer_of<T>(grad_z);
  second.grad_weight = pointer_of<T>(grads.weight_2);
  second.grad_bias = pointer_of<T>(grads.bias_2);
  second.grad_residual = !relu ? nullptr : has_down ? pointer_of<T>(grad_sum) : grad_x;

  down.shape = a.down;
  down.grad_y = relu ? pointer_of<T>(grad_sum) : second.grad_y;
  down.x = first.x = a.x.const_data_ptr<T>();
  down.weight = data_or_null<T>(a.down_weight);
  down.grad_x = first.grad_x = grad_x;
  down.grad_weight = pointer_of<T>(grads.down_weight);
  down.grad_bias = pointer_of<T>(grads.down_bias);

  first.shape = a.first;
  first.epilogue = a.epilogue_1;
  first.grad_y = second.grad_x;
  first.y = second.x;
  if (saved_1.numel() > 0) first.pre = saved_1.const_data_ptr<T>();
  first.addend = relu || has_down ? grad_x : second.grad_y;
  first.grad_weight = pointer_of<T>(grads.weight_1);
  first.grad_bias = pointer_of<T>(grads.bias_1);

  const auto run_one = [](ConvBackward<T>& p) {
    p.threads = thread_count(2 * multiply_adds(p.shape));
    check_workspace(run(p));
  };
  Tensor weight = a.weight_2;
  if (wants_first) weight = weight_of<T>(a.weight_2, a.g_2);
  second.weight = weight.const_data_ptr<T>();
  run_one(second);
  if (wants_down) run_one(down);
  if (wants_first) {
    weight = grad_x ? weight_of<T>(a.weight_1, a.g_1) : a.weight_1;
    first.weight = weight.const_data_ptr<T>();
    run_one(first);
  }
  const auto through_norm = [](const Tensor& v, const OptionalTensor& g, Tensor& grad_weight, Tensor& grad_g) {
    if (!g || grad_weight.numel() == 0) return;
    WeightNorm<T> p = norm_of<T>(v, *g, grad_weight);
    p.grad_g = grad_g.mutable_data_ptr<T>();
    differentiate(p);
  };
  through_norm(a.weight_1, a.g_1, grads.weight_1, grads.g_1);
  through_norm(a.weight_2, a.g_2, grads.weight_2, grads.g_2);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad_y, OptionalTensor y, Tensor z, Tensor saved_1, Tensor saved_2, Tensor x, Tensor weight_1,
    OptionalTensor g_1, Tensor weight_2, OptionalTensor g_2, OptionalTensor down_weight, OptionalTensor seed,
    OptionalTensor reset, int64_t dilation, Text activation_1, Text activation_2, bool relu, double dropout,
    int64_t wants) {
  Block a = make_block(x, weight_1, g_1, {}, weight_2, g_2, {}, down_weight, {}, seed, dilation, activation_1.value,
                       activation_2.value, relu, dropout);
  const Sequences episodes(a.first, reset, OptionalTensor());  // (the one of one tap sees one step only)
  a.second.divide_as(a.first);
  const int64_t B = a.batch(), O = a.channels(), T = a.length(), rows = a.first.out_channels;
  check_tensor(grad_y, "grad_y", {B, O, T}, a.dtype);
  check_tensor(z, "z", {B, O, T}, a.dtype);
  const auto check_saved = [&](const Tensor& saved, const char* name, Saved kind, int64_t channels) {
    if (kind == Saved::nothing) return check_tensor(saved, name, {0}, a.dtype);
    check_tensor(saved, name, {B, channels, T}, kind == Saved::active ? ScalarType::Byte : a.dtype);
  };
  check_saved(saved_1, "saved_1", saved_kind(a.epilogue_1, false), rows);
  check_saved(saved_2, "saved_2", saved_kind(a.epilogue_2, true), O);
  STD_TORCH_CHECK(y || !relu, "seqaccel: the backward of a relu needs y");
  if (y) check_tensor(*y, "y", {B, O, T}, a.dtype);
  STD_TORCH_CHECK((wants & (kDownWeight | kDownBias)) == 0 || down_weight,
                  "seqaccel: expected downsample_weight, whose gradient is wanted");
  STD_TORCH_CHECK((g_1 || !(wants & kG1)) && (g_2 || !(wants & kG2)), "seqaccel: expected g, whose gradient is wanted");
  const auto make = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return wanted ? new_tensor(x, sizes) : new_tensor(x, {0});
  };
  // A gradient of g takes that of its weight, and the other way round.
  const bool wants_1 = wants & (kWeight1 | kG1), wants_2 = wants & (kWeight2 | kG2);
  BlockGradients grads = {make(wants & kX, {B, a.first.in_channels, T}),
                          make(wants_1, {rows, a.first.in_channels, a.first.kernel_size}),
                          make(wants_1 && g_1, {rows, 1, 1}),
                          make(wants & kBias1, {rows}),
                          make(wants_2, {O, O, a.second.kernel_size}),
                          make(wants_2 && g_2, {O, 1, 1}),
                          make(wants & kBias2, {O}),
                          make(wants & kDownWeight, {O, a.first.in_channels, 1}),
                          make(wants & kDownBias, {O})};
  grad_y = to_contiguous(grad_y);
  y = to_contiguous(y);
  z = to_contiguous(z);
  saved_1 = to_contiguous(saved_1);
  saved_2 = to_contiguous(saved_2);
  if (a.empty()) {
    for (Tensor* grad : {&grads.x, &grads.weight_1, &grads.g_1, &grads.bias_1, &grads.weight_2, &grads.g_2,
                         &grads.bias_2, &grads.down_weight, &grads.down_bias}) {
      if (grad->numel() > 0) torch::stable::zero_(*grad);
    }
  } else if (a.dtype == ScalarType::Float) {
    run_backward<float>(a, grad_y, y, z, saved_1, saved_2, grads);
  } else {
    run_backward<double>(a, grad_y, y, z, saved_1, saved_2, grads);
  }
  return {grads.x,   grads.weight_1, grads.g_1,         grads.bias_1,   grads.weight_2,
          grads.g_2, grads.bias_2,   grads.down_weight, grads.down_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "temporal_block_forward(Tensor x, Tensor weight_1, Tensor? g_1, Tensor? bias_1, Tensor weight_2, Tensor? g_2, "
      "Tensor? bias_2, Tensor? downsample_weight, Tensor? downsample_bias, Tensor? seed, Tensor? reset, int dilation, "
      "str activation_1, str activation_2, bool relu, float dropout, bool save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "temporal_block_backward(Tensor grad_y, Tensor? y, Tensor z, Tensor saved_1, Tensor saved_2, Tensor x, "
      "Tensor weight_1, Tensor? g_1, Tensor weight_2, Tensor? g_2, Tensor? downsample_weight, Tensor? seed, "
      "Tensor? reset, int dilation, str activation_1, str activation_2, bool relu, float dropout, int wants) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("temporal_block_forward", TORCH_BOX(&forward));
  m.impl("temporal_block_backward", TORCH_BOX(&backward));
}

}  // namespace seqaccel::conv
