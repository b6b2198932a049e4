// Layers of a session without weights: functions of one and of two values, and what moves values. A `gather` puts
// pieces of other layers' outputs together. A `past` gives what a `keep` of the step before has kept.
#pragma once

#include <math.h>

#include "cpu/packed/dense.h"

namespace seqaccel::SEQACCEL_ISA::packed {

// y = of(x, skip), with vectors of values shared among the threads.
template <class Of>
SEQACCEL_INLINE void map_values(const SessionThread& t, const SessionLayer& l, Of of) {
  const float *const x = static_cast<const float*>(t.x), *const second = t.skip ? t.skip : x;
  const ptrdiff_t count = t.rows() * l.outputs, vectors = panel_count(count, kWordLanes);
  for (ptrdiff_t i = t.begin(vectors); i < t.end(vectors); ++i) {
    const ptrdiff_t at = i * kWordLanes;
    const int n = int(min_of(kWordLanes, count - at));
    store_some(static_cast<float*>(t.y) + at, of(load_some(x + at, n), load_some(second + at, n)), n);
  }
  t.wait();
}

inline void activation_layer(const SessionThread& t, const SessionLayer& l) {
  map_values(t, l, [&](Vec<float> x, Vec<float>) { return activate_as(l.activation, x, l.parameter); });
}

template <class Of>
SEQACCEL_INLINE Vec<float> each_lane(Vec<float> x, Of of) {
  alignas(64) float lanes[kWordLanes];
  store(lanes, x);
  for (int i = 0; i < kWordLanes; ++i) lanes[i] = of(lanes[i]);
  return load(lanes);
}

inline void unary_layer(const SessionThread& t, const SessionLayer& l) {
  const auto map = [&](auto of) { map_values(t, l, [&](Vec<float> x, Vec<float>) { return of(x); }); };
  const auto lanes = [&](auto of) { map([&](Vec<float> x) { return each_lane(x, of); }); };
  const Vec<float> limit = broadcast(l.parameter);
  switch (Unary(l.cell)) {
    case Unary::exp:
      return map([](Vec<float> x) { return exp_vec<float>(x); });
    case Unary::log:
      return lanes([](float x) { return logf(x); });
    case Unary::sqrt:
      return lanes([](float x) { return sqrtf(x); });
    case Unary::abs:
      return map([](Vec<float> x) { return (Vec<float>)((Words)x & 0x7FFFFFFFu); });
    case Unary::softplus:
      return lanes([](float x) { return (x < 0.0f ? 0.0f : x) + log1pf(expf(-fabsf(x))); });
    case Unary::reciprocal:
      return map([](Vec<float> x) { return 1.0f / x; });
    case Unary::at_least:
      return map([&](Vec<float> x) { return x < limit ? limit : x; });
    case Unary::at_most:
      return map([&](Vec<float> x) { return x > limit ? limit : x; });
  }
}

inline void binary_layer(const SessionThread& t, const SessionLayer& l) {
  switch (Binary(l.cell)) {
    case Binary::add:
      return map_values(t, l, [](Vec<float> a, Vec<float> b) { return a + b; });
    case Binary::subtract:
      return map_values(t, l, [](Vec<float> a, Vec<float> b) { return a - b; });
    case Binary::multiply:
      return map_values(t, l, [](Vec<float> a, Vec<float> b) { return a * b; });
    case Binary::divide:
      return map_values(t, l, [](Vec<float> a, Vec<float> b) { return a / b; });
    case Binary::maximum:  // NaN if either is
      return map_values(t, l, [](Vec<float> a, Vec<float> b) { return (a > b) | (a != a) ? a : b; });
    case Binary::minimum:
      return map_values(t, l, [](Vec<float> a, Vec<float> b) { return (a < b) | (a != a) ? a : b; });
  }
}

inline void gather_layer(const SessionThread& t, const SessionLayer& l) {
  const ptrdiff_t N = l.outputs;
  ptrdiff_t covered = 0;
  for (ptrdiff_t i = 0; i < l.move_count; ++i) covered += l.moves[i].count;
  for (ptrdiff_t row = t.begin(t.rows()); row < t.end(t.rows()); ++row) {
    float* const y = static_cast<float*>(t.y) + row * N;
    if (covered < N) memset(y, 0, size_t(N) * sizeof(float));
    for (ptrdiff_t i = 0; i < l.move_count; ++i) {
      const SessionMove& move = l.moves[i];
      const SessionLayer& from = t.run.layers[move.source < 0 ? 0 : move.source];
      const float* const x = move.source < 0 ? static_cast<const float*>(t.x) + row * l.inputs * l.frames
                                             : from.output + row * from.outputs * from.frames;
      if (move.count == 1) {
        y[move.to] = x[move.from];
      } else {
        memcpy(y + move.to, x + move.from, size_t(move.count) * sizeof(float));
      }
    }
  }
  t.wait();
}

inline void past_layer(const SessionThread& t, const SessionLayer& l) {
  for (ptrdiff_t b = t.begin(t.run.batch); b < t.end(t.run.batch); ++b) {
    memcpy(static_cast<float*>(t.y) + b * l.outputs, l.c + b * l.stride, size_t(l.outputs) * sizeof(float));
  }
  t.wait();
}

inline void keep_layer(const SessionThread& t, const SessionLayer& l) {
  const SessionLayer& past = t.run.layers[l.skip];
  for (ptrdiff_t b = t.begin(t.run.batch); b < t.end(t.run.batch); ++b) {
    if (!t.advances(b)) continue;
    memcpy(past.c + b * past.stride, static_cast<const float*>(t.x) + b * l.inputs, size_t(l.inputs) * sizeof(float));
  }
  t.wait();
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
