// Vectors of the instruction set at hand, and the functions a recurrent cell or a softmax needs.
//
//   Vec<T>      a register of Lanes<T> values, T float or double (a GCC vector extension type: + - * / and ?: work on
//               it)
//   exp         relative error <= 2 ulp; 0 below the smallest normal number, infinity within 0.4 of the overflow
//               threshold
//   sigmoid(x)  1 / (1 + 2 (e^-x / 2)): half of e^-x does not overflow where e^-x is finite
//   |tanh(x)|   -E / (E + 2) with E = expm1(-2|x|), so that small arguments keep their relative accuracy; what rounding
//               takes of E, of E + 2 and of the quotient is put back. Root of the mean square error 0.3 ulp, and 0.4
//               without fused multiply-adds; 0.8 if it were not. Sixteen floats at a time: a polynomial of degree 5 in
//               each of 32 segments (tanh_table.py), 0.35 ulp below |x| = 0.1 and 0.3 above. A register holds
//               16 coefficients, and one instruction picks from two of them: 3.4 ns instead of 8.5, LSTM step of 16
//               units 22 ns instead of 40
//
// expm1(x) = 2^n p + (2^n - 1), with n = round(x log2 e), r = x - n ln 2, p = expm1(r) = r + r^2 g(r); g is a
// polynomial fitted at Chebyshev nodes on |r| <= 1.01 ln(2)/2 (error 2.4e-8 for float, 5.5e-19 for double, relative to
// the node of largest error).
#pragma once

#include "cpu/base/intrinsics.h"
#include "cpu/base/isa.h"
#if SEQACCEL_VECTOR_BYTES == 64
#include "cpu/base/tanh_table.h"
#endif

namespace seqaccel::SEQACCEL_ISA::inline base {

template <typename T>
struct VecTypes;

template <>
struct VecTypes<float> {
  typedef float Value __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(SEQACCEL_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
  typedef uint32_t Bits __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
};

template <>
struct VecTypes<double> {
  typedef double Value __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(SEQACCEL_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
  typedef uint64_t Bits __attribute__((vector_size(SEQACCEL_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VecTypes<T>::Value;

template <typename T>
constexpr int Lanes = SEQACCEL_VECTOR_BYTES / int(sizeof(T));

template <typename T>
SEQACCEL_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTypes<T>::Unaligned*>(p);
}

template <typename T>
SEQACCEL_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTypes<T>::Unaligned*>(p) = v;
}

// The first n lanes, the others 0; n <= Lanes<T>.
template <typename T>
SEQACCEL_INLINE Vec<T> load(const T* p, int n) {
  alignas(SEQACCEL_VECTOR_BYTES) T lanes[Lanes<T>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <typename T>
SEQACCEL_INLINE void store(T* p, Vec<T> v, int n) {
  alignas(SEQACCEL_VECTOR_BYTES) T lanes[Lanes<T>];
  store(lanes, v);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

#if SEQACCEL_VECTOR_BYTES == 64
template <>
SEQACCEL_INLINE Vec<float> load<float>(const float* p, int n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
}
template <>
SEQACCEL_INLINE Vec<double> load<double>(const double* p, int n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p);
}
template <>
SEQACCEL_INLINE void store<float>(float* p, Vec<float> v, int n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
}
template <>
SEQACCEL_INLINE void store<double>(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
}
#endif

// The first n lanes, or all of them.
template <typename T>
SEQACCEL_INLINE Vec<T> load_some(const T* p, int n) {
  return n == Lanes<T> ? load(p) : load(p, n);
}

template <typename T>
SEQACCEL_INLINE void store_some(T* p, Vec<T> v, int n) {
  if (n == Lanes<T>) {
    store(p, v);
  } else {
    store(p, v, n);
  }
}

constexpr bool kNonTemporalStores = SEQACCEL_VECTOR_BYTES == 64;  // if a vector is a whole cache line

// Like store_some. If `non_temporal` and kNonTemporalStores, the store bypasses the caches: p must be aligned, and
// fence_stores() must be called before another thread reads it.
template <typename T>
SEQACCEL_INLINE void store_some(T* p, Vec<T> v, int n, bool non_temporal) {
#if SEQACCEL_VECTOR_BYTES == 64
  if (non_temporal) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#endif
  store_some(p, v, n);
}

SEQACCEL_INLINE void fence_stores() {
#if SEQACCEL_VECTOR_BYTES == 64
  _mm_sfence();
#endif
}

// Keeps a value in its register. A compiler that loads it again for each of two uses doubles what a product reads.
template <class V>
SEQACCEL_INLINE void keep(V& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#endif
}

template <typename T>
SEQACCEL_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 in every lane; keeps -0 and NaN
}

// Pairwise, in a fixed order.
template <typename T>
SEQACCEL_INLINE T horizontal_sum(Vec<T> v) {
  alignas(SEQACCEL_VECTOR_BYTES) T lanes[Lanes<T>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = Lanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <typename T>
SEQACCEL_INLINE T horizontal_max(Vec<T> v) {
  alignas(SEQACCEL_VECTOR_BYTES) T lanes[Lanes<T>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = Lanes<T> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
  }
  return lanes[0];
}

template <typename T>
struct ExpTraits;

template <>
struct ExpTraits<float> {
  static constexpr float kLog2E = 1.44269504088896340736f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kLowest = -88.0f, kHighest = 89.0f;  // 2^n becomes 0 and infinity here
  static constexpr float kInfinite = 88.37f;                  // less than 127.5 ln 2, above which 2^n is infinite
  static constexpr float kHalfLowest = -87.0f;                // 2^(n - 1) becomes 0 here
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kPolynomial[] = {0.5f, 0.16666573381900846f, 0.041666550110305124f, 0.0083637738744055735f,
                                          0.0013926926614021906f};
};

template <>
struct ExpTraits<double> {
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kRound = 6755399441055744.0;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -709.0, kHighest = 710.0;
  static constexpr double kInfinite = 709.43;
  static constexpr double kHalfLowest = -708.0;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kPolynomial[] = {
      0.5,
      0.16666666666666671438,
      0.041666666666666670074,
      0.0083333333333255446996,
      0.0013888888888883326674,
      0.00019841269876864354929,
      0.000024801587327007186731,
      2.7557252833516909748e-6,
      2.7557271810219799569e-7,
      2.5106274673573294687e-8,
      2.0915442297780115216e-9,
  };
};

// e^x = scale * (1 + p), or with kHalf e^x / 2. A NaN passes through p. Where scale is infinite, p is positive:
// infinity times -|p| would turn the sum into a NaN. Half of that scale is finite.
template <typename T, bool kHalf = false>
SEQACCEL_INLINE void exp_parts(Vec<T> x, Vec<T>& scale, Vec<T>& p) {
  using E = ExpTraits<T>;
  typedef typename VecTypes<T>::Bits Bits;
  constexpr T kLowest = kHalf ? E::kHalfLowest : E::kLowest;
  x = x < kLowest ? broadcast(kLowest) : x;
  x = x > (kHalf ? E::kHighest : E::kInfinite) ? broadcast(E::kHighest) : x;
  const Vec<T> shifted = x * E::kLog2E + E::kRound;
  const Vec<T> n = shifted - E::kRound;
  Vec<T> r = x - n * E::kLn2High;
  r = r - n * E::kLn2Low;
  constexpr int kDegree = int(sizeof(E::kPolynomial) / sizeof(T)) - 1;
  Vec<T> g = broadcast(E::kPolynomial[kDegree]);
#pragma GCC unroll 16
  for (int i = kDegree - 1; i >= 0; --i) g = g * r + E::kPolynomial[i];
  p = r + r * r * g;
  const Bits bits = (((Bits)shifted) + (E::kBias - int(kHalf))) << E::kMantissa;
  scale = (Vec<T>)bits;
}

template <typename T>
SEQACCEL_INLINE Vec<T> exp_vec(Vec<T> x) {
  Vec<T> scale, p;
  exp_parts<T>(x, scale, p);
  return scale * p + scale;
}

template <typename T>
SEQACCEL_INLINE Vec<T> sigmoid_vec(Vec<T> x) {
  Vec<T> scale, p;
  exp_parts<T, true>(-x, scale, p);
  return T(1) / (T(1) + T(2) * (scale * p + scale));
}

template <typename T>
SEQACCEL_INLINE Vec<T> tanh_vec(Vec<T> x) {
  typedef typename VecTypes<T>::Bits Bits;
  const Bits sign = ((Bits)x) & ((Bits)broadcast(T(-0.0)));
  const Vec<T> magnitude = (Vec<T>)(((Bits)x) ^ sign);
  Vec<T> scale, p;
  exp_parts<T>(magnitude * T(-2), scale, p);
  const Vec<T> less = scale - T(1), e = scale * p + less, e_low = scale * p + (less - e);
  const Vec<T> d = e + T(2), d_low = e + (T(2) - d) + e_low, inverse = T(1) / d;
  const Vec<T> quotient = e * inverse;
  const Vec<T> y = quotient + inverse * ((e - quotient * d) + (e_low - quotient * d_low));  // <= 0: its sign is dropped
  return (Vec<T>)((((Bits)y) & ~((Bits)broadcast(T(-0.0)))) | sign);
}

#if SEQACCEL_VECTOR_BYTES == 64
SEQACCEL_INLINE Vec<float> tanh_entry(int entry, VecTypes<float>::Int segment) {
  return __builtin_shuffle(load(kTanhTable[entry]), load(kTanhTable[entry] + 16), segment);
}

template <>
SEQACCEL_INLINE Vec<float> tanh_vec<float>(Vec<float> x) {
  typedef VecTypes<float>::Bits Bits;
  typedef VecTypes<float>::Int Int;
  const Bits sign = ((Bits)x) & ((Bits)broadcast(-0.0f));
  const Vec<float> magnitude = _mm512_min_ps(broadcast(kTanhHighest), (Vec<float>)(((Bits)x) ^ sign));  // keeps NaN
  const Int lowest = (Int)broadcast(kTanhLowest);
  const Int segment = (Int)((Bits)((Int)magnitude > lowest ? (Int)magnitude : lowest) >> 21);  // of which 5 bits count
  const Vec<float> t = magnitude - tanh_entry(0, segment);
  Vec<float> y = tanh_entry(kTanhDegree + 1, segment);
#pragma GCC unroll 8
  for (int i = kTanhDegree; i > 0; --i) y = y * t + tanh_entry(i, segment);
  return (Vec<float>)(((Bits)y) | sign);
}
#endif

}  // namespace seqaccel::SEQACCEL_ISA::inline base
