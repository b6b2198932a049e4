// Hierarchical attention: what the operator hands to the kernels of an instruction set.
//
// Letters: B batch, H query heads, G key heads (H a multiple of G), T time, D head dimension, N nodes of all summary
// levels, L summary levels.
#pragma once

#include "cpu/attention/heads.h"
#include "cpu/attention/hierarchical/cover.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::attention::hierarchical {

template <typename T>
struct Attention {
  int64_t B, H, G, D;
  Pyramid pyramid;
  T scale;
  T bias[kMaxLevels + 1];  // log span with mass_bias, else 0
  Heads<const T> query, key, value;
  const T* pool_query;  // [P, G, D], or null: the mean
  int64_t P;
  T* pooled_key;    // [B, G, N, D]
  T* pooled_value;  // [B, G, N, D]
  Heads<T> out;
  T* lse;        // [B, H, T]
  T* workspace;  // threads * <kernel>_workspace elements
};

template <typename T>
struct AttentionBackward {
  Attention<T> forward;  // out, lse and the pooled arrays are read only
  Heads<const T> grad_out;
  Heads<T> grad_query, grad_key, grad_value;
  T* grad_pool;      // [P, G, D], or null
  int64_t segments;  // a head's query blocks are split into so many independent segments
  T* partial;        // gradients of tokens and nodes outside a segment: see Outside
  T* partial_pool;   // [pool_tasks, D]
};

// The rows of `partial`, of D elements each, that one (batch, key head, segment) needs. For each of key and value these
// are the nodes of the pyramid, and the tokens outside the segment that its queries see.
struct Outside {
  int64_t first, last;  // the segment's own tokens
  int64_t left, right;  // its queries also see [left, first), [last, right)
  int64_t tail;         // and [tail, T)
};

static inline Outside segment_outside(const Pyramid& p, int64_t segment, int64_t segments) {
  const int64_t blocks = query_blocks(p);
  const int64_t first = blocks * segment / segments, last = blocks * (segment + 1) / segments;
  Outside o;
  o.first = min_of(p.T, first * p.block_size);
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

static inline int64_t pool_tasks(const Pyramid& p, int64_t heads) {
  int64_t n = 0;
  for (int l = 1; l <= p.levels; ++l) n += heads * ((p.count[l] + kPoolChunk - 1) / kPoolChunk);
  return n;
}

// Elements of workspace that one thread needs.
struct AttentionKernels {
  int64_t (*forward_workspace)(int64_t D, int64_t children, bool is_double);
  void (*forward_float)(const Attention<float>&);
  void (*forward_double)(const Attention<double>&);
};

struct AttentionBackwardKernels {
  int64_t (*backward_workspace)(int64_t D, int64_t children, bool is_double);
  void (*backward_float)(const AttentionBackward<float>&);
  void (*backward_double)(const AttentionBackward<double>&);
};

}  // namespace seqaccel::attention::hierarchical

SEQACCEL_DECLARE_KERNELS(attention::hierarchical, AttentionKernels, attention_kernels)
SEQACCEL_DECLARE_KERNELS(attention::hierarchical, AttentionBackwardKernels, attention_backward_kernels)
