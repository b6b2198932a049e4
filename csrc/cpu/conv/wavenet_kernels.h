// A WaveNet layer in one pass over time.
//
//   v = W * x + b + condition                 [2G, T], * the dilated convolution
//   z = tanh(v_f) sigmoid(v_g)                [G, T], v_f the first half of v's rows
//   y = x + R z + r,  skip' = skip + S z + s  [C, T] and [S, T]; R and S are the rows of `output_weight`
//
// The unit of work is a tile of kColumns time steps: v, z and the second product of a tile stay in the caches, and what
// a layer writes besides y and skip' is tanh and sigmoid for the backward.
//
//   dz = R^T dy + S^T dskip',  dv_f = dz sigmoid (1 - tanh^2),  dv_g = dz tanh sigmoid (1 - sigmoid)
//   dx = dy + W^T * dv          with dv up to (K - 1) * dilation steps later
//   dW, dR, dS                  sums over time, as in weight_gradient.h
//
// In the backward a thread goes through its part of the time from its end to its beginning, so that the dv that a tile
// needs is there. Where the row of another thread ends in the middle, that thread needs the first steps of this part:
// these dv are calculated before, in front of the only barrier.
#pragma once

#include "cpu/base/workspace.h"
#include "cpu/conv/epilogue.h"
#include "cpu/conv/product.h"
#include "cpu/conv/wavenet.h"
#include "cpu/conv/weight_gradient.h"

namespace seqaccel::SEQACCEL_ISA::conv {

// What the forward keeps for the backward lies in blocks of this many time steps of a row of the batch, [2G, steps of
// the block] each, so that it is written and read in order.
constexpr ptrdiff_t kSavedSteps = 64;

// The gate's place among what is saved: row `row` of the 2G of sequence b, time step t. Steps of one block are
// adjacent.
inline ptrdiff_t saved_at(ptrdiff_t rows, ptrdiff_t length, ptrdiff_t b, ptrdiff_t row, ptrdiff_t t) {
  const ptrdiff_t first = t / kSavedSteps * kSavedSteps;
  const ptrdiff_t steps = length - first < kSavedSteps ? length - first : kSavedSteps;
  return b * rows * length + rows * first + row * steps + t - first;
}

// How [B, T] is cut: into parts of a row, or of short rows into several of them. Columns are those of the flattened
// batch.
template <typename T>
struct Tiles {
  ptrdiff_t batch, length, width = kColumns<T>, rows = 1, per_row;
  Tiles(ptrdiff_t batch, ptrdiff_t length, ptrdiff_t threads, bool joins = true) : batch(batch), length(length) {
    static_assert(kSavedSteps % kColumns<T> == 0);
    while (width > Lanes<T> && batch * length <= (threads - 1) * width) width /= 2;
    if (joins && length < width) rows = width / length;
    per_row = length < width ? 1 : ceil_div(length, width);
  }
  ptrdiff_t count() const { return ceil_div(batch, rows) * per_row; }
  ptrdiff_t row(ptrdiff_t tile) const { return tile / per_row * rows; }
  ptrdiff_t time(ptrdiff_t tile) const { return tile % per_row * width; }
  ptrdiff_t begin(ptrdiff_t tile) const { return row(tile) * length + time(tile); }
  ptrdiff_t end(ptrdiff_t tile) const {
    if (per_row == 1) return smaller(batch, row(tile) + rows) * length;
    return smaller((row(tile) + 1) * length, begin(tile) + width);
  }
};

// Part `part` of `parts` of the lines that hold the columns of some rows.
template <bool writes, typename T>
SEQACCEL_INLINE void prefetch_rows(const T* values, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t part,
                                   ptrdiff_t parts) {
  for (ptrdiff_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
    prefetch_row<writes>(values + r * stride, n);
}

// f(i, m) for the vectors of n values: m of them from i on.
template <typename T, typename F>
SEQACCEL_INLINE void for_vectors(ptrdiff_t n, const F& f) {
  ptrdiff_t i = 0;
  for (; i + Lanes<T> <= n; i += Lanes<T>) f(i, Lanes<T>);
  if (i < n) f(i, int(n - i));
}

template <typename T>
SEQACCEL_INLINE bool is_line(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

template <typename T>
struct ForwardTile {
  const WaveNetForward<T>& p;
  const Product<T>& product;
  T* scratch;  // product_scratch
  T* z;        // [G, columns of the tile]
  T* outputs;  // [kRows, kColumns]

  // Of one row of z: acc holds the gate's product, and that of the value is G rows before.
  void gate(ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc, ptrdiff_t z_stride) const {
    const ptrdiff_t G = p.gates(), rows = 2 * G, length = p.conv.length;
    const ptrdiff_t column = acc - scratch - (channel + G) * kColumns<T>;
    const T* const first = acc - G * kColumns<T>;
    T value_bias = p.bias ? p.bias[channel] : T(0), gate_bias = p.bias ? p.bias[channel + G] : T(0);
    if (p.global_condition) {
      value_bias += p.global_condition[b * rows + channel];
      gate_bias += p.global_condition[b * rows + channel + G];
    }
    const T* const condition = p.condition ? p.condition + (b * rows + channel) * length + t : nullptr;
    T* const value_to = p.saved ? p.saved + saved_at(rows, length, b, channel, t) : nullptr;
    T* const gate_to = p.saved ? p.saved + saved_at(rows, length, b, channel + G, t) : nullptr;
    const bool non_temporal = p.non_temporal && is_line(value_to) && is_line(gate_to);
    T* const to = z + channel * z_stride + column;
    for_vectors<T>(n, [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
      Vec<T> value = load(first + i) + value_bias, open = load(acc + i) + gate_bias;
      if (condition) {
        value += load_some(condition + i, m);
        open += load_some(condition + G * length + i, m);
      }
      value = tanh_vec<T>(value);
      open = sigmoid_vec<T>(open);
      if (value_to) {
        store_some(value_to + i, value, m, non_temporal && m == Lanes<T>);
        store_some(gate_to + i, open, m, non_temporal && m == Lanes<T>);
      }
      store_some(to + i, value * open, m);
    });
  }

  // to[B, rows, T] = add + rows of output_weight times z.
  void output(const Runs<T>& runs, ptrdiff_t vectors, ptrdiff_t first_row, ptrdiff_t rows, const T* add, T* to) const {
    const ptrdiff_t G = p.gates(), length = p.conv.length;
    const RowBlocks blocks(rows);
    for (ptrdiff_t block = 0; block < blocks.count; ++block) {
      const ptrdiff_t row = blocks.begin(block), end = blocks.begin(block + 1);
      for (const Run& run : runs) {
        const ptrdiff_t at = (run.b * rows + row) * length + run.t;
        prefetch_rows<true>(to + at, end - row, length, run.n, 0, 1);
        if (add) prefetch_rows<false>(add + at, end - row, length, run.n, 0, 1);
      }
      multiply_tile<T>(end - row, vectors)(p.output_weight + (first_row + row) * G, G, z, G, outputs, kColumns<T>,
                                           false);
      for (ptrdiff_t r = row; r < end; ++r) {
        const T bias = p.output_bias ? p.output_bias[first_row + r] : T(0);
        for (const Run& run : runs) {
          const ptrdiff_t at = (run.b * rows + r) * length + run.t;
          const T* const from = outputs + (r - row) * kColumns<T> + run.column;
          for_vectors<T>(run.n, [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
            Vec<T> sum = load_some(from + i, m) + bias;
            if (add) sum += load_some(add + at + i, m);
            store_some(to + at + i, sum, m);
          });
        }
      }
    }
  }

  void run(ptrdiff_t begin, ptrdiff_t count) const {
    const ptrdiff_t G = p.gates(), C = p.conv.in_channels, vectors = ceil_div(count, Lanes<T>);
    const ptrdiff_t z_stride = vectors * Lanes<T>;
    product_tile(
        product, 0, begin, count, 0, RowBlocks(2 * G).count, scratch,
        [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) {
          if (p.condition) prefetch_row<false>(p.condition + (b * 2 * G + channel) * p.conv.length + t, n);
        },
        [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
          if (channel >= G) gate(channel - G, b, t, n, acc, z_stride);
        });
    const Runs<T> runs(product, begin, count);
    if (p.residual) output(runs, vectors, 0, C, p.x, p.y);
    output(runs, vectors, C, p.skips, p.skip, p.next_skip);
  }
};

template <typename T>
bool wavenet_forward(const WaveNetForward<T>& p) {
  const ConvShape& s = p.conv;
  const ptrdiff_t G = p.gates();
  const ptrdiff_t size = whole_lines(product_scratch<T>(2 * G, s.in_channels * s.kernel_size));
  const ptrdiff_t z_size = whole_lines(G * kColumns<T>), output_size = kRows * kColumns<T>;
  Workspace workspace;
  T *scratches, *all_z, *all_outputs;
  Tap* taps;
  workspace.reserve(scratches, p.threads * size);
  workspace.reserve(all_z, p.threads * z_size);
  workspace.reserve(all_outputs, p.threads * output_size);
  workspace.reserve(taps, s.kernel_size);
  Reaches<T> reaches(s, p.history);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  for (ptrdiff_t k = 0; k < s.kernel_size; ++k) taps[k] = s.tap(k);
  const Product<T> product = {p.weight,
                              {p.x, p.history, s.in_channels, s.length, s.length, s.context()},
                              &s,
                              taps,
                              /*newest=*/s.kernel_size - 1,
                              /*first_row=*/0,
                              s.batch,
                              2 * G,
                              s.in_channels,
                              /*first=*/0,
                              s.length,
                              /*only=*/nullptr,
                              &reaches};
  const Tiles<T> tiles(s.batch, s.length, p.threads);
#pragma omp parallel num_threads(p.threads)
  {
    reaches.fill();
    const ptrdiff_t me = omp_get_thread_num();
    const ForwardTile<T> tile = {p, product, scratches + me * size, all_z + me * z_size,
                                 all_outputs + me * output_size};
#pragma omp for schedule(dynamic, 1)
    for (ptrdiff_t i = 0; i < tiles.count(); ++i) tile.run(tiles.begin(i), tiles.end(i) - tiles.begin(i));
    if (p.non_temporal) fence_stores();
  }
  return true;
}

// The rows of dy and dskip' that are there: `depth` rows from first on of the C + S.
template <typename T>
struct Outputs {
  ptrdiff_t first, depth, channels, skips;
  explicit Outputs(const WaveNetBackward<T>& p)
      : first(p.grad_y ? 0 : p.conv.in_channels),
        depth((p.grad_y ? p.conv.in_channels : 0) + (p.grad_skip ? p.skips : 0)),
        channels(p.conv.in_channels),
        skips(p.skips) {}
};

// Values of each part of a thread's memory, in whole lines.
template <typename T>
struct WaveNetSizes {
  ptrdiff_t scratch, outputs, z, dz, partial, output_partial, output_sums, sums;
  explicit WaveNetSizes(const WaveNetBackward<T>& p)
      : scratch(whole_lines(larger(product_scratch<T>(p.conv.in_channels, p.conv.out_channels * p.conv.kernel_size),
                                   kWeightSteps * kColumns<T>))),
        outputs(whole_lines((p.conv.in_channels + p.skips) * kColumns<T>)),
        z(whole_lines(p.gates() * kColumns<T>)),
        dz(kRows * kColumns<T>),
        partial(whole_lines(WeightPanels<T>(p.conv.out_channels).size(p.conv))),
        output_partial(whole_lines((p.conv.in_channels + p.skips + Lanes<T>)*p.gates())),
        output_sums(whole_lines((p.conv.in_channels + p.skips) * Lanes<T>)),
        sums(whole_lines(p.conv.out_channels * Lanes<T>)) {}
};

// A thread's memory, and its work on tiles.
template <typename T>
struct BackwardTile {
  const WaveNetBackward<T>& p;
  const Product<T>& data;      // the product of dx
  const T* output_transposed;  // [G, C + S]
  bool needs_gate;             // whether dv is
  T *scratch, *outputs, *z, *dz, *partial, *output_partial, *output_sums;

  // dv of a tile, the sums of its rows (added to `sums`), and what the tile gives to the gradients of the output
  // weight and bias. `next`: the tile whose operands are to be fetched, as begin of its columns; -1: none.
  void gate(ptrdiff_t begin, ptrdiff_t count, T* sums, ptrdiff_t next) const {
    const ptrdiff_t G = p.gates(), C = p.conv.in_channels, S = p.skips, length = p.conv.length;
    const ptrdiff_t vectors = ceil_div(count, Lanes<T>), width = vectors * Lanes<T>;
    const Outputs<T> given(p);
    const Runs<T> runs(data, begin, count);
    const auto take = [&](const T* from, ptrdiff_t rows, T* to, T* row_sums) {
      for (ptrdiff_t r = 0; r < rows; ++r, to += width) {
        for (const Run& run : runs) {
          const T* const row = from + (run.b * rows + r) * length + run.t;
          for_vectors<T>(run.n, [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
            store_some(to + run.column + i, load_some(row + i, m), m);
          });
        }
        clear(to + count, width - count);
        Vec<T> sum = load(row_sums + r * Lanes<T>);
        for (ptrdiff_t i = 0; i < width; i += Lanes<T>) sum += load(to + i);
        store(row_sums + r * Lanes<T>, sum);
      }
    };
    if (p.grad_y) take(p.grad_y, C, outputs, output_sums);
    if (p.grad_skip) {
      const ptrdiff_t before = p.grad_y ? C : 0;
      take(p.grad_skip, S, outputs + before * width, output_sums + C * Lanes<T>);
    }
    if (!needs_gate && !p.grad_output_weight) return;
    const RowBlocks blocks(G);
    for (ptrdiff_t block = 0; block < blocks.count; ++block) {
      const ptrdiff_t row = blocks.begin(block), end = blocks.begin(block + 1);
      if (next >= 0) {
        const ptrdiff_t b = next / length, t = next % length, n = smaller(kColumns<T>, length - t);
        if (p.grad_y) prefetch_rows<false>(p.grad_y + b * C * length + t, C, length, n, block, blocks.count);
        if (p.grad_skip) prefetch_rows<false>(p.grad_skip + b * S * length + t, S, length, n, block, blocks.count);
      }
      if (needs_gate) {
        for (const Run& run : runs) {
          T* const to = p.gate + (run.b * 2 * G + row) * p.gate_stride + run.t;
          prefetch_rows<true>(to, end - row, p.gate_stride, run.n, 0, 1);
          prefetch_rows<true>(to + G * p.gate_stride, end - row, p.gate_stride, run.n, 0, 1);
        }
        multiply_tile<T>(end - row, vectors)(output_transposed + row * (C + S) + given.first, C + S, outputs,
                                             given.depth, dz, kColumns<T>, false);
      }
      for (ptrdiff_t r = row; r < end; ++r) {
        for (const Run& run : runs) differentiate(run, r, dz + (r - row) * kColumns<T> + run.column, sums);
      }
    }
    if (!p.grad_output_weight) return;
    const ConvShape second = {1, G, given.depth, kColumns<T>, 1, 1, 1};
    add_weight_gradient(second, z, static_cast<const T*>(nullptr), GradientTile<T>{outputs, width}, 0, 0,
                        Segment{0, count, 0}, Reach<T>(), 0, count, scratch, output_partial);
  }

  void differentiate(const Run& run, ptrdiff_t r, const T* dz_row, T* sums) const {
    const ptrdiff_t G = p.gates(), rows = 2 * G, length = p.conv.length;
    const T* const values = p.saved + saved_at(rows, length, run.b, r, run.t);
    const T* const opens = p.saved + saved_at(rows, length, run.b, r + G, run.t);
    T* const to = p.gate + (run.b * rows + r) * p.gate_stride + run.t;
    Vec<T> value_sum = {}, open_sum = {};
    for_vectors<T>(run.n, [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
      const Vec<T> value = load_some(values + i, m), open = load_some(opens + i, m);
      store_some(z + r * kColumns<T> + run.column + i, value * open, m);
      if (!needs_gate) return;
      const Vec<T> d = load_some(dz_row + i, m) * open;
      const Vec<T> d_value = d * (T(1) - value * value), d_open = d * value * (T(1) - open);
      value_sum += d_value;
      open_sum += d_open;
      store_some(to + i, d_value, m);
      store_some(to + G * p.gate_stride + i, d_open, m);
    });
    if (!needs_gate) return;
    T* const own = sums + r * Lanes<T>;
    store(own, load(own) + value_sum);
    store(own + G * Lanes<T>, load(own + G * Lanes<T>) + open_sum);
  }

  // dx of a tile; of its rows that begin in it the history's gradient.
  void inputs(ptrdiff_t begin, ptrdiff_t count) const {
    const ConvShape& s = p.conv;
    const ptrdiff_t C = s.in_channels, length = s.length, context = s.context(), blocks = RowBlocks(C).count;
    if (p.grad_x) {
      product_tile(
          data, 0, begin, count, 0, blocks, scratch,
          [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n) {
            const ptrdiff_t at = (b * C + channel) * length + t;
            prefetch_row<true>(p.grad_x + at, n);
            if (p.grad_y) prefetch_row<false>(p.grad_y + at, n);
          },
          [&](ptrdiff_t channel, ptrdiff_t b, ptrdiff_t t, ptrdiff_t n, const T* acc) {
            const ptrdiff_t at = (b * C + channel) * length + t;
            for_vectors<T>(n, [&](ptrdiff_t i, int m) __attribute__((always_inline)) {
              Vec<T> d = load_some(acc + i, m);
              if (p.grad_y) d += load_some(p.grad_y + at + i, m);
              store_some(p.grad_x + at + i, d, m);
            });
          });
    }
    if (!p.grad_history || begin % length != 0) return;
    for (ptrdiff_t b = begin / length; b * length < begin + count; ++b) {
      if (s.segment(b, 0).history == kZeros) {
        clear(p.grad_history + b * C * context, C * context);
        continue;
      }
      Product<T> head = data;
      head.reaches = nullptr;
      head.signal.values += b * s.out_channels * p.gate_stride;
      head.first_row = b;
      head.batch = 1;
      head.first = -context;
      head.steps = context;
      for (ptrdiff_t column = 0; column < context; column += kColumns<T>) {
        product_tile(
            head, 0, column, smaller(kColumns<T>, context - column), 0, blocks, scratch,
            [](ptrdiff_t, ptrdiff_t, ptrdiff_t, ptrdiff_t) {},
            [&](ptrdiff_t channel, ptrdiff_t, ptrdiff_t t, ptrdiff_t n, const T* acc) {
              memcpy(p.grad_history + (b * C + channel + 1) * context + t, acc, n * sizeof(T));
            });
      }
    }
  }

  void weights(ptrdiff_t begin, ptrdiff_t count) const {
    for (const Run& run : Runs<T>(data, begin, count)) {
      add_weight_gradient(p.conv, p.x, p.history, GradientTile<T>{p.gate, p.gate_stride}, run.b, run.b, run.segment,
                          data.reaches->of(run.b), run.t, run.t + run.n, scratch, partial);
    }
  }
};

template <typename T>
bool wavenet_backward(const WaveNetBackward<T>& p) {
  const ConvShape& s = p.conv;
  const ptrdiff_t C = s.in_channels, S = p.skips, G = p.gates(), K = s.kernel_size, R = C + S;
  const bool wants_data = p.grad_x || p.grad_history;
  const bool needs_gate = wants_data || p.grad_weight || p.grad_bias || p.grad_global || p.wants_gate;
  const WaveNetSizes<T> sizes(p);
  const Outputs<T> given(p);
  const ptrdiff_t slots = s.batch + p.threads;  // a row of the batch, in a thread
  Workspace workspace;
  T *transposed, *output_transposed, *all_sums, *scratches, *all_outputs, *all_z, *all_dz, *partials, *output_partials,
      *all_output_sums;
  Tap* taps;
  workspace.reserve(transposed, C * 2 * G * K);
  workspace.reserve(output_transposed, G * R);
  workspace.reserve(all_sums, slots * sizes.sums);
  workspace.reserve(scratches, p.threads * sizes.scratch);
  workspace.reserve(all_outputs, p.threads * sizes.outputs);
  workspace.reserve(all_z, p.threads * sizes.z);
  workspace.reserve(all_dz, p.threads * sizes.dz);
  workspace.reserve(partials, p.threads * sizes.partial);
  workspace.reserve(output_partials, p.threads * sizes.output_partial);
  workspace.reserve(all_output_sums, p.threads * sizes.output_sums);
  workspace.reserve(taps, K);
  Reaches<T> reaches(s, p.history || p.grad_history);
  workspace.reserve(reaches.before, reaches.size());
  workspace.reserve(reaches.after, reaches.size());
  if (!workspace.allocate()) return false;
  for (ptrdiff_t k = 0; k < K; ++k) taps[k] = {-s.tap(k).steps, 0};
  const Product<T> data = {transposed,
                           {p.gate, nullptr, 2 * G, s.length, p.gate_stride, 0},
                           &s,
                           taps,
                           /*newest=*/0,
                           /*first_row=*/0,
                           s.batch,
                           C,
                           2 * G,
                           /*first=*/0,
                           s.length,
                           /*only=*/nullptr,
                           &reaches,
                           /*forward=*/false};
  const Tiles<T> tiles(s.batch, s.length, p.threads, /*joins=*/!p.grad_global);

#pragma omp parallel num_threads(p.threads)
  {
    reaches.fill();
    const ptrdiff_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const BackwardTile<T> tile = {p,
                                  data,
                                  output_transposed,
                                  needs_gate,
                                  scratches + me * sizes.scratch,
                                  all_outputs + me * sizes.outputs,
                                  all_z + me * sizes.z,
                                  all_dz + me * sizes.dz,
                                  partials + me * sizes.partial,
                                  output_partials + me * sizes.output_partial,
                                  all_output_sums + me * sizes.output_sums};
    if (wants_data) {
#pragma omp for schedule(static) nowait
      for (ptrdiff_t c = 0; c < C; ++c) {  // [C, 2G, K] of [2G, C, K]
        for (ptrdiff_t o = 0; o < 2 * G; ++o) {
          for (ptrdiff_t k = 0; k < K; ++k) transposed[(c * 2 * G + o) * K + k] = p.weight[(o * C + c) * K + k];
        }
      }
    }
#pragma omp for schedule(static) nowait
    for (ptrdiff_t g = 0; g < G; ++g) {
      for (ptrdiff_t r = 0; r < R; ++r) output_transposed[g * R + r] = p.output_weight[r * G + g];
    }
#pragma omp for schedule(static) nowait
    for (ptrdiff_t slot = 0; slot < slots; ++slot) memset(all_sums + slot * sizes.sums, 0, sizes.sums * sizeof(T));
    memset(tile.partial, 0, sizes.partial * sizeof(T));
    memset(tile.output_partial, 0, sizes.output_partial * sizeof(T));
    memset(tile.output_sums, 0, sizes.output_sums * sizeof(T));
#pragma omp barrier
    const ptrdiff_t first = tiles.count() * me / team, last = tiles.count() * (me + 1) / team;
    // A tile of several rows sums in the slot of its first one.
    const auto sums_of = [&](ptrdiff_t i) { return all_sums + (tiles.row(i) + me) * sizes.sums; };
    ptrdiff_t ahead = first;  // up to here dv is there
    while (wants_data && ahead < last && tiles.time(first) > 0 && tiles.row(ahead) == tiles.row(first) &&
           tiles.time(ahead) < tiles.time(first) + s.context()) {
      tile.gate(tiles.begin(ahead), tiles.end(ahead) - tiles.begin(ahead), sums_of(ahead), -1);
      ++ahead;
    }
#pragma omp barrier
    for (ptrdiff_t i = last - 1; i >= first; --i) {
      const ptrdiff_t begin = tiles.begin(i), count = tiles.end(i) - begin;
      if (i >= ahead) tile.gate(begin, count, sums_of(i), i > ahead ? tiles.begin(i - 1) : -1);
      if (p.grad_weight) tile.weights(begin, count);
      if (wants_data) tile.inputs(begin, count);
    }
#pragma omp barrier
    const auto over_team = [&](const T* of_first, ptrdiff_t size) {
      T sum = 0;
      for (ptrdiff_t thread = 0; thread < team; ++thread) sum += of_first[thread * size];
      return sum;
    };
    // What a weight's gradient has in row o and input channel c, tap k, of the layout of WeightPanels.
    const auto from_panels = [&](const T* of_first, ptrdiff_t size, ptrdiff_t outputs, ptrdiff_t inputs, ptrdiff_t taps,
                                 ptrdiff_t o, T* to) {
      const WeightPanels<T> panels(outputs);
      const ptrdiff_t panel = o / kColumns<T>, column = panel * kColumns<T>, width = panels.width(panel);
      const T* const from = of_first + column * taps * inputs + o - column;
      for (ptrdiff_t c = 0; c < inputs; ++c) {
        for (ptrdiff_t k = 0; k < taps; ++k) to[c * taps + k] = over_team(from + (k * inputs + c) * width, size);
      }
    };
#pragma omp for schedule(static) nowait
    for (ptrdiff_t o = 0; o < 2 * G; ++o) {
      if (p.grad_weight) from_panels(partials, sizes.partial, 2 * G, C, K, o, p.grad_weight + o * C * K);
      if (!p.grad_bias && !p.grad_global) continue;
      T all = 0;
      for (ptrdiff_t b = 0; b < s.batch; ++b) {
        T sum = 0;
        for (ptrdiff_t thread = 0; thread < team; ++thread) {
          const ptrdiff_t from = tiles.count() * thread / team, to = tiles.count() * (thread + 1) / team;
          if (from == to || tiles.row(from) > b || tiles.row(to - 1) < b) continue;
          sum += horizontal_sum<T>(load(all_sums + (b + thread) * sizes.sums + o * Lanes<T>));
        }
        if (p.grad_global) p.grad_global[b * 2 * G + o] = sum;
        all += sum;
      }
      if (p.grad_bias) p.grad_bias[o] = all;
    }
#pragma omp for schedule(static)
    for (ptrdiff_t r = 0; r < R; ++r) {
      const bool there = r < C ? p.grad_y != nullptr : p.grad_skip != nullptr;
      if (p.grad_output_weight) {
        T* const to = p.grad_output_weight + r * G;
        if (there) {
          from_panels(output_partials, sizes.output_partial, given.depth, G, 1, r - given.first, to);
        } else {
          clear(to, G);
        }
      }
      if (!p.grad_output_bias) continue;
      T sum = 0;
      for (ptrdiff_t thread = 0; thread < team; ++thread) {
        sum += horizontal_sum<T>(load(all_output_sums + thread * sizes.output_sums + r * Lanes<T>));
      }
      p.grad_output_bias[r] = sum;
    }
  }
  return true;
}

extern const WaveNetKernels wavenet_kernels;
const WaveNetKernels wavenet_kernels = {wavenet_forward<float>, wavenet_forward<double>, wavenet_backward<float>,
                                        wavenet_backward<double>};

}  // namespace seqaccel::SEQACCEL_ISA::conv
