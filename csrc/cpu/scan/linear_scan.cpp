// The operators of the linear scan.
#include "common/scan_arguments.h"
#include "common/tensor.h"
#include "cpu/base/pool.h"
#include "cpu/scan/scan.h"

namespace seqaccel::scan {
namespace {

const LinearScanKernels<float>& kernels_of(float) { return active_scan_kernels().linear_float; }
const LinearScanKernels<double>& kernels_of(double) { return active_scan_kernels().linear_double; }
const LinearScanKernels<BFloat16>& kernels_of(BFloat16) { return active_scan_kernels().linear_bfloat16; }
const LinearScanKernels<Float16>& kernels_of(Float16) { return active_scan_kernels().linear_float16; }
const LinearScanKernels<Complex<float>>& kernels_of(Complex<float>) {
  return active_scan_kernels().linear_complex_float;
}
const LinearScanKernels<Complex<double>>& kernels_of(Complex<double>) {
  return active_scan_kernels().linear_complex_double;
}

Tensor pooled_like(const Tensor& t) { return new_pooled(t, sizes_of(t)); }

std::tuple<Tensor, Tensor> linear_scan_forward(Tensor a, Tensor b, OptionalTensor h_0, OptionalTensor cu_seqlens,
                                               OptionalTensor reset, bool reverse, bool return_last) {
  cu_seqlens = to_contiguous(cu_seqlens);
  const Sequences sequences = check_linear_scan(a, h_0, cu_seqlens, reset);
  const int64_t width = a.size(2);
  check_operand(b, "b", {a.size(0), a.size(1), width}, a, a.scalar_type());
  a = to_contiguous(a);
  b = to_contiguous(b);
  h_0 = to_contiguous(h_0);
  reset = to_contiguous(reset);
  Tensor h = pooled_like(a), h_last = new_tensor(a, {return_last ? sequences.count : 0, width});
  for_linear_scan_type(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    kernels_of(zero).forward({sequences, width, reverse, read<bool>(reset), read<T>(a), read<T>(b), read<T>(h_0),
                              write<T>(h), return_last ? write<T>(h_last) : nullptr});
  });
  return {h, h_last};
}

std::tuple<Tensor, Tensor, Tensor> linear_scan_backward(Tensor grad_h, OptionalTensor grad_h_last, Tensor a, Tensor h,
                                                        OptionalTensor h_0, OptionalTensor cu_seqlens,
                                                        OptionalTensor reset, bool reverse) {
  cu_seqlens = to_contiguous(cu_seqlens);
  const Sequences sequences = check_linear_scan(a, h_0, cu_seqlens, reset);
  const int64_t width = a.size(2);
  const ScalarType dtype = a.scalar_type();
  check_operand(grad_h, "grad_h", {a.size(0), a.size(1), width}, a, dtype);
  check_operand(h, "h", {a.size(0), a.size(1), width}, a, dtype);
  check_operand(grad_h_last, "grad_h_last", {sequences.count, width}, a, dtype);
  grad_h = to_contiguous(grad_h);
  grad_h_last = to_contiguous(grad_h_last);
  a = to_contiguous(a);
  h = to_contiguous(h);
  h_0 = to_contiguous(h_0);
  reset = to_contiguous(reset);
  Tensor grad_a = pooled_like(a), grad_b = pooled_like(a), grad_h_0 = new_tensor(a, {sequences.count, width});
  for_linear_scan_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    kernels_of(zero).backward({sequences, width, reverse, read<bool>(reset), read<T>(grad_h), read<T>(grad_h_last),
                               read<T>(a), read<T>(h), read<T>(h_0), write<T>(grad_a), write<T>(grad_b),
                               write<T>(grad_h_0)});
  });
  return {grad_a, grad_b, grad_h_0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def(
      "linear_scan_forward(Tensor a, Tensor b, Tensor? h_0, Tensor? cu_seqlens, Tensor? reset, bool reverse, bool "
      "return_last) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_scan_backward(Tensor grad_h, Tensor? grad_h_last, Tensor a, Tensor h, Tensor? h_0, Tensor? cu_seqlens, "
      "Tensor? reset, bool reverse) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("linear_scan_forward", TORCH_BOX(&linear_scan_forward));
  m.impl("linear_scan_backward", TORCH_BOX(&linear_scan_backward));
}

}  // namespace seqaccel::scan
