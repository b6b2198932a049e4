// Values that memory holds in 16 bits and that kernels calculate with in float.
#pragma once

#include <cstdint>

namespace seqaccel {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <typename T>
struct Computed {
  using Type = T;
};
template <>
struct Computed<BFloat16> {
  using Type = float;
};
template <>
struct Computed<Float16> {
  using Type = float;
};

// What a kernel calculates with on values of T: float, or double for double.
template <typename T>
using Compute = typename Computed<T>::Type;

}  // namespace seqaccel
