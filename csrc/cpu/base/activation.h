// Activations of vectors, and their slopes.
#pragma once

#include "common/activation.h"
#include "cpu/base/erfc_series.h"
#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

SEQACCEL_INLINE const float* erfc_series(float, int& terms) {
  terms = int(sizeof(kErfcSeriesFloat) / sizeof(float));
  return kErfcSeriesFloat;
}
SEQACCEL_INLINE const double* erfc_series(double, int& terms) {
  terms = int(sizeof(kErfcSeriesDouble) / sizeof(double));
  return kErfcSeriesDouble;
}

// 1 - erf(z) for z >= 0, as erfc_series.py says; absolute error below 1e-7 (float), 3e-16 (double).
template <typename T>
SEQACCEL_INLINE Vec<T> erfc_vec(Vec<T> z) {
  int terms;
  const T* const c = erfc_series(T(), terms);
  const Vec<T> t = T(2) / (T(2) + z), y = T(4) * t - T(2);
  Vec<T> last = {}, before = {};
  for (int i = terms - 1; i > 0; --i) {
    const Vec<T> next = y * last - before + c[i];
    before = last;
    last = next;
  }
  const Vec<T> sum = y * last * T(0.5) - before + c[0];
  return t * exp_vec<T>(sum - z * z);
}

// The distribution function of the standard normal distribution.
template <typename T>
SEQACCEL_INLINE Vec<T> normal_below(Vec<T> x) {
  const Vec<T> tail = T(0.5) * erfc_vec<T>((x < 0 ? -x : x) * T(0.70710678118654752440));
  return x < 0 ? tail : T(1) - tail;
}

constexpr double kGeluTanh = 0.79788456080286535588, kGeluCube = 0.044715;  // sqrt(2 / pi)

// Of an activation of one value; `parameter`: the slope of leaky_relu below 0, elu's alpha.
template <typename T, Activation kind>
SEQACCEL_INLINE Vec<T> activate(Vec<T> v, T parameter = T(0.01)) {
  if constexpr (kind == Activation::relu) return v < 0 ? Vec<T>{} : v;
  if constexpr (kind == Activation::leaky_relu) return v < 0 ? v * parameter : v;
  if constexpr (kind == Activation::silu) return v * sigmoid_vec<T>(v);
  if constexpr (kind == Activation::gelu) return v * normal_below<T>(v);
  if constexpr (kind == Activation::gelu_tanh) {
    return T(0.5) * v * (T(1) + tanh_vec<T>(T(kGeluTanh) * (v + T(kGeluCube) * v * v * v)));
  }
  if constexpr (kind == Activation::tanh) return tanh_vec<T>(v);
  if constexpr (kind == Activation::sigmoid) return sigmoid_vec<T>(v);
  if constexpr (kind == Activation::elu) {
    Vec<T> scale, p;
    exp_parts<T>(v, scale, p);
    return v < 0 ? parameter * (scale * p + (scale - T(1))) : v;
  }
  if constexpr (kind == Activation::hardswish) {
    const Vec<T> gate = v + T(3);
    return v * (gate < 0 ? Vec<T>{} : gate > T(6) ? broadcast(T(6)) : gate) * T(1.0 / 6.0);
  }
  return v;
}

// The slope at v of those that convolutions have.
template <typename T, Activation kind>
SEQACCEL_INLINE Vec<T> activation_slope(Vec<T> v, T parameter = T(0.01)) {
  const Vec<T> one = broadcast(T(1));
  if constexpr (kind == Activation::relu) return v <= 0 ? Vec<T>{} : one;  // 1 at NaN, as in torch
  if constexpr (kind == Activation::leaky_relu) return v <= 0 ? broadcast(parameter) : one;
  if constexpr (kind == Activation::silu) {
    const Vec<T> s = sigmoid_vec<T>(v);
    return s * (T(1) + v * (T(1) - s));
  }
  if constexpr (kind == Activation::gelu) {
    return normal_below<T>(v) + v * exp_vec<T>(T(-0.5) * v * v) * T(0.39894228040143267794);
  }
  if constexpr (kind == Activation::gelu_tanh) {
    const Vec<T> a = tanh_vec<T>(T(kGeluTanh) * (v + T(kGeluCube) * v * v * v));
    return T(0.5) * (T(1) + a) + T(0.5) * v * (T(1) - a * a) * T(kGeluTanh) * (T(1) + T(3 * kGeluCube) * v * v);
  }
  if constexpr (kind == Activation::tanh) {
    const Vec<T> a = tanh_vec<T>(v);
    return T(1) - a * a;
  }
  if constexpr (kind == Activation::sigmoid) {
    const Vec<T> a = sigmoid_vec<T>(v);
    return a * (T(1) - a);
  }
  return one;
}

}  // namespace seqaccel::SEQACCEL_ISA::inline base
