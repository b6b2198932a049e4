// Products of matrices over all time steps: torch's library's or matmul.h's, whichever is faster.
#pragma once

#include "common/tensor.h"

namespace seqaccel::matmul {

// out (+)= a b, a [M, K], b [K, N]; rows of out are contiguous.
void product(Tensor& out, const Tensor& a, const Tensor& b, bool accumulate = false);

// Whether our kernels make large products in less time than torch's library. On AMD's cores MKL uses no vectors of 512
// bits: two Zen 5 cores, [2048, 1024] x [1024, 4096]: 165 GFLOP/s, ours 408 (Zen 4, whose units are of 256 bits: 155 to
// 200, ours 185 to 205). On Intel's cores matmul.h takes 5 to 24% more time at H >= 512.
bool own_products_are_faster();

}  // namespace seqaccel::matmul
