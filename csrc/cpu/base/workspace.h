// The memory that the threads of a kernel share.
#pragma once

#include <stdlib.h>

#include "common/reuse.h"
#include "cpu/base/block.h"
#include "cpu/base/isa.h"

namespace seqaccel::SEQACCEL_ISA::inline base {

// Pieces of one allocation, aligned to 64 bytes: call reserve() for all, then allocate(). The largest block of at most
// kKept bytes is kept for the next call (block.h).
class Workspace {
 public:
  // Reserves room for `count` values. allocate() sets `piece`.
  template <typename T>
  void reserve(T*& piece, ptrdiff_t count) {
    if (count_ == kPieces) __builtin_trap();
    pieces_[count_++] = {&piece, bytes_};
    bytes_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
  }
  // Returns false if there is not enough memory.
  bool allocate() {
    if (!take_block()) return false;
    for (int i = 0; i < count_; ++i) {
      const char* const at = reinterpret_cast<char*>(block_ + 1) + pieces_[i].offset;
      memcpy(pieces_[i].pointer, &at, sizeof(at));
    }
    return true;
  }
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (kReuse && block_ != nullptr && block_->size <= kKept)
      block_ = __atomic_exchange_n(&kept(), block_, __ATOMIC_ACQ_REL);
    free(block_);
  }

 private:
  static constexpr size_t kKept = size_t(64) << 20;
  static constexpr int kPieces = 16;
  struct alignas(64) Head {
    size_t size;  // bytes after this header
  };
  struct Piece {
    void* pointer;  // T**
    size_t offset;
  };
  static Head*& kept() {
    static Head* block = nullptr;
    return block;
  }
  bool take_block() {
    block_ = __atomic_exchange_n(&kept(), nullptr, __ATOMIC_ACQ_REL);
    if (block_ != nullptr && block_->size >= bytes_) return true;
    free(block_);
    const auto [data, size] = new_block(bytes_ + sizeof(Head));
    block_ = static_cast<Head*>(data);
    if (block_ != nullptr) block_->size = size - sizeof(Head);
    return block_ != nullptr;
  }

  Head* block_ = nullptr;
  size_t bytes_ = 0;
  Piece pieces_[kPieces];
  int count_ = 0;
};

}  // namespace seqaccel::SEQACCEL_ISA::inline base
