// Hierarchical attention, backward.
//
//   p = e^(s - lse), delta = out . grad_out, ds = p (grad_out . value - delta)
//   grad_value += p grad_out, grad_key += scale ds query, grad_query += scale ds key
// for the keys of all levels, and then down the pyramid. A node with children c, weights w and scores
// scale * pool_query . key_c passes on
//   grad_w_c = grad_key . key_c + grad_value . value_c, e_c = w_c (grad_w_c - sum w grad_w)
//   grad_value_c += w_c grad_value, grad_key_c += w_c grad_key + scale e_c pool_query,
//   grad_pool_query += scale e_c key_c
//
// p is computed once and serves all three gradients: five products per pair of query and key. A task is a segment of a
// key head's query blocks, for all query heads of that key head. It owns the gradients of the segment's tokens. It adds
// up the other gradients that its queries contribute to (all nodes, and the tokens of the local_blocks - 1 blocks
// before) in rows of its own. Those rows are then added in the order of the segments: no atomics, and the same bits for
// any number of threads.
#include <math.h>

#include "cpu/attention/hierarchical/levels.h"
#include "cpu/attention/hierarchical/tile.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

constexpr ptrdiff_t kKeys = 64;

template <typename T>
ptrdiff_t padded(ptrdiff_t D) {
  return (D + Lanes<T> - 1) / Lanes<T> * Lanes<T>;
}

// One tile of queries; *_columns are [D, kColumns], *_rows [kColumns, padded D], p and ds [kKeys, kColumns].
template <typename T>
struct GradTile {
  T *query_columns, *grad_columns, *query_grad_columns;
  T *query_rows, *grad_rows;
  T *p, *ds;
  T *lse, *delta, *ones;
};

template <typename T>
int64_t grad_tile_elements(int64_t D) {
  return (3 * D + 2 * padded<T>(D) + 2 * kKeys + 3) * kColumns<T>;
}

template <typename T>
GradTile<T> make_grad_tile(T* workspace, int64_t D) {
  GradTile<T> q;
  const ptrdiff_t columns = D * kColumns<T>, rows = padded<T>(D) * kColumns<T>, scores = kKeys * kColumns<T>;
  q.query_columns = workspace;
  q.grad_columns = q.query_columns + columns;
  q.query_grad_columns = q.grad_columns + columns;
  q.query_rows = q.query_grad_columns + columns;
  q.grad_rows = q.query_rows + rows;
  q.p = q.grad_rows + rows;
  q.ds = q.p + scores;
  q.lse = q.ds + scores;
  q.delta = q.lse + kColumns<T>;
  q.ones = q.delta + kColumns<T>;
  return q;
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
void chunk_backward(const GradTile<T>& q, int first, ptrdiff_t count, const Chunk<T>& c, ptrdiff_t D, T bias,
                    bool masked) {
  const ptrdiff_t shift = first * Lanes<T>;
  const ProbabilityTile<T, NV> probability = {q.query_columns + shift, c.key, c.key_row, D, q.p + shift,
                                              q.lse + shift,           bias,  masked};
  for_row_tiles(c.keys, probability);
  const ScoreGradTile<T, NV> score_grad = {q.grad_columns + shift, c.value,      c.value_row, D, q.p + shift,
                                           q.delta + shift,        q.ds + shift, masked};
  for_row_tiles(c.keys, score_grad);
  const ptrdiff_t queries = count - shift;
  add_key_gradient(c.grad_value, c.grad_value_row, q.p + shift, q.grad_rows + shift * padded<T>(D), c.keys, queries, D,
                   masked);
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
                            ptrdiff_t D, T bias, bool masked) {
  switch (vectors) {
    case 1:
      return chunk_backward<T, 1>(q, first, count, c, D, bias, masked);
    case 2:
      return chunk_backward<T, 2>(q, first, count, c, D, bias, masked);
    case 3:
      return chunk_backward<T, (kTileVectors > 2 ? 3 : 1)>(q, first, count, c, D, bias, masked);
    default:
      return chunk_backward<T, kTileVectors>(q, first, count, c, D, bias, masked);
  }
}

// Where a segment of one key head adds gradients: those of its own tokens in place, the others in its rows of
// `partial`. These are the nodes, then the tokens [left, first), [last, right) and [tail, T).
template <typename T>
struct SegmentGrads {
  Outside outside;
  T *key, *value;  // this head's tokens
  ptrdiff_t key_row, value_row;
  T *partial_key, *partial_value;
  int64_t rows;
};

template <typename T>
SegmentGrads<T> segment_grads(const AttentionBackward<T>& p, int64_t b, int64_t g, int64_t segment) {
  const Attention<T>& f = p.forward;
  SegmentGrads<T> s;
  int64_t before = 0, total = 0;
  for (int64_t i = 0; i < p.segments; ++i) {
    const Outside o = segment_outside(f.pyramid, i, p.segments);
    const int64_t rows = f.pyramid.nodes + outside_rows(f.pyramid, o);
    if (i == segment) {
      before = total;
      s.outside = o;
      s.rows = rows;
    }
    total += rows;
  }
  s.key = p.grad_key.at(b, g);
  s.value = p.grad_value.at(b, g);
  s.key_row = p.grad_key.time;
  s.value_row = p.grad_value.time;
  s.partial_key = p.partial + ((b * f.G + g) * total + before) * 2 * f.D;
  s.partial_value = s.partial_key + s.rows * f.D;
  return s;
}

// The row of `partial` for token n, which is outside the segment.
SEQACCEL_INLINE int64_t outside_row(const Outside& o, int64_t nodes, int64_t n) {
  if (n < o.first) return nodes + n - o.left;
  const int64_t left = nodes + o.first - o.left;
  return n < o.right ? left + n - o.last : left + o.right - o.last + n - o.tail;
}

template <typename T>
void segment_tile(const AttentionBackward<T>& p, const SegmentGrads<T>& s, int64_t b, int64_t h, int64_t block,
                  int64_t t, int64_t count, const GradTile<T>& q) {
  constexpr int L = Lanes<T>;
  const Attention<T>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const int64_t D = f.D, g = h / (f.H / f.G);
  const int vectors = int((count + L - 1) / L);
  const T* query = f.query.at(b, h) + t * f.query.time;
  const T* grad = p.grad_out.at(b, h) + t * p.grad_out.time;
  const T* out = f.out.at(b, h) + t * f.out.time;
  transpose_in(q.query_columns, kColumns<T>, query, f.query.time, count, D, vectors * L, f.scale);
  transpose_in(q.grad_columns, kColumns<T>, grad, p.grad_out.time, count, D, vectors * L, T(1));
  memset(q.query_grad_columns, 0, size_t(D * kColumns<T>) * sizeof(T));
  const ptrdiff_t width = padded<T>(D);
  for (int64_t i = 0; i < count; ++i) {
    T* query_row = q.query_rows + i * width;
    T* grad_row = q.grad_rows + i * width;
    for (int64_t d = 0; d < D; ++d) query_row[d] = f.scale * query[i * f.query.time + d];
    for (int64_t d = 0; d < D; ++d) grad_row[d] = grad[i * p.grad_out.time + d];
    for (int64_t d = D; d < width; ++d) query_row[d] = grad_row[d] = T(0);
    q.delta[i] = dot(grad_row, out + i * f.out.time, D);
    q.lse[i] = f.lse[(b * f.H + h) * pyramid.T + t + i];
  }
  for (int64_t i = count; i < vectors * L; ++i) {
    q.delta[i] = T(0);
    q.lse[i] = T(INFINITY);
  }
  Run runs[kMaxRuns];
  const int n = cover_block(pyramid, block, runs);
  for (int r = 0; r < n; ++r) {
    const int level = runs[r].level;
    const Rows<T> rows = level_rows(f, b, g, level);
    const bool diagonal = pyramid.causal && level == 0;
    const int64_t end = diagonal ? t + count : runs[r].end;
    int64_t key = runs[r].begin;
    while (key < end) {
      const bool masked = diagonal && key >= t;
      const int first = masked ? int((key - t) / L) : 0;
      int64_t stop = masked ? min_of(end, t + (first + 1) * L) : diagonal ? t : end;
      Chunk<T> c;
      c.grad_key_row = c.grad_value_row = D;
      if (level > 0) {
        c.grad_key = s.partial_key + (pyramid.offset[level] + key) * D;
        c.grad_value = s.partial_value + (pyramid.offset[level] + key) * D;
      } else if (key >= s.outside.first && key < s.outside.last) {
        stop = min_of(stop, s.outside.last);
        c.grad_key = s.key + key * s.key_row;
        c.grad_value = s.value + key * s.value_row;
        c.grad_key_row = s.key_row;
        c.grad_value_row = s.value_row;
      } else {
        if (key < s.outside.first) {
          stop = min_of(stop, s.outside.first);
        } else if (key < s.outside.right) {
          stop = min_of(stop, s.outside.right);
        }
        const int64_t row = outside_row(s.outside, pyramid.nodes, key);
        c.grad_key = s.partial_key + row * D;
        c.grad_value = s.partial_value + row * D;
      }
      c.keys = min_of(kKeys, stop - key);
      c.key = rows.key + key * rows.key_row;
      c.value = rows.value + key * rows.value_row;
      c.key_row = rows.key_row;
      c.value_row = rows.value_row;
      chunk_backward_vectors(vectors - first, q, first, count, c, D, f.bias[level], masked);
      key += c.keys;
    }
  }
  for (int64_t i = 0; i < vectors * L; ++i) q.ones[i] = f.scale;
  transpose_out(p.grad_query.at(b, h) + t * p.grad_query.time, p.grad_query.time, q.query_grad_columns, kColumns<T>,
                count, D, q.ones);
}

template <typename T>
void segment_backward(const AttentionBackward<T>& p, int64_t b, int64_t g, int64_t segment, T* workspace) {
  const Attention<T>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const SegmentGrads<T> s = segment_grads(p, b, g, segment);
  if (s.rows > 0) memset(s.partial_key, 0, size_t(s.rows * 2 * f.D) * sizeof(T));
  for (int64_t n = s.outside.first; n < s.outside.last; ++n) {
    memset(s.key + n * s.key_row, 0, size_t(f.D) * sizeof(T));
    memset(s.value + n * s.value_row, 0, size_t(f.D) * sizeof(T));
  }
  const GradTile<T> q = make_grad_tile(workspace, f.D);
  const int64_t group = f.H / f.G;
  for (int64_t block = s.outside.first / pyramid.block_size; block * pyramid.block_size < s.outside.last; ++block) {
    const int64_t end = min_of(pyramid.T, (block + 1) * pyramid.block_size);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t t = block * pyramid.block_size; t < end; t += kColumns<T>) {
        segment_tile(p, s, b, h, block, t, min_of(kColumns<T>, end - t), q);
      }
    }
  }
}

// Adds the gradients of the tokens of `segment` from the queries of the other segments, in the order of the segments.
template <typename T>
void add_outside(const AttentionBackward<T>& p, int64_t b, int64_t g, int64_t segment) {
  const int64_t D = p.forward.D, nodes = p.forward.pyramid.nodes, T_ = p.forward.pyramid.T;
  const SegmentGrads<T> own = segment_grads(p, b, g, segment);
  for (int64_t i = 0; i < p.segments; ++i) {
    if (i == segment) continue;
    const SegmentGrads<T> s = segment_grads(p, b, g, i);
    const Outside& o = s.outside;
    const int64_t begins[3] = {o.left, o.last, o.tail}, ends[3] = {o.first, o.right, T_};
    for (int part = 0; part < 3; ++part) {
      const int64_t end = min_of(ends[part], own.outside.last);
      for (int64_t n = max_of(begins[part], own.outside.first); n < end; ++n) {
        const int64_t row = outside_row(o, nodes, n);
        add_scaled(own.key + n * own.key_row, T(1), s.partial_key + row * D, D);
        add_scaled(own.value + n * own.value_row, T(1), s.partial_value + row * D, D);
      }
    }
  }
}

// Adds the other segments' gradients of one node to those of segment 0.
template <typename T>
void add_node(const AttentionBackward<T>& p, int64_t b, int64_t g, int64_t node) {
  const int64_t D = p.forward.D;
  const SegmentGrads<T> own = segment_grads(p, b, g, 0);
  for (int64_t i = 1; i < p.segments; ++i) {
    const SegmentGrads<T> s = segment_grads(p, b, g, i);
    add_scaled(own.partial_key + node * D, T(1), s.partial_key + node * D, D);
    add_scaled(own.partial_value + node * D, T(1), s.partial_value + node * D, D);
  }
}

// Passes the gradient of one node to its children. `weights` and `slopes` hold one value per child.
template <typename T>
void unpool_node(const AttentionBackward<T>& p, const SegmentGrads<T>& s, int64_t b, int64_t g, int level, int64_t node,
                 T* weights, T* slopes, T* pool_grad) {
  const Attention<T>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const int64_t D = f.D, n = pyramid.span[level] / pyramid.span[level - 1], child = node * n;
  const T* grad_key = s.partial_key + (pyramid.offset[level] + node) * D;
  const T* grad_value = s.partial_value + (pyramid.offset[level] + node) * D;
  T* child_key = level == 1 ? s.key + child * s.key_row : s.partial_key + (pyramid.offset[level - 1] + child) * D;
  T* child_value =
      level == 1 ? s.value + child * s.value_row : s.partial_value + (pyramid.offset[level - 1] + child) * D;
  const ptrdiff_t key_row = level == 1 ? s.key_row : D, value_row = level == 1 ? s.value_row : D;
  if (f.pool_query == nullptr) {
    for (int64_t c = 0; c < n; ++c) {
      add_scaled(child_key + c * key_row, T(1) / T(n), grad_key, D);
      add_scaled(child_value + c * value_row, T(1) / T(n), grad_value, D);
    }
    return;
  }
  const T* pool = pool_row(f, g, level);
  const Rows<T> rows = level_rows(f, b, g, level - 1);
  const T* key = rows.key + child * rows.key_row;
  const T* value = rows.value + child * rows.value_row;
  for (int64_t c = 0; c < n; ++c) weights[c] = f.scale * dot(pool, key + c * rows.key_row, D);
  softmax_in_place(weights, n);
  T mean = 0;
  for (int64_t c = 0; c < n; ++c) {
    slopes[c] = dot(grad_key, key + c * rows.key_row, D) + dot(grad_value, value + c * rows.value_row, D);
    mean += weights[c] * slopes[c];
  }
  for (int64_t c = 0; c < n; ++c) {
    const T slope = f.scale * weights[c] * (slopes[c] - mean);
    add_scaled(child_key + c * key_row, weights[c], grad_key, D);
    add_scaled(child_key + c * key_row, slope, pool, D);
    add_scaled(child_value + c * value_row, weights[c], grad_value, D);
    add_scaled(pool_grad, slope, key + c * rows.key_row, D);
  }
}

// Computes a row of grad_pool [P, G, D]: adds up, in order, the tasks' sums of every level that uses the row.
template <typename T>
void add_pool_gradients(const AttentionBackward<T>& p, int64_t row, int64_t g) {
  const Attention<T>& f = p.forward;
  T* grad = p.grad_pool + (row * f.G + g) * f.D;
  memset(grad, 0, size_t(f.D) * sizeof(T));
  int64_t base = 0;
  for (int level = 1; level <= f.pyramid.levels; ++level) {
    const int64_t chunks = (f.pyramid.count[level] + kPoolChunk - 1) / kPoolChunk;
    if (min_of(level, f.P) - 1 == row) {
      for (int64_t b = 0; b < f.B; ++b) {
        for (int64_t c = 0; c < chunks; ++c) {
          add_scaled(grad, T(1), p.partial_pool + (base + (b * f.G + g) * chunks + c) * f.D, f.D);
        }
      }
    }
    base += f.B * f.G * chunks;
  }
}

template <typename T>
int64_t backward_elements(int64_t D, int64_t children) {
  return (max_of(grad_tile_elements<T>(D), 2 * children) + 31) / 16 * 16;
}

inline int64_t backward_workspace(int64_t D, int64_t children, bool is_double) {
  return is_double ? backward_elements<double>(D, children) : backward_elements<float>(D, children);
}

template <typename T>
void attention_backward(const AttentionBackward<T>& p) {
  const Attention<T>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const int64_t heads = f.B * f.G, children = pool_children(pyramid);
  const int64_t share = backward_elements<T>(f.D, children);
#pragma omp parallel if (f.B * f.H * pyramid.T > 256)
  {
    T* const workspace = f.workspace + omp_get_thread_num() * share;
    // The later segments of a causal head take longer, so they go first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < heads * p.segments; ++i) {
      const int64_t segment = p.segments - 1 - i / heads, head = i % heads;
      segment_backward(p, head / f.G, head % f.G, segment, workspace);
    }
    if (p.segments > 1) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < heads * p.segments; ++i) {
        const int64_t head = i / p.segments;
        add_outside(p, head / f.G, head % f.G, i % p.segments);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * pyramid.nodes; ++i) {
        const int64_t head = i / pyramid.nodes;
        add_node(p, head / f.G, head % f.G, i % pyramid.nodes);
      }
    }
    int64_t base = pool_tasks(pyramid, heads);
    for (int level = pyramid.levels; level >= 1; --level) {
      const int64_t chunks = (pyramid.count[level] + kPoolChunk - 1) / kPoolChunk;
      base -= heads * chunks;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < heads * chunks; ++i) {
        const int64_t head = i / chunks, first = i % chunks * kPoolChunk;
        const int64_t last = min_of(pyramid.count[level], first + kPoolChunk);
        const SegmentGrads<T> s = segment_grads(p, head / f.G, head % f.G, 0);
        T* pool_grad = p.grad_pool ? p.partial_pool + (base + i) * f.D : nullptr;
        if (pool_grad) memset(pool_grad, 0, size_t(f.D) * sizeof(T));
        for (int64_t node = first; node < last; ++node) {
          unpool_node(p, s, head / f.G, head % f.G, level, node, workspace, workspace + children, pool_grad);
        }
      }
    }
    if (p.grad_pool) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < f.P * f.G; ++i) add_pool_gradients(p, i / f.G, i % f.G);
    }
  }
}

extern const AttentionBackwardKernels attention_backward_kernels;
const AttentionBackwardKernels attention_backward_kernels = {backward_workspace, attention_backward<float>,
                                                             attention_backward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
