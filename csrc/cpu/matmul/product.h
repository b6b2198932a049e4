// Products of matrices over all time steps: torch's library's or matmul.h's, whichever is faster.
#pragma once

#include "common/tensor.h"

namespace seqaccel::matmul {

// out (+)= a b, a [M, K], b [K, N]; rows of out are contiguous.
void product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false);

// Whether our kernels are faster than torch's library at large products. On AMD processors MKL does not use 512-bit
// vectors: [2048, 1024] x [1024, 4096] on two Zen 5 cores runs at 165 GFLOP/s, with our kernels at 408 (Zen 4, with
// 256-bit units: 155 to 200, ours 185 to 205). On Intel processors our kernels take 5 to 24% more time at H >= 512.
bool own_products_are_faster();

}  // namespace seqaccel::matmul
