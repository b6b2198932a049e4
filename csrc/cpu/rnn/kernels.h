// The table of recurrent cells, and products of few rows.
#include "cpu/rnn/entry.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

template <typename T>
void row_product(const RowProduct<T>& p) {
  constexpr int L = Lanes<T>, kBlock = 4 * L;
  const ptrdiff_t blocks = panel_count(p.N, kBlock);
  const bool small = double(p.M) * double(p.N) * double(p.K) < 131072.0;
#pragma omp parallel for schedule(static) if (!small)
  for (ptrdiff_t block = 0; block < blocks; ++block) {
    alignas(64) T out[kDotRows * kBlock];
    const ptrdiff_t n = block * kBlock;
    const T* const weight = p.weight + n * p.K;
    for (ptrdiff_t m = 0; m < p.M; m += kDotRows) {
      const ptrdiff_t rows = min_of(p.M - m, kDotRows);
      T* const y = p.y + m * p.y_row + n;
      if (n + kBlock <= p.N) {
        dot_product<T, 4>(rows, p.x + m * p.K, p.K, weight, L * p.K, p.K, L, out);
        for (ptrdiff_t i = 0; i < rows; ++i) {
          for (int v = 0; v < 4; ++v) store(y + i * p.y_row + v * L, load(out + i * kBlock + v * L));
        }
        continue;
      }
      for (int v = 0; n + v * L < p.N; ++v) {
        const int units = int(min_of(L, p.N - n - v * L));
        dot_product<T, 1>(rows, p.x + m * p.K, p.K, weight + v * L * p.K, 0, p.K, units, out);
        for (ptrdiff_t i = 0; i < rows; ++i) store_some(y + i * p.y_row + v * L, load(out + i * L), units);
      }
    }
  }
}

constexpr auto kTable = table_of<RnnGroup::plain>(ProductCells{}, []<class Cell>(Cell) { return kEntry<Cell>; });

extern const RnnKernels rnn_kernels;
const RnnKernels rnn_kernels = {kTable.cells, kTable.kCount, row_product<float>, row_product<double>};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
