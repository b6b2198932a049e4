// What the scans hand to their kernels, on a CPU and on a GPU.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "common/narrow.h"

namespace seqaccel::scan {

template <typename R>
struct Complex {
  R real, imag;
};

// Sequences that lie one after the other in `rows` rows: `steps` rows each, or the rows [offsets[n], offsets[n + 1]).
// Offsets of any value stay within the rows; the first sequence begins at 0 and the last one ends at `rows`.
struct Sequences {
  int64_t count, steps, rows;
  const int64_t* offsets;  // [count + 1] or null

  SEQACCEL_HOST_DEVICE int64_t within(int64_t row) const { return row < 0 ? 0 : row < rows ? row : rows; }
  SEQACCEL_HOST_DEVICE int64_t begin(int64_t n) const { return n == 0 ? 0 : offsets ? within(offsets[n]) : n * steps; }
  SEQACCEL_HOST_DEVICE int64_t length(int64_t n) const {
    if (!offsets) return steps;
    const int64_t length = (n == count - 1 ? rows : within(offsets[n + 1])) - begin(n);
    return length < 0 ? 0 : length;
  }
};

// h_t = a_t * h_{t-1} + b_t on rows of `width` channels; reverse: h_t = a_t * h_{t+1} + b_t. Where an episode begins at
// t the state before it is zero: the steps t - 1 and t (reverse: t and t - 1) do not see each other. T: float, double,
// BFloat16, Float16, Complex<float>, Complex<double>.
template <typename T>
struct LinearScanForward {
  Sequences sequences;
  int64_t width;
  bool reverse;
  const bool* reset;  // [rows] or null; true: an episode begins
  const T* a;         // [rows, width]
  const T* b;         // [rows, width]
  const T* h_0;       // [count, width] or null (zero)
  T* h;               // [rows, width]
  T* h_last;          // [count, width]: the state after the last step
};

// grad_b_t = grad_h_t + conj(a_{t+1}) grad_b_{t+1}, with grad_h_last added to the last one; grad_a_t = grad_b_t
// conj(h_{t-1}); grad_h_0 = conj(a_1) grad_b_1.
template <typename T>
struct LinearScanBackward {
  Sequences sequences;
  int64_t width;
  bool reverse;
  const bool* reset;     // as above
  const T* grad_h;       // [rows, width]
  const T* grad_h_last;  // [count, width] or null (zero)
  const T* a;            // [rows, width]
  const T* h;            // [rows, width]
  const T* h_0;          // [count, width] or null
  T* grad_a;             // [rows, width]
  T* grad_b;             // [rows, width]
  T* grad_h_0;           // [count, width]
};

// Columns are batch x directions x hidden. Of a packed batch (`starts`), row n has the steps [starts[n], starts[n + 1])
// of the one row of the tensors; else it has all of them, and the tensors have `batch` rows.
struct ColumnShape {
  int64_t steps, batch, directions, hidden;
  const int64_t* starts;  // [batch + 1] or null; on a CPU ascending, in [0, steps]
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
  const bool* reset;     // [steps, batch] or null; true: an episode begins, from a zero state
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
