// What the scans hand to their kernels, on a CPU and on a GPU.
#pragma once

#include <cstdint>

namespace seqaccel::scan {

// h_t = a_t * h_{t-1} + b_t on rows of `width` channels; reverse: h_t = a_t * h_{t+1} + b_t. h_0 may be null (zero).
template <typename T>
struct LinearScanForward {
  int64_t batch, steps, width;
  bool reverse;
  const T* a;    // [batch, steps, width]
  const T* b;    // [batch, steps, width]
  const T* h_0;  // [batch, width] or null
  T* h;          // [batch, steps, width]
};

template <typename T>
struct LinearScanBackward {
  int64_t batch, steps, width;
  bool reverse;
  const T* grad_h;  // [batch, steps, width]
  const T* a;       // [batch, steps, width]
  const T* h;       // [batch, steps, width]
  const T* h_0;     // [batch, width] or null
  T* grad_a;        // [batch, steps, width]
  T* grad_b;        // [batch, steps, width]
  T* grad_h_0;      // [batch, width]
};

// Columns are batch x directions x hidden. Of a packed batch (`starts`), row n has the steps [starts[n], starts[n + 1])
// of the one row of the tensors; else it has all of them, and the tensors have `batch` rows.
struct ColumnShape {
  int64_t steps, batch, directions, hidden;
  const int64_t* starts;  // [batch + 1] or null
};

// The tensors are of one type T; `starts` and the masks of steps are not. Of what a cell does not have, the pointer is
// null.
struct ColumnOperands {
  ColumnShape shape;
  const void* u;         // [steps, batch, directions, hidden, inputs] or [steps, batch, directions, inputs, hidden]
  const void* x;         // [steps, batch, directions, hidden]
  const void* weight;    // [weights, directions, hidden] or null: zero
  const void* bias;      // [biases, directions, hidden] or null: zero
  const void* c_0;       // [batch, directions, hidden]
  const void* mask;      // [batch, directions, hidden], or with steps in front, or null: one
  const void* scale;     // [1] or null: one
  const bool* mask_pad;  // [steps, batch] or null; true is padding
  const bool* reset;     // [steps, batch] or null; true: a new sequence begins
};

struct ColumnForward {
  ColumnOperands in;
  void* h;    // [steps, batch, directions, hidden]
  void* c_n;  // [batch, directions, hidden]
  void* c;    // [steps, batch, directions, hidden] or null: the states are not kept
};

struct ColumnBackward {
  ColumnOperands in;
  const void* grad_h;    // [steps, batch, directions, hidden]
  const void* grad_c_n;  // [batch, directions, hidden] or null
  const void* c;         // [steps, batch, directions, hidden]
  void* grad_u;          // as u
  void* grad_x;          // as x
  void* grad_weight;     // as weight, or null
  void* grad_bias;       // as bias, or null
  void* grad_c_0;        // as c_0
};

}  // namespace seqaccel::scan
