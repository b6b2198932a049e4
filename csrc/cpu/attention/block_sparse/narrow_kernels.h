// The table of block-sparse attention in bfloat16 and float16. Softmax and sums are float, and a result is rounded
// once.
#include "cpu/attention/block_sparse/backward.h"
#include "cpu/attention/block_sparse/forward.h"

namespace seqaccel::SEQACCEL_ISA::attention::block_sparse {

extern const AttentionNarrowKernels attention_narrow_kernels;
const AttentionNarrowKernels attention_narrow_kernels = {
    kForward<float, BFloat16>,  kForward<float, Float16>,
#if defined(SEQACCEL_ISA_AVX512_BF16)
    kForward<Pair, BFloat16>,
#else
    {},
#endif
    kBackward<float, BFloat16>, kBackward<float, Float16>,
#if defined(SEQACCEL_ISA_AVX512_BF16)
    kBackward<Pair, BFloat16>,
#else
    {},
#endif
};

}  // namespace seqaccel::SEQACCEL_ISA::attention::block_sparse
