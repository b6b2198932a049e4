// The tables of hierarchical attention in float32 and float64, forward.
#include "cpu/attention/hierarchical/forward.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {kForward<float>, kForward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
