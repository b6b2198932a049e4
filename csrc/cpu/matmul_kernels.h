// K runs in blocks of kDepth. For each block the team packs B into panels of NV vectors and, unless its rows are
// contiguous, A into strips of a vector of rows, then every thread takes a share of the panels: a panel (512 x 64
// floats = 128 KB) stays in L2 while tiles of at most MR rows of A pass through L1. The inner loop reads 256 bytes of
// L2 and does 24 vector multiply-adds a step of k, so it is bound by arithmetic: 116 GFLOP/s measured on a Zen 4 core
// at 3.64 GHz, whose peak is 116.5.
#include "gemm.h"
#include "matmul.h"
#include "workspace.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr int kTileRows = SEQACCEL_REGISTERS >= 32 ? 6 : SEQACCEL_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kTileVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;
constexpr ptrdiff_t kDepth = 256;
constexpr ptrdiff_t kPackDepth = 32;  // rows of A^T that are packed at a time: the lines they share stay in L1

// C tile [MR, n] (+)= A tile [MR, K] * panel [K, NV vectors]. A's element (m, k) lies at tile[m * row + k], or in a
// packed strip (row = 0), which holds a vector of rows for each k, at tile[m + k * Lanes<T>].
template <typename T, int MR, int NV, bool Packed>
SEQACCEL_INLINE void product_tile(const T* tile, ptrdiff_t row, const T* panel, ptrdiff_t K, T* c, ptrdiff_t c_row,
                                  int n, bool add) {
  Vec<T> acc[MR][NV] = {};
  for (ptrdiff_t k = 0; k < K; ++k) {
    Vec<T> b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(panel + v * Lanes<T>);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec<T> x = broadcast(Packed ? tile[m] : tile[m * row]);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[m][v] += x * b[v];
    }
    tile += Packed ? Lanes<T> : 1;
    panel += NV * Lanes<T>;
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      T* out = c + m * c_row + v * Lanes<T>;
      const int left = n - v * Lanes<T>;
      if (left >= Lanes<T>) {
        store(out, add ? load(out) + acc[m][v] : acc[m][v]);
      } else if (left > 0) {
        store(out, add ? load(out, left) + acc[m][v] : acc[m][v], left);
      }
    }
  }
}

template <typename T, int MR, int NV>
void product_tile(const T* tile, ptrdiff_t row, const T* panel, ptrdiff_t K, T* c, ptrdiff_t c_row, int n, bool add) {
  if (row == 0) {
    product_tile<T, MR, NV, true>(tile, row, panel, K, c, c_row, n, add);
  } else {
    product_tile<T, MR, NV, false>(tile, row, panel, K, c, c_row, n, add);
  }
}

template <typename T, int NV>
void product_rows(int rows, const T* tile, ptrdiff_t row, const T* panel, ptrdiff_t K, T* c, ptrdiff_t c_row, int n,
                  bool add) {
  switch (rows) {
    case 1:
      return product_tile<T, 1, NV>(tile, row, panel, K, c, c_row, n, add);
    case 2:
      return product_tile<T, 2, NV>(tile, row, panel, K, c, c_row, n, add);
    case 3:
      return product_tile<T, 3, NV>(tile, row, panel, K, c, c_row, n, add);
    case 4:
      return product_tile<T, 4, NV>(tile, row, panel, K, c, c_row, n, add);
    case 5:
      return product_tile<T, (kTileRows >= 5 ? 5 : 1), NV>(tile, row, panel, K, c, c_row, n, add);
    default:
      return product_tile<T, kTileRows, NV>(tile, row, panel, K, c, c_row, n, add);
  }
}

template <typename T>
void product_panel(int vectors, int rows, const T* tile, ptrdiff_t row, const T* panel, ptrdiff_t K, T* c,
                   ptrdiff_t c_row, int n, bool add) {
  switch (vectors) {
    case 1:
      return product_rows<T, 1>(rows, tile, row, panel, K, c, c_row, n, add);
    case 2:
      return product_rows<T, 2>(rows, tile, row, panel, K, c, c_row, n, add);
    case 3:
      return product_rows<T, (kTileVectors >= 3 ? 3 : 1)>(rows, tile, row, panel, K, c, c_row, n, add);
    default:
      return product_rows<T, kTileVectors>(rows, tile, row, panel, K, c, c_row, n, add);
  }
}

// Values (i, k), i < count, k < K, at source[i * i_stride + k * k_stride] to out[k * width + i], zero for count <= i <
// width, a multiple of Lanes<T>.Blocks of 16 k keep the cache lines of both sides in L1 where i_stride
// is not 1.
template <typename T>
void pack_block(T* out, const T* source, ptrdiff_t i_stride, ptrdiff_t k_stride, int count, int width, ptrdiff_t K) {
  if (i_stride == 1) {
    const int whole = count / Lanes<T> * Lanes<T>;
    for (ptrdiff_t k = 0; k < K; ++k) {
      const T* const from = source + k * k_stride;
      T* const to = out + k * width;
      for (int i = 0; i < whole; i += Lanes<T>) store(to + i, load(from + i));
      for (int i = whole; i < count; ++i) to[i] = from[i];
      for (int i = count; i < width; ++i) to[i] = T(0);
    }
    return;
  }
  for (ptrdiff_t k0 = 0; k0 < K; k0 += 16) {
    const ptrdiff_t k1 = k0 + 16 < K ? k0 + 16 : K;
    for (int i = 0; i < count; ++i) {
      const T* from = source + i * i_stride;
      for (ptrdiff_t k = k0; k < k1; ++k) out[k * width + i] = from[k * k_stride];
    }
    for (int i = count; i < width; ++i) {
      for (ptrdiff_t k = k0; k < k1; ++k) out[k * width + i] = T(0);
    }
  }
}

struct Tile {
  ptrdiff_t first;
  int rows;
};

// The tiles of a strip of Lanes<T> rows, and of M rows that lie in A itself: as even as can be.
template <typename T>
constexpr int kStripTiles = (Lanes<T> + kTileRows - 1) / kTileRows;

template <typename T>
SEQACCEL_INLINE Tile tile_of_strip(ptrdiff_t tile, ptrdiff_t M) {
  const ptrdiff_t strip = tile / kStripTiles<T> * Lanes<T>, part = tile % kStripTiles<T>;
  const ptrdiff_t first = strip + Lanes<T> * part / kStripTiles<T>;
  const ptrdiff_t last = strip + Lanes<T> * (part + 1) / kStripTiles<T>;
  return {first, int((last < M ? last : M) - first)};
}

inline Tile tile_of_rows(ptrdiff_t tile, ptrdiff_t tiles, ptrdiff_t M) {
  const ptrdiff_t first = M * tile / tiles;
  return {first, int(M * (tile + 1) / tiles - first)};
}

template <typename T>
bool matmul_kernel(const Matmul<T>& p) {
  if (p.M == 0 || p.N == 0) return true;
  if (p.K == 0) {
    for (ptrdiff_t i = 0; i < p.M && !p.accumulate; ++i) memset(p.c + i * p.c_row, 0, size_t(p.N) * sizeof(T));
    return true;
  }
  constexpr int kWidth = kTileVectors * Lanes<T>;
  const ptrdiff_t strips = panel_count(p.M, Lanes<T>);
  const ptrdiff_t panels = panel_count(p.N, kWidth);
  const ptrdiff_t depth = p.K < kDepth ? p.K : kDepth;
  const ptrdiff_t strip_size = (depth + 1) * Lanes<T>;  // a vector more, so that strips do not lie whole pages apart
  const ptrdiff_t panel_size = depth * kWidth;
  const bool pack_rows = p.a_column != 1 || p.a_row == 0;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(panel_size * panels);
  const size_t strips_at = workspace.reserve<T>(pack_rows ? strip_size * strips : 0);
  if (!workspace.allocate()) return false;
  T* const packed_b = workspace.at<T>(panels_at);
  T* const packed_a = workspace.at<T>(strips_at);
  const bool small = double(p.M) * double(p.N) * double(p.K) < 262144.0;
  const ptrdiff_t tiles = pack_rows ? strips * kStripTiles<T> : panel_count(p.M, kTileRows);

#pragma omp parallel if (!small)
  {
    const ptrdiff_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    // Panels are split into row ranges where there are fewer of them than would keep the team even.
    const ptrdiff_t splits = panels % team == 0 || panels >= 8 * team ? 1 : (tiles < 4 * team ? tiles : 4 * team);
    const ptrdiff_t items = panels * splits;
    for (ptrdiff_t k0 = 0; k0 < p.K; k0 += kDepth) {
      const ptrdiff_t K = p.K - k0 < kDepth ? p.K - k0 : kDepth;
      for (ptrdiff_t j = thread; j < panels; j += team) {
        const ptrdiff_t left = p.N - j * kWidth;
        const int count = int(left < kWidth ? left : kWidth);
        const int width = int(panel_count(count, Lanes<T>)) * Lanes<T>;
        pack_block(packed_b + j * panel_size, p.b + k0 * p.b_row + j * kWidth * p.b_column, p.b_column, p.b_row, count,
                   width, K);
      }
      for (ptrdiff_t k = 0; k < K && pack_rows; k += kPackDepth) {
        const ptrdiff_t block = K - k < kPackDepth ? K - k : kPackDepth;
        for (ptrdiff_t i = strips * thread / team; i < strips * (thread + 1) / team; ++i) {
          const ptrdiff_t left = p.M - i * Lanes<T>;
          pack_block(packed_a + i * strip_size + k * Lanes<T>, p.a + i * Lanes<T> * p.a_row + (k0 + k) * p.a_column,
                     p.a_row, p.a_column, int(left < Lanes<T> ? left : Lanes<T>), Lanes<T>, block);
        }
      }
#pragma omp barrier
      for (ptrdiff_t item = items * thread / team; item < items * (thread + 1) / team; ++item) {
        const ptrdiff_t j = item / splits, split = item % splits;
        const ptrdiff_t left = p.N - j * kWidth;
        const int n = int(left < kWidth ? left : kWidth);
        for (ptrdiff_t i = tiles * split / splits; i < tiles * (split + 1) / splits; ++i) {
          const Tile tile = pack_rows ? tile_of_strip<T>(i, p.M) : tile_of_rows(i, tiles, p.M);
          if (tile.rows <= 0) continue;
          const T* const rows = pack_rows ? packed_a + i / kStripTiles<T> * strip_size + tile.first % Lanes<T>
                                          : p.a + tile.first * p.a_row + k0;
          product_panel<T>(int(panel_count(n, Lanes<T>)), tile.rows, rows, pack_rows ? 0 : p.a_row,
                           packed_b + j * panel_size, K, p.c + tile.first * p.c_row + j * kWidth, p.c_row, n,
                           p.accumulate || k0 > 0);
        }
      }
#pragma omp barrier
    }
  }
  return true;
}

extern const MatmulKernels matmul_kernels;
const MatmulKernels matmul_kernels = {matmul_kernel<float>, matmul_kernel<double>};

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
