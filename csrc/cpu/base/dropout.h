// Vectors of dropout masks: see common/dropout.h.
#pragma once

#include "common/dropout.h"
#include "cpu/base/vec.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

template <typename T>
using Mask = typename VecTypes<T>::Int;
template <typename T>
using Bits = typename VecTypes<T>::Bits;

template <typename T>
SEQACCEL_INLINE Vec<T> zero_unless(Mask<T> mask, Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & mask);
}

// Which elements are kept: `counter` is kDropoutStep times the element plus the first half of its row's key, `second`
// the other half. Only the low 32 bits of the lanes count.
template <typename T>
SEQACCEL_INLINE Mask<T> dropout_keeps(Bits<T> counter, Bits<T> second, uint32_t threshold) {
  typedef decltype(counter[0] + counter[0]) Word;
  const Word word = Word(0xFFFFFFFFu);
  Bits<T> h = counter & word;
  h ^= h >> 16;
  h = (h * Word(0x21F0AAADu) + second) & word;
  h ^= h >> 15;
  h = (h * Word(0x735A2D97u)) & word;
  h ^= h >> 15;
  return (Mask<T>)(h >= Word(threshold));
}

}  // namespace seqaccel::SEQACCEL_ISA::inline base
