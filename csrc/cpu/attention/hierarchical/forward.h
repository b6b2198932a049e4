// Hierarchical attention, forward.
//
// Pyramid: each node pools its children, key = sum w key_child, value = sum w value_child. The weights w are the
// softmax over the children of scale * pool_query . key_child, or 1 / children.
//
// Attention: one softmax over the nodes of the query's cover (cover.h), with the score
//   s = scale * query . key + bias of the level
// (attend.h). A weight of a node is dropped as one. A task is one tile of kColumns queries of one aligned block; tasks
// need no barrier.
#pragma once

#include "cpu/attention/hierarchical/levels.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

// out [D] = sum of weights[c] * rows [c, D]
template <typename S>
SEQACCEL_INLINE void weighted_sum(S* out, const S* rows, ptrdiff_t row, ptrdiff_t D, const Compute<S>* weights,
                                  ptrdiff_t n) {
  typedef Compute<S> T;
  ptrdiff_t d = 0;
  for (; d + 2 * Lanes<T> <= D; d += 2 * Lanes<T>) {
    Vec<T> a = {}, b = {};
    for (ptrdiff_t c = 0; c < n; ++c) {
      a += weights[c] * load_wide(rows + c * row + d);
      b += weights[c] * load_wide(rows + c * row + d + Lanes<T>);
    }
    store_narrow(out + d, a);
    store_narrow(out + d + Lanes<T>, b);
  }
  for (; d + Lanes<T> <= D; d += Lanes<T>) {
    Vec<T> a = {};
    for (ptrdiff_t c = 0; c < n; ++c) a += weights[c] * load_wide(rows + c * row + d);
    store_narrow(out + d, a);
  }
  for (; d < D; ++d) {
    T a = 0;
    for (ptrdiff_t c = 0; c < n; ++c) a += weights[c] * value_of(rows + c * row + d);
    set_value(out + d, a);
  }
}

template <typename S>
void pool_node(const Attention<S>& p, int64_t g, int level, int64_t node, Compute<S>* weights) {
  typedef Compute<S> T;
  const Rows<S> rows = level_rows(p, g, level - 1);
  const ptrdiff_t n = p.pyramid.span[level] / p.pyramid.span[level - 1];
  const S* key = rows.key + node * n * rows.key_row;
  const S* value = rows.value + node * n * rows.value_row;
  if (p.pool_query) {
    const S* pool = pool_row(p, g, level);
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
template <typename W, typename S>
void attend_tile(const Attention<S>& p, int64_t h, int64_t block, int64_t t, int64_t count, Sum<W>* workspace) {
  const Pyramid& pyramid = p.pyramid;
  const int64_t row = t - pyramid.first_query;
  QueryTile<W> q =
      begin_tile<W>(workspace, p.query.at(0, h) + row * p.query.time, p.query.time, count, p.D, p.Dv, p.scale);
  TileDropout<Sum<W>> dropout;
  if (p.dropout > 0) {
    dropout.begin(p.dropout, p.seed, p.dropout_row + h * p.Tq + row);
    q.dropout = &dropout;
  }
  const int64_t g = h / (p.H / p.G);
  Run runs[kMaxRuns];
  const int n = cover_block(pyramid, block, runs);
  for (int i = 0; i < n; ++i) {
    const int level = runs[i].level;
    const bool diagonal = pyramid.causal && level == 0;
    attend_run(q, count, level_rows(p, g, level), runs[i].begin, diagonal ? t + count : runs[i].end, t, diagonal, p.D,
               p.Dv, p.bias[level], first_element(pyramid, level));
  }
  end_tile(q, p.out.at(0, h) + row * p.out.time, p.out.time, p.lse + h * p.Tq + row, count, p.Dv);
}

// Pools the levels one after the other, by the whole team.
template <typename S>
void pool_levels(const Attention<S>& p, Current<Attention<S>>& current, Compute<S>* workspace) {
  for (int level = 1; level <= p.pyramid.levels; ++level) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.G * p.sequences.tasks(level); ++i) {
      const Task task = task_at(p.sequences, level, p.G, i);
      pool_node(current.at(task.sequence), task.head, level, task.item, workspace);
    }
  }
}

template <typename W, typename S>
int64_t forward_workspace(int64_t D, int64_t Dv, int64_t children) {
  return (max_of(query_tile_elements<W, S>(D, Dv), children) + 31) / 16 * 16;
}

template <typename W, typename S>
void attention_forward(const Attention<S>& p) {
  const Sequences& sequences = p.sequences;
  const int64_t tiles = (p.pyramid.block_size + kColumns<W> - 1) / kColumns<W>;
  const int64_t tasks = sequences.tasks(kBlocks) * p.H * tiles;
  const int64_t share = forward_workspace<W, S>(p.D, p.Dv, pool_children(p.pyramid));
#pragma omp parallel if (p.B * p.H * p.pyramid.T > 256)
  {
    Sum<W>* const workspace = p.workspace + omp_get_thread_num() * share;
    Current<Attention<S>> current(p);
    pool_levels(p, current, workspace);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      const Task task = task_at(sequences, kBlocks, p.H, i / tiles);
      const Attention<S>& s = current.at(task.sequence);
      const Pyramid& pyramid = s.pyramid;
      const int64_t block = first_block(pyramid) + task.item,
                    tile = block * pyramid.block_size + i % tiles * kColumns<W>;
      const int64_t t = max_of(tile, pyramid.first_query);
      const int64_t end = min_of(tile + kColumns<W>, min_of(pyramid.T, (block + 1) * pyramid.block_size));
      if (t < end) attend_tile<W>(s, task.head, block, t, end - t, workspace);
    }
  }
}

template <typename W, typename S = W>
constexpr Forward<S> kForward = {forward_workspace<W, S>, attention_forward<W, S>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
