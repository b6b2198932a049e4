// The memory that the threads of a kernel share.
#pragma once

#include <stdlib.h>

#include "common/reuse.h"
#include "cpu/base/isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqaccel::SEQACCEL_ISA::inline base {

// 64-byte aligned pieces of one allocation; measured first, handed out afterwards. The largest block of at most kKept
// bytes is kept for the next call, as fresh pages cost more than what is done in them: 16 MB of packed weights took
// 5.5 ms instead of 0.8.
class Workspace {
 public:
  template <typename T>
  size_t reserve(ptrdiff_t count) {
    const size_t offset = bytes_;
    bytes_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return offset;
  }
  bool allocate() {
    block_ = __atomic_exchange_n(&kept(), nullptr, __ATOMIC_ACQ_REL);
    if (block_ != nullptr && block_->size >= bytes_) return true;
    free(block_);
    const size_t size = bytes_ + sizeof(Block);
    const size_t align = size >= 2 * kHugePage ? kHugePage : 64;
    const size_t whole = (size + align - 1) / align * align;
    block_ = static_cast<Block*>(aligned_alloc(align, whole));
    if (block_ == nullptr) return false;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (align == kHugePage) madvise(block_, whole, MADV_HUGEPAGE);
#endif
    block_->size = whole - sizeof(Block);
    fill_fresh(block_ + 1, block_->size);
    return true;
  }
  template <typename T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(block_ + 1) + offset);
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
  static constexpr size_t kHugePage = size_t(2) << 20, kKept = size_t(64) << 20;
  struct alignas(64) Block {
    size_t size;
  };
  static Block*& kept() {
    static Block* block = nullptr;
    return block;
  }
  Block* block_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace seqaccel::SEQACCEL_ISA::inline base
