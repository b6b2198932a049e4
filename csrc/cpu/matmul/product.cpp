#include "cpu/matmul/product.h"

#include <dlfcn.h>
#include <omp.h>

#include "cpu/matmul/matmul.h"

namespace seqaccel::matmul {
namespace {

bool run(const Matmul<float>& product) { return active_matmul_kernels().matmul_float(product); }
bool run(const Matmul<double>& product) { return active_matmul_kernels().matmul_double(product); }

template <typename T>
void multiply(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  const bool allocated = run(Matmul<T>{a.size(0), b.size(1), a.size(1), a.const_data_ptr<T>(), a.stride(0), a.stride(1),
                                       b.const_data_ptr<T>(), b.stride(0), b.stride(1), out.mutable_data_ptr<T>(),
                                       out.stride(0), accumulate});
  STD_TORCH_CHECK(allocated, "seqaccel: not enough memory for the packed operands of a matrix product");
}

// out = a b with torch's library.
void mm_out(Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// out += a b with torch's library. Returns false if this torch lacks the call, which no stable header declares.
bool add_mm(Tensor& out, const Tensor& a, const Tensor& b) {
  using AddmmOut = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle mat1,
                                      AtenTensorHandle mat2, double beta, double alpha);
  static const AddmmOut addmm_out = reinterpret_cast<AddmmOut>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu_addmm_out"));
  if (addmm_out == nullptr) return false;
  TORCH_ERROR_CODE_CHECK(addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  return true;
}

// With few rows packing b takes longer than the product: [1, 256] x [256, 768] takes 25 us on two Zen 5 cores, torch's
// library 9 us.
constexpr int64_t kUnpackedRows = 8;

void check_operands(const Tensor& input, const Tensor& mat2) {
  check_float_or_double(input, "input");
  check_tensor(input, "input", {-1, -1}, input.scalar_type());
  check_tensor(mat2, "mat2", {input.size(1), -1}, input.scalar_type());
}

void own_product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  (a.scalar_type() == ScalarType::Float ? multiply<float> : multiply<double>)(out, a, b, accumulate);
}

Tensor mm(Tensor input, Tensor mat2) {
  check_operands(input, mat2);
  Tensor out = new_tensor(input, {input.size(0), mat2.size(1)});
  own_product(out, input, mat2, false);
  return out;
}

Tensor fastest_mm(Tensor input, Tensor mat2) {
  check_operands(input, mat2);
  Tensor out = new_tensor(input, {input.size(0), mat2.size(1)});
  product(out, detach(input), detach(mat2));
  return out;
}

void add_fastest_mm(Tensor out, Tensor input, Tensor mat2) {
  check_operands(input, mat2);
  check_tensor(out, "out", {input.size(0), mat2.size(1)}, input.scalar_type());
  STD_TORCH_CHECK(out.is_contiguous(), "seqaccel: expected out to be contiguous");
  product(out, detach(input), detach(mat2), true);
}

}  // namespace

bool own_products_are_faster() { return is_amd() && active_isa() >= Isa::avx512; }

// Our kernels run products of a transposed and a narrow matrix, which they read in place, and small products, which
// they run on one thread. Other products go to torch's library if it is faster.
void product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  constexpr int64_t kVector = 64;  // bytes
  const int64_t M = a.size(0), N = b.size(1), value = int64_t(a.element_size());
  const bool direct = a.stride(0) == 1 && b.stride(1) == 1 && N * value % kVector == 0;
  const bool narrow = direct && is_narrow(M, N, value, omp_get_max_threads());
  const bool small = M > 1 && double(M) * double(a.size(1)) * double(N) < kSmallProduct;
  if (!narrow && !small && (M <= kUnpackedRows || !own_products_are_faster())) {
    if (!accumulate) return mm_out(out, a, b);
    if (add_mm(out, a, b)) return;
  }
  own_product(out, a, b, accumulate);
}

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  m.def("mm(Tensor input, Tensor mat2) -> Tensor");  // always our kernels
  m.def("fastest_mm(Tensor input, Tensor mat2) -> Tensor");
  m.def("add_fastest_mm_(Tensor(a!) out, Tensor input, Tensor mat2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CPU, m) {
  m.impl("mm", TORCH_BOX(&mm));
  m.impl("fastest_mm", TORCH_BOX(&fastest_mm));
  m.impl("add_fastest_mm_", TORCH_BOX(&add_fastest_mm));
}

}  // namespace seqaccel::matmul
