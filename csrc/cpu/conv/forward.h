// The forward pass of a causal convolution: its product or its correlations (depthwise), and what surrounds them.
#pragma once

#include "cpu/base/workspace.h"
#include "cpu/conv/depthwise_grid.h"
#include "cpu/conv/epilogue.h"
#include "cpu/conv/product.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// Whether a weight's rows of `values` values are rows of factors as they are.
template <typename W, typename S>
constexpr bool are_factors(ptrdiff_t values) {
  return sizeof(typename Factor<W>::Value) == sizeof(S) && values % Factor<W>::kValues == 0;
}

// A row of a weight as factors.
template <typename W, typename S>
inline void to_factors(const S* row, ptrdiff_t values, W* out) {
  auto* const to = reinterpret_cast<typename Factor<W>::Value*>(out);
  copy_values(row, values, to);
  if (values % Factor<W>::kValues) to[values] = {};
}

// Depthwise, of 16-bit values: a piece of a row becomes floats with the context before it.
template <typename S>
inline bool depthwise_forward_narrow(const ConvForward<S>& p) {
  typedef Compute<S> T;
  const ConvShape& s = p.shape;
  const ptrdiff_t context = s.context(), K = s.kernel_size, piece = smaller(s.length, larger(4096, context));
  const ptrdiff_t wide_size = whole_lines(context + piece), strip_size = kDepthwiseStrip + Lanes<T>;
  const ptrdiff_t size = wide_size + strip_size + whole_lines(K);
  const Signal<S> signal = {p.x, p.history, s.in_channels, s.length, s.length, context};
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
    T *const wide = scratch + omp_get_thread_num() * size, *const strip = wide + wide_size;
    T* const weight = strip + strip_size;
#pragma omp for schedule(static)
    for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
      const ptrdiff_t b = row / s.out_channels, o = row % s.out_channels, c = o / s.group_out();
      copy_values(p.weight + o * K, K, weight);
      reaches.for_parts(b, 0, s.length, [&](const Segment& part, const Reach<T>& reach) {
        for (ptrdiff_t begin = part.begin; begin < part.end; begin += piece) {
          const ptrdiff_t n = smaller(piece, part.end - begin);
          signal.copy(b, part, c, begin - context, context + n, wide);
          for (ptrdiff_t t = 0; t < n; t += kDepthwiseStrip) {
            const ptrdiff_t m = smaller(kDepthwiseStrip, n - t);
            correlate(wide + t, weight, K, s.dilation, m, reach.from(begin + t), strip);
            finish_row(p, o, b, begin + t, m, strip);
          }
        }
      });
    }
  }
  return true;
}

// W are the factors of the product, S what memory holds.
template <typename W, typename S>
bool forward(const ConvForward<S>& p) {
  const ConvShape& s = p.shape;
  if (s.depthwise()) {
    if constexpr (kNarrow<S>) {
      return depthwise_forward_narrow(p);
    } else {
      return depthwise_forward(p);
    }
  }
  if constexpr (!kNarrow<S>) {
    if (s.depthwise_grid()) return depthwise_grid_forward(p);
  }
  const ptrdiff_t values = s.group_in() * s.kernel_size, depth = ceil_div(values, Factor<W>::kValues);
  const ptrdiff_t size = whole_lines(product_scratch<W>(s.group_out(), depth));
  const bool in_place = are_factors<W, S>(values);
  Workspace workspace;
  Sum<W>* scratch;
  Tap* taps;
  W* weight;
  Reaches<Sum<W>> reaches(s, p.history);
  workspace.reserve(scratch, p.threads * size);
  workspace.reserve(taps, s.kernel_size);
  workspace.reserve(weight, in_place ? 0 : s.out_channels * depth);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  for (ptrdiff_t k = 0; k < s.kernel_size; ++k) taps[k] = s.tap(k);
  const Product<W, S> product = {in_place ? reinterpret_cast<const W*>(p.weight) : weight,
                                 {p.x, p.history, s.in_channels, s.length, s.length, s.context()},
                                 &s,
                                 taps,
                                 /*newest=*/s.kernel_size - 1,
                                 /*first_row=*/0,
                                 s.batch,
                                 s.group_out(),
                                 s.group_in(),
                                 /*first=*/0,
                                 s.length,
                                 /*only=*/nullptr,
                                 &reaches};
#pragma omp parallel num_threads(p.threads)
  {
    reaches.fill();
    if (!in_place) {
#pragma omp for schedule(static)
      for (ptrdiff_t o = 0; o < s.out_channels; ++o) to_factors(p.weight + o * values, values, weight + o * depth);
    }
    run_product(
        product, scratch + omp_get_thread_num() * size,
        [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) { prefetch_finish(p, channel, b, t, n); },
        [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const Sum<W>* acc) {
          finish_row(p, channel, b, t, n, acc, kColumns<W>);
        },
        is_gated(p.epilogue.activation));
  }
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
