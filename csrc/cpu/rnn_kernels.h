// The recurrence of a layer, forward and backward, for every cell of cells.h.
//
// Step t of the forward pass, for a block of L = Lanes<T> hidden units:
//   pre [rows, G, L] = h' [rows, H] * panel [H, G, L]            all gates of the block's units lie side by side
//   gates, c, h = Cell::forward(pre + gates[t] + bias, c')       right behind the product, from L1
// Step t of the backward pass, for a block of 4 L units:
//   grad_h [rows, 4 L] = grad_gates[t+1] [rows, G*H] * panel [G*H, 4 L]
//   grad_gates[t], grad_c = Cell::backward(gates[t], c', c, grad_h + grad_output[t], grad_c)
// Panels of W_hh are packed once a call; with enough rows a thread, W_ih's stand before them in one panel of K = I + H,
// and the input's part of the pre-activations never leaves L1. Up to kDirectRows rows the product is bound by reading
// W_hh, and its own rows do as well: dot products along them forward, 4 vectors of each backward; nothing is packed.
//
// Threads. The batch is split first: its parts never wait for each other. Where there are too few rows to hide the
// reading of W_hh from L3 (kRowsPerThread), units are split too, and the threads of a part meet once a step at a
// barrier that yields after a bounded spin. On odd steps the blocks run backwards, so that those read last, still in
// L2, come first: 24.1 us a step instead of 26.6 for the backward product of 1 row, H = 512, on two Zen 4 cores with
// 1 MB of L2 each.
#include "common/cells.h"
#include "rnn.h"
#include "rnn_products.h"
#include "rnn_team.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr ptrdiff_t kChunk = 48;    // rows between a product and its update: 12 KB of L1
constexpr ptrdiff_t kBiasRows = 8;  // rows summed before they join the gradient of the bias
constexpr ptrdiff_t kDirectRows = 4;

template <typename T>
struct Functions {
  SEQACCEL_INLINE static Vec<T> sigmoid(Vec<T> x) { return sigmoid_vec<T>(x); }
  SEQACCEL_INLINE static Vec<T> tanh(Vec<T> x) { return tanh_vec<T>(x); }
};

template <typename T>
void row_product(const RowProduct<T>& p) {
  constexpr int L = Lanes<T>, kBlock = 4 * L;
  const ptrdiff_t blocks = panel_count(p.N, kBlock);
  const bool small = double(p.M) * double(p.N) * double(p.K) < 131072.0;
#pragma omp parallel for schedule(static) if (!small)
  for (ptrdiff_t block = 0; block < blocks; ++block) {
    alignas(64) T out[kDotRows * kBlock];
    const ptrdiff_t n = block * kBlock;
    const T* const weight = p.weight + n * p.K;
    for (ptrdiff_t m = 0; m < p.M; m += kDotRows) {
      const ptrdiff_t rows = min_of(p.M - m, kDotRows);
      T* const y = p.y + m * p.N + n;
      if (n + kBlock <= p.N) {
        dot_product<T, 4>(rows, p.x + m * p.K, p.K, weight, L * p.K, p.K, L, out);
        for (ptrdiff_t i = 0; i < rows; ++i) {
          for (int v = 0; v < 4; ++v) store(y + i * p.N + v * L, load(out + i * kBlock + v * L));
        }
        continue;
      }
      for (int v = 0; n + v * L < p.N; ++v) {
        const int units = int(min_of(L, p.N - n - v * L));
        dot_product<T, 1>(rows, p.x + m * p.K, p.K, weight + v * L * p.K, 0, p.K, units, out);
        for (ptrdiff_t i = 0; i < rows; ++i) store_some(y + i * p.N + v * L, load(out + i * L), units);
      }
    }
  }
}

// ---------------------------------------------------------------- forward

// State between the steps of a pass; rows are `stride` apart: whole vectors, and never a multiple of a page.
template <typename T>
struct ForwardState {
  T* h[2];  // [B, stride], of the step before and of this one
  T* c;     // [B, stride]
  T* bias;  // [G, stride]
  ptrdiff_t stride;
};

template <class Cell, typename T>
void forward_update(const RnnForward<T>& p, const ForwardState<T>& state, ptrdiff_t s, ptrdiff_t t, ptrdiff_t b0,
                    ptrdiff_t b1, ptrdiff_t u, const T* pre) {
  constexpr int G = Cell::kGates, L = Lanes<T>;
  const int units = int(min_of(L, p.hidden - u * L));
  const T* const h_prev = state.h[s & 1] + u * L;
  T* const h_next = state.h[(s + 1) & 1] + u * L;
  Vec<T> bias[G];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) bias[g] = load(state.bias + g * state.stride + u * L);
  for (ptrdiff_t b = b0; b < b1; ++b) {
    const ptrdiff_t row = t * p.batch + b;
    T* const gates_out = p.gates ? p.gates + row * G * p.hidden + u * L : nullptr;
    T* const output = p.output + row * p.hidden + u * L;
    T* const cells = p.cells ? p.cells + row * p.hidden + u * L : nullptr;
    T* const c = state.c + b * state.stride + u * L;
    if (p.lengths && p.first + t >= p.lengths[b]) {
      store(h_next + b * state.stride, load(h_prev + b * state.stride));
      store_some(output, Vec<T>{}, units);
      if (cells) {
        store_some(cells, Vec<T>{}, units);
        for (int g = 0; g < G; ++g) store_some(gates_out + g * p.hidden, Vec<T>{}, units);
      }
      continue;
    }
    Vec<T> sum[G], gates[G], c_new, h_new;
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      const Vec<T> rest = p.input ? bias[g] : load_some(gates_out + g * p.hidden, units) + bias[g];
      sum[g] = load(pre + ((b - b0) * G + g) * L) + rest;
    }
    Cell::template forward<Functions<T>>(sum, load(c), gates, c_new, h_new);
    store(c, c_new);
    store(h_next + b * state.stride, h_new);
    store_some(output, h_new, units);
    if (cells) {
      store_some(cells, c_new, units);
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) store_some(gates_out + g * p.hidden, gates[g], units);
    }
  }
}

// One past the last row of [b0, b1) that is still running at time t.
inline ptrdiff_t running_rows(const int64_t* lengths, ptrdiff_t t, ptrdiff_t b0, ptrdiff_t b1) {
  while (lengths && b1 > b0 && t >= lengths[b1 - 1]) --b1;
  return b1;
}

template <class Cell, typename T>
bool rnn_forward(const RnnForward<T>& p) {
  constexpr int G = Cell::kGates, L = Lanes<T>;
  const ptrdiff_t H = p.hidden, B = p.batch;
  const ptrdiff_t blocks = panel_count(H, L);
  const bool direct = H >= L && p.input == nullptr && (B <= kDirectRows || p.steps * B <= 64);
  const ptrdiff_t weights = G * H * H;
  const ptrdiff_t weight_bytes = weights * ptrdiff_t(sizeof(T));
  const ptrdiff_t inputs = p.input ? p.inputs : 0;
  const ptrdiff_t panel_size = (inputs + H) * G * L;
  const int threads = split_work(omp_get_max_threads(), p.steps, B, weights, weight_bytes, blocks).threads();

  ForwardState<T> state;
  state.stride = (blocks + 1) * L;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(direct ? 0 : blocks * panel_size);
  const size_t state_at = workspace.reserve<T>((3 * B + G) * state.stride);
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  if (!workspace.allocate()) return false;
  T* const panels = workspace.at<T>(panels_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.h[0] = workspace.at<T>(state_at);
  state.h[1] = state.h[0] + B * state.stride;
  state.c = state.h[1] + B * state.stride;
  state.bias = state.c + B * state.stride;
  for (int g = 0; g < G; ++g) {
    for (ptrdiff_t k = 0; k < blocks * L; ++k) {
      state.bias[g * state.stride + k] = p.bias && k < H ? p.bias[g * H + k] : T(0);
    }
  }

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_work(team, p.steps, B, weights, weight_bytes, blocks);
    const Share share = share_of(split, thread, B, blocks);
    for (ptrdiff_t u = thread; u < blocks && !direct; u += team) {
      T* const panel = panels + u * panel_size;
      pack_units<T, G>(panel, p.weight_ih, H, inputs, u);
      pack_units<T, G>(panel + inputs * G * L, p.weight, H, H, u);
    }
    for (ptrdiff_t u = share.u0; u < share.u1 && !share.idle; ++u) {
      const int units = int(min_of(L, H - u * L));
      for (ptrdiff_t b = share.b0; b < share.b1; ++b) {
        store(state.h[0] + b * state.stride + u * L, load_some(p.h_0 + b * H + u * L, units));
        store(state.c + b * state.stride + u * L, load_some(p.c_0 + b * H + u * L, units));
      }
    }
#pragma omp barrier
    if (!share.idle) {
      alignas(64) T pre[kChunk * G * L];
      for (ptrdiff_t s = 0; s < p.steps; ++s) {
        const ptrdiff_t t = p.reverse ? p.steps - 1 - s : s;
        const T* const h_prev = state.h[s & 1];
        for (ptrdiff_t i = share.u0; i < share.u1; ++i) {
          const ptrdiff_t u = s & 1 ? share.u0 + share.u1 - 1 - i : i;
          for (ptrdiff_t b = share.b0; b < share.b1; b += kChunk) {
            const ptrdiff_t end = min_of(b + kChunk, share.b1);
            const ptrdiff_t rows = running_rows(p.lengths, p.first + t, b, end) - b;
            if (direct) {
              dot_product<T, G>(rows, h_prev + b * state.stride, state.stride, p.weight + u * L * H, H * H, H,
                                int(min_of(L, H - u * L)), pre);
            } else {
              const T* const panel = panels + u * panel_size;
              if (p.input) {
                panel_product<T, G>(rows, p.input + (t * B + b) * inputs, inputs, panel, G * L, inputs, pre);
              }
              panel_product<T, G>(rows, h_prev + b * state.stride, state.stride, panel + inputs * G * L, G * L, H, pre,
                                  inputs > 0);
            }
            forward_update<Cell, T>(p, state, s, t, b, end, u, pre);
          }
        }
        wait_for_all(barriers[share.part], split.groups);
      }
      for (ptrdiff_t u = share.u0; u < share.u1; ++u) {
        const int units = int(min_of(L, H - u * L));
        for (ptrdiff_t b = share.b0; b < share.b1; ++b) {
          store_some(p.h_n + b * H + u * L, load(state.h[p.steps & 1] + b * state.stride + u * L), units);
          store_some(p.c_n + b * H + u * L, load(state.c + b * state.stride + u * L), units);
        }
      }
    }
  }
  return true;
}

// ---------------------------------------------------------------- backward

template <typename T>
struct BackwardState {
  T* grad_h;  // [B, stride]: of the state that a row has not reached yet; every row's before the first step
  T* grad_c;  // [B, stride]
  T* bias;    // [parts, 2, G, stride]: the sum and what rounding took from it
  ptrdiff_t stride;
};

// (*sum + *lost) += x, *lost being what rounding took (Knuth's two-sum).
template <typename T>
SEQACCEL_INLINE void add_compensated(T* sum, T* lost, Vec<T> x) {
  const Vec<T> old = load(sum);
  const Vec<T> next = old + x;
  const Vec<T> taken = next - old;
  store(lost, load(lost) + ((old - (next - taken)) + (x - taken)));
  store(sum, next);
}

// The steps of one iteration of the backward pass: t is undone now, `later` was undone before it (-1: none), and
// `earlier` comes after it (-1: none). t = -1: only the gradient of the initial state is left.
struct BackwardStep {
  ptrdiff_t t, later, earlier;
};

template <class Cell, typename T>
void backward_update(const RnnBackward<T>& p, const BackwardState<T>& state, const BackwardStep& step, ptrdiff_t b0,
                     ptrdiff_t b1, ptrdiff_t unit, const T* product, T* bias) {
  constexpr int G = Cell::kGates, L = Lanes<T>;
  const int units = int(min_of(L, p.hidden - unit));
  const ptrdiff_t H = p.hidden;
  Vec<T> sums[G] = {};
  const auto add_to_bias = [&] {
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      T* const sum = bias + g * state.stride + unit;
      add_compensated(sum, sum + G * state.stride, sums[g]);
      sums[g] = Vec<T>{};
    }
  };
  for (ptrdiff_t b = b0; b < b1; ++b) {
    const ptrdiff_t length = p.lengths ? p.lengths[b] : p.steps;
    T* const held = state.grad_h + b * state.stride + unit;
    T* const grad_c_at = state.grad_c + b * state.stride + unit;
    const bool reached = step.later >= 0 && step.later < length;
    Vec<T> grad_h = reached ? load(product + (b - b0) * kColumns * L) : load(held);
    Vec<T> grad_c = load(grad_c_at);
    if (step.t < 0) {
      store_some(p.grad_h_0 + b * H + unit, grad_h, units);
      store_some(p.grad_c_0 + b * H + unit, grad_c, units);
      continue;
    }
    const ptrdiff_t row = step.t * p.batch + b;
    T* const grad_gates = p.grad_gates + row * G * H + unit;
    if (step.t >= length) {
      store(held, grad_h);
      for (int g = 0; g < G; ++g) store_some(grad_gates + g * H, Vec<T>{}, units);
      continue;
    }
    if (p.grad_output) grad_h += load_some(p.grad_output + row * H + unit, units);
    const bool inner = step.earlier >= 0 && step.earlier < length;
    const T* const c_prev = inner ? p.cells + (step.earlier * p.batch + b) * H + unit : p.c_0 + b * H + unit;
    Vec<T> gates[G], grad_pre[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) gates[g] = load_some(p.gates + (row * G + g) * H + unit, units);
    Cell::template backward<Functions<T>>(gates, load_some(c_prev, units), load_some(p.cells + row * H + unit, units),
                                          grad_h, grad_c, grad_pre);
    store(grad_c_at, grad_c);
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) {
      store_some(grad_gates + g * H, grad_pre[g], units);
      sums[g] += grad_pre[g];
    }
    if ((b + 1 - b0) % kBiasRows == 0) add_to_bias();
  }
  add_to_bias();
}

template <class Cell, typename T>
bool rnn_backward(const RnnBackward<T>& p) {
  constexpr int G = Cell::kGates, L = Lanes<T>, kWidth = kColumns * L;
  const ptrdiff_t H = p.hidden, B = p.batch, K = G * H;
  const ptrdiff_t blocks = panel_count(H, kWidth), whole = H / kWidth;
  const bool direct = B <= kDirectRows || p.steps * B <= 64;
  const ptrdiff_t packed_from = direct ? whole : 0;  // blocks before it are read from the weight itself
  const ptrdiff_t weights = K * H;
  const ptrdiff_t weight_bytes = weights * ptrdiff_t(sizeof(T));
  const ptrdiff_t panel_size = K * kWidth;
  const int threads = split_work(omp_get_max_threads(), p.steps, B, weights, weight_bytes, blocks).threads();

  BackwardState<T> state;
  state.stride = blocks * kWidth + L;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>((blocks - packed_from) * panel_size);
  const size_t state_at = workspace.reserve<T>((2 * B + 2 * threads * G) * state.stride);
  const size_t barriers_at = workspace.reserve<Barrier>(threads);
  if (!workspace.allocate()) return false;
  T* const panels = workspace.at<T>(panels_at);
  Barrier* const barriers = workspace.at<Barrier>(barriers_at);
  memset(barriers, 0, sizeof(Barrier) * size_t(threads));
  state.grad_h = workspace.at<T>(state_at);
  state.grad_c = state.grad_h + B * state.stride;
  state.bias = state.grad_c + B * state.stride;
  memset(state.bias, 0, sizeof(T) * size_t(2 * threads * G * state.stride));
  int parts = 1;

#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), thread = omp_get_thread_num();
    const Split split = split_work(team, p.steps, B, weights, weight_bytes, blocks);
    const Share share = share_of(split, thread, B, blocks);
    if (thread == 0) parts = split.parts;
    for (ptrdiff_t j = packed_from + thread; j < blocks; j += team) {
      pack_columns<T>(panels + (j - packed_from) * panel_size, p.weight, K, H, j);
    }
    for (ptrdiff_t unit = share.u0 * kWidth; unit < share.u1 * kWidth && !share.idle; unit += L) {
      const int units = int(max_of(0, min_of(L, H - unit)));
      for (ptrdiff_t b = share.b0; b < share.b1; ++b) {
        store(state.grad_h + b * state.stride + unit,
              p.grad_h_n ? load_some(p.grad_h_n + b * H + unit, units) : Vec<T>{});
        store(state.grad_c + b * state.stride + unit,
              p.grad_c_n ? load_some(p.grad_c_n + b * H + unit, units) : Vec<T>{});
      }
    }
#pragma omp barrier
    if (!share.idle) {
      alignas(64) T product[kChunk * kWidth];
      T* const bias = state.bias + share.part * 2 * G * state.stride;
      for (ptrdiff_t s = p.steps - 1; s >= -1; --s) {
        const ptrdiff_t later = p.reverse ? p.steps - 2 - s : s + 1, earlier = p.reverse ? p.steps - s : s - 1;
        const BackwardStep step = {s < 0 ? -1 : (p.reverse ? p.steps - 1 - s : s), s + 1 < p.steps ? later : -1,
                                   s > 0 ? earlier : -1};
        for (ptrdiff_t i = share.u0; i < share.u1; ++i) {
          const ptrdiff_t j = s & 1 ? share.u0 + share.u1 - 1 - i : i;
          const T* const panel = j < packed_from ? p.weight + j * kWidth : panels + (j - packed_from) * panel_size;
          const ptrdiff_t panel_row = j < packed_from ? H : kWidth;
          for (ptrdiff_t b = share.b0; b < share.b1; b += kChunk) {
            const ptrdiff_t end = min_of(b + kChunk, share.b1);
            if (step.later >= 0) {
              const ptrdiff_t rows = running_rows(p.lengths, step.later, b, end) - b;
              panel_product<T, kColumns>(rows, p.grad_gates + (step.later * B + b) * K, K, panel, panel_row, K,
                                         product);
            }
            for (int v = 0; v < kColumns && (j * kColumns + v) * L < H; ++v) {
              backward_update<Cell, T>(p, state, step, b, end, (j * kColumns + v) * L, product + v * L, bias);
            }
          }
        }
        wait_for_all(barriers[share.part], split.groups);
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (ptrdiff_t k = 0; k < H; ++k) {
      T sum = T(0);
      for (int part = 0; part < parts; ++part) {
        const T* const at = state.bias + (part * 2 * G + g) * state.stride + k;
        sum += at[0] + at[G * state.stride];
      }
      p.grad_bias[g * H + k] = sum;
    }
  }
  return true;
}

extern const RnnKernels rnn_kernels;
const RnnKernels rnn_kernels = {
    rnn_forward<LstmCell, float>,
    rnn_forward<LstmCell, double>,
    rnn_backward<LstmCell, float>,
    rnn_backward<LstmCell, double>,
    row_product<float>,
    row_product<double>,
};

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
