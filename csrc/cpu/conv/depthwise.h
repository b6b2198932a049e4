// Depthwise causal convolution has one input channel a group. Every tap is a shifted row: an element takes K
// multiply-adds, and the loads from the first-level cache bound them. Outputs whose taps reach before the start (the
// head) read a small padded copy instead.
//
// A row of several segments is calculated as one. Only the vectors with a tap that leaves its segment are masked.
#pragma once

#include "cpu/base/workspace.h"
#include "cpu/conv/epilogue.h"

namespace seqaccel::SEQACCEL_ISA::conv {

constexpr ptrdiff_t kDepthwiseStrip = 512;  // outputs between two epilogues

// out[i] = finish(sum_k w[k] * x[i + k * step]), i < n; x is 0 where the tap leaves the segment of output i.
template <bool kMasked, typename T, typename Finish>
SEQACCEL_INLINE void correlate_within(const T* x, const T* w, ptrdiff_t K, ptrdiff_t step, ptrdiff_t n,
                                      const Reach<T>& reach, T* out, const Finish& finish) {
  constexpr int NV = 4;
  constexpr ptrdiff_t L = Lanes<T>;
  typedef typename Reach<T>::Count Count;
  ptrdiff_t i = 0;
  for (; i + NV * L <= n; i += NV * L) {
    Vec<T> acc[NV] = {};
    if (!kMasked || reach.holds_before(i, NV * L, (K - 1) * step)) {
      for (ptrdiff_t k = 0; k < K; ++k) {
        const Vec<T> wk = broadcast(w[k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[v] += wk * load(x + i + k * step + v * L);
      }
    } else {
      Mask<T> before[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) before[v] = reach.lanes(reach.before, i + v * L);
      for (ptrdiff_t k = 0; k < K; ++k) {
        const Vec<T> wk = broadcast(w[k]);
        const Count steps = Count((K - 1 - k) * step);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          acc[v] += wk * (before[v] >= steps ? load(x + i + k * step + v * L) : Vec<T>{});
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + i + v * L, finish(acc[v]));
  }
  for (; i < n; i += L) {
    const int m = n - i < L ? int(n - i) : int(L);
    const bool whole = !kMasked || reach.holds_before(i, m, (K - 1) * step);
    Vec<T> acc = {};
    for (ptrdiff_t k = 0; k < K; ++k) {
      const T* from = x + i + k * step;
      Vec<T> value = m == L ? load(from) : load(from, m);
      if (!whole) value = reach.lanes(reach.before, i) >= Count((K - 1 - k) * step) ? value : Vec<T>{};
      acc += broadcast(w[k]) * value;
    }
    store_some(out + i, finish(acc), m);
  }
}

// Apart from the plain loop, which would lose registers to it.
template <typename T, typename Finish>
__attribute__((noinline)) void correlate_masked(const T* x, const T* w, ptrdiff_t K, ptrdiff_t step, ptrdiff_t n,
                                                const Reach<T>& reach, T* out, const Finish& finish) {
  correlate_within<true>(x, w, K, step, n, reach, out, finish);
}

template <typename T, typename Finish>
inline void correlate(const T* x, const T* w, ptrdiff_t K, ptrdiff_t step, ptrdiff_t n, const Reach<T>& reach, T* out,
                      const Finish& finish) {
  if (reach.before) return correlate_masked(x, w, K, step, n, reach, out, finish);
  correlate_within<false>(x, w, K, step, n, reach, out, finish);
}

template <typename T>
inline void correlate(const T* x, const T* w, ptrdiff_t K, ptrdiff_t step, ptrdiff_t n, const Reach<T>& reach, T* out) {
  correlate(x, w, K, step, n, reach, out, [](Vec<T> v) __attribute__((always_inline)) { return v; });
}

// The sum over those time steps that have `steps` before them in their segment.
template <typename T>
inline T dot(const T* a, const T* b, ptrdiff_t n, const Reach<T>& reach = {}, ptrdiff_t steps = 0) {
  Vec<T> acc[4] = {};
  constexpr ptrdiff_t L = Lanes<T>;
  const auto masked = [&](Vec<T>& sum, ptrdiff_t i, Vec<T> x, Vec<T> y) __attribute__((always_inline)) {
    sum = reach.lanes(reach.before, i) >= typename Reach<T>::Count(steps) ? sum + x * y : sum;
  };
  ptrdiff_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    if (reach.holds_before(i, 4 * L, steps)) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[v] += load(a + i + v * L) * load(b + i + v * L);
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) masked(acc[v], i + v * L, load(a + i + v * L), load(b + i + v * L));
    }
  }
  for (; i < n; i += L) {
    const int m = n - i < L ? int(n - i) : int(L);
    const Vec<T> x = m == L ? load(a + i) : load(a + i, m), y = m == L ? load(b + i) : load(b + i, m);
    if (reach.holds_before(i, m, steps)) {
      acc[0] += x * y;
    } else {
      masked(acc[0], i, x, y);
    }
  }
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
inline void depthwise_row(const ConvShape& s, const T* x, ptrdiff_t length, const T* before, const Reach<T>& reach,
                          const T* w, T* scratch, const Emit& emit) {
  depthwise_strips(s, x, length, before, scratch, [&](ptrdiff_t t, ptrdiff_t n, const T* from, T* strip) {
    correlate(from, w, s.kernel_size, s.dilation, n, reach.from(t), strip);
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
  Reaches<T> reaches(s, p.history);
  workspace.reserve(scratch, p.threads * size);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
#pragma omp parallel num_threads(p.threads)
  {
    reaches.fill();
    T* mine = scratch + omp_get_thread_num() * size;
    if (!p.history) memset(mine, 0, context * sizeof(T));
#pragma omp for schedule(static)
    for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
      const ptrdiff_t b = row / s.out_channels, o = row % s.out_channels, c = o / s.group_out();
      reaches.for_parts(b, 0, s.length, [&](const Segment& at, const Reach<T>& reach) {
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
            correlate(taps, w, s.kernel_size, s.dilation, n, reach.from(t), p.y + row * s.length + at.begin + t,
                      [&](Vec<T> v) __attribute__((always_inline)) {
                        return relu ? activate<T, Activation::relu>(v + bias) : v + bias;
                      });
          });
          return;
        }
        depthwise_row(s, x, at.end - at.begin, before, reach, w, mine,
                      [&](ptrdiff_t t, ptrdiff_t n, const T* acc) { finish_row(p, o, b, at.begin + t, n, acc); });
      });
    }
  }
  return true;
}

// grad_x[u] = sum over the channel's outputs and taps of w[k] g[u + (K-1-k) d], u from -P when grad_history is wanted;
// grad_weight[k] = sum over b, t of g[t] x[t - (K-1-k) d]. g [B, O, T]. A thread owns its channels over the whole
// batch. By the whole team.
template <typename T>
inline void depthwise_backward(const ConvBackward<T>& p, const T* g, const Reaches<T>& reaches) {
  const ConvShape& s = p.shape;
  const ptrdiff_t context = s.context(), multiplier = s.group_out(), K = s.kernel_size;
  constexpr ptrdiff_t L = Lanes<T>;
  typedef typename Reach<T>::Count Count;
#pragma omp for schedule(static)
  for (ptrdiff_t c = 0; c < s.in_channels; ++c) {
    bool empty = true;  // the sums of the weight's gradient
    const auto add_part = [&](ptrdiff_t b, const Segment& part, const Reach<T>& reach) {
      const ptrdiff_t row = (b * s.in_channels + c) * s.length + part.begin, length = part.end - part.begin;
      const ptrdiff_t history_row = part.history * s.in_channels + c;
      const T* first_g = g + (b * s.out_channels + c * multiplier) * s.length + part.begin;
      // Time steps begin ... end, from the gradients of `length` of them.
      const auto gather = [&](ptrdiff_t begin, ptrdiff_t end, ptrdiff_t length, const Reach<T>& reach, T* out,
                              const T* add) {
        ptrdiff_t u = begin;
        while (u < end) {
          const int m = end - u < L ? int(end - u) : int(L);
          const bool whole = reach.holds_after(u, m, context);
          Vec<T> acc = {};
          if (add) acc = m == L ? load(add + u - begin) : load(add + u - begin, m);
          for (ptrdiff_t j = 0; j < multiplier; ++j) {
            for (ptrdiff_t k = 0; k < K; ++k) {
              const ptrdiff_t steps = (K - 1 - k) * s.dilation, at = u + steps;  // [at, at + m) clipped to [0, length)
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
              if (whole) {
                acc += weight * value;
              } else {
                acc = reach.lanes(reach.after, u) >= Count(steps) ? acc + weight * value : acc;
              }
            }
          }
          m == L ? store(out + u - begin, acc) : store(out + u - begin, acc, m);
          u += m;
        }
      };
      if (p.grad_x) gather(0, length, length, reach, p.grad_x + row, p.addend ? p.addend + row : nullptr);
      const bool begins = part.history == kZeros;
      const ptrdiff_t first_end = reach.after ? reach.after[0] + 1 : length;  // of the first segment
      if (p.grad_history && !begins) {
        gather(-context, 0, first_end, {}, p.grad_history + history_row * context, nullptr);
      }
      if (!p.grad_weight) return;
      for (ptrdiff_t j = 0; j < multiplier; ++j) {
        const T* gr = first_g + j * s.length;
        for (ptrdiff_t k = 0; k < K; ++k) {
          const ptrdiff_t shift = (K - 1 - k) * s.dilation, head = smaller(shift, length);
          T sum = dot(gr + head, p.x + row + head - shift, length - head, reach.from(head), shift);
          if (p.history && !begins) {
            sum += dot(gr, p.history + (history_row + 1) * context - shift, smaller(head, first_end));
          }
          T& total = p.grad_weight[(c * multiplier + j) * K + k];
          total = empty ? sum : total + sum;
        }
      }
      empty = false;
    };
    for (ptrdiff_t b = 0; b < s.batch; ++b) {
      reaches.for_parts(b, 0, s.length, [&](const Segment& part, const Reach<T>& reach) { add_part(b, part, reach); });
    }
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
