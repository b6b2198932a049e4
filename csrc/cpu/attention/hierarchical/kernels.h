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

// Runs the queries [t, t + count) of block `block`, with count <= kColumns.
template <typename T>
void attend_tile(const Attention<T>& p, int64_t b, int64_t h, int64_t block, int64_t t, int64_t count, T* workspace) {
  const Pyramid& pyramid = p.pyramid;
  const QueryTile<T> q =
      begin_tile(workspace, p.query.at(b, h) + t * p.query.time, p.query.time, count, p.D, p.D, p.scale);
  const int64_t g = h / (p.H / p.G);
  Run runs[kMaxRuns];
  const int n = cover_block(pyramid, block, runs);
  for (int i = 0; i < n; ++i) {
    const int level = runs[i].level;
    const bool diagonal = pyramid.causal && level == 0;
    attend_run(q, count, level_rows(p, b, g, level), runs[i].begin, diagonal ? t + count : runs[i].end, t, diagonal,
               p.D, p.D, p.bias[level]);
  }
  end_tile(q, p.out.at(b, h) + t * p.out.time, p.out.time, p.lse + (b * p.H + h) * pyramid.T + t, count, p.D);
}

template <typename T>
int64_t forward_elements(int64_t D, int64_t children) {
  return (max_of(query_tile_elements<T>(D, D), children) + 31) / 16 * 16;
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
