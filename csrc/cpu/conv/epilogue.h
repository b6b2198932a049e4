// What surrounds the convolution's product, row by row: y = relu?(residual + dropout(activation(v))), v = conv + bias,
// and the gradient of v from that of y. The derivative of the activation a needs, at least:
//
//   a           saved by the forward                          derivative
//   none        nothing                                       1
//   relu        y > 0; with a residual, one byte an element   1 where active
//   tanh        y; v where y is not a                         1 - a^2
//   sigmoid     likewise                                      a (1 - a)
//   silu        v                                             s (1 + v (1 - s)), s = sigmoid(v)
//
// A dropout mask is recomputed from its seed.
#pragma once

#include "common/dropout.h"
#include "cpu/base/vec.h"
#include "cpu/conv/conv.h"

namespace seqaccel::SEQACCEL_ISA::conv {

template <typename T>
using Mask = typename VecTypes<T>::Int;
template <typename T>
using Bits = typename VecTypes<T>::Bits;

template <typename T>
struct ByteVec {
  typedef int8_t Value __attribute__((vector_size(Lanes<T>)));
};

template <typename T>
SEQACCEL_INLINE void store_bytes(uint8_t* p, Mask<T> mask, int n) {
  const auto bytes = -__builtin_convertvector(mask, typename ByteVec<T>::Value);
  memcpy(p, &bytes, n);
}

template <typename T>
SEQACCEL_INLINE Mask<T> load_bytes(const uint8_t* p, int n) {
  typename ByteVec<T>::Value bytes = {};
  memcpy(&bytes, p, n);
  return __builtin_convertvector(bytes, Mask<T>) != 0;
}

template <typename T>
SEQACCEL_INLINE Vec<T> zero_unless(Mask<T> mask, Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & mask);
}

// The dropout mask of one row.
template <typename T>
struct RowDropout {
  Bits<T> lane;
  DropoutKey key;
  uint64_t threshold;

  SEQACCEL_INLINE RowDropout(const ConvEpilogue& epilogue, ptrdiff_t row) {
    if (epilogue.dropout == 0) return;
    for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
    key = dropout_key(epilogue.seed, uint64_t(row));
    threshold = uint64_t(epilogue.dropout * 4294967296.0 + 0.5);
  }

  SEQACCEL_INLINE Mask<T> keep(ptrdiff_t t) const {
    typedef decltype(lane[0] + lane[0]) Word;
    const Word word = Word(0xFFFFFFFFu);
    Bits<T> h = (lane + Word(uint32_t(t))) * Word(0x9E3779B9u) + Word(key.first);
    h &= word;
    h ^= h >> 16;
    h = (h * Word(0x21F0AAADu) + Word(key.second)) & word;
    h ^= h >> 15;
    h = (h * Word(0x735A2D97u)) & word;
    h ^= h >> 15;
    return (Mask<T>)(h >= Word(threshold > 0xFFFFFFFFu ? 0xFFFFFFFFu : threshold));
  }
};

inline double dropout_scale(const ConvEpilogue& epilogue) {
  return epilogue.dropout < 1 ? 1 / (1 - epilogue.dropout) : 0;
}

template <typename T, Activation kind>
SEQACCEL_INLINE Vec<T> activate(Vec<T> v) {
  switch (kind) {
    case Activation::relu:
      return v < 0 ? broadcast(T(0)) : v;
    case Activation::tanh:
      return tanh_vec<T>(v);
    case Activation::sigmoid:
      return sigmoid_vec<T>(v);
    case Activation::silu:
      return v * sigmoid_vec<T>(v);
    default:
      return v;
  }
}

// Fetches the lines of row[0 ... n), to be written or read.
template <bool writes, typename T>
SEQACCEL_INLINE void prefetch_row(const T* row, ptrdiff_t n) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (ptrdiff_t i = 0; i < n * ptrdiff_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, writes, 3);
}

// Fetches what finish_row will touch.
template <typename T>
SEQACCEL_INLINE void prefetch_finish(const ConvForward<T>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t,
                                     ptrdiff_t n) {
  const ptrdiff_t offset = (b * p.shape.out_channels + channel) * p.shape.length + t;
  prefetch_row<true>(p.y + offset, n);
  if (p.pre) prefetch_row<true>(p.pre + offset, n);
  if (p.active) prefetch_row<true>(p.active + offset, n);
  if (p.residual) prefetch_row<false>(p.residual + offset, n);
}

// acc holds conv for channel `channel` and n time steps from t on of sequence b; it may be read up to a whole vector
// past n.
template <typename T, Activation kind>
inline void finish_row_of(const ConvForward<T>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n,
                          const T* acc) {
  const ptrdiff_t row = b * p.shape.out_channels + channel;
  const ptrdiff_t offset = row * p.shape.length + t;
  const T bias = p.bias ? p.bias[channel] : T(0);
  const bool drops = p.epilogue.dropout > 0;
  const RowDropout<T> dropout(p.epilogue, row);
  const T scale = T(dropout_scale(p.epilogue));
  const auto part = [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
    const bool whole = m == Lanes<T>;
    const Vec<T> v = load(acc + i) + bias;
    if (p.pre) whole ? store(p.pre + offset + i, v) : store(p.pre + offset + i, v, m);
    Vec<T> y = activate<T, kind>(v);
    Mask<T> active = ~(v <= 0);  // NaN passes its gradient, as in torch
    if (drops) {
      const Mask<T> keep = dropout.keep(t + i);
      active &= keep;
      y = zero_unless<T>(keep, y * scale);
    }
    if (p.active) store_bytes<T>(p.active + offset + i, active, m);
    if (p.residual) y += whole ? load(p.residual + offset + i) : load(p.residual + offset + i, m);
    if (p.epilogue.relu) y = activate<T, Activation::relu>(y);
    whole ? store(p.y + offset + i, y) : store(p.y + offset + i, y, m);
  };
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) part(i, Lanes<T>);
  if (i < n) part(i, int(n - i));
}

template <typename T>
inline void finish_row(const ConvForward<T>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n,
                       const T* acc) {
  switch (p.epilogue.activation) {
    case Activation::relu:
      return finish_row_of<T, Activation::relu>(p, channel, b, t, n, acc);
    case Activation::tanh:
      return finish_row_of<T, Activation::tanh>(p, channel, b, t, n, acc);
    case Activation::sigmoid:
      return finish_row_of<T, Activation::sigmoid>(p, channel, b, t, n, acc);
    case Activation::silu:
      return finish_row_of<T, Activation::silu>(p, channel, b, t, n, acc);
    default:
      return finish_row_of<T, Activation::none>(p, channel, b, t, n, acc);
  }
}

// The gradient of v for time steps [begin, end) of one row (sequence, channel) into g, unless that is null; returns its
// sum. Writes the residual's gradient on the way where `residual` says so.
template <typename T, Activation kind>
inline T differentiate_row_of(const ConvBackward<T>& p, ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end, bool residual,
                              T* g) {
  const ptrdiff_t offset = row * p.shape.length;
  T* const grad_residual = residual ? p.grad_residual : nullptr;
  const bool drops = p.epilogue.dropout > 0;
  const RowDropout<T> dropout(p.epilogue, row);
  const T scale = drops ? T(dropout_scale(p.epilogue)) : T(1);
  Vec<T> sum = {};
  const auto part = [&](ptrdiff_t t, int m) __attribute__((always_inline)) {
    const bool whole = m == Lanes<T>;
    const auto get = [&](const T* from) __attribute__((always_inline)) {
      return whole ? load(from + offset + t) : load(from + offset + t, m);
    };
    Vec<T> d = get(p.grad_y);
    if (p.epilogue.relu) d = zero_unless<T>(~(get(p.y) <= 0), d);
    if (grad_residual) whole ? store(grad_residual + offset + t, d) : store(grad_residual + offset + t, d, m);
    if (kind == Activation::relu) {
      const Mask<T> active = p.active ? load_bytes<T>(p.active + offset + t, m) : Mask<T>(~(get(p.y) <= 0));
      d = zero_unless<T>(active, d * scale);
    } else {
      if (drops) d = zero_unless<T>(dropout.keep(t), d * scale);
      if (kind == Activation::tanh) {
        const Vec<T> a = p.pre ? tanh_vec<T>(get(p.pre)) : get(p.y);
        d *= T(1) - a * a;
      } else if (kind == Activation::sigmoid) {
        const Vec<T> a = p.pre ? sigmoid_vec<T>(get(p.pre)) : get(p.y);
        d *= a * (T(1) - a);
      } else if (kind == Activation::silu) {
        const Vec<T> v = get(p.pre), s = sigmoid_vec<T>(v);
        d *= s * (T(1) + v * (T(1) - s));
      }
    }
    sum += d;
    if (g) whole ? store(g + t - begin, d) : store(g + t - begin, d, m);
  };
  ptrdiff_t t = begin;
  for (; t + Lanes<T> <= end; t += Lanes<T>) part(t, Lanes<T>);
  if (t < end) part(t, int(end - t));
  return horizontal_sum<T>(sum);
}

template <typename T>
inline T differentiate_row(const ConvBackward<T>& p, ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end, bool residual,
                           T* g) {
  switch (p.epilogue.activation) {
    case Activation::relu:
      return differentiate_row_of<T, Activation::relu>(p, row, begin, end, residual, g);
    case Activation::tanh:
      return differentiate_row_of<T, Activation::tanh>(p, row, begin, end, residual, g);
    case Activation::sigmoid:
      return differentiate_row_of<T, Activation::sigmoid>(p, row, begin, end, residual, g);
    case Activation::silu:
      return differentiate_row_of<T, Activation::silu>(p, row, begin, end, residual, g);
    default:
      return differentiate_row_of<T, Activation::none>(p, row, begin, end, residual, g);
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
