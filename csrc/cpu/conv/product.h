// The product of a dense causal convolution: a matrix times shifted rows of a signal (kernels.h says which).
#pragma once

#include "cpu/base/factors.h"
#include "cpu/conv/reach.h"

namespace seqaccel::SEQACCEL_ISA::conv {

constexpr int kRows = 6;
constexpr int kVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;
template <typename T>
constexpr ptrdiff_t kColumns = kVectors * Lanes<T>;
constexpr ptrdiff_t kDepth = 256;              // rows of a panel: 64 KB, a sixteenth of the second-level cache
constexpr ptrdiff_t kSecondLevel = 256 << 10;  // bytes of A that stay in the second-level cache beside the rest
constexpr ptrdiff_t kFewColumns =
    8;  // up to here columns are dot products with the weight's rows, and nothing is packed

inline ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
inline ptrdiff_t whole_lines(ptrdiff_t values) { return ceil_div(values, 16) * 16; }  // of memory, 64 bytes each
inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
inline ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

// out[MR, NV vectors] (+)= A[MR, depth] * panel[depth, NV vectors]. A sum of n terms in one register is off by about
// sqrt(n) roundings; it goes to memory every kFlush factors.
template <typename W, int MR, int NV>
void multiply(const W* a, ptrdiff_t a_stride, const W* panel, ptrdiff_t depth, Sum<W>* out, ptrdiff_t out_stride,
              bool accumulate) {
  typedef Sum<W> T;
  constexpr ptrdiff_t kValues = Factor<W>::kValues;
  const auto* const values = reinterpret_cast<const FactorValue<W>*>(a);
  const ptrdiff_t blocks = larger(1, ceil_div(depth, Factor<W>::kFlush));
  for (ptrdiff_t block = 0; block < blocks; ++block) {
    const ptrdiff_t k = depth * block / blocks, n = depth * (block + 1) / blocks - k;
    Vec<T> acc[MR][NV] = {};
    add_factors<W, MR, NV>(acc, values + k * kValues, a_stride * kValues, kValues, panel + k * NV * Lanes<T>,
                           NV * Lanes<T>, n);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = out + m * out_stride + v * Lanes<T>;
        store(to, accumulate || block ? load(to) + acc[m][v] : acc[m][v]);
      }
    }
  }
}

template <typename W>
using Multiply = void (*)(const W*, ptrdiff_t, const W*, ptrdiff_t, Sum<W>*, ptrdiff_t, bool);

template <typename W, int NV>
SEQACCEL_INLINE Multiply<W> multiply_rows(ptrdiff_t rows) {
  constexpr Multiply<W> table[kRows] = {multiply<W, 1, NV>, multiply<W, 2, NV>, multiply<W, 3, NV>,
                                        multiply<W, 4, NV>, multiply<W, 5, NV>, multiply<W, 6, NV>};
  return table[rows - 1];
}

template <typename W>
SEQACCEL_INLINE Multiply<W> multiply_tile(ptrdiff_t rows, ptrdiff_t vectors) {
  if (vectors == 1) return multiply_rows<W, 1>(rows);
  if (vectors == 2) return multiply_rows<W, 2>(rows);
  if constexpr (kVectors > 2) {
    if (vectors == 3) return multiply_rows<W, 3>(rows);
    return multiply_rows<W, 4>(rows);
  }
  __builtin_unreachable();
}

// The same where the panel's rows are shifted parts of windows, one window for each of `channels` channels: tap k of a
// channel reads its window from `first` + k * step on. kMasked: zeros where `inside` is not set.
template <typename T>
struct Windows {
  const T* values;
  ptrdiff_t width, channels, taps, first, step;
  const Mask<T>* inside;  // [taps, kVectors]
};

constexpr ptrdiff_t kMaskedTaps = 16;  // have room for their masks

template <typename T, int MR, int NV, bool kMasked>
void multiply_windows(const T* a, ptrdiff_t a_stride, const Windows<T>& w, T* out, ptrdiff_t out_stride,
                      bool accumulate) {
  const ptrdiff_t blocks = larger(1, ceil_div(w.channels * w.taps, Factor<T>::kFlush));
  for (ptrdiff_t block = 0; block < blocks; ++block) {
    Vec<T> acc[MR][NV] = {};
    for (ptrdiff_t c = w.channels * block / blocks; c < w.channels * (block + 1) / blocks; ++c) {
      const T *const own = a + c * w.taps, *const window = w.values + c * w.width + w.first;
      if constexpr (!kMasked) {
        add_products<T, MR, NV>(acc, own, a_stride, 1, window, w.step, w.taps);
        continue;
      }
      for (ptrdiff_t k = 0; k < w.taps; ++k) {  // add_products, masked
        Vec<T> row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          row[v] = zero_unless<T>(w.inside[k * kVectors + v], load(window + k * w.step + v * Lanes<T>));
        }
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const Vec<T> x = broadcast(own[m * a_stride + k]);
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        T* to = out + m * out_stride + v * Lanes<T>;
        store(to, accumulate || block ? load(to) + acc[m][v] : acc[m][v]);
      }
    }
  }
}

template <typename T>
using MultiplyWindows = void (*)(const T*, ptrdiff_t, const Windows<T>&, T*, ptrdiff_t, bool);

template <typename T, int NV, bool kMasked>
SEQACCEL_INLINE MultiplyWindows<T> multiply_window_rows(ptrdiff_t rows) {
  constexpr MultiplyWindows<T> table[kRows] = {
      multiply_windows<T, 1, NV, kMasked>, multiply_windows<T, 2, NV, kMasked>, multiply_windows<T, 3, NV, kMasked>,
      multiply_windows<T, 4, NV, kMasked>, multiply_windows<T, 5, NV, kMasked>, multiply_windows<T, 6, NV, kMasked>};
  return table[rows - 1];
}

template <typename T, bool kMasked>
SEQACCEL_INLINE MultiplyWindows<T> multiply_window_tile(ptrdiff_t rows, ptrdiff_t vectors) {
  if (vectors == 1) return multiply_window_rows<T, 1, kMasked>(rows);
  if (vectors == 2) return multiply_window_rows<T, 2, kMasked>(rows);
  if constexpr (kVectors > 2) {
    if (vectors == 3) return multiply_window_rows<T, 3, kMasked>(rows);
    return multiply_window_rows<T, 4, kMasked>(rows);
  }
  __builtin_unreachable();
}

// Rows first ... last of block i when n rows are dealt evenly to blocks of at most kRows.
struct RowBlocks {
  ptrdiff_t n, count;
  explicit RowBlocks(ptrdiff_t rows) : n(rows), count(ceil_div(rows, kRows)) {}
  ptrdiff_t begin(ptrdiff_t i) const { return n * i / count; }
};

// A run of a product's columns: time steps [t, t + n) of one segment of sequence b.
struct Run {
  ptrdiff_t b, t, n, column;
  ptrdiff_t place;  // in a grid, of the first one in its row
  Segment segment;
  const void* counts;  // where taps leave the segment of their time step: of a Reach, to their side. Else null
};

// out[i] = 0, i < n, where a tap `columns` away lies outside of its row of a grid; out[0] is `place` in its row.
template <typename D>
SEQACCEL_INLINE void clear_outside(ptrdiff_t width, ptrdiff_t columns, ptrdiff_t place, ptrdiff_t n, D* out) {
  if (columns == 0) return;
  const ptrdiff_t begin = columns > 0 ? larger(0, width - columns) : 0;
  const ptrdiff_t end = columns > 0 ? width : smaller(width, -columns);
  for (ptrdiff_t i = -place; i < n; i += width) {
    const ptrdiff_t j = larger(0, i + begin);
    clear(out + j, smaller(n, i + end) - j);
  }
}

// The operand whose shifted rows make the columns of a product: value(b, c, t) for channel c of sequence b.
template <typename S>
struct Signal {
  const S* values;   // [batch, channels, length], rows `stride` apart
  const S* history;  // [rows, channels, context], the time steps before a segment; null: zeros
  ptrdiff_t channels, length, stride, context;

  // Brings value(b, c, t) ... value(b, c, t + n - 1) into the second-level cache.
  SEQACCEL_INLINE void prefetch(ptrdiff_t b, ptrdiff_t c, ptrdiff_t t, ptrdiff_t n) const {
    if (t < 0 || t + n > length) return;
    const S* row = values + (b * channels + c) * stride + t;
    for (ptrdiff_t i = 0; i < n; i += 64 / ptrdiff_t(sizeof(S))) __builtin_prefetch(row + i, 0, 2);
  }

  // out[i] = value(b, c, t + i), zero outside of the segment and its history
  template <typename D>
  SEQACCEL_INLINE void copy(ptrdiff_t b, const Segment& segment, ptrdiff_t c, ptrdiff_t t, ptrdiff_t n, D* out) const {
    const S* row = values + (b * channels + c) * stride;
    if (t >= segment.begin && t + n <= segment.end) return copy_values(row + t, n, out);
    const ptrdiff_t before = larger(0, smaller(n, segment.begin - t));  // values that the history has
    const bool zero = !history || segment.history == kZeros;
    const ptrdiff_t zeros = zero ? before : larger(0, smaller(before, segment.begin - context - t));
    const ptrdiff_t end = larger(before, smaller(n, segment.end - t));
    clear(out, zeros);
    if (zeros < before) {
      const S* past = history + (segment.history * channels + c + 1) * context;
      copy_values(past + t - segment.begin + zeros, before - zeros, out + zeros);
    }
    copy_values(row + t + before, end - before, out + before);
    clear(out + end, n - end);
  }
};

// out[m, column] = sum_{c,k} A[m, c * K + k] * signal(c, t + s_k), for every group; a column is a time step of a
// sequence. The signal is in memory as S.
template <typename W, typename S = W>
struct Product {
  const W* a;  // [groups * rows, depth()]: channels * K values, and zeros up to a whole factor
  Signal<S> signal;
  const ConvShape* shape;
  const Tap* tap;                            // [K]
  ptrdiff_t newest;                          // the tap that reads furthest ahead
  ptrdiff_t first_row;                       // the row of the batch that is sequence 0
  ptrdiff_t batch;                           // sequences
  ptrdiff_t rows, channels;                  // of one group
  ptrdiff_t first, steps;                    // columns of a sequence: time steps [first, first + steps)
  const Segment* only = nullptr;             // the segment that all columns belong to; null: they have their own
  const Reaches<Sum<W>>* reaches = nullptr;  // where they exist, rows are one segment and these keep their own apart
  bool forward = true;                       // taps lie before the present; else after it

  typedef typename Reach<Sum<W>>::Count Count;

  ptrdiff_t taps() const { return shape->kernel_size; }
  ptrdiff_t depth() const { return ceil_div(channels * taps(), Factor<W>::kValues); }
  // Columns of a tile: a row of a grid where that wastes few lanes.
  ptrdiff_t tile() const {
    const ptrdiff_t width = shape->width, wide = ceil_div(width, Lanes<W>) * Lanes<W>;
    const bool rows_fit = width <= kColumns<W> && 8 * wide <= 9 * width && first % width == 0 && steps % width == 0;
    return shape->column_taps > 1 && Factor<W>::kValues == 1 && rows_fit ? width : kColumns<W>;
  }

  // out[i] = signal(c, t + i + s_k) of a run from its column `from` on
  template <typename D>
  SEQACCEL_INLINE void copy(const Run& run, ptrdiff_t c, ptrdiff_t k, ptrdiff_t from, ptrdiff_t n, D* out) const {
    const ptrdiff_t columns = tap[k].columns, width = shape->width;
    if (columns >= width || columns <= -width) return clear(out, n);
    signal.copy(run.b, run.segment, c, run.t + from + tap[k].steps, n, out);
    if (run.counts) clear_beyond(static_cast<const Count*>(run.counts) + from, distance(tap[k].steps), n, out);
    clear_outside(width, columns, run.place + from, n, out);
  }

  // How many time steps to its side a tap lies away.
  ptrdiff_t distance(ptrdiff_t steps) const { return forward ? -steps : steps; }
  // Of a run (Run::counts).
  const Count* counts(ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) const {
    const Reach<Sum<W>> reach = reaches->of(first_row + b);
    const ptrdiff_t furthest = shape->context() + shape->beside();
    if (forward ? reach.holds_before(t, n, furthest) : reach.holds_after(t, n, furthest)) return nullptr;
    return (forward ? reach.before : reach.after) + t;
  }
};

// The runs of columns [begin, begin + count).
template <typename W>
struct Runs {
  Run list[kColumns<W>];
  ptrdiff_t size = 0;
  template <typename S>
  Runs(const Product<W, S>& p, ptrdiff_t begin, ptrdiff_t count) {
    for (ptrdiff_t done = 0; done < count;) {
      const ptrdiff_t b = (begin + done) / p.steps, t = p.first + (begin + done) % p.steps;
      const bool as_one = p.reaches && p.reaches->exist && !p.only;
      const Segment segment = p.only   ? *p.only
                              : as_one ? p.shape->row(p.first_row + b)
                                       : p.shape->segment(p.first_row + b, t);
      const ptrdiff_t n = smaller(smaller(p.first + p.steps, segment.end) - t, count - done);
      const void* const counts = as_one ? p.counts(b, t, n) : nullptr;
      list[size++] = {b, t, n, done, (t + p.shape->context()) % p.shape->width, segment, counts};
      done += n;
    }
  }
  const Run* begin() const { return list; }
  const Run* end() const { return list + size; }
};

template <typename W>
inline ptrdiff_t product_scratch(ptrdiff_t rows, ptrdiff_t depth) {
  const ptrdiff_t tiles = smaller(depth, kDepth) * kColumns<W> + rows * kColumns<W>;
  const ptrdiff_t dots = kFewColumns * (ceil_div(depth, Lanes<W>) * Lanes<W>)+rows * kColumns<W>;
  return larger(tiles, dots);
}

// Dot products of MR rows of A with NC columns, both contiguous along the depth; columns are padded with zeros.
template <typename W, int MR, int NC>
inline void dot_tile(const W* a, ptrdiff_t depth, const W* columns, ptrdiff_t column_stride, Sum<W>* out) {
  typedef Sum<W> T;
  constexpr ptrdiff_t L = Lanes<T>;
  Vec<T> acc[MR][NC] = {};
  ptrdiff_t i = 0;
  for (; i + L <= depth; i += L) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const Vec<T> w = load_factors(a + m * depth + i);
#pragma GCC unroll 4
      for (int c = 0; c < NC; ++c) multiply_add(acc[m][c], w, load_factors(columns + c * column_stride + i), W{});
    }
  }
  if (i < depth) {
    for (int m = 0; m < MR; ++m) {
      const Vec<T> w = load_factors(a + m * depth + i, int(depth - i));
      for (int c = 0; c < NC; ++c) multiply_add(acc[m][c], w, load_factors(columns + c * column_stride + i), W{});
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int c = 0; c < NC; ++c) out[m * kColumns<W> + c] = horizontal_sum<T>(acc[m][c]);
  }
}

template <typename W, int NC>
inline void dot_rows(const W* a, ptrdiff_t rows, ptrdiff_t depth, const W* columns, ptrdiff_t column_stride,
                     Sum<W>* out) {
  ptrdiff_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    dot_tile<W, 4, NC>(a + m * depth, depth, columns, column_stride, out + m * kColumns<W>);
  }
  for (; m < rows; ++m) dot_tile<W, 1, NC>(a + m * depth, depth, columns, column_stride, out + m * kColumns<W>);
}

// Rows [r0, r0 + deep) of the operand's panel, rows `width` apart, of a run's columns.
template <typename W, typename S>
SEQACCEL_INLINE void fill_panel(const Product<W, S>& p, ptrdiff_t group, const Run& run, ptrdiff_t r0, ptrdiff_t deep,
                                W* panel, ptrdiff_t width) {
  constexpr ptrdiff_t kValues = Factor<W>::kValues;
  const ptrdiff_t taps = p.taps(), first = group * p.channels;
  ptrdiff_t c = r0 * kValues / taps, k = r0 * kValues % taps;
  const auto copy_next = [&](auto* out) __attribute__((always_inline)) {
    p.copy(run, first + c, k, 0, run.n, out);
    if (++k == taps) k = 0, ++c;
  };
  for (ptrdiff_t r = 0; r < deep; ++r) {
    W* const to = panel + r * width + run.column;
    if constexpr (kValues == 1) {
      copy_next(to);
    } else {
      S rows[kValues][kColumns<W>];
      copy_next(rows[0]);
      c < p.channels ? copy_next(rows[1]) : clear(rows[1], run.n);
      interleave(rows[0], rows[1], run.n, to);
    }
  }
}

// Columns [begin, begin + count) of row blocks [first_block, last_block) of one group. emit(channel, b, t, n, values)
// for every run of finished columns; prepare(channel, b, t, n) some microseconds before, to fetch what emit will touch:
// rows are often a page apart, where no hardware prefetcher follows.
template <typename W, typename S, typename Prepare, typename Emit>
inline void product_tile(const Product<W, S>& p, ptrdiff_t group, ptrdiff_t begin, ptrdiff_t count,
                         ptrdiff_t first_block, ptrdiff_t last_block, Sum<W>* scratch, const Prepare& prepare,
                         const Emit& emit) {
  const ptrdiff_t depth = p.depth(), taps = p.taps();
  const RowBlocks blocks(p.rows);
  const Runs<W> runs(p, begin, count);
  const W* a = p.a + group * p.rows * depth;
  Sum<W>* out = scratch;  // [a block's rows, kColumns] once for each block
  W* panel = reinterpret_cast<W*>(scratch + p.rows * kColumns<W>);
  const ptrdiff_t vectors = ceil_div(count, Lanes<W>), panel_width = vectors * Lanes<W>;
  const bool large = p.rows * depth * ptrdiff_t(sizeof(W)) > kSecondLevel;  // A comes from further away
  // The part of the next tile's signal that block `block` of those that multiply rows [r0, r0 + deep) of A fetches.
  const auto fetch_next = [&](ptrdiff_t r0, ptrdiff_t deep, ptrdiff_t block) {
    constexpr ptrdiff_t kValues = Factor<W>::kValues;
    const ptrdiff_t from = r0 * kValues / taps, n_channels = deep * kValues / taps, all = last_block - first_block;
    const ptrdiff_t first = from + n_channels * (block - first_block) / all;
    const ptrdiff_t end = from + n_channels * (block - first_block + 1) / all;
    for (ptrdiff_t c = first; c < end; ++c) {
      for (const Run& run : runs) {
        p.signal.prefetch(run.b, group * p.channels + c, run.t + run.n + p.tap[p.newest].steps, run.n);
      }
    }
  };
  // Taps that overlap read their parts of one copy: all taps of a time step, or in a tile that is a row of a grid the
  // taps of each row.
  const bool grid = p.shape->column_taps > 1;
  const ptrdiff_t shared = grid ? p.shape->column_taps : taps;  // taps of a copy
  const auto shift = [&](ptrdiff_t k) { return grid ? p.tap[k].columns : p.tap[k].steps; };
  const ptrdiff_t oldest = smaller(shift(0), shift(shared - 1)), step = taps > 1 ? shift(1) - shift(0) : 0;
  const ptrdiff_t window = whole_lines(kColumns<W> + (shared - 1) * larger(step, -step));
  typedef typename Product<W, S>::Count Count;
  const auto* const counts = static_cast<const Count*>(runs.list[0].counts);
  const bool masked = counts && !grid;
  const bool overlap = Factor<W>::kValues == 1 && taps > 1 && runs.size == 1 && (!masked || taps <= kMaskedTaps) &&
                       (!grid || p.tile() == p.shape->width) && window <= smaller(shared, kDepth) * kColumns<W>;
  Mask<Sum<W>> inside[kMaskedTaps * kVectors];
  for (ptrdiff_t k = 0; overlap && masked && k < taps; ++k) {
    for (ptrdiff_t v = 0; v < vectors; ++v) {
      inside[k * kVectors + v] = Reach<Sum<W>>::lanes(counts, v * Lanes<W>) >= Count(p.distance(p.tap[k].steps));
    }
  }
  const ptrdiff_t most = overlap ? kDepth * kColumns<W> / window * shared : kDepth;
  for (ptrdiff_t r0 = 0; r0 == 0 || r0 < depth; r0 += most) {
    const ptrdiff_t deep = smaller(most, depth - r0);
    const ptrdiff_t copies = deep / shared;  // of whole windows
    if constexpr (Factor<W>::kValues == 1) {
      for (ptrdiff_t i = 0; overlap && i < copies; ++i) {
        const Run& run = runs.list[0];
        const ptrdiff_t row = r0 + i * shared, c = group * p.channels + row / taps;
        W* const to = panel + i * window;
        if (grid) {
          const Tap& tap = p.tap[row % taps];
          if (counts && counts[p.forward ? 0 : run.n - 1] < p.distance(tap.steps - tap.columns)) {  // the row is beyond
            clear(to, window);
            continue;
          }
          clear(to, -oldest);
          p.signal.copy(run.b, run.segment, c, run.t + tap.steps - tap.columns, run.n, to - oldest);
          clear(to - oldest + run.n, window + oldest - run.n);
        } else {
          p.signal.copy(run.b, run.segment, c, run.t + oldest, run.n + window - kColumns<W>, to);
        }
      }
    }
    for (const Run& run : runs) {
      if (!overlap) fill_panel(p, group, run, r0, deep, panel, panel_width);
    }
    for (ptrdiff_t r = 0; count < panel_width && !overlap && r < deep; ++r) {
      clear(panel + r * panel_width + count, panel_width - count);
    }
    const bool last = r0 + deep == depth;
    for (ptrdiff_t block = first_block; block < last_block; ++block) {
      const ptrdiff_t row = blocks.begin(block), end = blocks.begin(block + 1);
      Sum<W>* to = out + row * kColumns<W>;
      fetch_next(r0, deep, block);
      for (ptrdiff_t r = row; last && r < end; ++r) {
        for (const Run& run : runs) prepare(group * p.rows + r, run.b, run.t, run.n);
      }
      if (large) {
        const ptrdiff_t next_end = smaller(blocks.begin(smaller(block + 2, blocks.count)), p.rows);
        for (ptrdiff_t r = end; r < next_end; ++r) {
          const W* next = a + r * depth + r0;
          for (ptrdiff_t i = 0; i < deep; i += 64 / ptrdiff_t(sizeof(W))) __builtin_prefetch(next + i, 0, 2);
        }
      }
      if (!overlap) {
        multiply_tile<W>(end - row, vectors)(a + row * depth + r0, depth, panel, deep, to, kColumns<W>, r0 > 0);
      } else if constexpr (Factor<W>::kValues == 1) {
        const Windows<W> windows = {panel, window, copies, shared, shift(0) - oldest, step, inside};
        const MultiplyWindows<W> multiply = masked ? multiply_window_tile<W, true>(end - row, vectors)
                                                   : multiply_window_tile<W, false>(end - row, vectors);
        multiply(a + row * depth + r0, depth, windows, to, kColumns<W>, r0 > 0);
      }
      for (ptrdiff_t r = row; last && r < end; ++r) {
        for (const Run& run : runs) {
          emit(group * p.rows + r, run.b, run.t, run.n, out + r * kColumns<W> + run.column);
        }
      }
    }
  }
}

// The same for at most kFewColumns columns, as dot products.
template <typename W, typename S, typename Emit>
inline void product_few(const Product<W, S>& p, ptrdiff_t group, ptrdiff_t count, ptrdiff_t first_block,
                        ptrdiff_t last_block, Sum<W>* scratch, const Emit& emit) {
  typedef typename Factor<W>::Value Value;
  const ptrdiff_t depth = p.depth(), taps = p.taps(), stride = ceil_div(depth, Lanes<W>) * Lanes<W>;
  const Runs<W> runs(p, 0, count);
  const RowBlocks blocks(p.rows);
  const ptrdiff_t first_row = blocks.begin(first_block), last_row = blocks.begin(last_block);
  const W* a = p.a + (group * p.rows + first_row) * depth;
  Sum<W>* out = scratch;  // [rows, kColumns]
  W* columns = reinterpret_cast<W*>(scratch + p.rows * kColumns<W>);
  for (const Run& run : runs) {
    for (ptrdiff_t i = 0; i < run.n; ++i) {
      Value* to = reinterpret_cast<Value*>(columns + (run.column + i) * stride);
      for (ptrdiff_t c = 0; c < p.channels; ++c) {
        for (ptrdiff_t k = 0; k < taps; ++k) p.copy(run, group * p.channels + c, k, i, 1, to + c * taps + k);
      }
      clear(to + p.channels * taps, stride * Factor<W>::kValues - p.channels * taps);
    }
  }
  const ptrdiff_t rows = last_row - first_row;
  for (ptrdiff_t c = 0; c < count;) {
    const W* from = columns + c * stride;
    if (count - c >= 4) {
      dot_rows<W, 4>(a, rows, depth, from, stride, out + c);
      c += 4;
    } else if (count - c >= 2) {
      dot_rows<W, 2>(a, rows, depth, from, stride, out + c);
      c += 2;
    } else {
      dot_rows<W, 1>(a, rows, depth, from, stride, out + c);
      c += 1;
    }
  }
  for (ptrdiff_t row = first_row; row < last_row; ++row) {
    for (const Run& run : runs) {
      emit(group * p.rows + row, run.b, run.t, run.n, out + (row - first_row) * kColumns<W> + run.column);
    }
  }
}

// The whole product, by the whole team; scratch is the thread's own. `together`: a thread makes all rows of a column,
// so that emit finds those before its own kColumns apart.
template <typename W, typename S, typename Prepare, typename Emit>
inline void run_product(const Product<W, S>& p, Sum<W>* scratch, const Prepare& prepare, const Emit& emit,
                        bool together = false) {
  const ptrdiff_t columns = p.batch * p.steps, team = omp_get_num_threads();
  if (columns <= 0 || p.rows == 0) return;
  const bool few = columns <= smaller(kFewColumns, kColumns<W>);
  const ptrdiff_t width = few ? columns : p.tile();
  const ptrdiff_t tiles = ceil_div(columns, width);
  const RowBlocks blocks(p.rows);
  const ptrdiff_t groups = p.shape->groups, parts = together ? 1 : blocks.count;
  const auto run = [&](ptrdiff_t tile, ptrdiff_t first_block, ptrdiff_t last_block) {
    const ptrdiff_t group = tile % groups, begin = tile / groups * width;
    if (few) {
      product_few(p, group, columns, first_block, last_block, scratch, emit);
    } else {
      product_tile(p, group, begin, smaller(width, columns - begin), first_block, last_block, scratch, prepare, emit);
    }
  };
  if (tiles * groups >= 4 * team) {
#pragma omp for schedule(dynamic, 4) nowait
    for (ptrdiff_t tile = 0; tile < tiles * groups; ++tile) run(tile, 0, blocks.count);
    return;
  }
  // Few tiles: each thread takes its share of their blocks, so that it copies few panels.
  const ptrdiff_t all = tiles * groups * parts, me = omp_get_thread_num(), last = all * (me + 1) / team;
  for (ptrdiff_t part = all * me / team; part < last;) {
    const ptrdiff_t tile = part / parts, end = smaller(last, (tile + 1) * parts), first = tile * parts;
    run(tile, blocks.count * (part - first) / parts, blocks.count * (end - first) / parts);
    part = end;
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::conv
