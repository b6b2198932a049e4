// The novelty gate. Vectors are compared one after the other with those kept, which the ones before decide. So a chunk
// of vectors is compared at once with what was kept before it, in register tiles, and then each with those that joined
// within the chunk. The rows kept lie in panels [width, kColumns], a row per lane, and a product adds up along the
// width in its lane: in one order whatever the tile, the chunk and the thread. So these change no bit of a result, and
// equal vectors are equally similar.
#pragma once

#include <omp.h>

#include "cpu/attention/memory/memory.h"
#include "cpu/attention/tile.h"

namespace seqaccel::SEQACCEL_ISA::attention::memory {

constexpr int64_t kChunk = 4 * kTileRows;
constexpr int64_t kWorkOfThread = int64_t(1) << 18;  // multiply-adds: fewer cost less than waking a thread
constexpr int64_t kWorkOfPacking = 4;                // of an element, in multiply-adds

template <typename T>
inline int64_t panels_of(int64_t rows) {
  return (rows + kColumns<T> - 1) / kColumns<T>;
}

// Tiles of products: out[v * stride + row] of vectors [·, width] and the rows of one panel.
template <typename T>
struct Products {
  const T *vectors, *panel;
  int64_t width;
  T* out;
  int64_t stride;

  template <int kRows>
  SEQACCEL_INLINE void run(int64_t v) const {
    Vec<T> sum[kRows][kTileVectors] = {};
    add_products<T, kRows, kTileVectors>(sum, vectors + v * width, width, 1, panel, kColumns<T>, width);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kTileVectors; ++i) store(out + (v + r) * stride + i * Lanes<T>, sum[r][i]);
    }
  }
};

// The products of `count` vectors with the rows of the panels from `begin` to `end`.
template <typename T>
void compare(const T* panels, int64_t begin, int64_t end, const T* vectors, int64_t count, int64_t width, T* out,
             int64_t stride) {
  for (int64_t p = begin; p < end; ++p) {
    for_row_tiles(count, Products<T>{vectors, panels + p * kColumns<T> * width, width, out + p * kColumns<T>, stride});
  }
}

// The largest of row[begin] to row[end - 1]; a NaN is like nothing.
template <typename T>
inline T largest(const T* row, int64_t begin, int64_t end) {
  Vec<T> most = broadcast(T(-__builtin_inf()));
  int64_t r = begin;
  for (; r + Lanes<T> <= end; r += Lanes<T>) {
    const Vec<T> x = load(row + r);
    most = x > most ? x : most;
  }
  T found = horizontal_max<T>(most);
  for (; r < end; ++r) found = row[r] > found ? row[r] : found;
  return found;
}

// What makes a vector one of length 1; 0 for one of zeros.
template <typename T>
inline T inverse_length(const T* vector, int64_t width) {
  Vec<T> sum = {};
  for (int64_t i = 0; i < width; i += Lanes<T>) {
    const Vec<T> x = load_some(vector + i, int(width - i < Lanes<T> ? width - i : Lanes<T>));
    sum += x * x;
  }
  const T square = horizontal_sum<T>(sum);
  return square == 0 ? T(0) : 1 / T(__builtin_sqrt(square));
}

// Panels from `begin` to `end` of the first `size` rows of kept [·, width], each of length 1.
template <typename T>
void pack(T* panels, int64_t begin, int64_t end, const T* kept, int64_t size, int64_t width) {
  for (int64_t p = begin; p < end; ++p) {
    T inverse[kColumns<T>] = {};
    T* const panel = panels + p * kColumns<T> * width;
    const T* const rows = kept + p * kColumns<T> * width;
    const int64_t count = size - p * kColumns<T> < kColumns<T> ? size - p * kColumns<T> : kColumns<T>;
    for (int64_t r = 0; r < count; ++r) inverse[r] = inverse_length(rows + r * width, width);
    transpose_in(panel, rows, width, count, width, kColumns<T>);
    for (int64_t i = 0; i < width; ++i) {
      for (int r = 0; r < kColumns<T>; ++r) panel[i * kColumns<T> + r] *= inverse[r];
    }
  }
}

template <typename T>
inline void append(T* panels, int64_t row, const T* vector, int64_t width) {
  const int64_t lane = row % kColumns<T>;
  T* const panel = panels + (row - lane) * width;
  if (lane == 0) memset(panel, 0, size_t(width * kColumns<T>) * sizeof(T));
  for (int64_t i = 0; i < width; ++i) panel[i * kColumns<T> + lane] = vector[i];
}

template <typename T>
int64_t gate_workspace(int64_t length, int64_t rows, int64_t width) {
  const int64_t padded = panels_of<T>(rows + length) * kColumns<T>;
  return (padded + kChunk) * width + kChunk * padded;
}

// Calls run(begin, end) for parts of [first, last), on as many threads as `work` is worth.
template <class Run>
inline void split(int64_t first, int64_t last, int64_t work, int threads, const Run& run) {
  const int64_t worth = work / kWorkOfThread;
  const int team = int(worth < threads ? worth : threads);
  if (team < 2) return run(first, last);
#pragma omp parallel num_threads(team)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num(), count = last - first;
    run(first + count * i / n, first + count * (i + 1) / n);
  }
}

// By `threads` threads.
template <typename T>
void gate_stream(const Gate<T>& p, int64_t b, T* workspace, int threads) {
  const int64_t width = p.width, stride = panels_of<T>(p.rows + p.length) * kColumns<T>;
  T* const panels = workspace;                // [stride / kColumns, width, kColumns]: what is kept, of length 1
  T* const chunk = panels + stride * width;   // [kChunk, width], of length 1
  T* const similar = chunk + kChunk * width;  // [kChunk, stride]
  int64_t size = p.size[b] < 0 ? 0 : p.size[b] > p.rows ? p.rows : p.size[b];
  split(0, panels_of<T>(size), size * width * kWorkOfPacking, threads,
        [&](int64_t from, int64_t to) { pack(panels, from, to, p.kept + b * p.rows * width, size, width); });
  for (int64_t begin = 0; begin < p.length; begin += kChunk) {
    const int64_t count = p.length - begin < kChunk ? p.length - begin : kChunk, before = size;
    const int64_t first = before > p.window ? before - p.window : 0;
    for (int64_t v = 0; v < count; ++v) {
      const T* const vector = p.vectors + (b * p.length + begin + v) * width;
      const T inverse = inverse_length(vector, width);
      for (int64_t i = 0; i < width; ++i) chunk[v * width + i] = vector[i] * inverse;
    }
    split(first / kColumns<T>, panels_of<T>(before), (before - first) * count * width, threads,
          [&](int64_t from, int64_t to) { compare(panels, from, to, chunk, count, width, similar, stride); });
    for (int64_t v = 0; v < count; ++v) {
      const T* const vector = chunk + v * width;
      T* const row = similar + v * stride;
      if (size > before) {
        compare(panels, before / kColumns<T>, panels_of<T>(size), vector, 1, width, row, stride);
      }
      int64_t best = size > p.window ? size - p.window : 0;
      const T most = largest(row, best, size);
      if (size == 0 || (most < p.threshold && size < p.capacity)) {
        best = size++;
        append(panels, best, vector, width);
      } else if (most > T(-__builtin_inf())) {
        while (row[best] != most) ++best;  // the first of equals
      }
      p.slot[b * p.length + begin + v] = best;
    }
  }
}

// Threads share a stream where there are fewer streams than threads.
template <typename T>
void gate(const Gate<T>& p) {
  if (p.batch < p.threads) {
    for (int64_t b = 0; b < p.batch; ++b) gate_stream(p, b, p.workspace, p.threads);
    return;
  }
  const int64_t each = gate_workspace<T>(p.length, p.rows, p.width);
#pragma omp parallel for schedule(static) num_threads(p.threads)
  for (int64_t b = 0; b < p.batch; ++b) gate_stream(p, b, p.workspace + omp_get_thread_num() * each, 1);
}

extern const GateKernels gate_kernels;
const GateKernels gate_kernels = {gate_workspace<float>, gate_workspace<double>, gate<float>, gate<double>};

}  // namespace seqaccel::SEQACCEL_ISA::attention::memory
