// Column cells in a session. The rows of a chunk are multiplied many at a time, for the next steps too; no thread needs
// what another one makes of them.
#pragma once

#include "common/column_cells.h"
#include "cpu/packed/cells.h"
#include "cpu/packed/thread.h"

namespace seqaccel::SEQACCEL_ISA::packed {

// Runs one row of one vector of units. The sums of the products hold a vector for each input.
template <class Cell>
SEQACCEL_INLINE void column_step(const SessionThread& t, const SessionLayer& l, ptrdiff_t row, ptrdiff_t unit,
                                 const float* from_x, const float* from_before) {
  constexpr int L = kWordLanes;
  const int units = int(min_of(L, l.hidden - unit));
  float* const state = l.c + row % t.run.batch * l.stride + unit;
  Column<Cell, Vec<float>, float> u;
  for (int k = 0; k < Cell::kInputs; ++k) {
    u.in[k] = load(from_x + k * L) + load(l.bias + k * l.stride + unit);
    if (from_before) u.in[k] += load(from_before + k * L);
  }
  for (int k = 0; k < Cell::kWeights; ++k) u.weight[k] = load(l.weights + k * l.stride + unit);
  if constexpr (Cell::kReadsX) u.x = load_some(t.skip + row * l.outputs + unit, units);
  u.mask = broadcast(1.0f);
  u.scale = l.parameter;
  u.prev = load(state);
  Cell::template forward<SessionFunctions>(u);
  if (t.advances(row % t.run.batch)) store(state, u.state);
  t.store_output(row, l.outputs, unit, Cell::kOutputIsState ? u.state : u.h, units);
}

template <class Cell>
void column_layer(const SessionThread& t, const SessionLayer& l) {
  constexpr int L = kWordLanes, V = kBlockVectors<Cell::kInputs>, U = V / Cell::kInputs;
  const SessionMatrix& m = l.matrices[0];
  const ptrdiff_t rows = t.rows(), B = t.run.batch;
  const WordRows x = t.input_rows(m.precision, l.inputs);
  const bool window = m.columns[1] > 0;
  WordRows before{};
  if (window) before = t.state_rows(m.precision, l.h[l.parity ^ (t.done & 1)], l.stride, l.inputs);
  alignas(64) float sums[2][kRowChunk * 4 * L];
  for (ptrdiff_t i = t.begin(m.blocks); i < t.end(m.blocks); ++i) {
    for (ptrdiff_t r = 0, count = 0; r < rows; r += count) {
      count = min_of(kRowChunk, (window && r < B ? B : rows) - r);
      session_product(m, i, 0, x, r, count, sums[0]);
      if (window) session_product(m, i, 1, r < B ? before : x, r < B ? r : r - B, count, sums[1]);
      for (ptrdiff_t j = 0; j < count * U; ++j) {
        const ptrdiff_t unit = (i * U + j % U) * L, at = (j / U * V + j % U) * L;
        if (unit < l.hidden) column_step<Cell>(t, l, r + j / U, unit, sums[0] + at, window ? sums[1] + at : nullptr);
      }
    }
  }
  t.wait();
  if (!window) return;
  float* const kept = l.h[l.parity ^ ((t.done + t.steps) & 1)];
  for (ptrdiff_t b = t.begin(B); b < t.end(B); ++b) {
    const float* const from = t.advances(b) ? static_cast<const float*>(t.x) + (rows - B + b) * l.inputs
                                            : l.h[l.parity ^ (t.done & 1)] + b * l.stride;
    if (from != kept + b * l.stride) memcpy(kept + b * l.stride, from, size_t(l.inputs) * sizeof(float));
  }
  t.wait();
}

template <class... Cells>
inline void column_layer_of(const SessionThread& t, const SessionLayer& l, CellList<Cells...>) {
  static void (*const kLayers[])(const SessionThread&, const SessionLayer&) = {column_layer<Cells>...};
  kLayers[l.cell](t, l);
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
