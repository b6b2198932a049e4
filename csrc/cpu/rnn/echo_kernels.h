// The reservoir of an echo state network, with W in compressed sparse rows:
//   h = (1 - a) h' + a tanh(W h' + drive)
//
// Threads share the rows of W, each about as many of its values, and meet at one barrier per step. For one stream a row
// is a dot product: four values of h' are collected from L1 into a register by scalar loads, which on Zen 4 take less
// time than the gather instruction. From two streams on, the lanes of a vector are the streams: h' is kept as [units,
// streams], and each value of W multiplies whole vectors of it.
#pragma once

#include <omp.h>
#include <string.h>

#include "cpu/base/vec.h"
#include "cpu/rnn/echo.h"
#include "cpu/rnn/team.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr int64_t kEchoWork = 8192;  // multiply-adds per step and thread: fewer cost less than the barrier
constexpr int64_t kUnitWork = 16;    // of a unit beside its row, in multiply-adds

template <typename T>
struct QuadType;
template <>
struct QuadType<float> {
  typedef float Value __attribute__((vector_size(16)));
};
template <>
struct QuadType<double> {
  typedef double Value __attribute__((vector_size(32)));
};
template <typename T>
using Quad = typename QuadType<T>::Value;

template <typename T>
SEQACCEL_INLINE Quad<T> quad_product(const T* weight, const int32_t* columns, const T* h) {
  Quad<T> w;
  memcpy(&w, weight, sizeof(w));
  return w * Quad<T>{h[columns[0]], h[columns[1]], h[columns[2]], h[columns[3]]};
}

template <typename T>
SEQACCEL_INLINE T row_dot(const EchoState<T>& p, int64_t row, const T* h) {
  int64_t k = p.rows[row];
  const int64_t end = p.rows[row + 1];
  Quad<T> a = {}, b = {};
  for (; k + 8 <= end; k += 8) {
    a += quad_product(p.weight + k, p.columns + k, h);
    b += quad_product(p.weight + k + 4, p.columns + k + 4, h);
  }
  if (k + 4 <= end) {
    a += quad_product(p.weight + k, p.columns + k, h);
    k += 4;
  }
  a += b;
  T sum = (a[0] + a[2]) + (a[1] + a[3]);
  for (; k < end; ++k) sum += p.weight[k] * h[p.columns[k]];
  return sum;
}

template <typename T>
SEQACCEL_INLINE Vec<T> next_h(const EchoState<T>& p, Vec<T> h, Vec<T> pre) {
  return (1 - p.leak_rate) * h + p.leak_rate * tanh_vec<T>(pre);
}

// Units [begin, end) of the one stream.
template <typename T>
void step_one(const EchoState<T>& p, int64_t t, int64_t begin, int64_t end) {
  constexpr int L = Lanes<T>;
  const T* const h = t > 0 ? p.output + (t - 1) * p.units : p.h_0;
  const T* const drive = p.drive + t * p.units;
  T* const out = p.output + t * p.units;
  for (int64_t n = begin; n < end; n += L) {
    const int count = int(min_of(L, end - n));
    alignas(64) T sums[L] = {};
    for (int i = 0; i < count; ++i) sums[i] = row_dot(p, n + i, h);
    store_some(out + n, next_h<T>(p, load_some(h + n, count), load(sums) + load_some(drive + n, count)), count);
  }
}

// Units [n, n + count) of U vectors of streams, from stream b0 on; rows of `h` and `next` are `width` apart.
template <typename T, int U>
void step_tile(const EchoState<T>& p, int64_t t, int64_t n, int count, int64_t b0, const T* h, T* next, int64_t width) {
  constexpr int L = Lanes<T>;
  const int64_t streams = min_of(U * L, p.batch - b0), at = (t * p.batch + b0) * p.units + n;
  alignas(64) T tile[L][U * L];
  if (streams < U * L) memset(tile, 0, sizeof(tile));
  for (int64_t b = 0; b < streams; ++b) {
    for (int i = 0; i < count; ++i) tile[i][b] = p.drive[at + b * p.units + i];
  }
  for (int i = 0; i < count; ++i) {
    Vec<T> sums[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) sums[u] = load(tile[i] + u * L);
    for (int64_t k = p.rows[n + i], end = p.rows[n + i + 1]; k < end; ++k) {
      const Vec<T> w = broadcast(p.weight[k]);
      const T* const from = h + p.columns[k] * width + b0;
#pragma GCC unroll 4
      for (int u = 0; u < U; ++u) sums[u] += w * load(from + u * L);
    }
    const int64_t own = (n + i) * width + b0;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const Vec<T> result = next_h<T>(p, load(h + own + u * L), sums[u]);
      store(next + own + u * L, result);
      store(tile[i] + u * L, result);
    }
  }
  for (int64_t b = 0; b < streams; ++b) {
    for (int i = 0; i < count; ++i) p.output[at + b * p.units + i] = tile[i][b];
  }
}

// Units [begin, end) of all streams.
template <typename T>
void step_many(const EchoState<T>& p, int64_t t, int64_t begin, int64_t end, const T* h, T* next, int64_t width) {
  constexpr int L = Lanes<T>;
  for (int64_t n = begin; n < end; n += L) {
    const int count = int(min_of(L, end - n));
    int64_t b = 0;
    for (; b + 4 * L <= width; b += 4 * L) step_tile<T, 4>(p, t, n, count, b, h, next, width);
    for (; b + 2 * L <= width; b += 2 * L) step_tile<T, 2>(p, t, n, count, b, h, next, width);
    for (; b < width; b += L) step_tile<T, 1>(p, t, n, count, b, h, next, width);
  }
}

// The first unit of a part of `parts` that are of equal work; parts begin at whole vectors.
template <typename T>
int64_t first_unit(const EchoState<T>& p, int64_t part, int64_t parts) {
  if (part == parts) return p.units;
  const int64_t work = (p.rows[p.units] + kUnitWork * p.units) / parts * part;
  int64_t n = 0;
  while (n < p.units && p.rows[n] + kUnitWork * n < work) n += Lanes<T>;
  return min_of(n, p.units);
}

template <typename T>
bool run_echo_state(const EchoState<T>& p) {
  constexpr int L = Lanes<T>;
  const bool one = p.batch == 1;
  const int64_t width = (p.batch + L - 1) / L * L;
  T* h = nullptr;  // [2, units, width]: of even and odd steps
  Workspace workspace;
  if (!one) {
    workspace.reserve(h, 2 * p.units * width);
    if (!workspace.allocate()) return false;
  }
  const int64_t work = (one ? 1 : width / L) * (p.rows[p.units] + kUnitWork * p.units);
  const int threads = int(max_of(1, min_of(work / kEchoWork, p.threads)));
  Barrier barrier{};
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    const int64_t begin = first_unit(p, omp_get_thread_num(), team),
                  end = first_unit(p, omp_get_thread_num() + 1, team);
    if (!one) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t b = 0; b < width; ++b) h[n * width + b] = b < p.batch ? p.h_0[b * p.units + n] : T(0);
      }
      wait_for_all(barrier, team);
    }
    for (int64_t t = 0; t < p.steps; ++t) {
      if (one) {
        step_one(p, t, begin, end);
      } else {
        T *const even = h, *const odd = h + p.units * width;
        step_many(p, t, begin, end, t % 2 ? odd : even, t % 2 ? even : odd, width);
      }
      wait_for_all(barrier, team);
    }
  }
  return true;
}

// Whether rows rise from 0 to `count` and columns are units.
inline bool valid_sparse(const int32_t* rows, const int32_t* columns, int64_t units, int64_t count) {
  bool wrong = rows[0] != 0 || rows[units] != count;
  for (int64_t n = 0; n < units; ++n) wrong |= rows[n] > rows[n + 1];
  for (int64_t k = 0; k < count; ++k) wrong |= uint32_t(columns[k]) >= uint32_t(units);
  return !wrong;
}

extern const EchoKernels echo_kernels;
const EchoKernels echo_kernels = {valid_sparse, run_echo_state<float>, run_echo_state<double>};

}  // namespace seqaccel::SEQACCEL_ISA::rnn
