// One tile of queries and a chunk of keys in the backward passes:
//
//   p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)
//   grad_value += p grad_out, grad_key += scale ds query, grad_query += scale ds key
//
// p is computed once and serves all three gradients: five products per pair of query and key.
#pragma once

#include "cpu/attention/attend.h"

namespace seqaccel::SEQACCEL_ISA::attention {

template <typename T>
ptrdiff_t padded(ptrdiff_t D) {
  return (D + Lanes<T> - 1) / Lanes<T> * Lanes<T>;
}

// One tile of queries; *_columns are [D, kColumns], *_rows [kColumns, padded D], p and ds [kKeys, kColumns]; those of
// the gradient of the output have Dv for D.
template <typename T>
struct GradTile {
  T *query_columns, *grad_columns, *query_grad_columns;
  T *query_rows, *grad_rows;
  T *p, *ds;
  T *lse, *delta, *ones;
};

template <typename T>
int64_t grad_tile_elements(int64_t D, int64_t Dv) {
  return (2 * D + Dv + padded<T>(D) + padded<T>(Dv) + 2 * kKeys + 3) * kColumns<T>;
}

template <typename T>
GradTile<T> make_grad_tile(T* workspace, int64_t D, int64_t Dv) {
  GradTile<T> q;
  const ptrdiff_t columns = D * kColumns<T>, rows = padded<T>(D) * kColumns<T>, scores = kKeys * kColumns<T>;
  const ptrdiff_t value_columns = Dv * kColumns<T>, value_rows = padded<T>(Dv) * kColumns<T>;
  q.query_columns = workspace;
  q.grad_columns = q.query_columns + columns;
  q.query_grad_columns = q.grad_columns + value_columns;
  q.query_rows = q.query_grad_columns + columns;
  q.grad_rows = q.query_rows + rows;
  q.p = q.grad_rows + value_rows;
  q.ds = q.p + scores;
  q.lse = q.ds + scores;
  q.delta = q.lse + kColumns<T>;
  q.ones = q.delta + kColumns<T>;
  return q;
}

// Fills a tile with `count` queries; the gradients of the queries are 0.
template <typename T>
void fill_grad_tile(const GradTile<T>& q, const T* query, ptrdiff_t query_row, const T* grad, ptrdiff_t grad_row,
                    const T* out, ptrdiff_t out_row, const T* lse, ptrdiff_t count, ptrdiff_t D, ptrdiff_t Dv,
                    T scale) {
  const ptrdiff_t vectors = (count + Lanes<T> - 1) / Lanes<T>, width = padded<T>(D), value_width = padded<T>(Dv);
  transpose_in(q.query_columns, kColumns<T>, query, query_row, count, D, vectors * Lanes<T>, scale);
  transpose_in(q.grad_columns, kColumns<T>, grad, grad_row, count, Dv, vectors * Lanes<T>, T(1));
  memset(q.query_grad_columns, 0, size_t(D * kColumns<T>) * sizeof(T));
  for (ptrdiff_t i = 0; i < count; ++i) {
    T* to = q.query_rows + i * width;
    for (ptrdiff_t d = 0; d < D; ++d) to[d] = scale * query[i * query_row + d];
    for (ptrdiff_t d = D; d < width; ++d) to[d] = T(0);
    to = q.grad_rows + i * value_width;
    for (ptrdiff_t d = 0; d < Dv; ++d) to[d] = grad[i * grad_row + d];
    for (ptrdiff_t d = Dv; d < value_width; ++d) to[d] = T(0);
    q.delta[i] = dot(to, out + i * out_row, Dv);
    q.lse[i] = lse[i];
  }
  for (ptrdiff_t i = count; i < vectors * Lanes<T>; ++i) {
    q.delta[i] = T(0);
    q.lse[i] = T(INFINITY);
  }
}

// Writes the gradients of `count` queries.
template <typename T>
void end_grad_tile(const GradTile<T>& q, T* grad_query, ptrdiff_t grad_row, ptrdiff_t count, ptrdiff_t D, T scale) {
  for (int i = 0; i < kColumns<T>; ++i) q.ones[i] = scale;
  transpose_out(grad_query, grad_row, q.query_grad_columns, kColumns<T>, count, D, q.ones);
}

// p = e^(key query^T + bias - lse)
template <typename T, int NV>
struct ProbabilityTile {
  const T* query;
  const T* key;
  ptrdiff_t key_row, D;
  T* p;
  const T* lse;
  T bias;
  bool masked;  // lane i of vector v sees row r if r <= v * Lanes + i

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    typedef typename VecTypes<T>::Int Int;
    Vec<T> acc[MR][NV] = {};
    add_products<T, MR, NV>(acc, key + row * key_row, key_row, 1, query, kColumns<T>, D);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<T> shift = bias - load(lse + v * Lanes<T>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        Vec<T> s = acc[m][v] + shift;
        if (masked) {
          Int lane;
          for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
          s = lane + int(v * Lanes<T> - row - m) < 0 ? broadcast(T(-INFINITY)) : s;
        }
        store(p + (row + m) * kColumns<T> + v * Lanes<T>, exp_vec<T>(s));
      }
    }
  }
};

// ds = p (value grad_out^T - delta), and 0 where masked, also if the value is not finite.
template <typename T, int NV>
struct ScoreGradTile {
  const T* grad;
  const T* value;
  ptrdiff_t value_row, D;
  const T* p;
  const T* delta;
  T* ds;
  bool masked;  // as in ProbabilityTile

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    typedef typename VecTypes<T>::Int Int;
    Vec<T> acc[MR][NV] = {};
    add_products<T, MR, NV>(acc, value + row * value_row, value_row, 1, grad, kColumns<T>, D);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const Vec<T> d = load(delta + v * Lanes<T>);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const ptrdiff_t at = (row + m) * kColumns<T> + v * Lanes<T>;
        Vec<T> value_grad = load(p + at) * (acc[m][v] - d);
        if (masked && v == 0) {
          Int lane;
          for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
          value_grad = lane < int(row + m) ? Vec<T>{} : value_grad;
        }
        store(ds + at, value_grad);
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
template <typename T, int NV>
struct AddProductTile {
  const T* a;
  ptrdiff_t a_row, a_k;
  const T* b;
  ptrdiff_t b_k, K;
  T* out;
  ptrdiff_t out_row;
  int last;
  Part part;

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    Vec<T> acc[MR][NV] = {};
    if (part == Part::kLanesFromK) {
      tile_of_triangle<T, MR, NV>(acc, a + row * a_row, a_row, a_k, b, b_k, K);
    } else if (part == Part::kKFromRow) {
      tile_below_diagonal<T, MR, NV>(acc, a + row * (a_row + a_k), a_row, a_k, b + row * b_k, b_k, K - row);
    } else {
      add_products<T, MR, NV>(acc, a + row * a_row, a_row, a_k, b, b_k, K);
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

template <typename T, int NV>
void add_product(ptrdiff_t rows, const T* a, ptrdiff_t a_row, ptrdiff_t a_k, const T* b, ptrdiff_t b_k, ptrdiff_t K,
                 T* out, ptrdiff_t out_row, int last, bool masked) {
  const AddProductTile<T, NV> product = {a, a_row, a_k,     b,    b_k,
                                         K, out,   out_row, last, masked ? Part::kKFromRow : Part::kAll};
  for_row_tiles(rows, product);
}

// grad [keys, D] += weights [keys, queries] * rows [queries, padded D]. masked: query k sees the keys up to k.
template <typename T>
void add_key_gradient(T* grad, ptrdiff_t grad_row, const T* weights, const T* rows, ptrdiff_t keys, ptrdiff_t queries,
                      ptrdiff_t D, bool masked) {
  constexpr int L = Lanes<T>;
  const ptrdiff_t width = padded<T>(D);
  for (ptrdiff_t d = 0; d < D; d += kColumns<T>) {
    const ptrdiff_t left = D - d;
    const int vectors = int(left >= kColumns<T> ? kTileVectors : (left + L - 1) / L);
    const int last = int(left >= vectors * L ? L : left - (vectors - 1) * L);
    switch (vectors) {
      case 1:
        add_product<T, 1>(keys, weights, kColumns<T>, 1, rows + d, width, queries, grad + d, grad_row, last, masked);
        break;
      case 2:
        add_product<T, 2>(keys, weights, kColumns<T>, 1, rows + d, width, queries, grad + d, grad_row, last, masked);
        break;
      case 3:
        add_product<T, (kTileVectors > 2 ? 3 : 1)>(keys, weights, kColumns<T>, 1, rows + d, width, queries, grad + d,
                                                   grad_row, last, masked);
        break;
      default:
        add_product<T, kTileVectors>(keys, weights, kColumns<T>, 1, rows + d, width, queries, grad + d, grad_row, last,
                                     masked);
    }
  }
}

// Keys and values of one chunk, and the arrays that their gradients are added to.
template <typename T>
struct Chunk {
  const T *key, *value;
  ptrdiff_t key_row, value_row, keys;
  T *grad_key, *grad_value;
  ptrdiff_t grad_key_row, grad_value_row;
};

// Runs the queries [first * Lanes, count) of a tile with one chunk.
template <typename T, int NV>
void chunk_backward(const GradTile<T>& q, int first, ptrdiff_t count, const Chunk<T>& c, ptrdiff_t D, ptrdiff_t Dv,
                    T bias, bool masked) {
  const ptrdiff_t shift = first * Lanes<T>;
  const ProbabilityTile<T, NV> probability = {q.query_columns + shift, c.key, c.key_row, D, q.p + shift,
                                              q.lse + shift,           bias,  masked};
  for_row_tiles(c.keys, probability);
  const ScoreGradTile<T, NV> score_grad = {q.grad_columns + shift, c.value,      c.value_row, Dv, q.p + shift,
                                           q.delta + shift,        q.ds + shift, masked};
  for_row_tiles(c.keys, score_grad);
  const ptrdiff_t queries = count - shift;
  add_key_gradient(c.grad_value, c.grad_value_row, q.p + shift, q.grad_rows + shift * padded<T>(Dv), c.keys, queries,
                   Dv, masked);
  add_key_gradient(c.grad_key, c.grad_key_row, q.ds + shift, q.query_rows + shift * padded<T>(D), c.keys, queries, D,
                   masked);
  const AddProductTile<T, NV> query_grad = {c.key,
                                            1,
                                            c.key_row,
                                            q.ds + shift,
                                            kColumns<T>,
                                            c.keys,
                                            q.query_grad_columns + shift,
                                            kColumns<T>,
                                            Lanes<T>,
                                            masked ? Part::kLanesFromK : Part::kAll};
  for_row_tiles(D, query_grad);
}

template <typename T>
void chunk_backward_vectors(int vectors, const GradTile<T>& q, int first, ptrdiff_t count, const Chunk<T>& c,
                            ptrdiff_t D, ptrdiff_t Dv, T bias, bool masked) {
  switch (vectors) {
    case 1:
      return chunk_backward<T, 1>(q, first, count, c, D, Dv, bias, masked);
    case 2:
      return chunk_backward<T, 2>(q, first, count, c, D, Dv, bias, masked);
    case 3:
      return chunk_backward<T, (kTileVectors > 2 ? 3 : 1)>(q, first, count, c, D, Dv, bias, masked);
    default:
      return chunk_backward<T, kTileVectors>(q, first, count, c, D, Dv, bias, masked);
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::attention
