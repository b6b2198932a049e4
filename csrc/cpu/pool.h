// Memory of large tensors that do not leave autograd, above all of what a forward pass saves for its backward pass:
// kept for the next pass.
#pragma once

#include "tensor.h"

namespace seqaccel {

// As new_empty; a large tensor's memory goes back to the pool when the tensor dies. Training takes the same again in
// every iteration, and fresh pages are slow: with them a layer-norm LSTM (T, B, H = 128, 16, 512) trained in 177 ms
// instead of 122 on a virtual machine. The pool holds at most 256 MB that no tensor uses. Before torch 2.11, which lets
// a tensor own such memory: new_empty.
Tensor new_pooled(const Tensor& like, std::initializer_list<int64_t> sizes);

}  // namespace seqaccel
