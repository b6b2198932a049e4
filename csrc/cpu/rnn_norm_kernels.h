#include "rnn_entry.h"

namespace seqaccel {
namespace SEQACCEL_ISA {
extern const RnnNormKernels rnn_norm_kernels;
const RnnNormKernels rnn_norm_kernels = {nullptr, 0, nullptr, nullptr};
}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
