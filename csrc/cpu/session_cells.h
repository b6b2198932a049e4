// The cells' updates for a session: one vector of units of one stream, from the sums of the products.
#pragma once

#include "common/cells.h"
#include "rnn_products.h"
#include "session.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

struct SessionFunctions {
  SEQACCEL_INLINE static Vec<float> sigmoid(Vec<float> x) { return sigmoid_vec<float>(x); }
  SEQACCEL_INLINE static Vec<float> tanh(Vec<float> x) { return tanh_vec<float>(x); }
};

// Mean and 1 / sqrt(variance + epsilon) of N values in rows of `run` values, `stride` apart; the variance is biased.
struct Moments {
  float mean, scale;
};

inline Moments moments_of(const float* x, ptrdiff_t run, ptrdiff_t stride, ptrdiff_t rows, float epsilon) {
  constexpr int L = Lanes<float>;
  const float count = float(run * rows);
  Vec<float> sum = {}, squares = {};
  for (ptrdiff_t r = 0; r < rows; ++r) {
    for (ptrdiff_t k = 0; k < run; k += L) sum += load_some(x + r * stride + k, int(min_of(L, run - k)));
  }
  const float mean = horizontal_sum<float>(sum) / count;
  for (ptrdiff_t r = 0; r < rows; ++r) {
    for (ptrdiff_t k = 0; k < run; k += L) {
      const int n = int(min_of(L, run - k));
      alignas(64) float lanes[L];
      for (int i = 0; i < L; ++i) lanes[i] = i < n ? 1.0f : 0.0f;
      const Vec<float> d = (load_some(x + r * stride + k, n) - mean) * (n < L ? load(lanes) : broadcast(1.0f));
      squares += d * d;
    }
  }
  return {mean, 1.0f / sqrtf(horizontal_sum<float>(squares) / count + epsilon)};
}

// A cell has kGates, kVectors of a block, kHasCell and update: from its rows of x's and h's sums, gate g at [g * L]
// (with one gate, the unit's own), the new h, and c in and out.
template <int Gates, bool HasCell>
struct SessionCell {
  static constexpr int kGates = Gates, kVectors = Gates == 1 ? 4 : Gates;
  static constexpr bool kHasCell = HasCell;

  SEQACCEL_INLINE static Vec<float> bias(const SessionLayer& l, int g, ptrdiff_t unit) {
    return load(l.bias + g * l.stride + unit);
  }
  SEQACCEL_INLINE static Vec<float> sum(const SessionLayer& l, int g, ptrdiff_t unit, const float* x, const float* h) {
    return load(x + g * Lanes<float>) + load(h + g * Lanes<float>) + bias(l, g, unit);
  }
};

struct SessionRnnTanh : SessionCell<1, false> {
  SEQACCEL_INLINE static Vec<float> update(const SessionLayer& l, ptrdiff_t unit, const float* x, const float* h,
                                           Vec<float>, Vec<float>&) {
    return tanh_vec<float>(sum(l, 0, unit, x, h));
  }
};

struct SessionRnnRelu : SessionCell<1, false> {
  SEQACCEL_INLINE static Vec<float> update(const SessionLayer& l, ptrdiff_t unit, const float* x, const float* h,
                                           Vec<float>, Vec<float>&) {
    const Vec<float> pre = sum(l, 0, unit, x, h);
    return pre < 0.0f ? Vec<float>{} : pre;
  }
};

struct SessionLstm : SessionCell<4, true> {
  SEQACCEL_INLINE static Vec<float> update(const SessionLayer& l, ptrdiff_t unit, const float* x, const float* h,
                                           Vec<float>, Vec<float>& c) {
    Vec<float> pre[4], gates[4], new_c, new_h;
    for (int g = 0; g < 4; ++g) pre[g] = sum(l, g, unit, x, h);
    LstmCell::forward<SessionFunctions>(pre, c, gates, new_c, new_h);
    c = new_c;
    return new_h;
  }
};

// The bias of h's part of n is apart, the fourth.
struct SessionGru : SessionCell<3, false> {
  SEQACCEL_INLINE static Vec<float> update(const SessionLayer& l, ptrdiff_t unit, const float* x, const float* h,
                                           Vec<float> before, Vec<float>&) {
    constexpr int L = Lanes<float>;
    const Vec<float> r = sigmoid_vec<float>(sum(l, 0, unit, x, h)), z = sigmoid_vec<float>(sum(l, 1, unit, x, h));
    const Vec<float> n = tanh_vec<float>(load(x + 2 * L) + bias(l, 2, unit) + r * (load(h + 2 * L) + bias(l, 3, unit)));
    return n + z * (before - n);
  }
};

struct SessionPeepholeLstm : SessionCell<4, true> {
  SEQACCEL_INLINE static Vec<float> update(const SessionLayer& l, ptrdiff_t unit, const float* x, const float* h,
                                           Vec<float>, Vec<float>& c) {
    const float* const peephole = l.weights + unit;
    const Vec<float> i = sigmoid_vec<float>(sum(l, 0, unit, x, h) + load(peephole) * c);
    const Vec<float> f = sigmoid_vec<float>(sum(l, 1, unit, x, h) + load(peephole + l.stride) * c);
    c = f * c + i * tanh_vec<float>(sum(l, 2, unit, x, h));
    const Vec<float> o = sigmoid_vec<float>(sum(l, 3, unit, x, h) + load(peephole + 2 * l.stride) * c);
    return o * tanh_vec<float>(c);
  }
};

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
