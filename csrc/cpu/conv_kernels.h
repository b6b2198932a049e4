// Dilated causal convolution as an implicit matrix product.
//
//   forward    y[o, t]     = sum_{c,k} W[o, c, k] x[c, t - s_k]        s_k = (K - 1 - k) * dilation
//   data       dx[c, t]    = sum_{o,k} W[o, c, k] g[o, t + s_k]        g = the gradient of conv + bias
//   weight     dW[o, c, k] = sum_{b,t} g[o, t] x[c, t - s_k]
//
// All three run on one register tile, kRows x kVectors vectors: rows are broadcast, columns are vectors.
// forward and data: rows are output channels (W in its own layout; for data, transposed once a call), columns are time
// steps of the flattened batch. The columns' operand is copied into a panel [taps of channels, columns] that stays in
// the caches; the copy shifts, pads, takes the history in, and is used by every output channel (it costs 1 / (4
// channels) of the product). weight: rows are (c, k), read from x where it lies; columns are output channels, the
// operand is g transposed by blocks. Partial sums are kept a thread and added in the order of the threads: the result
// depends on the number of threads, not on timing.
//
// 6 x 4 of 32 registers (6 x 2 of 16) keeps 24 (12) independent sums, more than latency times throughput needs, and
// divides the usual lengths and channel counts: four vectors are 64 columns.
#pragma once

#include "conv.h"
#include "conv_depthwise.h"
#include "conv_epilogue.h"
#include "gemm.h"
#include "vec.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr int kRows = 6;
constexpr int kVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;
template <typename T>
constexpr ptrdiff_t kColumns = kVectors * Lanes<T>;
constexpr ptrdiff_t kDepth = 256;       // rows of a panel: 64 KB, a sixteenth of the second-level cache
constexpr ptrdiff_t kFlush = 64;        // terms summed in a register
constexpr ptrdiff_t kWeightSteps = 96;  // time steps a weight-gradient tile runs over
constexpr ptrdiff_t kFewColumns =
    8;  // up to here columns are dot products with the weight's rows, and nothing is packed

inline ptrdiff_t ceil_div(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
inline ptrdiff_t smaller(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
inline ptrdiff_t larger(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

// out[MR, NV vectors] (+)= A[MR, depth] * panel[depth, NV vectors]. A sum of n terms in one register is off by about
// sqrt(n) roundings; flushing it to memory every kFlush terms keeps the error near that of the sums of torch's
// operator.
template <typename T, int MR, int NV>
void multiply(const T* a, ptrdiff_t a_stride, const T* panel, ptrdiff_t depth, T* out, ptrdiff_t out_stride,
              bool accumulate) {
  const ptrdiff_t blocks = larger(1, ceil_div(depth, kFlush));
  for (ptrdiff_t block = 0; block < blocks; ++block) {
    const ptrdiff_t k = depth * block / blocks, n = depth * (block + 1) / blocks - k;
    Vec<T> acc[MR][NV] = {};
    tile_multiply<T, MR, NV>(acc, a + k, a_stride, panel + k * NV * Lanes<T>, n);
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
using Multiply = void (*)(const T*, ptrdiff_t, const T*, ptrdiff_t, T*, ptrdiff_t, bool);

template <typename T, int NV>
SEQACCEL_INLINE Multiply<T> multiply_rows(ptrdiff_t rows) {
  constexpr Multiply<T> table[kRows] = {multiply<T, 1, NV>, multiply<T, 2, NV>, multiply<T, 3, NV>,
                                        multiply<T, 4, NV>, multiply<T, 5, NV>, multiply<T, 6, NV>};
  return table[rows - 1];
}

template <typename T>
SEQACCEL_INLINE Multiply<T> multiply_tile(ptrdiff_t rows, ptrdiff_t vectors) {
  if (vectors == 1) return multiply_rows<T, 1>(rows);
  if (vectors == 2) return multiply_rows<T, 2>(rows);
  if constexpr (kVectors > 2) {
    if (vectors == 3) return multiply_rows<T, 3>(rows);
    return multiply_rows<T, 4>(rows);
  }
  __builtin_unreachable();
}

// Rows first ... last of block i when n rows are dealt evenly to blocks of at most kRows.
struct RowBlocks {
  ptrdiff_t n, count;
  explicit RowBlocks(ptrdiff_t rows) : n(rows), count(ceil_div(rows, kRows)) {}
  ptrdiff_t begin(ptrdiff_t i) const { return n * i / count; }
};

// The operand whose shifted rows make the columns of a product: value(b, c, t) for channel c of sequence b.
template <typename T>
struct Signal {
  const T* values;   // [batch, channels, length]
  const T* history;  // [batch, channels, context], the time steps before; null: zeros
  ptrdiff_t channels, length, context;

  // Brings value(b, c, t) ... value(b, c, t + n - 1) into the second-level cache.
  SEQACCEL_INLINE void prefetch(ptrdiff_t b, ptrdiff_t c, ptrdiff_t t, ptrdiff_t n) const {
    if (t < 0 || t + n > length) return;
    const T* row = values + (b * channels + c) * length + t;
    for (ptrdiff_t i = 0; i < n; i += 64 / ptrdiff_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
  }

  // out[i] = value(b, c, t + i), zero outside
  SEQACCEL_INLINE void copy(ptrdiff_t b, ptrdiff_t c, ptrdiff_t t, ptrdiff_t n, T* out) const {
    const T* row = values + (b * channels + c) * length;
    if (t >= 0 && t + n <= length) {
      const ptrdiff_t whole = n & ~ptrdiff_t(Lanes<T> - 1);
      for (ptrdiff_t i = 0; i < whole; i += Lanes<T>) store(out + i, load(row + t + i));
      for (ptrdiff_t i = whole; i < n; ++i) out[i] = row[t + i];
      return;
    }
    const T* before = history ? history + (b * channels + c + 1) * context : nullptr;
    ptrdiff_t i = 0;
    for (; i < n && t + i < 0; ++i) out[i] = before && t + i >= -context ? before[t + i] : T(0);
    for (; i < n && t + i < length; ++i) out[i] = row[t + i];
    for (; i < n; ++i) out[i] = T(0);
  }
};

// out[m, column] = sum_{c,k} A[m, c * K + k] * signal(c, t + direction * s_k), for every group; a column is a time step
// `first` <= t < signal.length of a sequence.
template <typename T>
struct Product {
  const T* a;  // [groups * rows, channels * K]
  Signal<T> signal;
  ptrdiff_t batch, groups, rows, channels, taps, dilation;  // rows and channels of one group
  ptrdiff_t first;
  int direction;

  ptrdiff_t depth() const { return channels * taps; }
  ptrdiff_t steps() const { return signal.length - first; }  // columns of a sequence
  ptrdiff_t shift(ptrdiff_t k) const { return direction * (taps - 1 - k) * dilation; }
};

// f(b, t, n, column) for each run of columns [begin, begin + count) that lies in one sequence.
template <typename F>
SEQACCEL_INLINE void for_runs(ptrdiff_t begin, ptrdiff_t count, ptrdiff_t steps, ptrdiff_t first, const F& f) {
  for (ptrdiff_t done = 0; done < count;) {
    const ptrdiff_t b = (begin + done) / steps, t = (begin + done) % steps, n = smaller(steps - t, count - done);
    f(b, t + first, n, done);
    done += n;
  }
}

template <typename T>
inline ptrdiff_t product_scratch(ptrdiff_t rows, ptrdiff_t depth) {
  const ptrdiff_t tiles = smaller(depth, kDepth) * kColumns<T> + rows * kColumns<T>;
  const ptrdiff_t dots = kFewColumns * (ceil_div(depth, Lanes<T>) * Lanes<T>)+rows * kColumns<T>;
  return larger(tiles, dots);
}

// Dot products of MR rows of A with NC columns, both contiguous along the depth; columns are padded with zeros.
template <typename T, int MR, int NC>
inline void dot_tile(const T* a, ptrdiff_t depth, const T* columns, ptrdiff_t column_stride, T* out) {
  constexpr ptrdiff_t L = Lanes<T>;
  Vec<T> acc[MR][NC] = {};
  ptrdiff_t i = 0;
  for (; i + L <= depth; i += L) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) {
      const Vec<T> w = load(a + m * depth + i);
#pragma GCC unroll 4
      for (int c = 0; c < NC; ++c) acc[m][c] += w * load(columns + c * column_stride + i);
    }
  }
  if (i < depth) {
    for (int m = 0; m < MR; ++m) {
      const Vec<T> w = load(a + m * depth + i, int(depth - i));
      for (int c = 0; c < NC; ++c) acc[m][c] += w * load(columns + c * column_stride + i);
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int c = 0; c < NC; ++c) out[m * kColumns<T> + c] = horizontal_sum<T>(acc[m][c]);
  }
}

template <typename T, int NC>
inline void dot_rows(const T* a, ptrdiff_t rows, ptrdiff_t depth, const T* columns, ptrdiff_t column_stride, T* out) {
  ptrdiff_t m = 0;
  for (; m + 4 <= rows; m += 4) {
    dot_tile<T, 4, NC>(a + m * depth, depth, columns, column_stride, out + m * kColumns<T>);
  }
  for (; m < rows; ++m) dot_tile<T, 1, NC>(a + m * depth, depth, columns, column_stride, out + m * kColumns<T>);
}

// emit(channel, b, t, n, values) for every run of finished columns. Called by the whole team; scratch is the thread's
// own.
template <typename T, typename Emit>
inline void run_product(const Product<T>& p, T* scratch, const Emit& emit) {
  const ptrdiff_t depth = p.depth(), steps = p.steps(), columns = p.batch * steps, team = omp_get_num_threads();
  if (columns <= 0 || p.rows == 0) return;
  const ptrdiff_t few_columns = smaller(kFewColumns, kColumns<T>);
  const bool few = columns <= few_columns;
  const ptrdiff_t width = few ? few_columns : kColumns<T>;
  const ptrdiff_t tiles = ceil_div(columns, width);
  const RowBlocks blocks(p.rows);
  const ptrdiff_t newest = p.direction < 0 ? p.taps - 1 : 0;  // the tap that reads furthest ahead
  const ptrdiff_t parts = larger(1, smaller(few ? team : ceil_div(4 * team, tiles * p.groups), blocks.count));
#pragma omp for schedule(dynamic, 4) nowait
  for (ptrdiff_t item = 0; item < tiles * p.groups * parts; ++item) {
    const ptrdiff_t part = item % parts, group = item / parts % p.groups, tile = item / parts / p.groups;
    const ptrdiff_t begin = tile * width, count = smaller(width, columns - begin);
    const ptrdiff_t first_block = blocks.count * part / parts, last_block = blocks.count * (part + 1) / parts;
    const ptrdiff_t first_row = blocks.begin(first_block), last_row = blocks.begin(last_block);
    const T* a = p.a + group * p.rows * depth;
    T* out = scratch;  // [rows of the part, kColumns]
    T* panel = scratch + p.rows * kColumns<T>;
    const auto emit_rows = [&](ptrdiff_t row, ptrdiff_t end) {
      for (; row < end; ++row) {
        for_runs(begin, count, steps, p.first, [&](ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, ptrdiff_t column) {
          emit(group * p.rows + row, b, t, n, out + (row - first_row) * kColumns<T> + column);
        });
      }
    };
    if (few) {
      const ptrdiff_t stride = ceil_div(depth, Lanes<T>) * Lanes<T>;
      for_runs(begin, count, steps, p.first, [&](ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, ptrdiff_t column) {
        for (ptrdiff_t i = 0; i < n; ++i) {
          T* to = panel + (column + i) * stride;
          for (ptrdiff_t c = 0; c < p.channels; ++c) {
            for (ptrdiff_t k = 0; k < p.taps; ++k) {
              p.signal.copy(b, group * p.channels + c, t + i + p.shift(k), 1, to + c * p.taps + k);
            }
          }
          for (ptrdiff_t r = depth; r < stride; ++r) to[r] = T(0);
        }
      });
      const ptrdiff_t rows = last_row - first_row;
      for (ptrdiff_t c = 0; c < count;) {
        const T* from = panel + c * stride;
        if (count - c >= 4) {
          dot_rows<T, 4>(a + first_row * depth, rows, depth, from, stride, out + c);
          c += 4;
        } else if (count - c >= 2) {
          dot_rows<T, 2>(a + first_row * depth, rows, depth, from, stride, out + c);
          c += 2;
        } else {
          dot_rows<T, 1>(a + first_row * depth, rows, depth, from, stride, out + c);
          c += 1;
        }
      }
      emit_rows(first_row, last_row);
      continue;
    }
    const ptrdiff_t vectors = ceil_div(count, Lanes<T>), panel_width = vectors * Lanes<T>;
    for (ptrdiff_t r0 = 0; r0 == 0 || r0 < depth; r0 += kDepth) {
      const ptrdiff_t deep = smaller(kDepth, depth - r0);
      for_runs(begin, count, steps, p.first, [&](ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, ptrdiff_t column) {
        ptrdiff_t c = r0 / p.taps, k = r0 % p.taps;
        for (ptrdiff_t r = 0; r < deep; ++r) {
          p.signal.copy(b, group * p.channels + c, t + p.shift(k), n, panel + r * panel_width + column);
          if (k == newest) p.signal.prefetch(b, group * p.channels + c, t + n + p.shift(k), n);
          if (++k == p.taps) k = 0, ++c;
        }
      });
      if (count < panel_width) {
        for (ptrdiff_t r = 0; r < deep; ++r) {
          for (ptrdiff_t i = count; i < panel_width; ++i) panel[r * panel_width + i] = T(0);
        }
      }
      for (ptrdiff_t block = first_block; block < last_block; ++block) {
        const ptrdiff_t row = blocks.begin(block), end = blocks.begin(block + 1);
        multiply_tile<T>(end - row, vectors)(a + row * depth + r0, depth, panel, deep,
                                             out + (row - first_row) * kColumns<T>, kColumns<T>, r0 > 0);
        if (r0 + deep == depth) emit_rows(row, end);
      }
    }
  }
}

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

// Layout of a thread's partial weight gradient: group, panel of output channels, tap, input channel, output channel.
template <typename T>
struct WeightPanels {
  ptrdiff_t outputs, count, padded;
  explicit WeightPanels(ptrdiff_t group_out)
      : outputs(group_out), count(ceil_div(group_out, kColumns<T>)), padded(ceil_div(group_out, Lanes<T>) * Lanes<T>) {}
  ptrdiff_t width(ptrdiff_t panel) const { return smaller(kColumns<T>, padded - panel * kColumns<T>); }
  ptrdiff_t size(const ConvShape& s) const { return s.groups * s.kernel_size * s.group_in() * padded; }
};

template <typename T>
inline void add_weight_gradient(const ConvShape& s, const T* x, const T* history, const T* g, ptrdiff_t b,
                                ptrdiff_t begin, ptrdiff_t end, T* panel, T* partial) {
  const ptrdiff_t C = s.group_in(), O = s.group_out(), K = s.kernel_size, context = s.context();
  const WeightPanels<T> panels(O);
  const RowBlocks blocks(C);
  for (ptrdiff_t group = 0; group < s.groups; ++group) {
    const T* xg = x + (b * s.in_channels + group * C) * s.length;
    const T* hg = history ? history + (b * s.in_channels + group * C) * context : nullptr;
    for (ptrdiff_t j = 0; j < panels.count; ++j) {
      const ptrdiff_t width = panels.width(j), first = j * kColumns<T>;
      transpose_panel<T>(g + (b * s.out_channels + group * O + first) * s.length + begin, s.length, O - first,
                         end - begin, width, panel);
      T* sums = partial + (group * panels.padded + first) * K * C;
      for (ptrdiff_t block = 0; block < blocks.count; ++block) {
        const ptrdiff_t c = blocks.begin(block), rows = blocks.begin(block + 1) - c;
        const Multiply<T> multiply = multiply_tile<T>(rows, width / Lanes<T>);
        for (ptrdiff_t k = 0; k < K; ++k) {
          const ptrdiff_t shift = (K - 1 - k) * s.dilation;
          const ptrdiff_t middle = smaller(larger(begin, shift), end);  // x from here on, the history before
          T* to = sums + (k * C + c) * width;
          if (middle < end) {
            multiply(xg + c * s.length + middle - shift, s.length, panel + (middle - begin) * width, end - middle, to,
                     width, true);
          }
          if (hg && begin < middle) {
            multiply(hg + c * context + context + begin - shift, context, panel, middle - begin, to, width, true);
          }
        }
      }
    }
  }
}

struct Workspace {
  char* next;
  template <typename T>
  T* take(ptrdiff_t n) {
    char* here = next;
    next += ceil_div(n * ptrdiff_t(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(here);
  }
};

template <typename T>
size_t forward_workspace_of(const ConvShape& s, int threads) {
  const ptrdiff_t each =
      s.depthwise() ? depthwise_scratch(s) : product_scratch<T>(s.group_out(), s.group_in() * s.kernel_size);
  return size_t(threads) * ceil_div(each * sizeof(T), 64) * 64;
}

template <typename T>
struct BackwardSizes {
  ptrdiff_t g, row_sums, weight, scratch, partial;
  explicit BackwardSizes(const ConvShape& s)
      : g(s.batch * s.out_channels * s.length),
        row_sums(s.batch * s.out_channels),
        weight(s.out_channels * s.group_in() * s.kernel_size),
        scratch(larger(product_scratch<T>(s.group_in(), s.group_out() * s.kernel_size), kWeightSteps * kColumns<T>)),
        partial(WeightPanels<T>(s.group_out()).size(s)) {
    if (s.depthwise()) weight = scratch = partial = 0;
  }
};

template <typename T>
size_t backward_workspace_of(const ConvShape& s, int threads) {
  const BackwardSizes<T> sizes(s);
  return (sizes.g + sizes.row_sums + sizes.weight + threads * (sizes.scratch + sizes.partial + 32)) * sizeof(T) + 512;
}

template <typename T>
void forward(const ConvForward<T>& p) {
  const ConvShape& s = p.shape;
  if (s.depthwise()) return depthwise_forward(p, static_cast<T*>(p.workspace));
  const Product<T> product = {p.weight,      {p.x, p.history, s.in_channels, s.length, s.context()},
                              s.batch,       s.groups,
                              s.group_out(), s.group_in(),
                              s.kernel_size, s.dilation,
                              /*first=*/0,   /*direction=*/-1};
  const ptrdiff_t size = ceil_div(product_scratch<T>(product.rows, product.depth()) * ptrdiff_t(sizeof(T)), 64) * 64;
#pragma omp parallel num_threads(p.threads)
  {
    T* scratch = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + omp_get_thread_num() * size);
    run_product(product, scratch, [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
      finish_row(p, channel, b, t, n, acc);
    });
  }
}

template <typename T>
void backward(const ConvBackward<T>& p) {
  const ConvShape& s = p.shape;
  const ptrdiff_t C = s.group_in(), O = s.group_out(), K = s.kernel_size, context = s.context();
  const BackwardSizes<T> sizes(s);
  const bool identity = p.epilogue.activation == Activation::none && !p.epilogue.relu && p.epilogue.dropout == 0;
  const bool wants_data = p.grad_x || p.grad_history, wants_product = wants_data || p.grad_weight;
  Workspace workspace = {static_cast<char*>(p.workspace)};
  T* const own_g = workspace.take<T>(sizes.g);
  T* const row_sums = workspace.take<T>(sizes.row_sums);
  T* const transposed = workspace.take<T>(sizes.weight);
  T* const scratches = workspace.take<T>(p.threads * (sizes.scratch + 16));
  T* const partials = workspace.take<T>(p.threads * sizes.partial);
  const T* const g = identity ? p.grad_y : own_g;
  const ptrdiff_t chunks = ceil_div(s.length, kWeightSteps);

#pragma omp parallel num_threads(p.threads)
  {
    const ptrdiff_t team = omp_get_num_threads(), me = omp_get_thread_num();
    if (!identity || p.grad_bias || p.grad_residual) {
#pragma omp for schedule(static) nowait
      for (ptrdiff_t row = 0; row < s.batch * s.out_channels; ++row) {
        row_sums[row] = differentiate_row<T>(p, row, identity || !wants_product ? nullptr : own_g + row * s.length);
      }
    }
    if (wants_data && !s.depthwise()) {
#pragma omp for schedule(static) nowait
      for (ptrdiff_t row = 0; row < s.in_channels; ++row) {  // [C, K, O] of the forward's [O, C, K], group by group
        const T* from = p.weight + row / C * O * C * K + row % C * K;
        T* to = transposed + row * O * K;
        for (ptrdiff_t o = 0; o < O; ++o) {
          for (ptrdiff_t k = 0; k < K; ++k) to[o * K + k] = from[o * C * K + k];
        }
      }
    }
#pragma omp barrier
    if (p.grad_bias) {
#pragma omp for schedule(static) nowait
      for (ptrdiff_t o = 0; o < s.out_channels; ++o) {
        T sum = 0;
        for (ptrdiff_t b = 0; b < s.batch; ++b) sum += row_sums[b * s.out_channels + o];
        p.grad_bias[o] = sum;
      }
    }
    if (!s.depthwise()) {
      T* const scratch = scratches + me * (sizes.scratch + 16) / 16 * 16;
      if (wants_data) {
        const Product<T> product = {transposed,
                                    {g, nullptr, s.out_channels, s.length, 0},
                                    s.batch,
                                    s.groups,
                                    C,
                                    O,
                                    K,
                                    s.dilation,
                                    p.grad_history ? -context : 0,
                                    /*direction=*/1};
        run_product(product, scratch, [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
          const ptrdiff_t row = b * s.in_channels + channel, before = t < 0 ? smaller(n, -t) : 0;
          if (before) memcpy(p.grad_history + (row + 1) * context + t, acc, before * sizeof(T));
          if (!p.grad_x || before == n) return;
          T* to = p.grad_x + row * s.length + t;
          if (p.addend) {
            const T* add = p.addend + row * s.length + t;
            for (ptrdiff_t i = before; i < n; ++i) to[i] = acc[i] + add[i];
          } else {
            memcpy(to + before, acc + before, (n - before) * sizeof(T));
          }
        });
      }
      if (p.grad_weight) {
        T* const partial = partials + me * sizes.partial;
        memset(partial, 0, sizes.partial * sizeof(T));
        const ptrdiff_t items = s.batch * chunks;
        for (ptrdiff_t item = items * me / team; item < items * (me + 1) / team; ++item) {
          const ptrdiff_t begin = item % chunks * kWeightSteps;
          add_weight_gradient(s, p.x, p.history, g, item / chunks, begin, smaller(begin + kWeightSteps, s.length),
                              scratch, partial);
        }
#pragma omp barrier
        const WeightPanels<T> panels(O);
#pragma omp for schedule(static)
        for (ptrdiff_t row = 0; row < s.out_channels; ++row) {
          const ptrdiff_t group = row / O, o = row % O, first = o / kColumns<T> * kColumns<T>;
          const ptrdiff_t width = panels.width(o / kColumns<T>);
          const T* from = partials + (group * panels.padded + first) * K * C + o - first;
          for (ptrdiff_t c = 0; c < C; ++c) {
            for (ptrdiff_t k = 0; k < K; ++k) {
              T sum = 0;
              for (ptrdiff_t thread = 0; thread < team; ++thread)
                sum += from[thread * sizes.partial + (k * C + c) * width];
              p.grad_weight[(row * C + c) * K + k] = sum;
            }
          }
        }
      }
    }
  }
  if (s.depthwise() && wants_product) depthwise_backward(p, g);
}

inline size_t forward_workspace(const ConvShape& s, size_t element, int threads) {
  return element == sizeof(float) ? forward_workspace_of<float>(s, threads) : forward_workspace_of<double>(s, threads);
}

inline size_t backward_workspace(const ConvShape& s, size_t element, int threads) {
  return element == sizeof(float) ? backward_workspace_of<float>(s, threads)
                                  : backward_workspace_of<double>(s, threads);
}

extern const ConvKernels conv_kernels;
const ConvKernels conv_kernels = {forward_workspace, backward_workspace, forward<float>,
                                  forward<double>,   backward<float>,    backward<double>};

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
