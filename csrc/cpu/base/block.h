// Memory of a kernel's or an operator's own. Touching fresh pages costs more than much that is done in them (16 MB of
// packed weights took 5.5 ms instead of 0.8), so three places keep theirs for the next call:
//   Workspace (workspace.h)  what one call of a kernel needs and its threads share: packed weights, states, sums. One
//                            block per instruction set, whatever the size asked for, so that a layer's memory is still
//                            in the caches when the next layer or product takes it; no lock, no search.
//   pool (pool.h)            what outlives a call: outputs, saved activations, gradients, sessions. Many blocks of many
//                            sizes; the smallest that fits.
//   Scratch (scratch.h)      a tensor that lives for one call, because torch's products read it. As the pool's tensors,
//                            but with every torch: before 2.11 a tensor cannot own memory of the pool.
// All other temporary memory is a few KB of a thread's stack.
#pragma once

#include <stddef.h>

namespace seqaccel::inline base {

struct Block {
  void* data;
  size_t size;
};

// Fresh memory of block_size(bytes), at least so many: aligned to 64, and on huge pages where they are many. Null: out
// of memory. std::free gives it back.
size_t block_size(size_t bytes) noexcept;
Block new_block(size_t bytes) noexcept;

}  // namespace seqaccel::inline base
