// The tables of block-sparse attention in float32 and float64, forward.
#include "cpu/attention/block_sparse/forward.h"

namespace seqaccel::SEQACCEL_ISA::attention::block_sparse {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {kForward<float>, kForward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::block_sparse
