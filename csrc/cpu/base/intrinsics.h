// The processor's vector instructions.
#pragma once

#if defined(__x86_64__)
// GCC 12 takes the register that its own headers leave undefined on purpose for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
