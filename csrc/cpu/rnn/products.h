// The products of a recurrent step: register tiles against packed panels of a weight, or dot products along its own
// rows.
#pragma once

#include <type_traits>

#include "cpu/base/integers.h"
#include "cpu/base/shuffle.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

// Rows of a register tile with NV vectors. With 3 vectors a tile has 8 rows, so that 16 rows take 2 tiles instead of 3:
// 8% faster (GRU (T, B, H) = (128, 16, 256)). With many rows and panels beyond L2 a tile has 6 rows for any NV: 8 are
// 1.5% slower ((128, 64, 512)).
template <int NV>
constexpr int kRows = SEQACCEL_REGISTERS < 32 ? 2
                      : NV > 3                ? 6
                                              : 8;
constexpr int kDotRows = SEQACCEL_REGISTERS >= 32 ? 4 : 2;  // rows of a tile of dot products with G weight rows
constexpr ptrdiff_t kPartial = 128;                         // products per partial sum
constexpr int kColumns = 4;                                 // vectors per panel of columns
constexpr ptrdiff_t kDepthBlock = 1024;                     // rows of a panel that stay in L2 for all tiles of a chunk
constexpr ptrdiff_t kLine = 64, kPage = 4096;
constexpr int kPrefetchRows = 3;  // a register tile of so many rows has time to prefetch

// ---------------------------------------------------------------- lanes to rows

// The even groups of W lanes of [a | b], or (High) the odd ones.
template <typename T, int W, bool High>
SEQACCEL_INLINE Vec<T> pick_groups(Vec<T> a, Vec<T> b) {
  typename VecTypes<T>::Int index = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < Lanes<T>; ++lane) index[lane] = 2 * (lane / W) * W + lane % W + (High ? W : 0);
  return __builtin_shuffle(a, b, index);
}

// Lane i of the result is the sum of the lanes of v[i]. The sums are pairwise, in a fixed order, and overwrite v.
template <typename T, int W = Lanes<T> / 2>
SEQACCEL_INLINE Vec<T> transposed_sum(Vec<T>* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    v[i] = pick_groups<T, W, false>(v[2 * i], v[2 * i + 1]) + pick_groups<T, W, true>(v[2 * i], v[2 * i + 1]);
  }
  if constexpr (W > 1) {
    return transposed_sum<T, W / 2>(v);
  } else {
    return v[0];
  }
}

// ---------------------------------------------------------------- products

// Cache lines that the update after a product will touch, to be prefetched to L2. A few lines are prefetched at once.
// Many would delay each other and the product. They are listed in pairs, and the tiles of the product prefetch one pair
// per step. Lines that the list has no room for are left to the update.
class PrefetchList {
 public:
  // Begins a list of `pieces` pieces of kBytes.
  template <ptrdiff_t kBytes>
  void begin(ptrdiff_t pieces) {
    const ptrdiff_t pairs = pieces * ((kBytes + kPair - 1) / kPair);
    listed_ = pairs >= 2 * kPartial;
    taken_ = count_ = 0;
  }
  template <ptrdiff_t kBytes>
  SEQACCEL_INLINE void add(const void* at) {
#pragma GCC unroll 8
    for (ptrdiff_t i = 0; i < kBytes; i += kPair) {
      const char* const pair = static_cast<const char*>(at) + i;
      if (!listed_) {
        fetch(pair);
      } else if (count_ < kRoom) {
        pairs_[count_++] = pair;
      }
    }
  }
  // Takes the next `steps` pairs from the list. If there are fewer, it prefetches them and returns null.
  const char* const* take(ptrdiff_t steps) {
    const char* const* const next = pairs_ + taken_;
    if (count_ - taken_ >= steps) {
      taken_ += steps;
      return next;
    }
    for (; taken_ < count_; ++taken_) fetch(pairs_[taken_]);
    return nullptr;
  }

 private:
  static constexpr ptrdiff_t kPair = 2 * kLine, kRoom = 2048;
  SEQACCEL_INLINE static void fetch(const char* pair) {
    __builtin_prefetch(pair, 0, 2);
    __builtin_prefetch(pair + kLine, 0, 2);
  }
  bool listed_ = false;
  ptrdiff_t taken_ = 0, count_ = 0;
  const char* pairs_[kRoom];
};

// What a tile prefetches at step k:
//   kPage  the panel one page ahead, where the processor's own prefetching stops (4 rows and 2 MB of panels on an Intel
//          core with 2 MB of L2: 92 GFLOP/s instead of 72)
//   kPart  the line at + k * step and the one after it (12 rows and more, panels beyond L2: 3 to 6% faster)
//   kList  the line list[k] and the one after it
enum class Fetch { kPage, kPart, kList };
struct Ahead {
  const char* at = nullptr;
  ptrdiff_t step = 0;
  const char* const* list = nullptr;
};

// While `tiles` tiles use one part of a panel, each prefetches a share of the next part.
template <typename T, int NV>
SEQACCEL_INLINE Ahead ahead_of(const T* part, ptrdiff_t tile, ptrdiff_t shares) {
  const ptrdiff_t step = NV * SEQACCEL_VECTOR_BYTES / shares;
  return {reinterpret_cast<const char*>(part) + kPartial * (NV * SEQACCEL_VECTOR_BYTES + tile * step), step};
}

// out [MR, NV vectors] (+)= a [MR, K] * panel; row k of the panel lies at panel + k * panel_row.
template <typename T, int MR, int NV, Fetch kFetch>
void rnn_tile(const T* a, ptrdiff_t a_row, const T* panel, ptrdiff_t panel_row, ptrdiff_t K, T* out, bool add,
              Ahead ahead) {
  Vec<T> acc[MR][NV] = {};
  for (ptrdiff_t k = 0; k < K; ++k) {
    Vec<T> b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(panel + v * Lanes<T>);
#pragma GCC unroll 8
    for (int v = 0; v < NV && MR == 2; ++v) keep(b[v]);  // backward 9% faster with 2 rows per thread, H = 128
    if (kFetch != Fetch::kPage) {
      if (kFetch == Fetch::kList) ahead.at = ahead.list[k];
      __builtin_prefetch(ahead.at, 0, 2);
      __builtin_prefetch(ahead.at + kLine, 0, 2);
      ahead.at += ahead.step;
    } else if (MR >= kPrefetchRows) {
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) __builtin_prefetch(reinterpret_cast<const char*>(panel + v * Lanes<T>) + kPage);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = broadcast(a[m * a_row + k]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += x * b[v];
    }
    panel += panel_row;
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR * NV; ++i) {
    T* const sum = out + i * Lanes<T>;
    store(sum, add ? load(sum) + acc[i / NV][i % NV] : acc[i / NV][i % NV]);
  }
}

template <typename T, int NV, Fetch kFetch>
void rnn_rows(ptrdiff_t rows, const T* a, ptrdiff_t a_row, const T* panel, ptrdiff_t panel_row, ptrdiff_t K, T* out,
              bool add, Ahead ahead) {
  const auto tile = [&](auto count) {
    rnn_tile<T, count() <= kRows<NV> ? count() : 1, NV, kFetch>(a, a_row, panel, panel_row, K, out, add, ahead);
  };
  switch (rows) {
    case 1:
      return tile(std::integral_constant<int, 1>());
    case 2:
      return tile(std::integral_constant<int, 2>());
    case 3:
      return tile(std::integral_constant<int, 3>());
    case 4:
      return tile(std::integral_constant<int, 4>());
    case 5:
      return tile(std::integral_constant<int, 5>());
    case 6:
      return tile(std::integral_constant<int, 6>());
    case 7:
      return tile(std::integral_constant<int, 7>());
    default:
      return tile(std::integral_constant<int, kRows<NV>>());
  }
}

// out [rows, NV vectors] (+)= a [rows, K] * panel. The sum over K is made of partial sums of kPartial products, since
// rounding errors grow with the square root of a chain's length. If the panels fit in L2, each tile of rows runs
// through kDepthBlock rows of the panel at a time. If they do not (`far`), all tiles run through kPartial rows of it
// (32 KB), which stay in L1, and meanwhile prefetch the next ones.
template <typename T, int NV>
void panel_product(ptrdiff_t rows, const T* a, ptrdiff_t a_row, const T* panel, ptrdiff_t panel_row, ptrdiff_t K,
                   T* out, bool add = false, bool far = false, PrefetchList* lines = nullptr) {
  const ptrdiff_t tiles = panel_count(rows, far && rows > 2 * kRows<NV> ? kRows<4> : kRows<NV>),
                  shares = tiles < 4 ? 2 : 4;
  const bool together = far && tiles > 1, contiguous = panel_row == NV * Lanes<T>;
  const ptrdiff_t depth = together ? kPartial : kDepthBlock;
  for (ptrdiff_t k0 = 0; k0 < K; k0 += depth) {
    const ptrdiff_t k_end = min_of(K, k0 + depth);
    for (ptrdiff_t tile = 0; tile < tiles; ++tile) {
      const ptrdiff_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
      T* const y = out + first * NV * Lanes<T>;
      for (ptrdiff_t k = k0; k < k_end; k += kPartial) {
        const ptrdiff_t terms = min_of(kPartial, k_end - k);
        const T* const x = a + first * a_row + k;
        const T* const part = panel + k * panel_row;
        const bool next_part = together && contiguous && tile < shares;
        const char* const* const list = next_part || lines == nullptr ? nullptr : lines->take(terms);
        if (next_part) {
          rnn_rows<T, NV, Fetch::kPart>(count, x, a_row, part, panel_row, terms, y, add || k > 0,
                                        ahead_of<T, NV>(part, tile, shares));
        } else if (list != nullptr) {
          rnn_rows<T, NV, Fetch::kList>(count, x, a_row, part, panel_row, terms, y, add || k > 0, {nullptr, 0, list});
        } else if (together) {
          rnn_rows<T, NV, Fetch::kPart>(count, x, a_row, part, panel_row, terms, y, add || k > 0,
                                        {reinterpret_cast<const char*>(part), 0});
        } else {
          rnn_rows<T, NV, Fetch::kPage>(count, x, a_row, part, panel_row, terms, y, add || k > 0, {});
        }
      }
    }
  }
}

// out [MR, G, L]: lane q of gate g is x [m] . weight[g * gate_stride + q * K ...] for q < units, else 0.
template <typename T, int G, int MR>
void dot_tile(const T* x, ptrdiff_t x_row, const T* weight, ptrdiff_t gate_stride, ptrdiff_t K, int units, T* out) {
  constexpr int L = Lanes<T>;
  typedef typename VecTypes<T>::Int Int;
  const ptrdiff_t full = K / L * L;
  const int tail = int(K - full);
  // The rest of a row is loaded as the end of its last L values. A row of fewer values is loaded whole.
  const ptrdiff_t tail_start = K >= L ? K - L : 0;
  const int tail_count = K >= L ? L : tail;
  Int keep = {};
  for (int lane = 0; lane < L; ++lane) keep[lane] = K < L || lane >= L - tail ? -1 : 0;
  Vec<T> x_tail[MR] = {};
  for (int m = 0; m < MR && tail; ++m) {
    x_tail[m] = (Vec<T>)((Int)load_some(x + m * x_row + tail_start, tail_count) & keep);
  }
  Vec<T> sums[MR][G][L];
  for (int q = 0; q < L; ++q) {
    Vec<T> acc[MR][G] = {};
    if (q < units) {
      const T* const row = weight + q * K;
      for (ptrdiff_t k = 0; k < full; k += L) {
        Vec<T> w[G];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) w[g] = load(row + g * gate_stride + k);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
          const Vec<T> value = load(x + m * x_row + k);
#pragma GCC unroll 8
          for (int g = 0; g < G; ++g) acc[m][g] += value * w[g];
        }
      }
      if (tail) {
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          const Vec<T> w = (Vec<T>)((Int)load_some(row + g * gate_stride + tail_start, tail_count) & keep);
#pragma GCC unroll 8
          for (int m = 0; m < MR; ++m) acc[m][g] += x_tail[m] * w;
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
      for (int g = 0; g < G; ++g) sums[m][g][q] = acc[m][g];
    }
  }
  for (int m = 0; m < MR; ++m) {
    for (int g = 0; g < G; ++g) store(out + (m * G + g) * L, transposed_sum<T>(sums[m][g]));
  }
}

template <typename T, int G>
void dot_product(ptrdiff_t rows, const T* x, ptrdiff_t x_row, const T* weight, ptrdiff_t gate_stride, ptrdiff_t K,
                 int units, T* out) {
  for (ptrdiff_t m = 0; m < rows; m += kDotRows) {
    const T* const from = x + m * x_row;
    T* const to = out + m * G * Lanes<T>;
    switch (min_of(rows - m, kDotRows)) {
      case 1:
        dot_tile<T, G, 1>(from, x_row, weight, gate_stride, K, units, to);
        break;
      case 2:
        dot_tile<T, G, 2>(from, x_row, weight, gate_stride, K, units, to);
        break;
      case 3:
        dot_tile<T, G, kDotRows >= 3 ? 3 : 1>(from, x_row, weight, gate_stride, K, units, to);
        break;
      default:
        dot_tile<T, G, kDotRows>(from, x_row, weight, gate_stride, K, units, to);
    }
  }
}

// ---------------------------------------------------------------- packing

// panel [K, G, L] of the units u*L ...: lane q of gate g at k is weight[g*H + u*L + q][k]; zero past the last unit.
template <typename T, int G>
void pack_units(T* panel, const T* weight, ptrdiff_t H, ptrdiff_t K, ptrdiff_t u) {
  constexpr int L = Lanes<T>;
  const int units = int(min_of(L, H - u * L));
  for (int g = 0; g < G; ++g) {
    const T* const rows = weight + (g * H + u * L) * K;
    for (ptrdiff_t k = 0; k < K; k += L) {
      const int count = int(min_of(L, K - k));
      Vec<T> square[L];
      for (int q = 0; q < L; ++q) square[q] = q < units ? load_some(rows + q * K + k, count) : Vec<T>{};
      transpose<T>(square);
      for (int i = 0; i < count; ++i) store(panel + ((k + i) * G + g) * L, square[i]);
    }
  }
}

// panel [rows, kColumns * L] of the columns j * kColumns * L ... of weight [rows, H]; zero past the last column.
template <typename T>
void pack_columns(T* panel, const T* weight, ptrdiff_t rows, ptrdiff_t H, ptrdiff_t j) {
  constexpr int L = Lanes<T>;
  for (ptrdiff_t k = 0; k < rows; ++k) {
    for (int v = 0; v < kColumns; ++v) {
      const ptrdiff_t column = (j * kColumns + v) * L;
      const int count = int(max_of(0, min_of(L, H - column)));
      store(panel + (k * kColumns + v) * L, count > 0 ? load_some(weight + k * H + column, count) : Vec<T>{});
    }
  }
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
