// The kernels of the linear scan.
#pragma once

#include "cpu/base/shuffle.h"
#include "cpu/scan/blocks.h"
#include "cpu/scan/scan.h"

namespace seqaccel::SEQACCEL_ISA::scan {

// y = coefficient * previous + input over one row; previous null: y = input, and coefficient is not read.
template <typename T>
SEQACCEL_INLINE void scan_row(const T* coefficient, const T* input, const T* previous, T* y, int64_t n) {
  if (previous == nullptr) {
    memcpy(y, input, size_t(n) * sizeof(T));
    return;
  }
  int64_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) store(y + i, load(coefficient + i) * load(previous + i) + load(input + i));
  for (; i < n; ++i) y[i] = coefficient[i] * previous[i] + input[i];
}

template <typename T>
SEQACCEL_INLINE void multiply_row(const T* a, const T* b, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) store(y + i, load(a + i) * load(b + i));
  for (; i < n; ++i) y[i] = a[i] * b[i];
}

// The scan of `n` consecutive scalars from `carry`, in registers: y = A * carry + B with (A, B) the composition of the
// affine maps up to each lane, found in log2(Lanes) shuffles. Four times the rate of the scalar chain. Returns the last
// y.
template <typename T, bool kReverse>
SEQACCEL_INLINE T scan_lanes(const T* coefficient, const T* input, T carry, T* y, int64_t n) {
  int64_t left = n;
  while (left >= Lanes<T>) {
    const int64_t i = kReverse ? left - Lanes<T> : n - left;
    Vec<T> a = load(coefficient + i), b = load(input + i);
    compose_lanes<T, kReverse>(a, b);
    const Vec<T> result = a * carry + b;
    store(y + i, result);
    carry = result[kReverse ? 0 : Lanes<T> - 1];
    left -= Lanes<T>;
  }
  for (; left > 0; --left) {
    const int64_t i = kReverse ? left - 1 : n - left;
    carry = coefficient[i] * carry + input[i];
    y[i] = carry;
  }
  return carry;
}

template <typename T>
void linear_scan_forward(const LinearScanForward<T>& p) {
  const int64_t row = p.width, length = p.steps * p.width;
  if (p.batch * length == 0) return;
  const int threads = p.batch * length < kSerialElements ? 1 : omp_get_max_threads();
  if (p.width == 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < p.batch; ++b) {
      const T *a = p.a + b * length, *input = p.b + b * length;
      T* h = p.h + b * length;
      int64_t n = length;
      T carry = T(0);
      if (p.h_0) {
        carry = p.h_0[b];
      } else {  // the first step does not read its coefficient
        const int64_t start = p.reverse ? --n : 0;
        carry = h[start] = input[start];
        if (!p.reverse) ++a, ++input, ++h, --n;
      }
      if (p.reverse) {
        scan_lanes<T, true>(a, input, carry, h, n);
      } else {
        scan_lanes<T, false>(a, input, carry, h, n);
      }
    }
    return;
  }
  const int64_t width = block_columns<T>(p.width, p.batch, threads);
  const int64_t blocks = (p.width + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < p.batch * blocks; ++task) {
    const int64_t b = task / blocks, column = task % blocks * width;
    const int64_t n = p.width - column < width ? p.width - column : width;
    const int64_t stride = p.reverse ? -row : row;
    int64_t at = b * length + column + (p.reverse ? length - row : 0);
    const T* previous = p.h_0 ? p.h_0 + b * row + column : nullptr;
    for (int64_t s = 0; s < p.steps; ++s) {
      scan_row(p.a + at, p.b + at, previous, p.h + at, n);
      previous = p.h + at;
      at += stride;
    }
  }
}

// grad_b is the same scan run against time with the coefficients one step off; grad_a_t = grad_b_t * h_{t-1};
// grad_h_0 = a_1 * grad_b_1 (t-1 and 1 in the order of the forward scan).
template <typename T>
void linear_scan_backward(const LinearScanBackward<T>& p) {
  const int64_t row = p.width, length = p.steps * p.width;
  if (p.batch * row == 0) return;
  const int threads = p.batch * length < kSerialElements ? 1 : omp_get_max_threads();
  const int64_t stride = p.reverse ? row : -row;  // from one step of the backward scan to the next
  if (p.width == 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t first = b * length;
      if (p.steps == 0) {
        p.grad_h_0[b] = T(0);
        continue;
      }
      const T *grad_h = p.grad_h + first, *a = p.a + first, *h = p.h + first;
      T *grad_a = p.grad_a + first, *grad_b = p.grad_b + first;
      const int64_t n = p.steps - 1, start = p.reverse ? 0 : n, end = p.reverse ? n : 0;
      grad_b[start] = grad_h[start];
      if (p.reverse) {
        scan_lanes<T, false>(a, grad_h + 1, grad_b[start], grad_b + 1, n);
        multiply_row(grad_b, h + 1, grad_a, n);
      } else {
        scan_lanes<T, true>(a + 1, grad_h, grad_b[start], grad_b, n);
        multiply_row(grad_b + 1, h, grad_a + 1, n);
      }
      grad_a[end] = p.h_0 ? grad_b[end] * p.h_0[b] : T(0);
      p.grad_h_0[b] = a[end] * grad_b[end];
    }
    return;
  }
  const int64_t width = block_columns<T>(p.width, p.batch, threads);
  const int64_t blocks = (p.width + width - 1) / width;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < p.batch * blocks; ++task) {
    const int64_t b = task / blocks, column = task % blocks * width;
    const int64_t n = p.width - column < width ? p.width - column : width;
    T* grad_h_0 = p.grad_h_0 + b * row + column;
    if (p.steps == 0) {
      memset(grad_h_0, 0, size_t(n) * sizeof(T));
      continue;
    }
    int64_t at = b * length + column + (p.reverse ? 0 : length - row);
    const T *previous = nullptr, *coefficient = nullptr;
    for (int64_t s = 0; s < p.steps; ++s) {
      scan_row(coefficient, p.grad_h + at, previous, p.grad_b + at, n);
      previous = p.grad_b + at;
      coefficient = p.a + at;
      if (s + 1 < p.steps) {
        multiply_row(previous, p.h + at + stride, p.grad_a + at, n);
      } else if (p.h_0) {
        multiply_row(previous, p.h_0 + b * row + column, p.grad_a + at, n);
      } else {
        memset(p.grad_a + at, 0, size_t(n) * sizeof(T));
      }
      at += stride;
    }
    multiply_row(coefficient, previous, grad_h_0, n);
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::scan
