// The processor: which instruction set's kernels run, and what its second-level cache holds.
#pragma once

#include <cstddef>

namespace seqaccel::inline base {

// Whether a thread's share of weights is more than the second-level cache of a core holds beside what else passes.
bool beyond_l2(std::ptrdiff_t bytes);

enum class Isa { portable, avx2, avx512, avx512_bf16 };

// The instruction set in use: the best one of this processor, or what SEQACCEL_ISA or set_isa asked for.
Isa active_isa();

// Whether the processor is one of AMD's.
bool is_amd();

}  // namespace seqaccel::inline base

// Declare, outside of any namespace, the table of kernels that a room's *kernels.h defines once for each instruction
// set, and active_<table>(). The room's names for all instruction sets are known in its namespaces of each.
#define SEQACCEL_DECLARE_TABLE(isa, room, Type, table) \
  namespace seqaccel::isa::room {                      \
  using namespace seqaccel::room;                      \
  extern const Type table;                             \
  }
#if defined(__x86_64__)
#define SEQACCEL_DECLARE_TABLES(room, Type, table, widest) \
  SEQACCEL_DECLARE_TABLE(portable, room, Type, table)      \
  SEQACCEL_DECLARE_TABLE(avx2, room, Type, table)          \
  SEQACCEL_DECLARE_TABLE(avx512, room, Type, table)        \
  SEQACCEL_DECLARE_TABLE(avx512_bf16, room, Type, table)   \
  namespace seqaccel::room {                               \
  inline const Type& active_##table() {                    \
    switch (active_isa()) {                                \
      case Isa::avx512_bf16:                               \
        return widest::room::table;                        \
      case Isa::avx512:                                    \
        return avx512::room::table;                        \
      case Isa::avx2:                                      \
        return avx2::room::table;                          \
      default:                                             \
        return portable::room::table;                      \
    }                                                      \
  }                                                        \
  }
#else
#define SEQACCEL_DECLARE_TABLES(room, Type, table, widest)              \
  SEQACCEL_DECLARE_TABLE(portable, room, Type, table)                   \
  namespace seqaccel::room {                                            \
  inline const Type& active_##table() { return portable::room::table; } \
  }
#endif
#define SEQACCEL_DECLARE_KERNELS(room, Type, table) SEQACCEL_DECLARE_TABLES(room, Type, table, avx512)
// The same for a file that setup.py compiles for AVX-512 with BF16 and VNNI too (BF16_KERNELS).
#define SEQACCEL_DECLARE_KERNELS_BF16(room, Type, table) SEQACCEL_DECLARE_TABLES(room, Type, table, avx512_bf16)
