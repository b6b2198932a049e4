// Attention of each step to itself and to earlier steps, whose keys and values a ring holds.
#pragma once

#include "cpu/packed/cells.h"
#include "cpu/packed/dense.h"

namespace seqaccel::SEQACCEL_ISA::packed {

// The attention of one query, to keys that come in several pieces: one softmax over all of them. After each piece
// y [d] = sum of exp(logit - most) * value, and total is the sum of the factors. y begins as zeros.
struct RunningSoftmax {
  static constexpr ptrdiff_t kKeys = 64;  // at a time: their logits stay in L1
  const float* query;                     // [d]
  float* y;
  ptrdiff_t d;
  float most = -INFINITY, total = 0.0f;

  // Writes the logits of up to kKeys keys. Past the last one the last is repeated.
  SEQACCEL_INLINE void multiply(const float* keys, ptrdiff_t stride, ptrdiff_t count, float bias, float* logits) const {
    constexpr int L = kWordLanes;
    const float scale = 1.0f / sqrtf(float(d));
    const ptrdiff_t whole = d / L * L;
    for (ptrdiff_t i = 0; i < count; i += L) {
      Vec<float> sums[L] = {};
      for (int q = 0; q < L; q += 4) {
        const float* row[4];
        for (int j = 0; j < 4; ++j) row[j] = keys + min_of(i + q + j, count - 1) * stride;
        for (ptrdiff_t k = 0; k < whole; k += L) {
          const Vec<float> x = load(query + k);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) sums[q + j] += x * load(row[j] + k);
        }
        for (int j = 0; j < 4 && whole < d; ++j) {
          sums[q + j] += load(query + whole, int(d - whole)) * load(row[j] + whole, int(d - whole));
        }
      }
      transpose<float>(sums);
      Vec<float> logit = sums[0];
      for (int q = 1; q < L; ++q) logit += sums[q];
      store(logits + i, logit * scale + bias);
    }
  }

  // y = shrink * y + factors * values, in V vectors from element k on.
  template <int V>
  SEQACCEL_INLINE void add_values(const float* values, ptrdiff_t stride, ptrdiff_t count, const float* factors,
                                  float shrink, ptrdiff_t k) {
    constexpr int L = kWordLanes;
    const int last = int(min_of(L, d - k - (V - 1) * L));
    const auto some = [&](const float* p, int v) { return v + 1 < V ? load(p + v * L) : load_some(p + v * L, last); };
    Vec<float> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = some(y + k, v) * shrink;
    for (ptrdiff_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[v] += factors[i] * some(values + i * stride + k, v);
    }
    for (int v = 0; v < V; ++v) store_some(y + k + v * L, sum[v], v + 1 < V ? L : last);
  }

  // Adds keys and values [count, d], rows `stride` apart. `bias` is added to their logits.
  inline void add(const float* keys, const float* values, ptrdiff_t stride, ptrdiff_t count, float bias = 0.0f) {
    constexpr int L = kWordLanes;
    alignas(64) float factors[kKeys];
    for (; count > 0; count -= kKeys, keys += kKeys * stride, values += kKeys * stride) {
      const ptrdiff_t n = min_of(kKeys, count);
      multiply(keys, stride, n, bias, factors);
      Vec<float> highest = broadcast(most), sum = {};
      for (ptrdiff_t i = 0; i < n; i += L) {
        const Vec<float> logit = load(factors + i);
        highest = logit > highest ? logit : highest;
      }
      const float before = most;
      most = horizontal_max<float>(highest);
      const float shrink = exp_vec<float>(broadcast(before - most))[0];
      for (ptrdiff_t i = 0; i < n; i += L) {
        const Vec<float> factor = exp_vec<float>(load(factors + i) - most);
        store(factors + i, factor);
        sum += load_some(factors + i, int(min_of(L, n - i)));
      }
      total = total * shrink + horizontal_sum<float>(sum);
      ptrdiff_t k = 0;
      for (; k + 4 * L <= d; k += 4 * L) add_values<4>(values, stride, n, factors, shrink, k);
      for (; k < d; k += L) add_values<1>(values, stride, n, factors, shrink, k);
    }
  }
};

// x holds keys and values [rows, 2, key heads, d] and the skip queries [rows, heads, d]. The keys of the chunk are
// those in x, the ones before are in the ring.
inline void attention_layer(const SessionThread& t, const SessionLayer& l) {
  const ptrdiff_t B = t.run.batch, I = l.inputs, d = l.outputs / l.heads, queries_of_key = 2 * l.outputs / I;
  for (ptrdiff_t i = t.begin(t.rows() * l.heads); i < t.end(t.rows() * l.heads); ++i) {
    const ptrdiff_t row = i / l.heads, head = i % l.heads, s = row / B, b = row % B;
    const ptrdiff_t at = row * l.outputs + head * d, key = head / queries_of_key * d, value = key + I / 2;
    float* const y = static_cast<float*>(t.y) + at;
    memset(y, 0, size_t(d) * sizeof(float));
    RunningSoftmax softmax{t.skip + at, y, d};
    const ptrdiff_t in_chunk = min_of(s + 1, l.taps), time = l.position[b] + t.done;
    const float* const x = static_cast<const float*>(t.x) + ((s + 1 - in_chunk) * B + b) * I;
    softmax.add(x + key, x + value, B * I, in_chunk);
    const ptrdiff_t kept = min_of(l.taps - in_chunk, time), first = (time - kept) % l.slots,
                    to_end = min_of(kept, l.slots - first);
    const float* const ring = l.ring + b * l.slots * I;
    softmax.add(ring + first * I + key, ring + first * I + value, I, to_end);
    softmax.add(ring + key, ring + value, I, kept - to_end);
    for (ptrdiff_t k = 0; k < d; k += kWordLanes) {
      const int units = int(min_of(kWordLanes, d - k));
      store_some(y + k, load_some(y + k, units) / softmax.total + l.parameter * load_some(t.skip + at + k, units),
                 units);
    }
  }
  keep_inputs(t, l);
  t.wait();
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
