// Keeps freed memory for the next request of its size. Sessions use it, and the tensors of recurrent layers: outputs,
// activations saved for the backward pass, gradients of inputs. block.h says why, and which other memory is kept.
#pragma once

#include "common/tensor.h"
#include "cpu/base/block.h"

namespace seqaccel::inline base {

// As new_block. Blocks given back stay in the pool, at most 256 MB of them, those used last.
Block take_block(size_t bytes);
void give_block(Block block) noexcept;

// As new_tensor; the memory of a tensor too large for malloc to keep goes back to the pool when the tensor dies.
// Training takes the same again in every iteration, and fresh pages are slow: with them (T, B, H = 128, 64, 256)
// trained an RNN in 40 ms instead of 24, and an LSTM in 104 instead of 95, on a virtual machine. The tensor's storage
// cannot be resized, as one of torch.from_numpy cannot. Before torch 2.11, which lets a tensor own such memory:
// new_tensor.
Tensor new_pooled(const Tensor& like, const Extents& sizes);

}  // namespace seqaccel::inline base
