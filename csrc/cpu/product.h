// Products of matrices over all time steps: torch's library's or matmul.h's, whichever is faster.
#pragma once

#include "tensor.h"

namespace seqaccel {

// out (+)= a b, a [M, K], b [K, N]; rows of out are contiguous.
void product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false);

}  // namespace seqaccel
