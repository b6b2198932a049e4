// A cell's row in the tables of kernels.
#pragma once

#include "cpu/rnn/backward.h"
#include "cpu/rnn/forward.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <class Cell>
constexpr RnnCellEntry rnn_entry(bool (*forward_float)(const RnnForward<float>&),
                                 bool (*forward_double)(const RnnForward<double>&),
                                 bool (*backward_float)(const RnnBackward<float>&),
                                 bool (*backward_double)(const RnnBackward<double>&)) {
  return {Cell::kName,          Cell::kGates,    kInputs<Cell>,   kPre<Cell>,     Cell::kSaved,    Cell::kWeights,
          Cell::kWeightTensors, Cell::kFirst,    Cell::kFirstPre, Cell::kMainPre, Cell::kSeparate, Cell::kHasCell,
          Cell::kZoneout,       Cell::kProjects, Cell::kExtra,    Cell::kNorm,    Cell::kNormC,    forward_float,
          forward_double,       backward_float,  backward_double};
}

template <class Cell>
constexpr RnnCellEntry kEntry = rnn_entry<Cell>(rnn_forward<Cell, float>, rnn_forward<Cell, double>,
                                                rnn_backward<Cell, float>, rnn_backward<Cell, double>);

}  // namespace seqaccel::SEQACCEL_ISA::rnn
