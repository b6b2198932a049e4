// Vectors of values that memory may hold in 16 bits: load_wide, store_narrow.
#pragma once

#include "common/narrow.h"
#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

typedef VecTypes<float>::Bits Words;
typedef VecTypes<float>::Int Ints;
typedef uint16_t Halves __attribute__((vector_size(2 * Lanes<float>)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * Lanes<float>), aligned(2), may_alias));

// To bfloat16, round to nearest even; a NaN stays one.
SEQACCEL_INLINE Words bfloat16_bits(Vec<float> x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : (bits >> 16) | 0x40;
}

// A float16's exponent is rebiased by 112. One without exponent bits is 2^-14 times its fraction: a subtraction makes
// it normal.
SEQACCEL_INLINE Vec<float> float16_values(Words half) {
  constexpr uint32_t kBias = 112u << 23, kExponent = 0x7C00u << 13;
  const Words magnitude = (half & 0x7FFF) << 13, exponent = magnitude & kExponent;
  const Words normal = magnitude + kBias + (exponent == kExponent ? Words{} + kBias : Words{});
  const Words smallest = (Words)((Vec<float>)(magnitude + kBias + (1u << 23)) - (Vec<float>)(Words{} + (113u << 23)));
  return (Vec<float>)((exponent == 0 ? smallest : normal) | ((half & 0x8000) << 16));
}

// To float16, round to nearest even; a NaN stays one.
SEQACCEL_INLINE Words float16_bits(Vec<float> x) {
  constexpr int32_t kInfinity = 255 << 23, kOverflow = 143 << 23, kSmallest = 113 << 23;
  const Ints magnitude = (Ints)x & 0x7FFFFFFF;
  // The addition rounds to the place of the last fraction bit.
  const Vec<float> magic = (Vec<float>)(Ints{} + (126 << 23));
  const Ints tiny = (Ints)((Vec<float>)magnitude + magic) - (Ints)magic;
  const Ints normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  const Ints large = magnitude > kInfinity ? Ints{} + 0x7E00 : Ints{} + 0x7C00;
  const Ints half = magnitude >= kOverflow ? large : magnitude < kSmallest ? tiny : normal;
  return (Words)half | (((Words)x >> 16) & 0x8000);
}

template <typename T>
constexpr bool kNarrow = sizeof(T) == 2;

SEQACCEL_INLINE Vec<float> widen(Halves bits, BFloat16) {
  return (Vec<float>)(__builtin_convertvector(bits, Words) << 16);
}
SEQACCEL_INLINE Vec<float> widen(Halves bits, Float16) { return float16_values(__builtin_convertvector(bits, Words)); }
SEQACCEL_INLINE Words narrow_bits(Vec<float> v, BFloat16) { return bfloat16_bits(v); }
SEQACCEL_INLINE Words narrow_bits(Vec<float> v, Float16) { return float16_bits(v); }

// Lanes<Compute<T>> values.
template <typename T>
SEQACCEL_INLINE Vec<Compute<T>> load_wide(const T* p) {
  if constexpr (kNarrow<T>) {
    return widen((Halves) * reinterpret_cast<const UnalignedHalves*>(p), T{});
  } else {
    return load(p);
  }
}

template <typename T>
SEQACCEL_INLINE void store_narrow(T* p, Vec<Compute<T>> v) {
  if constexpr (kNarrow<T>) {
    *reinterpret_cast<UnalignedHalves*>(p) = (UnalignedHalves) __builtin_convertvector(narrow_bits(v, T{}), Halves);
  } else {
    store(p, v);
  }
}

// By a non-temporal store if kNonTemporalStores: p is aligned to what it writes, and fence_stores() comes before
// another thread reads it.
template <typename T>
SEQACCEL_INLINE void stream_narrow(T* p, Vec<Compute<T>> v) {
#if SEQACCEL_VECTOR_BYTES == 64
  if constexpr (kNarrow<T>) {
    const Halves bits = __builtin_convertvector(narrow_bits(v, T{}), Halves);
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
  }
#endif
  if constexpr (kNarrow<T>) {
    store_narrow(p, v);
  } else {
    store_some(p, v, Lanes<T>, true);
  }
}

// The first n lanes, the others 0; n <= Lanes<Compute<T>>.
template <typename T>
SEQACCEL_INLINE Vec<Compute<T>> load_wide(const T* p, int n) {
  if constexpr (kNarrow<T>) {
    T lanes[Lanes<float>] = {};
    for (int i = 0; i < n; ++i) lanes[i] = p[i];
    return load_wide(lanes);
  } else {
    return load(p, n);
  }
}

template <typename T>
SEQACCEL_INLINE void store_narrow(T* p, Vec<Compute<T>> v, int n) {
  if constexpr (kNarrow<T>) {
    T lanes[Lanes<float>];
    store_narrow(lanes, v);
    for (int i = 0; i < n; ++i) p[i] = lanes[i];
  } else {
    store(p, v, n);
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::inline base
