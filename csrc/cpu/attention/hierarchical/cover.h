// Which nodes of the pyramid a block of queries attends to.
//
// Level 0 is the tokens; a node of level l stands for span[l] of them. All queries of one aligned block of block_size
// see the same nodes, but for the diagonal of a causal block, so a block's cover is a few contiguous runs a level: no
// index lists. The cover is exact and disjoint: each visible position counts in one node.
#pragma once

#include <cstdint>

#include "cpu/base/integers.h"

namespace seqaccel::attention::hierarchical {

constexpr int kMaxLevels = 62;

struct Pyramid {
  int64_t T, block_size, fanout, local_blocks;
  int64_t first_query;  // the queries are at the positions [first_query, T)
  bool causal;
  int levels;                      // summary levels that hold a node
  int64_t nodes;                   // of all summary levels
  int64_t span[kMaxLevels + 1];    // span[0] = 1, span[1] = block_size, span[l + 1] = fanout * span[l]
  int64_t count[kMaxLevels + 1];   // complete nodes of a level
  int64_t offset[kMaxLevels + 1];  // row of a level's first node in the pooled arrays (level >= 1)
};

// Nodes [begin, end) of one level.
struct Run {
  int level;
  int64_t begin, end;
};

constexpr int kMaxRuns = 3 * (kMaxLevels + 1);

// levels < 0: as many levels as there are. Sizes are limited to T, beyond which they make no difference, so that no
// product overflows.
static inline Pyramid make_pyramid(int64_t T, int64_t block_size, int64_t fanout, int64_t levels, int64_t local_blocks,
                                   int64_t first_query, bool causal) {
  Pyramid p;
  p.T = T;
  p.first_query = first_query;
  p.block_size = min_of(block_size, max_of(T, 1) + 1);
  p.fanout = fanout;
  p.local_blocks = min_of(local_blocks, T / p.block_size + 2);
  p.causal = causal;
  p.levels = 0;
  p.nodes = 0;
  p.span[0] = 1;
  p.count[0] = T;
  p.offset[0] = 0;
  int64_t factor = p.block_size;
  while (p.levels < kMaxLevels && (levels < 0 || p.levels < levels) && factor <= T / p.span[p.levels]) {
    const int l = ++p.levels;
    p.span[l] = p.span[l - 1] * factor;
    p.count[l] = T / p.span[l];
    p.offset[l] = p.nodes;
    p.nodes += p.count[l];
    factor = p.fanout;
  }
  return p;
}

// The block of the first query, and how many blocks hold queries.
static inline int64_t first_block(const Pyramid& p) { return p.first_query / p.block_size; }
static inline int64_t query_blocks(const Pyramid& p) {
  return (p.T + p.block_size - 1) / p.block_size - first_block(p);
}

static inline int add_run(Run* runs, int n, int level, int64_t begin, int64_t end, int64_t span) {
  if (begin >= end) return n;
  runs[n].level = level;
  runs[n].begin = begin / span;
  runs[n].end = end / span;
  return n + 1;
}

// Computes the runs of query block `block`. runs[0] has level 0 and begins with a token that every query of the block
// sees. In a causal block a query at position t does not see the tokens of runs[0] after t.
static inline int cover_block(const Pyramid& p, int64_t block, Run* runs) {
  const int top = p.levels;
  const int64_t t = block * p.block_size, w = p.local_blocks;
  int64_t starts[kMaxLevels + 1];
  for (int l = 0; l < top; ++l) starts[l] = p.span[l + 1] * max_of(0, t / p.span[l + 1] - (w - 1));
  starts[top] = 0;
  const int64_t complete = top > 0 ? p.count[1] * p.block_size : p.T;
  int64_t end;  // tokens before it are covered so far
  if (p.causal) {
    end = min_of(p.T, t + p.block_size);
  } else if (top == 0 || t >= complete) {
    end = p.T;
  } else {
    end = min_of(complete, p.block_size * (block + w));
  }
  int n = add_run(runs, 0, 0, starts[0], end, 1);
  for (int l = 1; l <= top; ++l) n = add_run(runs, n, l, starts[l], starts[l - 1], p.span[l]);
  if (p.causal || end == p.T) return n;
  for (int l = 1; l <= top; ++l) {
    const int64_t reach =
        l == top ? p.count[l] * p.span[l] : min_of(p.count[l + 1], t / p.span[l + 1] + w) * p.span[l + 1];
    const int64_t next = max_of(end, reach);
    n = add_run(runs, n, l, end, next, p.span[l]);
    end = next;
  }
  for (int l = top - 1; l >= 0; --l) {
    n = add_run(runs, n, l, max_of(end, p.count[l + 1] * p.span[l + 1]), p.count[l] * p.span[l], p.span[l]);
  }
  return n;
}

}  // namespace seqaccel::attention::hierarchical
