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
#pragma once

#include "cpu/attention/attend_backward.h"
#include "cpu/attention/hierarchical/levels.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

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

template <typename S>
SegmentGrads<Compute<S>> segment_grads(const AttentionBackward<S>& p, int64_t g, int64_t segment) {
  const Attention<S>& f = p.forward;
  SegmentGrads<Compute<S>> s;
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
  s.key = p.grad_key.at(0, g);
  s.value = p.grad_value.at(0, g);
  s.key_row = p.grad_key.time;
  s.value_row = p.grad_value.time;
  s.partial_key = p.partial + (g * total + before) * (f.D + f.Dv);
  s.partial_value = s.partial_key + s.rows * f.D;
  return s;
}

// The row of `partial` for token n, which is outside the segment.
SEQACCEL_INLINE int64_t outside_row(const Outside& o, int64_t nodes, int64_t n) {
  if (n < o.first) return nodes + n - o.left;
  const int64_t left = nodes + o.first - o.left;
  return n < o.right ? left + n - o.last : left + o.right - o.last + n - o.tail;
}

template <typename W, typename S>
void segment_tile(const AttentionBackward<S>& p, const SegmentGrads<Sum<W>>& s, int64_t h, int64_t block, int64_t t,
                  int64_t count, const GradTile<W>& q) {
  constexpr int L = Lanes<W>;
  const Attention<S>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const int64_t D = f.D, Dv = f.Dv, g = h / (f.H / f.G), row = t - pyramid.first_query;
  const int vectors = int((count + L - 1) / L);
  fill_grad_tile(q, f.query.at(0, h) + row * f.query.time, f.query.time, p.grad_out.at(0, h) + row * p.grad_out.time,
                 p.grad_out.time, f.out.at(0, h) + row * f.out.time, f.out.time, f.lse + h * f.Tq + row, count, D, Dv);
  if (q.dropout) q.dropout->begin(f.dropout, f.seed, f.dropout_row + h * f.Tq + row);
  if (p.grad_lse) {  // lse's derivative by a score is the score's weight
    for (int64_t i = 0; i < count; ++i) q.delta[i] -= p.grad_lse[h * f.Tq + row + i];
  }
  Run runs[kMaxRuns];
  const int n = cover_block(pyramid, block, runs);
  for (int r = 0; r < n; ++r) {
    const int level = runs[r].level;
    const Rows<S> rows = level_rows(f, g, level);
    const bool diagonal = pyramid.causal && level == 0;
    const int64_t end = diagonal ? t + count : runs[r].end;
    int64_t key = runs[r].begin;
    while (key < end) {
      const bool masked = diagonal && key >= t;
      const int first = masked ? int((key - t) / L) : 0;
      int64_t stop = masked ? min_of(end, t + (first + 1) * L) : diagonal ? t : end;
      Chunk<S> c;
      c.grad_key_row = D;
      c.grad_value_row = Dv;
      if (level > 0) {
        c.grad_key = s.partial_key + (pyramid.offset[level] + key) * D;
        c.grad_value = s.partial_value + (pyramid.offset[level] + key) * Dv;
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
        const int64_t at = outside_row(s.outside, pyramid.nodes, key);
        c.grad_key = s.partial_key + at * D;
        c.grad_value = s.partial_value + at * Dv;
      }
      c.keys = min_of(kKeys, stop - key);
      c.key = rows.key + key * rows.key_row;
      c.value = rows.value + key * rows.value_row;
      c.key_row = rows.key_row;
      c.value_row = rows.value_row;
      chunk_backward_vectors(vectors - first, q, first, count, c, D, Dv, f.bias[level],
                             uint32_t(first_element(pyramid, level) + key), masked);
      key += c.keys;
    }
  }
  end_grad_tile(q, p.grad_query.at(0, h) + row * p.grad_query.time, p.grad_query.time, count, D);
}

template <typename W, typename S>
void segment_backward(const AttentionBackward<S>& p, int64_t g, int64_t segment, Sum<W>* workspace) {
  typedef Sum<W> T;
  const Attention<S>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const SegmentGrads<T> s = segment_grads(p, g, segment);
  if (s.rows > 0) memset(s.partial_key, 0, size_t(s.rows * (f.D + f.Dv)) * sizeof(T));
  for (int64_t n = s.outside.first; n < s.outside.last; ++n) {
    memset(s.key + n * s.key_row, 0, size_t(f.D) * sizeof(T));
    memset(s.value + n * s.value_row, 0, size_t(f.Dv) * sizeof(T));
  }
  TileDropout<T> dropout;
  GradTile<W> q = make_grad_tile<W>(workspace, f.D, f.Dv, f.scale);
  if (f.dropout > 0) q.dropout = &dropout;
  const int64_t group = f.H / f.G;
  int64_t block = max_of(first_block(pyramid), s.outside.first / pyramid.block_size);
  for (; block * pyramid.block_size < s.outside.last; ++block) {
    const int64_t first = max_of(pyramid.first_query, block * pyramid.block_size);
    const int64_t end = min_of(pyramid.T, (block + 1) * pyramid.block_size);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      for (int64_t t = first; t < end; t += kColumns<W>) {
        segment_tile(p, s, h, block, t, min_of(kColumns<W>, end - t), q);
      }
    }
  }
}

// Adds the gradients of the tokens of `segment` from the queries of the other segments, in the order of the segments.
template <typename S>
void add_outside(const AttentionBackward<S>& p, int64_t g, int64_t segment) {
  typedef Compute<S> T;
  const int64_t D = p.forward.D, Dv = p.forward.Dv, nodes = p.forward.pyramid.nodes, T_ = p.forward.pyramid.T;
  const SegmentGrads<T> own = segment_grads(p, g, segment);
  for (int64_t i = 0; i < p.segments; ++i) {
    if (i == segment) continue;
    const SegmentGrads<T> s = segment_grads(p, g, i);
    const Outside& o = s.outside;
    const int64_t begins[3] = {o.left, o.last, o.tail}, ends[3] = {o.first, o.right, T_};
    for (int part = 0; part < 3; ++part) {
      const int64_t end = min_of(ends[part], own.outside.last);
      for (int64_t n = max_of(begins[part], own.outside.first); n < end; ++n) {
        const int64_t row = outside_row(o, nodes, n);
        add_scaled(own.key + n * own.key_row, T(1), s.partial_key + row * D, D);
        add_scaled(own.value + n * own.value_row, T(1), s.partial_value + row * Dv, Dv);
      }
    }
  }
}

// Adds the other segments' gradients of one node to those of segment 0.
template <typename S>
void add_node(const AttentionBackward<S>& p, int64_t g, int64_t node) {
  typedef Compute<S> T;
  const int64_t D = p.forward.D, Dv = p.forward.Dv;
  const SegmentGrads<T> own = segment_grads(p, g, 0);
  for (int64_t i = 1; i < p.segments; ++i) {
    const SegmentGrads<T> s = segment_grads(p, g, i);
    add_scaled(own.partial_key + node * D, T(1), s.partial_key + node * D, D);
    add_scaled(own.partial_value + node * Dv, T(1), s.partial_value + node * Dv, Dv);
  }
}

// Passes the gradient of one node to its children. `weights` and `slopes` hold one value per child.
template <typename S>
void unpool_node(const AttentionBackward<S>& p, const SegmentGrads<Compute<S>>& s, int64_t g, int level, int64_t node,
                 Compute<S>* weights, Compute<S>* slopes, Compute<S>* pool_grad) {
  typedef Compute<S> T;
  const Attention<S>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const int64_t D = f.D, Dv = f.Dv, n = pyramid.span[level] / pyramid.span[level - 1], child = node * n;
  const T* grad_key = s.partial_key + (pyramid.offset[level] + node) * D;
  const T* grad_value = s.partial_value + (pyramid.offset[level] + node) * Dv;
  T* child_key = level == 1 ? s.key + child * s.key_row : s.partial_key + (pyramid.offset[level - 1] + child) * D;
  T* child_value =
      level == 1 ? s.value + child * s.value_row : s.partial_value + (pyramid.offset[level - 1] + child) * Dv;
  const ptrdiff_t key_row = level == 1 ? s.key_row : D, value_row = level == 1 ? s.value_row : Dv;
  if (f.pool_query == nullptr) {
    for (int64_t c = 0; c < n; ++c) {
      add_scaled(child_key + c * key_row, T(1) / T(n), grad_key, D);
      add_scaled(child_value + c * value_row, T(1) / T(n), grad_value, Dv);
    }
    return;
  }
  const S* pool = pool_row(f, g, level);
  const Rows<S> rows = level_rows(f, g, level - 1);
  const S* key = rows.key + child * rows.key_row;
  const S* value = rows.value + child * rows.value_row;
  for (int64_t c = 0; c < n; ++c) weights[c] = f.scale * dot(pool, key + c * rows.key_row, D);
  softmax_in_place(weights, n);
  T mean = 0;
  for (int64_t c = 0; c < n; ++c) {
    slopes[c] = dot(grad_key, key + c * rows.key_row, D) + dot(grad_value, value + c * rows.value_row, Dv);
    mean += weights[c] * slopes[c];
  }
  for (int64_t c = 0; c < n; ++c) {
    const T slope = f.scale * weights[c] * (slopes[c] - mean);
    add_scaled(child_key + c * key_row, weights[c], grad_key, D);
    add_scaled(child_key + c * key_row, slope, pool, D);
    add_scaled(child_value + c * value_row, weights[c], grad_value, Dv);
    add_scaled(pool_grad, slope, key + c * rows.key_row, D);
  }
}

// Computes a row of grad_pool [P, G, D]: adds up, in order, the tasks' sums of every level that uses the row.
template <typename S>
void add_pool_gradients(const AttentionBackward<S>& p, int64_t row, int64_t g) {
  typedef Compute<S> T;
  const Attention<S>& f = p.forward;
  const Sequences& sequences = f.sequences;
  T* grad = p.grad_pool + (row * f.G + g) * f.D;
  memset(grad, 0, size_t(f.D) * sizeof(T));
  for (int level = 1; level <= f.pyramid.levels; ++level) {
    if (min_of(level, f.P) - 1 != row) continue;
    for (int64_t n = 0; n < sequences.count; ++n) {
      int64_t sum = sequences.tasks_before(kPoolSums, n) * f.G;
      for (int l = 1; l < level; ++l) sum += sequences.tasks(kChunks + l, n) * f.G;
      const int64_t chunks = sequences.tasks(kChunks + level, n);
      for (int64_t c = 0; c < chunks; ++c) {
        add_scaled(grad, T(1), p.partial_pool + (sum + g * chunks + c) * f.D, f.D);
      }
    }
  }
}

template <typename W, typename S>
int64_t backward_workspace(int64_t D, int64_t Dv, int64_t children) {
  return (max_of(grad_tile_elements<W, S>(D, Dv), 2 * children) + 31) / 16 * 16;
}

// Passes the gradients of the nodes of a chunk of level `level` on.
template <typename S>
void unpool_chunk(const AttentionBackward<S>& p, int64_t g, int level, int64_t chunk, Compute<S>* workspace) {
  typedef Compute<S> T;
  const Attention<S>& f = p.forward;
  const Pyramid& pyramid = f.pyramid;
  const SegmentGrads<T> s = segment_grads(p, g, 0);
  int64_t sum = g * pool_chunks(pyramid, level) + chunk;
  for (int l = 1; l < level; ++l) sum += f.G * pool_chunks(pyramid, l);
  T* pool_grad = p.grad_pool ? p.partial_pool + sum * f.D : nullptr;
  if (pool_grad) memset(pool_grad, 0, size_t(f.D) * sizeof(T));
  const int64_t last = min_of(pyramid.count[level], (chunk + 1) * kPoolChunk);
  for (int64_t node = chunk * kPoolChunk; node < last; ++node) {
    unpool_node(p, s, g, level, node, workspace, workspace + pool_children(pyramid), pool_grad);
  }
}

// Passes the gradients of all nodes on, the highest level first, by the whole team.
template <typename S>
void unpool_levels(const AttentionBackward<S>& p, Current<AttentionBackward<S>>& current, Compute<S>* workspace) {
  const Attention<S>& f = p.forward;
  const Sequences& sequences = f.sequences;
  for (int level = f.pyramid.levels; level >= 1; --level) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < f.G * sequences.tasks(kChunks + level); ++i) {
      const Task task = task_at(sequences, kChunks + level, f.G, i);
      unpool_chunk(current.at(task.sequence), task.head, level, task.item, workspace);
    }
  }
  if (p.grad_pool) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < f.P * f.G; ++i) add_pool_gradients(p, i / f.G, i % f.G);
  }
}

template <typename W, typename S>
void attention_backward(const AttentionBackward<S>& p) {
  const Attention<S>& f = p.forward;
  const Sequences& sequences = f.sequences;
  const int64_t segments = f.G * sequences.tasks(kSegments);
  const int64_t share = backward_workspace<W, S>(f.D, f.Dv, pool_children(f.pyramid));
#pragma omp parallel if (f.B * f.H * f.pyramid.T > 256)
  {
    Sum<W>* const workspace = f.workspace + omp_get_thread_num() * share;
    Current<AttentionBackward<S>> current(p);
    // The later segments of a causal head take longer, so they go first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < segments; ++i) {
      const Task task = task_at(sequences, kSegments, f.G, segments - 1 - i);
      segment_backward<W>(current.at(task.sequence), task.head, task.item, workspace);
    }
    if (segments > f.G * sequences.count) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < segments; ++i) {
        const Task task = task_at(sequences, kSegments, f.G, i);
        add_outside(current.at(task.sequence), task.head, task.item);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < f.G * sequences.tasks(kNodes); ++i) {
        const Task task = task_at(sequences, kNodes, f.G, i);
        add_node(current.at(task.sequence), task.head, task.item);
      }
    }
    unpool_levels(p, current, workspace);
  }
}

template <typename W, typename S = W>
constexpr Backward<S> kBackward = {backward_workspace<W, S>, attention_backward<W, S>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
