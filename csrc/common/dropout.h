// Dropout masks that are recomputed instead of stored.
//
// Element t of row r (r counts all dimensions but the last) is kept when hash(t; key(seed, r)) >= round(p * 2^32). The
// key is splitmix64 of the seed and the row; the hash is a 32-bit multiply-xorshift finaliser with the key's halves
// added before the first and the second multiplication. seqaccel/reference/conv.py holds the same function in tensor
// arithmetic.
#pragma once

#include <stdint.h>

#include "common/host_device.h"

namespace seqaccel {

constexpr uint32_t kDropoutStep = 0x9E3779B9u;  // the hash begins with kDropoutStep * t + key.first

struct DropoutKey {
  uint32_t first, second;
};

static inline SEQACCEL_HOST_DEVICE DropoutKey dropout_key(uint64_t seed, uint64_t row) {
  uint64_t z = seed + (row + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return {uint32_t(z), uint32_t(z >> 32)};
}

// The least hash that is kept, and what the kept elements are multiplied by.
static inline uint32_t dropout_threshold(double p) {
  const uint64_t threshold = uint64_t(p * 4294967296.0 + 0.5);
  return threshold > 0xFFFFFFFFu ? 0xFFFFFFFFu : uint32_t(threshold);
}

static inline double dropout_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

}  // namespace seqaccel
