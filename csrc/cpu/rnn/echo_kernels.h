// The reservoir of an echo state network, with W in compressed sparse rows:
//   h = (1 - a) h' + a tanh(W h' + drive)
//
// Threads share the rows of W, each about as many of its values, and meet at one barrier per step. For one stream four
// values of h' are collected from L1 into a register by scalar loads, which on Zen 4 take less time than the gather
// instruction (0.22 ns per value instead of 0.35). A call of many steps first packs W: the lanes of a register are four
// rows, which needs no sum across lanes, with indices of 16 bits where they suffice (2,000 rows of 20 values: 8.8 us
// instead of 14.1). From two streams on, the lanes of a vector are the streams: h' is kept as [units, streams], and
// each value of W multiplies whole vectors of it.
#pragma once

#include <omp.h>
#include <string.h>

#include "cpu/base/vec.h"
#include "cpu/rnn/echo.h"
#include "cpu/rnn/team.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

constexpr int64_t kEchoWork = 8192;  // multiply-adds per step and thread: fewer cost less than the barrier
constexpr int64_t kUnitWork = 16;    // of a unit beside its row, in multiply-adds
constexpr int64_t kPackedSteps = 8;  // packing W takes as long as two to four steps
constexpr int64_t kPart = 16;        // parts of threads begin at multiples: of every vector, and of four rows

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

template <typename T, typename Index>
SEQACCEL_INLINE Quad<T> quad_product(const T* weight, const Index* columns, const T* h) {
  Quad<T> w;
  memcpy(&w, weight, sizeof(w));
  if constexpr (sizeof(Index) == 2) {  // one load instead of four
    uint64_t c;
    memcpy(&c, columns, sizeof(c));
    return w * Quad<T>{h[c & 0xffff], h[(c >> 16) & 0xffff], h[(c >> 32) & 0xffff], h[c >> 48]};
  } else {
    return w * Quad<T>{h[columns[0]], h[columns[1]], h[columns[2]], h[columns[3]]};
  }
}

// W in groups of four rows, whose k-th values lie side by side. Rows shorter than their group's longest end in zeros
// that multiply h' of their own unit, so that what is not finite reaches no other unit.
template <typename T, typename Index>
struct Packed {
  int64_t* begins;  // [groups + 1]
  Index* columns;   // [begins[groups], 4]
  T* weight;        // [begins[groups], 4]

  void pack(const EchoState<T>& p, int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t lane = n % 4;
      int64_t k = p.rows[n];
      for (int64_t at = begins[n / 4]; at < begins[n / 4 + 1]; ++at, ++k) {
        const bool inside = k < p.rows[n + 1];
        columns[at * 4 + lane] = Index(inside ? p.columns[k] : n);
        weight[at * 4 + lane] = inside ? p.weight[k] : T(0);
      }
    }
    for (int64_t lane = end % 4; end == p.units && lane % 4 != 0; ++lane) {  // of no unit
      for (int64_t at = begins[end / 4]; at < begins[end / 4 + 1]; ++at) {
        columns[at * 4 + lane] = 0;
        weight[at * 4 + lane] = 0;
      }
    }
  }

  SEQACCEL_INLINE Quad<T> product(int64_t group, const T* h) const {
    int64_t k = begins[group];
    const int64_t end = begins[group + 1];
    Quad<T> a = {}, b = {};
    for (; k + 2 <= end; k += 2) {
      a += quad_product(weight + 4 * k, columns + 4 * k, h);
      b += quad_product(weight + 4 * k + 4, columns + 4 * k + 4, h);
    }
    if (k < end) a += quad_product(weight + 4 * k, columns + 4 * k, h);
    return a + b;
  }
};

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

// Units [begin, end) of the one stream. products(h, out) sets out[n] to W h' of each.
template <typename T, class Products>
void step_one(const EchoState<T>& p, int64_t t, int64_t begin, int64_t end, const Products& products) {
  constexpr int L = Lanes<T>;
  const T* const h = p.reset && p.reset[t] ? p.zeros : t > 0 ? p.output + (t - 1) * p.units : p.h_0;
  const T* const drive = p.drive + t * p.units;
  T* const out = p.output + t * p.units;
  products(h, out);
  for (int64_t n = begin; n < end; n += L) {
    const int count = int(min_of(L, end - n));
    const Vec<T> pre = load_some(out + n, count) + load_some(drive + n, count);
    store_some(out + n, next_h<T>(p, load_some(h + n, count), pre), count);
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

// Zeroes h' [units, width], units [begin, end), of the streams with a reset at t.
template <typename T>
void clear_streams(const EchoState<T>& p, int64_t t, int64_t begin, int64_t end, T* h, int64_t width) {
  if (!p.reset || t >= p.steps) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t n = begin; n < end && p.reset[t * p.batch + b]; ++n) h[n * width + b] = T(0);
  }
}

// The first unit of a part of `parts` that are of equal work.
template <typename T>
int64_t first_unit(const EchoState<T>& p, int64_t part, int64_t parts) {
  if (part == parts) return p.units;
  const int64_t work = (p.rows[p.units] + kUnitWork * p.units) / parts * part;
  int64_t n = 0;
  while (n < p.units && p.rows[n] + kUnitWork * n < work) n += kPart;
  return min_of(n, p.units);
}

// Calls part(begin, end, wait) on each thread with its units, and wait() where all meet.
template <typename T, class Part>
void share_units(const EchoState<T>& p, int64_t vectors, const Part& part) {
  const int64_t work = vectors * (p.rows[p.units] + kUnitWork * p.units);
  const int threads = int(max_of(1, min_of(work / kEchoWork, p.threads)));
  Barrier barrier{};
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads(), i = omp_get_thread_num();
    part(first_unit(p, i, team), first_unit(p, i + 1, team), [&] { wait_for_all(barrier, team); });
  }
}

template <typename T>
void run_rows(const EchoState<T>& p) {
  share_units(p, 1, [&](int64_t begin, int64_t end, const auto& wait) {
    const auto products = [&](const T* h, T* out) {
      for (int64_t n = begin; n < end; ++n) out[n] = row_dot(p, n, h);
    };
    for (int64_t t = 0; t < p.steps; ++t, wait()) step_one(p, t, begin, end, products);
  });
}

// Of the four of a group.
template <typename T>
inline int64_t longest_row(const EchoState<T>& p, int64_t group) {
  int64_t longest = 0;
  for (int64_t n = 4 * group; n < min_of(4 * group + 4, p.units); ++n) {
    longest = max_of(longest, p.rows[n + 1] - p.rows[n]);
  }
  return longest;
}

template <typename T, typename Index>
bool run_packed(const EchoState<T>& p) {
  const int64_t groups = panel_count(p.units, 4);
  int64_t count = 0;
  for (int64_t g = 0; g < groups; ++g) count += longest_row(p, g);
  Packed<T, Index> packed;
  Workspace workspace;
  workspace.reserve(packed.begins, groups + 1);
  workspace.reserve(packed.columns, 4 * count);
  workspace.reserve(packed.weight, 4 * count);
  if (!workspace.allocate()) return false;
  packed.begins[0] = 0;
  for (int64_t g = 0; g < groups; ++g) packed.begins[g + 1] = packed.begins[g] + longest_row(p, g);
  share_units(p, 1, [&](int64_t begin, int64_t end, const auto& wait) {
    packed.pack(p, begin, end);
    const auto products = [&](const T* h, T* out) {
      int64_t n = begin;
      for (; n + 4 <= end; n += 4) {
        const Quad<T> sums = packed.product(n / 4, h);
        memcpy(out + n, &sums, sizeof(sums));
      }
      if (n < end) {
        const Quad<T> sums = packed.product(n / 4, h);
        memcpy(out + n, &sums, size_t(end - n) * sizeof(T));
      }
    };
    for (int64_t t = 0; t < p.steps; ++t, wait()) step_one(p, t, begin, end, products);
  });
  return true;
}

template <typename T>
bool run_streams(const EchoState<T>& p) {
  constexpr int L = Lanes<T>;
  const int64_t width = panel_count(p.batch, L) * L;
  T* even;  // [units, width]: h of even steps
  T* odd;
  Workspace workspace;
  workspace.reserve(even, p.units * width);
  workspace.reserve(odd, p.units * width);
  if (!workspace.allocate()) return false;
  share_units(p, width / L, [&](int64_t begin, int64_t end, const auto& wait) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t b = 0; b < width; ++b) even[n * width + b] = b < p.batch ? p.h_0[b * p.units + n] : T(0);
    }
    clear_streams(p, 0, begin, end, even, width);
    wait();
    for (int64_t t = 0; t < p.steps; ++t, wait()) {
      T* const next = t % 2 ? even : odd;
      step_many(p, t, begin, end, t % 2 ? odd : even, next, width);
      clear_streams(p, t + 1, begin, end, next, width);
    }
  });
  return true;
}

template <typename T>
bool run_echo_state(const EchoState<T>& p) {
  if (p.batch > 1) return run_streams(p);
  if (p.steps >= kPackedSteps) return p.units <= 65536 ? run_packed<T, uint16_t>(p) : run_packed<T, int32_t>(p);
  run_rows(p);
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
