#include "cpu/base/dispatch.h"

#include <unistd.h>

#include <cstdlib>
#include <string>

#include "common/tensor.h"
#include "cpu/base/threads.h"

namespace seqaccel::inline base {
namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  return bf16 ? Isa::avx512_bf16 : avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::portable;
#else
  return Isa::portable;
#endif
}

Isa parse_isa(const std::string& name) {
  const Isa best = best_isa();
  if (name == "auto") return best;
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) {
      STD_TORCH_CHECK(i <= int(best), "instruction set '", name,
                      "' is not available on this processor, which has up to '", kNames[int(best)], "'");
      return Isa(i);
    }
  }
  STD_TORCH_CHECK(false, "unknown instruction set '", name,
                  "': expected 'auto', 'portable', 'avx2', 'avx512' or 'avx512_bf16'");
  return best;
}

Isa& isa_slot() {
  static Isa isa = best_isa();
  return isa;
}

int64_t isa_number(bool best) { return int64_t(best ? best_isa() : active_isa()); }

int64_t threads() { return team_size(); }

void set_isa(Text name) { isa_slot() = parse_isa(name.value); }

}  // namespace

bool beyond_l2(std::ptrdiff_t bytes) {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const std::ptrdiff_t known = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const std::ptrdiff_t known = 0;
#endif
  return bytes > (known > 0 ? known : 1 << 20) / 4 * 3;
}

Isa active_isa() { return isa_slot(); }

bool is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(seqaccel, m) {
  // torch leaks a string that an operator of the stable ABI returns, so isa and best_isa are in Python (_extension.py).
  m.def("isa() -> str");
  m.def("best_isa() -> str");
  m.def("isa_number(bool best) -> int");
  m.def("set_isa(str name) -> ()");
  m.def("threads() -> int");  // the most that a recurrent layer runs on
}

STABLE_TORCH_LIBRARY_IMPL(seqaccel, CompositeExplicitAutograd, m) {
  m.impl("isa_number", TORCH_BOX(&isa_number));
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("threads", TORCH_BOX(&threads));
}

}  // namespace seqaccel::inline base
