// Recurrent layers on the CPU: what the operators (rnn.cpp) hand to the loops (forward.h, backward.h).
// G gates, B batch, H hidden units, P the width of h; tensors are contiguous and time comes first.
#pragma once

#include <cstdint>

#include "common/product_cells.h"
#include "cpu/base/dispatch.h"

namespace seqaccel::rnn {

constexpr int64_t kRowsPerThread = 16;  // with so many rows each, threads split the batch rather than the units

// The rows of a stretch of time, longest sequence first, so that the rows running at time t are the first ones. A
// packed tensor holds only the rows that run, step after step. A padded one holds rows in the caller's order: those of
// `streams` sequences per step, unless the caller's tensors are packed themselves (is_packed). A row is a sequence, or
// with resets an episode of one, whose time t counts from its begin.
struct RnnRows {
  int64_t steps, batch;
  int64_t streams = batch;
  const int64_t* order = nullptr;    // [B]: the index of row b in h_0 and h_n; null: b
  const int64_t* first = nullptr;    // [B]: the padded index of row b at time 0; null: b
  const int64_t* running = nullptr;  // [steps]: rows that run at time t; null: all of them
  const int64_t* offsets = nullptr;  // [steps]: packed index of row 0 at time t; null: t B
  bool is_packed = false;
  int64_t usual = batch;  // rows of a step, by which threads share the work

  int64_t count(int64_t t) const { return running ? running[t] : batch; }
  int64_t row(int64_t b) const { return order ? order[b] : b; }
  int64_t padded(int64_t t, int64_t b) const { return is_packed ? packed(t, b) : t * streams + (first ? first[b] : b); }
  int64_t packed(int64_t t, int64_t b) const { return (offsets ? offsets[t] - offsets[0] : t * batch) + b; }
};

// Blend factors Z of a state, s = Z s' + (1 - Z) s~: padded [steps, B, width], or one for all; null: none.
template <typename T>
struct RnnBlend {
  const T* factors = nullptr;
  bool one = false;
};

// The weights of a layer's recurrence.
template <typename T>
struct RnnWeights {
  const T* hh;                      // weight_hh [G*H, P]
  const T* mh = nullptr;            // [H, H], if the cell has kExtra
  const T* hr = nullptr;            // [P, H], or null: P is H
  const T* unit_weights = nullptr;  // [kWeights, H]
};

// A stretch of a layer's recurrence in one direction. Pre-activations and their biases: see CellTraits.
template <typename T>
struct RnnForward {
  RnnRows rows;
  int64_t hidden, outputs;  // H and P
  bool reverse;             // runs from the last step to the first
  const T* h_0;             // [B, P]; may be h_n
  const T* c_0;             // [B, H], or null if the cell has no c; may be c_n
  RnnWeights<T> weights;
  const T* bias;  // [kPre, H], or null
  const T* x;     // packed (x_padded: padded) [., x_row]: W_ih x, kInputs*H values; null: computed from `input`
  int64_t x_row;
  T* saved;   // packed [., kSaved*H]; may be x. Null: nothing is kept; never null if a step has two products
  T* cells;   // packed [., H]: the new c, or null
  T* output;  // padded [steps, B, P]; may be x if the layouts are equal. Rows that do not run are not written
  T* h_n;     // [B, P]
  T* c_n;     // [B, H]
  RnnBlend<T> zoneout_h, zoneout_c;
  bool x_padded = false;
  // Where x is null, W_ih x is computed step by step beside W_hh h, from these.
  const T* input = nullptr;      // packed [., I]
  const T* weight_ih = nullptr;  // [G*H, I]
  int64_t inputs = 0;            // I
  // If the cell has kNorm. x is then the normalised W_ih x. Null: not kept.
  T* normed = nullptr;  // packed, rows x_row apart: normalised W_hh h', G*H values per row
  T* stats = nullptr;   // packed [., kNormStats]
};

template <typename T>
struct RnnBackward {
  RnnRows rows;
  int64_t hidden, outputs;
  bool reverse;
  const T* grad_output;  // padded [steps, B, P], or null: zero
  const T* grad_h_n;     // [B, P], or null: zero
  const T* grad_c_n;     // [B, H], or null: zero
  const T* h_0;
  const T* c_0;
  RnnWeights<T> weights;
  const T* output;  // padded
  const T* saved;   // packed [., kSaved*H]
  const T* cells;   // packed [., H]
  T* grad_pre;      // packed [., grad_row]: dL/dpre, kPre*H values; with kNorm dL/d(W_ih x) and dL/d(W_hh h')
  int64_t grad_row;
  T* grad_h_0;           // [B, P]
  T* grad_c_0;           // [B, H]
  T* grad_bias;          // [kPre, H]
  T* grad_unit_weights;  // [kWeights, H]
  RnnBlend<T> zoneout_h, zoneout_c;
  // What weight_hr or the main one of two products multiplied, packed [., H]. With weight_hr also dL/dh, packed [., P].
  T* source = nullptr;
  T* grad_h = nullptr;
  // If the cell has kNorm.
  const T* normed = nullptr;  // packed [., 2*G*H]: normalised W_ih x and W_hh h'
  const T* stats = nullptr;   // packed [., kNormStats]
};

// Statistics of a step's layer norms: 1/sigma of W_ih x and of W_hh h', mean and 1/sigma of c.
enum NormStat { kScaleX, kScaleH, kMeanC, kScaleC, kNormStats };

// Rows of W_ih x, `row` apart, to normalise in place. Their 1/sigma goes to stats [rows, kNormStats], if not null.
template <typename T>
struct NormRows {
  int64_t rows, width, row;
  T* x;
  T* stats;
};

// y [M, N] = x [M, K] weight^T, for so few rows that packing weight [N, K] would cost more than the product. Rows of y
// are y_row apart.
template <typename T>
struct RowProduct {
  int64_t M, N, K;
  const T* x;
  const T* weight;
  T* y;
  int64_t y_row;
};

// The traits of a cell that the operators need (see CellTraits), and its loops. A loop returns false if there is no
// memory for its workspace.
struct RnnCellEntry {
  const char* name;
  int gates, inputs, pre, saved, unit_weights;
  const int* weight_tensors;  // [4]
  int first, first_pre, main_pre;
  bool separate, has_cell, constant, zoneout, projects, extra, norm, norm_c;
  bool (*forward_float)(const RnnForward<float>&);
  bool (*forward_double)(const RnnForward<double>&);
  bool (*backward_float)(const RnnBackward<float>&);
  bool (*backward_double)(const RnnBackward<double>&);
  WeightShapes weights;
  int index;  // its place in ProductCells
};

struct RnnKernels {
  const RnnCellEntry* cells;
  int count;
  void (*row_product_float)(const RowProduct<float>&);
  void (*row_product_double)(const RowProduct<double>&);
};

// The table that has a cell. Each table is a translation unit of its own, so that none takes long to compile.
enum class RnnGroup { plain, staged, norm };

// Staged: a step has two products, or weights of units.
template <class Cell>
constexpr RnnGroup kRnnGroup = Cell::kNorm                      ? RnnGroup::norm
                               : Cell::kFirst || Cell::kWeights ? RnnGroup::staged
                                                                : RnnGroup::plain;

struct RnnStagedKernels {
  const RnnCellEntry* cells;
  int count;
};

struct RnnNormKernels {
  const RnnCellEntry* cells;
  int count;
  void (*normalize_float)(const NormRows<float>&);
  void (*normalize_double)(const NormRows<double>&);
};

// The entry of the active instruction set, or null if there is no such cell.
const RnnCellEntry* find_rnn_cell(const char* name);

}  // namespace seqaccel::rnn

SEQACCEL_DECLARE_KERNELS(rnn, RnnKernels, rnn_kernels)
SEQACCEL_DECLARE_KERNELS(rnn, RnnStagedKernels, rnn_staged_kernels)
SEQACCEL_DECLARE_KERNELS(rnn, RnnNormKernels, rnn_norm_kernels)
