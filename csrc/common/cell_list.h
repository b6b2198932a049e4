// What the lists of cells share (product_cells.h, column_cells.h).
#pragma once

#if defined(__CUDACC__)
#define SEQACCEL_CELL __host__ __device__ __forceinline__ static
#else
#define SEQACCEL_CELL static inline __attribute__((always_inline))
#endif

namespace seqaccel {

template <class... Cells>
struct CellList {};

}  // namespace seqaccel
