// Block-sparse attention, forward: s = scale * query . key over the key blocks that the layout names (attend.h).
//
// A task is one tile of kColumns queries of one query block; tasks need no barrier. Neighbouring key blocks are one run
// of keys. All queries of a block see the same runs, but for the diagonal of a causal block, where a run begins at the
// block's first query or before.
#pragma once

#include "cpu/attention/attend.h"
#include "cpu/attention/block_sparse/block_sparse.h"

namespace seqaccel::SEQACCEL_ISA::attention::block_sparse {

// Runs the queries [t, t + count) of block `block`, with count <= kColumns.
template <typename W, typename S>
void attend_tile(const Attention<S>& p, int64_t b, int64_t h, int64_t block, int64_t t, int64_t count,
                 Sum<W>* workspace) {
  typedef Sum<W> T;
  const Layout& layout = p.layout;
  const bool* seen = layout.at(b, h, block);
  const int64_t g = h / (p.H / p.G), reach = layout.reach(block);
  const int64_t end = layout.causal ? min_of(p.Tk, t + count) : p.Tk;
  S* out = p.out.at(b, h) + t * p.out.time;
  T* lse = p.lse + (b * p.H + h) * p.Tq + t;
  int64_t key_block = 0;
  while (key_block < reach && !seen[key_block]) ++key_block;
  if (key_block == reach) {
    for (int64_t i = 0; i < count; ++i) {
      memset(out + i * p.out.time, 0, size_t(p.Dv) * sizeof(S));
      lse[i] = T(-INFINITY);
    }
    return;
  }
  const QueryTile<W> q =
      begin_tile<W>(workspace, p.query.at(b, h) + t * p.query.time, p.query.time, count, p.D, p.Dv, p.scale);
  const Rows<S> rows = {p.key.at(b, g), p.value.at(b, g), p.key.time, p.value.time};
  while (key_block < reach) {
    const int64_t first = key_block;
    while (key_block < reach && seen[key_block]) ++key_block;
    attend_run(q, count, rows, first * layout.block_size, min_of(end, key_block * layout.block_size), t, layout.causal,
               p.D, p.Dv, T(0));
    while (key_block < reach && !seen[key_block]) ++key_block;
  }
  end_tile(q, out, p.out.time, lse, count, p.Dv);
}

template <typename W, typename S>
int64_t forward_workspace(int64_t D, int64_t Dv) {
  return (query_tile_elements<W, S>(D, Dv) + 31) / 16 * 16;
}

template <typename W, typename S>
void attention_forward(const Attention<S>& p) {
  const Layout& layout = p.layout;
  const int64_t tiles = (layout.block_size + kColumns<W> - 1) / kColumns<W>;
  const int64_t tasks = p.B * p.H * layout.query_blocks * tiles, share = forward_workspace<W, S>(p.D, p.Dv);
#pragma omp parallel if (p.B * p.H * p.Tq > 256)
  {
    Sum<W>* const workspace = p.workspace + omp_get_thread_num() * share;
    // The later blocks of a causal head may take longer, so they go first.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      const int64_t tile = i % tiles, block = layout.query_blocks - 1 - i / tiles % layout.query_blocks;
      const int64_t head = i / tiles / layout.query_blocks;
      const int64_t t = block * layout.block_size + tile * kColumns<W>;
      const int64_t end = min_of(p.Tq, (block + 1) * layout.block_size);
      if (t < end) attend_tile<W>(p, head / p.H, head % p.H, block, t, min_of(kColumns<W>, end - t), workspace);
    }
  }
}

template <typename W, typename S = W>
constexpr Forward<S> kForward = {forward_workspace<W, S>, attention_forward<W, S>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::block_sparse
