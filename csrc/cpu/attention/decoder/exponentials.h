// Additive attention of a decoder's steps from exponentials, which are calculated once per key and call, and once per
// feature of a query. With a = e^2q and e = e^2k,
//   tanh(q + k) = 1 - 2 r, and its derivative is 4 r (1 - r), r = 1 / (1 + a e)
// A value takes one reciprocal and 4 products and sums instead of a polynomial: on two Zen 4 cores, B=16, S=400, A=512,
// 1.8 ns per 16 floats instead of 6 to 8, prefetching included. Its error is absolute, 1.5e-7 in float: enough for
// logits and for the gradient of queries, not for that of score_weight, which is a sum of the tanh themselves.
#pragma once

#include "cpu/attention/decoder/decoder.h"
#include "cpu/base/vec.h"
#include "cpu/base/workspace.h"

namespace seqaccel::SEQACCEL_ISA::attention::decoder {

constexpr double kLargest = 20;             // |q| and |k| up to which a e and 1 / (1 + a e) are normal numbers
constexpr ptrdiff_t kExponentialSteps = 4;  // fewer steps are not worth the keys' exponentials

template <typename T>
SEQACCEL_INLINE Vec<T> reciprocal(Vec<T> x) {
  return T(1) / x;
}

#if SEQACCEL_VECTOR_BYTES == 64
template <>
SEQACCEL_INLINE Vec<float> reciprocal<float>(Vec<float> x) {
  const Vec<float> r = _mm512_rcp14_ps(x);
  return r * (2.0f - x * r);
}
#endif

// out[i] = e^(2 x[i]). Returns whether no |x[i]| is larger than kLargest, and none is NaN.
template <typename T>
bool doubled_exponentials(const T* x, ptrdiff_t count, T* out) {
  constexpr int L = Lanes<T>;
  const Vec<T> zero = {}, one = broadcast(T(1)), largest = broadcast(T(kLargest));
  Vec<T> beyond = {};
  for (ptrdiff_t i = 0; i < count; i += L) {
    const int lanes = int(min_of(ptrdiff_t(L), count - i));
    const Vec<T> v = load_some(x + i, lanes);
    beyond += (v <= largest) & (v >= -largest) ? zero : one;
    store_some(out + i, exp_vec<T>(v + v), lanes);
  }
  return horizontal_sum<T>(beyond) == T(0);
}

// Logits of a query and K keys, without the sum of all weights.
template <typename T, int K>
SEQACCEL_INLINE void exponential_logits(const T* query, const T* key, const T* weight, ptrdiff_t A, T* logits) {
  constexpr int L = Lanes<T>;
  Vec<T> sum[K] = {};
  const auto add = [&](ptrdiff_t h, int lanes) __attribute__((always_inline)) {
    const Vec<T> a = load_some(query + h, lanes), w = load_some(weight + h, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      __builtin_prefetch(key + (n + K) * A + h);
      sum[n] += w * reciprocal<T>(T(1) + a * load_some(key + n * A + h, lanes));
    }
  };
  ptrdiff_t h = 0;
  for (; h + L <= A; h += L) add(h, L);
  if (h < A) add(h, int(A - h));
  for (int n = 0; n < K; ++n) logits[n] = T(-2) * horizontal_sum<T>(sum[n]);
}

// grad[h] += sum over K keys of s_j r (1 - r)
template <typename T, int K>
SEQACCEL_INLINE void add_exponential_slopes(const T* query, const T* key, const T* s, ptrdiff_t A, T* grad) {
  constexpr int L = Lanes<T>;
  const auto add = [&](ptrdiff_t h, int lanes) __attribute__((always_inline)) {
    const Vec<T> a = load_some(query + h, lanes);
    Vec<T> sum = load_some(grad + h, lanes);
#pragma GCC unroll 4
    for (int n = 0; n < K; ++n) {
      __builtin_prefetch(key + (n + K) * A + h);
      const Vec<T> r = reciprocal<T>(T(1) + a * load_some(key + n * A + h, lanes));
      sum += s[n] * (r - r * r);
    }
    store_some(grad + h, sum, lanes);
  };
  ptrdiff_t h = 0;
  for (; h + L <= A; h += L) add(h, L);
  if (h < A) add(h, int(A - h));
}

// dL/dq of a query from dL/dlogits.
template <typename T>
void exponential_backward(const T* query, const T* key, const T* weight, const T* grad_logits, ptrdiff_t count,
                          ptrdiff_t A, T* grad_query) {
  constexpr int L = Lanes<T>;
  memset(grad_query, 0, size_t(A) * sizeof(T));
  ptrdiff_t j = 0;
  for (; j + 4 <= count; j += 4) add_exponential_slopes<T, 4>(query, key + j * A, grad_logits + j, A, grad_query);
  for (; j < count; ++j) add_exponential_slopes<T, 1>(query, key + j * A, grad_logits + j, A, grad_query);
  for (ptrdiff_t h = 0; h < A; h += L) {
    const int lanes = int(min_of(ptrdiff_t(L), A - h));
    store_some(grad_query + h, T(4) * load_some(grad_query + h, lanes) * load_some(weight + h, lanes), lanes);
  }
}

// The exponentials of all keys and of the queries of a step.
template <typename T>
struct Exponentials {
  struct Row {
    const T *query, *key;  // null: tanh is to be used
  };

  T *keys = nullptr, *queries = nullptr;  // [B, S, A], [B, A]
  bool* bounded = nullptr;                // [B]: no key is larger than kLargest

  void reserve(const Decoder<T>& p, Workspace& workspace) {
    if (p.score_weight == nullptr || p.steps < kExponentialSteps) return;
    workspace.reserve(keys, p.B * p.S * p.A);
    workspace.reserve(queries, p.B * p.A);
    workspace.reserve(bounded, p.B);
  }

  // Of the first `count` keys of a source.
  void begin(const Decoder<T>& p, ptrdiff_t b, ptrdiff_t count) const {
    const ptrdiff_t at = b * p.S * p.A;
    if (keys != nullptr) bounded[b] = doubled_exponentials(p.key + at, count * p.A, keys + at);
  }

  Row row(const Decoder<T>& p, ptrdiff_t b, const T* query) const {
    if (keys == nullptr || !bounded[b] || !doubled_exponentials(query, p.A, queries + b * p.A)) return {};
    return {queries + b * p.A, keys + b * p.S * p.A};
  }
};

}  // namespace seqaccel::SEQACCEL_ISA::attention::decoder
