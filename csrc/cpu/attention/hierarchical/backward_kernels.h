// The tables of hierarchical attention in float32 and float64, backward.
#include "cpu/attention/hierarchical/backward.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

extern const AttentionBackwardKernels attention_backward_kernels;
const AttentionBackwardKernels attention_backward_kernels = {kBackward<float>, kBackward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
