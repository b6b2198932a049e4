// Where the keys and values of a level of the pyramid lie.
#pragma once

#include "cpu/attention/attend.h"
#include "cpu/attention/hierarchical/hierarchical.h"

namespace seqaccel::SEQACCEL_ISA::attention::hierarchical {

// The children of a level are tokens, or nodes of the level below.
template <typename T>
SEQACCEL_INLINE Rows<T> level_rows(const Attention<T>& p, int64_t b, int64_t g, int level) {
  if (level == 0) return {p.key.at(b, g), p.value.at(b, g), p.key.time, p.value.time};
  const int64_t base = ((b * p.G + g) * p.pyramid.nodes + p.pyramid.offset[level]) * p.D;
  return {p.pooled_key + base, p.pooled_value + base, p.D, p.D};
}

template <typename T>
SEQACCEL_INLINE const T* pool_row(const Attention<T>& p, int64_t g, int level) {
  return p.pool_query + ((level < p.P ? level : p.P) - 1) * p.G * p.D + g * p.D;
}

}  // namespace seqaccel::SEQACCEL_ISA::attention::hierarchical
