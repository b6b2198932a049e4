// The table of recurrent cells with layer norm.
#include "cpu/rnn/entry.h"
#include "cpu/rnn/norm_backward.h"
#include "cpu/rnn/norm_forward.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <class Cell>
constexpr RnnCellEntry kNormEntry = rnn_entry<Cell>(norm_forward<Cell, float>, norm_forward<Cell, double>,
                                                    norm_backward<Cell, float>, norm_backward<Cell, double>);

constexpr RnnCellEntry kNormCells[] = {kNormEntry<LayerNormLstmCell>, kNormEntry<LayerNormLstmNormalizedCell>,
                                       kNormEntry<LayerNormGruCell>};

extern const RnnNormKernels rnn_norm_kernels;
const RnnNormKernels rnn_norm_kernels = {kNormCells, int(sizeof(kNormCells) / sizeof(kNormCells[0])),
                                         normalize_rows<float>, normalize_rows<double>};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
