// The backward pass of a causal convolution (kernels.h).
#pragma once

#include "cpu/conv/forward.h"
#include "cpu/conv/short_backward.h"
#include "cpu/conv/weight_gradient.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// to[i] = from[i] + add[i]; add may be null or `to`.
template <typename T, typename S>
SEQACCEL_INLINE void put_values(const T* from, ptrdiff_t n, S* to, const S* add = nullptr) {
  for (ptrdiff_t i = 0; i < n; i += Lanes<T>) {
    const int m = int(smaller(Lanes<T>, n - i));
    const Vec<T> value = load_some(from + i, m);
    store_some_narrow(to + i, add ? value + load_some_wide(add + i, m) : value, m);
  }
}

template <typename T, typename S>
SEQACCEL_INLINE void put_value(T value, S* to) {
  if constexpr (kNarrow<S>) {
    store_narrow(to, broadcast(value), 1);
  } else {
    *to = value;
  }
}

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

// Factors of a row of the transposed weight, [C, O * K].
template <typename W>
ptrdiff_t transposed_depth(const ConvShape& s) {
  return ceil_div(s.group_out() * s.kernel_size, Factor<W>::kValues);
}

// Values of each part of a thread's memory, in whole lines.
template <typename W>
struct BackwardSizes {
  ptrdiff_t g, scratch, partial, bias;
  BackwardSizes(const ConvShape& s, const BackwardItems& items)
      : g(whole_lines(items.sequences * s.out_channels * items.stride() + Lanes<W>)),
        scratch(
            whole_lines(larger(product_scratch<W>(s.group_in(), transposed_depth<W>(s)), kWeightSteps * kColumns<W>))),
        partial(whole_lines(WeightPanels<W>(s.group_out()).size(s))),
        bias(whole_lines(s.out_channels)) {}
};

template <typename T>
bool backward_depthwise(const ConvBackward<T>& p, bool identity, bool wants_product) {
  const ConvShape& s = p.shape;
  Workspace workspace;
  T *g, *row_sums;
  workspace.reserve(g, s.batch * s.out_channels * s.length);
  workspace.reserve(row_sums, s.batch * s.out_channels);
  Reaches<T> reaches(s, p.history || p.grad_history);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  if (!identity || p.grad_bias || p.grad_residual) {
#pragma omp parallel for schedule(static) num_threads(p.threads)
    for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
      row_sums[row] =
          differentiate_row(p, row, 0, s.length, true, identity || !wants_product ? nullptr : g + row * s.length);
    }
  }
  for (ptrdiff_t o = 0; p.grad_bias && o < s.out_channels; ++o) {
    T sum = 0;
    for (ptrdiff_t b = 0; b < s.batch; ++b) sum += row_sums[b * s.out_channels + o];
    p.grad_bias[o] = sum;
  }
  if (!wants_product) return true;
  if (s.depthwise_grid()) return depthwise_grid_backward(p, identity ? p.grad_y : g);
#pragma omp parallel num_threads(p.threads)
  {
    reaches.fill();
    depthwise_backward(p, identity ? p.grad_y : g, reaches);
  }
  return true;
}

// W are the factors of the products, S what memory holds.
template <typename W, typename S>
bool backward(const ConvBackward<S>& p) {
  typedef Sum<W> T;
  typedef typename Factor<W>::Value G;  // of the gradient of conv + bias
  const ConvShape& s = p.shape;
  const ptrdiff_t C = s.group_in(), O = s.group_out(), K = s.kernel_size, context = s.context(), beside = s.beside();
  const bool identity = p.epilogue.activation == Activation::none && !p.epilogue.relu && p.epilogue.dropout == 0;
  const bool wants_data = p.grad_x || p.grad_history, wants_product = wants_data || p.grad_weight;
  if (p.grad_history && s.segments) memset(p.grad_history, 0, s.history_rows * s.in_channels * context * sizeof(S));
  if constexpr (!kNarrow<S>) {
    if (s.depthwise() || s.depthwise_grid()) return backward_depthwise(p, identity, wants_product);
    if (is_short(p)) return short_backward(p);
  }
  const bool in_place = identity && sizeof(G) == sizeof(S);
  const BackwardItems items(s, p.threads);
  const BackwardSizes<W> sizes(s, items);
  const ptrdiff_t transposed_row = transposed_depth<W>(s);
  const ptrdiff_t stride = items.stride();
  Workspace workspace;
  W* transposed;
  T *partials, *all_bias_sums, *scratches;
  G* all_g;
  workspace.reserve(transposed, s.in_channels * transposed_row);
  workspace.reserve(partials, p.threads * sizes.partial);
  workspace.reserve(all_bias_sums, p.threads * sizes.bias);
  workspace.reserve(scratches, p.threads * sizes.scratch);
  workspace.reserve(all_g, p.threads * sizes.g);
  Tap* taps;
  workspace.reserve(taps, K);
  Reaches<T> reaches(s, p.history || p.grad_history);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  for (ptrdiff_t k = 0; k < K; ++k) taps[k] = {-s.tap(k).steps, -s.tap(k).columns};

#pragma omp parallel num_threads(p.threads)
  {
    const ptrdiff_t team = omp_get_num_threads(), me = omp_get_thread_num();
    T* const partial = partials + me * sizes.partial;
    T* const bias_sums = all_bias_sums + me * sizes.bias;
    T* const scratch = scratches + me * sizes.scratch;
    G* const own_g = all_g + me * sizes.g;
    reaches.fill();
    if (wants_data) {
#pragma omp for schedule(static)
      for (ptrdiff_t first = 0; first < s.in_channels;
           first += BackwardItems::kUnit) {  // [C, O, K] of the forward's [O, C, K]
        const ptrdiff_t last = smaller(first + BackwardItems::kUnit, s.in_channels);
        for (ptrdiff_t o = 0; o < O; ++o) {  // lines of the weight are read once
          for (ptrdiff_t row = first; row < last; ++row) {
            const S* from = p.weight + ((row / C * O + o) * C + row % C) * K;
            copy_values(from, K, reinterpret_cast<G*>(transposed + row * transposed_row) + o * K);
          }
        }
        for (ptrdiff_t row = first; row < last; ++row) {
          clear(reinterpret_cast<G*>(transposed + row * transposed_row) + O * K,
                transposed_row * Factor<W>::kValues - O * K);
        }
      }
    }
    memset(partial, 0, sizes.partial * sizeof(T));
    memset(bias_sums, 0, sizes.bias * sizeof(T));
    for (ptrdiff_t item = items.count() * me / team; item < items.count() * (me + 1) / team; ++item) {
      const ptrdiff_t first = items.first(item), last = items.last(item);
      const ptrdiff_t begin = items.begin(item), end = items.end(item);
      const ptrdiff_t before = larger(0, begin - beside), after = smaller(s.length, end + context + beside);
      GradientTile<G> g = {own_g - before, stride};
      if constexpr (sizeof(G) == sizeof(S)) {
        if (in_place) g = {p.grad_y + first * s.out_channels * s.length, s.length};
      }
      if (!in_place || p.grad_bias || p.grad_residual) {
        for (ptrdiff_t row = first * s.out_channels; row < last * s.out_channels; ++row) {
          const bool keeps = !in_place && wants_product;
          G* to = own_g + (row - first * s.out_channels) * stride + begin - before;
          bias_sums[row % s.out_channels] += differentiate_row(p, row, begin, end, true, keeps ? to : nullptr);
          if (!keeps || !wants_data) continue;
          differentiate_row(p, row, end, after, false, to + end - begin);
          if (before < begin) differentiate_row(p, row, before, begin, false, to + before - begin);
        }
      }
      if (wants_data) {
        const ptrdiff_t start = p.grad_history && begin == 0 && !s.segments ? -context : begin;
        const Product<W, G> product = {transposed,
                                       {g.values, nullptr, s.out_channels, s.length, g.stride, 0},
                                       &s,
                                       taps,
                                       /*newest=*/0,
                                       first,
                                       last - first,
                                       C,
                                       O,
                                       start,
                                       /*steps=*/end - start,
                                       /*only=*/nullptr,
                                       &reaches,
                                       /*forward=*/false};
        const auto prepare = [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) {
          if (!p.grad_x || t < 0) return;
          const ptrdiff_t offset = ((first + b) * s.in_channels + channel) * s.length + t;
          prefetch_row<true>(p.grad_x + offset, n);
          if (p.addend) prefetch_row<false>(p.addend + offset, n);
        };
        const auto emit = [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
          const ptrdiff_t row = (first + b) * s.in_channels + channel, before = t < 0 ? smaller(n, -t) : 0;
          if (before) put_values(acc, before, p.grad_history + (row + 1) * context + t);
          if (!p.grad_x || before == n) return;
          const ptrdiff_t at = row * s.length + t + before;
          put_values(acc + before, n - before, p.grad_x + at, p.addend ? p.addend + at : nullptr);
        };
        const auto run_all = [&](const Product<W, G>& p, const auto& prepare, const auto& emit) {
          const ptrdiff_t columns = p.batch * p.steps, width = p.tile(), blocks = RowBlocks(C).count;
          for (ptrdiff_t group = 0; group < s.groups; ++group) {
            for (ptrdiff_t column = 0; column < columns; column += width) {
              product_tile(p, group, column, smaller(width, columns - column), 0, blocks, scratch, prepare, emit);
            }
          }
        };
        run_all(product, prepare, emit);
        for (ptrdiff_t b = first; p.grad_history && s.segments && b < last; ++b) {
          s.for_segments(b, begin, end, [&](const Segment& segment) {
            if (segment.begin < begin || segment.history == kZeros) return;
            Product<W, G> head = product;
            head.signal.values += (b - first) * s.out_channels * g.stride;
            head.batch = 1;
            head.first = segment.begin - context;
            head.steps = context;
            head.only = &segment;
            run_all(
                head, [](ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t) {},
                [&](ptrdiff_t channel, ptrdiff_t, ptrdiff_t t, ptrdiff_t n, const T* acc) {
                  const ptrdiff_t row = segment.history * s.in_channels + channel;
                  put_values(acc, n, p.grad_history + (row + 1) * context + t - segment.begin);
                });
          });
        }
      }
      if (p.grad_weight) {
        for (ptrdiff_t b = first; b < last; ++b) {
          reaches.for_parts(b, begin, end, [&](const Segment& segment, const Reach<T>& reach) {
            const ptrdiff_t from = larger(begin, segment.begin), n = smaller(end, segment.end) - from;
            const ptrdiff_t parts = ceil_div(n, kWeightSteps * Factor<W>::kValues);
            for (ptrdiff_t part = 0; part < parts; ++part) {
              add_weight_gradient(s, p.x, p.history, g, b - first, b, segment, reach, from + n * part / parts,
                                  from + n * (part + 1) / parts, reinterpret_cast<W*>(scratch), partial);
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
#pragma omp for schedule(static) nowait
    for (ptrdiff_t row = 0; row < s.out_channels; ++row) {
      if (p.grad_bias) put_value(sum_over_team(all_bias_sums + row, sizes.bias), p.grad_bias + row);
    }
    if (p.grad_weight) {  // squares of the panels, [K, C, O] each, to [O, C, K]
      constexpr ptrdiff_t L = Lanes<T>;
      const WeightPanels<W> panels(O);
      const ptrdiff_t strips = panels.padded / L;
#pragma omp for schedule(static)
      for (ptrdiff_t strip = 0; strip < s.groups * strips; ++strip) {
        const ptrdiff_t group = strip / strips, o = strip % strips * L, panel = o / kColumns<W>;
        const ptrdiff_t width = panels.width(panel), rows = smaller(L, O - o);
        const T* from = partials + (group * panels.padded + panel * kColumns<W>)*K * C + o % kColumns<W>;
        for (ptrdiff_t j = 0; j < C * K; j += L) {
          Vec<T> square[L] = {};
          const ptrdiff_t n = smaller(L, C * K - j);
          ptrdiff_t c = j / K, k = j % K;
          for (ptrdiff_t i = 0; i < n; ++i) {
            const T* at = from + (k * C + c) * width;
            for (ptrdiff_t thread = 0; thread < team; ++thread) square[i] += load(at + thread * sizes.partial);
            if (++k == K) k = 0, ++c;
          }
          transpose_square<T>(square);
          for (ptrdiff_t i = 0; i < rows; ++i) {
            store_some_narrow(p.grad_weight + (group * O + o + i) * C * K + j, square[i], int(n));
          }
        }
      }
    }
  }
  return true;
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
