// What surrounds the convolution's product, row by row: y = relu?(residual + dropout(activation(v))), v = conv + bias,
// and the gradient of v from that of y. The derivative of the activation a needs, at least:
//
//   a           saved by the forward                          derivative
//   none        nothing                                       1
//   relu        y > 0; with a residual, one byte an element   1 where active
//   leaky_relu  y; v where y is not a                         1, or the slope
//   tanh        likewise                                      1 - a^2
//   sigmoid     likewise                                      a (1 - a)
//   silu, gelu  v                                             activation_slope(v)
//   glu, gated  v of both rows                                that of the product f(v) sigmoid(gate)
//
// A dropout mask is recomputed from its seed.
#pragma once

#include "cpu/base/activation.h"
#include "cpu/base/dropout.h"
#include "cpu/base/narrow.h"
#include "cpu/conv/product.h"

namespace seqaccel::SEQACCEL_ISA::conv {

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

// The dropout mask of one row.
template <typename T>
struct RowDropout {
  Bits<T> lane;
  DropoutKey key;
  uint32_t threshold;

  SEQACCEL_INLINE RowDropout(const ConvEpilogue& epilogue, ptrdiff_t row) {
    if (epilogue.dropout == 0) return;
    for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
    key = dropout_key(epilogue.seed, uint64_t(row));
    threshold = dropout_threshold(epilogue.dropout);
  }

  SEQACCEL_INLINE Mask<T> keep(ptrdiff_t t) const {
    typedef decltype(lane[0] + lane[0]) Word;
    const Bits<T> counter = (lane + Word(uint32_t(t))) * Word(kDropoutStep) + Word(key.first);
    return dropout_keeps<T>(counter, Bits<T>{} + Word(key.second), threshold);
  }
};

// Fetches the lines of row[0 ... n) into the cache, to be written or read.
template <bool writes, typename T>
SEQACCEL_INLINE void prefetch_row(const T* row, ptrdiff_t n) {
  const char* const bytes = reinterpret_cast<const char*>(row);
  for (ptrdiff_t i = 0; i < n * ptrdiff_t(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, writes, 3);
}

// Fetches what finish_row will touch.
template <typename S>
SEQACCEL_INLINE void prefetch_finish(const ConvForward<S>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t,
                                     ptrdiff_t n) {
  if (p.pre) prefetch_row<true>(p.pre + (b * p.shape.out_channels + channel) * p.shape.length + t, n);
  const ptrdiff_t Y = p.epilogue.y_channels(p.shape), before = p.shape.out_channels - Y;
  if (channel < before) return;
  const ptrdiff_t offset = (b * Y + channel - before) * p.shape.length + t;
  prefetch_row<true>(p.y + offset, n);
  if (p.active) prefetch_row<true>(p.active + offset, n);
  if (p.residual) prefetch_row<false>(p.residual + offset, n);
}

template <typename S>
SEQACCEL_INLINE Compute<S> value_or_zero(const S* values, ptrdiff_t i) {
  return values ? value_of(values + i) : Compute<S>(0);
}

// acc holds conv for channel `channel` and n time steps from t on of sequence b; it may be read up to a whole vector
// past n. Of a gated pair the second row, the gate, makes y; that of the first one lies acc_stride * O / 2 before.
template <typename S, Activation kind>
inline void finish_row_of(const ConvForward<S>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n,
                          const Compute<S>* acc, ptrdiff_t acc_stride) {
  typedef Compute<S> T;
  constexpr bool kGated = is_gated(kind);
  const ptrdiff_t O = p.shape.out_channels, half = kGated ? O / 2 : 0, row = b * (O - half) + channel - half;
  const ptrdiff_t offset = row * p.shape.length + t, pre_offset = (b * O + channel) * p.shape.length + t;
  const T bias = value_or_zero(p.bias, channel), first_bias = kGated ? value_or_zero(p.bias, channel - half) : T(0);
  const bool drops = p.epilogue.dropout > 0;
  const RowDropout<T> dropout(p.epilogue, row);
  const T scale = T(dropout_scale(p.epilogue.dropout));
  const auto part = [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
    const Vec<T> v = load(acc + i) + bias;
    if (p.pre) store_some_narrow(p.pre + pre_offset + i, v, m);
    Vec<T> y;
    if constexpr (kGated) {
      const Vec<T> first = load(acc - half * acc_stride + i) + first_bias;
      y = sigmoid_vec<T>(v) * (kind == Activation::gated ? tanh_vec<T>(first) : first);
    } else {
      y = activate<T, kind>(v);
    }
    Mask<T> active = ~(v <= 0);  // NaN passes its gradient, as in torch
    if (drops) {
      const Mask<T> keep = dropout.keep(t + i);
      active &= keep;
      y = zero_unless<T>(keep, y * scale);
    }
    if (p.active) store_bytes<T>(p.active + offset + i, active, m);
    if (p.residual) y += load_some_wide(p.residual + offset + i, m);
    if (p.epilogue.relu) y = activate<T, Activation::relu>(y);
    store_some_narrow(p.y + offset + i, y, m);
  };
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) part(i, Lanes<T>);
  if (i < n) part(i, int(n - i));
}

// Keeps v of the first row of a gated pair for the backward pass.
template <typename S>
inline void keep_row(const ConvForward<S>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n,
                     const Compute<S>* acc) {
  typedef Compute<S> T;
  if (!p.pre) return;
  S* const to = p.pre + (b * p.shape.out_channels + channel) * p.shape.length + t;
  const T bias = value_or_zero(p.bias, channel);
  for (ptrdiff_t i = 0; i < n; i += Lanes<T>) {
    store_some_narrow(to + i, load(acc + i) + bias, int(smaller(Lanes<T>, n - i)));
  }
}

// Calls f.operator()<kind>().
template <class F>
SEQACCEL_INLINE auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::leaky_relu:
      return f.template operator()<Activation::leaky_relu>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::tanh:
      return f.template operator()<Activation::tanh>();
    case Activation::sigmoid:
      return f.template operator()<Activation::sigmoid>();
    case Activation::glu:
      return f.template operator()<Activation::glu>();
    case Activation::gated:
      return f.template operator()<Activation::gated>();
    default:
      return f.template operator()<Activation::none>();
  }
}

template <typename S>
inline void finish_row(const ConvForward<S>& p, ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n,
                       const Compute<S>* acc, ptrdiff_t acc_stride = 0) {
  if (is_gated(p.epilogue.activation) && channel < p.shape.out_channels / 2) return keep_row(p, channel, b, t, n, acc);
  with_activation(p.epilogue.activation,
                  [&]<Activation kind>() { finish_row_of<S, kind>(p, channel, b, t, n, acc, acc_stride); });
}

// The gradient of v for time steps [begin, end) of one row (sequence, channel) into g, unless that is null; returns its
// sum. Writes the residual's gradient on the way where `residual` says so.
template <typename S, typename G, Activation kind>
inline Compute<S> differentiate_row_of(const ConvBackward<S>& p, ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end,
                                       bool residual, G* g) {
  typedef Compute<S> T;
  constexpr bool kGated = is_gated(kind);
  const ptrdiff_t O = p.shape.out_channels, half = kGated ? O / 2 : 0, channel = row % O;
  const bool gate = kGated && channel >= half;
  const ptrdiff_t y_row = kGated ? row / O * half + channel % half : row;
  const ptrdiff_t offset = y_row * p.shape.length, pre_offset = row * p.shape.length;
  const ptrdiff_t other = (gate ? -half : half) * p.shape.length;
  S* const grad_residual = residual && !gate ? p.grad_residual : nullptr;
  const bool drops = p.epilogue.dropout > 0;
  const RowDropout<T> dropout(p.epilogue, y_row);
  const T scale = drops ? T(dropout_scale(p.epilogue.dropout)) : T(1);
  Vec<T> sum = {};
  const auto part = [&](ptrdiff_t t, int m) __attribute__((always_inline)) {
    const auto get = [&](const S* from) __attribute__((always_inline)) { return load_some_wide(from + offset + t, m); };
    const auto pre = [&](ptrdiff_t at) __attribute__((always_inline)) { return load_some_wide(p.pre + at + t, m); };
    Vec<T> d = get(p.grad_y);
    if (p.epilogue.relu) d = zero_unless<T>(~(get(p.y) <= 0), d);
    if (grad_residual) store_some_narrow(grad_residual + offset + t, d, m);
    if constexpr (kind == Activation::relu) {
      const Mask<T> active = p.active ? load_bytes<T>(p.active + offset + t, m) : Mask<T>(~(get(p.y) <= 0));
      d = zero_unless<T>(active, d * scale);
    } else {
      if (drops) d = zero_unless<T>(dropout.keep(t), d * scale);
      if constexpr (kGated) {
        const Vec<T> first = pre(gate ? pre_offset + other : pre_offset);
        const Vec<T> s = sigmoid_vec<T>(pre(gate ? pre_offset : pre_offset + other));
        const Vec<T> value = kind == Activation::gated ? tanh_vec<T>(first) : first;
        if (gate) {
          d *= value * s * (T(1) - s);
        } else {
          d *= kind == Activation::gated ? s * (T(1) - value * value) : s;
        }
      } else if constexpr (kind == Activation::leaky_relu) {
        d *= activation_slope<T, kind>(p.pre ? pre(pre_offset) : get(p.y));
      } else if constexpr (kind == Activation::tanh) {
        const Vec<T> a = p.pre ? tanh_vec<T>(pre(pre_offset)) : get(p.y);
        d *= T(1) - a * a;
      } else if constexpr (kind == Activation::sigmoid) {
        const Vec<T> a = p.pre ? sigmoid_vec<T>(pre(pre_offset)) : get(p.y);
        d *= a * (T(1) - a);
      } else if constexpr (kind != Activation::none) {
        d *= activation_slope<T, kind>(pre(pre_offset));
      }
    }
    sum += d;
    if (g) store_some_narrow(g + t - begin, d, m);
  };
  ptrdiff_t t = begin;
  for (; t + Lanes<T> <= end; t += Lanes<T>) part(t, Lanes<T>);
  if (t < end) part(t, int(end - t));
  return horizontal_sum<T>(sum);
}

template <typename S, typename G>
inline Compute<S> differentiate_row(const ConvBackward<S>& p, ptrdiff_t row, ptrdiff_t begin, ptrdiff_t end,
                                    bool residual, G* g) {
  return with_activation(p.epilogue.activation, [&]<Activation kind>() {
    return differentiate_row_of<S, G, kind>(p, row, begin, end, residual, g);
  });
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
