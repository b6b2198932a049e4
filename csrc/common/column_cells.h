// Column cells: recurrences that are elementwise in the state, whose matrix product over all steps is done before. One
// time step of one column, forward and backward, written once for every loop: training and streams, on vectors of any
// instruction set, and on a GPU.
//
// A cell is a struct of traits (ColumnTraits says which, and their defaults) and
//   forward<F>(u)    from u.in, u.x, u.weight, u.mask, u.scale and u.prev, the state before: u.state and u.h
//   backward<F>(u)   from the same, u.state, dL/dh in u.grad_h and dL/dstate in u.grad_state: u.grad_in, u.grad_x,
//                    u.grad_weight, and dL/dprev in u.grad_state. It calculates the gates again
// u is a Column<Cell, V, S>; V is the value of a lane or a vector of them, S a scalar, and F gives V its functions:
// F::sigmoid, F::tanh. The loops add the biases to u.in; so a bias has the gradient of its input. Where the
// output is the state (kOutputIsState), neither u.h nor u.grad_h is the cell's.
#pragma once

#include "common/cell_list.h"

namespace seqaccel {

// What multiplies: nothing, a factor of a column for all steps, or one of each step.
enum class Mask { none, column, step };

struct ColumnTraits {
  // Inputs of a column: rows of the product's weight.
  // static constexpr int kInputs;
  static constexpr bool kInterleaved = false;  // the inputs of a column are adjacent, (..., H, kInputs); else they
                                               // are rows, (..., kInputs, H)
  static constexpr int kBiases = 0;            // biases of a column: of the inputs from kFirstBias on
  static constexpr int kFirstBias = 0;
  static constexpr int kWeights = 0;             // weights of a column that multiply its state
  static constexpr bool kReadsX = false;         // reads the layer's input, u.x
  static constexpr Mask kMask = Mask::none;      // u.mask, 1 where there is none
  static constexpr bool kScale = false;          // u.scale, a number, 1 where there is none
  static constexpr bool kOutputIsState = false;  // h is the state: nothing else is kept for backward
};

template <class Cell, typename V, typename S>
struct Column {
  V in[Cell::kInputs];
  V weight[Cell::kWeights + 1];  // (the last one only keeps the array from being empty)
  V x, mask, prev, state, h;
  S scale;
  V grad_h, grad_state, grad_x;
  V grad_in[Cell::kInputs];
  V grad_weight[Cell::kWeights + 1];
};

// What stands for the input in the highway connection of an SRU: nothing, scale * x, or the fourth input.
enum class Highway { none, input, projected };

// Lei et al. 2018: f, r = sigmoid(in + w c'); c = f c' + (1 - f) in_0; h = s + m r (g(c) - s), with s the highway, m
// the mask, and g the identity or tanh.
template <Highway kHighway, bool kTanh>
struct SruCell : ColumnTraits {
  static constexpr const char* kName = kTanh ? "sru_tanh" : "sru";
  static constexpr int kInputs = kHighway == Highway::projected ? 4 : 3;
  static constexpr bool kInterleaved = true;
  static constexpr int kBiases = 2, kFirstBias = 1, kWeights = 2;
  static constexpr bool kReadsX = kHighway == Highway::input, kScale = kReadsX;
  static constexpr Mask kMask = Mask::column;

  template <class U>
  SEQACCEL_CELL auto highway(const U& u) {
    if constexpr (kHighway == Highway::projected) {
      return u.in[3];
    } else if constexpr (kHighway == Highway::input) {
      return u.x * u.scale;
    } else {
      return decltype(u.x){};
    }
  }

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto forget = F::sigmoid(u.in[1] + u.weight[0] * u.prev);
    const auto reset = F::sigmoid(u.in[2] + u.weight[1] * u.prev);
    const auto skip = highway(u);
    u.state = u.in[0] + forget * (u.prev - u.in[0]);
    const auto activated = kTanh ? F::tanh(u.state) : u.state;
    u.h = skip + u.mask * reset * (activated - skip);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto forget = F::sigmoid(u.in[1] + u.weight[0] * u.prev);
    const auto reset = F::sigmoid(u.in[2] + u.weight[1] * u.prev);
    const auto skip = highway(u);
    const auto activated = kTanh ? F::tanh(u.state) : u.state;
    const auto through = u.mask * u.grad_h * reset;
    const auto grad = u.grad_state + (kTanh ? through * (1 - activated * activated) : through);
    const auto closed = 1 - forget;
    u.grad_in[0] = grad * closed;
    u.grad_in[1] = grad * (u.prev - u.in[0]) * (forget * closed);
    u.grad_in[2] = through * (activated - skip) * (1 - reset);
    if constexpr (kHighway == Highway::projected) u.grad_in[3] = u.grad_h - through;
    if constexpr (kHighway == Highway::input) u.grad_x = (u.grad_h - through) * u.scale;
    u.grad_weight[0] = u.grad_in[1] * u.prev;
    u.grad_weight[1] = u.grad_in[2] * u.prev;
    u.grad_state = grad * forget + u.grad_in[1] * u.weight[0] + u.grad_in[2] * u.weight[1];
  }
};

// The pooling of a QRNN (Bradbury et al. 2017), fo or f: z = tanh, f, o = sigmoid; k = scale m (1 - f), with m and
// scale those of zoneout; c = c' + k (z - c'); h = o c, or c. Inputs: z, f, o.
template <bool kOutputGate>
struct PoolCell : ColumnTraits {
  static constexpr const char* kName = kOutputGate ? "fo_pool" : "f_pool";
  static constexpr int kInputs = kOutputGate ? 3 : 2, kBiases = kInputs;
  static constexpr Mask kMask = Mask::step;
  static constexpr bool kScale = true, kOutputIsState = !kOutputGate;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto z = F::tanh(u.in[0]);
    u.state = u.prev + u.mask * u.scale * (1 - F::sigmoid(u.in[1])) * (z - u.prev);
    if constexpr (kOutputGate) u.h = F::sigmoid(u.in[2]) * u.state;
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto z = F::tanh(u.in[0]), f = F::sigmoid(u.in[1]);
    const auto factor = u.mask * u.scale, keep = factor * (1 - f);
    if constexpr (kOutputGate) {
      const auto o = F::sigmoid(u.in[2]);
      u.grad_state = u.grad_state + u.grad_h * o;
      u.grad_in[2] = u.grad_h * u.state * o * (1 - o);
    }
    u.grad_in[0] = u.grad_state * keep * (1 - z * z);
    u.grad_in[1] = u.grad_state * factor * (u.prev - z) * f * (1 - f);
    u.grad_state = u.grad_state * (1 - keep);
  }
};

// Li et al. 2018: h = g(in + w h'), g relu or tanh.
template <bool kTanh>
struct IndRnnCell : ColumnTraits {
  static constexpr const char* kName = kTanh ? "indrnn_tanh" : "indrnn_relu";
  static constexpr int kInputs = 1, kBiases = 1, kWeights = 1;
  static constexpr bool kOutputIsState = true;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto pre = u.in[0] + u.weight[0] * u.prev;
    if constexpr (kTanh) {
      u.state = F::tanh(pre);
    } else {
      u.state = pre < 0 ? decltype(u.state){} : pre;
    }
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    if constexpr (kTanh) {
      u.grad_in[0] = u.grad_state * (1 - u.state * u.state);
    } else {
      u.grad_in[0] = u.state <= 0 ? decltype(u.state){} : u.grad_state;
    }
    u.grad_weight[0] = u.grad_in[0] * u.prev;
    u.grad_state = u.grad_in[0] * u.weight[0];
  }
};

// The candidate of Feng et al. 2024: v, or g(v) = v + 1/2 for v >= 0 and sigmoid(v) below; and its slope, from g.
template <bool kG, class F, class V>
SEQACCEL_CELL V candidate(V v) {
  if constexpr (kG) return v < 0 ? F::sigmoid(v) : v + 0.5f;
  return v;
}

template <bool kG, class V>
SEQACCEL_CELL V candidate_slope(V v, V g) {
  if constexpr (kG) return v < 0 ? g * (1 - g) : V{} + 1;
  return V{} + 1;
}

// Feng et al. 2024: z = sigmoid; h = (1 - z) h' + z g. Inputs: z, g.
template <bool kG>
struct MinGruCell : ColumnTraits {
  static constexpr const char* kName = kG ? "mingru_g" : "mingru";
  static constexpr int kInputs = 2, kBiases = 2;
  static constexpr bool kOutputIsState = true;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    u.state = u.prev + F::sigmoid(u.in[0]) * (candidate<kG, F>(u.in[1]) - u.prev);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto z = F::sigmoid(u.in[0]), g = candidate<kG, F>(u.in[1]);
    u.grad_in[0] = u.grad_state * (g - u.prev) * z * (1 - z);
    u.grad_in[1] = u.grad_state * z * candidate_slope<kG>(u.in[1], g);
    u.grad_state = u.grad_state * (1 - z);
  }
};

// Feng et al. 2024: f, i = sigmoid; i' = i / (f + i); h = (1 - i') h' + i' g. Inputs: f, i, g.
template <bool kG>
struct MinLstmCell : ColumnTraits {
  static constexpr const char* kName = kG ? "minlstm_g" : "minlstm";
  static constexpr int kInputs = 3, kBiases = 3;
  static constexpr bool kOutputIsState = true;

  // Where both gates vanish, i / (f + i) is sigmoid(in_1 - in_0) to rounding.
  template <class F, class V>
  SEQACCEL_CELL V share(V in_f, V in_i, V f, V i) {
    const auto larger = in_f > in_i ? in_f : in_i;
    return larger < -60 ? F::sigmoid(in_i - in_f) : i / (f + i);
  }

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto i = share<F>(u.in[0], u.in[1], F::sigmoid(u.in[0]), F::sigmoid(u.in[1]));
    u.state = u.prev + i * (candidate<kG, F>(u.in[2]) - u.prev);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto gate_f = F::sigmoid(u.in[0]), gate_i = F::sigmoid(u.in[1]);
    const auto i = share<F>(u.in[0], u.in[1], gate_f, gate_i), g = candidate<kG, F>(u.in[2]);
    const auto grad = u.grad_state * (g - u.prev) * i * (1 - i);
    u.grad_in[0] = -grad * (1 - gate_f);
    u.grad_in[1] = grad * (1 - gate_i);
    u.grad_in[2] = u.grad_state * i * candidate_slope<kG>(u.in[2], g);
    u.grad_state = u.grad_state * (1 - i);
  }
};

// Every cell: the loops and the operators' checks are made for these. Cells of one name differ in kInputs or kReadsX.
// clang-format off: a line each
using ColumnCells = CellList<
    SruCell<Highway::none, false>,
    SruCell<Highway::input, false>,
    SruCell<Highway::projected, false>,
    SruCell<Highway::none, true>,
    SruCell<Highway::input, true>,
    SruCell<Highway::projected, true>,
    PoolCell<true>,
    PoolCell<false>,
    IndRnnCell<false>,
    IndRnnCell<true>,
    MinGruCell<false>,
    MinGruCell<true>,
    MinLstmCell<false>,
    MinLstmCell<true>>;
// clang-format on

}  // namespace seqaccel
