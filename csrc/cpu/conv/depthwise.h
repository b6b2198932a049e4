// Depthwise causal convolution has one input channel a group. Every tap is a shifted row: an element takes K
// multiply-adds, and the loads from the first-level cache bound them. Outputs whose taps reach before the start (the
// head) read a small padded copy instead.
#pragma once

#include "cpu/base/workspace.h"
#include "cpu/conv/epilogue.h"

namespace seqaccel::SEQACCEL_ISA::conv {

constexpr ptrdiff_t kDepthwiseStrip = 512;  // outputs between two epilogues

// out[i] = finish(sum_k w[k] * x[i + k * step]), i < n.
template <typename T, typename Finish>
inline void correlate(const T* x, const T* w, ptrdiff_t K, ptrdiff_t step, ptrdiff_t n, T* out, const Finish& finish) {
  constexpr int NV = 4;
  constexpr ptrdiff_t L = Lanes<T>;
  ptrdiff_t i = 0;
  for (; i + NV * L <= n; i += NV * L) {
    Vec<T> acc[NV] = {};
    for (ptrdiff_t k = 0; k < K; ++k) {
      const Vec<T> wk = broadcast(w[k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[v] += wk * load(x + i + k * step + v * L);
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + i + v * L, finish(acc[v]));
  }
  for (; i < n; i += L) {
    const int m = n - i < L ? int(n - i) : int(L);
    Vec<T> acc = {};
    for (ptrdiff_t k = 0; k < K; ++k) {
      const T* from = x + i + k * step;
      acc += broadcast(w[k]) * (m == L ? load(from) : load(from, m));
    }
    store_some(out + i, finish(acc), m);
  }
}

template <typename T>
inline void correlate(const T* x, const T* w, ptrdiff_t K, ptrdiff_t step, ptrdiff_t n, T* out) {
  correlate(x, w, K, step, n, out, [](Vec<T> v) __attribute__((always_inline)) { return v; });
}

template <typename T>
inline T dot(const T* a, const T* b, ptrdiff_t n) {
  Vec<T> acc[4] = {};
  constexpr ptrdiff_t L = Lanes<T>;
  ptrdiff_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[v] += load(a + i + v * L) * load(b + i + v * L);
  }
  for (; i + L <= n; i += L) acc[0] += load(a + i) * load(b + i);
  if (i < n) acc[0] += load(a + i, int(n - i)) * load(b + i, int(n - i));
  return horizontal_sum<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// Elements of scratch a thread needs: the padded head, a strip, and whole lines.
inline ptrdiff_t depthwise_scratch(const ConvShape& s) {
  const ptrdiff_t context = s.context(), most = context > kDepthwiseStrip ? context : kDepthwiseStrip;
  return (context + (most < s.length ? most : s.length) + kDepthwiseStrip + 64) / 16 * 16;
}

// y[t] = sum_k w[k] x[t - (K-1-k) d], t < length, write(t, n, taps, strip) for every strip: its taps begin at `taps`,
// and `strip` has room for it. `before` ends where x begins (null: zeros, which scratch begins with).
template <typename T, typename Write>
inline void depthwise_strips(const ConvShape& s, const T* x, ptrdiff_t length, const T* before, T* scratch,
                             const Write& write) {
  const ptrdiff_t context = s.context(), head = length <= kDepthwiseStrip || length < context ? length : context;
  T* padded = scratch;
  if (before) memcpy(padded, before - context, context * sizeof(T));
  memcpy(padded + context, x, head * sizeof(T));
  for (ptrdiff_t t = 0; t < length;) {
    const ptrdiff_t end = t < head ? head : length;
    const ptrdiff_t n = end - t < kDepthwiseStrip ? end - t : kDepthwiseStrip;
    write(t, n, t < head ? padded + t : x + t - context, scratch + context + head);
    t += n;
  }
}

// The same, emit(t, n, values) for every strip.
template <typename T, typename Emit>
inline void depthwise_row(const ConvShape& s, const T* x, ptrdiff_t length, const T* before, const T* w, T* scratch,
                          const Emit& emit) {
  depthwise_strips(s, x, length, before, scratch, [&](ptrdiff_t t, ptrdiff_t n, const T* from, T* strip) {
    correlate(from, w, s.kernel_size, s.dilation, n, strip);
    emit(t, n, strip);
  });
}

template <typename T>
inline bool depthwise_forward(const ConvForward<T>& p) {
  const ConvShape& s = p.shape;
  const ptrdiff_t context = s.context(), size = depthwise_scratch(s);
  const ConvEpilogue& epilogue = p.epilogue;
  const bool relu = epilogue.relu || epilogue.activation == Activation::relu;
  const bool simple = epilogue.activation == Activation::none || epilogue.activation == Activation::relu;
  const bool plain =  // bias and relu, in registers
      simple && epilogue.dropout == 0 && !p.pre && !p.active && !p.residual;
  Workspace workspace;
  T* scratch;
  workspace.reserve(scratch, p.threads * size);
  if (!workspace.allocate()) return false;
#pragma omp parallel num_threads(p.threads)
  {
    T* mine = scratch + omp_get_thread_num() * size;
    if (!p.history) memset(mine, 0, context * sizeof(T));
#pragma omp for schedule(static)
    for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
      const ptrdiff_t b = row / s.out_channels, o = row % s.out_channels, c = o / s.group_out();
      s.for_segments(b, 0, s.length, [&](const Segment& at) {
        const T* before = nullptr;
        if (p.history && at.history != kZeros) {
          before = p.history + (at.history * s.in_channels + c + 1) * context;
        } else if (p.history) {
          memset(mine, 0, context * sizeof(T));
        }
        const T* x = p.x + (b * s.in_channels + c) * s.length + at.begin;
        const T* w = p.weight + o * s.kernel_size;
        if (plain) {
          const T bias = p.bias ? p.bias[o] : T(0);
          depthwise_strips(s, x, at.end - at.begin, before, mine, [&](ptrdiff_t t, ptrdiff_t n, const T* taps, T*) {
            correlate(taps, w, s.kernel_size, s.dilation, n, p.y + row * s.length + at.begin + t,
                      [&](Vec<T> v) __attribute__((always_inline)) {
                        return relu ? activate<T, Activation::relu>(v + bias) : v + bias;
                      });
          });
          return;
        }
        depthwise_row(s, x, at.end - at.begin, before, w, mine,
                      [&](ptrdiff_t t, ptrdiff_t n, const T* acc) { finish_row(p, o, b, at.begin + t, n, acc); });
      });
    }
  }
  return true;
}

// grad_x[u] = sum over the channel's outputs and taps of w[k] g[u + (K-1-k) d], u from -P when grad_history is wanted;
// grad_weight[k] = sum over b, t of g[t] x[t - (K-1-k) d]. g [B, O, T]. A thread owns its channels over the whole
// batch.
template <typename T>
inline void depthwise_backward(const ConvBackward<T>& p, const T* g) {
  const ConvShape& s = p.shape;
  const ptrdiff_t context = s.context(), multiplier = s.group_out(), K = s.kernel_size;
  constexpr ptrdiff_t L = Lanes<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (ptrdiff_t c = 0; c < s.in_channels; ++c) {
    bool empty = true;  // the sums of the weight's gradient
    const auto add_segment = [&](ptrdiff_t b, const Segment& segment) {
      const ptrdiff_t row = (b * s.in_channels + c) * s.length + segment.begin, length = segment.end - segment.begin;
      const ptrdiff_t history_row = segment.history * s.in_channels + c;
      const T* first_g = g + (b * s.out_channels + c * multiplier) * s.length + segment.begin;
      const auto gather = [&](ptrdiff_t begin, ptrdiff_t end, T* out, const T* add) {  // time steps begin ... end
        ptrdiff_t u = begin;
        while (u < end) {
          const int m = end - u < L ? int(end - u) : int(L);
          Vec<T> acc = {};
          if (add) acc = m == L ? load(add + u - begin) : load(add + u - begin, m);
          for (ptrdiff_t j = 0; j < multiplier; ++j) {
            for (ptrdiff_t k = 0; k < K; ++k) {
              const ptrdiff_t at = u + (K - 1 - k) * s.dilation;  // [at, at + m) clipped to [0, length)
              const T* from = first_g + j * s.length;
              Vec<T> value, weight = broadcast(p.weight[(c * multiplier + j) * K + k]);
              if (at >= 0 && at + L <= length) {
                value = load(from + at);
              } else if (at + m <= 0 || at >= length) {
                continue;
              } else {  // past the ends both are 0: a weight that is not finite stays apart
                const T w = weight[0];
                value = weight = Vec<T>{};
                for (int i = 0; i < m; ++i) {
                  if (at + i >= 0 && at + i < length) value[i] = from[at + i], weight[i] = w;
                }
              }
              acc += weight * value;
            }
          }
          m == L ? store(out + u - begin, acc) : store(out + u - begin, acc, m);
          u += m;
        }
      };
      if (p.grad_x) gather(0, length, p.grad_x + row, p.addend ? p.addend + row : nullptr);
      const bool begins = segment.history == kZeros;
      if (p.grad_history && !begins) gather(-context, 0, p.grad_history + history_row * context, nullptr);
      if (!p.grad_weight) return;
      for (ptrdiff_t j = 0; j < multiplier; ++j) {
        const T* gr = first_g + j * s.length;
        for (ptrdiff_t k = 0; k < K; ++k) {
          const ptrdiff_t shift = (K - 1 - k) * s.dilation, head = shift < length ? shift : length;
          T sum = dot(gr + head, p.x + row + head - shift, length - head);
          if (p.history && !begins) sum += dot(gr, p.history + (history_row + 1) * context - shift, head);
          T& total = p.grad_weight[(c * multiplier + j) * K + k];
          total = empty ? sum : total + sum;
        }
      }
      empty = false;
    };
    for (ptrdiff_t b = 0; b < s.batch; ++b) {
      s.for_segments(b, 0, s.length, [&](const Segment& segment) { add_segment(b, segment); });
    }
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
