// The arguments of the scan operators, checked once for the CPU and the GPU: ranks, sizes, dtypes and devices, in O(1),
// so that no call can make a kernel read or write out of bounds.
#pragma once

#include "common/scan.h"
#include "common/tensor.h"

namespace seqaccel::scan {

// Shape as given, dtype and device as the first tensor's.
inline void check_operand(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, const Tensor& first,
                          ScalarType dtype) {
  bool matches = t.dim() == int64_t(sizes.size());
  int64_t i = 0;
  std::string expected = "[";
  for (const int64_t size : sizes) {
    matches = matches && t.size(i) == size;
    expected += (i++ ? ", " : "") + std::to_string(size);
  }
  STD_TORCH_CHECK(matches, "seqaccel: expected ", name, " to have shape ", expected, "], but got ", shape_string(t));
  STD_TORCH_CHECK(t.scalar_type() == dtype, "seqaccel: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(),
                  "seqaccel: expected ", name, " to be on the device of the first tensor");
  check_memory(t, name);
}

inline void check_operand(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> sizes,
                          const Tensor& first, ScalarType dtype) {
  if (t) check_operand(*t, name, sizes, first, dtype);
}

// Calls function(T{}) with the T that a tensor of `dtype` holds.
template <typename Function>
void for_linear_scan_type(ScalarType dtype, Function function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    case ScalarType::Half:
      return function(Float16{});
    case ScalarType::ComplexFloat:
      return function(Complex<float>{});
    case ScalarType::ComplexDouble:
      return function(Complex<double>{});
    default:
      STD_TORCH_CHECK(false, "seqaccel: expected a to be float16, bfloat16, float32, float64, complex64 or complex128");
  }
}

// What `offsets` points to must outlive the result. States, one of each sequence, have the shape [count, width].
inline Sequences check_linear_scan(const Tensor& a, const OptionalTensor& h_0, const OptionalTensor& cu_seqlens,
                                   const OptionalTensor& reset) {
  for_linear_scan_type(a.scalar_type(), [](auto) {});
  STD_TORCH_CHECK(a.dim() == 3, "seqaccel: expected a to have shape [batch, steps, width], but got ", shape_string(a));
  check_memory(a, "a");
  Sequences sequences = {a.size(0), a.size(1), a.size(0) * a.size(1), nullptr};
  if (cu_seqlens) {
    STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) > 0,
                    "seqaccel: expected cu_seqlens to have shape [sequences + 1], but got ", shape_string(*cu_seqlens));
    check_operand(*cu_seqlens, "cu_seqlens", {cu_seqlens->size(0)}, a, ScalarType::Long);
    sequences = {cu_seqlens->size(0) - 1, 0, a.size(0) * a.size(1), cu_seqlens->const_data_ptr<int64_t>()};
    STD_TORCH_CHECK(a.size(0) == 1, "seqaccel: expected a batch of 1 with cu_seqlens, but got a of shape ",
                    shape_string(a));
    STD_TORCH_CHECK(sequences.count > 0 || sequences.rows == 0, "seqaccel: expected cu_seqlens to have at least 2 ",
                    "offsets for a of shape ", shape_string(a));
    STD_TORCH_CHECK(!reset, "seqaccel: expected reset or cu_seqlens, but got both");
  }
  check_operand(h_0, "h_0", {sequences.count, a.size(2)}, a, a.scalar_type());
  check_operand(reset, "reset", {a.size(0), a.size(1)}, a, ScalarType::Bool);
  return sequences;
}

// The memory of a tensor, or null.
template <typename T>
const T* read(const OptionalTensor& t) {
  return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

template <typename T>
T* write(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace seqaccel::scan
