// The operators of the linear scan.
#include "common/scan_arguments.h"
#include "common/tensor.h"
#include "cpu/scan/scan.h"

namespace seqaccel::scan {
namespace {

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
  Tensor h = new_like(a);
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
  Tensor grad_a = new_like(a), grad_b = new_like(a), grad_h_0 = new_tensor(a, {sizes[0], sizes[2]});
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def("linear_scan_forward(Tensor a, Tensor b, Tensor? h_0, bool reverse) -> Tensor");
  m.def(
      "linear_scan_backward(Tensor grad_h, Tensor a, Tensor h, Tensor? h_0, bool reverse) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace seqaccel::scan
