// Block-sparse attention: what the operator hands to the kernels of an instruction set.
//
// Letters: B batch, H query heads, G key heads (H a multiple of G), Tq and Tk positions, D size of a query and a key,
// Dv of a value. A block is block_size positions; the last one may be shorter.
#pragma once

#include <cstdint>

#include "cpu/attention/heads.h"
#include "cpu/base/dispatch.h"
#include "cpu/base/integers.h"

namespace seqaccel::attention::block_sparse {

// Which key blocks a query block sees: [B, H, query_blocks, key_blocks], or the first part of more, with these strides
// of the first three dimensions. Where causal, a query sees no key after its own position, and a query block no block
// after its own.
struct Layout {
  const bool* data;
  int64_t batch, head, row;
  int64_t query_blocks, key_blocks, block_size;
  bool causal;
  const bool* at(int64_t b, int64_t h, int64_t block) const { return data + b * batch + h * head + block * row; }
  // Key blocks that may be seen.
  int64_t reach(int64_t block) const { return causal ? min_of(key_blocks, block + 1) : key_blocks; }
};

template <typename T>
struct Attention {
  int64_t B, H, G, Tq, Tk, D, Dv;
  Layout layout;
  T scale;
  Heads<const T> query, key, value;
  Heads<T> out;
  T* lse;        // [B, H, Tq]
  T* workspace;  // threads * <kernel>_workspace elements
};

// The backward pass divides the query blocks of a key head into segments. One of those that see a key block, the first,
// adds to its gradient in place; each other one has a block of `partial`.
constexpr int32_t kUnseen = -1, kInPlace = -2;

template <typename T>
struct AttentionBackward {
  Attention<T> forward;  // out and lse are read only
  Heads<const T> grad_out;
  Heads<T> grad_query, grad_key, grad_value;
  int64_t segments, plan_batch, plan_head;  // strides of plans in batch and key head
  const int64_t* first;                     // [plans, segments + 1]: the segments' query blocks
  const int32_t* place;  // [plans, segments, key_blocks]: kUnseen, kInPlace, or the block of `partial`
  int64_t partial_blocks;
  T* partial_key;    // [B, G, partial_blocks, block_size, D]
  T* partial_value;  // [B, G, partial_blocks, block_size, Dv]
};

// *_workspace: elements of workspace that one thread needs.
struct AttentionKernels {
  int64_t (*forward_workspace)(int64_t D, int64_t Dv, bool is_double);
  void (*forward_float)(const Attention<float>&);
  void (*forward_double)(const Attention<double>&);
};

struct AttentionBackwardKernels {
  int64_t (*backward_workspace)(int64_t D, int64_t Dv, bool is_double);
  void (*backward_float)(const AttentionBackward<float>&);
  void (*backward_double)(const AttentionBackward<double>&);
};

}  // namespace seqaccel::attention::block_sparse

SEQACCEL_DECLARE_KERNELS(attention::block_sparse, AttentionKernels, attention_kernels)
SEQACCEL_DECLARE_KERNELS(attention::block_sparse, AttentionBackwardKernels, attention_backward_kernels)
