// One tile of queries attends to a chunk of keys: the online softmax that the forward passes share.
//
//   m' = max(m, max s), p = e^(s - m'), l = l e^(m - m') + sum p, out = out e^(m - m') + p value; lse = m + log l
//
// Keys pass in chunks of kKeys, so that the scores of a chunk (64 x 64 floats, 16 KB), the transposed queries and the
// keys stay in the near caches. D is the size of queries and keys, Dv that of values.
#pragma once

#include <float.h>
#include <math.h>

#include "cpu/attention/heads.h"
#include "cpu/attention/tile.h"
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
template <typename T>
struct Rows {
  const T* key;
  const T* value;
  ptrdiff_t key_row, value_row;
};

// The state of a tile of queries while it runs through its keys.
template <typename T>
struct QueryTile {
  T* query;   // [D, kColumns], times scale
  T* scores;  // [kKeys, kColumns]
  T* out;     // [Dv, kColumns]
  T* most;    // [kColumns]
  T* sum;     // [kColumns]
};

template <typename T>
int64_t query_tile_elements(int64_t D, int64_t Dv) {
  return (D + Dv + kKeys + 2) * kColumns<T>;
}

// Begins with `count` queries and no keys.
template <typename T>
QueryTile<T> begin_tile(T* workspace, const T* query, ptrdiff_t query_row, ptrdiff_t count, ptrdiff_t D, ptrdiff_t Dv,
                        T scale) {
  const ptrdiff_t width = (count + Lanes<T> - 1) / Lanes<T> * Lanes<T>;
  QueryTile<T> q;
  q.query = workspace;
  q.out = q.query + D * kColumns<T>;
  q.scores = q.out + Dv * kColumns<T>;
  q.most = q.scores + kKeys * kColumns<T>;
  q.sum = q.most + kColumns<T>;
  transpose_in(q.query, kColumns<T>, query, query_row, count, D, width, scale);
  memset(q.out, 0, size_t(Dv * kColumns<T>) * sizeof(T));
  for (ptrdiff_t i = 0; i < width; ++i) {
    q.most[i] = kLeast<T>;
    q.sum[i] = T(0);
  }
  return q;
}

// Writes the outputs and lse of `count` queries.
template <typename T>
void end_tile(const QueryTile<T>& q, T* out, ptrdiff_t out_row, T* lse, ptrdiff_t count, ptrdiff_t Dv) {
  for (ptrdiff_t i = 0; i < count; ++i) {
    lse[i] = q.most[i] + log_of(q.sum[i]);
    q.sum[i] = T(1) / q.sum[i];
  }
  transpose_out(out, out_row, q.out, kColumns<T>, count, Dv, q.sum);
}

template <typename T, int NV>
struct ScoreTile {
  const T* query;
  const T* key;
  ptrdiff_t key_row, D;
  T* scores;
  T bias;
  bool masked;   // lane i of vector v sees row r if r <= v * Lanes + i
  Vec<T>* most;  // [NV]

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    typedef typename VecTypes<T>::Int Int;
    Vec<T> acc[MR][NV] = {};
    add_products<T, MR, NV>(acc, key + row * key_row, key_row, 1, query, kColumns<T>, D);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Vec<T> s = acc[m][v] + bias;
        if (masked) {
          Int lane;
          for (int i = 0; i < Lanes<T>; ++i) lane[i] = i;
          s = lane + int(v * Lanes<T> - row - m) < 0 ? broadcast(T(-INFINITY)) : s;
        }
        most[v] = s > most[v] ? s : most[v];
        store(scores + (row + m) * kColumns<T> + v * Lanes<T>, s);
      }
    }
  }
};

template <typename T, int NV>
struct OutputTile {
  const T* scores;
  const T* value;
  ptrdiff_t value_row, keys;
  T* out;
  const Vec<T>* decay;  // [NV]
  bool masked;          // lane i sees value k if k <= i

  template <int MR>
  SEQACCEL_INLINE void run(ptrdiff_t row) const {
    Vec<T> acc[MR][NV] = {};
    if (masked) {
      tile_of_triangle<T, MR, NV>(acc, value + row, 1, value_row, scores, kColumns<T>, keys);
    } else {
      add_products<T, MR, NV>(acc, value + row, 1, value_row, scores, kColumns<T>, keys);
    }
    T* o = out + row * kColumns<T>;
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = o + m * kColumns<T> + v * Lanes<T>;
        store(to, load(to) * decay[v] + acc[m][v]);
      }
    }
  }
};

// Attends to the keys [0, keys) with the vectors [first, first + NV) of the tile. masked: key r is seen by lane r of
// the first vector and all later lanes.
template <typename T, int NV>
void attend(const QueryTile<T>& q, int first, const T* key, ptrdiff_t key_row, const T* value, ptrdiff_t value_row,
            ptrdiff_t keys, ptrdiff_t D, ptrdiff_t Dv, T bias, bool masked) {
  const int shift = first * Lanes<T>;
  Vec<T> old[NV], most[NV], decay[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) most[v] = old[v] = load(q.most + shift + v * Lanes<T>);
  const ScoreTile<T, NV> score = {q.query + shift, key, key_row, D, q.scores + shift, bias, masked, most};
  for_row_tiles(keys, score);
  Vec<T> sum[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    decay[v] = exp_vec<T>(old[v] - most[v]);
    sum[v] = load(q.sum + shift + v * Lanes<T>) * decay[v];
  }
  for (ptrdiff_t n = 0; n < keys; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* s = q.scores + n * kColumns<T> + shift + v * Lanes<T>;
      const Vec<T> e = exp_vec<T>(load(s) - most[v]);
      sum[v] += e;
      store(s, e);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store(q.sum + shift + v * Lanes<T>, sum[v]);
    store(q.most + shift + v * Lanes<T>, most[v]);
  }
  const OutputTile<T, NV> output = {q.scores + shift, value, value_row, keys, q.out + shift, decay, masked};
  for_row_tiles(Dv, output);
}

template <typename T>
void attend_vectors(int vectors, const QueryTile<T>& q, int first, const T* key, ptrdiff_t key_row, const T* value,
                    ptrdiff_t value_row, ptrdiff_t keys, ptrdiff_t D, ptrdiff_t Dv, T bias, bool masked) {
  switch (vectors) {
    case 1:
      return attend<T, 1>(q, first, key, key_row, value, value_row, keys, D, Dv, bias, masked);
    case 2:
      return attend<T, 2>(q, first, key, key_row, value, value_row, keys, D, Dv, bias, masked);
    case 3:
      return attend<T, (kTileVectors > 2 ? 3 : 1)>(q, first, key, key_row, value, value_row, keys, D, Dv, bias, masked);
    default:
      return attend<T, kTileVectors>(q, first, key, key_row, value, value_row, keys, D, Dv, bias, masked);
  }
}

// The `count` queries of a tile, at positions from t on, attend to the keys [key, end). diagonal: a query sees the keys
// up to its own position; `key` is at most t, and `end` at most t + count.
template <typename T>
void attend_run(const QueryTile<T>& q, ptrdiff_t count, const Rows<T>& rows, int64_t key, int64_t end, int64_t t,
                bool diagonal, ptrdiff_t D, ptrdiff_t Dv, T bias) {
  constexpr int L = Lanes<T>;
  const int vectors = int((count + L - 1) / L);
  while (key < end) {
    // On the diagonal the keys are taken one vector at a time, since the lanes before them do not see them.
    const bool masked = diagonal && key >= t;
    const int first = masked ? int((key - t) / L) : 0;
    const int64_t stop = masked ? t + (first + 1) * L : diagonal ? t : end;
    const int64_t keys = min_of(kKeys, min_of(stop, end) - key);
    attend_vectors(vectors - first, q, first, rows.key + key * rows.key_row, rows.key_row,
                   rows.value + key * rows.value_row, rows.value_row, keys, D, Dv, bias, masked);
    key += keys;
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::attention
