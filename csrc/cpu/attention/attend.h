// One tile of queries attends to a chunk of keys: the online softmax that the forward passes share.
//
//   m' = max(m, max s), p = e^(s - m'), l = l e^(m - m') + sum p, out = out e^(m - m') + p value; lse = m + log l
//
// With dropout, out is the sum over the p that are kept, divided by the keep rate; m, l and lse are those of all p.
//
// Keys pass in chunks of kKeys, so that the scores of a chunk (64 x 64 floats, 16 KB), the transposed queries and the
// keys stay in the near caches. D is the size of queries and keys, Dv that of values.
#pragma once

#include <float.h>
#include <math.h>

#include "cpu/attention/heads.h"
#include "cpu/attention/tile.h"
#include "cpu/base/dropout.h"
#include "cpu/base/integers.h"

namespace seqaccel::SEQACCEL_ISA::attention {

using namespace seqaccel::attention;

constexpr ptrdiff_t kKeys = 64;

// The initial value of the maximum score. With -infinity, scores that are all -infinity would give NaN.
template <typename T>
constexpr T kLeast = sizeof(T) == sizeof(float) ? T(-FLT_MAX) : T(-DBL_MAX);

SEQACCEL_INLINE float log_of(float x) { return logf(x); }
SEQACCEL_INLINE double log_of(double x) { return log(x); }

// Keys and values of a head.
template <typename S>
struct Rows {
  const S* key;
  const S* value;
  ptrdiff_t key_row, value_row;
};

// Keys and values of a chunk as operands of products. Factors along the head of key n begin at key + n * key_row;
// those along the keys, of values n and element d, at value + n / kValues * value_k + d * kValues.
template <typename W>
struct Operands {
  const FactorValue<W>* key;
  ptrdiff_t key_row;
  const FactorValue<W>* value;
  ptrdiff_t value_k;
};

template <typename T, typename S>
void copy_rows(T* out, const S* in, ptrdiff_t in_row, ptrdiff_t rows, ptrdiff_t columns) {
  for (ptrdiff_t r = 0; r < rows; ++r) copy_values(in + r * in_row, columns, out + r * columns);
}

// Values of the copies of a chunk that read_chunk makes.
template <typename W, typename S>
int64_t chunk_elements(int64_t D, int64_t Dv) {
  return kNarrow<S> ? kKeys * (D + Dv) : 0;
}

// The keys [0, keys) of `rows`; `copy` has room for chunk_elements.
template <typename W, typename S>
SEQACCEL_INLINE Operands<W> read_chunk(const S* key, ptrdiff_t key_row, const S* value, ptrdiff_t value_row,
                                       ptrdiff_t keys, ptrdiff_t D, ptrdiff_t Dv, Sum<W>* copy) {
  if constexpr (!kNarrow<S>) {
    return {key, key_row, value, value_row};
  } else if constexpr (kValues<W> == 2) {
    W* const pairs = reinterpret_cast<W*>(copy);
    interleave_rows(pairs, Dv, value, value_row, keys, Dv);
    return {key, key_row, reinterpret_cast<const S*>(pairs), 2 * Dv};
  } else {
    Sum<W>* const values = copy + kKeys * D;
    copy_rows(copy, key, key_row, keys, D);
    copy_rows(values, value, value_row, keys, Dv);
    return {copy, D, values, Dv};
  }
}

// The dropout masks of a tile of queries. Query i is row `row` + i of the generator.
template <typename T>
struct TileDropout {
  Bits<T> first[kTileVectors], second[kTileVectors];
  uint32_t threshold;
  T scale;

  void begin(double p, uint64_t seed, int64_t row) {
    for (int i = 0; i < kColumns<T>; ++i) {
      const DropoutKey key = dropout_key(seed, uint64_t(row + i));
      first[i / Lanes<T>][i % Lanes<T>] = key.first;
      second[i / Lanes<T>][i % Lanes<T>] = key.second;
    }
    threshold = dropout_threshold(p);
    scale = T(dropout_scale(p));
  }

  // Of the queries of vector v: whether `element` is kept.
  SEQACCEL_INLINE Mask<T> keep(int v, uint32_t element) const {
    typedef decltype(first[0][0] + first[0][0]) Word;
    return dropout_keeps<T>(first[v] + Word(element * kDropoutStep), second[v], threshold);
  }
};

// The state of a tile of queries while it runs through its keys.
template <typename W>
struct QueryTile {
  typedef Sum<W> T;
  W* query;   // [D, kColumns]
  T* scores;  // [kKeys, kColumns], then the weights as factors
  T* out;     // [Dv, kColumns]
  T* most;    // [kColumns]
  T* sum;     // [kColumns]
  T* copy;    // of a chunk
  T scale;
  const TileDropout<T>* dropout;  // or null
};

template <typename W, typename S>
int64_t query_tile_elements(int64_t D, int64_t Dv) {
  return (D + Dv + kKeys + 2) * kColumns<W> + chunk_elements<W, S>(D, Dv);
}

// Begins with `count` queries and no keys.
template <typename W, typename S>
QueryTile<W> begin_tile(Sum<W>* workspace, const S* query, ptrdiff_t query_row, ptrdiff_t count, ptrdiff_t D,
                        ptrdiff_t Dv, Sum<W> scale) {
  typedef Sum<W> T;
  const ptrdiff_t width = (count + Lanes<T> - 1) / Lanes<T> * Lanes<T>;
  QueryTile<W> q;
  q.query = reinterpret_cast<W*>(workspace);
  q.out = workspace + D * kColumns<W>;
  q.scores = q.out + Dv * kColumns<W>;
  q.most = q.scores + kKeys * kColumns<W>;
  q.sum = q.most + kColumns<W>;
  q.copy = q.sum + kColumns<W>;
  q.scale = scale;
  q.dropout = nullptr;
  transpose_in(q.query, query, query_row, count, D, width);
  memset(q.out, 0, size_t(Dv * kColumns<W>) * sizeof(T));
  for (ptrdiff_t i = 0; i < width; ++i) {
    q.most[i] = kLeast<T>;
    q.sum[i] = T(0);
  }
  return q;
}

// Writes the outputs and lse of `count` queries.
template <typename W, typename S>
void end_tile(const QueryTile<W>& q, S* out, ptrdiff_t out_row, Sum<W>* lse, ptrdiff_t count, ptrdiff_t Dv) {
  typedef Sum<W> T;
  const T scale = q.dropout ? q.dropout->scale : T(1);
  for (ptrdiff_t i = 0; i < count; ++i) {
    lse[i] = q.most[i] + log_of(q.sum[i]);
    q.sum[i] = scale / q.sum[i];
  }
  transpose_out(out, out_row, q.out, count, Dv, q.sum);
}

template <typename W, int NV>
struct ScoreTile {
  typedef Sum<W> T;
  const W* query;
  const FactorValue<W>* key;
  ptrdiff_t key_row, D;
  T* scores;
  T scale, bias;
  bool masked;   // lane i of vector v sees row r if r <= v * Lanes + i
  Vec<T>* most;  // [NV]

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    typedef typename VecTypes<T>::Int Int;
    Vec<T> acc[MR][NV] = {};
    add_factors<W, MR, NV>(acc, key + row * key_row, key_row, kValues<W>, query, kColumns<W>, factors_of<W>(D));
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Vec<T> s = acc[m][v] * scale + bias;
        if (masked) {
          Int lane;
          for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
          s = lane + int(v * Lanes<T> - row - m) < 0 ? broadcast(T(-INFINITY)) : s;
        }
        most[v] = s > most[v] ? s : most[v];
        store(scores + (row + m) * kColumns<W> + v * Lanes<T>, s);
      }
    }
  }
};

template <typename W, int NV>
struct OutputTile {
  typedef Sum<W> T;
  const W* weights;
  const FactorValue<W>* value;
  ptrdiff_t value_k, keys;
  T* out;
  const Vec<T>* decay;  // [NV]
  bool masked;          // lane i sees value k if k <= i

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    Vec<T> acc[MR][NV] = {};
    const FactorValue<W>* a = value + row * kValues<W>;
    if (masked) {
      tile_of_triangle<W, MR, NV>(acc, a, kValues<W>, value_k, weights, kColumns<W>, factors_of<W>(keys));
    } else {
      add_factors<W, MR, NV>(acc, a, kValues<W>, value_k, weights, kColumns<W>, factors_of<W>(keys));
    }
    T* o = out + row * kColumns<W>;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = o + m * kColumns<W> + v * Lanes<T>;
        store(to, load(to) * decay[v] + acc[m][v]);
      }
    }
  }
};

// The weights e^(s - most), in the place of the scores [keys, kColumns] as factors along the keys, and their sums.
template <typename W, int NV>
SEQACCEL_INLINE void scores_to_weights(Sum<W>* scores, ptrdiff_t keys, const Vec<Sum<W>>* most, Vec<Sum<W>>* sum) {
  typedef Sum<W> T;
  for (ptrdiff_t n = 0; n < keys; n += kValues<W>) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const T* s = scores + n * kColumns<W> + v * Lanes<T>;
      const Vec<T> e = exp_vec<T>(load(s) - most[v]);
      if constexpr (kValues<W> == 1) {
        sum[v] += e;
        store(scores + n * kColumns<W> + v * Lanes<T>, e);
      } else {  // the sum is of the rounded weights
        const Vec<T> next = n + 1 < keys ? exp_vec<T>(load(s + kColumns<W>) - most[v]) : Vec<T>{};
        const Vec<T> pairs = pair_of(e, next, W{});
        multiply_add(sum[v], pairs, pair_of(broadcast(1.0f), broadcast(1.0f), W{}), W{});
        store(scores + n / 2 * kColumns<W> + v * Lanes<T>, pairs);
      }
    }
  }
}

// Zeros the weights that are dropped, of the vectors [first, first + NV). Key n is element `element` + n.
template <typename W, int NV>
void drop_weights(const TileDropout<Sum<W>>& dropout, Sum<W>* weights, int first, ptrdiff_t keys, uint32_t element) {
  typedef Sum<W> T;
  for (ptrdiff_t n = 0; n < keys; n += kValues<W>) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* const w = weights + n / kValues<W> * kColumns<W> + v * Lanes<T>;
      Mask<T> keep = dropout.keep(first + v, element + uint32_t(n));
      if constexpr (kValues<W> == 2) {
        keep = (keep & 0xFFFF) | (dropout.keep(first + v, element + uint32_t(n) + 1) & int(0xFFFF0000u));
      }
      store(w, zero_unless<T>(keep, load(w)));
    }
  }
}

// Attends to the keys [0, keys) with the vectors [first, first + NV) of the tile. masked: key r is seen by lane r of
// the first vector and all later lanes. Key r is element `element` + r of dropout.
template <typename W, int NV>
void attend(const QueryTile<W>& q, int first, const Operands<W>& rows, ptrdiff_t keys, ptrdiff_t D, ptrdiff_t Dv,
            Sum<W> bias, uint32_t element, bool masked) {
  typedef Sum<W> T;
  const int shift = first * Lanes<T>;
  Vec<T> old[NV], most[NV], decay[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) most[v] = old[v] = load(q.most + shift + v * Lanes<T>);
  const ScoreTile<W, NV> score = {q.query + shift, rows.key, rows.key_row, D,   q.scores + shift,
                                  q.scale,         bias,     masked,       most};
  for_row_tiles(keys, score);
  Vec<T> sum[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    decay[v] = exp_vec<T>(old[v] - most[v]);
    sum[v] = load(q.sum + shift + v * Lanes<T>) * decay[v];
  }
  scores_to_weights<W, NV>(q.scores + shift, keys, most, sum);
  if (q.dropout) drop_weights<W, NV>(*q.dropout, q.scores + shift, first, keys, element);
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store(q.sum + shift + v * Lanes<T>, sum[v]);
    store(q.most + shift + v * Lanes<T>, most[v]);
  }
  const W* weights = reinterpret_cast<const W*>(q.scores + shift);
  const OutputTile<W, NV> output = {weights, rows.value, rows.value_k, keys, q.out + shift, decay, masked};
  for_row_tiles(Dv, output);
}

template <typename W>
void attend_vectors(int vectors, const QueryTile<W>& q, int first, const Operands<W>& rows, ptrdiff_t keys, ptrdiff_t D,
                    ptrdiff_t Dv, Sum<W> bias, uint32_t element, bool masked) {
  switch (vectors) {
    case 1:
      return attend<W, 1>(q, first, rows, keys, D, Dv, bias, element, masked);
    case 2:
      return attend<W, 2>(q, first, rows, keys, D, Dv, bias, element, masked);
    case 3:
      return attend<W, (kTileVectors > 2 ? 3 : 1)>(q, first, rows, keys, D, Dv, bias, element, masked);
    default:
      return attend<W, kTileVectors>(q, first, rows, keys, D, Dv, bias, element, masked);
  }
}

// The `count` queries of a tile, at positions from t on, attend to the keys [key, end). diagonal: a query sees the keys
// up to its own position; `key` is at most t, and `end` at most t + count. Key n is element `element` + n of dropout.
template <typename W, typename S>
void attend_run(const QueryTile<W>& q, ptrdiff_t count, const Rows<S>& rows, int64_t key, int64_t end, int64_t t,
                bool diagonal, ptrdiff_t D, ptrdiff_t Dv, Sum<W> bias, int64_t element = 0) {
  constexpr int L = Lanes<W>;
  const int vectors = int((count + L - 1) / L);
  while (key < end) {
    // On the diagonal the keys are taken one vector at a time, since the lanes before them do not see them.
    const bool masked = diagonal && key >= t;
    const int first = masked ? int((key - t) / L) : 0;
    const int64_t stop = masked ? t + (first + 1) * L : diagonal ? t : end;
    const int64_t keys = min_of(kKeys, min_of(stop, end) - key);
    const Operands<W> chunk = read_chunk<W>(rows.key + key * rows.key_row, rows.key_row,
                                            rows.value + key * rows.value_row, rows.value_row, keys, D, Dv, q.copy);
    attend_vectors(vectors - first, q, first, chunk, keys, D, Dv, bias, uint32_t(element + key), masked);
    key += keys;
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::attention
