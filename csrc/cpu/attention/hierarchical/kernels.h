// Hierarchical attention, forward.
//
// Pyramid: each node pools its children, key = sum w key_child, value = sum w value_child. The weights w are the
// softmax over the children of scale * pool_query . key_child, or 1 / children.
//
// Attention: one softmax over the nodes of the query's cover (cover.h), with the score
//   s = scale * query . key + bias of the level
// (attend.h). A task is one tile of kColumns queries of one aligned block; tasks need no barrier.
#include "cpu/attention/hierarchical/levels.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

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
void pool_node(const Attention<T>& p, int64_t g, int level, int64_t node, T* weights) {
  const Rows<T> rows = level_rows(p, g, level - 1);
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
  const int64_t row = g * p.nodes + p.pyramid.offset[level] + node;
  weighted_sum(p.pooled_key + row * p.D, key, rows.key_row, p.D, weights, n);
  weighted_sum(p.pooled_value + row * p.Dv, value, rows.value_row, p.Dv, weights, n);
}

// Runs the queries at [t, t + count) of block `block`, with count <= kColumns.
template <typename T>
void attend_tile(const Attention<T>& p, int64_t h, int64_t block, int64_t t, int64_t count, T* workspace) {
  const Pyramid& pyramid = p.pyramid;
  const int64_t row = t - pyramid.first_query;
  const QueryTile<T> q =
      begin_tile(workspace, p.query.at(0, h) + row * p.query.time, p.query.time, count, p.D, p.Dv, p.scale);
  const int64_t g = h / (p.H / p.G);
  Run runs[kMaxRuns];
  const int n = cover_block(pyramid, block, runs);
  for (int i = 0; i < n; ++i) {
    const int level = runs[i].level;
    const bool diagonal = pyramid.causal && level == 0;
    attend_run(q, count, level_rows(p, g, level), runs[i].begin, diagonal ? t + count : runs[i].end, t, diagonal, p.D,
               p.Dv, p.bias[level]);
  }
  end_tile(q, p.out.at(0, h) + row * p.out.time, p.out.time, p.lse + h * p.Tq + row, count, p.Dv);
}

template <typename T>
int64_t forward_elements(int64_t D, int64_t Dv, int64_t children) {
  return (max_of(query_tile_elements<T>(D, Dv), children) + 31) / 16 * 16;
}

inline int64_t forward_workspace(int64_t D, int64_t Dv, int64_t children, bool is_double) {
  return is_double ? forward_elements<double>(D, Dv, children) : forward_elements<float>(D, Dv, children);
}

template <typename T>
void attention_forward(const Attention<T>& p) {
  const Sequences& sequences = p.sequences;
  const int64_t tiles = (p.pyramid.block_size + kColumns<T> - 1) / kColumns<T>;
  const int64_t tasks = sequences.tasks(kBlocks) * p.H * tiles;
  const int64_t share = forward_elements<T>(p.D, p.Dv, pool_children(p.pyramid));
#pragma omp parallel if (p.B * p.H * p.pyramid.T > 256)
  {
    T* const workspace = p.workspace + omp_get_thread_num() * share;
    Current<Attention<T>> current(p);
    for (int level = 1; level <= p.pyramid.levels; ++level) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < p.G * sequences.tasks(level); ++i) {
        const Task task = task_at(sequences, level, p.G, i);
        pool_node(current.at(task.sequence), task.head, level, task.item, workspace);
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      const Task task = task_at(sequences, kBlocks, p.H, i / tiles);
      const Attention<T>& s = current.at(task.sequence);
      const Pyramid& pyramid = s.pyramid;
      const int64_t block = first_block(pyramid) + task.item,
                    tile = block * pyramid.block_size + i % tiles * kColumns<T>;
      const int64_t t = max_of(tile, pyramid.first_query);
      const int64_t end = min_of(tile + kColumns<T>, min_of(pyramid.T, (block + 1) * pyramid.block_size));
      if (t < end) attend_tile(s, task.head, block, t, end - t, workspace);
    }
  }
}

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {forward_workspace, attention_forward<float>, attention_forward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
