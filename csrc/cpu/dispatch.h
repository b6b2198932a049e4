// The processor: which instruction set's kernels run, and what its second-level cache holds.
#pragma once

#include <cstddef>

namespace seqaccel {

// Whether a thread's share of weights is more than the second-level cache of a core holds beside what else passes.
bool beyond_l2(std::ptrdiff_t bytes);

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// The best one this processor has, or what SEQACCEL_ISA or set_isa asked for.
Isa active_isa();

// Whether the processor is one of AMD's.
bool is_amd();

// Declares the table of kernels that <name>_kernels.h defines once for each instruction set.
#if defined(__x86_64__)
#define SEQACCEL_DECLARE_KERNELS(Type, table) \
  namespace portable {                        \
  extern const Type table;                    \
  }                                           \
  namespace avx2 {                            \
  extern const Type table;                    \
  }                                           \
  namespace avx512 {                          \
  extern const Type table;                    \
  }                                           \
  inline const Type& active_##table() {       \
    switch (active_isa()) {                   \
      case Isa::avx512_bf16:                  \
      case Isa::avx512:                       \
        return avx512::table;                 \
      case Isa::avx2:                         \
        return avx2::table;                   \
      default:                                \
        return portable::table;               \
    }                                         \
  }

// The same for a kernel file that setup.py compiles for AVX-512 with BF16 and VNNI too (BF16_KERNELS).
#define SEQACCEL_DECLARE_KERNELS_BF16(Type, table) \
  namespace portable {                             \
  extern const Type table;                         \
  }                                                \
  namespace avx2 {                                 \
  extern const Type table;                         \
  }                                                \
  namespace avx512 {                               \
  extern const Type table;                         \
  }                                                \
  namespace avx512_bf16 {                          \
  extern const Type table;                         \
  }                                                \
  inline const Type& active_##table() {            \
    switch (active_isa()) {                        \
      case Isa::avx512_bf16:                       \
        return avx512_bf16::table;                 \
      case Isa::avx512:                            \
        return avx512::table;                      \
      case Isa::avx2:                              \
        return avx2::table;                        \
      default:                                     \
        return portable::table;                    \
    }                                              \
  }
#else
#define SEQACCEL_DECLARE_KERNELS(Type, table) \
  namespace portable {                        \
  extern const Type table;                    \
  }                                           \
  inline const Type& active_##table() { return portable::table; }
#define SEQACCEL_DECLARE_KERNELS_BF16(Type, table) SEQACCEL_DECLARE_KERNELS(Type, table)
#endif

}  // namespace seqaccel
