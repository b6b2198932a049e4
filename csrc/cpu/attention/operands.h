// The tensors of the attention operators.
#pragma once

#include "common/tensor.h"
#include "cpu/attention/heads.h"

namespace seqaccel::attention {

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

template <typename T>
Heads<const T> read(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

template <typename T>
Heads<T> write(const Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

// An uninitialised tensor [B, heads, T, width]. Its dimensions of time and heads have the order in memory that t's
// have.
inline Tensor empty_heads(const Tensor& t, int64_t width) {
  if (t.stride(1) < t.stride(2)) {
    return torch::stable::transpose(new_tensor(t, {t.size(0), t.size(2), t.size(1), width}), 1, 2);
  }
  return new_tensor(t, {t.size(0), t.size(1), t.size(2), width});
}

inline Tensor empty_heads(const Tensor& t) { return empty_heads(t, t.size(3)); }

}  // namespace seqaccel::attention
