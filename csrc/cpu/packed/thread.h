// The view that one thread of a session's team has of its work.
#pragma once

#include "cpu/packed/products.h"
#include "cpu/rnn/team.h"

namespace seqaccel::SEQACCEL_ISA::packed {

constexpr ptrdiff_t kRowChunk = 24;  // rows between a product and its update: 6 KB of L1 for each segment

// What a thread knows while it runs a layer on a chunk.
struct SessionThread {
  const SessionRun& run;
  int thread, team;
  Barrier& barrier;
  uint32_t* scratch;
  ptrdiff_t done, steps;  // steps before the chunk, and in it
  const void* x;          // [steps, B, inputs]
  void* y;                // [steps, B, outputs]
  bool narrow_x, narrow_y;
  const float* skip;  // [steps, B, outputs], or null
  ptrdiff_t frames;   // rows of the layer per step and stream
  ptrdiff_t rows() const { return steps * run.batch * frames; }
  ptrdiff_t begin(ptrdiff_t count) const { return count * thread / team; }
  ptrdiff_t end(ptrdiff_t count) const { return count * (thread + 1) / team; }
  void wait() const { wait_for_all(barrier, team); }

  WordRows input_rows(Precision precision, ptrdiff_t K) const {
    if (narrow_x) return prepare_rows(static_cast<const uint16_t*>(x), K, rows(), scratch);
    return prepare_rows(precision, static_cast<const float*>(x), K, K, rows(), scratch,
                        reinterpret_cast<float*>(scratch + run.scales_at));
  }
  WordRows state_rows(Precision precision, const float* from, ptrdiff_t stride, ptrdiff_t K) const {
    return prepare_rows(precision, from, stride, K, run.batch, scratch + run.scratch_rows_at,
                        reinterpret_cast<float*>(scratch + run.scales_at) + run.chunk * run.batch);
  }
  bool advances(ptrdiff_t b) const { return run.advance == nullptr || run.advance[b]; }
  void store_output(ptrdiff_t row, ptrdiff_t width, ptrdiff_t unit, Vec<float> value, int units) const {
    if (!narrow_y) return store_some(static_cast<float*>(y) + row * width + unit, value, units);
    if (units == kWordLanes) {
      const Halves narrow = __builtin_convertvector(bfloat16_bits(value), Halves);
      memcpy(static_cast<uint16_t*>(y) + row * width + unit, &narrow, sizeof(narrow));
      return;
    }
    alignas(64) uint32_t bits[kWordLanes];
    store_words(bits, bfloat16_bits(value));
    for (int i = 0; i < units; ++i) static_cast<uint16_t*>(y)[row * width + unit + i] = uint16_t(bits[i]);
  }
};

}  // namespace seqaccel::SEQACCEL_ISA::packed
