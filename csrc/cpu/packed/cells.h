// The cells' updates for a session: one vector of units of one stream, from the sums of the products.
#pragma once

#include "common/product_cells.h"
#include "cpu/packed/session.h"
#include "cpu/rnn/products.h"

namespace seqaccel::SEQACCEL_ISA::packed {
using namespace rnn;

struct SessionFunctions {
  SEQACCEL_INLINE static Vec<float> sigmoid(Vec<float> x) { return sigmoid_vec<float>(x); }
  SEQACCEL_INLINE static Vec<float> tanh(Vec<float> x) { return tanh_vec<float>(x); }
};

// Keeps the first n lanes and sets the others to 0.
SEQACCEL_INLINE Vec<float> first_lanes(Vec<float> v, int n) {
  alignas(64) float lanes[Lanes<float>];
  store(lanes, v);
  for (int i = n; i < Lanes<float>; ++i) lanes[i] = 0.0f;
  return load(lanes);
}

// Mean and 1 / sqrt(variance + epsilon); the variance is biased.
struct Moments {
  float mean, scale;
};

inline Moments moments_of(const float* x, ptrdiff_t count, float epsilon) {
  constexpr int L = Lanes<float>;
  Vec<float> sum = {}, squares = {};
  for (ptrdiff_t k = 0; k < count; k += L) sum += load_some(x + k, int(min_of(L, count - k)));
  const float mean = horizontal_sum<float>(sum) / float(count);
  for (ptrdiff_t k = 0; k < count; k += L) {
    const int n = int(min_of(L, count - k));
    const Vec<float> d = load_some(x + k, n) - mean;
    squares += n == L ? d * d : first_lanes(d * d, n);
  }
  return {mean, 1.0f / sqrtf(horizontal_sum<float>(squares) / float(count) + epsilon)};
}

// Number of vectors of a block: one per gate, or four if the cell has one gate.
template <int Gates>
constexpr int kBlockVectors = Gates == 1 ? 4 : Gates;

// Loads a unit's weights, its biases (into pre) and its old state.
template <class Cell>
SEQACCEL_INLINE Unit<Cell, Vec<float>> unit_at(const SessionLayer& l, ptrdiff_t unit, const float* h, const float* c) {
  Unit<Cell, Vec<float>> u;
#pragma GCC unroll 8
  for (int g = 0; g < Cell::kGates + int(Cell::kSeparate); ++g) u.pre[g] = load(l.bias + g * l.stride + unit);
#pragma GCC unroll 16
  for (int w = 0; w < Cell::kWeights; ++w) u.weights[w] = load(l.weights + w * l.stride + unit);
  u.h_prev = load(h + unit);
  if constexpr (Cell::kHasCell) u.c_prev = load(c + unit);
  return u;
}

// Adds gates of the sums x and h, a vector a gate, to the pre-activations from `first` on.
template <class Cell>
SEQACCEL_INLINE void add_sums(Unit<Cell, Vec<float>>& u, const float* x, const float* h, int first, int count) {
  constexpr int L = Lanes<float>;
#pragma GCC unroll 8
  for (int g = 0; g < count; ++g) {
    const Vec<float> from_x = load(x + g * L), from_h = load(h + g * L);
    if (Cell::kSeparate && first + g == Cell::kGates - 1) {
      u.pre[first + g] += from_x;
      u.pre[first + g + 1] += from_h;
    } else {
      u.pre[first + g] += from_x + from_h;
    }
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
