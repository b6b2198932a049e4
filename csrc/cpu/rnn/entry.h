// The tables of kernels, made of ProductCells.
#pragma once

#include "cpu/rnn/backward.h"
#include "cpu/rnn/forward.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <class Cell>
constexpr RnnCellEntry rnn_entry(bool (*forward_float)(const RnnForward<float>&),
                                 bool (*forward_double)(const RnnForward<double>&),
                                 bool (*backward_float)(const RnnBackward<float>&),
                                 bool (*backward_double)(const RnnBackward<double>&)) {
  return {Cell::kName,          Cell::kGates,   kInputs<Cell>,   kPre<Cell>,      Cell::kSaved,         Cell::kWeights,
          Cell::kWeightTensors, Cell::kFirst,   Cell::kFirstPre, Cell::kMainPre,  Cell::kSeparate,      Cell::kHasCell,
          Cell::kConstant,      Cell::kZoneout, Cell::kProjects, Cell::kExtra,    Cell::kNorm,          Cell::kNormC,
          forward_float,        forward_double, backward_float,  backward_double, weight_shapes<Cell>()};
}

template <class Cell>
constexpr RnnCellEntry kEntry = rnn_entry<Cell>(rnn_forward<Cell, float>, rnn_forward<Cell, double>,
                                                rnn_backward<Cell, float>, rnn_backward<Cell, double>);

template <int Count>
struct RnnTable {
  static constexpr int kCount = Count;
  RnnCellEntry cells[Count];
};

// A group's cells; entry(cell) makes the row of each.
template <RnnGroup group, class... Cells, class Entry>
constexpr auto table_of(CellList<Cells...>, Entry entry) {
  RnnTable<(int(kRnnGroup<Cells> == group) + ...)> table{};
  int index = 0, count = 0;
  const auto add = [&]<class Cell>(Cell cell) {
    if constexpr (kRnnGroup<Cell> == group) {
      table.cells[count] = entry(cell);
      table.cells[count++].index = index;
    }
    ++index;
  };
  (add(Cells{}), ...);
  return table;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
