// Memory that is kept for the next call: touching fresh pages costs more than much that is done in them (16 MB of
// packed weights took 5.5 ms instead of 0.8). Three places keep it:
//   Workspace (workspace.h)  what one call of a kernel needs and its threads share: packed weights, states, sums. One
//                            block per instruction set, whatever the size asked for: no lock and no search.
//   pool (pool.h)            what outlives a call: outputs, saved activations, gradients, sessions. Many blocks of many
//                            sizes; the smallest that fits (RNN training (128, 64, 256) in 24 ms instead of 40).
//   Scratch (scratch.h)      one tensor that lives for one call, because torch's products read it. It works with every
//                            torch: before 2.11 a tensor cannot own memory of the pool.
// Attention and scans take tensors from torch.
#pragma once

#include <stddef.h>

namespace seqaccel::inline base {

struct Block {
  void* data;
  size_t size;
};

// Allocates block_size(bytes) bytes, which are at least as many, aligned to 64 and on huge pages if they are many.
// Returns null if there is no memory. std::free releases it.
size_t block_size(size_t bytes) noexcept;
Block new_block(size_t bytes) noexcept;

}  // namespace seqaccel::inline base
