// Layers of a session that are one product without a recurrent state: linear layers and causal convolutions. The same
// pass applies the activation and adds the skip. A convolution keeps its past inputs in a ring.
#pragma once

#include "cpu/base/activation.h"
#include "cpu/packed/thread.h"

namespace seqaccel::SEQACCEL_ISA::packed {

// Applies an activation of one value.
inline Vec<float> activate_as(Activation which, Vec<float> x, float parameter) {
  switch (which) {
#define SEQACCEL_CASE(kind) \
  case Activation::kind:    \
    return activate<float, Activation::kind>(x, parameter);
    SEQACCEL_CASE(relu)
    SEQACCEL_CASE(leaky_relu)
    SEQACCEL_CASE(silu)
    SEQACCEL_CASE(gelu)
    SEQACCEL_CASE(gelu_tanh)
    SEQACCEL_CASE(tanh)
    SEQACCEL_CASE(sigmoid)
    SEQACCEL_CASE(elu)
    SEQACCEL_CASE(hardswish)
#undef SEQACCEL_CASE
    default:
      return x;
  }
}

// Adds the skip, applies the relu and stores the units.
SEQACCEL_INLINE void put_out(const SessionThread& t, const SessionLayer& l, ptrdiff_t row, ptrdiff_t unit,
                             Vec<float> value) {
  const int units = int(min_of(kWordLanes, l.outputs - unit));
  if (t.skip) value += load_some(t.skip + row * l.outputs + unit, units);
  if (l.relu) value = value < 0.0f ? Vec<float>{} : value;
  t.store_output(row, l.outputs, unit, value, units);
}

// A thread's share of a product. The threads share the blocks of units, or the rows where the blocks are too few.
struct DenseShare {
  ptrdiff_t blocks[2], rows[2];
  DenseShare(const SessionThread& t, const SessionMatrix& m) {
    const bool by_rows = m.blocks < t.team && t.rows() >= 4 * t.team;
    blocks[0] = by_rows ? 0 : t.begin(m.blocks);
    blocks[1] = by_rows ? m.blocks : t.end(m.blocks);
    rows[0] = by_rows ? t.begin(t.rows()) : 0;
    rows[1] = by_rows ? t.end(t.rows()) : t.rows();
  }
};

// x begins with row `first`.
inline void dense_layer(const SessionThread& t, const SessionLayer& l, const WordRows& x, ptrdiff_t first = 0) {
  constexpr int L = kWordLanes;
  const SessionMatrix& m = l.matrices[0];
  const ptrdiff_t V = m.vectors, N = l.outputs;
  const bool gated = m.interleaved;
  const auto biased = [&](const float* sum, ptrdiff_t row) {
    const int units = int(min_of(L, N - row % N));
    return l.bias ? load(sum) + load_some(l.bias + row, units) : load(sum);
  };
  const DenseShare share(t, m);
  alignas(64) float sums[kRowChunk * 4 * L];
  for (ptrdiff_t u = share.blocks[0]; u < share.blocks[1]; ++u) {
    for (ptrdiff_t r = share.rows[0]; r < share.rows[1]; r += kRowChunk) {
      const ptrdiff_t rows = min_of(kRowChunk, share.rows[1] - r);
      session_product(m, u, 0, x, r - first, rows, sums);
      for (ptrdiff_t i = 0; i < rows; ++i) {
        const float* const sum = sums + i * V * L;
        if (gated) {
          const Vec<float> value = biased(sum, u * L), gate = sigmoid_vec<float>(biased(sum + L, N + u * L));
          put_out(t, l, r + i, u * L, gate * (l.activation == Activation::gated ? tanh_vec<float>(value) : value));
          continue;
        }
        for (ptrdiff_t v = 0; v < V && (u * V + v) * L < N; ++v) {
          const ptrdiff_t unit = (u * V + v) * L;
          put_out(t, l, r + i, unit, activate_as(l.activation, biased(sum + v * L, unit), l.parameter));
        }
      }
    }
  }
  t.wait();
}

// Finds the input that tap k of output (s, b) sees. It lies in the chunk or in the ring.
SEQACCEL_INLINE const float* tap_of(const SessionThread& t, const SessionLayer& l, ptrdiff_t s, ptrdiff_t b,
                                    ptrdiff_t k) {
  const ptrdiff_t before = (l.taps - 1 - k) * l.dilation;
  if (before <= s) return static_cast<const float*>(t.x) + ((s - before) * t.run.batch + b) * l.inputs;
  return l.ring + (b * l.slots + (l.position[b] + t.done + s - before + l.slots) % l.slots) * l.inputs;
}

// Puts into the ring the inputs that later outputs see. No thread reads their slots in this chunk.
inline void keep_inputs(const SessionThread& t, const SessionLayer& l) {
  const ptrdiff_t B = t.run.batch, seen = min_of((l.taps - 1) * l.dilation, t.steps);
  for (ptrdiff_t i = t.begin(seen * B); i < t.end(seen * B); ++i) {
    const ptrdiff_t s = t.steps - seen + i / B, b = i % B;
    if (!t.advances(b)) continue;
    memcpy(l.ring + (b * l.slots + (l.position[b] + t.done + s) % l.slots) * l.inputs, tap_of(t, l, s, b, l.taps - 1),
           size_t(l.inputs) * sizeof(float));
  }
}

// The matrix multiplies rows that hold all taps of an output, one after the other.
inline void conv_layer(const SessionThread& t, const SessionLayer& l) {
  const DenseShare share(t, l.matrices[0]);
  const ptrdiff_t width = l.taps * l.inputs, B = t.run.batch;
  float* const gathered = reinterpret_cast<float*>(t.scratch + t.run.gathered_at);
  for (ptrdiff_t r = share.rows[0]; r < share.rows[1]; ++r) {
    for (ptrdiff_t k = 0; k < l.taps; ++k) {
      memcpy(gathered + (r - share.rows[0]) * width + k * l.inputs, tap_of(t, l, r / B, r % B, k),
             size_t(l.inputs) * sizeof(float));
    }
  }
  keep_inputs(t, l);
  const WordRows x = prepare_rows(l.matrices[0].precision, gathered, width, width, share.rows[1] - share.rows[0],
                                  t.scratch, reinterpret_cast<float*>(t.scratch + t.run.scales_at));
  dense_layer(t, l, x, share.rows[0]);
}

inline void depthwise_layer(const SessionThread& t, const SessionLayer& l) {
  constexpr int L = kWordLanes;
  const ptrdiff_t N = l.outputs;
  for (ptrdiff_t i = t.begin(t.rows()); i < t.end(t.rows()); ++i) {
    for (ptrdiff_t unit = 0; unit < N; unit += L) {
      const int units = int(min_of(L, N - unit));
      Vec<float> sum = l.bias ? load_some(l.bias + unit, units) : Vec<float>{};
      for (ptrdiff_t k = 0; k < l.taps; ++k) {
        const float* const x = tap_of(t, l, i / t.run.batch, i % t.run.batch, k);
        sum += load_some(l.weights + k * N + unit, units) * load_some(x + unit, units);
      }
      put_out(t, l, i, unit, activate_as(l.activation, sum, l.parameter));
    }
  }
  keep_inputs(t, l);
  t.wait();
}

}  // namespace seqaccel::SEQACCEL_ISA::packed
