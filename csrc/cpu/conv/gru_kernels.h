// The elementwise parts of a convolutional GRU (Kaiser and Sutskever, 2016), with s the sigmoid or the saturating one,
// max(0, min(1, 1.2 s - 0.1)):
//
//   u, r = s(gates)      y = u x + (1 - u) c
//
// c is tanh of the convolution of r x. A slope is taken from the value: g (1 - g), or where 0 < g < 1 with
// g = 1.2 s - 0.1, (g + 0.1) (1.1 - g) / 1.2.
#pragma once

#include "cpu/base/vec.h"
#include "cpu/conv/gru.h"

namespace seqaccel::SEQACCEL_ISA::conv {

template <typename T, bool hard>
SEQACCEL_INLINE Vec<T> gate_of(Vec<T> v) {
  const Vec<T> s = sigmoid_vec<T>(v);
  if constexpr (!hard) return s;
  const Vec<T> g = T(1.2) * s - T(0.1);
  return g < 0 ? Vec<T>{} : g > 1 ? broadcast(T(1)) : g;  // NaN stays
}

template <typename T, bool hard>
SEQACCEL_INLINE Vec<T> gate_slope(Vec<T> g) {
  if constexpr (!hard) return g * (T(1) - g);
  return g > 0 ? g < 1 ? (g + T(0.1)) * (T(1.1) - g) * T(1 / 1.2) : Vec<T>{} : Vec<T>{};
}

// part(at, gate, n): values [at, at + n) of x, whose update gate is at `gate`, for all of them; n <= Lanes<T>.
template <typename T, class Part>
SEQACCEL_INLINE void for_values(const GruGates<T>& p, const Part& part) {
  constexpr ptrdiff_t kPiece = 64 * Lanes<T>;
  const ptrdiff_t pieces = (p.size + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (ptrdiff_t piece = 0; piece < p.batch * pieces; ++piece) {
    const ptrdiff_t b = piece / pieces, begin = piece % pieces * kPiece;
    const ptrdiff_t end = begin + kPiece < p.size ? begin + kPiece : p.size, at = b * p.size, gate = 2 * at;
    ptrdiff_t i = begin;
    for (; i + Lanes<T> <= end; i += Lanes<T>) part(at + i, gate + i, Lanes<T>);
    if (i < end) part(at + i, gate + i, int(end - i));
  }
}

template <typename T, bool hard>
void reset_gates(const GruGates<T>& p) {
  for_values(p, [&](ptrdiff_t at, ptrdiff_t gate, int n) __attribute__((always_inline)) {
    const Vec<T> r = gate_of<T, hard>(load_some(p.gates + gate + p.size, n));
    store_some(p.gates + gate, gate_of<T, hard>(load_some(p.gates + gate, n)), n);
    store_some(p.gates + gate + p.size, r, n);
    store_some(p.reset + at, r * load_some(p.x + at, n), n);
  });
}

template <typename T>
void update(const GruGates<T>& p) {
  for_values(p, [&](ptrdiff_t at, ptrdiff_t gate, int n) __attribute__((always_inline)) {
    const Vec<T> u = load_some(p.gates + gate, n);
    store_some(p.y + at, u * load_some(p.x + at, n) + (T(1) - u) * load_some(p.candidate + at, n), n);
  });
}

template <typename T, bool hard>
void update_backward(const GruGates<T>& p) {
  for_values(p, [&](ptrdiff_t at, ptrdiff_t gate, int n) __attribute__((always_inline)) {
    const Vec<T> u = load_some(p.gates + gate, n), x = load_some(p.x + at, n), c = load_some(p.candidate + at, n);
    const Vec<T> d = load_some(p.grad_y + at, n);
    store_some(p.reset + at, load_some(p.gates + gate + p.size, n) * x, n);
    store_some(p.grad_gates + gate, d * (x - c) * gate_slope<T, hard>(u), n);
    store_some(p.grad_candidate + at, d * (T(1) - u) * (T(1) - c * c), n);
    if (p.grad_x) store_some(p.grad_x + at, d * u, n);
  });
}

template <typename T, bool hard>
void reset_backward(const GruGates<T>& p) {
  for_values(p, [&](ptrdiff_t at, ptrdiff_t gate, int n) __attribute__((always_inline)) {
    const Vec<T> r = load_some(p.gates + gate + p.size, n), d = load_some(p.grad_reset + at, n);
    store_some(p.grad_gates + gate + p.size, d * load_some(p.x + at, n) * gate_slope<T, hard>(r), n);
    if (p.grad_x) store_some(p.grad_x + at, load_some(p.grad_x + at, n) + d * r, n);
  });
}

template <typename T>
void reset(const GruGates<T>& p) {
  p.hard ? reset_gates<T, true>(p) : reset_gates<T, false>(p);
}

template <typename T>
void differentiate_update(const GruGates<T>& p) {
  p.hard ? update_backward<T, true>(p) : update_backward<T, false>(p);
}

template <typename T>
void differentiate_reset(const GruGates<T>& p) {
  p.hard ? reset_backward<T, true>(p) : reset_backward<T, false>(p);
}

extern const GruKernels gru_kernels;
const GruKernels gru_kernels = {
    {reset<float>, update<float>, differentiate_update<float>, differentiate_reset<float>},
    {reset<double>, update<double>, differentiate_update<double>, differentiate_reset<double>}};

}  // namespace seqaccel::SEQACCEL_ISA::conv
