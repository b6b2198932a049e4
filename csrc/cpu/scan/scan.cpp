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
void run_linear_forward(const std::array<int64_t, 3>& sizes, bool reverse, const Tensor& a, const Tensor& b,
                        const OptionalTensor& h_0, Tensor& h, void (*kernel)(const LinearScanForward<T>&)) {
  kernel({sizes[0], sizes[1], sizes[2], reverse, a.const_data_ptr<T>(), b.const_data_ptr<T>(), data_or_null<T>(h_0),
          h.mutable_data_ptr<T>()});
}

Tensor linear_scan_forward(Tensor a, Tensor b, OptionalTensor h_0, bool reverse) {
  const std::array<int64_t, 3> sizes = check_linear_scan(a, "a");
  const ScalarType dtype = a.scalar_type();
  check_operand(b, "b", {sizes[0], sizes[1], sizes[2]}, a, dtype);
  check_operand(h_0, "h_0", {sizes[0], sizes[2]}, a, dtype);
  a = to_contiguous(a);
  b = to_contiguous(b);
  h_0 = to_contiguous(h_0);
  Tensor h = fresh_like(a);
  const ScanKernels& kernels = active_scan_kernels();
  if (dtype == ScalarType::Float) {
    run_linear_forward<float>(sizes, reverse, a, b, h_0, h, kernels.linear_forward_float);
  } else {
    run_linear_forward<double>(sizes, reverse, a, b, h_0, h, kernels.linear_forward_double);
  }
  return h;
}

template <typename T>
void run_linear_backward(const std::array<int64_t, 3>& sizes, bool reverse, const Tensor& grad_h, const Tensor& a,
                         const Tensor& h, const OptionalTensor& h_0, Tensor& grad_a, Tensor& grad_b, Tensor& grad_h_0,
                         void (*kernel)(const LinearScanBackward<T>&)) {
  kernel({sizes[0], sizes[1], sizes[2], reverse, grad_h.const_data_ptr<T>(), a.const_data_ptr<T>(),
          h.const_data_ptr<T>(), data_or_null<T>(h_0), grad_a.mutable_data_ptr<T>(), grad_b.mutable_data_ptr<T>(),
          grad_h_0.mutable_data_ptr<T>()});
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(Tensor grad_h, Tensor a, Tensor h, OptionalTensor h_0,
                                                        bool reverse) {
  const std::array<int64_t, 3> sizes = check_linear_scan(a, "a");
  const ScalarType dtype = a.scalar_type();
  check_operand(grad_h, "grad_h", {sizes[0], sizes[1], sizes[2]}, a, dtype);
  check_operand(h, "h", {sizes[0], sizes[1], sizes[2]}, a, dtype);
  check_operand(h_0, "h_0", {sizes[0], sizes[2]}, a, dtype);
  grad_h = to_contiguous(grad_h);
  a = to_contiguous(a);
  h = to_contiguous(h);
  h_0 = to_contiguous(h_0);
  Tensor grad_a = fresh_like(a), grad_b = fresh_like(a), grad_h_0 = new_tensor(a, {sizes[0], sizes[2]});
  const ScanKernels& kernels = active_scan_kernels();
  if (dtype == ScalarType::Float) {
    run_linear_backward<float>(sizes, reverse, grad_h, a, h, h_0, grad_a, grad_b, grad_h_0,
                               kernels.linear_backward_float);
  } else {
    run_linear_backward<double>(sizes, reverse, grad_h, a, h, h_0, grad_a, grad_b, grad_h_0,
                                kernels.linear_backward_double);
  }
  return {grad_a, grad_b, grad_h_0};
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
  m.def("linear_scan_forward(Tensor a, Tensor b, Tensor? h_0, bool reverse) -> Tensor");
  m.def(
      "linear_scan_backward(Tensor grad_h, Tensor a, Tensor h, Tensor? h_0, bool reverse) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sru_forward(Tensor u, Tensor? x, Tensor weight_c, Tensor bias, Tensor c_0, Tensor? mask_c, Tensor? mask_pad, "
      "Tensor? scale_x, int directions, bool use_tanh, bool save_c) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sru_backward(Tensor grad_h, Tensor? grad_c_n, Tensor u, Tensor? x, Tensor weight_c, Tensor bias, Tensor c_0, "
      "Tensor? mask_c, Tensor? mask_pad, Tensor? scale_x, Tensor c, int directions, bool use_tanh) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
  m.impl("sru_forward", TORCH_BOX(&sru_forward));
  m.impl("sru_backward", TORCH_BOX(&sru_backward));
}

}  // namespace seqaccel::scan
