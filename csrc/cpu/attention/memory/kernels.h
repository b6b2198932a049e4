// The novelty gate. Vectors are compared one after the other with those kept, which the ones before decide. So a chunk
// of vectors is compared at once with what was kept before it, in register tiles, and then each with those that joined
// within the chunk. Each scalar product adds up in one order whatever the tile: chunks change no bit of a result, and
// equal vectors are equally similar.
#pragma once

#include <omp.h>

#include "cpu/attention/memory/memory.h"
#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::attention::memory {

constexpr int64_t kChunk = 16;
constexpr int kTileRows = 2, kTileVectors = 4;  // 8 sums hide the latency of a multiply-add

// The products of rows of a and of b, both `width` apart; those of one row of b are `stride` apart.
template <typename T, int kRows, int kVectors>
inline void multiply(const T* a, const T* b, int64_t width, T* out, int64_t stride) {
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < width; i += Lanes<T>) {
    const int n = int(width - i < Lanes<T> ? width - i : Lanes<T>);
    Vec<T> x[kRows];
    for (int r = 0; r < kRows; ++r) x[r] = load_some(a + r * width + i, n);
    for (int v = 0; v < kVectors; ++v) {
      const Vec<T> y = load_some(b + v * width + i, n);
      for (int r = 0; r < kRows; ++r) sum[r][v] += x[r] * y;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) out[v * stride + r] = horizontal_sum<T>(sum[r][v]);
  }
}

template <typename T, int kVectors>
void compare_rows(const T* rows, int64_t count, const T* vectors, int64_t width, T* out, int64_t stride) {
  int64_t r = 0;
  for (; r + kTileRows <= count; r += kTileRows) {
    multiply<T, kTileRows, kVectors>(rows + r * width, vectors, width, out + r, stride);
  }
  if (r < count) multiply<T, 1, kVectors>(rows + r * width, vectors, width, out + r, stride);
}

// A vector of length 1, or of zeros.
template <typename T>
inline void normalize(const T* from, T* to, int64_t width) {
  T square;
  multiply<T, 1, 1>(from, from, width, &square, 1);
  const T inverse = square == 0 ? T(0) : 1 / T(__builtin_sqrt(square));
  for (int64_t i = 0; i < width; ++i) to[i] = from[i] * inverse;
}

inline int64_t gate_workspace(int64_t length, int64_t rows, int64_t width) {
  return (rows + length + kChunk) * width + kChunk * (rows + length);
}

template <typename T>
void gate_stream(const Gate<T>& p, int64_t b, T* workspace) {
  const int64_t width = p.width, stride = p.rows + p.length;
  T* const kept = workspace;                  // [rows + length, width], of length 1
  T* const chunk = kept + stride * width;     // [kChunk, width], likewise
  T* const similar = chunk + kChunk * width;  // [kChunk, stride]
  int64_t size = p.size[b] < 0 ? 0 : p.size[b] > p.rows ? p.rows : p.size[b];
  for (int64_t r = 0; r < size; ++r) normalize(p.kept + (b * p.rows + r) * width, kept + r * width, width);
  for (int64_t begin = 0; begin < p.length; begin += kChunk) {
    const int64_t count = p.length - begin < kChunk ? p.length - begin : kChunk, before = size;
    const int64_t first = before > p.window ? before - p.window : 0;
    for (int64_t v = 0; v < count; ++v) {
      normalize(p.vectors + (b * p.length + begin + v) * width, chunk + v * width, width);
    }
    int64_t v = 0;
    for (; v + kTileVectors <= count; v += kTileVectors) {
      compare_rows<T, kTileVectors>(kept + first * width, before - first, chunk + v * width, width,
                                    similar + v * stride + first, stride);
    }
    for (; v < count; ++v) {
      compare_rows<T, 1>(kept + first * width, before - first, chunk + v * width, width, similar + v * stride + first,
                         stride);
    }
    for (v = 0; v < count; ++v) {
      T* const row = similar + v * stride;
      if (size > before) {
        compare_rows<T, 1>(kept + before * width, size - before, chunk + v * width, width, row + before, stride);
      }
      int64_t best = size > p.window ? size - p.window : 0;
      T most = -__builtin_inf();  // a NaN is like nothing
      for (int64_t r = best; r < size; ++r) {
        if (row[r] > most) most = row[r], best = r;
      }
      const bool novel = size == 0 || (most < p.threshold && size < p.capacity);
      if (novel) {
        best = size++;
        memcpy(kept + best * width, chunk + v * width, size_t(width) * sizeof(T));
      }
      p.slot[b * p.length + begin + v] = best;
    }
  }
}

template <typename T>
void gate(const Gate<T>& p) {
  const int64_t each = gate_workspace(p.length, p.rows, p.width);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t b = 0; b < p.batch; ++b) gate_stream(p, b, p.workspace + omp_get_thread_num() * each);
}

extern const GateKernels gate_kernels;
const GateKernels gate_kernels = {gate_workspace, gate<float>, gate<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::memory
