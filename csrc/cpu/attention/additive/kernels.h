// Weights of additive attention, p_ij = softmax_j(e_ij) with e_ij = sum_h w_h tanh(q_ih + k_jh), and their gradients.
//
// Nearly all time goes into B * Tq * Tk * H values of tanh (3.4 ns for 16 with AVX-512), once forward and once more
// backward: saving them would take H times the memory of the weights.
//
// Forward: lanes hold neighbouring h. A tile is four pairs of query and key, which are four independent chains: one
// key for four queries, or four keys for one query (what is left over, and decoding step by step).
//
// Backward: with s_ij = p_ij (grad p_ij - sum_j p_ij grad p_ij) and t = tanh(q_ih + k_jh),
//   grad q_ih = w_h sum_j s_ij (1 - t^2), grad k_jh = w_h sum_i s_ij (1 - t^2), grad w_h = sum_ij s_ij t.
// A task is one vector of h of one batch entry, or with few queries four: every sum stays within it, so that there are
// neither atomics nor partial sums but for grad w, and the number of threads changes no bit.
#include "cpu/attention/additive/scores.h"

namespace seqaccel::SEQACCEL_ISA::attention::additive {

constexpr int64_t kQueries = 4;       // of a tile
constexpr int64_t kVectors = 4;       // of h in a task of the backward pass with fewer queries
constexpr int64_t kKeyChunk = 64;     // keys of a task: 128 KB with H = 512, which the second-level cache keeps
constexpr int64_t kSerial = 1 << 14;  // values of tanh that are not worth a second thread

template <typename T>
void forward(const Additive<T>& p) {
  const int64_t chunks = (p.Tk + kKeyChunk - 1) / kKeyChunk, tiles = (p.Tq + kQueries - 1) / kQueries;
#pragma omp parallel if (p.B * p.Tq * p.Tk * p.H > kSerial)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.B * chunks * tiles; ++task) {
      const int64_t b = task / tiles / chunks, first = task / tiles % chunks * kKeyChunk, i = task % tiles * kQueries;
      const int64_t end = min_of(p.Tk, first + kKeyChunk);
      if (i + kQueries <= p.Tq) {
        for (int64_t j = first; j < end; ++j) score_tile<T, kQueries, 1>(p, b, i, j);
        continue;
      }
      for (int64_t row = i; row < p.Tq; ++row) {
        int64_t j = first;
        for (; j + 4 <= end; j += 4) score_tile<T, 1, 4>(p, b, row, j);
        for (; j < end; ++j) score_tile<T, 1, 1>(p, b, row, j);
      }
    }
#pragma omp for
    for (int64_t row = 0; row < p.B * p.Tq; ++row) {
      T* const at = p.attention + row * p.Tk;
      bool any = p.mask == nullptr;
      const bool* seen = p.mask + (p.mask_rows == 1 ? row / p.Tq : row) * p.Tk;
      for (int64_t j = 0; !any && j < p.Tk; ++j) any = seen[j];
      if (any) {
        softmax_row(at, p.Tk);
      } else {
        memset(at, 0, size_t(p.Tk) * sizeof(T));
      }
    }
  }
}

// Q queries from i on, and all keys, of V vectors of h. The first queries write grad k, the others add to it.
template <typename T, int Q, int V>
SEQACCEL_INLINE void backward_tile(const AdditiveBackward<T>& p, int64_t b, int64_t i, int64_t h, int lanes) {
  constexpr int L = Lanes<T>;
  const T* s = p.grad_logits + (b * p.Tq + i) * p.Tk;
  const int64_t query = (b * p.Tq + i) * p.H + h;
  Vec<T> w[V], q[V][Q], grad_w[V] = {}, grad_q[V][Q] = {};
  for (int v = 0; v < V; ++v) {
    w[v] = load_some(p.weight + h + v * L, lanes);
    for (int n = 0; n < Q; ++n) q[v][n] = load_some(p.query + query + n * p.H + v * L, lanes);
  }
  for (int64_t j = 0; j < p.Tk; ++j) {
    bool any = false;
    for (int n = 0; n < Q; ++n) any = any || !(s[n * p.Tk + j] == T(0));
    if (!any && i > 0) continue;
    for (int v = 0; v < V; ++v) {
      const int64_t at = (b * p.Tk + j) * p.H + h + v * L;
      Vec<T> slopes = {};
      if (any) {
        const Vec<T> k = load_some(p.key + at, lanes);
        for (int n = 0; n < Q; ++n) {
          const Vec<T> t = tanh_vec<T>(q[v][n] + k), scaled = broadcast(s[n * p.Tk + j]), st = scaled * t;
          const Vec<T> slope = scaled - st * t;
          grad_q[v][n] += slope;
          slopes += slope;
          grad_w[v] += st;
        }
      }
      slopes *= w[v];
      store_some(p.grad_key + at, i > 0 ? load_some(p.grad_key + at, lanes) + slopes : slopes, lanes);
    }
  }
  for (int v = 0; v < V; ++v) {
    for (int n = 0; n < Q; ++n) store_some(p.grad_query + query + n * p.H + v * L, grad_q[v][n] * w[v], lanes);
    T* const sum = p.grad_weights + b * p.H + h + v * L;
    store_some(sum, i > 0 ? load_some(sum, lanes) + grad_w[v] : grad_w[v], lanes);
  }
}

template <typename T>
void backward(const AdditiveBackward<T>& p) {
  constexpr int L = Lanes<T>;
  // Few queries: each key's row is read and written once, so that memory binds. It takes longer runs.
  const int64_t width = (p.Tq < kQueries ? kVectors : 1) * L, tasks = (p.H + width - 1) / width;
#pragma omp parallel if (p.B * p.Tq * p.Tk * p.H > kSerial)
  {
#pragma omp for
    for (int64_t row = 0; row < p.B * p.Tq; ++row) {
      const int64_t at = row * p.Tk;
      softmax_row_backward(p.grad_attention + at, p.attention + at, p.grad_logits + at, p.Tk);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < p.B * tasks; ++task) {
      const int64_t b = task / tasks, first = task % tasks * width, end = min_of(p.H, first + width);
      if (end - first == kVectors * L) {
        for (int64_t i = 0; i < p.Tq; ++i) backward_tile<T, 1, kVectors>(p, b, i, first, L);
        continue;
      }
      for (int64_t h = first; h < end; h += L) {
        const int lanes = int(min_of(L, end - h));
        int64_t i = 0;
        for (; i + kQueries <= p.Tq; i += kQueries) backward_tile<T, kQueries, 1>(p, b, i, h, lanes);
        for (; i < p.Tq; ++i) backward_tile<T, 1, 1>(p, b, i, h, lanes);
      }
    }
  }
}

extern const AdditiveKernels additive_kernels;
const AdditiveKernels additive_kernels = {forward<float>, forward<double>, backward<float>, backward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::additive
