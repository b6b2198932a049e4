// The weight gradient of a dense causal convolution, tile by tile (kernels.h says which product).
#pragma once

#include "cpu/conv/epilogue.h"
#include "cpu/conv/product.h"

namespace seqaccel::SEQACCEL_ISA::conv {

constexpr ptrdiff_t kWeightSteps = 96;  // time steps a weight-gradient tile runs over

// In-register transposition of a square of vectors: after the stage of distance h, lane l of r[i] is what lane l ^ h of
// r[i ^ h] was where bit h of i and l differ.
template <typename T>
SEQACCEL_INLINE void transpose_square(Vec<T> (&r)[Lanes<T>]) {
  constexpr int L = Lanes<T>;
#pragma GCC unroll 8
  for (int h = 1; h < L; h *= 2) {
    Mask<T> low, high;
    for (int l = 0; l < L; ++l) {
      low[l] = l & h ? L + l - h : l;
      high[l] = l & h ? L + l : l + h;
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i & h) continue;
      const Vec<T> a = r[i], b = r[i + h];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + h] = __builtin_shuffle(a, b, high);
    }
  }
}

// out[t, j] = rows[j * stride + t], t < steps, j < width; rows past `count` repeat the last (their sums are not used).
template <typename T>
inline void transpose_panel(const T* rows, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t steps, ptrdiff_t width,
                            T* out) {
  constexpr ptrdiff_t L = Lanes<T>;
  for (ptrdiff_t t = 0; t < steps; t += L) {
    const int m = int(smaller(L, steps - t));
    for (ptrdiff_t j = 0; j < width; j += L) {
      Vec<T> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const T* from = rows + smaller(j + i, count - 1) * stride + t;
        square[i] = m == L ? load(from) : load(from, m);
      }
      transpose_square<T>(square);
      if (m == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(out + (t + i) * width + j, square[i]);
      } else {
        for (int i = 0; i < m; ++i) store(out + (t + i) * width + j, square[i]);
      }
    }
  }
}

#if defined(SEQACCEL_ISA_AVX512_BF16)
// The same of pairs of time steps; a zero fills up the last one.
inline void transpose_panel(const BFloat16* rows, ptrdiff_t stride, ptrdiff_t count, ptrdiff_t steps, ptrdiff_t width,
                            Pair* out) {
  constexpr ptrdiff_t L = Lanes<Pair>;
  for (ptrdiff_t t = 0; t < steps; t += 2 * L) {
    const ptrdiff_t m = smaller(2 * L, steps - t), pairs = (m + 1) / 2;
    for (ptrdiff_t j = 0; j < width; j += L) {
      Vec<float> square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        BFloat16 values[2 * L] = {};
        copy_values(rows + smaller(j + i, count - 1) * stride + t, m, values);
        square[i] = load_factors(reinterpret_cast<const Pair*>(values));
      }
      transpose_square<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (i < pairs) store(reinterpret_cast<float*>(out + (t / 2 + i) * width + j), square[i]);
      }
    }
  }
}
#endif

// The layout of a thread's partial weight gradient is [group, panel, tap, input channel, output channel of the panel].
template <typename T>
struct WeightPanels {
  ptrdiff_t outputs, count, padded;
  explicit WeightPanels(ptrdiff_t group_out)
      : outputs(group_out), count(ceil_div(group_out, kColumns<T>)), padded(ceil_div(group_out, Lanes<T>) * Lanes<T>) {}
  ptrdiff_t width(ptrdiff_t panel) const { return smaller(kColumns<T>, padded - panel * kColumns<T>); }
  ptrdiff_t size(const ConvShape& s) const { return s.groups * s.kernel_size * s.group_in() * padded; }
};

// The gradient of conv + bias of some sequences over a range of time: element (sequence b, channel, t) is
// values[(b * channels + channel) * stride + t].
template <typename G>
struct GradientTile {
  const G* values;
  ptrdiff_t stride;
};

// Adds what time steps [begin, end) of a segment of sequence b, which g numbers `own`, give to the weight gradient.
// Rows of x of 16-bit values are copied as factors, a tile at a time, which costs 1 / (16 kVectors) of the product.
template <typename W, typename S>
inline void add_weight_gradient(const ConvShape& s, const S* x, const S* history,
                                const GradientTile<typename Factor<W>::Value>& g, ptrdiff_t own, ptrdiff_t b,
                                const Segment& segment, const Reach<Sum<W>>& reach, ptrdiff_t begin, ptrdiff_t end,
                                W* panel, Sum<W>* partial) {
  const ptrdiff_t C = s.group_in(), O = s.group_out(), K = s.kernel_size, context = s.context();
  const WeightPanels<W> panels(O);
  const RowBlocks blocks(C);
  const Reach<Sum<W>> own_reach =
      reach.holds_before(begin, end - begin, context + s.beside()) ? Reach<Sum<W>>() : reach;
  for (ptrdiff_t group = 0; group < s.groups; ++group) {
    const S* xg = x + (b * s.in_channels + group * C) * s.length;
    const S* hg = history && segment.history != kZeros
                      ? history + (segment.history * s.in_channels + group * C) * context
                      : nullptr;
    for (ptrdiff_t j = 0; j < panels.count; ++j) {
      const ptrdiff_t width = panels.width(j), first = j * kColumns<W>;
      transpose_panel(g.values + (own * s.out_channels + group * O + first) * g.stride + begin, g.stride, O - first,
                      end - begin, width, panel);
      Sum<W>* sums = partial + (group * panels.padded + first) * K * C;
      for (ptrdiff_t block = 0; block < blocks.count; ++block) {
        const ptrdiff_t c = blocks.begin(block), rows = blocks.begin(block + 1) - c;
        const ptrdiff_t next = block + 1 < blocks.count ? blocks.begin(block + 2) : c + rows;
        for (ptrdiff_t i = c + rows; i < next; ++i) prefetch_row<false>(xg + i * s.length + begin, end - begin);
        const Multiply<W> multiply = multiply_tile<W>(rows, width / Lanes<W>);
        for (ptrdiff_t k = 0; k < K; ++k) {
          const Tap tap = s.tap(k);
          Sum<W>* to = sums + (k * C + c) * width;
          if constexpr (kNarrow<S>) {
            typedef typename Factor<W>::Value Value;
            constexpr ptrdiff_t kValues = Factor<W>::kValues, kStride = kWeightSteps * kValues;
            const Signal<S> signal = {x, history, s.in_channels, s.length, s.length, context};
            const ptrdiff_t steps = end - begin, depth = ceil_div(steps, kValues);
            alignas(64) Value copies[kRows * kStride];
            for (ptrdiff_t i = 0; i < rows; ++i) {
              Value* const row = copies + i * kStride;
              signal.copy(b, segment, group * C + c + i, begin + tap.steps, steps, row);
              if (own_reach.before) clear_beyond(own_reach.before + begin, -tap.steps, steps, row);
              clear(row + steps, depth * kValues - steps);
            }
            multiply(reinterpret_cast<const W*>(copies), kStride / kValues, panel, depth, to, width, true);
            continue;
          } else {
            const auto add = [&](ptrdiff_t t, ptrdiff_t until) {
              // x from `middle` to `last`, the history before
              const ptrdiff_t middle = smaller(larger(t, segment.begin + tap.columns - tap.steps), until);
              const ptrdiff_t last = smaller(until, segment.end + tap.columns - tap.steps);
              if (middle < last) {
                multiply(xg + c * s.length + middle + tap.steps, s.length, panel + (middle - begin) * width,
                         last - middle, to, width, true);
              }
              if (hg && t < middle) {
                multiply(hg + c * context + context + t - segment.begin + tap.steps, context,
                         panel + (t - begin) * width, middle - t, to, width, true);
              }
            };
            if (tap.columns == 0) {
              for_reaching(own_reach, -tap.steps, begin, end, add);
              continue;
            }
            for (ptrdiff_t row = begin / s.width * s.width; row < end; row += s.width) {  // of the grid
              const ptrdiff_t t = larger(begin, row + larger(0, -tap.columns));
              const ptrdiff_t until = smaller(end, row + s.width - larger(0, tap.columns));
              if (t < until && own_reach.holds_before(t, until - t, -tap.steps)) add(t, until);
            }
          }
        }
      }
    }
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
