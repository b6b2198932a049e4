// Hierarchical attention of streams. Each step adds its key and value to the ring of level 0 and to the sums of the
// open node of level 1. A node is complete with its last step: its weighted means go into its level's ring and into the
// sums of the level above. A query attends to what it sees of each level: a contiguous piece of each ring.
#pragma once

#include "cpu/packed/attention.h"

namespace seqaccel::SEQACCEL_ISA::packed {

// A key head of a stream: its memory, and where its layer's levels lie in it.
struct StreamPyramid {
  const SessionLayer& l;
  ptrdiff_t head, d;
  float* memory;

  // The weight of a child in the open node of a level, exp(score - most), where `most` is the largest score so far. The
  // sums before it are to be multiplied by `decay`.
  SEQACCEL_INLINE float weight_of(const float* key, ptrdiff_t level, float& most, float& decay) const {
    decay = 1.0f;
    if (l.weights == nullptr) return 1.0f;
    const float* const row = l.weights + ((min_of(level, l.pool_rows) - 1) * l.key_heads + head) * d;
    Vec<float> product = {};
    for (ptrdiff_t k = 0; k < d; k += kWordLanes) {
      const int n = int(min_of(kWordLanes, d - k));
      product += load_some(row + k, n) * load_some(key + k, n);
    }
    const float score = horizontal_sum<float>(product) / sqrtf(float(d)), before = most;
    most = score > most ? score : most;
    const float shift = most == -INFINITY ? 0.0f : most;
    decay = exp_vec<float>(broadcast(before - shift))[0];
    return exp_vec<float>(broadcast(score - shift))[0];
  }

  // Adds the key and value of step `time`. `pooled` [2, d] is workspace.
  inline void add(ptrdiff_t time, const float* key, const float* value, float* pooled) const {
    const size_t bytes = size_t(d) * sizeof(float);
    for (ptrdiff_t i = 0;; ++i) {
      const SessionLevel& level = l.level[i];
      if (level.slots > 0) {
        float* const slot = memory + level.keys + time / level.span % level.slots * d;
        memcpy(slot, key, bytes);
        memcpy(slot + level.slots * d, value, bytes);
      }
      if (i + 1 == l.levels) return;
      const SessionLevel& above = l.level[i + 1];
      float *const sums = memory + above.sums, *const moments = memory + above.moments;
      float decay;
      const float weight = weight_of(key, i + 1, moments[0], decay);
      const float total = moments[1] * decay + weight;
      for (ptrdiff_t k = 0; k < d; k += kWordLanes) {
        const int n = int(min_of(kWordLanes, d - k));
        store_some(sums + k, load_some(sums + k, n) * decay + load_some(key + k, n) * weight, n);
        store_some(sums + d + k, load_some(sums + d + k, n) * decay + load_some(value + k, n) * weight, n);
      }
      moments[1] = total;
      if ((time + 1) % above.span != 0) return;
      for (ptrdiff_t k = 0; k < 2 * d; k += kWordLanes) {
        const int n = int(min_of(kWordLanes, 2 * d - k));
        store_some(pooled + k, load_some(sums + k, n) / total, n);
      }
      memset(sums, 0, 2 * bytes);
      moments[0] = -INFINITY;
      moments[1] = 0.0f;
      key = pooled;
      value = pooled + d;
    }
  }

  // Writes the output y [d] of a query [d] at step `time`, which has been added.
  inline void attend(ptrdiff_t time, const float* query, float* y) const {
    memset(y, 0, size_t(d) * sizeof(float));
    RunningSoftmax softmax{query, y, d};
    for (ptrdiff_t i = 0; i < l.levels; ++i) {
      const SessionLevel& level = l.level[i];
      const ptrdiff_t end = i == 0 ? time + 1 : time / level.span - l.local_blocks + 1;
      if (end <= 0) break;
      // Nodes of the ring, and those whose parent is too near to be seen itself.
      ptrdiff_t begin = max_of(0, (time + 1) / level.span - level.slots);
      const ptrdiff_t parent = level.above ? time / level.above - l.local_blocks + 1 : 0;
      if (parent > 0) begin = max_of(begin, parent * (level.above / level.span));
      if (begin >= end) continue;
      const float* const keys = memory + level.keys;
      const ptrdiff_t first = begin % level.slots, to_end = min_of(end - begin, level.slots - first);
      softmax.add(keys + first * d, keys + (level.slots + first) * d, d, to_end, level.bias);
      softmax.add(keys, keys + level.slots * d, d, end - begin - to_end, level.bias);
    }
    for (ptrdiff_t k = 0; k < d; k += kWordLanes) {
      const int n = int(min_of(kWordLanes, d - k));
      store_some(y + k, load_some(y + k, n) / softmax.total, n);
    }
  }
};

// The cosines [d / 2] and sines [d / 2] of the angles of a step.
inline void angles_of(const SessionLayer& l, ptrdiff_t time, ptrdiff_t d, float* angles) {
  for (ptrdiff_t k = 0; k < d / 2; ++k) {
    const double angle = double(time) * l.frequencies[k];
    angles[k] = float(cos(angle));
    angles[d / 2 + k] = float(sin(angle));
  }
}

// Turns a vector [d] by the angles: elements k and d / 2 + k are a pair.
inline void turn(const float* x, const float* angles, ptrdiff_t d, float* y) {
  const ptrdiff_t half = d / 2;
  for (ptrdiff_t k = 0; k < half; k += kWordLanes) {
    const int n = int(min_of(kWordLanes, half - k));
    const Vec<float> c = load_some(angles + k, n), s = load_some(angles + half + k, n), first = load_some(x + k, n),
                     second = load_some(x + half + k, n);
    store_some(y + k, first * c - second * s, n);
    store_some(y + half + k, second * c + first * s, n);
  }
}

// x holds queries [rows, heads, d], keys and values [rows, key heads, d].
inline void hierarchical_layer(const SessionThread& t, const SessionLayer& l) {
  const ptrdiff_t B = t.run.batch, G = l.key_heads, d = l.outputs / l.heads, queries = l.heads / G;
  float* const angles = reinterpret_cast<float*>(t.scratch + t.run.gathered_at);
  float *const pooled = angles + d, *const turned = pooled + 2 * d;  // a key or a query
  const ptrdiff_t begin = t.begin(B * G), end = t.end(B * G);
  for (ptrdiff_t first = begin, last; first < end; first = last) {
    const ptrdiff_t b = first / G;
    last = min_of(end, (b + 1) * G);
    for (ptrdiff_t s = 0; s < t.steps; ++s) {
      const float* const x = static_cast<const float*>(t.x) + (s * B + b) * l.inputs;
      float* const y = static_cast<float*>(t.y) + (s * B + b) * l.outputs;
      const ptrdiff_t time = l.position[b] + t.done + s;
      if (t.advances(b) && l.frequencies) angles_of(l, time, d, angles);
      const auto positioned = [&](const float* vector) {
        if (l.frequencies == nullptr) return vector;
        turn(vector, angles, d, turned);
        return static_cast<const float*>(turned);
      };
      for (ptrdiff_t g = first % G; g < first % G + last - first; ++g) {
        if (!t.advances(b)) {
          memset(y + g * queries * d, 0, size_t(queries * d) * sizeof(float));
          continue;
        }
        const StreamPyramid pyramid{l, g, d, l.ring + b * l.kept + g * l.hidden};
        const float* const key = x + l.outputs + g * d;
        pyramid.add(time, positioned(key), key + G * d, pooled);
        for (ptrdiff_t h = g * queries; h < (g + 1) * queries; ++h) {
          pyramid.attend(time, positioned(x + h * d), y + h * d);
        }
      }
    }
  }
  t.wait();
}

// Adds to each row the row of the table that belongs to its stream's age.
inline void positions_layer(const SessionThread& t, const SessionLayer& l) {
  const ptrdiff_t N = l.outputs;
  for (ptrdiff_t i = t.begin(t.rows()); i < t.end(t.rows()); ++i) {
    const ptrdiff_t b = i % t.run.batch, time = l.position[b] + t.done + i / t.run.batch;
    const float* const row = l.weights + (t.advances(b) ? time : 0) * N;
    for (ptrdiff_t k = 0; k < N; k += kWordLanes) {
      const int n = int(min_of(kWordLanes, N - k));
      store_some(static_cast<float*>(t.y) + i * N + k,
                 load_some(static_cast<const float*>(t.x) + i * N + k, n) + load_some(row + k, n), n);
    }
  }
  t.wait();
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
