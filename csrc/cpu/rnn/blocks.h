// What every loop over steps uses: the rows of a thread, the product of a block of units, and where its values lie.
#pragma once

#include "common/product_cells.h"
#include "cpu/rnn/products.h"
#include "cpu/rnn/rnn.h"
#include "cpu/rnn/team.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr ptrdiff_t kChunk = 48;  // rows between a product and its update: 12 KB of L1

template <typename T>
struct Functions {
  SEQACCEL_INLINE static Vec<T> sigmoid(Vec<T> x) { return sigmoid_vec<T>(x); }
  SEQACCEL_INLINE static Vec<T> tanh(Vec<T> x) { return tanh_vec<T>(x); }
};

// The rows of a thread: row i is b = first + i * step. Sequences of different lengths are dealt out one by one, so that
// every thread gets as many long ones.
struct RowShare {
  ptrdiff_t first, step, size;
  ptrdiff_t at(ptrdiff_t i) const { return first + i * step; }
  // How many of them are among the first `running` rows of the batch.
  ptrdiff_t among(ptrdiff_t running) const {
    return min_of(size, running > first ? (running - first + step - 1) / step : 0);
  }
};

inline RowShare row_share(const Split& split, const Share& share, const RnnRows& rows) {
  if (!rows.running) return {ptrdiff_t(share.b0), 1, ptrdiff_t(share.b1 - share.b0)};
  return {share.part, split.parts, (rows.batch - share.part + split.parts - 1) / split.parts};
}

// A thread of a team: its number and its share of the work.
struct Member {
  int thread;
  Split split;
  Share share;
  RowShare rows;
  Barrier* barrier;
  int part() const { return share.part; }
  void wait() const { wait_for_all(*barrier, split.groups); }
};

inline Member member_of(const Split& split, int thread, const RnnRows& rows, Barrier* barriers) {
  const Share share = share_of(split, thread, rows.batch);
  return {thread, split, share, row_share(split, share, rows), barriers + (share.idle ? 0 : share.part)};
}

// The threads of a pass.
struct Team {
  const RnnRows& rows;
  ptrdiff_t weights, weight_bytes, blocks;  // values and bytes of the weights that a step reads; blocks of units
  ptrdiff_t rows_from_l2 = kRowsFromL2;
  Split planned = split(team_size());
  Barrier* barriers = nullptr;  // [threads()]

  int threads() const { return planned.threads(); }
  // Whether a thread's panels exceed its L2.
  bool far() const { return beyond_l2(weight_bytes / planned.groups); }
  Split split(int count) const {
    return split_work(count, rows.steps, rows.usual, weights, weight_bytes, blocks, rows_from_l2);
  }

  // Calls prepare(me) on every thread and, when all are ready, walk(me) on those that have a share. Returns the split.
  template <class Prepare, class Walk>
  Split run(const Prepare& prepare, const Walk& walk) const {
    Split shared{};
    memset(barriers, 0, sizeof(Barrier) * size_t(threads()));
#pragma omp parallel num_threads(threads())
    {
      const Split split_here = split(omp_get_num_threads());
      const Member me = member_of(split_here, omp_get_thread_num(), rows, barriers);
      if (me.thread == 0) shared = split_here;
      prepare(me);
#pragma omp barrier
      if (!me.share.idle) walk(me);
    }
    return shared;
  }
};

// How many weights a step's products read, without those of the input.
template <class Cell>
constexpr ptrdiff_t recurrent_weights(ptrdiff_t H, ptrdiff_t P, bool projected) {
  return (kMain<Cell> + Cell::kFirst) * H * P + (projected ? P * H : 0);
}

// The part of `count` blocks of units that belongs to a thread.
struct Blocks {
  ptrdiff_t begin, end;
  // The i-th block that a step runs (odd steps run backwards), and the last one.
  ptrdiff_t at(ptrdiff_t i, ptrdiff_t step) const { return step & 1 ? end - 1 - i : begin + i; }
  ptrdiff_t last(ptrdiff_t step) const { return at(end - begin - 1, step); }
};

inline Blocks blocks_of(const Member& me, ptrdiff_t count) {
  return {count * me.share.group / me.split.groups, count * (me.share.group + 1) / me.split.groups};
}

// Calls body(block, row, rows) for a thread's part of `count` blocks of units and its first `rows` rows in chunks.
template <class Body>
SEQACCEL_INLINE void for_blocks(const Member& me, ptrdiff_t count, ptrdiff_t step, ptrdiff_t rows, const Body& body) {
  const Blocks mine = blocks_of(me, count);
  for (ptrdiff_t i = 0; i < mine.end - mine.begin; ++i) {
    for (ptrdiff_t row = 0; row < rows; row += kChunk) body(mine.at(i, step), row, min_of(kChunk, rows - row));
  }
}

// Calls pack(block) for `count` blocks. Each thread packs blocks that it reads itself, so that they are in its own L2:
// forward is 5% faster for LSTM and GRU (T, B, H) = (128, 1, 256), and 3% for (128, 4, 256), than with blocks packed in
// turn.
template <class Pack>
SEQACCEL_INLINE void pack_blocks(const Member& me, ptrdiff_t count, const Pack& pack) {
  const Blocks mine = blocks_of(me, count);
  for (ptrdiff_t u = mine.begin + me.part(); u < mine.end && !me.share.idle; u += me.split.parts) pack(u);
}

// Calls body(unit, units in the vector) for a thread's part of the vectors of `width` values. The parts do not depend
// on the blocks of a product.
template <typename T, class Body>
SEQACCEL_INLINE void for_units(const Member& me, ptrdiff_t width, const Body& body) {
  constexpr int L = Lanes<T>;
  const Blocks mine = blocks_of(me, panel_count(width, L));
  for (ptrdiff_t v = mine.begin; v < mine.end; ++v) body(v * L, int(min_of(L, width - v * L)));
}

// Prefetches the first `running` rows of a thread, `row` apart, to L2 before a product reads them. Other cores have
// just written parts of them, and such lines take long to arrive. So all are requested at once, where the product would
// request a few at a time: RNN is 14% faster, LSTM 4% ((T, B, H) = (128, 4, 256)). Rows of up to one partial sum are
// left to the processor's own prefetching.
template <typename T>
SEQACCEL_INLINE void fetch_rows(const Member& me, const T* rows, ptrdiff_t row, ptrdiff_t width, ptrdiff_t running) {
  constexpr ptrdiff_t kValues = kLine / ptrdiff_t(sizeof(T));
  if (me.split.groups == 1 || width <= kPartial) return;
  for (ptrdiff_t i = 0; i < running; ++i) {
    const T* const at = rows + me.rows.at(i) * row;
    for (ptrdiff_t k = 0; k < width; k += kValues) __builtin_prefetch(at + k, 0, 2);
  }
}

// Copies [count, H] to rows of this stride, filled up with zeros. If `from` is null, all is zero.
template <typename T>
void spread_rows(T* to, ptrdiff_t stride, const T* from, ptrdiff_t count, ptrdiff_t H) {
  for (ptrdiff_t i = 0; i < count; ++i) {
    for (ptrdiff_t k = 0; k < stride; ++k) to[i * stride + k] = from && k < H ? from[i * H + k] : T(0);
  }
}

template <typename T>
SEQACCEL_INLINE Vec<T> blend_at(const RnnBlend<T>& blend, ptrdiff_t offset, int units) {
  return blend.one ? broadcast(blend.factors[0]) : load_some(blend.factors + offset, units);
}

// y [rows, G, U, L] (+)= a [rows, K] W^T for block u of U * Lanes<T> units. All G pre-activations of a unit lie side by
// side; with one pre-activation a block has four vectors of units. W [G*N, K] is packed into panels, or its rows are
// read in place.
template <typename T, int G>
struct UnitProduct {
  static constexpr int U = G == 1 ? kColumns : 1, V = G * U;
  const T* weight;
  ptrdiff_t N, K;
  T* panels = nullptr;       // null: the rows are read in place
  ptrdiff_t panel_size = 0;  // from one panel to the next, which may hold more than this weight's K rows
  bool far = false;          // a thread's panels exceed its L2

  static ptrdiff_t blocks(ptrdiff_t N) { return panel_count(N, U * Lanes<T>); }
  static ptrdiff_t panel_values(ptrdiff_t K) { return K * V * Lanes<T>; }

  void pack(ptrdiff_t u) const {
    T* const panel = panels + u * panel_size;
    if constexpr (U == 1) {
      pack_units<T, G>(panel, weight, N, K, u);
    } else {
      constexpr int L = Lanes<T>;
      const ptrdiff_t first = u * U * L;
      if (first + U * L <= N) return pack_units<T, U>(panel, weight + first * K, L, K, 0);
      for (ptrdiff_t k = 0; k < K; ++k) {
        for (ptrdiff_t n = 0; n < U * L; ++n) panel[k * U * L + n] = first + n < N ? weight[(first + n) * K + k] : T(0);
      }
    }
  }

  void operator()(ptrdiff_t rows, const T* a, ptrdiff_t a_row, ptrdiff_t u, T* y, bool add = false,
                  PrefetchList* lines = nullptr) const {
    constexpr int L = Lanes<T>;
    if (panels) return panel_product<T, V>(rows, a, a_row, panels + u * panel_size, V * L, K, y, add, far, lines);
    if constexpr (U == 1) {
      dot_product<T, G>(rows, a, a_row, weight + u * L * K, N * K, K, int(min_of(L, N - u * L)), y);
    } else {
      const ptrdiff_t first = u * U * L;
      if (first + U * L <= N) return dot_product<T, U>(rows, a, a_row, weight + first * K, L * K, K, L, y);
      T sums[kChunk * L];
      for (int v = 0; v < U && first + v * L < N; ++v) {
        dot_product<T, 1>(rows, a, a_row, weight + (first + v * L) * K, 0, K, int(min_of(L, N - first - v * L)), sums);
        for (ptrdiff_t i = 0; i < rows; ++i) store(y + (i * U + v) * L, load(sums + i * L));
      }
    }
  }
};

// Computes the input's part of the pre-activations of a thread's blocks some steps ahead. W_ih x needs no state, so one
// product can take the rows of several steps. It then runs at the machine's peak, where the rows of one step are too
// few.
template <typename T, int G>
struct InputAhead {
  typedef UnitProduct<T, G> Product;
  const Product& product;
  const T* input;  // packed [., I]
  const RnnRows& rows;
  const RowShare& share;
  T* values;          // [blocks of the thread, held, V, L]
  ptrdiff_t steps;    // how many at a time; 1: nothing is held
  ptrdiff_t held;     // rows of `values`
  ptrdiff_t low = 0;  // the lowest time held

  static ptrdiff_t steps_ahead(ptrdiff_t share_rows) {
    return share_rows == 0 ? 1 : max_of(1, kAheadRows / share_rows);
  }
  static ptrdiff_t capacity(ptrdiff_t share_rows) { return max_of(kAheadRows, share_rows); }

  // Whether the rows of consecutive times are adjacent in memory.
  bool dense() const { return share.first == 0 && share.step == 1 && share.size == rows.batch; }
  ptrdiff_t offset(ptrdiff_t t) const {
    return dense() ? rows.packed(t, 0) - rows.packed(low, 0) : (t - low) * share.size;
  }
  T* at(ptrdiff_t block, ptrdiff_t t) const { return values + (block * held + offset(t)) * Product::V * Lanes<T>; }

  // Computes the times [t0, t1) for the blocks [u0, u1).
  void fill(ptrdiff_t t0, ptrdiff_t t1, ptrdiff_t u0, ptrdiff_t u1) {
    const ptrdiff_t K = product.K;
    low = t0;
    for (ptrdiff_t u = u0; u < u1; ++u) {
      if (dense()) {
        const ptrdiff_t count = rows.packed(t1 - 1, 0) + rows.count(t1 - 1) - rows.packed(t0, 0);
        product(count, input + rows.packed(t0, 0) * K, K, u, at(u - u0, t0));
        continue;
      }
      for (ptrdiff_t t = t0; t < t1; ++t) {
        const ptrdiff_t count = share.among(rows.count(t));
        if (count > 0) product(count, input + rows.packed(t, share.first) * K, share.step * K, u, at(u - u0, t));
      }
    }
  }
};

// y [rows, kColumns vectors] (+)= a [rows, K] W for block j of kColumns vectors of W's columns, W [K, N]. Blocks before
// packed_from are read from W in place.
template <typename T>
struct ColumnProduct {
  static constexpr int kWidth = kColumns * Lanes<T>;
  const T* weight;
  ptrdiff_t N, K;
  ptrdiff_t packed_from = 0;
  T* panels = nullptr;
  bool far = false;  // a thread's panels exceed its L2

  // Chooses what to pack. `few`: there are so few rows in all that packing costs more than it gains. It does not gain
  // either where W fits in L2 but not in L1, and its rows are a few whole lines: panels make the sweep of GRU
  // (T, B, H) = (128, 4, 256) 10% slower, and of GRU (128, 16, 128) 12%. Packing gains with weights of 1 MB
  // (multiplicative LSTM of 256 units), and with rows of 2 KB or of half a line.
  static ColumnProduct of(const T* weight, ptrdiff_t N, ptrdiff_t K, bool few) {
    constexpr ptrdiff_t kNearRow = 1024, kNearWeights = ptrdiff_t(768) << 10;
    const ptrdiff_t row = N * ptrdiff_t(sizeof(T)), bytes = K * row;
    const bool lines = row % SEQACCEL_VECTOR_BYTES == 0 && uintptr_t(weight) % SEQACCEL_VECTOR_BYTES == 0;
    const bool near = lines && row <= kNearRow && bytes > kFewWeights && bytes <= kNearWeights;
    return {weight, N, K, few || near ? N / kWidth : 0};
  }

  static ptrdiff_t blocks(ptrdiff_t N) { return panel_count(N, kWidth); }
  ptrdiff_t panel_values() const { return (blocks(N) - packed_from) * K * kWidth; }

  void pack(ptrdiff_t j) const {
    if (j >= packed_from) pack_columns<T>(panels + (j - packed_from) * K * kWidth, weight, K, N, j);
  }

  // Multiplies with the rows [k0, k0 + count) of W.
  void operator()(ptrdiff_t rows, const T* a, ptrdiff_t a_row, ptrdiff_t j, ptrdiff_t k0, ptrdiff_t count, T* y,
                  bool add = false, PrefetchList* lines = nullptr) const {
    const bool packed = j >= packed_from;
    const ptrdiff_t panel_row = packed ? kWidth : N;
    const T* const panel = packed ? panels + (j - packed_from) * K * kWidth : weight + j * kWidth;
    panel_product<T, kColumns>(rows, a, a_row, panel + k0 * panel_row, panel_row, count, y, add, far, lines);
  }
};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
