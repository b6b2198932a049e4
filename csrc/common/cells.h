// Recurrent cells: one time step of one unit, forward and backward, written once for every loop (CPU vectors of any
// instruction set, CUDA scalars).
//
// A cell is a struct of
//   kGates                 pre-activations of a unit at a step; pre[g] = W_ih[g] x + W_hh[g] h' + b[g]
//   forward<F>(pre, c_prev, gates, c, h)
//                          activated gates, new cell and new hidden state
//   backward<F>(gates, c_prev, c, grad_h, grad_c, grad_pre)
//                          from dL/dh and dL/dc (grad_c, in) of the new state: dL/dpre, and dL/dc' (grad_c, out)
// V is the value of a lane or a vector of them, and F gives V its functions: F::sigmoid and F::tanh.
#pragma once

#if defined(__CUDACC__)
#define SEQACCEL_CELL __host__ __device__ __forceinline__ static
#else
#define SEQACCEL_CELL static inline __attribute__((always_inline))
#endif

namespace seqaccel {

// torch.nn.LSTM: i, f, o = sigmoid, g = tanh; c = f c' + i g; h = o tanh(c). Gates in the order i, f, g, o.
struct LstmCell {
  static constexpr int kGates = 4;

  template <class F, typename V>
  SEQACCEL_CELL void forward(const V (&pre)[4], V c_prev, V (&gates)[4], V& c, V& h) {
    gates[0] = F::sigmoid(pre[0]);
    gates[1] = F::sigmoid(pre[1]);
    gates[2] = F::tanh(pre[2]);
    gates[3] = F::sigmoid(pre[3]);
    c = gates[1] * c_prev + gates[0] * gates[2];
    h = gates[3] * F::tanh(c);
  }

  template <class F, typename V>
  SEQACCEL_CELL void backward(const V (&gates)[4], V c_prev, V c, V grad_h, V& grad_c, V (&grad_pre)[4]) {
    const V i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const V tanh_c = F::tanh(c);
    const V grad = grad_c + grad_h * o * (1 - tanh_c * tanh_c);
    grad_pre[0] = grad * g * i * (1 - i);
    grad_pre[1] = grad * c_prev * f * (1 - f);
    grad_pre[2] = grad * i * (1 - g * g);
    grad_pre[3] = grad_h * tanh_c * o * (1 - o);
    grad_c = grad * f;
  }
};

}  // namespace seqaccel
