// Register tiles of the attention kernels.
//
// Queries lie along the vector lanes: a tile of kColumns = kTileVectors * Lanes queries is transposed once, [D,
// kColumns], and then every product of the forward pass reads keys and values where they are, row by row, unpacked:
//   scores^T [keys, queries] = key [keys, D] * query^T [D, queries]
//   out^T    [D, queries]   += value^T [D, keys] * p^T [keys, queries]
// and the softmax over keys runs down the lanes: no reduction across a vector.
#pragma once

#include "cpu/base/shuffle.h"
#include "cpu/base/tile.h"

namespace seqaccel::SEQACCEL_ISA::attention {

constexpr int kTileRows = SEQACCEL_REGISTERS >= 32 || SEQACCEL_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kTileVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;

template <typename T>
constexpr int kColumns = kTileVectors * Lanes<T>;

// Like add_products for a triangle: in row k only the lanes i >= k of b's first vector count. Zeros in the other lanes
// of b would not suffice, since a value of a may be infinite or NaN.
template <typename T, int MR, int NV>
SEQACCEL_INLINE void tile_of_triangle(Vec<T> (&acc)[MR][NV], const T* a, ptrdiff_t a_row, ptrdiff_t a_k, const T* b,
                                      ptrdiff_t b_k, ptrdiff_t K) {
  typedef typename VecTypes<T>::Int Int;
  Int lane;
  for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
  for (ptrdiff_t k = 0; k < K; ++k) {
    const Int seen = lane >= int(k);
    Vec<T> x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = load(b + v * Lanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> y = broadcast(a[m * a_row]);
      acc[m][0] += (Vec<T>)((Int)y & seen) * x[0];
#pragma GCC unroll 4
      for (int v = 1; v < NV; ++v) acc[m][v] += y * x[v];
    }
    a += a_k;
    b += b_k;
  }
}

// Like add_products, where row m counts from k = m on.
template <typename T, int MR, int NV>
SEQACCEL_INLINE void tile_below_diagonal(Vec<T> (&acc)[MR][NV], const T* a, ptrdiff_t a_row, ptrdiff_t a_k, const T* b,
                                         ptrdiff_t b_k, ptrdiff_t K) {
#pragma GCC unroll 8
  for (int k = 0; k + 1 < MR; ++k) {
    Vec<T> x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = load(b + k * b_k + v * Lanes<T>);
#pragma GCC unroll 8
    for (int m = 0; m <= k; ++m) {
      const Vec<T> y = broadcast(a[m * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] += y * x[v];
    }
  }
  add_products<T, MR, NV>(acc, a + (MR - 1) * a_k, a_row, a_k, b + (MR - 1) * b_k, b_k, K - (MR - 1));
}

// Calls f.template operator()<MR>(row) for the rows [0, n) in groups of at most kTileRows.
template <typename F>
SEQACCEL_INLINE void for_row_tiles(ptrdiff_t n, const F& f) {
  ptrdiff_t row = 0;
  for (; row + kTileRows <= n; row += kTileRows) f.template run<kTileRows>(row);
  switch (n - row) {
    case 1:
      return f.template run<1>(row);
    case 2:
      return f.template run<2>(row);
    case 3:
      return f.template run<3>(row);
    case 4:
      return f.template run<(kTileRows > 4 ? 4 : 1)>(row);
    case 5:
      return f.template run<(kTileRows > 4 ? 5 : 1)>(row);
    default:
      return;
  }
}

// out[c * out_row + r] = factor * in[r * in_row + c] for r < rows, c < columns; out is zero for rows <= r < width, a
// multiple of Lanes.
template <typename T>
inline void transpose_in(T* out, ptrdiff_t out_row, const T* in, ptrdiff_t in_row, ptrdiff_t rows, ptrdiff_t columns,
                         ptrdiff_t width, T factor) {
  constexpr int L = Lanes<T>;
  for (ptrdiff_t r = 0; r < width; r += L) {
    ptrdiff_t c = 0;
    if (r + L <= rows) {
      for (; c + L <= columns; c += L) {
        Vec<T> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load(in + (r + i) * in_row + c) * factor;
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(out + (c + i) * out_row + r, v[i]);
      }
    }
    for (; c < columns; ++c) {
      for (ptrdiff_t i = 0; i < L; ++i)
        out[c * out_row + r + i] = r + i < rows ? in[(r + i) * in_row + c] * factor : T(0);
    }
  }
}

// out[r * out_row + c] = factors[r] * in[c * in_row + r] for r < rows, c < columns.
template <typename T>
inline void transpose_out(T* out, ptrdiff_t out_row, const T* in, ptrdiff_t in_row, ptrdiff_t rows, ptrdiff_t columns,
                          const T* factors) {
  constexpr int L = Lanes<T>;
  for (ptrdiff_t r = 0; r < rows; r += L) {
    ptrdiff_t c = 0;
    if (r + L <= rows) {
      const Vec<T> factor = load(factors + r);
      for (; c + L <= columns; c += L) {
        Vec<T> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load(in + (c + i) * in_row + r) * factor;
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(out + (r + i) * out_row + c, v[i]);
      }
    }
    for (; c < columns; ++c) {
      for (ptrdiff_t i = 0; i < L && r + i < rows; ++i)
        out[(r + i) * out_row + c] = in[c * in_row + r + i] * factors[r + i];
    }
  }
}

template <typename T>
SEQACCEL_INLINE T dot(const T* a, const T* b, ptrdiff_t n) {
  Vec<T> sum = {};
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) sum += load(a + i) * load(b + i);
  T total = i > 0 ? horizontal_sum<T>(sum) : T(0);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// y += a * x
template <typename T>
SEQACCEL_INLINE void add_scaled(T* y, T a, const T* x, ptrdiff_t n) {
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) store(y + i, load(y + i) + a * load(x + i));
  for (; i < n; ++i) y[i] += a * x[i];
}

// w[i] = e^(w[i] - max w) / sum
template <typename T>
inline void softmax_in_place(T* w, ptrdiff_t n) {
  T most = w[0];
  for (ptrdiff_t i = 1; i < n; ++i) most = w[i] > most ? w[i] : most;
  T sum = 0;
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) {
    const Vec<T> e = exp_vec<T>(load(w + i) - most);
    store(w + i, e);
    sum += horizontal_sum<T>(e);
  }
  if (i < n) {
    const Vec<T> e = exp_vec<T>(load(w + i, int(n - i)) - most);
    store(w + i, e, int(n - i));
    for (ptrdiff_t j = i; j < n; ++j) sum += w[j];
  }
  for (ptrdiff_t j = 0; j < n; ++j) w[j] /= sum;
}

}  // namespace seqaccel::SEQACCEL_ISA::attention
