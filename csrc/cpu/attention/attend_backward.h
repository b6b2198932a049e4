// One tile of queries and a chunk of keys in the backward passes:
//
//   p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)
//   grad_value += p grad_out, grad_key += scale ds query, grad_query += scale ds key
//
// With dropout, z is 1 / (1 - rate) where p is kept and else 0, out = sum z p value, and
//   ds = p (z grad_out . value - delta), grad_value += z p grad_out
//
// p is computed once and serves all three gradients: five products per pair of query and key. The gradients of keys
// and values are sums over many queries: they are float where memory holds 16 bits.
#pragma once

#include <type_traits>

#include "cpu/attention/attend.h"

namespace seqaccel::SEQACCEL_ISA::attention {

template <typename T>
ptrdiff_t padded(ptrdiff_t D) {
  return (D + Lanes<T> - 1) / Lanes<T> * Lanes<T>;
}

// One tile of queries: factors along D in *_columns [D, kColumns], along the queries in *_rows [kColumns, padded D]; p
// and ds are values [kKeys, kColumns]. Those of the gradient of the output have Dv for D.
template <typename W>
struct GradTile {
  typedef Sum<W> T;
  W *query_columns, *grad_columns;
  T* query_grad_columns;
  W *query_rows, *grad_rows;
  FactorValue<W>*p, *ds;
  W* ds_columns;  // ds as factors along the keys
  T *lse, *delta, *ones;
  T* copy;  // of a chunk
  T scale;
  TileDropout<T>* dropout;  // or null
};

template <typename W, typename S>
int64_t grad_tile_elements(int64_t D, int64_t Dv) {
  typedef Sum<W> T;
  return (2 * D + Dv + padded<T>(D) + padded<T>(Dv) + 2 * kKeys + 3) * kColumns<W> + chunk_elements<W, S>(D, Dv);
}

template <typename W>
GradTile<W> make_grad_tile(Sum<W>* workspace, int64_t D, int64_t Dv, Sum<W> scale) {
  typedef Sum<W> T;
  GradTile<W> q;
  const ptrdiff_t columns = D * kColumns<W>, rows = padded<T>(D) * kColumns<W>, scores = kKeys * kColumns<W>;
  const ptrdiff_t value_columns = Dv * kColumns<W>, value_rows = padded<T>(Dv) * kColumns<W>;
  T* const grad_columns = workspace + columns;
  q.query_columns = reinterpret_cast<W*>(workspace);
  q.grad_columns = reinterpret_cast<W*>(grad_columns);
  q.query_grad_columns = grad_columns + value_columns;
  T* const query_rows = q.query_grad_columns + columns;
  T* const grad_rows = query_rows + rows;
  T* const p = grad_rows + value_rows;
  T* const ds = p + scores;
  q.query_rows = reinterpret_cast<W*>(query_rows);
  q.grad_rows = reinterpret_cast<W*>(grad_rows);
  q.p = reinterpret_cast<FactorValue<W>*>(p);
  q.ds = reinterpret_cast<FactorValue<W>*>(ds);
  q.ds_columns = reinterpret_cast<W*>(kValues<W> == 1 ? ds : ds + scores / 2);
  q.lse = ds + scores;
  q.delta = q.lse + kColumns<W>;
  q.ones = q.delta + kColumns<W>;
  q.copy = q.ones + kColumns<W>;
  q.scale = scale;
  q.dropout = nullptr;
  return q;
}

// Factors along `rows` rows of `in`: [rows, width], and zeros up to `width`.
template <typename W, typename S>
SEQACCEL_INLINE void rows_as_factors(W* out, ptrdiff_t width, const S* in, ptrdiff_t in_row, ptrdiff_t rows,
                                     ptrdiff_t columns) {
  for (ptrdiff_t i = 0; i < rows; i += kValues<W>) {
    W* const to = out + i / kValues<W> * width;
    const S* const from = in + i * in_row;
    if constexpr (kValues<W> == 1) {
      copy_values(from, columns, to);
    } else {
      interleave(from, i + 1 < rows ? from + in_row : nullptr, columns, to);
    }
    for (ptrdiff_t d = columns; d < width; ++d) to[d] = W{};
  }
}

// Fills a tile with `count` queries; the gradients of the queries are 0.
template <typename W, typename S>
void fill_grad_tile(const GradTile<W>& q, const S* query, ptrdiff_t query_row, const S* grad, ptrdiff_t grad_row,
                    const S* out, ptrdiff_t out_row, const Sum<W>* lse, ptrdiff_t count, ptrdiff_t D, ptrdiff_t Dv) {
  typedef Sum<W> T;
  const ptrdiff_t width = (count + Lanes<T> - 1) / Lanes<T> * Lanes<T>;
  transpose_in(q.query_columns, query, query_row, count, D, width);
  transpose_in(q.grad_columns, grad, grad_row, count, Dv, width);
  memset(q.query_grad_columns, 0, size_t(D * kColumns<W>) * sizeof(T));
  rows_as_factors(q.query_rows, padded<T>(D), query, query_row, count, D);
  rows_as_factors(q.grad_rows, padded<T>(Dv), grad, grad_row, count, Dv);
  for (ptrdiff_t i = 0; i < count; ++i) {
    q.delta[i] = dot(grad + i * grad_row, out + i * out_row, Dv);
    q.lse[i] = lse[i];
  }
  for (ptrdiff_t i = count; i < width; ++i) {
    q.delta[i] = T(0);
    q.lse[i] = T(INFINITY);
  }
}

// Writes the gradients of `count` queries.
template <typename W, typename S>
void end_grad_tile(const GradTile<W>& q, S* grad_query, ptrdiff_t grad_row, ptrdiff_t count, ptrdiff_t D) {
  for (int i = 0; i < kColumns<W>; ++i) q.ones[i] = 1;
  transpose_out(grad_query, grad_row, q.query_grad_columns, count, D, q.ones);
}

// A factor's values of a row, rounded to nearest even.
template <typename T>
SEQACCEL_INLINE void store_values(T* p, Vec<T> v) {
  store(p, v);
}
#if defined(SEQACCEL_ISA_AVX512_BF16)
SEQACCEL_INLINE void store_values(BFloat16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

// p = e^(scale key query^T + bias - lse)
template <typename W, int NV>
struct ProbabilityTile {
  typedef Sum<W> T;
  const W* query;
  const FactorValue<W>* key;
  ptrdiff_t key_row, D;
  FactorValue<W>* p;
  const T* lse;
  T scale, bias;
  bool masked;  // lane i of vector v sees row r if r <= v * Lanes + i

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    typedef typename VecTypes<T>::Int Int;
    Vec<T> acc[MR][NV] = {};
    add_factors<W, MR, NV>(acc, key + row * key_row, key_row, kValues<W>, query, kColumns<W>, factors_of<W>(D));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<T> shift = bias - load(lse + v * Lanes<T>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        Vec<T> s = acc[m][v] * scale + shift;
        if (masked) {
          Int lane;
          for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
          s = lane + int(v * Lanes<T> - row - m) < 0 ? broadcast(T(-INFINITY)) : s;
        }
        store_values(p + (row + m) * kColumns<W> + v * Lanes<T>, exp_vec<T>(s));
      }
    }
  }
};

// ds = scale p (value grad_out^T - delta), and 0 where masked, also if the value is not finite. With dropout p becomes
// z p.
template <typename W, int NV, bool drops>
struct ScoreGradTile {
  typedef Sum<W> T;
  const W* grad;
  const FactorValue<W>* value;
  ptrdiff_t value_row, D;
  FactorValue<W>* p;
  const T* delta;
  T scale;
  FactorValue<W>* ds;
  bool masked;                    // lane i sees row r if r <= i
  const TileDropout<T>* dropout;  // where drops
  int first;                      // vector 0 is the tile's vector `first`
  uint32_t element;               // of row 0

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    typedef typename VecTypes<T>::Int Int;
    Vec<T> acc[MR][NV] = {};
    add_factors<W, MR, NV>(acc, value + row * value_row, value_row, kValues<W>, grad, kColumns<W>, factors_of<W>(D));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<T> d = load(delta + v * Lanes<T>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const ptrdiff_t at = (row + m) * kColumns<W> + v * Lanes<T>;
        const Vec<T> weight = load_wide(p + at);
        if constexpr (drops) {
          const Mask<T> keep = dropout->keep(first + v, element + uint32_t(row + m));
          acc[m][v] = zero_unless<T>(keep, acc[m][v] * dropout->scale);
          store_values(p + at, zero_unless<T>(keep, weight * dropout->scale));
        }
        Vec<T> score_grad = scale * weight * (acc[m][v] - d);
        if (masked && v == 0) {
          Int lane;
          for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
          score_grad = lane < int(row + m) ? Vec<T>{} : score_grad;
        }
        store_values(ds + at, score_grad);
      }
    }
  }
};

// Which part of a product on the diagonal of a causal block counts.
enum class Part {
  kAll,
  kLanesFromK,  // the lanes i >= k of b's first vector
  kKFromRow     // k >= row
};

// out [rows, NV vectors] += a b. The last vector holds `last` elements. The product is summed up before it is added to
// out: a sum of sums loses less to rounding than one long sum.
template <typename W, int NV>
struct AddProductTile {
  typedef Sum<W> T;
  const FactorValue<W>* a;
  ptrdiff_t a_row, a_k;
  const W* b;
  ptrdiff_t b_k, K;  // factors
  T* out;
  ptrdiff_t out_row;
  int last;
  Part part;

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    Vec<T> acc[MR][NV] = {};
    if (part == Part::kLanesFromK) {
      tile_of_triangle<W, MR, NV>(acc, a + row * a_row, a_row, a_k, b, b_k, K);
    } else if (part == Part::kKFromRow) {
      const ptrdiff_t k = row / kValues<W>;  // row is a multiple of kTileRows, which is even
      tile_below_diagonal<W, MR, NV>(acc, a + row * a_row + k * a_k, a_row, a_k, b + k * b_k, b_k, K - k);
    } else {
      add_factors<W, MR, NV>(acc, a + row * a_row, a_row, a_k, b, b_k, K);
    }
    T* o = out + row * out_row;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = o + m * out_row + v * Lanes<T>;
        if (v + 1 < NV || last == Lanes<T>) {
          store(to, load(to) + acc[m][v]);
        } else {
          store(to, load(to, last) + acc[m][v], last);
        }
      }
    }
  }
};

template <typename W, int NV>
void add_product(ptrdiff_t rows, const FactorValue<W>* a, const W* b, ptrdiff_t b_k, ptrdiff_t K, Sum<W>* out,
                 ptrdiff_t out_row, int last, bool masked) {
  const AddProductTile<W, NV> product = {a, kColumns<W>, kValues<W>, b,    b_k,
                                         K, out,         out_row,    last, masked ? Part::kKFromRow : Part::kAll};
  for_row_tiles(rows, product);
}

// grad [keys, D] += weights [keys, queries] * rows [queries, padded D]. masked: query k sees the keys up to k.
template <typename W>
void add_key_gradient(Sum<W>* grad, ptrdiff_t grad_row, const FactorValue<W>* weights, const W* rows, ptrdiff_t keys,
                      ptrdiff_t queries, ptrdiff_t D, bool masked) {
  constexpr int L = Lanes<W>;
  const ptrdiff_t width = padded<Sum<W>>(D), K = factors_of<W>(queries);
  for (ptrdiff_t d = 0; d < D; d += kColumns<W>) {
    const ptrdiff_t left = D - d;
    const int vectors = int(left >= kColumns<W> ? kTileVectors : (left + L - 1) / L);
    const int last = int(left >= vectors * L ? L : left - (vectors - 1) * L);
    switch (vectors) {
      case 1:
        add_product<W, 1>(keys, weights, rows + d, width, K, grad + d, grad_row, last, masked);
        break;
      case 2:
        add_product<W, 2>(keys, weights, rows + d, width, K, grad + d, grad_row, last, masked);
        break;
      case 3:
        add_product<W, (kTileVectors > 2 ? 3 : 1)>(keys, weights, rows + d, width, K, grad + d, grad_row, last, masked);
        break;
      default:
        add_product<W, kTileVectors>(keys, weights, rows + d, width, K, grad + d, grad_row, last, masked);
    }
  }
}

// Keys and values of one chunk, and the arrays that their gradients are added to.
template <typename S>
struct Chunk {
  typedef Compute<S> T;
  const S *key, *value;
  ptrdiff_t key_row, value_row, keys;
  T *grad_key, *grad_value;
  ptrdiff_t grad_key_row, grad_value_row;
};

// A chunk as operands of products: factors along the heads of keys and values, and of keys along the keys, as in
// Operands.
template <typename W>
struct GradOperands {
  const FactorValue<W>*key, *value;
  ptrdiff_t key_row, value_row;
  const FactorValue<W>* key_columns;
  ptrdiff_t key_k;
};

template <typename W, typename S>
SEQACCEL_INLINE GradOperands<W> read_grad_chunk(const Chunk<S>& c, ptrdiff_t D, ptrdiff_t Dv, Sum<W>* copy) {
  if constexpr (kValues<W> == 2) {
    W* const pairs = reinterpret_cast<W*>(copy);
    interleave_rows(pairs, D, c.key, c.key_row, c.keys, D);
    return {c.key, c.value, c.key_row, c.value_row, reinterpret_cast<const S*>(pairs), 2 * D};
  } else {
    const Operands<W> rows = read_chunk<W>(c.key, c.key_row, c.value, c.value_row, c.keys, D, Dv, copy);
    return {rows.key, rows.value, rows.key_row, rows.value_k, rows.key, rows.key_row};
  }
}

// Runs the queries [first * Lanes, count) of a tile with one chunk. Key n is element `element` + n of dropout.
template <typename W, int NV, typename S>
void chunk_backward(const GradTile<W>& q, int first, ptrdiff_t count, const Chunk<S>& c, const GradOperands<W>& rows,
                    ptrdiff_t D, ptrdiff_t Dv, Sum<W> bias, uint32_t element, bool masked) {
  typedef Sum<W> T;
  const ptrdiff_t shift = first * Lanes<T>, row = shift / kValues<W>;
  const ProbabilityTile<W, NV> probability = {q.query_columns + shift, rows.key, rows.key_row, D,     q.p + shift,
                                              q.lse + shift,           q.scale,  bias,         masked};
  for_row_tiles(c.keys, probability);
  const auto score_gradients = [&](auto drops) {
    const ScoreGradTile<W, NV, drops.value> score_grad = {
        q.grad_columns + shift, rows.value, rows.value_row, Dv,    q.p + shift, q.delta + shift, q.scale,
        q.ds + shift,           masked,     q.dropout,      first, element};
    for_row_tiles(c.keys, score_grad);
  };
  if (q.dropout) {
    score_gradients(std::true_type());
  } else {
    score_gradients(std::false_type());
  }
  const ptrdiff_t queries = count - shift;
  add_key_gradient(c.grad_value, c.grad_value_row, q.p + shift, q.grad_rows + row * padded<T>(Dv), c.keys, queries, Dv,
                   masked);
  add_key_gradient(c.grad_key, c.grad_key_row, q.ds + shift, q.query_rows + row * padded<T>(D), c.keys, queries, D,
                   masked);
  if constexpr (kValues<W> == 2) {
    interleave_rows(q.ds_columns + shift, kColumns<W>, q.ds + shift, kColumns<W>, c.keys, NV * Lanes<T>);
  }
  const AddProductTile<W, NV> query_grad = {rows.key_columns,
                                            kValues<W>,
                                            rows.key_k,
                                            q.ds_columns + shift,
                                            kColumns<W>,
                                            factors_of<W>(c.keys),
                                            q.query_grad_columns + shift,
                                            kColumns<W>,
                                            Lanes<T>,
                                            masked ? Part::kLanesFromK : Part::kAll};
  for_row_tiles(D, query_grad);
}

template <typename W, typename S>
void chunk_backward_vectors(int vectors, const GradTile<W>& q, int first, ptrdiff_t count, const Chunk<S>& c,
                            ptrdiff_t D, ptrdiff_t Dv, Sum<W> bias, uint32_t element, bool masked) {
  const GradOperands<W> rows = read_grad_chunk<W>(c, D, Dv, q.copy);
  switch (vectors) {
    case 1:
      return chunk_backward<W, 1>(q, first, count, c, rows, D, Dv, bias, element, masked);
    case 2:
      return chunk_backward<W, 2>(q, first, count, c, rows, D, Dv, bias, element, masked);
    case 3:
      return chunk_backward<W, (kTileVectors > 2 ? 3 : 1)>(q, first, count, c, rows, D, Dv, bias, element, masked);
    default:
      return chunk_backward<W, kTileVectors>(q, first, count, c, rows, D, Dv, bias, element, masked);
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::attention
