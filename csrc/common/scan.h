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

// What stands for the input in the highway connection of an SRU.
enum class Highway : int64_t {
  none,       // nothing
  input,      // scale_x * x
  projected,  // the fourth matrix of u
};

struct SruShape {
  int64_t steps, batch, directions, hidden;
  Highway highway;
  bool use_tanh;
};

template <typename T>
struct SruForward {
  SruShape shape;
  const T* u;            // [steps, batch, directions, hidden, 3 or 4]
  const T* x;            // [steps, batch, directions, hidden] or null
  const T* weight_c;     // [2, directions, hidden]: forget, reset
  const T* bias;         // [2, directions, hidden]
  const T* c_0;          // [batch, directions, hidden]
  const T* mask_c;       // [batch, directions, hidden] or null
  const bool* mask_pad;  // [steps, batch] or null; true is padding
  T scale_x;
  T* h;    // [steps, batch, directions, hidden]
  T* c_n;  // [batch, directions, hidden]
  T* c;    // [steps, batch, directions, hidden], or null: only the last state is kept, in c_n
};

template <typename T>
struct SruBackward {
  SruShape shape;
  const T* grad_h;    // [steps, batch, directions, hidden]
  const T* grad_c_n;  // [batch, directions, hidden] or null
  const T* u;
  const T* x;
  const T* weight_c;
  const T* bias;
  const T* c_0;
  const T* mask_c;
  const bool* mask_pad;
  T scale_x;
  const T* c;
  T* grad_u;         // as u
  T* grad_x;         // as x; null unless highway is input
  T* grad_weight_c;  // [2, directions, hidden]
  T* grad_bias;      // [2, directions, hidden]
  T* grad_c_0;       // [batch, directions, hidden]
  T* column_sums;    // [4, batch, directions, hidden]: scratch, the parameters' gradients before the sum over the batch
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
