// The tables of block-sparse attention in float32 and float64, backward.
#include "cpu/attention/block_sparse/backward.h"

namespace seqaccel::SEQACCEL_ISA::attention::block_sparse {

extern const AttentionBackwardKernels attention_backward_kernels;
const AttentionBackwardKernels attention_backward_kernels = {kBackward<float>, kBackward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::block_sparse
