// What the kernels of all scans share: one pass over memory each way, no barrier.
//
// The columns (batch x channels) are independent, so they are what threads share. A thread takes a block of columns and
// walks through time; at each step it passes over its columns in memory order, so that every array is read and written
// as a stream, consecutive vectors are independent (no latency of the recurrence shows) and the carried state, kept in
// memory, stays in L1. Walking one vector of columns through all of time instead would touch a new page at every step.
#pragma once

#include "cpu/base/isa.h"

namespace seqaccel::SEQACCEL_ISA::scan {

constexpr int64_t kBlockColumns = 1024;       // 4 KB a row of floats: a handful of such rows fit L1
constexpr int64_t kSerialElements = 1 << 14;  // less work than this is done faster than a team of threads wakes up

// Columns a block has, so that every thread gets one; a multiple of 64 bytes.
template <typename T>
inline int64_t block_columns(int64_t columns, int64_t tasks, int threads) {
  const int64_t line = 64 / int64_t(sizeof(T));
  const int64_t blocks_wanted = tasks >= threads ? 1 : (threads + tasks - 1) / tasks;
  int64_t width = (columns + blocks_wanted - 1) / blocks_wanted;
  width = (width + line - 1) / line * line;
  return width < kBlockColumns ? width : kBlockColumns;
}

}  // namespace seqaccel::SEQACCEL_ISA::scan
