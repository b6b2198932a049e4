// Arithmetic of sizes, for kernels (which use no std:: templates) and for all else.
#pragma once

#include <cstddef>

namespace seqaccel::inline base {

static inline ptrdiff_t min_of(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t max_of(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }

// How many pieces of `width` hold n.
static inline ptrdiff_t panel_count(ptrdiff_t n, int width) { return (n + width - 1) / width; }

}  // namespace seqaccel::inline base
