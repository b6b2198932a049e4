// Register tiles of the attention kernels.
//
// Queries lie along the vector lanes: a tile of kColumns = kTileVectors * Lanes queries is transposed once, [D,
// kColumns], and then every product of the forward pass reads keys and values row by row:
//   scores^T [keys, queries] = key [keys, D] * query^T [D, queries]
//   out^T    [D, queries]   += value^T [D, keys] * p^T [keys, queries]
// and the softmax over keys runs down the lanes: no reduction across a vector.
//
// S is what memory holds, W the factors of the products (base/factors.h). Where W is S, keys and values are read where
// they are, unpacked. Pairs of bfloat16 lie along the depth of each product: keys are read where they are, and values
// are copied, two rows interleaved. Other 16-bit values become floats, a chunk of keys at a time.
#pragma once

#include "cpu/base/factors.h"
#include "cpu/base/shuffle.h"

namespace seqaccel::SEQACCEL_ISA::attention {

constexpr int kTileRows = SEQACCEL_REGISTERS >= 32 || SEQACCEL_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kTileVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;

template <typename W>
constexpr int kColumns = kTileVectors * Lanes<W>;

template <typename W>
constexpr int kValues = int(Factor<W>::kValues);

// Factors that hold n values.
template <typename W>
SEQACCEL_INLINE ptrdiff_t factors_of(ptrdiff_t n) {
  return (n + kValues<W> - 1) / kValues<W>;
}

// The lanes i of a factor's vector whose first value's index, k, is at most i; a pair keeps its second value where k +
// 1 is.
template <typename W>
SEQACCEL_INLINE typename VecTypes<Sum<W>>::Int lanes_from(ptrdiff_t k) {
  typename VecTypes<Sum<W>>::Int lane;
  for (int i = 0; i < Lanes<W>; ++i) lane[i] = i;
  const auto first = lane >= int(k);
  if constexpr (kValues<W> == 1) {
    return first;
  } else {
    return (first & 0xFFFF) | ((lane >= int(k) + 1) & int(0xFFFF0000u));
  }
}

// Like add_factors for a triangle: of row k, in values, only the lanes i >= k of b's first vector count. Zeros in the
// other lanes of b would not suffice, since a value of a may be infinite or NaN.
template <typename W, int MR, int NV>
SEQACCEL_INLINE void tile_of_triangle(Vec<Sum<W>> (&acc)[MR][NV], const FactorValue<W>* a, ptrdiff_t a_row,
                                      ptrdiff_t a_k, const W* b, ptrdiff_t b_k, ptrdiff_t K) {
  typedef Sum<W> T;
  typedef typename VecTypes<T>::Int Int;
  for (ptrdiff_t k = 0; k < K; ++k) {
    const Int seen = lanes_from<W>(k * kValues<W>);
    Vec<T> x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = load_factors(b + v * Lanes<W>);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> y = broadcast_factor(a + m * a_row);
      multiply_add(acc[m][0], (Vec<T>)((Int)y & seen), x[0], W{});
#pragma GCC unroll 4
      for (int v = 1; v < NV; ++v) multiply_add(acc[m][v], y, x[v], W{});
    }
    a += a_k;
    b += b_k;
  }
}

// Like add_factors, where row m counts from value k = m on.
template <typename W, int MR, int NV>
SEQACCEL_INLINE void tile_below_diagonal(Vec<Sum<W>> (&acc)[MR][NV], const FactorValue<W>* a, ptrdiff_t a_row,
                                         ptrdiff_t a_k, const W* b, ptrdiff_t b_k, ptrdiff_t K) {
  typedef Sum<W> T;
  constexpr int kPartial = (MR - 1 + kValues<W> - 1) / kValues<W>;  // factors that not all rows see whole
#pragma GCC unroll 8
  for (int k = 0; k < kPartial; ++k) {
    Vec<T> x[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) x[v] = load_factors(b + k * b_k + v * Lanes<W>);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      if (m >= (k + 1) * kValues<W>) continue;
      const Vec<T> y = broadcast_factor(a + m * a_row + k * a_k);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (k * kValues<W> >= m) {
          multiply_add(acc[m][v], y, x[v], W{});
        } else {  // the second of a pair
          multiply_add(acc[m][v], y, (Vec<T>)((typename VecTypes<T>::Bits)x[v] & 0xFFFF0000u), W{});
        }
      }
    }
  }
  add_factors<W, MR, NV>(acc, a + kPartial * a_k, a_row, a_k, b + kPartial * b_k, b_k, K - kPartial);
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

template <typename W, typename S>
SEQACCEL_INLINE Vec<Sum<W>> load_as(const S* p) {
  if constexpr (kValues<W> == 1) {
    return load_wide(p);
  } else {
    return load_factors(reinterpret_cast<const W*>(p));
  }
}

template <typename S>
SEQACCEL_INLINE void set_value(S* p, Compute<S> x) {
  if constexpr (kNarrow<S>) {
    store_narrow(p, broadcast(x), 1);
  } else {
    *p = x;
  }
}

// out[c * kColumns + r] = factor c of row r of `in`, for r < rows and the factors of `columns` values; out is zero for
// rows <= r < width, a multiple of Lanes.
template <typename W, typename S>
inline void transpose_in(W* out, const S* in, ptrdiff_t in_row, ptrdiff_t rows, ptrdiff_t columns, ptrdiff_t width) {
  typedef Sum<W> T;
  constexpr int L = Lanes<W>;
  constexpr ptrdiff_t kStep = kValues<W>;
  const ptrdiff_t factors = factors_of<W>(columns);
  for (ptrdiff_t r = 0; r < width; r += L) {
    ptrdiff_t c = 0;
    if (r + L <= rows) {
      for (; c + L <= factors; c += L) {
        Vec<T> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load_as<W>(in + (r + i) * in_row + c * kStep);
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store_factors(out + (c + i) * kColumns<W> + r, v[i]);
      }
    }
    for (; c < factors; ++c) {
      for (ptrdiff_t i = 0; i < L; ++i) {
        W* to = out + c * kColumns<W> + r + i;
        const S* from = in + (r + i) * in_row + c * kStep;
        if (r + i >= rows) {
          *to = W{};
        } else if constexpr (kStep == 1) {
          *to = value_of(from);
        } else {
          *to = *reinterpret_cast<const W*>(from);
        }
      }
    }
  }
}

// out[r * out_row + c] = factors[r] * in[c * kColumns + r] for r < rows, c < columns.
template <typename S, typename T>
inline void transpose_out(S* out, ptrdiff_t out_row, const T* in, ptrdiff_t rows, ptrdiff_t columns, const T* factors) {
  constexpr int L = Lanes<T>;
  for (ptrdiff_t r = 0; r < rows; r += L) {
    ptrdiff_t c = 0;
    if (r + L <= rows) {
      const Vec<T> factor = load(factors + r);
      for (; c + L <= columns; c += L) {
        Vec<T> v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = load(in + (c + i) * kColumns<T> + r) * factor;
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store_narrow(out + (r + i) * out_row + c, v[i]);
      }
    }
    for (; c < columns; ++c) {
      for (ptrdiff_t i = 0; i < L && r + i < rows; ++i)
        set_value(out + (r + i) * out_row + c, in[c * kColumns<T> + r + i] * factors[r + i]);
    }
  }
}

template <typename A, typename B>
SEQACCEL_INLINE Compute<A> dot(const A* a, const B* b, ptrdiff_t n) {
  typedef Compute<A> T;
  Vec<T> sum = {};
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) sum += load_wide(a + i) * load_wide(b + i);
  T total = i > 0 ? horizontal_sum<T>(sum) : T(0);
  for (; i < n; ++i) total += value_of(a + i) * value_of(b + i);
  return total;
}

// y += a * x
template <typename T, typename S>
SEQACCEL_INLINE void add_scaled(T* y, T a, const S* x, ptrdiff_t n) {
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) store(y + i, load(y + i) + a * load_wide(x + i));
  for (; i < n; ++i) y[i] += a * value_of(x + i);
}

// Rows r and r + 1 of `in` side by side, as pairs [rows / 2, columns]; the last row of an odd number beside zeros.
template <typename W>
inline void interleave_rows(W* out, ptrdiff_t out_row, const BFloat16* in, ptrdiff_t in_row, ptrdiff_t rows,
                            ptrdiff_t columns) {
  for (ptrdiff_t r = 0; r < rows; r += 2, in += 2 * in_row, out += out_row) {
    interleave(in, r + 1 < rows ? in + in_row : nullptr, columns, out);
  }
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
