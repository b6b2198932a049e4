// Hierarchical attention, forward.
//
// Pyramid: each node pools its children, key = sum w key_child, value = sum w value_child. The weights w are the
// softmax over the children of scale * pool_query . key_child, or 1 / children.
//
// Attention: one softmax over the nodes of the query's cover (cover.h), with the score
//   s = scale * query . key + bias of the level
// computed as
//   m' = max(m, max s), p = e^(s - m'), l = l e^(m - m') + sum p, out = out e^(m - m') + p value; lse = m + log l
//
// A task is one tile of kColumns queries of one aligned block; tasks need no barrier. Keys pass in chunks of kKeys, so
// that the scores of a chunk (64 x 64 floats, 16 KB), the transposed queries and the keys stay in the near caches.
#include <float.h>
#include <math.h>

#include "cpu/attention/hierarchical/levels.h"
#include "cpu/attention/hierarchical/tile.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

constexpr ptrdiff_t kKeys = 64;

// The initial value of the maximum score. With -infinity, scores that are all -infinity would give NaN.
template <typename T>
constexpr T kLeast = sizeof(T) == sizeof(float) ? T(-FLT_MAX) : T(-DBL_MAX);

SEQACCEL_INLINE float log_of(float x) { return logf(x); }
SEQACCEL_INLINE double log_of(double x) { return log(x); }

// out [D] = sum of weights[c] * rows [c, D]
template <typename T>
SEQACCEL_INLINE void weighted_sum(T* out, const T* rows, ptrdiff_t row, ptrdiff_t D, const T* weights, ptrdiff_t n) {
  ptrdiff_t d = 0;
  for (; d + 2 * Lanes<T> <= D; d += 2 * Lanes<T>) {
    Vec<T> a = {}, b = {};
    for (ptrdiff_t c = 0; c < n; ++c) {
      a += weights[c] * load(rows + c * row + d);
      b += weights[c] * load(rows + c * row + d + Lanes<T>);
    }
    store(out + d, a);
    store(out + d + Lanes<T>, b);
  }
  for (; d + Lanes<T> <= D; d += Lanes<T>) {
    Vec<T> a = {};
    for (ptrdiff_t c = 0; c < n; ++c) a += weights[c] * load(rows + c * row + d);
    store(out + d, a);
  }
  for (; d < D; ++d) {
    T a = 0;
    for (ptrdiff_t c = 0; c < n; ++c) a += weights[c] * rows[c * row + d];
    out[d] = a;
  }
}

template <typename T>
void pool_node(const Attention<T>& p, int64_t b, int64_t g, int level, int64_t node, T* weights) {
  const Rows<T> rows = level_rows(p, b, g, level - 1);
  const ptrdiff_t n = p.pyramid.span[level] / p.pyramid.span[level - 1];
  const T* key = rows.key + node * n * rows.key_row;
  const T* value = rows.value + node * n * rows.value_row;
  if (p.pool_query) {
    const T* pool = pool_row(p, g, level);
    for (ptrdiff_t c = 0; c < n; ++c) weights[c] = p.scale * dot(pool, key + c * rows.key_row, p.D);
    softmax_in_place(weights, n);
  } else {
    for (ptrdiff_t c = 0; c < n; ++c) weights[c] = T(1) / T(n);
  }
  const int64_t at = ((b * p.G + g) * p.pyramid.nodes + p.pyramid.offset[level] + node) * p.D;
  weighted_sum(p.pooled_key + at, key, rows.key_row, p.D, weights, n);
  weighted_sum(p.pooled_value + at, value, rows.value_row, p.D, weights, n);
}

// The state of a tile of queries while it runs through its cover.
template <typename T>
struct QueryTile {
  T* query;   // [D, kColumns], times scale
  T* scores;  // [kKeys, kColumns]
  T* out;     // [D, kColumns]
  T* most;    // [kColumns]
  T* sum;     // [kColumns]
};

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
            ptrdiff_t keys, ptrdiff_t D, T bias, bool masked) {
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
  for_row_tiles(D, output);
}

template <typename T>
void attend_vectors(int vectors, const QueryTile<T>& q, int first, const T* key, ptrdiff_t key_row, const T* value,
                    ptrdiff_t value_row, ptrdiff_t keys, ptrdiff_t D, T bias, bool masked) {
  switch (vectors) {
    case 1:
      return attend<T, 1>(q, first, key, key_row, value, value_row, keys, D, bias, masked);
    case 2:
      return attend<T, 2>(q, first, key, key_row, value, value_row, keys, D, bias, masked);
    case 3:
      return attend<T, (kTileVectors > 2 ? 3 : 1)>(q, first, key, key_row, value, value_row, keys, D, bias, masked);
    default:
      return attend<T, kTileVectors>(q, first, key, key_row, value, value_row, keys, D, bias, masked);
  }
}

// Runs the queries [t, t + count) of block `block`, with count <= kColumns.
template <typename T>
void attend_tile(const Attention<T>& p, int64_t b, int64_t h, int64_t block, int64_t t, int64_t count, T* workspace) {
  constexpr int L = Lanes<T>;
  const Pyramid& pyramid = p.pyramid;
  const int vectors = int((count + L - 1) / L);
  QueryTile<T> q;
  q.query = workspace;
  q.out = q.query + p.D * kColumns<T>;
  q.scores = q.out + p.D * kColumns<T>;
  q.most = q.scores + kKeys * kColumns<T>;
  q.sum = q.most + kColumns<T>;
  transpose_in(q.query, kColumns<T>, p.query.at(b, h) + t * p.query.time, p.query.time, count, p.D, vectors * L,
               p.scale);
  memset(q.out, 0, size_t(p.D * kColumns<T>) * sizeof(T));
  for (int i = 0; i < vectors * L; ++i) {
    q.most[i] = kLeast<T>;
    q.sum[i] = T(0);
  }
  const int64_t g = h / (p.H / p.G);
  Run runs[kMaxRuns];
  const int n = cover_block(pyramid, block, runs);
  for (int i = 0; i < n; ++i) {
    const int level = runs[i].level;
    const Rows<T> rows = level_rows(p, b, g, level);
    const bool diagonal = pyramid.causal && level == 0;
    const int64_t end = diagonal ? t + count : runs[i].end;
    int64_t key = runs[i].begin;
    while (key < end) {
      // On the diagonal the keys are taken one vector at a time, since the lanes before them do not see them.
      const bool masked = diagonal && key >= t;
      const int first = masked ? int((key - t) / L) : 0;
      const int64_t stop = masked ? t + (first + 1) * L : diagonal ? t : end;
      const int64_t keys = min_of(kKeys, min_of(stop, end) - key);
      attend_vectors(vectors - first, q, first, rows.key + key * rows.key_row, rows.key_row,
                     rows.value + key * rows.value_row, rows.value_row, keys, p.D, p.bias[level], masked);
      key += keys;
    }
  }
  T* lse = p.lse + (b * p.H + h) * pyramid.T + t;
  for (int i = 0; i < count; ++i) {
    lse[i] = q.most[i] + log_of(q.sum[i]);
    q.sum[i] = T(1) / q.sum[i];
  }
  transpose_out(p.out.at(b, h) + t * p.out.time, p.out.time, q.out, kColumns<T>, count, p.D, q.sum);
}

template <typename T>
int64_t forward_elements(int64_t D, int64_t children) {
  const int64_t tile = (2 * D + kKeys + 2) * kColumns<T>;
  return (max_of(tile, children) + 31) / 16 * 16;
}

inline int64_t forward_workspace(int64_t D, int64_t children, bool is_double) {
  return is_double ? forward_elements<double>(D, children) : forward_elements<float>(D, children);
}

template <typename T>
void attention_forward(const Attention<T>& p) {
  const Pyramid& pyramid = p.pyramid;
  const int64_t heads = p.B * p.G;
  const int64_t tiles = (pyramid.block_size + kColumns<T> - 1) / kColumns<T>;
  const int64_t blocks = query_blocks(pyramid), tasks = p.B * p.H * blocks * tiles;
  const int64_t share = forward_elements<T>(p.D, pool_children(pyramid));
#pragma omp parallel if (p.B * p.H * pyramid.T > 256)
  {
    T* const workspace = p.workspace + omp_get_thread_num() * share;
    for (int level = 1; level <= pyramid.levels; ++level) {
      const int64_t nodes = pyramid.count[level];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * nodes; ++i) {
        const int64_t head = i / nodes;
        pool_node(p, head / p.G, head % p.G, level, i % nodes, workspace);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t tile = i % tiles, block = i / tiles % blocks, head = i / tiles / blocks;
      const int64_t t = block * pyramid.block_size + tile * kColumns<T>;
      const int64_t end = min_of(pyramid.T, (block + 1) * pyramid.block_size);
      if (t < end) attend_tile(p, head / p.H, head % p.H, block, t, min_of(kColumns<T>, end - t), workspace);
    }
  }
}

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {forward_workspace, attention_forward<float>, attention_forward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
