// bfloat16 and float16 on a GPU: memory holds 16 bits, kernels calculate in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/narrow.h"

namespace seqaccel::cuda {

template <typename T>
__device__ __forceinline__ Compute<T> widen(T x) {
  return x;
}

template <>
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}

template <>
__device__ __forceinline__ float widen(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T narrow(Compute<T> x) {
  return x;
}

template <>
__device__ __forceinline__ BFloat16 narrow<BFloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

template <>
__device__ __forceinline__ Float16 narrow<Float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

}  // namespace seqaccel::cuda
