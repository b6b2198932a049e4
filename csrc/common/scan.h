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

}  // namespace seqaccel::scan
