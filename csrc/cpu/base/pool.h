// Keeps freed memory for the next request of its size. Sessions use it, and the tensors of recurrent layers: outputs,
// activations saved for the backward pass, gradients of inputs. block.h says why, and which other memory is kept.
#pragma once

#include "common/tensor.h"
#include "cpu/base/block.h"

namespace seqaccel::inline base {

// Like new_block. Blocks that are given back stay in the pool, up to 256 MB of those used last.
Block take_block(size_t bytes);
void give_block(Block block) noexcept;

// Like new_tensor, but the memory of large tensors, which malloc would not keep, returns to the pool when the tensor
// dies. Training allocates the same sizes in every iteration, and fresh pages are slow: without the pool, training at
// (T, B, H) = (128, 64, 256) took 40 ms instead of 24 for an RNN, and 104 ms instead of 95 for an LSTM, on a virtual
// machine. The storage of such a tensor cannot be resized, like one of torch.from_numpy. Before torch 2.11 a tensor
// cannot own memory of the pool, and this is new_tensor.
Tensor new_pooled(const Tensor& like, const Extents& sizes);

// As to_contiguous, without autograd; a copy is from the pool.
inline Tensor pooled_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return detach(t);
  Tensor copy = new_pooled(t, sizes_of(t));
  torch::stable::copy_(copy, detach(t));
  return copy;
}

}  // namespace seqaccel::inline base
