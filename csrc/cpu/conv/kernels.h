// Dilated causal convolution as an implicit matrix product.
//
//   forward    y[o, t]     = sum_{c,k} W[o, c, k] x[c, t - s_k]        s_k = (K - 1 - k) * dilation
//   data       dx[c, t]    = sum_{o,k} W[o, c, k] g[o, t + s_k]        g = the gradient of conv + bias
//   weight     dW[o, c, k] = sum_{b,t} g[o, t] x[c, t - s_k]
//
// A grid is its rows one after another, so that a tap is still a shift. A tap beside the centre finds zeros where it
// would leave its row. A shift never leaves the segment of a time step: before it lies the history.
//
// All three use one register tile of kRows x kVectors vectors: rows are broadcast, columns are vectors.
//
// forward and data: rows are output channels (W in its own layout; for data, transposed once per call). Columns are the
// time steps of the flattened batch. Their operand is copied into a panel [taps of channels, columns] that stays in the
// caches. The copy shifts, pads and inserts the history; every output channel uses it, so it costs 1 / (4 channels) of
// the product.
//
// weight: rows are (c, k), read from x in place; columns are output channels, and their operand is g, transposed by
// blocks. Each thread keeps a partial sum, and the sums are added in the order of the threads: the result depends on
// the number of threads, not on timing. The backward pass runs through all of this item by item (BackwardItems).
//
// A tile of 6 x 4 with 32 registers (6 x 2 with 16) keeps 24 (12) independent sums, more than latency times throughput
// needs, and divides the usual lengths and channel counts: four vectors are 64 columns.
#pragma once

#include "cpu/base/vec.h"
#include "cpu/conv/conv.h"
#include "cpu/conv/depthwise.h"
#include "cpu/conv/depthwise_grid.h"
#include "cpu/conv/epilogue.h"
#include "cpu/conv/product.h"
#include "cpu/conv/short_backward.h"
#include "cpu/conv/weight_gradient.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// How the backward is cut: an item is the time steps [begin, end) of sequences [first, last), and its gradient of conv
// + bias, with the context after it that its data gradient sees, stays in the second-level cache from the epilogue's
// derivative through both products. Each thread takes as many items.
struct BackwardItems {
  static constexpr ptrdiff_t kElements = 64 << 10;  // of that gradient: 256 KB of floats
  static constexpr ptrdiff_t kUnit = 16;
  // An item: one of `cuts` parts of some of `sequences` sequences; it sees `beside` steps more to either side.
  ptrdiff_t batch, length, context, beside, sequences, cuts;
  BackwardItems(const ConvShape& s, ptrdiff_t threads)
      : batch(s.batch), length(s.length), context(s.context()), beside(s.beside()), sequences(1), cuts(1) {
    const ptrdiff_t columns = larger(kElements / s.out_channels, 4 * kUnit);
    if (length < columns / 2) {
      sequences = smaller(columns / length, larger(1, batch / (4 * threads)));
    }
    const ptrdiff_t shortest = larger(4 * kUnit, smaller(context, columns));
    const ptrdiff_t most = larger(1, length / shortest);
    cuts = smaller(most, ceil_div(length, columns));
    while (cuts < most && groups() * cuts < 8 * threads && groups() * cuts % threads) ++cuts;
  }
  ptrdiff_t groups() const { return ceil_div(batch, sequences); }
  ptrdiff_t count() const { return groups() * cuts; }
  ptrdiff_t first(ptrdiff_t item) const { return batch * (item / cuts) / groups(); }
  ptrdiff_t last(ptrdiff_t item) const { return batch * (item / cuts + 1) / groups(); }
  ptrdiff_t begin(ptrdiff_t item) const {
    return smaller(length, ceil_div(length, kUnit) * (item % cuts) / cuts * kUnit);
  }
  ptrdiff_t end(ptrdiff_t item) const {
    return smaller(length, ceil_div(length, kUnit) * (item % cuts + 1) / cuts * kUnit);
  }
  // Row stride of the gradient: rows an odd number of cache lines apart fall into different sets.
  ptrdiff_t stride() const {
    const ptrdiff_t n = smaller(length, ceil_div(ceil_div(length, kUnit), cuts) * kUnit + context + 2 * beside);
    return (ceil_div(n, kUnit) | 1) * kUnit;
  }
};

// Values of each part of a thread's memory, in whole lines.
template <typename T>
struct BackwardSizes {
  ptrdiff_t g, scratch, partial, bias;
  BackwardSizes(const ConvShape& s, const BackwardItems& items)
      : g(whole_lines(items.sequences * s.out_channels * items.stride() + Lanes<T>)),
        scratch(whole_lines(
            larger(product_scratch<T>(s.group_in(), s.group_out() * s.kernel_size), kWeightSteps * kColumns<T>))),
        partial(whole_lines(WeightPanels<T>(s.group_out()).size(s))),
        bias(whole_lines(s.out_channels)) {}
};

template <typename T>
bool forward(const ConvForward<T>& p) {
  const ConvShape& s = p.shape;
  if (s.depthwise()) return depthwise_forward(p);
  if (s.depthwise_grid()) return depthwise_grid_forward(p);
  const ptrdiff_t size = whole_lines(product_scratch<T>(s.group_out(), s.group_in() * s.kernel_size));
  Workspace workspace;
  T* scratch;
  Tap* taps;
  workspace.reserve(scratch, p.threads * size);
  workspace.reserve(taps, s.kernel_size);
  if (!workspace.allocate()) return false;
  for (ptrdiff_t k = 0; k < s.kernel_size; ++k) taps[k] = s.tap(k);
  const Product<T> product = {p.weight,
                              {p.x, p.history, s.in_channels, s.length, s.length, s.context()},
                              &s,
                              taps,
                              /*newest=*/s.kernel_size - 1,
                              /*first_row=*/0,
                              s.batch,
                              s.group_out(),
                              s.group_in(),
                              /*first=*/0,
                              s.length};
#pragma omp parallel num_threads(p.threads)
  {
    run_product(
        product, scratch + omp_get_thread_num() * size,
        [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) { prefetch_finish(p, channel, b, t, n); },
        [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
          finish_row(p, channel, b, t, n, acc, kColumns<T>);
        },
        is_gated(p.epilogue.activation));
  }
  return true;
}

template <typename T>
bool backward_depthwise(const ConvBackward<T>& p, bool identity, bool wants_product) {
  const ConvShape& s = p.shape;
  Workspace workspace;
  T *g, *row_sums;
  workspace.reserve(g, s.batch * s.out_channels * s.length);
  workspace.reserve(row_sums, s.batch * s.out_channels);
  if (!workspace.allocate()) return false;
  if (!identity || p.grad_bias || p.grad_residual) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
      row_sums[row] =
          differentiate_row<T>(p, row, 0, s.length, true, identity || !wants_product ? nullptr : g + row * s.length);
    }
  }
  for (ptrdiff_t o = 0; p.grad_bias && o < s.out_channels; ++o) {
    T sum = 0;
    for (ptrdiff_t b = 0; b < s.batch; ++b) sum += row_sums[b * s.out_channels + o];
    p.grad_bias[o] = sum;
  }
  if (!wants_product) return true;
  if (s.depthwise_grid()) return depthwise_grid_backward(p, identity ? p.grad_y : g);
  depthwise_backward(p, identity ? p.grad_y : g);
  return true;
}

template <typename T>
bool backward(const ConvBackward<T>& p) {
  const ConvShape& s = p.shape;
  const ptrdiff_t C = s.group_in(), O = s.group_out(), K = s.kernel_size, context = s.context(), beside = s.beside();
  const bool identity = p.epilogue.activation == Activation::none && !p.epilogue.relu && p.epilogue.dropout == 0;
  const bool wants_data = p.grad_x || p.grad_history, wants_product = wants_data || p.grad_weight;
  if (p.grad_history && s.segments) memset(p.grad_history, 0, s.history_rows * s.in_channels * context * sizeof(T));
  if (s.depthwise() || s.depthwise_grid()) return backward_depthwise(p, identity, wants_product);
  if (is_short(p)) return short_backward(p);
  const BackwardItems items(s, p.threads);
  const BackwardSizes<T> sizes(s, items);
  const ptrdiff_t stride = items.stride();
  Workspace workspace;
  T *transposed, *partials, *all_bias_sums, *scratches, *all_g;
  workspace.reserve(transposed, s.out_channels * C * K);
  workspace.reserve(partials, p.threads * sizes.partial);
  workspace.reserve(all_bias_sums, p.threads * sizes.bias);
  workspace.reserve(scratches, p.threads * sizes.scratch);
  workspace.reserve(all_g, p.threads * sizes.g);
  Tap* taps;
  workspace.reserve(taps, K);
  if (!workspace.allocate()) return false;
  for (ptrdiff_t k = 0; k < K; ++k) taps[k] = {-s.tap(k).steps, -s.tap(k).columns};
  // Segments of a row that share a row of the history add to its gradient one after another: in one thread.
  const ptrdiff_t unit = p.grad_history && s.segments && s.history_rows == s.batch ? items.cuts : 1;
  const ptrdiff_t units = items.count() / unit;

#pragma omp parallel num_threads(p.threads)
  {
    const ptrdiff_t team = omp_get_num_threads(), me = omp_get_thread_num();
    T* const partial = partials + me * sizes.partial;
    T* const bias_sums = all_bias_sums + me * sizes.bias;
    T* const scratch = scratches + me * sizes.scratch;
    T* const own_g = all_g + me * sizes.g;
    if (wants_data) {
#pragma omp for schedule(static)
      for (ptrdiff_t row = 0; row < s.in_channels; ++row) {  // [C, K, O] of the forward's [O, C, K], group by group
        const T* from = p.weight + row / C * O * C * K + row % C * K;
        T* to = transposed + row * O * K;
        for (ptrdiff_t o = 0; o < O; ++o) {
          for (ptrdiff_t k = 0; k < K; ++k) to[o * K + k] = from[o * C * K + k];
        }
      }
    }
    memset(partial, 0, sizes.partial * sizeof(T));
    memset(bias_sums, 0, sizes.bias * sizeof(T));
    for (ptrdiff_t item = units * me / team * unit; item < units * (me + 1) / team * unit; ++item) {
      const ptrdiff_t first = items.first(item), last = items.last(item);
      const ptrdiff_t begin = items.begin(item), end = items.end(item);
      const ptrdiff_t before = larger(0, begin - beside), after = smaller(s.length, end + context + beside);
      const GradientTile<T> g = identity ? GradientTile<T>{p.grad_y + first * s.out_channels * s.length, s.length}
                                         : GradientTile<T>{own_g - before, stride};
      if (!identity || p.grad_bias || p.grad_residual) {
        for (ptrdiff_t row = first * s.out_channels; row < last * s.out_channels; ++row) {
          const bool keeps = !identity && wants_product;
          T* to = own_g + (row - first * s.out_channels) * stride + begin - before;
          bias_sums[row % s.out_channels] += differentiate_row<T>(p, row, begin, end, true, keeps ? to : nullptr);
          if (!keeps || !wants_data) continue;
          differentiate_row<T>(p, row, end, after, false, to + end - begin);
          if (before < begin) differentiate_row<T>(p, row, before, begin, false, to + before - begin);
        }
      }
      if (wants_data) {
        const ptrdiff_t start = p.grad_history && begin == 0 && !s.segments ? -context : begin;
        const Product<T> product = {transposed,
                                    {g.values, nullptr, s.out_channels, s.length, g.stride, 0},
                                    &s,
                                    taps,
                                    /*newest=*/0,
                                    first,
                                    last - first,
                                    C,
                                    O,
                                    start,
                                    /*steps=*/end - start};
        const auto prepare = [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) {
          if (!p.grad_x || t < 0) return;
          const ptrdiff_t offset = ((first + b) * s.in_channels + channel) * s.length + t;
          prefetch_row<true>(p.grad_x + offset, n);
          if (p.addend) prefetch_row<false>(p.addend + offset, n);
        };
        const auto emit = [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
          const ptrdiff_t row = (first + b) * s.in_channels + channel, before = t < 0 ? smaller(n, -t) : 0;
          if (before) memcpy(p.grad_history + (row + 1) * context + t, acc, before * sizeof(T));
          if (!p.grad_x || before == n) return;
          T* to = p.grad_x + row * s.length + t;
          if (p.addend) {
            const T* add = p.addend + row * s.length + t;
            for (ptrdiff_t i = before; i < n; ++i) to[i] = acc[i] + add[i];
          } else {
            memcpy(to + before, acc + before, (n - before) * sizeof(T));
          }
        };
        const auto run_all = [&](const Product<T>& p, const auto& prepare, const auto& emit) {
          const ptrdiff_t columns = p.batch * p.steps, blocks = RowBlocks(C).count;
          for (ptrdiff_t group = 0; group < s.groups; ++group) {
            for (ptrdiff_t column = 0; column < columns; column += kColumns<T>) {
              product_tile(p, group, column, smaller(kColumns<T>, columns - column), 0, blocks, scratch, prepare, emit);
            }
          }
        };
        run_all(product, prepare, emit);
        for (ptrdiff_t b = first; p.grad_history && s.segments && b < last; ++b) {
          s.for_segments(b, begin, end, [&](const Segment& segment) {
            if (segment.begin < begin) return;
            Product<T> head = product;
            head.signal.values += (b - first) * s.out_channels * g.stride;
            head.batch = 1;
            head.first = segment.begin - context;
            head.steps = context;
            head.only = &segment;
            run_all(
                head, [](ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t) {},
                [&](ptrdiff_t channel, ptrdiff_t, ptrdiff_t t, ptrdiff_t n, const T* acc) {
                  T* to =
                      p.grad_history + (segment.history * s.in_channels + channel + 1) * context + t - segment.begin;
                  for (ptrdiff_t i = 0; i < n; ++i) to[i] += acc[i];
                });
          });
        }
      }
      if (p.grad_weight) {
        for (ptrdiff_t b = first; b < last; ++b) {
          s.for_segments(b, begin, end, [&](const Segment& segment) {
            const ptrdiff_t from = larger(begin, segment.begin), n = smaller(end, segment.end) - from;
            const ptrdiff_t parts = ceil_div(n, kWeightSteps);
            for (ptrdiff_t part = 0; part < parts; ++part) {
              add_weight_gradient(s, p.x, p.history, g, b - first, b, segment, from + n * part / parts,
                                  from + n * (part + 1) / parts, scratch, partial);
            }
          });
        }
      }
    }
#pragma omp barrier
    const auto sum_over_team = [&](const T* of_first, ptrdiff_t size) {
      T sum = 0;
      for (ptrdiff_t thread = 0; thread < team; ++thread) sum += of_first[thread * size];
      return sum;
    };
    const WeightPanels<T> panels(O);
#pragma omp for schedule(static)
    for (ptrdiff_t row = 0; row < s.out_channels; ++row) {
      if (p.grad_bias) p.grad_bias[row] = sum_over_team(all_bias_sums + row, sizes.bias);
      if (!p.grad_weight) continue;
      const ptrdiff_t group = row / O, o = row % O, column = o / kColumns<T> * kColumns<T>;
      const ptrdiff_t width = panels.width(o / kColumns<T>);
      const T* from = partials + (group * panels.padded + column) * K * C + o - column;
      for (ptrdiff_t c = 0; c < C; ++c) {
        for (ptrdiff_t k = 0; k < K; ++k) {
          p.grad_weight[(row * C + c) * K + k] = sum_over_team(from + (k * C + c) * width, sizes.partial);
        }
      }
    }
  }
  return true;
}

extern const ConvKernels conv_kernels;
const ConvKernels conv_kernels = {forward<float>, forward<double>, backward<float>, backward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::conv
