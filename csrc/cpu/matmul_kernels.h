// K runs in blocks of kDepth. For each block the team packs B into panels of NV vectors and, unless its rows are
// contiguous, A into strips of MR rows; then every thread takes a share of the tiles of A, and for each of them goes
// through a chunk of panels, so that the tile stays in L1 and the chunk (8 panels of 256 x 64 floats, 512 KB) in L2.
// The inner loop reads 256 bytes of L2 and does 24 vector multiply-adds a step of k, so it is bound by arithmetic. What
// comes from further away is prefetched: the tile of C and the next tile of A.
#include "gemm.h"
#include "matmul.h"
#include "shuffle.h"
#include "workspace.h"

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr int kTileRows = SEQACCEL_REGISTERS >= 32 ? 6 : SEQACCEL_VECTOR_BYTES >= 32 ? 6 : 4;
constexpr int kTileVectors = SEQACCEL_REGISTERS >= 32 ? 4 : 2;
constexpr ptrdiff_t kDepth = 256;
constexpr ptrdiff_t kChain = 64;      // products of a partial sum: rounding errors grow with the square root of a chain
constexpr ptrdiff_t kPackDepth = 32;  // rows of A^T that are packed at a time: the lines they share stay in L1
constexpr ptrdiff_t kChunkPanels = 8;
constexpr ptrdiff_t kLine = 64;

template <typename T, int MR, int NV>
SEQACCEL_INLINE void add_tile(T* sums, const Vec<T> (&acc)[MR][NV], bool first) {
#pragma GCC unroll 32
  for (int i = 0; i < MR * NV; ++i) {
    T* const sum = sums + i * Lanes<T>;
    store(sum, first ? acc[i / NV][i % NV] : load(sum) + acc[i / NV][i % NV]);
  }
}

// C tile [MR, n] (+)= A tile [MR, K] * panel [K, NV vectors]. A's element (m, k) lies at tile[m * row + k], or in a
// packed strip (row = 0) at tile[m + k * kTileRows].
template <typename T, int MR, int NV, bool Packed>
SEQACCEL_INLINE void product_tile(const T* tile, ptrdiff_t row, const T* panel, ptrdiff_t K, T* c, ptrdiff_t c_row,
                                  int n, bool add) {
  constexpr int L = Lanes<T>;
  alignas(64) T sums[MR * NV * L];
  for (int m = 0; m < MR; ++m) {
    for (int v = 0; v < NV; ++v) __builtin_prefetch(c + m * c_row + v * L, 1);
  }
  ptrdiff_t k0 = 0;
  do {
    const ptrdiff_t k1 = k0 + kChain < K ? k0 + kChain : K;
    Vec<T> acc[MR][NV] = {};
    for (ptrdiff_t k = k0; k < k1; ++k) {
      Vec<T> b[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) b[v] = load(panel + v * L);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const Vec<T> x = broadcast(Packed ? tile[m] : tile[m * row]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[m][v] += x * b[v];
      }
      tile += Packed ? kTileRows : 1;
      panel += NV * L;
    }
    add_tile<T, MR, NV>(sums, acc, k0 == 0);
    k0 = k1;
  } while (k0 < K);
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      T* out = c + m * c_row + v * L;
      const Vec<T> sum = load(sums + (m * NV + v) * L);
      const int left = n - v * L;
      if (left >= L) {
        store(out, add ? load(out) + sum : sum);
      } else if (left > 0) {
        store(out, add ? load(out, left) + sum : sum, left);
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
// width.
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
  const ptrdiff_t tiles = panel_count(p.M, kTileRows), panels = panel_count(p.N, kWidth);
  const ptrdiff_t depth = p.K < kDepth ? p.K : kDepth;
  const ptrdiff_t strip_size = depth * kTileRows, panel_size = depth * kWidth;
  const bool pack_rows = p.a_column != 1 || p.a_row == 0;
  Workspace workspace;
  const size_t panels_at = workspace.reserve<T>(panel_size * panels);
  const size_t strips_at = workspace.reserve<T>(pack_rows ? strip_size * tiles : 0);
  if (!workspace.allocate()) return false;
  T* const packed_b = workspace.at<T>(panels_at);
  T* const packed_a = workspace.at<T>(strips_at);
  const bool small = double(p.M) * double(p.N) * double(p.K) < 262144.0;

#pragma omp parallel if (!small)
  {
    const ptrdiff_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    // Chunks of fewer panels where there would be too few pieces of work to keep the team even.
    const ptrdiff_t even = tiles * panels / (8 * team);
    const ptrdiff_t chunk = even < 1 ? 1 : even < kChunkPanels ? even : kChunkPanels;
    const ptrdiff_t items = panel_count(panels, int(chunk)) * tiles;
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
      for (ptrdiff_t item = items * thread / team; item < items * (thread + 1) / team; ++item) {
        const ptrdiff_t first = item / tiles * chunk, last = first + chunk < panels ? first + chunk : panels;
        const ptrdiff_t m = item % tiles * kTileRows;
        const int rows = int(p.M - m < kTileRows ? p.M - m : kTileRows);
        const T* const tile = pack_rows ? packed_a + item % tiles * strip_size : p.a + m * p.a_row + k0;
        const char* const next = reinterpret_cast<const char*>(tile + (pack_rows ? strip_size : kTileRows * p.a_row));
        for (ptrdiff_t i = 0; i < (pack_rows ? 1 : rows) && item % tiles + 1 < tiles; ++i) {
          const ptrdiff_t bytes = (pack_rows ? kTileRows * K : K) * ptrdiff_t(sizeof(T));
          for (ptrdiff_t at = 0; at < bytes; at += kLine) {
            __builtin_prefetch(next + i * p.a_row * ptrdiff_t(sizeof(T)) + at, 0, 2);
          }
        }
        for (ptrdiff_t j = first; j < last; ++j) {
          const ptrdiff_t left = p.N - j * kWidth;
          const int n = int(left < kWidth ? left : kWidth);
          product_panel<T>(int(panel_count(n, L)), rows, tile, pack_rows ? 0 : p.a_row, packed_b + j * panel_size, K,
                           p.c + m * p.c_row + j * kWidth, p.c_row, n, p.accumulate || k0 > 0);
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
