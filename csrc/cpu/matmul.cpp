#include "matmul.h"

#include "tensor.h"

namespace seqaccel {
namespace {

void check_workspace(bool allocated) {
  STD_TORCH_CHECK(allocated, "seqaccel: out of memory for the packed operands of a matrix product");
}

template <typename T>
void multiply(const Tensor& a, const Tensor& b, Tensor& c) {
  matmul(Matmul<T>{a.size(0), b.size(1), a.size(1), a.const_data_ptr<T>(), a.stride(0), a.stride(1),
                   b.const_data_ptr<T>(), b.stride(0), b.stride(1), c.mutable_data_ptr<T>(), b.size(1), false});
}

Tensor mm(Tensor input, Tensor mat2) {
  check_float_or_double(input, "input");
  check_tensor(input, "input", {-1, -1}, input.scalar_type());
  check_tensor(mat2, "mat2", {input.size(1), -1}, input.scalar_type());
  Tensor out = new_tensor(input, {input.size(0), mat2.size(1)});
  if (input.scalar_type() == ScalarType::Float) {
    multiply<float>(input, mat2, out);
  } else {
    multiply<double>(input, mat2, out);
  }
  return out;
}

}  // namespace

void matmul(const Matmul<float>& product) { check_workspace(active_matmul_kernels().matmul_float(product)); }
void matmul(const Matmul<double>& product) { check_workspace(active_matmul_kernels().matmul_double(product)); }

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) { m.def("mm(Tensor input, Tensor mat2) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) { m.impl("mm", TORCH_BOX(&mm)); }

}  // namespace seqaccel
