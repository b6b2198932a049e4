// The table of recurrent cells with two products a step or weights besides them.
#include "cpu/rnn/entry.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr auto kTable = table_of<RnnGroup::staged>(ProductCells{}, []<class Cell>(Cell) { return kEntry<Cell>; });

extern const RnnStagedKernels rnn_staged_kernels;
const RnnStagedKernels rnn_staged_kernels = {kTable.cells, kTable.kCount};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
