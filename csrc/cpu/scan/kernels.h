// The kernels of SRU, and the table of all scans.
#include "cpu/base/shuffle.h"
#include "cpu/base/vec.h"
#include "cpu/scan/linear_scan.h"
#include "cpu/scan/scan.h"

namespace seqaccel::SEQACCEL_ISA::scan {

constexpr int64_t kFlushSteps = 64;  // gradients of parameters are summed in two levels: error grows with 64 + T / 64

// ---- SRU ----
//
//   f = sigmoid(u1 + w_f c' + b_f)     r = sigmoid(u2 + w_r c' + b_r)     c = u0 + f (c' - u0)
//   h = s + m r (g(c) - s)             s = scale_x x, u3 or 0;  m the dropout mask;  g identity or tanh
//
// Backward, from dh and the carried dc, with f and r computed again from u and c':
//   dr = dh m (g - s) r (1 - r)        dc += dh m r g'(c)          df = dc (c' - u0) f (1 - f)
//   du = [dc (1 - f), df, dr, ds]      ds = dh (1 - m r)           dc' = dc f + df w_f + dr w_r

// Where one vector of columns reads and writes at one step. The pointers that a variant does not use are never read.
template <typename T>
struct SruColumns {
  const T *u, *x, *forget_weight, *reset_weight, *forget_bias, *reset_bias, *mask_c, *c_previous;
};

template <typename T, Highway kHighway>
SEQACCEL_INLINE void sru_gates(const SruColumns<T>& p, T scale_x, Vec<T> c_previous, Vec<T>& u0, Vec<T>& forget,
                               Vec<T>& reset, Vec<T>& skip) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  Vec<T> u[K];
  load_interleaved<T>(p.u, u);
  u0 = u[0];
  forget = sigmoid_vec<T>(u[1] + load(p.forget_weight) * c_previous + load(p.forget_bias));
  reset = sigmoid_vec<T>(u[2] + load(p.reset_weight) * c_previous + load(p.reset_bias));
  if constexpr (kHighway == Highway::projected) {
    skip = u[3];
  } else if constexpr (kHighway == Highway::input) {
    skip = load(p.x) * scale_x;
  } else {
    skip = Vec<T>{};
  }
}

template <typename T, Highway kHighway, bool kTanh>
SEQACCEL_INLINE void sru_forward_vector(const SruColumns<T>& p, T scale_x, T* h, T* c) {
  const Vec<T> c_previous = load(p.c_previous);
  Vec<T> u0, forget, reset, skip;
  sru_gates<T, kHighway>(p, scale_x, c_previous, u0, forget, reset, skip);
  const Vec<T> state = u0 + forget * (c_previous - u0);
  store(c, state);
  const Vec<T> activated = kTanh ? tanh_vec<T>(state) : state;
  if (p.mask_c) reset = reset * load(p.mask_c);
  store(h, skip + reset * (activated - skip));
}

template <typename T>
struct SruGradients {
  const T *grad_h, *c;
  T *grad_u, *grad_x, *grad_c;  // grad_c: the carried gradient, in and out
  T* sums[4];                   // of the forget weight, the reset weight, the forget bias, the reset bias
};

template <typename T, Highway kHighway, bool kTanh>
SEQACCEL_INLINE void sru_backward_vector(const SruColumns<T>& p, T scale_x, const SruGradients<T>& g) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  const Vec<T> c_previous = load(p.c_previous);
  Vec<T> u0, forget, reset, skip;
  sru_gates<T, kHighway>(p, scale_x, c_previous, u0, forget, reset, skip);
  const Vec<T> state = load(g.c);
  const Vec<T> activated = kTanh ? tanh_vec<T>(state) : state;
  const Vec<T> grad_h = load(g.grad_h);
  const Vec<T> masked = p.mask_c ? grad_h * load(p.mask_c) : grad_h;
  const Vec<T> through = masked * reset;
  const Vec<T> grad_reset = through * (activated - skip) * (T(1) - reset);
  const Vec<T> grad_c = load(g.grad_c) + (kTanh ? through * (T(1) - activated * activated) : through);
  const Vec<T> closed = T(1) - forget;
  const Vec<T> grad_forget = grad_c * (c_previous - u0) * (forget * closed);
  Vec<T> grad_u[K];
  grad_u[0] = grad_c * closed;
  grad_u[1] = grad_forget;
  grad_u[2] = grad_reset;
  if constexpr (kHighway == Highway::projected) grad_u[3] = grad_h - through;
  store_interleaved<T>(g.grad_u, grad_u);
  if constexpr (kHighway == Highway::input) store(g.grad_x, (grad_h - through) * scale_x);
  store(g.grad_c, grad_c * forget + grad_forget * load(p.forget_weight) + grad_reset * load(p.reset_weight));
  store(g.sums[0], load(g.sums[0]) + grad_forget * c_previous);
  store(g.sums[1], load(g.sums[1]) + grad_reset * c_previous);
  store(g.sums[2], load(g.sums[2]) + grad_forget);
  store(g.sums[3], load(g.sums[3]) + grad_reset);
}

template <typename T>
SEQACCEL_INLINE SruColumns<T> sru_advance(const SruColumns<T>& p, int64_t i, int k) {
  return {
      p.u + i * k,      p.x ? p.x + i : nullptr,           p.forget_weight + i, p.reset_weight + i, p.forget_bias + i,
      p.reset_bias + i, p.mask_c ? p.mask_c + i : nullptr, p.c_previous + i};
}

// Copies of the last, incomplete vector of columns, zero past the end, so that the vector code serves there too.
template <typename T>
struct SruTail {
  alignas(64) T u[4 * Lanes<T>] = {}, rest[7][Lanes<T>] = {};

  SruColumns<T> fill(const SruColumns<T>& p, int n, int k) {
    for (int i = 0; i < n * k; ++i) u[i] = p.u[i];
    const T* const from[7] = {p.x,          p.forget_weight, p.reset_weight, p.forget_bias,
                              p.reset_bias, p.mask_c,        p.c_previous};
    for (int row = 0; row < 7; ++row) {
      if (from[row]) copy(rest[row], from[row], n);
    }
    return {u, rest[0], rest[1], rest[2], rest[3], rest[4], p.mask_c ? rest[5] : nullptr, rest[6]};
  }

  static void copy(T* to, const T* from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
};

template <typename T, Highway kHighway, bool kTanh>
SEQACCEL_INLINE void sru_forward_row(const SruColumns<T>& p, T scale_x, T* h, T* c, int64_t n) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  int64_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) {
    sru_forward_vector<T, kHighway, kTanh>(sru_advance(p, i, K), scale_x, h + i, c + i);
  }
  if (i < n) {
    SruTail<T> tail;
    alignas(64) T h_tail[Lanes<T>], c_tail[Lanes<T>];
    sru_forward_vector<T, kHighway, kTanh>(tail.fill(sru_advance(p, i, K), int(n - i), K), scale_x, h_tail, c_tail);
    SruTail<T>::copy(h + i, h_tail, n - i);
    SruTail<T>::copy(c + i, c_tail, n - i);
  }
}

template <typename T, Highway kHighway, bool kTanh>
SEQACCEL_INLINE void sru_backward_row(const SruColumns<T>& p, T scale_x, const SruGradients<T>& g, int64_t n) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  int64_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) {
    const SruGradients<T> here = {g.grad_h + i,     g.c + i,
                                  g.grad_u + i * K, g.grad_x + i,
                                  g.grad_c + i,     {g.sums[0] + i, g.sums[1] + i, g.sums[2] + i, g.sums[3] + i}};
    sru_backward_vector<T, kHighway, kTanh>(sru_advance(p, i, K), scale_x, here);
  }
  if (i < n) {
    const int m = int(n - i);
    SruTail<T> tail;
    alignas(64) T grad_h[Lanes<T>] = {}, c[Lanes<T>] = {}, grad_c[Lanes<T>] = {}, sums[4][Lanes<T>] = {};
    alignas(64) T grad_u[4 * Lanes<T>], grad_x[Lanes<T>];
    SruTail<T>::copy(grad_h, g.grad_h + i, m);
    SruTail<T>::copy(c, g.c + i, m);
    SruTail<T>::copy(grad_c, g.grad_c + i, m);
    for (int k = 0; k < 4; ++k) SruTail<T>::copy(sums[k], g.sums[k] + i, m);
    const SruGradients<T> here = {grad_h, c, grad_u, grad_x, grad_c, {sums[0], sums[1], sums[2], sums[3]}};
    sru_backward_vector<T, kHighway, kTanh>(tail.fill(sru_advance(p, i, K), m, K), scale_x, here);
    SruTail<T>::copy(g.grad_u + i * K, grad_u, m * K);
    if (kHighway == Highway::input) SruTail<T>::copy(g.grad_x + i, grad_x, m);
    SruTail<T>::copy(g.grad_c + i, grad_c, m);
    for (int k = 0; k < 4; ++k) SruTail<T>::copy(g.sums[k] + i, sums[k], m);
  }
}

// Walks the columns [first, last) of batch x directions x hidden in runs of one batch row and direction.
struct SruRun {
  int64_t batch, direction, hidden;  // where the run begins
  int64_t column, length;

  static SruRun at(const SruShape& s, int64_t first, int64_t last) {
    SruRun run = {first / (s.directions * s.hidden), first / s.hidden % s.directions, first % s.hidden, first, 0};
    run.measure(s, last);
    return run;
  }

  void next(const SruShape& s, int64_t last) {
    column += length;
    hidden = 0;
    if (++direction == s.directions) {
      direction = 0;
      ++batch;
    }
    measure(s, last);
  }

 private:
  void measure(const SruShape& s, int64_t last) {
    length = s.hidden - hidden < last - column ? s.hidden - hidden : last - column;
  }
};

template <typename T, typename P>
SEQACCEL_INLINE SruColumns<T> sru_columns(const P& p, const SruRun& run, int64_t t, const T* c_previous, int k) {
  const SruShape& s = p.shape;
  const int64_t channels = s.directions * s.hidden, at = t * s.batch * channels + run.column;
  const int64_t channel = run.direction * s.hidden + run.hidden;
  return {p.u + at * k,
          p.x ? p.x + at : nullptr,
          p.weight_c + channel,
          p.weight_c + channels + channel,
          p.bias + channel,
          p.bias + channels + channel,
          p.mask_c ? p.mask_c + run.column : nullptr,
          c_previous};
}

template <typename T, Highway kHighway, bool kTanh>
void sru_forward_block(const SruForward<T>& p, int64_t first, int64_t last) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  const SruShape& s = p.shape;
  const int64_t columns = s.batch * s.directions * s.hidden;
  T* const c = p.c ? p.c : p.c_n;
  const int64_t c_stride = p.c ? columns : 0;
  for (int64_t step = 0; step < s.steps; ++step) {
    SruRun run = SruRun::at(s, first, last);
    for (; run.column < last; run.next(s, last)) {
      const int64_t t = run.direction ? s.steps - 1 - step : step;
      const int64_t before = run.direction ? t + 1 : t - 1;
      const T* c_previous = (step ? c + before * c_stride : p.c_0) + run.column;
      T* const c_here = c + t * c_stride + run.column;
      T* const h = p.h + t * columns + run.column;
      if (p.mask_pad && p.mask_pad[t * s.batch + run.batch]) {
        if (c_here != c_previous) memcpy(c_here, c_previous, size_t(run.length) * sizeof(T));
        memset(h, 0, size_t(run.length) * sizeof(T));
      } else {
        sru_forward_row<T, kHighway, kTanh>(sru_columns(p, run, t, c_previous, K), p.scale_x, h, c_here, run.length);
      }
    }
  }
  if (s.steps == 0) {
    memcpy(p.c_n + first, p.c_0 + first, size_t(last - first) * sizeof(T));
  } else if (p.c) {
    for (SruRun run = SruRun::at(s, first, last); run.column < last; run.next(s, last)) {
      const int64_t t = run.direction ? 0 : s.steps - 1;
      memcpy(p.c_n + run.column, p.c + t * columns + run.column, size_t(run.length) * sizeof(T));
    }
  }
}

template <typename T, Highway kHighway, bool kTanh>
void sru_backward_block(const SruBackward<T>& p, int64_t first, int64_t last) {
  constexpr int K = kHighway == Highway::projected ? 4 : 3;
  const SruShape& s = p.shape;
  const int64_t columns = s.batch * s.directions * s.hidden, n = last - first;
  alignas(64) T sums[4][kBlockColumns];
  T* const grad_c = p.grad_c_0 + first;
  if (p.grad_c_n) {
    memcpy(grad_c, p.grad_c_n + first, size_t(n) * sizeof(T));
  } else {
    memset(grad_c, 0, size_t(n) * sizeof(T));
  }
  for (int k = 0; k < 4; ++k) {
    memset(sums[k], 0, size_t(n) * sizeof(T));
    memset(p.column_sums + k * columns + first, 0, size_t(n) * sizeof(T));
  }
  for (int64_t step = s.steps - 1; step >= 0; --step) {
    SruRun run = SruRun::at(s, first, last);
    for (; run.column < last; run.next(s, last)) {
      const int64_t t = run.direction ? s.steps - 1 - step : step;
      const int64_t before = run.direction ? t + 1 : t - 1;
      const int64_t at = t * columns + run.column, local = run.column - first;
      if (p.mask_pad && p.mask_pad[t * s.batch + run.batch]) {
        memset(p.grad_u + at * K, 0, size_t(run.length) * K * sizeof(T));
        if (kHighway == Highway::input) memset(p.grad_x + at, 0, size_t(run.length) * sizeof(T));
        continue;
      }
      const T* c_previous = (step ? p.c + before * columns : p.c_0) + run.column;
      const SruGradients<T> g = {
          p.grad_h + at,     p.c + at,
          p.grad_u + at * K, p.grad_x ? p.grad_x + at : nullptr,
          grad_c + local,    {sums[0] + local, sums[1] + local, sums[2] + local, sums[3] + local}};
      sru_backward_row<T, kHighway, kTanh>(sru_columns(p, run, t, c_previous, K), p.scale_x, g, run.length);
    }
    if (step % kFlushSteps == 0) {
      for (int k = 0; k < 4; ++k) {
        T* const total = p.column_sums + k * columns + first;
        for (int64_t i = 0; i < n; ++i) total[i] += sums[k][i];
        memset(sums[k], 0, size_t(n) * sizeof(T));
      }
    }
  }
}

template <typename P, typename Block>
SEQACCEL_INLINE void sru_for_blocks(const P& p, int64_t element_bytes, Block block) {
  const SruShape& s = p.shape;
  const int64_t columns = s.batch * s.directions * s.hidden;
  if (columns == 0) return;
  const int threads = columns * s.steps < kSerialElements ? 1 : omp_get_max_threads();
  const int64_t width =
      element_bytes == 4 ? block_columns<float>(columns, 1, threads) : block_columns<double>(columns, 1, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < columns; first += width)
    block(p, first, columns - first < width ? columns : first + width);
}

template <typename T>
void sru_forward(const SruForward<T>& p) {
  void (*block)(const SruForward<T>&, int64_t, int64_t);
  const bool tanh = p.shape.use_tanh;
  switch (p.shape.highway) {
    case Highway::none:
      block = tanh ? sru_forward_block<T, Highway::none, true> : sru_forward_block<T, Highway::none, false>;
      break;
    case Highway::input:
      block = tanh ? sru_forward_block<T, Highway::input, true> : sru_forward_block<T, Highway::input, false>;
      break;
    default:
      block = tanh ? sru_forward_block<T, Highway::projected, true> : sru_forward_block<T, Highway::projected, false>;
  }
  sru_for_blocks(p, sizeof(T), block);
}

template <typename T>
void sru_backward(const SruBackward<T>& p) {
  void (*block)(const SruBackward<T>&, int64_t, int64_t);
  const bool tanh = p.shape.use_tanh;
  switch (p.shape.highway) {
    case Highway::none:
      block = tanh ? sru_backward_block<T, Highway::none, true> : sru_backward_block<T, Highway::none, false>;
      break;
    case Highway::input:
      block = tanh ? sru_backward_block<T, Highway::input, true> : sru_backward_block<T, Highway::input, false>;
      break;
    default:
      block = tanh ? sru_backward_block<T, Highway::projected, true> : sru_backward_block<T, Highway::projected, false>;
  }
  sru_for_blocks(p, sizeof(T), block);
  const int64_t channels = p.shape.directions * p.shape.hidden;
  for (int k = 0; k < 4; ++k) {
    T* const total = (k < 2 ? p.grad_weight_c : p.grad_bias) + k % 2 * channels;
    memset(total, 0, size_t(channels) * sizeof(T));
    for (int64_t b = 0; b < p.shape.batch; ++b) {
      const T* sums = p.column_sums + (k * p.shape.batch + b) * channels;
      for (int64_t i = 0; i < channels; ++i) total[i] += sums[i];
    }
  }
}

extern const ScanKernels scan_kernels;
const ScanKernels scan_kernels = {
    linear_scan_kernels<float>,
    linear_scan_kernels<double>,
    linear_scan_kernels<BFloat16>,
    linear_scan_kernels<Float16>,
    linear_scan_kernels<Complex<float>>,
    linear_scan_kernels<Complex<double>>,
    sru_forward<float>,
    sru_forward<double>,
    sru_backward<float>,
    sru_backward<double>,
};

}  // namespace seqaccel::SEQACCEL_ISA::scan
