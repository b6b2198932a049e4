// The backward of wide layers over few time steps. The weight is larger than all else there, and partial sums of its
// gradient, one a thread, would take longer than the products. With N = B T columns, and the shifted rows of x as a
// matrix X [C K, N], both gradients are whole matrix products:
//
//   dW [O, C K] = g [O, N] X^T        dX [C K, N] = W^T g        dx[c, t] = sum_k dX[(c, k), t + s_k]
#pragma once

#include "cpu/base/workspace.h"
#include "cpu/conv/epilogue.h"
#include "cpu/matmul/matmul.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// Whether to take it: the weight has kShortWeight values or more, and X, whose copies replace those of the weight,
// fewer than the weight and at most kShortColumns.
constexpr ptrdiff_t kShortWeight = 32 << 10, kShortColumns = 8 << 20;

template <typename T>
inline bool is_short(const ConvBackward<T>& p) {
  const ConvShape& s = p.shape;
  if (s.segments || s.column_taps != 1 || s.ahead || p.grad_history || !(p.grad_x || p.grad_weight)) return false;
  const ptrdiff_t columns = s.batch * s.length, depth = s.group_in() * s.kernel_size;
  return s.group_out() * depth >= kShortWeight && columns <= s.group_out() && depth <= kShortColumns / columns;
}

inline bool multiply_matrices(const seqaccel::matmul::Matmul<float>& p) {
  return seqaccel::matmul::active_matmul_kernels().matmul_float(p);
}
inline bool multiply_matrices(const seqaccel::matmul::Matmul<double>& p) {
  return seqaccel::matmul::active_matmul_kernels().matmul_double(p);
}

template <typename T>
inline bool short_backward(const ConvBackward<T>& p) {
  const ConvShape& s = p.shape;
  const ptrdiff_t B = s.batch, length = s.length, N = B * length, C = s.group_in(), O = s.group_out();
  const ptrdiff_t K = s.kernel_size, depth = C * K;
  Workspace workspace;
  T *g, *columns, *row_sums;  // [O of all groups, N], [depth, N], [B, O of all groups]
  workspace.reserve(g, s.out_channels * N);
  workspace.reserve(columns, depth * N);
  workspace.reserve(row_sums, B * s.out_channels);
  if (!workspace.allocate()) return false;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (ptrdiff_t row = 0; row < B * s.out_channels; ++row) {
    T* const to = g + row % s.out_channels * N + row / s.out_channels * length;
    row_sums[row] = differentiate_row(p, row, 0, length, true, to);
  }
  for (ptrdiff_t o = 0; p.grad_bias && o < s.out_channels; ++o) {
    T sum = 0;
    for (ptrdiff_t b = 0; b < B; ++b) sum += row_sums[b * s.out_channels + o];
    p.grad_bias[o] = sum;
  }
  const Signal<T> signal = {p.x, p.history, s.in_channels, length, length, s.context()};
  for (ptrdiff_t group = 0; group < s.groups; ++group) {
    const T* const group_g = g + group * O * N;
    if (p.grad_weight) {
#pragma omp parallel for num_threads(p.threads) schedule(static)
      for (ptrdiff_t row = 0; row < depth; ++row) {
        const ptrdiff_t c = group * C + row / K, steps = s.tap(row % K).steps;
        for (ptrdiff_t b = 0; b < B; ++b) {
          signal.copy(b, {0, length, b}, c, steps, length, columns + row * N + b * length);
        }
      }
      if (!multiply_matrices(
              {O, depth, N, group_g, N, 1, columns, 1, N, p.grad_weight + group * O * depth, depth, false})) {
        return false;
      }
    }
    if (!p.grad_x) continue;
    if (!multiply_matrices({depth, N, O, p.weight + group * O * depth, 1, depth, group_g, N, 1, columns, N, false})) {
      return false;
    }
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (ptrdiff_t c = 0; c < C; ++c) {
      for (ptrdiff_t b = 0; b < B; ++b) {
        const ptrdiff_t row = (b * s.in_channels + group * C + c) * length;
        T* const to = p.grad_x + row;
        const T* const last = columns + (c * K + K - 1) * N + b * length;
        for (ptrdiff_t t = 0; t < length; ++t) to[t] = p.addend ? last[t] + p.addend[row + t] : last[t];
        for (ptrdiff_t k = K - 2; k >= 0; --k) {
          const ptrdiff_t shift = -s.tap(k).steps;
          const T* const from = columns + (c * K + k) * N + b * length;
          for (ptrdiff_t t = 0; t + shift < length; ++t) to[t] += from[t + shift];
        }
      }
    }
  }
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
