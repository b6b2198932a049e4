// Block-sparse attention: what the operator hands to the kernels of an instruction set.
//
// Letters: B batch, H query heads, G key heads (H a multiple of G), Tq and Tk positions, D size of a query and a key,
// Dv of a value. A block is block_size positions; the last one may be shorter.
#pragma once

#include <cstdint>

#include "common/narrow.h"
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

// S is what memory holds, T what is calculated.
template <typename S>
struct Attention {
  typedef Compute<S> T;
  int64_t B, H, G, Tq, Tk, D, Dv;
  Layout layout;
  T scale;
  Heads<const S> query, key, value;
  Heads<S> out;
  T* lse;        // [B, H, Tq]
  T* workspace;  // threads * <kernel>_workspace elements
};

// The backward pass divides the query blocks of a key head into segments. One of those that see a key block, the first,
// adds to its gradient in place; each other one has a block of `partial`.
constexpr int32_t kUnseen = -1, kInPlace = -2;

template <typename S>
struct AttentionBackward {
  typedef Compute<S> T;
  Attention<S> forward;  // out and lse are read only
  Heads<const S> grad_out;
  Heads<S> grad_query;
  Heads<T> grad_key, grad_value;
  int64_t segments, plan_batch, plan_head;  // strides of plans in batch and key head
  const int64_t* first;                     // [plans, segments + 1]: the segments' query blocks
  const int32_t* place;  // [plans, segments, key_blocks]: kUnseen, kInPlace, or the block of `partial`
  int64_t partial_blocks;
  T* partial_key;    // [B, G, partial_blocks, block_size, D]
  T* partial_value;  // [B, G, partial_blocks, block_size, Dv]
};

// A kernel, and the elements of workspace that one of its threads needs.
template <typename S>
struct Forward {
  int64_t (*workspace)(int64_t D, int64_t Dv);
  void (*run)(const Attention<S>&);
};

template <typename S>
struct Backward {
  int64_t (*workspace)(int64_t D, int64_t Dv);
  void (*run)(const AttentionBackward<S>&);
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

}  // namespace seqaccel::attention::block_sparse

SEQACCEL_DECLARE_KERNELS(attention::block_sparse, AttentionKernels, attention_kernels)
SEQACCEL_DECLARE_KERNELS(attention::block_sparse, AttentionBackwardKernels, attention_backward_kernels)
SEQACCEL_DECLARE_KERNELS_BF16(attention::block_sparse, AttentionNarrowKernels, attention_narrow_kernels)
