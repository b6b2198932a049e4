// The table of recurrent cells with layer norm.
#include "cpu/rnn/entry.h"
#include "cpu/rnn/norm_backward.h"
#include "cpu/rnn/norm_forward.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <class Cell>
constexpr RnnCellEntry kNormEntry = rnn_entry<Cell>(norm_forward<Cell, float>, norm_forward<Cell, double>,
                                                    norm_backward<Cell, float>, norm_backward<Cell, double>);

constexpr auto kTable = table_of<RnnGroup::norm>(ProductCells{}, []<class Cell>(Cell) { return kNormEntry<Cell>; });

extern const RnnNormKernels rnn_norm_kernels;
const RnnNormKernels rnn_norm_kernels = {kTable.cells, kTable.kCount, normalize_rows<float>, normalize_rows<double>};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
