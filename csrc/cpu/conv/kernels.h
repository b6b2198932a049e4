// Dilated causal convolution as an implicit matrix product.
//
//   forward    y[o, t]     = sum_{c,k} W[o, c, k] x[c, t - s_k]        s_k = (K - 1 - k) * dilation
//   data       dx[c, t]    = sum_{o,k} W[o, c, k] g[o, t + s_k]        g = the gradient of conv + bias
//   weight     dW[o, c, k] = sum_{b,t} g[o, t] x[c, t - s_k]
//
// A grid is its rows one after another, so that a tap is still a shift. A tap beside the centre finds zeros where it
// would leave its row. A shift never leaves the segment of a time step: before it lies the history.
//
// All three use one register tile of kRows x kVectors vectors: rows are broadcast, columns are vectors.
//
// forward and data: rows are output channels (W in its own layout; for data, transposed once per call). Columns are the
// time steps of the flattened batch. Their operand is copied into a panel [taps of channels, columns] that stays in the
// caches. The copy shifts, pads and inserts the history; every output channel uses it, so it costs 1 / (4 channels) of
// the product.
//
// weight: rows are (c, k), read from x in place; columns are output channels, and their operand is g, transposed by
// blocks. Each thread keeps a partial sum, and the sums are added in the order of the threads: the result depends on
// the number of threads, not on timing. The backward pass runs through all of this item by item (BackwardItems).
//
// A tile of 6 x 4 with 32 registers (6 x 2 with 16) keeps 24 (12) independent sums, more than latency times throughput
// needs, and divides the usual lengths and channel counts: four vectors are 64 columns.
#include "cpu/conv/backward.h"

namespace seqaccel::SEQACCEL_ISA::conv {

extern const ConvKernels conv_kernels;
const ConvKernels conv_kernels = {forward<float, float>, forward<double, double>, backward<float, float>,
                                  backward<double, double>};

}  // namespace seqaccel::SEQACCEL_ISA::conv
