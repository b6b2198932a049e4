// A matrix product has two ways, by the layout of its operands.
//
// Packed: K runs in blocks of kDepth. For each block the team packs B into panels of NV vectors and, unless the rows of
// A are contiguous, A into strips of MR rows. Each thread then takes a share of the tiles of A, and multiplies each
// tile by a chunk of panels: the tile stays in L1 and the chunk (8 panels of 256 x 64 floats, 512 KB) in L2. The inner
// loop reads 256 bytes of L2 and does 24 vector multiply-adds per k, so arithmetic binds it. It prefetches what lies
// further away: the tile of C and the next tile of A.
//
// Direct, where A is given by columns, B by rows, and C and the rows of B are small: both operands are read in place,
// kChain values of k at a time. These are few enough pages and lines to stay in the caches; the next ones are
// prefetched meanwhile. Each thread owns a part of C, keeps it in its L2 while all of K passes, and waits for no other
// thread. Weight gradients of 128 units over 8192 steps reach 94% of the machine's peak (packed: 72%).
#include "cpu/base/integers.h"
#include "cpu/base/shuffle.h"
#include "cpu/base/tile.h"
#include "cpu/base/workspace.h"
#include "cpu/matmul/matmul.h"

namespace seqaccel::SEQACCEL_ISA::matmul {

constexpr int kTileRows = SEQACCEL_REGISTERS >= 32 ? 6 : SEQACCEL_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kTileVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;
constexpr ptrdiff_t kDepth = 256;
constexpr ptrdiff_t kChain = 64;      // products per partial sum: rounding errors grow with the root of its length
constexpr ptrdiff_t kPackDepth = 32;  // rows of A^T that are packed at a time: the lines they share stay in L1
constexpr ptrdiff_t kChunkPanels = 8;
constexpr ptrdiff_t kShareTiles = 4;  // with fewer tiles of rows per thread, threads share the columns too
constexpr int kLine = 64;

// Lines to prefetch, one per step of k.
struct Lines {
  const char* at;
  ptrdiff_t step;
};

// Where element (m, k) of a tile of A is: at[m * row + k] (kRows), at[m + k * kTileRows] of a packed strip (kStrip), or
// at[m + k * row] of A itself (kColumns).
enum class Layout { kRows, kStrip, kColumns };

template <typename T, int MR, int NV>
SEQACCEL_INLINE void add_tile(T* sums, const Vec<T> (&acc)[MR][NV], bool first) {
#pragma GCC unroll 32
  for (int i = 0; i < MR * NV; ++i) {
    T* const sum = sums + i * Lanes<T>;
    store(sum, first ? acc[i / NV][i % NV] : load(sum) + acc[i / NV][i % NV]);
  }
}

// C tile [MR, n] (+)= A tile [MR, K] * B [K, n]. B is a packed panel of whole vectors. With kColumns it is a matrix
// whose rows are b_row apart, n is a multiple of the vector, and K is at most kChain.
template <typename T>
struct TileProduct {
  const T* a;
  ptrdiff_t row;
  Layout layout;
  const T* b;
  ptrdiff_t b_row, K;
  T* c;
  ptrdiff_t c_row;
  int n;
  bool add;
  Lines lines;
};

template <typename T, int MR, int NV, Layout kLayout>
SEQACCEL_INLINE void product_tile(const TileProduct<T>& p) {
  constexpr int L = Lanes<T>;
  constexpr bool kDirect = kLayout == Layout::kColumns;
  const T *const a = p.a, *const b = p.b;
  T* c = p.c;
  const ptrdiff_t row = p.row, c_row = p.c_row;
  const ptrdiff_t a_k = kLayout == Layout::kRows ? 1 : kDirect ? row : kTileRows, b_k = kDirect ? p.b_row : NV * L;
  Lines lines = p.lines;
  alignas(64) T sums[kDirect ? 1 : MR * NV * L];
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) __builtin_prefetch(c + m * c_row + v * L, 1);
  }
  ptrdiff_t k0 = 0;
  do {
    const ptrdiff_t k1 = min_of(k0 + kChain, p.K);
    Vec<T> acc[MR][NV] = {};
    add_products<T, MR, NV>(acc, a + k0 * a_k, kLayout == Layout::kRows ? row : 1, a_k, b + k0 * b_k, b_k, k1 - k0,
                            [&]() __attribute__((always_inline)) {
                              if (!kDirect) return;
                              __builtin_prefetch(lines.at, 0, 2);
                              lines.at += lines.step;
                            });
    if constexpr (kDirect) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m, c += c_row) {
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) store(c + v * L, p.add ? load(c + v * L) + acc[m][v] : acc[m][v]);
      }
      return;
    } else {
      add_tile<T, MR, NV>(sums, acc, k0 == 0);
    }
    k0 = k1;
  } while (k0 < p.K);
  for (int m = 0; m < MR; ++m, c += c_row) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      const int count = int(min_of(p.n - v * L, L));
      const Vec<T> sum = load(sums + (m * NV + v) * L);
      store_some(c + v * L, p.add ? load_some(c + v * L, count) + sum : sum, count);
    }
  }
}

template <typename T, int MR, int NV>
void product_tile(const TileProduct<T>& p) {
  switch (p.layout) {
    case Layout::kRows:
      return product_tile<T, MR, NV, Layout::kRows>(p);
    case Layout::kStrip:
      return product_tile<T, MR, NV, Layout::kStrip>(p);
    default:
      return product_tile<T, MR, NV, Layout::kColumns>(p);
  }
}

template <typename T, int NV>
void product_rows(int rows, const TileProduct<T>& p) {
  switch (rows) {
    case 1:
      return product_tile<T, 1, NV>(p);
    case 2:
      return product_tile<T, 2, NV>(p);
    case 3:
      return product_tile<T, 3, NV>(p);
    case 4:
      return product_tile<T, 4, NV>(p);
    case 5:
      return product_tile<T, (kTileRows >= 5 ? 5 : 1), NV>(p);
    default:
      return product_tile<T, kTileRows, NV>(p);
  }
}

template <typename T>
void product_panel(int rows, const TileProduct<T>& p) {
  switch (panel_count(p.n, Lanes<T>)) {
    case 1:
      return product_rows<T, 1>(rows, p);
    case 2:
      return product_rows<T, 2>(rows, p);
    case 3:
      return product_rows<T, (kTileVectors >= 3 ? 3 : 1)>(rows, p);
    default:
      return product_rows<T, kTileVectors>(rows, p);
  }
}

// ---------------------------------------------------------------- direct

// The lines of a block [K, width] of a matrix, to prefetch one column of lines after the other.
template <typename T>
struct BlockLines {
  const T* at;
  ptrdiff_t row, width;
  ptrdiff_t count() const { return panel_count(width, kLine / int(sizeof(T))); }
  Lines column(ptrdiff_t i) const {
    return {reinterpret_cast<const char*>(at) + i * kLine, row * ptrdiff_t(sizeof(T))};
  }
};

template <typename T>
bool is_direct(const Matmul<T>& p, ptrdiff_t team) {
  return p.a_row == 1 && p.b_column == 1 && p.N % Lanes<T> == 0 && is_narrow(p.M, p.N, sizeof(T), team);
}

// Computes a thread's share of C. Threads share the rows; if these are few, also the columns.
template <typename T>
void direct_share(const Matmul<T>& p, ptrdiff_t thread, ptrdiff_t team) {
  constexpr int kWidth = kTileVectors * Lanes<T>;
  const ptrdiff_t tiles = panel_count(p.M, kTileRows), panels = panel_count(p.N, kWidth);
  ptrdiff_t across = 1;
  while (across < panels && across < team && tiles * across < team * kShareTiles) ++across;
  while (team % across != 0) --across;
  const ptrdiff_t down = team / across, i = thread / across, j = thread % across;
  const ptrdiff_t m0 = tiles * i / down * kTileRows, m1 = min_of(tiles * (i + 1) / down * kTileRows, p.M);
  const ptrdiff_t n0 = panels * j / across * kWidth, n1 = min_of(panels * (j + 1) / across * kWidth, p.N);
  for (ptrdiff_t k0 = 0; k0 < p.K; k0 += kChain) {
    const ptrdiff_t K = min_of(p.K - k0, kChain);
    const T *const a = p.a + k0 * p.a_column, *const b = p.b + k0 * p.b_row;
    const bool more = p.K - k0 >= 2 * kChain;
    const BlockLines<T> next_b{b + kChain * p.b_row + n0, p.b_row, more ? n1 - n0 : 0};
    const BlockLines<T> next_a{a + kChain * p.a_column + m0, p.a_column, more ? m1 - m0 : 0};
    ptrdiff_t tile = 0;
    for (ptrdiff_t m = m0; m < m1; m += kTileRows) {
      TileProduct<T> product{a + m, p.a_column,        Layout::kColumns, b, p.b_row,
                             K,     p.c + m * p.c_row, p.c_row,          0, p.accumulate || k0 > 0};
      for (ptrdiff_t n = n0; n < n1; n += kWidth, ++tile) {
        const ptrdiff_t line = tile - next_b.count();
        product.b = b + n;
        product.c = p.c + m * p.c_row + n;
        product.n = int(min_of(n1 - n, kWidth));
        product.lines = {reinterpret_cast<const char*>(b), 0};
        if (line < 0) {
          product.lines = next_b.column(tile);
        } else if (line < next_a.count()) {
          product.lines = next_a.column(line);
        }
        product_panel<T>(int(min_of(m1 - m, kTileRows)), product);
      }
    }
  }
}

// ---------------------------------------------------------------- packed

// Copies the values (i, k), i < count, k < K, from source[i * i_stride + k * k_stride] to out[k * width + i], with
// zeros for count <= i < width.
template <typename T, int kWhole>
void pack_block(T* out, const T* source, ptrdiff_t i_stride, ptrdiff_t k_stride, int count, int width, ptrdiff_t K) {
  constexpr int L = Lanes<T>;
  if (i_stride == 1 && count == kWhole) {
    for (ptrdiff_t k = 0; k < K; ++k) memcpy(out + k * width, source + k * k_stride, kWhole * sizeof(T));
    return;
  }
  int done = 0;
  if (k_stride == 1 && width % L == 0) {
    for (; done + L <= count; done += L) {
      for (ptrdiff_t k = 0; k < K; k += L) {
        const int columns = int(K - k < L ? K - k : L);
        Vec<T> square[L];
        for (int i = 0; i < L; ++i) {
          const T* const from = source + (done + i) * i_stride + k;
          square[i] = columns == L ? load(from) : load(from, columns);
        }
        transpose<T>(square);
        for (int i = 0; i < columns; ++i) store(out + (k + i) * width + done, square[i]);
      }
    }
  }
  for (ptrdiff_t k = 0; k < K; ++k) {
    for (int i = done; i < width; ++i) out[k * width + i] = i < count ? source[i * i_stride + k * k_stride] : T(0);
  }
}

template <typename T>
bool matmul_kernel(const Matmul<T>& p) {
  if (p.M == 0 || p.N == 0) return true;
  if (p.K == 0) {
    for (ptrdiff_t i = 0; i < p.M && !p.accumulate; ++i) memset(p.c + i * p.c_row, 0, size_t(p.N) * sizeof(T));
    return true;
  }
  constexpr int L = Lanes<T>, kWidth = kTileVectors * L;
  const bool small = double(p.M) * double(p.N) * double(p.K) < kSmallProduct;
  if (is_direct(p, small ? 1 : omp_get_max_threads())) {
#pragma omp parallel if (!small)
    direct_share(p, omp_get_thread_num(), omp_get_num_threads());
    return true;
  }
  const ptrdiff_t tiles = panel_count(p.M, kTileRows), panels = panel_count(p.N, kWidth);
  const ptrdiff_t depth = p.K < kDepth ? p.K : kDepth;
  const ptrdiff_t strip_size = depth * kTileRows, panel_size = depth * kWidth;
  const bool pack_rows = p.a_column != 1;
  Workspace workspace;
  T *packed_b, *packed_a;
  workspace.reserve(packed_b, panel_size * panels);
  workspace.reserve(packed_a, pack_rows ? strip_size * tiles : 0);
  if (!workspace.allocate()) return false;

#pragma omp parallel if (!small)
  {
    const ptrdiff_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    // Chunks have fewer panels if there were too few pieces of work to balance the team.
    const ptrdiff_t even = tiles * panels / (8 * team);
    const ptrdiff_t chunks = panel_count(panels, int(even < 1 ? 1 : min_of(even, kChunkPanels)));
    // The first tile of a chunk that comes after `share` of the team's shares of all tiles and panels.
    const auto tile_at = [&](ptrdiff_t share, ptrdiff_t first, ptrdiff_t count) {
      const ptrdiff_t tile = panel_count(max_of(0, tiles * panels * share / team - tiles * first), int(count));
      return min_of(tile, tiles);
    };
    for (ptrdiff_t k0 = 0; k0 < p.K; k0 += kDepth) {
      const ptrdiff_t K = p.K - k0 < kDepth ? p.K - k0 : kDepth;
      for (ptrdiff_t j = thread; j < panels; j += team) {
        const ptrdiff_t left = p.N - j * kWidth;
        const int count = int(left < kWidth ? left : kWidth), width = int(panel_count(count, L)) * L;
        pack_block<T, kWidth>(packed_b + j * panel_size, p.b + k0 * p.b_row + j * kWidth * p.b_column, p.b_column,
                              p.b_row, count, width, K);
      }
      for (ptrdiff_t k = 0; k < K && pack_rows; k += kPackDepth) {
        const ptrdiff_t block = K - k < kPackDepth ? K - k : kPackDepth;
        for (ptrdiff_t i = tiles * thread / team; i < tiles * (thread + 1) / team; ++i) {
          const ptrdiff_t left = p.M - i * kTileRows;
          pack_block<T, kTileRows>(packed_a + i * strip_size + k * kTileRows,
                                   p.a + i * kTileRows * p.a_row + (k0 + k) * p.a_column, p.a_row, p.a_column,
                                   int(left < kTileRows ? left : kTileRows), kTileRows, block);
        }
      }
#pragma omp barrier
      for (ptrdiff_t c = 0; c < chunks; ++c) {
        const ptrdiff_t first = panels * c / chunks, last = panels * (c + 1) / chunks, count = last - first;
        const ptrdiff_t end = tile_at(thread + 1, first, count);
        for (ptrdiff_t i = tile_at(thread, first, count); i < end; ++i) {
          const ptrdiff_t m = i * kTileRows;
          const int rows = int(min_of(p.M - m, kTileRows));
          const T* const tile = pack_rows ? packed_a + i * strip_size : p.a + m * p.a_row + k0;
          const char* const next = reinterpret_cast<const char*>(tile + (pack_rows ? strip_size : kTileRows * p.a_row));
          for (ptrdiff_t row = 0; row < (pack_rows ? 1 : rows) && i + 1 < tiles; ++row) {
            const ptrdiff_t bytes = (pack_rows ? kTileRows * K : K) * ptrdiff_t(sizeof(T));
            for (ptrdiff_t at = 0; at < bytes; at += kLine) {
              __builtin_prefetch(next + row * p.a_row * ptrdiff_t(sizeof(T)) + at, 0, 2);
            }
          }
          for (ptrdiff_t j = first; j < last; ++j) {
            const int n = int(min_of(p.N - j * kWidth, kWidth));
            product_panel<T>(
                rows, {tile, p.a_row, pack_rows ? Layout::kStrip : Layout::kRows, packed_b + j * panel_size, 0, K,
                       p.c + m * p.c_row + j * kWidth, p.c_row, n, p.accumulate || k0 > 0});
          }
        }
      }
#pragma omp barrier
    }
  }
  return true;
}

extern const MatmulKernels matmul_kernels;
const MatmulKernels matmul_kernels = {matmul_kernel<float>, matmul_kernel<double>};

}  // namespace seqaccel::SEQACCEL_ISA::matmul
