// Depthwise causal convolution of a grid. A plane is copied with zeros around it: the rows of context above (for the
// gradient of x, below) and `beside` columns after each row, which also lie before the next one. Then each tap is a
// shift of the whole plane, and the loops are those of a sequence. Rows with a tap beyond their segment are calculated
// one by one, with the last taps alone.
#pragma once

#include "cpu/conv/depthwise.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// out[i] (+)= sum_k w[k] * x[i + at[k]], i < n. out and x have room for whole vectors; those of out past n are written,
// unless it accumulates.
template <typename T>
inline void correlate_at(const T* x, const T* w, const ptrdiff_t* at, ptrdiff_t taps, ptrdiff_t n, T* out,
                         bool accumulate) {
  constexpr int NV = 4;
  constexpr ptrdiff_t L = Lanes<T>;
  for (ptrdiff_t i = 0; i < n; i += NV * L) {
    Vec<T> acc[NV] = {};
    for (ptrdiff_t k = 0; k < taps; ++k) {
      const Vec<T> wk = broadcast(w[k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[v] += wk * load(x + i + at[k] + v * L);
    }
    if (accumulate && i + NV * L > n) {
      for (int v = 0; i + v * L < n; ++v) {
        const int m = int(smaller(L, n - i - v * L));
        store_some(out + i + v * L, load(out + i + v * L) + acc[v], m);
      }
      return;
    }
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + i + v * L, accumulate ? load(out + i + v * L) + acc[v] : acc[v]);
  }
}

// The taps that meet the plane, and the layout of its copies.
struct GridPlane {
  ptrdiff_t rows, width, context, beside, pitch, taps;

  explicit GridPlane(const ConvShape& s)
      : rows(s.length / s.width),
        width(s.width),
        context(s.context() / s.width),
        beside(s.beside()),
        pitch(width + beside),
        taps(0) {
    for (ptrdiff_t k = 0; k < s.kernel_size; ++k) taps += meets(s.tap(k));
  }
  bool meets(const Tap& tap) const { return tap.columns < width && tap.columns > -width; }
  // Rows between two epilogues, and values of a copy of `rows` rows, of which the first one's columns begin at
  // `beside`.
  ptrdiff_t strip() const { return smaller(rows, larger(1, kDepthwiseStrip / pitch)); }
  template <typename T>
  ptrdiff_t size(ptrdiff_t of_rows) const {
    return whole_lines(beside + of_rows * pitch + 8 * Lanes<T>);
  }
  // Where tap k of the present reads a copy that begins `context` rows before.
  ptrdiff_t at(const Tap& tap) const {
    return beside + context * pitch + (tap.steps - tap.columns) / width * pitch + tap.columns;
  }
  // The context before row b of the batch.
  template <typename T>
  void copy_history(const ConvShape& s, const T* history, ptrdiff_t b, ptrdiff_t c, T* to) const {
    const Segment row = s.row(b);
    if (row.history == kZeros) return clear(to, beside + context * pitch);
    copy(history + (row.history * s.in_channels + c) * s.context(), context, to);
  }
  // Copies rows of a plane, of which the pads stay as they are.
  template <typename T>
  void copy(const T* from, ptrdiff_t count, T* to) const {
    for (ptrdiff_t r = 0; r < count; ++r) copy_values(from + r * width, width, to + beside + r * pitch);
  }
};

// Taps of the plane: their numbers, the shifts that the output and the gradient of x need, and how many time steps
// their rows lie apart.
struct GridTaps {
  ptrdiff_t *number, *forward, *backward, *steps;
  void fill(const ConvShape& s, const GridPlane& plane) const {
    ptrdiff_t i = 0;
    for (ptrdiff_t k = 0; k < s.kernel_size; ++k) {
      const Tap tap = s.tap(k);
      if (!plane.meets(tap)) continue;
      number[i] = k;
      steps[i] = tap.columns - tap.steps;
      forward[i] = plane.at(tap);
      backward[i++] = plane.beside - (tap.steps - tap.columns) / plane.width * plane.pitch - tap.columns;
    }
  }
};

// rows(first row, count, first tap) for the rows of a plane from `begin` on, in order and at most `strip` at once. Rows
// before the plane see its first segment.
template <typename T, typename F>
inline void for_strips(const GridPlane& plane, const GridTaps& taps, const Reach<T>& reach, bool forward,
                       ptrdiff_t begin, ptrdiff_t strip, const F& rows) {
  const auto* const counts = forward ? reach.before : reach.after;
  const ptrdiff_t furthest = plane.context * plane.width;
  for (ptrdiff_t r = begin; r < plane.rows;) {
    const ptrdiff_t count = smaller(strip, plane.rows - r), t = r * plane.width, n = count * plane.width;
    const auto all_hold = [&] {
      return forward ? reach.holds_before(t, n, furthest) : reach.holds_after(t, n, furthest);
    };
    if (!counts || (r >= 0 && all_hold())) {
      rows(r, count, 0);
      r += count;
      continue;
    }
    const ptrdiff_t last = plane.width - 1, near = forward ? counts[t] : r < 0 ? counts[last] - t : counts[t + last];
    ptrdiff_t first = 0;
    while (first < plane.taps && taps.steps[first] > near) ++first;
    rows(r++, 1, first);
  }
}

template <typename T>
inline void gather_weight(const T* weight, const GridTaps& taps, ptrdiff_t count, T* out) {
  for (ptrdiff_t i = 0; i < count; ++i) out[i] = weight[taps.number[i]];
}

template <typename T>
inline bool depthwise_grid_forward(const ConvForward<T>& p) {
  const ConvShape& s = p.shape;
  const GridPlane plane(s);
  const ptrdiff_t padded = plane.size<T>(plane.context + plane.rows), strip = plane.size<T>(plane.strip());
  const ptrdiff_t weights = whole_lines(s.kernel_size), size = padded + strip + weights;
  Workspace workspace;
  T* scratch;
  GridTaps taps;
  Reaches<T> reaches(s, p.history);
  workspace.reserve(scratch, p.threads * size);
  workspace.reserve(taps.number, s.kernel_size);
  workspace.reserve(taps.forward, s.kernel_size);
  workspace.reserve(taps.backward, s.kernel_size);
  workspace.reserve(taps.steps, s.kernel_size);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  taps.fill(s, plane);
#pragma omp parallel num_threads(p.threads)
  {
    T* const x = scratch + omp_get_thread_num() * size;
    T *const out = x + padded, *const w = out + strip;
    reaches.fill();
    clear(x, padded);
#pragma omp for schedule(static)
    for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
      const ptrdiff_t b = row / s.out_channels, o = row % s.out_channels, in = b * s.in_channels + o / s.group_out();
      gather_weight(p.weight + o * s.kernel_size, taps, plane.taps, w);
      if (p.history) plane.copy_history(s, p.history, b, o / s.group_out(), x);
      plane.copy(p.x + in * s.length, plane.rows, x + plane.context * plane.pitch);
      for_strips(plane, taps, reaches.of(b), true, 0, plane.strip(),
                 [&](ptrdiff_t r, ptrdiff_t count, ptrdiff_t first) {
                   correlate_at(x + r * plane.pitch, w + first, taps.forward + first, plane.taps - first,
                                (count - 1) * plane.pitch + plane.width, out, false);
                   for (ptrdiff_t i = 0; i < count; ++i) {
                     finish_row(p, o, b, (r + i) * plane.width, plane.width, out + i * plane.pitch);
                   }
                 });
    }
  }
  return true;
}

// As depthwise_backward; a thread owns its channels over the whole batch.
template <typename T>
inline bool depthwise_grid_backward(const ConvBackward<T>& p, const T* g) {
  const ConvShape& s = p.shape;
  const GridPlane plane(s);
  const ptrdiff_t front = p.grad_history ? plane.context : 0, multiplier = s.group_out();
  const ptrdiff_t padded = plane.size<T>(plane.context + plane.rows);
  const ptrdiff_t outer = plane.size<T>(front + plane.rows + plane.context), sums = plane.size<T>(front + plane.rows);
  const ptrdiff_t weights = whole_lines(s.kernel_size), size = padded + outer + sums + weights;
  Workspace workspace;
  T* scratch;
  GridTaps taps;
  Reaches<T> reaches(s, p.history || p.grad_history);
  workspace.reserve(scratch, p.threads * size);
  workspace.reserve(taps.number, s.kernel_size);
  workspace.reserve(taps.forward, s.kernel_size);
  workspace.reserve(taps.backward, s.kernel_size);
  workspace.reserve(taps.steps, s.kernel_size);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  taps.fill(s, plane);
#pragma omp parallel num_threads(p.threads)
  {
    T* const x = scratch + omp_get_thread_num() * size;
    T *const gradient = x + padded, *const sum = gradient + outer, *const w = sum + sums;
    reaches.fill();
    clear(x, padded);
    clear(gradient, outer);
#pragma omp for schedule(static)
    for (ptrdiff_t c = 0; c < s.in_channels; ++c) {
      T* const of_weight = p.grad_weight ? p.grad_weight + c * multiplier * s.kernel_size : nullptr;
      if (of_weight) clear(of_weight, multiplier * s.kernel_size);
      for (ptrdiff_t b = 0; b < s.batch; ++b) {
        const ptrdiff_t in = b * s.in_channels + c;
        const Reach<T> reach = reaches.of(b);
        const bool from_history = p.grad_history && s.row(b).history != kZeros;
        if (of_weight) {
          if (p.history) plane.copy_history(s, p.history, b, c, x);
          plane.copy(p.x + in * s.length, plane.rows, x + plane.context * plane.pitch);
        }
        for (ptrdiff_t j = 0; j < multiplier; ++j) {
          const ptrdiff_t o = c * multiplier + j;
          const T* const own = g + (b * s.out_channels + o) * s.length;
          for (ptrdiff_t i = 0; of_weight && i < plane.taps; ++i) {
            T total = 0;
            for (ptrdiff_t r = 0; r < plane.rows; ++r) {
              if (reach.before && reach.before[r * plane.width] < taps.steps[i]) continue;
              total += dot(own + r * plane.width, x + r * plane.pitch + taps.forward[i], plane.width);
            }
            of_weight[j * s.kernel_size + taps.number[i]] += total;
          }
          if (!p.grad_x && !p.grad_history) continue;
          gather_weight(p.weight + o * s.kernel_size, taps, plane.taps, w);
          plane.copy(own, plane.rows, gradient + front * plane.pitch);
          const ptrdiff_t strip = reach.after ? plane.strip() : front + plane.rows;
          for_strips(plane, taps, reach, false, -front, strip, [&](ptrdiff_t r, ptrdiff_t count, ptrdiff_t first) {
            correlate_at(gradient + (front + r) * plane.pitch, w + first, taps.backward + first, plane.taps - first,
                         (count - 1) * plane.pitch + plane.width, sum + (front + r) * plane.pitch, j > 0);
          });
        }
        for (ptrdiff_t r = 0; from_history && r < plane.context; ++r) {
          copy_values(sum + r * plane.pitch, plane.width, p.grad_history + in * s.context() + r * plane.width);
        }
        for (ptrdiff_t r = 0; p.grad_x && r < plane.rows; ++r) {
          copy_values(sum + (front + r) * plane.pitch, plane.width, p.grad_x + in * s.length + r * plane.width);
        }
      }
    }
  }
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
