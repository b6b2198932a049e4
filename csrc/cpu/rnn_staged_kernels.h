// The table of recurrent cells with two products a step or weights besides them.
#include "rnn_entry.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr RnnCellEntry kStagedCells[] = {kEntry<PeepholeLstmCell>, kEntry<MultiplicativeLstmCell>,
                                         kEntry<GruResetBeforeCell>};

extern const RnnStagedKernels rnn_staged_kernels;
const RnnStagedKernels rnn_staged_kernels = {kStagedCells, int(sizeof(kStagedCells) / sizeof(kStagedCells[0]))};

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
