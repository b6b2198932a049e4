#include "cpu/scan/scan.h"

#include "common/scan_arguments.h"
#include "common/tensor.h"

namespace seqaccel::scan {
namespace {

Tensor fresh_like(const Tensor& t) {
  switch (t.dim()) {
    case 1:
      return new_tensor(t, {t.size(0)});
    case 2:
      return new_tensor(t, {t.size(0), t.size(1)});
    default:
      return new_tensor(t, {t.size(0), t.size(1), t.size(2)});
  }
}

template <typename T>
void run_sru_forward(const SruShape& shape, const Tensor& u, const OptionalTensor& x, const Tensor& weight_c,
                     const Tensor& bias, const Tensor& c_0, const OptionalTensor& mask_c,
                     const OptionalTensor& mask_pad, const OptionalTensor& scale_x, Tensor& h, Tensor& c_n, Tensor* c,
                     void (*kernel)(const SruForward<T>&)) {
  kernel({shape, u.const_data_ptr<T>(), data_or_null<T>(x), weight_c.const_data_ptr<T>(), bias.const_data_ptr<T>(),
          c_0.const_data_ptr<T>(), data_or_null<T>(mask_c), data_or_null<bool>(mask_pad),
          scale_x ? *scale_x->const_data_ptr<T>() : T(1), h.mutable_data_ptr<T>(), c_n.mutable_data_ptr<T>(),
          c ? c->mutable_data_ptr<T>() : nullptr});
}

std::tuple<Tensor, Tensor, Tensor> sru_forward(Tensor u, OptionalTensor x, Tensor weight_c, Tensor bias, Tensor c_0,
                                               OptionalTensor mask_c, OptionalTensor mask_pad, OptionalTensor scale_x,
                                               int64_t directions, bool use_tanh, bool save_c) {
  const SruShape shape = check_sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh);
  u = to_contiguous(u);
  x = to_contiguous(x);
  weight_c = to_contiguous(weight_c);
  bias = to_contiguous(bias);
  c_0 = to_contiguous(c_0);
  mask_c = to_contiguous(mask_c);
  mask_pad = to_contiguous(mask_pad);
  Tensor h = new_tensor(u, {shape.steps, shape.batch, c_0.size(1)}), c_n = fresh_like(c_0);
  Tensor c = save_c ? fresh_like(h) : new_tensor(u, {0});
  const ScanKernels& kernels = active_scan_kernels();
  Tensor* const saved = save_c ? &c : nullptr;
  if (u.scalar_type() == ScalarType::Float) {
    run_sru_forward<float>(shape, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, h, c_n, saved,
                           kernels.sru_forward_float);
  } else {
    run_sru_forward<double>(shape, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, h, c_n, saved,
                            kernels.sru_forward_double);
  }
  return {h, c_n, c};
}

struct SruGradientTensors {
  Tensor u, x, weight_c, bias, c_0, sums;
};

template <typename T>
void run_sru_backward(const SruShape& shape, const Tensor& grad_h, const OptionalTensor& grad_c_n, const Tensor& u,
                      const OptionalTensor& x, const Tensor& weight_c, const Tensor& bias, const Tensor& c_0,
                      const OptionalTensor& mask_c, const OptionalTensor& mask_pad, const OptionalTensor& scale_x,
                      const Tensor& c, SruGradientTensors& g, void (*kernel)(const SruBackward<T>&)) {
  kernel({shape, grad_h.const_data_ptr<T>(), data_or_null<T>(grad_c_n), u.const_data_ptr<T>(), data_or_null<T>(x),
          weight_c.const_data_ptr<T>(), bias.const_data_ptr<T>(), c_0.const_data_ptr<T>(), data_or_null<T>(mask_c),
          data_or_null<bool>(mask_pad), scale_x ? *scale_x->const_data_ptr<T>() : T(1), c.const_data_ptr<T>(),
          g.u.mutable_data_ptr<T>(), x ? g.x.mutable_data_ptr<T>() : nullptr, g.weight_c.mutable_data_ptr<T>(),
          g.bias.mutable_data_ptr<T>(), g.c_0.mutable_data_ptr<T>(), g.sums.mutable_data_ptr<T>()});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sru_backward(Tensor grad_h, OptionalTensor grad_c_n, Tensor u,
                                                                OptionalTensor x, Tensor weight_c, Tensor bias,
                                                                Tensor c_0, OptionalTensor mask_c,
                                                                OptionalTensor mask_pad, OptionalTensor scale_x,
                                                                Tensor c, int64_t directions, bool use_tanh) {
  const SruShape shape = check_sru(u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, directions, use_tanh);
  const int64_t channels = c_0.size(1);
  const ScalarType dtype = u.scalar_type();
  check_operand(grad_h, "grad_h", {shape.steps, shape.batch, channels}, u, dtype);
  check_operand(grad_c_n, "grad_c_n", {shape.batch, channels}, u, dtype);
  check_operand(c, "c", {shape.steps, shape.batch, channels}, u, dtype);
  grad_h = to_contiguous(grad_h);
  grad_c_n = to_contiguous(grad_c_n);
  u = to_contiguous(u);
  x = to_contiguous(x);
  weight_c = to_contiguous(weight_c);
  bias = to_contiguous(bias);
  c_0 = to_contiguous(c_0);
  mask_c = to_contiguous(mask_c);
  mask_pad = to_contiguous(mask_pad);
  c = to_contiguous(c);
  SruGradientTensors g = {fresh_like(u),        x ? fresh_like(*x) : new_tensor(u, {0}),
                          fresh_like(weight_c), fresh_like(bias),
                          fresh_like(c_0),      new_tensor(u, {4, shape.batch, channels})};
  const ScanKernels& kernels = active_scan_kernels();
  if (dtype == ScalarType::Float) {
    run_sru_backward<float>(shape, grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, g,
                            kernels.sru_backward_float);
  } else {
    run_sru_backward<double>(shape, grad_h, grad_c_n, u, x, weight_c, bias, c_0, mask_c, mask_pad, scale_x, c, g,
                             kernels.sru_backward_double);
  }
  return {g.u, g.x, g.weight_c, g.bias, g.c_0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "sru_forward(Tensor u, Tensor? x, Tensor weight_c, Tensor bias, Tensor c_0, Tensor? mask_c, Tensor? mask_pad, "
      "Tensor? scale_x, int directions, bool use_tanh, bool save_c) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sru_backward(Tensor grad_h, Tensor? grad_c_n, Tensor u, Tensor? x, Tensor weight_c, Tensor bias, Tensor c_0, "
      "Tensor? mask_c, Tensor? mask_pad, Tensor? scale_x, Tensor c, int directions, bool use_tanh) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("sru_forward", TORCH_BOX(&sru_forward));
  m.impl("sru_backward", TORCH_BOX(&sru_backward));
}

}  // namespace seqaccel::scan
