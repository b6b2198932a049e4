// The tensors of the attention operators.
#pragma once

#include "common/dtypes.h"
#include "cpu/attention/heads.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::attention {

// The tensor itself if its last dimension is contiguous, else a contiguous copy.
inline Tensor rows_contiguous(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

template <typename T>
Heads<const T> read(const Tensor& t) {
  return {data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <typename T>
Heads<T> write(const Tensor& t) {
  return {mutable_data_of<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// An uninitialised tensor [B, heads, T, width] by `make`. Its dimensions of time and heads have the order in memory
// that t's have.
template <typename Make>
Tensor empty_heads(const Tensor& t, int64_t width, const Make& make) {
  if (t.stride(1) < t.stride(2)) {
    return torch::stable::transpose(make(t, Extents{t.size(0), t.size(2), t.size(1), width}), 1, 2);
  }
  return make(t, Extents{t.size(0), t.size(1), t.size(2), width});
}

inline Tensor empty_heads(const Tensor& t, int64_t width) {
  return empty_heads(t, width, [](const Tensor& like, const Extents& sizes) { return new_tensor(like, sizes); });
}

// In the dtype of sums.
inline Tensor empty_sums(const Tensor& t, int64_t width) { return empty_heads(t, width, new_sums); }

// Whether bfloat16 is multiplied in pairs: only AMD's cores do twice the multiply-adds on them that they do on float.
template <typename Kernel>
bool takes_pairs(const Kernel& pairs, int64_t D, int64_t Dv) {
  return pairs.run && is_amd() && D % 2 == 0 && Dv % 2 == 0;
}

inline Tensor empty_heads(const Tensor& t) { return empty_heads(t, t.size(3)); }

}  // namespace seqaccel::attention
