// The column cells' traits as data.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "common/column_cells.h"

namespace seqaccel::scan {

// A cell's traits.
struct ColumnCell {
  const char* name;
  int inputs, weights, biases, first_bias;
  bool reads_x, scale, output_is_state;
  Mask mask;
};

template <class... Cells>
constexpr std::array<ColumnCell, sizeof...(Cells)> traits_of(CellList<Cells...>) {
  return {{{Cells::kName, Cells::kInputs, Cells::kWeights, Cells::kBiases, Cells::kFirstBias, Cells::kReadsX,
            Cells::kScale, Cells::kOutputIsState, Cells::kMask}...}};
}

inline constexpr auto kColumnCells = traits_of(ColumnCells{});

// Null: there is none.
inline const ColumnCell* find_column_cell(std::string_view name, int64_t inputs, bool reads_x) {
  for (const ColumnCell& cell : kColumnCells) {
    if (name == cell.name && inputs == cell.inputs && reads_x == cell.reads_x) return &cell;
  }
  return nullptr;
}

}  // namespace seqaccel::scan
