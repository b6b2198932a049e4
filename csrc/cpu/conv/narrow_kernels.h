// The table of convolutions of bfloat16 and float16. Sums and all that surrounds the product are float, and a result is
// rounded once.
#include "cpu/conv/backward.h"

namespace seqaccel::SEQACCEL_ISA::conv {

extern const ConvNarrowKernels conv_narrow_kernels;
const ConvNarrowKernels conv_narrow_kernels = {
    forward<float, BFloat16>,  forward<float, Float16>,
#if defined(SEQACCEL_ISA_AVX512_BF16)
    forward<Pair, BFloat16>,
#else
    nullptr,
#endif
    backward<float, BFloat16>, backward<float, Float16>,
#if defined(SEQACCEL_ISA_AVX512_BF16)
    backward<Pair, BFloat16>,
#else
    nullptr,
#endif
};

}  // namespace seqaccel::SEQACCEL_ISA::conv
