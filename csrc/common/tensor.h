// What every operator needs of torch's stable ABI.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/reuse.h"
#include "common/stable_abi.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqaccel {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_string(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

// Sizes or strides of a tensor.
using Extents = std::vector<int64_t>;

// The most elements that the checks accept, so that products of sizes, and small multiples of them, fit 64 bits. A
// tensor without elements may have sizes of any magnitude: `fits` multiplies all sizes except 0.
constexpr int64_t kMostElements = int64_t(1) << 50;

inline bool fits(int64_t& product, int64_t size) {
  return !__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product) && product <= kMostElements;
}

// Checks that the sizes are within bounds, and that a tensor with elements has memory (autograd's zero tensors and fake
// tensors have none).
inline void check_memory(const Tensor& t, const char* name) {
  const int64_t count = t.numel();
  bool small = count <= kMostElements;
  for (int64_t i = 0, product = 1; count == 0 && i < t.dim(); ++i) small = small && fits(product, t.size(i));
  STD_TORCH_CHECK(small, "seqaccel: the shape ", shape_string(t), " of ", name, " is too large");
  STD_TORCH_CHECK(count == 0 || t.const_data_ptr() != nullptr, "seqaccel: ", name, " has no memory");
}

// Checks rank, sizes (-1: any), dtype and device in O(1), before an operator touches memory.
inline void check_tensor(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  bool matches = t.dim() == int64_t(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) {
    matches = matches && (size < 0 || t.size(i) == size);
    ++i;
  }
  if (!matches) {
    std::string expected = "[";
    for (const int64_t size : sizes) {
      expected += (expected.size() > 1 ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    }
    STD_TORCH_CHECK(false, "seqaccel: expected ", name, " to have shape ", expected, "], but got ", shape_string(t));
  }
  STD_TORCH_CHECK(t.scalar_type() == dtype, "seqaccel: expected ", name, " to have the dtype of the first tensor");
  STD_TORCH_CHECK(t.is_cpu(), "seqaccel: expected ", name, " to be on the CPU");
  check_memory(t, name);
}

inline void check_float_or_double(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, "seqaccel: expected ",
                  name, " to be float32 or float64");
}

inline Tensor to_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline OptionalTensor to_contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(to_contiguous(*t)) : std::nullopt;
}

inline Extents row_major(const Extents& sizes) {
  Extents strides(sizes.size(), 1);
  int64_t product = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = product;
    STD_TORCH_CHECK(fits(product, sizes[i]), "seqaccel: not enough memory: a tensor of ", sizes.size(),
                    " dimensions would have more than ", kMostElements, " elements");
  }
  return strides;
}

// A tensor over t's memory, from its value `offset` on. Autograd does not record it.
inline Tensor view_of(const Tensor& t, const Extents& sizes, const Extents& strides, int64_t offset = 0) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.data(), strides.data(), offset, &view));
  return Tensor(view);
}

inline Extents sizes_of(const Tensor& t) {
  Extents sizes(size_t(t.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(int64_t(i));
  return sizes;
}

inline Extents strides_of(const Tensor& t) {
  Extents strides(size_t(t.dim()));
  for (size_t i = 0; i < strides.size(); ++i) strides[i] = t.stride(int64_t(i));
  return strides;
}

// The same tensor without autograd's record.
inline Tensor detach(const Tensor& t) { return view_of(t, sizes_of(t), strides_of(t)); }

// An uninitialised tensor; a large one is backed by huge pages. Touching fresh 4 KB pages costs more than the work of
// many kernels: the first write of 34 MB took 23 ms on a virtual machine, 3.2 ms with huge pages, and the second 1.5
// ms. It and view_of call torch's C interface, which takes 0.3 us; operators called by name take 1 us.
inline Tensor new_tensor(const Tensor& like, const Extents& sizes, int32_t dtype) {
  int32_t device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle = nullptr;
  const Extents strides = row_major(sizes);
  if (aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device, index, &handle) !=
      TORCH_SUCCESS) {
    const int64_t bytes = sizes.empty() ? 1 : sizes[0] * strides[0];
    fail("seqaccel: not enough memory: you tried to allocate ", bytes * int64_t(like.element_size()), " bytes");
  }
  Tensor t(handle);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = begin + uintptr_t(t.numel()) * t.element_size();
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  fill_fresh(t.mutable_data_ptr(), size_t(t.numel()) * t.element_size());
  return t;
}

inline Tensor new_tensor(const Tensor& like, const Extents& sizes) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(like, sizes, dtype);
}

inline Tensor new_like(const Tensor& t) { return new_tensor(t, sizes_of(t)); }

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

}  // namespace seqaccel
