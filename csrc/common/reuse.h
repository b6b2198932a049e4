// Whether freed memory is kept for the next request of its size. A build with sanitizers (SEQACCEL_SANITIZE in
// setup.py) keeps none, and fills fresh memory with 0xFF, which is a NaN: a read past an end, after a free, or of
// memory that nobody wrote then shows in the results.
#pragma once

#include <stddef.h>
#include <string.h>

namespace seqaccel {

#if defined(SEQACCEL_SANITIZE)
constexpr bool kReuse = false;
#else
constexpr bool kReuse = true;
#endif

static inline void fill_fresh(void* data, size_t bytes) {
  if (!kReuse && data != nullptr) memset(data, 0xFF, bytes);
}

}  // namespace seqaccel
