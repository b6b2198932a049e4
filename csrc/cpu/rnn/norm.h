// Statistics of rows for layer norm: y = (x - mean) / sigma, sigma^2 = variance + epsilon, the variance biased.
#pragma once

#include <math.h>

#include "cpu/rnn/blocks.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr double kEpsilon = 1e-5;

template <typename T>
struct RowMoments {
  T mean, scale;  // scale: 1 / sigma
};

// The mean of `count` values, and the sum of their squared distances from it.
template <typename T>
struct Moments {
  T count, mean, squares;
  RowMoments<T> of_row() const { return {mean, T(1) / T(sqrt(squares / count + T(kEpsilon)))}; }
};

// The moments of `pieces` pieces of `count` values, `stride` apart, in two passes.
template <typename T>
Moments<T> moments_of(const T* x, ptrdiff_t count, int pieces = 1, ptrdiff_t stride = 0) {
  constexpr int L = Lanes<T>;
  const ptrdiff_t whole = count / L * L;
  Vec<T> sums{};
  T total = T(0);
  for (int piece = 0; piece < pieces; ++piece) {
    const T* const from = x + piece * stride;
    for (ptrdiff_t k = 0; k < whole; k += L) sums += load(from + k);
    for (ptrdiff_t k = whole; k < count; ++k) total += from[k];
  }
  total += horizontal_sum<T>(sums);
  const T mean = count > 0 ? total / T(pieces * count) : T(0);
  Vec<T> squares{};
  T square = T(0);
  for (int piece = 0; piece < pieces; ++piece) {
    const T* const from = x + piece * stride;
    for (ptrdiff_t k = 0; k < whole; k += L) {
      const Vec<T> d = load(from + k) - mean;
      squares += d * d;
    }
    for (ptrdiff_t k = whole; k < count; ++k) square += (from[k] - mean) * (from[k] - mean);
  }
  return {T(pieces * count), mean, square + horizontal_sum<T>(squares)};
}

// N values per row from each group of units, for the other threads of the part to read after a barrier. Sums over a
// row's units are exchanged this way, since the units themselves would have to come from the other cores.
template <typename T, int N>
struct Shared {
  T* values;  // of the part: [groups, stride]
  ptrdiff_t stride;

  static ptrdiff_t size(ptrdiff_t rows) { return panel_count(rows * N * ptrdiff_t(sizeof(T)), 64) * 64 / sizeof(T); }
  static Shared of(T* all, const Member& me, ptrdiff_t rows) {
    return {all + me.part() * me.split.groups * size(rows), size(rows)};
  }
  T& at(int group, ptrdiff_t row, int i) const { return values[group * stride + row * N + i]; }
};

template <typename T>
void share_moments(const Shared<T, 3>& shared, const Member& me, ptrdiff_t row, const Moments<T>& moments) {
  shared.at(me.share.group, row, 0) = moments.count;
  shared.at(me.share.group, row, 1) = moments.mean;
  shared.at(me.share.group, row, 2) = moments.squares;
}

// Of a whole row, from those of each group's units.
template <typename T>
RowMoments<T> join_moments(const Shared<T, 3>& shared, const Member& me, ptrdiff_t row) {
  Moments<T> all{};
  for (int group = 0; group < me.split.groups; ++group) {
    all.count += shared.at(group, row, 0);
    all.mean += shared.at(group, row, 0) * shared.at(group, row, 1);
  }
  all.mean /= all.count;
  for (int group = 0; group < me.split.groups; ++group) {
    const T away = shared.at(group, row, 1) - all.mean;
    all.squares += shared.at(group, row, 2) + shared.at(group, row, 0) * away * away;
  }
  return all.of_row();
}

// Sums of N values over a row's units. A thread adds up vectors of its own units, and then shares the sums.
template <typename T, int N>
struct UnitSums {
  T* own;  // [rows, N, L]; zero between steps
  Shared<T, N> shared;

  SEQACCEL_INLINE void add(ptrdiff_t row, int i, Vec<T> x, int units) const {
    T* const at = own + (row * N + i) * Lanes<T>;
    store_some(at, load_some(at, units) + x, units);
  }
  void share(const Member& me, ptrdiff_t rows) const {
    for (ptrdiff_t i = 0; i < rows * N; ++i) {
      shared.at(me.share.group, i / N, int(i % N)) = horizontal_sum<T>(load(own + i * Lanes<T>));
      store(own + i * Lanes<T>, Vec<T>{});
    }
  }
  void clear(ptrdiff_t rows) const { memset(own, 0, sizeof(T) * size_t(rows * N * Lanes<T>)); }
  T total(const Member& me, ptrdiff_t row, int i) const {
    T sum = T(0);
    for (int group = 0; group < me.split.groups; ++group) sum += shared.at(group, row, i);
    return sum;
  }
};

// The gradient through a norm: dL/dx = (g - mean(g) - y mean(g y)) / sigma, with g = dL/dy.
template <typename T>
struct NormGrad {
  T mean, slope, scale;
  // From the sums over `count` values: number i is that of g, number i + 1 that of g y.
  template <int N>
  static NormGrad of(const UnitSums<T, N>& sums, const Member& me, ptrdiff_t row, int i, ptrdiff_t count, T scale) {
    return {sums.total(me, row, i) / T(count), sums.total(me, row, i + 1) / T(count), scale};
  }
  SEQACCEL_INLINE Vec<T> operator()(Vec<T> g, Vec<T> y) const { return (g - mean - y * slope) * scale; }
};

template <typename T>
void normalize_rows(const NormRows<T>& p) {
  constexpr int L = Lanes<T>;
  const bool small = double(p.rows) * double(p.width) < 16384.0;
#pragma omp parallel for schedule(static) if (!small)
  for (ptrdiff_t row = 0; row < p.rows; ++row) {
    T* const x = p.x + row * p.row;
    const RowMoments<T> moments = moments_of(x, p.width).of_row();
    for (ptrdiff_t k = 0; k < p.width; k += L) {
      const int n = int(min_of(L, p.width - k));
      store_some(x + k, (load_some(x + k, n) - moments.mean) * moments.scale, n);
    }
    if (p.stats) p.stats[row * kNormStats + kScaleX] = moments.scale;
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
