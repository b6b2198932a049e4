// Hierarchical attention: what the operator hands to the kernels of an instruction set.
//
// Letters: B batch, H query heads, G key heads (H a multiple of G), T time of keys and values, Tq of queries, D size of
// queries and keys, Dv of values, N nodes of all summary levels, L summary levels.
#pragma once

#include "common/narrow.h"
#include "cpu/attention/heads.h"
#include "cpu/attention/hierarchical/cover.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::attention::hierarchical {

// T tokens that no other tokens attend to, from `first` on in row `row` of the batch. Its nodes begin at row `node` of
// the pooled arrays.
struct Sequence {
  int64_t row, first, T, node;
};

// The sequences of a call, and its tasks of several kinds. A kind has so many tasks per sequence and head.
struct Sequences {
  int64_t count;
  const Sequence* list;   // null: the rows of the batch, which are alike
  const int64_t* before;  // [kinds, count + 1]: tasks of the sequences before; alike: [kinds], tasks of each

  int64_t tasks_before(int kind, int64_t n) const { return list ? before[kind * (count + 1) + n] : n * before[kind]; }
  int64_t tasks(int kind, int64_t n) const { return tasks_before(kind, n + 1) - tasks_before(kind, n); }
  int64_t tasks(int kind) const { return tasks_before(kind, count); }
};

struct Task {
  int64_t sequence, head, item;
};

// Task i of all, which are in the order of sequences, heads, and tasks per head.
static inline Task task_at(const Sequences& s, int kind, int64_t heads, int64_t i) {
  int64_t n = 0;
  if (s.list) {
    for (int64_t end = s.count; end - n > 1;) {
      const int64_t middle = n + (end - n) / 2;
      if (heads * s.tasks_before(kind, middle) <= i) {
        n = middle;
      } else {
        end = middle;
      }
    }
  } else {
    n = i / (heads * s.before[kind]);
  }
  const int64_t each = s.tasks(kind, n);
  i -= heads * s.tasks_before(kind, n);
  return {n, i / each, i % each};
}

// S is what memory holds, T what is calculated.
template <typename S>
struct Attention {
  typedef Compute<S> T;
  int64_t B, H, G, D, Dv;
  int64_t Tq, nodes;  // rows per head of lse and of the pooled arrays
  Pyramid pyramid;    // of the whole time; its other sizes are the call's
  Sequences sequences;
  T scale;
  T bias[kMaxLevels + 1];  // log span with mass_bias, else 0
  double dropout;          // the rate, or 0
  uint64_t seed;
  int64_t dropout_row;  // the generator's row for the first query of head 0; rows are those of lse
  Heads<const S> query, key, value;
  const S* pool_query;  // [P, G, D], or null: the mean
  int64_t P;
  S* pooled_key;    // [B, G, nodes, D]
  S* pooled_value;  // [B, G, nodes, Dv]
  Heads<S> out;
  T* lse;        // [B, H, Tq]
  T* workspace;  // threads * <kernel>_workspace elements
};

// Kinds of tasks of the forward pass: blocks of queries, and the nodes of level l >= 1 as kind l.
constexpr int kBlocks = 0;

template <typename S>
struct AttentionBackward {
  typedef Compute<S> T;
  Attention<S> forward;  // out, lse and the pooled arrays are read only; its sequences are those of this pass
  Heads<const S> grad_out;
  const T* grad_lse;  // [B, H, Tq], or null
  Heads<S> grad_query;
  Heads<T> grad_key, grad_value;
  T* grad_pool;      // [P, G, D], or null
  int64_t segments;  // a head's query blocks are split into so many independent segments; of one sequence
  T* partial;        // gradients of tokens and nodes outside a segment: see Outside
  T* partial_pool;   // [sequences, levels, G, chunks, D]
};

// Kinds of tasks of the backward pass. kPartialRows are rows of `partial`, kPoolSums rows of `partial_pool`. Chunks of
// nodes of level l >= 1 are of kind kChunks + l.
constexpr int kSegments = 0, kNodes = 1, kPartialRows = 2, kPoolSums = 3, kChunks = 3;

// The rows of `partial` that one (sequence, key head, segment) needs. For each of key and value these are the nodes of
// the pyramid, and the tokens outside the segment that its queries see.
struct Outside {
  int64_t first, last;  // the segment's own tokens; the first segment also has those before the queries
  int64_t left, right;  // its queries also see [left, first), [last, right)
  int64_t tail;         // and [tail, T)
};

static inline Outside segment_outside(const Pyramid& p, int64_t segment, int64_t segments) {
  const int64_t blocks = query_blocks(p), before = first_block(p);
  const int64_t first = before + blocks * segment / segments, last = before + blocks * (segment + 1) / segments;
  Outside o;
  o.first = segment == 0 ? 0 : min_of(p.T, first * p.block_size);
  o.last = min_of(p.T, last * p.block_size);
  o.left = o.first;
  o.right = o.last;
  o.tail = p.T;
  if (first == last) return o;
  Run runs[kMaxRuns];
  cover_block(p, first, runs);
  o.left = min_of(o.first, runs[0].begin);
  cover_block(p, last - 1, runs);
  o.right = max_of(o.last, runs[0].end);
  if (!p.causal && p.levels > 0) o.tail = max_of(o.right, p.count[1] * p.block_size);
  return o;
}

static inline int64_t outside_rows(const Pyramid& p, const Outside& o) {
  return (o.first - o.left) + (o.right - o.last) + (p.T - o.tail);
}

// The most children a node has.
static inline int64_t pool_children(const Pyramid& p) {
  return p.levels == 0 ? 1 : p.levels == 1 ? p.block_size : max_of(p.block_size, p.fanout);
}

constexpr int64_t kPoolChunk = 32;  // nodes of a level per task in the backward pass of the pyramid

static inline int64_t pool_chunks(const Pyramid& p, int level) {
  return (p.count[level] + kPoolChunk - 1) / kPoolChunk;
}

// A kernel, and the elements of workspace that one of its threads needs.
template <typename S>
struct Forward {
  int64_t (*workspace)(int64_t D, int64_t Dv, int64_t children);
  void (*run)(const Attention<S>&);
};

template <typename S>
struct Backward {
  int64_t (*workspace)(int64_t D, int64_t Dv, int64_t children);
  void (*run)(const AttentionBackward<S>&);
};

// The pyramid alone: G heads, and no queries. The backward pass has its nodes' gradients in partial [B, G, nodes * (D +
// Dv)], keys before values, and adds those of level 1 to the tokens'.
template <typename S>
struct Pool {
  void (*forward)(const Attention<S>&);
  void (*backward)(const AttentionBackward<S>&);
};

struct PoolKernels {
  Pool<float> of_float;
  Pool<double> of_double;
  Pool<BFloat16> of_bfloat16;
  Pool<Float16> of_float16;
};

struct AttentionKernels {
  Forward<float> forward_float;
  Forward<double> forward_double;
};

struct AttentionBackwardKernels {
  Backward<float> backward_float;
  Backward<double> backward_double;
};

struct AttentionNarrowKernels {
  Forward<BFloat16> forward_bfloat16;
  Forward<Float16> forward_float16;
  // Products of pairs, of even D and Dv; null without AVX-512 BF16.
  Forward<BFloat16> forward_pairs;
  Backward<BFloat16> backward_bfloat16;
  Backward<Float16> backward_float16;
  Backward<BFloat16> backward_pairs;
};

}  // namespace seqaccel::attention::hierarchical

SEQACCEL_DECLARE_KERNELS(attention::hierarchical, AttentionKernels, attention_kernels)
SEQACCEL_DECLARE_KERNELS(attention::hierarchical, AttentionBackwardKernels, attention_backward_kernels)
SEQACCEL_DECLARE_KERNELS(attention::hierarchical, PoolKernels, pool_kernels)
SEQACCEL_DECLARE_KERNELS_BF16(attention::hierarchical, AttentionNarrowKernels, attention_narrow_kernels)
