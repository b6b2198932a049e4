// The table of recurrent cells with two products a step or weights besides them.
#include "cpu/rnn/entry.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr RnnCellEntry kStagedCells[] = {kEntry<PeepholeLstmCell>, kEntry<MultiplicativeLstmCell>,
                                         kEntry<GruResetBeforeCell>};

extern const RnnStagedKernels rnn_staged_kernels;
const RnnStagedKernels rnn_staged_kernels = {kStagedCells, int(sizeof(kStagedCells) / sizeof(kStagedCells[0]))};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
