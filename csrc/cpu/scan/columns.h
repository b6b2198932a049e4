// The table of the column cells' kernels.
#pragma once

#include "common/column_cells.h"
#include "common/scan.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::scan {

template <class... Cells>
constexpr int count_of(CellList<Cells...>) {
  return sizeof...(Cells);
}

// Of each cell and type of value: float, double, bfloat16, float16. False: there was not enough memory.
struct ColumnKernels {
  bool (*forward[4])(const ColumnForward&);
  bool (*backward[4])(const ColumnBackward&);
};

struct ColumnTable {
  ColumnKernels cells[count_of(ColumnCells{})];
};

}  // namespace seqaccel::scan

SEQACCEL_DECLARE_KERNELS(scan, ColumnTable, column_table)
