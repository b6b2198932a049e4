// The factors of a product as they lie in its operands: floats, doubles, or pairs of bfloat16.
//
// A pair holds two values along the depth. One instruction of AVX-512 BF16 multiplies both and adds them to a float: an
// AMD core does twice the multiply-adds of float. Other values of 16 bits become floats as they are copied into an
// operand.
#pragma once

#include "cpu/base/intrinsics.h"
#include "cpu/base/narrow.h"
#include "cpu/base/tile.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

// The first value is in the low half. It may begin wherever a bfloat16 may.
struct __attribute__((packed, aligned(2), may_alias)) Pair {
  uint32_t bits;
};

// kValues along the depth make a factor, which come from memory as Value; kFlush factors are summed in a register, of
// float and double as few as keep the error near that of the sums of torch's operator.
template <typename W>
struct Factor {
  using Sum = W;
  using Value = W;
  static constexpr ptrdiff_t kValues = 1, kFlush = 64;
};

template <>
struct Factor<Pair> {
  using Sum = float;
  using Value = BFloat16;
  static constexpr ptrdiff_t kValues = 2, kFlush = 256;
};

template <typename W>
using Sum = typename Factor<W>::Sum;
template <typename W>
using FactorValue = typename Factor<W>::Value;

template <typename T>
SEQACCEL_INLINE Vec<T> load_factors(const T* p, int n = Lanes<T>) {
  return load_some(p, n);
}

template <typename T>
SEQACCEL_INLINE void multiply_add(Vec<T>& sum, Vec<T> a, Vec<T> b, T) {
  sum += a * b;
}

template <typename T>
SEQACCEL_INLINE void store_factors(T* p, Vec<T> v) {
  store(p, v);
}

// The factor that begins with *p, in every lane.
template <typename W>
SEQACCEL_INLINE Vec<W> broadcast_factor(const W* p) {
  return broadcast(*p);
}

#if defined(SEQACCEL_ISA_AVX512_BF16)
SEQACCEL_INLINE Vec<float> load_factors(const Pair* p, int n = Lanes<Pair>) {
  typedef float Unaligned __attribute__((vector_size(SEQACCEL_VECTOR_BYTES), aligned(2), may_alias));
  if (n == Lanes<Pair>) return *reinterpret_cast<const Unaligned*>(p);
  alignas(SEQACCEL_VECTOR_BYTES) float lanes[Lanes<Pair>] = {};
  memcpy(lanes, p, n * sizeof(Pair));
  return load(lanes);
}

SEQACCEL_INLINE void multiply_add(Vec<float>& sum, Vec<float> a, Vec<float> b, Pair) {
  sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

SEQACCEL_INLINE void store_factors(Pair* p, Vec<float> v) {
  typedef float Unaligned __attribute__((vector_size(SEQACCEL_VECTOR_BYTES), aligned(2), may_alias));
  *reinterpret_cast<Unaligned*>(p) = v;
}

// (first[i], second[i]) in lane i, rounded to nearest even.
SEQACCEL_INLINE Vec<float> pair_of(Vec<float> first, Vec<float> second, Pair) {
  const auto words = [](Vec<float> x) __attribute__((always_inline)) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
  };
  return (Vec<float>)_mm512_or_si512(words(first), _mm512_slli_epi32(words(second), 16));
}

SEQACCEL_INLINE Vec<float> broadcast_factor(const BFloat16* p) {
  return (Vec<float>)_mm512_set1_epi32(int(reinterpret_cast<const Pair*>(p)->bits));
}
#endif

// acc [MR, NV vectors] += A [MR, K] * B [K, NV vectors]. Factor (m, k) of A begins at a + m * a_row + k * a_k; row k of
// B begins at b + k * b_k.
template <typename W, int MR, int NV>
SEQACCEL_INLINE void add_factors(Vec<Sum<W>> (&acc)[MR][NV], const FactorValue<W>* a, ptrdiff_t a_row, ptrdiff_t a_k,
                                 const W* b, ptrdiff_t b_k, ptrdiff_t K) {
  if constexpr (Factor<W>::kValues == 1) {
    add_products<W, MR, NV>(acc, a, a_row, a_k, b, b_k, K);
  } else {
    for (ptrdiff_t k = 0; k < K; ++k) {
      Vec<Sum<W>> row[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) row[v] = load_factors(b + v * Lanes<W>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const Vec<Sum<W>> x = broadcast_factor(a + m * a_row);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) multiply_add(acc[m][v], row[v], x, W{});
      }
      a += a_k;
      b += b_k;
    }
  }
}

// The first n lanes, or all of them.
template <typename S>
SEQACCEL_INLINE Vec<Compute<S>> load_some_wide(const S* p, int n) {
  return n == Lanes<Compute<S>> ? load_wide(p) : load_wide(p, n);
}

template <typename S>
SEQACCEL_INLINE void store_some_narrow(S* p, Vec<Compute<S>> v, int n) {
  if (n == Lanes<Compute<S>>) {
    store_narrow(p, v);
  } else {
    store_narrow(p, v, n);
  }
}

template <typename S>
SEQACCEL_INLINE Compute<S> value_of(const S* p) {
  if constexpr (kNarrow<S>) {
    return load_wide(p, 1)[0];
  } else {
    return *p;
  }
}

template <typename T>
SEQACCEL_INLINE void clear(T* out, ptrdiff_t n) {
  for (ptrdiff_t i = 0; i < n; i += Lanes<T>) {
    store_some(out + i, Vec<T>{}, int(n - i < Lanes<T> ? n - i : Lanes<T>));
  }
}
SEQACCEL_INLINE void clear(BFloat16* out, ptrdiff_t n) { memset(out, 0, size_t(n) * sizeof(*out)); }
SEQACCEL_INLINE void clear(Pair* out, ptrdiff_t n) { memset(static_cast<void*>(out), 0, size_t(n) * sizeof(*out)); }

// out[i] = from[i], as D
template <typename D, typename S>
SEQACCEL_INLINE void copy_values(const S* from, ptrdiff_t n, D* out) {
  constexpr ptrdiff_t L = Lanes<Compute<S>>;
  ptrdiff_t i = 0;
  if constexpr (sizeof(D) != sizeof(S)) {
    for (; i + L <= n; i += L) store(out + i, load_wide(from + i));
    if (i < n) store(out + i, load_wide(from + i, int(n - i)), int(n - i));
  } else {
    for (; i + L <= n; i += L) memcpy(out + i, from + i, L * sizeof(S));
    if constexpr (kNarrow<S>) {
      for (; i < n; ++i) out[i] = from[i];
    } else if (i < n) {
      store(out + i, load(from + i, int(n - i)), int(n - i));
    }
  }
}

// out[i] = (first[i], second[i]); a null second is zeros.
SEQACCEL_INLINE void interleave(const BFloat16* first, const BFloat16* second, ptrdiff_t n, Pair* out) {
  constexpr ptrdiff_t L = Lanes<float>;
  ptrdiff_t i = 0;
  for (; i + L <= n; i += L) {
    const auto words = [&](const BFloat16* from) __attribute__((always_inline)) {
      return __builtin_convertvector((Halves) * reinterpret_cast<const UnalignedHalves*>(from + i), Words);
    };
    const Words pairs = second ? words(first) | words(second) << 16 : words(first);
    store(reinterpret_cast<float*>(out + i), (Vec<float>)pairs);
  }
  for (; i < n; ++i) out[i].bits = first[i].bits | (second ? uint32_t(second[i].bits) << 16 : 0);
}

}  // namespace seqaccel::SEQACCEL_ISA::inline base
