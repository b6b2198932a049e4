// Recurrent cells: one time step of one unit, forward and backward, written once for every loop (CPU vectors of any
// instruction set, CUDA scalars).
//
// A cell is a struct of traits (CellTraits says which, and their defaults) and
//   forward<F>(u)    from u.pre, u.weights, u.h_prev, u.c_prev: u.saved, u.c and u.h, the new state
//   backward<F>(u)   from u.saved, u.weights, u.h_prev, u.c_prev, u.h, and dL/dh in u.grad_h, dL/dc in u.grad_c:
//                    u.grad_pre, u.grad_weights, dL/dc' in u.grad_c, and in u.grad_h_prev what of dL/dh' does not pass
//                    through the recurrent weights
// u is a Unit<Cell, V>; V is the value of a lane or a vector of them, and F gives V its functions: F::sigmoid, F::tanh.
#pragma once

#if defined(__CUDACC__)
#define SEQACCEL_CELL __host__ __device__ __forceinline__ static
#else
#define SEQACCEL_CELL static inline __attribute__((always_inline))
#endif

namespace seqaccel {

struct CellTraits {
  // Rows of weight_ih, of weight_hh and of each bias for a unit. Row g of them makes one pre-activation,
  //   pre[g] = W_ih[g] x + b_ih[g] + W_hh[g] h' + b_hh[g],
  // but with kApart those of the last row are two: pre[kGates - 1] of the input, pre[kGates] of h'.
  // static constexpr int kGates;
  static constexpr bool kApart = false;
  static constexpr int kSaved = 0;          // values of a unit that a step keeps for the backward pass, besides c
  static constexpr bool kHasCell = false;   // has a cell state c
  static constexpr bool kDirect = false;    // backward sets u.grad_h_prev
  static constexpr bool kUsesPrev = false;  // reads u.h_prev
  static constexpr bool kUsesH = false;     // backward reads u.h
  static constexpr bool kZoneout = true;    // takes zoneout
  static constexpr bool kProjects = false;  // takes weight_hr
  static constexpr int kWeights = 0;        // weights of a unit that are not part of a product
  static constexpr int kTensors = 0;        // weight tensors besides weight_ih, weight_hh, bias_ih and bias_hh
};

// Pre-activations of a unit at a step.
template <class Cell>
constexpr int kPre = Cell::kGates + (Cell::kApart ? 1 : 0);

template <class Cell, typename V>
struct Unit {
  V pre[kPre<Cell>];
  V weights[Cell::kWeights + 1];  // (the last one only keeps the array from being empty)
  V saved[Cell::kSaved + 1];
  V h_prev, c_prev, h, c;
  V grad_h, grad_c, grad_h_prev;
  V grad_pre[kPre<Cell>];
  V grad_weights[Cell::kWeights + 1];
};

// h = tanh(pre).
struct RnnTanhCell : CellTraits {
  static constexpr const char* kName = "rnn_tanh";
  static constexpr int kGates = 1;
  static constexpr bool kUsesH = true, kZoneout = false;

  template <class F, typename V>
  SEQACCEL_CELL void forward(Unit<RnnTanhCell, V>& u) {
    u.h = F::tanh(u.pre[0]);
  }

  template <class F, typename V>
  SEQACCEL_CELL void backward(Unit<RnnTanhCell, V>& u) {
    u.grad_pre[0] = u.grad_h * (1 - u.h * u.h);
  }
};

// h = max(pre, 0).
struct RnnReluCell : CellTraits {
  static constexpr const char* kName = "rnn_relu";
  static constexpr int kGates = 1;
  static constexpr bool kUsesH = true, kZoneout = false;

  template <class F, typename V>
  SEQACCEL_CELL void forward(Unit<RnnReluCell, V>& u) {
    u.h = u.pre[0] < 0 ? V{} : u.pre[0];
  }

  template <class F, typename V>
  SEQACCEL_CELL void backward(Unit<RnnReluCell, V>& u) {
    u.grad_pre[0] = u.h <= 0 ? V{} : u.grad_h;
  }
};

// torch.nn.LSTM: i, f, o = sigmoid, g = tanh; c = f c' + i g; h = o tanh(c). Gates in the order i, f, g, o.
struct LstmCell : CellTraits {
  static constexpr const char* kName = "lstm";
  static constexpr int kGates = 4, kSaved = 4, kTensors = 1;
  static constexpr bool kHasCell = true;

  template <class F, typename V>
  SEQACCEL_CELL void forward(Unit<LstmCell, V>& u) {
    const V i = F::sigmoid(u.pre[0]), f = F::sigmoid(u.pre[1]), g = F::tanh(u.pre[2]), o = F::sigmoid(u.pre[3]);
    u.saved[0] = i;
    u.saved[1] = f;
    u.saved[2] = g;
    u.saved[3] = o;
    u.c = f * u.c_prev + i * g;
    u.h = o * F::tanh(u.c);
  }

  template <class F, typename V>
  SEQACCEL_CELL void backward(Unit<LstmCell, V>& u) {
    const V i = u.saved[0], f = u.saved[1], g = u.saved[2], o = u.saved[3];
    const V tanh_c = F::tanh(f * u.c_prev + i * g);
    const V grad = u.grad_c + u.grad_h * o * (1 - tanh_c * tanh_c);
    u.grad_pre[0] = grad * g * i * (1 - i);
    u.grad_pre[1] = grad * u.c_prev * f * (1 - f);
    u.grad_pre[2] = grad * i * (1 - g * g);
    u.grad_pre[3] = u.grad_h * tanh_c * o * (1 - o);
    u.grad_c = grad * f;
  }
};

// torch.nn.GRU: r, z = sigmoid; n = tanh(pre_nx + r pre_nh); h = (1 - z) n + z h'. Gates in the order r, z, n.
struct GruCell : CellTraits {
  static constexpr const char* kName = "gru";
  static constexpr int kGates = 3, kSaved = 4;
  static constexpr bool kApart = true, kDirect = true, kUsesPrev = true;

  template <class F, typename V>
  SEQACCEL_CELL void forward(Unit<GruCell, V>& u) {
    const V r = F::sigmoid(u.pre[0]), z = F::sigmoid(u.pre[1]), n = F::tanh(u.pre[2] + r * u.pre[3]);
    u.saved[0] = r;
    u.saved[1] = z;
    u.saved[2] = n;
    u.saved[3] = u.pre[3];
    u.h = n + z * (u.h_prev - n);
  }

  template <class F, typename V>
  SEQACCEL_CELL void backward(Unit<GruCell, V>& u) {
    const V r = u.saved[0], z = u.saved[1], n = u.saved[2];
    const V grad_n = u.grad_h * (1 - z) * (1 - n * n);
    u.grad_pre[0] = grad_n * u.saved[3] * r * (1 - r);
    u.grad_pre[1] = u.grad_h * (u.h_prev - n) * z * (1 - z);
    u.grad_pre[2] = grad_n;
    u.grad_pre[3] = grad_n * r;
    u.grad_h_prev = u.grad_h * z;
  }
};

}  // namespace seqaccel
