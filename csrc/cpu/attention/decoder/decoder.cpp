// The operators of an attention decoder's recurrence: checks, sizes, allocation.
#include "cpu/attention/decoder/decoder.h"

#include "common/tensor.h"

namespace seqaccel::attention::decoder {
namespace {

// The operands that both operators share, contiguous once they are checked.
struct Operands {
  Tensor key, value;
  OptionalTensor mask, lengths;
  Tensor c_0;
  OptionalTensor query_weight, score_weight;
  Tensor context_weight, weight_hh;
  int64_t B, T, S, H, A, M;

  // From a tensor [B, T, .], which gives the dtype.
  void check(const Tensor& first) {
    const ScalarType dtype = first.scalar_type();
    B = first.size(0);
    T = first.size(1);
    check_tensor(key, "key", {B, -1, -1}, dtype);
    S = key.size(1);
    A = key.size(2);
    check_tensor(value, "value", {B, S, -1}, dtype);
    M = value.size(2);
    check_tensor(c_0, "c_0", {B, -1}, dtype);
    H = c_0.size(1);
    STD_TORCH_CHECK(A > 0 && M > 0 && H > 0, "seqaccel: expected key, value and c_0 to have at least one feature");
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "seqaccel: expected mask to be bool");
      check_tensor(*mask, "mask", {B, S}, ScalarType::Bool);
    }
    if (lengths) {
      STD_TORCH_CHECK(lengths->scalar_type() == ScalarType::Long, "seqaccel: expected lengths to be int64");
      check_tensor(*lengths, "lengths", {B}, ScalarType::Long);
    }
    if (query_weight) {
      check_tensor(*query_weight, "query_weight", {A, H}, dtype);
    } else {
      STD_TORCH_CHECK(A == H, "seqaccel: expected key to have the ", H, " features of h, but got ", shape_string(key));
    }
    if (score_weight) check_tensor(*score_weight, "score_weight", {A}, dtype);
    check_tensor(context_weight, "context_weight", {4 * H, M}, dtype);
    check_tensor(weight_hh, "weight_hh", {4 * H, H}, dtype);
    for (Tensor* t : {&key, &value, &c_0, &context_weight, &weight_hh}) *t = to_contiguous(*t);
    for (OptionalTensor* t : {&mask, &lengths, &query_weight, &score_weight}) *t = to_contiguous(*t);
  }

  template <typename V>
  Decoder<V> pointers() const {
    return {B,
            T,
            S,
            H,
            A,
            M,
            key.const_data_ptr<V>(),
            value.const_data_ptr<V>(),
            data_or_null<bool>(mask),
            data_or_null<int64_t>(lengths),
            c_0.const_data_ptr<V>(),
            data_or_null<V>(query_weight),
            data_or_null<V>(score_weight),
            context_weight.const_data_ptr<V>(),
            weight_hh.const_data_ptr<V>()};
  }
};

void check_workspace(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: not enough memory for the packed weights of an attention decoder");
}

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ForwardResults;

template <typename V>
ForwardResults run_forward(bool (*kernel)(const Forward<V>&), const Operands& o, const Tensor& pre, const Tensor& h_0,
                           const OptionalTensor& query_bias) {
  Tensor output = new_tensor(pre, {o.B, o.T, o.H}), h_n = new_tensor(pre, {o.B, o.H}), c_n = new_like(h_n);
  Tensor context = new_tensor(pre, {o.B, o.T, o.M}), attention = new_tensor(pre, {o.B, o.T, o.S});
  Tensor gates = new_like(pre), cells = new_like(output);
  Forward<V> pass{o.pointers<V>()};
  pass.pre = pre.const_data_ptr<V>();
  pass.h_0 = h_0.const_data_ptr<V>();
  pass.query_bias = data_or_null<V>(query_bias);
  pass.output = output.mutable_data_ptr<V>();
  pass.h_n = h_n.mutable_data_ptr<V>();
  pass.c_n = c_n.mutable_data_ptr<V>();
  pass.context = context.mutable_data_ptr<V>();
  pass.attention = attention.mutable_data_ptr<V>();
  pass.gates = gates.mutable_data_ptr<V>();
  pass.cells = cells.mutable_data_ptr<V>();
  check_workspace(kernel(pass));
  return {output, h_n, c_n, context, attention, gates, cells};
}

ForwardResults attention_lstm_forward(Tensor pre, Tensor key, Tensor value, OptionalTensor mask, OptionalTensor lengths,
                                      Tensor h_0, Tensor c_0, OptionalTensor query_weight, OptionalTensor query_bias,
                                      OptionalTensor score_weight, Tensor context_weight, Tensor weight_hh) {
  check_float_or_double(pre, "pre");
  const ScalarType dtype = pre.scalar_type();
  check_tensor(pre, "pre", {-1, -1, -1}, dtype);
  Operands o{key, value, mask, lengths, c_0, query_weight, score_weight, context_weight, weight_hh};
  o.check(pre);
  check_tensor(pre, "pre", {o.B, o.T, 4 * o.H}, dtype);
  check_tensor(h_0, "h_0", {o.B, o.H}, dtype);
  if (query_bias) check_tensor(*query_bias, "query_bias", {o.A}, dtype);
  pre = to_contiguous(pre);
  h_0 = to_contiguous(h_0);
  query_bias = to_contiguous(query_bias);
  const DecoderKernels& kernels = active_decoder_kernels();
  if (dtype == ScalarType::Double) return run_forward<double>(kernels.forward_double, o, pre, h_0, query_bias);
  return run_forward<float>(kernels.forward_float, o, pre, h_0, query_bias);
}

struct Grads {
  OptionalTensor output, h_n, c_n, context, attention;

  void check(const Operands& o, ScalarType dtype) {
    if (output) check_tensor(*output, "grad_output", {o.B, o.T, o.H}, dtype);
    if (h_n) check_tensor(*h_n, "grad_h_n", {o.B, o.H}, dtype);
    if (c_n) check_tensor(*c_n, "grad_c_n", {o.B, o.H}, dtype);
    if (context) check_tensor(*context, "grad_context", {o.B, o.T, o.M}, dtype);
    if (attention) check_tensor(*attention, "grad_attention", {o.B, o.T, o.S}, dtype);
    for (OptionalTensor* t : {&output, &h_n, &c_n, &context, &attention}) *t = to_contiguous(*t);
  }
};

typedef std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> BackwardResults;

template <typename V>
BackwardResults run_backward(bool (*kernel)(const Backward<V>&), const Operands& o, const Grads& grads,
                             const Tensor& query, const Tensor& attention, const Tensor& gates, const Tensor& cells) {
  Tensor grad_pre = new_like(gates), all_grad_attention = new_like(attention), grad_query = new_like(query);
  Tensor all_grad_context = new_tensor(query, {o.B, o.T, o.M});
  Tensor grad_h_0 = new_like(o.c_0), grad_c_0 = new_like(o.c_0);
  Backward<V> pass{o.pointers<V>()};
  pass.query = query.const_data_ptr<V>();
  pass.grad_output = data_or_null<V>(grads.output);
  pass.grad_h_n = data_or_null<V>(grads.h_n);
  pass.grad_c_n = data_or_null<V>(grads.c_n);
  pass.grad_context = data_or_null<V>(grads.context);
  pass.grad_attention = data_or_null<V>(grads.attention);
  pass.attention = attention.const_data_ptr<V>();
  pass.gates = gates.const_data_ptr<V>();
  pass.cells = cells.const_data_ptr<V>();
  pass.grad_pre = grad_pre.mutable_data_ptr<V>();
  pass.all_grad_attention = all_grad_attention.mutable_data_ptr<V>();
  pass.grad_query = grad_query.mutable_data_ptr<V>();
  pass.all_grad_context = all_grad_context.mutable_data_ptr<V>();
  pass.grad_h_0 = grad_h_0.mutable_data_ptr<V>();
  pass.grad_c_0 = grad_c_0.mutable_data_ptr<V>();
  check_workspace(kernel(pass));
  return {grad_pre, all_grad_attention, grad_query, all_grad_context, grad_h_0, grad_c_0};
}

BackwardResults attention_lstm_backward(Tensor query, OptionalTensor grad_output, OptionalTensor grad_h_n,
                                        OptionalTensor grad_c_n, OptionalTensor grad_context,
                                        OptionalTensor grad_attention, Tensor key, Tensor value, OptionalTensor lengths,
                                        Tensor c_0, OptionalTensor query_weight, OptionalTensor score_weight,
                                        Tensor context_weight, Tensor weight_hh, Tensor attention, Tensor gates,
                                        Tensor cells) {
  check_float_or_double(query, "query");
  const ScalarType dtype = query.scalar_type();
  check_tensor(query, "query", {-1, -1, -1}, dtype);
  Operands o{key, value, std::nullopt, lengths, c_0, query_weight, score_weight, context_weight, weight_hh};
  o.check(query);
  Grads grads{grad_output, grad_h_n, grad_c_n, grad_context, grad_attention};
  grads.check(o, dtype);
  check_tensor(query, "query", {o.B, o.T, o.A}, dtype);
  check_tensor(attention, "attention", {o.B, o.T, o.S}, dtype);
  check_tensor(gates, "gates", {o.B, o.T, 4 * o.H}, dtype);
  check_tensor(cells, "cells", {o.B, o.T, o.H}, dtype);
  for (Tensor* t : {&query, &attention, &gates, &cells}) *t = to_contiguous(*t);
  const DecoderKernels& kernels = active_decoder_kernels();
  if (dtype == ScalarType::Double) {
    return run_backward<double>(kernels.backward_double, o, grads, query, attention, gates, cells);
  }
  return run_backward<float>(kernels.backward_float, o, grads, query, attention, gates, cells);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "attention_lstm_forward(Tensor pre, Tensor key, Tensor value, Tensor? mask, Tensor? lengths, Tensor h_0, "
      "Tensor c_0, Tensor? query_weight, Tensor? query_bias, Tensor? score_weight, Tensor context_weight, "
      "Tensor weight_hh) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor context, Tensor attention, Tensor gates, "
      "Tensor cells)");
  m.def(
      "attention_lstm_backward(Tensor query, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_context, Tensor? grad_attention, Tensor key, Tensor value, Tensor? lengths, Tensor c_0, "
      "Tensor? query_weight, Tensor? score_weight, Tensor context_weight, Tensor weight_hh, Tensor attention, "
      "Tensor gates, Tensor cells) -> (Tensor grad_pre, Tensor all_grad_attention, Tensor grad_query, "
      "Tensor all_grad_context, Tensor grad_h_0, Tensor grad_c_0)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("attention_lstm_forward", TORCH_BOX(&attention_lstm_forward));
  m.impl("attention_lstm_backward", TORCH_BOX(&attention_lstm_backward));
}

}  // namespace seqaccel::attention::decoder
