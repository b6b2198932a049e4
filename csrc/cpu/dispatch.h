// Which instruction set's kernels run.
#pragma once

namespace seqaccel {

enum class Isa { portable, avx2, avx512 };

// The best one this processor has, or what SEQACCEL_ISA or set_isa asked for.
Isa active_isa();

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
      case Isa::avx512:                       \
        return avx512::table;                 \
      case Isa::avx2:                         \
        return avx2::table;                   \
      default:                                \
        return portable::table;               \
    }                                         \
  }
#else
#define SEQACCEL_DECLARE_KERNELS(Type, table) \
  namespace portable {                        \
  extern const Type table;                    \
  }                                           \
  inline const Type& active_##table() { return portable::table; }
#endif

}  // namespace seqaccel
