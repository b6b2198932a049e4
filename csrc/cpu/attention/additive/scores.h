// Logits of additive attention, and the softmax of a query's logits: what all queries at once (kernels.h) and a
// decoder's steps share.
#pragma once

#include <math.h>

#include "cpu/attention/additive/additive.h"
#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::attention::additive {

// Logits of the queries i ... i + Q - 1 and the keys j ... j + K - 1; -infinity where a query does not attend.
template <typename T, int Q, int K>
SEQACCEL_INLINE void score_tile(const Additive<T>& p, int64_t b, int64_t i, int64_t j) {
  constexpr int L = Lanes<T>;
  bool seen[Q * K], any = false;
  for (int n = 0; n < Q * K; ++n) {
    const int64_t row = p.mask_rows == 1 ? 0 : i + n / K;
    seen[n] = p.mask == nullptr || p.mask[(b * p.mask_rows + row) * p.Tk + j + n % K];
    any = any || seen[n];
  }
  Vec<T> sum[Q * K] = {};
  if (any) {
    const T *query = p.query + (b * p.Tq + i) * p.H, *key = p.key + (b * p.Tk + j) * p.H;
    const auto add = [&](int64_t h, int lanes) {
      const Vec<T> w = load_some(p.weight + h, lanes);
      for (int n = 0; n < Q * K; ++n) {
        sum[n] += w * tanh_vec<T>(load_some(query + n / K * p.H + h, lanes) + load_some(key + n % K * p.H + h, lanes));
      }
    };
    int64_t h = 0;
    for (; h + L <= p.H; h += L) add(h, L);
    if (h < p.H) add(h, int(p.H - h));
  }
  for (int n = 0; n < Q * K; ++n) {
    p.attention[(b * p.Tq + i + n / K) * p.Tk + j + n % K] = seen[n] ? horizontal_sum<T>(sum[n]) : T(-INFINITY);
  }
}

// In place; a row of nothing but -infinity, a query without keys, becomes 0.
template <typename T>
void softmax_row(T* row, int64_t count) {
  constexpr int L = Lanes<T>;
  const int64_t whole = count / L * L;
  Vec<T> most = broadcast(T(-INFINITY));
  for (int64_t j = 0; j < whole; j += L) {
    const Vec<T> v = load(row + j);
    most = v > most ? v : most;
  }
  T top = horizontal_max<T>(most);
  for (int64_t j = whole; j < count; ++j) top = row[j] > top ? row[j] : top;
  Vec<T> sums = {};
  for (int64_t j = 0; j < whole; j += L) {
    const Vec<T> e = exp_vec<T>(load(row + j) - top);
    store(row + j, e);
    sums += e;
  }
  const int rest = int(count - whole);
  if (rest) store(row + whole, exp_vec<T>(load(row + whole, rest) - top), rest);
  T sum = horizontal_sum<T>(sums);
  for (int64_t j = whole; j < count; ++j) sum += row[j];
  const T inverse = T(1) / sum;
  for (int64_t j = 0; j < whole; j += L) store(row + j, load(row + j) * inverse);
  for (int64_t j = whole; j < count; ++j) row[j] *= inverse;
}

// s of one query. Where its weight is 0, as at keys that it does not attend to, the gradient does not count.
template <typename T>
void softmax_row_backward(const T* grad, const T* weights, T* out, int64_t count) {
  constexpr int L = Lanes<T>;
  const Vec<T> zero = {};
  const auto product = [&](int64_t j, int lanes) {
    const Vec<T> w = load_some(weights + j, lanes);
    return w == zero ? zero : w * load_some(grad + j, lanes);
  };
  const int64_t whole = count / L * L;
  const int rest = int(count - whole);
  Vec<T> sums = {};
  for (int64_t j = 0; j < whole; j += L) sums += product(j, L);
  if (rest) sums += product(whole, rest);
  const T mean = horizontal_sum<T>(sums);
  const auto difference = [&](int64_t j, int lanes) {
    const Vec<T> w = load_some(weights + j, lanes);
    return w == zero ? zero : w * (load_some(grad + j, lanes) - mean);
  };
  for (int64_t j = 0; j < whole; j += L) store(out + j, difference(j, L));
  if (rest) store(out + whole, difference(whole, rest), rest);
}

}  // namespace seqaccel::SEQACCEL_ISA::attention::additive
