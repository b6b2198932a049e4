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
  fill_grad_tile(q, f.query.at(b, h) + t * f.query.time, f.query.time, p.grad_out.at(b, h) + t * p.grad_out.time,
                 p.grad_out.time, f.out.at(b, h) + t * f.out.time, f.out.time, f.lse + (b * f.H + h) * pyramid.T + t,
                 count, D, D, f.scale);
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
      chunk_backward_vectors(vectors - first, q, first, count, c, D, D, f.bias[level], masked);
      key += c.keys;
    }
  }
  end_grad_tile(q, p.grad_query.at(b, h) + t * p.grad_query.time, p.grad_query.time, count, D, f.scale);
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
  const GradTile<T> q = make_grad_tile(workspace, f.D, f.D);
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
  return (max_of(grad_tile_elements<T>(D, D), 2 * children) + 31) / 16 * 16;
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
