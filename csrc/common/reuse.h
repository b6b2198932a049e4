// Whether memory is kept for the next one who asks for as much. A build with sanitizers (SEQACCEL_SANITIZE in setup.py)
// keeps none and fills what is fresh with 0xFF, a NaN: reading past an end, after a free, or what nobody wrote shows.
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
