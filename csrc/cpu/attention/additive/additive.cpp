// The operators of additive attention's weights: checks, sizes, allocation.
#include "cpu/attention/additive/additive.h"

#include "common/tensor.h"

namespace seqaccel::attention::additive {
namespace {

// The sizes that both operators share, after checks.
struct Sizes {
  int64_t B, Tq, Tk, H;
};

Sizes check(const Tensor& query, const Tensor& key, const Tensor& weight, const OptionalTensor& mask) {
  check_float_or_double(query, "query");
  const ScalarType dtype = query.scalar_type();
  check_tensor(query, "query", {-1, -1, -1}, dtype);
  const int64_t B = query.size(0), Tq = query.size(1), H = query.size(2);
  check_tensor(key, "key", {B, -1, H}, dtype);
  const int64_t Tk = key.size(1);
  check_tensor(weight, "weight", {H}, dtype);
  STD_TORCH_CHECK(H > 0, "seqaccel: expected weight to have at least one element");
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "seqaccel: expected mask to be bool");
    check_tensor(*mask, "mask", {B, -1, Tk}, ScalarType::Bool);
    STD_TORCH_CHECK(mask->size(1) == 1 || mask->size(1) == Tq, "seqaccel: expected mask to have 1 or ", Tq,
                    " rows, but got ", shape_string(*mask));
  }
  return {B, Tq, Tk, H};
}

template <typename T>
Additive<T> arguments(const Sizes& s, const Tensor& query, const Tensor& key, const Tensor& weight,
                      const OptionalTensor& mask, const Tensor& attention) {
  return {s.B,
          s.Tq,
          s.Tk,
          s.H,
          query.const_data_ptr<T>(),
          key.const_data_ptr<T>(),
          weight.const_data_ptr<T>(),
          data_or_null<bool>(mask),
          mask ? mask->size(1) : 1,
          attention.mutable_data_ptr<T>()};
}

Tensor additive_attention_forward(Tensor query, Tensor key, Tensor weight, OptionalTensor mask) {
  const Sizes s = check(query, key, weight, mask);
  query = to_contiguous(query);
  key = to_contiguous(key);
  weight = to_contiguous(weight);
  mask = to_contiguous(mask);
  Tensor attention = new_tensor(query, {s.B, s.Tq, s.Tk});
  if (attention.numel() == 0) return attention;
  const AdditiveKernels& kernels = active_additive_kernels();
  if (query.scalar_type() == ScalarType::Double) {
    kernels.forward_double(arguments<double>(s, query, key, weight, mask, attention));
  } else {
    kernels.forward_float(arguments<float>(s, query, key, weight, mask, attention));
  }
  return attention;
}

template <typename T>
void run_backward(void (*kernel)(const AdditiveBackward<T>&), const Sizes& s, const Tensor& grad_attention,
                  const Tensor& query, const Tensor& key, const Tensor& weight, const Tensor& attention,
                  const Tensor& grad_query, const Tensor& grad_key, const Tensor& grad_weight) {
  Tensor grad_logits = new_like(attention), grad_weights = new_tensor(query, {s.B, s.H});
  kernel({s.B, s.Tq, s.Tk, s.H, grad_attention.const_data_ptr<T>(), query.const_data_ptr<T>(), key.const_data_ptr<T>(),
          weight.const_data_ptr<T>(), attention.const_data_ptr<T>(), grad_logits.mutable_data_ptr<T>(),
          grad_query.mutable_data_ptr<T>(), grad_key.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>()});
  const T* from = grad_weights.const_data_ptr<T>();
  T* to = grad_weight.mutable_data_ptr<T>();
  for (int64_t h = 0; h < s.H; ++h) to[h] = from[h];
  for (int64_t b = 1; b < s.B; ++b) {
    for (int64_t h = 0; h < s.H; ++h) to[h] += from[b * s.H + h];
  }
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_backward(Tensor grad_attention, Tensor query, Tensor key,
                                                               Tensor weight, Tensor attention) {
  const Sizes s = check(query, key, weight, std::nullopt);
  const ScalarType dtype = query.scalar_type();
  check_tensor(grad_attention, "grad_attention", {s.B, s.Tq, s.Tk}, dtype);
  check_tensor(attention, "attention", {s.B, s.Tq, s.Tk}, dtype);
  grad_attention = to_contiguous(grad_attention);
  query = to_contiguous(query);
  key = to_contiguous(key);
  weight = to_contiguous(weight);
  attention = to_contiguous(attention);
  Tensor grad_query = new_tensor(query, {s.B, s.Tq, s.H}), grad_key = new_tensor(query, {s.B, s.Tk, s.H});
  Tensor grad_weight = new_tensor(query, {s.H});
  const AdditiveKernels& kernels = active_additive_kernels();
  if (attention.numel() == 0) {
    for (Tensor* grad : {&grad_query, &grad_key, &grad_weight}) torch::stable::zero_(*grad);
  } else if (dtype == ScalarType::Double) {
    run_backward(kernels.backward_double, s, grad_attention, query, key, weight, attention, grad_query, grad_key,
                 grad_weight);
  } else {
    run_backward(kernels.backward_float, s, grad_attention, query, key, weight, attention, grad_query, grad_key,
                 grad_weight);
  }
  return {grad_query, grad_key, grad_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def("additive_attention_forward(Tensor query, Tensor key, Tensor weight, Tensor? mask) -> Tensor");
  m.def(
      "additive_attention_backward(Tensor grad_attention, Tensor query, Tensor key, Tensor weight, Tensor attention) "
      "-> (Tensor grad_query, Tensor grad_key, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("additive_attention_forward", TORCH_BOX(&additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&additive_attention_backward));
}

}  // namespace seqaccel::attention::additive
