// Recurrent cells: one time step of one unit, forward and backward, written once for every loop: training and streams,
// on vectors of any instruction set. It compiles as CUDA too, where no loop uses it yet.
//
// A cell is a struct of traits (CellTraits says which, and their defaults) and
//   forward<F>(u)    from u.pre, u.weights, u.h_prev, u.c_prev: u.saved, u.c and u.h, the new state
//   backward<F>(u)   from u.saved, u.weights, u.h_prev, u.c_prev, and dL/dh in u.grad_h, dL/dc in u.grad_c: u.grad_pre,
//                    u.grad_weights, dL/dc' in u.grad_c, and in u.grad_h_prev what of dL/dh' does not pass through the
//                    recurrent weights. With kUsesH it is given u.h; with kProjects it calculates it
// u is a Unit<Cell, V>; V is the value of a lane or a vector of them, and F gives V its functions: F::sigmoid, F::tanh.
//
// A cell of two products a step (kFirst) multiplies h' first; what first<F>(u) makes of that, u.source, is what the
// main product multiplies. Backward, first_backward<F>(u) follows backward<F>(u) with dL/dsource in u.grad_source.
//
// A cell with layer norm (kNorm) has u.pre already normalised, scaled and added up. Where it normalises c too (kNormC),
// forward gives u.c only; finish<F>(u) makes u.h of u.c, normalised and scaled. finish_backward<F>(u) takes that u.c
// and u.grad_h and gives dL/du.c in u.grad_c, and the part of u.grad_pre that does not pass through c; backward follows
// with dL/dc in u.grad_c and gives the rest.
#pragma once

#include "common/cell_list.h"

namespace seqaccel {

struct CellTraits {
  // Rows of weight_ih, of weight_hh and of each bias for a unit. Row g of them makes one pre-activation,
  //   pre[g] = W_ih[g] x + b_ih[g] + W_hh[g] h' + b_hh[g],
  // but with kSeparate those of the last row are two: pre[kGates - 1] of the input, pre[kGates] of h'.
  // static constexpr int kGates;
  static constexpr bool kSeparate = false;
  static constexpr int kSaved = 0;          // values per unit that a step keeps for the backward pass, besides c
  static constexpr bool kHasCell = false;   // has a cell state c
  static constexpr bool kConstant = false;  // c holds factors that neither a step nor a reset changes
  static constexpr bool kDirect = false;    // backward sets u.grad_h_prev
  static constexpr bool kUsesPrev = false;  // reads u.h_prev
  static constexpr bool kUsesH = false;     // backward reads u.h
  static constexpr bool kZoneout = true;    // takes zoneout
  static constexpr bool kProjects = false;  // takes weight_hr
  static constexpr bool kGiven = false;     // weight_ih may be missing: the input is W_ih x itself
  // The weights per unit that are not part of a product, and how many of them each weight tensor holds.
  static constexpr int kWeights = 0;
  static constexpr int kWeightTensors[4] = {};
  // Two products. The first has kFirst rows per unit and gives pre[kFirstPre ...]. They are the first rows of
  // weight_hh, or with kExtra those of weight_mh; then weight_mx gives one more pre-activation of the input. The main
  // product has the other rows of weight_hh and gives pre[kMainPre ...]. The function first reads pre[kFirstBegin ...
  // kFirstEnd) and sets the same elements of saved; first_backward sets grad_pre[kFirstGrad ... kFirstGradEnd).
  static constexpr int kFirst = 0, kFirstPre = 0, kMainPre = 0;
  static constexpr int kFirstBegin = 0, kFirstEnd = 0, kFirstGrad = 0, kFirstGradEnd = 0;
  static constexpr bool kExtra = false;
  // Layer norm: of both products (kNorm), of c on its way to h (kNormC), and of the c that the next step reads
  // (kNormState). The weights of units begin with the scales of the input's products and of the recurrent ones, kGates
  // each, and end with scale and shift of c.
  static constexpr bool kNorm = false, kNormC = false, kNormState = false;
};

// Per unit and step: the pre-activations, those of them that depend on the input, and the rows of the main product.
template <class Cell>
constexpr int kPre = Cell::kGates + (Cell::kSeparate ? 1 : 0) + (Cell::kExtra ? 2 : 0);
template <class Cell>
constexpr int kInputs = Cell::kGates + (Cell::kExtra ? 1 : 0);
template <class Cell>
constexpr int kMain = Cell::kGates - (Cell::kExtra ? 0 : Cell::kFirst);

template <class Cell, typename V>
struct Unit {
  V pre[kPre<Cell>];
  V weights[Cell::kWeights + 1];  // (the last one only keeps the array from being empty)
  V saved[Cell::kSaved + 1];
  V h_prev, c_prev, h, c;
  V source, grad_source;
  V grad_h, grad_c, grad_h_prev;
  V grad_pre[kPre<Cell>];
  V grad_weights[Cell::kWeights + 1];
};

// h = tanh(pre).
struct RnnTanhCell : CellTraits {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1;
  static constexpr bool kUsesH = true, kZoneout = false;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    u.h = F::tanh(u.pre[0]);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    u.grad_pre[0] = u.grad_h * (1 - u.h * u.h);
  }
};

// h = max(pre, 0).
struct RnnReluCell : CellTraits {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1;
  static constexpr bool kUsesH = true, kZoneout = false;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    u.h = u.pre[0] < 0 ? decltype(u.h){} : u.pre[0];
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    u.grad_pre[0] = u.h <= 0 ? decltype(u.h){} : u.grad_h;
  }
};

// torch.nn.LSTM: i, f, o = sigmoid, g = tanh; c = f c' + i g; h = o tanh(c). Gates in the order i, f, g, o.
struct LstmCell : CellTraits {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kSaved = 4;
  static constexpr bool kHasCell = true, kProjects = true;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto i = F::sigmoid(u.pre[0]), f = F::sigmoid(u.pre[1]), g = F::tanh(u.pre[2]), o = F::sigmoid(u.pre[3]);
    u.saved[0] = i;
    u.saved[1] = f;
    u.saved[2] = g;
    u.saved[3] = o;
    u.c = f * u.c_prev + i * g;
    u.h = o * F::tanh(u.c);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto i = u.saved[0], f = u.saved[1], g = u.saved[2], o = u.saved[3];
    const auto tanh_c = F::tanh(f * u.c_prev + i * g);
    const auto grad = u.grad_c + u.grad_h * o * (1 - tanh_c * tanh_c);
    u.h = o * tanh_c;
    u.grad_pre[0] = grad * g * i * (1 - i);
    u.grad_pre[1] = grad * u.c_prev * f * (1 - f);
    u.grad_pre[2] = grad * i * (1 - g * g);
    u.grad_pre[3] = u.grad_h * tanh_c * o * (1 - o);
    u.grad_c = grad * f;
  }
};

// The LSTM whose gates see the cell: p_i c' in i, p_f c' in f, p_o c in o. u.weights in the order i, f, o.
struct PeepholeLstmCell : LstmCell {
  static constexpr const char* kName = "peephole_lstm";
  static constexpr int kWeights = 3;
  static constexpr int kWeightTensors[4] = {3};

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto i = F::sigmoid(u.pre[0] + u.weights[0] * u.c_prev), f = F::sigmoid(u.pre[1] + u.weights[1] * u.c_prev);
    const auto g = F::tanh(u.pre[2]);
    u.c = f * u.c_prev + i * g;
    const auto o = F::sigmoid(u.pre[3] + u.weights[2] * u.c);
    u.saved[0] = i;
    u.saved[1] = f;
    u.saved[2] = g;
    u.saved[3] = o;
    u.h = o * F::tanh(u.c);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto i = u.saved[0], f = u.saved[1], g = u.saved[2], o = u.saved[3];
    const auto c = f * u.c_prev + i * g, tanh_c = F::tanh(c);
    u.h = o * tanh_c;
    u.grad_pre[3] = u.grad_h * tanh_c * o * (1 - o);
    const auto grad = u.grad_c + u.grad_h * o * (1 - tanh_c * tanh_c) + u.grad_pre[3] * u.weights[2];
    u.grad_pre[0] = grad * g * i * (1 - i);
    u.grad_pre[1] = grad * u.c_prev * f * (1 - f);
    u.grad_pre[2] = grad * i * (1 - g * g);
    u.grad_c = grad * f + u.grad_pre[0] * u.weights[0] + u.grad_pre[1] * u.weights[1];
    u.grad_weights[0] = u.grad_pre[0] * u.c_prev;
    u.grad_weights[1] = u.grad_pre[1] * u.c_prev;
    u.grad_weights[2] = u.grad_pre[3] * c;
  }
};

// m = (W_mx x) (W_mh h') takes the place of h' in the gates of an LSTM. Saved: i, f, g, o, W_mx x, W_mh h'.
struct MultiplicativeLstmCell : LstmCell {
  static constexpr const char* kName = "multiplicative_lstm";
  static constexpr int kSaved = 6;
  static constexpr bool kProjects = false;
  static constexpr int kFirst = 1, kFirstPre = 5, kFirstBegin = 4, kFirstEnd = 6, kFirstGrad = 4, kFirstGradEnd = 6;
  static constexpr bool kExtra = true;

  template <class F, class U>
  SEQACCEL_CELL void first(U& u) {
    u.saved[4] = u.pre[4];
    u.saved[5] = u.pre[5];
    u.source = u.pre[4] * u.pre[5];
  }

  template <class F, class U>
  SEQACCEL_CELL void first_backward(U& u) {
    u.source = u.saved[4] * u.saved[5];
    u.grad_pre[4] = u.grad_source * u.saved[5];
    u.grad_pre[5] = u.grad_source * u.saved[4];
  }
};

// torch.nn.GRU: r, z = sigmoid; n = tanh(pre_nx + r pre_nh); h = (1 - z) n + z h'. Gates in the order r, z, n.
// Saved: r, z, n, pre_nh.
struct GruCell : CellTraits {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kSaved = 4;
  static constexpr bool kSeparate = true, kDirect = true, kUsesPrev = true;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto r = F::sigmoid(u.pre[0]), z = F::sigmoid(u.pre[1]), n = F::tanh(u.pre[2] + r * u.pre[3]);
    u.saved[0] = r;
    u.saved[1] = z;
    u.saved[2] = n;
    u.saved[3] = u.pre[3];
    u.h = n + z * (u.h_prev - n);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto r = u.saved[0], z = u.saved[1], n = u.saved[2];
    const auto grad_n = u.grad_h * (1 - z) * (1 - n * n);
    u.grad_pre[0] = grad_n * u.saved[3] * r * (1 - r);
    u.grad_pre[1] = u.grad_h * (u.h_prev - n) * z * (1 - z);
    u.grad_pre[2] = grad_n;
    u.grad_pre[3] = grad_n * r;
    u.grad_h_prev = u.grad_h * z;
  }
};

// The GRU of 2014: the reset gate comes before the product, n = tanh(pre_n) with r h' in the place of h'.
struct GruResetBeforeCell : CellTraits {
  static constexpr const char* kName = "gru_reset_before";
  static constexpr int kGates = 3, kSaved = 3;
  static constexpr bool kDirect = true, kUsesPrev = true;
  static constexpr int kFirst = 2, kMainPre = 2, kFirstEnd = 2, kFirstGradEnd = 1;

  template <class F, class U>
  SEQACCEL_CELL void first(U& u) {
    u.saved[0] = F::sigmoid(u.pre[0]);
    u.saved[1] = F::sigmoid(u.pre[1]);
    u.source = u.saved[0] * u.h_prev;
  }

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    u.saved[2] = F::tanh(u.pre[2]);
    u.h = u.saved[2] + u.saved[1] * (u.h_prev - u.saved[2]);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto z = u.saved[1], n = u.saved[2];
    u.grad_pre[1] = u.grad_h * (u.h_prev - n) * z * (1 - z);
    u.grad_pre[2] = u.grad_h * (1 - z) * (1 - n * n);
    u.grad_h_prev = u.grad_h * z;
  }

  template <class F, class U>
  SEQACCEL_CELL void first_backward(U& u) {
    const auto r = u.saved[0];
    u.source = r * u.h_prev;
    u.grad_pre[0] = u.grad_source * u.h_prev * r * (1 - r);
    u.grad_h_prev = u.grad_source * r;
  }
};

// The LSTM of normalised products: u.pre = gamma_1 LN(W_ih x) + gamma_2 LN(W_hh h') + b; h = o tanh(LN(c)). u.weights:
// gamma_1 and gamma_2 of i, f, g, o, gamma and beta of c.
struct LayerNormLstmCell : CellTraits {
  static constexpr const char* kName = "layer_norm_lstm";
  static constexpr int kGates = 4, kSaved = 4, kWeights = 10;
  static constexpr int kWeightTensors[4] = {4, 4, 1, 1};
  static constexpr bool kHasCell = true, kNorm = true, kNormC = true;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    u.saved[0] = F::sigmoid(u.pre[0]);
    u.saved[1] = F::sigmoid(u.pre[1]);
    u.saved[2] = F::tanh(u.pre[2]);
    u.saved[3] = F::sigmoid(u.pre[3]);
    u.c = u.saved[1] * u.c_prev + u.saved[0] * u.saved[2];
  }

  template <class F, class U>
  SEQACCEL_CELL void finish(U& u) {
    u.h = u.saved[3] * F::tanh(u.c);
  }

  template <class F, class U>
  SEQACCEL_CELL void finish_backward(U& u) {
    const auto o = u.saved[3], tanh_c = F::tanh(u.c);
    u.grad_pre[3] = u.grad_h * tanh_c * o * (1 - o);
    u.grad_c = u.grad_h * o * (1 - tanh_c * tanh_c);
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto i = u.saved[0], f = u.saved[1], g = u.saved[2];
    u.grad_pre[0] = u.grad_c * g * i * (1 - i);
    u.grad_pre[1] = u.grad_c * u.c_prev * f * (1 - f);
    u.grad_pre[2] = u.grad_c * i * (1 - g * g);
    u.grad_c = u.grad_c * f;
  }
};

// The same with c = LN(f c' + i g) itself normalised.
struct LayerNormLstmNormalizedCell : LayerNormLstmCell {
  static constexpr const char* kName = "layer_norm_lstm_normalized_cell";
  static constexpr bool kNormState = true;
};

// The GRU of normalised products, u.pre = gamma LN(.) + b for each: r, z = sigmoid(pre_x + pre_h). u.weights: gamma_1
// and gamma_2 of r, z, n.
struct LayerNormGruCell : GruCell {
  static constexpr const char* kName = "layer_norm_gru";
  static constexpr int kWeights = 6;
  static constexpr int kWeightTensors[4] = {3, 3};
  static constexpr bool kNorm = true;
};

// The light GRU of Ravanelli et al.: z = sigmoid(pre_z), h = z h' + (1 - z) phi(pre_a). Gates in the order a, z. The
// masked cell multiplies phi by factors that stay the same at every step: c, which no step changes.
template <bool kRelu, bool kMasked>
struct LiGruCell : CellTraits {
  static constexpr const char* kName =
      kRelu ? (kMasked ? "ligru_relu_masked" : "ligru_relu") : (kMasked ? "ligru_tanh_masked" : "ligru_tanh");
  static constexpr int kGates = 2, kSaved = 2;
  static constexpr bool kHasCell = kMasked, kConstant = kMasked, kDirect = true, kUsesPrev = true, kGiven = true;

  template <class F, class U>
  SEQACCEL_CELL void forward(U& u) {
    const auto zero = decltype(u.h){};
    const auto z = F::sigmoid(u.pre[1]);
    if constexpr (kRelu) {
      u.saved[0] = u.pre[0] < 0 ? zero : u.pre[0];
    } else {
      u.saved[0] = F::tanh(u.pre[0]);
    }
    u.saved[1] = z;
    auto n = u.saved[0];
    if constexpr (kMasked) n = n * u.c_prev;
    u.c = u.c_prev;
    u.h = z * u.h_prev + (1 - z) * n;  // not n + z (h' - n): n may be infinite
  }

  template <class F, class U>
  SEQACCEL_CELL void backward(U& u) {
    const auto zero = decltype(u.h){};
    const auto phi = u.saved[0], z = u.saved[1];
    auto n = phi, grad = u.grad_h * (1 - z);
    if constexpr (kMasked) {
      n = n * u.c_prev;
      u.grad_c = u.grad_c + grad * phi;
      grad = grad * u.c_prev;
    }
    if constexpr (kRelu) {
      u.grad_pre[0] = phi <= 0 ? zero : grad;
    } else {
      u.grad_pre[0] = grad * (1 - phi * phi);
    }
    u.grad_pre[1] = u.grad_h * (u.h_prev - n) * z * (1 - z);
    u.grad_h_prev = u.grad_h * z;
  }
};

// All cells. The loops, the operators' checks and the sessions' layers are compiled for these.
// clang-format off: a line each
using ProductCells = CellList<
    RnnTanhCell,
    RnnReluCell,
    LstmCell,
    GruCell,
    GruResetBeforeCell,
    PeepholeLstmCell,
    LayerNormLstmCell,
    LayerNormLstmNormalizedCell,
    LayerNormGruCell,
    MultiplicativeLstmCell,
    LiGruCell<true, false>,
    LiGruCell<true, true>,
    LiGruCell<false, false>,
    LiGruCell<false, true>>;
// clang-format on

// The shape of a weight, a letter per dimension: G (kGates * H), H, I (features of the input), P (of h), or a digit.
struct WeightShape {
  char rows, columns;  // columns 0: a vector
  // Whether it is part of a product. The other weights hold values of units.
  constexpr bool multiplies() const { return columns != 0 && !(rows >= '0' && rows <= '9'); }
};

// Shapes of a layer's weights in the operators' order: weight_ih, weight_hh, bias_ih, bias_hh, and the cell's own.
struct WeightShapes {
  int count = 4;
  WeightShape shapes[10] = {{'G', 'I'}, {'G', 'P'}, {'G', 0}, {'G', 0}};
  bool given = false;  // kGiven
  constexpr void add(char rows, char columns) { shapes[count++] = {rows, columns}; }
  // Whether it may be missing: biases, the projection, and weight_ih.
  constexpr bool optional(int i) const { return (given && i == 0) || i == 2 || i == 3 || shapes[i].rows == 'P'; }
};

template <class Cell>
constexpr WeightShapes weight_shapes() {
  WeightShapes found;
  found.given = Cell::kGiven;
  if (Cell::kProjects) found.add('P', 'H');
  if (Cell::kExtra) found.add('H', 'I');
  if (Cell::kExtra) found.add('H', 'H');
  for (const int values : Cell::kWeightTensors) {
    if (values == 0) break;
    if (Cell::kNorm) {
      found.add(values == Cell::kGates ? 'G' : 'H', 0);
    } else {
      found.add(char('0' + values), 'H');
    }
  }
  return found;
}

}  // namespace seqaccel
