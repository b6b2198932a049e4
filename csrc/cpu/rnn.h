// Recurrent layers on the CPU: what the operators (rnn.cpp) hand to the loops (rnn_forward.h, rnn_backward.h).
// G gates, B batch, H hidden units, P the width of h; tensors are contiguous and time comes first.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace seqaccel {

// The rows of a stretch of time, longest sequence first, so that those running at time t are the first of them. Of a
// packed tensor only the rows that run lie in memory, step after step; a padded one holds [steps, B] rows in the
// caller's order.
struct RnnRows {
  int64_t steps, batch;
  const int64_t* order = nullptr;    // [B]: the caller's index of row b; null: b
  const int64_t* running = nullptr;  // [steps]: rows that run at time t; null: all of them
  const int64_t* offsets = nullptr;  // [steps]: packed index of row 0 at time t; null: t B

  int64_t count(int64_t t) const { return running ? running[t] : batch; }
  int64_t row(int64_t b) const { return order ? order[b] : b; }
  int64_t padded(int64_t t, int64_t b) const { return t * batch + row(b); }
  int64_t packed(int64_t t, int64_t b) const { return (offsets ? offsets[t] - offsets[0] : t * batch) + b; }
};

// Blend factors Z of a state, s = Z s' + (1 - Z) s~: padded [steps, B, width], or one for all; null: none.
template <typename T>
struct RnnBlend {
  const T* factors = nullptr;
  bool one = false;
};

// A stretch of a layer's recurrence in one direction. Pre-activations and their biases: see CellTraits.
template <typename T>
struct RnnForward {
  RnnRows rows;
  int64_t hidden, outputs;          // H and P
  bool reverse;                     // runs from the last step to the first
  const T* h_0;                     // [B, P]; may be h_n
  const T* c_0;                     // [B, H], or null: the cell has none; may be c_n
  const T* weight;                  // weight_hh [G*H, P]
  const T* bias;                    // [kPre, H], or null
  const T* unit_weights = nullptr;  // [kWeights, H]
  const T* x;                       // packed [., x_row]: W_ih x, G*H values a row; null: calculated from input
  int64_t x_row;
  T* saved;   // packed [., kSaved*H], or null: nothing is kept for a backward pass; may be x
  T* cells;   // packed [., H]: the new c, or null
  T* output;  // padded [steps, B, P]; may be x where rows are not packed. Rows that do not run stay as they are
  T* h_n;     // [B, P]
  T* c_n;     // [B, H]
  RnnBlend<T> zoneout_h, zoneout_c;
  // x null: W_ih x is calculated step by step, beside W_hh h.
  const T* input = nullptr;      // packed [., I]
  const T* weight_ih = nullptr;  // [G*H, I]
  int64_t inputs = 0;            // I
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
  const T* weight;
  const T* unit_weights;
  const T* output;       // padded
  const T* saved;        // packed [., kSaved*H]
  const T* cells;        // packed [., H]
  T* grad_pre;           // packed [., kPre*H]: dL/dpre
  T* grad_h_0;           // [B, P]
  T* grad_c_0;           // [B, H]
  T* grad_bias;          // [kPre, H]
  T* grad_unit_weights;  // [kWeights, H]
  RnnBlend<T> zoneout_h, zoneout_c;
};

// y [M, N] = x [M, K] weight^T, for the few rows where packing weight [N, K] would cost more than the product; rows of
// y lie y_row apart.
template <typename T>
struct RowProduct {
  int64_t M, N, K;
  const T* x;
  const T* weight;
  T* y;
  int64_t y_row;
};

// What the operators need to know of a cell, and its loops. A loop returns false when its workspace could not be
// allocated.
struct RnnCellEntry {
  const char* name;
  int gates, pre, saved, unit_weights, tensors;
  bool apart, has_cell, zoneout, projects;
  bool (*forward_float)(const RnnForward<float>&);
  bool (*forward_double)(const RnnForward<double>&);
  bool (*backward_float)(const RnnBackward<float>&);
  bool (*backward_double)(const RnnBackward<double>&);
};

struct RnnKernels {
  const RnnCellEntry* cells;
  int count;
  void (*row_product_float)(const RowProduct<float>&);
  void (*row_product_double)(const RowProduct<double>&);
};

SEQACCEL_DECLARE_KERNELS(RnnKernels, rnn_kernels)

// The entry of the active instruction set; null: there is no such cell.
const RnnCellEntry* find_rnn_cell(const char* name);

}  // namespace seqaccel
