// The loops of a closed-form continuous-time recurrence. Threads share the batch, and never wait for each other.
// Weights are packed once per call (blocks.h).
#include <omp.h>
#include <string.h>

#include "cpu/rnn/blocks.h"
#include "cpu/rnn/cfc.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr double kCfcSerialWork = 262144.0;                  // products of a call that are not worth a second thread
constexpr double kLecunScale = 1.7159, kLecunSlope = 0.666;  // lecun_tanh(v) = scale tanh(slope v)

template <typename T>
int cfc_threads(const Cfc<T>& p) {
  double row = 0;
  for (int i = 0; i < p.matrices; ++i) row += double(p.widths[i]) * double(p.widths[i + 1]);
  if (row * double(p.batch) * double(p.steps) < kCfcSerialWork) return 1;
  return int(min_of(ptrdiff_t(team_size()), ptrdiff_t(p.batch)));
}

// Packs on all threads, then runs the rows of a part of the batch on each.
template <class Pack, class Walk>
void run_cfc(int threads, ptrdiff_t batch, const Pack& pack, const Walk& walk) {
#pragma omp parallel num_threads(threads)
  {
    const ptrdiff_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    pack(thread, count);
#pragma omp barrier
    const ptrdiff_t b0 = batch * thread / count, b1 = batch * (thread + 1) / count;
    if (b0 < b1) walk(b0, b1);
  }
}

template <typename T>
bool cfc_beyond_l2(const Cfc<T>& p) {
  ptrdiff_t values = 0;
  for (int i = 0; i < p.matrices; ++i) values += ptrdiff_t(p.widths[i] * p.widths[i + 1]);
  return beyond_l2(values * ptrdiff_t(sizeof(T)));
}

template <typename T>
SEQACCEL_INLINE Vec<T> cfc_activation(CfcActivation kind, Vec<T> v) {
  if (kind == CfcActivation::relu) return v < 0 ? Vec<T>{} : v;
  if (kind == CfcActivation::tanh) return tanh_vec<T>(v);
  return T(kLecunScale) * tanh_vec<T>(T(kLecunSlope) * v);
}

// The derivative, from the activation.
template <typename T>
SEQACCEL_INLINE Vec<T> cfc_slope(CfcActivation kind, Vec<T> s) {
  if (kind == CfcActivation::relu) return s <= 0 ? Vec<T>{} : broadcast(T(1));
  if (kind == CfcActivation::tanh) return 1 - s * s;
  const Vec<T> tanh = s * T(1 / kLecunScale);
  return T(kLecunScale * kLecunSlope) * (1 - tanh * tanh);
}

template <typename T>
SEQACCEL_INLINE Vec<T> cfc_abs(Vec<T> v) {
  return v < 0 ? -v : v;
}

// Calls body(row, rows) for chunks of the rows [b0, b1).
template <class Body>
SEQACCEL_INLINE void cfc_chunks(ptrdiff_t b0, ptrdiff_t b1, const Body& body) {
  for (ptrdiff_t b = b0; b < b1; b += kChunk) body(b, min_of(kChunk, b1 - b));
}

template <typename T>
struct CfcForwardPlan {
  static constexpr int L = Lanes<T>;
  typedef UnitProduct<T, 1> Product;

  const CfcForward<T>& p;
  const bool direct = p.batch * p.steps <= kDirectRows;  // nothing is packed
  Product products[kCfcMatrices];
  ptrdiff_t blocks[kCfcMatrices];
  T* panels;
  T* started;  // [B, H] if there are resets: h', zero where an episode begins
  Workspace workspace;

  explicit CfcForwardPlan(const CfcForward<T>& pass) : p(pass) {
    const bool far = cfc_beyond_l2<T>(p);
    for (int i = 0; i < p.matrices; ++i) {
      products[i] = {p.weights[i], ptrdiff_t(p.widths[i + 1]), ptrdiff_t(p.widths[i])};
      products[i].panel_size = Product::panel_values(products[i].K);
      products[i].far = far;
      blocks[i] = Product::blocks(products[i].N);
    }
  }

  bool allocate() {
    ptrdiff_t values = 0;
    for (int i = 0; i < p.matrices && !direct; ++i) values += blocks[i] * products[i].panel_size;
    workspace.reserve(panels, values);
    workspace.reserve(started, p.reset ? p.batch * p.hidden : 0);
    if (!workspace.allocate()) return false;
    T* next = panels;
    for (int i = 0; i < p.matrices && !direct; ++i) {
      products[i].panels = next;
      next += blocks[i] * products[i].panel_size;
    }
    return true;
  }

  void pack(ptrdiff_t thread, ptrdiff_t count) const {
    for (int i = 0; i < p.matrices && !direct; ++i) {
      for (ptrdiff_t u = thread; u < blocks[i]; u += count) products[i].pack(u);
    }
  }

  // The activations of a matrix at time t.
  T* place(int i, ptrdiff_t t) const { return p.activations[i] + (p.keeps ? t : 0) * p.batch * p.widths[i + 1]; }

  // h' [B, H] of the rows [b0, b1).
  const T* before(ptrdiff_t t, ptrdiff_t b0, ptrdiff_t b1) const {
    const T* const h = t == 0 ? p.h_0 : p.output + (t - 1) * p.batch * p.hidden;
    if (!p.reset || !memchr(p.reset + t * p.batch + b0, true, size_t(b1 - b0))) return h;
    const size_t bytes = size_t(p.hidden) * sizeof(T);
    for (ptrdiff_t b = b0; b < b1; ++b) {
      if (p.begins(t, b)) {
        memset(started + b * p.hidden, 0, bytes);
      } else {
        memcpy(started + b * p.hidden, h + b * p.hidden, bytes);
      }
    }
    return started;
  }

  void multiply(int i, ptrdiff_t t, ptrdiff_t b0, ptrdiff_t b1) const {
    alignas(64) T y[kChunk * Product::V * L];
    const Product& product = products[i];
    const ptrdiff_t N = product.N;
    const T* const source = i == 0 ? before(t, b0, b1) : place(i - 1, t);
    const T* const added = i == 0 ? p.x + t * p.batch * N : p.biases[i];
    const ptrdiff_t added_row = i == 0 ? N : 0;
    const bool activates = i + 1 < p.matrices;
    T* const to = place(i, t);
    for (ptrdiff_t u = 0; u < blocks[i]; ++u) {
      cfc_chunks(b0, b1, [&](ptrdiff_t first, ptrdiff_t rows) {
        product(rows, source + first * product.K, product.K, u, y);
        for (int v = 0; v < Product::U && (u * Product::U + v) * L < N; ++v) {
          const ptrdiff_t unit = (u * Product::U + v) * L;
          const int units = int(min_of(L, N - unit));
          for (ptrdiff_t row = 0; row < rows; ++row) {
            const ptrdiff_t b = first + row;
            const Vec<T> sum = load(y + (row * Product::U + v) * L) + load_some(added + b * added_row + unit, units);
            store_some(to + b * N + unit, activates ? cfc_activation<T>(p.activation, sum) : sum, units);
          }
        }
      });
    }
  }

  // Makes h of the heads, which are replaced by what the backward pass needs.
  void mix(ptrdiff_t t, ptrdiff_t b) const {
    const ptrdiff_t H = p.hidden;
    T* const heads = place(p.matrices - 1, t) + b * p.heads() * H;
    T* const output = p.output + (t * p.batch + b) * H;
    const Vec<T> span = broadcast(p.timespans ? p.timespans[t * p.batch + b] : T(1));
    for (ptrdiff_t unit = 0; unit < H; unit += L) {
      const int units = int(min_of(L, H - unit));
      T* const at = heads + unit;
      if (p.mode == CfcMode::pure) {
        const Vec<T> f = load_some(at, units), a = load_some(p.a + unit, units);
        const Vec<T> decay = exp_vec<T>(-span * (cfc_abs<T>(load_some(p.w + unit, units)) + cfc_abs<T>(f)));
        store_some(output + unit, a - a * decay * f, units);
        continue;
      }
      const Vec<T> f = tanh_vec<T>(load_some(at, units)), g = tanh_vec<T>(load_some(at + H, units));
      const Vec<T> v_a = load_some(at + 2 * H, units);
      const Vec<T> gate = sigmoid_vec<T>(span * v_a + load_some(at + 3 * H, units));
      store_some(output + unit, p.mode == CfcMode::gated ? f + gate * (g - f) : f + gate * g, units);
      if (!p.keeps) continue;
      store_some(at, f, units);
      store_some(at + H, g, units);
      store_some(at + 2 * H, gate, units);
      store_some(at + 3 * H, v_a, units);
    }
  }

  void walk(ptrdiff_t b0, ptrdiff_t b1) const {
    for (ptrdiff_t t = 0; t < p.steps; ++t) {
      for (int i = 0; i < p.matrices; ++i) multiply(i, t, b0, b1);
      for (ptrdiff_t b = b0; b < b1; ++b) mix(t, b);
    }
  }
};

template <typename T>
bool cfc_forward(const CfcForward<T>& p) {
  CfcForwardPlan<T> plan(p);
  if (!plan.allocate()) return false;
  run_cfc(
      cfc_threads<T>(p), p.batch, [&](ptrdiff_t thread, ptrdiff_t count) { plan.pack(thread, count); },
      [&](ptrdiff_t b0, ptrdiff_t b1) { plan.walk(b0, b1); });
  return true;
}

template <typename T>
struct CfcBackwardPlan {
  static constexpr int L = Lanes<T>;
  typedef ColumnProduct<T> Product;

  const CfcBackward<T>& p;
  Product products[kCfcMatrices];
  T* panels;
  T* carried;  // [B, H]: dL/dh from the step after
  Workspace workspace;

  explicit CfcBackwardPlan(const CfcBackward<T>& pass) : p(pass) {
    const bool few = p.batch * p.steps <= kDirectRows, far = cfc_beyond_l2<T>(p);
    for (int i = 0; i < p.matrices; ++i) {
      products[i] = Product::of(p.weights[i], ptrdiff_t(p.widths[i]), ptrdiff_t(p.widths[i + 1]), few);
      products[i].far = far;
    }
  }

  bool allocate() {
    ptrdiff_t values = 0;
    for (int i = 0; i < p.matrices; ++i) values += products[i].panel_values();
    workspace.reserve(panels, values);
    workspace.reserve(carried, p.batch * p.hidden);
    if (!workspace.allocate()) return false;
    T* next = panels;
    for (int i = 0; i < p.matrices; ++i) {
      products[i].panels = next;
      next += products[i].panel_values();
    }
    return true;
  }

  void pack(ptrdiff_t thread, ptrdiff_t count) const {
    for (int i = 0; i < p.matrices; ++i) {
      for (ptrdiff_t j = thread; j < Product::blocks(products[i].N); j += count) products[i].pack(j);
    }
  }

  void mix(ptrdiff_t t, ptrdiff_t b) const {
    const ptrdiff_t H = p.hidden, row = t * p.batch + b;
    const int last = p.matrices - 1;
    const T* const heads = p.activations[last] + row * p.heads() * H;
    T* const grads = p.grads[last] + row * p.heads() * H;
    const Vec<T> span = broadcast(p.timespans ? p.timespans[row] : T(1));
    for (ptrdiff_t unit = 0; unit < H; unit += L) {
      const int units = int(min_of(L, H - unit));
      const Vec<T> grad = load_some(p.grad_output + row * H + unit, units) + load_some(carried + b * H + unit, units);
      if (p.grad_h) store_some(p.grad_h + row * H + unit, grad, units);
      const T* const at = heads + unit;
      const Vec<T> f = load_some(at, units);
      if (p.mode == CfcMode::pure) {
        const Vec<T> size = cfc_abs<T>(f), a = load_some(p.a + unit, units);
        const Vec<T> decay = exp_vec<T>(-span * (cfc_abs<T>(load_some(p.w + unit, units)) + size));
        store_some(grads + unit, -grad * a * decay * (1 - span * size), units);
        continue;
      }
      const bool gated = p.mode == CfcMode::gated;
      const Vec<T> g = load_some(at + H, units), gate = load_some(at + 2 * H, units);
      const Vec<T> grad_gate = grad * (gated ? g - f : g) * gate * (1 - gate);
      store_some(grads + unit, (gated ? grad * (1 - gate) : grad) * (1 - f * f), units);
      store_some(grads + H + unit, grad * gate * (1 - g * g), units);
      store_some(grads + 2 * H + unit, grad_gate * span, units);
      store_some(grads + 3 * H + unit, grad_gate, units);
    }
  }

  // The gradient of what matrix i multiplies.
  void multiply(int i, ptrdiff_t t, ptrdiff_t b0, ptrdiff_t b1) const {
    alignas(64) T y[kChunk * Product::kWidth];
    const Product& product = products[i];
    const ptrdiff_t N = product.N;
    const T* const from = p.grads[i] + t * p.batch * product.K;
    T* const to = i == 0 ? carried : p.grads[i - 1] + t * p.batch * N;
    const T* const activation = i == 0 ? nullptr : p.activations[i - 1] + t * p.batch * N;
    for (ptrdiff_t j = 0; j < Product::blocks(N); ++j) {
      cfc_chunks(b0, b1, [&](ptrdiff_t first, ptrdiff_t rows) {
        product(rows, from + first * product.K, product.K, j, 0, product.K, y);
        for (ptrdiff_t row = 0; row < rows; ++row) {
          for (int v = 0; v < kColumns && j * Product::kWidth + v * L < N; ++v) {
            const ptrdiff_t unit = j * Product::kWidth + v * L, place = (first + row) * N + unit;
            const int units = int(min_of(L, N - unit));
            Vec<T> grad = load(y + row * Product::kWidth + v * L);
            if (i > 0) grad *= cfc_slope<T>(p.activation, load_some(activation + place, units));
            store_some(to + place, grad, units);
          }
        }
      });
    }
  }

  void walk(ptrdiff_t b0, ptrdiff_t b1) const {
    const size_t bytes = size_t((b1 - b0) * p.hidden) * sizeof(T);
    memset(carried + b0 * p.hidden, 0, bytes);
    for (ptrdiff_t t = p.steps - 1; t >= 0; --t) {
      for (ptrdiff_t b = b0; b < b1; ++b) mix(t, b);
      for (int i = p.matrices - 1; i >= 0; --i) multiply(i, t, b0, b1);
      for (ptrdiff_t b = b0; b < b1; ++b) {
        if (p.begins(t, b)) memset(carried + b * p.hidden, 0, size_t(p.hidden) * sizeof(T));
      }
    }
    memcpy(p.grad_h_0 + b0 * p.hidden, carried + b0 * p.hidden, bytes);
  }
};

template <typename T>
bool cfc_backward(const CfcBackward<T>& p) {
  CfcBackwardPlan<T> plan(p);
  if (!plan.allocate()) return false;
  run_cfc(
      cfc_threads<T>(p), p.batch, [&](ptrdiff_t thread, ptrdiff_t count) { plan.pack(thread, count); },
      [&](ptrdiff_t b0, ptrdiff_t b1) { plan.walk(b0, b1); });
  return true;
}

extern const CfcKernels cfc_kernels;
const CfcKernels cfc_kernels = {cfc_forward<float>, cfc_forward<double>, cfc_backward<float>, cfc_backward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
