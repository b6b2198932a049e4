// How threads share the steps of a recurrence.
#pragma once

#include "cpu/base/isa.h"
#include "cpu/base/threads.h"
#include "cpu/base/workspace.h"
#include "cpu/rnn/products.h"
#include "cpu/rnn/rnn.h"

namespace seqaccel::SEQACCEL_ISA::rnn {

// When to split the batch rather than the units. Parts of the batch never wait for each other. With kRowsPerThread rows
// each they are as fast as a split of the units. Beside a process that spins on every core they take twice their time;
// a split of the units, with a barrier per step, takes 5.7 times. Fewer rows are enough if all weights fit in a core's
// L2: threads that split the units exchange dL/dpre in each backward step, at 13 ns per line of 64 bytes (Intel, 2 MB
// of L2 per core: a step takes two thirds longer at 16 rows, H = 256). Two rows are enough with few weights (RNN (T, B,
// H) = (128, 4, 128): 0.20 ms instead of 0.25), and in the backward pass with more.
constexpr ptrdiff_t kRowsFromL2 = 4, kFewWeights = ptrdiff_t(128) << 10;
inline ptrdiff_t backward_rows(ptrdiff_t outputs) { return outputs < 256 ? 2 : kRowsFromL2; }
constexpr ptrdiff_t kDirectRows = 64;  // up to so many rows in all, packing a weight costs more than it gains
constexpr ptrdiff_t kAheadRows = 48;   // rows of W_ih x that are computed at a time

struct Barrier {
  alignas(64) int arrived;
  int sleepers;
  int haste;  // shortens the spins of threads that wait: see kSpins
  alignas(64) int phase;
};

// How often a thread spins before it sleeps: about 50 us, as much as sleeping costs. Beside other busy processes a
// thread that spins uses up its own share of the cores. So each wait that was in vain halves the spins, and kCalm
// others double them again. (128 steps of 10 us on two threads, a dozen processes on two cores: 12 ms; 32 ms with all
// spins, 24 ms with a sixteenth, 46 ms with sched_yield after all of them.)
constexpr int kSpins = 4096, kCalm = 128, kMostHaste = 4 * kCalm;

inline void wait_for_all(Barrier& barrier, int threads) {
  if (threads == 1) return;
  const int phase = __atomic_load_n(&barrier.phase, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_exchange_n(&barrier.phase, phase + 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&barrier.sleepers, __ATOMIC_SEQ_CST) > 0) wake_all(&barrier.phase);
    return;
  }
  const int haste = __atomic_load_n(&barrier.haste, __ATOMIC_RELAXED), most = kSpins >> (haste / kCalm);
  int spins = 0;
  for (; __atomic_load_n(&barrier.phase, __ATOMIC_ACQUIRE) == phase; ++spins) {
    if (spins >= most) {
      __atomic_add_fetch(&barrier.sleepers, 1, __ATOMIC_SEQ_CST);
      sleep_while(&barrier.phase, phase);
      __atomic_sub_fetch(&barrier.sleepers, 1, __ATOMIC_SEQ_CST);
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ __volatile__("yield");
#endif
    }
  }
  const int next = spins > most ? haste + kCalm : haste - 1;
  if (next >= 0 && next <= kMostHaste) __atomic_store_n(&barrier.haste, next, __ATOMIC_RELAXED);
}

// How `threads` share a layer: parts of the batch, and in each part groups of units.
struct Split {
  int parts, groups;
  int threads() const { return parts * groups; }
};

inline Split split_work(int threads, ptrdiff_t steps, ptrdiff_t batch, ptrdiff_t weights, ptrdiff_t weight_bytes,
                        ptrdiff_t blocks, ptrdiff_t rows_from_l2 = kRowsFromL2) {
  if (double(steps) * double(batch) * double(weights) < 262144.0) return {1, 1};
  const ptrdiff_t near = weight_bytes <= kFewWeights ? 2 : rows_from_l2;
  const ptrdiff_t rows = beyond_l2(weight_bytes) ? kRowsPerThread : near;
  int parts = threads;
  while (parts > 1 && (threads % parts != 0 || batch / parts < rows)) --parts;
  const ptrdiff_t useful = max_of(1, batch / parts * weights / 16384);  // about 0.5 us of work per step and thread
  return {parts, int(min_of(threads / parts, min_of(useful, blocks)))};
}

// A thread's share: rows [b0, b1) of the batch, and the number of its group of units.
struct Share {
  ptrdiff_t b0, b1;
  int part, group;
  bool idle;
};

inline Share share_of(const Split& split, int thread, ptrdiff_t batch) {
  Share share;
  share.part = thread / split.groups;
  share.group = thread % split.groups;
  share.idle = thread >= split.threads();
  share.b0 = batch * share.part / split.parts;
  share.b1 = batch * (share.part + 1) / split.parts;
  return share;
}

}  // namespace seqaccel::SEQACCEL_ISA::rnn
