// How threads share the steps of a recurrence, and the memory they share.
#pragma once

#include <stdlib.h>

#include "isa.h"
#include "rnn_products.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqaccel {
namespace SEQACCEL_ISA {

constexpr ptrdiff_t kRowsPerThread = 8;

struct Barrier {
  alignas(64) int arrived;
  alignas(64) int phase;
};

inline void wait_for_all(Barrier& barrier, int threads) {
  if (threads == 1) return;
  const int phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.phase, phase + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins > 4096) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ __volatile__("yield");
#endif
    }
  }
}

// How `threads` share a layer: parts of the batch, and in each part groups of units.
struct Split {
  int parts, groups;
  int threads() const { return parts * groups; }
};

inline Split split_work(int threads, ptrdiff_t steps, ptrdiff_t batch, ptrdiff_t weights, ptrdiff_t weight_bytes,
                        ptrdiff_t blocks) {
  if (double(steps) * double(batch) * double(weights) < 262144.0) return {1, 1};
  const ptrdiff_t rows = weight_bytes <= 262144 ? 1 : kRowsPerThread;
  int parts = threads;
  while (parts > 1 && (threads % parts != 0 || batch / parts < rows)) --parts;
  const ptrdiff_t useful = max_of(1, batch / parts * weights / 16384);  // about 0.5 us of work a step for each thread
  return {parts, int(min_of(threads / parts, min_of(useful, blocks)))};
}

// A thread's share: rows [b0, b1) of the batch, blocks [u0, u1), the barrier of its part.
struct Share {
  ptrdiff_t b0, b1, u0, u1;
  int part, group;
  bool idle;
};

inline Share share_of(const Split& split, int thread, ptrdiff_t batch, ptrdiff_t blocks) {
  Share share;
  share.part = thread / split.groups;
  share.group = thread % split.groups;
  share.idle = thread >= split.threads();
  share.b0 = batch * share.part / split.parts;
  share.b1 = batch * (share.part + 1) / split.parts;
  share.u0 = blocks * share.group / split.groups;
  share.u1 = blocks * (share.group + 1) / split.groups;
  return share;
}

// 64-byte aligned pieces of one allocation; measured first, handed out afterwards.
class Workspace {
 public:
  template <typename T>
  size_t reserve(ptrdiff_t count) {
    const size_t offset = bytes_;
    bytes_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  bool allocate() {
    constexpr size_t kHugePage = size_t(2) << 20;
    const size_t align = bytes_ >= 2 * kHugePage ? kHugePage : 64;
    base_ = static_cast<char*>(aligned_alloc(align, (bytes_ + align - 1) / align * align + align));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (base_ != nullptr && align == kHugePage) madvise(base_, bytes_ / align * align, MADV_HUGEPAGE);
#endif
    return base_ != nullptr;
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { free(base_); }

 private:
  char* base_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace SEQACCEL_ISA
}  // namespace seqaccel
