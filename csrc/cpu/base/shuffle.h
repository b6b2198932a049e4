// Fixed permutations of the lanes of vectors, for any vector length.
#pragma once

#include "cpu/base/narrow.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

template <int... I>
struct LaneList {};

#if defined(__clang__)
template <typename, int... I>
using LaneSequence = LaneList<I...>;
template <int N>
using LaneIndices = __make_integer_seq<LaneSequence, int, N>;
#else
template <int N>
using LaneIndices = LaneList<__integer_pack(N)...>;
#endif

// Source lane for lane i of a two-operand shuffle: 0 .. L-1 from the first operand, L .. 2L-1 from the second.
// Three interleaved sequences are taken apart (and put together) by a shuffle of two operands followed by one with the
// third.
template <int L>
struct Shuffles {
  static constexpr int unzip3_first(int k, int i) { return 3 * i + k < 2 * L ? 3 * i + k : 0; }
  static constexpr int unzip3_second(int k, int i) { return 3 * i + k < 2 * L ? i : 3 * i + k - L; }
  static constexpr int zip3_first(int part, int i) {
    const int at = part * L + i;
    return at % 3 == 0 ? at / 3 : at % 3 == 1 ? L + at / 3 : 0;
  }
  static constexpr int zip3_second(int part, int i) {
    const int at = part * L + i;
    return at % 3 == 2 ? L + at / 3 : i;
  }
  static constexpr int zip2(int part, int i) {
    const int at = part * L + i;
    return at % 2 * L + at / 2;
  }
  // Lane i takes the lane `distance` before it (after it, reversed); past the edge, its own lane of the second operand.
  static constexpr int shift(int distance, bool reverse, int i) {
    const int from = reverse ? i + distance : i - distance;
    return from >= 0 && from < L ? from : L + i;
  }
};

template <typename T, int K, int... I>
SEQACCEL_INLINE Vec<T> unzip3(Vec<T> a, Vec<T> b, Vec<T> c, LaneList<I...>) {
  using S = Shuffles<Lanes<T>>;
  const Vec<T> ab = __builtin_shufflevector(a, b, S::unzip3_first(K, I)...);
  return __builtin_shufflevector(ab, c, S::unzip3_second(K, I)...);
}

template <typename T, int PART, int... I>
SEQACCEL_INLINE Vec<T> zip3(Vec<T> a, Vec<T> b, Vec<T> c, LaneList<I...>) {
  using S = Shuffles<Lanes<T>>;
  const Vec<T> ab = __builtin_shufflevector(a, b, S::zip3_first(PART, I)...);
  return __builtin_shufflevector(ab, c, S::zip3_second(PART, I)...);
}

template <typename T, int ODD, int... I>
SEQACCEL_INLINE Vec<T> unzip2(Vec<T> a, Vec<T> b, LaneList<I...>) {
  return __builtin_shufflevector(a, b, (2 * I + ODD)...);
}

template <typename T, int PART, int... I>
SEQACCEL_INLINE Vec<T> zip2(Vec<T> a, Vec<T> b, LaneList<I...>) {
  return __builtin_shufflevector(a, b, Shuffles<Lanes<T>>::zip2(PART, I)...);
}

// out[k][i] = p[K * i + k]
template <typename S>
SEQACCEL_INLINE void load_interleaved(const S* p, Vec<Compute<S>> (&out)[3]) {
  typedef Compute<S> T;
  const Vec<T> a = load_wide(p), b = load_wide(p + Lanes<T>), c = load_wide(p + 2 * Lanes<T>);
  const LaneIndices<Lanes<T>> lanes;
  out[0] = unzip3<T, 0>(a, b, c, lanes);
  out[1] = unzip3<T, 1>(a, b, c, lanes);
  out[2] = unzip3<T, 2>(a, b, c, lanes);
}

template <typename S>
SEQACCEL_INLINE void load_interleaved(const S* p, Vec<Compute<S>> (&out)[4]) {
  typedef Compute<S> T;
  const Vec<T> a = load_wide(p), b = load_wide(p + Lanes<T>);
  const Vec<T> c = load_wide(p + 2 * Lanes<T>), d = load_wide(p + 3 * Lanes<T>);
  const LaneIndices<Lanes<T>> lanes;
  const Vec<T> even_low = unzip2<T, 0>(a, b, lanes), even_high = unzip2<T, 0>(c, d, lanes);
  const Vec<T> odd_low = unzip2<T, 1>(a, b, lanes), odd_high = unzip2<T, 1>(c, d, lanes);
  out[0] = unzip2<T, 0>(even_low, even_high, lanes);
  out[1] = unzip2<T, 0>(odd_low, odd_high, lanes);
  out[2] = unzip2<T, 1>(even_low, even_high, lanes);
  out[3] = unzip2<T, 1>(odd_low, odd_high, lanes);
}

// p[K * i + k] = v[k][i]
template <typename S>
SEQACCEL_INLINE void store_interleaved(S* p, const Vec<Compute<S>> (&v)[3]) {
  typedef Compute<S> T;
  const LaneIndices<Lanes<T>> lanes;
  store_narrow(p, zip3<T, 0>(v[0], v[1], v[2], lanes));
  store_narrow(p + Lanes<T>, zip3<T, 1>(v[0], v[1], v[2], lanes));
  store_narrow(p + 2 * Lanes<T>, zip3<T, 2>(v[0], v[1], v[2], lanes));
}

template <typename S>
SEQACCEL_INLINE void store_interleaved(S* p, const Vec<Compute<S>> (&v)[4]) {
  typedef Compute<S> T;
  const LaneIndices<Lanes<T>> lanes;
  const Vec<T> even_low = zip2<T, 0>(v[0], v[2], lanes), even_high = zip2<T, 1>(v[0], v[2], lanes);
  const Vec<T> odd_low = zip2<T, 0>(v[1], v[3], lanes), odd_high = zip2<T, 1>(v[1], v[3], lanes);
  store_narrow(p, zip2<T, 0>(even_low, odd_low, lanes));
  store_narrow(p + Lanes<T>, zip2<T, 1>(even_low, odd_low, lanes));
  store_narrow(p + 2 * Lanes<T>, zip2<T, 0>(even_high, odd_high, lanes));
  store_narrow(p + 3 * Lanes<T>, zip2<T, 1>(even_high, odd_high, lanes));
}

template <typename T, int DISTANCE, bool kReverse, int... I>
SEQACCEL_INLINE Vec<T> shift_lanes(Vec<T> v, Vec<T> fill, LaneList<I...>) {
  return __builtin_shufflevector(v, fill, Shuffles<Lanes<T>>::shift(DISTANCE, kReverse, I)...);
}

// Transposes the square v[Lanes][Lanes]: log2 rounds of interleaving its halves.
template <typename T, int Rounds = Lanes<T>>
SEQACCEL_INLINE void transpose(Vec<T>* v) {
  constexpr int L = Lanes<T>;
  typename VecTypes<T>::Int low = {}, high = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < L; ++lane) {
    low[lane] = lane / 2 + (lane % 2) * L;
    high[lane] = low[lane] + L / 2;
  }
  Vec<T> next[L];
#pragma GCC unroll 16
  for (int i = 0; i < L / 2; ++i) {
    next[2 * i] = __builtin_shuffle(v[i], v[i + L / 2], low);
    next[2 * i + 1] = __builtin_shuffle(v[i], v[i + L / 2], high);
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = next[i];
  if constexpr (Rounds > 2) transpose<T, Rounds / 2>(v);
}

}  // namespace seqaccel::SEQACCEL_ISA::inline base
