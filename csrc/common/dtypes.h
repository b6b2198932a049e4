// The dtypes of floating-point tensors, and the types that memory holds for them.
#pragma once

#include "common/narrow.h"
#include "common/tensor.h"

namespace seqaccel {

inline bool is_narrow(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

inline void check_floating(const Tensor& t, const char* name) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(is_narrow(dtype) || dtype == ScalarType::Float || dtype == ScalarType::Double, "seqaccel: expected ",
                  name, " to be float32, float64, bfloat16 or float16");
}

// The dtype of sums, and an uninitialised tensor of it.
inline ScalarType compute_dtype(ScalarType dtype) { return is_narrow(dtype) ? ScalarType::Float : dtype; }

inline Tensor new_sums(const Tensor& like, const Extents& sizes) {
  return is_narrow(like.scalar_type()) ? new_tensor(like, sizes, aoti_torch_dtype_float32()) : new_tensor(like, sizes);
}

inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline OptionalTensor to_dtype(const OptionalTensor& t, ScalarType dtype) {
  return t ? OptionalTensor(to_dtype(*t, dtype)) : OptionalTensor();
}

template <typename T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* data_of(const OptionalTensor& t) {
  return t ? data_of<T>(*t) : nullptr;
}

template <typename T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls f with a value of the type that memory holds.
template <typename F>
auto with_type(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      return f(Float16());
  }
}

}  // namespace seqaccel
